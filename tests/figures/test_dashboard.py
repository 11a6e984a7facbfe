"""The dashboard: what is drawn from which table, and that nothing odd in a table stops it."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from simulated import LEVELS, SimulatedTrainer

from selfflow.figures.dashboard import (
    draw_dashboard,
    draw_sample_history,
    sample_history_grid,
    thin,
)
from selfflow.figures.plots import COLOURS, Picture, to_png


@pytest.fixture
def log(tmp_path):
    trainer = SimulatedTrainer(tmp_path / "mine")
    return pd.DataFrame([trainer.line(step) for step in range(1, 101)])


@pytest.fixture
def film():
    return [
        (step, torch.full((4, 1, 8, 8), step / 50 - 1), torch.arange(4))
        for step in range(0, 101, 10)
    ]


def titled(figure, title):
    (axis,) = (
        axis for axis in figure.axes if axis.get_title(loc="left").startswith(title)
    )
    return axis


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def words(axis):
    return [text.get_text() for text in axis.texts if text.get_text()]


def draws(figure):
    assert isinstance(figure, Picture)
    assert to_png(figure, dpi=50).startswith(b"\x89PNG")
    return figure


# thinning


def test_short_curves_are_drawn_as_they_are():
    x, y = np.arange(1200.0), np.random.default_rng(0).normal(size=1200)
    assert thin(x, y)[1] is y


@pytest.mark.parametrize("count", [1201, 5000, 99_999])
def test_every_stretch_keeps_its_lowest_and_highest_point_in_order(count):
    x, y = np.arange(float(count)), np.random.default_rng(0).normal(size=count)
    few_x, few_y = thin(x, y)
    assert (
        len(few_x) <= 1200
        and (np.diff(few_x) >= 0).all()
        and (y[few_x.astype(int)] == few_y).all()
    )
    width = math.ceil(count / 600)
    for start in range(0, count, width):
        inside = few_y[(few_x >= start) & (few_x < start + width)]
        assert (
            inside.min() == y[start : start + width].min()
            and inside.max() == y[start : start + width].max()
        )


def test_thinning_leaves_gaps_out_where_it_can():
    y = np.where(np.arange(5000) % 2, np.nan, 1.0)
    assert np.isfinite(thin(np.arange(5000.0), y)[1]).all()
    assert np.isnan(thin(np.arange(5000.0), y * np.nan)[1]).all()


# the curves


def test_raw_and_smoothed_losses_are_those_of_the_log(log):
    figure = draws(draw_dashboard(log, steps=100))
    for title, name in (
        ("flow loss", "flow_loss"),
        ("representation loss", "rep_loss"),
    ):
        raw, even = titled(figure, title).lines
        np.testing.assert_array_equal(raw.get_xdata(), log["step"])
        np.testing.assert_array_equal(raw.get_ydata(), log[name])
        np.testing.assert_allclose(
            even.get_ydata()[10:], log[name].rolling(4).mean()[10:]
        )
        assert raw.get_alpha() < 0.5 and even.get_alpha() is None
    assert "mean of 4 lines; faint: each" in words(titled(figure, "flow loss"))
    # the last value, at its end
    assert f"{log['flow_loss'][96:].mean():.3g}" in words(titled(figure, "flow loss"))


def test_the_cosine_stands_beside_what_a_constant_reaches(log):
    axis = titled(draws(draw_dashboard(log)), "cosine")
    constant, raw, even = axis.lines
    assert constant.get_linestyle() == ":" and constant.get_color() != even.get_color()
    np.testing.assert_allclose(
        constant.get_ydata()[10:], log["constant_cosine"].rolling(4).mean()[10:]
    )
    np.testing.assert_array_equal(raw.get_ydata(), log["cosine"])
    assert axis.get_ylim()[1] >= 1 and -0.1 < axis.get_ylim()[0] <= 0


def test_a_cosine_below_zero_is_not_cut_off(log):
    log["cosine"] -= 0.5
    axis = titled(draws(draw_dashboard(log)), "cosine")
    # but for the first 3 %
    assert -1.1 < axis.get_ylim()[0] < log["cosine"][3:].min() < 0


def test_the_gradient_norm_is_logarithmic_and_the_clip_marked(log):
    log.loc[3, "grad_norm"] = 0.0  # has no logarithm
    axis = titled(draws(draw_dashboard(log, clip=0.7)), "gradient norm")
    assert axis.get_yscale() == "log" and "dotted: clipped at 0.7" in words(axis)
    raw, _, clip = axis.lines
    assert (
        np.isnan(raw.get_ydata()[3])
        and clip.get_linestyle() == ":"
        and set(clip.get_ydata()) == {0.7}
    )
    low, high = axis.get_ylim()
    assert low < log["grad_norm"].drop(3).min() and high > log["grad_norm"].max()
    unmarked = titled(draws(draw_dashboard(log)), "gradient norm")
    assert len(unmarked.lines) == 2 and not any(
        "clipped" in text for text in words(unmarked)
    )


@pytest.mark.parametrize(
    "low, high", [(0.9, 1.1), (1e-3, 1e3), (0.1, 1.0), (3.0, 3.0), (1e-12, 1e-9)]
)
def test_the_norm_has_few_ticks_at_any_scale(low, high):
    log = {
        "step": [1, 2, 3, 4],
        "flow_loss": [1.0] * 4,
        "grad_norm": [low, high, low, high],
    }
    axis = titled(draws(draw_dashboard(log)), "gradient norm")
    bottom, top = axis.get_ylim()
    assert 1 <= sum(bottom <= tick <= top for tick in axis.get_yticks()) <= 5


def test_a_start_that_is_far_off_does_not_set_the_scale_but_a_spike_does(log):
    log.loc[0, "flow_loss"], log.loc[60, "flow_loss"] = 1000.0, 5.0
    assert 5.0 < titled(draws(draw_dashboard(log)), "flow loss").get_ylim()[1] < 10.0


def test_levels_first_middle_and_newest(log):
    axis = titled(draws(draw_dashboard(log)), "validation loss by noise level")
    assert set(words(axis)) == {"step 100", "step 50", "step 10"}
    for line, step in zip(axis.lines, (10, 50, 100), strict=True):
        np.testing.assert_allclose(line.get_xdata(), LEVELS)
        np.testing.assert_allclose(
            line.get_ydata(), log["flow_loss_by_level"][step - 1]
        )
    assert axis.lines[-1].get_color() == COLOURS[0] and axis.get_xlim() == (0, 1)


def test_a_single_validation_is_drawn_as_the_newest(log):
    log = log[:10]
    (line,) = titled(draws(draw_dashboard(log)), "validation loss by noise level").lines
    assert line.get_color() == COLOURS[0]


def test_an_older_run_shows_its_validation_over_steps(log):
    axis = titled(
        draws(draw_dashboard(log.drop(columns="flow_loss_by_level"), steps=100)),
        "validation loss",
    )
    (line,) = axis.lines
    assert line.get_xdata().tolist() == list(range(10, 101, 10))
    np.testing.assert_array_equal(
        line.get_ydata(), log["validation_flow_loss"].dropna()
    )
    assert axis.get_xlim() == (0, 100)


def test_flow_matching_has_no_chart_of_features(log):
    figure = draws(
        draw_dashboard(log.drop(columns=["rep_loss", "cosine", "constant_cosine"]))
    )
    assert titles(figure) == [
        "flow loss",
        "gradient norm",
        "validation loss by noise level, same noise",
        "",
    ]


def test_the_speed_is_drawn_from_zero_where_it_is_known(log):
    timing = pd.DataFrame({"step": log["step"], "steps_per_second": 12.0})
    axis = titled(draws(draw_dashboard(log, timing)), "steps per second")
    assert (
        axis.get_ylim()[0] == 0 and axis.lines[0].get_ydata().tolist() == [12.0] * 100
    )
    assert "steps per second" not in titles(draw_dashboard(log, timing[:0]))


def test_charts_over_steps_share_one_axis_that_is_at_least_half_full(log):
    for steps, end in (
        (100, 100),
        (150, 150),
        (300, 150),
        (100_000, 195.3125),
        (None, 100),
        (50, 100),
    ):
        figure = draw_dashboard(log, steps=steps)
        over_steps = [
            axis
            for axis in figure.axes
            if axis.get_title(loc="left")
            in ("flow loss", "cosine with the teacher", "gradient norm")
        ]
        assert {axis.get_xlim() for axis in over_steps} == {(0, end)}
        named = [axis.get_xlabel() for axis in over_steps if axis.get_xlabel()]
        assert named == [f"step (of {steps:,})" if steps else "step"]  # once, below


def test_labels_at_the_ends_do_not_overlap(log):
    log["constant_cosine"] = log["cosine"] = 0.5
    figure = draw_dashboard(log)
    to_png(figure, dpi=figure.dpi)
    ends = [
        text.get_window_extent()
        for text in titled(figure, "cosine").texts
        if text.get_text() == "0.5"
    ]
    assert len(ends) == 2 and not ends[0].overlaps(ends[1])


def test_labels_near_the_top_stay_below_the_title(log):
    log["cosine"], log["constant_cosine"] = 1.0, 0.98
    figure = draw_dashboard(log)
    to_png(figure, dpi=figure.dpi)
    axis = titled(figure, "cosine")
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert not boxes["1"].overlaps(
        boxes["dotted: reached by a constant"]
    ) and not boxes["1"].overlaps(boxes["0.98"])
    assert boxes["1"].y0 > boxes["0.98"].y0


def test_ticks_that_lie_close_are_told_apart(log):
    log["flow_loss_by_level"] = [[1.7 + 0.001 * t for t in LEVELS]] * 100
    figure = draw_dashboard(log)
    to_png(figure, dpi=figure.dpi)
    ticks = [
        label.get_text()
        for label in titled(figure, "validation loss by noise level").get_yticklabels()
    ]
    assert len(set(ticks)) == len(ticks) > 2


def test_all_that_is_written_lies_within_the_picture(log, film):
    log["flow_loss"] *= 12345.678
    log["step"] *= 4_000
    figure = draw_dashboard(
        log,
        {"step": log["step"], "steps_per_second": log["flow_loss"]},
        film,
        steps=1_000_000,
        clip=1.0,
    )
    to_png(figure, dpi=figure.dpi)  # finds every text its place
    width, height = figure.canvas.get_width_height()
    for axis in figure.axes:
        (left, right), (low, high) = axis.get_xlim(), sorted(axis.get_ylim())
        ticks = [
            label
            for label in axis.get_xticklabels()
            if left <= label.get_position()[0] <= right
        ]
        ticks += [
            label
            for label in axis.get_yticklabels()
            if low <= label.get_position()[1] <= high
        ]
        for text in [*axis.texts, *ticks, axis.title, axis.xaxis.label]:
            box = text.get_window_extent()
            if text.get_text() and text.get_visible() and box.width:
                assert (
                    -1 <= box.x0
                    and box.x1 <= width + 1
                    and -1 <= box.y0
                    and box.y1 <= height + 1
                ), text.get_text()


# odd tables


ODD = {
    "none": None,
    "empty dict": {},
    "empty table": pd.DataFrame(),
    "no steps": {"flow_loss": [1.0]},
    "one line": {"step": [5], "flow_loss": [1.0], "grad_norm": [0.5]},
    "only steps": {"step": [1, 2, 3]},
    "all NaN": {
        "step": [1, 2],
        "flow_loss": [math.nan] * 2,
        "cosine": [math.nan] * 2,
        "grad_norm": [math.nan] * 2,
    },
    "infinite": {
        "step": [1, 2],
        "flow_loss": [math.inf, 1.0],
        "grad_norm": [math.inf, -1.0],
    },
    "words": {"step": [1, 2], "flow_loss": ["a", 1.0], "grad_norm": [None, "b"]},
    "no step in a line": {"step": [None, 2, 3], "flow_loss": [1.0, 2.0, 3.0]},
    "steps go back": {"step": [1, 2, 3, 2, 3], "flow_loss": [1.0, 2.0, 3.0, 2.0, 1.0]},
    "levels of several lengths": {
        "step": [1, 2, 3],
        "flow_loss_by_level": [[1.0], [1.0, None, 2.0], []],
    },
    "levels of NaN": {"step": [1], "flow_loss_by_level": [[math.nan] * 10]},
    "constant": {
        "step": [1, 2],
        "flow_loss": [0.0, 0.0],
        "rep_loss": [3.0, 3.0],
        "grad_norm": [0.0, 0.0],
    },
    "only a constant cosine": {"step": [1], "constant_cosine": [0.5]},
    "a cosine without a constant": {"step": [1], "cosine": [0.5]},
    "huge": {"step": [1, 2], "flow_loss": [1e30, 1e35], "grad_norm": [1e-30, 1e30]},
}


@pytest.mark.parametrize("log", ODD.values(), ids=ODD)
@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.filterwarnings("error")
def test_odd_tables_are_drawn_as_far_as_they_go(log, steps):
    figure = draws(draw_dashboard(log, timing=log, history=[], steps=steps, clip=1.0))
    assert figure.axes


def test_an_empty_run_says_so():
    figure = draws(draw_dashboard(None))
    assert sum(map(words, figure.axes), []) == [
        "nothing was logged yet",
        "no validation yet",
        "no samples yet",
    ]


def test_one_line_is_a_point_one_can_see():
    _, even = titled(draws(draw_dashboard(ODD["one line"])), "flow loss").lines
    assert even.get_marker() == "." and even.get_xydata().tolist() == [[5.0, 1.0]]


def test_drawing_changes_no_table(log, film):
    before = log.copy()
    draw_dashboard(log, log, film, 100, 1.0)
    pd.testing.assert_frame_equal(log, before)


def test_pyplot_is_not_touched(log, film):
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_fignums()
    draws(draw_dashboard(log, None, film))
    draws(draw_sample_history(film))
    assert plt.get_fignums() == before


# the film


def test_rows_are_steps_and_columns_samples(film):
    picture, steps, labels, gap = sample_history_grid(film, rows=3, columns=2)
    assert (
        steps == [0, 50, 100]
        and labels == [0, 1]
        and picture.shape == (3 * 8 + 2 * gap, 2 * 8 + gap, 3)
    )
    # black, grey, white: -1, 0, 1
    assert [picture[row * (8 + gap), 0, 0] for row in range(3)] == [0, 127, 255]
    assert (picture[:, 8 : 8 + gap] == 255).all()  # the gap


def test_the_step_is_written_at_the_left_of_its_row(film):
    (axis,) = draws(draw_sample_history(film, rows=3)).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "50", "100"]
    assert [label.get_text() for label in axis.get_xticklabels()] == [
        "0",
        "1",
        "2",
        "3",
    ]
    rows = axis.get_images()[0].get_array().shape[0]
    centres = axis.get_yticks()
    assert centres[0] == pytest.approx(3.5) and centres[-1] == pytest.approx(
        rows - 1 - 3.5
    )


def test_colours_are_colours_and_other_channels_show_the_first():
    colour = torch.zeros(1, 3, 4, 4)
    colour[:, 0] = 1.0
    assert sample_history_grid([(0, colour, [7])])[0][0, 0].tolist() == [255, 127, 127]
    latent = torch.stack([torch.ones(4, 4), *torch.full((3, 4, 4), -1.0)])[None]
    assert sample_history_grid([(0, latent, [7])])[0][0, 0].tolist() == [255, 255, 255]


@pytest.mark.filterwarnings("error")
def test_pixels_that_are_not_finite_or_too_large_are_drawn():
    odd = np.array([math.nan, math.inf, -math.inf, 9.0]).reshape(1, 1, 2, 2)
    assert sample_history_grid([(0, odd, [0])])[0][..., 0].tolist() == [
        [0, 255],
        [0, 255],
    ]


def test_pictures_of_another_shape_than_the_newest_are_left_out(film):
    other = (5, torch.zeros(4, 3, 16, 16), torch.arange(4))
    assert sample_history_grid([other, *film], rows=20)[1] == [
        step for step, *_ in film
    ]


def test_a_film_may_have_fewer_samples_in_a_row():
    film = [
        (0, torch.ones(2, 1, 4, 4), [1, 2]),
        (1, torch.ones(4, 1, 4, 4), [1, 2, 3, 4]),
        (2, torch.ones(1, 1, 4, 4), [1]),
    ]
    assert [sample_history_grid(film[:n])[0].shape for n in (2, 3)] == [
        (9, 19, 3),
        (14, 4, 3),
    ]


def test_an_empty_film_says_so():
    assert words(draws(draw_sample_history([])).axes[0]) == ["no samples yet"]


def test_the_film_is_in_the_dashboard(log, film):
    axis = titled(
        draws(draw_dashboard(log, history=film)), "samples from the same noise"
    )
    assert axis.get_images()[0].get_array().shape == sample_history_grid(film)[0].shape
