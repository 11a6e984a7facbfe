"""Patches equal loops and round trips are exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfflow.method.tokens import ImagePatches


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_patches_equal_loops(channels, rows, columns, patch):
    patches = ImagePatches(channels, rows * patch, columns * patch, patch)
    images = torch.randn(
        2,
        channels,
        rows * patch,
        columns * patch,
        generator=torch.Generator().manual_seed(0),
    )
    tokens = patches.patchify(images)
    assert tokens.shape == (2, patches.tokens, patches.token_channels)
    assert torch.equal(patches.unpatchify(tokens), images)
    places = patches.coordinates()
    for n in range(patches.tokens):
        time, row, column, place = places[n].int().tolist()
        assert (time, place) == (0, 0)
        assert n == row * columns + column
        piece = images[
            :, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch
        ]
        assert torch.equal(tokens[:, n], piece.reshape(2, -1)), (
            "channels first, then rows, then columns of the patch"
        )


@pytest.mark.parametrize(
    "height, width, patch", [(9, 8, 2), (8, 9, 2), (8, 8, 3), (8, 8, 0)]
)
def test_a_patch_that_does_not_divide_is_refused(height, width, patch):
    with pytest.raises(
        ValueError, match=f"not divisible by patch {patch}; choose a patch from"
    ):
        ImagePatches(1, height, width, patch)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 6\), expected \(b, 1, 8, 8\)"):
        ImagePatches(1, 8, 8, 2).patchify(torch.zeros(1, 1, 8, 6))
