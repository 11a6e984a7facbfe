"""A run folder can be read while it grows; its state is described in words."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from simulated import SimulatedTrainer

from selfflow.figures.style import clock, column, memory, series, short, spread
from selfflow.training import watching as follow
from selfflow.training.watching import Following, Lines, _speed, run_state, status


def write(path, rows, mode="w"):
    with path.open(mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def rows(*steps):
    return [{"step": step, "flow_loss": 1 / step} for step in steps]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.jsonl"


def test_only_what_is_new_is_parsed(log, monkeypatch):
    parsed = []
    monkeypatch.setattr(
        follow.json,
        "loads",
        lambda line, loads=json.loads: parsed.append(line) or loads(line),
    )
    lines = Lines(log)
    write(log, rows(*range(1, 1001)))
    assert lines.read()
    assert len(parsed) == 1000
    write(log, rows(1001, 1002), "a")
    assert lines.read()
    assert len(parsed) == 1002
    assert lines.table["step"] == list(range(1, 1003))
    assert not lines.read()
    assert len(parsed) == 1002


def test_a_column_that_comes_later_is_filled_up(log):
    lines = Lines(log)
    write(log, [{"step": 1}, {"step": 2, "cosine": 0.5}])
    lines.read()
    write(log, [{"step": 3, "cosine": 0.6, "x": [1, 2]}, {"step": 4}], "a")
    lines.read()
    assert lines.table == {
        "step": [1, 2, 3, 4],
        "cosine": [None, 0.5, 0.6, None],
        "x": [None, None, [1, 2], None],
    }


def test_lines_that_are_no_objects_are_counted_and_left_out(log):
    log.write_bytes(
        b'{"step": 1}\nnonsense\n[1, 2]\n3\n\n\xff\xfe\n'
        b'{"step": 2, "flow_loss": NaN}\n{"step": 3'
    )
    lines = Lines(log)
    lines.read()
    assert lines.table["step"] == [1, 2]
    assert lines.damaged == 5
    assert math.isnan(lines.table["flow_loss"][1])


@pytest.mark.parametrize(
    "how", ["replaced", "in place", "grown past what was read", "removed"]
)
def test_a_log_that_is_cut_is_read_again(log, how):
    lines = Lines(log)
    write(log, rows(*range(1, 21)))
    lines.read()
    # what Run.cut_log does; other numbers follow, as in a log of times
    if how == "replaced":
        write(
            log.with_suffix(".tmp"),
            [
                *rows(*range(1, 11)),
                *({"step": s, "flow_loss": 1 / s + 1} for s in range(11, 21)),
            ],
        )
        os.replace(log.with_suffix(".tmp"), log)
    elif how == "in place":
        write(log, rows(*range(1, 11)))
    elif how == "grown past what was read":
        write(
            log,
            [
                *rows(*range(1, 11)),
                *({"step": s, "flow_loss": 2 / s} for s in range(11, 41)),
            ],
        )
    else:
        log.unlink()
    assert lines.read()
    expected = (
        [json.loads(line) for line in log.read_text().splitlines()]
        if log.exists()
        else []
    )
    assert [
        dict(zip(lines.table, values, strict=True))
        for values in zip(*lines.table.values(), strict=True)
    ] == expected
    assert lines.count == len(expected)
    assert not lines.read()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(0, 40), st.just("cut"), st.just("read")), max_size=30
    ),
    st.integers(1, 400),
)
def test_the_table_always_equals_the_file(tmp_path_factory, events, torn):
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    log.touch()
    lines = Lines(log)
    text = b""
    step = 0
    for event in events:
        if event == "cut":
            text = b"".join(text.splitlines(keepends=True)[: len(text) % 7])
            log.with_suffix(".tmp").write_bytes(text)
            os.replace(log.with_suffix(".tmp"), log)
        elif event == "read":
            lines.read()
        else:
            for _ in range(event):
                step += 1
                text += (
                    json.dumps({"step": step, "flow_loss": 1 / step}).encode() + b"\n"
                )
            log.write_bytes(text)
    lines.read()
    log.write_bytes(text + b'{"step": 1234567}\n'[:torn])  # a line that may be torn
    lines.read()
    known = [
        json.loads(line)["step"]
        for line in log.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    assert lines.table.get("step", []) == known


# columns and words


@pytest.mark.parametrize("table", [None, {}, pd.DataFrame(), {"step": [], "a": []}])
def test_a_table_without_the_column_gives_nothing(table):
    x, y = series(table, "a")
    assert x.size == y.size == 0


@pytest.mark.parametrize("make", [dict, pd.DataFrame])
def test_non_finite_values_are_gaps(make):
    table = make(
        {
            "step": [1, 2, None, 4, 5, 6],
            "a": [0.5, None, 3.0, math.inf, "nonsense", [1.0]],
        }
    )
    x, y = series(table, "a")
    assert x.tolist() == [1, 2, 4, 5, 6]
    np.testing.assert_array_equal(y, [0.5, *[np.nan] * 4])
    assert column(table, "b").size == 0


@pytest.mark.parametrize(
    "count, most, expected",
    [(0, 8, []), (1, 8, [0]), (3, 8, [0, 1, 2]), (9, 3, [0, 4, 8]), (5, 1, [4])],
)
def test_an_even_choice_has_the_first_and_the_newest(count, most, expected):
    assert spread(count, most) == expected


def test_numbers_are_short():
    assert [
        short(v)
        for v in (
            0,
            0.05,
            0.12345,
            999.4,
            1000,
            9_999,
            10_000,
            400_000,
            2.5e6,
            -1.5,
            math.nan,
        )
    ] == [
        "0",
        "0.05",
        "0.123",
        "999",
        "1,000",
        "9,999",
        "10k",
        "400k",
        "2.5M",
        "-1.5",
        "not finite",
    ]
    assert [clock(s) for s in (0, 59.6, 3600, 360_000)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "100:00:00",
    ]
    assert [memory(b) for b in (5e5, 9.4e8, 1.26e9)] == ["0 MB", "940 MB", "1.3 GB"]


WRITER = {"pid": 4711, "host": "ada", "since": "2026-01-01"}


@pytest.mark.parametrize(
    "problems, logged, writer, not_finite, expected",
    [
        ({}, None, None, None, (0, "not started")),
        ({}, 3, None, None, (0, "stopped before anything was saved")),
        ({}, None, WRITER, None, (0, "training: process 4711 on ada")),
        # the last checkpoint is still being written
        ({90: ""}, 100, WRITER, None, (100, "training: process 4711 on ada")),
        ({90: "", 100: ""}, 100, None, None, (100, "finished")),
        ({15: ""}, 19, None, None, (15, "stopped at step 15")),
        (
            {50: ""},
            51,
            None,
            {"step": 51},
            (50, "stopped at step 51: the loss was not finite"),
        ),
        # resumed since
        ({50: ""}, 51, WRITER, {"step": 51}, (51, "training: process 4711 on ada")),
        ({100: ""}, 100, None, {"step": 51}, (100, "finished")),
        (
            {50: "", 100: "torn"},
            100,
            None,
            None,
            (50, "stopped at step 50; 1 of 2 checkpoints damaged (step 100: torn)"),
        ),
        (
            {50: "bad", 100: "torn"},
            100,
            None,
            None,
            (0, "damaged: no intact checkpoint (step 100: torn)"),
        ),
    ],
)
def test_the_state_in_words(tmp_path, problems, logged, writer, not_finite, expected):
    run = SimpleNamespace(
        exported=None,
        path=tmp_path,
        config=SimpleNamespace(training=SimpleNamespace(steps=100)),
    )
    if not_finite:
        (tmp_path / "not_finite.json").write_text(json.dumps(not_finite))
    assert run_state(run, writer, logged, problems) == expected
    run.exported = {"step": 1500}
    assert run_state(run, writer, logged, problems) == (1500, "exported at step 1,500")


def timing(steps, rate, overhead=0.0, **last):
    seconds = np.array(steps) / rate
    return pd.DataFrame(
        {
            "step": steps,
            "seconds": seconds,
            "wall": seconds * (1 + overhead),
            "steps_per_second": rate,
            "data_wait": 0.012,
            "peak_memory": 2.5e9,
            "device": "NVIDIA H100",
            "processes": 1,
        }
        | last
    )


def test_the_remaining_time_includes_validation_and_samples():
    alone, wall = _speed(timing([100, 200], rate=10.0, overhead=0.25))
    assert alone == pytest.approx(10)
    assert wall == pytest.approx(8)
    parts = status(
        "mine", 200, 1000, "training: process 1 on a", timing([100, 200], 10.0, 0.25)
    )
    assert " | ".join(parts) == (
        "mine | training: process 1 on a | step 200 of 1,000 (20 %) | 10 it/s | "
        "0:01:40 left | "
        "data wait 1.2 % | peak memory 2.5 GB | NVIDIA H100"
    )


def test_a_slow_run_shows_seconds_per_step_and_its_processes():
    parts = status(
        "mine", 3, 10, "training: process 1 on a", timing([1, 2, 3], 0.25, processes=4)
    )
    assert "4 s/it" in parts
    assert "NVIDIA H100, 4 processes" in parts
    assert "0:00:28 left" in parts


def test_the_speed_is_that_of_the_last_lines():
    table = timing(list(range(1, 101)), 10.0)
    table.loc[50:, "wall"] += np.arange(50) * 10.0
    # 500 steps of 10.1 s
    assert "1:24:10 left" in status("mine", 100, 600, "training: process 1 on a", table)


def test_the_wait_for_data_is_that_of_the_last_lines():
    table = timing(list(range(1, 101)), 10.0)
    table["data_wait"] = [0.9] * 80 + [0.0] * 19 + [0.4]  # one line alone says little
    assert "data wait 2.0 %" in status(
        "mine", 100, 600, "training: process 1 on a", table
    )


def test_a_finished_run_shows_how_long_it_took():
    assert "took 0:01:40" in status(
        "mine", 1000, 1000, "finished", timing([500, 1000], 10.0)
    )


@pytest.mark.parametrize(
    "table",
    [
        None,
        {},
        {"step": [5]},
        timing([5], 10.0),
        {"step": [5, 5], "wall": [1.0, 1.0]},
        {"step": [1], "device": [None], "processes": [math.nan]},
    ],
)
def test_unknown_parts_are_left_out(table):
    parts = status("mine", 5, 10, "training: process 1 on a", table)
    assert parts[:3] == ["mine", "training: process 1 on a", "step 5 of 10 (50 %)"]
    assert not any("nan" in part or "None" in part for part in parts)


def test_percent_is_full_only_at_the_end():
    assert "(99 %)" in status("mine", 9_999, 10_000, "stopped")[2]


# the folder


@pytest.fixture
def run(tmp_path):
    return SimulatedTrainer(tmp_path / "mine", steps=100)


def test_a_missing_folder_is_no_error(tmp_path):
    following = Following(tmp_path / "mine")
    assert not following.read()
    assert (
        following.run,
        following.steps,
        following.step,
        following.sample_history,
    ) == (None, None, 0, [])
    assert following.state == "no run here yet"
    assert not following.finished


def test_a_new_run_is_noticed(tmp_path):
    following = Following(tmp_path / "mine")
    following.read()
    trainer = SimulatedTrainer(tmp_path / "mine", steps=100)
    assert not following.read()
    assert following.steps == 100
    assert following.state == "not started"
    trainer.log_lines(5)
    assert following.read()
    assert following.step == 5
    assert following.state == "stopped at step 5"
    assert not following.read()


def test_without_training_the_saved_step_counts(run):
    run.log_lines(5)
    run.step = 100
    run.save()
    (run.path / "checkpoints/.step-00000200-abc").mkdir()
    (run.path / "checkpoints/step-odd").mkdir()
    following = Following(run.path)
    following.read()
    assert following.step == 100
    assert following.finished
    with run.run.locked():
        following.read()
        assert not following.finished
        assert following.writer["pid"] == os.getpid()


def test_without_a_writer_the_newest_checkpoint_counts_and_no_later_line(tmp_path):
    run = SimulatedTrainer(tmp_path / "mine", steps=12)
    run.log_lines(8)
    run._log_lines(4)
    following = Following(run.path)
    with run.run.locked():
        following.read()
        assert following.step == 12
        assert not following.finished
    following.read()
    assert (following.step, following.state, following.finished) == (
        8,
        "stopped at step 8",
        False,
    )
    shutil.rmtree(run.path / "checkpoints/step-00000008")
    following.read()
    assert (following.step, following.state) == (0, "stopped before anything was saved")


@pytest.mark.parametrize(
    "saved, steps, state",
    [
        (8, 20, "stopped at step 9: the loss was not finite"),
        (9, 20, "stopped at step 9"),
        (20, 20, "finished"),
    ],
)
def test_a_loss_that_was_not_finite_counts_until_a_later_step_is_saved(
    tmp_path, saved, steps, state
):
    run = SimulatedTrainer(tmp_path / "mine", steps=steps)
    (run.path / "not_finite.json").write_text('{"step": 9}')
    run.log_lines(saved)
    following = Following(run.path)
    following.read()
    assert following.state == state


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": "x"}', "\0"])
def test_a_damaged_report_of_a_loss_is_ignored(run, content):
    run.log_lines(5)
    (run.path / "not_finite.json").write_text(content)
    following = Following(run.path)
    following.read()
    assert following.state == "stopped at step 5"


def test_a_non_finite_loss_is_reported(run):
    run.log_lines(5)
    (run.path / "not_finite.json").write_text('{"step": 6, "losses": {"total": NaN}}')
    following = Following(run.path)
    following.read()
    assert "stopped at step 6: the loss was not finite" in following.status()


def test_each_shown_sample_grid_is_read_once(run, monkeypatch):
    read = []
    monkeypatch.setattr(
        follow,
        "load_file",
        lambda file, load=follow.load_file: read.append(file.name) or load(file),
    )
    following = Following(run.path, rows=3)
    for step in range(10, 60, 10):
        run.save_sample_grid(step)
    assert following.read()
    assert [entry[0] for entry in following.sample_history] == [10, 30, 50]
    assert len(read) == 3
    assert not following.read()
    assert len(read) == 3
    run.save_sample_grid(60)
    assert following.read()
    assert following.sample_history[-1][0] == 60
    assert following.sample_history[-1][1].shape == (4, 1, 8, 8)
    assert len(following._pictures) == 3


def test_an_unreadable_sample_grid_is_reported_and_the_others_shown(run):
    run.save_sample_grid(10)
    (run.path / "samples/film/step-00000020.safetensors").write_bytes(b"no safetensors")
    save_file(
        {"other": np.zeros(3)}, run.path / "samples/film/step-00000030.safetensors"
    )
    following = Following(run.path)
    following.read()
    assert [entry[0] for entry in following.sample_history] == [10]
    assert len(following.problems) == 2
    assert all("cannot be read" in problem for problem in following.problems)


def test_a_config_of_another_format_is_refused_in_words(run):
    following = Following(run.path)
    (run.path / "config.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        following.read()
