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
# UMAP compiles for half a minute: one process does so, for all that use it
WITH_UMAP = [
    Path("nbs", name)
    for name in (
        "studies/quickstart.ipynb",
        "studies/own_data.ipynb",
        "studies/umap.ipynb",
        "4_analysis/11_projection.ipynb",
    )
]
# studies take longest: what is short fills the gaps at the end
NOTEBOOKS = sorted(
    (
        path
        for file in (ROOT / "nbs").rglob("*.ipynb")
        if (path := file.relative_to(ROOT)) not in WITH_UMAP
        and ".ipynb_checkpoints" not in path.parts
    ),
    key=lambda path: (path.parent.name != "studies", path),
)


def start(umap=False):
    """Begin the process from which those that execute notebooks are forked.

    It imports and compiles once what many of them need, with UMAP if asked; IN_TEST
    tells them that they are tested.
    """
    os.environ["IN_TEST"] = "1"
    # a process that has used the threads of OpenMP must not be forked
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"
    os.environ["NUMBA_NUM_THREADS"] = "1"
    import torch._dynamo  # noqa: F401, the first optimiser of a process imports it

    import selfflow.report.report
    import selfflow.workbench.app  # noqa: F401

    if umap:
        import numpy as np

        from selfflow.analysis.projection import project

        points = np.random.default_rng(0).normal(size=(40, 4))
        project(points, "UMAP", neighbours=5)

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


@contextlib.contextmanager
def executing(umap=False):
    """A function that executes a notebook in another process and returns its traceback.

    That process is forked from one that has imported torch, and not from that of the
    tests, which has threads.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, start, (umap,)) as pool:
        yield lambda path: pool.submit(execute_alone, path).result()


@pytest.fixture(scope="session")
def executed():
    with executing() as execute:
        yield execute


@pytest.fixture(scope="module")
def executed_with_umap():
    with executing(umap=True) as execute:
        yield execute


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: "/".join(path.parts[1:]))
def test_a_notebook_runs(executed, path):
    problem = executed(ROOT / path)
    assert not problem, problem


@pytest.mark.parametrize("path", WITH_UMAP, ids=lambda path: "/".join(path.parts[1:]))
def test_a_notebook_with_umap_runs(executed_with_umap, path):
    problem = executed_with_umap(ROOT / path)
    assert not problem, problem
