"""A simulated trainer: writes a run folder as the loop does and answers requests."""

import json
import math
import shutil
import threading
import time
from datetime import datetime
from pathlib import Path

import torch

from selfflow.method.backbone import Inputs
from selfflow.method.tokens import Part
from selfflow.training.config import Config, TrainConfig
from selfflow.training.run import Run

LEVELS = [0.05 + 0.1 * i for i in range(10)]


class SimulatedTrainer:
    "Writes a run folder without training: log, sample grids, answers to requests."

    def __init__(self, path: Path, steps: int = 100, features: bool = True):
        self.path = Path(path)
        self.features = features
        self.step = 0
        self.answers = []
        config = Config(name=self.path.name, training=TrainConfig(steps=steps))
        self.run = Run.create(
            path, config, Inputs((Part("image", 4, (1, 4, 4)),), classes=10), "cpu"
        )

    def line(self, step: int) -> dict:
        fall = math.exp(-step / 50)
        values = {
            "step": step,
            "total": 1 + fall,
            "flow_loss": 0.4 + fall,
            "grad_norm": 0.5 + fall,
        }
        if self.features:
            values |= {
                "rep_loss": 0.2 + fall,
                "cosine": 0.8 - 0.6 * fall,
                "constant_cosine": 0.6 - 0.5 * fall,
            }
        if step % 10 == 0:
            values |= {
                "validation_flow_loss": 0.5 + fall,
                "flow_loss_by_level": [t + fall for t in LEVELS],
            }
        return values

    def log_lines(self, count: int, rate: float = 20.0) -> None:
        "Log some steps and save a checkpoint after the last."
        self._log_lines(count, rate)
        self.save()

    def save(self) -> None:
        """Write what an observer reads of a checkpoint, and remove older ones."""
        new = self.path / f"checkpoints/step-{self.step:08d}"
        new.mkdir(parents=True, exist_ok=True)
        state = json.dumps({"step": self.step})
        (new / "state.json").write_text(state)
        (new / "manifest.json").write_text(
            json.dumps({"state.json": {"size": len(state)}})
        )
        for path in set(new.parent.iterdir()) - {new}:
            shutil.rmtree(path)

    def _log_lines(self, count: int, rate: float = 20.0) -> None:
        with (
            (self.path / "log.jsonl").open("a") as log,
            (self.path / "timing.jsonl").open("a") as timing,
        ):
            for _ in range(count):
                self.step += 1
                log.write(json.dumps(self.line(self.step)) + "\n")
                record = {
                    "step": self.step,
                    "seconds": self.step / rate,
                    "wall": self.step / rate,
                    "steps_per_second": rate,
                    "data_wait": 0.004,
                    "peak_memory": 1_300_000_000,
                    "device": "cpu",
                    "processes": 1,
                }
                timing.write(json.dumps(record) + "\n")

    def save_sample_grid(self, step: int, count: int = 4) -> None:
        noise = torch.randn(
            (count, 1, 8, 8), generator=torch.Generator().manual_seed(0)
        )
        self.run.save_sample_grid(
            step, noise.clamp(-1, 1) * math.exp(-step / 50), torch.arange(count)
        )

    def train(self, pause: float = 0.02) -> None:
        "Hold the lock and log until all steps are done or a stop is requested."
        with self.run.locked():
            while self.step < self.run.config.training.steps:
                self._log_lines(1)
                time.sleep(pause)
                if self.run.requested("sample"):
                    self.save_sample_grid(self.step)
                    self.run.clear_request("sample")
                    self.answers.append(("sample", self.step, datetime.now()))
                if self.run.requested("stop"):
                    self.run.clear_request("stop")
                    self.answers.append(("stop", self.step, datetime.now()))
                    break
            self.save()

    def in_thread(self, pause: float = 0.02) -> threading.Thread:
        thread = threading.Thread(target=self.train, args=(pause,), daemon=True)
        thread.start()
        while self.run.writer() is None and thread.is_alive():
            time.sleep(0.005)
        return thread
