"""Faults at the k-th change of the disk, and processes that tests kill.

Run as a script, it is the parent of these processes: it has torch loaded and forks a
child for each line `ACTION FOLDER [K]` that it reads, so a child starts in
milliseconds.
"""

import io
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import selfflow.disk
from selfflow.disk import read_lines, step_of
from selfflow.training.run import Run

CALLS = [
    (os, name)
    for name in (
        "open",
        "fsync",
        "rename",
        "replace",
        "mkdir",
        "unlink",
        "rmdir",
        "chmod",
        "utime",
    )
]
CALLS += [(io, "open"), (selfflow.disk, "save_file")]


def writes(args, options):
    "Return True if a call of `open` may change the disk."
    how = args[1] if len(args) > 1 else options.get("mode", "r")
    return (
        bool(set(how) & set("wax+"))
        if isinstance(how, str)
        else bool(how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )


@contextmanager
def at_call(k, fault):
    """Count the calls that change the disk and call `fault()` before the k-th.

    Yields the names of the calls so far.
    """
    calls = []
    originals = {(module, name): getattr(module, name) for module, name in CALLS}

    def counted(module, name):
        def call(*args, **options):
            if name != "open" or writes(args, options):
                calls.append(name)
                if len(calls) == k:
                    fault()
            return originals[module, name](*args, **options)

        return call

    for module, name in CALLS:
        setattr(module, name, counted(module, name))
    try:
        yield calls
    finally:
        for (module, name), function in originals.items():
            setattr(module, name, function)


def tensors(step):
    "The parts of a tiny checkpoint."
    return {
        part: {"x": torch.full((50,), float(step))}
        for part in ("model", "teacher", "optimizer")
    }


def emit(text):
    os.write(1, f"{text}\n".encode())  # in one piece, at once


def save_repeatedly(folder):
    "Resume the run; log, save and prune as training does; print each saved step."
    run = Run.open(folder, "cpu")
    with run.locked():
        run.clear_staging()
        step = step_of(path) if (path := run.latest()) else 0
        run.cut_log(step)
        with run.log_path.open("a", buffering=1) as log:
            while True:
                step += 1
                log.write(f'{{"step": {step}, "flow_loss": {1 / step}}}\n')
                os.fsync(log.fileno())
                run.save(step, tensors(step), {})
                emit(step)
                run.prune()


def hold(folder):
    with Run.open(folder, "cpu").locked():
        emit("held")
        time.sleep(100)


def hold_with_child(folder):
    "The child outlives its parent, as a process that fetches data may."
    with Run.open(folder, "cpu").locked():
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
        emit("held")
        time.sleep(100)


def hold_without_flock(folder):
    import fcntl

    def missing(*args):
        raise OSError(38, "no flock here")

    fcntl.flock = missing
    hold(folder)


def small_files_only(folder):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    run = Run.open(folder, "cpu")
    try:
        run.save(2, {"model": {"x": torch.zeros(5000)}}, {})
    except OSError as error:
        emit(f"{type(error).__name__} {error.errno} {error}")


def save(folder):
    Run.open(folder, "cpu").save(3, tensors(3), {})


def prune(folder):
    Run.open(folder, "cpu").prune()


def cut(folder):
    Run.open(folder, "cpu").cut_log(2)


def history(folder):
    Run.open(folder, "cpu").save_sample_grid(
        3, torch.full((2, 1, 8, 8), 3.0), torch.tensor([1, 2])
    )


def child(action, folder, k=None):
    function = globals()[action]
    if k is None:
        return function(folder)
    with at_call(int(k), lambda: os.kill(os.getpid(), signal.SIGKILL)):
        return function(folder)


def serve():
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(*line.split())
            except BaseException as error:
                emit(f"{type(error).__name__}: {error}")
            os._exit(0)
        # on a line of its own: a child may have been killed in the middle of one
        emit(f"\npid {pid}")
        _, status = os.waitpid(pid, 0)
        emit(f"\nended {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}")


class Worker:
    "The parent process as the tests use it."

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONFAULTHANDLER": "1",
                "PYTHONPATH": str(Path(__file__).parent.parent),
            },
        )
        self.unread = b""
        self.early = []

    def start(self, *words):
        "Fork a child; returns its pid."
        self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())
        self.process.stdin.flush()
        lines = self.early = []
        # a child may be faster than its parent
        while not (line := self.read()).startswith("pid "):
            lines.append(line)  # read before `wait`
        return int(line.split()[1])

    def read(self):
        while b"\n" not in self.unread:
            if not select.select([self.process.stdout], [], [], 60)[0]:
                # faulthandler prints where each process is
                os.killpg(self.process.pid, signal.SIGABRT)
                raise AssertionError(
                    f"nothing was printed for a minute after {self.early}"
                )
            chunk = os.read(self.process.stdout.fileno(), 10000)
            assert chunk, "the worker has died"
            self.unread += chunk
        line, _, self.unread = self.unread.partition(b"\n")
        return line.decode().strip() or self.read()

    def step(self):
        "Wait until the child prints a step."
        while not any(line.isdigit() for line in self.early):
            self.early.append(self.read())
            assert not self.early[-1].startswith("ended "), (
                f"the child ended before it saved: {self.early}"
            )

    def wait(self):
        "Return the signal that ended the child (0 = none) and the lines it printed."
        lines = self.early
        while not (line := self.read()).startswith("ended "):
            lines.append(line)
        return int(line.split()[1]), lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert read_lines(Path("nowhere")) == []
    serve()
