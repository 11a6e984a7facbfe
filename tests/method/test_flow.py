"""The path, the densities of levels and the keyed random numbers equal formulas derived
independently; invalid levels and densities are refused.
"""

import math
import multiprocessing
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from selfflow.checks import check_shares
from selfflow.draws import draw_index, keyed, noise_like
from selfflow.method.flow import (
    LogitNormal,
    Mixture,
    PlateauLogitNormal,
    Shifted,
    Uniform,
    interpolate,
    shift,
    velocity,
)


def unshift(t, alpha):
    t = np.asarray(t)
    return t / (t + alpha * (1 - t))


def logit_normal_pdf(mean, std):
    """By the change of variables from scipy's normal density."""
    return lambda t: stats.norm(mean, std).pdf(np.log(t / (1 - t))) / (t * (1 - t))


def plateau_cdf(mean, std):
    """By a numerical search for the mode and numerical integration, without the closed
    forms under test.
    """
    q = logit_normal_pdf(mean, std)
    mode = optimize.minimize_scalar(
        lambda z: -q(1 / (1 + np.exp(-z))), bracket=(mean - 1, mean + 1), tol=1e-12
    ).x
    mode = 1 / (1 + np.exp(-mode))
    fine = np.linspace(0, 1, 200_001)
    height = q(np.clip(fine, 1e-12, mode))
    area = integrate.cumulative_trapezoid(height, fine, initial=0)
    return lambda t: np.interp(np.asarray(t), fine, area / area[-1])


PLATEAUS = [
    (0.0, 1.0),
    (math.log(10), 1.0),
    (-1.5, 0.4),
    (0.7, math.sqrt(2)),
    (4.0, 1.4),
]
DENSITIES = {
    "uniform": (Uniform(), stats.uniform().cdf),
    "logit-normal": (
        LogitNormal(0.3, 1.2),
        lambda t: stats.norm(0.3, 1.2).cdf(torch.logit(torch.as_tensor(t)).numpy()),
    ),
    "shifted uniform": (Shifted(Uniform(), 3.0), lambda t: t / (t + 3.0 * (1 - t))),
    "shifted logit-normal": (
        Shifted(LogitNormal(), 4.63),
        lambda t: stats.norm(math.log(4.63), 1).cdf(
            torch.logit(torch.as_tensor(t)).numpy()
        ),
    ),
    "part of the interval": (Uniform(0.25, 0.75), stats.uniform(0.25, 0.5).cdf),
    "video": (
        Mixture((Uniform(), Uniform(0.95, 1)), (0.95, 0.05)),
        lambda t: (
            0.95 * np.asarray(t) + 0.05 * np.clip((np.asarray(t) - 0.95) / 0.05, 0, 1)
        ),
    ),
    "three": (
        Mixture((LogitNormal(), Uniform(0, 0.5), Uniform()), (0.2, 0.0, 0.8)),
        lambda t: (
            0.2 * stats.norm.cdf(torch.logit(torch.as_tensor(t)).numpy())
            + 0.8 * np.asarray(t)
        ),
    ),
    "shifted video": (
        Shifted(Mixture((Uniform(), Uniform(0.5, 1)), (0.5, 0.5)), 2.0),
        lambda t: 0.5 * unshift(t, 2) + np.clip(unshift(t, 2) - 0.5, 0, 1),
    ),
    **{
        f"plateau {mean:.2f} {std:.2f}": (
            PlateauLogitNormal(mean, std),
            plateau_cdf(mean, std),
        )
        for mean, std in PLATEAUS
    },
}


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)])
@pytest.mark.parametrize("leading", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolation_is_the_line_from_data_to_noise(shape, leading, dtype):
    leading = min(leading, len(shape))
    g = torch.Generator().manual_seed(len(shape) + leading)
    x0, x1 = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
    t = torch.rand(shape[:leading], generator=g, dtype=dtype)
    expected = torch.empty_like(x0)
    for index in (
        torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist()
    ):
        level = t[tuple(index[:leading])].item()
        expected[tuple(index)] = (
            x0[tuple(index)] * (1 - level) + x1[tuple(index)] * level
        )
    torch.testing.assert_close(interpolate(x0, x1, t), expected)


def test_time_runs_from_data_at_0_to_noise_at_1():
    data = torch.full((2, 3), 5.0)
    noise = torch.full((2, 3), -7.0)
    assert torch.equal(interpolate(data, noise, 0.0), data)
    assert torch.equal(interpolate(data, noise, 1.0), noise)
    assert torch.equal(velocity(data, noise), torch.full((2, 3), -12.0))
    x = interpolate(data, noise, 1.0)
    dt = 0.25
    for _ in range(4):  # going against the velocity leads from noise to data
        x = x - dt * velocity(data, noise)
    assert torch.equal(x, data)


@pytest.mark.parametrize("t", [1.5, -0.1, float("nan"), torch.tensor([0.5, 1.01])])
def test_levels_out_of_range_are_refused(t):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        interpolate(torch.zeros(2, 4), torch.zeros(2, 4), t)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and noise of shape \(3, 4\)"):
        interpolate(torch.zeros(2, 3, 4), torch.zeros(3, 4), 0.5)


def test_a_number_as_level_is_exact_in_float64():
    x = torch.ones(2, 3, dtype=torch.float64)
    assert (interpolate(x, 0 * x, 0.3) == 1 - 0.3).all()
    assert interpolate(x, x, 0.3).dtype == torch.float64


def test_levels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 4\)"):
        interpolate(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3))


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_of_a_density_follow_its_pdf(name):
    density, cdf = DENSITIES[name]
    drawn = density.sample((20_000,), keyed(0, name))
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min()
    assert drawn.max() <= 1
    assert stats.kstest(drawn.double().numpy(), cdf).pvalue > 1e-3
    t = torch.linspace(
        0.021, 0.981, 25, dtype=torch.float64
    )  # no density has a corner here
    slope = (torch.as_tensor(cdf(t + 1e-5)) - torch.as_tensor(cdf(t - 1e-5))) / 2e-5
    # the reference for plateaus is numerical
    tolerance = (
        {"rtol": 2e-4, "atol": 1e-5}
        if "plateau" in name
        else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(density.pdf(t), slope, **tolerance)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("shape", [(), (2, 0), (2, 3, 4)])
def test_every_density_follows_the_interface(name, shape):
    density, _ = DENSITIES[name]
    drawn = density.sample(shape, keyed(1, "shape"))
    assert drawn.shape == shape
    assert drawn.dtype == torch.float32
    assert drawn.device.type == "cpu"
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert torch.equal(drawn, density.sample(shape, keyed(1, "shape"))), (
        "only the generator decides"
    )
    assert density.pdf(torch.full(shape, 0.3)).shape == shape
    assert density.pdf(torch.full(shape, 0.3)).dtype == torch.float32


def test_uniform_levels_equal_those_of_rand():
    assert torch.equal(
        Uniform().sample((1000,), keyed(0, "u")),
        torch.rand(1000, generator=keyed(0, "u")),
    )


@given(st.floats(0, 0.999), st.floats(1e-3, 1), st.integers(0, 9))
def test_uniform_levels_stay_in_their_interval(low, width, seed):
    high = min(low + width, 1.0)
    drawn = Uniform(low, high).sample((500,), keyed(seed, "u"))
    assert torch.tensor(low) <= drawn.min()
    assert drawn.max() <= torch.tensor(high)
    assert drawn.max() <= 1
    outside = Uniform(low, high).pdf(
        torch.tensor([low - 0.01, high + 0.01, (low + high) / 2], dtype=torch.float64)
    )
    assert outside.tolist() == pytest.approx([0, 0, 1 / (high - low)])


@pytest.mark.parametrize("mean, std", PLATEAUS + [(-30, 1.0), (30, 1.0), (12.0, 0.1)])
def test_a_plateau_is_constant_from_the_mode_and_logit_normal_below(mean, std):
    density = PlateauLogitNormal(mean, std)
    mode, below, plateau = density.parts
    logit = math.log(mode) - math.log1p(-mode)
    assert logit == pytest.approx(
        mean + std**2 * (2 * mode - 1), abs=1e-3 if mean > 20 else 1e-9
    ), "the equation of the mode"
    assert below == pytest.approx(
        stats.norm.cdf((logit - mean) / std), abs=1e-3 if mean > 20 else 1e-9
    )
    if abs(mean) < 10:
        above = density.pdf(torch.linspace(mode, 1, 50, dtype=torch.float64))
        assert above.tolist() == pytest.approx([above[0].item()] * 50)
        under = torch.linspace(mode / 50, mode, 50, dtype=torch.float64)
        ratio = density.pdf(under) / torch.as_tensor(
            logit_normal_pdf(mean, std)(under.numpy())
        )
        assert ratio.tolist() == pytest.approx([1 / (below + plateau)] * 50), (
            "one factor for all levels"
        )
        assert (density.pdf(under).diff() >= -1e-9).all(), "it rises to the mode"
    drawn = density.sample((5000,), keyed(0, "plateau"))
    assert drawn.isfinite().all()
    assert 0 <= drawn.min()
    assert drawn.max() <= 1
    # the share of the plateau; float32 cannot resolve levels closer to 1 than 6e-8
    share = plateau / (below + plateau)
    if mean < 15:
        assert (drawn > mode).float().mean() == pytest.approx(share, abs=0.02)


def test_the_extremes_of_the_uniform_number_give_valid_levels(monkeypatch):
    extremes = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: extremes.clone())
    for mean, std in PLATEAUS:
        drawn = PlateauLogitNormal(mean, std).sample((3,))
        assert drawn[0] == 0
        assert 0 < drawn[1] < 0.05
        assert 1 - 1e-5 < drawn[2] <= 1
    assert Uniform(0.1, 0.7).sample((3,)).tolist() == pytest.approx([0.1, 0.1, 0.7])
    assert Uniform(0.09, 0.12).sample((3,)).max() <= torch.tensor(0.12), (
        "float32 would round past the end"
    )
    assert draw_index((0.5, 0.25, 0.25), (3,)).tolist() == [1, 1, 0]
    assert draw_index((0.5, 0.0, 0.5), (3,)).tolist() == [2, 2, 0], (
        "index 1 has no share"
    )


def test_a_mixture_takes_each_level_from_one_of_its_densities():
    densities = (Uniform(0, 0.1), Uniform(0.4, 0.5), Uniform(0.9, 1))
    drawn = Mixture(densities, (0.5, 0.2, 0.3)).sample((30_000,), keyed(0, "mixture"))
    shares = [
        ((drawn >= density.low) & (drawn <= density.high)).float().mean().item()
        for density in densities
    ]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.01)
    assert torch.equal(
        Mixture(densities[:1], (1.0,)).sample((9,), keyed(0, "x")),
        densities[0].sample((9,), keyed(0, "x")),
    )


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(sum), st.integers(0, 99)
)
def test_a_drawn_index_equals_a_loop(counts, seed):
    shares = tuple(count / sum(counts) for count in counts)
    drawn = draw_index(shares, (4, 5), keyed(seed, "index"))
    assert drawn.dtype == torch.int64
    uniform = torch.rand(4, 5, generator=keyed(seed, "index"))
    for u, index in zip(
        uniform.flatten().tolist(), drawn.flatten().tolist(), strict=True
    ):
        # index 1 below the first edge, then 2, ...; the rest is index 0
        edge, expected = 0.0, 0
        for j in range(1, len(shares)):
            edge += shares[j]
            if u < edge:
                expected = j
                break
        assert index == expected
        assert shares[index] > 0


@pytest.mark.parametrize(
    "shares", [(), (0.5,), (0.5, 0.6), (-0.1, 1.1), (math.nan, 1.0), (math.inf,)]
)
def test_shares_that_are_no_probabilities_are_refused(shares):
    with pytest.raises(ValueError, match="parts are.*sum to 1"):
        check_shares(shares, "parts")
    with pytest.raises(ValueError, match="weights are.*sum to 1"):
        Mixture((Uniform(),) * len(shares), shares)


def test_a_mixture_needs_a_weight_for_each_density():
    with pytest.raises(ValueError, match="2 densities with 1 weights"):
        Mixture((Uniform(), Uniform()), (1.0,))


@pytest.mark.parametrize(
    "low, high",
    [(-0.1, 1), (0, 1.1), (0.5, 0.5), (0.7, 0.2), (math.nan, 1), (0, math.nan)],
)
def test_intervals_outside_0_to_1_are_refused(low, high):
    with pytest.raises(
        ValueError, match=f"low {low}.*high {high}.*0 <= low < high <= 1"
    ):
        Uniform(low, high)


@pytest.mark.parametrize(
    "mean, std",
    [(0.0, 1.5), (0.0, math.inf), (31.0, 1.0), (math.nan, 1.0), (-math.inf, 1.0)],
)
def test_plateaus_without_one_mode_are_refused(mean, std):
    with pytest.raises(ValueError, match=f"mean is {mean}, std is {std}.*two modes"):
        PlateauLogitNormal(mean, std)


def test_a_std_above_sqrt_2_can_have_two_modes():
    q = logit_normal_pdf(0.0, 1.6)(np.linspace(0.001, 0.999, 999))
    peaks = (q[1:-1] > q[:-2]) & (q[1:-1] > q[2:])
    assert peaks.sum() == 2, "the reason why such a std is refused"


@given(st.floats(0, 1), st.floats(0.05, 20))
def test_a_shift_preserves_the_ends_and_is_inverted_by_its_inverse(t, alpha):
    t = torch.tensor(t, dtype=torch.float64)
    assert 0 <= shift(t, alpha) <= 1
    torch.testing.assert_close(shift(shift(t, alpha), 1 / alpha), t)
    assert shift(torch.tensor(0.0), alpha) == 0
    assert shift(torch.tensor(1.0), alpha) == 1
    assert (shift(t, alpha) - t) * (alpha - 1) >= -1e-12, (
        "alpha > 1 moves towards noise, alpha < 1 towards data"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: shift(torch.zeros(1), 0.0),
        lambda: Shifted(Uniform(), -1.0),
        lambda: LogitNormal(0, 0),
        lambda: PlateauLogitNormal(0, -1),
        lambda: shift(torch.zeros(1), math.nan),
    ],
)
def test_bad_densities_are_refused(wrong):
    with pytest.raises(ValueError, match="> 0"):
        wrong()


def test_keyed_numbers_depend_only_on_the_whole_key():
    def draw(*key):
        return torch.randn(256, generator=keyed(*key))

    base = draw(0, "noise", 1, 2)
    torch.rand(10)  # the global stream has no effect
    assert torch.equal(base, draw(0, "noise", 1, 2))
    others = [
        draw(*key)
        for key in (
            (1, "noise", 1, 2),
            (0, "levels", 1, 2),
            (0, "noise", 2, 2),
            (0, "noise", 1, 3),
            (0, "noise", 12),
        )
    ]
    for i, a in enumerate([base, *others]):
        for b in [base, *others][i + 1 :]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.3
    # any change here would change every run
    assert draw(0, "noise")[:2].tolist() == pytest.approx(GOLDEN)


GOLDEN = [1.432212233543396, 0.6305968761444092]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def drawn_in_shards(dtype=torch.float32):
    return noise_like(
        torch.zeros(12, 5, 3, dtype=dtype),
        [partial(keyed, 0, shard=shard) for shard in range(4)],
    )


def test_noise_is_the_concatenation_of_its_shards(two_threads):
    in_turn = torch.cat(
        [
            torch.randn(3, 5, 3, generator=keyed(0, "noise", shard=shard))
            for shard in range(4)
        ]
    )
    assert torch.equal(drawn_in_shards(), in_turn)
    assert torch.equal(drawn_in_shards(torch.float64), in_turn.double())
    torch.set_num_threads(1)
    assert torch.equal(drawn_in_shards(), in_turn)


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(),
    reason="processes are not forked here",
)
def test_a_forked_process_can_draw_noise(two_threads):
    """The threads of its parent do not exist in it, so waiting for them would never
    end.
    """
    noise = drawn_in_shards()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(pool.apply_async(drawn_in_shards).get(timeout=60), noise)
