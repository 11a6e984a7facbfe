"""Run folders: what was saved is read back or refused, never half believed."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY

from selfflow.checkpoint import check_checkpoint
from selfflow.flow import keyed
from selfflow.run import Run
from selfflow.sampling import guided_velocity, sample
from selfflow.training import train


@pytest.fixture
def run(runs, tmp_path):
    "A copy of the tiny run, to be damaged."
    shutil.copytree(runs["tiny"].path, tmp_path / "tiny")
    return Run.open(tmp_path / "tiny")


def steps_of(run):
    return sorted(p.name for p in run.path.glob("checkpoints/*"))


def test_a_run_opens_from_its_folder_alone(run):
    assert run.config == TINY and steps_of(run) == ["step-00000004", "step-00000008", "step-00000012"]
    assert run.latest().name == "step-00000012" and run.state()["step"] == 12
    assert {p.name for p in run.latest().iterdir()} == {"model.safetensors", "teacher.safetensors", "objective.safetensors",
                                                        "optimizer.safetensors", "state.json", "manifest.json"}
    assert run.log["step"].tolist() == list(range(1, 13)) and {"flow_loss", "rep_loss", "cosine"} <= set(run.log)
    assert not run.teacher.training and not any(p.requires_grad for p in run.teacher.parameters())
    assert run.sample(torch.tensor([0, 9]), steps=2).shape == (2, 1, 8, 8)
    assert not list(run.path.rglob("*.tmp")) and not list(run.path.rglob("*.p*t")), "no leftovers, no pickle"


def damage(kind, file):
    content = bytearray(file.read_bytes())
    if kind == "flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "truncated":
        file.write_bytes(content[:-7])
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "empty", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_skipped_and_said(run, capsys, kind, name):
    damage(kind, run.path / "checkpoints/step-00000012" / name)
    assert run.latest().name == "step-00000008"
    assert "skipped" in (said := capsys.readouterr().out) and name in said


def test_training_goes_on_from_the_newest_whole_checkpoint(run, runs):
    damage("flipped bit", run.path / "checkpoints/step-00000012/teacher.safetensors")
    damage("missing", run.path / "checkpoints/step-00000008/manifest.json")
    again = train(TINY, run.path.parent)
    assert again.latest().name == "step-00000012" and check_checkpoint(again.latest()) is None
    for part in ("model", "teacher", "objective", "optimizer"):
        expected, actual = runs["tiny"].load(part), again.load(part)
        assert expected.keys() == actual.keys() and all(torch.equal(expected[k], actual[k]) for k in expected)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"model.safetensors": 3}', "{not json"])
def test_a_strange_manifest_never_passes(run, content):
    path = run.path / "checkpoints/step-00000012"
    (path / "manifest.json").write_text(content)
    assert check_checkpoint(path) is not None and run.latest().name == "step-00000008"


def test_a_teacher_that_is_missing_is_an_error_and_no_silent_fall_back(run):
    path = run.path / "checkpoints/step-00000012"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["teacher.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "teacher.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no teacher"):
        run.teacher  # noqa: B018
    with pytest.raises(FileNotFoundError, match="has no teacher"):
        train(TINY, run.path.parent)


def test_when_no_checkpoint_is_whole_training_does_not_start_over_by_itself(run):
    for path in run.path.glob("checkpoints/step-*"):
        damage("flipped bit", path / "model.safetensors")
    before = run.log_path.read_text()
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        train(TINY, run.path.parent)
    assert run.log_path.read_text() == before and len(steps_of(run)) == 3


def test_another_config_does_not_enter_the_folder(run):
    with pytest.raises(ValueError, match=r"another config:\n  seed: 0 in the folder, 1 asked for\n.*another name"):
        train(replace(TINY, seed=1), run.path.parent)
    assert steps_of(run)[-1] == "step-00000012" and len(run.log) == 12


@pytest.mark.parametrize("change, words", [
    ({"objective": replace(TINY.objective, separated=True)}, "objective.separated: False in the folder, True asked for"),
    ({"model": replace(TINY.model, positions="rotary", heads=1)}, "model.positions: 'sincos' in the folder, 'rotary' asked for"),
    ({"training": replace(TINY.training, compile=True)}, "training.compile: False in the folder, True asked for"),
])
def test_a_new_choice_is_another_config(run, change, words):
    with pytest.raises(ValueError, match=words):
        train(replace(TINY, **change), run.path.parent)


def test_another_shape_of_model_does_not_enter_the_folder(run):
    stored = json.loads((run.path / "config.json").read_text())
    stored["transformer"]["classes"] = 7
    (run.path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="transformer.classes: 7 in the folder, 10 asked for"):
        train(TINY, run.path.parent)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "config": {"x": 1}, "transformer": {}}'])
def test_a_damaged_config_is_named(run, content):
    (run.path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="tiny/config.json cannot be used"):
        Run.open(run.path)


def test_a_run_looks_at_one_checkpoint_until_it_is_opened_again(run):
    shutil.rmtree(run.path / "checkpoints/step-00000012")
    early = Run.open(run.path)
    assert early.state()["step"] == 8
    later = train(TINY, run.path.parent)
    assert early.state()["step"] == 8 and later.state()["step"] == 12
    assert not torch.equal(early.teacher.x_embedder.weight, later.teacher.x_embedder.weight)


def test_a_format_from_the_future_is_refused(run):
    stored = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps({**stored, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        Run.open(run.path)


def test_no_run_no_checkpoint(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run.open(tmp_path / "nothing")
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint yet"):
        run.teacher  # noqa: B018


def test_an_unfinished_staging_folder_is_not_a_checkpoint_and_goes_when_training_goes_on(tmp_path, run):
    (run.path / "checkpoints/.step-00000016-abc").mkdir()
    assert run.latest().name == "step-00000012"
    train(TINY, run.path.parent)
    assert steps_of(run) == ["step-00000004", "step-00000008", "step-00000012"]


def test_an_unfinished_line_of_the_log_is_cut(run):
    with run.log_path.open("a") as file:
        file.write('{"step": 13, "flow')
    run.cut_log(8)
    assert run.log["step"].tolist() == list(range(1, 9))


# samples

@pytest.mark.parametrize("method", ["euler", "sde", "heun", "midpoint"])
def test_samples_depend_on_the_seed_alone(runs, method):
    run, labels = runs["tiny"], torch.tensor([3, 1, 4, 1, 5])
    assert not run.teacher.training
    torch.manual_seed(1)
    stream = torch.get_rng_state()
    images = run.sample(labels, 4, method, seed=2)
    assert torch.equal(images, run.sample(labels, 4, method, seed=2)), "again"
    assert images.shape == (5, 1, 8, 8) and images.isfinite().all() and torch.equal(stream, torch.get_rng_state())
    for batch in (1, 2, 3):
        torch.testing.assert_close(run.sample(labels, 4, method, seed=2, batch=batch), images, atol=1e-5, rtol=1e-5)
    assert (run.sample(labels, 4, method, seed=3) - images).abs().max() > 0.1
    assert (images[1] - images[3]).abs().max() > 0.1, "one class, two noises"


def test_the_sde_adds_noise_of_its_own(runs):
    run, labels = runs["tiny"], torch.tensor([0, 1])
    x1 = torch.randn(2, 16, 4, generator=keyed(5, "samples"))
    noise = [torch.stack([torch.randn(16, 4, generator=keyed(5, "sampling noise", step, sample)) for sample in range(2)])
             for step in range(6)]
    expected = sample(guided_velocity(run.teacher, labels), x1, 6, "sde", noise=lambda step: noise[step])
    torch.testing.assert_close(run.sample(labels, 6, "sde", seed=5), run.patches.unpatchify(expected))
    assert (run.sample(labels, 6, "sde", seed=5) - run.sample(labels, 6, seed=5)).abs().max() > 0.1


def test_shift_and_interval_are_those_of_the_sampler(runs):
    run, labels = runs["tiny"], torch.tensor([0, 1, 2])
    x1 = torch.randn(3, 16, 4, generator=keyed(0, "samples"))
    velocity_fn = guided_velocity(run.teacher, labels, 4.0, (0.3, 0.8))
    expected = run.patches.unpatchify(sample(velocity_fn, x1, 5, "heun", shift=3.0))
    found = run.sample(labels, 5, "heun", 4.0, shift=3.0, interval=(0.3, 0.8))
    torch.testing.assert_close(found, expected)
    for change in ({"shift": 1.0}, {"interval": (0.0, 1.0)}, {"cfg_scale": 1.0}):
        options = {"cfg_scale": 4.0, "shift": 3.0, "interval": (0.3, 0.8), **change}
        assert (run.sample(labels, 5, "heun", **options) - expected).abs().max() > 1e-4, change


@pytest.mark.parametrize("options, words", [
    ({"shift": 0.0}, "shift"), ({"interval": (0.5, 0.5), "cfg_scale": 2.0}, r"interval is \(0.5, 0.5\)"),
    ({"interval": (-0.1, 1), "cfg_scale": 2.0}, "interval"), ({"method": "rk4"}, "method is 'rk4'"),
    ({"method": "sde", "steps": 1}, "at least 2"), ({"labels": torch.tensor([], dtype=torch.int64)}, "0 labels in batches of"),
])
def test_bad_requests_for_samples_are_refused(runs, options, words):
    with pytest.raises(ValueError, match=words):
        runs["tiny"].sample(**{"labels": torch.tensor([1]), **options})


def test_guidance_needs_a_model_that_knows_the_null_label(run):
    stored = json.loads((run.path / "config.json").read_text())
    stored["config"]["objective"]["label_drop"] = 0.0
    (run.path / "config.json").write_text(json.dumps(stored))
    never, labels = Run.open(run.path), torch.tensor([1, 2])
    for cfg_scale in (2.0, 0.0):
        with pytest.raises(ValueError, match=f"cfg_scale is {cfg_scale}, but this run was trained with label_drop 0"):
            never.sample(labels, 2, cfg_scale=cfg_scale)
    assert torch.equal(never.sample(labels, 2), run.sample(labels, 2))
