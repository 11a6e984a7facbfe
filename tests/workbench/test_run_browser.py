"""The run browser lists, compares and opens runs without a page; errors are shown."""

import io
import json
import shutil
import stat
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from simulated import SimulatedTrainer

from selfflow.analysis.comparison import run_curves
from selfflow.analysis.probe_records import write_probes
from selfflow.analysis.probes import scored
from selfflow.analysis.probing import ProbeRow, Probes
from selfflow.figures.layers import draw_score_maps
from selfflow.figures.plots import draw_runs
from selfflow.registries import explorers, trial
from selfflow.training.run import Run
from selfflow.training.watching import Listing, open_runs, steps_of
from selfflow.workbench import probe_process
from selfflow.workbench.boards import figure_png
from selfflow.workbench.controls import DARK, LIGHT, RunList
from selfflow.workbench.probe_process import Probing
from selfflow.workbench.run_browser import browse
from selfflow.workbench.run_views import (
    compute,
    describe,
    draw,
    groups_of,
    probes_of,
    settings_of,
    short_name,
)
from selfflow.workbench.tools import Chosen

VALUES = {
    "runs": ["tiny", "vanilla"],
    "view": "curves",
    "measure": "flow_loss",
    "against": "steps",
}


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.01)


@pytest.fixture
def folder(runs, tmp_path):
    "Copies of two runs, which a test may change."
    for name, run in runs.items():
        shutil.copytree(run.path, tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.fixture
def listing(folder):
    listing = Listing(folder)
    listing.look()
    return listing


def other_data(folder, name):
    "A copy of a run whose config names another data set."
    shutil.copytree(folder / "tiny", folder / name)
    stored = json.loads((folder / name / "config.json").read_text())
    stored["config"]["data"] |= {"name": "shapes"}
    (folder / name / "config.json").write_text(json.dumps(stored))


def test_every_run_of_a_folder_is_listed_with_its_state(listing, folder):
    assert [listing.runs[name].cells for name in ("tiny", "vanilla")] == [
        [name, "digits, classes", "12 of 12", "finished"]
        for name in ("self_flow", "flow_matching")
    ]
    (folder / "begun").mkdir()
    (folder / "begun/config.json").write_text('{"format": <b>')
    (folder / "bare/checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "tiny", folder / "deep/hurt")
    for checkpoint in (folder / "deep/hurt/checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with (folder / "vanilla/checkpoints/step-00000012/model.safetensors").open(
        "r+b"
    ) as file:
        file.truncate(10)  # half a file
    with (folder / "tiny/log.jsonl").open("a") as log:
        log.write('no JSON\n{"step": 13, "flow')  # a line being written is no damage
    listing.look(anew=True)
    states = {name: run.state for name, run in listing.runs.items()}
    assert states["begun"].startswith("damaged: ")
    assert "config.json cannot be used" in states["begun"]
    assert "no config.json" in states["bare"]
    assert states["deep/hurt"].startswith("damaged: no intact checkpoint (step 12: ")
    assert states["vanilla"].startswith(
        "stopped at step 8; 1 of 3 checkpoints damaged "
        "(step 12: model.safetensors has 10 bytes"
    )
    assert states["tiny"] == "finished; 1 damaged line of its log skipped"


def test_the_listing_changes_only_when_a_run_does(folder, listing):
    assert not listing.look()
    run = Run.open(folder / "tiny", "cpu")
    with run.locked():
        assert listing.look()
        assert listing.runs["tiny"].training
        assert "training: process" in listing.runs["tiny"].state
        before = listing.runs["tiny"].stamp
        with run.log_path.open("a") as log:
            log.write('{"step": 14, "flow_loss": 1.0}\n')
        assert listing.look()
        assert listing.runs["tiny"].step == 14
        assert listing.runs["tiny"].stamp != before
        # though the last line has none
        assert "validation_flow_loss" in listing.measures
        assert "cosine" in listing.measures
    assert listing.look()
    assert listing.runs["tiny"].state == "finished"
    assert listing.runs["tiny"].step == 12
    shutil.rmtree(folder / "tiny")
    assert listing.look()
    assert "tiny" not in listing.runs


def test_folders_without_runs_show_what_to_do(tmp_path):
    for place, words in (
        (tmp_path, "holds no run yet"),
        (tmp_path / "gone", "there is no folder"),
    ):
        listing = Listing(place)
        listing.look()
        assert words in listing.problem
        assert "selfflow train" in listing.problem
        assert "make demo" in listing.problem
        assert not listing.runs
    (tmp_path / "file").write_text("")
    listing = Listing(tmp_path / "file")
    listing.look()
    assert "is a file" in listing.problem


def test_checkpoints_are_read_through_before_they_are_opened(listing, folder):
    assert steps_of(listing, ["tiny", "vanilla"]) == [
        ("the newest", 0),
        ("step 12", 12),
        ("step 8", 8),
        ("step 4", 4),
    ]
    assert steps_of(listing, []) == [("the newest", 0)]
    assert [
        run.state()["step"]
        for run in open_runs(listing, ["tiny", "vanilla"], 4, "cpu").values()
    ] == [4, 4]
    file = folder / "tiny/checkpoints/step-00000008/teacher.safetensors"
    values = bytearray(file.read_bytes())
    values[-1] ^= 1  # the size is as it was
    file.write_bytes(values)
    with pytest.raises(
        ValueError,
        match="tiny cannot be opened: its checkpoint of step 8 is damaged: "
        "teacher.safetensors has",
    ):
        open_runs(listing, ["tiny"], 8, "cpu")
    with pytest.raises(ValueError, match="has no checkpoint of step 5"):
        open_runs(listing, ["tiny"], 5, "cpu")
    with pytest.raises(ValueError, match="it is no longer in"):
        open_runs(listing, ["gone"], 0, "cpu")
    with pytest.raises(ValueError, match="no run is chosen"):
        open_runs(listing, [])


def test_the_browser_shows_what_the_pure_functions_draw(listing, folder):
    for measure in ("flow_loss", "validation_flow_loss"):
        for against, label in (("steps", "step"), ("seconds", "time of training")):
            view = compute(listing, {**VALUES, "measure": measure, "against": against})
            curves = run_curves(
                {name: folder / name for name in VALUES["runs"]}, measure, against
            )
            if against == "steps":
                wanted = figure_png(draw_runs(curves, label, measure.replace("_", " ")))
                assert draw(view) == {"picture-1": wanted}
            assert len(view.pictures) == 1
    assert "different noise levels" in describe(compute(listing, VALUES))
    assert not describe(compute(listing, {**VALUES, "measure": "validation_flow_loss"}))
    view = compute(listing, {**VALUES, "measure": "cosine"})
    assert "cosine was not logged by vanilla" in view.notes[0].lower()
    assert len(view.pictures) == 1


def test_runs_on_other_data_have_separate_images(listing, folder):
    other_data(folder, "other")
    listing.look()
    values = {**VALUES, "runs": ["tiny", "vanilla", "other"]}
    for kind, count in (("curves", 2), ("levels", 3)):
        view = compute(listing, {**values, "view": kind})
        assert len(view.pictures) == count
        assert "on 2 kinds of data (tiny, vanilla; other)" in view.notes[0]
    runs = {name: Run.open(folder / name, "cpu") for name in values["runs"]}
    assert [list(group) for group in groups_of(runs)] == [
        ["tiny", "vanilla"],
        ["other"],
    ]
    table = settings_of(runs).table.set_index("setting")
    assert list(table.loc["data.name"]) == ["digits", "digits", "shapes"]


def test_bad_choices_are_reported_and_the_rest_is_shown(listing):
    view = compute(listing, {**VALUES, "runs": ["tiny", "gone"]})
    assert len(view.pictures) == 1
    assert "gone cannot be opened" in view.notes[0]
    assert compute(listing, {**VALUES, "runs": []}).notes == [
        "choose one or more runs in the list"
    ]
    assert "nothing" in compute(listing, {**VALUES, "measure": "nothing"}).notes[0]
    for change, words in (({"view": "curve"}, "view"), ({"against": "money"}, "cost")):
        with pytest.raises(ValueError, match=words):
            compute(listing, {**VALUES, **change})


def grid(seed, levels=(0.0, 0.5), items=40, step=12):
    random = np.random.default_rng(seed)
    rows = []
    for place, (layer, level) in enumerate(
        (layer, level) for layer in (1, 2) for level in levels
    ):
        wrong = random.random(items) > 0.3 + 0.1 * place
        probe = scored(
            "made up", "accuracy", wrong, np.ones(items), 0.5, "C = 1", {"test": items}
        )
        rows.append(ProbeRow("class", "model", "regression", layer, level, probe))
    about = {
        "run": "made up",
        "step": step,
        "layers": [1, 2],
        "levels": list(levels),
        "items": "some",
        "data": "digits",
    }
    return Probes(about, tuple(rows))


def test_probe_maps_have_their_difference_with_paired_intervals(listing, folder):
    runs = {name: Run.open(folder / name, "cpu") for name in ("tiny", "vanilla")}
    assert "no probes yet of tiny, vanilla" in probes_of(runs).notes
    write_probes(runs["tiny"], grid(0))
    write_probes(runs["vanilla"], grid(1))
    view = probes_of(runs)
    maps = {
        "class": {
            name: grid(seed).grid("class")
            for name, seed in (("tiny", 0), ("vanilla", 1))
        }
    }
    expected = draw_score_maps(
        maps, (1, 2), (0.0, 0.5), {"class": grid(0).difference(grid(1), "class")}
    )
    assert figure_png(view.pictures[0]()) == figure_png(expected)
    assert "vanilla minus tiny: of 4 cells" in view.notes[0]
    write_probes(runs["vanilla"], grid(1, levels=(0.1, 0.9), step=8))
    view = probes_of(runs)
    assert len(view.pictures) == 2
    assert "vanilla was probed at other layers, levels or items" in view.notes[0]
    assert (
        "probes of vanilla are of step 8, its newest checkpoint of 12" in view.notes[1]
    )
    (folder / "tiny/probes.json").write_text("{half")
    assert any("cannot be shown" in note for note in probes_of(runs).notes)


def test_names_stay_text_and_long_ones_are_cut(listing, folder):
    evil = "<img src=x onerror=alert(1)>"
    shutil.copytree(folder / "vanilla", folder / evil)
    listing.look()
    table = draw(
        compute(listing, {**VALUES, "runs": ["tiny", evil], "view": "settings"})
    )["table"].decode()
    assert "&lt;img" in table
    assert "<img" not in table
    browser = browse(folder, device="cpu", runs=["tiny", evil])
    browser.which.value = (evil,)
    with trial():
        explorers.register("Broken", fails)
        browser.opener.options = [*browser.opener.options, "Broken"]
        browser.opener.value = "Broken"
        browser.open()
    for text in (browser.head, browser.open_status, browser.view.message):
        assert "<img" not in text.value
        assert "<i>" not in text.value
    assert "&lt;i&gt;not today" in browser.open_status.value
    assert 'role="alert"' in browser.open_status.value
    assert len(short_name("long" * 2500)) == 26
    assert short_name("short") == "short"


def fails(chosen):
    raise RuntimeError("<i>not today</i>")


def test_a_dark_page_inverts_everything_but_maps(listing):
    figure = draw_score_maps(
        {"class": {"a": grid(0).grid("class")}}, (1, 2), (0.0, 0.5)
    )
    light, dark = (
        np.asarray(Image.open(io.BytesIO(figure_png(figure, theme)))).astype(int)
        for theme in (LIGHT, DARK)
    )
    box = figure.axes[0].get_position()
    high, wide = light.shape[:2]
    inside = (
        slice(round((1 - box.y1) * high) + 2, round((1 - box.y0) * high) - 2),
        slice(round(box.x0 * wide) + 2, round(box.x1 * wide) - 2),
    )
    assert (light[inside] == dark[inside]).all()
    assert light[0, 0].tolist() == [255] * 3
    assert dark[0, 0].tolist() == [17] * 3
    orange = draw_runs({"a": (np.arange(3), np.arange(3.0))}, "step", "loss")
    # text and lines are light there
    assert np.asarray(Image.open(io.BytesIO(figure_png(orange, DARK)))).max() > 200


def test_the_list_keeps_runs_that_still_exist():
    run_list = RunList(rows=[["a", "", "", "", ""], ["b", "", "", "", ""]], value=[])
    run_list.value = ["b", "gone", "a"]
    assert run_list.value == ["a", "b"]


def following():
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith(("browser of", "panel of"))
    ]


def test_a_browser_follows_its_folder_while_it_is_shown(folder):
    trainer = SimulatedTrainer(folder / "mine", steps=100_000)
    browser = browse(folder, device="cpu", refresh=0.02, runs=["mine", "tiny"])
    assert browser.list.value == ["mine", "tiny"]
    assert not browser.panels
    assert not following()
    thread = trainer.in_thread()
    try:
        browser.list.shown = True  # as a page says
        until(lambda: "mine" in browser.panels and browser.live.children)
        assert "training: process" in browser.panels["mine"].header.value
        before = browser.list.rows
        until(lambda: browser.list.rows != before)
        drawn = browser.view.drawn
        until(lambda: browser.view.drawn > drawn)
        panel = browser.panels["mine"]
        browser.list.value = ["tiny"]
        until(lambda: not browser.panels and not browser.live.children)
        until(lambda: not panel.thread.is_alive())
        # also for a run that is not training
        browser.view.controls["view"].value = "training"
        until(
            lambda: (
                "tiny" in browser.panels
                and "finished" in browser.panels["tiny"].header.value
            )
        )
    finally:
        browser.list.shown = False
        trainer.run.request("stop")
        thread.join(10)
    until(lambda: not following())
    browser.view.settle()


def test_a_browser_begins_empty_and_recovers_from_errors(folder, tmp_path, monkeypatch):
    browser = browse(tmp_path / "later", device="cpu")
    assert 'role="alert"' in browser.head.value
    assert "make demo" in browser.head.value
    assert browser.below.layout.display == "none"
    assert browser.button.disabled
    assert not browser.list.rows
    browser.open()
    assert "no run is chosen" in browser.open_status.value
    shutil.copytree(folder, tmp_path / "later")
    browser.look()
    assert browser.list.value == ["tiny", "vanilla"]
    assert browser.below.layout.display == ""
    assert not browser.button.disabled
    browser.view.settle()
    assert "Cannot be shown" not in browser.view.message.value
    assert "picture-1" in browser.view.pictures

    def refuse(*_):
        raise PermissionError(13, "Permission <denied>")

    with monkeypatch.context() as patched:
        patched.setattr(browser.listing, "look", refuse)
        browser.look()
    assert "Permission &lt;denied&gt;" in browser.trouble.value
    browser.look()
    assert "denied" not in browser.trouble.value


def test_bad_options_are_refused(folder):
    for options, words in (
        ({"refresh": 0}, "refresh is 0"),
        ({"runs": ["tin"]}, "tin"),
        ({"vew": "curves"}, "vew"),
    ):
        with pytest.raises(ValueError, match=words):
            browse(folder, device="cpu", **options)
    with pytest.raises(ValueError, match="shows one run, but 2 are chosen"):
        explorers["Noise asymmetry"].load()(
            Chosen(folder, folder, opened={"a": None, "b": None})
        )


@pytest.fixture
def command(tmp_path, monkeypatch):
    "Write a script that runs in place of `selfflow probe`."

    def write(script):
        file = tmp_path / "command"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(probe_process.sys, "executable", str(file))

    yield write
    monkeypatch.setattr(probe_process.sys, "executable", sys.executable)


def test_probing_reports_progress_and_errors(folder, command):
    messages = []

    def probed(script):
        command(script)
        probing = Probing(
            {"tiny": Path(folder / "tiny")}, lambda: messages.append(probing.progress)
        )
        probing.thread.start()
        probing.thread.join(20)
        assert probing.done
        return probing

    probing = probed('printf "tiny:  40%%|####    | 8/20 [00:02<00:03]\\r" >&2')
    assert "probing tiny: tiny:  40%  8/20 [00:02<00:03]" in messages
    assert probing.progress == "probed tiny"
    assert not probing.failed
    probing = probed('echo "selfflow: the disk is full" >&2; exit 2')
    assert probing.failed == "tiny: selfflow: the disk is full"
    assert not probing.progress
    command("exec sleep 60")
    probing = Probing(
        {"tiny": folder / "tiny", "vanilla": folder / "vanilla"}, lambda: None
    )
    probing.thread.start()
    until(lambda: probing._process is not None)
    probing.stop()
    probing.thread.join(10)
    assert probing.done
    assert probing.progress == "stopped"


def test_the_button_shows_the_cost_first_and_then_begins(folder, command):
    command("exit 0")
    browser = browse(folder, device="cpu", view="probes")
    assert browser.probes.layout.display == ""
    assert "no probes yet of tiny, vanilla" in browser.probe_status.value
    browser._probe()
    assert "20 cells" in browser.probe_status.value
    assert browser.probe.description == "Start"
    assert browser.probing is None
    browser.list.value = ["vanilla"]  # another choice leaves it
    assert browser.probe.description == "Probe them"
    browser._probe()
    browser._probe()
    browser.probing.thread.join(20)
    assert browser.probing.runs.keys() == {"vanilla"}
    assert browser.probing.done
    browser.view.settle()
