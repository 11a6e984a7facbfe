"""Shared by the tests: one tiny pair of runs, trained once."""
import os
import socket
from dataclasses import replace

import pytest
import torch
from hypothesis import settings

from selfflow.config import Config, ModelConfig, ObjectiveConfig, TrainConfig
from selfflow.training import train

torch.set_num_threads(1)

# Properties are tested with the same examples every time, so that a commit is not blamed for what chance finds. To look for more:
# HYPOTHESIS_PROFILE=search pytest tests/test_x.py, with twenty times as many, others each time.
settings.register_profile("same", derandomize=True)
settings.register_profile("search", max_examples=20 * settings.default.max_examples, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items):
    if settings.get_current_profile_name() == "search":
        for item in items:  # where a test says how many, twenty times as many of these
            if own := getattr(getattr(item, "obj", None), "_hypothesis_internal_use_settings", None):
                item.obj._hypothesis_internal_use_settings = settings(own, max_examples=20 * own.max_examples)

TINY = Config(name="tiny", model=ModelConfig(width=16, depth=4, heads=2),
              training=TrainConfig(steps=12, batch=16, log_every=1, validate_every=6, save_every=4))
VANILLA = replace(TINY, name="vanilla", objective=ObjectiveConfig("flow_matching"))


@pytest.fixture(autouse=True)
def no_connection_leaves_this_machine(monkeypatch):
    real = socket.socket.connect
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test wants to connect to {address}")
        return real(self, address)
    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "A Self-Flow run and a flow-matching run; tests must not change them."
    folder = tmp_path_factory.mktemp("runs")
    return {config.name: train(config, folder) for config in (TINY, VANILLA)}
