"""Every command works on runs of video and audio, or is refused before any work.

The kinds and the commands are in matrix.py.
"""

import functools

import pytest
from matrix import SIGNALS, at_small_cost, cases, check, check_choice, trained


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    "Return the folder of the run of a kind by its name, trained once."

    @functools.cache
    def run_of_kind(kind):
        folder = tmp_path_factory.mktemp(kind.replace(" ", "-").replace(",", ""))
        return trained(SIGNALS[kind], folder)

    with pytest.MonkeyPatch.context() as patch:
        at_small_cost(patch)
        yield run_of_kind


@pytest.mark.parametrize("kind, cell", cases(SIGNALS))
def test_a_command_works_or_is_refused_before_any_work(
    kind, cell, run_of, tmp_path, capsys
):
    run = run_of(kind)
    if cell == "train":
        check_choice(SIGNALS[kind], run)
    else:
        check(SIGNALS[kind], cell, run, tmp_path, capsys)
