"""The playground works in a real browser.

Every control by keys or pointer, painted tokens, playing the progress, a long caption.
"""

import pytest
from browser import run_all, set_theme, shoot, until_shown, until_within, write_notebook

from selfflow.workbench.controls import DARK, LIGHT
from selfflow.workbench.paths import SideBySide
from selfflow.workbench.playground import compute, draw

CELLS = (
    """
from dataclasses import replace
from selfflow.training.config import Config, DataConfig, ModelConfig
from selfflow.training.config import ObjectiveConfig, TrainConfig
from selfflow.workbench.playground import explore
from selfflow.training.loop import train
training = TrainConfig(steps=2, batch=8, shards=1, validate_every=2, validation=8,
                       save_every=2, sample_every=0)
model = ModelConfig(width=16, depth=4, heads=2)
config = Config(name="self_flow", model=model, training=training)
plain = replace(config, name="plain", objective=ObjectiveConfig("flow_matching"))
texts = replace(plain, data=DataConfig("shapes", size=16, patch=4, condition="caption"))
for each, folder in ((config, "play"), (plain, "play"), (texts, "texts")):
    train(each, folder, bar=False, device="cpu")
explore("play", steps=4, count=2)
""",
    "explore('texts', steps=2, count=1)",
)
START = {
    "condition": 0,
    "steps": 4,
    "method": "euler",
    "shift": 1.0,
    "cfg_scale": 1.0,
    "seed": 0,
    "count": 2,
    "progress": 100,
    "sample": 0,
    "given_as": "as trained",
    "level": 0.0,
    "inpaint": False,
    "tokens": [],
    "runs": ["plain", "self_flow"],
}
FIRST = ".selfflow-explorer >> nth=0 >> "
IMAGES = {
    "tokens": FIRST + ".selfflow-tokens img",
    "views": FIRST + "img.selfflow-picture-views",
    "history": FIRST + "img.selfflow-picture-history",
}


class Played:
    "The page with the playground, and the values that its controls should have."

    def __init__(self, lab, page):
        self.page = page
        self.values = dict(START)
        self.theme = LIGHT
        self.side = SideBySide.of(lab[2] / "play", device="cpu")

    def control(self, name, inner=""):
        return self.page.locator(".selfflow-explorer").first.locator(
            f".selfflow-control-{name} {inner}".strip()
        )

    def readout(self, name):
        return float(self.control(name, ".widget-readout").inner_text())

    def shows(self, **changes):
        "Wait until all pictures are those that the pure function draws of the values."
        self.values |= changes
        for name, png in draw(compute(self.side, self.values), self.theme).items():
            until_shown(self.page, IMAGES[name], png)


@pytest.fixture
def played(lab, page):
    page.set_viewport_size({"width": 1280, "height": 1250})
    write_notebook(lab, "playground", *CELLS)
    run_all(page, lab, "playground")
    page.locator(".selfflow-explorer").nth(1).wait_for(timeout=120_000)
    return Played(lab, page)


def test_every_control_is_followed_and_a_long_caption_is_answered(played):
    page = played.page
    values = played.values
    played.shows()
    shoot(page, "playground")
    for name, key, step in (
        ("steps", "ArrowRight", 1),
        ("shift", "ArrowRight", 0.1),
        ("cfg_scale", "ArrowRight", 0.1),
        ("count", "ArrowLeft", -1),
        ("sample", "ArrowRight", 1),
        ("progress", "ArrowLeft", -2),
    ):
        handle = played.control(name, ".noUi-handle")
        assert handle.get_attribute("aria-label")
        handle.focus()
        page.keyboard.press(key)
        played.shows(**{name: type(values[name])(round(values[name] + step, 2))})
    track = played.control("progress", ".noUi-base").bounding_box()  # by pointer
    page.mouse.click(
        track["x"] + 0.4 * track["width"], track["y"] + track["height"] / 2
    )
    page.wait_for_function(
        "document.querySelector('.selfflow-control-progress .widget-readout')"
        ".innerText != '98'"
    )
    played.shows(progress=int(played.readout("progress")))
    before = played.readout("progress")
    page.locator(".selfflow-play button").first.click()
    while played.readout("progress") == before:
        page.wait_for_timeout(50)
    page.locator(".selfflow-play button").first.click()  # pauses
    page.wait_for_timeout(500)
    played.shows(progress=int(played.readout("progress")))
    seed = played.control("seed", "input")
    for typed, limit in (("7", 7), ("999999999999", 9999), ("-5", 0)):
        seed.fill(typed)
        seed.press("Enter")
        played.shows(seed=limit)
    for name, label, value in (
        ("method", "heun", "heun"),
        ("method", "sde", "sde"),
        ("condition", "5", 5),
        ("condition", "(none)", -1),
        ("given_as", "clean", "clean"),
        ("runs", ["plain"], ["plain"]),
    ):
        played.control(name, "select").select_option(label=label)
        played.shows(**{name: value})
    last = played.control("options", "input")  # of sde
    last.fill("0.2")
    last.press("Enter")
    played.shows(options={"sde": {"last": 0.2}})
    tokens = played.control("tokens", "button")
    tokens.nth(5).click()  # turns inpainting on
    played.shows(inpaint=True, tokens=[5])
    # token 5 is in row 1, column 1 of 4 x 4
    for key in ("ArrowRight", "Space", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    played.shows(tokens=[5, 6, 10])
    played.control("level", ".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    played.shows(level=0.01)
    status = page.locator(
        ".selfflow-message", has_text="clean at level 0.01 (plain)"
    ).first
    status.wait_for()  # so little noise is hardly seen in the picture
    assert "3 of 16 tokens are drawn anew" in status.inner_text()
    shoot(page, "playground-painted")
    played.control("inpaint", "input").uncheck()
    played.shows(inpaint=False)
    set_theme(page, "Dark")
    played.theme = DARK
    played.shows()
    page.set_viewport_size({"width": 800, "height": 1250})
    until_within(
        page,
        page.locator(".selfflow-explorer").first,
        *map(page.locator, IMAGES.values()),
    )
    shoot(page, "playground-dark-narrow")
    set_theme(page, "Light")
    texts = page.locator(".selfflow-explorer").nth(1)
    caption = texts.locator(".selfflow-control-condition input")
    caption.scroll_into_view_if_needed()
    caption.fill("a red star " * 909 + "?")
    caption.press("Enter")
    texts.locator(
        ".selfflow-message",
        has_text="the caption has 10,000 characters, of which this is read",
    ).wait_for()
    shoot(page, "playground-caption")
