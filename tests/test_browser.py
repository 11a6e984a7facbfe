"""The panel in a real browser: a cell that is busy training in JupyterLab, a picture that changes, buttons that answer."""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
ROOT = Path(__file__).parent.parent
CELLS = {"train": """
from selfflow import panel
from selfflow.config import Config, ModelConfig, TrainConfig
panel.SHARE = 0.25  # pictures more often than one would want
training = TrainConfig(steps=20_000, batch=16, log_every=1, validate_every=20, sample_every=0)
config = Config(name="mine", model=ModelConfig(width=16, depth=4, heads=2), training=training)
run = panel.train(config, refresh=0.5, device="cpu")
print("the cell has ended at step", run.state()["step"])
""", "look": """
from selfflow.panel import watch
watch("runs/mine")
"""}


def playwright():
    "The library, or the reason to skip."
    if os.environ.get("SELFFLOW_NEEDS_BROWSER"):
        assert CHROMIUM, "SELFFLOW_NEEDS_BROWSER is set, but there is no chromium or google-chrome on the path"
        import playwright.sync_api as api
        return api
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on the path")
    return pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a folder with two notebooks: (address, token, folder)."
    playwright()
    folder = tmp_path_factory.mktemp("lab")
    settings = folder / "data/lab/settings"
    settings.mkdir(parents=True)
    quiet = {"checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false"}
    (settings / "overrides.json").write_text(json.dumps({"@jupyterlab/apputils-extension:notification": quiet}))
    work = folder / "work"
    work.mkdir()
    for name, source in CELLS.items():
        cell = {"cell_type": "code", "id": name, "metadata": {}, "outputs": [], "execution_count": None, "source": source}
        (work / f"{name}.ipynb").write_text(json.dumps({
            "cells": [cell], "nbformat": 4, "nbformat_minor": 5,
            "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | places | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                         "HOME": str(folder), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
                                         "JUPYTERLAB_SETTINGS_DIR": str(folder / "user")}
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True",
             "--LabApp.extension_manager=readonly", f"--LabApp.app_settings_dir={settings}",
             "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", str(work)],
            stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=work)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(address, token, server, folder / "lab.log")
        yield address, token, work
    finally:
        server.terminate()  # shuts its kernels down first
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for_server(address, token, server, log, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)


@pytest.fixture
def page(lab):
    "A page of a browser; what the page complained of and what it asked of other machines is looked at in the end."
    api, address = playwright(), lab[0]
    errors, elsewhere = [], []
    with api.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": 1600, "height": 1250}).new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        def local(route):
            if route.request.url.startswith((address, "data:", "blob:")):
                return route.continue_()
            elsewhere.append(route.request.url)
            route.abort()
        page.route("**/*", local)
        yield page
        shoot(page, "last")
        browser.close()
    assert not errors and not elsewhere


def shoot(page, name):
    "A picture of the page for one who works on it: SELFFLOW_SCREENSHOTS=FOLDER pytest tests/test_browser.py."
    if folder := os.environ.get("SELFFLOW_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def source(page, name):
    return page.locator(f"img.selfflow-{name}").get_attribute("src")


def run_all(page, lab, name):
    "Open a notebook and start its cell."
    address, token, _ = lab
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset&token={token}")
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    page.wait_for_function("""name => { const notebook = window.jupyterapp.shell.currentWidget;
        return notebook?.context?.path === name && notebook.sessionContext?.session?.kernel?.status === 'idle' }""",
                           arg=f"{name}.ipynb", timeout=60_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")  # does not wait for its end


def test_the_panel_lives_while_the_cell_is_busy(lab, page):
    work = lab[2]
    busy = page.locator(".jp-CodeCell .jp-InputPrompt", has_text="[*]")
    run_all(page, lab, "train")
    page.locator(".selfflow-header", has_text="training: process").wait_for(timeout=60_000)
    page.locator("img.selfflow-dashboard").wait_for()
    seen = {source(page, "dashboard")}
    while len(seen) < 3:  # two more pictures, while the cell is busy
        assert busy.count() == 1
        page.wait_for_timeout(100)
        seen.add(source(page, "dashboard"))

    page.get_by_role("button", name="Sample now").click()
    page.locator(".selfflow-said", has_text="sample asked at").wait_for()
    page.locator(".selfflow-said", has_text="answered").wait_for()
    assert busy.count() == 1 and len(list((work / "runs/mine/samples/film").iterdir())) == 1
    with_film = source(page, "dashboard")
    while source(page, "dashboard") == with_film:
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
        assert page.locator(".selfflow-panel").get_by_role("button", name=name).is_disabled()
    assert "nobody is training" in page.locator(".selfflow-said").inner_text()
    page.get_by_text("Film, large").click()  # after the run, too
    page.locator("img.selfflow-film").wait_for()
    shoot(page, "stopped")
    page.locator(".selfflow-header").scroll_into_view_if_needed()
    page.set_viewport_size({"width": 900, "height": 1100})
    page.wait_for_timeout(500)
    panel, picture = page.locator(".selfflow-panel").bounding_box(), page.locator("img.selfflow-dashboard").bounding_box()
    assert picture["width"] <= panel["width"] + 1 and picture["x"] + picture["width"] <= 900  # it fits into half a screen
    shoot(page, "narrow")


def test_another_kernel_shows_the_same_from_the_folder_alone(lab, page):
    if not (lab[2] / "runs/mine/checkpoints").exists():
        pytest.skip("looks at what the test above has trained")
    run_all(page, lab, "look")
    page.locator(".selfflow-header", has_text="stopped at step").wait_for(timeout=60_000)
    page.locator("img.selfflow-dashboard").wait_for()
    assert "nobody is training" in page.locator(".selfflow-said").inner_text()
    for name in ("Stop", "Sample now"):
        assert page.locator(".selfflow-panel").get_by_role("button", name=name).is_disabled()
    shoot(page, "look")
