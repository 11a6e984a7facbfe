"""Fashion-MNIST is read correctly, in part and in full; damaged files are refused."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from selfflow.data import fashion as module
from selfflow.data.datasets import SPLITS
from selfflow.data.fashion import fashion, read_idx, write_idx
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources, load

FOLDER = Path(__file__).parents[2] / "data" / "fashion"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def test_the_shipped_files_have_the_listed_checksums():
    listed = [line.split() for line in (FOLDER / "SHA256").read_text().splitlines()]
    assert {name for _, name in listed} == {file.name for file in FOLDER.glob("*.gz")}
    for digest, name in listed:
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest
    total = sum(file.stat().st_size for file in FOLDER.iterdir())
    assert total < 8_000_000


def test_splits_are_balanced_and_share_no_image():
    rows = torch.cat([fashion(split).images.flatten(1) for split in SPLITS])
    assert rows.shape == (13_000, 784)
    assert len(rows.unique(dim=0)) >= 13_000 - 5  # the original repeats a few images
    for split, count in module.PART.items():
        assert fashion(split).labels.bincount().tolist() == [count] * 10


def test_a_run_finds_it_by_name():
    sources = Sources(DataConfig("fashion", patch=4))
    (part,) = sources.parts
    assert (part.name, part.grid, part.channels) == ("image", (1, 7, 7), 16)
    assert sources.settings["fashion"].always_there
    assert load("fashion", "test").fingerprint == fashion("test").fingerprint


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the original files are not installed")
def test_the_part_is_in_the_same_split_of_the_full_set():
    for split, count in {"train": 54_000, "validation": 6_000, "test": 10_000}.items():
        full = load("fashion", split, full=True)
        assert len(full) == count
        rows = {row.tobytes() for row in full.images.numpy()}
        assert all(row.tobytes() in rows for row in fashion(split).images.numpy())
    config = DataConfig("fashion", full=True)
    assert not config.always_there, (
        "a run stores an outline, as the files may be missing"
    )


def test_missing_original_files_are_named_with_the_remedy(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train-images.*data\.path.*data\.full"
    ):
        load("fashion", full=True, path=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.path.*add data\.full"):
        DataConfig("fashion", path=str(tmp_path))
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        fashion("tain")


def test_a_file_that_is_not_the_original_is_refused(tmp_path):
    for name in module._ORIGINAL:
        write_idx(tmp_path / f"{name}.gz", np.zeros((6, 2, 2)))
    with pytest.raises(ValueError, match="checksum differs"):
        load("fashion", full=True, path=str(tmp_path))


@pytest.mark.parametrize("values", [np.arange(7), np.arange(24).reshape(2, 3, 4)])
def test_idx_files_are_read_as_they_were_written(tmp_path, values):
    write_idx(tmp_path / "values.gz", values)
    assert np.array_equal(read_idx(tmp_path / "values.gz"), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcd"), "announces .5. bytes"),
        (gzip.compress(b"\x89PNG and more"), "not an IDX file"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x04abcd")[:-3], "damaged"),
        (b"no gzip at all", "damaged"),
    ],
    # gzip writes the time, so names made of the bytes would differ between workers
    ids=["a value is missing", "another file", "cut", "not compressed"],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "values.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)
