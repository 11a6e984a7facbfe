"""The loop: falls, stays finite, resumes bit for bit, pairs its arms, refuses bad input before the first step."""
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, VANILLA

import selfflow.images
from selfflow.config import DataConfig, ModelConfig, TrainConfig
from selfflow.images import ImageSet, digits
from selfflow.training import batch_indices, start_state, shape_of, train, train_step, validation_losses


def parts_of(run):
    return {f"{part}/{name}": value for part in ("model", "teacher", "optimizer") for name, value in run.load(part).items()}


def test_both_objectives_fall_and_stay_finite(tmp_path):
    longer = replace(TINY.training, steps=80, batch=32, lr=3e-3, validate_every=40, save_every=80)
    for config in (TINY, VANILLA):
        log = train(replace(config, training=longer), tmp_path).log
        assert log.drop(columns="validation_flow_loss").notna().all().all()
        assert log["flow_loss"].tail(10).mean() < 0.75 * log["flow_loss"].head(5).mean()
        assert log["validation_flow_loss"].dropna().is_monotonic_decreasing
    assert log.columns.tolist() == ["step", "total", "flow_loss", "grad_norm", "validation_flow_loss"]


@pytest.mark.parametrize("config", [TINY, VANILLA], ids=lambda c: c.name)
@pytest.mark.parametrize("lost", [[12], [12, 8], [12, 8, 4]])
def test_resuming_gives_the_uninterrupted_run_bit_for_bit(runs, tmp_path, config, lost):
    whole = runs[config.name]
    shutil.copytree(whole.path, tmp_path / config.name)
    for step in lost:
        shutil.rmtree(tmp_path / config.name / f"checkpoints/step-{step:08d}")
    torch.manual_seed(123)  # the global stream plays no part
    again = train(config, tmp_path)
    expected, actual = parts_of(whole), parts_of(again)
    assert expected.keys() == actual.keys() and all(torch.equal(expected[k], actual[k]) for k in expected)
    assert again.log_path.read_text() == whole.log_path.read_text()


def test_an_interrupted_run_goes_on_from_its_checkpoint(runs, tmp_path, monkeypatch):
    real, calls = train_step, []
    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr("selfflow.training.train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path)
    monkeypatch.undo()
    again = train(TINY, tmp_path)
    expected, actual = parts_of(runs["tiny"]), parts_of(again)
    assert all(torch.equal(expected[k], actual[k]) for k in expected)
    assert again.log_path.read_text() == runs["tiny"].log_path.read_text()


def test_looking_at_a_run_in_the_middle_changes_nothing(runs, tmp_path):
    half = train(TINY, tmp_path)
    shutil.rmtree(half.path / "checkpoints/step-00000012")
    half.sample(torch.tensor([1, 2]), steps=3)
    validation_losses(half.teacher, TINY)
    expected, actual = parts_of(runs["tiny"]), parts_of(train(TINY, tmp_path))
    assert all(torch.equal(expected[k], actual[k]) for k in expected)


def test_a_finished_run_is_returned_as_it_is(runs):
    before = {p: p.stat().st_mtime_ns for p in runs["tiny"].path.rglob("*.safetensors")}
    train(TINY, runs["tiny"].path.parent)
    assert before == {p: p.stat().st_mtime_ns for p in runs["tiny"].path.rglob("*.safetensors")}


def test_the_arms_are_paired():
    shape = shape_of(TINY, digits("train"))
    full, plain = (start_state(config, shape, torch.device("cpu")) for config in (TINY, VANILLA))
    assert all(torch.equal(a, b) for a, b in zip(full.student.parameters(), plain.student.parameters(), strict=True))
    other = start_state(replace(TINY, seed=1), shape, torch.device("cpu"))
    assert not torch.equal(full.student.x_embedder.weight, other.student.x_embedder.weight)


def test_the_teacher_is_the_average_after_the_step():
    data, shape = digits("train")[:16], shape_of(TINY, digits("train"))
    state = start_state(TINY, shape, torch.device("cpu"))
    before = state.teacher.x_embedder.bias.clone()
    tokens = selfflow.training.patches_of(data, 2).patchify(data.images)
    train_step(state, TINY, tokens, data.labels)
    decay = 0.5 ** (1 / (TINY.training.ema_half_life * TINY.training.steps))
    torch.testing.assert_close(state.teacher.x_embedder.bias, decay * before + (1 - decay) * state.student.x_embedder.bias)
    assert not state.teacher.training and state.step == 1


def test_every_sample_once_per_epoch_in_an_order_of_the_seed():
    steps = [batch_indices(50, 16, seed=3, step=step) for step in range(25)]
    everything = torch.cat(steps)
    for epoch in everything.split(50):
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(everything[:50], everything[50:100])
    assert not torch.equal(everything[:50], torch.cat([batch_indices(50, 16, 4, step) for step in range(4)])[:50])
    assert len(batch_indices(5, 16, 0, 0)) == 16  # a batch larger than the data goes on into the next epochs


def test_bf16_trains(tmp_path):
    log = train(replace(TINY, name="bf16", training=replace(TINY.training, precision="bf16")), tmp_path).log
    reference = train(TINY, tmp_path).log
    assert log["flow_loss"].tolist() == pytest.approx(reference["flow_loss"].tolist(), rel=0.02)
    assert log["flow_loss"].tolist() != reference["flow_loss"].tolist()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    real = batch_indices
    def poisoned(count, batch, seed, step):
        if step == 6:
            raise_for.fill_(float("nan"))
        return real(count, batch, seed, step)
    raise_for = torch.zeros(1)
    monkeypatch.setattr("selfflow.training.batch_indices", poisoned)
    monkeypatch.setattr("selfflow.objective.velocity", lambda x0, x1: x1 - x0 + raise_for)
    with pytest.raises(FloatingPointError, match="step 6 is not finite.*last checkpoint is whole"):
        train(TINY, tmp_path)
    assert selfflow.run.Run.open(tmp_path / "tiny").latest().name == "step-00000004"


def with_data(monkeypatch, only=None, **change):
    def broken(split):
        good = digits(split)
        if only not in (None, split):
            return good
        return ImageSet(**{"images": good.images, "labels": good.labels, "names": good.names, **change})
    monkeypatch.setitem(selfflow.images.DATASETS, "digits", broken)


@pytest.mark.parametrize("change, error, words", [
    ({"images": torch.full((1078, 1, 8, 8), torch.nan)}, ValueError, "NaN"),
    ({"images": torch.zeros(1078, 1, 8, 8, dtype=torch.int32)}, TypeError, "torch.int32"),
    ({"labels": torch.full((1078,), 10)}, ValueError, "outside 0 to 9"),
    ({"images": torch.zeros(1078, 1, 9, 9)}, ValueError, "not divisible by patch 2"),
])
def test_bad_data_is_refused_before_a_folder_is_made(tmp_path, monkeypatch, change, error, words):
    with_data(monkeypatch, only="train", **change)
    with pytest.raises(error, match=words):
        train(TINY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_validation_data_is_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    with_data(monkeypatch, only="validation", images=torch.full((359, 1, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="NaN"):
        train(TINY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(TINY, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("config, words", [
    (replace(TINY, data=DataConfig(patch=3)), "not divisible by patch 3"),
    (replace(TINY, model=ModelConfig(width=18, depth=4)), "width 18"),
])
def test_bad_sizes_are_refused_before_a_folder_is_made(tmp_path, config, words):
    with pytest.raises(ValueError, match=words):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_device_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        train(TINY, tmp_path, device="gpu")
    assert not list(tmp_path.iterdir())


def test_the_default_is_the_quickstart():
    assert TrainConfig().steps == 1000 and ModelConfig().width == 96
