"""A study reads only valid files, gives its arms equal operations, resumes after an
interruption, lists failures and compares arms over seeds.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from selfflow.analysis import study as module
from selfflow.analysis.study import (
    Judging,
    Study,
    compare_arms,
    export_run,
    run_study,
    steps_of,
    study_record,
    study_status,
    study_table,
)
from selfflow.cli import main
from selfflow.training.export import load
from selfflow.training.run import Run, run_at

STUDIES = sorted((Path(__file__).parents[2] / "nbs/studies").glob("*.toml"))
FILE = """
seeds = [0, 1]
preset = "digits-small"
equal_flops = "Self-Flow"

[shared.model]
width = 16
depth = 2
heads = 2

[shared.training]
steps = 4
batch = 8
save_every = 2
validate_every = 4
validation = 20
sample_every = 0

[budgets.cpu]
[budgets.long.training]
steps = 8

[arms."flow matching".objective]
name = "flow_matching"

[arms."Self-Flow".objective]
name = "self_flow"

[judging]
probe_levels = [0.0]
probe_counts = {train = 60, validation = 30, test = 30}
strengths = [1.0]
samples = 12
sampling_steps = 2
cfg_scales = [1, 2]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "little.toml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished study: its folder, and its record."
    folder = tmp_path_factory.mktemp("finished")
    (folder / "little.toml").write_text(FILE)
    study = Study.read(folder / "little.toml")
    return study, folder, run_study(study, folder)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_project_are_valid_and_fair(path):
    study = Study.read(path)
    first_arm = study.config(next(iter(study.arms)), study.seeds[0])
    for arm in study.arms:
        config = study.config(arm, study.seeds[0])
        half_life = first_arm.training.ema_half_life  # the teacher's
        training = replace(config.training, ema_half_life=half_life)
        aligned = replace(
            config,
            objective=first_arm.objective,
            training=training,
            name=first_arm.name,
        )
        assert aligned == first_arm, (
            f"{arm} may differ only in its objective and its teacher"
        )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0]", "two or more"),
        ("seeds = [0, 1]", "seeds = [3, 3]", "each once"),
        ("seeds = [0, 1]", "", "has no seeds"),
        ("seeds = [0, 1]", "sedes = [0, 1]", "Did you mean 'seeds'"),
        ("seeds = [0, 1]", "seeds = [0, 1", "not a TOML file"),
        ('"digits-small"', '"digit-small"', "Did you mean 'digits-small'"),
        ('equal_flops = "Self-Flow"', 'equal_flops = "SRA"', "equal_flops"),
        ("width = 16", "widht = 16", "Did you mean 'width'"),
        ("steps = 4", "steps = -4", "-4"),
        ("cfg_scales = [1, 2]", "cfg_scales = [2]", "no guidance"),
        ("samples = 12", "sampels = 12", "Did you mean 'samples'"),
        ("batch = 8", "batch = 8\ncooldown = 0.3", "constant learning rate"),
        ('[arms."Self-Flow".objective]\nname = "self_flow"', "", "needs two"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_trained(file, old, new, message):
    assert old in FILE
    file.write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        Study.read(file)


def test_arms_at_equal_operations_differ_by_less_than_a_step(file):
    study = Study.read(file)
    for budget in study.budgets:
        steps = steps_of(study, budget)
        base = study.config("Self-Flow", 0, budget).training.steps
        assert steps["Self-Flow"] == {"equal steps": base, "equal FLOPs": base}
        spent = {
            arm: module._flops(study.config(arm, 0, budget))
            * chosen_steps["equal FLOPs"]
            for arm, chosen_steps in steps.items()
        }
        a_step = module._flops(study.config("flow matching", 0, budget))
        assert abs(spent["flow matching"] - spent["Self-Flow"]) <= a_step


def test_a_more_expensive_arm_is_judged_at_an_earlier_checkpoint(file):
    file.write_text(
        FILE.replace('equal_flops = "Self-Flow"', 'equal_flops = "flow matching"')
        .replace("steps = 4", "steps = 40")
        .replace("validate_every = 4", "validate_every = 40")
    )
    study = Study.read(file)
    steps = steps_of(study)["Self-Flow"]
    assert steps["equal FLOPs"] < steps["equal steps"] == 40
    config = module._run_config(study, "Self-Flow", 0, "cpu", steps)
    assert config.training.keep_every == steps["equal FLOPs"]
    assert steps["equal FLOPs"] % config.training.save_every == 0


def test_a_study_has_a_row_for_every_run_and_step(finished):
    study, _, record = finished
    assert record["complete"]
    assert not record["failed"]
    assert [(row["seed"], row["arm"], row["at"]) for row in record["rows"]] == [
        (seed, arm, at)
        for seed in (0, 1)
        for arm, at in (
            ("flow matching", ["equal steps"]),
            ("flow matching", ["equal FLOPs"]),
            ("Self-Flow", ["equal steps", "equal FLOPs"]),
        )
    ]
    for row in record["rows"]:
        assert row["FLOPs"] > 0
        assert row["seconds"] > 0
        assert row["code"]
        assert row["torch"]
        assert len(row["flow loss by level"]) == 10
        mean = np.mean(list(row["flow loss by level"].values()))
        assert row["flow loss"] == pytest.approx(mean, rel=1e-5)
        assert {"probe, class", "Frechet distance", "as requested, digit"} <= row.keys()
        by_scale = row["samples on validation"]
        best = min(by_scale, key=lambda scale: by_scale[scale]["Frechet distance"])
        assert row["guidance"] == float(best), "guidance is chosen on validation"
        if best == "1":
            assert row["Frechet distance, guided"] == row["Frechet distance"]
    assert json.loads(json.dumps(record)) == json.loads(
        json.dumps(study_record(study, finished[1]))
    )


def test_an_earlier_step_is_judged_as_the_run_was_then(finished):
    study, folder, record = finished
    early, late = record["rows"][:2]
    assert early["step"] == 4 < late["step"]
    assert early["flow loss"] != late["flow loss"]
    assert (
        Run.open(folder / "little/cpu/flow-matching-0").state()["step"] == late["step"]
    )


def test_a_judged_run_is_exported_as_it_was_at_equal_steps(finished, tmp_path):
    study, folder, record = finished
    row = record["rows"][0]
    place = export_run(study, "flow matching", 0, tmp_path / "little", folder)
    model = load(place, "cpu")
    assert (model.config.name, model.state()["step"]) == ("little", row["step"])
    assert model.exported["metrics"]["Frechet distance"] == row["Frechet distance"]
    run = run_at(Run.open(folder / "little/cpu/flow-matching-0"), row["step"])
    for name, value in run.teacher.state_dict().items():
        torch.testing.assert_close(
            model.teacher.state_dict()[name], value.half().to(value.dtype)
        )
    with pytest.raises(FileNotFoundError, match="was not judged at step 4"):
        export_run(study, "Self-Flow", 0, tmp_path / "none", tmp_path)


def test_a_finished_study_repeats_no_work(finished, monkeypatch):
    study, folder, record = finished
    monkeypatch.setattr(module, "judge_run", None)
    monkeypatch.setattr(module, "_check_folder", lambda *args: None)
    monkeypatch.setattr(module, "train", None)
    assert run_study(study, folder) == record


def test_a_resumed_study_gives_the_same_numbers(finished, tmp_path, monkeypatch):
    study, _, record = finished
    judge = module.judge_run

    def interrupted(run, judging):
        if run.config.seed == 1:
            raise KeyboardInterrupt
        return judge(run, judging)

    monkeypatch.setattr(module, "judge_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path)
    status = study_status(study, tmp_path)
    assert status["state"].tolist() == ["judged", "judged", "trained", "waiting"]
    assert math.isfinite(status["hours left"].sum())
    monkeypatch.setattr(module, "judge_run", judge)
    resumed = run_study(study, tmp_path)
    assert [row["flow loss"] for row in resumed["rows"]] == [
        row["flow loss"] for row in record["rows"]
    ]


def test_a_failed_run_is_listed_and_the_others_continue(file, tmp_path, monkeypatch):
    train = module.train

    def failing(config, *args, **options):
        if config.name == "flow-matching-0" and "miniatures" not in str(args[0]):
            raise FloatingPointError("the loss is not finite at step 3")
        return train(config, *args, **options)

    monkeypatch.setattr(module, "train", failing)
    study = replace(
        Study.read(file),
        judging=Judging((0.0,), {"train": 60, "validation": 30, "test": 30}, (1.0,), 0),
    )
    record = run_study(study, tmp_path)
    assert record["failed"] == [
        {
            "arm": "flow matching",
            "seed": 0,
            "reason": "the loss is not finite at step 3",
        }
    ]
    assert not record["complete"]
    assert {row["seed"] for row in record["rows"] if row["arm"] == "Self-Flow"} == {
        0,
        1,
    }
    assert study_status(study, tmp_path)["state"].tolist().count("failed") == 1
    monkeypatch.setattr(module, "train", train)
    resumed = run_study(study, tmp_path)
    assert resumed["complete"], "a later success counts"
    assert not resumed["failed"]


def test_a_save_every_that_misses_a_judged_step_is_refused_first(file, tmp_path):
    file.write_text(FILE.replace("steps = 4", "steps = 41"))
    with pytest.raises(ValueError, match="save_every 2 does not divide step 41"):
        run_study(Study.read(file), tmp_path)
    assert not (tmp_path / "little").exists(), "nothing was started"


def test_numbers_of_changed_files_or_code_are_not_mixed(finished, monkeypatch):
    study, folder, _ = finished
    with pytest.raises(ValueError, match="take another folder"):
        run_study(replace(study, seeds=(0, 1, 2)), folder)
    losses = module._miniature_losses

    def changed(*args):
        return {
            arm: [1.01 * value for value in own] for arm, own in losses(*args).items()
        }

    monkeypatch.setattr(module, "_miniature_losses", changed)
    with pytest.raises(ValueError, match="computes other losses"):
        run_study(study, folder)


def rows(**values):
    return [
        {"arm": arm, "seed": seed, "at": ["equal steps"], "flow loss": value}
        for arm, own in values.items()
        for seed, value in enumerate(own)
    ]


def test_arms_are_compared_by_a_paired_t_interval_over_seeds():
    first = [0.41, 0.43, 0.39, 0.40]
    second = [0.38, 0.41, 0.38, 0.36]
    record = {"arms": {"a": {}, "b": {}}, "rows": rows(a=first, b=second)}
    comparison = compare_arms(record, "flow loss")["b"]
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert comparison.interval == pytest.approx((expected.low, expected.high))
    assert comparison.difference == pytest.approx(np.mean(second) - np.mean(first))


def test_only_seeds_that_both_arms_have_are_compared():
    record = {"arms": {"a": {}, "b": {}}, "rows": rows(a=[1.0, 2.0, 9.0], b=[1.5, 2.6])}
    assert compare_arms(record, "flow loss")["b"].difference == pytest.approx(0.55)
    record["rows"] = rows(a=[1.0, 2.0], b=[1.5])
    assert compare_arms(record, "flow loss") == {}, "a single seed proves nothing"
    with pytest.raises(ValueError, match="Did you mean 'flow loss'"):
        compare_arms(record, "flow los")


def test_an_unfinished_study_still_has_a_table(finished):
    study, _, record = finished
    unfinished = {**record, "rows": [row for row in record["rows"] if row["seed"] == 0]}
    assert "flow loss" in study_table(unfinished).index
    assert list(study_table(record).columns) == list(study.arms)


def test_a_shell_runs_a_study_and_shows_its_status(finished, capsys, monkeypatch):
    _, folder, record = finished
    command = ["study", str(folder / "little.toml"), "--folder", str(folder)]
    main([*command, "--status"])
    assert capsys.readouterr().out.count("judged") == 4
    monkeypatch.setattr("os.nice", lambda niceness: niceness)
    main(command)
    assert "flow loss" in capsys.readouterr().out
    assert (
        json.loads((folder / "little/cpu/record.json").read_text())["rows"]
        == record["rows"]
    )
