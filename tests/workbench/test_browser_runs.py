"""The run browser works on a real page.

Runs are chosen by keys and pointer; another process trains one; an explorer opens.
"""

import shutil
import signal
import time

import programs
import pytest
from browser import (
    record_latency,
    run_all,
    set_theme,
    shoot,
    source,
    until_shown,
    until_within,
    write_notebook,
)

from selfflow.training.run import Run
from selfflow.training.watching import Listing, open_runs
from selfflow.workbench import asymmetry
from selfflow.workbench.controls import DARK, LIGHT
from selfflow.workbench.run_views import SHOWN, compute, draw
from selfflow.workbench.viewed_run import ViewedRun

TRAIN = """
from dataclasses import replace
from selfflow.training.config import Config, ModelConfig, ObjectiveConfig, TrainConfig
from selfflow.training.loop import train
training = TrainConfig(steps={steps}, batch=8, shards=1, log_every=1,
                       validate_every={every}, validation=8, save_every={every},
                       sample_every=0)
model = ModelConfig(width=16, depth=4, heads=2)
config = Config(name="{name}", model=model, training=training)
"""
CELLS = (
    TRAIN.format(steps=6, every=2, name="self_flow")
    + """
plain = replace(config, name="plain", objective=ObjectiveConfig("flow_matching"))
for each in (config, plain):
    train(each, "browsed", bar=False, device="cpu")
from selfflow.workbench import panel
from selfflow.workbench import run_browser
panel.SHARE = run_browser.SHARE = 0.5  # pictures more often than one would want
run_browser.browse("browsed", device="cpu", refresh=0.3)
""",
    "run_browser.browse('nothing/<i>here</i>', refresh=0.5)",
)
EVIL = "<img src=x onerror=alert(1)>"
FIRST = ".selfflow-browser >> nth=0 >> "
PICTURE = FIRST + "img.selfflow-picture-picture-1"


class Browsed:
    "The page with the browser, and the values that its controls should have."

    def __init__(self, lab, page):
        self.page = page
        self.theme = LIGHT
        self.listing = Listing(lab[2] / "browsed")
        self.values = {
            "runs": ["plain", "self_flow"],
            "view": "curves",
            "measure": "flow_loss",
            "against": "steps",
        }

    def inner(self, selector, **options):
        return self.page.locator(".selfflow-browser").first.locator(selector, **options)

    def box(self, name):
        return self.page.locator(".selfflow-browser").first.get_by_label(
            f"choose {name}", exact=True
        )

    def shows(self, **changes):
        "Wait until all pictures are those that the pure function draws of the values."
        self.values |= changes
        self.listing.look()
        pictures = draw(compute(self.listing, self.values), self.theme)
        for name, picture in pictures.items():
            if name != "table":
                until_shown(self.page, f"{FIRST}img.selfflow-picture-{name}", picture)
        assert self.inner("[role=alert]:visible").count() == 0
        return pictures

    def view(self, name):
        self.page.locator(".selfflow-browser").first.get_by_role(
            "button", name=name, exact=True
        ).click()
        return self.shows(view=name)


@pytest.fixture
def browsed(lab, page):
    page.set_viewport_size({"width": 1280, "height": 1250})
    write_notebook(lab, "browsed", *CELLS)
    run_all(page, lab, "browsed")
    page.locator(".selfflow-browser").nth(1).wait_for(timeout=180_000)
    return Browsed(lab, page)


@pytest.fixture
def elsewhere(lab):
    "A run that another process trains, until the test ends."
    code = (
        TRAIN.format(steps=50_000, every=40, name="elsewhere")
        + "train(config, 'browsed', bar=False, device='cpu')"
    )
    program = programs.Program("-c", code, cwd=lab[2])
    yield program
    program.send_signal(signal.SIGTERM)
    program.wait(60)


def test_runs_are_listed_chosen_compared_and_opened_at_a_checkpoint(browsed, lab):
    page = browsed.page
    inner = browsed.inner
    browsed.box("self_flow").wait_for()
    assert inner(".selfflow-runs tbody tr").count() == 2
    assert "6 of 6" in inner(".selfflow-runs tbody").inner_text()
    assert browsed.box("plain").is_checked()
    assert browsed.box("self_flow").is_checked()
    browsed.shows()
    shoot(page, "runs")

    # by pointer, anywhere on the row
    inner(".selfflow-runs td", has_text="flow_matching").click()
    browsed.shows(runs=["self_flow"])
    browsed.box("plain").focus()  # by keys
    page.keyboard.press("Space")
    browsed.shows(runs=["plain", "self_flow"])
    milliseconds = []
    for wanted in (["plain"], ["plain", "self_flow"]) * 3:
        before = source(page, "picture-picture-1")
        started = time.monotonic()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        while source(page, "picture-picture-1") == before:
            page.wait_for_timeout(5)
        milliseconds.append(1000 * (time.monotonic() - started))
        browsed.shows(runs=wanted)
    record_latency("run browser, a run chosen", milliseconds, runs=2)

    for name, label, value in (
        ("measure", "validation_flow_loss", "validation_flow_loss"),
        ("against", "flops", "flops"),
    ):
        inner(f".selfflow-control-{name} select").select_option(label=label)
        browsed.shows(**{name: value})
    select = inner(".selfflow-control-against select")
    select.focus()
    page.keyboard.press("ArrowUp")
    browsed.shows(against="steps")

    browsed.view("settings")
    table = inner(".selfflow-table")
    table.get_by_text("objective.name").wait_for()
    assert inner("img.selfflow-picture-picture-1").is_hidden()
    assert "flow_matching" in table.inner_text()
    shoot(page, "runs-settings")
    browsed.view("levels")
    assert table.is_hidden()
    assert inner("img.selfflow-picture-picture-2").is_visible()
    for _ in range(4):  # rapid, the last one counts
        for name in SHOWN[:3]:
            page.locator(".selfflow-browser").first.get_by_role(
                "button", name=name, exact=True
            ).click()
    browsed.shows(view="levels")
    browsed.view("samples")
    inner(".selfflow-message", has_text="has no samples yet").wait_for()
    browsed.view("probes")
    inner(
        ".selfflow-probe-status", has_text="no probes yet of plain, self_flow"
    ).wait_for()
    inner("button.selfflow-probe").click()
    inner(".selfflow-probe-status", has_text="plain: 20 cells").wait_for()
    assert not (lab[2] / "browsed/plain/probes.json").exists(), (
        "the cost is shown first"
    )
    inner("button.selfflow-probe", has_text="Start").click()
    inner(".selfflow-probe-status", has_text="probing plain").wait_for()
    inner("button.selfflow-halt").click()
    inner(".selfflow-probe-status", has_text="stopped").wait_for()
    browsed.view("levels")

    for name, label in (
        ("which", "self_flow"),
        ("step", "step 4"),
        ("opener", "Noise asymmetry"),
    ):
        inner(f".selfflow-open-{name} select").select_option(label=label)
        page.wait_for_timeout(300)
    inner("button.selfflow-open").click()
    inner(
        ".selfflow-opened", has_text="Noise asymmetry: self_flow at step 4"
    ).wait_for()
    viewed = ViewedRun(open_runs(browsed.listing, ["self_flow"], 4, "cpu")["self_flow"])
    values = asymmetry.explore(viewed).values()
    until_shown(
        page,
        FIRST + "img.selfflow-picture-views",
        asymmetry.draw(asymmetry.compute(viewed, values))["views"],
    )
    shoot(page, "runs-opened")
    inner(".selfflow-open-which select").select_option(label="all 2 chosen")
    page.wait_for_timeout(300)
    inner("button.selfflow-open").click()
    inner(".selfflow-open-status [role=alert]", has_text="shows one run").wait_for()
    inner(".selfflow-open-opener select").select_option(label="Sampling")
    page.wait_for_timeout(300)
    inner("button.selfflow-open").click()
    inner(
        ".selfflow-opened", has_text="Sampling: plain at step 4, self_flow at step 4"
    ).wait_for()
    inner("img.selfflow-picture-history").wait_for()

    set_theme(page, "Dark")
    browsed.theme = DARK
    browsed.shows()
    inner(".selfflow-runs").scroll_into_view_if_needed()
    page.set_viewport_size({"width": 800, "height": 1250})
    until_within(
        page, page.locator(".selfflow-browser").first, inner("img, button, select")
    )
    shoot(page, "runs-dark-narrow")
    set_theme(page, "Light")


def test_an_empty_folder_shows_a_hint_and_a_run_elsewhere_is_followed(
    browsed, lab, elsewhere
):
    page = browsed.page
    inner = browsed.inner
    empty = page.locator(".selfflow-browser").nth(1)
    empty.locator(".selfflow-folder [role=alert]", has_text="selfflow train").wait_for()
    message = empty.locator(".selfflow-folder").inner_text()
    assert "make demo" in message
    assert "<i>here</i>" in message
    assert empty.locator(".selfflow-runs").is_hidden()

    row = inner(".selfflow-runs tbody tr", has_text="elsewhere")
    row.wait_for()  # though nobody told the kernel
    inner(".selfflow-runs tbody tr", has_text="training: process").wait_for()
    assert f"process {elsewhere.pid} on" in row.inner_text()
    steps = row.locator("td").nth(4).inner_text()
    while row.locator("td").nth(4).inner_text() == steps:
        page.wait_for_timeout(100)
    browsed.box("elsewhere").check()
    panel = inner(".selfflow-panel")
    panel.locator(
        ".selfflow-header", has_text=f"training: process {elsewhere.pid}"
    ).wait_for()
    panel.locator("img.selfflow-dashboard").wait_for()
    seen = {panel.locator("img.selfflow-dashboard").get_attribute("src")}
    curves = {source(page, "picture-picture-1")}
    while len(seen) < 3 or len(curves) < 3:  # panel and curves move
        page.wait_for_timeout(100)
        seen.add(panel.locator("img.selfflow-dashboard").get_attribute("src"))
        curves.add(source(page, "picture-picture-1"))
    shoot(page, "runs-training")
    panel.get_by_role("button", name="Stop").click()
    elsewhere.wait(60)
    step = Run.open(lab[2] / "browsed/elsewhere", "cpu").state()["step"]
    inner(".selfflow-runs tbody tr", has_text=f"stopped at step {step:,}").wait_for()
    browsed.shows(runs=["elsewhere", "plain", "self_flow"])
    assert panel.is_visible(), "what was followed stays until it is no longer chosen"
    browsed.box("elsewhere").uncheck()
    panel.wait_for(state="detached")

    # a name that wants to be HTML
    shutil.copytree(lab[2] / "browsed/plain", lab[2] / "browsed" / EVIL)
    (lab[2] / "browsed" / EVIL / "checkpoints/step-00000006/model.safetensors").unlink()
    browsed.box(EVIL).check()
    browsed.shows(runs=[EVIL, "plain", "self_flow"])
    damaged = inner(".selfflow-runs tbody tr", has_text="1 of 3 checkpoints damaged")
    assert EVIL in damaged.inner_text()
    assert "model.safetensors is missing" in damaged.inner_text()
    browsed.view("settings")
    inner(".selfflow-table", has_text=EVIL).wait_for()
    inner(".selfflow-open-which select").select_option(label=EVIL)
    page.wait_for_timeout(300)
    inner(".selfflow-open-step select").select_option(label="step 6: damaged")
    page.wait_for_timeout(300)
    inner("button.selfflow-open").click()
    inner(
        ".selfflow-open-status [role=alert]", has_text="choose another one"
    ).wait_for()
    assert page.locator("img[src='x']").count() == 0, "a name stays text"
    shoot(page, "runs-damaged")
    shutil.rmtree(lab[2] / "browsed" / EVIL)
    damaged.wait_for(state="detached")
    inner("[role=status]", has_text="3 runs in browsed").wait_for()
