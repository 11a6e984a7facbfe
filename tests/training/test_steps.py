"""A finished run resumes with more steps; without its optimiser it cannot."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from selfflow.analysis.features import extract
from selfflow.method.options import ObjectiveConfig
from selfflow.training.checkpoint import _drop_optimizer, check_checkpoint, resumable
from selfflow.training.config import TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.training.state import build_optimizer, learning_rate
from selfflow.training.watching import Following

SHORT = replace(
    TINY,
    objective=ObjectiveConfig(),
    training=replace(
        TINY.training,
        steps=8,
        save_every=4,
        validate_every=8,
        log_every=1,
        sample_every=0,
        cooldown=0.0,
    ),
)


def longer(config, steps, **changes):
    return replace(config, training=replace(config.training, steps=steps, **changes))


@pytest.fixture
def run(tmp_path):
    return train(SHORT, tmp_path, "cpu", bar=False)


def assert_same_weights(run, other):
    for part in ("model", "teacher", "objective", "optimizer"):
        theirs = other.load(part)
        for name, value in run.load(part).items():
            assert torch.equal(value, theirs[name]), f"{part} {name}"


def names(run):
    return [path.name[-2:] for path in run.checkpoints()], [
        path.name[-2:] for path in run.checkpoints() if resumable(path)
    ]


def test_a_finished_run_resumes_and_prints_the_changes(run, capsys):
    first = run.log_path.read_text()
    again = train(longer(SHORT, 16), run.path.parent, "cpu", bar=False)
    printed = capsys.readouterr().out
    assert "training.steps: 8 -> 16 from here on\n" in printed
    assert (
        "tiny: resuming from step 8; 16 steps instead of 8: "
        "the average's half-life is now 0.8 steps (was 0.4)\n"
    ) in printed
    assert again.state()["step"] == 16
    assert again.log_path.read_text().startswith(first)
    assert Run.open(run.path).config == longer(SHORT, 16)
    following = Following(run.path)
    following.read()
    assert following.finished


def test_the_student_equals_that_of_a_longer_run(tmp_path):
    # without a teacher in the loss nothing else differs
    flow = replace(SHORT, objective=ObjectiveConfig("flow_matching"))
    train(flow, tmp_path / "grown", "cpu", bar=False)
    grown = train(longer(flow, 12), tmp_path / "grown", "cpu", bar=False)
    planned = train(longer(flow, 12), tmp_path / "whole", "cpu", bar=False)
    assert grown.log["total"].tolist() == planned.log["total"].tolist()
    for part in ("model", "optimizer"):
        assert all(
            torch.equal(value, grown.load(part)[name])
            for name, value in planned.load(part).items()
        )


def test_a_cool_down_comes_at_the_new_end(tmp_path, capsys):
    config = longer(SHORT, 8, cooldown=0.5)
    train(config, tmp_path, "cpu", bar=False)
    train(longer(config, 20), tmp_path, "cpu", bar=False)
    assert (
        "(was 0.4), the learning rate is 0.002 and falls to 0 over the last 10 steps. "
        "The steps until 8 had the learning rates of 8 steps, so this is not the run "
        "that 20 steps give from the start\n"
        in capsys.readouterr().out.replace(f"{config.training.lr:g}", "0.002")
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_grows_before_its_cool_down_is_the_longer_run(
    tmp_path, optimizer, capsys
):
    config = longer(
        SHORT, 8, warmup=2, cooldown=3, ema_half_life=2.0, optimizer=optimizer
    )
    train(config, tmp_path / "grown", "cpu", bar=False)
    # as if stopped before its cool-down
    shutil.rmtree(tmp_path / "grown/tiny/checkpoints/step-00000008")
    grown = train(longer(config, 11), tmp_path / "grown", "cpu", bar=False)
    assert "not the run" not in capsys.readouterr().out
    planned = train(longer(config, 11), tmp_path / "whole", "cpu", bar=False)
    assert_same_weights(planned, grown)
    rates = [learning_rate(planned.config.training, step) for step in range(11)]
    assert planned.log["lr"].tolist() == rates
    lr = config.training.lr
    assert rates[:2] == [lr / 2, lr]
    assert rates[-3:] == [lr, lr * 2 / 3, lr / 3]


def test_extending_a_cosine_run_prints_that_it_is_another_run(tmp_path, capsys):
    config = longer(SHORT, 8, lr_schedule="cosine")
    train(config, tmp_path, "cpu", bar=False)
    capsys.readouterr()
    run = train(longer(config, 12), tmp_path, "cpu", bar=False)
    assert "had the learning rates of 8 steps" in capsys.readouterr().out
    # from here on, the rates of the new length; those done stay in the log
    expected = [learning_rate(config.training, step) for step in range(8)]
    expected += [learning_rate(run.config.training, step) for step in range(8, 12)]
    assert run.log["lr"].tolist() == expected
    assert expected[8] > expected[7]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_learning_rates_rise_then_fall_to_nothing(schedule):
    settings = {"lr_schedule": schedule, "warmup": 10}
    if schedule == "constant":
        settings["cooldown"] = 0.3
    config = TrainConfig(steps=100, lr=1.0, **settings)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert 0 < rates[-1] < 0.04
    middle = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule]
    assert rates[55] == pytest.approx(middle), "half-way between warm-up and end"
    quarter = {"constant": 1.0, "linear": 0.75, "cosine": 0.853}[schedule]
    assert rates[32] == pytest.approx(quarter, abs=0.01)


def test_betas_and_eps_reach_the_optimiser():
    parameters = {"model.blocks.0.w": torch.nn.Parameter(torch.zeros(4, 4))}
    parameters["model.bias"] = torch.nn.Parameter(torch.zeros(4))
    config = TrainConfig(optimizer="muon", betas=(0.8, 0.95), eps=1e-6)
    (group,) = build_optimizer(config, parameters).parts[0].param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_fewer_steps_than_done_are_refused(run):
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(
        ValueError,
        match="has done 8 steps, more than the 6 requested; use training.steps 8 or "
        "more",
    ) as error:
        train(longer(SHORT, 6), run.path.parent, "cpu", bar=False)
    assert "\n" not in str(error.value)
    assert (run.path / "config.json").read_bytes() == before
    stopped = train(longer(SHORT, 20), run.path.parent, "cpu", bar=False)
    for path in stopped.checkpoints()[-1:]:
        shutil.rmtree(path)
    done = train(longer(SHORT, 16), run.path.parent, "cpu", bar=False)
    assert done.state()["step"] == 16, "fewer than before, but not than are done"


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_checkpoint_without_an_optimiser_is_used_but_not_resumed(
    run, by_hand, capsys
):
    config = longer(SHORT, 12)
    last = run.latest()
    if by_hand:
        (last / "optimizer.safetensors").unlink()
    else:
        _drop_optimizer(last)
        assert "optimizer.safetensors" not in json.loads(
            (last / "manifest.json").read_text()
        )
    assert check_checkpoint(last) is None
    assert not resumable(last)
    opened = Run.open(run.path, "cpu")
    assert opened.state()["step"] == 8
    assert opened.sample([1], steps=2)["image"].isfinite().all()
    x = torch.randn(4, 16, 4)
    assert extract(opened.teacher, x, x, 0.5, (2,))[2].isfinite().all()
    assert train(SHORT, run.path.parent, "cpu", bar=False).state()["step"] == 8, (
        "a finished run needs none"
    )
    again = train(config, run.path.parent, "cpu", bar=False)
    printed = capsys.readouterr().out
    assert f"skipped {last}: it has no optimiser" in printed
    assert "resuming from step 4" in printed
    assert again.state()["step"] == 12 and names(again)[1] == ["04", "08", "12"], (
        "the one that had none was written again"
    )
    for path in again.checkpoints():
        _drop_optimizer(path)
    with pytest.raises(
        ValueError,
        match="No checkpoint in .* has its optimiser.*Put "
        ".*step-00000012/optimizer.safetensors back",
    ):
        train(longer(SHORT, 16), run.path.parent, "cpu", bar=False)


def test_the_newest_keep_their_optimisers(tmp_path):
    config = longer(SHORT, 12, save_every=2, keep_last=4, keep_optimizers=2)
    run = train(config, tmp_path, "cpu", bar=False)
    assert names(run) == (["06", "08", "10", "12"], ["10", "12"])
    for path in run.checkpoints():
        manifest = json.loads((path / "manifest.json").read_text())
        assert check_checkpoint(path) is None
        assert ("optimizer.safetensors" in manifest) == resumable(path)
        assert load_file(path / "teacher.safetensors")
    shutil.rmtree(run.checkpoints()[-1])
    (run.checkpoints()[-1] / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="No checkpoint in .* has its optimiser"):
        train(config, tmp_path, "cpu", bar=False)


def test_keep_optimizers_may_change_on_resuming(run, capsys):
    again = train(
        longer(SHORT, 8, keep_optimizers=1), run.path.parent, "cpu", bar=False
    )
    assert "training.keep_optimizers: 0 -> 1 from here on" in capsys.readouterr().out
    assert names(again) == (["04", "08"], ["08"])
    with pytest.raises(ValueError, match="keep_optimizers is -1, but must be 0"):
        longer(SHORT, 8, keep_optimizers=-1)
