"""What a user sees when something outside goes wrong: a full disk, a closed pipe, a
killed process, a copied folder.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import programs
import pytest
import torch
from conftest import TINY
from faults import at_call
from safetensors.torch import load_file

from selfflow.analysis import benchmark
from selfflow.analysis.benchmark import peak_memory
from selfflow.analysis.comparison import runs_table
from selfflow.cli import main
from selfflow.disk import NotWritten, write_files
from selfflow.report import sample_sections
from selfflow.training import loop as training
from selfflow.training.run import Run
from selfflow.training.watching import Listing

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(runs, tmp_path):
    "The folder of a run that may be changed."
    return Path(shutil.copytree(runs["tiny"].path, tmp_path / "runs/tiny"))


# what cannot be written


def test_several_files_are_all_there_or_none_is_new(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for k in range(1, 40):
        folder = tmp_path / str(k)
        folder.mkdir()
        contents = {folder / name: b"new" * 50 for name in ("a", "b", "c")}
        (folder / "b").write_bytes(b"old")
        with at_call(k, full) as calls:
            try:
                write_files(contents)
                break
            except NotWritten as error:
                assert "No space left on device" in str(error)
        names = {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if not path.name.startswith(".")
        }
        if "replace" not in calls:
            assert names == {"b": b"old"}
        assert set(names.values()) <= {b"old", b"new" * 50}, "and none is half there"
    assert k > 8
    assert {path.read_bytes() for path in folder.iterdir()} == {b"new" * 50}


def commands(folder):
    "A line for each command that writes a file, and the files it would write."
    run = f"{folder}/tiny"
    return {
        "sample": f"sample {run} --each 1 --steps 1 --device cpu",
        "report": f"report {run} --device cpu",
        "probe": f"probe {run} --samples 40 --device cpu",
        "metrics": f"metrics {run} --count 12 --steps 1 --resamples 0 --device cpu",
        "runs": f"runs {folder} --output {folder}/x.png",
        "notebook": f"notebook {folder}/in.ipynb {folder}/out.ipynb",
        "bench": "bench --sizes tiny --precisions fp32 --tokens 4 --batch 1 "
        f"--rounds 1 --device cpu --output {folder}/b.json",
    }


def files_of(folder):
    return {
        path: path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture
def folder(run):
    cell = nbformat.v4.new_code_cell("1 + 1")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), run.parent / "in.ipynb")
    return run.parent


@pytest.mark.parametrize("command", commands(""))
def test_a_disk_that_can_only_be_read_is_reported_in_a_line_before_any_work(
    folder, command, monkeypatch, capsys
):
    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = files_of(folder)
    monkeypatch.setattr(Path, "touch", refused)
    monkeypatch.setattr(Path, "write_bytes", refused)
    for name in ("sample", "transformer_of", "read"):
        if hasattr(Run, name):
            monkeypatch.setattr(
                Run, name, lambda *_, **__: pytest.fail("work was done")
            )
    with pytest.raises(SystemExit) as stop:
        main(commands(folder)[command].split())
    messages = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert messages[-1].startswith("selfflow: ")
    assert "Read-only file system" in messages[-1]
    assert files_of(folder) == before


@pytest.mark.parametrize("command", commands(""))
def test_a_disk_that_fills_up_leaves_no_part_of_a_result(
    folder, command, monkeypatch, capsys
):
    def half(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_a_text(path, text, **_):
        half(path, text.encode())

    before = {
        path: size
        for path, size in files_of(folder).items()
        if "features" not in path.parts
    }
    # neither how a report draws its points nor how fast the machine is
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")
    monkeypatch.setattr(benchmark, "_ceiling", lambda *_: lambda: 1e12)
    monkeypatch.setattr(Path, "write_bytes", half)
    monkeypatch.setattr(Path, "write_text", half_a_text)
    with pytest.raises(SystemExit) as stop:
        main(commands(folder)[command].split())
    messages = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("selfflow: ")
    ]
    assert stop.value.code == 2
    assert len(messages) == 1
    assert "No space left on device" in messages[0]
    assert "Make room" in messages[0]
    assert {
        path: size
        for path, size in files_of(folder).items()
        if "features" not in path.parts
    } == before


# pipes


@pytest.mark.parametrize(
    "line", ["--help", "train --help", "--version", "runs {folder}"]
)
def test_a_reader_that_has_left_ends_a_command_quietly(folder, line):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "selfflow.cli", *line.format(folder=folder).split()],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
    def broken(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "a worker is gone")

    monkeypatch.setattr(training, "train", broken)
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    assert "a worker is gone" in capsys.readouterr().err


# processes


def test_a_killed_process_is_named_with_its_signal(tmp_path):
    options = (
        f"--name it --folder {tmp_path} --preset digits-small --model.width 16 "
        "--device cpu --processes 2 --training.steps 100000 "
        "--training.sample-every 0 --training.log-every 1"
    )
    program = programs.Program(
        "-m", "selfflow.cli", "train", *options.split(), env=ENVIRONMENT
    )
    end = time.monotonic() + 120
    while not (log := tmp_path / "it/log.jsonl").exists() or not log.stat().st_size:
        assert time.monotonic() < end
        assert program.poll() is None
        time.sleep(0.05)
    writer = Run.open(tmp_path / "it", "cpu").writer()["pid"]  # the first of the two
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout.split()
    parents = dict(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
    (other,) = (
        pid
        for pid, parent in parents.items()
        if parent == parents[writer] and pid != writer
    )
    os.kill(other, signal.SIGKILL)
    program.wait(120)
    messages = [
        line
        for line in program.stderr.replace("\r", "\n").splitlines()
        if line.strip() and "%|" not in line
    ]
    assert program.returncode == 2
    assert len(messages) == 1
    assert messages[0].startswith(
        "selfflow: process 1 was killed by SIGKILL (the system does that when memory "
        "runs out), one of 2"
    )


def test_tensorboard_shows_each_step_once_after_a_crash(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing import event_accumulator

    real = training.train_step
    steps = []

    def crashes(*args, **options):
        steps.append(1)
        if len(steps) == 11:
            raise RuntimeError("a crash")
        return real(*args, **options)

    monkeypatch.setattr(training, "train_step", crashes)
    with pytest.raises(RuntimeError, match="a crash"):
        training.train(TINY, tmp_path, "cpu", track=("tensorboard",))
    run = training.train(TINY, tmp_path, "cpu", track=("tensorboard",))
    (folder,) = {
        path.parent
        for path in (run.path / "tensorboard").rglob("events.*")
        if path.parent.name == "tiny"
    }
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert (
        [event.step for event in events.Scalars("flow_loss")]
        == run.log["step"].tolist()
        == list(range(1, 13))
    )


def test_measuring_memory_is_silent(capfd):
    assert peak_memory(lambda: torch.zeros(1000), torch.device("cpu")) >= 4000
    assert capfd.readouterr() == ("", "")
    os.write(2, b"again")
    assert capfd.readouterr().err == "again"


# a folder that was copied


def test_a_copied_checkpoint_counts_nowhere(run):
    shutil.copytree(
        run / "checkpoints/step-00000008", run / "checkpoints/step-00000016"
    )
    row = runs_table(run.parent).loc["tiny"]
    assert (row["step"], row["steps"]) == (12, 12)
    assert row["state"].startswith(
        "finished; 1 of 4 checkpoints damaged (step 16: its state.json is of step 8"
    )
    listing = Listing(run.parent)
    listing.look()
    listed = listing.runs["tiny"]
    assert listed.step == 12
    assert (
        "1 of 4 checkpoints damaged (step 16: its state.json is of step 8"
        in listed.state
    )
    assert Run.open(run, "cpu").state()["step"] == 12
    main(["sample", str(run), "--each", "1", "--steps", "1", "--device", "cpu"])
    (file,) = (run / "samples").glob("step-12-*.safetensors")
    assert load_file(file)["images"].shape[0] == 10
