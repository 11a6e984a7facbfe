"""No saved step is lost by kills, full disks, damage or a second writer."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch
from faults import Worker, at_call, tensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from selfflow.disk import NotWritten, cut_lines, read_lines, sha256, step_of, write_json
from selfflow.method.backbone import Inputs
from selfflow.method.options import ModelConfig
from selfflow.method.tokens import Part
from selfflow.training.checkpoint import (
    _FREE,
    check_checkpoint,
    problem_of,
    prune,
    write_checkpoint,
)
from selfflow.training.config import Config, TrainConfig, differences
from selfflow.training.lock import RunInUse, sole_writer, writer_of
from selfflow.training.run import Run

CONFIG = Config(
    name="tiny",
    model=ModelConfig(width=8, depth=3, heads=1),
    training=TrainConfig(keep_last=2),
)
INPUTS = Inputs((Part("image", 4, (1, 4, 4)),), 10)
FEW = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def saved(folder, steps=(1, 2)):
    "A run with checkpoints, logged as far as the last."
    run = Run.create(folder, CONFIG, INPUTS, "cpu")
    for step in steps:
        run.save(step, tensors(step), {})
    run.log_path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    return run


def steps_of(run):
    return [step_of(path) for path in run.checkpoints()]


def leftovers(run):
    return list(run.path.rglob(".*"))


@pytest.fixture(scope="module")
def worker():
    started = Worker()
    yield started
    started.process.stdin.close()
    started.process.wait(timeout=20)


# kill -9


def test_kills_at_random_moments_lose_nothing(worker, tmp_path):
    run = saved(tmp_path / "tiny", (1,))
    draw = random.Random(0)
    last = 1
    for kill in range(40):
        pid = worker.start("save_repeatedly", run.path)
        if kill % 2:
            worker.step()  # the other half may be killed before anything is saved
        time.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        signal_number, lines = worker.wait()
        assert signal_number == signal.SIGKILL and all(
            line.isdigit() or "was left by process" in line for line in lines
        ), lines
        announced = [int(line) for line in lines if line.isdigit()]
        assert announced == list(range(last + 1, last + 1 + len(announced))), (
            "each process resumes where the previous one was killed"
        )
        newest = step_of(run.latest())
        last = max([last, *announced])
        assert newest in (last, last + 1), (
            "the last checkpoint that was printed, or one that was just renamed"
        )
        assert intact_steps(run) == steps_of(run), "every visible checkpoint is intact"
        assert run.log["step"].tolist()[:newest] == list(range(1, newest + 1)), (
            "the log covers every step up to the checkpoint"
        )
        last = newest
    assert last >= 20, "saving continued"
    run.clear_staging()
    assert not leftovers(run)
    assert len(run.checkpoints()) in (2, 3)


def prepared(folder, action):
    run = saved(folder, (1, 2, 3, 4) if action in ("prune", "cut") else (1, 2))
    if action == "save_again":  # over one that is damaged
        run.save(3, tensors(3), {})
        (run.path / "checkpoints/step-00000003/model.safetensors").write_bytes(b"")
    if action == "history":
        run.save_sample_grid(3, torch.zeros(1, 1, 8, 8), torch.tensor([0]))
    return run


def intact_steps(run):
    return [step_of(path) for path in run.checkpoints() if problem_of(path) is None]


@pytest.mark.parametrize(
    "action, look, states",
    [
        ("save", steps_of, [[1, 2], [1, 2, 3]]),
        ("save_again", intact_steps, [[1, 2], [1, 2, 3]]),
        ("prune", steps_of, [[1, 2, 3, 4], [2, 3, 4], [3, 4]]),
        ("cut", lambda run: run.log["step"].tolist(), [[1, 2, 3, 4], [1, 2]]),
        (
            "history",
            lambda run: [images.mean().item() for _, images, _ in run.sample_history()],
            [[0.0], [3.0]],
        ),
    ],
    ids=["save", "save_again", "prune", "cut", "history"],
)
def test_a_kill_before_any_call_leaves_the_old_or_the_new_state(
    worker, tmp_path, action, look, states
):
    observed = []
    signal_number = signal.SIGKILL
    k = 0
    while signal_number == signal.SIGKILL:
        run = prepared(tmp_path / str(k), action)
        k = k + 1
        worker.start(action.removesuffix("_again"), run.path, k)
        signal_number, lines = worker.wait()
        assert not lines, lines
        observed.append(look(run))
        assert action == "save_again" or intact_steps(run) == steps_of(run), (
            "every visible checkpoint is intact"
        )
        run.clear_staging()
        assert not leftovers(run)
        assert look(run) == observed[-1]
    order = [states.index(state) for state in observed]
    assert order == sorted(order) and set(order) == set(range(len(states))) and k > 5, (
        "the state changes from old to new in one call"
    )


# a full disk, a read-only folder


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_at_any_call_of_a_save_leaves_good_checkpoints(tmp_path):
    failed = 0
    for k in range(1, 200):
        run = saved(tmp_path / str(k))
        before = run.log_path.read_bytes(), (run.path / "config.json").read_bytes()
        raised = None
        with at_call(k, full) as calls:
            try:
                run.save(3, tensors(3), {})
            except OSError as error:
                raised = error
        if len(calls) < k:
            break
        if raised is not None:
            failed += 1
            assert isinstance(raised, NotWritten)
            assert raised.errno == errno.ENOSPC
            assert "step 3 of " in str(raised)
            assert "No space left" in str(raised)
            assert "Make room on the disk" in str(raised)
            assert f"The last good checkpoint, {run.latest().name}, is intact" in str(
                raised
            )
        assert all(problem_of(path) is None for path in run.checkpoints())
        assert steps_of(run) == (
            [1, 2, 3] if raised is None or "rename" in calls[: k - 1] else [1, 2]
        ), (k, calls)
        assert before == (
            run.log_path.read_bytes(),
            (run.path / "config.json").read_bytes(),
        )
        assert not leftovers(run), "the space is freed"
        run.save(3, tensors(3), {})
        assert steps_of(run) == [1, 2, 3]
        assert problem_of(run.latest()) is None
    assert failed > 20
    assert raised is None


@pytest.mark.parametrize(
    "write",
    [
        lambda run: write_json(run.path / "config.json", {"new": 1}),
        lambda run: run.cut_log(1),
        lambda run: run.save_sample_grid(1, torch.ones(1, 1, 8, 8), torch.tensor([1])),
        lambda run: run.request("stop"),
        lambda run: run.locked().__enter__(),
        lambda run: Run.create(
            run.path.with_name(f"{run.path.name}-new"), CONFIG, INPUTS, "cpu"
        ),
    ],
    ids=["config", "log", "history", "request", "lock", "create"],
)
def test_an_error_at_any_other_write_is_reported_and_leaves_old_files(tmp_path, write):
    for k in range(1, 100):
        run = saved(tmp_path / str(k))
        run.save_sample_grid(1, torch.zeros(1, 1, 8, 8), torch.tensor([1]))
        raised = None
        with at_call(k, full) as calls:
            try:
                write(run)
            except OSError as error:
                raised = error
        if len(calls) < k:
            break
        assert (
            raised is None
            or isinstance(raised, NotWritten)
            and "No space left" in str(raised)
        ), (calls, raised)
        if raised is not None and not {"replace"} & set(calls[: k - 1]):
            assert run.log["step"].tolist() == [1, 2]
            assert Run.open(run.path, "cpu").config == CONFIG
            assert run.sample_history()[0][1].sum() == 0
            assert not run.requested("stop")
            assert run.writer() is None
            assert not leftovers(run)
    assert k > 4
    assert raised is None


def test_a_file_limit_of_the_system_is_a_full_disk(worker, tmp_path):
    run = saved(tmp_path / "tiny", (1,))
    worker.start("small_files_only", run.path)
    _, lines = worker.wait()
    assert (
        lines[0].startswith(f"NotWritten {errno.EFBIG} step 2 of ")
        and "step-00000001, is intact" in lines[0]
    ), lines
    assert steps_of(run) == [1]
    assert problem_of(run.latest()) is None
    assert not leftovers(run)


@pytest.fixture
def mounted(tmp_path):
    "A small file system of its own; mount(options) changes it."
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True
        ).returncode

    if shutil.which("mount") is None or mount("size=1m"):
        pytest.skip("mounting is not allowed here")
    yield place, mount
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full_at_any_moment_of_a_save(mounted):
    mount_point, _ = mounted
    run = saved(mount_point / "tiny")
    filler = mount_point / "filler"
    # 12 kB each
    large_tensors = {part: {"x": torch.zeros(3000)} for part in ("model", "teacher")}
    failed = 0
    for room in range(0, 64, 2):
        filler.write_bytes(b"")
        free = shutil.disk_usage(mount_point).free
        filler.write_bytes(b"\0" * max(0, free - 1024 * room))
        try:
            run.save(3, large_tensors, {})
        except NotWritten as error:
            failed += 1
            assert error.errno == errno.ENOSPC
            assert "step-00000002, is intact" in str(error)
            assert steps_of(run) == [1, 2]
            assert problem_of(run.latest()) is None
            assert not leftovers(run)
            with pytest.raises(
                NotWritten, match="config.json could not be written: No space"
            ):
                write_json(run.path / "config.json", "much" * 20000)
            assert Run.open(run.path, "cpu").config == CONFIG
        else:
            assert problem_of(run.latest()) is None
            assert run.latest().name == "step-00000003"
            shutil.rmtree(run.latest())
    assert 10 < failed < 32
    filler.unlink()
    assert step_of(run.save(3, large_tensors, {})) == 3
    assert problem_of(run.latest()) is None


def test_a_read_only_folder_is_readable_and_refused_before_training(mounted):
    mount_point, mount = mounted
    run = saved(mount_point / "tiny")
    (run.path / "lock").unlink()
    assert mount("remount,ro") == 0
    reader = Run.open(run.path, "cpu")
    assert reader.writer() is None
    assert reader.latest().name == "step-00000002"
    assert len(reader.log) == 2
    assert not reader.requested("stop")
    assert Run.create(run.path, CONFIG, INPUTS, "cpu").config == CONFIG, (
        "nothing has to be written"
    )
    for write in (
        lambda: reader.locked().__enter__(),
        lambda: reader.request("stop"),
        lambda: reader.save(3, tensors(3), {}),
        lambda: Run.create(mount_point / "other", CONFIG, INPUTS, "cpu"),
        lambda: reader.cut_log(1),
        lambda: Run.create(run.path, CONFIG, INPUTS, "cpu", {"train": "0" * 16}),
    ):
        with pytest.raises(
            NotWritten,
            match="Read-only file system.*Make the folder writable",
        ) as error:
            write()
        assert error.value.errno == errno.EROFS


def test_a_folder_without_permission_is_reported(tmp_path, monkeypatch):
    run = saved(tmp_path / "tiny")

    def forbidden(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", forbidden)
    with pytest.raises(
        NotWritten,
        match="step 3 of .*tiny could not be written: Permission denied. The last good "
        "checkpoint, "
        "step-00000002, is intact. Make the folder writable",
    ):
        run.save(3, tensors(3), {})
    with pytest.raises(NotWritten, match="Permission denied. Nothing was changed."):
        Run.create(tmp_path / "new", CONFIG, INPUTS, "cpu")


def test_files_have_the_rights_that_new_files_get(tmp_path):
    before = os.umask(0o027)
    try:
        run = saved(tmp_path / "tiny")
        run.save_sample_grid(1, torch.zeros(1, 1, 8, 8), torch.tensor([1]))
    finally:
        os.umask(before)
    for path in run.path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


# damage


def damaged(content, kind, position, bit):
    position = min(position, len(content) - 1)
    if kind == "flip":
        return (
            content[:position]
            + bytes([content[position] ^ 1 << bit])
            + content[position + 1 :]
        )
    return {"cut": content[:position], "empty": b"", "longer": content + b"\0"}[kind]


DAMAGE = {
    "kind": st.sampled_from(["flip", "flip", "flip", "cut", "empty", "longer"]),
    "position": st.integers(0, 20000),
    "bit": st.integers(0, 7),
}


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"],
)
def test_the_check_detects_all_damage(tmp_path, name):
    run = saved(tmp_path / "tiny")
    path = run.latest()
    intact = (path / name).read_bytes()

    @FEW
    @given(**DAMAGE)
    def check(kind, position, bit):
        damaged_content = damaged(intact, kind, position % len(intact), bit)
        (path / name).write_bytes(damaged_content)
        assert problem_of(path) is not None
        assert run.latest().name == "step-00000001"

    check()
    (path / name).write_bytes(intact)
    assert run.latest() == path


def test_damage_of_the_config_is_refused_where_it_matters_and_repaired_elsewhere(
    tmp_path,
):
    run = saved(tmp_path / "tiny")
    refused = []
    file = run.path / "config.json"
    intact = file.read_bytes()

    @FEW
    @given(**DAMAGE)
    # the name, which may change
    @example(kind="flip", position=intact.index(b"tiny") + 3, bit=0)
    # this setting may change as well
    @example(kind="flip", position=intact.index(b"save_every") + 13, bit=0)
    @example(kind="flip", position=intact.index(b"batch") + 8, bit=0)  # but not this
    def check(kind, position, bit):
        damaged_content = damaged(intact, kind, position % len(intact), bit)
        file.write_bytes(damaged_content)
        try:
            Run.create(run.path, CONFIG, INPUTS, "cpu")
        except ValueError:
            assert damaged_content.strip() != intact.strip()
            assert file.read_bytes() == damaged_content
        else:
            assert differences(
                json.loads(damaged_content), json.loads(intact)
            ).keys() <= {f"config.{name}" for name in _FREE}
            assert json.loads(file.read_bytes()) == json.loads(intact)
        try:
            Run.open(run.path, "cpu")
        except ValueError as error:
            refused.append(error)
            assert "config.json cannot be used" in str(error)
            assert "checkpoints next to it are not touched" in str(error)

    check()
    assert len(refused) > 10
    assert steps_of(run) == [1, 2]


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"state.json": 3}',
        "{not json",
        "[" * 100000,
        "\0" * 50,
    ],
)
def test_an_invalid_manifest_never_passes(tmp_path, manifest):
    path = saved(tmp_path / "tiny").latest()
    (path / "manifest.json").write_text(manifest)
    assert check_checkpoint(path) is not None


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "..", ".", "", "deeper/model"]
)
def test_a_manifest_that_names_outside_files_is_refused(tmp_path, name):
    path = saved(tmp_path / "tiny").latest()
    (path.parent / "secret").write_text("1")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(
        json.dumps({**manifest, name: {"size": 1, "sha256": "6b86b273ff34fce1"}})
    )
    assert "which is not a file name" in check_checkpoint(path)


def test_files_added_to_a_checkpoint_by_hand_are_detected(tmp_path, capsys):
    run = saved(tmp_path / "tiny")
    first, second = run.checkpoints()
    (second / "notes.txt").write_text("the best one so far")
    assert run.latest() == second, "a note harms nobody"
    shutil.copy(first / "model.safetensors", second / "judge.safetensors")
    assert run.latest() == first
    assert "judge.safetensors is not listed in manifest.json" in capsys.readouterr().out
    (second / "judge.safetensors").unlink()
    (second / "model.safetensors").unlink()
    (second / "model.safetensors").mkdir()
    assert problem_of(second) == "model.safetensors is missing"
    shutil.rmtree(second)
    shutil.copytree(first, second)
    assert (
        problem_of(second)
        == "its state.json is of step 1: the folder was renamed or copied"
    )
    assert run.latest() == first


def test_only_folders_named_exactly_like_a_step_are_checkpoints(tmp_path):
    run = saved(tmp_path / "tiny", (1, 2, 99999999, 100000000))
    place = run.path / "checkpoints"
    # an Arabic 1
    for name in (
        "step-xyz",
        "step-00000012.bak",
        "step-12",
        "step-000000012",
        "step-" + 8 * "\u0661",
    ):
        shutil.copytree(place / "step-00000002", place / name)
    (place / "step-00000013").write_text("a file")
    (place / "step-00000014").symlink_to(place / "nowhere")
    assert steps_of(run) == [1, 2, 99999999, 100000000]
    assert step_of(run.latest()) == 100000000
    assert step_of(run.save(13, tensors(13), {})) == 13
    assert problem_of(place / "step-00000013") is None


def test_a_linked_checkpoint_counts_and_its_original_is_never_removed(
    tmp_path,
):
    run = saved(tmp_path / "tiny", (1, 2))
    moved = tmp_path / "elsewhere"
    run.checkpoints()[0].rename(moved)
    (run.path / "checkpoints/step-00000001").symlink_to(moved)
    assert steps_of(run) == [1, 2]
    assert problem_of(run.checkpoints()[0]) is None
    prune(run.path / "checkpoints", 1)
    assert steps_of(run) == [2]
    assert check_checkpoint(moved) is None
    assert not leftovers(run)


def test_a_step_is_written_once_and_again_only_when_damaged(tmp_path):
    run = saved(tmp_path / "tiny")
    file = run.latest() / "model.safetensors"
    before = file.stat().st_mtime_ns
    run.save(2, tensors(7), {})
    assert file.stat().st_mtime_ns == before and run.load("model")["x"][0] == 2, (
        "an intact checkpoint stays"
    )
    file.write_bytes(b"")
    run.save(2, tensors(7), {})
    assert Run.open(run.path, "cpu").load("model")["x"][0] == 7
    assert not leftovers(run)


# pruning


@pytest.mark.parametrize(
    "last, every, broken, remaining",
    [
        (2, 0, {}, [5, 6]),
        (2, 3, {}, [3, 5, 6]),
        (9, 0, {}, [1, 2, 3, 4, 5, 6]),
        (1, 2, {}, [2, 4, 6]),
        (1, 100, {}, [6]),
        (2, 0, {5: "content"}, [4, 5, 6]),
        (3, 2, {4: "content", 5: "content"}, [2, 3, 4, 5, 6]),
        (2, 0, {6: "size"}, [4, 5, 6]),
        (2, 0, {6: "content"}, [4, 5, 6]),
        (1, 0, {4: "size", 5: "content", 6: "size"}, [3, 4, 5, 6]),
        (3, 0, {5: "size"}, [3, 4, 5, 6]),
        (1, 0, dict.fromkeys(range(1, 7), "content"), [1, 2, 3, 4, 5, 6]),
        (1, 0, dict.fromkeys(range(1, 7), "size"), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_pruning_keeps_the_last_intact_checkpoints(
    tmp_path, last, every, broken, remaining
):
    for step in range(1, 7):
        write_checkpoint(tmp_path / f"step-{step:08d}", tensors(step), {"step": step})
    for step, kind in broken.items():
        file = tmp_path / f"step-{step:08d}/teacher.safetensors"
        file.write_bytes(
            damaged(
                file.read_bytes(), "flip" if kind == "content" else "longer", 400, 0
            )
        )
    prune(tmp_path, last, every)
    assert sorted(step_of(path) for path in tmp_path.iterdir()) == remaining
    prune(tmp_path / "nothing", last)


def test_each_checkpoint_is_read_through_once_to_prune(tmp_path, monkeypatch):
    read = []
    run = saved(tmp_path / "tiny", (1, 2, 3))
    run = Run.open(run.path, "cpu")
    monkeypatch.setattr(
        "selfflow.training.checkpoint.sha256",
        lambda path: read.append(path.parent.name) or sha256(path),
    )
    run.prune()
    assert steps_of(run) == [2, 3] and set(read) == {
        "step-00000002",
        "step-00000003",
    }, "another process wrote them"
    for step in (4, 5):
        run.save(step, tensors(step), {})
        read.clear()
        run.prune()
        assert not read
        assert steps_of(run) == [step - 1, step]


def test_reading_a_pruned_checkpoint_is_reported(tmp_path, capsys):
    run = saved(tmp_path / "tiny", (1, 2))
    reader = Run.open(run.path, "cpu")
    assert reader.load("model")["x"][0] == 2
    run.save(3, tensors(3), {})
    run.save(4, tensors(4), {})
    run.prune()
    with pytest.raises(
        FileNotFoundError,
        match="step-00000002 no longer exists: training removes older "
        "checkpoints.*Open the run again",
    ):
        reader.load("teacher")
    assert reader.latest().name == "step-00000004"
    assert not capsys.readouterr().out


def test_checkpoints_that_vanish_during_the_search_do_no_harm(
    tmp_path, monkeypatch, capsys
):
    run = saved(tmp_path / "tiny", (1,))
    real = problem_of

    def while_training(path):
        if step_of(path) == 1:
            run.save(2, tensors(2), {})
            shutil.rmtree(path)
        return real(path)

    monkeypatch.setattr("selfflow.training.run.problem_of", while_training)
    assert run.latest().name == "step-00000002"
    assert not capsys.readouterr().out


# lines


@settings(FEW, max_examples=50)
@given(
    rows=st.lists(st.binary(max_size=30), max_size=8),
    place=st.integers(0, 6),
    lost=st.integers(0, 19),
    step=st.integers(0, 8),
)
def test_a_log_survives_any_damage(tmp_path, rows, place, lost, step):
    file = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": n, "flow_loss": 1 / n}).encode() for n in range(1, 7)]
    content = (
        b"\n".join(
            [
                *lines[:place],
                *(row.replace(b"\n", b"?") + b"#" for row in rows),
                *lines[place:],
            ]
        )
        + b"\n"
    )
    content = content[: len(content) - lost]
    file.write_bytes(content)
    intact = [n for n in range(1, 7) if lines[n - 1] in content.split(b"\n")]
    steps = [row["step"] for row in read_lines(file)]
    assert steps == intact
    cut_lines(file, step)
    assert file.read_bytes() == b"".join(
        lines[n - 1] + b"\n" for n in intact if n <= step
    )
    before = file.stat().st_ino
    cut_lines(file, step)
    assert file.stat().st_ino == before, (
        "nothing is written when there is nothing to cut"
    )


def test_damaged_lines_are_reported_once_and_an_unfinished_one_never(tmp_path, capsys):
    run = saved(tmp_path / "tiny", (1,))
    run.log_path.write_bytes(
        b'{"step": 1}\n{"step": 2\n\xff\xfe\n[3]\n'
        b'{"step": "4"}\n{"step": 5}\n{"step": 6, "flow'
    )
    assert run.log["step"].tolist() == [1, 5]
    assert run.log["step"].tolist() == [1, 5]
    messages = capsys.readouterr().out.splitlines()
    assert len(messages) == 4
    assert all(
        f"{run.log_path}, line {n} is damaged and left out" in messages[n - 2]
        for n in (2, 3, 4, 5)
    )
    assert run.timing.empty
    run.timing_path.write_text(
        '{"step": 1, "seconds": 0.5}\n'
        '{"step": 5, "seconds": 1.5}\n'
        '{"step": 6, "seconds": 2.0}'
    )
    assert run.timing["seconds"].tolist() == [0.5, 1.5, 2.0], (
        "a line without its newline is complete"
    )
    run.cut_log(5)
    assert run.log_path.read_text() == '{"step": 1}\n{"step": 5}\n'
    assert (
        run.timing_path.read_text()
        == '{"step": 1, "seconds": 0.5}\n{"step": 5, "seconds": 1.5}\n'
    )


def test_a_log_that_lost_lines_before_the_checkpoint_is_left_as_it_is(tmp_path):
    run = saved(tmp_path / "tiny", (1, 2, 3))
    run.log_path.write_text('{"step": 1}\n')
    before = run.log_path.stat().st_ino
    run.cut_log(3)
    assert run.log_path.stat().st_ino == before
    assert run.log["step"].tolist() == [1]


# one writer


def test_the_writing_process_is_named_and_a_killed_one_is_replaced(
    worker, tmp_path, capsys
):
    run = saved(tmp_path / "tiny")
    pid = worker.start("hold", run.path)
    while run.writer() is None:
        time.sleep(0.01)
    writer = run.writer()
    assert writer["pid"] == pid
    assert set(writer) == {"pid", "host", "since"}
    with pytest.raises(
        RunInUse,
        match=f"process {pid} on .* trains it. Stop it .*stop.*, or use another name "
        f".tiny-2 is",
    ):
        with run.locked():
            pass
    with pytest.raises(RunInUse):
        Run.create(run.path, CONFIG, INPUTS, "cpu", {"train": "0" * 16})
    assert Run.open(run.path, "cpu").data == {}
    assert Run.create(run.path, CONFIG, INPUTS, "cpu").latest() is not None
    os.kill(pid, signal.SIGKILL)
    worker.wait()
    assert (run.path / "writer.json").exists() and run.writer() is None, (
        "the file is left behind and recognised as stale"
    )
    capsys.readouterr()
    with run.locked():
        printed = capsys.readouterr().out
        assert f"left by process {pid}" in printed
        assert "taken over" in printed
        assert printed.count("\n") == 1
        assert run.writer()["pid"] == os.getpid()
    assert not (run.path / "writer.json").exists()
    with run.locked():
        assert not capsys.readouterr().out


def test_a_child_that_outlives_a_killed_writer_does_not_keep_its_lock(worker, tmp_path):
    run = saved(tmp_path / "tiny")
    pid = worker.start("hold_with_child", run.path)
    while "held" not in worker.early:
        worker.early.append(worker.read())
    os.kill(pid, signal.SIGKILL)
    worker.wait()
    assert run.writer() is None
    with sole_writer(run.path, seconds=0):
        assert run.writer()["pid"] == os.getpid()


def test_only_one_thread_may_write_and_no_thread_twice(tmp_path):
    run = saved(tmp_path / "tiny")
    outcomes = []
    gate = threading.Barrier(4)
    done = threading.Event()

    def train():
        gate.wait()
        try:
            with sole_writer(run.path, seconds=0.1):
                outcomes.append("held")
                done.wait(5)
        except RunInUse:
            outcomes.append("refused")
            if len(outcomes) == 4:
                done.set()

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]
    with (
        sole_writer(run.path),
        pytest.raises(RunInUse),
        sole_writer(run.path, seconds=0),
    ):
        pass
    assert run.writer() is None


def test_the_lock_is_released_after_an_error(tmp_path):
    run = saved(tmp_path / "tiny")
    with pytest.raises(KeyboardInterrupt):
        with run.locked():
            raise KeyboardInterrupt
    assert run.writer() is None
    with run.locked():
        assert run.writer()


def test_processes_asking_for_the_writer_do_not_see_each_other(tmp_path):
    run = saved(tmp_path / "tiny")
    answers = []
    with run.locked():
        record = (run.path / "writer.json").read_text()
    (run.path / "writer.json").write_text(record)  # as a kill leaves it
    threads = [
        threading.Thread(
            target=lambda: answers.extend(writer_of(run.path) for _ in range(300))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [None] * 1200


def test_asking_for_the_writer_disturbs_nobody(tmp_path):
    run = saved(tmp_path / "tiny")
    done = threading.Event()
    answers = []

    def ask():
        while not done.is_set():
            answers.append(writer_of(run.path))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            with run.locked():
                assert run.writer()["pid"] == os.getpid()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert None in answers
    assert all(writer is None or writer["pid"] == os.getpid() for writer in answers)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_a_file_names_the_writer(
    worker, tmp_path, monkeypatch, number, capsys
):
    def missing(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", missing)
    run = saved(tmp_path / "tiny")
    with run.locked():
        assert run.writer()["pid"] == os.getpid()
        assert (run.path / "lock.soft").exists()
        with pytest.raises(
            RunInUse,
            match=f"process {os.getpid()} on.* If no process trains it, delete "
            f".*lock.soft",
        ):
            with sole_writer(run.path, seconds=0.1):
                pass
    assert run.writer() is None
    assert not (run.path / "lock.soft").exists()
    pid = worker.start("hold_without_flock", run.path)
    while run.writer() is None:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    worker.wait()
    assert (run.path / "lock.soft").exists()
    assert run.writer() is None
    with run.locked():
        assert run.writer()["pid"] == os.getpid()
        assert f"left by process {pid}" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EIO, errno.EPERM])
def test_other_lock_errors_are_reported(tmp_path, monkeypatch, number):
    run = saved(tmp_path / "tiny")
    write_json(
        run.path / "writer.json",
        {"pid": os.getpid(), "host": socket.gethostname(), "since": "today"},
    )

    def failing(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(NotWritten, match="tiny/lock could not be written") as error:
        run.locked().__enter__()
    assert error.value.errno == number
    assert not (run.path / "lock.soft").exists()
    assert run.writer()["pid"] == os.getpid(), "the recorded writer is still reported"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"pid": 1}',
        '{"pid": "x", "host": 3, "since": null}',
        "\0\0",
    ],
)
def test_an_invalid_writer_file_is_ignored(tmp_path, content):
    run = saved(tmp_path / "tiny")
    (run.path / "writer.json").write_text(content)
    assert run.writer() is None
    with run.locked():
        assert run.writer()["pid"] == os.getpid()


def test_a_missing_folder_has_no_writer(tmp_path):
    assert writer_of(tmp_path / "nothing") is None
    assert not (tmp_path / "nothing").exists()
