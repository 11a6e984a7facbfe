"""The digits are split as recorded, and bad data are refused."""

import hashlib

import pytest
import torch
from sklearn.datasets import load_digits

from selfflow.checks import choose
from selfflow.data.datasets import SPLITS, ImageSet, digits


def test_the_split_is_complete_disjoint_stratified_and_fixed():
    splits = [digits(split) for split in SPLITS]
    assert [len(data) for data in splits] == [1078, 359, 360]
    ours = torch.cat([data.images for data in splits]).flatten(1)
    theirs = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    assert torch.equal(ours.unique(dim=0), theirs.unique(dim=0))
    assert len(ours) == len(theirs)
    digest = hashlib.sha256()
    for data in splits:
        assert (data.labels.bincount() / len(data) - 0.1).abs().max() < 0.01
        digest.update(data.labels.numpy().tobytes())
        digest.update(data.images.numpy().tobytes())
    expected = "4d71a60e5f89161809f7289b9abb4a7b17c46879b8cd5a8f71bd8723755732a5"
    assert digest.hexdigest() == expected, "test images must stay test images"


def test_images_have_the_documented_form_and_range():
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
            {"images": torch.full((3, 1, 4, 4), torch.nan)},
            ValueError,
            r"3 images contain NaN or infinity, first at \[0, 1, 2\]",
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


def test_a_fingerprint_depends_on_the_content_alone():
    assert [digits(split).fingerprint for split in SPLITS] == [
        "0baa8e8e02dd480c",
        "6151c9834bad1fcd",
        "bda2c20757b08fb3",
    ]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, 3, 5, generator=generator)
    labels = torch.tensor([0, 1, 1, 0])
    original = ImageSet(images, labels, ("a", "b"))
    copied = ImageSet(
        images.transpose(2, 3).contiguous().transpose(2, 3), labels.clone(), ("a", "b")
    )
    assert original.fingerprint == copied.fingerprint
    assert not copied.images.is_contiguous()
    assert len(original[:4].fingerprint) == 16
    changed = images.clone()
    changed[3, 1, 2, 4] += 1e-6
    others = [
        ImageSet(changed, labels, ("a", "b")),
        ImageSet(images, labels.flip(0) ^ 1, ("a", "b")),
        ImageSet(images, labels, ("a", "c")),
        ImageSet(images, labels, ("a", "b", "c")),
        original[:3],
        original[[1, 0, 2, 3]],
        ImageSet(images.reshape(4, 2, 5, 3), labels, ("a", "b")),
    ]
    fingerprints = {data.fingerprint for data in (original, *others)}
    assert len(fingerprints) == 1 + len(others)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown split 'valid'.*train, validation, test"
    ):
        digits("valid")
    assert choose("a", ("a", "b"), "letter") == "a"
