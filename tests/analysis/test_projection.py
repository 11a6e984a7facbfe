"""Projections and token colours show hidden structure and are repeatable."""

import numpy as np
import pytest
import torch
from sklearn.manifold import trustworthiness

from selfflow.analysis.projection import project, token_colours


def test_colours_are_the_three_principal_axes():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4, 15, 3)) * (9, 3, 1)
    tokens = hidden @ np.linalg.qr(rng.normal(size=(12, 12)))[0][:3] + 5
    colours, share = token_colours(torch.tensor(tokens), (3, 5))
    assert colours.shape == (4, 3, 3, 5)
    assert share == pytest.approx(1)
    assert abs(colours).max() <= 1
    for axis in range(3):
        drawn = colours[:, axis].ravel()
        expected = hidden[..., axis].ravel()
        assert abs(np.corrcoef(drawn, expected)[0, 1]) > 0.9
    repeated, _ = token_colours(torch.tensor(tokens), (3, 5))
    assert np.array_equal(colours, repeated)
    flat, _ = token_colours(
        np.ones((2, 4, 3)) + 1e-9 * rng.normal(size=(2, 4, 3)), (2, 2)
    )
    assert np.isfinite(flat).all()


def test_a_plane_of_pca_equals_the_singular_value_decomposition():
    "UMAP compiles for half a minute and is tested in the notebook instead."
    rng = np.random.default_rng(1)
    clouds = 5 * np.eye(8)[np.repeat(np.arange(4), 12)] + rng.normal(size=(48, 8))
    plane = project(torch.tensor(clouds), "PCA", neighbours=6)
    centred = clouds - clouds.mean(0)
    expected = np.abs(centred @ np.linalg.svd(centred)[2][:2].T)
    assert np.allclose(np.abs(plane.points), expected, atol=1e-4)
    assert plane.trustworthiness == pytest.approx(
        trustworthiness(clouds, plane.points, n_neighbors=6)
    )
    assert "PCA of 48 points" in repr(plane)
    assert "mean nothing" in repr(plane)


def test_bad_input_is_refused():
    values = np.random.default_rng(2).normal(size=(20, 4))
    bad = values.copy()
    bad[2, 1] = np.nan
    for call, words in (
        (lambda: project(bad), "1 of 20 features are not finite"),
        (lambda: project(values[None]), r"\(1, 20, 4\)"),
        (lambda: project(values, neighbours=10), "neighbours is 10 for 20 points"),
        (lambda: project(values, "TSNE"), "unknown method 'TSNE'; known are UMAP, PCA"),
        (lambda: token_colours(values[None], (3, 7)), r"expected \(b, 3 x 7"),
        (lambda: token_colours(values[None, :, :2], (4, 5)), "3 or more"),
        (lambda: token_colours(bad[None], (4, 5)), "1 of 1 tokens are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
