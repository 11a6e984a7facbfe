"""The digits are split as recorded; bad data are refused."""

import hashlib

import pytest
import torch
from sklearn.datasets import load_digits

from selfflow.checks import choose
from selfflow.data.datasets import SPLITS, ImageSet, digits


def test_the_split_is_complete_disjoint_stratified_and_fixed():
    parts = [digits(split) for split in SPLITS]
    assert [len(p) for p in parts] == [1078, 359, 360]
    ours = torch.cat([p.images for p in parts]).flatten(1)
    theirs = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    assert torch.equal(ours.unique(dim=0), theirs.unique(dim=0))
    assert len(ours) == len(theirs)
    for p in parts:
        assert (p.labels.bincount() / len(p) - 0.1).abs().max() < 0.01
    digest = hashlib.sha256(
        b"".join(p.labels.numpy().tobytes() + p.images.numpy().tobytes() for p in parts)
    ).hexdigest()
    assert (
        digest == "4d71a60e5f89161809f7289b9abb4a7b17c46879b8cd5a8f71bd8723755732a5"
    ), "test images must stay test images"


def test_values():
    data = digits("train")
    assert data.images.shape[1:] == (1, 8, 8)
    assert data.images.dtype == torch.float32
    assert data.images.min() == -1
    assert data.images.max() == 1
    assert data.names == tuple("0123456789")


GOOD = {
    "images": torch.zeros(3, 1, 4, 4),
    "labels": torch.tensor([0, 1, 1]),
    "names": ("a", "b"),
}


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            {"images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8)},
            TypeError,
            "torch.uint8, expected torch.float32",
        ),
        (
            {"images": torch.zeros(3, 1, 4, 4, dtype=torch.float64)},
            TypeError,
            "torch.float64",
        ),
        (
            {"images": torch.full((3, 1, 4, 4), torch.nan)},
            ValueError,
            r"3 images contain NaN or infinity, first at \[0, 1, 2\]",
        ),
        (
            {"images": torch.full((3, 1, 4, 4), torch.inf)},
            ValueError,
            "NaN or infinity",
        ),
        ({"images": torch.full((3, 1, 4, 4), 255.0)}, ValueError, "values reach 255"),
        ({"images": torch.zeros(3, 16)}, ValueError, r"\(3, 16\)"),
        (
            {
                "images": torch.zeros(0, 1, 4, 4),
                "labels": torch.zeros(0, dtype=torch.int64),
            },
            ValueError,
            "n >= 1",
        ),
        ({"labels": torch.tensor([0, 1])}, ValueError, "one n"),
        ({"labels": torch.tensor([0.0, 1, 1])}, TypeError, r"labels are torch.float32"),
        (
            {"labels": torch.tensor([0, 1, 2])},
            ValueError,
            "1 labels are outside 0 to 1, first 2 at 2",
        ),
        ({"labels": torch.tensor([0, -1, 1])}, ValueError, "first -1 at 1"),
    ],
)
def test_bad_data_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        ImageSet(**GOOD | change)


def test_a_fingerprint_follows_from_the_content_alone():
    assert [digits(split).fingerprint for split in SPLITS] == [
        "0baa8e8e02dd480c",
        "6151c9834bad1fcd",
        "bda2c20757b08fb3",
    ]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, 3, 5, generator=generator)
    labels = torch.tensor([0, 1, 1, 0])
    one = ImageSet(images, labels, ("a", "b"))
    same = ImageSet(
        images.transpose(2, 3).contiguous().transpose(2, 3), labels.clone(), ("a", "b")
    )
    assert one.fingerprint == same.fingerprint
    assert not same.images.is_contiguous()
    assert len(one[:4].fingerprint) == 16
    changed = images.clone()
    changed[3, 1, 2, 4] += 1e-6
    others = [
        ImageSet(changed, labels, ("a", "b")),
        ImageSet(images, labels.flip(0) ^ 1, ("a", "b")),
        ImageSet(images, labels, ("a", "c")),
        ImageSet(images, labels, ("a", "b", "c")),
        one[:3],
        one[[1, 0, 2, 3]],
        ImageSet(images.reshape(4, 2, 5, 3), labels, ("a", "b")),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(
        others
    )


def test_unknown_names_name_their_neighbour():
    with pytest.raises(
        ValueError, match="unknown split 'valid'.*train, validation, test"
    ):
        digits("valid")
    assert choose("a", ("a", "b"), "letter") == "a"
