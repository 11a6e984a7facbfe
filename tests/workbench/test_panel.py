"""The panel shows a simulated trainer, its buttons work, and it survives errors."""

import gc
import io
import json
import os
import shutil
import textwrap
import threading
import time
from pathlib import Path

import pytest
from jupyter_client import KernelManager
from PIL import Image
from simulated import SimulatedTrainer

from selfflow.figures.plots import Picture
from selfflow.figures.style import clock
from selfflow.training.watching import Following
from selfflow.workbench import panel as module
from selfflow.workbench.panel import Panel, header_html, train, watch


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def png(image):
    return bytes(image.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine"


@pytest.fixture(autouse=True)
def opened():
    "Panels are closed after each test, and leave no thread behind."
    yield
    left = list(module._PANELS.values())
    for panel in left:
        panel.close()
    for panel in left:
        panel.thread.join(10)
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("panel of")
    ]


@pytest.fixture
def training(path):
    "A run that is being trained by a thread, until the test ends."
    trainer = SimulatedTrainer(path, steps=100_000)
    trainer.log_lines(10)
    thread = trainer.in_thread()
    yield trainer
    trainer.run.request("stop")
    thread.join(10)


def test_a_folder_that_does_not_exist_is_waited_for(path):
    panel = watch(path, refresh=0.02)
    assert "no run here yet" in panel.header.value
    assert "mine" in panel.header.value
    assert panel.stop.disabled
    assert panel.sample.disabled
    assert "no process is training" in panel.reply.value
    trainer = SimulatedTrainer(path)
    until(lambda: "not started" in panel.header.value)
    trainer.log_lines(7)
    until(lambda: "stopped at step 7" in panel.header.value)
    assert png(panel.picture).startswith(b"\x89PNG")
    assert not panel.trouble.value


def corner(image):
    "The colour of the paper."
    return Image.open(io.BytesIO(png(image))).convert("RGB").getpixel((0, 0))


def test_images_follow_the_theme_of_the_page_on_their_own(path):
    trainer = SimulatedTrainer(path, steps=7)
    trainer.log_lines(7)
    panel = watch(path, refresh=60.0)
    panel.unfold.selected_index = 0
    until(lambda: png(panel.history))
    assert corner(panel.picture) == corner(panel.history) == (255, 255, 255)
    panel.surroundings.dark = True
    until(lambda: corner(panel.picture) == corner(panel.history) == (17, 17, 17))
    panel.close()
    panel.thread.join(10)
    panel.surroundings.dark = False  # after the end it is done at once
    assert corner(panel.picture) == corner(panel.history) == (255, 255, 255)


def test_the_header_shows_the_process_speed_and_time(training):
    panel = watch(training.path, refresh=0.02)
    until(lambda: "left" in panel.header.value)
    for part in (
        f"training: process {os.getpid()} on",
        "of 100,000 (0 %)",
        "20 it/s",
        "data wait 0.4 %",
        "peak memory 1.3 GB",
    ):
        assert part in panel.header.value
    assert not panel.stop.disabled
    assert not panel.sample.disabled
    assert "no process" not in panel.reply.value
    before = panel.header.value
    until(lambda: panel.header.value != before)


def test_the_image_changes_during_training(training, monkeypatch):
    monkeypatch.setattr(module, "SHARE", 0.5)
    panel = watch(training.path, refresh=0.02)
    images = {png(panel.picture)}
    until(lambda: images.add(png(panel.picture)) or len(images) > 2)


def test_an_unchanged_folder_is_not_drawn_again(path):
    SimulatedTrainer(path).log_lines(10)
    panel = watch(path, refresh=0.01)
    time.sleep(0.3)
    assert panel.drawn == 1


def test_at_most_a_share_of_the_time_is_spent_on_drawing(training, monkeypatch):
    spent = []

    def slow(*data):
        started = time.thread_time()
        while time.thread_time() - started < 0.05:
            pass
        spent.append(time.thread_time() - started)
        return Picture(figsize=(1, 1))

    monkeypatch.setattr(module, "draw_dashboard", slow)
    panel = watch(training.path, refresh=0.01)
    started = time.monotonic()
    until(lambda: len(spent) >= 4, 60)
    assert sum(spent[:-1]) / (time.monotonic() - started) <= module.SHARE
    panel.close()


def test_the_line_of_text_is_updated_between_two_images(training):
    panel = watch(training.path, refresh=0.02)
    panel._due = float("inf")
    headers = {panel.header.value}
    drawn = panel.drawn
    until(lambda: headers.add(panel.header.value) or len(headers) > 4)
    assert panel.drawn == drawn


def test_sample_now_is_requested_answered_and_shown(training):
    panel = watch(training.path, refresh=0.02)
    panel.sample.click()
    until(lambda: training.answers)
    until(
        lambda: (
            "sample requested at" in panel.reply.value
            and "answered" in panel.reply.value
        )
    )
    until(lambda: not panel.sample.disabled)
    assert training.answers[0][0] == "sample"
    assert len(panel.following.sample_history) == 1
    assert "training" in panel.header.value  # and goes on


def test_stop_ends_the_run_and_the_panel_shows_the_step(path):
    trainer = SimulatedTrainer(path, steps=100_000)
    thread = trainer.in_thread()
    panel = watch(path, refresh=0.02)
    panel.stop.click()
    thread.join(10)
    assert not thread.is_alive()
    assert trainer.answers[0][0] == "stop"
    until(lambda: f"stopped at step {trainer.step}" in panel.header.value)
    assert panel.stop.disabled
    assert panel.sample.disabled
    assert panel.stop.tooltip == "No process is training this run"
    assert "stop requested at" in panel.reply.value
    assert "answered" in panel.reply.value
    assert "no process is training" in panel.reply.value
    # the last line is in the picture
    until(
        lambda: (
            panel.following.log.table["step"][-1] == trainer.step and not panel._stale
        )
    )


def test_the_button_of_a_pending_request_is_disabled(path):
    trainer = SimulatedTrainer(path)
    trainer.log_lines(3)
    with trainer.run.locked():
        panel = watch(path, refresh=0.02)
        panel.stop.click()
        assert (path / "stop").exists()
        assert panel.stop.disabled
        assert not panel.sample.disabled
        assert "waiting for the training loop" in panel.reply.value
    until(lambda: "not answered: training ended" in panel.reply.value)


def test_a_request_from_another_process_is_shown(path):
    trainer = SimulatedTrainer(path)
    with trainer.run.locked():  # a loop that is slow to look
        panel = watch(path, refresh=0.02)
        (path / "sample").touch()  # as from a terminal
        until(
            lambda: (
                "sample requested at" in panel.reply.value
                and "waiting for the training loop" in panel.reply.value
            )
        )
        (path / "sample").unlink()
        until(lambda: "answered" in panel.reply.value)


def test_nothing_is_requested_when_no_process_trains(path):
    trainer = SimulatedTrainer(path)
    panel = watch(path, refresh=10)
    for what in ("stop", "sample"):
        panel.ask(what)  # as a click that comes too late
        assert not trainer.run.requested(what)
        assert "no process is training this run" in panel.reply.value


def test_errors_are_described_and_the_panel_recovers(path):
    trainer = SimulatedTrainer(path)
    trainer.log_lines(5)
    intact = (path / "config.json").read_text()
    panel = watch(path, refresh=0.02)
    (path / "config.json").write_text('{"format": "<b>99</b>"}')
    until(lambda: "99" in panel.trouble.value)
    assert "<b>" not in panel.trouble.value
    assert panel.thread.is_alive()
    (path / "config.json").write_text(intact)
    trainer.log_lines(1)
    until(lambda: "stopped at step 6" in panel.header.value and not panel.trouble.value)


def test_an_error_while_drawing_is_shown_and_tried_again(path, monkeypatch):
    SimulatedTrainer(path).log_lines(5)

    def fail(*data):
        raise RuntimeError("no <fonts>")

    monkeypatch.setattr(module, "draw_dashboard", fail)
    panel = watch(path, refresh=0.02)
    assert "RuntimeError: no &lt;fonts&gt;" in panel.trouble.value
    assert png(panel.picture) == b""
    monkeypatch.undo()
    until(lambda: png(panel.picture).startswith(b"\x89PNG") and not panel.trouble.value)


def test_a_request_that_cannot_be_written_is_reported(training, monkeypatch):
    panel = watch(training.path, refresh=10)

    def refuse(what):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(panel.following.run, "request", refuse)
    panel.stop.click()
    assert "The request failed (stop)" in panel.trouble.value
    assert "Permission denied" in panel.trouble.value


def test_a_folder_that_is_removed_is_no_error(path):
    SimulatedTrainer(path).log_lines(5)
    panel = watch(path, refresh=0.02)
    shutil.rmtree(path)
    until(lambda: "no run here yet" in panel.header.value)
    assert not panel.trouble.value


def test_a_log_that_is_cut_on_resume_is_followed(path):
    trainer = SimulatedTrainer(path)
    trainer.log_lines(10)
    trainer._log_lines(10)  # a process that was killed, and lost these
    panel = watch(path, refresh=0.02)
    assert panel.following.log.count == 20
    assert "stopped at step 10" in panel.header.value
    trainer.run.cut_log(10)
    until(lambda: panel.following.log.table["step"] == list(range(1, 11)))


def test_a_panel_does_not_take_a_log_for_a_run_that_is_finished(path):
    trainer = SimulatedTrainer(path, steps=12)
    trainer.log_lines(8)
    trainer._log_lines(4)
    panel = watch(path, refresh=0.02)
    drawn = panel.following.log.count
    time.sleep(0.3)
    assert drawn == 12
    assert panel.thread.is_alive()
    assert "stopped at step 8" in panel.header.value
    assert 'aria-valuenow="66"' in panel.header.value
    trainer.save()
    panel.thread.join(20)
    assert not panel.thread.is_alive()
    assert "finished" in panel.header.value


def test_speed_and_time_left_of_a_run_whose_first_steps_were_not_timed(path):
    # and nobody who writes more lines meanwhile
    SimulatedTrainer(path, steps=100_010).log_lines(10)
    times = [
        json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()
    ]
    lines = [
        {**line, "seconds": None, "wall": None, "device": "AMD EPYC, 2 threads"}
        for line in times
    ]
    (path / "timing.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    following = Following(path)
    following.read()
    following.state = "training: process 1 on a"
    parts = following.status()
    assert "20 it/s" in parts
    assert parts[-1] == "AMD EPYC"
    assert [part for part in parts if part.endswith(" left")] == [
        f"{clock(100_000 / 20)} left"
    ]


def test_a_finished_run_is_drawn_once_more_and_then_left_alone(path):
    trainer = SimulatedTrainer(path, steps=30)
    panel = watch(path, refresh=0.02)
    trainer.in_thread(0.0).join(10)
    panel.thread.join(20)
    assert not panel.thread.is_alive()
    assert "finished" in panel.header.value
    assert panel.following.log.count == 30
    assert 'aria-valuenow="100"' in panel.header.value
    assert not panel._stale


def test_a_restarted_panel_shows_the_same_from_the_folder_alone(path):
    trainer = SimulatedTrainer(path, steps=30)
    trainer.save_sample_grid(10)
    first = watch(path, refresh=0.02)
    trainer.in_thread(0.0).join(10)
    first.thread.join(20)
    second = watch(path)
    assert png(second.picture) == png(first.picture)
    assert second.header.value == first.header.value


def test_a_second_panel_of_a_folder_closes_the_first(path):
    first = watch(path, refresh=0.02)
    second = watch(path.parent / "other" / ".." / "mine", refresh=0.02)
    first.thread.join(10)
    assert not first.thread.is_alive()
    assert "a newer panel follows this run" in first.reply.value
    assert second.thread.is_alive()


def test_a_closed_panel_ends_at_once_even_when_it_looks_rarely(path):
    panel = watch(path, refresh=600)
    panel.close()
    panel.thread.join(5)
    assert not panel.thread.is_alive()
    assert panel.thread.daemon
    assert path.resolve() not in module._PANELS


def test_the_large_history_is_drawn_when_it_is_unfolded(path):
    trainer = SimulatedTrainer(path)
    trainer.save_sample_grid(10)
    panel = watch(path, refresh=0.02)
    assert png(panel.history) == b""
    panel.unfold.selected_index = 0
    until(lambda: png(panel.history).startswith(b"\x89PNG"))
    before = png(panel.history)
    trainer.save_sample_grid(20)
    until(lambda: png(panel.history) != before)


def test_the_history_is_unfolded_after_the_run_too(path):
    trainer = SimulatedTrainer(path, steps=10)
    trainer.save_sample_grid(10)
    trainer.log_lines(10)
    panel = watch(path, refresh=0.02)
    panel.thread.join(10)
    assert not panel.thread.is_alive()
    assert png(panel.history) == b""
    panel.unfold.selected_index = 0
    assert png(panel.history).startswith(b"\x89PNG")


def test_images_are_freed(path):
    trainer = SimulatedTrainer(path)
    panel = Panel(path)
    counts = []
    for _ in range(4):
        trainer.log_lines(1)
        panel.refresh()
        gc.collect()
        counts.append(sum(type(thing) is Picture for thing in gc.get_objects()))
    assert panel.drawn == 4
    assert len(set(counts)) == 1


def test_outside_text_is_escaped(tmp_path):
    for text in ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b"):
        assert "<script" not in header_html([text] * 4)
        assert "<img" not in header_html([text] * 4)
    path = tmp_path / "<img src=x onerror=alert(1)>"
    trainer = SimulatedTrainer(tmp_path / "plain")
    (trainer.path / "writer.json").write_text("{}")
    (trainer.path / "samples/film").mkdir(parents=True)
    (trainer.path / "samples/film/step-<script>.safetensors").write_bytes(b"x")
    trainer.path.rename(path)
    panel = watch(path, refresh=10)
    assert not any(
        "<img" in text.value or "<script" in text.value
        for text in (panel.header, panel.reply, panel.trouble)
    )
    assert "&lt;img" in panel.header.value


@pytest.mark.parametrize("refresh", [0, -1, float("nan")])
def test_an_invalid_pause_is_refused(path, refresh):
    with pytest.raises(ValueError, match="refresh is .* positive"):
        watch(path, refresh)


def test_labels_for_tests_and_screen_readers_exist(path):
    panel = watch(path, refresh=10)
    assert [button.description for button in (panel.stop, panel.sample)] == [
        "Stop",
        "Sample now",
    ]
    assert all(button.tooltip for button in (panel.stop, panel.sample))
    names = {
        name
        for part in (
            panel.box,
            panel.header,
            panel.reply,
            panel.trouble,
            panel.stop,
            panel.sample,
            panel.picture,
            panel.history,
        )
        for name in part._dom_classes
    }
    assert names == {
        f"selfflow-{name}"
        for name in (
            "panel",
            "header",
            "reply",
            "trouble",
            "stop",
            "sample",
            "dashboard",
            "history",
        )
    }
    assert 'role="status"' in panel.header.value
    assert 'role="status"' in panel.reply.value
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"].startswith("mine | no run here yet")


def test_train_shows_a_panel_trains_and_releases_it(tmp_path, monkeypatch):
    panels = []
    done = object()

    def trains(config, folder, device="auto", bar=True):
        trainer = SimulatedTrainer(folder / config.name, steps=20)
        trainer.train(0.0)
        return done if device == "cpu" else None

    monkeypatch.setattr(module, "display", panels.append)
    monkeypatch.setattr(module, "train_run", trains)
    config = SimulatedTrainer(tmp_path / "elsewhere/mine", steps=20).run.config
    assert train(config, tmp_path, device="cpu") is done
    (panel,) = panels
    panel.thread.join(10)
    assert "step 20 of 20" in panel.header.value
    assert "finished" in panel.header.value
    assert not panel.thread.is_alive()


def test_a_failing_train_raises_and_releases_the_panel(tmp_path, monkeypatch):
    panels = []

    def fails(config, folder, bar=True):
        trainer = SimulatedTrainer(folder / config.name)
        trainer.log_lines(5)
        (trainer.path / "not_finite.json").write_text(json.dumps({"step": 6}))
        raise FloatingPointError("step 6 is not finite")

    monkeypatch.setattr(module, "display", panels.append)
    monkeypatch.setattr(module, "train_run", fails)
    with pytest.raises(FloatingPointError):
        train(SimulatedTrainer(tmp_path / "other").run.config, tmp_path)
    panels[0].thread.join(10)
    assert "stopped at step 6: the loss was not finite" in panels[0].header.value
    assert not panels[0].thread.is_alive()


def test_a_busy_kernel_reacts_to_the_buttons(path):
    "A click is sent to a subshell while the main one is busy, as by JupyterLab."
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=Path(__file__).parents[1])
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(60)
        client.control_channel.send(client.session.msg("create_subshell_request"))
        subshell = client.get_control_msg(timeout=20)["content"]["subshell_id"]
        code = f"""
            import time
            from simulated import SimulatedTrainer
            from selfflow.workbench import panel
            trainer = SimulatedTrainer({str(path)!r}, steps=4000)
            shown = panel.watch({str(path)!r}, refresh=0.1)
            thread = trainer.in_thread()
            while shown.stop.disabled: time.sleep(0.01)
            print(shown.stop.comm.comm_id)
            started = time.monotonic()
            while thread.is_alive() and time.monotonic() - started < 30:
                time.sleep(0.01)  # the cell is busy
            print("stopped by", *(what for what, *_ in trainer.answers))
        """
        client.execute(textwrap.dedent(code))
        click = {
            "comm_id": _printed(client),
            "data": {"method": "custom", "content": {"event": "click"}},
        }
        message = client.session.msg("comm_msg", click)
        message["header"]["subshell_id"] = subshell
        client.shell_channel.send(message)
        assert _printed(client) == "stopped by stop"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def _printed(client):
    while True:
        message = client.get_iopub_msg(timeout=60)
        assert message["msg_type"] != "error", message["content"]["traceback"]
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            return message["content"]["text"].strip()
