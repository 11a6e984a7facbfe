"""Probes choose on validation, report on test and detect planted factors; their records
are written, read and recognised as outdated.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from selfflow import cli
from selfflow.analysis import probing
from selfflow.analysis.features import Items, extract, items_of
from selfflow.analysis.fitting import HeadFit
from selfflow.analysis.probe_records import outdated, read_probes, write_probes
from selfflow.analysis.probes import (
    _logistic_probe,
    _ridge_probe,
    attentive_probe,
    field_probe,
    knn_probe,
    majority_score,
    position_score,
    regression_probe,
    shuffled,
    token_probe,
)
from selfflow.analysis.probing import (
    Probes,
    _untrained_network,
    probe_run,
    probe_table,
    probe_targets,
    probes_cost,
    token_covers,
)
from selfflow.data.datasets import SPLITS, digits, subset
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.draws import keyed
from selfflow.figures.layers import draw_layer_curves, draw_score_maps
from selfflow.intervals import paired_difference, proportion_interval
from selfflow.method.options import ModelConfig
from selfflow.method.schedule import NoiseLevels
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.training.state import start_state

SIZES = {"train": 400, "validation": 150, "test": 300}
SHORT = HeadFit(epochs=25)
FEW = {
    "levels": (0.0, 0.5),
    "layers": (1, 4),
    "counts": {"train": 60, "validation": 30, "test": 40},
}


@pytest.fixture(autouse=True, scope="module")
def no_flush_to_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfflow.disk.flush", lambda path: None)
        yield


def planted(seed=0, noise=0.3):
    "Features, with a class and a value planted in separate directions."
    rng = np.random.default_rng(seed)
    x = {
        split: rng.normal(size=(n, 12)).astype(np.float32) for split, n in SIZES.items()
    }
    ways = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    kinds = {split: (rows @ ways[:, :3]).argmax(1) for split, rows in x.items()}
    values = {
        split: rows @ ways[:, 3] + noise * rng.normal(size=len(rows))
        for split, rows in x.items()
    }
    return x, kinds, values


def all_probes(x, targets):
    by_token = {
        split: np.stack([features, features], 1) for split, features in x.items()
    }
    return {
        "regression": regression_probe(x, targets),
        "field": field_probe(x, {"f": targets}, SHORT)["f"],
        "neighbours": knn_probe(x, targets),
        "attentive": attentive_probe(by_token, {"f": targets}, SHORT)["f"],
    }


def test_all_probes_detect_a_planted_factor_and_nothing_in_shuffled_labels():
    x, kinds, values = planted()
    for name, result in all_probes(x, kinds).items():
        assert result.score > (0.75 if name == "neighbours" else 0.9), name
        assert result.measure == "accuracy"
        assert result.protocol
        assert result.interval[0] < result.score < result.interval[1]
    for name, result in all_probes(x, values).items():
        assert result.score > (0.3 if name == "neighbours" else 0.85), name
        assert result.measure == "R^2", name
    for name, result in all_probes(x, shuffled(kinds)).items():
        assert result.interval[0] < majority_score(kinds).score + 0.05, name
    assert all(
        result.score < 0.1 for result in all_probes(x, shuffled(values)).values()
    )


def test_the_ridge_probe_equals_ridge_regression():
    x, _, values = planted()
    # d < n and d > n
    wide = {split: np.concatenate([rows] * 40, 1) for split, rows in x.items()}
    for features in (x, wide):
        result = _ridge_probe(features, values, (0.01,))
        mean = features["train"].mean(0)
        std = features["train"].std(0)
        train = (features["train"] - mean) / std
        test = (features["test"] - mean) / std
        y = (values["train"] - values["train"].mean()) / values["train"].std()
        n = len(train)
        weights = np.linalg.solve(
            train.T @ train + 0.01 * n * np.eye(train.shape[1]), train.T @ y
        )
        truth = (values["test"] - values["train"].mean()) / values["train"].std()
        expected = (
            1
            - ((test @ weights - truth) ** 2).sum()
            / ((truth - truth.mean()) ** 2).sum()
        )
        assert result.score == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "probe",
    [regression_probe, knn_probe, lambda x, y: field_probe(x, {"f": y}, SHORT)["f"]],
)
def test_test_targets_affect_only_the_score(probe):
    x, kinds, values = planted()
    for targets in (kinds, values):
        spoiled = {**targets, "test": targets["test"][::-1].copy()}
        a = probe(x, targets)
        b = probe(x, spoiled)
        assert (a.validation, a.chosen) == (
            b.validation,
            b.chosen,
        )
        assert a.score != b.score


def test_the_field_protocol_is_repeatable_and_uses_no_global_random_numbers():
    x, kinds, values = planted()
    state = torch.get_rng_state()
    first, second = (field_probe(x, {"a": kinds, "b": values}, SHORT) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for name in "ab":
        np.testing.assert_array_equal(first[name].errors, second[name].errors)
    alone = field_probe(x, {"b": values}, SHORT)["b"]
    assert alone.score == pytest.approx(first["b"].score, abs=1e-5), (
        "factors do not affect each other"
    )


def test_token_probes_beat_the_position_alone():
    rng = np.random.default_rng(0)
    x = {}
    covers = {}
    for split, n in {"train": 120, "validation": 60, "test": 80}.items():
        covers[split] = (rng.random((n, 9)) < 0.3) * rng.uniform(0.6, 1, (n, 9))
        x[split] = rng.normal(size=(n, 9, 6)).astype(np.float32)
        x[split][..., 2] += 5 * (covers[split] > 0.5)
    result = token_probe(x, covers, how := HeadFit(30, 32))
    assert result.score > 0.75
    assert result.errors.shape == (80,)
    assert position_score(covers).score < 0.5
    assert token_probe(x, shuffled(covers), how).score < 0.5
    with pytest.raises(ValueError, match="no covered token"):
        token_probe(x, {split: 0 * cover for split, cover in covers.items()})


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda x, y: x.pop("test"), "test part"),
        (lambda x, y: y.pop("validation"), "validation part"),
        (lambda x, y: y.update(train=y["train"][:-1]), "train part"),
        (lambda x, y: x["validation"].__setitem__((0, 0), np.nan), "not finite"),
        (lambda x, y: x.update(train=x["train"][:, None]), r"expects \(n, d\)"),
        (lambda x, y: y.update(test=y["test"][:0]), "test part"),
    ],
)
def test_unsuitable_features_are_refused(spoil, words):
    x, kinds, _ = planted()
    spoil(x, kinds)
    for probe in (
        _logistic_probe,
        _ridge_probe,
        knn_probe,
        lambda x, y: field_probe(x, {"f": y}, SHORT),
    ):
        with pytest.raises(ValueError, match=words):
            probe(x, kinds)


def test_the_attentive_probe_refuses_pooled_features():
    x, kinds, _ = planted()
    with pytest.raises(ValueError, match=r"expects \(n, tokens, d\)"):
        attentive_probe(x, {"f": kinds})


# runs


def test_factors_become_targets():
    items = {
        split: Items(
            Sources(DataConfig("motion", size=16, patch=4, frames=8), split), count=50
        )
        for split in SPLITS
    }
    targets = probe_targets(items)
    assert targets["direction"]["train"].dtype == np.int64
    assert targets["positions"]["train"].shape == (50, 16)
    assert targets["bounce"]["test"].shape == (50,)
    assert "grain" not in targets
    assert targets["angle"]["train"].shape == (50, 2)
    np.testing.assert_allclose((targets["angle"]["test"] ** 2).sum(1), 1, atol=1e-5)
    scenes = {
        split: Items(Sources(DataConfig("scenes", size=16, patch=4), split), count=20)
        for split in SPLITS
    }
    assert "impact_times" not in probe_targets(scenes), (
        "a factor that some samples lack is no target"
    )
    with pytest.raises(ValueError, match="nothing that varies"):
        probe_targets(
            {
                split: Items(Sources(DataConfig("digits"), split), count=1)
                for split in SPLITS
            }
        )


@pytest.mark.parametrize(
    "data",
    [
        DataConfig("shapes", size=16, patch=4),
        DataConfig("motion", size=16, patch=4, frames=8),
    ],
)
def test_the_cover_of_a_token_is_the_mean_of_its_mask(data):
    items = Items(Sources(data, "test"), count=3)
    covers = token_covers(items)
    masks = items.data.masks(torch.arange(3))
    grid = items.layout.parts[0].grid
    assert covers.shape == (3, np.prod(grid))
    assert covers.mean() == pytest.approx(masks.mean().item(), abs=1e-6)
    masks = masks.reshape(3, -1, 16, 16)
    frames = masks.shape[1] // grid[0]
    corner = masks[:, :frames, :4, :4]
    np.testing.assert_allclose(covers[:, 0], corner.mean((1, 2, 3)), atol=1e-6)
    with pytest.raises(ValueError, match="not known of digits"):
        token_covers(Items(Sources(DataConfig("digits"), "test"), count=3))


@pytest.fixture(scope="module")
def probed(runs, tmp_path_factory):
    "A copy of a run of digits, and its probes."
    path = tmp_path_factory.mktemp("probed") / "tiny"
    shutil.copytree(runs["tiny"].path, path)
    run = Run.open(path)
    return run, probe_run(run, **FEW)


def test_every_split_needs_a_count(runs):
    with pytest.raises(ValueError, match="have no entry for validation, test"):
        probe_run(runs["tiny"], counts={"train": 60})


def test_a_run_is_probed_with_all_baselines_and_every_row_states_its_protocol(probed):
    run, probes = probed
    assert probes.factors == ("class",)
    assert {row.features for row in probes.rows} == {
        "majority",
        "raw input",
        "untrained network",
        "model",
        "shuffled labels",
    }
    assert all(
        row.probe.protocol and len(row.probe.errors) == 40 for row in probes.rows
    )
    assert (
        len(probes.of("class"))
        == len(probes.of("class", "untrained network", "field"))
        == 4
    )
    best = probes.best("class")
    assert best.probe.validation == probes.grid("class", "validation").max()
    own = probes.difference(probes, "class")
    assert probes.grid("class").shape == (2, 2)
    assert (own[0] == 0).all()
    assert (own[1] < 0).all()
    assert (own[2] > 0).all()
    assert probes_cost(run, **FEW).passes == 0, "features are stored"
    assert set(probes.table()) == {
        "measure",
        "majority",
        "shuffled labels",
        "raw input",
        "untrained network",
        "model",
        "cell",
        "protocol",
    }
    table = probe_table({"x": probes})
    assert len(table) == 4
    assert table.iloc[1, 0] == "raw input"
    assert table.columns[1] == "test accuracy (95 %)"
    with pytest.raises(ValueError, match="Did you mean 'class'"):
        probes.of("clas")


def test_probes_are_read_as_written_and_damage_is_reported(probed):
    run, probes = probed
    assert read_probes(Run.open(run.path)) is None
    write_probes(run, probes)
    stored_probes = read_probes(run)
    assert stored_probes.about == json.loads(json.dumps(probes.about))
    assert stored_probes.table("field").equals(probes.table("field"))
    assert not stored_probes.compare(probes, "class").significant
    items = run.path / "probes.safetensors"
    stored = load_file(items)
    # as after a crash between the two files
    save_file({**stored, "errors": np.roll(stored["errors"], 1)}, items)
    with pytest.raises(ValueError, match="belongs to other probes"):
        read_probes(run)
    items.write_bytes(items.read_bytes()[:-8])
    with pytest.raises(ValueError, match="makes it again"):
        read_probes(run)


def test_probes_of_different_items_cannot_be_compared(probed):
    _, probes = probed
    of_other_items = Probes({**probes.about, "items": "others"}, probes.rows)
    for call in (probes.compare, probes.difference):
        with pytest.raises(ValueError, match="test items"):
            call(of_other_items, "class")


def test_the_items_of_a_run_have_fixed_noise(probed):
    run, _ = probed
    items = items_of(run, "test", 8)
    assert torch.equal(
        items.take(torch.tensor([3]))[1][0], list(items.batches(4))[0][1][3]
    )
    assert torch.equal(items.factors["class"], items.data.labels[subset(items.data, 8)])


def test_the_command_probes_factors_and_prints_the_cost_first(probed, capsys, tmp_path):
    run, _ = probed
    cli.probe(
        run.path, field=True, samples=40, features=tmp_path / "features", device="cpu"
    )
    printed = capsys.readouterr().out
    assert printed.index("features: 30 passes") < printed.index("majority")
    assert "BatchNorm + linear" in printed
    assert (run.path / "probes.json").exists()
    assert len(list((tmp_path / "features").glob("*.npy"))) == 120
    with pytest.raises(SystemExit):
        cli.main(["probe", str(run.path), "--weights", "studnet"])
    assert "known are teacher, model" in capsys.readouterr().err


def test_runs_of_audio_are_probed_too(tmp_path):
    config = replace(
        TINY,
        name="notes",
        data=DataConfig("notes", columns=8, condition="none"),
        model=ModelConfig(width=16, depth=4, heads=2),
        training=replace(
            TINY.training, steps=2, validate_every=2, save_every=2, validation=8
        ),
    )
    run = train(config, tmp_path, bar=False)
    probes = probe_run(
        run,
        levels=(0.0,),
        layers=(2,),
        counts={"train": 60, "validation": 30, "test": 30},
        part="audio",
        families=("regression",),
    )
    assert {"pitch", "timbre", "attack", "vibrato", "loudness", "phase"} == set(
        probes.factors
    )


def test_a_raw_input_of_long_samples_is_reduced_before_probing():
    generator = torch.Generator().manual_seed(0)
    x = {}
    targets = {}
    for split, count in (("train", 120), ("validation", 60), ("test", 60)):
        labels = torch.arange(count) % 3
        x[split] = torch.randn(count, 20, 20, generator=generator) + 2 * labels[
            :, None, None
        ] * (torch.arange(20) < 10)
        targets[split] = labels.numpy()
    items = {
        split: SimpleNamespace(
            slices={}, batches=lambda values=values: [(values, None)]
        )
        for split, values in x.items()
    }
    raw = probing._raw_tokens(items, "")
    # half as many features as training samples
    assert raw["train"].shape == (120, 60)
    assert raw["test"].shape == (60, 60)
    assert regression_probe(raw, targets, (0.1, 1.0)).score > 0.9


def test_the_legend_of_a_single_factor_is_not_cut_off():
    across = {"a": {"raw input": 0.7, "untrained network": 0.6}}
    figure = draw_layer_curves({"a": {"a run": [0.1, 0.2]}}, (1, 2), across)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0
    assert box.x1 <= figure.bbox.width


def test_figures_of_probes_are_drawn_from_arrays():
    cells = np.zeros((3, 2, 2))
    maps = {"a": {"x": np.ones((2, 2)), "y": np.zeros((2, 2))}}
    assert len(draw_score_maps(maps, (1, 2), (0.0, 0.5), {"a": cells}).axes) == 3
    assert (
        len(
            draw_layer_curves(
                {"a": {"x": np.ones((3, 2))}, "b": {"x": [0, 1]}},
                (1, 2),
                {"a": {"raw": 0.1}},
            ).axes
        )
        == 2
    )
    for draw in (
        lambda: draw_score_maps({}, (1,), (0.0,)),
        lambda: draw_layer_curves({}, (1,)),
    ):
        with pytest.raises(ValueError, match="no factor"):
            draw()


def toy(separation, sizes=(200, 100, 100), seed=0):
    rng = np.random.default_rng(seed)
    labels = {
        split: rng.integers(0, 3, n) for split, n in zip(SPLITS, sizes, strict=True)
    }
    centres = separation * np.eye(3, 8)
    return {
        split: centres[y] + rng.normal(size=(len(y), 8)) for split, y in labels.items()
    }, labels


def test_the_interval_of_a_share_is_that_of_wilson():
    for hits, total in ((0, 10), (7, 20), (180, 200), (50, 50)):
        p = hits / total
        z = 1.959964
        centre = p + z * z / (2 * total)
        half = z * np.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
        expected = (
            (centre - half) / (1 + z * z / total),
            (centre + half) / (1 + z * z / total),
        )
        assert proportion_interval(
            [True] * hits + [False] * (total - hits)
        ) == pytest.approx(expected, abs=1e-6)


def test_the_paired_difference_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=500)
    b = a + 0.1 + 0.2 * rng.normal(size=500)
    mean, low, high = paired_difference(a, b)
    half = 1.96 * (b - a).std(ddof=1) / np.sqrt(500)
    assert mean == pytest.approx((b - a).mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.004)
    assert low > 0, "an unpaired comparison could not detect this difference"
    with pytest.raises(ValueError, match="same items"):
        paired_difference(a, b[:-1])


def test_the_logistic_probe_equals_scikit_learn():
    x, y = toy(2.0)
    result = _logistic_probe(x, y, strengths=(0.01, 1.0))
    scaler = StandardScaler().fit(x["train"])
    models = {
        c: LogisticRegression(C=c, max_iter=2000).fit(
            scaler.transform(x["train"]), y["train"]
        )
        for c in (0.01, 1.0)
    }
    scores = {
        c: m.score(scaler.transform(x["validation"]), y["validation"])
        for c, m in models.items()
    }
    strength = float(result.chosen.removeprefix("C = "))
    assert result.validation == max(scores.values()) == scores[strength]
    correct = models[strength].predict(scaler.transform(x["test"])) == y["test"]
    assert result.score == pytest.approx(correct.mean())
    assert (result.errors == ~correct).all()
    assert result.interval[0] < result.score < result.interval[1]
    assert result.sizes == {"train": 200, "validation": 100, "test": 100}


def test_separable_features_score_1_and_random_ones_near_chance():
    assert _logistic_probe(*toy(20.0)).score == 1.0
    assert _logistic_probe(*toy(0.0)).score < 0.5
    x, y = toy(2.0)
    constant = {
        split: np.concatenate([rows, np.ones((len(rows), 1))], 1)
        for split, rows in x.items()
    }
    assert _logistic_probe(constant, y).score == _logistic_probe(x, y).score, (
        "a constant feature changes nothing"
    )


def test_extracted_features_equal_those_of_the_model(runs):
    run = runs["tiny"]
    data = digits("test")[:20]
    x0 = run.layout().patchify({"image": data.images})
    x1 = torch.randn(x0.shape, generator=keyed(0, "x"))
    expected = run.teacher(
        (0.7 * x0 + 0.3 * x1),
        NoiseLevels.single(torch.full((20,), 0.3), 16),
        None,
        taps=(2, 3),
    ).features
    for batch in (3, 512):
        by_token = extract(run.teacher, x0, x1, 0.3, (2, 3), pooled=False, batch=batch)
        pooled = extract(run.teacher, x0, x1, 0.3, (2, 3), batch=batch)
        for layer in (2, 3):
            torch.testing.assert_close(by_token[layer], expected[layer])
            torch.testing.assert_close(pooled[layer], expected[layer].mean(1))
    with pytest.raises(ValueError, match="no layer"):
        extract(run.teacher, x0, x1, 0.3, (5,))


def older_grid(step, seed):
    "Probes of the class as stored by formats 1 to 4, with random answers."
    rng = np.random.default_rng(seed)
    results = []
    for place in range(4):
        correct = rng.random(360) < 0.5 + 0.1 * place
        results.append(
            {
                "accuracy": correct.mean(),
                "interval": list(proportion_interval(correct)),
                "validation": 0.5 + place / 10,
                "strength": 0.1,
                "sizes": {"train": 1078, "validation": 359, "test": 360},
                "correct": correct.tolist(),
            }
        )
    return {
        "step": step,
        "layers": [1, 4],
        "levels": [0.0, 0.5],
        "results": results,
        "chosen": dict.fromkeys(SPLITS, "all"),
    }


def test_records_of_earlier_versions_are_read(runs, tmp_path):
    shutil.copytree(runs["tiny"].path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert read_probes(run) is None
    grid = older_grid(12, 0)
    fresh = older_grid(0, 1)
    (run.path / "probe.json").write_text(json.dumps(grid))
    alone = read_probes(run)
    assert [row.probe.score for row in alone.of("class")] == [
        result["accuracy"] for result in grid["results"]
    ]
    assert alone.best("class").cell == "block 4, t = 0.5"
    assert alone.table()["raw input"].tolist() == ["-"]
    assert not outdated(alone, run)
    assert len(probe_table({"x": alone})) == 1
    (run.path / "baselines.json").write_text(
        json.dumps({"majority": 0.1, "pixels": grid["results"][3], "untrained": fresh})
    )
    with_baselines = read_probes(run)
    assert with_baselines.of("class", "majority")[0].probe.score == pytest.approx(0.1)
    assert (
        with_baselines.grid("class", features="untrained network")[1, 1]
        == fresh["results"][3]["accuracy"]
    )
    words = probe_table({"x": with_baselines}).iloc[:, 0].tolist()
    assert words == [
        "most frequent class",
        "raw input",
        "untrained network, block 4, t = 0.5",
        "x, block 4, t = 0.5",
    ]
    (run.path / "probe.json").write_text(json.dumps({**grid, "step": 4}))
    assert (
        outdated(read_probes(run), run) == "are of step 4, not of its newest checkpoint"
    )
    differences = read_probes(run).difference(with_baselines, "class")
    a, b = (
        np.array(result["correct"], float)
        for result in (grid["results"][0], grid["results"][0])
    )
    assert tuple(differences[:, 0, 0]) == pytest.approx(paired_difference(a, b))
    for damaged in ("{half", "[]", "{}"):
        (run.path / "probe.json").write_text(damaged)
        with pytest.raises(ValueError, match="`selfflow probe .*` makes it again"):
            read_probes(run)


def test_the_untrained_network_is_the_start_of_training_with_open_gates(runs):
    run = runs["tiny"]
    model = _untrained_network(run)
    data = digits("test")[:50]
    x0 = run.layout().patchify({"image": data.images})
    features = extract(model, x0, torch.zeros_like(x0), 0.0, (1, 2, 3, 4))
    assert all(
        not torch.allclose(features[a], features[a + 1], atol=1e-2) for a in (1, 2, 3)
    ), "its blocks are not the identity"
    start = start_state(run.config, run.sources, torch.device("cpu")).student
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), start.named_parameters(), strict=True
    ):
        changed = ours != theirs
        assert changed.sum() == (
            2 * 16
            if "blocks" in name and name.endswith("adaLN_modulation.1.bias")
            else 0
        )
