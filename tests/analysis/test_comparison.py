"""Runs are compared by the cost of a step, which equals that of training, in tables
that survive damaged folders, and by curves against steps, time or operations.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY

from selfflow.analysis import benchmark, comparison
from selfflow.analysis.benchmark import count_flops, flops_per_step
from selfflow.analysis.comparison import (
    AGAINST,
    fit_table,
    readable,
    run_curves,
    runs_table,
)
from selfflow.analysis.probe_records import write_probes
from selfflow.analysis.probing import probe_run
from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.method.backbone import Inputs
from selfflow.method.layers import Groups
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.method.schedule import NoiseLevels
from selfflow.method.tokens import Part
from selfflow.training.checkpoint import FORMAT, find_runs
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run


def flops_of_training(config, folder, features=None):
    "FLOPs of a training step: half the difference between three steps and one."
    counts = []
    for steps in (1, 3):
        training = replace(
            config.training,
            steps=steps,
            validate_every=9,
            log_every=9,
            save_every=9,
            sample_every=0,
        )
        named = replace(config, name=f"steps-{steps}", training=training)
        counts.append(
            count_flops(lambda named=named: train(named, folder, "cpu", features))
        )
    return (counts[1] - counts[0]) / 2


NAMES = ("self_flow", "flow_matching", "sra", "layer_sync", "repa")
MASKED = {
    "schedule": "dual",
    "flow_tokens": "masked",
    "rep_tokens": "noisier",
    "normalise": "standardised",
}


@pytest.mark.parametrize(
    "name, switches, checkpointing",
    [
        *((name, {}, False) for name in NAMES),
        *((name, {"schedule": "dual"}, True) for name in NAMES),
        ("self_flow", {"schedule": "diffusion_forcing"}, False),
        ("self_flow", MASKED, False),
        ("repa", MASKED, False),
    ],
)
def test_flops_equal_those_of_a_training_step(name, switches, checkpointing, tmp_path):
    training = replace(TINY.training, checkpointing=checkpointing)
    config = replace(
        TINY, objective=ObjectiveConfig(name, **switches), training=training
    )
    features = torch.randn(1078, 5) if name == "repa" else None
    counted = flops_per_step(config, Inputs((Part("image", 4, (1, 4, 4)),), 10), 5)
    measured = flops_of_training(config, tmp_path, features)
    if switches is MASKED:
        # the diagnosis of the last step covers more tokens in one run than in the other
        assert measured == pytest.approx(counted, rel=1e-3)
    else:
        assert measured == counted


def test_flops_of_a_modern_model_equal_those_of_a_training_step(tmp_path):
    config = replace(
        TINY,
        model=ModelConfig(
            width=32,
            depth=3,
            heads=2,
            mlp_ratio=2.5,
            positions="rotary",
            mlp="swiglu",
            qk_norm=True,
            modulation="shared",
        ),
        training=replace(TINY.training, precision="bf16", accumulate=2),
    )
    shape = Inputs((Part("image", 4, (1, 4, 4)),), 10)
    assert flops_of_training(config, tmp_path) == flops_per_step(config, shape)


def test_attention_within_levels_is_counted_for_one_draw(tmp_path):
    config = replace(TINY, objective=ObjectiveConfig(separated=True, mask_ratio=0.5))
    shape = Inputs((Part("image", 4, (1, 4, 4)),), 10)
    unseparated = flops_per_step(
        replace(config, objective=ObjectiveConfig(mask_ratio=0.5)), shape
    )
    counted = flops_per_step(config, shape)
    measured = flops_of_training(config, tmp_path)
    assert counted == pytest.approx(measured, rel=0.02)
    assert counted != unseparated
    # two groups of eight: half of the pairs
    levels = NoiseLevels(torch.rand(1, 2), torch.tensor([[0, 1] * 8]))
    assert sum(len(g.rows) * len(g.keys) for g in Groups.of(levels).groups) == 128


def test_flops_scale_with_the_batch_and_follow_their_formula():
    shape = Inputs((Part("image", 16, (1, 16, 16)),), 10)
    config = replace(
        TINY,
        model=ModelConfig(width=64, depth=4, heads=2),
        objective=ObjectiveConfig("flow_matching"),
    )
    single, double = (
        flops_per_step(replace(config, training=TrainConfig(batch=b)), shape)
        for b in (1, 2)
    )
    assert double == 2 * single
    n = 256
    d = 64
    depth = 4
    attention = 4 * n * n * d * depth
    linear = 2 * (
        depth * n * 12 * d * d
        + depth * 6 * d * d
        + 2 * n * 16 * d
        + 2 * d * d
        + 256 * d
        + d * d
    )
    # the first layers need no gradient of their input
    assert single == pytest.approx(3 * (attention + linear), rel=0.01)


def test_the_largest_model_is_counted_once_and_without_memory(monkeypatch):
    models = []
    original = benchmark.build_backbone
    monkeypatch.setattr(
        benchmark,
        "build_backbone",
        lambda *args: models.append(original(*args)) or models[-1],
    )
    benchmark._flops_of_sample.cache_clear()
    shape = Inputs((Part("image", 16, (1, 16, 16)),), 1000)
    config = replace(
        TINY, model=ModelConfig(size="XL"), training=TrainConfig(batch=256)
    )
    assert 2.0e14 < flops_per_step(config, shape) < 2.5e14
    assert all(p.is_meta for p in models[0].parameters())
    flops_per_step(replace(config, training=TrainConfig(batch=8)), shape)
    assert len(models) == 1, (
        "the count is per sample and not repeated for another batch"
    )


# folders


def old_copy(run, path):
    "A copy of a run as older versions left it, without its times."
    shutil.copytree(run.path, path)
    (path / "timing.jsonl").unlink()
    return path


def timed(path, speed=2.0, **values):
    steps = Run.open(path, "cpu").log["step"]
    lines = [
        {
            "step": step,
            "seconds": step * speed,
            "wall": step * speed + 1,
            "steps_per_second": 1 / speed,
            "data_wait": 0.0,
            "peak_memory": 1,
            "device": "a small machine",
            "processes": 2,
            **values,
        }
        for step in steps.tolist()
    ]
    (path / "timing.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )


@pytest.fixture
def folder(runs, tmp_path):
    "A folder with runs in every state."
    root = tmp_path / "runs"
    old_copy(runs["vanilla"], root / "run10")
    for path in (
        "run2",
        "deep/inside",
        "stopped",
        "halved",
        "edited",
        "strange",
        "unlogged",
        "no config",
    ):
        old_copy(runs["tiny"], root / path)
    shutil.rmtree(root / "stopped/checkpoints/step-00000012")
    shutil.rmtree(root / "stopped/checkpoints/step-00000008")
    for checkpoint in (root / "halved/checkpoints").iterdir():
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    (root / "edited/config.json").write_text("{")
    (root / "strange/config.json").write_text('{"model_type": "bert"}')
    (root / "unlogged/log.jsonl").write_text("\0\0\n")
    (root / "no config/config.json").unlink()
    Run.create(root / "fresh", replace(TINY, name="fresh"), runs["tiny"].inputs, "cpu")
    (root / "notes").mkdir()
    (root / "notes/read me.txt").write_text("no run")
    (root / ".hidden").mkdir()
    (root / ".hidden/config.json").write_text("{}")
    return root


def test_runs_are_listed_in_natural_order(folder):
    paths = find_runs(folder)
    assert list(paths) == [
        "deep/inside",
        "edited",
        "fresh",
        "halved",
        "no config",
        "run2",
        "run10",
        "stopped",
        "strange",
        "unlogged",
    ]
    assert find_runs(folder / "run2") == {"run2": folder / "run2"}
    assert paths["run10"] == folder / "run10"
    with pytest.raises(
        FileNotFoundError, match="there is no folder .*selfflow train --folder"
    ):
        find_runs(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no run yet"):
        find_runs(folder / "notes")


def test_the_table_states_the_progress_of_each_run(folder):
    table = runs_table(folder)
    states = dict(table["state"])
    assert states["run2"] == states["deep/inside"] == "finished"
    assert states["fresh"] == "not started"
    assert states["stopped"] == "stopped at step 4"
    assert table.loc["stopped", "step"] == 4
    assert table.loc["run2", "steps"] == 12
    assert states["halved"].startswith("damaged: no intact checkpoint (step ")
    for name, words in {
        "edited": "config.json",
        "strange": "config.json",
        "no config": "no config.json",
    }.items():
        assert states[name].startswith("damaged: ")
        assert words in states[name]
    log = Run.open(folder / "run2", "cpu").log
    assert table.loc["run2", "flow loss"] == pytest.approx(
        log["flow_loss"].tail(20).mean()
    )
    assert table.loc["run2", "validation"] == log["validation_flow_loss"].iloc[-1]
    assert table.loc["run2", "cosine"] == pytest.approx(log["cosine"].mean())
    assert table.loc["stopped", "flow loss"] == pytest.approx(
        log["flow_loss"][:4].mean()
    ), "steps after the last checkpoint do not count"
    assert all(
        pd.isna(table.loc[place])
        for place in (("run10", "cosine"), ("run2", "seconds"), ("fresh", "cosine"))
    )
    run = Run.open(folder / "run2", "cpu")
    assert table.loc["run2", "FLOPs"] == 12 * flops_per_step(run.config, run.inputs)


def test_the_table_shows_only_settings_that_differ(folder):
    assert [name for name in runs_table(folder) if "." in name] == ["objective.name"]
    pair = {name: folder / name for name in ("run2", "stopped")}
    assert not [name for name in runs_table(pair) if "." in name]
    mixed = runs_table(
        {"a": Run.open(folder / "run2", "cpu"), "b": str(folder / "run10")}
    )
    assert mixed["objective.name"].tolist() == ["self_flow", "flow_matching"]


def test_the_process_that_trains_is_named(folder):
    run = Run.open(folder / "stopped", "cpu")
    with run.locked():
        state = runs_table({"it": run}).loc["it"]
    assert str(os.getpid()) in state["state"]
    assert state["state"].startswith("training")
    assert state["step"] == 12
    assert runs_table({"it": run}).loc["it", "state"] == "stopped at step 4"


def test_the_table_shows_probes_times_and_losses_that_were_not_finite(folder):
    run = Run.open(folder / "run2", "cpu")
    write_probes(
        run,
        probe_run(
            run,
            levels=(0.0, 0.5),
            layers=(2,),
            families=("regression",),
            strengths=(0.1,),
        ),
    )
    (folder / "run10/probe.json").write_text("[]")
    timed(folder / "run2")
    for name, step in {"stopped": 5, "run2": 5, "run10": 13}.items():
        (folder / name / "not_finite.json").write_text(json.dumps({"step": step}))
    table = runs_table(folder)
    row = table.loc["run2"]
    assert 0 < row["probe"] < 1
    assert row["probe cell"].startswith("block 2, t = ")
    assert row["probe cell"].endswith("step 12")
    assert (row["seconds"], row["device"], row["processes"]) == (
        24.0,
        "a small machine",
        2,
    )
    assert table.loc["stopped", "state"] == "stopped at step 5: the loss was not finite"
    assert table.loc["run2", "state"] == "finished"
    # training has passed that step since
    (folder / "stopped/not_finite.json").write_text('{"step": 4}')
    assert runs_table(folder).loc["stopped", "state"] == "stopped at step 4"
    # an unreadable file leaves the rest of the row intact
    assert table.loc["run10", "state"].startswith("damaged: ")
    assert table.loc["run10", "step"] == 12
    text = readable(table).loc["run2"]
    assert text["step"] == "12/12"
    assert text["time"] == "0:00:24"
    assert text["probe"].endswith("step 12)")
    assert "%" in text["probe"]


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", "[]"),
        (
            "config.json",
            f'{{"format": {FORMAT}, "config": [], "inputs": 3, "data": {{}}}}',
        ),
        ("config.json", "\0"),
        ("log.jsonl", '{"step": "x"}\n'),
        ("log.jsonl", "[1]\n"),
        ("timing.jsonl", '{"step": 1}\n'),
        ("probe.json", "{}"),
        ("checkpoints/step-00000012/manifest.json", "[]"),
        ("checkpoints/step-00000012/manifest.json", '{"state.json": 1}'),
        ("checkpoints/step-x/state.json", ""),
        ("writer.json", "?"),
        ("log.jsonl", '{"step": 1, "flow_loss": "much"}\n'),
    ],
)
def test_a_damaged_file_never_breaks_the_table(runs, tmp_path, file, content):
    path = old_copy(runs["tiny"], tmp_path / "runs/bad")
    old_copy(runs["vanilla"], tmp_path / "runs/good")
    (path / file).parent.mkdir(exist_ok=True)
    (path / file).write_text(content)
    table = runs_table(tmp_path / "runs")
    assert table.loc["good", "state"] == "finished"
    assert isinstance(table.loc["bad", "state"], str)
    assert "good" in fit_table(table)
    assert "bad" in fit_table(table)


def test_flops_of_repa_need_the_width_of_its_features(runs, tmp_path):
    config = replace(
        TINY,
        name="repa",
        objective=ObjectiveConfig("repa"),
        training=replace(TINY.training, steps=2),
    )
    run = train(config, tmp_path, "cpu", torch.randn(1078, 7))
    assert runs_table(tmp_path).loc["repa", "FLOPs"] == 2 * flops_per_step(
        config, run.inputs, 7
    )
    shutil.rmtree(tmp_path / "repa/checkpoints")
    assert pd.isna(runs_table(tmp_path).loc["repa", "FLOPs"])
    Run.open(tmp_path / "repa", "cpu")
    old_copy(runs["tiny"], tmp_path / "tiny")
    (tmp_path / "tiny/checkpoints/step-00000012/objective.safetensors").write_bytes(
        b"x"
    )
    assert (
        runs_table(tmp_path)
        .loc["tiny", "state"]
        .startswith("stopped at step 8; 1 of 3 checkpoints damaged")
    )


@pytest.mark.parametrize(
    "file, content, words",
    [
        (
            "timing.jsonl",
            '{"step": 1}\n',
            r"bad/timing.jsonl has no seconds, device, processes; remove it",
        ),
        (
            "timing.jsonl",
            '{"step": 1, "seconds": "long", "device": "cpu", "processes": 1}\n',
            "timing.jsonl has what is no number in seconds",
        ),
        (
            "log.jsonl",
            '{"step": 1, "flow_loss": 1.0}\n'
            '{"step": 2, "flow_loss": "much", "cosine": [1]}\n',
            "bad/log.jsonl has what is no number in flow_loss, cosine; remove those",
        ),
    ],
)
def test_damage_in_a_file_is_reported_with_its_remedy(
    runs, tmp_path, file, content, words
):
    path = old_copy(runs["tiny"], tmp_path / "bad")
    (path / file).write_text(content)
    state = runs_table(tmp_path).loc["bad", "state"]
    assert re.search("^damaged: .*" + words, state)
    assert "Error" not in state
    with pytest.raises(ValueError, match=words.partition(",")[0]):
        run_curves(tmp_path, against="seconds" if file == "timing.jsonl" else "steps")


def test_a_run_whose_first_steps_were_not_timed_has_no_time(runs, tmp_path):
    timed(
        old_copy(runs["tiny"], tmp_path / "old"),
        seconds=None,
        wall=None,
        device="AMD EPYC 9B14, 2 threads",
    )
    timed(old_copy(runs["vanilla"], tmp_path / "new"))
    table = runs_table(tmp_path)
    assert pd.isna(table.loc["old", "seconds"])
    assert table.loc["old", "state"] == "finished"
    text = readable(table)
    assert text.loc["old", "time"] == ""
    assert text.loc["old", "device"] == "AMD EPYC 9B14"
    assert text.loc["new", "time"] == "0:00:24"
    assert "old" in fit_table(table)
    assert "time" not in readable(runs_table(tmp_path / "old"))
    with pytest.raises(
        ValueError, match="run old did not keep its time from the start"
    ):
        run_curves(tmp_path, against="seconds")
    assert len(run_curves(tmp_path, against="steps")) == 2


@pytest.mark.parametrize(
    "file, near",
    [
        ("runs/a/config.json", ", such as .*runs/a$"),
        ("runs/note", ", such as .*runs$"),
        ("note", "the folder of one run"),
    ],
)
def test_a_file_given_as_a_folder_of_runs_is_refused(runs, tmp_path, file, near):
    old_copy(runs["tiny"], tmp_path / "x/y/runs/a")
    for name in ("x/y/runs/note", "note"):
        (tmp_path / name).write_text("no run")
    with pytest.raises(
        NotADirectoryError, match=f"{Path(file).name} is a file; .*{near}"
    ):
        find_runs(tmp_path / ("" if file == "note" else "x/y") / file)


# text


def test_tables_fit_the_terminal_and_name_what_they_leave_out(folder):
    table = runs_table(folder)
    for width in (200, 120, 100, 80, 60):
        text = fit_table(table, width)
        rows = [
            line
            for line in text.splitlines()
            if not line.startswith("Left out") and ": " not in line
        ]
        assert max(map(len, rows)) <= width
        assert all(name in text for name in table.index)
        # damage is described in full
        assert "no intact checkpoint" in text
        assert "config.json" in text
    assert "Left out for the width of 60: " in fit_table(table, 60)
    assert "Left out" not in fit_table(table, 200)
    few = fit_table(runs_table({name: folder / name for name in ("run2", "run10")}), 60)
    # two runs are shown side by side
    assert "Left out" not in few
    assert few.splitlines()[0].split() == ["run2", "run10"]
    assert fit_table(table, 1).count("\n") >= len(table) - 1


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (360000, "100:00:00")],
)
def test_times_are_readable(seconds, text):
    assert comparison._time(seconds) == text


@pytest.mark.parametrize(
    "flops, text",
    [
        (0, "0 FLOP"),
        (999, "999 FLOP"),
        (2.5e9, "2.5 GFLOP"),
        (1.234e21, "1.23 ZFLOP"),
        (5e25, "5e+04 ZFLOP"),
    ],
)
def test_flops_are_readable(flops, text):
    assert comparison._with_unit(flops) == text


# curves


def test_curves_equal_the_log(folder):
    pair = {name: folder / name for name in ("run2", "run10")}
    log = Run.open(folder / "run2", "cpu").log
    steps, losses = run_curves(pair)["run2"]
    assert steps.tolist() == log["step"].tolist()
    assert losses.tolist() == log["flow_loss"].tolist()
    steps, losses = run_curves(pair, "validation_flow_loss")["run10"]
    assert steps.tolist() == [6, 12]
    assert (
        losses.tolist()
        == Run.open(folder / "run10").log["validation_flow_loss"].dropna().tolist()
    )
    assert list(run_curves(pair, "cosine")) == ["run2"], "flow matching has none"
    curves = run_curves(pair, against="flops")
    for name, objective in {
        "run2": ObjectiveConfig(),
        "run10": ObjectiveConfig("flow_matching"),
    }.items():
        each = flops_per_step(
            replace(TINY, objective=objective), Run.open(folder / name).inputs
        )
        assert curves[name][0].tolist() == [step * each for step in range(1, 13)]
    assert curves["run2"][0][-1] > 1.2 * curves["run10"][0][-1]


def test_curves_against_time_need_the_time(folder):
    pair = {name: folder / name for name in ("run2", "run10")}
    timed(folder / "run2")
    with pytest.raises(
        ValueError,
        match="run run10 did not keep its time .*compare it against steps or flops",
    ):
        run_curves(pair, against="seconds")
    timed(folder / "run10", 1.5)
    curves = run_curves(pair, "validation_flow_loss", "seconds")
    assert curves["run2"][0].tolist() == [12.0, 24.0]
    assert curves["run10"][0].tolist() == [9.0, 18.0]
    lines = (folder / "run2/timing.jsonl").read_text().splitlines(keepends=True)
    # the last line is not written yet
    (folder / "run2/timing.jsonl").write_text("".join(lines[:-1]))
    assert run_curves(pair, against="seconds")["run2"][0].tolist() == [
        2.0 * step for step in range(1, 12)
    ]
    # a run started by a version that stored no times
    (folder / "run2/timing.jsonl").write_text("".join(lines[6:]))
    with pytest.raises(
        ValueError, match="run run2 did not keep its time from the start"
    ):
        run_curves(pair, against="seconds")


def test_times_equal_those_that_training_recorded(runs):
    table = runs_table(runs)
    run = runs["tiny"]
    assert (table["seconds"] > 0).all()
    assert (table["processes"] == 1).all()
    assert table["device"].str.len().min() > 0
    assert table.loc["tiny", "seconds"] == run.timing["seconds"].iloc[-1]
    seconds, losses = run_curves(runs, against="seconds")["tiny"]
    assert seconds.tolist() == run.timing["seconds"].tolist()
    assert losses.tolist() == run.log["flow_loss"].tolist()


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"measure": "flowloss"},
            "unknown measure 'flowloss'.*Did you mean 'flow_loss'",
        ),
        ({"against": "step"}, "unknown cost .*Did you mean 'steps'"),
    ],
)
def test_unknown_measures_and_costs_are_refused(folder, options, words):
    with pytest.raises(ValueError, match=words):
        run_curves({"it": folder / "run2"}, **options)


# the command


def test_the_command_prints_a_table_and_draws_curves(folder, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")
    main(["runs", str(folder)])
    printed = capsys.readouterr().out
    assert "stopped at step 4" in printed
    assert "damaged" in printed
    assert not list(folder.glob("*.png"))
    timed(folder / "run2")
    main(
        [
            "runs",
            str(folder),
            "--names",
            "run2",
            "run10",
            "--against",
            "flops",
            "--measure",
            "cosine",
        ]
    )
    printed = capsys.readouterr().out
    assert (
        f"the picture is {folder}/comparison.png; it has no curve of run10" in printed
    )
    assert "stopped" not in printed
    assert (folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    main(["runs", str(folder), "--output", str(folder / "other.png")])
    assert (folder / "other.png").stat().st_size > 5000
    assert "it has no curve of edited" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, words",
    [
        (["--names", "run1"], "unknown run in"),
        (["--against", "hours"], "unknown cost"),
        (["--against", "seconds"], "did not keep its time"),
        (["--names", "fresh", "--output", "x"], "no run has logged a step yet"),
        (
            ["--names", "edited", "strange", "--against", "steps"],
            "there is nothing to draw: no run could be read",
        ),
    ],
)
def test_the_command_explains_mistakes(folder, capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        main(["runs", str(folder), *args])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_every_cost_has_a_name_and_units():
    for label, units in AGAINST.values():
        assert label
        assert [size for size, _ in units] == sorted(size for size, _ in units)


def test_an_unreadable_weights_file_does_not_break_the_table(runs, tmp_path):
    config = replace(
        TINY,
        name="repa",
        objective=ObjectiveConfig("repa"),
        training=replace(TINY.training, steps=1),
    )
    train(config, tmp_path, "cpu", torch.randn(1078, 7))
    head = tmp_path / "repa/checkpoints/step-00000001/objective.safetensors"
    manifest = head.parent / "manifest.json"
    head.write_bytes(b"no weights")
    stored = json.loads(manifest.read_text())
    stored["objective.safetensors"]["size"] = head.stat().st_size
    manifest.write_text(json.dumps(stored))
    assert (
        "objective.safetensors cannot be read"
        in runs_table(tmp_path).loc["repa", "state"]
    )


@pytest.mark.parametrize(
    "data, given",
    [
        (DataConfig("motion", size=16, frames=8, patch=4), "first_frame"),
        (DataConfig("scenes", size=16, frames=8, columns=1, patch=4), "either"),
        (DataConfig("shapes", size=16, patch=4, condition="caption"), ""),
    ],
)
def test_the_table_includes_runs_of_video_audio_and_captions(tmp_path, data, given):
    config = Config(
        "made",
        data=data,
        model=ModelConfig(width=16, depth=3, heads=2),
        objective=ObjectiveConfig(given=given),
        training=TrainConfig(steps=1, batch=2, validation=2, sample_every=0),
    )
    run = train(config, tmp_path, bar=False)
    table = runs_table(tmp_path)
    assert table.loc["made", "FLOPs"] == flops_per_step(config, run.inputs) > 0
    assert table.loc["made", "state"] == "finished"
    plain = replace(config, objective=replace(config.objective, given=""))
    assert flops_per_step(plain, run.inputs) == table.loc["made", "FLOPs"]
