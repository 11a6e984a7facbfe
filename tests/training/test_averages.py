"""Several averages in one run: resumed bit for bit, evaluated, exported, rebuilt."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_same

from selfflow.disk import step_of
from selfflow.method.averages import (
    Averages,
    power_decay,
    power_exponent,
    reconstruction,
)
from selfflow.method.objective import ema_decay
from selfflow.training.batches import validation_losses
from selfflow.training.checkpoint import problem_of
from selfflow.training.config import Config, TrainConfig
from selfflow.training.export import export, load
from selfflow.training.loop import train
from selfflow.training.run import Run

SEVERAL = replace(
    TINY,
    name="several",
    training=replace(
        TINY.training,
        ema={"short": 0.01, "long": 6.0},
        power_ema=(0.05, 0.1, 0.15),
        snapshot_every=2,
        evaluated="short",
        keep_last=2,
        sample_every=12,
    ),
)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return train(SEVERAL, tmp_path_factory.mktemp("runs"), "cpu", bar=False)


def same(network, other):
    theirs = other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in network.state_dict().items())


def test_averages_resume_bit_for_bit_and_leave_training_alone(several, runs, tmp_path):
    shutil.copytree(several.path, tmp_path / "several")
    shutil.rmtree(tmp_path / "several/checkpoints/step-00000012")
    assert_same(several, train(SEVERAL, tmp_path, "cpu", bar=False))
    names = {path.stem for path in several.latest().glob("average-*")}
    assert names == {f"average-{name}" for name in SEVERAL.training.averages[1:]}
    for part in ("model", "teacher", "objective"):
        for name, value in runs["tiny"].load(part).items():
            assert torch.equal(value, several.load(part)[name])


def test_an_average_follows_its_recursion():
    model = torch.nn.Linear(3, 1, bias=False).bfloat16()
    gamma = power_exponent(0.1)
    averages = Averages(
        model, {"half": lambda step: ema_decay(1), "p": lambda s: power_decay(gamma, s)}
    )
    assert averages.values["p"]["weight"].dtype == torch.float32
    weights = [model.weight.detach().double().clone()]
    for step in range(1, 6):
        with torch.no_grad():
            model.weight += 0.25 * step
        averages.update(model, step)
        weights.append(model.weight.detach().double().clone())
    half = weights[0] / 32 + sum(weights[k] / 2 ** (6 - k) for k in range(1, 6))
    torch.testing.assert_close(averages.values["half"]["weight"], half.float())
    power = sum(
        weights[k] * (k ** (gamma + 1) - (k - 1) ** (gamma + 1)) / 5 ** (gamma + 1)
        for k in range(1, 6)
    )
    torch.testing.assert_close(averages.values["p"]["weight"], power.float())


def test_the_evaluated_average_is_validated_sampled_and_exported(several, tmp_path):
    assert same(several.evaluated, several.average("short"))
    assert not same(several.evaluated, several.teacher)
    loss = validation_losses(several.evaluated, SEVERAL).mean().item()
    assert several.log["validation_flow_loss"].iloc[-1] == pytest.approx(loss, rel=1e-5)
    drawn = several.sample([1, 2], steps=2)["image"]
    exported = load(export(several, tmp_path / "short"), "cpu")
    assert torch.equal(exported.sample([1, 2], steps=2)["image"], drawn)
    assert exported.exported["average"] == "short"
    other = load(export(several, tmp_path / "long", average="long"), "cpu")
    assert same(other.evaluated, several.average("long"))
    assert "average long" in (other.path / "README.md").read_text()
    _, images, _ = several.sample_history()[-1]
    expected, _ = several.draw_sample_grid(several.evaluated)
    assert torch.equal(images, expected.float())
    with pytest.raises(ValueError, match="unknown average .*'shrt'.*short"):
        export(several, tmp_path / "none", average="shrt")
    with pytest.raises(ValueError, match="exported model, which has one average"):
        export(other, tmp_path / "none", average="short")


def test_snapshots_stay_and_rebuild_an_average_that_was_tracked_too(several, tmp_path):
    steps = [step_of(path) for path in several.snapshots()]
    assert steps == [2, 4, 6, 8, 10, 12], "keep_last 2 does not count for them"
    assert len(several.checkpoints()) == 2
    assert not any(map(problem_of, several.snapshots()))
    # a run that knows only the outer pair must find the middle one
    pair = Run.open(several.path, "cpu")
    training = replace(SEVERAL.training, power_ema=(0.05, 0.15))
    pair.config = replace(SEVERAL, training=training)
    built = pair.reconstructed(0.1)
    tracked = several.average("power-0.1")
    error, scale = 0.0, 0.0
    for (_, a), (_, b), (_, c) in zip(
        built.named_parameters(),
        tracked.named_parameters(),
        several.model.named_parameters(),
        strict=True,
    ):
        error += (a - b).square().sum().item()
        scale += (c - b).square().sum().item()
    assert 0 < error < 0.05**2 * scale
    place = export(several, tmp_path / "built", sigma_rel=0.1)
    assert load(place, "cpu").exported["average"] == "sigma_rel 0.1"
    with pytest.raises(ValueError, match="sigma_rel 0.01 cannot be made"):
        several.reconstructed(0.01)


def test_the_evaluated_average_may_change_and_the_averages_may_not(
    several, tmp_path, capsys
):
    shutil.copytree(several.path, tmp_path / "several")

    def ask(**changes):
        training = replace(SEVERAL.training, **changes)
        config = replace(SEVERAL, training=training)
        return Run.create(tmp_path / "several", config, several.inputs, "cpu")

    again = ask(evaluated="long", snapshot_every=3)
    printed = capsys.readouterr().out
    assert "training.evaluated: short -> long from here on" in printed
    assert "training.snapshot_every: 2 -> 3 from here on" in printed
    assert same(again.evaluated, several.average("long"))
    with pytest.raises(ValueError, match="training.ema.short: 0.01 in the folder"):
        ask(ema={"short": 0.02, "long": 6.0})


def test_a_tracked_average_is_rebuilt_exactly():
    snapshots = [(at, sigma) for at in (50, 100) for sigma in (0.05, 0.1)]
    weights, misfit = reconstruction(snapshots, 100, 0.1)
    torch.testing.assert_close(
        torch.tensor(weights), torch.tensor([0.0, 0, 0, 1]).double(), atol=1e-9, rtol=0
    )
    assert misfit < 1e-6
    # a long run and a narrow average overflow nothing
    many = [(at, s) for at in range(10**6, 10**7, 10**6) for s in (0.01, 0.02)]
    weights, misfit = reconstruction(many, 9 * 10**6, 0.015)
    assert abs(weights.sum() - 1) < 1e-9
    assert misfit < 0.05
    with pytest.raises(ValueError, match="2 snapshots for step 90"):
        reconstruction([(50, 0.1), (100, 0.1)], 90, 0.1)
    with pytest.raises(ValueError, match="sigma_rel is 0.3, .* between 0 and 0.289"):
        power_exponent(0.3)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"ema": {"teacher": 0.1}}, "'teacher' is not a valid name"),
        ({"ema": {"power-0.1": 0.1}}, "not a valid name of an average"),
        ({"ema": {"a": 0.0}}, "half-life of average a is 0.0"),
        ({"power_ema": (0.5,)}, "training.power_ema is 0.5"),
        ({"power_ema": (0.1, 0.1)}, "repeats a width"),
        ({"snapshot_every": 5}, "there are no power-function averages"),
        ({"evaluated": "long"}, "unknown average .*'long'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


def test_a_config_with_averages_comes_back_from_its_short_form():
    assert Config.from_dict(SEVERAL.explicit()) == SEVERAL
