"""A run with a user's objective trains, resumes, samples, and is reported."""

import json
from pathlib import Path

import programs
import pytest
from shell import shell

FILE = Path(__file__).with_name("own_objective.py")
SMALL = [
    "--model.width",
    "16",
    "--model.depth",
    "2",
    "--model.heads",
    "2",
    "--training.batch",
    "8",
    "--training.validation",
    "8",
]
OWN = ["--use", FILE, "--objective.name", "clean_view"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with a run of three steps, trained from the command line."
    folder = tmp_path_factory.mktemp("objective")
    settings = ["--name", "mine", *SMALL, *OWN, "--objective.rep-weight", "0.4"]
    length = ["--training.steps", "3", "--workers", "1", "--device", "cpu"]
    done = programs.run("-m", "selfflow.cli", "train", *settings, *length, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_it_is_trained_resumed_sampled_probed_and_reported(trained):
    stored = json.loads((trained / "runs/mine/config.json").read_text())
    assert stored["use"] == [str(FILE)]
    assert stored["config"]["objective"]["rep_weight"] == 0.4
    assert "rep_loss" in (trained / "runs/mine/log.jsonl").read_text()
    config = ["--config", "runs/mine/config.json"]
    resumed, *others = shell(
        trained,
        ["train", "--use", FILE, *config, "--training.steps", "5", "--device", "cpu"],
        ["sample", "runs/mine", "--each", "1", "--steps", "2", "--use", FILE],
        ["probe", "runs/mine", "--samples", "200", "--use", FILE],
        ["report", "runs/mine", "--use", FILE],
        ["runs", "--use", FILE],
    )
    assert resumed.status == 0
    assert "5 steps" in resumed.output
    for answer in others:
        assert answer.status == 0, answer.errors


def test_unusable_objectives_are_named_in_one_line(trained, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "twice.py").write_text(
        "from selfflow import register_objective\nregister_objective('sra', print)\n"
    )
    refused = {
        ("--use", "nowhere.py"): "there is no file",
        ("--use",): "needs a Python file",
        ("--use", "broken.py"): "failed on import: ZeroDivisionError",
        ("--use", "twice.py"): "'sra' is registered twice",
        ("--objective.name", "sra_"): "Did you mean 'sra'",
        (*OWN, "--objective.offset", "0.1"): "offset is an option of objective sra",
    }
    run = str(trained / "runs/mine")
    commands = [["train", *arguments] for arguments in refused]
    *answers, without_file = shell(tmp_path, *commands, ["sample", run])
    for answer, words in zip(answers, refused.values(), strict=True):
        assert words in answer.refusal
    assert f"--use {FILE}" in without_file.refusal
    assert not (tmp_path / "runs").exists()


def test_help_shows_the_options_of_the_named_objective():
    (answer,) = shell(FILE.parent, ["train", *OWN, "--help"])
    assert answer.status == 0
    assert "--objective.teacher-layer" in answer.output
    assert "--objective.offset" not in answer.output
