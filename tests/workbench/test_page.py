"""The workbench finds or trains runs, opens tools; the app is for this machine."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import nbformat
import programs
import pytest
import websocket
from browser import ROOT, served, wait_for_server
from conftest import TINY

import selfflow.workbench.page as module
from selfflow.method import build as method
from selfflow.training import config
from selfflow.training.export import export
from selfflow.training.run import Run
from selfflow.workbench import tools
from selfflow.workbench.app import free_port, options_of, page_of, serve
from selfflow.workbench.page import (
    Tool,
    Workbench,
    label_of,
    quickstart,
    runs_in,
    saved_step,
    tools_on_page,
    workbench,
)
from selfflow.workbench.tools import Chosen

QUICK = (replace(TINY, name="self-flow"), replace(TINY, name="flow-matching"))
WORDS = Tool(
    "Words",
    "Says which run it was given.",
    lambda chosen: widgets.HTML(chosen.path.name),
)


def page(bench):
    bench.settle()
    return bench.page.children[0]


def test_the_quickstart_is_that_of_the_notebook():
    cells = json.loads(
        (Path(__file__).parents[2] / "nbs/studies/quickstart.ipynb").read_text()
    )["cells"]
    source = next(
        "".join(cell["source"])
        for cell in cells
        if "vanilla = Config(" in "".join(cell["source"])
    )
    given = {
        "os": type("Os", (), {"environ": {}}),
        "tempfile": None,
        "Path": Path,
        "replace": replace,
    }
    exec(source, given | vars(config) | vars(method), names := {})
    assert quickstart() == (names["selfflow"], names["vanilla"])
    assert names["folder"].name == "quickstart"
    assert names["folder"].parent.name == "runs"


def test_without_a_run_the_quickstart_is_trained_and_opened(tmp_path):
    bench = Workbench(tmp_path / "runs", (WORDS,), QUICK, {})
    assert page(bench).value == "self-flow"
    assert list(bench.runs) == [
        "quickstart/flow-matching",
        "quickstart/self-flow",
    ]
    assert [label for label, _ in bench.run.options] == [
        "quickstart/flow-matching: step 12",
        "quickstart/self-flow: step 12",
    ]
    assert "Both runs" in bench.status.value
    assert not bench.live.children
    assert bench.more.layout.display == "none"
    again = Workbench(tmp_path / "runs", (WORDS,), QUICK, {})
    assert not again._trains
    assert page(again).value == "self-flow"


def test_a_stopped_quickstart_resumes(tmp_path, monkeypatch):
    real = module.train
    trained = []

    def train(config, folder, **options):
        trained.append(config.name)
        # as the panel's button does, once the run is being trained
        if len(trained) == 1:
            save = Run.save

            def asks(run, step, *rest):
                run.request("stop")
                return save(run, step, *rest)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Run, "save", asks)
                return real(config, folder, **options)
        return real(config, folder, **options)

    monkeypatch.setattr(module, "train", train)
    bench = Workbench(tmp_path, (WORDS,), QUICK, {})
    bench.settle()
    assert trained == ["self-flow"]
    assert "Stopped at step" in bench.status.value
    assert bench.more.layout.display == ""
    assert 0 < saved_step(tmp_path / "quickstart/self-flow") < 12
    assert page(bench).value == "self-flow"
    bench.more.click()
    bench.settle()
    assert trained == ["self-flow", "self-flow", "flow-matching"]
    assert bench.more.layout.display == "none"
    assert {saved_step(path) for path in bench.runs.values()} == {12}


def test_models_of_the_project_are_listed_after_the_runs_without_training(
    runs, tmp_path
):
    models = {
        name: export(runs["tiny"], tmp_path / name)
        for name in ("plain", "own-self-flow")
    }
    bench = Workbench(tmp_path / "none", (WORDS,), QUICK, models)
    assert not bench._trains
    assert bench.more.layout.display == ""
    assert page(bench).value == "own-self-flow"
    assert [label for label, _ in bench.run.options] == [
        "plain: step 12",
        "own-self-flow: step 12",
    ]
    with_runs = Workbench(runs["tiny"].path.parent, (WORDS,), QUICK, models)
    assert with_runs.run.value in runs_in(with_runs.folder).values()
    assert list(with_runs.runs)[-2:] == ["plain", "own-self-flow"]
    same_name = Workbench(with_runs.folder, (WORDS,), QUICK, {"tiny": models["plain"]})
    assert same_name.runs["tiny"] == runs["tiny"].path, (
        "a model of the same name does not hide a run"
    )
    assert same_name.runs["tiny (of the project)"] == models["plain"]


def test_a_failed_training_is_reported(tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/self-flow").write_text("a file where a folder should be")
    bench = Workbench(tmp_path, (WORDS,), QUICK, {})
    bench.settle()
    assert 'role="alert"' in bench.status.value
    assert "self-flow" in bench.status.value
    assert bench.more.layout.display == ""
    assert "no run" in page(bench).value


def test_tools_are_opened_once_on_request(runs):
    opened = []

    def tool(title):
        return Tool(
            title,
            f"about <{title}>",
            lambda chosen: (
                opened.append((title, chosen.path.name)) or widgets.HTML(title)
            ),
        )

    bench = Workbench(runs["tiny"].path.parent, (tool("a"), tool("b")), (), {})
    assert page(bench).value == "a"
    assert opened == [("a", "tiny")]
    assert bench.about.value == "<i>about &lt;a&gt;</i>"
    bench.tool.value = "b"
    assert page(bench).value == "b"
    bench.tool.value = "a"
    assert page(bench).value == "a"
    assert len(opened) == 2
    bench.run.value = runs["vanilla"].path
    assert page(bench).value == "a"
    assert opened[-1] == ("a", "vanilla")
    assert len(opened) == 3
    bench.run.value = runs["tiny"].path
    assert page(bench).value == "a" and len(opened) == 3, "an open tool stays open"


def test_the_last_request_is_shown(runs):
    gates = {name: threading.Event() for name in ("slow", "quick")}

    def tool(title):
        return Tool(
            title, title, lambda chosen: gates[title].wait(30) and widgets.HTML(title)
        )

    bench = Workbench(runs["tiny"].path.parent, (tool("slow"), tool("quick")), (), {})
    bench.tool.value = "quick"
    gates["quick"].set()
    with bench._state:
        assert bench._state.wait_for(lambda: len(bench._opening) == 1, 30)
    assert bench.page.children[0].value == "quick"
    gates["slow"].set()
    assert page(bench).value == "quick", "the slow one comes last and is not shown"
    bench.tool.value = "slow"
    assert page(bench).value == "slow"


def test_a_tool_that_fails_reports_it_and_can_be_retried(runs):
    tries = []

    def fails(chosen):
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("<img onerror=alert(1)> is no layer")
        return widgets.HTML("there")

    bench = Workbench(runs["tiny"].path.parent, (Tool("t", "t", fails), WORDS), (), {})
    message, retry = page(bench).children
    assert "&lt;img onerror" in message.value
    assert 'role="alert"' in message.value
    assert "<img" not in message.value
    bench.tool.value = "Words"
    assert page(bench).value == "tiny"
    bench.tool.value = "t"
    retry.click()
    assert page(bench).value == "there"
    assert len(tries) == 2


def test_a_run_without_a_checkpoint_is_listed_and_the_reason_shown(runs, tmp_path):
    Run.create(tmp_path / "begun", TINY, runs["tiny"].inputs)
    bench = Workbench(tmp_path, tools_on_page()[:1], (), {})
    assert label_of("begun", tmp_path / "begun") == "begun: no checkpoint yet"
    message, _ = page(bench).children
    assert "no intact checkpoint yet" in message.value


def test_a_run_with_new_steps_is_reopened(runs, tmp_path):
    run = Run.create(tmp_path / "goes-on", TINY, runs["tiny"].inputs)
    tensors = {
        part: runs["tiny"].load(part)
        for part in ("model", "teacher", "objective", "optimizer")
    }
    run.save(4, tensors, {})
    opened = []
    bench = Workbench(
        tmp_path,
        (
            Tool(
                "t",
                "t",
                lambda chosen: opened.append(1) or widgets.HTML(str(len(opened))),
            ),
        ),
        (),
        {},
    )
    assert page(bench).value == "1"
    bench.look()
    assert page(bench).value == "1" and len(opened) == 1, "nothing has changed"
    run.save(8, tensors, {})
    bench.look()
    assert page(bench).value == "2"
    assert bench.run.options[0][0] == "goes-on: step 8"


def test_only_runs_of_the_same_data_are_comparable(runs, tmp_path):
    other = tmp_path / "other"
    Run.create(other, TINY, runs["tiny"].inputs)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    runs_of_both = runs_in(runs["tiny"].path.parent) | runs_in(tmp_path)
    comparable = Chosen(
        tmp_path,
        runs["tiny"].path,
        {"a/tiny" if name == "tiny" else name: p for name, p in runs_of_both.items()},
    ).comparable()
    assert list(comparable)[:2] == ["a/tiny", "vanilla"], "all by the names of the list"
    comparable = Chosen(tmp_path, runs["tiny"].path, runs_of_both).comparable()
    assert list(comparable)[:2] == ["tiny", "vanilla"]
    assert not {"other", "broken"} & set(comparable)
    assert (
        len(Chosen(tmp_path, runs["tiny"].path, runs_of_both).comparable(most=1)) == 1
    )


def test_every_tool_opens_on_a_run(runs, monkeypatch):
    # UMAP, whose compilation takes long, is tried in lessons and in a browser
    few = partial(tools.explore_features, count=40, methods=("PCA",))
    monkeypatch.setattr(tools, "explore_features", few)
    bench = Workbench(runs["tiny"].path.parent, configs=(), models={})
    for tool in tools_on_page():
        bench.tool.value = tool.title
        content = page(bench)
        assert isinstance(content, widgets.Widget) and "alert" not in str(
            getattr(content, "children", [content])[0]
        ), tool.title
    for thread in threading.enumerate():
        # it computes all planes and must finish before the process ends
        if thread.name == "feature explorer":
            thread.join(300)


def test_a_file_given_as_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        workbench(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        serve(tmp_path / "file", 0, False)


# --- the app


def test_the_notebook_of_the_app_runs_nothing_else(tmp_path):
    folder = tmp_path / "it's \"\n#"
    book = page_of(folder)
    nbformat.validate(book)
    calls = []

    class Bench:
        settle = staticmethod(lambda **options: calls.append(options))

    source = book.cells[0].source.replace(
        "from selfflow.workbench.page import workbench", ""
    )
    exec(source, {"workbench": lambda path: calls.append(path) or Bench})
    assert calls == [str(folder.resolve()), {"trained": False}]
    assert len(book.cells) == 1


def test_a_taken_port_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(
            ValueError, match=f"port {taken.getsockname()[1]} is not available .*--port"
        ):
            serve(tmp_path, taken.getsockname()[1], False)
    with pytest.raises(ValueError, match="port 70000 is not available"):
        free_port(70000)
    assert "--ServerApp.ip=127.0.0.1" in options_of(tmp_path, 1, False)


def test_the_app_answers_only_to_its_token_and_ends_with_its_files(runs, tmp_path):
    with served(runs["tiny"].path.parent, tmp_path) as (address, _):
        with urllib.request.urlopen(
            f"{address}/voila/render/workbench.ipynb", timeout=30
        ) as answer:
            assert "/login" in answer.url, "without the token it asks for it"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/api/contents", timeout=30)
        assert len(list(tmp_path.glob("selfflow-app-*/served/*"))) == 1
    assert not list(tmp_path.glob("selfflow-app-*"))


SERVE = """
import os, sys
from pathlib import Path
import nbformat
from jupyter_server.serverapp import ServerApp
from selfflow.workbench.app import options_of, write_page
root = Path(sys.argv[1])
write_page(root, root)
book = nbformat.read(root / "served/workbench.ipynb", 4)
book.cells[0].source = sys.argv[3]  # a small page
nbformat.write(book, root / "served/workbench.ipynb")
os.environ["JUPYTER_PATH"] = f"{root}/data"
options = options_of(root, int(sys.argv[2]), False)
options = [option for option in options if "cull_i" not in option]
assert len(options) == len(options_of(root, 0, False)) - 2
options += ["--IdentityProvider.token=x"]
options += ["--MappingKernelManager.cull_idle_timeout=3"]
options += ["--MappingKernelManager.cull_interval=1"]
ServerApp.launch_instance(options)
"""


@contextmanager
def pages(tmp_path, source: str):
    "A server that removes kernels after 3 seconds: (open a page, wait for its end)."
    root = tmp_path / "app"
    port = free_port(0)
    root.mkdir()
    address = f"127.0.0.1:{port}"
    log = tmp_path / "log"

    def kernels():
        with urllib.request.urlopen(
            f"http://{address}/api/kernels?token=x", timeout=30
        ) as answer:
            return {kernel["id"] for kernel in json.load(answer)}

    def opened():
        "The kernel of a page that is opened now, and the page's connection to it."
        before = kernels()
        urllib.request.urlopen(
            f"http://{address}/voila/render/workbench.ipynb?token=x", timeout=120
        ).read()
        (kernel,) = kernels() - before
        return kernel, websocket.create_connection(
            f"ws://{address}/api/kernels/{kernel}/channels?token=x", timeout=60
        )

    def gone(kernel, seconds=60):
        end = time.monotonic() + seconds
        while kernel in kernels() and time.monotonic() < end:
            time.sleep(0.5)
        return kernel not in kernels()

    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(root), str(port), source],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "HOME": str(tmp_path),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            },
        )
    try:
        wait_for_server(f"http://{address}", "x", server, log)
        yield opened, gone
    finally:
        server.terminate()
        server.wait(60)


def test_a_kernel_ends_when_its_page_is_closed(tmp_path):
    with pages(tmp_path, "1 + 1") as (opened, gone):
        open_kernel, connection = opened()
        closed_kernel, its_connection = opened()
        its_connection.close()
        assert gone(closed_kernel) and not gone(open_kernel, seconds=5), (
            "it has been idle for longer than is allowed without a page"
        )
        connection.close()
        assert gone(open_kernel)


TRAINS = """
import threading, time, ipywidgets
step = ipywidgets.IntText()
def train():  # as the panel of a training does: it goes on showing where it is
    for step.value in range(10):
        time.sleep(1)
threading.Thread(target=train).start()
step
"""


def test_a_closed_page_that_trains_keeps_its_kernel_until_it_has_trained(tmp_path):
    with pages(tmp_path, TRAINS) as (opened, gone):
        kernel, connection = opened()
        connection.close()
        assert not gone(kernel, seconds=6)
        assert gone(kernel)


MINE = ROOT / "tests/plugins/own_explorer.py"


def test_an_explorer_in_a_file_of_the_user_is_a_tool(runs):
    script = (
        "import sys, nbformat\n"
        "from pathlib import Path\n"
        "from selfflow.registries import use\n"
        "from selfflow.workbench.app import page_of\n"
        "from selfflow.workbench.page import Workbench\n"
        "use(sys.argv[1])\n"
        "bench = Workbench(sys.argv[2], configs=(), models={})\n"
        "bench.tool.value = 'Name of the run'\n"
        "bench.settle()\n"
        "shown = bench.page.children[0].value\n"
        "print(bench.about.value, shown, list(bench.tools)[0])\n"
        "print(page_of(Path(sys.argv[2])).cells[0].source)"
    )
    done = programs.run("-c", script, MINE, runs["tiny"].path)
    printed, *cell = done.stdout.splitlines()
    assert (
        printed == "<i>Says &lt;which&gt; run it was given.</i> tiny Noise asymmetry"
    ), done.stderr
    assert f"use({str(MINE)!r})" in cell, "the kernel of the app uses it too"
