"""The panel works in a real browser while its cell is busy training in JupyterLab."""

import pytest
from browser import (
    run_all,
    set_theme,
    shoot,
    source,
    until_shown,
    until_within,
    write_notebook,
)

from selfflow.figures.dashboard import draw_dashboard
from selfflow.training.watching import Following
from selfflow.workbench.boards import figure_png
from selfflow.workbench.controls import DARK, LIGHT

CELLS = {
    "train": """
from selfflow.workbench import panel
from selfflow.training.config import Config, ModelConfig, TrainConfig
panel.SHARE = 0.25  # pictures more often than one would want
training = TrainConfig(steps=20_000, batch=16, log_every=1, validate_every=20,
                       sample_every=0)
model = ModelConfig(width=16, depth=4, heads=2)
config = Config(name="mine", model=model, training=training)
run = panel.train(config, refresh=0.5, device="cpu")
print("the cell has ended at step", run.state()["step"])
""",
    "look": """
from selfflow.workbench.panel import watch
watch("runs/mine")
""",
}


@pytest.fixture(autouse=True)
def notebooks(lab):
    for name, cell in CELLS.items():
        if not (lab[2] / f"{name}.ipynb").exists():
            write_notebook(lab, name, cell)


def test_the_panel_lives_while_the_cell_is_busy(lab, page):
    work = lab[2]
    busy = page.locator(".jp-CodeCell .jp-InputPrompt", has_text="[*]")
    run_all(page, lab, "train")
    page.locator(".selfflow-header", has_text="training: process").wait_for(
        timeout=60_000
    )
    page.locator("img.selfflow-dashboard").wait_for()
    seen = {source(page, "dashboard")}
    while len(seen) < 3:  # two more pictures, while the cell is busy
        assert busy.count() == 1
        page.wait_for_timeout(100)
        seen.add(source(page, "dashboard"))

    page.get_by_role("button", name="Sample now").click()
    page.locator(".selfflow-reply", has_text="sample requested at").wait_for()
    page.locator(".selfflow-reply", has_text="answered").wait_for()
    assert busy.count() == 1
    assert len(list((work / "runs/mine/samples/film").iterdir())) == 1
    with_sample = source(page, "dashboard")
    while source(page, "dashboard") == with_sample:
        assert busy.count() == 1
        page.wait_for_timeout(100)
    shoot(page, "busy")

    page.get_by_role("button", name="Stop").focus()
    page.keyboard.press("Enter")  # reached by keyboard
    ended = page.locator(".jp-OutputArea-output", has_text="the cell has ended at step")
    ended.wait_for()
    step = int(ended.inner_text().split()[-1])
    assert step < 20_000
    busy.wait_for(state="detached")
    page.locator(".selfflow-header", has_text=f"stopped at step {step}").wait_for()
    for name in ("Stop", "Sample now"):
        assert (
            page.locator(".selfflow-panel")
            .get_by_role("button", name=name)
            .is_disabled()
        )
    assert "no process is training" in page.locator(".selfflow-reply").inner_text()
    page.get_by_text("Sample history, large").click()  # after the run, too
    page.locator("img.selfflow-history").wait_for()
    shoot(page, "stopped")
    page.locator(".selfflow-header").scroll_into_view_if_needed()
    page.set_viewport_size({"width": 900, "height": 1100})
    until_within(
        page, page.locator(".selfflow-panel"), page.locator("img.selfflow-dashboard")
    )
    shoot(page, "narrow")


def test_another_kernel_shows_the_same_from_the_folder_alone(lab, page):
    if not (lab[2] / "runs/mine/checkpoints").exists():
        pytest.skip("looks at what the test above has trained")
    run_all(page, lab, "look")
    page.locator(".selfflow-header", has_text="stopped at step").wait_for(
        timeout=60_000
    )
    page.locator("img.selfflow-dashboard").wait_for()
    assert "no process is training" in page.locator(".selfflow-reply").inner_text()
    for name in ("Stop", "Sample now"):
        assert (
            page.locator(".selfflow-panel")
            .get_by_role("button", name=name)
            .is_disabled()
        )
    shoot(page, "look")
    following = Following(lab[2] / "runs/mine")
    following.read()
    data = (
        following.log.table,
        following.timing.table,
        following.sample_history,
        following.steps,
        following.run.config.training.clip,
    )
    for name, theme in (("Light", LIGHT), ("Dark", DARK), ("Light", LIGHT)):
        set_theme(page, name)
        until_shown(
            page,
            "img.selfflow-dashboard",
            figure_png(draw_dashboard(*data), theme, dpi=140),
        )
        shoot(page, f"look-{name.lower()}")
