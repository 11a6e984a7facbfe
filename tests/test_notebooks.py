"""Every notebook runs from top to bottom, as nbdev_test runs it."""

import contextlib
import io
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# studies take longest: what is short fills the gaps at the end
NOTEBOOKS = sorted(
    (
        path.relative_to(ROOT)
        for path in (ROOT / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    ),
    key=lambda path: (path.parent.name != "studies", path),
)


def start():
    """Begin the process from which those that execute notebooks are forked.

    It imports once what all of them need; IN_TEST tells them that they are tested.
    """
    import selfflow.workbench.app  # noqa: F401

    os.environ["IN_TEST"] = "1"
    os.chdir(ROOT / "nbs")  # as nbdev_test does
    sys.path.insert(0, str(ROOT))
    # a notebook's own processes begin as they do for a user
    multiprocessing.set_start_method(None, force=True)


def execute(path):
    "Execute a notebook in this process; return its traceback, empty if it passes."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split())
    return "" if passed else errors.getvalue()


def execute_alone(path):
    "Execute a notebook in a process of its own, which leaves nothing to the next one."
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(execute, path).result()


@pytest.fixture(scope="session")
def executed():
    """A function that executes a notebook in another process and returns its traceback.

    That process is forked from one that has imported torch, and not from that of the
    tests, which has threads.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start) as pool:
        yield lambda path: pool.submit(execute_alone, path).result()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: "/".join(path.parts[1:]))
def test_a_notebook_runs(executed, path):
    problem = executed(ROOT / path)
    assert not problem, problem
