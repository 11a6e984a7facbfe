"""The pre-flight check gives the known answer for planted backbones, and its
numbers can be checked by hand.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pandas import testing as pd_testing
from PIL import Image
from torch import nn

from selfflow.analysis.preflight import (
    Pair,
    Preflight,
    candidate_pairs,
    fit_head,
    mean_cosines,
    preflight,
)
from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.method.backbone import Output
from selfflow.method.options import LoraConfig, ModelConfig, ObjectiveConfig
from selfflow.training.config import PRESETS, Config, TrainConfig
from selfflow.training.loop import train

CONFIG = Config(
    data=DataConfig("digits"),
    objective=ObjectiveConfig("self_flow", label_drop=0.0),
    training=TrainConfig(batch=32, lr=1e-2),
)
FEW = {"steps": 60, "samples": 96, "held_out": 64, "device": "cpu"}


class Planted(nn.Module):
    """Layer 1 reads each token on its own and can learn to use the others."""

    width = 12
    depth = 3

    def __init__(self, kind, inputs):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Linear(inputs.channels, self.width)
        self.classes = nn.Embedding(inputs.classes + 1, self.width)
        self.look_around = nn.Parameter(torch.zeros(self.width, self.width))
        self.out = nn.Linear(self.width, inputs.channels)

    def forward(self, x, levels, condition=None, taps=(), stop=False, parts=()):
        tokens = self.embed(x)
        around = tokens.mean(1, keepdim=True).expand_as(tokens)
        first = tokens + around @ self.look_around
        if self.kind == "constant":
            target = torch.ones_like(tokens)
        elif self.kind == "class":
            labels = torch.zeros(len(x), dtype=torch.int64)
            labels = labels if condition is None else condition.values
            target = first = self.classes(labels)[:, None].expand_as(tokens)
        else:
            target = around
        features = {1: first, 2: target, 3: target}
        velocity = None if stop else self.out(first)
        return Output(velocity, {layer: features[layer] for layer in taps})


def planted(kind, how="raw", **options):
    objective = replace(CONFIG.objective, normalise=how)
    return preflight(
        replace(CONFIG, objective=objective),
        **{**FEW, "cost": False, **options},
        backbone=partial(Planted, kind),
    )


def test_a_constant_target_cannot_teach():
    result = planted("constant", pairs=((1, 2), (1, 3)))
    assert not result.can_teach
    assert result.verdict().startswith("No: the target")
    for pair in result.pairs:
        assert pair.constant.mean() == pytest.approx(1)
        assert pair.both is None
        assert pair.room == pytest.approx(0, abs=1e-6)


def test_a_head_alone_reaches_what_both_views_share():
    result = planted("class", steps=200, pairs=((1, 2),))
    pair = result.best
    assert not result.can_teach
    assert "nothing is left" in result.verdict()
    assert pair.views.mean() == pytest.approx(1)
    assert pair.head.mean() > 0.95
    assert pair.other.mean() < 0.6
    assert pair.constant.mean() < 0.6


def test_features_that_only_trained_layers_reach_can_be_taught():
    result = planted("mean", "centred", pairs=((1, 2), (2, 3)))
    pair = result.best
    assert result.can_teach
    assert pair.layers == (1, 2)
    trained, alone = pair.both
    assert trained.mean() > alone.mean() + 0.05
    assert pair.gain[1] > 0
    assert pair.gain[0] == pytest.approx((trained - alone).mean())
    verdict = result.verdict()
    assert verdict.startswith("Yes: with objective.student_layer 1")
    for values in (pair.constant, pair.head, trained):
        assert f"{values.mean():.3f}" in verdict
    assert result.pairs[1].layers == (2, 3)
    assert len(pair.head) == 64
    # without normalisation the common part hides this
    raw = planted("mean", pairs=((1, 2),))
    assert not raw.can_teach
    assert "objective.normalise centred" in raw.verdict()


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_random_state():
    before = torch.get_rng_state()
    first, second = (planted("mean", pairs=((1, 2),)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    table = first.table()
    assert table.equals(second.table())
    of_another_seed = planted("mean", pairs=((1, 2),), seed=1).table()
    assert not table.equals(of_another_seed)


def test_room_that_training_does_not_fill_proves_nothing():
    rng = np.random.default_rng(0)
    half = rng.normal(0.5, 0.01, 50)
    alone = half + rng.normal(0, 0.01, 50)
    pair = Pair(1, 2, half, half, half, half, (half, alone))
    about = {"steps": 10, "untrained": True}
    result = Preflight(about, [pair])
    assert pair.room == pytest.approx(0.5, abs=0.01)
    assert not result.can_teach
    assert result.verdict().startswith("Not shown")
    assert "untrained" in result.verdict()


def test_a_head_is_fitted_only_to_counted_tokens():
    torch.manual_seed(0)
    hidden = torch.randn(8, 6, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    target = hidden @ rotation
    counted = torch.rand(8, 6) < 0.7
    target[~counted] = 100.0  # would spoil the fit
    head = nn.Linear(4, 4)
    fit_head(head, hidden, target, counted, 1500)
    cosines = mean_cosines(head(hidden), target, counted)
    assert cosines.min() > 0.98
    is_counted = counted[0]
    by_hand = nn.functional.cosine_similarity(
        head(hidden[0])[is_counted], target[0][is_counted]
    )
    torch.testing.assert_close(cosines[0], by_hand.mean())


@pytest.mark.parametrize("depth", [2, 3, 6, 28])
def test_candidates_are_pairs_of_layers(depth):
    pairs = candidate_pairs(depth)
    assert len(set(pairs)) == len(pairs) >= 1
    assert all(1 <= first < second <= depth for first, second in pairs)
    if depth == 28:
        assert pairs[0] == (8, 20)


def test_layers_and_objectives_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="depth = 3"):
        planted("mean", pairs=((2, 4),))
    flow = replace(CONFIG, objective=ObjectiveConfig("flow_matching"))
    with pytest.raises(ValueError, match="no teacher layer"):
        preflight(flow, **FEW)


TINY = Config(
    name="tiny",
    model=ModelConfig(width=16, depth=3, heads=2),
    training=TrainConfig(
        steps=3, batch=8, log_every=1, validate_every=3, validation=8, sample_every=0
    ),
)


def test_a_run_is_examined_and_not_changed(tmp_path, capsys):
    run = train(TINY, tmp_path, device="cpu", bar=False)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    args = ["--steps", "4", "--samples", "16", "--device", "cpu"]
    main(["preflight", "--run", str(run.path), "--pairs", "1", "2", *args])
    printed = capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
    stored = json.loads((run.path / "preflight.json").read_text())
    assert stored["verdict"] in printed
    assert "head alone" in printed
    assert len(stored["pairs"]) == 1
    assert not stored["about"]["untrained"]
    cost = stored["cost"]
    weights = sum(value.nbytes for value in run.load("model").values())
    # weights, their average, two moments, and the head with its moments
    assert cost["held_bytes"] > 4 * weights
    assert cost["peak_bytes"] > 0
    assert cost["batch"] == 8
    assert cost["seconds"] > 0
    with pytest.raises(SystemExit):
        main(["preflight", "--run", str(run.path), "--model.depth", "4", *args])
    assert "own settings" in capsys.readouterr().err


def test_a_failed_pre_flight_leaves_no_folder(tmp_path, capsys):
    args = ["--preset", "digits-small", "--folder", str(tmp_path), "--name", "soon"]
    with pytest.raises(SystemExit):
        main(["preflight", *args, "--device", "cpu", "--pairs", "2", "9"])
    assert "layers 2 and 9 do not fit" in capsys.readouterr().err
    assert not (tmp_path / "soon").exists()


LITTLE = {"steps": 4, "samples": 16, "held_out": 16, "device": "cpu"}


def test_adapters_are_examined_before_and_after_training(tmp_path):
    pytest.importorskip("peft")
    base = train(TINY, tmp_path, device="cpu", bar=False)
    training = replace(TINY.training, start_from=str(base.path), lr=1e-2)
    config = replace(TINY, name="adapted", training=training, lora=LoraConfig(2))
    planned = preflight(config, **LITTLE, pairs=((1, 2),))
    assert not planned.about["untrained"], "it starts from trained weights"
    full = replace(config, lora=LoraConfig())
    unadapted = preflight(full, **LITTLE, pairs=((1, 2),))
    # before the first step an adapter changes nothing
    np.testing.assert_allclose(
        planned.pairs[0].head, unadapted.pairs[0].head, atol=1e-5
    )
    assert planned.cost["held_bytes"] < 0.7 * unadapted.cost["held_bytes"]
    run = train(config, tmp_path, device="cpu", bar=False)
    before = {name: value.clone() for name, value in run.load("model").items()}
    after = preflight(run, **LITTLE, pairs=((1, 2),))
    assert np.abs(after.pairs[0].head - planned.pairs[0].head).max() > 1e-4
    for name, value in run.load("model").items():
        assert torch.equal(value, before[name])


def test_images_of_several_sizes_are_examined_together(tmp_path):
    for split, count in (("train", 12), ("validation", 8)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for number in range(count):
            shape = (24, 16, 3) if number % 2 else (16, 24, 3)
            pixels = np.random.default_rng(number).integers(0, 255, shape, np.uint8)
            place = tmp_path / "photos" / split / f"{number}.png"
            Image.fromarray(pixels).save(place)
    data = DataConfig(
        "folder",
        path=str(tmp_path / "photos"),
        channels=3,
        height=16,
        width=16,
        patch=8,
        condition="none",
        aspect=2.0,
    )
    config = replace(TINY, data=data, objective=ObjectiveConfig(label_drop=0.0))
    result = preflight(config, **LITTLE, pairs=((1, 2),))
    assert len(result.pairs[0].head) == 8
    assert result.cost["seconds"] > 0
    assert np.isfinite(result.pairs[0].head).all()


def test_further_averages_do_not_change_the_numbers(tmp_path):
    several = replace(TINY.training, ema={"fast": 0.5}, power_ema=(0.1,))
    plain = preflight(TINY, **LITTLE, pairs=((1, 2),), cost=False)
    config = replace(TINY, training=several)
    measured = preflight(config, **LITTLE, pairs=((1, 2),))
    pd_testing.assert_frame_equal(measured.table(), plain.table())
    assert measured.cost["seconds"] > 0
    run = train(config, tmp_path, device="cpu", bar=False)
    assert preflight(run, **LITTLE, pairs=((1, 2),), cost=False).pairs


def test_a_planned_run_is_examined_with_the_arguments_of_train(tmp_path, capsys):
    args = ["--preset", "digits-small", "--folder", str(tmp_path), "--name", "soon"]
    few = [
        "--steps",
        "4",
        "--samples",
        "32",
        "--device",
        "cpu",
        "--training.batch",
        "8",
    ]
    main(["preflight", *args, *few, "--pairs", "1", "2", "2", "3"])
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "soon" / "preflight.json").read_text())
    assert stored["about"]["untrained"]
    assert "--run FOLDER" in printed
    assert stored["about"]["depth"] == PRESETS["digits-small"].model.depth
    pairs = [(row["student layer"], row["teacher layer"]) for row in stored["pairs"]]
    assert pairs == [(1, 2), (2, 3)]
    # the file does not prevent the run
    main(["train", *args, *few[4:], "--training.steps", "1"])
    assert (tmp_path / "soon" / "config.json").exists()
