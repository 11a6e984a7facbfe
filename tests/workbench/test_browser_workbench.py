"""The workbench works in a real browser, with cells and without.

A run is trained and stopped, every tool opened by pointer and keys.
"""

import pytest
from browser import run_all, served, shoot, until_shown, write_notebook

from selfflow.training.run import Run
from selfflow.workbench.asymmetry import compute, draw, explore
from selfflow.workbench.page import tools_on_page

CELL = """
from dataclasses import replace
from selfflow.training.config import PRESETS
from selfflow.workbench.page import Workbench
config = PRESETS["digits-small"]
training = replace(config.training, steps=1_000_000, batch=8, shards=1,
                   validate_every=1_000_000, validation=8,
                   save_every=1_000_000, sample_every=0)
config = replace(config, name="self-flow", training=training)
bench = Workbench("front", configs=(config,), models={})
bench
"""
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
OPEN = {
    "Noise asymmetry": "img.selfflow-picture-views",
    "Sampling": "img.selfflow-picture-history",
    "Attention": "img.selfflow-picture-heads",
    "Features": ".js-plotly-plot .scatterlayer",
    "Training": "img.selfflow-dashboard",
    "Runs": ".selfflow-browser",
}


def press(page, title, key=None):
    button = page.locator(".selfflow-tool button", has_text=title).first
    if key:
        button.focus()
        page.keyboard.press(key)
    else:
        button.click()
    page.locator(f".selfflow-page {OPEN[title]}").wait_for(timeout=120_000)


def asymmetry_is_that_of(page, run):
    "The page shows what the pure functions draw of that run."
    explorer = explore(run)
    png = draw(compute(explorer.compute.args[0], explorer.values()))["views"]
    until_shown(page, f".selfflow-page {OPEN['Noise asymmetry']}", png)


def test_a_run_is_trained_stopped_and_opened_with_every_tool(lab, page):
    write_notebook(lab, "workbench", CELL)
    run_all(page, lab, "workbench")
    # it trains, with its panel
    page.locator(".selfflow-workbench img.selfflow-dashboard").wait_for(timeout=120_000)
    page.locator(".selfflow-workbench button.selfflow-stop").click()
    page.get_by_text("which is saved").wait_for(timeout=60_000)
    press(page, "Noise asymmetry")
    asymmetry_is_that_of(page, Run.open(lab[2] / "front/quickstart/self-flow", "cpu"))
    for turn, tool in enumerate(tools_on_page()):
        press(page, tool.title, ("Enter", " ", None)[turn % 3])
        shoot(page, f"workbench-{turn}")
    page.set_viewport_size({"width": 760, "height": 1000})  # a half-width pane
    press(page, "Noise asymmetry")
    shoot(page, "workbench-narrow")
    page.set_viewport_size({"width": 1600, "height": 1250})
    page.evaluate(f"() => {KERNEL}.restart()")
    page.wait_for_function(f"() => {KERNEL}.status === 'idle'")
    page.evaluate(
        "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
    )
    page.wait_for_function(
        """() => document.querySelectorAll(
            '.selfflow-page img.selfflow-picture-views').length === 1
        && !document.querySelector('.selfflow-workbench .selfflow-panel')""",
        timeout=120_000,
    )  # nothing is trained again


def test_without_cells_and_without_a_network(runs, lab, page, tmp_path):
    with served(runs["tiny"].path.parent, tmp_path) as (address, token):
        page.goto(
            f"{address}/voila/render/workbench.ipynb?token={token}", timeout=120_000
        )
        press(page, "Noise asymmetry")
        run = page.locator(".selfflow-run select")
        run.select_option(label="tiny: step 12")
        asymmetry_is_that_of(page, Run.open(runs["tiny"].path, "cpu"))
        shoot(page, "app")
        assert not page.locator(
            ".jp-InputArea, .jp-CodeMirrorEditor, .cm-editor"
        ).count()
        # which needs plotly, where no JupyterLab has loaded it
        press(page, "Features", "Enter")
        page.goto("about:blank")


@pytest.fixture(autouse=True)
def wide(page):
    page.set_viewport_size({"width": 1600, "height": 1250})
