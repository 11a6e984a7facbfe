"""Controls, explorers and the noise asymmetry explorer work without a browser.

Pure functions, changes that overtake each other, and bad input.
"""

import io
import json
import threading
import time

import numpy as np
import pytest
import torch
import traitlets
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.method.backbone import Output
from selfflow.method.flow import LogitNormal, Uniform
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.method.schedule import NoiseLevels
from selfflow.training.config import Config, TrainConfig
from selfflow.training.export import export, load
from selfflow.training.loop import train
from selfflow.workbench.asymmetry import compute, describe, draw, explore
from selfflow.workbench.boards import Board, Panel, Plot, coloured, draw_panels
from selfflow.workbench.controls import (
    DARK,
    LIGHT,
    Surroundings,
    TokenGrid,
    number,
    png_of,
    slider,
)
from selfflow.workbench.explorer import Explorer
from selfflow.workbench.viewed_run import (
    KINDS,
    ViewedRun,
    levels_of,
    many_levels,
    schedule_of,
)

VALUES = {
    "t": 0.8,
    "s": 0.2,
    "mask_ratio": 0.25,
    "seed": 0,
    "sample": 0,
    "schedule": "dual",
    "density": "uniform",
    "shift": 1.0,
    "drawn": False,
    "hand": False,
    "tokens": [],
}


@pytest.fixture(scope="module")
def viewed(runs):
    return ViewedRun(runs["tiny"])


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def square(tone, theme=LIGHT):
    return png_of(Image.new("RGB", (4, 4), (round(255 * tone),) * 3))


# the base


def test_the_last_of_many_changes_from_many_threads_is_shown():
    def slow(values):
        time.sleep(0.002)
        return values["tone"]

    explorer = Explorer(
        {"tone": slider("tone", 0.0), "other": slider("other", 0.0)}, slow, square
    )

    def move(name):
        for tone in np.linspace(0, 1, 40):
            explorer.controls[name].value = float(tone)
            time.sleep(0.001)

    threads = [
        threading.Thread(target=move, args=(name,))
        for name in ("tone", "other", "tone")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    explorer.settle()
    assert (
        bytes(explorer.pictures["picture"].value)
        == square(explorer.controls["tone"].value)
        == square(1.0)
    )
    assert explorer.data == 1.0
    assert 'role="status"' in explorer.message.value


def test_a_change_during_drawing_is_not_lost():
    begun = threading.Event()
    go = threading.Event()

    def held(values):
        if values["tone"] == 0.5:
            begun.set()
            assert go.wait(10)
        return values["tone"]

    explorer = Explorer({"tone": slider("tone", 0.0)}, held, square)
    explorer.controls["tone"].value = 0.5
    assert begun.wait(10)
    explorer.controls["tone"].value = 0.7  # while 0.5 is being computed
    go.set()
    explorer.settle()
    assert bytes(explorer.pictures["picture"].value) == square(0.7)


def test_two_images_are_never_drawn_at_once():
    busy = []
    most = []

    def watched(tone, theme):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.002)
        busy.pop()
        return square(tone)

    explorer = Explorer(
        {"tone": slider("tone", 0.0)}, lambda values: values["tone"], watched
    )
    strips = [threading.Thread(target=explorer.strip) for _ in range(5)]
    for number_, strip in enumerate(strips):
        explorer.controls["tone"].value = number_ / 10
        strip.start()
    for strip in strips:
        strip.join()
    explorer.settle()
    assert max(most) == 1


@pytest.mark.parametrize("where", ["compute", "draw", "describe"])
def test_errors_are_shown_and_the_next_change_is_drawn(where):
    def fails(name, result):
        def function(given, *theme):
            tone = given["tone"] if isinstance(given, dict) else given
            if name == where and tone == 0.5:
                raise RuntimeError("<b>no & more</b>")
            return result(tone)

        return function

    explorer = Explorer(
        {"tone": slider("tone", 0.0)},
        fails("compute", lambda tone: tone),
        fails("draw", square),
        fails("describe", str),
    )
    for tone in (0.5, 0.7):
        explorer.controls["tone"].value = tone
        explorer.settle()
        if tone == 0.5:
            text = explorer.message.value
            assert "alert" in text
            assert "RuntimeError: &lt;b&gt;no &amp; more&lt;/b&gt;" in text
    assert bytes(explorer.pictures["picture"].value) == square(0.7)
    assert "alert" not in explorer.message.value


def test_an_explorer_that_begins_with_an_error_recovers():
    explorer = Explorer(
        {"tone": slider("tone", 0.0)},
        lambda values: 1 / values["tone"],
        lambda data, theme: square(0.1),
    )
    assert "ZeroDivisionError" in explorer.message.value
    assert not explorer.pictures
    explorer.controls["tone"].value = 0.5
    explorer.settle()
    assert bytes(explorer.pictures["picture"].value) == square(0.1)


def test_a_worker_ends_when_nothing_changes_and_another_begins(monkeypatch):
    monkeypatch.setattr("selfflow.workbench.explorer.LINGER", 0.05)
    explorer = Explorer(
        {"tone": slider("tone", 0.0)}, lambda values: values["tone"], square
    )
    explorer.controls["tone"].value = 0.3
    explorer.settle()
    first = explorer._worker
    end = time.monotonic() + 10
    while explorer._worker is not None:
        assert time.monotonic() < end
        time.sleep(0.01)
    if first:
        first.join(10)
    explorer.controls["tone"].value = 0.6
    explorer.settle()
    assert bytes(explorer.pictures["picture"].value) == square(0.6)


def test_an_omitted_image_is_hidden_and_comes_back():
    explorer = Explorer(
        {"tone": slider("tone", 1.0)},
        lambda values: values["tone"],
        lambda tone, theme: {
            "a": square(0.1),
            **({"b": square(0.2)} if tone > 0.5 else {}),
        },
    )
    for tone, display in ((1.0, ""), (0.2, "none"), (0.9, "")):
        explorer.controls["tone"].value = tone
        explorer.settle()
        assert explorer.pictures["b"].layout.display in (display, display or None)


def test_absurd_numbers_are_limited_to_the_range():
    for control, low, high in (
        (slider("t", 0.5), 0, 1),
        (slider("n", 3, 0, 9, 1), 0, 9),
        (number("seed", 0, 0, 999), 0, 999),
    ):
        for absurd, limit in ((10**9, high), (-(10**9), low)):
            control.value = absurd
            assert control.value == limit


def test_tokens_that_do_not_exist_cannot_be_chosen():
    grid = TokenGrid(places=[[x, y, 0.5, 0.5] for y in (0, 0.5) for x in (0, 0.5)])
    for wrong in ([4], [-1], [0, 99]):
        with pytest.raises(traitlets.TraitError, match="from 0 to 3"):
            grid.value = wrong
    grid.value = [3, 0, 3]
    assert grid.value == [0, 3]


def test_code_for_the_browser_makes_no_requests():
    for source in (TokenGrid._esm, TokenGrid._css, Surroundings._esm):
        assert "http" not in str(source)
        assert "import" not in str(source)


# boards


@pytest.mark.parametrize(
    "config",
    [
        DataConfig("digits"),
        DataConfig("shapes", patch=4),
        DataConfig("motion", size=16, frames=8),
        DataConfig("notes"),
        DataConfig("scenes", size=16, frames=8),
    ],
    ids=lambda c: c.name,
)
def test_every_token_has_pixels_a_place_and_a_name(config):
    sources = Sources(config, "validation")
    board = Board(sources.layouts[config.name])
    tokens = sources.take(config.name, torch.arange(1)).x0[0]
    n = len(tokens)
    assert len(board.places) == len(board.names) == len(set(board.names)) == n
    assert set(board.owner.ravel()) - {-1} == set(range(n))
    # what is changed lies where it is clicked, and nowhere else
    for token in (0, n // 2, n - 1):
        changed = tokens.clone()
        changed[token] = 1 - changed[token].abs()
        differs = (board.pixels(changed) != board.pixels(tokens)).any(-1)
        assert differs.any()
        assert (board.owner[differs] == token).all()
        left, top, width, height = board.places[token]
        high, wide = board.owner.shape
        ys, xs = np.nonzero(board.owner == token)
        assert np.allclose(
            [left * wide, top * high, width * wide, height * high],
            [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1],
            atol=0.01,
        )


def test_tokens_that_are_not_finite_are_drawn_black():
    board = Board(Sources(DataConfig("digits"), "validation").layouts["digits"])
    assert not board.pixels(torch.full((16, 4), torch.nan)).any()
    assert board.pixels(torch.full((16, 4), torch.inf)).max() == 255


def test_maps_plots_and_panels():
    colours = coloured(np.array([[-9.0, 0.0, 1.0, np.nan]]), paper=DARK.paper)
    assert (colours[0, 0] == colours[0, 1]).all()
    assert (colours[0, 3] == 0x11).all()
    page = draw_panels(
        [
            [Panel("a", colours), Panel("b", colours, ("0", "1", "viridis"))],
            [Panel("c", colours)],
        ],
        DARK,
        60,
    )
    assert page.getpixel((page.width - 1, page.height - 1)) == (0x11, 0x11, 0x11)
    plot = Plot("title", "x", (0, 0), (0, 0))
    # nothing to draw, nothing to fail
    plot.line([0, np.nan], [np.inf, 0], "#000000", dots=True)
    plot.mark(7, "far out", "#ff0000")


# levels


@given(
    t=st.floats(0, 1, width=32),
    s=st.floats(0, 1, width=32),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_levels_are_those_of_the_sliders(t, s, kind, seed):
    levels = levels_of(kind, t, s, schedule_of(kind, Uniform(), 0.25, (4, 4)), 16, seed)
    distinct = set(levels.levels[0].tolist())
    lowest = levels.cleanest().levels.item()
    if kind != "diffusion forcing":
        assert distinct == {"single": {t}, "full masking": {t, 1.0}}.get(kind, {t, s})
    assert lowest == min(levels.levels[0].tolist())
    if kind == "sorted":
        assert levels.levels[0, 1] <= levels.levels[0, 0]
    if kind == "block masks":
        squares = levels.assign.reshape(2, 2, 2, 2).permute(0, 2, 1, 3).flatten(2)
        assert (squares == squares[..., :1]).all()


@pytest.mark.parametrize("density", [Uniform(), LogitNormal(1.0)])
def test_unsorted_levels_are_distributed_as_the_density(density):
    edges, heights = many_levels(schedule_of("dual", density, 0.25), 16)
    middle = torch.tensor((edges[1:] + edges[:-1]) / 2)
    assert abs(heights - density.pdf(middle).numpy()).mean() < 0.08
    _, ordered = many_levels(schedule_of("sorted", density, 0.5), 16)
    assert abs(ordered.sum() - heights.sum()) < 1e-6


def test_bad_input_is_refused(viewed):
    density = Uniform()
    with pytest.raises(ValueError, match="tokens lie in time.*take dual"):
        schedule_of("block masks", density, 0.25)
    with pytest.raises(ValueError, match="11 x 11"):
        schedule_of("block masks", density, 0.25, (11, 11))
    with pytest.raises(ValueError, match="schedule"):
        schedule_of("twofold", density, 0.25)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            compute(viewed, {**VALUES, "t": wrong})
    with pytest.raises(ValueError, match="token 99"):
        compute(viewed, {**VALUES, "hand": True, "tokens": [99]})
    with pytest.raises(ValueError, match="sample is 999"):
        compute(viewed, {**VALUES, "sample": 999})
    with pytest.raises(ValueError, match="mask_ratio"):
        compute(viewed, {**VALUES, "mask_ratio": 0.9})


# views


def test_a_perfect_model_makes_no_error(viewed):
    x0 = viewed.x0[:1]
    x1 = viewed.noise(3)

    class Perfect(torch.nn.Linear):
        def forward(self, *args, **options):
            return Output(x1 - x0, {})

    levels = levels_of(
        "dual", 0.9, 0.3, schedule_of("dual", Uniform(), 0.25), viewed.tokens, 0
    )
    _, estimate, error, _ = viewed.estimate(
        Perfect(1, 1), x0, x1, levels, torch.tensor([0])
    )
    torch.testing.assert_close(estimate, x0, atol=1e-6, rtol=0)
    assert error.max() < 1e-12


def test_the_views_are_those_of_a_training_step(viewed):
    "Levels, inputs, estimates and cosine computed again from the parts."
    view = compute(viewed, VALUES).view
    tau = view.levels.per_token()[0, :, None]
    x0 = view.x0
    x1 = viewed.noise(0)[0]
    torch.testing.assert_close(view.student, (1 - tau) * x0 + tau * x1)
    torch.testing.assert_close(view.teacher, 0.8 * x0 + 0.2 * x1)
    run = viewed.run
    head = viewed.head
    own = run.model(
        view.student[None],
        view.levels,
        viewed.condition[:1],
        taps=(head.student_layer,),
    )
    other = run.teacher(
        view.teacher[None],
        view.levels.cleanest(),
        viewed.condition[:1],
        taps=(head.teacher_layer,),
    )
    torch.testing.assert_close(
        view.student_estimate, view.student - tau * own.velocity[0]
    )
    torch.testing.assert_close(
        view.teacher_error, (view.teacher_estimate - x0).square().mean(-1)
    )
    features = (
        head.projector(own.features[head.student_layer])[0],
        other.features[head.teacher_layer][0],
    )
    torch.testing.assert_close(view.cosine, torch.cosine_similarity(*features, dim=-1))
    assert view.teacher_level == pytest.approx(0.2)


def test_a_run_without_a_head_shows_no_cosine(runs):
    scene = compute(ViewedRun(runs["vanilla"]), VALUES)
    assert scene.view.cosine is None
    assert "no cosine" in describe(scene)
    assert set(draw(scene)) == {"tokens", "levels", "views"}


@pytest.mark.parametrize(
    "tokens, curve",
    [([], False), (list(range(16)), False), ([0], True), (list(range(15)), True)],
)
def test_masks_on_no_token_on_all_and_between(viewed, tokens, curve):
    scene = compute(viewed, {**VALUES, "hand": True, "tokens": tokens})
    assert (scene.curve is not None) == curve
    assert ("no token is cleaner" in describe(scene)) != curve
    assert set(draw(scene)) == {"tokens", "levels", "views", "curve"}
    if curve:
        counts, errors = scene.curve
        assert counts[0] == 0
        assert counts[-1] == len(tokens)
        assert np.isfinite(errors).all()


def test_equal_levels_have_no_gap(viewed):
    scene = compute(viewed, {**VALUES, "t": 0.5, "s": 0.5, "hand": True, "tokens": [1]})
    assert "gap |t - s| = 0.00" in describe(scene)
    assert scene.curve is None
    assert draw(scene)
    torch.testing.assert_close(scene.view.student, scene.view.teacher)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_every_schedule_works_at_the_end_levels(viewed, kind, ends):
    for dark in (LIGHT, DARK):
        scene = compute(
            viewed, {**VALUES, "schedule": kind, "t": ends[0], "s": ends[1]}
        )
        assert all(pixels(png).size for png in draw(scene, dark).values())
    assert f"{kind}:" in describe(scene)


def test_revealed_errors_belong_to_the_same_tokens(viewed):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([0, 1, 2])
    errors = viewed.revealed(index, order, [0, 4, 8], 0.9, 0.1, seed=2)
    assert errors.shape == (3, 3)
    tau = torch.full((1, 16), 0.9)
    tau[0, order[:4]] = 0.1
    levels = NoiseLevels.of_tokens(tau.expand(3, -1).contiguous())
    estimated = viewed.estimate(
        viewed.student, viewed.x0[index], viewed.noise(2, 3), levels, index
    )[2]
    torch.testing.assert_close(errors[1], estimated[:, order[8:]].mean(1))
    with pytest.raises(ValueError, match="at least one of 16 tokens must stay noisy"):
        viewed.revealed(index, order, [0, 16], 0.9, 0.1)


# the widget


def test_the_explorer_shows_what_the_pure_functions_draw(viewed):
    explorer = explore(viewed)
    assert explorer.values() == VALUES
    for change in (
        {"t": 0.5},
        {"schedule": "sorted"},
        {"density": "logit_normal"},
        {"seed": 4},
        {"drawn": True},
    ):
        for name, value in change.items():
            explorer.controls[name].value = value
        explorer.settle()
        drawn = draw(compute(viewed, explorer.values()))
        assert bytes(explorer.pictures["views"].value) == drawn["views"]
        assert bytes(explorer.controls["tokens"].picture) == drawn["tokens"]
    explorer.surroundings.dark = True
    explorer.settle()
    assert (
        bytes(explorer.pictures["levels"].value)
        == draw(compute(viewed, explorer.values()), DARK)["levels"]
    )


def test_painting_switches_the_hand_on_and_frames_the_tokens(viewed):
    explorer = explore(viewed)
    grid = explorer.controls["tokens"]
    hand = explorer.controls["hand"]
    assert not grid.marked
    assert not hand.value
    grid.value = [2, 3]
    explorer.settle()
    assert hand.value
    assert grid.marked
    assert explorer.data.values["tokens"] == [2, 3]
    assert "curve" in explorer.pictures
    hand.value = False
    explorer.settle()
    assert not grid.marked
    assert explorer.data.curve is None
    assert explorer.pictures["curve"].layout.display == "none"


def test_the_starting_values_can_be_given(viewed):
    explorer = explore(viewed, t=0.3, hand=True, tokens=[1])
    assert explorer.values()["t"] == 0.3
    assert explorer.data.view.levels.assign[0, 1] == 1
    with pytest.raises(ValueError, match="control"):
        explore(viewed, level=0.3)


def test_strips_are_drawn_by_the_same_functions(viewed):
    strip = explore(viewed).strip(
        {"s": 0.1}, {"s": 0.9}, columns=2, width=700, only=("views",)
    )
    assert pixels(strip._repr_png_()).shape[1] == 700


@pytest.mark.parametrize("data", ["motion", "notes", "scenes"])
def test_videos_and_audio_are_explored_too(data, tmp_path):
    size = {"size": 16, "frames": 8} if data != "notes" else {}
    config = Config(
        name=data,
        data=DataConfig(data, patch=4, **size),
        model=ModelConfig(width=16, depth=3, heads=2),
        objective=ObjectiveConfig(density="logit_normal", density_shift=3.0),
        training=TrainConfig(
            steps=2, batch=4, validation=4, validate_every=2, sample_every=0
        ),
    )
    explorer = explore(
        ViewedRun(train(config, tmp_path, bar=False, device="cpu"), count=3)
    )
    assert explorer.data.view.cosine is not None
    assert "alert" not in explorer.message.value
    explorer.controls["tokens"].value = [0, 5]
    explorer.settle()
    assert explorer.data.curve is not None
    explorer.controls["hand"].value = False
    explorer.controls["schedule"].value = "block masks"
    explorer.settle()
    assert "take dual" in explorer.message.value


def test_the_density_changes_the_distribution_of_levels(viewed):
    plain, shifted = (
        compute(viewed, {**VALUES, "drawn": True, "shift": shift}).values
        for shift in (1.0, 10.0)
    )
    assert shifted["t"] > plain["t"]
    assert shifted["s"] > plain["s"]


def test_an_exported_model_shows_the_cosine_if_its_head_was_exported(runs, tmp_path):
    place = export(runs["tiny"], tmp_path / "model")
    assert ViewedRun(load(place, "cpu"), count=2).head is not None
    config = json.loads((place / "config.json").read_text())
    del config["exported"]["objective_sha256"]  # as exports without a head
    (place / "config.json").write_text(json.dumps(config))
    assert ViewedRun(load(place, "cpu"), count=2).head is None
