"""The dashboard draws each curve from its table, its texts fit without overlap, and no
odd table stops it.
"""

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

BY_LEVEL = "validation loss by noise level"


@pytest.fixture
def log(tmp_path):
    trainer = SimulatedTrainer(tmp_path / "mine")
    return pd.DataFrame([trainer.line(step) for step in range(1, 101)])


@pytest.fixture
def history():
    """Grey samples that become lighter: -1 at step 0, 1 at step 100."""
    entries = []
    for step in range(0, 101, 10):
        images = torch.full((4, 1, 8, 8), step / 50 - 1)
        entries.append((step, images, torch.arange(4)))
    return entries


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def chart(figure, title):
    """The only axes whose title starts with this text."""
    (place,) = [i for i, text in enumerate(titles(figure)) if text.startswith(title)]
    return figure.axes[place]


def texts(axis):
    return [text.get_text() for text in axis.texts if text.get_text()]


def tick_texts(labels):
    return [label.get_text() for label in labels]


def checked(figure):
    """The figure, after rendering it once."""
    assert isinstance(figure, Picture)
    assert to_png(figure, dpi=50).startswith(b"\x89PNG")
    return figure


# thinning


def test_short_curves_are_not_thinned():
    x = np.arange(1200.0)
    y = np.random.default_rng(0).normal(size=1200)
    assert thin(x, y)[1] is y


@pytest.mark.parametrize("count", [1201, 5000, 99_999])
def test_thinning_preserves_the_extremes_of_every_stretch_in_order(count):
    x = np.arange(float(count))
    y = np.random.default_rng(0).normal(size=count)
    few_x, few_y = thin(x, y)
    assert len(few_x) <= 1200
    assert (np.diff(few_x) >= 0).all()
    assert (y[few_x.astype(int)] == few_y).all()
    width = math.ceil(count / 600)
    for start in range(0, count, width):
        stretch = y[start : start + width]
        inside = few_y[(few_x >= start) & (few_x < start + width)]
        assert (inside.min(), inside.max()) == (stretch.min(), stretch.max())


def test_thinning_skips_gaps_where_possible():
    y = np.where(np.arange(5000) % 2, np.nan, 1.0)
    assert np.isfinite(thin(np.arange(5000.0), y)[1]).all()
    assert np.isnan(thin(np.arange(5000.0), y * np.nan)[1]).all()


# the curves


def test_losses_are_drawn_as_logged_and_smoothed(log):
    figure = checked(draw_dashboard(log, steps=100))
    charts = {"flow loss": "flow_loss", "representation loss": "rep_loss"}
    for title, name in charts.items():
        raw, smoothed = chart(figure, title).lines
        np.testing.assert_array_equal(raw.get_xdata(), log["step"])
        np.testing.assert_array_equal(raw.get_ydata(), log[name])
        means = log[name].rolling(4).mean()
        np.testing.assert_allclose(smoothed.get_ydata()[10:], means[10:])
        assert raw.get_alpha() < 0.5
        assert smoothed.get_alpha() is None
    written = texts(chart(figure, "flow loss"))
    assert "mean of 4 lines; faint: raw values" in written
    assert f"{log['flow_loss'][96:].mean():.3g}" in written, "the value at the end"


def test_the_cosine_is_drawn_with_that_of_a_constant(log):
    axis = chart(checked(draw_dashboard(log)), "cosine")
    constant, raw, smoothed = axis.lines
    assert constant.get_linestyle() == ":"
    assert constant.get_color() != smoothed.get_color()
    means = log["constant_cosine"].rolling(4).mean()
    np.testing.assert_allclose(constant.get_ydata()[10:], means[10:])
    np.testing.assert_array_equal(raw.get_ydata(), log["cosine"])
    assert axis.get_ylim()[1] >= 1
    assert -0.1 < axis.get_ylim()[0] <= 0


def test_a_cosine_below_zero_is_not_cut_off(log):
    log["cosine"] -= 0.5
    axis = chart(checked(draw_dashboard(log)), "cosine")
    lowest_after_start = log["cosine"][3:].min()
    assert -1.1 < axis.get_ylim()[0] < lowest_after_start < 0


def test_the_gradient_norm_is_logarithmic_and_its_clip_is_marked(log):
    log.loc[3, "grad_norm"] = 0.0  # it has no logarithm
    axis = chart(checked(draw_dashboard(log, clip=0.7)), "gradient norm")
    assert axis.get_yscale() == "log"
    assert "dotted: clipped at 0.7" in texts(axis)
    raw, _, clip = axis.lines
    assert np.isnan(raw.get_ydata()[3])
    assert clip.get_linestyle() == ":"
    assert set(clip.get_ydata()) == {0.7}
    low, high = axis.get_ylim()
    assert low < log["grad_norm"].drop(3).min()
    assert high > log["grad_norm"].max()
    unclipped = chart(checked(draw_dashboard(log)), "gradient norm")
    assert len(unclipped.lines) == 2
    assert not any("clipped" in text for text in texts(unclipped))


@pytest.mark.parametrize(
    "low, high", [(0.9, 1.1), (1e-3, 1e3), (0.1, 1.0), (3.0, 3.0), (1e-12, 1e-9)]
)
def test_the_norm_has_few_ticks_at_any_scale(low, high):
    norms = [low, high, low, high]
    log = {"step": [1, 2, 3, 4], "flow_loss": [1.0] * 4, "grad_norm": norms}
    axis = chart(checked(draw_dashboard(log)), "gradient norm")
    bottom, top = axis.get_ylim()
    assert 1 <= sum(bottom <= tick <= top for tick in axis.get_yticks()) <= 5


def test_a_spike_sets_the_scale_but_the_start_does_not(log):
    log.loc[0, "flow_loss"] = 1000.0
    log.loc[60, "flow_loss"] = 5.0
    assert 5.0 < chart(checked(draw_dashboard(log)), "flow loss").get_ylim()[1] < 10.0


def test_the_first_middle_and_newest_validations_are_drawn(log):
    axis = chart(checked(draw_dashboard(log)), BY_LEVEL)
    assert set(texts(axis)) == {"step 100", "step 50", "step 10"}
    for line, step in zip(axis.lines, (10, 50, 100), strict=True):
        np.testing.assert_allclose(line.get_xdata(), LEVELS)
        losses = log["flow_loss_by_level"][step - 1]
        np.testing.assert_allclose(line.get_ydata(), losses)
    assert axis.lines[-1].get_color() == COLOURS[0]
    assert axis.get_xlim() == (0, 1)


def test_a_single_validation_is_drawn_as_the_newest(log):
    (line,) = chart(checked(draw_dashboard(log[:10])), BY_LEVEL).lines
    assert line.get_color() == COLOURS[0]


def test_an_older_run_shows_its_validation_over_steps(log):
    older = log.drop(columns="flow_loss_by_level")
    axis = chart(checked(draw_dashboard(older, steps=100)), "validation loss")
    (line,) = axis.lines
    assert line.get_xdata().tolist() == list(range(10, 101, 10))
    losses = log["validation_flow_loss"].dropna()
    np.testing.assert_array_equal(line.get_ydata(), losses)
    assert axis.get_xlim() == (0, 100)


def test_flow_matching_has_no_charts_of_features(log):
    plain = log.drop(columns=["rep_loss", "cosine", "constant_cosine"])
    figure = checked(draw_dashboard(plain))
    assert titles(figure) == [
        "flow loss",
        "gradient norm",
        f"{BY_LEVEL}, same noise",
        "",
    ]


def test_the_speed_is_drawn_from_zero_if_known(log):
    timing = pd.DataFrame({"step": log["step"], "steps_per_second": 12.0})
    axis = chart(checked(draw_dashboard(log, timing)), "steps per second")
    assert axis.get_ylim()[0] == 0
    assert axis.lines[0].get_ydata().tolist() == [12.0] * 100
    assert "steps per second" not in titles(draw_dashboard(log, timing[:0]))


@pytest.mark.parametrize(
    ("steps", "end"), [(100, 100), (300, 150), (100_000, 195.3125), (None, 100)]
)
def test_charts_share_one_axis_of_steps_and_fill_half_of_it(log, steps, end):
    figure = draw_dashboard(log, steps=steps)
    names = ("flow loss", "cosine with the teacher", "gradient norm")
    charts = [chart(figure, name) for name in names]
    assert {axis.get_xlim() for axis in charts} == {(0, end)}
    labels = [axis.get_xlabel() for axis in charts if axis.get_xlabel()]
    once_below = [f"step (of {steps:,})" if steps else "step"]
    assert labels == once_below


# texts


def rendered(figure):
    """The figure, rendered so that every text has a position."""
    to_png(figure, dpi=figure.dpi)
    return figure


def test_labels_at_the_ends_do_not_overlap(log):
    log["constant_cosine"] = log["cosine"] = 0.5
    axis = chart(rendered(draw_dashboard(log)), "cosine")
    ends = [t.get_window_extent() for t in axis.texts if t.get_text() == "0.5"]
    assert len(ends) == 2
    assert not ends[0].overlaps(ends[1])


def test_labels_near_the_top_stay_below_the_title(log):
    log["cosine"] = 1.0
    log["constant_cosine"] = 0.98
    axis = chart(rendered(draw_dashboard(log)), "cosine")
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert not boxes["1"].overlaps(boxes["dotted: constant baseline"])
    assert not boxes["1"].overlaps(boxes["0.98"])
    assert boxes["1"].y0 > boxes["0.98"].y0


def test_ticks_of_close_values_differ(log):
    log["flow_loss_by_level"] = [[1.7 + 0.001 * t for t in LEVELS]] * 100
    axis = chart(rendered(draw_dashboard(log)), BY_LEVEL)
    ticks = tick_texts(axis.get_yticklabels())
    assert len(set(ticks)) == len(ticks) > 2


def test_every_text_is_within_the_figure(log, history):
    log["flow_loss"] *= 12345.678
    log["step"] *= 4_000
    timing = {"step": log["step"], "steps_per_second": log["flow_loss"]}
    figure = rendered(draw_dashboard(log, timing, history, 1_000_000, clip=1.0))
    width, height = figure.canvas.get_width_height()
    for axis in figure.axes:
        left, right = axis.get_xlim()
        low, high = sorted(axis.get_ylim())
        visible = [*axis.texts, axis.title, axis.xaxis.label]
        for tick in axis.get_xticklabels():
            if left <= tick.get_position()[0] <= right:
                visible.append(tick)
        for tick in axis.get_yticklabels():
            if low <= tick.get_position()[1] <= high:
                visible.append(tick)
        for text in visible:
            box = text.get_window_extent()
            if text.get_text() and text.get_visible() and box.width:
                assert -1 <= box.x0 and box.x1 <= width + 1, text.get_text()
                assert -1 <= box.y0 and box.y1 <= height + 1, text.get_text()


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
    "texts": {"step": [1, 2], "flow_loss": ["a", 1.0], "grad_norm": [None, "b"]},
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
def test_odd_tables_are_drawn_as_far_as_possible(log, steps):
    figure = draw_dashboard(log, timing=log, history=[], steps=steps, clip=1.0)
    assert checked(figure).axes


def test_an_empty_run_has_three_remarks():
    remarks = [texts(axis) for axis in checked(draw_dashboard(None)).axes]
    assert remarks == [
        ["nothing logged yet"],
        ["no validation yet"],
        ["no samples yet"],
    ]


def test_a_single_line_of_the_log_is_drawn_as_a_visible_point():
    figure = checked(draw_dashboard(ODD["one line"]))
    _, smoothed = chart(figure, "flow loss").lines
    assert smoothed.get_marker() == "."
    assert smoothed.get_xydata().tolist() == [[5, 1]]


def test_drawing_changes_no_table(log, history):
    before = log.copy()
    draw_dashboard(log, log, history, 100, 1.0)
    pd.testing.assert_frame_equal(log, before)


def test_drawing_opens_no_pyplot_figure(log, history):
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_fignums()
    checked(draw_dashboard(log, None, history))
    checked(draw_sample_history(history))
    assert plt.get_fignums() == before


# the sample history


def test_rows_are_steps_and_columns_are_samples(history):
    pixels, steps, labels, gap = sample_history_grid(history, rows=3, columns=2)
    assert steps == [0, 50, 100]
    assert labels == [0, 1]
    assert pixels.shape == (3 * 8 + 2 * gap, 2 * 8 + gap, 3)
    black, grey, white = 0, 127, 255
    left_edge = [pixels[row * (8 + gap), 0, 0] for row in range(3)]
    assert left_edge == [black, grey, white]
    assert (pixels[:, 8 : 8 + gap] == white).all(), "the gap"


def test_steps_are_at_the_left_and_labels_are_below(history):
    (axis,) = checked(draw_sample_history(history, rows=3)).axes
    assert tick_texts(axis.get_yticklabels()) == ["0", "50", "100"]
    assert tick_texts(axis.get_xticklabels()) == ["0", "1", "2", "3"]
    height = axis.get_images()[0].get_array().shape[0]
    centres = axis.get_yticks()
    assert centres[0] == pytest.approx(3.5)
    assert centres[-1] == pytest.approx(height - 1 - 3.5)


def test_three_channels_are_colours_and_other_numbers_show_the_first():
    colour = torch.zeros(1, 3, 4, 4)
    colour[:, 0] = 1.0
    pixels = sample_history_grid([(0, colour, [7])]).pixels
    assert pixels[0, 0].tolist() == [255, 127, 127]
    latent = torch.full((1, 4, 4, 4), -1.0)
    latent[:, 0] = 1.0
    pixels = sample_history_grid([(0, latent, [7])]).pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_or_too_large_are_drawn():
    odd = np.array([math.nan, math.inf, -math.inf, 9.0]).reshape(1, 1, 2, 2)
    pixels = sample_history_grid([(0, odd, [0])]).pixels
    assert pixels[..., 0].tolist() == [[0, 255], [0, 255]]


def test_samples_of_another_shape_than_the_newest_are_left_out(history):
    of_another_shape = (5, torch.zeros(4, 3, 16, 16), torch.arange(4))
    steps = sample_history_grid([of_another_shape, *history], rows=20).steps
    assert steps == [step for step, *_ in history]


def test_steps_can_have_fewer_samples():
    history = [
        (0, torch.ones(2, 1, 4, 4), [1, 2]),
        (1, torch.ones(4, 1, 4, 4), [1, 2, 3, 4]),
        (2, torch.ones(1, 1, 4, 4), [1]),
    ]
    assert sample_history_grid(history[:2]).pixels.shape == (9, 19, 3)
    assert sample_history_grid(history).pixels.shape == (14, 4, 3)


def test_an_empty_history_has_a_remark():
    (axis,) = checked(draw_sample_history([])).axes
    assert texts(axis) == ["no samples yet"]


def test_the_history_is_part_of_the_dashboard(log, history):
    figure = checked(draw_dashboard(log, history=history))
    axis = chart(figure, "samples from the same noise")
    pixels = sample_history_grid(history).pixels
    assert axis.get_images()[0].get_array().shape == pixels.shape
