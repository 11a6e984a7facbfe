"""A real JupyterLab and a real browser, for the tests that look at what a user sees."""

import base64
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfflow.training.recording import device_name
from selfflow.training.run import device_for

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ROOT = Path(__file__).parent.parent


def playwright():
    "The library, or the reason to skip."
    if os.environ.get("SELFFLOW_NEEDS_BROWSER"):
        assert CHROMIUM, (
            "SELFFLOW_NEEDS_BROWSER is set, but there is no chromium or google-chrome "
            "on the path"
        )
        import playwright.sync_api as api

        return api
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on the path")
    return pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed"
    )


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """JupyterLab on an empty folder, for all tests of a session: (address, token,
    folder).
    """
    playwright()
    folder = tmp_path_factory.mktemp("lab")
    settings = folder / "data/lab/settings"
    settings.mkdir(parents=True)
    quiet = {"checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false"}
    (settings / "overrides.json").write_text(
        json.dumps({"@jupyterlab/apputils-extension:notification": quiet})
    )
    work = folder / "work"
    work.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    places = {
        f"JUPYTER_{name}_DIR": str(folder / name.lower())
        for name in ("CONFIG", "DATA", "RUNTIME")
    }
    environment = (
        os.environ
        | places
        | {
            "IPYTHONDIR": str(folder / "ipython"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "user"),
        }
    )
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyter",
                "lab",
                "--no-browser",
                "--allow-root",
                "--ip=127.0.0.1",
                f"--port={port}",
                "--ServerApp.port_retries=0",
                f"--IdentityProvider.token={token}",
                "--LabApp.expose_app_in_browser=True",
                "--LabApp.extension_manager=readonly",
                f"--LabApp.app_settings_dir={settings}",
                "--LabApp.news_url=",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                str(work),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=work,
        )
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


def write_notebook(lab, name, *sources):
    "A notebook of some cells in the folder of the laboratory."
    empty = {
        "cell_type": "code",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }
    cells = [
        {**empty, "id": f"cell-{number}", "source": source}
        for number, source in enumerate(sources)
    ]
    (lab[2] / f"{name}.ipynb").write_text(
        json.dumps(
            {
                "cells": cells,
                "nbformat": 4,
                "nbformat_minor": 5,
                "metadata": {
                    "kernelspec": {
                        "name": "python3",
                        "display_name": "python3",
                        "language": "python",
                    }
                },
            }
        )
    )


# of a machine that is busy
def wait_for_server(address, token, server, log, seconds=180):
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(
                f"{address}/api/status?token={token}", timeout=2
            ).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[
                -3000:
            ]
            time.sleep(0.1)


@contextmanager
def served(runs, folder):
    """`selfflow app` on a folder of runs until the block ends: (address, token); what
    it leaves behind lies in `folder`.
    """
    command = [
        sys.executable,
        "-m",
        "selfflow.cli",
        "app",
        "--folder",
        str(runs),
        "--port",
        "0",
        "--no-browser",
    ]
    environment = os.environ | {
        "TMPDIR": str(folder),
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    log = folder / "app.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            # a suite that runs in the background passes on that Ctrl-C is ignored
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    try:
        end = time.monotonic() + 180
        form = r"(http://127\.0\.0\.1:\d+)/voila/render/workbench\.ipynb\?token=(\w+)"
        while not (match := re.search(form, log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        wait_for_server(*match.groups(), server, log)
        yield match.groups()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


@pytest.fixture
def page(lab):
    """A page of a browser; what the page complained of and what it asked of other
    machines is looked at in the end.
    """
    api = playwright()
    errors = []
    elsewhere = []
    with api.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": 1600, "height": 1250}).new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                errors.append(message.text) if message.type == "error" else None
            ),
        )

        def local(route):
            if route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
                return route.continue_()
            elsewhere.append(route.request.url)
            route.abort()

        page.route("**/*", local)
        yield page
        shoot(page, "last")
        browser.close()
    assert not errors
    assert not elsewhere


def shoot(page, name):
    """A picture of the page for one who works on it: SELFFLOW_SCREENSHOTS=FOLDER pytest
    tests/test_browser*.py.
    """
    if folder := os.environ.get("SELFFLOW_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def set_theme(page, name):
    "Change the theme of JupyterLab to Dark or Light."
    page.evaluate(
        "theme => window.jupyterapp.commands.execute("
        "'apputils:change-theme', {theme: `JupyterLab ${theme}`})",
        name,
    )


def source(page, name):
    return page.locator(f"img.selfflow-{name}").get_attribute("src")


def run_all(page, lab, name):
    "Open a notebook and start its cells."
    address, token, _ = lab
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset&token={token}")
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    page.wait_for_function(
        """name => { const notebook = window.jupyterapp.shell.currentWidget;
        const kernel = notebook?.sessionContext?.session?.kernel;
        return notebook?.context?.path === name && kernel?.status === 'idle' }""",
        arg=f"{name}.ipynb",
        timeout=60_000,
    )
    # does not wait for its end
    page.evaluate(
        "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
    )


# decode() fails if the image is replaced meanwhile: then the next one is awaited
SHOWN = """async image => {
    for (let address; address !== image.src;) {
        address = image.src;
        await image.decode().catch(
            error => { if (address === image.src) throw error; });
    } }"""


def pixels(page, selector):
    "The pixels of an image on the page, (h, w, 3) bytes."
    encoded = page.locator(selector).evaluate(
        f"async image => {{ await ({SHOWN})(image);"
        + """
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        const letter = byte => String.fromCharCode(byte);
        return btoa(bytes.reduce((text, byte) => text + letter(byte), '')) }"""
    )
    return decoded(base64.b64decode(encoded))


def decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def until_shown(page, selector, png, seconds=60):
    """Wait until an image shows what a pure function has drawn.

    The tolerance covers the rounding of another process.
    """
    expected = decoded(png)
    end = time.monotonic() + seconds
    while True:
        actual = pixels(page, selector)
        if actual.shape == expected.shape and abs(actual - expected).mean() < 0.05:
            return
        assert time.monotonic() < end, (
            f"{selector} differs from what was drawn: {actual.shape}, {expected.shape}"
        )
        page.wait_for_timeout(50)


def until_within(page, box, *locators, seconds=20):
    """Wait until a box lies within the page and the visible `locators` within the box.

    A page takes a while to get narrower.
    """
    end = time.monotonic() + seconds
    while True:
        shapes = [
            shape
            for locator in (box, *locators)
            for element in locator.all()
            if (shape := element.bounding_box())
        ]
        edge, *ends = (shape["x"] + shape["width"] for shape in shapes)
        if ends and max(ends) <= edge + 4 and edge <= page.viewport_size["width"]:
            return
        assert time.monotonic() < end, (
            f"a box ends at {edge:.0f}, what lies in it at "
            f"{', '.join(f'{e:.0f}' for e in ends)}"
        )
        page.wait_for_timeout(100)


def step_times(page, picture, control, steps=40):
    "Milliseconds from a key on a slider to its picture, for steps to and fro."
    page.locator(f".selfflow-control-{control} .noUi-handle").first.focus()
    return page.evaluate(
        f"async ([picture, control, steps]) => {{ const shown = {SHOWN};"
        + """
        const find = selector => document.querySelector(selector), times = [];
        const image = find(`img.selfflow-picture-${picture}`);
        const handle = find(`.selfflow-control-${control} .noUi-handle`);
        for (let step = 0; step < steps; step++) {
            const changed = new Promise(resolve => {
                const stop = (_, self) => { self.disconnect(); resolve(); };
                const watched = { attributes: true, attributeFilter: ['src'] };
                new MutationObserver(stop).observe(image, watched); });
            const started = performance.now();
            const key = step % 2 ? 'ArrowLeft' : 'ArrowRight';
            handle.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
            await changed;
            await shown(image);
            times.push(performance.now() - started);
        }
        return times }""",
        [picture, control, steps],
    )


def record_latency(name, milliseconds, **about):
    """Keep how long the picture took to follow, with SELFFLOW_RECORD=1, in
    data/results/latency.json; the median in any case.
    """
    median = statistics.median(milliseconds)
    if os.environ.get("SELFFLOW_RECORD"):
        path = ROOT / "data/results/latency.json"
        records = json.loads(path.read_text()) if path.exists() else {}
        tenth = sorted(milliseconds)[-max(1, len(milliseconds) // 10)]
        records[name] = {
            "milliseconds": {
                "median": round(median, 1),
                "slowest tenth from": round(tenth, 1),
            },
            "steps": len(milliseconds),
            "device": device_name(device_for("cpu")),
            "browser": "headless Chromium",
            **about,
        }
        path.write_text(json.dumps(records, indent=1) + "\n")
    return median
