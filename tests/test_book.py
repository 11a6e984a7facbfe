"""The notebooks as a book, and its cover: whom a chapter is for, where a folder begins,
and that README and studies show the numbers that were recorded.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("*/*.ipynb"))
AUDIENCES = {"*For learners*", "*Engineering*"}
README = (ROOT / "README.md").read_text()
MOST_WORDS = 900  # two screens


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


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in CHAPTERS}), ids=lambda path: path.name
)
def test_the_first_page_of_a_folder_names_each_of_its_chapters_and_no_other(folder):
    introduction = cells(_first(folder), "markdown")[1]
    named = set(re.findall(r"\]\((\w+)\.ipynb\)", introduction))
    assert named == {path.stem for path in folder.glob("*.ipynb")}


def test_learners_are_sent_to_the_chapters_for_learners():
    "In a folder with both kinds, its first page lists them in two paragraphs."
    for folder in {path.parent for path in CHAPTERS}:
        introduction = cells(_first(folder), "markdown")[1]
        audience = {
            path.stem: "*For learners*" in cells(path, "markdown")[0]
            for path in folder.glob("*.ipynb")
        }
        if not any(audience.values()):
            assert "All chapters are engineering" in introduction
            continue
        for paragraph in introduction.split("\n\n"):
            named = re.findall(r"\]\((\w+)\.ipynb\)", paragraph)
            if paragraph.startswith("**Learners**"):
                assert all(audience[name] for name in named), (folder.name, named)
            elif paragraph.startswith("**Engineers"):
                assert not any(audience[name] for name in named), (folder.name, named)


def _first(folder: Path) -> Path:
    "The notebook that is read first: the quickstart among the studies."
    quickstart = folder / "quickstart.ipynb"
    return quickstart if quickstart.exists() else min(folder.glob("*.ipynb"))


def test_the_readme_is_read_in_two_screens():
    assert len(README.split()) <= MOST_WORDS


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "steps=1000" in example
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example.replace("steps=1000", "steps=2"), names)  # the same lines, in small
    assert names["images"].shape == (3, 1, 8, 8)
    assert (tmp_path / "runs/mine/config.json").exists()


def recorded(name: str):
    return json.loads((ROOT / f"data/results/{name}.json").read_text())


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", text)]


def test_the_table_of_the_readme_is_the_recorded_one():
    record = recorded("quickstart_seeds")
    assert len(record["seeds"]) == 5
    assert record["steps"]["Self-Flow"] == 1000
    assert f"{record['pixels']:.1%}".replace("%", " %") in README
    lines = [
        line for line in README.splitlines() if line.startswith("| ") and "±" in line
    ]
    for line, row in zip(lines, record["summary"], strict=True):
        in_percent = row["measure"] != "flow loss"
        expected = [
            number * (100 if in_percent else 1)
            for column, cell in row.items()
            if column not in ("measure", "flow matching, 4/3 steps")
            for number in numbers(cell)
        ]
        printed = numbers(line.split("|", 2)[2])  # without the name of the row
        tolerance = 0.051 if in_percent else 1e-9  # one digit is shown
        assert printed == pytest.approx(expected, abs=tolerance), line


def strings(value):
    "All strings in a record."
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def shown_by(study: str) -> str:
    "What the stored outputs of a study show, as text."
    notebook = json.loads((ROOT / f"nbs/studies/{study}.ipynb").read_text())
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    texts = [out.get("text", "") for out in outputs]
    for out in outputs:
        data = out.get("data", {})
        texts += [data.get("text/plain", ""), data.get("text/html", "")]
    return "\n".join("".join(text) for text in texts)


@pytest.mark.parametrize(
    "record, study",
    {
        "own_data": "own_data",
        "quickstart_seeds": "quickstart_seeds",
        "rivals": "rivals",
        "saturation": "attention",
        "train_audio": "train_audio",
        "train_image": "train_image",
        "train_joint": "train_joint",
        "train_video": "train_video",
        "train_video_gpu": "train_video",
    }.items(),
)
def test_a_study_shows_the_numbers_that_it_recorded(record, study):
    # "69.2% (65.0% to 73.1%, n = 500)"
    with_interval = [
        text for text in strings(recorded(record)) if re.search(r"\d[.%].*\(.*\d", text)
    ]
    assert with_interval
    printed = shown_by(study)
    assert [text for text in with_interval if text not in printed] == []


def test_the_benchmark_shows_the_speeds_that_were_recorded():
    printed = shown_by("benchmark")
    for entry in [*recorded("benchmark_cpu"), *recorded("benchmark_gpu")]:
        low, median, high = entry["results"]["Self-Flow"]["speed_ratio"]
        assert f"{median:.2f} ({low:.2f} to {high:.2f})" in printed


def test_the_long_run_shows_what_was_recorded():
    record = recorded("long_run")
    assert record["equal"]
    stops = ", ".join(str(step) for step in record["stops"])
    assert f"stopped after steps {stops}" in shown_by("long_run")


def test_the_workbench_says_how_quick_it_is():
    record = recorded("latency")
    median = {name: entry["milliseconds"]["median"] for name, entry in record.items()}
    chosen = median.pop("run browser, a run chosen")
    text = " ".join(cells(ROOT / "nbs/studies/workbench.ipynb", "markdown")[-1].split())
    assert f"{min(median.values()):.0f} to {max(median.values()):.0f} ms" in text
    assert f"{chosen:.0f} ms when other runs are chosen" in text


def test_the_first_chapter_needs_no_library_before_its_end():
    path = ROOT / "nbs/00_self_flow.ipynb"
    notebook = json.loads(path.read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    heading = next(text for text in sources if text.startswith("## The library"))
    end = sources.index(heading)
    code = [
        text
        for text, cell in zip(sources[:end], notebook["cells"], strict=False)
        if cell["cell_type"] == "code"
    ]
    assert code
    assert not any("selfflow" in text for text in code)
    assert "assert_close" in "".join(sources[end:])
