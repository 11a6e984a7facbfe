"""Faults at the k-th thing that is done to the disk, and a process to be killed.

As a script it is that process's parent.

The parent has torch loaded and forks a child for each line that it reads, `ACTION
FOLDER [K]`; so a child starts in milliseconds.
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
    "Whether a call of `open` may change the disk."
    how = args[1] if len(args) > 1 else options.get("mode", "r")
    return (
        bool(set(how) & set("wax+"))
        if isinstance(how, str)
        else bool(how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )


@contextmanager
def at_call(k, fault):
    """What changes the disk is counted; `fault()` comes before the k-th.

    Yields the names of the calls so far.
    """
    seen = []
    real = {(module, name): getattr(module, name) for module, name in CALLS}

    def counted(module, name):
        def call(*args, **options):
            if name != "open" or writes(args, options):
                seen.append(name)
                if len(seen) == k:
                    fault()
            return real[module, name](*args, **options)

        return call

    for module, name in CALLS:
        setattr(module, name, counted(module, name))
    try:
        yield seen
    finally:
        for (module, name), function in real.items():
            setattr(module, name, function)


def tensors(step):
    "The parts of a tiny checkpoint."
    return {
        part: {"x": torch.full((50,), float(step))}
        for part in ("model", "teacher", "optimizer")
    }


def say(text):
    os.write(1, f"{text}\n".encode())  # in one piece, at once


def save_on(folder):
    """Log, save and prune, as training does, from where the folder stands; says each
    step that was saved.
    """
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
                say(step)
                run.prune()


def hold(folder):
    with Run.open(folder, "cpu").locked():
        say("held")
        time.sleep(100)


def hold_with_child(folder):
    "As with processes that fetch data: the child outlives its parent."
    with Run.open(folder, "cpu").locked():
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
        say("held")
        time.sleep(100)


def hold_softly(folder):
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
        say(f"{type(error).__name__} {error.errno} {error}")


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
                say(f"{type(error).__name__}: {error}")
            os._exit(0)
        # on a line of its own: a child may have been killed in the middle of one
        say(f"\npid {pid}")
        _, status = os.waitpid(pid, 0)
        say(f"\nended {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}")


class Worker:
    "The parent, seen from the tests."

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
        said = self.early = []
        # a child may be faster than its parent
        while not (line := self.read()).startswith("pid "):
            said.append(line)  # read before `wait`
        return int(line.split()[1])

    def read(self):
        while b"\n" not in self.unread:
            if not select.select([self.process.stdout], [], [], 60)[0]:
                # says where each of them stands
                os.killpg(self.process.pid, signal.SIGABRT)
                raise AssertionError(
                    f"nothing was said for a minute after {self.early}"
                )
            part = os.read(self.process.stdout.fileno(), 10000)
            assert part, "the worker has died"
            self.unread += part
        line, _, self.unread = self.unread.partition(b"\n")
        return line.decode().strip() or self.read()

    def step(self):
        "Wait until the child says a step."
        while not any(line.isdigit() for line in self.early):
            self.early.append(self.read())
            assert not self.early[-1].startswith("ended "), (
                f"the child ended before it saved: {self.early}"
            )

    def wait(self):
        """Wait for the child; returns the signal that ended it (0 = none) and what it
        said.
        """
        said = self.early
        while not (line := self.read()).startswith("ended "):
            said.append(line)
        return int(line.split()[1]), said


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert read_lines(Path("nowhere")) == []
    serve()
