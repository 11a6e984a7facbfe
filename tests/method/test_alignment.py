"""Distances, loss masks and the diagnosis of compared features equal loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.method.alignment import (
    DISTANCES,
    NORMALISATIONS,
    TOKENS,
    constant_cosine,
    effective_rank,
    loss_mask,
    masked_mean,
    normalise,
)
from selfflow.method.losses import _GAPS, Alignment, watch_gradients
from selfflow.method.schedule import (
    Conditioned,
    DiffusionForcing,
    DualTimestep,
    NoiseLevels,
    SingleLevel,
)


def random_values(*shape, seed=0, offset=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset


def cosine_by_loops(p, h):
    return sum(a * b for a, b in zip(p, h, strict=True)) / math.sqrt(
        sum(a * a for a in p) * sum(b * b for b in h)
    )


BY_HAND = {
    "cosine": lambda p, h: 1 - cosine_by_loops(p, h),
    "l2": lambda p, h: sum((a - b) ** 2 for a, b in zip(p, h, strict=True)) / len(p),
    "smooth_l1": lambda p, h: (
        sum(
            (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5
            for a, b in zip(p, h, strict=True)
        )
        / len(p)
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_distances_equal_loops(name):
    predicted = random_values(3, 4, 6)
    target = random_values(3, 4, 6, seed=1)
    expected = [
        [BY_HAND[name](p, h) for p, h in zip(*rows, strict=True)]
        for rows in zip(predicted.tolist(), target.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        DISTANCES[name](predicted, target), torch.tensor(expected)
    )
    torch.testing.assert_close(
        DISTANCES[name](target, target), torch.zeros(3, 4), atol=1e-6, rtol=0
    )
    assert set(DISTANCES) == set(BY_HAND)


def test_normalisations_follow_from_the_moments():
    features = 3 * random_values(5, 7, 4) + torch.tensor([0.0, 100.0, -3.0, 1.0])
    assert normalise(features) is features
    centred, standard = (
        normalise(features, how) for how in ("centred", "standardised")
    )
    rows = features.reshape(35, 4).double().numpy()
    np.testing.assert_allclose(centred.reshape(35, 4), rows - rows.mean(0), atol=1e-4)
    np.testing.assert_allclose(
        standard.reshape(35, 4), (rows - rows.mean(0)) / rows.std(0), atol=1e-4
    )
    assert normalise(torch.ones(2, 3, 4), "standardised").eq(0).all(), (
        "a channel that never differs is 0, not NaN"
    )
    with pytest.raises(
        ValueError, match="normalise is 'unit'; known are raw, centred, standardised"
    ):
        normalise(features, "unit")
    assert NORMALISATIONS == ("raw", "centred", "standardised")


# counted tokens

LEVELS = torch.tensor([[0.3, 0.7, 0.1], [0.8, 0.2, 0.0]])
ASSIGN = torch.tensor([[0, 1, 1, 0, 2], [1, 1, 0, 0, 2]])


@pytest.mark.parametrize(
    "which, condition, expected",
    [
        ("all", 0, None),
        ("all", 1, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]),
        ("masked", 0, [[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]]),
        ("masked", 1, [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
        # the third level is the cleanest
        ("noisier", 0, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]),
        # that of the condition does not count
        ("noisier", 1, [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]),
    ],
)
def test_loss_masks_select_the_tokens_that_count(which, condition, expected):
    mask = loss_mask(NoiseLevels(LEVELS, ASSIGN, condition), which)
    assert mask is None if expected is None else mask.int().tolist() == expected


@pytest.mark.parametrize("which", TOKENS)
def test_a_condition_never_counts_and_equal_levels_are_not_noisier(which):
    schedule = Conditioned(DualTimestep(mask_ratio=0.5), (0, 3), max_level=1.0)
    levels = schedule.sample(50, 8, torch.Generator().manual_seed(0))
    counted = loss_mask(levels, which)
    assert not counted[:, [0, 3]].any()
    t = levels.levels[:, 0]
    s = levels.levels[:, 1]
    for i in range(50):
        for n in (1, 2, 4, 5, 6, 7):
            second = levels.assign[i, n] == 1
            assert (
                counted[i, n]
                == {
                    "all": True,
                    "masked": second,
                    "noisier": (s > t)[i] if second else (t > s)[i],
                }[which]
            )


@pytest.mark.parametrize("which", ["masked", "noisier"])
def test_masked_and_noisier_tokens_need_two_levels(which):
    levels = SingleLevel().sample(3, 4, torch.Generator())
    with pytest.raises(
        ValueError,
        match=f"'{which}', but with one level no token is; take 'all' or a schedule",
    ):
        loss_mask(levels, which)
    conditioned = Conditioned(SingleLevel(), (0,)).sample(3, 4, torch.Generator())
    with pytest.raises(ValueError, match="with one level"):
        loss_mask(conditioned, which)
    assert loss_mask(DiffusionForcing().sample(3, 4, torch.Generator()), which).any()
    with pytest.raises(
        ValueError, match="tokens are 'clean'; known are all, masked, noisier"
    ):
        loss_mask(levels, "clean")


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=12))
def test_the_masked_mean_equals_a_loop(rows):
    values = torch.tensor(
        [[value for value, _ in rows]], dtype=torch.float64, requires_grad=True
    )
    counted = torch.tensor([[flag for _, flag in rows]])
    counted_values = [value for value, flag in rows if flag]
    mean = masked_mean(values, counted)
    assert mean.item() == pytest.approx(
        sum(counted_values) / len(counted_values) if counted_values else 0.0, abs=1e-12
    )
    (gradient,) = torch.autograd.grad(mean, values)
    torch.testing.assert_close(gradient, counted.double() / max(1, len(counted_values)))
    assert masked_mean(values, None).item() == pytest.approx(
        sum(value for value, _ in rows) / len(rows), abs=1e-12
    )


# statistics of features


def test_the_constant_cosine_is_the_best_that_a_constant_reaches():
    h = random_values(40, 6, 8, offset=1.0)
    rows = [row / np.linalg.norm(row) for row in h.reshape(-1, 8).numpy()]
    assert constant_cosine(h).item() == pytest.approx(
        np.linalg.norm(sum(rows) / len(rows)), rel=1e-5
    )
    best = sum(rows) / len(rows)

    def reach(p):
        return sum(p @ row for row in rows) / len(rows) / np.linalg.norm(p)

    assert reach(best) == pytest.approx(constant_cosine(h).item(), rel=1e-5)
    noise = np.random.default_rng(0).normal(size=(50, 8))
    assert all(reach(best + 0.1 * step) < reach(best) for step in noise), (
        "every other constant reaches less"
    )
    assert constant_cosine(torch.ones(5, 3)).item() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_the_effective_rank_follows_from_singular_values(seed):
    features = (
        random_values(6, 9, 5, seed=seed) * torch.tensor([5.0, 2.0, 1.0, 0.5, 0.01]) + 7
    )
    rows = features.reshape(54, 5).double().numpy()
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    share = values / values.sum()
    assert effective_rank(features).item() == pytest.approx(
        np.exp(-(share * np.log(share)).sum()), rel=1e-6
    )


def test_the_effective_rank_is_exact_in_special_cases():
    q, _ = torch.linalg.qr(random_values(12, 12).double())
    flat = torch.cat([q[:, :4], -q[:, :4]])  # four directions, equally strong
    assert effective_rank(flat).item() == pytest.approx(4)
    assert effective_rank(
        random_values(30, 1) * random_values(1, 8)
    ).item() == pytest.approx(1, abs=1e-3)
    assert (
        effective_rank(random_values(1, 1, 8).expand(4, 5, 8))
        == 0
        == effective_rank(random_values(1, 8))
    ), "nothing differs"
    assert effective_rank(1e-4 * flat.float() + 0.0).item() == pytest.approx(
        4, rel=1e-4
    ), "scale does not matter"
    assert effective_rank(torch.full((4, 3), torch.nan)).isnan(), (
        "instead of an error of the solver"
    )


def test_the_diagnosis_equals_loops():
    predicted = random_values(60, 5)
    target = random_values(60, 5, seed=1, offset=0.5)
    gap = torch.rand(60, generator=torch.Generator().manual_seed(2))
    gap[:15], gap[20], gap[21] = 0, 0.25, 0.5
    diagnosis = Alignment(predicted, target, gap).diagnosis()
    cosines = [
        cosine_by_loops(p, h)
        for p, h in zip(predicted.tolist(), target.tolist(), strict=True)
    ]
    ends = [-1, *_GAPS]
    for low, high in zip(ends, ends[1:], strict=False):
        inside = [
            c for c, g in zip(cosines, gap.tolist(), strict=True) if low < g <= high
        ]
        assert len(inside) > 3
        assert diagnosis[f"cosine_gap_{high:g}"] == pytest.approx(
            sum(inside) / len(inside), abs=1e-6
        )
    assert diagnosis["cosine"] == pytest.approx(sum(cosines) / 60, abs=1e-6)
    assert diagnosis["feature_std"] == pytest.approx(
        target.numpy().std(0).mean(), rel=1e-5
    )
    assert diagnosis["constant_cosine"] == pytest.approx(constant_cosine(target).item())
    assert diagnosis["effective_rank"] == pytest.approx(effective_rank(target).item())
    assert _GAPS == (0.0, 0.25, 0.5, 1.0)
    assert "rep_gradient_share" not in diagnosis
    assert Alignment(predicted, target, gap).means() == {
        name: diagnosis[name] for name in ("cosine", "constant_cosine")
    }
    zero = Alignment(predicted, target, torch.zeros(60)).diagnosis()
    assert [name for name in zero if "gap" in name] == ["cosine_gap_0"]
    assert zero["cosine_gap_0"] == pytest.approx(zero["cosine"])


def test_there_is_no_diagnosis_without_counted_tokens():
    empty = Alignment(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0))
    assert empty.means() == {} == empty.diagnosis()


@pytest.mark.parametrize("weight", [0.0, 0.8, 50.0])
def test_the_gradients_of_both_losses_are_measured_separately(weight):
    x = random_values(4, 3, 5)
    w = random_values(5, 5, seed=1)
    direction = random_values(4, 3, 5, seed=2)

    def flow(hidden):
        return (hidden * direction).sum()

    def rep(hidden):
        return weight * (hidden.square() @ w).sum()

    watched = x.clone().requires_grad_()
    hidden = (watched @ w).tanh()
    branch, norms = watch_gradients(hidden)
    (flow(hidden) + rep(branch)).backward()

    plain = x.clone().requires_grad_()
    hidden = (plain @ w).tanh()
    (by_flow,) = torch.autograd.grad(flow(hidden), hidden, retain_graph=True)
    (by_rep,) = torch.autograd.grad(rep(hidden), hidden, retain_graph=True)
    torch.testing.assert_close(norms["rep"], by_rep.norm())
    torch.testing.assert_close(norms["flow"], by_flow.norm())
    (flow(hidden) + rep(hidden)).backward()
    torch.testing.assert_close(watched.grad, plain.grad, msg="watching changes nothing")


def test_nothing_is_watched_without_gradients():
    hidden = random_values(2, 3, 4)
    branch, norms = watch_gradients(hidden)
    assert branch is hidden
    assert norms == {}
