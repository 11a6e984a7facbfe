"""Shapes cover the pixels of exact polygons, and images show the factors they are
drawn from.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path

from selfflow.data.datasets import SPLITS
from selfflow.data.shapes import (
    CATEGORIES,
    COLOURS,
    CONTRAST,
    KINDS,
    LARGE,
    PALETTE,
    PLACES,
    RANGES,
    SYMMETRY,
    TEXTURES,
    Emblems,
    Shapes,
    captions_of,
    cover,
    draw_figures,
    figure_masks,
    grounds,
)

INDEX = {name: k for k, name in enumerate(KINDS)}


def star(points, inner):
    "Return the corners of a star, its tips at radius 1 and the first one up."
    turns = np.arange(2 * points) * math.pi / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1)
    return np.stack([radii * np.sin(turns), radii * np.cos(turns)], 1)


def shoelace(corners):
    x, y = corners.T
    return abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2


CORNERS = {
    "square": star(4, math.sqrt(0.5)),
    "triangle": star(3, 0.5),
    "star": star(5, 0.45),
    "cross": np.array(
        [
            (1, 3),
            (1, 1),
            (3, 1),
            (3, -1),
            (1, -1),
            (1, -3),
            (-1, -3),
            (-1, -1),
            (-3, -1),
            (-3, 1),
            (-1, 1),
            (-1, 3),
        ]
    ),
}


def inside(kind, points):
    """Return True for each point (n, 2) inside a figure of this kind."""
    x, y = points.T
    if kind in CORNERS:
        return Path(CORNERS[kind]).contains_points(points)
    if kind == "disc":
        return x**2 + y**2 < 1
    if kind == "ring":
        return (x**2 + y**2 < 1) & (x**2 + y**2 > 0.55**2)
    # a square on its corner, with a disc around the middle of each upper side
    if kind == "heart":
        return (abs(x) + abs(y) < 1) | ((abs(x) - 0.5) ** 2 + (y - 0.5) ** 2 < 0.5)
    return (x**2 + y**2 < 1) & ((x - 0.8) ** 2 + y**2 > 1)  # a crescent


def coverage_by_counting(kind, scale, x, y, angle, size, fine=8):
    """Return the covered share of each pixel, counted at fine x fine points."""
    grid = np.stack(np.meshgrid(*[np.linspace(-3.3, 3.3, 1500)] * 2), -1).reshape(-1, 2)
    within = grid[inside(kind, grid)]
    area = len(within) * (6.6 / 1499) ** 2
    centre = within.mean(0)
    places = (np.arange(size * fine) + 0.5) / (size * fine)
    across, down = np.meshgrid(places - x, places - y)
    # in the coordinates of the figure
    unit = scale / 2 / math.sqrt(area / math.pi)
    turned = (across - 1j * down) * np.exp(-1j * angle) / unit
    points = np.stack([turned.real, turned.imag], -1).reshape(-1, 2) + centre
    return inside(kind, points).reshape(size, fine, size, fine).mean((1, 3))


@pytest.mark.parametrize("kind, angle", list(product(KINDS, (0.0, 0.7, 4.0))))
def test_a_mask_is_the_share_of_each_pixel_that_the_figure_covers(kind, angle):
    mask = (
        figure_masks(INDEX[kind], 0.5, 0.45, 0.55, angle, size=48)[0].double().numpy()
    )
    reference = coverage_by_counting(kind, 0.5, 0.45, 0.55, angle, 48)
    assert abs(mask - reference).max() < 0.35
    assert abs(mask - reference).mean() < 0.003
    assert ((mask > 0.5) != (reference > 0.5)).mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.2, 0.3, 0.5])
def test_all_kinds_have_the_area_of_the_disc_and_the_given_centre_of_mass(kind, scale):
    mask = figure_masks(INDEX[kind], scale, 0.48, 0.53, 1.0, size=128)[0].double()
    place = (torch.arange(128) + 0.5).double() / 128
    assert mask.mean().item() == pytest.approx(math.pi / 4 * scale**2, rel=0.02)
    assert (mask.sum(0) @ place / mask.sum()).item() == pytest.approx(0.48, abs=1e-3)
    assert (mask.sum(1) @ place / mask.sum()).item() == pytest.approx(0.53, abs=1e-3)


@pytest.mark.parametrize("corners", CORNERS.values(), ids=CORNERS)
def test_polygons_have_the_area_of_the_shoelace_formula(corners):
    "The farthest point of a figure is the corner of a polygon of its area."
    kind = next(name for name in CORNERS if CORNERS[name] is corners)
    # at scale 0.4
    reach = np.hypot(*corners.T).max() * math.sqrt(math.pi / shoelace(corners)) * 0.2
    mask = figure_masks(INDEX[kind], 0.4, size=128)[0]
    place = (torch.arange(128) + 0.5) / 128 - 0.5
    farthest = ((place[:, None] ** 2 + place**2).sqrt() * (mask > 0.2)).max().item()
    assert farthest == pytest.approx(reach, abs=1.5 / 128)


@pytest.mark.parametrize("kind", [k for k in KINDS if SYMMETRY[INDEX[k]]])
def test_rotation_is_anticlockwise_and_visible_except_by_a_symmetry(kind):
    order = SYMMETRY[INDEX[kind]]
    k = INDEX[kind]
    upright = figure_masks(k, 0.5, size=64)[0]
    assert (
        figure_masks(k, 0.5, angle=2 * math.pi / order, size=64)[0] - upright
    ).abs().max() < 1e-3
    assert (
        figure_masks(k, 0.5, angle=math.pi / order, size=64)[0] - upright
    ).abs().max() > 0.9
    quarter = figure_masks(k, 0.5, angle=math.pi / 2, size=64)[0]
    # rot90 turns an image anticlockwise
    torch.testing.assert_close(quarter, upright.rot90(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [k for k in KINDS if not SYMMETRY[INDEX[k]]])
def test_round_kinds_look_the_same_when_rotated(kind):
    turned = figure_masks(INDEX[kind], 0.5, angle=torch.arange(6.0), size=32)
    assert (turned - turned[0]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_figures_wrap_around_the_border(kind):
    centred = figure_masks(INDEX[kind], 0.4, 0.5, 0.5, 0.3, size=32)[0]
    moved = figure_masks(
        INDEX[kind],
        0.4,
        torch.tensor([0.5 + 13 / 32, 1.5]),
        torch.tensor([0.5 - 10 / 32, 0.5]),
        0.3,
        wrap=True,
    )
    torch.testing.assert_close(
        moved[0], centred.roll((-10, 13), (0, 1)), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(moved[1], centred, atol=1e-4, rtol=0)
    assert figure_masks(INDEX[kind], 0.4, 1.5, 0.5).sum() == 0


def test_kinds_differ_at_every_rotation():
    "Two kinds overlap by less than 93 % at every rotation."
    angles = torch.arange(0, 2 * math.pi, 0.1)
    turned = [figure_masks(k, 0.4, angle=angles, size=32) for k in range(len(KINDS))]
    for a, b in product(range(len(KINDS)), repeat=2):
        if a < b:
            overlap = torch.minimum(turned[a][:, None], turned[b][:1]).sum(
                (2, 3)
            ) / turned[b][:1].sum((1, 2))
            assert overlap.max() < 0.93, (KINDS[a], KINDS[b])


def painted_by_loops(mask, colour, background):
    "Return an image painted pixel by pixel."
    image = np.empty((3, *mask.shape))
    for c, row, column in np.ndindex(image.shape):
        share = mask[row, column]
        behind = background[c, row, column]
        image[c, row, column] = PALETTE[colour][c] * share + behind * (1 - share)
    return image


def test_an_image_is_its_background_covered_by_its_figure():
    factors = {
        "kind": torch.tensor([4, 1]),
        "scale": torch.tensor([0.3, 0.5]),
        "x": torch.tensor([0.4, 0.6]),
        "angle": 1.0,
    }
    images = draw_figures(
        colour=torch.tensor([0, 5]),
        ground=7,
        texture=torch.tensor([1, 4]),
        grain=0.2,
        size=16,
        **factors,
    )
    masks = figure_masks(**factors, size=16)
    background = grounds(7, torch.tensor([1, 4]), 0.2, size=16)
    for k, colour in enumerate((0, 5)):
        torch.testing.assert_close(
            images[k].double(),
            torch.tensor(
                painted_by_loops(masks[k].numpy(), colour, background[k].numpy())
            ),
            atol=1e-6,
            rtol=0,
        )
    video = cover(
        background[:, :, None],
        torch.tensor([PALETTE[0], PALETTE[5]]),
        masks[:, None].expand(-1, 3, -1, -1),
    )
    assert video.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(video[:, :, 1], images)


@pytest.mark.parametrize("texture", range(len(TEXTURES)), ids=TEXTURES)
@pytest.mark.parametrize("size", [16, 32, 64, 104])
def test_a_texture_is_grey_within_its_contrast_and_plain_on_average(texture, size):
    grain = torch.rand(
        2000 if size == 16 else 50, 5, generator=torch.Generator().manual_seed(0)
    )
    light = grounds(2, texture, grain, size) - torch.tensor(PALETTE[2])[:, None, None]
    assert torch.allclose(light[:, 0], light[:, 1], atol=1e-6)
    assert light.abs().max() <= CONTRAST + 1e-6
    # 16 pixels are few for seven stripes
    least = (0.35 if size == 16 else 0.9) * CONTRAST
    assert (light.abs().amax((1, 2, 3)) > least).all() if texture else not light.any()
    if size == 16:
        assert light.mean(0).abs().max() < 5 * CONTRAST / 2000**0.5


def test_stripes_have_the_period_and_the_direction_of_their_grain():
    # 4 vertical and 6 horizontal stripes
    grain = torch.tensor([[0.1, 0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.5, 2 / 3, 0.0]])
    spectrum = torch.fft.rfft2(grounds(0, 1, grain, size=64)[:, 0]).abs()
    spectrum[:, 0, 0] = 0
    peaks = [divmod(int(k), 33) for k in spectrum.flatten(1).argmax(1)]
    assert [(min(row, 64 - row), column) for row, column in peaks] == [(0, 4), (6, 0)]


@pytest.mark.parametrize("data_set", [Shapes, Emblems])
def test_a_sample_does_not_depend_on_its_batch(data_set):
    data = data_set(size=32)
    many = data.take(torch.arange(300))
    for indices in (
        torch.tensor([7]),
        torch.arange(250, 300),
        torch.arange(299, -1, -7),
    ):
        some = data.take(indices)
        assert torch.equal(some.signals["image"], many.signals["image"][indices])
        for name, values in many.factors.items():
            assert torch.equal(some.factors[name], values[indices])
        assert some.captions == tuple(many.captions[k] for k in indices.tolist())
        assert torch.equal(data.masks(indices), data.masks(torch.arange(300))[indices])
    assert len(data.take(torch.tensor([], dtype=torch.int64))) == 0


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("data_set", [Shapes, Emblems])
def test_the_data_set_follows_the_interface(data_set, size):
    data = data_set("validation", 500, size)
    examples = data.take(torch.arange(500))
    image = examples.signals["image"]
    assert image.dtype == torch.float32
    assert image.shape[1:] == data.shapes["image"] == (3, size, size)
    assert image.abs().max() <= 1
    assert image.isfinite().all()
    assert data.names == KINDS
    assert torch.equal(examples.labels, examples.factors["kind"])
    assert examples.labels.dtype == torch.int64
    assert len(examples) == len(examples.captions) == 500
    for name, values in examples.factors.items():
        assert values.dtype == (torch.int64 if name in CATEGORIES else torch.float32)
    assert torch.equal(image, draw_figures(**examples.factors, size=size))
    assert examples.captions == captions_of(**examples.factors, ranges=data.ranges)
    assert data.masks(torch.arange(500)).shape == (500, size, size)


def test_splits_and_options_change_the_data():
    first = [Shapes(split).take(torch.arange(50)).factors["x"] for split in SPLITS]
    assert len(torch.cat(first).unique()) == 150
    fingerprints = {
        data_set(*options).fingerprint
        for options in (("train",), ("test",), ("train", 10), ("train", 10, 64))
        for data_set in (Shapes, Emblems)
    }
    assert len(fingerprints) == 8
    assert len(Shapes()) == 100_000
    assert len(Shapes("test")) == 1_000
    assert torch.equal(Shapes(size=64).factors(torch.arange(50))["x"], first[0]), (
        "the same samples at every size"
    )


@pytest.mark.parametrize("data_set, ranges", [(Shapes, RANGES), (Emblems, LARGE)])
def test_factors_are_uniform_in_their_ranges_and_independent(data_set, ranges):
    factors = data_set().factors(torch.arange(20_000))
    for name, known in CATEGORIES.items():
        share = factors[name].bincount(minlength=len(known)) / 20_000
        assert len(share) == len(known)
        assert (share * len(known) - 1).abs().max() < 0.1, name
    for name, (low, high) in ranges.items():
        assert factors[name].min() >= low
        assert factors[name].max() <= high + 1e-6
        assert torch.quantile(factors[name], 0.25).item() == pytest.approx(
            low + (high - low) / 4, abs=0.02 * (high - low)
        )
    assert (factors["colour"] != factors["ground"]).all()
    pairs = torch.zeros(8, 8).index_put(
        (factors["colour"], factors["ground"]), torch.ones(()), accumulate=True
    )
    assert (pairs[~torch.eye(8, dtype=torch.bool)] / 20_000 * 56 - 1).abs().max() < 0.25
    columns = [
        values.float()
        for name, values in factors.items()
        if name not in ("grain", "ground")
    ] + list(factors["grain"].T)
    assert (
        torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    ).abs().max() < 0.03


def test_figures_are_always_visible():
    colours = torch.tensor(PALETTE)
    distance = torch.cdist(colours, colours) + 9 * torch.eye(8)
    assert len(COLOURS) == len(PALETTE)
    assert distance.min() > 2 * CONTRAST * math.sqrt(3)
    areas = Shapes().masks(torch.arange(2000)).sum((1, 2))
    assert areas.min() > 0.8 * math.pi / 4 * (0.3 * 32) ** 2


def test_emblems_are_larger_and_captioned_by_their_own_thirds():
    shapes = Shapes().take(torch.arange(300))
    emblems = Emblems().take(torch.arange(300))
    covered = [
        data_set().masks(torch.arange(300)).mean() for data_set in (Shapes, Emblems)
    ]
    assert covered[1] > 2 * covered[0]
    assert emblems.factors["scale"].min() >= shapes.factors["scale"].max()
    for examples in (shapes, emblems):
        words = [caption.split(", ")[1] for caption in examples.captions]
        assert all(20 < words.count(place) < 50 for place in PLACES), (
            "each place covers a third of the range in both directions"
        )
        sizes = [caption.split()[1] for caption in examples.captions]
        assert 70 < sizes.count("small") < 130
        assert 70 < sizes.count("large") < 130
    left = [caption.endswith("left") for caption in emblems.captions]
    x = emblems.factors["x"]
    elsewhere = [not is_left for is_left in left]
    assert x[left].max() < x[elsewhere].min() + 1e-6


def test_captions_describe_the_coarse_factors():
    rows = list(
        product(
            range(8),
            range(8),
            range(8),
            range(5),
            (0.33, 0.4, 0.47),
            (0.3, 0.5, 0.7),
            (0.3, 0.5, 0.7),
        )
    )[::17]
    names = ("kind", "colour", "ground", "texture", "scale", "x", "y")
    captions = captions_of(
        **{
            name: torch.tensor(values)
            for name, values in zip(names, zip(*rows, strict=True), strict=True)
        }
    )
    assert len(set(captions)) == len(rows)
    for caption, (kind, colour, ground, texture, scale, x, y) in zip(
        captions, rows, strict=True
    ):
        assert caption.isascii()
        assert len(caption) <= 64
        beginning = {0.33: "a small ", 0.4: "a ", 0.47: "a large "}[scale]
        assert caption.startswith(f"{beginning}{COLOURS[colour]} {KINDS[kind]} on a ")
        words = [COLOURS[ground], *[TEXTURES[texture]][:texture], "ground"]
        assert (
            f" on a {' '.join(words)}, "
            f"{PLACES[3 * round(5 * y - 1.5) + round(5 * x - 1.5)]}" in caption
        )
    factors = {
        "kind": 4,
        "colour": 0,
        "ground": 2,
        "texture": 1,
        "scale": 0.3,
        "x": 0.1,
        "y": 0.2,
    }
    assert captions_of(
        **{k: torch.tensor([v]) for k, v in factors.items()}, angle=3
    ) == ("a small red star on a blue striped ground, upper left",)


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([16, 24, 40, 128]),
    count=st.integers(0, 3),
    texture=st.integers(0, 4),
    kind=st.integers(0, 7),
    x=st.floats(-2, 3),
    scale=st.floats(1e-3, 4),
    angle=st.floats(-50, 50),
)
def test_all_images_stay_in_range(size, count, texture, kind, x, scale, angle):
    grain = torch.rand(count, 5, generator=torch.Generator().manual_seed(count))
    images = draw_figures(
        kind,
        3,
        6,
        texture,
        scale,
        torch.full((count,), x),
        angle=angle,
        grain=grain,
        size=size,
    )
    assert images.shape == (count, 3, size, size)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert (images.abs() <= 1 + 1e-6).all()


GOOD = {"kind": 0, "colour": 0, "ground": 1}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": 8}, "kind is 8, expected an index from 0 to 7 into disc"),
        ({"kind": torch.tensor([0, -1])}, r"kind is \[0, -1\]"),
        ({"colour": 1.0}, "colour is 1.0, expected an index"),
        ({"ground": 99}, "ground is 99.*red, green"),
        ({"texture": 5}, "texture is 5, expected an index from 0 to 4"),
        ({"scale": 0}, "scale is 0, expected numbers above 0"),
        ({"scale": float("nan")}, "scale is nan"),
        (
            {"x": torch.tensor([0.1, math.inf])},
            r"x is \[0.1.*, inf\], expected finite numbers",
        ),
        ({"grain": math.nan}, "grain is nan"),
        ({"grain": torch.zeros(4)}, r"grain: five.*grain \(4,\)"),
        (
            {"x": torch.zeros(3), "y": torch.zeros(2)},
            r"one for each sample.*x \(3,\), y \(2,\)",
        ),
        ({"size": 20}, "size is 20, expected a multiple of 8"),
        ({"size": 8}, "size is 8"),
        ({"size": 256}, "size is 256"),
        ({"size": 32.5}, "size is 32.5"),
    ],
)
def test_invalid_factors_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        draw_figures(**GOOD | change)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"size": 20}, "size is 20"),
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"count": 0}, "at least one"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Shapes(**options)


def test_missing_indices_are_refused():
    with pytest.raises(IndexError, match="5 to 10 of 10"):
        Shapes(count=10).take(torch.tensor([5, 10]))
