"""Train the configs of a list in turn and record what was raised.

Each process that test_processes starts runs this script.

Called by torchrun: several.py TASKS.json. A task: config, folder, and optionally poison
(the step whose data become huge in the last process), stop (the step after which the
last process gets a SIGTERM) or features (train REPA on features made here).
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from selfflow.collectives import processes
from selfflow.data.sources import Sources
from selfflow.training import loop as training
from selfflow.training.batches import Batches
from selfflow.training.config import Config

torch.set_num_threads(1)


def disturb(task: dict):
    "Batches.__getitem__ with the disturbance that the task requests."
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    read = Batches.__getitem__

    def disturbed(self, step):
        batch = read(self, step)
        if last and step + 1 == task.get("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        return (
            replace(batch, x0=batch.x0 * 1e30)
            if last and step == task.get("poison")
            else batch
        )

    return disturbed


class OneBase:
    "Student and teacher hold one base, of which this process has a part if sharded."

    def on_checkpoint(self, moment):
        student, teacher = moment.state.student, moment.state.teacher
        ours = dict(student.named_parameters())
        shared = {k for k, p in teacher.named_parameters() if p is ours[k]}
        assert shared == getattr(student, "base_names", set()) & ours.keys()
        if shared and moment.run.config.training.parallel == "fsdp":
            held = sum(ours[name].to_local().numel() for name in shared)
            assert held < 0.6 * sum(ours[name].numel() for name in shared)


def main(file: Path) -> None:
    read = Batches.__getitem__
    for task in json.loads(file.read_text()):
        config = Config.from_dict(task["config"])
        raised = None
        features = None
        if task.get("features"):
            sources = Sources(config.data)
            (name,) = sources.data
            tokens = sources.take(name, torch.arange(len(sources.data[name]))).x0
            features = torch.cat([tokens, -tokens], -1)
        Batches.__getitem__ = disturb(task)
        try:
            training.train(
                config, task["folder"], "cpu", features, callbacks=[OneBase()]
            )
        except (Exception, SystemExit) as error:
            raised = f"{type(error).__name__}: {error}"
        Batches.__getitem__ = read
        report = (
            Path(task["folder"]) / f"raised-{os.environ['RANK']}-of-{processes()}.json"
        )
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(raised))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
