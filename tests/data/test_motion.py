"""Videos of motion follow a simulation, and show the factors they are drawn from."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from selfflow.data.datasets import SPLITS, digits
from selfflow.data.motion import (
    _RANGES,
    _WALL,
    DIRECTIONS,
    Motion,
    digit_masks,
    headings,
    paths,
)
from selfflow.data.shapes import (
    COLOURS,
    KINDS,
    PALETTE,
    TEXTURES,
    draw_figures,
    figure_masks,
    grounds,
)

OPTIONS = [
    {},
    {"size": 16, "frames": 9},
    {"figures": "digits"},
    {"pair": True},
    {"figures": "digits", "pair": True, "frames": 8},
]
WORDS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}


def simulated_path(start, heading, speed, low, high, bounce, frames, substeps=400):
    """Return the path of a ball, in small steps, that bounces or wraps around."""
    place = np.array(start, dtype=float)
    step = np.array(heading) * speed / (frames - 1) / substeps
    path = [place.copy()]
    for _ in range(frames - 1):
        for _ in range(substeps):
            place = place + step
            if bounce:
                outside = (place > high) | (place < low)
                place = np.where(place > high, 2 * high - place, place)
                place = np.where(place < low, 2 * low - place, place)
                step = np.where(outside, -step, step)
            else:
                place = place % 1
        path.append(place.copy())
    return np.array(path)


@pytest.mark.parametrize("direction, bounce", list(product(range(8), (True, False))))
def test_paths_equal_a_simulated_ball(direction, bounce):
    scale = 0.35
    start = (0.5, 0.37)
    words = np.sum([WORDS[word] for word in DIRECTIONS[direction].split()], 0)
    path = paths(
        torch.tensor([start]),
        torch.tensor([direction]),
        torch.tensor([1.9]),
        torch.tensor([bounce]),
        torch.tensor([scale]),
        11,
    )
    ball = simulated_path(
        start,
        words / np.hypot(*words),
        1.9,
        _WALL * scale,
        1 - _WALL * scale,
        bounce,
        11,
    )
    distance = abs(path[0].numpy() - ball)
    assert np.minimum(distance, 1 - distance * (not bounce)).max() < 1e-4


def test_directions_are_named_anticlockwise_from_the_right():
    vectors = headings(torch.arange(8))
    assert torch.allclose(
        torch.atan2(-vectors[:, 1], vectors[:, 0]) % (2 * math.pi),
        math.pi / 4 * torch.arange(8),
        atol=1e-6,
    )
    assert torch.allclose(vectors.norm(dim=1), torch.ones(8))
    for name, vector in zip(DIRECTIONS, vectors, strict=True):
        expected = np.sum([WORDS[word] for word in name.split()], 0)
        assert vector.sign().round().tolist() == expected.tolist()


@settings(max_examples=20, deadline=None)
@given(
    direction=st.integers(0, 7),
    speed=st.floats(0, 20),
    scale=st.floats(0.05, 0.8),
    bounce=st.booleans(),
    frames=st.integers(2, 70),
)
def test_paths_never_leave_the_frame(direction, speed, scale, bounce, frames):
    path = paths(
        torch.tensor([[0.5, 0.5]]),
        torch.tensor([direction]),
        torch.tensor([speed]),
        torch.tensor([bounce]),
        torch.tensor([scale]),
        frames,
    )
    low = _WALL * scale if bounce else 0
    assert path.shape == (1, frames, 2)
    assert (path >= low - 1e-5).all()
    assert (path <= 1 - low + 1e-5).all()


@pytest.mark.parametrize(
    "angle, x, y", [(0.0, 0.5, 0.5), (0.7, 0.45, 0.6), (-2.0, 0.55, 0.5)]
)
def test_digits_are_drawn_by_linear_interpolation(angle, x, y):
    chosen = torch.tensor([5, 77])
    ones = torch.ones(2)
    masks = digit_masks(
        "test", chosen, 0.4 * ones, x * ones, y * ones, angle * ones, 0 * ones, size=32
    )
    place = (np.arange(32) + 0.5) / 32
    across, down = np.meshgrid(place - x, place - y)
    # in pixels of the digit, from its centre of mass, upwards
    turned = (across - 1j * down) * np.exp(-1j * angle) / (1.5 * 0.4) * 8
    for mask, image in zip(
        masks, digits("test").images[chosen, 0].numpy(), strict=True
    ):
        ink = np.pad((image + 1) / 2, 1)
        rows, columns = np.mgrid[:10, :10]
        centre = (ink * rows).sum() / ink.sum(), (ink * columns).sum() / ink.sum()
        expected = map_coordinates(
            ink, [centre[0] - turned.imag, centre[1] + turned.real], order=1
        )
        np.testing.assert_allclose(mask, np.clip(2 * expected - 0.7, 0, 1), atol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_digits_are_centred_where_requested(split):
    data = digits(split)
    half = torch.full((len(data),), 0.5)
    masks = digit_masks(
        split,
        torch.arange(len(data)),
        0.8 * half,
        half,
        half,
        0 * half,
        0 * half,
        size=32,
    )
    place = (torch.arange(32) + 0.5) / 32
    moments = torch.stack([masks.sum(1) @ place, masks.sum(2) @ place])
    pixels_off = 32 * (moments / masks.sum((1, 2)) - 0.5).abs()
    assert pixels_off.median() < 0.2
    assert pixels_off.max() < 1.5
    assert masks.amax((1, 2)).min() > 0.9
    assert masks.sum((1, 2)).min() > 40


def test_each_frame_is_an_image_of_shapes():
    data = Motion(size=24, frames=10, count=64)
    examples = data.take(torch.arange(64))
    video = examples.signals["video"]
    f = examples.factors
    for frame in range(10):
        turned = f["angle"] + 2 * math.pi * f["rotation"] * frame / 9
        x, y = f["positions"][:, frame].unbind(1)
        expected = draw_figures(
            f["kind"],
            f["colour"],
            f["ground"],
            f["texture"],
            f["scale"],
            x,
            y,
            turned,
            f["grain"],
            size=24,
        )
        gone = (frame < f["appears"]) | (frame >= f["vanishes"])
        expected[gone] = grounds(f["ground"], f["texture"], f["grain"], size=24)[gone]
        # figures that cannot reach the border
        near = (torch.stack([x, y]) - 0.5).abs().amax(0) < 0.5 - 0.8 * f["scale"]
        same = near | f["bounce"] | gone
        torch.testing.assert_close(
            video[same, :, frame], expected[same], atol=1e-4, rtol=0
        )
        assert same.sum() > 32


def test_only_figures_that_wrap_appear_at_the_opposite_side():
    data = Motion(count=300)
    factors = data.factors(torch.arange(300))
    masks = data.masks(torch.arange(300))
    place = (torch.arange(32) + 0.5) / 32
    # farther than any figure reaches
    far_x = (place - factors["positions"][..., :1]).abs() > 0.4
    far_y = (place - factors["positions"][..., 1:]).abs() > 0.4
    elsewhere = (
        (masks * (far_x[:, :, None, :] | far_y[:, :, :, None])).flatten(1).sum(1)
    )
    assert (elsewhere[factors["bounce"]] == 0).all()
    assert (elsewhere[~factors["bounce"]] > 0).float().mean() > 0.9


def centres(video, factors):
    """Return the centre of mass of the figure, on a circle, and its mask."""
    background = grounds(
        factors["ground"], factors["texture"], factors["grain"], video.shape[-1]
    )[:, :, None]
    mask = (video - background).square().sum(1).sqrt()
    circle = torch.exp(
        2j * math.pi * (torch.arange(video.shape[-1]) + 0.5) / video.shape[-1]
    )
    return torch.stack(
        [(mask.sum(2) * circle).sum(2), (mask.sum(3) * circle).sum(2)], 2
    ), mask


@pytest.mark.parametrize(
    "options", [{}, {"figures": "digits"}, {"size": 16, "frames": 32}, {"size": 64}]
)
def test_direction_speed_and_presence_can_be_measured_in_the_video(options):
    data = Motion("test", 150, **options)
    examples = data.take(torch.arange(150))
    centre, mask = centres(examples.signals["video"], examples.factors)
    early = math.ceil(0.2 * (data.frames - 1))
    late = math.floor(0.45 * (data.frames - 1))
    movement = (centre[:, late] / centre[:, early]).angle() / (2 * math.pi)
    assert torch.equal(
        (torch.atan2(-movement[:, 1], movement[:, 0]) / (math.pi / 4)).round().long()
        % 8,
        examples.labels,
    )
    speed = movement.norm(dim=1) / (late - early) * (data.frames - 1)
    assert torch.corrcoef(torch.stack([speed, examples.factors["speed"]]))[0, 1] > 0.9
    frame = torch.arange(data.frames)
    visible = (frame >= examples.factors["appears"][:, None]) & (
        frame < examples.factors["vanishes"][:, None]
    )
    assert torch.equal(mask.amax((2, 3)) > 0.3, visible)


@pytest.mark.parametrize(
    "options",
    [{"size": 128}, {"size": 128, "figures": "digits"}],
    ids=["shapes", "digits"],
)
def test_the_sense_of_rotation_can_be_measured_in_the_video(options):
    """A later frame turned back by the rotation equals the first."""
    data = Motion(frames=8, count=200, **options)
    factors = data.factors(torch.arange(200))
    kind = 2 if "figures" in options else 7
    turning = (factors["rotation"] != 0) & (factors["kind"] == kind)
    chosen = turning.nonzero().flatten()[:5]
    assert len(chosen) >= 3
    still = {name: values[chosen].clone() for name, values in factors.items()}
    still["positions"] = torch.full_like(still["positions"], 0.5)
    still["appears"][:] = 0
    still["vanishes"][:] = 8
    still["angle"][:] = 0
    masks = data.draw_masks(still)
    for k in range(len(chosen)):
        angle = -2 * math.pi * float(still["rotation"][k]) / 7
        back = still | {"angle": torch.full((len(chosen),), angle)}
        assert (data.draw_masks(back)[k, 1] - masks[k, 0]).abs().mean() < 1e-4
        assert (masks[k, 1] - masks[k, 0]).abs().mean() > 1e-3
    # a quarter turn to the left in each frame
    rotation = torch.full((len(chosen),), 1.75)
    quarter = data.draw_masks(still | {"rotation": rotation})[:, 1]
    torch.testing.assert_close(quarter, masks[:, 0].rot90(1, (1, 2)), atol=1e-3, rtol=0)


def test_the_larger_of_a_pair_is_in_front_and_gives_the_label():
    data = Motion(pair=True, count=400)
    examples = data.take(torch.arange(400))
    f = examples.factors
    masks = data.masks(torch.arange(400))
    video = examples.signals["video"]
    assert torch.equal(examples.labels, f["direction"][:, 0])
    assert masks.shape == (400, 2, 16, 32, 32)
    assert (f["scale"][:, 1] < f["scale"][:, 0].min()).all(), (
        "the second figure is always smaller"
    )
    assert (f["colour"][:, 0] != f["colour"][:, 1]).all()
    assert (f["colour"] != f["ground"][:, None]).all()
    overlap = (masks[:, 0] == 1) & (masks[:, 1] == 1)
    assert overlap.sum() > 1000
    front = torch.tensor(PALETTE)[f["colour"][:, 0]][:, None, None, None].expand(
        *overlap.shape, 3
    )
    torch.testing.assert_close(
        video.permute(0, 2, 3, 4, 1)[overlap], front[overlap], atol=1e-5, rtol=0
    )
    only = (masks[:, 0] == 0) & (masks[:, 1] == 1)
    behind = torch.tensor(PALETTE)[f["colour"][:, 1]][:, None, None, None].expand(
        *overlap.shape, 3
    )
    torch.testing.assert_close(
        video.permute(0, 2, 3, 4, 1)[only], behind[only], atol=1e-5, rtol=0
    )
    assert abs(torch.corrcoef(f["direction"].float().T)[0, 1]) < 0.15


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sample_does_not_depend_on_its_batch(options):
    data = Motion("validation", 100, **options)
    many = data.take(torch.arange(60))
    for indices in (torch.tensor([7]), torch.arange(59, 20, -5)):
        some = data.take(indices)
        assert torch.equal(some.signals["video"], many.signals["video"][indices])
        for name, values in many.factors.items():
            assert torch.equal(some.factors[name], values[indices])
        assert some.captions == tuple(many.captions[k] for k in indices.tolist())
    assert len(data.take(torch.tensor([], dtype=torch.int64))) == 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_data_set_follows_the_interface(options):
    data = Motion("test", 120, **options)
    examples = data.take(torch.arange(120))
    video = examples.signals["video"]
    assert video.dtype == torch.float32
    shape = (3, data.frames, data.size, data.size)
    assert video.shape[1:] == data.shapes["video"] == shape
    assert video.abs().max() <= 1
    assert video.isfinite().all()
    assert data.names == DIRECTIONS
    assert examples.labels.shape == (120,)
    assert examples.labels.dtype == torch.int64
    integers = {
        "kind",
        "colour",
        "ground",
        "texture",
        "direction",
        "appears",
        "vanishes",
        "handwriting",
    }
    for name, values in examples.factors.items():
        dtype = torch.int64 if name in integers else torch.float32
        assert values.dtype == (torch.bool if name == "bounce" else dtype), name
        if data.pair and name not in ("ground", "texture", "grain"):
            assert values.shape[:2] == (120, 2)
    assert torch.equal(video, data.draw(examples.factors))
    assert examples.captions == data.captions(examples.factors)
    if data.figures == "digits":
        assert torch.equal(
            digits("test").labels[examples.factors["handwriting"]],
            examples.factors["kind"],
        )
    assert all(
        caption.isascii() and len(caption) <= 64 for caption in examples.captions
    )


def test_splits_and_options_change_the_data():
    speeds = [Motion(split).factors(torch.arange(50))["speed"] for split in SPLITS]
    assert len(torch.cat(speeds).unique()) == 150
    fingerprints = {Motion("test", **options).fingerprint for options in OPTIONS}
    assert len(fingerprints | {Motion(**OPTIONS[0]).fingerprint}) == 6
    for split in ("train", "test"):
        data = Motion(split, 3000, figures="digits")
        handwriting = data.factors(torch.arange(3000))["handwriting"]
        assert handwriting.max() < len(digits(split).images)
        assert len(handwriting.unique()) > 0.9 * 360


@pytest.mark.parametrize("frames", [8, 16, 33])
def test_factors_are_uniform_independent_and_within_their_ranges(frames):
    f = Motion(frames=frames, pair=frames == 33).factors(torch.arange(12_000))
    if frames == 33:
        assert (torch.corrcoef(f["speed"].T)[0, 1]).abs() < 0.03
        f = {
            name: values[:, 0] if values.ndim > 1 and values.shape[1] == 2 else values
            for name, values in f.items()
        }
    known_names = {
        "kind": KINDS,
        "direction": DIRECTIONS,
        "ground": COLOURS,
        "colour": COLOURS,
        "texture": TEXTURES,
    }
    for name, known in known_names.items():
        share = f[name].bincount(minlength=len(known)) / 12_000
        assert len(share) == len(known)
        assert (share * len(known) - 1).abs().max() < 0.12, name
    assert (f["colour"] != f["ground"]).all()
    assert f["bounce"].float().mean().item() == pytest.approx(0.5, abs=0.02)
    late = f["appears"] > 0
    early = f["vanishes"] < frames
    assert not (late & early).any()
    assert late.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert early.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert f["appears"].max() <= 0.2 * (frames - 1)
    assert f["vanishes"].min() - 1 >= 0.8 * (frames - 1) - 1e-6
    turning = f["rotation"][f["rotation"] != 0]
    assert len(turning) / 12_000 == pytest.approx(0.5, abs=0.02)
    assert (turning > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert turning.abs().min() >= _RANGES["rotation"][0]
    assert turning.abs().max() <= _RANGES["rotation"][1]
    names = (
        "kind",
        "colour",
        "direction",
        "speed",
        "bounce",
        "rotation",
        "scale",
        "appears",
        "texture",
    )
    related = torch.corrcoef(
        torch.stack([f[name].float() for name in names])
    ) - torch.eye(len(names))
    assert related.abs().max() < 0.05
    straight = f["positions"][~f["bounce"], 0]
    assert (straight.mean(0) - 0.5).abs().max() < 0.02
    assert (straight.var(0) - 1 / 12).abs().max() < 0.003


def test_only_bouncing_figures_meet_a_wall_about_half_way():
    f = Motion(frames=61).factors(torch.arange(4000))
    step = f["positions"].diff(dim=1)
    expected = (f["speed"][:, None] * headings(f["direction"]) / 60)[:, None]
    # larger steps wrap around
    turned = ((step - expected).abs() > 1e-3).any(2) & (
        (step - expected).abs() < 0.5
    ).all(2)
    first = torch.where(turned.any(1), turned.int().argmax(1), 60) / 60
    bounce = f["bounce"]
    assert not turned[~bounce].any()
    assert first[bounce].min() >= 0.45 - 1 / 60
    assert first[bounce].max() <= 0.6 + 1e-6
    assert (
        f["positions"][bounce] >= _WALL * f["scale"][bounce, None, None] - 1e-5
    ).all()
    assert (
        f["positions"][bounce] <= 1 - _WALL * f["scale"][bounce, None, None] + 1e-5
    ).all()
    before = f["speed"][bounce] * (first[bounce] - f["appears"][bounce] / 60)
    assert before.min() > 0.11, "an eighth of the width, less one frame"


def test_captions_describe_visible_factors():
    data = Motion(frames=16)
    rows = list(
        product(
            range(8),
            (0, 4, 7),
            range(8),
            (0.6, 0.75, 0.9),
            (True, False),
            (0.0, 0.3),
            ((0, 16), (2, 16), (0, 14)),
        )
    )
    kind, colour, direction, speed, bounce, rotation, when = zip(*rows, strict=True)
    captions = data.captions(
        {
            "kind": torch.tensor(kind),
            "colour": torch.tensor(colour),
            "direction": torch.tensor(direction),
            "speed": torch.tensor(speed),
            "bounce": torch.tensor(bounce),
            "rotation": torch.tensor(rotation),
            "appears": torch.tensor([a for a, _ in when]),
            "vanishes": torch.tensor([v for _, v in when]),
        }
    )
    round_kinds = [KINDS[k] for k in (0, 1)]
    visible = {
        (row[:5], row[5] if KINDS[row[0]] not in round_kinds else 0, row[6])
        for row in rows
    }
    assert len(set(captions)) == len(visible)
    assert max(map(len, captions)) <= 64
    caption_of = dict(zip(rows, captions, strict=True))
    assert (
        caption_of[4, 0, 3, 0.9, False, 0.3, (0, 16)]
        == "a red star moves up left, fast, turning"
    )
    assert (
        caption_of[3, 7, 6, 0.6, True, 0.0, (2, 16)]
        == "a black triangle bounces down, slow, appears"
    )
    assert (
        caption_of[0, 4, 0, 0.75, True, 0.3, (0, 14)]
        == "a purple disc bounces right, vanishes"
    )
    of_digits = Motion(figures="digits").take(torch.arange(20))
    for caption, kind, colour in zip(
        of_digits.captions,
        of_digits.factors["kind"],
        of_digits.factors["colour"],
        strict=True,
    ):
        assert caption.startswith(f"a {COLOURS[colour]} {kind} ")


def test_the_longest_captions_have_64_characters():
    longest = {
        "kind": [7, 7],
        "colour": [3, 4],
        "direction": [7, 7],
        "speed": 0.9,
        "bounce": True,
        "rotation": 0.3,
        "appears": 0,
        "vanishes": 14,
    }
    pair = {
        name: torch.tensor([value if isinstance(value, list) else [value] * 2])
        for name, value in longest.items()
    }
    (of_pair,) = Motion(pair=True).captions(pair)
    assert of_pair == "a yellow crescent moves down right, a purple crescent down right"
    assert len(of_pair) == 64
    (of_single,) = Motion().captions(
        {name: values[:, 0] for name, values in pair.items()}
    )
    assert of_single == "a yellow crescent bounces down right, fast, turning, vanishes"
    assert len(of_single) <= 64


@pytest.mark.parametrize(
    "change, words",
    [
        ({"size": 30}, "size is 30, expected a multiple of 8"),
        ({"frames": 7}, "frames is 7, expected 8 to 64"),
        ({"frames": 65}, "frames is 65"),
        (
            {"figures": "digit"},
            "unknown kind of figures 'digit'.*Did you mean 'digits'",
        ),
        ({"split": "trian"}, "Did you mean 'train'"),
        ({"count": -1}, "count is -1"),
    ],
)
def test_invalid_options_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Motion(**change)


def test_missing_indices_are_refused():
    with pytest.raises(IndexError, match="of 10"):
        Motion(count=10).take(torch.tensor([10]))


def test_wrapping_can_differ_by_sample():
    masks = figure_masks(
        0, 0.4, torch.tensor([0.0, 0.0]), 0.5, wrap=torch.tensor([True, False])
    )
    assert masks[0, :, -1].sum() > 5
    assert masks[1, :, -1].sum() == 0
    assert torch.equal(masks[0, :, :16], masks[1, :, :16])
