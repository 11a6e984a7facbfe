"""Streamed features equal those in memory, take one pass per level, are complete or
absent on disk, and use memory for one batch only.
"""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from selfflow.analysis.features import (
    FeatureKey,
    FeatureStore,
    Items,
    extract,
    feature_cost,
    items_of,
    stream_features,
    weights_fingerprint,
)
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.disk import NotWritten
from selfflow.method.transformer import Transformer, TransformerConfig


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "features")


@pytest.fixture
def forwards(monkeypatch):
    "The number of samples and the taps of each forward pass."
    calls = []
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda self, x, *args, **options: (
            calls.append((len(x), options["taps"]))
            or forward(self, x, *args, **options)
        ),
    )
    return calls


def scenes(split="test", count=5, **options):
    return Items(
        Sources(DataConfig("scenes", size=16, patch=4, frames=8, **options), split),
        count=count,
    )


def model_of(items, depth=3, width=16):
    torch.manual_seed(0)
    parts = items.layout.parts
    model = Transformer(
        TransformerConfig(
            parts, classes=1, width=width, depth=depth, heads=2, positions="rotary"
        )
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("weights", ["teacher", "model"])
def test_streamed_features_equal_those_in_memory(runs, store, weights):
    model = getattr(runs["tiny"], weights)
    items = items_of(runs["tiny"], "test", 30)
    x0, x1 = items.take(torch.arange(30))
    for pooled in (True, False):
        streamed = stream_features(model, items, 0.3, (2, 4), store, pooled, batch=7)
        at_once = items.features(model, 0.3, (2, 4), pooled)
        for layer, expected in extract(model, x0, x1, 0.3, (2, 4), pooled).items():
            torch.testing.assert_close(at_once[layer], expected)
            actual = items.pooled(streamed[layer]) if pooled else streamed[layer]
            assert isinstance(streamed[layer], np.memmap)
            assert not streamed[layer].flags.writeable
            torch.testing.assert_close(torch.tensor(np.array(actual)), expected)


def test_parts_of_a_sequence_are_pooled_separately_and_together(store):
    items = scenes()
    model = model_of(items)
    x0, x1 = items.take(torch.arange(5))
    hidden = extract(model, x0, x1, 0.2, (3,), pooled=False)[3]
    means = stream_features(model, items, 0.2, (3,), store, batch=2)[3]
    assert means.shape == (5, 2, 16)
    np.testing.assert_allclose(items.pooled(means), hidden.mean(1), atol=1e-5)
    for name, place in items.slices.items():
        np.testing.assert_allclose(
            items.pooled(means, name), hidden[:, place].mean(1), atol=1e-5
        )
    with pytest.raises(ValueError, match="unknown part 'vido'.*Did you mean 'video'"):
        items.pooled(means, "vido")


def test_each_level_takes_one_pass_for_its_missing_layers(runs, store, forwards):
    model = runs["tiny"].teacher
    items = items_of(runs["tiny"], "test", 20)
    for level in (0.0, 0.5):
        stream_features(model, items, level, (1, 2, 3), store, batch=8)
    assert forwards == 2 * [(8, (1, 2, 3)), (8, (1, 2, 3)), (4, (1, 2, 3))], (
        "one pass gives all layers and stops at the last"
    )
    forwards.clear()
    stream_features(model, items, 0.5, (1, 2, 3), FeatureStore(store.folder), batch=8)
    assert not forwards, "stored features are not computed again"
    stream_features(model, items, 0.5, (2, 4), store, batch=20)
    assert forwards == [(20, (4,))]


def test_ten_thousand_samples_at_width_384_take_one_pass(monkeypatch, store):
    items = Items(
        Sources(DataConfig("shapes", size=16, patch=4, condition="none")), count=10_000
    )
    model = Transformer(
        TransformerConfig.of_image(48, (4, 4), 384, 12, 6, classes=1)
    ).eval()
    passed = []

    # only the number of passes matters here, at full size
    def forward(self, x, levels, condition, taps, **options):
        passed.append(len(x))
        return type(
            "Output",
            (),
            {
                "features": {
                    layer: x.new_full((len(x), 1, 384), layer) for layer in taps
                }
            },
        )

    monkeypatch.setattr(
        items, "take", lambda indices: 2 * (torch.zeros(len(indices), 16, 48),)
    )
    monkeypatch.setattr(Transformer, "forward", forward)
    features = stream_features(model, items, 0.1, range(1, 13), store, batch=500)
    assert passed == 20 * [500]
    assert features[12].shape == (10_000, 1, 384)
    assert (features[12][::1000] == 12).all()


def test_keys_differ_by_weights_data_layer_level_and_pooling(runs):
    teacher, student = (
        weights_fingerprint(model)
        for model in (runs["tiny"].teacher, runs["tiny"].model)
    )
    assert teacher != student
    assert teacher == weights_fingerprint(runs["tiny"].teacher)
    keys = [
        FeatureKey("w", "d", 1, 0.1),
        FeatureKey("v", "d", 1, 0.1),
        FeatureKey("w", "e", 1, 0.1),
        FeatureKey("w", "d", 2, 0.1),
        FeatureKey("w", "d", 1, 0.2),
        FeatureKey("w", "d", 1, 0.1, False),
    ]
    assert len({key.name for key in keys}) == 6
    fingerprints = [
        items_of(runs["tiny"], split, count, seed=seed).fingerprint
        for split, count, seed in (
            ("test", 5, 0),
            ("train", 5, 0),
            ("test", 6, 0),
            ("test", 5, 1),
        )
    ]
    assert len(set(fingerprints)) == 4
    assert scenes().fingerprint != scenes(columns=4).fingerprint


def test_damaged_features_are_reported_and_recomputed(runs, store, capsys):
    model = runs["tiny"].teacher
    items = items_of(runs["tiny"], "test", 9)
    expected = np.array(stream_features(model, items, 0.5, (2,), store)[2])
    (file,) = store.folder.glob("*.npy")
    for damage in (
        lambda: file.write_bytes(file.read_bytes()[:-4]),
        lambda: file.write_bytes(b"\x00" * file.stat().st_size),
        file.unlink,
        lambda: file.with_suffix(".json").write_text("{"),
    ):
        damage()
        assert (
            feature_cost(model, items, (0.5,), (2,), FeatureStore(store.folder)).passes
            == 1
        )
        np.testing.assert_array_equal(
            stream_features(model, items, 0.5, (2,), FeatureStore(store.folder))[2],
            expected,
        )
    assert "will be computed again" in capsys.readouterr().out


def test_an_interrupted_level_leaves_no_files_and_is_recomputed(
    runs, store, monkeypatch, forwards
):
    model = runs["tiny"].teacher
    items = items_of(runs["tiny"], "test", 9)
    stream_features(model, items, 0.0, (1, 2), store, batch=3)
    take = items.take
    calls = []

    def stopped(indices):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take(indices)

    monkeypatch.setattr(items, "take", stopped)
    with pytest.raises(KeyboardInterrupt):
        stream_features(model, items, 0.5, (1, 2), store, batch=3)
    # the files of level 0, and nothing of 0.5
    assert len(list(store.folder.iterdir())) == 4
    assert not list(store.folder.glob(".*"))
    monkeypatch.setattr(items, "take", take)
    forwards.clear()
    for level in (0.0, 0.5):
        stream_features(model, items, level, (1, 2), store, batch=3)
    assert len(forwards) == 3


def test_a_full_disk_raises_not_written(store, monkeypatch):
    store.folder.mkdir()
    monkeypatch.setattr(
        "selfflow.disk.flush",
        lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with (
        pytest.raises(NotWritten, match="No space left on device.*Make room"),
        store.writing({1: FeatureKey("w", "d", 1, 0.1)}, (1, 1, 1)) as write,
    ):
        write(1, np.zeros((1, 1, 1)))
    assert store.read(FeatureKey("w", "d", 1, 0.1)) is None


def test_the_estimated_cost_equals_the_real_one(runs, store, forwards):
    model = runs["tiny"].teacher
    items = items_of(runs["tiny"], "test", 20)
    cost = feature_cost(model, items, (0.0, 0.5, 0.9), (1, 2), store, batch=8)
    assert len(forwards) == 2
    assert cost.seconds > 0, "one batch is measured"
    forwards.clear()
    for level in (0.0, 0.5, 0.9):
        stream_features(model, items, level, (1, 2), store, batch=8)
    files = list(store.folder.glob("*.npy"))
    assert cost.forwards == len(forwards) == 9
    assert cost.samples == sum(size for size, _ in forwards) == 60
    assert cost.bytes == sum(np.load(file).nbytes for file in files)
    assert cost.passes == 3
    nothing = feature_cost(model, items, (0.5,), (2,), store)
    assert (nothing.passes, nothing.bytes, nothing.seconds) == (0, 0, 0)


MEASURE = """
import resource, sys, torch
torch.set_num_threads(1)
from selfflow.training.config import DataConfig
from selfflow.analysis.features import FeatureStore, Items, stream_features
from selfflow.data.sources import Sources
from selfflow.method.transformer import Transformer, TransformerConfig
model = Transformer(TransformerConfig.of_image(48, (8, 8), 64, 4, 2, classes=1)).eval()
sources = Sources(DataConfig("shapes", patch=4, condition="none"))
def stream(count):
    items = Items(sources, count=count)
    store = FeatureStore(sys.argv[1])
    stream_features(model, items, 0.1, (1, 2, 3, 4), store, pooled=False, batch=32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream(64)
before = peak()
stream(1600)
print(before, peak())
"""


def test_memory_is_bounded_by_the_batch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    before, after = map(int, done.stdout.split()[-2:])
    written = sum(file.stat().st_size for file in tmp_path.glob("*.npy")) / (
        1024 if sys.platform != "darwin" else 1
    )
    assert written > 100_000
    assert after - before < written / 10, (
        f"{after - before} KiB for {written:.0f} KiB of features"
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda run, store: stream_features(
                run.teacher, items_of(run, count=2), 0.1, (5,), store
            ),
            "no layer .5.",
        ),
        (
            lambda run, store: feature_cost(
                run.teacher, items_of(run, count=2), (0.1,), (0,), store
            ),
            "no layer .0.",
        ),
        (lambda run, store: items_of(run, "tset"), "Did you mean 'test'"),
        (lambda run, store: items_of(run, name="digit"), "Did you mean 'digits'"),
        (lambda run, store: items_of(run, count=0), "at least one sample"),
    ],
)
def test_bad_input_is_refused(runs, store, call, words):
    with pytest.raises(ValueError, match=words):
        call(runs["tiny"], store)
