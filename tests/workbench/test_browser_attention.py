"""The attention explorer works in a real browser.

Every control by keys and pointer, clicks, a video with audio, captions.
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

from selfflow.training.run import Run
from selfflow.workbench.attention_explorer import draw
from selfflow.workbench.attention_scene import QUESTIONS, Watched, compute
from selfflow.workbench.controls import DARK, LIGHT
from selfflow.workbench.viewed_run import ViewedRun

CELLS = (
    """
from dataclasses import replace
from selfflow.workbench.attention_explorer import explore_attention
from selfflow.training.config import PRESETS, Config, DataConfig
from selfflow.training.config import ModelConfig, TrainConfig
from selfflow.training.loop import train
config = PRESETS["digits"]  # the model of the quickstart
training = replace(config.training, steps=2, batch=8, shards=1, validate_every=2,
                   validation=8, save_every=2, sample_every=0)
config = replace(config, name="looks", training=training)
explore_attention(train(config, "runs", bar=False, device="cpu"), tokens=[8])
""",
    """
short = TrainConfig(steps=2, batch=4, shards=1, validate_every=2, validation=4,
                    save_every=2, sample_every=0)
small = ModelConfig(width=16, depth=3, heads=2)
kinds = {"scenes": DataConfig("scenes", size=16, frames=8, patch=4),
         "texts": DataConfig("shapes", size=16, patch=4, condition="caption")}
made = {}
for name, data in kinds.items():
    config = Config(name=name, data=data, model=small, training=short)
    made[name] = train(config, "more", bar=False, device="cpu")
explore_attention(made["scenes"], count=4, tokens=[8])
""",
    "explore_attention(made['texts'], count=4, tokens=[8])",
    "explore_attention('nothing')",
)
START = {
    "question": QUESTIONS[0],
    "tokens": [8],
    "layer": 3,
    "head": "mean",
    "t": 0.8,
    "s": 0.2,
    "mask_ratio": 0.25,
    "sample": 0,
    "seed": 0,
    "network": "EMA teacher",
    "separated": False,
    "frame": 1,
}


class Looked:
    "One of the explorers on the page, and the values that its controls should have."

    def __init__(self, page, place, run, count=24, **start):
        self.page = page
        self.theme = LIGHT
        self.watched = Watched(ViewedRun(run, count=count))
        self.values = {**START, **start}
        self.box = f".selfflow-explorer >> nth={place} >> "

    def control(self, name, inner=""):
        return self.page.locator(f"{self.box}.selfflow-control-{name} {inner}".strip())

    def handle(self, name):
        return self.control(name, ".noUi-handle")

    def picture(self, name):
        return self.box + (
            ".selfflow-tokens img"
            if name == "tokens"
            else f"img.selfflow-picture-{name}"
        )

    def shows(self, **changes):
        "Wait until all pictures are those that the pure function draws of the values."
        self.values |= changes
        for name, png in draw(compute(self.watched, self.values), self.theme).items():
            if name != "audio":
                until_shown(self.page, self.picture(name), png)

    def says(self, words):
        self.page.locator(f"{self.box}.selfflow-message", has_text=words).wait_for()

    def press(self, name, key):
        assert self.handle(name).get_attribute("aria-label")
        self.handle(name).focus()
        self.page.keyboard.press(key)


@pytest.fixture
def opened(lab, page):
    page.set_viewport_size({"width": 1280, "height": 1150})
    write_notebook(lab, "attention", *CELLS)
    run_all(page, lab, "attention")
    page.locator(".selfflow-explorer").nth(3).wait_for(timeout=240_000)
    return page


def test_every_control_is_followed(lab, opened):
    page = opened
    looked = Looked(opened, 0, Run.open(lab[2] / "runs/looks", "cpu"))
    looked.shows()
    shoot(page, "attention")
    values = looked.values
    for name, key, step in (
        ("layer", "ArrowRight", 1),
        ("t", "ArrowRight", 0.01),
        ("s", "ArrowLeft", -0.01),
        ("mask_ratio", "ArrowRight", 0.01),
        ("sample", "ArrowRight", 1),
    ):
        looked.press(name, key)
        looked.shows(**{name: type(values[name])(round(values[name] + step, 2))})
    for head in (1, 2):
        looked.press("head", "ArrowRight")
        looked.shows(head=head)
    looked.says(f"head {head}")
    for name in ("layer", "t"):  # by pointer
        before = values[name]
        track = looked.control(name, ".noUi-base").bounding_box()
        page.mouse.click(
            track["x"] + 0.15 * track["width"], track["y"] + track["height"] / 2
        )
        readout = looked.control(name, ".widget-readout")
        while float(readout.inner_text()) == before:
            page.wait_for_timeout(50)
        looked.shows(**{name: type(before)(float(readout.inner_text()))})
    tokens = looked.control("tokens", "button")
    assert tokens.count() == looked.watched.viewed.tokens
    tokens.nth(2).hover()
    assert "row 1, column 3" in tokens.nth(2).get_attribute("title")
    tokens.nth(2).click()
    looked.shows(tokens=[2])
    for key in ("ArrowRight", "Space"):
        page.keyboard.press(key)
    looked.shows(tokens=[3])
    assert tokens.nth(3).get_attribute("aria-pressed") == "true"
    assert tokens.nth(2).get_attribute("aria-pressed") == "false"
    for question in (QUESTIONS[1], QUESTIONS[2]):
        looked.control("question", "select").select_option(question)
        looked.shows(question=question)
    tokens.nth(10).click()  # asks for that token
    looked.shows(question=QUESTIONS[0], tokens=[10])
    looked.control("network", "select").select_option("student")
    looked.shows(network="student")
    for on in (True, False):
        looked.control("separated", "input").set_checked(on)
        looked.shows(separated=on)
    seed = looked.control("seed", "input")
    for typed, limit in (("7", 7), ("999999999999", 9999), ("-5", 0)):
        seed.fill(typed)
        seed.press("Enter")
        looked.shows(seed=limit)
    # absurd numbers are kept within the limits
    layer = looked.control("layer", ".widget-readout")
    layer.fill("1000000")
    layer.press("Enter")
    looked.shows(layer=6)
    measure(looked)
    drag(looked)
    set_theme(page, "Dark")
    looked.theme = DARK
    looked.shows()
    shoot(page, "attention-dark")
    page.set_viewport_size({"width": 800, "height": 1150})
    until_within(
        page,
        page.locator(".selfflow-explorer").first,
        *(
            page.locator(looked.picture(name))
            for name in ("tokens", "layers", "inputs", "heads")
        ),
    )
    shoot(page, "attention-dark-narrow")
    set_theme(page, "Light")


def measure(looked):
    looked.handle("layer").focus()
    looked.page.keyboard.press("ArrowLeft")
    looked.shows(layer=5)
    times = step_times(looked.page, "heads", "layer")
    shape = looked.watched.config
    median = record_latency(
        "attention",
        times,
        model=f"width {shape.width}, depth {shape.depth}, {shape.tokens} tokens",
        moved="layer: all pictures are drawn again, no forward",
    )
    # on a machine that does other things too; see data/results/latency.json
    assert median < 1000
    looked.shows()


def drag(looked):
    "The handle moved to and fro, faster than pictures are drawn."
    page = looked.page
    box = looked.handle("t").bounding_box()
    track = looked.control("t", ".noUi-base").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    for turn in range(60):
        page.mouse.move(
            track["x"] + track["width"] * (0.1 + 0.8 * (turn % 7) / 6), box["y"] + 5
        )
    page.mouse.up()
    page.wait_for_timeout(100)
    looked.shows(t=float(looked.control("t", ".widget-readout").inner_text()))


def test_videos_audio_captions_and_a_folder_without_runs(lab, opened):
    page = opened
    scenes = Looked(page, 1, Run.open(lab[2] / "more/scenes", "cpu"), 4)
    page.locator(scenes.picture("tokens")).scroll_into_view_if_needed()
    scenes.shows(layer=2)
    scenes.press("frame", "ArrowRight")
    scenes.shows(frame=2)
    clip = scenes.watched.slices["audio"].start + 3
    scenes.control("tokens", "button").nth(clip).click()
    scenes.shows(tokens=[clip])
    scenes.says("audio, moment 4")
    page.locator(f"{scenes.box}.selfflow-play button").first.click()
    while int(scenes.control("frame", ".widget-readout").inner_text()) < 4:
        page.wait_for_timeout(50)
    page.locator(f"{scenes.box}.selfflow-play button").first.click()  # pauses
    page.wait_for_timeout(500)
    scenes.shows(frame=int(scenes.control("frame", ".widget-readout").inner_text()))
    length = page.locator(f"{scenes.box}audio").evaluate("""async player => {
        player.muted = true; await player.play(); return player.duration }""")
    assert length > 0.2  # seconds: it can be played
    shoot(page, "attention-scenes")
    texts = Looked(page, 2, Run.open(lab[2] / "more/texts", "cpu"), 4)
    texts.control("caption", "input").scroll_into_view_if_needed()
    texts.shows(layer=2, caption="")
    long_caption = "a red star " * 909 + "?"
    texts.control("caption", "input").fill(long_caption)
    texts.control("caption", "input").press("Enter")
    texts.says("the caption has 10,000 characters, of which this is read")
    texts.shows(caption=long_caption)
    shoot(page, "attention-caption")
    page.locator(".selfflow-explorer").nth(3).locator(
        "[role=alert]", has_text="holds no run"
    ).wait_for()
