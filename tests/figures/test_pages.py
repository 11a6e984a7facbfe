"""Pages of samples: what is drawn is what was given, in place and in colour."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image

from selfflow.figures.pages import (
    draw_captioned,
    draw_level_map,
    draw_rows,
    draw_sheet,
    draw_video_strip,
    sheet_rows,
    to_webp,
)
from selfflow.figures.plots import to_png


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def frames_of(data):
    with Image.open(io.BytesIO(data)) as opened:
        shown = []
        for index in range(opened.n_frames):
            opened.seek(index)
            shown.append(
                (np.asarray(opened.convert("RGB")), opened.info.get("duration"))
            )
    return shown


def pictures_in(figure):
    "What each axes with an image shows, as numbers in [0, 1]."
    arrays = [
        np.asarray(axis.get_images()[0].get_array())
        for axis in figure.axes
        if axis.get_images()
    ]
    return [array / 255 if array.dtype == np.uint8 else array for array in arrays]


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    frames=st.integers(2, 5),
    columns=st.integers(1, 6),
    scale=st.integers(1, 3),
)
def test_a_webp_holds_every_film_at_its_place(count, channels, frames, columns, scale):
    films = (
        torch.linspace(-1, 1, count * frames)
        .reshape(count, 1, frames, 1, 1)
        .expand(-1, channels, -1, 8, 16)
    )
    shown = frames_of(to_webp(films, fps=20, columns=columns, scale=scale))
    across = min(columns, count)
    down = -(-count // across)
    assert len(shown) == frames and shown[0][1] in (50, None)
    for frame, (canvas, _) in enumerate(shown):
        assert canvas.shape == (
            down * 8 * scale + 2 * (down - 1),
            across * 16 * scale + 2 * (across - 1),
            3,
        )
        for film in range(count):
            y, x = (
                (film // across) * (8 * scale + 2) + 4 * scale,
                (film % across) * (16 * scale + 2) + 8 * scale,
            )
            expected = (films[film, 0, frame, 0, 0].item() + 1) * 127.5
            assert abs(canvas[y, x].astype(float) - expected).max() < 12, (
                "lossy, but this"
            )
        if across * down > count:
            assert (canvas[-2, -2] > 245).all(), "where there is no film it is white"


def test_a_webp_begins_again_and_lasts_as_long_as_asked():
    data = to_webp(noise(2, 3, 6, 8, 8), fps=8)
    with Image.open(io.BytesIO(data)) as opened:
        assert (
            opened.format == "WEBP" and opened.is_animated and opened.info["loop"] == 0
        )
    assert {duration for _, duration in frames_of(data)} == {125}


def test_quality_and_scale_are_heard():
    films = noise(2, 3, 4, 16, 16)
    assert len(to_webp(films, quality=10)) < len(to_webp(films, quality=95))
    assert len(to_webp(films, scale=1)) < len(to_webp(films, scale=4))


def test_values_outside_are_cut_off_and_tensors_may_carry_gradient():
    wide = (3 * noise(1, 3, 2, 8, 8)).requires_grad_()
    assert to_webp(wide) == to_webp(wide.detach().clamp(-1, 1).numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 0}, "fps 0 "),
        ({"fps": float("nan")}, "fps nan"),
        ({"fps": 2000}, "fps 2000"),
        ({"columns": 0}, "columns 0"),
        ({"scale": 0}, "scale 0"),
        ({"quality": 101}, "101"),
        ({"scale": 1500, "columns": 12}, "ends at 16383"),
    ],
)
def test_a_webp_of_numbers_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        to_webp(noise(12, 1, 1, 1, 1), **change)


@pytest.mark.parametrize("function", [to_webp, draw_video_strip])
@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (2, 2, 4, 8, 8), (0, 3, 4, 8, 8), (2, 3, 0, 8, 8)]
)
def test_what_is_no_film_is_refused(function, shape):
    with pytest.raises(ValueError, match=r"expected \(n, 1 or 3, f, h, w\)"):
        function(torch.zeros(shape))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: to_webp(x[:, :, None]),
        lambda x: draw_video_strip(x[:, :, None]),
        lambda x: draw_captioned(x, None),
        lambda x: draw_level_map(x, torch.zeros(2, 1, 1)),
        lambda x: draw_level_map(
            torch.zeros_like(x), torch.zeros(2, 1, 1), {"seen": x}
        ),
    ],
)
def test_nan_is_refused(draw):
    pictures = torch.zeros(2, 3, 8, 8)
    pictures[1, 0, 2, 3:5] = float("nan")
    with pytest.raises(ValueError, match="2 values of the .* NaN"):
        draw(pictures)


@pytest.mark.parametrize(("count", "columns"), [(1, 6), (5, 2), (6, 3)])
def test_a_page_shows_each_picture_above_its_caption(count, columns):
    pictures, captions = (
        noise(count, 3, 8, 8),
        [f"a figure {k} of very many words for one line" for k in range(count)],
    )
    page = draw_captioned(pictures, captions, columns)
    for picture, axis, caption in zip(pictures, page.axes, captions, strict=False):
        shown = np.asarray(axis.get_images()[0].get_array())
        assert (
            np.abs(shown / 127.5 - 1 - picture.numpy().transpose(1, 2, 0)).max()
            <= 0.5 / 127.5 + 1e-6
        )
        assert (
            axis.get_xlabel().replace("\n", " ") == caption
            and "\n" in axis.get_xlabel()
        )
    assert len(pictures_in(page)) == count, "no picture in a place that is left over"
    assert page._repr_png_().startswith(b"\x89PNG")


def test_captions_lie_on_the_page_and_not_over_pictures():
    page = draw_captioned(noise(4, 3, 8, 8), ["many words " * 8] * 4, columns=2)
    page.draw_without_rendering()
    bounds = [
        (axis.get_images()[0].get_window_extent(), axis.xaxis.label.get_window_extent())
        for axis in page.axes
    ]
    for _, words in bounds:
        assert 0 <= words.x0 and words.x1 <= page.bbox.x1 and 0 <= words.y0
        assert not any(words.overlaps(picture) for picture, _ in bounds)


@pytest.mark.parametrize(
    ("frames", "asked", "chosen"),
    [(16, 8, [0, 2, 4, 6, 9, 11, 13, 15]), (3, 8, [0, 1, 2]), (5, 1, [0])],
)
def test_a_strip_shows_evenly_chosen_frames(frames, asked, chosen):
    films = noise(2, 3, frames, 4, 6)
    strip = draw_video_strip(films, ["one", "another"], asked)
    for film, shown in zip(films, pictures_in(strip), strict=True):
        assert shown.shape == (4, 7 * len(chosen) - 1, 3)
        for place, frame in enumerate(chosen):
            expected = (film[:, frame].permute(1, 2, 0).numpy() + 1) / 2
            assert (
                np.abs(shown[:, 7 * place : 7 * place + 6] - expected).max()
                < 0.5 / 255 + 1e-6
            )
    assert [
        int(label.get_text()) for label in strip.axes[-1].get_xticklabels()
    ] == chosen
    assert [axis.get_ylabel() for axis in strip.axes] == ["one", "another"]


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(8, 8, (4, 2)), (16, 8, (1, 8)), (4, 4, (4, 4))]
)
def test_a_level_map_colours_each_token_by_its_level(height, width, grid):
    pictures, levels = noise(3, 1, height, width), (noise(3, *grid, seed=1) + 1) / 2
    shown = pictures_in(draw_level_map(pictures, levels))
    viridis = colormaps["viridis"]
    for picture, level, image in zip(pictures[:, 0], levels, shown, strict=True):
        for y, x in np.ndindex(height, width):
            colour = np.array(
                viridis(level[y * grid[0] // height, x * grid[1] // width].item())[:3]
            )
            grey = np.round((picture[y, x].item() + 1) * 127.5) / 255
            np.testing.assert_allclose(
                image[y, x], 0.6 * colour + 0.4 * grey, atol=1 / 255
            )


def test_views_stand_below_by_name():
    pictures, other = noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1)
    figure = draw_level_map(
        pictures,
        torch.zeros(2, 2, 2),
        {"student sees": other, "teacher sees": pictures},
        ["first", "second"],
    )
    shown = pictures_in(figure)
    assert len(shown) == 6 and [axis.get_title() for axis in figure.axes[:2]] == [
        "first",
        "second",
    ]
    for image, expected in zip(shown[2:], [*other, *pictures], strict=True):
        assert (
            np.abs(image * 2 - 1 - expected.permute(1, 2, 0).numpy()).max() < 1.01 / 255
        )
    assert [figure.axes[2 * row].get_ylabel() for row in range(3)] == [
        "levels",
        "student sees",
        "teacher sees",
    ]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (torch.zeros(2, 3, 2), "do not fit pictures of 8 x 8"),
        (torch.zeros(3, 2, 2), "do not fit"),
        (torch.zeros(2, 4), "do not fit"),
        (torch.full((2, 2, 2), 1.5), "1.5, outside"),
        (torch.full((2, 2, 2), float("nan")), "outside"),
    ],
)
def test_levels_that_cannot_be_laid_over_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        draw_level_map(torch.zeros(2, 3, 8, 8), levels)


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (lambda texts: draw_captioned(torch.zeros(2, 3, 8, 8), texts), "captions"),
        (lambda texts: draw_video_strip(torch.zeros(2, 3, 4, 8, 8), texts), "titles"),
        (
            lambda texts: draw_level_map(
                torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 1), titles=texts
            ),
            "titles",
        ),
    ],
)
def test_another_number_of_texts_is_refused(draw, what):
    with pytest.raises(ValueError, match=f"3 {what} for 2 samples"):
        draw(["a", "b", "c"])


def test_a_strip_without_frames_is_refused():
    with pytest.raises(ValueError, match="frames is 0"):
        draw_video_strip(torch.zeros(1, 3, 4, 8, 8), frames=0)


def test_rows_that_are_compared_share_their_captions():
    rows = {"data": noise(3, 1, 4, 6), "a model": noise(3, 1, 4, 6, seed=1)}
    page = draw_rows(rows, ["first", "second", "third"])
    for image, expected in zip(
        pictures_in(page), [*rows["data"], *rows["a model"]], strict=True
    ):
        assert np.abs(image[..., 0] * 2 - 1 - expected[0].numpy()).max() < 1.01 / 255
    assert [axis.get_ylabel() for axis in page.axes] == [
        "data",
        "",
        "",
        "a model",
        "",
        "",
    ]
    assert [axis.get_xlabel() for axis in page.axes] == [
        "",
        "",
        "",
        "first",
        "second",
        "third",
    ]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ({}, "none"),
        ({"a": noise(2, 1, 4, 4), "b": noise(3, 1, 4, 4)}, r"a \(2, 1, 4, 4\), b"),
    ],
)
def test_rows_of_several_shapes_are_refused(rows, found):
    with pytest.raises(ValueError, match=f"one shape; these are {found}"):
        draw_rows(rows)


# a sheet of samples


def white(page) -> float:
    "The share of a sheet that is paper."
    pixels = np.asarray(Image.open(io.BytesIO(to_png(page))).convert("L"))
    return float((pixels > 250).mean())


@pytest.mark.parametrize(
    "shape, count, texts, size",
    [
        # six videos of eight frames: it was 1517 x 9107
        ((3, 32, 256), 6, ["fractal", "life", "test"], (823, 600)),
        ((1, 8, 8), 100, [str(i) for i in range(10)], (914, 920)),
        ((3, 64, 8), 20, ["tall"], (232, 264)),
        ((4, 16, 16), 10, [], (880, 88)),  # latents: the first channel
        ((3, 5, 3000), 2, ["a strip"], (1100, 12)),
        ((3, 512, 512), 4, ["large", "larger"], (590, 520)),
    ],
)
def test_a_sheet_is_as_large_as_its_pictures(shape, count, texts, size):
    texts = [text for text in texts for _ in range(count // len(texts))] or None
    page = draw_sheet(-torch.ones(count, *shape), texts)
    pixels = Image.open(io.BytesIO(to_png(page))).size
    assert all(abs(a - b) <= 40 for a, b in zip(pixels, size, strict=True)), pixels
    assert white(page) < 0.35 or shape[1] < 8, (
        "what is not a picture is a narrow margin"
    )


def test_a_sheet_has_a_row_for_each_text_and_shows_as_many_of_each():
    texts = ["b", "a", "b", "a", "b", "a"]
    assert sheet_rows(texts) == [[0, 2, 4], [1, 3, 5]] and sheet_rows(
        texts, most=4
    ) == [[0, 2], [1, 3]]
    assert sheet_rows([str(i) for i in range(200)], 100) == [[i] for i in range(100)]
    shown = [
        text.get_text()
        for text in draw_sheet(torch.zeros(6, 1, 8, 8), texts).axes[0].texts
    ]
    assert [text for text in shown if text] == ["b", "a"], "at the left of their rows"
    below = [
        text.get_text()
        for text in draw_sheet(torch.zeros(3, 3, 8, 8), ["$x$", "a red star", ""])
        .axes[0]
        .texts
    ]
    assert [text.replace("\n", " ") for text in below if text] == [
        "$x$",
        "a red star",
    ], "below, where each is there once"
    with pytest.raises(ValueError, match="2 texts for 3 samples"):
        draw_sheet(torch.zeros(3, 1, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="pictures have shape"):
        draw_sheet(torch.zeros(0, 1, 8, 8))
