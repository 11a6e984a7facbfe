"""A run folder gives back what was saved, or refuses to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from selfflow.draws import keyed
from selfflow.method.sampling import guided_velocity, sample
from selfflow.method.transformer import TransformerConfig
from selfflow.training.batches import validation_losses
from selfflow.training.checkpoint import _FREE, FORMAT, check_checkpoint, migrate
from selfflow.training.config import Config, TrainConfig
from selfflow.training.lock import RunInUse, sole_writer
from selfflow.training.loop import train
from selfflow.training.run import Run

# written by the first version
FIRST = Path(__file__).parents[1] / "fixtures/runs/format-1"
SECOND = FIRST.with_name("format-2")  # with captions, each byte of which was a token


@pytest.fixture
def run(runs, tmp_path):
    "A copy of the tiny run, to be damaged."
    shutil.copytree(runs["tiny"].path, tmp_path / "tiny")
    return Run.open(tmp_path / "tiny")


def steps_of(run):
    return sorted(p.name for p in run.path.glob("checkpoints/*"))


def test_a_run_opens_from_its_folder_alone(run):
    assert run.config == TINY
    assert steps_of(run) == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    assert run.latest().name == "step-00000012"
    assert run.state()["step"] == 12
    assert {p.name for p in run.latest().iterdir()} == {
        "model.safetensors",
        "teacher.safetensors",
        "objective.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    assert run.log["step"].tolist() == list(range(1, 13))
    assert {
        "flow_loss",
        "rep_loss",
        "cosine",
    } <= set(run.log)
    assert not run.teacher.training
    assert not any(p.requires_grad for p in run.teacher.parameters())
    assert run.sample(torch.tensor([0, 9]), steps=2)["image"].shape == (2, 1, 8, 8)
    assert not list(run.path.rglob("*.tmp")) and not list(run.path.rglob("*.p*t")), (
        "no leftovers, no pickle"
    )


def damage(kind, file):
    content = bytearray(file.read_bytes())
    if kind == "flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "truncated":
        file.write_bytes(content[:-7])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "longer":
        file.write_bytes(content + b"\n")
    elif kind == "of another step":
        shutil.copy(file.parent.with_name("step-00000004") / file.name, file)
    else:
        file.unlink()


@pytest.mark.parametrize(
    "kind, name",
    [
        ("flipped bit", "model.safetensors"),
        ("truncated", "teacher.safetensors"),
        ("empty", "teacher.safetensors"),
        ("missing", "teacher.safetensors"),
        ("longer", "teacher.safetensors"),
        ("of another step", "teacher.safetensors"),
        ("flipped bit", "objective.safetensors"),
        ("flipped bit", "optimizer.safetensors"),
        ("missing", "optimizer.safetensors"),
        ("of another step", "state.json"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_reported(run, capsys, kind, name):
    damage(kind, run.path / "checkpoints/step-00000012" / name)
    # only resuming needs the optimizer
    unfit = (kind, name) == ("missing", "optimizer.safetensors")
    assert run.latest().name == ("step-00000012" if unfit else "step-00000008")
    assert run.latest(resume=True).name == "step-00000008"
    assert "skipped" in (printed := capsys.readouterr().out)
    assert name in printed or unfit and "no optimiser" in printed


def test_training_resumes_from_the_newest_intact_checkpoint(run, runs):
    damage("flipped bit", run.path / "checkpoints/step-00000012/teacher.safetensors")
    damage("missing", run.path / "checkpoints/step-00000008/manifest.json")
    again = train(TINY, run.path.parent)
    assert again.latest().name == "step-00000012"
    assert check_checkpoint(again.latest()) is None
    for part in ("model", "teacher", "objective", "optimizer"):
        expected = runs["tiny"].load(part)
        actual = again.load(part)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[k], actual[k]) for k in expected)


def test_a_missing_teacher_is_an_error_without_silent_fallback(run):
    path = run.path / "checkpoints/step-00000012"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["teacher.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "teacher.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no teacher"):
        run.teacher  # noqa: B018
    with pytest.raises(FileNotFoundError, match="has no teacher"):
        train(TINY, run.path.parent)


def test_without_an_intact_checkpoint_training_does_not_restart_by_itself(run):
    for path in run.path.glob("checkpoints/step-*"):
        damage("flipped bit", path / "model.safetensors")
    before = run.log_path.read_text()
    with pytest.raises(ValueError, match="No intact checkpoint in"):
        train(TINY, run.path.parent)
    assert run.log_path.read_text() == before
    assert len(steps_of(run)) == 3


def test_another_config_is_refused_for_the_folder(run):
    before = (run.path / "config.json").read_bytes()
    (run.path.parent / "tiny-2").mkdir()
    asked = replace(TINY, seed=1, training=replace(TINY.training, keep_last=9))
    with pytest.raises(
        ValueError,
        match=r"different settings:\n  seed: 0 in the folder, 1 requested\n"
        r"Give this run another name \(tiny-3 is free\), or delete the folder.",
    ):
        Run.create(run.path, asked, run.inputs)
    with pytest.raises(ValueError, match="seed: 0 in the folder, 1 requested"):
        train(replace(TINY, seed=1), run.path.parent)
    assert steps_of(run)[-1] == "step-00000012"
    assert len(run.log) == 12
    assert (run.path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"objective": replace(TINY.objective, separated=True)},
            "objective.separated: False in the folder, True requested",
        ),
        (
            {"model": replace(TINY.model, positions="rotary", heads=1)},
            "model.positions: 'sincos' in the folder, 'rotary' requested",
        ),
        (
            {"training": replace(TINY.training, compile=True)},
            "training.compile: False in the folder, True requested",
        ),
    ],
)
def test_a_new_choice_is_another_config(run, change, words):
    with pytest.raises(ValueError, match=words):
        train(replace(TINY, **change), run.path.parent)


def test_another_model_shape_is_refused_for_the_folder(run):
    stored = json.loads((run.path / "config.json").read_text())
    stored["inputs"]["classes"] = 7
    (run.path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(
        ValueError, match="inputs.classes: 7 in the folder, 10 requested"
    ):
        train(TINY, run.path.parent)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "config": {"x": 1}, "transformer": {}}',
    ],
)
def test_a_damaged_config_is_named(run, content):
    (run.path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="tiny/config.json cannot be used"):
        Run.open(run.path)


def test_a_run_reads_one_checkpoint_until_it_is_reopened(run):
    shutil.rmtree(run.path / "checkpoints/step-00000012")
    early = Run.open(run.path)
    assert early.state()["step"] == 8
    later = train(TINY, run.path.parent)
    assert early.state()["step"] == 8
    assert later.state()["step"] == 12
    assert not torch.equal(
        early.teacher.x_embedder.image.weight, later.teacher.x_embedder.image.weight
    )


@pytest.mark.parametrize("number", [0, FORMAT + 1, "1", None, [1], 1.5])
def test_a_format_that_is_not_known_is_refused(run, number):
    stored = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps({**stored, "format": number}))
    for opening in (
        lambda: Run.open(run.path),
        lambda: Run.create(run.path, TINY, run.inputs),
    ):
        with pytest.raises(ValueError) as error:
            opening()
        assert (
            f"has format {number!r}, but this version reads formats 1 to {FORMAT}"
            in str(error.value)
        )


def test_a_missing_run_or_checkpoint_is_reported(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run.open(tmp_path / "nothing")
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no intact checkpoint yet"):
        run.teacher  # noqa: B018


def test_an_unfinished_staging_folder_is_not_a_checkpoint_and_is_removed(tmp_path, run):
    (run.path / "checkpoints/.step-00000016-abc").mkdir()
    assert run.latest().name == "step-00000012"
    train(TINY, run.path.parent)
    assert steps_of(run) == ["step-00000004", "step-00000008", "step-00000012"]


def test_an_unfinished_line_of_the_log_is_cut(run):
    with run.log_path.open("a") as file:
        file.write('{"step": 13, "flow')
    run.cut_log(8)
    assert run.log["step"].tolist() == list(range(1, 9))


def test_an_old_run_with_one_token_per_caption_byte_is_unchanged(tmp_path):
    shutil.copytree(SECOND, tmp_path / "format-2")
    run = Run.open(tmp_path / "format-2", "cpu")
    assert run.config.model.caption_stride == run.teacher.config.caption_stride == 1
    loss = validation_losses(run.teacher, run.config).mean().item()
    assert loss == pytest.approx(run.log["validation_flow_loss"].iloc[-1], 1e-5)
    config = replace(run.config, training=replace(run.config.training, steps=6))
    with pytest.raises(ValueError, match="caption_stride"):
        train(replace(config, model=replace(config.model, caption_stride=4)), tmp_path)


# formats


@pytest.fixture
def first(tmp_path):
    "A copy of the run that the first version wrote."
    shutil.copytree(FIRST, tmp_path / "format-1")
    return tmp_path / "format-1"


def first_shape():
    "The transformer that the first version stored."
    shape = json.loads((FIRST / "config.json").read_text())["transformer"]
    return TransformerConfig.of_image(
        shape.pop("channels"), shape.pop("grid"), fp32_levels=False, **shape
    )


def test_a_run_of_the_first_version_opens_as_it_is(first):
    before = {path: path.read_bytes() for path in first.rglob("*.*") if path.is_file()}
    run = Run.open(first)
    stored = json.loads((first / "config.json").read_text())
    assert stored["format"] == 1
    assert "shards" not in stored["config"]["training"]
    assert run.config.training.shards == 1
    assert run.config.training.keep_last == TrainConfig().keep_last
    assert run.data == {}
    assert run.state()["step"] == 4
    assert run.state()["format"] == 1
    assert len(run.log) == 8
    assert run.timing.empty
    assert run.sample_history() == []
    for model in (run.model, run.teacher):
        assert model.config == first_shape()
        assert sum(p.numel() for p in model.parameters()) > 5000
    assert run.sample(torch.tensor([3, 7]), 2)["image"].isfinite().all()
    assert run.writer() is None
    assert before == {
        path: path.read_bytes() for path in first.rglob("*.*") if path.is_file()
    }, "opening changes nothing"


def test_a_run_of_the_first_version_resumes_to_the_same_losses(first):
    original = Run.open(FIRST).log
    run = train(Run.open(first).config, first.parent)
    assert run.state()["step"] == 8
    assert run.state()["format"] == FORMAT
    assert check_checkpoint(run.latest()) is None
    stored = json.loads((first / "config.json").read_text())
    assert stored["format"] == FORMAT
    assert stored["config"]["training"]["shards"] == 1
    assert "data" in stored
    assert Run.open(first).config == run.config
    assert (
        run.log_path.read_text().splitlines()[:4]
        == (FIRST / "log.jsonl").read_text().splitlines()[:4]
    ), "the existing lines stay"
    for name in ("total", "flow_loss", "rep_loss", "grad_norm"):
        assert run.log["step"].tolist() == list(range(1, 9))
        assert run.log[name].tolist() == pytest.approx(
            original[name].tolist(), rel=1e-5
        ), name
    assert run.log["validation_flow_loss"].iloc[7] == pytest.approx(
        original["validation_flow_loss"].iloc[7], rel=1e-5
    )


def test_another_number_of_shards_is_another_run(first):
    config = Run.open(first).config
    with pytest.raises(
        ValueError, match="training.shards: 1 in the folder, 8 requested"
    ):
        Run.create(
            first,
            replace(config, training=replace(config.training, shards=8)),
            Run.open(first).inputs,
        )
    script = Config.from_dict(
        {
            **(stored := json.loads((first / "config.json").read_text()))["config"],
            "name": "format-1",
        }
    )
    with pytest.raises(
        ValueError,
        match="is older than shards and has one: resume it with training.shards=1",
    ):
        train(script, first.parent)
    assert "shards" not in stored["config"]["training"]
    assert script.training.shards == 8
    with pytest.raises(ValueError, match="seed: .*") as error:
        train(replace(script, seed=9), first.parent)
    assert "older than shards" not in str(error.value), (
        "changing the shards alone would not help"
    )
    assert (
        train(
            replace(script, training=replace(script.training, shards=1)), first.parent
        ).state()["step"]
        == 8
    )
    shutil.copyfile(FIRST / "config.json", first / "config.json")
    with pytest.raises(
        ValueError, match="training.shards: 1 in the folder, 8 requested"
    ):
        Run.create(first, script, Run.open(first).inputs)
    assert json.loads((first / "config.json").read_text())["format"] == 1, (
        "a refused request changes nothing"
    )


@pytest.mark.parametrize(
    "old, new",
    [
        (
            {
                "name": "digits",
                "patch": 4,
                "size": 32,
                "path": "",
                "shares": "",
                "weights": "",
                "signals": "image",
            },
            {"name": "digits", "patch": 4},
        ),
        (
            {
                "name": "scenes",
                "size": 16,
                "frames": 8,
                "rate": 8000,
                "weights": "audio=0.5+video=2",
            },
            {
                "name": "scenes",
                "size": 16,
                "frames": 8,
                "weight": {"audio": 0.5, "video": 2.0},
            },
        ),
        (
            {
                "name": "folder",
                "path": "x",
                "signals": "video+audio",
                "channels": 1,
                "shares": "",
                "size": 24,
            },
            {
                "name": "folder",
                "path": "x",
                "signals": ["video", "audio"],
                "channels": 1,
                "height": 24,
                "width": 24,
                "profiles": False,
            },
        ),
        (
            {
                "name": "shapes+notes+latents",
                "shares": "0.57+0.3+0.13",
                "path": "x",
                "patch": 8,
                "size": 16,
                "weights": "audio=2",
            },
            [
                {"name": "shapes", "share": 0.57, "patch": 8, "size": 16},
                {"name": "notes", "share": 0.3, "patch": 8, "weight": {"audio": 2.0}},
                {
                    "name": "latents",
                    "share": 0.13,
                    "path": "x",
                    "patch": 8,
                    "weight": {"audio": 2.0},
                },
            ],
        ),
    ],
)
def test_settings_of_the_data_of_format_4_become_those_of_each_data_set(old, new):
    assert (
        migrate({"format": 4, "config": {"data": old}, "data": {}})["config"]["data"]
        == new
    )
    Config.from_dict({"data": new})
    for data in new if isinstance(new, list) else [new]:
        with pytest.raises(ValueError, match="unknown setting"):
            Config.from_dict({"data": data | {"shares": ""}})


def test_migration_keeps_existing_settings():
    stored = json.loads((FIRST / "config.json").read_text())
    new = migrate(stored)
    assert new["format"] == FORMAT
    assert new["data"] == {}
    assert migrate(new) == new
    assert {**new["config"]["training"], "shards": None} == {
        **stored["config"]["training"],
        "shards": None,
    }
    image = {"name": "image", "channels": 4, "grid": [1, 4, 4], "ticks": 1.0}
    inputs = {
        "parts": [image],
        "classes": stored["transformer"]["classes"],
        "caption": 0,
        "caption_width": 0,
    }
    assert new["inputs"] == inputs
    assert "transformer" not in new
    assert stored["format"] == 1


OLD = {
    "config": {"name", "seed", "data", "model", "objective", "training"},
    "data": {"name", "patch"},
    "model": {"width", "depth", "heads", "mlp_ratio"},
    "objective": {
        "name",
        "density",
        "mask_ratio",
        "student_layer",
        "teacher_layer",
        "rep_weight",
        "label_drop",
    },
    "training": {
        "steps",
        "batch",
        "lr",
        "weight_decay",
        "clip",
        "ema_half_life",
        "precision",
        "log_every",
        "validate_every",
        "save_every",
    },
}
OLD_TRANSFORMER = {
    "channels",
    "grid",
    "width",
    "depth",
    "heads",
    "mlp_ratio",
    "classes",
}


def test_a_config_from_before_later_options_opens(run):
    stored = json.loads((run.path / "config.json").read_text())
    for part in ("data", "model", "objective", "training"):
        assert OLD[part] <= set(stored["config"][part])
        stored["config"][part] = {
            name: stored["config"][part][name] for name in OLD[part]
        }
    assert OLD["config"] | {"defaults", "lora"} == set(stored["config"])
    del stored["config"]["defaults"]
    shape = {"channels": 4, "grid": [4, 4], "classes": 10, **stored["config"]["model"]}
    stored = {
        "format": 1,
        "config": stored["config"],
        "transformer": {n: shape[n] for n in OLD_TRANSFORMER},
    }
    (run.path / "config.json").write_text(json.dumps(stored))
    opened = Run.open(run.path)
    # settings that were not stored have the defaults of that time
    training = replace(TINY.training, shards=1, validation=TrainConfig().validation)
    assert opened.config == replace(TINY, training=training, defaults=3)
    assert opened.inputs == run.inputs
    assert opened.teacher.config == replace(run.teacher.config, fp32_levels=False)


# resuming

OTHER = {
    "steps": 20,
    "keep_optimizers": 2,
    "save_every": 7,
    "keep_last": 1,
    "keep_every": 8,
    "sample_every": 3,
    "parallel": "fsdp",
    "checkpointing": True,
}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_settings_without_effect_on_results_may_change_on_resuming(run, capsys, name):
    # of a run with several averages, see test_averages.py
    others = {"name", "data.encoder", "data.pooled"} | {
        "training.evaluated",
        "training.snapshot_every",
    }
    assert others | {f"training.{name}" for name in OTHER} == _FREE
    requested = replace(TINY, training=replace(TINY.training, **{name: OTHER[name]}))
    resumed = Run.create(run.path, requested, run.inputs)
    before = getattr(TINY.training, name)
    assert (
        capsys.readouterr().out
        == f"training.{name}: {before} -> {OTHER[name]} from here on\n"
    )
    assert resumed.config == requested == Run.open(run.path).config
    assert resumed.state()["step"] == 12
    Run.create(run.path, requested, run.inputs)
    assert not capsys.readouterr().out


def test_free_settings_change_together_but_not_during_training(run, capsys):
    requested = replace(TINY, training=replace(TINY.training, **OTHER))
    before = (run.path / "config.json").read_bytes()
    with run.locked():
        assert Run.create(run.path, TINY, run.inputs).config == TINY, (
            "nothing has to be written"
        )
        with pytest.raises(RunInUse):
            Run.create(run.path, requested, run.inputs)
        assert (run.path / "config.json").read_bytes() == before
        assert not capsys.readouterr().out
    assert Run.create(run.path, requested, run.inputs).config == requested
    assert len(capsys.readouterr().out.splitlines()) == len(OTHER)


def test_renaming_the_folder_renames_the_run(run, capsys):
    moved = run.path.rename(run.path.with_name("renamed"))
    config = replace(TINY, name="renamed", training=replace(TINY.training, keep_last=9))
    again = train(config, moved.parent)
    assert "name: tiny -> renamed from here on\n" in capsys.readouterr().out
    assert again.path == moved
    assert Run.open(moved).config == config
    assert len(steps_of(again)) == 3
    assert not run.path.exists()


A = "a" * 16
B = "b" * 16


@pytest.mark.parametrize(
    "there, asked, words",
    [
        (
            {"train": A, "validation": A},
            {"train": B, "validation": A},
            [f"data.train: '{A}' in the folder, '{B}' requested"],
        ),
        (
            {"train": A, "validation": A},
            {"train": B, "validation": B},
            ["data.train", "data.validation"],
        ),
        (
            {"train": A, "features": A},
            {"features": B, "train": A},
            [f"data.features: '{A}' in the folder, '{B}' requested"],
        ),
    ],
)
def test_other_data_are_refused_for_the_folder(tmp_path, run, there, asked, words):
    Run.create(tmp_path / "new", TINY, run.inputs, data=there)
    before = (tmp_path / "new/config.json").read_bytes()
    with pytest.raises(
        ValueError,
        match="(?s)new contains a run with different data:\n.*\nGive this run another "
        "name .new-2",
    ) as error:
        Run.create(tmp_path / "new", TINY, run.inputs, data=asked)
    assert all(
        word in str(error.value)
        for word in (
            *words,
            "or delete the folder. With the original data the run can resume.",
        )
    )
    assert (tmp_path / "new/config.json").read_bytes() == before
    with pytest.raises(
        ValueError, match="different settings and different data:\n  seed: 0 .*\n  data"
    ):
        Run.create(tmp_path / "new", replace(TINY, seed=1), run.inputs, data=asked)


@pytest.mark.parametrize(
    "there, asked, then",
    [
        ({"train": A}, {"train": A}, {"train": A}),
        ({"train": A}, None, {"train": A}),
        ({}, {"train": A}, {"train": A}),
        ({"train": A}, {"train": A, "features": B}, {"train": A, "features": B}),
        ({"train": A, "features": B}, {"train": A}, {"train": A, "features": B}),
    ],
)
def test_missing_fingerprints_are_added_to_matching_data(
    tmp_path, run, there, asked, then
):
    Run.create(tmp_path / "new", TINY, run.inputs, data=there)
    assert (
        Run.create(tmp_path / "new", TINY, run.inputs, data=asked).data
        == then
        == Run.open(tmp_path / "new").data
    )


def test_a_folder_without_its_config_is_not_taken_for_a_new_run(run):
    (run.path / "config.json").unlink()
    with pytest.raises(
        ValueError,
        match="has checkpoints or a log, but no config.json. Put it back, .*tiny-2 is "
        "free",
    ):
        Run.create(run.path, TINY, run.inputs)
    assert not (run.path / "config.json").exists()
    assert run.writer() is None
    assert len(steps_of(run)) == 3


def test_a_folder_that_a_kill_left_empty_is_a_new_run(tmp_path, run):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.config.json-0123abcd").write_text("{")
    new = Run.create(tmp_path / "new", TINY, run.inputs)
    assert Run.open(new.path).config == TINY
    with new.locked():
        new.clear_staging()
    assert {path.name for path in new.path.iterdir()} == {"config.json", "lock"}


def test_a_run_created_by_another_process_at_the_same_time_is_not_overwritten(
    tmp_path, run, monkeypatch
):
    def create_first(folder):
        monkeypatch.undo()
        Run.create(folder, replace(TINY, seed=5), run.inputs)
        return sole_writer(folder)

    monkeypatch.setattr("selfflow.training.run.sole_writer", create_first)
    with pytest.raises(ValueError, match="seed: 5 in the folder, 0 requested"):
        Run.create(tmp_path / "new", TINY, run.inputs)


# requests and sample history


def test_requests_are_made_and_cleared(run):
    for name in ("stop", "sample"):
        assert not run.requested(name)
        run.request(name)
        run.request(name)
        assert Run.open(run.path).requested(name)
        assert (run.path / name).read_bytes() == b""
        run.clear_request(name)
        run.clear_request(name)
        assert not run.requested(name)
    for request in (run.request, run.requested, run.clear_request):
        with pytest.raises(
            ValueError,
            match="unknown request 'stpo'; known are stop, sample. Did you mean 'stop'",
        ):
            request("stpo")


def test_sample_history_is_in_order_and_survives_damage(runs, tmp_path, capsys):
    run = Run.create(tmp_path / "new", TINY, runs["tiny"].inputs)
    assert run.sample_history() == []
    assert not (run.path / "samples").exists()
    grids = {
        step: torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        for step in (500, 250, 1000)
    }
    for step, images in grids.items():
        assert (
            run.save_sample_grid(
                step, images.double(), torch.tensor([1, 2, step % 7])
            ).name
            == f"step-{step:08d}.safetensors"
        )
    for step, images, labels in run.sample_history():
        assert torch.equal(images, grids[step])
        assert images.dtype == torch.float32
        assert labels.tolist() == [1, 2, step % 7]
    assert [step for step, *_ in run.sample_history()] == [250, 500, 1000]
    run.save_sample_grid(250, grids[500], torch.tensor([1, 2, 3]))
    assert torch.equal(run.sample_history()[0][1], grids[500]), (
        "a second grid of a step replaces the first"
    )
    folder = run.path / "samples/film"
    (folder / "step-00000500.safetensors").write_bytes(b"no tensors")
    (folder / "step-best.safetensors").write_bytes(b"nobody's")
    (folder / ".tmpAbc").write_bytes(b"left by a kill")
    assert (
        [step for step, *_ in run.sample_history()]
        == [step for step, *_ in run.sample_history()]
        == [250, 1000]
    )
    assert capsys.readouterr().out.count("skipped") == 1, "the damage is reported once"
    run.clear_staging()
    assert not (folder / ".tmpAbc").exists()
    assert [step for step, *_ in run.sample_history()] == [
        250,
        1000,
    ]


# samples


@pytest.mark.parametrize("method", ["euler", "sde", "heun", "midpoint"])
def test_samples_depend_on_the_seed_alone(runs, method):
    run = runs["tiny"]
    labels = torch.tensor([3, 1, 4, 1, 5])
    assert not run.teacher.training
    torch.manual_seed(1)
    stream = torch.get_rng_state()
    images = run.sample(labels, 4, method, seed=2)["image"]
    assert torch.equal(images, run.sample(labels, 4, method, seed=2)["image"]), "again"
    assert images.shape == (5, 1, 8, 8)
    assert images.isfinite().all()
    assert torch.equal(stream, torch.get_rng_state())
    for batch in (1, 2, 3):
        torch.testing.assert_close(
            run.sample(labels, 4, method, seed=2, batch=batch)["image"],
            images,
            atol=1e-5,
            rtol=1e-5,
        )
    assert (run.sample(labels, 4, method, seed=3)["image"] - images).abs().max() > 0.1
    assert (images[1] - images[3]).abs().max() > 0.1, "one class, two noises"


def test_the_sde_adds_noise_of_its_own(runs):
    run = runs["tiny"]
    labels = torch.tensor([0, 1])
    x1 = torch.randn(2, 16, 4, generator=keyed(5, "samples"))
    noise = [
        torch.stack(
            [
                torch.randn(16, 4, generator=keyed(5, "sampling noise", step, sample))
                for sample in range(2)
            ]
        )
        for step in range(6)
    ]
    expected = sample(
        guided_velocity(run.teacher, run.sources.condition_for(labels)),
        x1,
        6,
        "sde",
        noise=lambda step: noise[step],
    )
    torch.testing.assert_close(
        run.sample(labels, 6, "sde", seed=5)["image"],
        run.layout().unpatchify(expected)["image"],
    )
    assert (
        run.sample(labels, 6, "sde", seed=5)["image"]
        - run.sample(labels, 6, seed=5)["image"]
    ).abs().max() > 0.1


def test_shift_and_interval_are_those_of_the_sampler(runs):
    run = runs["tiny"]
    labels = torch.tensor([0, 1, 2])
    x1 = torch.randn(3, 16, 4, generator=keyed(0, "samples"))
    velocity_fn = guided_velocity(
        run.teacher, run.sources.condition_for(labels), 4.0, (0.3, 0.8)
    )
    expected = run.layout().unpatchify(sample(velocity_fn, x1, 5, "heun", shift=3.0))[
        "image"
    ]
    actual = run.sample(labels, 5, "heun", 4.0, shift=3.0, interval=(0.3, 0.8))["image"]
    torch.testing.assert_close(actual, expected)
    for change in ({"shift": 1.0}, {"interval": (0.0, 1.0)}, {"cfg_scale": 1.0}):
        options = {"cfg_scale": 4.0, "shift": 3.0, "interval": (0.3, 0.8), **change}
        assert (
            run.sample(labels, 5, "heun", **options)["image"] - expected
        ).abs().max() > 1e-4, change


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shift": 0.0}, "shift"),
        ({"interval": (0.5, 0.5), "cfg_scale": 2.0}, r"interval is \(0.5, 0.5\)"),
        ({"interval": (-0.1, 1), "cfg_scale": 2.0}, "interval"),
        ({"method": "rk4"}, "unknown sampler 'rk4'"),
        ({"method": "sde", "steps": 1}, "at least 2"),
        ({"labels": torch.tensor([], dtype=torch.int64)}, "labels is empty"),
    ],
)
def test_bad_requests_for_samples_are_refused(runs, options, words):
    with pytest.raises(ValueError, match=words):
        runs["tiny"].sample(**{"labels": torch.tensor([1]), **options})


def test_guidance_needs_a_model_that_knows_the_null_label(run):
    stored = json.loads((run.path / "config.json").read_text())
    stored["config"]["objective"]["label_drop"] = 0.0
    (run.path / "config.json").write_text(json.dumps(stored))
    never = Run.open(run.path)
    labels = torch.tensor([1, 2])
    for cfg_scale in (2.0, 0.0):
        with pytest.raises(
            ValueError,
            match=f"cfg_scale is {cfg_scale}, but this run was trained without label "
            f"dropout",
        ):
            never.sample(labels, 2, cfg_scale=cfg_scale)["image"]
    assert torch.equal(never.sample(labels, 2)["image"], run.sample(labels, 2)["image"])


def test_samples_of_a_model_that_is_given(runs, tmp_path):
    run = runs["tiny"]
    labels = torch.tensor([1, 2, 3])
    assert torch.equal(
        run.sample(labels, 3, model=run.teacher)["image"],
        run.sample(labels, 3)["image"],
    )
    expected = run.sample(labels, 3, cfg_scale=2.0, model=run.model)["image"]
    assert (expected - run.sample(labels, 3, cfg_scale=2.0)["image"]).abs().max() > 1e-3
    new = Run.create(tmp_path / "new", TINY, run.inputs)
    assert torch.equal(
        new.sample(labels, 3, cfg_scale=2.0, model=run.model)["image"], expected
    ), "no checkpoint is needed"
    with pytest.raises(FileNotFoundError, match="no intact checkpoint yet"):
        new.sample(labels, 3)


def test_seconds_between_logged_steps_are_interpolated(tmp_path):
    run = Run.create(
        tmp_path / "run", TINY, TransformerConfig.of_image(1, (4, 4), 16, 2, 2)
    )
    assert np.isnan(run.seconds_at(3))
    lines = ({"step": 4, "seconds": 2.0}, {"step": 8, "seconds": 6.0})
    run.timing_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [run.seconds_at(step) for step in (0, 2, 4, 6, 8)] == [0, 1, 2, 4, 6]
