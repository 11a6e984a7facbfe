"""FID and related metrics equal the formulas of others, and only statistics and weights
of their network are accepted.
"""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import linalg

from selfflow import cli
from selfflow.analysis import fid
from selfflow.analysis.extractors import open_inception
from selfflow.analysis.fid import (
    FidSet,
    Moments,
    fidelity,
    frechet_of,
    inception_score,
    open_set,
)
from selfflow.training.npz import arrays_of, recipe_in, text_array, write_arrays


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file with random weights for torch-fidelity's network."
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng():
        torch.manual_seed(0)
        patched.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        patched.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    file = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(network.state_dict(), file)
    return file


@pytest.fixture
def small(monkeypatch):
    "Statistics of 6 and 4 dimensions, which are quick to compute."
    monkeypatch.setitem(fid._DIMENSIONS, "mu", 6)
    monkeypatch.setitem(fid._DIMENSIONS, "mu_s", 4)
    rng = np.random.default_rng(1)
    return {
        name: Moments.of(rng.normal(size=(50, size)) @ rng.normal(size=(size, size)))
        for name, size in (("pool", 6), ("spatial", 4))
    }


def stored(small, **changed):
    arrays = {
        "mu": small["pool"].mean,
        "sigma": small["pool"].covariance,
        "mu_s": small["spatial"].mean,
        "sigma_s": small["spatial"].covariance,
        "recipe": text_array({"count": 50}),
    }
    return {name: v for name, v in (arrays | changed).items() if v is not None}


# the distance


@pytest.mark.parametrize(
    "counts, size", [((60, 40), 5), ((300, 200), 12), ((8, 9), 20)]
)
def test_the_distance_equals_that_of_torch_fidelity_and_scipy(counts, size):
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    rng = np.random.default_rng(size)
    mixed = rng.normal(size=(size, size))
    sets = [rng.normal(i, 1 + i, size=(n, size)) @ mixed for i, n in enumerate(counts)]
    first, second = (Moments.of(values, block=7) for values in sets)
    stats = [theirs.fid_features_to_statistics(torch.from_numpy(v)) for v in sets]
    for ours, expected_moments in zip((first, second), stats, strict=True):
        np.testing.assert_allclose(
            ours.mean, expected_moments["mu"], rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(
            ours.covariance, expected_moments["sigma"], atol=1e-9
        )
    expected = theirs.fid_statistics_to_metric(*stats, False)
    value = frechet_of(first, second)
    assert value == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    if min(counts) > size:  # SciPy's root needs full rank
        root = linalg.sqrtm(first.covariance @ second.covariance).real
        means = np.square(first.mean - second.mean).sum()
        trace = np.trace(first.covariance + second.covariance - 2 * root)
        assert value == pytest.approx(means + trace, rel=1e-8)
    assert frechet_of(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_of(second, first) == pytest.approx(value, rel=1e-8)


def test_the_inception_score_equals_that_of_torch_fidelity():
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.randn(40, 11, generator=torch.Generator().manual_seed(0))
    expected = theirs.isc_features_to_metric(logits, splits=1, shuffle=False)
    ours = inception_score(logits.double().softmax(1))
    assert ours == pytest.approx(expected["inception_score_mean"], rel=1e-9)


# files


def test_moments_survive_a_file_unchanged(small, tmp_path):
    write_arrays(tmp_path / "a.npz", stored(small))
    opened = open_set(tmp_path / "a.npz")
    assert np.array_equal(opened.pool.covariance, small["pool"].covariance)
    assert opened.pool.count == 50
    assert opened.recipe == {"count": 50}
    another_set = FidSet(
        tmp_path / "b.npz", Moments.of(np.eye(6)), Moments.of(np.eye(4))
    )
    computed = FidSet(tmp_path / "a.npz", small["pool"], small["spatial"])
    by_file = fidelity(another_set, opened)
    in_memory = fidelity(another_set, computed)
    assert by_file.values == in_memory.values
    assert set(by_file.values) == {"FID", "sFID"}
    # a mean and a covariance cannot tell which samples are near which
    assert (
        "a.npz holds only mean and covariance" in by_file.missing["precision, recall"]
    )
    assert "not computed" in str(by_file)
    assert "reference a.npz" in str(by_file)


SYMMETRIC = np.eye(6)
TWISTED = SYMMETRIC + np.triu(np.ones((6, 6)), 1)
NAN = np.where(SYMMETRIC, np.nan, 0)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"sigma": None}, "has mu, but no sigma"),
        ({"mu_s": None}, "has sigma_s, but no mu_s"),
        ({"mu": np.zeros(7)}, "features of another network"),
        ({"sigma": np.eye(7)}, "features of another network"),
        ({"sigma": NAN}, "NaN or infinity"),
        ({"sigma": TWISTED}, "not symmetric"),
        ({"sigma": -SYMMETRIC}, "trace is negative"),
        ({"mu": np.zeros(6, np.int64)}, "expected floats"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "expected images"),
        ({"arr_0": np.zeros((2, 4, 4, 4), np.uint8)}, "expected images"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "give the weights"),
        ({"arr_0": np.zeros((2, 768), np.float32)}, "expected images"),
    ],
)
def test_files_of_another_network_are_refused(small, tmp_path, changed, words):
    write_arrays(tmp_path / "x.npz", stored(small, **changed))
    with pytest.raises(ValueError, match=words):
        open_set(tmp_path / "x.npz")


def test_damaged_and_dangerous_files_are_refused(tmp_path):
    file = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        arrays_of(file)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as an npz file"):
        arrays_of(file)
    np.savez(file, arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="holds objects, which are never decoded"):
        arrays_of(file)
    np.savez(file, other=np.zeros(3))
    with pytest.raises(ValueError, match="neither arr_0 nor mu and sigma, only other"):
        open_set(file)
    # a header that promises more than the file has
    np.savez(tmp_path / "whole.npz", arr_0=np.zeros((4, 2, 2, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", content[:-5])
    with pytest.raises(ValueError, match="ends early; its header promises 4 rows"):
        arrays_of(file)["arr_0"].whole()
    np.savez(file, arr_0=np.zeros((4, 2, 2, 0), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(4, 2, 2, 0\), which cannot be used"):
        arrays_of(file)
    # one byte of the content is changed
    np.savez(file, arr_0=np.zeros((50, 40, 40, 3), np.uint8))
    raw = bytearray(file.read_bytes())
    raw[200_000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="arr_0 in .* is damaged: Bad CRC-32"):
        arrays_of(file)["arr_0"].whole()


def test_features_that_are_not_finite_or_too_few_are_refused():
    with pytest.raises(ValueError, match="features hold NaN or infinity"):
        Moments.of(np.array([[0.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(n, d\)"):
        Moments.of(np.zeros((1, 3)))


# the network and the commands


def test_features_of_sfid_are_a_branch_of_the_network_with_channels_last(weights):
    network = open_inception(weights, batch=2)
    images = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    pooled, spatial = network(images)
    layer = network.network.Mixed_6d.branch1x1
    maps = []
    hook = layer.register_forward_hook(lambda module, inputs, out: maps.append(out))
    expected = network.network(images)[0]
    hook.remove()
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
    assert spatial.shape == (3, 17 * 17 * 7)
    place = spatial.reshape(3, 17, 17, 7)[1, 4, 9]
    torch.testing.assert_close(place, maps[0][1, :7, 4, 9], rtol=1e-4, atol=1e-5)
    assert not layer._forward_hooks
    assert not network.recipe["published weights"]


def test_the_commands_lead_from_a_run_to_its_fid(
    runs, weights, tmp_path, capsys, monkeypatch
):
    run = str(runs["tiny"].path)
    inception = ["--extractor", str(weights)]
    reference = str(tmp_path / "own.npz")
    samples = tmp_path / "samples.npz"
    on_cpu = ["--device", "cpu"]
    cli.main(["reference", run, reference, "--count", "6", *inception, *on_cpu])
    cli.main(
        ["sample", run, "--npz", str(samples), "--n", "5", "--steps", "1", *on_cpu]
    )
    with np.load(reference) as file:  # ADM's form
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} < set(file)
        assert file["arr_0"].shape == (6, 8, 8, 3)
        assert file["arr_0"].dtype == np.uint8
        assert file["sigma_s"].shape == (2023, 2023)
        np.testing.assert_allclose(file["sigma"], file["sigma"].T)
    with pytest.raises(SystemExit):
        cli.main(["metrics", run, "--reference", reference, *on_cpu])
    with pytest.raises(SystemExit):
        cli.main(["metrics", str(samples), *on_cpu])
    captured = capsys.readouterr()
    assert "give its weights: --extractor FILE" in captured.err
    assert "measure it against --reference FILE" in captured.err
    # the distance itself is tested above; in 2048 dimensions it is slow
    monkeypatch.setattr(fid, "frechet_of", lambda first, second: 7.0)
    cli.main(["metrics", str(samples), "--reference", reference, *inception, *on_cpu])
    captured = capsys.readouterr().out
    assert "5 images are fewer than the 2,048 dimensions" in captured
    assert "weights.safetensors is not the published file" in captured
    result = json.loads((tmp_path / "samples-against-own.json").read_text())
    assert set(result["values"]) == {
        *("FID", "sFID", "inception score", "precision", "recall")
    }
    # for a run, samples are drawn first and stored with its others
    copied = tmp_path / "run"
    copied.mkdir()
    for name in ("config.json", "checkpoints"):
        (copied / name).symlink_to(runs["tiny"].path / name)
    settings = ["--count", "5", "--steps", "1", "--balance", "data"]
    against = ["--reference", reference]
    cli.main(["metrics", str(copied), *settings, *against, *inception, *on_cpu])
    (drawn,) = (copied / "samples").glob("*.npz")
    assert (copied / "samples" / f"{drawn.stem}-against-own.json").exists()
    assert recipe_in(arrays_of(drawn))["balance"] == "data"
    recipe = result["recipe"]
    assert recipe["drawn"]["steps"] == 1
    assert recipe["drawn"]["count"] == 5
    assert recipe["reference recipe"]["split"] == "train"
    assert recipe["sha256"] == recipe_in(arrays_of(reference))["sha256"]
    # statistics of other weights are not compared
    write_arrays(
        samples,
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
        | {"recipe": text_array({"sha256": "0" * 16})},
    )
    with pytest.raises(ValueError, match="made with weights 0000"):
        open_set(samples, open_inception(weights))
