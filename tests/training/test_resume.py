"""An interrupted run equals the uninterrupted one, bit for bit."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import programs
import pytest
import torch
from conftest import TINY, assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfflow.analysis.probing import probe_run
from selfflow.disk import NotWritten
from selfflow.method.options import ObjectiveConfig
from selfflow.training import loop as training
from selfflow.training.lock import RunInUse
from selfflow.training.loop import train
from selfflow.training.processes import Interrupt
from selfflow.training.recording import Recorder
from selfflow.training.run import Run

HERE = Path(__file__).parents[1]
GOLDEN = HERE / "fixtures/golden.json"
KILLS = 12


def test_kill_at_random_moments_also_while_saving_loses_nothing(tmp_path):
    config = replace(
        TINY,
        training=replace(
            TINY.training,
            steps=20,
            save_every=2,
            keep_last=2,
            keep_every=8,
            sample_every=7,
        ),
    )
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    program = programs.Program(
        HERE / "victims.py", tmp_path, tmp_path / "config.json", 0, KILLS
    )
    program.wait(500)
    assert program.returncode == 0, program.stderr[-3000:]
    report = json.loads(program.stdout)
    assert (
        sum(report["killed"].values()) >= KILLS
        and report["killed"].get("saving", 0) >= 3
    ), report
    uninterrupted = train(config, tmp_path / "whole")
    assert [p.name[-2:] for p in uninterrupted.checkpoints()] == [
        "08",
        "16",
        "18",
        "20",
    ]
    for number in range(report["runs"]):
        run = Run.open(tmp_path / f"tiny-{number}")
        assert_same(uninterrupted, run)
        assert [p.name for p in run.checkpoints()] == [
            p.name for p in uninterrupted.checkpoints()
        ]
        assert [step for step, *_ in run.sample_history()] == [7, 14, 20]
        for (step, images, _), (_, expected, _) in zip(
            run.sample_history(), uninterrupted.sample_history(), strict=True
        ):
            assert torch.equal(images, expected), f"the sample grid of step {step}"
        assert run.timing["step"].tolist() == uninterrupted.log["step"].tolist()
        assert run.timing["seconds"].is_monotonic_increasing
        leftovers = {p.name for p in (run.path / "checkpoints").iterdir()} - {
            p.name for p in run.checkpoints()
        }
        assert not leftovers and not [
            path for path in run.path.rglob(".*") if path.name != "lock"
        ], "no leftovers"
    print(report)


def test_sample_grids_do_not_depend_on_the_number_of_threads(tmp_path):
    "As weights do not, whose shards are too small to be divided."
    config = replace(TINY, training=replace(TINY.training, steps=2, sample_every=1))
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(train(config, tmp_path / str(threads)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_same(*runs)
    for (_, images, _), (_, expected, _) in zip(
        runs[0].sample_history(), runs[1].sample_history(), strict=True
    ):
        assert torch.equal(images, expected)


class Stops:
    "Asks a run to stop after given steps, by Run.requested."

    def __init__(self, monkeypatch, steps, what="stop"):
        self.steps = steps
        self.now = 0
        real = training.train_step

        def counting(state, *args, **options):
            self.now = state.step + 1
            return real(state, *args, **options)

        monkeypatch.setattr(training, "train_step", counting)
        monkeypatch.setattr(
            Run,
            "requested",
            lambda run, asked: asked == what and self.now in self.steps,
        )


@settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.sets(st.integers(1, 12)), workers=st.sampled_from([0, 0, 2]))
def test_stopped_at_any_steps_any_number_of_times(
    runs, tmp_path_factory, steps, workers
):
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        Stops(patch, steps)
        for step in sorted(steps - {12}):
            assert train(TINY, folder, workers=workers).state()["step"] == step
        final = train(TINY, folder, workers=workers)
    assert_same(runs["tiny"], final)
    assert train(TINY, folder).timing["step"].tolist() == list(range(1, 13))


def test_two_resumes_within_one_epoch(tmp_path):
    "One epoch has 16 steps of 64 digits; the run stops after 5, 10 and 17 of 20."
    config = replace(
        TINY,
        training=replace(
            TINY.training, steps=20, batch=64, save_every=20, validate_every=10
        ),
    )
    uninterrupted = train(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        Stops(patch, {5, 10, 17})
        steps = [train(config, tmp_path).state()["step"] for _ in range(4)]
        assert steps == [5, 10, 17, 20]
    assert_same(uninterrupted, Run.open(tmp_path / "tiny"))


def test_muon_and_a_falling_rate_resume_exactly(tmp_path):
    config = replace(
        TINY, training=replace(TINY.training, optimizer="muon", cooldown=0.8)
    )
    uninterrupted = train(config, tmp_path / "whole")
    slots = {
        name.rsplit("/", 1)[1]
        for name in uninterrupted.load("optimizer")
        if "blocks.0.mlp.fc1.weight" in name
    }
    assert slots == {"momentum_buffer"}
    assert "model.x_embedder.image.weight/exp_avg" in uninterrupted.load("optimizer")
    with pytest.MonkeyPatch.context() as patch:
        Stops(patch, {5})
        assert [train(config, tmp_path).state()["step"] for _ in range(2)] == [5, 12]
    assert_same(uninterrupted, Run.open(tmp_path / "tiny"))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(runs, tmp_path, workers):
    torch.manual_seed(workers)
    stream = torch.get_rng_state()
    assert_same(runs["tiny"], train(TINY, tmp_path, workers=workers))
    assert torch.equal(stream, torch.get_rng_state()), (
        "nor does training touch the caller's random numbers"
    )
    with pytest.raises(ValueError, match="workers is -1"):
        train(replace(TINY, name="none"), tmp_path, workers=-1)


def test_sampling_validating_and_probing_in_the_middle_change_nothing(
    runs, tmp_path, monkeypatch
):
    config = replace(
        TINY, training=replace(TINY.training, sample_every=3, save_every=3)
    )
    Stops(monkeypatch, {5}, "sample")
    real = Run.prune
    steps = []

    def prune_after_probing(run):  # as another program may do during training
        opened = Run.open(run.path)
        opened.sample(torch.tensor([1, 2]), steps=3, method="sde")
        torch.manual_seed(len(steps))
        probe_run(
            opened,
            levels=(0.5,),
            counts={"train": 60, "validation": 30, "test": 30},
            families=("regression",),
            strengths=(0.1,),
        )
        steps.append(opened.state()["step"])
        real(run)

    monkeypatch.setattr(Run, "prune", prune_after_probing)
    run = train(config, tmp_path)
    assert steps == [3, 6, 9, 12]
    assert [step for step, *_ in run.sample_history()] == [
        3,
        5,
        6,
        9,
        12,
    ]
    assert_same(runs["tiny"], run)


# interruption

PROGRAM = """
import sys, torch
sys.path.insert(0, {here!r})
from conftest import TINY
from dataclasses import replace
from selfflow.training.loop import train
endless = replace(TINY.training, steps=100000, save_every=100000)
train(replace(TINY, training=endless), {folder!r}, workers={workers})
print("came back")
"""


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "how, expected, workers",
    [
        ("SIGINT", None, 0),
        ("SIGTERM", 143, 2),
        ("stop file", 0, 1),
    ],
)
def test_an_interrupted_run_finishes_its_step_saves_and_prints_how_to_resume(
    tmp_path, how, expected, workers
):
    program = programs.Program(
        "-c", PROGRAM.format(here=str(HERE), folder=str(tmp_path), workers=workers)
    )
    wait_for(tmp_path / "tiny/log.jsonl")
    wait_for(tmp_path / "tiny/writer.json")
    with pytest.raises(RunInUse, match=f"{program.pid}"):
        train(
            replace(
                TINY, training=replace(TINY.training, steps=100000, save_every=100000)
            ),
            tmp_path,
        )
    if how == "stop file":
        (tmp_path / "tiny/stop").touch()
    else:
        # as a terminal, a cluster and a container do: workers get it too
        os.killpg(program.pid, getattr(signal, how))
    status = program.wait(60)
    message = program.stdout
    if how == "SIGINT":  # the status depends on what libraries do at the end
        assert status
        assert program.stderr.endswith("KeyboardInterrupt: saved\n")
    else:
        assert status == expected, program.stderr
    run = Run.open(tmp_path / "tiny")
    (step,) = re.findall(r"after step (\d+) of 100000, which is saved", message)
    assert run.state()["step"] == int(step) == run.log["step"].max()
    assert run.writer() is None
    assert f"selfflow train --config {run.path}/config.json" in message
    assert not (run.path / "stop").exists()
    assert ("came back" in message) == (how == "stop file")


def test_a_second_signal_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_another_thread_leaves_signals_alone(runs, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    results = []
    thread = threading.Thread(target=lambda: results.append(train(TINY, tmp_path)))
    thread.start()
    thread.join()
    assert_same(runs["tiny"], results[0])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_in_the_last_step_also_ends_the_program(
    runs, tmp_path, monkeypatch, number, raised
):
    real = training.train_step

    def last(state, *args, **options):
        if state.step == 11:
            signal.raise_signal(number)
        return real(state, *args, **options)

    monkeypatch.setattr(training, "train_step", last)
    with pytest.raises(raised):
        train(TINY, tmp_path)
    assert_same(runs["tiny"], Run.open(tmp_path / "tiny"))


def test_a_request_from_before_the_run_is_ignored(runs, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/stop").touch()
    assert_same(runs["tiny"], train(TINY, tmp_path))


# a disk that is full, other data


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(
    runs, tmp_path, monkeypatch
):
    real = Run.save

    def full(run, step, tensors, state):
        if step == 8:
            monkeypatch.setattr(
                "selfflow.disk.save_file",
                lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")),
            )
        return real(run, step, tensors, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", full)
        with pytest.raises(
            NotWritten, match="step 8 .*could not be written.*step-00000004"
        ) as raised:
            train(TINY, tmp_path)
        assert raised.value.errno == 28
    monkeypatch.undo()
    assert Run.open(tmp_path / "tiny").state()["step"] == 4
    assert not list((tmp_path / "tiny/checkpoints").glob(".*"))
    assert_same(runs["tiny"], train(TINY, tmp_path))


def test_a_log_that_cannot_be_written_ends_the_run(runs, tmp_path):
    real = Recorder.write

    def write(recorder, step, values):
        if step == 7:
            for file in recorder.files:
                os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        real(recorder, step, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "write", write)
        with pytest.raises(
            NotWritten,
            match="log.*No space left.*Earlier checkpoints are intact.*Make room",
        ):
            train(TINY, tmp_path)
    run = Run.open(tmp_path / "tiny")
    assert run.state()["step"] == 4
    assert run.log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.writer() is None
    assert_same(runs["tiny"], train(TINY, tmp_path))


def test_a_config_edited_by_hand_does_not_resume(runs, tmp_path, monkeypatch):
    Stops(monkeypatch, {5})
    run = train(TINY, tmp_path)
    stored = json.loads((run.path / "config.json").read_text())
    stored["config"]["training"]["lr"], stored["config"]["training"]["keep_last"] = (
        0.5,
        2,
    )
    (run.path / "config.json").write_text(json.dumps(stored))
    edited = Run.open(run.path).config
    with pytest.raises(
        ValueError,
        match=r"different settings than those in .*:\n  training.lr: 0.002 when it was "
        r"saved, 0.5 now",
    ):
        train(edited, tmp_path)
    (run.path / "config.json").write_text(
        json.dumps({**stored, "config": asdict(TINY)})
    )
    assert_same(
        runs["tiny"],
        train(replace(TINY, training=replace(TINY.training, keep_last=2)), tmp_path),
    )


def test_time_adds_up_over_sessions_and_may_be_unknown(tmp_path, monkeypatch):
    config = replace(
        TINY, training=replace(TINY.training, log_every=10, save_every=100)
    )
    real = training.train_step
    monkeypatch.setattr(
        training,
        "train_step",
        lambda *args, **options: (time.sleep(0.05), real(*args, **options))[1],
    )
    Stops(monkeypatch, {5, 9})
    for _ in range(3):
        run = train(config, tmp_path)
    assert run.timing["step"].tolist() == [6, 10, 12]
    assert run.timing["seconds"].iloc[-1] > 12 * 0.05
    assert run.timing["seconds"].iloc[1] > 10 * 0.05
    assert (run.timing["wall"] > run.timing["seconds"]).all()
    shutil.copytree(HERE / "fixtures/runs/format-1", tmp_path / "format-1")
    old = Run.open(tmp_path / "format-1")
    assert train(old.config, tmp_path).timing["seconds"].isna().all()


def test_a_finished_run_in_a_folder_that_cannot_be_written_is_returned(
    runs, monkeypatch
):
    def refused(*_, **__):
        raise NotWritten(30, "a file system that can only be read")

    for name in ("save", "locked", "cut_log", "clear_staging", "save_sample_grid"):
        monkeypatch.setattr(Run, name, refused)
    assert train(TINY, runs["tiny"].path.parent).state()["step"] == 12
    monkeypatch.setattr(Run, "latest", lambda run: run.checkpoints()[0])
    with pytest.raises(NotWritten, match="only be read"):
        train(TINY, runs["tiny"].path.parent)


def test_data_that_changed_since_the_run_began_are_refused(tmp_path, monkeypatch):
    from selfflow.data import sources
    from selfflow.data.datasets import ImageSet

    config = replace(TINY, objective=ObjectiveConfig("flow_matching"))
    run = train(config, tmp_path)
    before = run.log_path.read_text()
    digits = sources._open_digits

    def changed(asked, split):
        data = digits(asked, split)
        labels = data.labels.clone()
        labels[0] = (labels[0] + 1) % 10
        return ImageSet(data.images, labels, data.names) if split == "train" else data

    monkeypatch.setattr(sources, "_open_digits", changed)
    with pytest.raises(ValueError, match=r"data.*train"):
        train(config, tmp_path)
    assert run.log_path.read_text() == before


# connections and trackers


def test_training_opens_no_socket_at_all(runs, tmp_path, monkeypatch):
    real = socket.socket.__init__

    def refused(self, family=socket.AF_INET, *args, **options):
        # by which workers of a loader hand over their tensors
        if family != socket.AF_UNIX:
            raise AssertionError("training wants a socket")
        real(self, family, *args, **options)

    monkeypatch.setattr(socket.socket, "__init__", refused)
    with pytest.raises(AssertionError, match="wants a socket"):
        socket.socket()
    assert_same(runs["tiny"], train(TINY, tmp_path, workers=1))


def test_a_requested_tracker_receives_the_log(runs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(TINY, tmp_path, track=("tensorboard",))
    assert_same(runs["tiny"], run)
    (folder,) = {
        path.parent
        for path in (run.path / "tensorboard").rglob("events.*")
        if path.parent.name == "tiny"
    }
    events = EventAccumulator(str(folder))
    events.Reload()
    tracked = {event.step: event.value for event in events.Scalars("flow_loss")}
    assert tracked == pytest.approx(
        dict(zip(run.log["step"], run.log["flow_loss"], strict=True)), rel=1e-6
    )
    levels = run.log["flow_loss_by_level"].dropna().iloc[-1]
    assert events.Scalars("flow_loss_by_level/0.95")[-1].value == pytest.approx(
        levels[-1], rel=1e-6
    )
    assert {"steps_per_second", "data_wait"} <= set(events.Tags()["scalars"])
    assert not list(runs["tiny"].path.rglob("events.*"))


def test_a_failing_tracker_is_dropped_and_training_continues(
    runs, tmp_path, monkeypatch, capsys
):
    def gone(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", gone)
    assert_same(runs["tiny"], train(TINY, tmp_path, track=("tensorboard",)))
    assert (
        capsys.readouterr().out.count(
            "tracker tensorboard failed and is not used any more (ConnectionError: no "
            "route"
        )
        == 1
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("tensorbord", "Did you mean 'tensorboard'"),
        ("mlflow", "mlflow is not installed.*selfflow"),
    ],
)
def test_missing_trackers_are_refused_first(tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(
        "accelerate.tracking.get_available_trackers", lambda: ["tensorboard"]
    )
    with pytest.raises(ValueError, match=words):
        train(TINY, tmp_path, track=(name,))
    assert not list(tmp_path.iterdir())


# recorded losses

GOLD = replace(
    TINY,
    name="golden",
    training=replace(
        TINY.training, steps=30, validate_every=10, validation=400, save_every=30
    ),
)


def test_the_golden_curve(tmp_path):
    """The losses of a tiny run equal the recorded ones.

    `python tests/training/test_resume.py` records them again.
    """
    expected = json.loads(GOLDEN.read_text())
    log = train(GOLD, tmp_path).log
    for name, values in expected.items():
        assert log[name].dropna().tolist() == pytest.approx(values, rel=1e-3), name
    assert len(expected["flow_loss"]) == 30
    assert log["flow_loss"].iloc[-1] < 0.8 * log["flow_loss"].iloc[0]


MEMORY = """
import sys, torch
sys.path.insert(0, {here!r})
from conftest import TINY
from dataclasses import replace
from pathlib import Path
from selfflow.training import loop as training
from selfflow.training.config import ModelConfig
real, held = training.train_step, []
def watched(state, *args, **options):
    if state.step in (400, 1199):
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    return real(state, *args, **options)
training.train_step = watched
often = replace(
    TINY.training,
    steps=1200,
    batch=8,
    log_every=5,
    save_every=100,
    validate_every=500,
    sample_every=500,
)
small = ModelConfig(width=8, depth=2, heads=1)
training.train(replace(TINY, model=small, training=often), {folder!r})
print(held[1] - held[0])
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is read from /proc"
)
def test_memory_does_not_grow_with_steps(tmp_path):
    # not forked: memory that is shared with another process would count as well
    program = subprocess.run(
        [sys.executable, "-c", MEMORY.format(here=str(HERE), folder=str(tmp_path))],
        capture_output=True,
        text=True,
    )
    assert program.returncode == 0, program.stderr
    assert int(program.stdout.split()[-1]) < 3 * 2**20, (
        "bytes added by 800 steps; a leak of 4 kB a step would exceed this"
    )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        log = train(GOLD, folder).log
    names = (
        "total",
        "flow_loss",
        "rep_loss",
        "cosine",
        "grad_norm",
        "validation_flow_loss",
        "effective_rank",
    )
    GOLDEN.write_text(
        json.dumps(
            {name: log[name].dropna().round(7).tolist() for name in names}, indent=1
        )
        + "\n"
    )
