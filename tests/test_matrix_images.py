"""Every command works on every kind of image run, or is refused before any work.

See matrix.py.
"""

import pytest
from matrix import IMAGES, at_small_cost, cases, check, check_choice, trained


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
                        IMAGES[kind],
                        tmp_path_factory.mktemp(
                            kind.replace(" ", "-").replace(",", "")
                        ),
                    ),
                )
            )
        )


@pytest.mark.parametrize("kind, cell", cases(IMAGES))
def test_it_works_or_is_refused_before_any_work(kind, cell, run_of, tmp_path, capsys):
    run = run_of(kind)
    if cell == "train":
        check_choice(IMAGES[kind], run)
    else:
        check(IMAGES[kind], cell, run, tmp_path, capsys)
