"""Every notebook runs from top to bottom, as nbdev_test runs it.

None leaves its process other than it was.
"""

import contextlib
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import process_settings

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
    "The process that executes notebooks: nbdev's variable says that they are tested."
    os.environ["IN_TEST"] = "1"
    os.chdir(ROOT / "nbs")  # as nbdev_test does
    sys.path.insert(0, str(ROOT))


def execute(path):
    "The traceback of a notebook that fails and the settings that it leaves changed."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    before = process_settings()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split())
    after = process_settings()
    changed = {name: value for name, value in after.items() if value != before[name]}
    return "" if passed else errors.getvalue(), changed


@pytest.fixture(scope="session")
def executed():
    """A function that executes a notebook in another process and returns its answer.

    One process serves many notebooks, so that torch is imported once; it is not that of
    the tests, which IPython would change.
    """
    pool = None

    def run(path):
        nonlocal pool
        if pool is None:
            pool = ProcessPoolExecutor(1, get_context("spawn"), start)
        try:
            return pool.submit(execute, path).result()
        except BrokenProcessPool:
            pool = None
            raise

    yield run
    if pool:
        pool.shutdown()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: "/".join(path.parts[1:]))
def test_a_notebook_runs(executed, path):
    problem, changed = executed(ROOT / path)
    assert not problem, problem
    assert not changed, f"{path} changes what other notebooks compute"
