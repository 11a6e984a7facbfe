"""Distances between sets of samples equal closed forms, loops and other libraries, and
their intervals cover the truth.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from selfflow.analysis.distances import (
    frechet,
    kernel_distance,
    measure,
    neighbourhoods,
    sliced_wasserstein,
)
from selfflow.registries import metrics

torch_fidelity = pytest.importorskip("torch_fidelity")


def clouds(n=60, m=45, d=6, seed=0, shift=0.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(
        shift, 1.3, (m, d)
    ) @ rng.normal(size=(d, d))


def samples_with(mean, cov, count, rng):
    "Samples with exactly this mean and covariance."
    values = rng.normal(size=(count, len(mean)))
    values -= values.mean(0)
    whitened = (
        values
        @ np.linalg.inv(
            np.linalg.cholesky(np.atleast_2d(np.cov(values, rowvar=False)))
        ).T
    )
    return whitened @ np.linalg.cholesky(cov).T + mean


# closed forms


@pytest.mark.parametrize("d", [1, 3, 8])
def test_the_frechet_distance_of_gaussians_has_its_closed_form(d):
    "By scipy's matrix square root, and sum of (s1 - s2)^2 for diagonal covariances."
    rng = np.random.default_rng(d)
    mean, other_mean = rng.normal(size=(2, d))
    cov, other_cov = (a @ a.T + 0.1 * np.eye(d) for a in rng.normal(size=(2, d, d)))
    expected = ((mean - other_mean) ** 2).sum() + np.trace(
        cov + other_cov - 2 * sqrtm(cov @ other_cov).real
    )
    assert frechet(
        samples_with(mean, cov, 50, rng), samples_with(other_mean, other_cov, 70, rng)
    ) == pytest.approx(expected, rel=1e-8)
    s, r = rng.uniform(0.2, 3, (2, d))
    plain = frechet(
        samples_with(mean, np.diag(s**2), 50, rng),
        samples_with(other_mean, np.diag(r**2), 30, rng),
    )
    assert plain == pytest.approx(
        ((mean - other_mean) ** 2).sum() + ((s - r) ** 2).sum(), rel=1e-8
    )


def test_the_frechet_distance_allows_fewer_samples_than_dimensions():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(12, 40))
    many = rng.normal(1, 2, (100, 40))
    for first, second in ((few, many), (many, few), (few, few + 1)):
        covs = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
        values = np.linalg.eigvals(covs[0] @ covs[1])
        shared = np.sqrt(values.astype(complex)).real.sum()
        expected = (
            ((first.mean(0) - second.mean(0)) ** 2).sum()
            + np.trace(sum(covs))
            - 2 * shared
        )
        assert frechet(first, second) == pytest.approx(expected, rel=1e-5)
    assert frechet(few, few + 1) == pytest.approx(40, rel=1e-9)


def test_the_kernel_distance_equals_a_mean_over_pairs():
    real, drawn = clouds(9, 7, 3)

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    inside = [
        np.mean([k(a, b) for i, a in enumerate(c) for j, b in enumerate(c) if i != j])
        for c in (real, drawn)
    ]
    expected = sum(inside) - 2 * np.mean([k(a, b) for a in real for b in drawn])
    assert kernel_distance(real, drawn) == pytest.approx(expected, rel=1e-10)


def test_the_kernel_distance_of_gaussians_has_its_expected_mean():
    """E k(x, y) of N(a, 1) and N(b, 1) on a line, by their moments.

    (xy + 1)^3 = 1 + 3xy + 3(xy)^2 + (xy)^3.
    """
    rng = np.random.default_rng(1)
    a = 0.2
    b = 1.1
    moments = {m: (m, m**2 + 1, m**3 + 3 * m) for m in (a, b)}  # E x, E x^2, E x^3

    def kernel(p, q):
        return 1 + sum(
            c * moments[p][i] * moments[q][i] for i, c in enumerate((3, 3, 1))
        )

    expected = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    distances = [
        kernel_distance(rng.normal(a, 1, (25, 1)), rng.normal(b, 1, (25, 1)))
        for _ in range(800)
    ]
    assert abs(np.mean(distances) - expected) < 4 * np.std(distances) / 800**0.5


@pytest.mark.parametrize("n, m", [(40, 40), (40, 27), (1, 13), (6, 3)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_sliced_distance_on_a_line_is_the_wasserstein_distance(n, m, order):
    rng = np.random.default_rng(n + m)
    first = rng.normal(size=n)
    second = rng.normal(0.3, 2, m)
    distance = sliced_wasserstein(first[:, None], second[:, None], 3, order)
    if order == 1:
        assert distance == pytest.approx(wasserstein_distance(first, second))
    # the same distributions with equal counts
    a, b = (np.sort(np.repeat(x, k)) for x, k in ((first, m), (second, n)))
    assert distance == pytest.approx(np.mean(np.abs(a - b) ** order) ** (1 / order))


def test_sliced_wasserstein_of_gaussians_has_its_closed_form():
    "N(0, 1) and N(m, s^2) in d dimensions: SW_2^2 = |m|^2 / d + (1 - s)^2."
    rng = np.random.default_rng(2)
    d = 5
    shift = np.array([1.0, -2, 0.5, 0, 1])
    first = rng.normal(size=(5_000, d))
    second = shift + 1.7 * rng.normal(size=(5_000, d))
    expected = ((shift**2).sum() / d + 0.7**2) ** 0.5
    assert sliced_wasserstein(first, second, 600) == pytest.approx(expected, rel=0.05)


@settings(max_examples=15)
@given(
    st.integers(4, 18),
    st.integers(4, 18),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_neighbourhoods_equal_loops(n, m, d, k, seed):
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(n, d))
    drawn = rng.normal(0.5, 1, (m, d))
    real_radius = [sorted(np.linalg.norm(x - y) for y in real)[k] for x in real]
    drawn_radius = [sorted(np.linalg.norm(x - y) for y in drawn)[k] for x in drawn]
    inside = [
        [np.linalg.norm(x - y) <= r for y in drawn]
        for x, r in zip(real, real_radius, strict=True)
    ]
    expected = {
        "precision": np.mean([any(row[j] for row in inside) for j in range(m)]),
        "recall": np.mean(
            [
                any(
                    np.linalg.norm(x - y) <= r
                    for y, r in zip(drawn, drawn_radius, strict=True)
                )
                for x in real
            ]
        ),
        "density": np.sum(inside) / (k * m),
        "coverage": np.mean([any(row) for row in inside]),
    }
    assert neighbourhoods(real, drawn, k) == pytest.approx(expected)


# libraries


@pytest.mark.parametrize("n, m, d", [(60, 45, 6), (300, 200, 24), (90, 90, 3)])
def test_distances_equal_those_of_torch_fidelity(n, m, d):
    from torch_fidelity.metric_fid import (
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, drawn = map(torch.tensor, clouds(n, m, d))
    fid = fid_statistics_to_metric(
        *map(fid_features_to_statistics, (real, drawn)), False
    )["frechet_inception_distance"]
    assert frechet(real, drawn) == pytest.approx(fid, rel=1e-6)
    fewer = min(n, m)
    kid = kid_features_to_metric(
        drawn[:fewer], real[:fewer], kid_subsets=1, kid_subset_size=fewer, verbose=False
    )
    assert kernel_distance(real[:fewer], drawn[:fewer]) == pytest.approx(
        kid["kernel_inception_distance_mean"], rel=1e-9
    )
    theirs = prc_features_to_metric(drawn, real, prc_neighborhood=3, verbose=False)
    ours = neighbourhoods(real, drawn, 3)
    assert ours["precision"] == pytest.approx(theirs["precision"])
    assert ours["recall"] == pytest.approx(theirs["recall"])


def test_distances_equal_those_of_scikit_learn():
    real, drawn = clouds(200, 150, 5)
    inside = [polynomial_kernel(c, degree=3) for c in (real, drawn)]
    expected = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in inside)
    assert kernel_distance(real, drawn) == pytest.approx(
        expected - 2 * polynomial_kernel(real, drawn, degree=3).mean()
    )
    radii = NearestNeighbors(n_neighbors=5).fit(real).kneighbors()[0][:, -1]
    to_drawn = NearestNeighbors(n_neighbors=1).fit(drawn).kneighbors(real)[0][:, 0]
    assert neighbourhoods(real, drawn)["coverage"] == pytest.approx(
        (to_drawn <= radii).mean()
    )


# properties of all metrics


@pytest.mark.parametrize("metric", list(metrics))
def test_metrics_ignore_the_order_of_samples_and_rotation(metric):
    real, drawn = clouds(80, 80, 4)
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    function = metrics[metric].load()
    shuffled = function(rng.permutation(real), rng.permutation(drawn))
    assert shuffled == pytest.approx(function(real, drawn))
    rotated = function(real @ rotation, drawn @ rotation)
    assert rotated == pytest.approx(
        function(real, drawn), rel=0.1 if metric == "sliced Wasserstein" else 1e-6
    )
    if metric != "neighbourhoods":
        assert function(drawn, real) == pytest.approx(function(real, drawn))


@pytest.mark.parametrize("metric", list(metrics))
def test_bad_input_is_refused_with_the_value(metric):
    real, drawn = clouds()
    function = metrics[metric].load()
    bad = drawn.copy()
    bad[3, 1] = np.nan
    for first, second, words in (
        (real, bad, "1 of 45 drawn samples are not finite, first 3"),
        (bad, real, "45 real samples"),
        (real, drawn[:, :4], "6 dimensions, drawn ones 4"),
        (real[0], drawn, r"shape \(6,\)"),
        (real[:0], drawn, r"shape \(0, 6\)"),
        (real[:, :0], drawn[:, :0], r"\(60, 0\)"),
    ):
        with pytest.raises(ValueError, match=words):
            function(first, second)
    bad[3, 1] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        measure(metric, real, bad)


def test_unsuitable_settings_are_refused():
    real, drawn = clouds()
    for call, words in (
        (lambda: neighbourhoods(real, drawn, 45), "smaller set has 45"),
        (lambda: neighbourhoods(real, drawn, 0), "neighbours is 0"),
        (lambda: sliced_wasserstein(real, drawn, 0), "directions 0"),
        (lambda: sliced_wasserstein(real, drawn, order=0.5), "order 0.5"),
        (lambda: measure("FID", real, drawn), "known are Frechet"),
        (lambda: measure("kernel distance", real, drawn, 1), "1 resamples"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# intervals


@pytest.mark.parametrize(
    "metric, truth",
    [
        ("kernel distance", 3 * 0.64 + 3 * 0.64**2 + (0.512 + 2.4) ** 2),
        ("Frechet distance", 0.64),
        ("sliced Wasserstein", 0.8),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_claim(metric, truth):
    """N(0, 1) and N(0.8, 1) on a line. The kernel distance is known by moments:

    3 (a-b)^2 + 3 (a^2-b^2)^2 + (a^3-b^3 + 3(a-b))^2.
    """
    rng = np.random.default_rng(4)
    covered = 0
    for seed in range(100):
        measurement = measure(
            metric, rng.normal(size=(120, 1)), rng.normal(0.8, 1, (120, 1)), 20, seed
        )[metric]
        covered += measurement.interval[0] <= truth <= measurement.interval[1]
    # of 100 intervals of 95 %; fewer than 87 occur by chance once in 700 times
    assert 87 <= covered <= 100


def test_an_interval_is_as_wide_as_fresh_samples_spread():
    rng = np.random.default_rng(5)

    def fresh():
        return rng.normal(size=(150, 3)), rng.normal(0.7, 1, (150, 3))

    for metric in metrics:
        numbers = [measure(metric, *fresh(), resamples=0) for _ in range(60)]
        intervals = [
            measure(metric, *fresh(), resamples=30, seed=seed) for seed in range(6)
        ]
        for name in numbers[0]:
            spread = np.std([measured[name].value for measured in numbers])
            widths = [
                np.diff(measured[name].interval)[0] / (2 * 1.96)
                for measured in intervals
            ]
            assert 0.6 < np.mean(widths) / spread < 1.7, name


def test_a_measurement_states_its_counts_and_doubts():
    rng = np.random.default_rng(6)
    real, drawn = rng.normal(size=(2, 60, 8))
    measurement = measure("Frechet distance", real, drawn, 4)["Frechet distance"]
    assert measurement.counts == (60, 60)
    assert "60 samples in 8 dimensions: mostly bias" in measurement.doubts[0]
    assert " to " in str(measurement)
    assert (
        measure("Frechet distance", real[:8], drawn, 0)["Frechet distance"]
        .doubts[0]
        .startswith("8 samples span less than 8")
    )
    assert (
        measure("Frechet distance", *rng.normal(size=(2, 90, 8)), 0)[
            "Frechet distance"
        ].doubts
        == ()
    )
    assert measure("kernel distance", real[:40], drawn, 0)[
        "kernel distance"
    ].doubts == ("40 samples are few",)
    assert (
        measurement == measure("Frechet distance", real, drawn, 4)["Frechet distance"]
    ), "the same seed, the same interval"
    shares = measure("neighbourhoods", real, drawn, 10)
    assert list(shares) == ["precision", "recall", "density", "coverage"]
    assert shares["recall"].interval[1] <= 1
