"""Shared by the tests: one tiny pair of runs, trained once, and the same rules for all.

No test connects to another machine, and none leaves its process other than it was.
"""

import os
import socket
from dataclasses import replace

# Two test processes share two cores, and each test's own processes with them: threads
# that wait for a core make everything several times slower. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from browser import lab, page  # noqa: F401, fixtures
from hypothesis import HealthCheck, settings

from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.registries import trial
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train

torch.set_num_threads(1)

# Properties are tested with the same examples each time and without a clock: neither
# chance nor a slow machine fails a commit.
# To look further: HYPOTHESIS_PROFILE=search pytest tests/test_x.py, with others each
# time, and more where no test says how many.
for name, options in {
    "same": {"derandomize": True, "max_examples": 30},
    "search": {"derandomize": False, "max_examples": 2_000},
}.items():
    settings.register_profile(
        name, deadline=None, suppress_health_check=[HealthCheck.too_slow], **options
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

TINY = Config(
    name="tiny",
    model=ModelConfig(width=16, depth=4, heads=2),
    training=TrainConfig(
        steps=12,
        batch=16,
        log_every=1,
        validate_every=6,
        validation=64,
        save_every=4,
    ),
)
VANILLA = replace(TINY, name="vanilla", objective=ObjectiveConfig("flow_matching"))


def parts_of(run):
    parts = [path.stem for path in run.latest().glob("*.safetensors")]
    assert {"model", "teacher", "optimizer"} <= set(parts)
    return {
        f"{part}/{name}": value
        for part in parts
        for name, value in run.load(part).items()
    }


def assert_same(run, other):
    expected = parts_of(run)
    actual = parts_of(other)
    assert expected.keys() == actual.keys() and all(
        torch.equal(expected[k], actual[k]) for k in expected
    )
    assert run.log_path.read_text() == other.log_path.read_text()


# libraries set others when they are imported
VARIABLES = ("IN_TEST", "OMP_NUM_THREADS", "WORLD_SIZE", "HOME", "PATH")


def process_settings():
    "Settings of this process that change what later tests compute."
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "folder": os.getcwd(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def group_of(nodeid):
    """Return the group of a test; one test process runs all tests of a group.

    The tests of a file share trained runs, those with a browser one JupyterLab.
    Notebooks share nothing but, some of them, UMAP.
    """
    file = nodeid.partition("::")[0]
    name = file.rpartition("/")[2]
    if "test_a_notebook_runs[" in nodeid:
        return nodeid
    return "browser" if name.startswith("test_browser") else file


def pytest_collection_modifyitems(items):
    "The longest group first, the browser; notebooks last, to fill both processes."

    def rank(item):
        group = group_of(item.nodeid)
        if group == "browser":
            return 0
        return 2 if group == item.nodeid else 1

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Return the scheduler of `pytest -n 2`, which keeps groups together.

    Of its own, because `--dist loadgroup` of pytest-xdist 3.8 silently ignores groups
    with pytest 9.2: both processes then train the same runs.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    config.option.loadscopereorder = False  # the order is that of the collection
    return Groups(config, log)


@pytest.fixture(autouse=True)
def the_process_is_left_as_it_was():
    """A picture once differed in its last bits because another test had left two
    threads.
    """
    before = process_settings()
    yield
    after = process_settings()
    torch.set_num_threads(before["threads"])
    assert after == before


@pytest.fixture(autouse=True, scope="module")
def registrations_end_with_their_file():
    with trial():
        yield


@pytest.fixture(autouse=True)
def no_connection_leaves_this_machine(the_process_is_left_as_it_was, monkeypatch):
    real = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test wants to connect to {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "A Self-Flow run and a flow-matching run; tests must not change them."
    folder = tmp_path_factory.mktemp("runs")
    return {config.name: train(config, folder) for config in (TINY, VANILLA)}
