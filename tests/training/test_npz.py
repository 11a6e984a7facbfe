"""Samples in an npz file: complete, resumable, in ADM's form."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import programs
import pytest
import torch

from selfflow.data.datasets import subset
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.training import npz
from selfflow.training.npz import (
    Rows,
    arrays_of,
    balanced_labels,
    draw_npz,
    write_arrays,
)
from selfflow.training.run import Run

SETTINGS = {"count": 7, "steps": 1, "piece": 3, "bar": False}


@pytest.fixture(scope="module")
def complete(runs, tmp_path_factory):
    return draw_npz(
        runs["tiny"], tmp_path_factory.mktemp("npz") / "all.npz", **SETTINGS
    )


def test_numpy_reads_images_and_classes(runs, complete):
    with np.load(complete) as file:
        images = file["arr_0"]
        labels = file["arr_1"]
    assert images.shape == (7, 8, 8, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [*range(7)]
    assert (images[..., 0] == images[..., 2]).all(), "grey in three channels"
    # the second piece alone, from its own seed
    drawn = runs["tiny"].sample(torch.arange(3, 6), 1, seed=npz._piece_seed(0, 1))
    pixels = ((drawn["image"].clamp(-1, 1) + 1) * 127.5).round().byte()[:, 0]
    assert (images[3:6, ..., 0] == pixels.numpy()).all()
    assert len(np.unique(images.reshape(7, -1), axis=0)) == 7


def test_a_killed_process_and_a_second_one_write_the_same_file(
    runs, complete, tmp_path
):
    "Killed, not interrupted: nothing may run on the way out."
    file = tmp_path / "cut.npz"
    script = f"""
import os
from selfflow.training.npz import draw_npz
from selfflow.training.run import Run
draw, calls = Run.sample, []
def counted(*arguments, **keywords):
    calls.append(0)
    if len(calls) == 3:
        os._exit(9)
    return draw(*arguments, **keywords)
Run.sample = counted
draw_npz(Run.open({str(runs["tiny"].path)!r}, "cpu"), {str(file)!r}, **{SETTINGS!r})
"""
    assert programs.run("-c", script).returncode == 9
    parts = tmp_path / "cut.npz.parts"
    assert sorted(p.name for p in parts.glob("piece*")) == [
        *("piece-00000.npy", "piece-00001.npy")
    ]
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        draw_npz(runs["tiny"], file, **SETTINGS, seed=1)
    draw_npz(runs["tiny"], file, **SETTINGS)
    assert file.read_bytes() == complete.read_bytes()
    assert not parts.exists()


def test_a_finished_file_is_kept_and_never_mixed(runs, complete, monkeypatch):
    monkeypatch.setattr(Run, "sample", None)  # nothing is drawn again
    before = complete.stat()
    assert draw_npz(runs["tiny"], complete, **SETTINGS) == complete
    assert complete.stat() == before
    with pytest.raises(ValueError, match="holds other samples: count is 7 there, 8"):
        draw_npz(runs["tiny"], complete, **SETTINGS | {"count": 8})


@pytest.mark.parametrize("name", ["samples.zip", "samples.npz"])
def test_impossible_requests_are_refused_at_once(runs, tmp_path, name):
    with pytest.raises(ValueError, match="numbers of 1 or more"):
        count = 5 if name.endswith("zip") else 0
        draw_npz(runs["tiny"], tmp_path / name, count)
    with pytest.raises(ValueError, match="unknown balance 'fair'"):
        draw_npz(runs["tiny"], tmp_path / "x.npz", 5, "fair")
    assert not list(tmp_path.iterdir())


def test_runs_without_images_are_refused(tmp_path):
    made = SimpleNamespace(
        path=tmp_path,
        config=SimpleNamespace(
            data_name=lambda name: "notes",
            datasets={"notes": SimpleNamespace(name="notes")},
        ),
        sources=SimpleNamespace(
            data={"notes": SimpleNamespace(shapes={"audio": (8,)})}
        ),
    )
    with pytest.raises(ValueError, match="notes has no images"):
        draw_npz(made, tmp_path / "x.npz")
    made.config.datasets["notes"].name = "latents"
    with pytest.raises(ValueError, match="--autoencoder FOLDER"):
        draw_npz(made, tmp_path / "x.npz")


def test_images_of_two_channels_are_no_pictures():
    with pytest.raises(ValueError, match="2 channels, expected 1 or 3; latents need"):
        npz._as_bytes(torch.zeros(1, 2, 4, 4))


def test_captions_are_those_of_test_data():
    run = SimpleNamespace(
        inputs=SimpleNamespace(caption=True),
        sources_of=partial(Sources, DataConfig("shapes")),
    )
    shapes = run.sources_of("test").data["shapes"]
    captions = npz._conditions(run, "shapes", 5, "equal", 0)
    assert captions == list(shapes.take(subset(shapes, 5)).captions)


def test_classes_come_as_often_as_in_the_data(runs, tmp_path):
    frequencies = torch.tensor([5, 0, 3, 2])
    labels = balanced_labels(101, frequencies, "data")
    assert labels.bincount(minlength=4).tolist() == [51, 0, 30, 20]
    assert labels.tolist() != sorted(labels.tolist())
    assert labels.equal(balanced_labels(101, frequencies, "data"))
    assert not labels.equal(balanced_labels(101, frequencies, "data", seed=1))
    assert balanced_labels(9, frequencies).bincount().tolist() == [3, 2, 2, 2]
    conditions = npz._conditions(runs["tiny"], "digits", 1078, "data", 0)
    known = runs["tiny"].sources_of("train").data["digits"].labels
    assert conditions.bincount().equal(known.bincount())


def test_blocks_of_any_size_give_the_same_array(tmp_path):
    values = np.arange(60, dtype=np.float32).reshape(10, 6)
    rows = Rows(values.shape, values.dtype, np.split(values, [1, 4]))
    write_arrays(tmp_path / "x.npz", {"a": rows})
    array = arrays_of(tmp_path / "x.npz")["a"]
    for size in (1, 3, 10, 99):
        assert np.array_equal(np.concatenate([*array.blocks(size)]), values)
