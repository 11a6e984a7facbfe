"""Intervals cover the truth as often as they claim, even where nothing varies.

`python tests/analysis/test_intervals.py` compares old and new methods in a large
simulation and writes data/results/interval_coverage.json.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from scipy.special import gammaln, xlogy
from scipy.stats import t

from selfflow.intervals import (
    _seeds_interval,
    cells_in_words,
    compare_items,
    compare_seeds,
    compare_values,
    mean_interval,
    paired_difference,
    proportion_interval,
    score_interval,
    score_of,
    smallest_effect,
    tango_interval,
)

RECORD = Path(__file__).parents[2] / "data/results/interval_coverage.json"
SHARES = (0.02, 0.03, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.97, 0.98)
# 0: the arms are independent; 1: as alike as their shares allow
TIES = (0.0, 0.5, 0.95)


# paired proportions: coverage is exact, from the probability of every outcome


@lru_cache
def outcomes(n: int) -> tuple[np.ndarray, np.ndarray]:
    "Counts of items that only the second, and only the first, arm gets right."
    only_second, only_first = np.meshgrid(np.arange(n + 1), np.arange(n + 1))
    possible = only_second + only_first <= n
    return only_second[possible], only_first[possible]


def chances(n: int, p: float, q: float, tie: float) -> np.ndarray:
    "The probability of each outcome for arms that are right with p and q."
    both = p * q + tie * (min(p, q) - p * q)
    b, c = outcomes(n)
    ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
    return np.exp(
        ways
        + xlogy(b, q - both)
        + xlogy(c, p - both)
        + xlogy(n - b - c, 1 - p - q + 2 * both)
    )


def expected(ends, n: int, p: float, q: float, tie: float) -> tuple[float, float]:
    "Coverage and mean width of the intervals of all outcomes."
    low, high = ends
    weights = chances(n, p, q, tie)
    truth = q - p
    return float(weights[(low <= truth + 1e-9) & (truth - 1e-9 <= high)].sum()), float(
        (weights * (high - low)).sum()
    )


@lru_cache
def tango(n: int):
    return tango_interval(*outcomes(n), n)


@lru_cache
def percentile_of_outcomes(n: int, resamples: int = 1000):
    "The bootstrap interval of paired proportions for each outcome."
    rng = np.random.default_rng(0)
    b, c = outcomes(n)
    ends = []
    for cell in np.stack([b, c, n - b - c], 1) / n:
        counts = rng.multinomial(n, cell, resamples)
        ends.append(np.percentile((counts[:, 0] - counts[:, 1]) / n, (2.5, 97.5)))
    return np.array(ends).T


@pytest.mark.parametrize("n, least", [(20, 0.92), (50, 0.93), (100, 0.93)])
def test_intervals_of_paired_proportions_cover_from_2_to_98_percent(n, least):
    covered = [
        expected(tango(n), n, p, q, tie)[0]
        for p in SHARES
        for q in SHARES
        for tie in TIES
    ]
    assert min(covered) >= least
    assert 0.95 < np.mean(covered) < 0.975


def test_the_bootstrap_interval_of_paired_proportions_fails_near_1():
    old, new = (
        expected(ends(20), 20, 0.97, 0.99, 0.5)
        for ends in (percentile_of_outcomes, tango)
    )
    assert old[0] < 0.5 < 0.95 < new[0]
    assert old[1] < new[1]


@pytest.mark.parametrize(
    "counts, ends",
    [
        ((1, 7, 21), (-0.5172, -0.0260)),
        ((0, 0, 20), (-0.1611, 0.1611)),
        ((20, 0, 20), (0.6777, 1.0)),
    ],
)
def test_tango_intervals_equal_the_published_ones(counts, ends):
    "First: Bentur et al. 2009, in Fagerland, Lydersen and Laake, BMC MRM 2013."
    assert tango_interval(*counts) == pytest.approx(ends, abs=1e-4)
    assert tango_interval(counts[1], counts[0], counts[2]) == pytest.approx(
        (-ends[1], -ends[0]), abs=1e-4
    )


def test_the_ends_of_tangos_interval_are_just_rejected():
    "The likeliest share, on a fine grid, puts the test statistic at its limit."
    b, c, n = 8, 3, 40
    for end in tango_interval(b, c, n):
        share = np.linspace(max(0, -end), (1 - end) / 2, 200_001)[1:-1]
        likely = share[
            np.argmax(
                b * np.log(share + end)
                + c * np.log(share)
                + (n - b - c) * np.log(1 - 2 * share - end)
            )
        ]
        statistic = (b - c - n * end) / np.sqrt(n * (2 * likely + end * (1 - end)))
        assert abs(statistic) == pytest.approx(1.959964, abs=1e-3)


def test_zeros_and_ones_get_tangos_interval_in_every_form():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 80)) < 0.9
    actual = paired_difference(first, second)
    low, high = tango_interval((second & ~first).sum(), (first & ~second).sum(), 80)
    assert actual[1:] == (low, high)
    assert actual[0] == pytest.approx(second.mean() - first.mean())
    assert actual == paired_difference(first.astype(int), second.astype(float))
    assert compare_items((~first, np.ones(80)), (~second, np.ones(80))).interval == (
        low,
        high,
    )
    assert compare_values(first, second).interval == (low, high)


# skewed values and scores: coverage is simulated


def percentile(values, weights=None, draws: int = 1000) -> np.ndarray:
    "The bootstrap interval of a ratio of sums, for many samples at once: (2, samples)."
    n = values.shape[1]
    counts = (
        np.random.default_rng(0)
        .multinomial(n, np.full(n, 1 / n), draws)
        .astype(float)
        .T
    )
    return np.percentile(
        values @ counts / (n if weights is None else weights @ counts),
        (2.5, 97.5),
        axis=1,
    )


def student(values) -> np.ndarray:
    "Student's interval of the mean for many samples at once: (2, samples)."
    half = (
        t.ppf(0.975, values.shape[1] - 1)
        * values.std(1, ddof=1)
        / np.sqrt(values.shape[1])
    )
    return np.stack([values.mean(1) - half, values.mean(1) + half])


def coverage(ends, truth: float) -> tuple[float, float]:
    low, high = ends
    return float(np.mean((low <= truth) & (truth <= high))), float(np.mean(high - low))


MEANS = {  # how values are drawn, and their mean
    "lognormal": (lambda rng, size: rng.lognormal(size=size), np.exp(0.5)),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
    "difference of lognormals": (
        lambda rng, size: rng.lognormal(size=size) - rng.lognormal(size=size),
        0.0,
    ),
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
}
TARGETS = {  # with mean 0 and variance 1
    "normal": lambda rng, size: rng.normal(size=size),
    "uniform": lambda rng, size: rng.uniform(-1, 1, size) * 3**0.5,
    "exponential": lambda rng, size: rng.exponential(size=size) - 1,
    "two values": lambda rng, size: rng.choice([-1.0, 1.0], size),
}
HARD = {  # the variance itself is hardly known from 50 items: nothing here reaches 95 %
    "lognormal": lambda rng, size: (
        (rng.lognormal(size=size) - np.exp(0.5)) / np.sqrt(np.exp(2) - np.exp(1))
    ),
}


def residuals(
    rng, samples: int, n: int, target: str, *sizes: float, shared: float = 0.0
):
    """Spreads (samples, n) and squared errors of models with R^2 of 1 - size^2.

    shared: the share of equal noise.
    """
    y = (TARGETS | HARD)[target](rng, (samples, n))
    common = rng.normal(size=y.shape)
    same = rng.random(y.shape) < shared
    errors = [
        (size * np.where(same, common, rng.normal(size=y.shape))) ** 2 for size in sizes
    ]
    return (y - y.mean(1, keepdims=True)) ** 2, *errors


def simulated_mean(name: str, n: int, samples: int) -> dict:
    draw, truth = MEANS[name]
    values = draw(np.random.default_rng(n), (samples, n))
    return {
        "percentile": coverage(percentile(values), truth),
        "Student": coverage(student(values), truth),
        "now": coverage(mean_interval(values)[1:], truth),
    }


def simulated_score(target: str, n: int, samples: int, size: float = 0.5) -> dict:
    spreads, errors = residuals(np.random.default_rng(n), samples, n, target, size)
    ends = np.array(
        [score_interval(e, s) for e, s in zip(errors, spreads, strict=True)]
    ).T
    return {
        "percentile": coverage(1 - percentile(errors, spreads)[::-1], 1 - size**2),
        "now": coverage(ends, 1 - size**2),
    }


def simulated_pair(
    target: str, n: int, samples: int, sizes=(0.6, 0.4), shared: float = 0.5
) -> dict:
    spreads, first, second = residuals(
        np.random.default_rng(n), samples, n, target, *sizes, shared=shared
    )
    ends = np.array(
        [
            compare_items((a, s), (b, s)).interval
            for a, b, s in zip(first, second, spreads, strict=True)
        ]
    ).T
    truth = sizes[0] ** 2 - sizes[1] ** 2
    return {
        "percentile": coverage(percentile(first - second, spreads), truth),
        "now": coverage(ends, truth),
    }


@pytest.mark.parametrize("n, least", [(20, 0.90), (50, 0.91)])
@pytest.mark.parametrize("name", MEANS)
def test_intervals_cover_means_of_skewed_values(name, n, least):
    result = simulated_mean(name, n, 1000)
    assert result["now"][0] >= max(least, result["percentile"][0])
    assert result["now"][1] < 2 * result["Student"][1]


def test_a_very_skewed_target_is_covered_far_better_than_by_the_bootstrap():
    result = simulated_score("lognormal", 50, 500)
    assert result["percentile"][0] < 0.75
    assert result["now"][0] > 0.85


@pytest.mark.parametrize("n, least", [(20, 0.90), (50, 0.91)])
@pytest.mark.parametrize("target", TARGETS)
def test_intervals_cover_scores_and_their_differences(target, n, least):
    for result in (simulated_score(target, n, 800), simulated_pair(target, n, 800)):
        assert result["now"][0] >= max(least, result["percentile"][0])
        assert result["now"][1] < 2 * result["percentile"][1]


def test_intervals_cover_differences_of_overlaps_with_unlike_unions():
    "The spreads of two arms differ, as unions do."
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(600):
        figure = rng.integers(5, 30, 60)
        union = [figure + rng.binomial(20, share, 60) for share in (0.3, 0.2)]
        errors = [
            total - rng.binomial(figure, share)
            for total, share in zip(union, (0.7, 0.8), strict=True)
        ]
        low, high = compare_items(*zip(errors, union, strict=True)).interval
        hits.append(low <= 17 * 0.8 / (17 + 4) - 17 * 0.7 / (17 + 6) <= high)
    assert np.mean(hits) > 0.93


def test_one_ratio_of_differences_equals_the_difference_of_ratios():
    rng = np.random.default_rng(0)
    spreads, first, second = rng.random((3, 50))
    together = compare_items((first, spreads), (second, spreads))
    apart = compare_items((first, spreads), (second, spreads * (1 + 1e-12)))
    assert apart.interval == pytest.approx(together.interval, rel=1e-6)
    assert apart.difference == pytest.approx(together.difference)


def test_the_interval_of_a_mean_is_that_of_a_score_and_scales_with_the_values():
    values = np.random.default_rng(0).lognormal(size=(2, 3, 40))
    mean, low, high = mean_interval(values)
    assert mean.shape == low.shape == high.shape == (2, 3)
    score = score_interval(values[1, 2], np.ones(40))
    assert (1 - score[1], 1 - score[0]) == pytest.approx((low[1, 2], high[1, 2]))
    for moved, ends in zip(
        mean_interval(3 * np.moveaxis(values, -1, 0) + 5, axis=0),
        (mean, low, high),
        strict=True,
    ):
        np.testing.assert_allclose(moved, 3 * ends + 5)
    assert mean_interval(values)[1][0, 0] == low[0, 0], (
        "the same values, the same interval"
    )


# where nothing varies


@pytest.mark.parametrize("n", [2, 3, 20, 500])
def test_only_zeros_are_certain(n):
    unseen = 1.959964**2 / (n + 1.959964**2)
    values = np.linspace(0.1, 0.7, n)
    assert paired_difference(values, values) == pytest.approx(
        (0, -0.7 * unseen, 0.7 * unseen)
    )
    assert mean_interval(np.full(n, 0.3)) == pytest.approx(
        (0.3, 0.3 - 0.3 * unseen, 0.3 + 0.3 * unseen)
    )
    assert mean_interval(np.zeros(n)) == paired_difference(
        np.zeros(n) - 0.0, np.zeros(n), 10
    )[:1] + (0, 0)
    right = np.ones(n, bool)
    assert paired_difference(right, right) == pytest.approx((0, -unseen, unseen))
    assert score_interval(np.zeros(n), np.ones(n)) == pytest.approx((1 - unseen, 1))
    assert score_interval(np.zeros(n), np.full(n, 2.0)) == pytest.approx(
        (1 - unseen, 1)
    ), "R^2 = 1 is as certain as all correct"
    same = compare_items((values, values + 1), (values, values + 1))
    assert same.interval[0] < 0 < same.interval[1]
    assert not same.significant
    assert same.smallest > same.interval[1]


def test_a_single_item_gives_the_widest_interval_and_none_is_refused():
    assert mean_interval([0.3]) == (0.3, -np.inf, np.inf)
    assert score_interval([0.3], [1.0]) == (-np.inf, 1.0)
    assert not compare_items(([0.3], [1.0]), ([0.1], [1.0])).significant
    assert not compare_values([0.3], [0.1]).significant
    low, high = proportion_interval([True])
    assert 0.2 < low < high == 1
    assert paired_difference([True], [False])[1:] == pytest.approx((-1, 0.58690137))
    for call in (lambda: mean_interval([]), lambda: paired_difference([], [])):
        with pytest.raises(ValueError, match="at least one|same items"):
            call()


def test_undefined_results_are_nan_and_not_significant():
    assert np.isnan(score_interval(np.ones(5), np.zeros(5))).all()
    assert np.isnan(score_of(np.ones(5), np.zeros(5)))
    assert np.isnan(mean_interval([1.0, np.nan, 2.0])).all()
    assert np.isnan(paired_difference([1.0, 2.0], [np.nan, 2.0])).all()
    undefined = compare_items((np.ones(5), np.zeros(5)), (np.ones(5), np.arange(5.0)))
    assert not undefined.significant
    assert np.isnan(undefined.interval).all()
    # most resamples have no spread
    sparse = score_interval([0.2, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0])
    assert sparse[0] < 0.8 < sparse[1] <= 1


def test_a_rare_difference_has_a_bounded_interval():
    "19 of 20 differences are 0, so a third of the resamples have no spread at all."
    differences = np.zeros(20)
    differences[3] = 5.0
    mean, low, high = mean_interval(differences)
    assert mean == 0.25
    assert low < 0
    assert 0.7 < high < 2


# comparisons


@pytest.mark.parametrize("share", [0.5, 0.2, 0.03])
def test_the_smallest_effect_is_significant_in_eight_of_ten_tests(share):
    rng = np.random.default_rng(0)
    significant = []
    ones = np.ones(500)
    tries = [
        compare_items(*((errors, ones) for errors in rng.random((2, 500)) < share))
        for _ in range(20)
    ]
    least = np.median([comparison.smallest for comparison in tries])
    for _ in range(300):
        wrong = (
            rng.random(500) < share + least / 2,
            rng.random(500) < max(share - least / 2, 0),
        )
        significant.append(
            compare_items(*((errors, ones) for errors in wrong)).significant
        )
    assert 0.72 < np.mean(significant) < 0.88


def test_the_smallest_effect_of_real_values_is_significant_in_eight_of_ten_tests():
    rng = np.random.default_rng(0)
    least = compare_values(rng.normal(size=200), rng.normal(size=200)).smallest
    significant = [
        compare_values(rng.normal(size=200), rng.normal(least, 1, 200)).significant
        for _ in range(300)
    ]
    assert 0.72 < np.mean(significant) < 0.88
    assert smallest_effect((-1.0, 1.0)) == pytest.approx(1 + 0.841621 / 1.959964)


def test_equal_arms_rarely_differ_significantly():
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(200):
        a, b = rng.random((2, 300)) < 0.3
        comparison = compare_items((a, np.ones(300)), (b, np.ones(300)))
        rejected += comparison.significant
        assert comparison.significant or "no significant difference (one of" in str(
            comparison
        )
    assert rejected < 20
    assert "of 2 cells, 1 are above 0 and 0 below" in cells_in_words(
        [[0.1, 0], [0.05, -1], [0.2, 1]]
    )


def test_different_items_are_not_compared():
    wrong = np.random.default_rng(0).random(80) < 0.4
    assert score_of(wrong, np.ones(80)) == pytest.approx(1 - wrong.mean())
    with pytest.raises(ValueError, match="same test items"):
        compare_items((wrong, np.ones(80)), (wrong[1:], np.ones(79)))


# seeds


def test_shared_seeds_are_paired():
    first = {0: 0.5, 1: 0.7, 2: 0.9}
    second = {
        seed: value + gap
        for (seed, value), gap in zip(first.items(), (0.02, 0.03, 0.04), strict=True)
    }
    paired = compare_seeds(first, second)
    apart = compare_seeds(first, {seed + 3: value for seed, value in second.items()})
    half = 4.302653 * 0.01 / 3**0.5
    assert paired.interval == pytest.approx((0.03 - half, 0.03 + half))
    assert paired.significant
    assert not apart.significant
    assert "3 training seeds, paired" in str(paired)
    assert "3 and 3 training seeds, not paired" in str(apart)
    assert _seeds_interval([1, 2, 3])[0] == 2
    for call in (
        lambda: _seeds_interval([1.0]),
        lambda: compare_seeds({0: 1.0}, {0: 2.0}),
    ):
        with pytest.raises(ValueError, match="another seed"):
            call()


def test_equal_gains_of_two_seeds_are_not_significant():
    "Differences that vary only by rounding are not significant."
    for second in ({0: 0.91, 1: 0.92}, {5: 0.91, 6: 0.91}):
        comparison = compare_seeds({0: 0.90, 1: 0.91}, second)
        assert not comparison.significant
        assert comparison.interval[1] > 0.01
    reach = 1.959964**2 / (2 + 1.959964**2)
    assert compare_seeds({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).interval == pytest.approx(
        (-reach, reach)
    )
    assert _seeds_interval([0.5, 0.5]) == pytest.approx(
        (0.5, 0.5 - reach / 2, 0.5 + reach / 2)
    )
    assert _seeds_interval([0, 0]) == (0, 0, 0)
    assert compare_seeds({0: 0.0, 1: 0.0}, {2: 0.0, 3: 0.0}).interval == (0, 0)


# the record


def records() -> list[dict]:
    "The rows of the large simulation."
    rows = []
    for p, q in (
        (0.02, 0.02),
        (0.97, 0.99),
        (0.98, 0.98),
        (0.95, 0.90),
        (0.50, 0.50),
        (0.60, 0.50),
    ):
        for tie in TIES:
            for n in (20, 50, 100):
                rows.append(
                    {
                        "of": "paired proportions",
                        "case": f"{p:g} and {q:g}",
                        "tie": tie,
                        "n": n,
                        "percentile": expected(percentile_of_outcomes(n), n, p, q, tie),
                        "now": expected(tango(n), n, p, q, tie),
                    }
                )
    for n in (20, 50, 100):
        rows += [
            {"of": "mean", "case": name, "n": n, **simulated_mean(name, n, 4000)}
            for name in MEANS
        ]
        rows += [
            {
                "of": "R^2",
                "case": f"{name} target",
                "n": n,
                **simulated_score(name, n, 4000),
            }
            for name in TARGETS | HARD
        ]
        rows += [
            {
                "of": "R^2, paired difference",
                "case": f"{name} target",
                "n": n,
                **simulated_pair(name, n, 4000),
            }
            for name in TARGETS | HARD
        ]
    return rows


def extremes() -> list[dict]:
    "The lowest coverage of Tango's interval over all pairs of SHARES and TIES."
    grid = [(p, q, tie) for p in SHARES for q in SHARES for tie in TIES]
    return [
        {
            "n": n,
            "settings": len(grid),
            "lowest": min(expected(tango(n), n, *setting)[0] for setting in grid),
            "lowest of percentile": min(
                expected(percentile_of_outcomes(n), n, *setting)[0] for setting in grid
            ),
        }
        for n in (20, 50, 100)
    ]


def test_the_stored_record_agrees_with_these_tests():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert {row["n"] for row in record["rows"]} == {20, 50, 100}
    assert len(record["rows"]) == 54 + 42
    for row in record["rows"]:
        if row["case"] == "lognormal target":
            continue
        if row["n"] == 20:
            least = 0.90
        else:
            least = 0.93 if row["of"] == "paired proportions" else 0.91
        assert row["now"][0] >= least, row
    for row in record["rows"][:54:9]:
        p, q = map(float, row["case"].split(" and "))
        assert row["now"] == pytest.approx(
            expected(tango(row["n"]), row["n"], p, q, row["tie"]), abs=5e-5
        )


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    about = {
        "about": "Coverage of the truth by 95 % intervals, and their mean width: "
        "[coverage, width]. Paired proportions "
        "exactly, over all outcomes; the rest over 4,000 samples each.",
        "methods": {
            "percentile": "percentile bootstrap, the former method",
            "now": "Tango's score interval for paired proportions, else the farther of "
            "Student and bootstrap-t",
        },
    }
    lines = [json.dumps(row) for row in rounded(records())]
    text = json.dumps({**about, "extremes": rounded(extremes())}, indent=1)
    RECORD.write_text(
        text[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n",
        encoding="utf-8",
    )
