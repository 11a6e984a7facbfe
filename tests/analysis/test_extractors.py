"""Extractors equal the networks they wrap; the metrics of a run are complete."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from selfflow import cli
from selfflow.analysis.distances import frechet
from selfflow.analysis.extractors import (
    Extractor,
    _judge_extractor,
    _penultimate,
    built_in,
    inception,
    open_extractor,
)
from selfflow.analysis.factors import HEADS
from selfflow.analysis.judge import judge_for
from selfflow.analysis.sample_metrics import run_metrics
from selfflow.data.datasets import subset
from selfflow.data.options import DataConfig
from selfflow.data.sources import load
from selfflow.training.config import Config
from selfflow.training.run import Run

NAMES = tuple(name for name in HEADS if name != "digits")  # which has no network


def some(name, count, split="test", start=0):
    return load(name, split).take(torch.arange(start, start + count)).signals


# the judges


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_before_the_last_layer_gives_the_answers(name):
    judge = judge_for(name)
    signals = some(name, 20)
    found = _penultimate(judge, signals)
    read = judge.read(signals)
    assert set(found) == set(judge.readers)
    for view, reader in judge.readers.items():
        for factor, head in reader.heads.items():
            assert torch.equal(head(found[view]).argmax(1), read[factor])


def test_axes_are_those_of_training_data_and_keep_distances():
    judge = judge_for("shapes")
    train = some("shapes", 50, "train")
    test = some("shapes", 30)
    extractor = _judge_extractor(judge, train, axes=64)
    assert (
        extractor.recipe["dimensions"] == 50
        and "50 training samples, 100.0%" in extractor.recipe["axes"]
    )
    parts = _penultimate(judge, train)
    joined = torch.cat(
        [values / values.var(0).sum().sqrt() for values in parts.values()], 1
    )
    features = extractor(train)
    assert np.allclose(features.mean(0), 0, atol=1e-5) and features.var(
        0, ddof=1
    ).sum() == pytest.approx(len(parts), rel=1e-3)
    distances = np.linalg.norm(features[:9, None] - features[None, :9], axis=-1)
    assert np.allclose(distances, torch.cdist(joined[:9], joined[:9]), atol=1e-3)
    assert np.allclose(
        extractor(test)[3:5], extractor({"image": test["image"][3:5]}), atol=1e-5
    ), "each sample by itself"
    assert np.all(np.diff(features.var(0)) <= 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_worse_samples_lie_farther_away(name):
    "Much worse, because the judges were trained on views with some noise."
    extractor = built_in(DataConfig(name), count=100)
    real = extractor(some(name, 60))
    other = extractor(some(name, 60, start=60))
    worse = {
        signal: values
        + torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
        for signal, values in some(name, 60, start=60).items()
    }
    assert frechet(real, extractor(worse)) > 1.5 * frechet(real, other)


def test_missing_signals_and_nan_are_refused():
    broken = some("shapes", 3)["image"].clone()
    broken[1, 0, 0, 0] = math.nan
    extractor = built_in(DataConfig("shapes"), count=20)
    for signals, words in (
        ({"audio": broken}, "judge of shapes looks at image, but there is only audio"),
        ({"image": broken}, "1 of 3 image samples are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            extractor(signals)
    with pytest.raises(ValueError, match="no built-in judge of folder"):
        built_in(DataConfig("folder", path="somewhere"))
    blank = {"image": torch.zeros(2, 1, 8, 8)}
    assert built_in(DataConfig("digits"))(blank).shape == (2, 64)


# weights from a folder or a file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Tiny models with random weights, saved as usual: {kind: (folder, network)}."
    transformers = pytest.importorskip("transformers")
    from transformers import models as known

    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    audio = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_mel_bins": 8,
        "spec_size": 32,
        "patch_size": 2,
        "patch_stride": [2, 2],
        "window_size": 2,
        "projection_dim": 12,
    }
    clap = transformers.ClapConfig(
        text_config={**small, "vocab_size": 20}, audio_config=audio, projection_dim=12
    )
    made = {
        "dinov2": (
            transformers.Dinov2Model(
                transformers.Dinov2Config(**small, image_size=28, patch_size=14)
            ),
            known.bit.BitImageProcessor(
                size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
            ),
        ),
        "videomae": (
            transformers.VideoMAEModel(
                transformers.VideoMAEConfig(
                    **small, image_size=16, patch_size=8, num_frames=4
                )
            ),
            transformers.VideoMAEImageProcessor(
                size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
            ),
        ),
        "clap": (
            transformers.ClapModel(clap),
            transformers.ClapFeatureExtractor(
                feature_size=8,
                sampling_rate=16000,
                max_length_s=1,
                truncation="rand_trunc",
                padding="repeatpad",
            ),
        ),
    }
    folders = {}
    for kind, (network, processor) in made.items():
        folders[kind] = tmp_path_factory.mktemp(kind), network.eval()
        for part in (network, processor):
            part.save_pretrained(folders[kind][0])
    return folders


def test_dinov2_is_the_class_token_of_what_its_processor_makes(models):
    folder, network = models["dinov2"]
    images = torch.rand(3, 3, 28, 28) * 2 - 1
    found = open_extractor(folder, batch=2)({"image": images})
    said = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (
        torch.tensor(said[key])[:, None, None] for key in ("image_mean", "image_std")
    )
    pixels = (((images + 1) * 127.5).round() / 255 - mean) / std
    with torch.no_grad():
        assert np.allclose(found, network(pixels).last_hidden_state[:, 0], atol=1e-4)
    grey = open_extractor(folder)({"image": images[:, :1]})
    assert np.allclose(
        grey, open_extractor(folder)({"image": images[:, :1].expand(-1, 3, -1, -1)})
    )


def test_videomae_is_the_mean_of_tokens_of_evenly_chosen_frames(models):
    folder, network = models["videomae"]
    films = torch.rand(2, 3, 7, 16, 16) * 2 - 1
    found = open_extractor(folder)({"video": films})
    said = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (
        torch.tensor(said[key])[:, None, None] for key in ("image_mean", "image_std")
    )
    frames = films[:, :, [0, 2, 4, 6]].transpose(1, 2)
    pixels = (((frames + 1) * 127.5).round() / 255 - mean) / std
    with torch.no_grad():
        assert np.allclose(found, network(pixels).last_hidden_state.mean(1), atol=1e-4)


def test_clap_hears_sounds_at_its_own_rate(models):
    folder, _ = models["clap"]
    tone = torch.sin(2 * math.pi * 440 * torch.arange(8000) / 8000).repeat(
        3, 1
    ) * torch.tensor([[1.0], [0.5], [0.01]])
    extractor = open_extractor(folder)
    found = extractor({"audio": tone})
    assert (
        found.shape == (3, 12)
        and np.isfinite(found).all()
        and extractor.recipe["resize"] == "16000 samples a second"
    )
    twice = torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000)[None]
    again = open_extractor(folder, rate=16000)({"audio": twice})
    assert np.linalg.norm(found[0] - again[0]) < 0.2 * np.linalg.norm(
        found[0] - found[2]
    )


def test_inception_is_torch_fidelitys_with_the_weights_of_a_file(tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    # its network with random numbers, whose weights become the file
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            module.FeatureExtractorInceptionV3,
            "load_state_dict",
            lambda self, state: None,
        )
        patched.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 20, 20) * 2 - 1
    extractor = open_extractor(tmp_path / "weights.safetensors")
    expected = network(((images + 1) * 127.5).round().byte())[0]
    assert (
        np.allclose(extractor({"image": images}), expected, atol=1e-5)
        and extractor.recipe["dimensions"] == 2048
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for call, error, words in (
        (
            lambda: inception(tmp_path / "other.safetensors"),
            ValueError,
            "does not fit InceptionV3",
        ),
        (
            lambda: inception(tmp_path / "none.pth"),
            FileNotFoundError,
            "nothing is downloaded",
        ),
    ):
        with pytest.raises(error, match=words):
            call()


def test_damaged_files_and_other_models_are_refused(tmp_path, models):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    # what a pickle can do
    (tmp_path / "x.pth").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for name in ("x.safetensors", "x.pth"):
        with pytest.raises(ValueError, match=f"{name} (cannot be read|holds more)"):
            inception(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        open_extractor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match="unknown model_type 'bert'; known are dinov2, clap, videomae"
    ):
        open_extractor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded: "):
        open_extractor(tmp_path)
    with pytest.raises(
        ValueError, match="dinov2 looks at image, but there is only audio"
    ):
        open_extractor(models["dinov2"][0])({"audio": torch.zeros(2, 100)})


# metrics of a run


def stand_in(path, name, condition, spoiled=0):
    "A run that draws validation examples, the first of them spoiled."
    source = load(name, "validation")

    def draw(told, **options):
        signals = {
            key: values.clone()
            for key, values in source.take(subset(source, len(told))).signals.items()
        }
        for values in signals.values():
            values[:spoiled] = torch.randn(
                values[:spoiled].shape, generator=torch.Generator().manual_seed(0)
            ).clamp(-1, 1)
        return signals

    data = DataConfig(
        name, patch=2 if name in ("digits", "notes") else 8, condition=condition
    )
    return SimpleNamespace(
        path=path,
        records=path,
        sample=draw,
        state=lambda: {"step": 7},
        device=torch.device("cpu"),
        shift=1.0,
        config=Config(data=data),
    )


@pytest.mark.parametrize(
    "name, condition",
    [
        ("digits", "class"),
        ("shapes", "caption"),
        ("notes", "class"),
        ("scenes", "none"),
    ],
)
def test_samples_that_are_real_are_as_near_as_real_ones(tmp_path, name, condition):
    run = stand_in(tmp_path, name, condition)
    found = run_metrics(
        run, 40, 2, 1.5, 4, extractor=built_in(run.config.data, count=64), resamples=3
    )
    assert found.drawn == found.floor and ("Frechet distance" in found.doubts[0])
    assert (
        set(found.judged)
        == {
            "digits": {"digit", "all"},
            "shapes": {"kind", "colour", "ground", "place", "all"},
            "notes": {"pitch", "all"},
            "scenes": set(),
        }[name]
    )
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert (
        stored["drawn"]["recall"]["value"] == found.drawn["recall"].value
        and stored["recipe"] == found.recipe
    )
    said = {
        "count": 40,
        "steps": 2,
        "cfg_scale": 1.5,
        "seed": 4,
        "step": 7,
        "neighbours": 5,
        "resamples": 3,
        "data": name,
    }
    assert found.recipe.items() >= said.items() and {
        "features",
        "dimensions",
        "torch",
        "device",
        "floor",
    } <= set(found.recipe)
    assert "steps 2" in str(found) and "<table" in found._repr_html_()


def test_spoiled_samples_are_seen_in_every_metric(tmp_path):
    found = run_metrics(
        stand_in(tmp_path, "digits", "class", spoiled=60), count=120, resamples=4
    )
    for name in ("Frechet distance", "kernel distance", "sliced Wasserstein"):
        assert found.drawn[name].value > 2 * found.floor[name].value
    assert found.drawn["precision"].value < 0.6 < 0.8 < found.floor["precision"].value
    with pytest.raises(
        ValueError, match="11 samples are too few for halves with 5 neighbours; take 12"
    ):
        run_metrics(stand_in(tmp_path, "digits", "class"), count=11)


def test_an_extractor_of_ones_own_is_used(tmp_path):
    seen = []

    def four(signals):
        seen.append(len(signals["image"]))
        return signals["image"].flatten(1)[:, 20:24].numpy()

    own = Extractor(four, {"features": "four"})
    found = run_metrics(
        stand_in(tmp_path, "digits", "none"), count=30, extractor=own, resamples=0
    )
    assert (
        seen == [30, 30, 30]
        and found.recipe["features"] == "four"
        and found.drawn["recall"].interval is None
    )
    assert not found.judged


def test_the_command_measures_a_run(runs, tmp_path, capsys, monkeypatch):
    source = runs["tiny"].path
    copied = tmp_path / "run"
    copied.mkdir()
    for part in ("config.json", "checkpoints"):
        (copied / part).symlink_to(source / part)
    cli.main(
        [
            "metrics",
            str(copied),
            "--count",
            "24",
            "--steps",
            "2",
            "--resamples",
            "2",
            "--device",
            "cpu",
        ]
    )
    said = capsys.readouterr().out
    assert (
        "Frechet distance" in said
        and "judged right: digit" in said
        and f"{copied}/metrics.json" in said
    )
    stored = json.loads((copied / "metrics.json").read_text())
    assert stored["recipe"]["step"] == Run.open(copied, "cpu").state()["step"] == 12
    with pytest.raises(SystemExit):
        cli.main(
            [
                "metrics",
                str(copied),
                "--extractor",
                str(tmp_path / "none"),
                "--device",
                "cpu",
            ]
        )
    assert "holds no model" in capsys.readouterr().err
