"""Pages of samples draw every image, video, caption and level in its place and colour,
and refuse arrays and texts that do not fit.
"""

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

ONE_BYTE = 1.01 / 255


def noise(*shape, seed=0):
    """Values in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def frames_of(data):
    """The frames of a WebP file as arrays, with their durations."""
    frames = []
    with Image.open(io.BytesIO(data)) as opened:
        for index in range(opened.n_frames):
            opened.seek(index)
            pixels = np.asarray(opened.convert("RGB"))
            frames.append((pixels, opened.info.get("duration")))
    return frames


def images_in(figure):
    """The image of each axes that has one, as numbers in [0, 1]."""
    arrays = []
    for axis in figure.axes:
        if axis.get_images():
            array = np.asarray(axis.get_images()[0].get_array())
            arrays.append(array / 255 if array.dtype == np.uint8 else array)
    return arrays


def assert_shows(image, expected, tolerance=ONE_BYTE):
    """An image (h, w, 3) in [0, 1] shows a signal (c, h, w) in [-1, 1]."""
    expected = expected.expand(3, -1, -1).permute(1, 2, 0).numpy()
    assert np.abs(image * 2 - 1 - expected).max() < tolerance


def texts_of(axis):
    return [text.get_text() for text in axis.texts if text.get_text()]


# moving videos


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    frames=st.integers(2, 5),
    columns=st.integers(1, 6),
    scale=st.integers(1, 3),
)
def test_a_webp_has_every_video_in_its_place(count, channels, frames, columns, scale):
    # each frame of each video has a grey value of its own
    greys = torch.linspace(-1, 1, count * frames).reshape(count, 1, frames, 1, 1)
    videos = greys.expand(-1, channels, -1, 8, 16)
    canvases = frames_of(to_webp(videos, fps=20, columns=columns, scale=scale))
    across = min(columns, count)
    down = -(-count // across)
    height = 8 * scale + 2
    width = 16 * scale + 2
    assert len(canvases) == frames
    assert canvases[0][1] in (50, None)
    for frame, (canvas, _) in enumerate(canvases):
        assert canvas.shape == (down * height - 2, across * width - 2, 3)
        for video in range(count):
            y = (video // across) * height + 4 * scale
            x = (video % across) * width + 8 * scale
            expected = (greys[video, 0, frame].item() + 1) * 127.5
            lossy = 12
            assert abs(canvas[y, x].astype(float) - expected).max() < lossy
        if across * down > count:
            assert (canvas[-2, -2] > 245).all(), "an empty place is white"


def test_a_webp_loops_and_lasts_as_long_as_requested():
    data = to_webp(noise(2, 3, 6, 8, 8), fps=8)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == "WEBP"
        assert opened.is_animated
        assert opened.info["loop"] == 0
    assert {duration for _, duration in frames_of(data)} == {125}


def test_quality_and_scale_change_the_size_of_the_file():
    videos = noise(2, 3, 4, 16, 16)
    assert len(to_webp(videos, quality=10)) < len(to_webp(videos, quality=95))
    assert len(to_webp(videos, scale=1)) < len(to_webp(videos, scale=4))


def test_values_out_of_range_are_clipped_and_gradients_are_allowed():
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
        ({"scale": 1500, "columns": 12}, "WebP allows 16383"),
    ],
)
def test_a_webp_refuses_numbers_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        to_webp(noise(12, 1, 1, 1, 1), **change)


# shapes, NaN and texts


@pytest.mark.parametrize("function", [to_webp, draw_video_strip])
@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (2, 2, 4, 8, 8), (0, 3, 4, 8, 8), (2, 3, 0, 8, 8)]
)
def test_arrays_that_are_not_videos_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"expected \(n, 1 or 3, f, h, w\)"):
        function(torch.zeros(shape))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: to_webp(x[:, :, None]),
        lambda x: draw_video_strip(x[:, :, None]),
        lambda x: draw_captioned(x, None),
        lambda x: draw_level_map(x, torch.zeros(2, 1, 1)),
        lambda x: draw_level_map(torch.zeros_like(x), torch.zeros(2, 1, 1), {"a": x}),
    ],
)
def test_nan_is_refused(draw):
    images = torch.zeros(2, 3, 8, 8)
    images[1, 0, 2, 3:5] = float("nan")
    with pytest.raises(ValueError, match="2 values of the .* NaN"):
        draw(images)


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
def test_a_wrong_number_of_texts_is_refused(draw, what):
    with pytest.raises(ValueError, match=f"3 {what} for 2 samples"):
        draw(["a", "b", "c"])


# captions, strips, rows


@pytest.mark.parametrize(("count", "columns"), [(1, 6), (5, 2), (6, 3)])
def test_each_image_is_above_its_caption(count, columns):
    images = noise(count, 3, 8, 8)
    captions = [f"a figure {k} of very many words for one line" for k in range(count)]
    page = draw_captioned(images, captions, columns)
    drawn_images = images_in(page)
    assert len(drawn_images) == count, "unused places are empty"
    for pixels, image, axis, caption in zip(
        drawn_images, images, page.axes, captions, strict=False
    ):
        assert_shows(pixels, image)
        assert "\n" in axis.get_xlabel(), "a long caption is wrapped"
        assert axis.get_xlabel().replace("\n", " ") == caption
    assert page._repr_png_().startswith(b"\x89PNG")


def test_captions_are_on_the_page_and_do_not_cover_images():
    page = draw_captioned(noise(4, 3, 8, 8), ["many words " * 8] * 4, columns=2)
    page.draw_without_rendering()
    images = [axis.get_images()[0].get_window_extent() for axis in page.axes]
    for axis in page.axes:
        caption = axis.xaxis.label.get_window_extent()
        assert caption.x0 >= 0
        assert caption.x1 <= page.bbox.x1
        assert caption.y0 >= 0
        assert not any(caption.overlaps(image) for image in images)


@pytest.mark.parametrize(
    ("frames", "requested", "chosen"),
    [(16, 8, [0, 2, 4, 6, 9, 11, 13, 15]), (3, 8, [0, 1, 2]), (5, 1, [0])],
)
def test_a_strip_shows_evenly_spaced_frames(frames, requested, chosen):
    videos = noise(2, 3, frames, 4, 6)
    strip = draw_video_strip(videos, ["one", "another"], requested)
    for video, strip_image in zip(videos, images_in(strip), strict=True):
        assert strip_image.shape == (4, 7 * len(chosen) - 1, 3)
        for place, frame in enumerate(chosen):
            assert_shows(strip_image[:, 7 * place : 7 * place + 6], video[:, frame])
    ticks = strip.axes[-1].get_xticklabels()
    assert [int(tick.get_text()) for tick in ticks] == chosen
    assert [axis.get_ylabel() for axis in strip.axes] == ["one", "another"]


def test_a_strip_needs_a_frame():
    with pytest.raises(ValueError, match="frames is 0"):
        draw_video_strip(torch.zeros(1, 3, 4, 8, 8), frames=0)


def test_rows_share_their_captions():
    rows = {"data": noise(3, 1, 4, 6), "a model": noise(3, 1, 4, 6, seed=1)}
    page = draw_rows(rows, ["first", "second", "third"])
    signals = [*rows["data"], *rows["a model"]]
    for image, signal in zip(images_in(page), signals, strict=True):
        assert_shows(image, signal)
    names = [axis.get_ylabel() for axis in page.axes]
    assert names == ["data", "", "", "a model", "", ""]
    captions = [axis.get_xlabel() for axis in page.axes]
    assert captions == ["", "", "", "first", "second", "third"]


@pytest.mark.parametrize(
    ("rows", "shapes"),
    [
        ({}, "none"),
        ({"a": noise(2, 1, 4, 4), "b": noise(3, 1, 4, 4)}, r"a \(2, 1, 4, 4\), b"),
    ],
)
def test_rows_of_different_shapes_are_refused(rows, shapes):
    with pytest.raises(ValueError, match=f"one shape; these are {shapes}"):
        draw_rows(rows)


# noise levels over images


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(8, 8, (4, 2)), (16, 8, (1, 8)), (4, 4, (4, 4))]
)
def test_each_token_is_coloured_by_its_level(height, width, grid):
    images = noise(3, 1, height, width)
    levels = (noise(3, *grid, seed=1) + 1) / 2
    drawn_images = images_in(draw_level_map(images, levels))
    for image, level, pixels in zip(images[:, 0], levels, drawn_images, strict=True):
        for y, x in np.ndindex(height, width):
            token = level[y * grid[0] // height, x * grid[1] // width].item()
            colour = np.array(colormaps["viridis"](token)[:3])
            grey = np.round((image[y, x].item() + 1) * 127.5) / 255
            expected = 0.6 * colour + 0.4 * grey
            np.testing.assert_allclose(pixels[y, x], expected, atol=1 / 255)


def test_views_are_below_the_levels_with_their_names():
    images = noise(2, 3, 8, 8)
    student_view = noise(2, 3, 8, 8, seed=1)
    views = {"student sees": student_view, "teacher sees": images}
    titles = ["first", "second"]
    figure = draw_level_map(images, torch.zeros(2, 2, 2), views, titles)
    assert [axis.get_title() for axis in figure.axes[:2]] == titles
    drawn_images = images_in(figure)
    assert len(drawn_images) == 6
    for pixels, image in zip(drawn_images[2:], [*student_view, *images], strict=True):
        assert_shows(pixels, image)
    assert [axis.get_ylabel() for axis in figure.axes[:6:2]] == ["levels", *views]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (torch.zeros(2, 3, 2), "do not fit 2 images of 8 x 8"),
        (torch.zeros(3, 2, 2), "do not fit"),
        (torch.zeros(2, 4), "do not fit"),
        (torch.full((2, 2, 2), 1.5), "1.5, outside"),
        (torch.full((2, 2, 2), float("nan")), "outside"),
    ],
)
def test_levels_that_do_not_fit_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        draw_level_map(torch.zeros(2, 3, 8, 8), levels)


# a sheet of samples


def white_share(page) -> float:
    pixels = np.asarray(Image.open(io.BytesIO(to_png(page))).convert("L"))
    return float((pixels > 250).mean())


@pytest.mark.parametrize(
    ("shape", "count", "texts", "size"),
    [
        # six videos of eight frames each, side by side
        ((3, 32, 256), 6, ["fractal", "life", "test"], (823, 600)),
        ((1, 8, 8), 100, [str(i) for i in range(10)], (914, 920)),
        ((3, 64, 8), 20, ["tall"], (232, 264)),
        ((4, 16, 16), 10, [], (880, 88)),  # latents: the first channel
        ((3, 5, 3000), 2, ["a strip"], (1100, 12)),
        ((3, 512, 512), 4, ["large", "larger"], (590, 520)),
    ],
)
def test_a_sheet_fits_its_images(shape, count, texts, size):
    texts = [text for text in texts for _ in range(count // len(texts))] or None
    page = draw_sheet(-torch.ones(count, *shape), texts)
    pixels = Image.open(io.BytesIO(to_png(page))).size
    assert all(abs(a - b) <= 40 for a, b in zip(pixels, size, strict=True)), pixels
    assert white_share(page) < 0.35 or shape[1] < 8, "margins are narrow"


def test_a_sheet_groups_samples_by_text():
    texts = ["b", "a", "b", "a", "b", "a"]
    assert sheet_rows(texts) == [[0, 2, 4], [1, 3, 5]]
    assert sheet_rows(texts, most=4) == [[0, 2], [1, 3]]
    assert sheet_rows([str(i) for i in range(200)], 100) == [[i] for i in range(100)]
    page = draw_sheet(torch.zeros(6, 1, 8, 8), texts)
    assert texts_of(page.axes[0]) == ["b", "a"], "once, at the left of its row"


def test_a_sheet_writes_texts_that_occur_once_below_their_images():
    page = draw_sheet(torch.zeros(3, 3, 8, 8), ["$x$", "a red star", ""])
    texts = [text.replace("\n", " ") for text in texts_of(page.axes[0])]
    assert texts == ["$x$", "a red star"]


def test_a_sheet_refuses_missing_texts_and_no_images():
    with pytest.raises(ValueError, match="2 texts for 3 samples"):
        draw_sheet(torch.zeros(3, 1, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="images have shape"):
        draw_sheet(torch.zeros(0, 1, 8, 8))
