"""The notebooks as a book: who a chapter is for, and where a folder begins."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("*/*.ipynb"))
AUDIENCES = {"*For learners*", "*Engineering*"}


def cells(path, kind):
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_says_under_its_title_whom_it_is_for(path):
    lines = [line for line in cells(path, "markdown")[0].splitlines() if line]
    assert lines[0].startswith("# ")
    assert lines[1].startswith("> ")
    below = [line for line in lines if not line.startswith(("# ", "> "))]
    assert below[0] in AUDIENCES


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in CHAPTERS}), ids=lambda path: path.name
)
def test_a_folder_says_what_it_is_for_and_in_which_order_to_read_it(folder):
    introductions = [
        text
        for path in folder.glob("*.ipynb")
        for text in cells(path, "markdown")
        if text.startswith(f"**This folder, `{folder.name}`,**")
    ]
    assert len(introductions) == 1
    assert introductions[0] == cells(_first(folder), "markdown")[1]


def _first(folder: Path) -> Path:
    "The notebook that is read first: the quickstart among the studies."
    quickstart = folder / "quickstart.ipynb"
    return quickstart if quickstart.exists() else min(folder.glob("*.ipynb"))
