"""A user's objective, from a shell: trained, gone on with, sampled, probed, in the
report.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def shell(folder, *args):
    done = subprocess.run(
        [sys.executable, "-m", "selfflow.cli", *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective")
    code, _, problem = shell(
        folder,
        "train",
        "--use",
        FILE,
        "--name",
        "mine",
        *SMALL,
        "--training.steps",
        "3",
        "--objective.name",
        "clean_view",
        "--objective.rep-weight",
        "0.4",
        "--workers",
        "1",
        "--device",
        "cpu",
    )
    assert code == 0, problem
    return folder


def test_it_is_trained_and_goes_on(trained):
    stored = json.loads((trained / "runs/mine/config.json").read_text())
    assert (
        stored["use"] == [str(FILE)]
        and stored["config"]["objective"]["rep_weight"] == 0.4
    )
    assert "rep_loss" in (trained / "runs/mine/log.jsonl").read_text()
    code, said, problem = shell(
        trained,
        "train",
        "--use",
        FILE,
        "--config",
        "runs/mine/config.json",
        "--training.steps",
        "5",
        "--device",
        "cpu",
    )
    assert code == 0 and "5 steps" in said, problem


def test_it_is_sampled_probed_and_reported(trained):
    drawn = ["sample", "runs/mine", "--each", "1", "--steps", "2"]
    for args in (drawn, ["probe", "runs/mine"], ["report", "runs/mine"], ["runs"]):
        code, _, problem = shell(trained, *args, "--use", FILE)
        assert code == 0, problem


def test_without_the_file_one_line_names_it(trained):
    code, _, problem = shell(trained, "sample", "runs/mine")
    assert (
        code == 2
        and f"--use {FILE}" in problem
        and len(problem.strip().splitlines()) == 1
    )


def test_help_shows_the_options_of_the_objective_that_is_named():
    code, said, _ = shell(
        FILE.parent,
        "train",
        f"--use={FILE}",
        "--objective.name",
        "clean_view",
        "--help",
    )
    assert (
        code == 0
        and "--objective.teacher-layer" in said
        and "--objective.offset" not in said
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (["--use", "nowhere.py"], "there is no file"),
        (["--use"], "needs a Python file"),
        (["--use", "broken.py"], "failed on import: ZeroDivisionError"),
        (["--use", "twice.py"], "'sra' is registered twice"),
        (["--objective.name", "sra_"], "Did you mean 'sra'"),
        (
            [
                "--use",
                FILE,
                "--objective.name",
                "clean_view",
                "--objective.offset",
                "0.1",
            ],
            "offset is an option of objective sra",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, args, words):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "twice.py").write_text(
        "from selfflow import register_objective\nregister_objective('sra', print)\n"
    )
    code, _, problem = shell(tmp_path, "train", *args)
    assert code == 2 and words in problem and len(problem.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
