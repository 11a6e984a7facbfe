"""The explorer of noise asymmetry works in a real browser.

Every control by keys and pointer, painted masks, rapid drags, a restart.
"""

import pytest
from browser import (
    record_latency,
    run_all,
    set_theme,
    shoot,
    step_times,
    until_shown,
    until_within,
    write_notebook,
)

from selfflow.training.config import PRESETS
from selfflow.training.run import Run
from selfflow.workbench.asymmetry import compute, draw
from selfflow.workbench.controls import DARK, LIGHT
from selfflow.workbench.viewed_run import ViewedRun

CELL = """
from dataclasses import replace
from selfflow.workbench.asymmetry import explore
from selfflow.training.config import PRESETS
from selfflow.training.loop import train
config = PRESETS["digits"]  # the model of the quickstart
training = replace(config.training, steps=2, batch=8, shards=1, validate_every=2,
                   validation=8, save_every=2, sample_every=0)
config = replace(config, name="seen", training=training)
explorer = explore(train(config, "runs", bar=False, device="cpu"))
explorer
"""
START = {
    "t": 0.8,
    "s": 0.2,
    "mask_ratio": 0.25,
    "seed": 0,
    "sample": 0,
    "schedule": "dual",
    "density": "uniform",
    "shift": 1.0,
    "drawn": False,
    "hand": False,
    "tokens": [],
}
IMAGES = {
    "tokens": ".selfflow-tokens img",
    "levels": "img.selfflow-picture-levels",
    "views": "img.selfflow-picture-views",
    "curve": "img.selfflow-picture-curve",
}


class Explored:
    "The page with the explorer, and the values that its controls should have."

    def __init__(self, lab, page):
        self.page = page
        self.values = dict(START)
        self.theme = LIGHT
        self.viewed = ViewedRun(Run.open(lab[2] / "runs/seen", "cpu"))

    def control(self, name, inner=""):
        return self.page.locator(f".selfflow-control-{name} {inner}".strip())

    def handle(self, name):
        return self.control(name, ".noUi-handle")

    def readout(self, name):
        return float(self.control(name, ".widget-readout").inner_text())

    def shows(self, **changes):
        "Wait until all pictures are those that the pure function draws of the values."
        self.values |= changes
        for name, png in draw(compute(self.viewed, self.values), self.theme).items():
            until_shown(self.page, IMAGES[name], png)


@pytest.fixture
def explored(lab, page):
    page.set_viewport_size({"width": 1280, "height": 1000})
    write_notebook(lab, "asymmetry", CELL)
    run_all(page, lab, "asymmetry")
    page.locator(IMAGES["views"]).wait_for(timeout=180_000)
    return Explored(lab, page)


def test_every_control_is_followed(explored):
    page = explored.page
    values = explored.values
    explored.shows()
    shoot(page, "asymmetry")
    for name, key, step in (
        ("t", "ArrowRight", 0.01),
        ("s", "ArrowLeft", -0.01),
        ("mask_ratio", "ArrowRight", 0.01),
        ("sample", "ArrowRight", 1),
        ("shift", "ArrowRight", 0.1),
    ):
        assert explored.handle(name).get_attribute("aria-label")
        explored.handle(name).focus()
        page.keyboard.press(key)
        explored.shows(**{name: type(values[name])(round(values[name] + step, 2))})
        assert explored.readout(name) == pytest.approx(values[name])
    for name in ("t", "s"):  # by pointer
        track = explored.control(name, ".noUi-base").bounding_box()
        page.mouse.click(
            track["x"] + 0.55 * track["width"], track["y"] + track["height"] / 2
        )
        readout = f"document.querySelector('.selfflow-control-{name} .widget-readout')"
        page.wait_for_function(f"{readout}.innerText != '{values[name]:.2f}'")
        explored.shows(**{name: explored.readout(name)})
    seed = explored.control("seed", "input")
    for typed, limit in (("7", 7), ("1000000000", 9999), ("-5", 0)):
        seed.fill(typed)
        seed.press("Enter")
        explored.shows(seed=limit)
    for kind in (
        "single",
        "sorted",
        "diffusion forcing",
        "full masking",
        "block masks",
        "dual",
    ):
        explored.control("schedule", "select").select_option(kind)
        explored.shows(schedule=kind)
    explored.control("density", "select").select_option("logit_normal")
    explored.shows(density="logit_normal")
    explored.control("drawn", "input").check()
    explored.shows(drawn=True)
    explored.control("drawn", "input").uncheck()
    explored.shows(drawn=False)
    measure(explored)
    drag(explored)


def drag(explored):
    "The handle moved to and fro, faster than pictures are drawn."
    page = explored.page
    box = explored.handle("t").bounding_box()
    track = explored.control("t", ".noUi-base").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    for turn in range(60):
        page.mouse.move(
            track["x"] + track["width"] * (0.1 + 0.8 * (turn % 7) / 6), box["y"] + 5
        )
    page.mouse.up()
    page.wait_for_timeout(100)
    explored.shows(t=explored.readout("t"))


def measure(explored):
    times = step_times(explored.page, "views", "t")
    shape = explored.viewed.teacher.config
    median = record_latency(
        "asymmetry",
        times,
        model=f"width {shape.width}, depth {shape.depth}, {shape.tokens} tokens",
    )
    # on a machine that does other things too; see data/results/latency.json
    assert median < 1000
    explored.shows()


def test_masks_are_painted_by_hand_and_a_restart_changes_nothing(explored):
    page = explored.page
    tokens = explored.control("tokens", "button")
    assert tokens.count() == explored.viewed.tokens
    tokens.nth(5).click()  # switches the hand on
    explored.shows(hand=True, tokens=[5])
    assert explored.control("hand", "input").is_checked()
    assert tokens.nth(5).get_attribute("aria-pressed") == "true"
    # token 5 is in row 1, column 1 of 4 x 4
    for key in ("ArrowRight", "Space", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    explored.shows(tokens=[5, 6, 10])
    start = tokens.nth(12).bounding_box()
    end = tokens.nth(15).bounding_box()
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=20)
    page.mouse.up()
    explored.shows(tokens=[5, 6, 10, 12, 13, 14, 15])
    shoot(page, "asymmetry-painted")
    for token in [*range(5), 7, 8, 9, 11]:  # all of them
        tokens.nth(token).click()
    explored.shows(tokens=list(range(16)))
    assert "all tokens are painted" in page.locator(".selfflow-message").inner_text()
    explored.control("hand", "input").uncheck()
    explored.shows(hand=False)
    assert not page.locator(IMAGES["curve"]).is_visible()

    set_theme(page, "Dark")
    explored.theme = DARK
    explored.shows()
    shoot(page, "asymmetry-dark")
    page.set_viewport_size({"width": 800, "height": 1000})
    until_within(
        page,
        page.locator(".selfflow-explorer"),
        *(page.locator(IMAGES[name]) for name in ("tokens", "levels", "views")),
    )
    shoot(page, "asymmetry-narrow")

    set_theme(page, "Light")
    page.evaluate("""async () => {
        const session = window.jupyterapp.shell.currentWidget.sessionContext;
        await session.restartKernel(); await session.ready;
        window.jupyterapp.commands.execute('notebook:run-all-cells') }""")
    explored.values = dict(START)
    explored.theme = LIGHT
    page.locator(".jp-CodeCell .jp-InputPrompt", has_text="[1]").wait_for(
        timeout=180_000
    )
    explored.shows()
    explored.handle("s").focus()
    page.keyboard.press("ArrowRight")
    explored.shows(s=0.21)


def test_the_model_is_that_of_the_quickstart():
    assert (PRESETS["digits"].model.width, PRESETS["digits"].model.depth) == (96, 6)
