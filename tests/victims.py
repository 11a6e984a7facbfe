"""Train a run in child processes that are killed at random moments until one finishes.

Used by test_resume.

victims.py FOLDER CONFIG.json SEED KILLS: prints what the children were doing when they
were killed, as JSON {doing: times}. At least KILLS children are killed: when a run
finishes earlier, another one starts under the next number.
"""

import collections
import json
import mmap
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from selfflow.training import loop as training
from selfflow.training import recording, run
from selfflow.training.config import Config

torch.set_num_threads(1)
DOING = ("starting", "training", "saving", "logging", "pruning", "drawing")
# the index of what the child is doing, and whether it has trained a step
shared = mmap.mmap(-1, 2)


def announced(name, function):
    def announcing(*args, **options):
        shared[1] = shared[1] or name == "training"
        # pruning at the start is no target: repeated kills there stop all progress
        if name == "pruning" and not shared[1]:
            return function(*args, **options)
        before = shared[0]
        shared[0] = DOING.index(name)
        try:
            return function(*args, **options)
        finally:
            shared[0] = before

    return announcing


training.train_step = announced("training", training.train_step)
recording.Recorder.write = announced("logging", recording.Recorder.write)
for method, name in (
    ("save", "saving"),
    ("prune", "pruning"),
    ("save_sample_grid", "drawing"),
):
    setattr(run.Run, method, announced(name, getattr(run.Run, method)))


def main(folder: Path, config: Config, seed: int, kills: int) -> None:
    chance = random.Random(seed)
    killed = collections.Counter()
    number, lives = 0, 0
    while killed.total() < kills or lives:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.dup2(
                os.open(folder / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                1,
            )
            training.train(
                replace(config, name=f"{config.name}-{number}"), folder, "cpu"
            )
            os._exit(0)
        if lives == 6:  # enough kills: this child may finish
            os.waitpid(child, 0)
            number = number + 1
            lives = 0
            continue
        shared[:2], patience = bytes(2), chance.uniform(0.02, 0.4)
        began = time.monotonic()
        wanted = chance.choice((None, "saving", "saving", "pruning", "logging"))
        while (
            time.monotonic() - began < patience
            or wanted
            and shared[0] != DOING.index(wanted)
        ):
            if os.waitpid(child, os.WNOHANG)[0]:
                number, lives = number + 1, 0  # the run is finished
                break
            # short enough to hit a moment, and the child has the core
            time.sleep(0.0002)
        else:
            os.kill(child, signal.SIGKILL)
            killed[DOING[shared[0]]] += 1
            os.waitpid(child, 0)
            lives += 1
    print(json.dumps({"killed": killed, "runs": number}))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Config.from_dict(json.loads(Path(sys.argv[2]).read_text())),
        *map(int, sys.argv[3:]),
    )
