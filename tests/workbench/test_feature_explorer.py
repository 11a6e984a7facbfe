"""Features are laid out, stored and explored; bad input is refused. No browser."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from plotly.callbacks import LassoSelector, Points
from scipy.linalg import orthogonal_procrustes
from sklearn.metrics.pairwise import cosine_distances
from sklearn.preprocessing import StandardScaler

from selfflow.analysis.factors import known_factors
from selfflow.analysis.features import FeatureStore, Items, extract
from selfflow.analysis.projection import (
    _standardised,
    _turned,
    aligned,
    nearest,
    project,
    sharing,
)
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.method.options import ModelConfig
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.workbench import feature_explorer
from selfflow.workbench.feature_explorer import (
    FeatureMap,
    describe_near,
    explore_features,
    item_previews,
    viewable,
)
from selfflow.workbench.feature_maps import (
    AtlasBuilder,
    AtlasCost,
    AtlasOptions,
    draw_maps,
)

TRAINING = TrainConfig(
    steps=2,
    batch=8,
    shards=1,
    validate_every=2,
    validation=8,
    save_every=2,
    sample_every=0,
)
FEW = {"layers": (1, 3), "levels": (0.0, 0.5), "count": 40, "methods": ("PCA",)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = ModelConfig(width=16, depth=3, heads=2)
    config = Config(
        name="seen", data=DataConfig("shapes", size=16), model=model, training=TRAINING
    )
    return train(config, tmp_path_factory.mktemp("runs"), bar=False, device="cpu")


@pytest.fixture
def view(run):
    return explore_features(run, **FEW).wait(120)


# more than are compared at once
@pytest.mark.parametrize("shape", [(7, 2), (30, 5), (600, 16)])
def test_neighbours_are_those_of_the_cosine_of_standardised_features(shape):
    features = (
        np.random.default_rng(shape[0]).normal(size=shape)
        * np.geomspace(0.01, 100, shape[1])
        + 3
    )
    away = cosine_distances(StandardScaler().fit_transform(features)) + 9 * np.eye(
        len(features)
    )
    order, far = nearest(torch.tensor(features), 5)
    assert np.array_equal(order, np.argsort(away, 1, kind="stable")[:, :5])
    np.testing.assert_allclose(far, np.sort(away, 1)[:, :5], atol=1e-10)


def test_constant_channels_do_not_count():
    features = np.random.default_rng(0).normal(size=(9, 3))
    still = np.c_[features, np.full(9, 7.3)]
    assert (_standardised(still)[:, 3] == 0).all()
    assert np.array_equal(nearest(features, 4)[0], nearest(still, 4)[0])
    assert np.isfinite(nearest(np.zeros((4, 2)), 2)[1]).all()


def test_chance_is_that_of_all_pairs():
    generator = np.random.default_rng(1)
    kinds = generator.integers(0, 4, 25)
    angles = generator.uniform(0, 7, 25)
    near = nearest(generator.normal(size=(25, 3)), 6)[0]
    pairs = ~np.eye(25, dtype=bool)
    result = sharing(kinds, near, 3)
    same = kinds[:, None] == kinds[None]
    np.testing.assert_allclose(
        result[:4],
        (
            same[3, near[3]].mean(),
            same[3][pairs[3]].mean(),
            np.mean([same[i, near[i]].mean() for i in range(25)]),
            same[pairs].mean(),
        ),
    )
    # the shorter way round the circle
    around = np.abs(np.angle(np.exp(1j * (angles[:, None] - angles[None]))))
    result = sharing(angles, near, 3, 2 * math.pi)
    np.testing.assert_allclose(
        result[:4],
        (
            around[3, near[3]].mean(),
            around[3][pairs[3]].mean(),
            np.mean([around[i, near[i]].mean() for i in range(25)]),
            around[pairs].mean(),
        ),
    )
    assert sharing(kinds, near, 3).kinds
    assert not result.kinds


def test_planes_are_turned_as_procrustes_turns_them():
    generator = np.random.default_rng(2)
    planes = {
        (layer, level): generator.normal(size=(20, 2))
        for layer in (2, 5)
        for level in (0.0, 0.3)
    }
    turned = aligned(planes, (2, 5), (0.0, 0.3))
    onto = turned[2, 0.3] + turned[5, 0.0]
    rotation = orthogonal_procrustes(_turned(planes[5, 0.3]), onto)[0]
    np.testing.assert_allclose(
        turned[5, 0.3], _turned(planes[5, 0.3]) @ rotation, atol=1e-12
    )
    for place, plane in planes.items():  # neighbours within a plane are what they were
        apart = [
            np.linalg.norm(points[:, None] - points[None], axis=2)
            for points in (turned[place], _turned(plane))
        ]
        np.testing.assert_allclose(*apart, atol=1e-12)


def test_features_and_planes_are_those_that_are_made_one_by_one(run):
    opened = AtlasBuilder(run, AtlasOptions(**FEW))
    atlas = opened.atlas()
    x0, x1 = opened.items.take(torch.arange(40))
    wanted = extract(run.teacher, x0, x1, 0.5, (3,))[3]
    torch.testing.assert_close(torch.tensor(atlas.features[3, 0.5]), wanted)
    plane = project(wanted, "PCA", 15)
    stored_points = atlas.planes["PCA", 3, 0.5].points
    np.testing.assert_allclose(
        np.abs(np.corrcoef(_turned(plane.points).T, _turned(stored_points).T)).max(), 1
    )
    assert atlas.planes["PCA", 3, 0.5].trustworthiness == pytest.approx(
        plane.trustworthiness, abs=1e-6
    )


def test_a_second_opening_reads_and_other_questions_do_not(run, tmp_path, capsys):
    store = FeatureStore(tmp_path)
    first = AtlasBuilder(run, AtlasOptions(**FEW), store)
    assert first.cost.features.passes == 2
    assert first.cost.planes == {"PCA": 4}
    assert "4 by PCA" in str(first.cost)
    both = AtlasCost(
        first.cost.features, {"UMAP": 24, "PCA": 24}, 0, 400, "400 of 1,000, at random"
    )
    assert "24 by UMAP, 24 by PCA" in str(both)
    assert "UMAP about 22 s" in str(both)
    progress = []
    atlas = first.atlas(lambda *step: progress.append(step))
    assert [step[:2] for step in progress] == [(done, 6) for done in range(7)]
    assert progress[2][2] == "PCA, layer 1, t = 0"
    second = AtlasBuilder(run, AtlasOptions(**FEW), store)
    assert "all stored" in str(second.cost)
    assert "none to be laid out, 4 stored" in str(second.cost)
    for other in (
        {"seed": 1},
        {"neighbours": 5},
        {"weights": "model"},
        {"count": 30},
        {"split": "validation"},
    ):
        assert (
            AtlasBuilder(run, AtlasOptions(**{**FEW, **other}), store).cost.stored == 0
        ), other
    file = tmp_path / f"{second.keys['PCA', 3, 0.5].name}.json"
    stored_atlas = json.loads(file.read_text())
    for damage in (
        "{",
        json.dumps({**stored_atlas, "points": stored_atlas["points"][:-1]}),
        json.dumps({**stored_atlas, "key": {}}),
        "[]",
    ):
        file.write_text(damage)
        again = AtlasBuilder(run, AtlasOptions(**FEW), store).atlas()
        np.testing.assert_allclose(
            again.planes["PCA", 3, 0.5].points,
            atlas.planes["PCA", 3, 0.5].points,
            atol=1e-5,
        )
    assert "made again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("digits", ["image/png"]),
        ("motion", ["image/png"]),
        ("notes", ["audio/wav"]),
        ("scenes", ["image/png", "audio/wav"]),
    ],
)
def test_samples_of_every_modality_are_shown_with_their_factors_in_words(name, kinds):
    items = Items(Sources(DataConfig(name), "test"), count=6)
    previews, captions = item_previews(items)
    factors, names = known_factors(items)
    assert [[kind for kind, _ in files] for files in previews] == [kinds] * 6
    assert len(captions) == 6
    for factor, values in factors.items():
        assert values.shape == (6,)
        assert factor not in names or max(values) < len(names[factor])
    if name == "notes":
        example = items.data.take(torch.arange(6))
        assert [names["pitch"][pitch] for pitch in factors["pitch"]] == [
            items.data.names[label] for label in example.labels
        ]
    if name == "scenes":
        assert all(
            names["ground"][place] in caption
            for place, caption in zip(factors["ground"], captions, strict=True)
        )
    assert viewable({"image": torch.full((2, 4, 8, 8), torch.nan)})["image"].shape == (
        2,
        1,
        8,
        8,
    )


def test_sliders_move_points_and_neighbours_follow(view):
    for layer, level in ((3, 0.0), (3, 0.5), (1, 0.5)):
        view.layer.value, view.level.value = layer, level
        plane = view.atlas.planes["PCA", layer, level]
        assert np.array_equal(view.figure.data[0].x, plane.points[:, 0])
        assert (
            f"trustworthiness {plane.trustworthiness:.3f}"
            in view.figure.layout.title.text
        )
    view.clicked(view.figure.data[0], Points(point_inds=[9]), None)
    view.count.value, view.layer.value = 5, 3
    order = nearest(view.atlas.features[3, 0.5], 5)[0][9]
    assert np.array_equal(view.nearest(), order)
    assert view.near.value.count("<img") == 6
    assert np.array_equal(view.figure.data[1].x, view.figure.data[0].x[order])
    assert len(view.figure.data[2].x) == 1
    kind = view.atlas.factors["kind"]
    assert f"{(kind[order] == kind[9]).sum()} share its kind" in view.near.value
    view.colour.value = "x"
    assert "differ from it in x" in view.near.value
    assert describe_near(view.atlas, "x", 3, 0.5, 9, 5) in view.near.value
    published = view.figure._widget_data  # what a page that opens later sees
    assert len(published) == len(view.figure.data)
    assert np.array_equal(published[0]["x"], view.figure.data[0].x)


def test_the_selection_stays_and_is_ringed_on_the_strip(view):
    view.choose(view.figure.data[0], Points(point_inds=[4, 2]), LassoSelector())
    view.layer.value = 3
    assert view.selected.tolist() == [2, 4]
    # the page forgets the lasso that it was asked to forget
    view.choose(view.figure.data[0], Points(point_inds=[]), None)
    assert view.selected.tolist() == [2, 4]
    figure = view.strip(factor="ground")
    titles = [axis.get_title() for axis in figure.axes]
    places = [(layer, level) for level in (0.0, 0.5) for layer in (1, 3)]
    for axis, title, (layer, level) in zip(figure.axes, titles, places, strict=True):
        plane = view.atlas.planes["PCA", layer, level]
        assert title == f"layer {layer}, t = {level:g}: {plane.trustworthiness:.2f}"
        assert np.allclose(axis.collections[-1].get_offsets(), plane.points[[2, 4]])
    view.choose(view.figure.data[0], Points(point_inds=[]), None)
    assert len(view.selected) == 0


def test_a_factor_that_cannot_be_shown_is_reported(view):
    view.atlas.factors["scale"] = view.factors["scale"] = np.full(40, np.nan)
    view.seek_near(0)
    view.colour.value = "scale"
    assert 'role="alert"' in view.message.value
    assert 'role="alert"' in view.near.value
    assert view.near.value.count("<img") == 9
    view.colour.value, view.layer.value = "kind", 3
    assert view.message.value == ""
    assert "share its kind" in view.near.value


def test_a_long_caption_is_cut(view):
    long = FeatureMap(view.atlas, view.previews, ["a red star " * 909 + "?"] * 40)
    assert len(long.describe(0)) < 600
    assert max(map(len, long.figure.data[0].hovertext)) < 320
    assert FeatureMap(view.atlas, view.previews).describe(3).startswith("3; kind ")


def test_a_folder_without_a_run_is_reported_and_can_be_tried_again(run, tmp_path):
    empty = explore_features(tmp_path / "later")
    with pytest.raises(RuntimeError, match="holds no run"):
        empty.wait(60)
    assert 'role="alert"' in empty.status.value
    assert empty.again.layout.display == ""
    assert len(empty.selected) == 0
    half = tmp_path / "later"
    half.mkdir()
    # written so far: no checkpoint yet
    (half / "config.json").write_text((run.path / "config.json").read_text())
    empty.again.click()
    with pytest.raises(RuntimeError, match="no intact checkpoint yet"):
        empty.wait(60)
    (half / "checkpoints").symlink_to(run.path / "checkpoints")
    empty.options = AtlasOptions(**FEW)
    empty.again.click()
    assert len(empty.wait(120).previews) == 40
    assert empty.problem == ""
    assert "FeatureMap" in repr(empty)


def test_changes_from_many_threads_end_in_the_right_state(view):
    threads = [
        threading.Thread(target=setattr, args=(control, "value", value))
        for turn in range(6)
        for control, value in (
            (view.layer, (1, 3)[turn % 2]),
            (view.level, (0.0, 0.5)[turn % 2]),
            (view.count, 3 + turn),
            (view.sample, turn),
        )
    ]
    view.seek_near(5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plane = view.atlas.planes[view.place].points
    assert np.array_equal(view.figure.data[0].x, plane[:, 0])
    assert np.array_equal(view.figure.data[1].y, plane[view.nearest(), 1])


def test_bad_input_is_refused(run, view, monkeypatch):
    for options, words in (
        ({"level": (0.5,)}, "unknown option 'level'.*Did you mean 'levels'"),
        ({"levels": (1.5,)}, "1.5 is outside"),
        ({"levels": (math.nan,)}, "nan is outside"),
        ({"levels": ()}, "levels is empty"),
        ({"layers": ()}, "layers is empty"),
        ({"count": 10**9}, "count is 1000000000, but must be from 6 to 5,000"),
        ({"count": 2}, "count is 2"),
        ({"methods": ("TSNE",)}, "unknown method 'TSNE'"),
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"weights": "ema"}, "unknown weights"),
        ({"neighbours": 1}, "neighbours is 1"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            explore_features(run, **options)
    for options, words in (
        ({"layers": (4,)}, "no layer 4: layers are counted after each block, 1 to 3"),
        ({"part": "audio"}, "unknown part"),
        ({"data": "digit"}, "unknown data set"),
    ):
        explorer = explore_features(run, **{**FEW, **options})
        with pytest.raises(RuntimeError, match=words):
            explorer.wait(60)
        assert 'role="alert"' in explorer.status.value
    for call, words in (
        (
            lambda: nearest(np.zeros((4, 2)), 4),
            "each of 4 samples has from 1 to 3 neighbours",
        ),
        (lambda: draw_maps(view.atlas, "UMAP"), "unknown method"),
        (
            lambda: draw_maps(view.atlas, layers=(2,)),
            "layer 2 at t = 0 is not laid out",
        ),
        (lambda: draw_maps(view.atlas, factor="knd"), "Did you mean 'kind'"),
        (lambda: sharing(np.zeros(3), np.zeros((4, 2), int), 0), r"expected \(4,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    monkeypatch.setattr(feature_explorer, "item_previews", lambda items: 1 / 0)
    broken = explore_features(Run.open(run.path, "cpu"), **FEW)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        broken.wait(60)
