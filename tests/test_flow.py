"""Oracles for the path, the densities and the keyed draws: each formula derived again, independently."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfflow.flow import LogitNormal, Shifted, Uniform, interpolate, keyed, shift, velocity

DENSITIES = {
    "uniform": (Uniform(), stats.uniform().cdf),
    "logit-normal": (LogitNormal(0.3, 1.2), lambda t: stats.norm(0.3, 1.2).cdf(torch.logit(torch.as_tensor(t)).numpy())),
    "shifted uniform": (Shifted(Uniform(), 3.0), lambda t: t / (t + 3.0 * (1 - t))),
    "shifted logit-normal": (Shifted(LogitNormal(), 4.63),
                             lambda t: stats.norm(math.log(4.63), 1).cdf(torch.logit(torch.as_tensor(t)).numpy())),
}


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("leading", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolate_is_the_line_from_data_to_noise(shape, leading, dtype):
    leading = min(leading, len(shape))
    g = torch.Generator().manual_seed(len(shape) + leading)
    x0, x1 = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
    t = torch.rand(shape[:leading], generator=g, dtype=dtype)
    expected = torch.empty_like(x0)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        level = t[tuple(index[:leading])].item()
        expected[tuple(index)] = x0[tuple(index)] * (1 - level) + x1[tuple(index)] * level
    torch.testing.assert_close(interpolate(x0, x1, t), expected)


def test_time_runs_from_data_at_0_to_noise_at_1():
    data, noise = torch.full((2, 3), 5.0), torch.full((2, 3), -7.0)
    assert torch.equal(interpolate(data, noise, 0.0), data)
    assert torch.equal(interpolate(data, noise, 1.0), noise)
    assert torch.equal(velocity(data, noise), torch.full((2, 3), -12.0))
    x, dt = interpolate(data, noise, 1.0), 0.25
    for _ in range(4):  # walking against the velocity leads from noise to data
        x = x - dt * velocity(data, noise)
    assert torch.equal(x, data)


def test_levels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 4\)"):
        interpolate(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3))


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_sample_what_they_say(name):
    density, cdf = DENSITIES[name]
    drawn = density.sample((20_000,), keyed(0, name))
    assert drawn.dtype == torch.float32 and 0 <= drawn.min() and drawn.max() <= 1
    assert stats.kstest(drawn.double().numpy(), cdf).pvalue > 1e-3
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    slope = (torch.as_tensor(cdf(t + 1e-5)) - torch.as_tensor(cdf(t - 1e-5))) / 2e-5
    torch.testing.assert_close(density.pdf(t), slope, rtol=1e-5, atol=1e-6)


@given(st.floats(0, 1), st.floats(0.05, 20))
def test_shift_keeps_the_ends_and_inverts(t, alpha):
    t = torch.tensor(t, dtype=torch.float64)
    assert 0 <= shift(t, alpha) <= 1
    torch.testing.assert_close(shift(shift(t, alpha), 1 / alpha), t)
    assert shift(torch.tensor(0.0), alpha) == 0 and shift(torch.tensor(1.0), alpha) == 1
    assert (shift(t, alpha) - t) * (alpha - 1) >= -1e-12, "alpha > 1 moves towards noise, alpha < 1 towards data"


@pytest.mark.parametrize("wrong", [lambda: shift(torch.zeros(1), 0.0), lambda: Shifted(Uniform(), -1.0),
                                   lambda: LogitNormal(0, 0), lambda: shift(torch.zeros(1), math.nan)])
def test_bad_densities_are_refused(wrong):
    with pytest.raises(ValueError, match="> 0"):
        wrong()


def test_keyed_draws_depend_on_every_part_of_the_key_and_on_nothing_else():
    def draw(*key):
        return torch.randn(256, generator=keyed(*key))
    base = draw(0, "noise", 1, 2)
    torch.rand(10)  # the global stream plays no part
    assert torch.equal(base, draw(0, "noise", 1, 2))
    others = [draw(*key) for key in ((1, "noise", 1, 2), (0, "levels", 1, 2), (0, "noise", 2, 2), (0, "noise", 1, 3),
                                     (0, "noise", 12))]
    for i, a in enumerate([base, *others]):
        for b in [base, *others][i + 1:]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.3
    assert draw(0, "noise")[:2].tolist() == pytest.approx(GOLDEN)  # a change here would change every run


GOLDEN = [1.432212233543396, 0.6305968761444092]
