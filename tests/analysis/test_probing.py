"""Probes: choose on validation, report on test, beat what must be beaten; intervals against independent formulas."""
import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from selfflow.analysis import verdict as metrics
from selfflow.analysis.features import extract
from selfflow.analysis.probing import (
    ProbeGrid,
    labelled,
    linear_probe,
    majority_accuracy,
    probe_baselines,
    probe_grid,
    probe_pixels,
    probe_run,
    probe_table,
    read_probes,
    untrained_network,
)
from selfflow.data.datasets import SPLITS, digits
from selfflow.draws import keyed
from selfflow.intervals import paired_difference, proportion_interval
from selfflow.method.schedule import NoiseLevels
from selfflow.training.run import Run
from selfflow.training.state import start_state

FEW = {"levels": (0.0, 0.5), "strengths": (0.1,)}


@pytest.fixture(scope="module")
def copies(runs, tmp_path_factory):
    "The runs of all tests as copies: probes leave their results in the folder."
    folder = tmp_path_factory.mktemp("probed")
    return {name: Run.open(shutil.copytree(run.path, folder / name)) for name, run in runs.items()}


def toy(separation, sizes=(200, 100, 100), seed=0):
    rng = np.random.default_rng(seed)
    labels = {split: rng.integers(0, 3, n) for split, n in zip(SPLITS, sizes, strict=True)}
    centres = separation * np.eye(3, 8)
    return {split: centres[y] + rng.normal(size=(len(y), 8)) for split, y in labels.items()}, labels


def test_wilson_interval():
    for hits, total in ((0, 10), (7, 20), (180, 200), (50, 50)):
        p, z = hits / total, 1.959964
        centre, half = p + z * z / (2 * total), z * np.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
        expected = ((centre - half) / (1 + z * z / total), (centre + half) / (1 + z * z / total))
        assert proportion_interval([True] * hits + [False] * (total - hits)) == pytest.approx(expected, abs=1e-6)


def test_paired_difference_agrees_with_the_normal_approximation_and_uses_the_pairing():
    rng = np.random.default_rng(0)
    a = rng.normal(size=500)
    b = a + 0.1 + 0.2 * rng.normal(size=500)
    mean, low, high = paired_difference(a, b)
    half = 1.96 * (b - a).std(ddof=1) / np.sqrt(500)
    assert mean == pytest.approx((b - a).mean()) and (low, high) == pytest.approx((mean - half, mean + half), abs=0.004)
    assert low > 0, "an unpaired comparison could not see this difference"
    with pytest.raises(ValueError, match="same items"):
        paired_difference(a, b[:-1])


def test_probe_against_scikit_learn_by_hand():
    x, y = toy(2.0)
    result = linear_probe(x, y, strengths=(0.01, 1.0))
    scaler = StandardScaler().fit(x["train"])
    models = {c: LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(x["train"]), y["train"]) for c in (0.01, 1.0)}
    scores = {c: m.score(scaler.transform(x["validation"]), y["validation"]) for c, m in models.items()}
    assert result.validation == max(scores.values()) == scores[result.strength]
    correct = models[result.strength].predict(scaler.transform(x["test"])) == y["test"]
    assert result.accuracy == correct.mean() and result.correct == correct.tolist()
    assert result.interval[0] < result.accuracy < result.interval[1]
    assert result.sizes == {"train": 200, "validation": 100, "test": 100}


def test_test_labels_decide_nothing_but_the_score():
    x, y = toy(1.0)
    flipped = {**y, "test": (y["test"] + 1) % 3}
    a, b = linear_probe(x, y), linear_probe(x, flipped)
    assert (a.strength, a.validation) == (b.strength, b.validation) and a.accuracy != b.accuracy


def test_separable_and_hopeless_features():
    assert linear_probe(*toy(20.0)).accuracy == 1.0
    assert linear_probe(*toy(0.0)).accuracy < 0.5
    x, y = toy(2.0)
    constant = {split: np.concatenate([part, np.ones((len(part), 1))], 1) for split, part in x.items()}
    assert linear_probe(constant, y).accuracy == linear_probe(x, y).accuracy, "a constant feature changes nothing"


@pytest.mark.parametrize("spoil, words", [
    (lambda x, y: x.pop("test"), "test part"), (lambda x, y: y.pop("validation"), "validation part"),
    (lambda x, y: x.update(train=x["train"][:-1]), "train part"),
    (lambda x, y: x["train"].__setitem__((0, 0), np.nan), "not finite")])
def test_bad_features_are_refused(spoil, words):
    x, y = toy(1.0)
    spoil(x, y)
    with pytest.raises(ValueError, match=words):
        linear_probe(x, y)


def test_features_are_those_of_the_model(runs):
    run, data = runs["tiny"], digits("test")[:20]
    x0 = run.layout().patchify({"image": data.images})
    x1 = torch.randn(x0.shape, generator=keyed(0, "x"))
    expected = run.teacher((0.7 * x0 + 0.3 * x1), NoiseLevels.single(torch.full((20,), 0.3), 16), None, taps=(2, 3)).features
    for batch in (3, 512):
        by_token = extract(run.teacher, x0, x1, 0.3, (2, 3), pooled=False, batch=batch)
        pooled = extract(run.teacher, x0, x1, 0.3, (2, 3), batch=batch)
        for layer in (2, 3):
            torch.testing.assert_close(by_token[layer], expected[layer])
            torch.testing.assert_close(pooled[layer], expected[layer].mean(1))
    with pytest.raises(ValueError, match="no layer"):
        extract(run.teacher, x0, x1, 0.3, (5,))


def test_grids_are_read_as_written_and_the_best_cell_is_chosen_on_validation(copies):
    run = copies["tiny"]
    grid = probe_run(run, **FEW)
    assert read_probes(run) == (grid, None) and grid.step == 12 == json.loads((run.path / "probe.json").read_text())["step"]
    assert grid.table("accuracy").shape == (4, 2) and grid.table("correct").shape == (4, 2, 360)
    layer, level, best = grid.best()
    assert best.validation == grid.table("validation").max()
    assert grid.results[grid.layers.index(layer) * 2 + grid.levels.index(level)] is best
    same = grid.difference(grid)
    assert same.shape == (3, 4, 2) and (same[0] == 0).all() and np.allclose(same[2], 0.010558, atol=1e-6)  # of 360 images
    with pytest.raises(ValueError, match="other layers or levels"):
        grid.difference(ProbeGrid(12, (1,), (0.0,), grid.results[:1]))


def test_a_difference_of_grids_is_the_paired_difference_of_each_cell(copies):
    first, second = probe_run(copies["tiny"], **FEW), probe_run(copies["vanilla"], **FEW)
    cells = first.difference(second)
    for row, column in np.ndindex(4, 2):
        a, b = (grid.results[2 * row + column].correct for grid in (first, second))
        assert tuple(cells[:, row, column]) == paired_difference(a, b)


def test_the_untrained_network_computes_something_and_is_not_trained(runs):
    run = runs["tiny"]
    model, data = untrained_network(run), digits("test")[:50]
    x0 = run.layout().patchify({"image": data.images})
    features = extract(model, x0, torch.zeros_like(x0), 0.0, (1, 2, 3, 4))
    assert all(not torch.allclose(features[a], features[a + 1], atol=1e-2) for a in (1, 2, 3)), "its blocks are no identity"
    start = start_state(run.config, run.transformer, torch.device("cpu")).student
    for (name, ours), (_, theirs) in zip(model.named_parameters(), start.named_parameters(), strict=True):
        changed = ours != theirs
        assert changed.sum() == (2 * 16 if "blocks" in name and name.endswith("adaLN_modulation.1.bias") else 0)


def test_baselines_are_kept_and_read(copies):
    baselines = probe_baselines(copies["vanilla"], **FEW)
    assert read_probes(copies["vanilla"])[1] == baselines and baselines.untrained.step == 0
    table = probe_table({"x": baselines.untrained}, baselines)
    assert table.iloc[:, 0].str.contains("class|pixels|untrained|x").all() and len(table) == 4


def test_probing_is_repeatable_and_sees_noise(runs):
    run = runs["vanilla"]
    tokens = {split: run.layout().patchify({"image": digits(split).images}) for split in SPLITS}
    labels = {split: digits(split).labels for split in SPLITS}
    first, again = (probe_grid(run.teacher, tokens, labels, layers=(2,), **FEW) for _ in range(2))
    assert first == again and first.results[0].accuracy > first.results[1].accuracy, "noise hides the class"


def test_baselines():
    assert majority_accuracy(labelled("digits")) == pytest.approx(0.1, abs=0.01)
    assert probe_pixels(labelled("digits")).accuracy > 0.93


def test_the_judge_is_chosen_on_validation(monkeypatch):
    class Fixed:
        def __init__(self, c):
            self.c = c

        def score(self, images, labels):
            assert len(images) == 359, "validation images decide"
            return {1.0: 0.5, 10.0: 0.9, 100.0: 0.7}[self.c]

        def predict(self, images):
            return np.full(len(images), self.c)

    monkeypatch.setattr(metrics, "_fit", lambda data, c: Fixed(c))
    assert metrics.train_judge("digits").classifier.c == 10.0


def test_the_judge_never_sees_test_images(monkeypatch):
    fitted = []
    real = metrics._fit
    monkeypatch.setattr(metrics, "_fit", lambda data, c: fitted.append(data) or real(data, c))
    judge = metrics.train_judge("digits")
    assert fitted and all(torch.equal(data.images, digits("train").images) for data in fitted)
    test = digits("test")
    assert judge.own.value > 0.97 and judge.own.count == 360
    assert judge.recognised(test.images, (test.labels + 1) % 10).value < 0.03
    assert "n = 360" in str(judge.own)
