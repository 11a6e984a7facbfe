"""Probes: choose on validation, report on test, beat what must be beaten; intervals against independent formulas."""
import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from selfflow.analysis.features import extract
from selfflow.analysis.probes import _logistic_probe
from selfflow.analysis.probing import outdated, probe_table, read_probes, _untrained_network
from selfflow.data.datasets import SPLITS, digits
from selfflow.draws import keyed
from selfflow.intervals import paired_difference, proportion_interval
from selfflow.method.schedule import NoiseLevels
from selfflow.training.run import Run
from selfflow.training.state import start_state


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
    result = _logistic_probe(x, y, strengths=(0.01, 1.0))
    scaler = StandardScaler().fit(x["train"])
    models = {c: LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(x["train"]), y["train"]) for c in (0.01, 1.0)}
    scores = {c: m.score(scaler.transform(x["validation"]), y["validation"]) for c, m in models.items()}
    strength = float(result.chosen.removeprefix("C = "))
    assert result.validation == max(scores.values()) == scores[strength]
    correct = models[strength].predict(scaler.transform(x["test"])) == y["test"]
    assert result.score == pytest.approx(correct.mean()) and (result.errors == ~correct).all()
    assert result.interval[0] < result.score < result.interval[1]
    assert result.sizes == {"train": 200, "validation": 100, "test": 100}


def test_test_labels_decide_nothing_but_the_score():
    x, y = toy(1.0)
    flipped = {**y, "test": (y["test"] + 1) % 3}
    a, b = _logistic_probe(x, y), _logistic_probe(x, flipped)
    assert (a.chosen, a.validation) == (b.chosen, b.validation) and a.score != b.score


def test_separable_and_hopeless_features():
    assert _logistic_probe(*toy(20.0)).score == 1.0
    assert _logistic_probe(*toy(0.0)).score < 0.5
    x, y = toy(2.0)
    constant = {split: np.concatenate([part, np.ones((len(part), 1))], 1) for split, part in x.items()}
    assert _logistic_probe(constant, y).score == _logistic_probe(x, y).score, "a constant feature changes nothing"


@pytest.mark.parametrize("spoil, words", [
    (lambda x, y: x.pop("test"), "test part"), (lambda x, y: y.pop("validation"), "validation part"),
    (lambda x, y: x.update(train=x["train"][:-1]), "train part"),
    (lambda x, y: x["train"].__setitem__((0, 0), np.nan), "not finite")])
def test_bad_features_are_refused(spoil, words):
    x, y = toy(1.0)
    spoil(x, y)
    with pytest.raises(ValueError, match=words):
        _logistic_probe(x, y)


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


def older_grid(step, seed):
    "Probes of the class as formats 1 to 4 stored them, with their random numbers of right answers."
    rng, results = np.random.default_rng(seed), []
    for place in range(4):
        correct = rng.random(360) < 0.5 + 0.1 * place
        results.append({"accuracy": correct.mean(), "interval": list(proportion_interval(correct)),
                        "validation": 0.5 + place / 10, "strength": 0.1,
                        "sizes": {"train": 1078, "validation": 359, "test": 360}, "correct": correct.tolist()})
    return {"step": step, "layers": [1, 4], "levels": [0.0, 0.5], "results": results,
            "chosen": dict.fromkeys(SPLITS, "all")}


def test_records_of_earlier_versions_are_read_with_their_numbers(runs, tmp_path):
    shutil.copytree(runs["tiny"].path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert read_probes(run) is None
    grid, fresh = older_grid(12, 0), older_grid(0, 1)
    (run.path / "probe.json").write_text(json.dumps(grid))
    alone = read_probes(run)
    assert [row.probe.score for row in alone.of("class")] == [result["accuracy"] for result in grid["results"]]
    assert alone.best("class").cell == "block 4, t = 0.5" and alone.table()["raw input"].tolist() == ["-"]
    assert not outdated(alone, run) and len(probe_table({"x": alone})) == 1
    (run.path / "baselines.json").write_text(json.dumps(
        {"majority": 0.1, "pixels": grid["results"][3], "untrained": fresh}))
    both = read_probes(run)
    assert both.of("class", "majority")[0].probe.score == pytest.approx(0.1)
    assert both.grid("class", features="untrained network")[1, 1] == fresh["results"][3]["accuracy"]
    words = probe_table({"x": both}).iloc[:, 0].tolist()
    assert words == ["most frequent class", "raw input", "untrained network, block 4, t = 0.5", "x, block 4, t = 0.5"]
    (run.path / "probe.json").write_text(json.dumps({**grid, "step": 4}))
    assert outdated(read_probes(run), run) == "are of step 4, not of its newest checkpoint"
    other = read_probes(run).difference(both, "class")
    a, b = (np.array(result["correct"], float) for result in (grid["results"][0], grid["results"][0]))
    assert tuple(other[:, 0, 0]) == pytest.approx(paired_difference(a, b))
    for damaged in ("{half", "[]", "{}"):
        (run.path / "probe.json").write_text(damaged)
        with pytest.raises(ValueError, match="`selfflow probe .*` makes it again"):
            read_probes(run)


def test_the_untrained_network_computes_something_and_is_not_trained(runs):
    run = runs["tiny"]
    model, data = _untrained_network(run), digits("test")[:50]
    x0 = run.layout().patchify({"image": data.images})
    features = extract(model, x0, torch.zeros_like(x0), 0.0, (1, 2, 3, 4))
    assert all(not torch.allclose(features[a], features[a + 1], atol=1e-2) for a in (1, 2, 3)), "its blocks are no identity"
    start = start_state(run.config, run.sources, torch.device("cpu")).student
    for (name, ours), (_, theirs) in zip(model.named_parameters(), start.named_parameters(), strict=True):
        changed = ours != theirs
        assert changed.sum() == (2 * 16 if "blocks" in name and name.endswith("adaLN_modulation.1.bias") else 0)
