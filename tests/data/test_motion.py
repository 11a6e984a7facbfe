"""Motion equals a simulation, and its factors are those measured in the videos."""

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


def stepped(start, heading, speed, low, high, bounce, frames, fine=400):
    """A ball in small steps that turns at a wall or enters at the other side."""
    place = np.array(start, dtype=float)
    step = np.array(heading) * speed / (frames - 1) / fine
    way = [place.copy()]
    for _ in range(frames - 1):
        for _ in range(fine):
            place = place + step
            if bounce:
                over = (place > high) | (place < low)
                place = np.where(
                    place > high,
                    2 * high - place,
                    np.where(place < low, 2 * low - place, place),
                )
                step = np.where(over, -step, step)
            else:
                place = place % 1
        way.append(place.copy())
    return np.array(way)


@pytest.mark.parametrize("direction, bounce", list(product(range(8), (True, False))))
def test_paths_are_those_of_a_ball(direction, bounce):
    scale = 0.35
    start = (0.5, 0.37)
    words = np.sum([WORDS[word] for word in DIRECTIONS[direction].split()], 0)
    way = paths(
        torch.tensor([start]),
        torch.tensor([direction]),
        torch.tensor([1.9]),
        torch.tensor([bounce]),
        torch.tensor([scale]),
        11,
    )
    ball = stepped(
        start,
        words / np.hypot(*words),
        1.9,
        _WALL * scale,
        1 - _WALL * scale,
        bounce,
        11,
    )
    apart = abs(way[0].numpy() - ball)
    assert np.minimum(apart, 1 - apart * (not bounce)).max() < 1e-4


def test_directions_are_named_anticlockwise_from_the_right():
    vectors = headings(torch.arange(8))
    assert torch.allclose(
        torch.atan2(-vectors[:, 1], vectors[:, 0]) % (2 * math.pi),
        math.pi / 4 * torch.arange(8),
        atol=1e-6,
    )
    assert torch.allclose(vectors.norm(dim=1), torch.ones(8))
    for name, vector in zip(DIRECTIONS, vectors, strict=True):
        assert (
            vector.sign().round().tolist()
            == np.sum([WORDS[word] for word in name.split()], 0).tolist()
        )


@settings(max_examples=20, deadline=None)
@given(
    direction=st.integers(0, 7),
    speed=st.floats(0, 20),
    scale=st.floats(0.05, 0.8),
    bounce=st.booleans(),
    frames=st.integers(2, 70),
)
def test_paths_never_leave(direction, speed, scale, bounce, frames):
    way = paths(
        torch.tensor([[0.5, 0.5]]),
        torch.tensor([direction]),
        torch.tensor([speed]),
        torch.tensor([bounce]),
        torch.tensor([scale]),
        frames,
    )
    low = _WALL * scale if bounce else 0
    assert way.shape == (1, frames, 2)
    assert (way >= low - 1e-5).all()
    assert (way <= 1 - low + 1e-5).all()


@pytest.mark.parametrize(
    "angle, x, y", [(0.0, 0.5, 0.5), (0.7, 0.45, 0.6), (-2.0, 0.55, 0.5)]
)
def test_digits_are_read_by_linear_interpolation(angle, x, y):
    chosen = torch.tensor([5, 77])
    one = torch.ones(2)
    masks = digit_masks(
        "test", chosen, 0.4 * one, x * one, y * one, angle * one, 0 * one, size=32
    )
    place = (np.arange(32) + 0.5) / 32
    across, down = np.meshgrid(place - x, place - y)
    # in cells of the digit, from its centre of mass, up
    turned = (across - 1j * down) * np.exp(-1j * angle) / (1.5 * 0.4) * 8
    for mask, image in zip(
        masks, digits("test").images[chosen, 0].numpy(), strict=True
    ):
        ink = np.pad((image + 1) / 2, 1)
        rows, columns = np.mgrid[:10, :10]
        centre = (ink * rows).sum() / ink.sum(), (ink * columns).sum() / ink.sum()
        read = map_coordinates(
            ink, [centre[0] - turned.imag, centre[1] + turned.real], order=1
        )
        np.testing.assert_allclose(mask, np.clip(2 * read - 0.7, 0, 1), atol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_digits_have_their_given_centre_and_angle(split):
    known = digits(split)
    half = torch.full((len(known),), 0.5)
    masks = digit_masks(
        split,
        torch.arange(len(known)),
        0.8 * half,
        half,
        half,
        0 * half,
        0 * half,
        size=32,
    )
    place = (torch.arange(32) + 0.5) / 32
    off = (
        torch.stack([masks.sum(1) @ place, masks.sum(2) @ place]) / masks.sum((1, 2))
        - 0.5
    )
    assert 32 * off.abs().median() < 0.2
    assert 32 * off.abs().max() < 1.5, "in pixels"
    assert masks.amax((1, 2)).min() > 0.9
    assert masks.sum((1, 2)).min() > 40


def test_each_frame_is_an_image_of_shapes():
    data = Motion(size=24, frames=10, count=64)
    examples = data.take(torch.arange(64))
    film = examples.signals["video"]
    f = examples.factors
    for frame in range(10):
        turned = f["angle"] + 2 * math.pi * f["rotation"] * frame / 9
        x, y = f["positions"][:, frame].unbind(1)
        alone = draw_figures(
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
        alone[gone] = grounds(f["ground"], f["texture"], f["grain"], size=24)[gone]
        # nothing can reach a border
        near = (torch.stack([x, y]) - 0.5).abs().amax(0) < 0.5 - 0.8 * f["scale"]
        same = near | f["bounce"] | gone
        torch.testing.assert_close(film[same, :, frame], alone[same], atol=1e-4, rtol=0)
        assert same.sum() > 32


def test_only_figures_that_wrap_enter_at_the_opposite_side():
    data = Motion(count=300)
    factors = data.factors(torch.arange(300))
    masks = data.masks(torch.arange(300))
    place = (torch.arange(32) + 0.5) / 32
    # farther than any tip reaches
    far_x = (place - factors["positions"][..., :1]).abs() > 0.4
    far_y = (place - factors["positions"][..., 1:]).abs() > 0.4
    elsewhere = (
        (masks * (far_x[:, :, None, :] | far_y[:, :, :, None])).flatten(1).sum(1)
    )
    assert (elsewhere[factors["bounce"]] == 0).all()
    assert (elsewhere[~factors["bounce"]] > 0).float().mean() > 0.9


def centres(film, factors):
    """Centre of mass of what differs from the background, on a circle, and its size."""
    below = grounds(
        factors["ground"], factors["texture"], factors["grain"], film.shape[-1]
    )[:, :, None]
    share = (film - below).square().sum(1).sqrt()
    circle = torch.exp(
        2j * math.pi * (torch.arange(film.shape[-1]) + 0.5) / film.shape[-1]
    )
    return torch.stack(
        [(share.sum(2) * circle).sum(2), (share.sum(3) * circle).sum(2)], 2
    ), share


@pytest.mark.parametrize(
    "options", [{}, {"figures": "digits"}, {"size": 16, "frames": 32}, {"size": 64}]
)
def test_direction_speed_and_presence_can_be_measured_in_the_video(options):
    data = Motion("test", 150, **options)
    examples = data.take(torch.arange(150))
    where, share = centres(examples.signals["video"], examples.factors)
    early = math.ceil(0.2 * (data.frames - 1))
    late = math.floor(0.45 * (data.frames - 1))
    moved = (where[:, late] / where[:, early]).angle() / (2 * math.pi)
    assert torch.equal(
        (torch.atan2(-moved[:, 1], moved[:, 0]) / (math.pi / 4)).round().long() % 8,
        examples.labels,
    )
    speed = moved.norm(dim=1) / (late - early) * (data.frames - 1)
    assert torch.corrcoef(torch.stack([speed, examples.factors["speed"]]))[0, 1] > 0.9
    frame = torch.arange(data.frames)
    seen = (frame >= examples.factors["appears"][:, None]) & (
        frame < examples.factors["vanishes"][:, None]
    )
    assert torch.equal(share.amax((2, 3)) > 0.3, seen)


@pytest.mark.parametrize(
    "options",
    [{"size": 128}, {"size": 128, "figures": "digits"}],
    ids=["shapes", "digits"],
)
def test_the_sense_of_rotation_can_be_measured_in_the_video(options):
    """The angle by which a later frame has to be turned back to fit the first."""
    data = Motion(frames=8, count=200, **options)
    factors = data.factors(torch.arange(200))
    chosen = (
        (
            (factors["rotation"] != 0)
            & (factors["kind"] == (7 if "figures" not in options else 2))
        )
        .nonzero()
        .flatten()[:5]
    )
    assert len(chosen) >= 3
    still = {name: values[chosen].clone() for name, values in factors.items()}
    still["positions"] = torch.full_like(still["positions"], 0.5)
    still["appears"][:], still["vanishes"][:], still["angle"][:] = 0, 8, 0
    masks = data.draw_masks(still)
    for k in range(len(chosen)):
        back = still | {
            "angle": torch.full(
                (len(chosen),), -2 * math.pi * float(still["rotation"][k]) / 7
            )
        }
        assert (data.draw_masks(back)[k, 1] - masks[k, 0]).abs().mean() < 1e-4
        assert (masks[k, 1] - masks[k, 0]).abs().mean() > 1e-3
    # a quarter to the left a frame
    quarter = data.draw_masks(still | {"rotation": torch.full((len(chosen),), 1.75)})[
        :, 1
    ]
    torch.testing.assert_close(quarter, masks[:, 0].rot90(1, (1, 2)), atol=1e-3, rtol=0)


def test_the_larger_of_a_pair_is_in_front_and_gives_the_label():
    data = Motion(pair=True, count=400)
    examples = data.take(torch.arange(400))
    f = examples.factors
    masks = data.masks(torch.arange(400))
    film = examples.signals["video"]
    assert torch.equal(examples.labels, f["direction"][:, 0])
    assert masks.shape == (
        400,
        2,
        16,
        32,
        32,
    )
    assert (f["scale"][:, 1] < f["scale"][:, 0].min()).all(), (
        "the larger can always be told"
    )
    assert (f["colour"][:, 0] != f["colour"][:, 1]).all()
    assert (f["colour"] != f["ground"][:, None]).all()
    both = (masks[:, 0] == 1) & (masks[:, 1] == 1)
    assert both.sum() > 1000
    front = torch.tensor(PALETTE)[f["colour"][:, 0]][:, None, None, None].expand(
        *both.shape, 3
    )
    torch.testing.assert_close(
        film.permute(0, 2, 3, 4, 1)[both], front[both], atol=1e-5, rtol=0
    )
    only = (masks[:, 0] == 0) & (masks[:, 1] == 1)
    behind = torch.tensor(PALETTE)[f["colour"][:, 1]][:, None, None, None].expand(
        *both.shape, 3
    )
    torch.testing.assert_close(
        film.permute(0, 2, 3, 4, 1)[only], behind[only], atol=1e-5, rtol=0
    )
    assert abs(torch.corrcoef(f["direction"].float().T)[0, 1]) < 0.15


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sample_does_not_depend_on_its_batch(options):
    data = Motion("validation", 100, **options)
    many = data.take(torch.arange(60))
    for indices in (torch.tensor([7]), torch.arange(59, 20, -5)):
        some = data.take(indices)
        assert torch.equal(some.signals["video"], many.signals["video"][indices])
        assert all(
            torch.equal(some.factors[name], values[indices])
            for name, values in many.factors.items()
        )
        assert some.captions == tuple(many.captions[k] for k in indices.tolist())
    assert len(data.take(torch.tensor([], dtype=torch.int64))) == 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_data_set_follows_the_interface(options):
    data = Motion("test", 120, **options)
    examples = data.take(torch.arange(120))
    film = examples.signals["video"]
    assert film.dtype == torch.float32
    assert (
        film.shape[1:]
        == data.shapes["video"]
        == (
            3,
            data.frames,
            data.size,
            data.size,
        )
    )
    assert film.abs().max() <= 1
    assert film.isfinite().all()
    assert data.names == DIRECTIONS
    assert examples.labels.shape == (120,)
    assert examples.labels.dtype == torch.int64
    whole = {
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
        assert values.dtype == (
            torch.int64
            if name in whole
            else torch.bool
            if name == "bounce"
            else torch.float32
        ), name
        assert (
            values.shape[:2] == (120, 2)
            or not data.pair
            or name in ("ground", "texture", "grain")
        )
    assert torch.equal(film, data.draw(examples.factors))
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
    assert (
        len(
            {Motion("test", **options).fingerprint for options in OPTIONS}
            | {Motion(**OPTIONS[0]).fingerprint}
        )
        == 6
    )
    written = {split: digits(split).images for split in ("train", "test")}
    film = {
        split: Motion(split, 3000, figures="digits").factors(torch.arange(3000))[
            "handwriting"
        ]
        for split in written
    }
    assert all(
        film[split].max() < len(written[split])
        and len(film[split].unique()) > 0.9 * 360
        for split in written
    )


@pytest.mark.parametrize("frames", [8, 16, 33])
def test_factors_are_uniform_independent_and_in_time(frames):
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


def test_only_bouncing_figures_meet_a_wall_and_in_time():
    f = Motion(frames=61).factors(torch.arange(4000))
    step = f["positions"].diff(dim=1)
    expected = (f["speed"][:, None] * headings(f["direction"]) / 60)[:, None]
    # larger: to the other side
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
    assert before.min() > 0.11, "an eighth of the picture, less a frame"


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
    seen = {
        (row[:5], row[5] if KINDS[row[0]] not in round_kinds else 0, row[6])
        for row in rows
    }
    assert len(set(captions)) == len(seen)
    assert max(map(len, captions)) <= 64
    told = dict(zip(rows, captions, strict=True))
    assert (
        told[4, 0, 3, 0.9, False, 0.3, (0, 16)]
        == "a red star moves up left, fast, turning"
    )
    assert (
        told[3, 7, 6, 0.6, True, 0.0, (2, 16)]
        == "a black triangle bounces down, slow, appears"
    )
    assert (
        told[0, 4, 0, 0.75, True, 0.3, (0, 14)]
        == "a purple disc bounces right, vanishes"
    )
    written = Motion(figures="digits").take(torch.arange(20))
    for caption, kind, colour in zip(
        written.captions,
        written.factors["kind"],
        written.factors["colour"],
        strict=True,
    ):
        assert caption.startswith(f"a {COLOURS[colour]} {kind} ")


def test_the_longest_captions():
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
    (two,) = Motion(pair=True).captions(pair)
    assert two == "a yellow crescent moves down right, a purple crescent down right"
    assert len(two) == 64
    (one,) = Motion().captions({name: values[:, 0] for name, values in pair.items()})
    assert one == "a yellow crescent bounces down right, fast, turning, vanishes"
    assert len(one) <= 64


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
