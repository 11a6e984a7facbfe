"""Dual-Timestep Scheduling, checked by counting; NoiseLevels against loops."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfflow.flow import LogitNormal, Shifted, Uniform, keyed
from selfflow.schedule import DualTimestep, NoiseLevels, SingleLevel

DENSITIES = [Uniform(), LogitNormal(-0.4, 1.3), Shifted(Uniform(), 3.0)]


def levels_of(b, k, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return NoiseLevels(torch.rand(b, k, generator=g), torch.randint(0, k, (b, n), generator=g))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_noise_levels_against_loops(b, k, n, seed):
    levels = levels_of(b, k, n, seed)
    values = torch.randn(b, k, 3, generator=torch.Generator().manual_seed(seed))
    spread = levels.spread(values).expand(b, n, 3)
    for i in range(b):
        for j in range(n):
            assert levels.per_token()[i, j] == levels.levels[i, levels.assign[i, j]]
            assert torch.equal(spread[i, j], values[i, levels.assign[i, j]])
        assert (levels.cleanest().per_token()[i] == min(levels.levels[i].tolist())).all()
    assert levels.cleanest().k == 1 and levels.cleanest().assign.shape == (b, n)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.1, 0.25, 0.5])
def test_dual_timestep_statistics(density, mask_ratio):
    drawn = DualTimestep(density, mask_ratio).sample(20_000, 8, keyed(0, "levels"))
    (t, s), masked = drawn.levels.unbind(1), drawn.assign
    assert drawn.k == 2 and set(masked.unique().tolist()) <= {0, 1}
    share = masked.float()
    assert share.mean() == pytest.approx(mask_ratio, abs=0.005)
    # Bernoulli per token: the number of masked tokens varies as a binomial does, not fixed, not shared
    assert share.sum(1).var() == pytest.approx(8 * mask_ratio * (1 - mask_ratio), rel=0.05, abs=1e-6)
    # unsorted and independent of each other and of the mask
    assert (s > t).float().mean() == pytest.approx(0.5, abs=0.015)
    assert abs(stats.spearmanr(t, s).statistic) < 0.03
    if mask_ratio:
        chosen = masked.bool()
        above = (s > t)[:, None].expand_as(chosen)[chosen].float().mean()
        assert above == pytest.approx(0.5, abs=0.02), "masked tokens are noisier half of the time"
    # every token's marginal is p(t), masked or not
    reference = density.sample((20_000,), keyed(1, "reference"))
    for token in (0, 7):
        assert stats.ks_2samp(drawn.per_token()[:, token], reference).pvalue > 1e-3


def test_levels_stay_two_numbers_even_when_close_or_unmasked():
    drawn = DualTimestep(mask_ratio=0.0).sample(50, 4, keyed(0, "levels"))
    assert torch.equal(drawn.per_token(), drawn.levels[:, :1].expand(50, 4))
    assert torch.equal(drawn.cleanest().levels[:, 0], drawn.levels.amin(1)), "the teacher sees min(t, s), masked tokens or not"


def test_single_level_and_dual_share_t_under_one_generator():
    single, dual = (schedule.sample(64, 4, keyed(3, "levels")) for schedule in (SingleLevel(), DualTimestep()))
    assert torch.equal(single.levels[:, 0], dual.levels[:, 0])
    assert single.k == 1 and (single.assign == 0).all()


@pytest.mark.parametrize("ratio", [-0.01, 0.51, 1.0, float("nan")])
def test_mask_ratio_outside_0_to_half_is_refused(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio.*\[0, 0.5\]"):
        DualTimestep(mask_ratio=ratio)


@pytest.mark.parametrize("levels, assign, error, words", [
    (torch.rand(2, 2), torch.zeros(3, 4, dtype=torch.int64), ValueError, "one b"),
    (torch.rand(2), torch.zeros(2, 4, dtype=torch.int64), ValueError, "one b"),
    (torch.tensor([[1.2]]), torch.zeros(1, 4, dtype=torch.int64), ValueError, "levels run from 1.2"),
    (torch.tensor([[float("nan")]]), torch.zeros(1, 4, dtype=torch.int64), ValueError, "nan"),
    (torch.rand(1, 2), torch.full((1, 4), 2), ValueError, "assign.*there are 2 levels"),
    (torch.rand(1, 2), torch.zeros(1, 4), TypeError, "int64"),
    (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), TypeError, "floats"),
])
def test_bad_levels_are_refused(levels, assign, error, words):
    with pytest.raises(error, match=words):
        NoiseLevels(levels, assign)
