"""Kinds of data and everything a user can do with a run on them.

For test_matrix_images and test_matrix_signals; each kind is trained once.
"""

import csv
import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from selfflow.analysis import features, probing
from selfflow.analysis.features import items_of
from selfflow.analysis.projection import project
from selfflow.cli import main
from selfflow.data.autoencoder import Haar
from selfflow.data.folders import Folder
from selfflow.data.latents import encode_latents
from selfflow.method.transformer import Transformer
from selfflow.report import report, representation_sections, sample_sections
from selfflow.training.batches import Validation
from selfflow.training.run import Run
from selfflow.workbench.asymmetry import explore as explore_asymmetry
from selfflow.workbench.attention_explorer import explore_attention
from selfflow.workbench.feature_explorer import explore_features, item_previews
from selfflow.workbench.map_explorer import explore_map
from selfflow.workbench.page import tools_on_page
from selfflow.workbench.paths import SideBySide
from selfflow.workbench.playground import explore as explore_sampling
from selfflow.workbench.probe_process import Probing
from selfflow.workbench.tools import Chosen
from selfflow.workbench.viewed_run import ViewedRun

NOTEBOOKS = Path(__file__).parent.parent / "nbs/studies"
CLASSES = ("circle", "square", "star")
SIZES = {"train": 12, "validation": 6, "test": 6}  # of a class

# data: the classes come one after the other, as in folders


def _write_image(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng((label, number))
    pixels = draw.integers(0, 60, (16, 16, 3), np.uint8)
    pixels[2 + 4 * label : 6 + 4 * label, 2:14] += 150
    Image.fromarray(pixels).save(path)


def _write_video(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [
        Image.new("L", (16, 16), 20 * number % 100 + (frame * label * 10) % 100)
        for frame in range(8)
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


def _write_audio(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(8_192) / 8_000
    tone = 0.3 * np.sin(2 * np.pi * 200 * 2**label * times + number)
    wavfile.write(path, 8_000, tone.astype(np.float32))


def _folder(
    root: Path, *writers: tuple[Callable, str], classes=CLASSES, times: int = 1
) -> None:
    for split, count in SIZES.items():
        for label, name in enumerate(classes or [""] * 3):
            for number in range(times * count):
                for write, suffix in writers:
                    file = root / split / name / f"{label}{number:02d}{suffix}"
                    write(file, label, number)


def _table(root: Path, *columns: str) -> None:
    _folder(root, (_write_image, ".png"), classes=())
    for split, count in SIZES.items():
        with (root / split / "metadata.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("file_name", *columns))
            for label, name in enumerate(CLASSES):
                cells = {"label": name, "caption": f"a bright {name}"}
                values = [cells[column] for column in columns]
                for number in range(count):
                    rows.writerow((f"{label}{number:02d}.png", *values))


def _huggingface(root: Path) -> None:
    _folder(root / "files", (_write_image, ".png"))
    columns = datasets.Features(
        {
            "image": {
                "bytes": datasets.Value("binary"),
                "path": datasets.Value("string"),
            },
            "label": datasets.ClassLabel(names=list(CLASSES)),
        }
    )
    tables = {}
    for split in SIZES:
        files = sorted((root / "files" / split).rglob("*.png"))
        rows = [
            {
                "image": {"bytes": file.read_bytes(), "path": None},
                "label": CLASSES.index(file.parent.name),
            }
            for file in files
        ]
        tables[split] = datasets.Dataset.from_list(rows, features=columns)
    datasets.disable_progress_bars()
    datasets.DatasetDict(tables).save_to_disk(str(root / "saved"))


def _latents(root: Path) -> None:
    _folder(root / "files", (_write_image, ".png"))
    for split in SIZES:
        encode_latents(
            Folder(root / "files", size=16, split=split),
            Haar(),
            root / "latents",
            split,
            bar=False,
        )


# kinds: the data that are written, and the options of `selfflow train`

FILES = {"patch": 8, "height": 16, "width": 16}
VIDEOS = FILES | {"frames": 8}


@dataclass(frozen=True)
class Kind:
    """Data of one kind, and the cells that are refused for a run on them.

    write: writes the data into a folder; path: of the data in it; data: options;
    refused: {cell: part of the reason}; as_another: its samples, conditions and classes
    all occur in other kinds, which are tried in the explorers.
    """

    write: Callable | None
    data: dict
    path: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    as_another: bool = False


NO_CLASS = dict.fromkeys(
    ("probe", "probe panel", "probe notebook"), "nothing to probe for"
)
NO_JUDGE = {"metrics": "need an extractor"}
IMAGES = {
    "digits": Kind(None, {"name": "digits"}),
    "digits, no condition": Kind(
        None, {"name": "digits", "condition": "none"}, as_another=True
    ),
    "shapes": Kind(None, {"name": "shapes", "patch": 8}),
    "shapes, captions": Kind(
        None,
        {"name": "shapes", "patch": 8, "condition": "caption", "caption": 32},
        as_another=True,
    ),
    "folder": Kind(
        lambda root: _folder(root, (_write_image, ".png")),
        {"name": "folder", **FILES},
        refused=NO_JUDGE,
    ),
    "folder, no classes": Kind(
        lambda root: _folder(root, (_write_image, ".png"), classes=()),
        {"name": "folder", "condition": "none", **FILES},
        refused=NO_CLASS | NO_JUDGE,
    ),
    "folder, one class": Kind(
        lambda root: _folder(root, (_write_image, ".png"), classes=("only",), times=3),
        {"name": "folder", **FILES},
        refused=NO_CLASS | NO_JUDGE,
        as_another=True,
    ),
    "table, captions": Kind(
        lambda root: _table(root, "label", "caption"),
        {"name": "folder", "condition": "caption", "caption": 24, **FILES},
        refused=NO_JUDGE,
        as_another=True,
    ),
    "table, captions alone": Kind(
        lambda root: _table(root, "caption"),
        {"name": "folder", "condition": "caption", "caption": 24, **FILES},
        refused=NO_CLASS | NO_JUDGE,
    ),
    "Hugging Face": Kind(
        _huggingface,
        {"name": "huggingface", **FILES},
        "saved",
        refused=NO_JUDGE,
        as_another=True,
    ),
    "latents": Kind(
        _latents,
        {"name": "latents", "patch": 4},
        "latents",
        {"metrics": "a run of latents draws latents"},
    ),
}
SIGNALS = {
    "motion": Kind(None, {"name": "motion", "patch": 8, "span": 4}),
    "notes": Kind(None, {"name": "notes", "columns": 8}),
    "scenes": Kind(None, {"name": "scenes", "patch": 16, "span": 4, "columns": 8}),
    "audio": Kind(
        lambda root: _folder(root, (_write_audio, ".wav")),
        {"name": "folder", "signals": ("audio",), "columns": 1},
        refused=NO_JUDGE,
        as_another=True,
    ),
    "videos": Kind(
        lambda root: _folder(root, (_write_video, ".gif")),
        {"name": "folder", "signals": ("video",), **VIDEOS},
        refused=NO_JUDGE,
    ),
    "pairs": Kind(
        lambda root: _folder(root, (_write_video, ".gif"), (_write_audio, ".wav")),
        {"name": "folder", "signals": ("video", "audio"), "columns": 1, **VIDEOS},
        refused=NO_JUDGE,
        as_another=True,
    ),
    "pairs, no classes": Kind(
        lambda root: _folder(
            root, (_write_video, ".gif"), (_write_audio, ".wav"), classes=()
        ),
        {
            "name": "folder",
            "condition": "none",
            "signals": ("video", "audio"),
            "columns": 1,
            **VIDEOS,
        },
        refused=NO_CLASS | NO_JUDGE,
        as_another=True,
    ),
}
TRAINING = {
    "steps": 8,
    "batch": 8,
    "log_every": 1,
    "validate_every": 4,
    "save_every": 4,
    "validation": 12,
    "keep_last": 9,
    "sample_every": 8,
}
MODEL = {"width": 16, "depth": 3, "heads": 1}


def trained(kind: Kind, folder: Path) -> Path:
    "Train a run of this kind from the command line, and return its folder."
    data = dict(kind.data)
    if kind.write:
        kind.write(folder / "data")
        data["path"] = str(folder / "data" / kind.path)
    options = [("--name", "run")]
    for name, value in data.items():
        values = value if isinstance(value, tuple) else (value,)
        options.append((f"--data.{name}", *map(str, values)))
    options += [(f"--model.{name}", str(value)) for name, value in MODEL.items()]
    options += [
        (f"--training.{name.replace('_', '-')}", str(value))
        for name, value in TRAINING.items()
    ]
    main(
        [
            "train",
            *itertools.chain(*options),
            "--folder",
            str(folder / "runs"),
            "--device",
            "cpu",
        ]
    )
    return folder / "runs/run"


def at_small_cost(patch: pytest.MonkeyPatch) -> None:
    "Use fewer samples, levels and steps where a command has no option for it."
    few = {"train": 24, "validation": 12, "test": 12}
    for split, count in few.items():
        patch.setitem(probing.COUNTS, split, count)
    all_cells = probing.probe_run

    def few_cells(run, levels=(0.0, 0.5), layers=(1, 3), **named):
        # the choice among strengths is tested in test_probing
        return all_cells(run, levels, layers, **{"strengths": (0.1,), **named})

    for module in (probing, report):
        patch.setattr(module, "probe_run", few_cells)
    patch.setattr(
        report,
        "run_metrics",
        functools.partial(report.run_metrics, count=12, steps=2, resamples=2),
    )
    write = report.write_samples

    def write_in_two_steps(run, condition, steps=2, *rest, **named):
        return write(run, condition, steps, *rest, **named)

    patch.setattr(report, "write_samples", write_in_two_steps)
    patch.setattr(representation_sections, "_FITTED", 24)
    patch.setattr(representation_sections, "_SCORED", 12)
    patch.setattr(sample_sections, "_METHOD", "PCA")

    def few_items(run, split="test", count=12, *rest):
        return features.items_of(run, split, min(count or 12, 12), *rest)

    patch.setattr(representation_sections, "items_of", few_items)


# cells: what is done with a run


def _command(*arguments) -> None:
    device = [] if arguments[0] == "runs" else ["--device", "cpu"]
    main([*map(str, arguments), *device])


def _resume(run: Path, place: Path) -> None:
    shutil.copytree(run, place / "again")
    shutil.rmtree(place / "again/checkpoints/step-00000008")
    _command("train", "--config", place / "again/config.json")
    expected, resumed = (
        Run.open(path, "cpu").log.set_index("step")["total"].tolist()
        for path in (run, place / "again")
    )
    assert resumed == pytest.approx(expected, rel=1e-5)


def _report(run: Path, place: Path) -> None:
    _command("report", run, "--full", "--output", place / "report.html")
    page = (place / "report.html").read_text()
    around = page.find("could not be made")
    assert around == -1, page[around - 200 : around + 400]
    assert "this makes them" not in page, "nothing is left to be made"


def _explorer(explorer) -> None:
    explorer.strip({}, width=400)


def _asymmetry(run: Path, place: Path) -> None:
    _explorer(explore_asymmetry(ViewedRun(Run.open(run, "cpu")), t=0.9, s=0.2))


def _attention(run: Path, place: Path) -> None:
    _explorer(explore_attention(Run.open(run, "cpu")))


def _sampling(run: Path, place: Path) -> None:
    _explorer(explore_sampling(SideBySide({"run": Run.open(run, "cpu")}), steps=2))


def _features(run: Path, place: Path) -> None:
    explorer = explore_features(
        Run.open(run, "cpu"),
        place,
        layers=(1, 2),
        levels=(0.0,),
        count=12,
        methods=("PCA",),
    )
    explorer.wait(120).seek_near(3)


def _map(run: Path, place: Path) -> None:
    opened = Run.open(run, "cpu")
    items = items_of(opened, "test", 12)
    hidden = items.features(opened.teacher, 0.5, (2,))
    previews, captions = item_previews(items)
    factors = {
        name: values.numpy()
        for name, values in items.factors.items()
        if values.ndim == 1
    }
    explore_map(project(hidden[2], "PCA", 3), previews, factors, captions=captions)


def _workbench(run: Path, place: Path) -> None:
    chosen = Chosen(run.parent, run, {"run": run})
    for tool in tools_on_page():
        if tool.title in ("Training", "Runs"):
            tool.open(chosen)


def _probe_panel(run: Path, place: Path) -> None:
    Probing.cost({"run": Run.open(run, "cpu")})


def _notebook(name: str, run: Path, path: str, **changes) -> None:
    """Execute the code of a companion notebook on a run; changes: {old: new} text."""
    cells = [
        cell.source
        for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
        if cell.cell_type == "code"
    ]
    source = "\n".join(cells)
    for old, new in {path: repr(str(run)), **changes}.items():
        assert old in source, f"{name} has no {old!r} any more"
        source = source.replace(old, new)
    exec(compile(source, f"{name}.ipynb", "exec"), {"__name__": "__main__"})


def _asymmetry_notebook(run: Path, place: Path) -> None:
    _notebook(
        "asymmetry",
        run,
        '"fashion-self-flow"',
        **{
            "from selfflow.training.models import model": (
                "from selfflow.training.run import Run\nmodel = Run.open"
            ),
            "count=8 if tiny else 96": "count=8",
        },
    )


def _probe_notebook(run: Path, place: Path) -> None:
    shutil.copytree(run, place / "other")
    _notebook(
        "probe",
        run,
        '"emblems"',
        **{
            "from selfflow.training.models import pair": (
                "from selfflow.training.run import Run\n"
                f"first = Run.open({str(place / 'other')!r})\n"
                "pair = lambda path: "
                "{'flow matching': first, 'Self-Flow': Run.open(path)}"
            ),
            'tiny = bool(os.environ.get("IN_TEST"))': "tiny = True",
            "if not tiny:\n    write_json(": "if tiny:\n    write_json(",
            '"../../data/results/probe.json"': repr(str(place / "probe.json")),
        },
    )


CELLS: dict[str, Callable[[Path, Path], None]] = {
    "resume": _resume,
    "sample": lambda run, place: _command("sample", run, "--each", 1, "--steps", 2),
    "probe": lambda run, place: _command("probe", run, "--samples", 24),
    "metrics": lambda run, place: _command(
        "metrics", run, "--count", 12, "--steps", 2, "--resamples", 2
    ),
    "report": _report,
    "runs": lambda run, place: _command(
        "runs", run.parent, "--output", place / "runs.png"
    ),
    "asymmetry": _asymmetry,
    "attention": _attention,
    "sampling": _sampling,
    "features": _features,
    "map": _map,
    "workbench": _workbench,
    "probe panel": _probe_panel,
    "asymmetry notebook": _asymmetry_notebook,
    "probe notebook": _probe_notebook,
}
COMMANDS = ("sample", "probe", "metrics", "report", "runs")


def cases(kinds: dict[str, Kind]) -> list[tuple[str, str]]:
    "Return the pairs (kind, cell) to try; commands are tried with every kind."
    chosen = []
    for name, kind in kinds.items():
        for cell in ("train", *CELLS):
            command = cell in ("train", "resume", *COMMANDS)
            if command or cell in kind.refused or not kind.as_another:
                chosen.append((name, cell))
    return chosen


def contents(run: Path) -> dict[str, float]:
    "Return all files of a run and the times when they were written."
    return {
        str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()
    }


def check(kind: Kind, cell: str, run: Path, place: Path, capsys) -> None:
    """Assert that a cell works, or is refused in one line before any work.

    Before any work: no model is called and no file is written.
    """
    reason = kind.refused.get(cell)
    if reason is None:
        CELLS[cell](run, place)
        out = capsys.readouterr().out
        if cell == "probe" and kind.write:
            assert "24 of 36, balanced" in out
            assert "test 18" not in out, out
        return
    before = contents(run)
    with pytest.MonkeyPatch.context() as patch:

        def forward(*rest, **named):
            raise AssertionError("the model was called before the refusal")

        patch.setattr(Transformer, "forward", forward)
        if cell in COMMANDS:
            with pytest.raises(SystemExit) as raised:
                CELLS[cell](run, place)
            assert raised.value.code == 2
            message = capsys.readouterr().err.strip().splitlines()
            message = [line for line in message if line.startswith("selfflow: ")]
        else:
            with pytest.raises(ValueError) as raised:
                CELLS[cell](run, place)
            message = str(raised.value).splitlines()
    assert len(message) == 1
    assert reason in message[0], message
    assert contents(run) == before


def check_choice(kind: Kind, run: Path) -> None:
    """Assert that samples chosen from stored data are balanced by class.

    In the validation, the items and the explorers.
    """
    opened = Run.open(run, "cpu")
    assert opened.state()["step"] == 8
    assert len(opened.log) == 8
    if not kind.write:
        return
    validation = Validation.of(opened.config)
    assert validation.chosen[opened.config.data.name].startswith("12 of 18")
    labels = items_of(opened, "test", 9).examples(torch.arange(9)).labels
    one_class = len(opened.sources.data[opened.config.data.name].names) < 2
    assert one_class or labels.bincount().tolist() == [3, 3, 3]
    conditions = validation.data[opened.config.data.name][0].condition.values
    if opened.config.data.condition == "class" and not one_class:
        assert conditions.bincount().tolist() == [4, 4, 4]
        viewed = ViewedRun(opened, count=6).condition.values
        assert viewed.bincount().tolist() == [2, 2, 2]
