"""The map of samples and its static twin work without a browser."""

import base64
import io
import re
import wave

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from plotly.callbacks import BoxSelector, LassoSelector, Points

from selfflow.analysis.projection import Projection
from selfflow.figures.projection import (
    HUES,
    MAX_CATEGORIES,
    categories_of,
    draw_projection,
    draw_token_colours,
)
from selfflow.workbench.map_explorer import (
    MapExplorer,
    explore_map,
    figure_of,
    preview_html,
    previews_of,
)

COUNT = 40
PLANE = np.random.default_rng(0).normal(size=(COUNT, 2)).astype(np.float32)
KIND = torch.arange(COUNT) % 3
FACTORS = {
    "kind": KIND,
    "size": torch.linspace(0, 1, COUNT),
    "broken": torch.full((COUNT,), torch.nan),
}
EVIL = "<img src=x onerror=alert(1)>"


def a_map(**options) -> MapExplorer:
    pictures = torch.linspace(-1, 1, COUNT)[:, None, None, None].expand(COUNT, 3, 4, 4)
    names = {"kind": ("disc", EVIL, "star")}
    return explore_map(
        options.pop("points", PLANE),
        previews_of({"image": pictures}),
        FACTORS,
        names,
        [f"caption {place} {EVIL}" for place in range(COUNT)],
        **options,
    )


def test_categories_differ_in_colour_and_shape_and_numbers_are_not_categories():
    figure = draw_projection(
        {"one": PLANE, "two": 2 * PLANE},
        KIND,
        ("disc", "ring", "star"),
        "kind",
        chosen=[3, 4],
    )
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "disc",
        "ring",
        "star",
    ]
    groups = figure.axes[1].collections
    for kind, group in enumerate(groups[:3]):
        assert np.allclose(group.get_offsets(), 2 * PLANE[KIND == kind])
        assert to_hex(group.get_facecolor()[0]) == HUES[kind].lower()
    assert (
        len({group.get_paths()[0].vertices.tobytes() for group in groups[:3]}) == 3
    ), "three shapes"
    assert np.allclose(groups[3].get_offsets(), 2 * PLANE[[3, 4]])
    assert categories_of(FACTORS["size"]) is None
    assert categories_of(np.array(["b", "a", "b"]))[0].tolist() == [1, 0, 1]


def test_colours_of_tokens_keep_their_places():
    colours = np.random.default_rng(1).uniform(-1, 1, (2, 3, 2, 4)).astype(np.float32)
    figure = draw_token_colours(np.zeros((2, 1, 8, 8)), {"block 1": colours})
    arrays = [image.get_array() for axis in figure.axes for image in axis.images]
    pixels = np.concatenate([np.asarray(array).reshape(-1, 3) for array in arrays])
    for token in ((0, 0, 0), (1, 1, 3)):
        wanted = np.round(
            (colours[token[0], :, token[1], token[2]] + 1) * 127.5
        ).astype(np.uint8)
        # a token of 8 / 2 x 8 / 4 pixels
        assert (pixels == wanted).all(1).sum() == 4 * 2


def test_previews_are_the_samples():
    g = torch.Generator().manual_seed(0)
    videos = torch.rand(2, 1, 5, 8, 8, generator=g) * 2 - 1
    clips = torch.rand(2, 50, generator=g)
    (_, still), (kind, clip) = previews_of(
        {"video": videos, "audio": clips}, rate=4000
    )[1]
    picture = np.asarray(Image.open(io.BytesIO(still)))
    assert picture.shape == (96, 96, 3)
    assert (
        picture[::12, ::12, 0] == ((videos[1, 0, 2] + 1) * 127.5).round().numpy()
    ).all()
    with wave.open(io.BytesIO(clip)) as file:
        assert kind == "audio/wav"
        assert (file.getnframes(), file.getframerate()) == (
            50,
            4000,
        )
    html = preview_html([("audio/wav", clip)], 'a "ring" <b>')
    assert base64.b64decode(re.search('base64,([^"]+)', html)[1]) == clip
    assert "&quot;ring&quot; &lt;b&gt;" in html


def test_the_pointer_shows_the_sample_and_a_number_does_too():
    view = a_map()
    view.pointed(view.figure.data[0], Points(point_inds=[7]), None)
    preview = view.preview.value
    assert "caption 7" in preview
    assert "size 0.179" in preview
    assert view.sample.value == 7
    assert base64.b64encode(view.previews[7][0][1]).decode() in preview
    view.pointed(view.figure.data[0], Points(point_inds=[]), None)
    assert view.preview.value == preview, (
        "the last preview stays when nothing is under the pointer"
    )
    view.sample.value = 12
    assert "caption 12" in view.preview.value


def test_a_selection_gives_back_indices():
    view = a_map()
    view.choose(view.figure.data[0], Points(point_inds=[9, 2, 30]), LassoSelector())
    assert view.selected.tolist() == [2, 9, 30]
    assert view.chosen.value.count("<img") == 3
    assert "3 chosen" in view.chosen.value
    assert len(view.twin().axes[0].collections[-1].get_offsets()) == 3
    view.choose(
        view.figure.data[0], Points(point_inds=list(range(COUNT))), BoxSelector()
    )
    assert len(view.selected) == COUNT
    assert f"the first {view.SHOWN} shown" in view.chosen.value
    assert view.chosen.value.count("<img") == view.SHOWN
    view.choose(view.figure.data[0], Points(point_inds=[]), None)
    assert len(view.selected) == 0


def test_a_factor_gives_its_colours_or_an_error_message():
    view = a_map()
    before = view.figure.data[0].marker.color
    assert len(view.figure.data) == 4
    assert before[:3] == HUES[:3]
    view.colour.value = "size"
    assert len(view.figure.data) == 1
    assert np.allclose(view.figure.data[0].marker.color, FACTORS["size"])
    view.colour.value = "broken"
    assert 'role="alert"' in view.message.value
    assert "40 of 40 values are not finite" in view.message.value
    assert np.allclose(view.figure.data[0].marker.color, FACTORS["size"]), "as it was"
    assert view.twin().axes[-1].get_ylabel() == "size"
    view.colour.value = "kind"
    assert view.message.value == ""
    assert view.figure.data[0].marker.color == before
    assert len(view.figure.data) == 4
    view.choose(view.figure.data[0], Points(point_inds=[1]), BoxSelector())
    assert view.selected.tolist() == [1], (
        "points are still heard after colours have changed"
    )


def test_every_text_is_escaped():
    view = a_map(title=EVIL)
    view.choose(None, Points(point_inds=[1]), BoxSelector())
    for text in (
        view.preview.value,
        view.chosen.value,
        str(view.figure.data),
        str(view.figure.layout),
    ):
        assert EVIL not in text
    assert "&lt;img" in view.chosen.value
    assert "&lt;img" in view.figure.data[2].name
    assert "&lt;img" in view.figure.layout.title.text


def test_trustworthiness_is_stated():
    plane = Projection(PLANE, 0.9174, {"method": "UMAP", "neighbours": 5, "seed": 0})
    view = a_map(points=plane, title="mine")
    for title in (view.figure.layout.title.text, view.twin().axes[0].get_title()):
        assert (
            title.replace("\n", "; ")
            == "mine; UMAP, trustworthiness 0.917; distances mean nothing"
        )


def test_bad_input_is_refused():
    files = [[]] * COUNT
    for call, words in (
        (lambda: explore_map(PLANE[:9], files), "40 previews, but .*'points': 9"),
        (lambda: explore_map(PLANE[:0], []), "0 previews"),
        (lambda: explore_map(PLANE, files, {"kind": KIND[:5]}), "'factor kind': 5"),
        (
            lambda: explore_map(PLANE, files, {"kind": PLANE}),
            r"factor kind has shape \(40, 2\)",
        ),
        (
            lambda: explore_map(PLANE, files, {"kind": KIND}, {"sort": ("a",)}),
            "'sort', which is no factor",
        ),
        (
            lambda: explore_map(PLANE, files, {"kind": KIND}, {"kind": ("a",)}),
            "0 to 2 have no names among 1",
        ),
        (lambda: explore_map(PLANE * np.nan, files), "finite"),
        (lambda: figure_of(PLANE, KIND, texts=["a"]), "1 texts for 40 points"),
        (
            lambda: categories_of(torch.arange(MAX_CATEGORIES + 1)),
            "29 categories are more than the 28",
        ),
        (lambda: draw_projection({}, KIND), "no projection"),
        (lambda: draw_projection({"a": PLANE[:, :1]}, KIND), r"expected \(40, 2\)"),
        (
            lambda: draw_token_colours(
                np.zeros((1, 1, 8, 8)), {"a": np.zeros((1, 3, 3, 4))}
            ),
            "colours of a have",
        ),
        (lambda: previews_of({}), "no signals"),
        (
            lambda: previews_of({"a": torch.zeros(1, 3, 4, 4), "b": torch.zeros(2, 9)}),
            "different numbers of samples",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
