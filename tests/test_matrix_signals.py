"""Every command works on runs of video and audio, or is refused before any work.

See matrix.py.
"""

import pytest
from matrix import SIGNALS, at_small_cost, cases, check, check_choice, trained


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    "From the name of a kind to the folder of its run, trained once."
    known = {}
    with pytest.MonkeyPatch.context() as patch:
        at_small_cost(patch)
        yield (
            lambda kind: (
                known[kind]
                if kind in known
                else known.setdefault(
                    kind,
                    trained(
                        SIGNALS[kind],
                        tmp_path_factory.mktemp(
                            kind.replace(" ", "-").replace(",", "")
                        ),
                    ),
                )
            )
        )


@pytest.mark.parametrize("kind, cell", cases(SIGNALS))
def test_it_works_or_is_refused_before_any_work(kind, cell, run_of, tmp_path, capsys):
    run = run_of(kind)
    if cell == "train":
        check_choice(SIGNALS[kind], run)
    else:
        check(SIGNALS[kind], cell, run, tmp_path, capsys)
