"""Every schedule draws the levels that loops over plain numbers compute from the same
random numbers, with the distributions it claims; bad settings are refused.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfflow.draws import keyed
from selfflow.method.flow import LogitNormal, Mixture, Shifted, Uniform
from selfflow.method.schedule import (
    Conditioned,
    DiffusionForcing,
    DualTimestep,
    FullMasking,
    MultiTimestep,
    NoiseLevels,
    SingleLevel,
)

DENSITIES = [Uniform(), LogitNormal(-0.4, 1.3), Shifted(Uniform(), 3.0)]
ALL_DENSITIES = [
    *DENSITIES,
    Uniform(0.2, 0.7),
    Mixture((Uniform(), Uniform(0.95, 1)), (0.95, 0.05)),
]


def levels_of(b, k, n, seed=0, condition=0):
    g = torch.Generator().manual_seed(seed)
    return NoiseLevels(
        torch.rand(b, k, generator=g),
        torch.randint(0, k, (b, n), generator=g),
        condition,
    )


# --- the schedules again, as loops over Python numbers; torch only draws the raw random
# numbers


def uniforms(g, *shape):
    return torch.rand(*shape, generator=g).double().numpy()


def density_by_hand(density, count, g):
    if isinstance(density, Uniform):
        return [
            density.low + (density.high - density.low) * u for u in uniforms(g, count)
        ]
    if isinstance(density, LogitNormal):
        return [
            1 / (1 + math.exp(-density.mean - density.std * z))
            for z in torch.randn(count, generator=g).tolist()
        ]
    if isinstance(density, Shifted):
        return [
            density.alpha * t / (1 + (density.alpha - 1) * t)
            for t in density_by_hand(density.density, count, g)
        ]
    draws = [density_by_hand(component, count, g) for component in density.densities]
    # a mixture has two components
    return [
        draws[1 if u < density.weights[1] else 0][i]
        for i, u in enumerate(uniforms(g, count))
    ]


def dual_by_hand(schedule, b, n, g):
    t = density_by_hand(schedule.density, b, g)
    s = density_by_hand(schedule.density, b, g)
    rows, columns = schedule.grid or (1, n)
    rows = rows // schedule.block
    columns = columns // schedule.block
    scores = uniforms(g, b, rows * columns)
    offsets = uniforms(g, b) if schedule.near is not None else [None] * b
    single = uniforms(g, b) if schedule.single_share else [1.0] * b
    for i in range(b):
        if schedule.near is not None:
            s[i] = t[i] + schedule.near * (2 * offsets[i] - 1)
            if s[i] < 0:
                s[i] = -s[i]
            elif s[i] > 1:
                s[i] = 2 - s[i]
        alone = single[i] < schedule.single_share
        if schedule.order != "unsorted" and not alone:
            ends = sorted((t[i], s[i]))
            s[i], t[i] = ends if schedule.order == "cleaner" else ends[::-1]
        lowest = sorted(scores[i])[: round(schedule.mask_ratio * rows * columns)]
        tau = []
        for token in range(n):
            row, column = divmod(token, columns * schedule.block)
            score = scores[i][
                row // schedule.block * columns + column // schedule.block
            ]
            masked = score in lowest if schedule.exact else score < schedule.mask_ratio
            tau.append(s[i] if masked and not alone else t[i])
        yield tau, min(t[i], s[i])


def by_hand(schedule, b, n, g):
    """Yield for each sample the levels of its tokens and the teacher's level of the
    generated tokens.
    """
    if isinstance(schedule, DualTimestep):
        yield from dual_by_hand(schedule, b, n, g)
    elif isinstance(schedule, SingleLevel):
        yield from (([t] * n, t) for t in density_by_hand(schedule.density, b, g))
    elif isinstance(schedule, FullMasking):
        t = density_by_hand(schedule.density, b, g)
        yield from (
            ([1.0 if u < schedule.mask_ratio else t[i] for u in row], t[i])
            for i, row in enumerate(uniforms(g, b, n))
        )
    elif isinstance(schedule, DiffusionForcing):
        tau = density_by_hand(schedule.density, b * n, g)
        yield from (
            (tau[i * n : (i + 1) * n], min(tau[i * n : (i + 1) * n])) for i in range(b)
        )
    elif isinstance(schedule, MultiTimestep):
        levels = [density_by_hand(schedule.density, b, g) for _ in schedule.shares]
        for i, row in enumerate(uniforms(g, b, n)):
            tau = []
            for u in row:
                chosen = 0
                for j in range(len(levels) - 1, 0, -1):
                    if u < sum(schedule.shares[1 : j + 1]):
                        chosen = j
                tau.append(levels[chosen][i])
            yield tau, min(level[i] for level in levels)
    else:
        inner = by_hand(schedule.schedule, b, n, g)
        for (tau, teacher), u in zip(list(inner), uniforms(g, b), strict=True):
            for i in schedule.tokens:
                tau[i] = schedule.max_level * u
            yield tau, teacher


SCHEDULES = {
    "single": SingleLevel(),
    "dual": DualTimestep(),
    "dual, half": DualTimestep(mask_ratio=0.5),
    "cleaner": DualTimestep(order="cleaner"),
    "noisier": DualTimestep(order="noisier"),
    "near": DualTimestep(near=0.2),
    "near, far": DualTimestep(near=1.0),
    "exact": DualTimestep(exact=True),
    "block 2": DualTimestep(block=2, grid=(4, 6)),
    "block 2, exact": DualTimestep(block=2, grid=(4, 6), exact=True),
    "grid": DualTimestep(grid=(2, 12)),
    "partly single": DualTimestep(single_share=0.5),
    "all single": DualTimestep(single_share=1.0),
    "everything": DualTimestep(
        mask_ratio=0.4,
        order="noisier",
        exact=True,
        near=0.3,
        block=2,
        grid=(6, 4),
        single_share=0.3,
    ),
    "multi": MultiTimestep(),
    "multi, five": MultiTimestep(shares=(0.2,) * 5),
    "multi, one": MultiTimestep(shares=(1.0,)),
    "forcing": DiffusionForcing(),
    "masking": FullMasking(),
    "masking all": FullMasking(mask_ratio=1.0),
    "clean condition": Conditioned(DualTimestep(), (0, 5)),
    "noised condition": Conditioned(SingleLevel(), (23,), 0.2),
    "forced condition": Conditioned(DiffusionForcing(), (1, 2), 1.0),
    "two conditions": Conditioned(
        Conditioned(DualTimestep(order="cleaner"), (0, 1), 0.2), (1, 7)
    ),
}


def with_density(schedule, density):
    if isinstance(schedule, Conditioned):
        return replace(schedule, schedule=with_density(schedule.schedule, density))
    return replace(schedule, density=density)


@pytest.mark.parametrize(
    "density",
    [density for density in ALL_DENSITIES if not isinstance(density, Uniform)],
    ids=lambda density: type(density).__name__,
)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed, batch", [(0, 1), (1, 7)])
def test_schedules_equal_their_loops(name, density, seed, batch):
    schedule = with_density(SCHEDULES[name], density)
    tokens = 24
    drawn = schedule.sample(batch, tokens, keyed(seed, name))
    expected = list(by_hand(schedule, batch, tokens, keyed(seed, name)))
    close = {"atol": 2e-6, "rtol": 1e-5}
    torch.testing.assert_close(
        drawn.per_token(),
        torch.tensor([tau for tau, _ in expected], dtype=torch.float32),
        **close,
    )
    assert drawn.levels.dtype == torch.float32
    assert drawn.assign.shape == (batch, tokens)
    teacher = drawn.cleanest()
    is_given = drawn.is_condition()
    assert teacher.k == 1 + drawn.condition
    assert torch.equal(teacher.is_condition(), is_given)
    lowest = torch.tensor([low for _, low in expected], dtype=torch.float32)[
        :, None
    ].expand(batch, tokens)
    torch.testing.assert_close(
        teacher.per_token(), torch.where(is_given, drawn.per_token(), lowest), **close
    )


def uniform_cdf(x):
    return np.clip(x, 0, 1)


@pytest.mark.parametrize(
    "name",
    [
        "single",
        "dual",
        "dual, half",
        "near",
        "near, far",
        "exact",
        "block 2",
        "block 2, exact",
        "partly single",
        "all single",
        "multi",
        "multi, five",
        "forcing",
        "clean condition",
    ],
)
def test_the_level_of_every_token_follows_the_density(name):
    drawn = SCHEDULES[name].sample(6000, 24, keyed(0, name))
    tau = drawn.per_token().double().numpy()
    for token in range(24):
        if not drawn.is_condition()[0, token]:
            assert stats.kstest(tau[:, token], uniform_cdf).pvalue > 1e-4
    if "near" not in name:  # folding at the edges preserves only a uniform density
        density = LogitNormal(0.4, 0.9)
        tau = (
            with_density(SCHEDULES[name], density)
            .sample(6000, 24, keyed(1, name))
            .per_token()
        )
        for token in (6, 23):
            logits = torch.logit(tau[:, token]).double().numpy()
            assert stats.kstest(logits, stats.norm(0.4, 0.9).cdf).pvalue > 1e-4


@pytest.mark.parametrize("mask_ratio", [0.1, 0.25, 0.5])
@pytest.mark.parametrize(
    "order, cdf",
    [
        ("cleaner", lambda f, r: r * (1 - (1 - f) ** 2) + (1 - r) * f**2),
        ("noisier", lambda f, r: r * f**2 + (1 - r) * (1 - (1 - f) ** 2)),
    ],
)
def test_sorting_changes_the_marginal_of_a_token(order, cdf, mask_ratio):
    # masked tokens have the minimum (or maximum) of two draws, the others the other one
    # of the two
    tau = (
        DualTimestep(mask_ratio=mask_ratio, order=order)
        .sample(20_000, 2, keyed(0, order))
        .per_token()[:, 1]
        .double()
        .numpy()
    )
    assert stats.kstest(tau, lambda x: cdf(uniform_cdf(x), mask_ratio)).pvalue > 1e-3
    p_value = stats.kstest(tau, uniform_cdf).pvalue
    assert p_value > 1e-3 if mask_ratio == 0.5 else p_value < 1e-9, (
        "p(t) survives sorting only at one half"
    )


@pytest.mark.parametrize("order, sign", [("cleaner", -1), ("noisier", 1)])
def test_sorting_orders_the_two_levels_and_leaves_single_samples_unchanged(order, sign):
    plain, sorted_ = (
        DualTimestep(order=o, single_share=0.5).sample(500, 64, keyed(0, "s"))
        for o in ("unsorted", order)
    )
    single = (plain.assign == 0).all(1)
    assert 150 < single.sum() < 350
    assert torch.equal(plain.assign, sorted_.assign)
    assert torch.equal(plain.levels[single], sorted_.levels[single]), (
        "their t is a draw of the density"
    )
    t, s = sorted_.levels[~single].unbind(1)
    assert (sign * (s - t) >= 0).all()
    assert torch.equal(plain.levels.sort(1).values, sorted_.levels.sort(1).values)


def test_near_smooths_a_density_by_its_integral():
    density = Uniform(0, 0.5)
    near = 0.3
    ratio = 0.25
    drawn = DualTimestep(density, ratio, near=near).sample(20_000, 2, keyed(0, "near"))
    # midpoints of [0, 0.5]; t + near < 1
    t = (np.arange(500) + 0.5) / 1000
    x = np.linspace(0, 1, 1001)[:, None]
    # the part of [t - near, t + near] that folds to levels up to x lies in [-x, x]
    below = (
        np.clip(np.minimum(t + near, x) - np.maximum(t - near, -x), 0, None)
        / (2 * near)
    ).mean(1)

    def cdf_of_s(s):
        return np.interp(s, x[:, 0], below)

    assert stats.kstest(drawn.levels[:, 1].double().numpy(), cdf_of_s).pvalue > 1e-3
    assert (
        stats.kstest(
            drawn.per_token()[:, 1].double().numpy(),
            lambda x: ratio * cdf_of_s(x) + (1 - ratio) * np.clip(2 * x, 0, 1),
        ).pvalue
        > 1e-3
    )


@given(st.floats(1e-4, 1), st.sampled_from(ALL_DENSITIES), st.integers(0, 99))
def test_near_levels_stay_within_reach_and_in_0_to_1(near, density, seed):
    t, s = (
        DualTimestep(density, near=near)
        .sample(200, 1, keyed(seed, "near"))
        .levels.unbind(1)
    )
    assert ((s >= 0) & (s <= 1)).all()
    assert ((s - t).abs() <= near + 1e-6).all()


def test_near_levels_are_reflected_at_both_edges(monkeypatch):
    class Ends:
        def sample(self, shape, generator=None):
            return torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5])

    monkeypatch.setattr(
        torch,
        "rand",
        lambda *size, **kwargs: (
            torch.tensor([0.25, 0.75, 0.75, 0.25, 0.0])
            if len(size) == 1
            else torch.zeros(size)
        ),
    )
    drawn = DualTimestep(Ends(), near=0.4).sample(5, 2)
    torch.testing.assert_close(
        drawn.levels[:, 1], torch.tensor([0.2, 0.8, 0.2, 0.8, 0.1])
    )


@given(
    st.floats(0, 0.5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_exact_masks_have_an_exact_count_and_constant_blocks(
    mask_ratio, rows, columns, block, seed
):
    grid = (rows * block, columns * block)
    schedule = DualTimestep(mask_ratio=mask_ratio, exact=True, block=block, grid=grid)
    assign = schedule.sample(5, grid[0] * grid[1], keyed(seed, "exact")).assign
    assert (assign.sum(1) == round(mask_ratio * rows * columns) * block**2).all()
    squares = assign.reshape(5, rows, block, columns, block)
    for i in range(rows):
        for j in range(columns):
            assert (squares[:, i, :, j].flatten(1).unique(dim=1).shape[1]) == 1, (
                "one level in a square"
            )


def test_exact_masks_are_uniform_over_positions_and_vary():
    masks = DualTimestep(exact=True).sample(12_000, 8, keyed(0, "exact")).assign
    kinds, counts = masks.unique(dim=0, return_counts=True)
    assert len(kinds) == 28, "all ways to choose 2 of 8"
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_blocks_are_drawn_independently():
    assign = (
        DualTimestep(block=2, grid=(4, 4)).sample(20_000, 16, keyed(0, "block")).assign
    )
    masks = assign.reshape(-1, 4, 4)[:, ::2, ::2].flatten(1)
    assert masks.float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.015)
    assert np.abs(np.corrcoef(masks.T) - np.eye(4)).max() < 0.03


def test_variants_share_levels_and_mask_under_one_generator():
    plain = DualTimestep().sample(50, 24, keyed(0, "levels"))
    for name in ("near", "partly single", "grid"):
        variant = SCHEDULES[name].sample(50, 24, keyed(0, "levels"))
        assert torch.equal(variant.levels[:, 0], plain.levels[:, 0])
        single = (variant.assign == 0).all(1)
        assert torch.equal(variant.assign[~single], plain.assign[~single])
        assert single.sum() < 40
    partly = SCHEDULES["partly single"].sample(50, 24, keyed(0, "levels"))
    assert torch.equal(partly.levels, plain.levels), (
        "s is drawn although single samples ignore it"
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_single_share_of_samples_has_one_level(share):
    drawn = DualTimestep(mask_ratio=0.5, single_share=share).sample(
        8000, 64, keyed(0, "single")
    )
    alone = (drawn.assign == 0).all(1)
    assert alone.float().mean() == pytest.approx(share, abs=0.015)
    if share < 1:
        assert drawn.assign[~alone].float().mean() == pytest.approx(0.5, abs=0.005), (
            "the others are masked as usual"
        )
    assert torch.equal(drawn.cleanest().levels[:, 0], drawn.levels.amin(1))


@pytest.mark.parametrize(
    "density", ALL_DENSITIES, ids=lambda density: type(density).__name__
)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.25])
def test_the_defaults_draw_the_numbers_of_the_first_version(density, mask_ratio):
    # the first version of the schedule, in full: runs that began with it must continue
    # with the same numbers
    g = keyed(7, "levels", 3)
    t, s = (density.sample((9,), g) for _ in range(2))
    masked = torch.rand(9, 11, generator=g) < mask_ratio
    h = keyed(7, "levels", 3)
    drawn = DualTimestep(density, mask_ratio).sample(9, 11, h)
    assert torch.equal(drawn.levels, torch.stack([t, s], dim=1))
    assert torch.equal(drawn.assign, masked.long())
    assert torch.equal(g.get_state(), h.get_state()), "nothing more is drawn"
    i = keyed(7, "levels", 3)
    assert torch.equal(SingleLevel(density).sample(9, 11, i).levels[:, 0], t), (
        "the t of a single level"
    )
    assert torch.equal(
        MultiTimestep(density, (1 - mask_ratio, mask_ratio))
        .sample(9, 11, keyed(7, "levels", 3))
        .per_token(),
        drawn.per_token(),
    ), "MultiTimestep generalises it"


def test_the_defaults_draw_fixed_numbers():
    drawn = DualTimestep().sample(3, 6, torch.Generator().manual_seed(5))
    assert drawn.levels.tolist() == [
        [0.8302518725395203, 0.8199270367622375],
        [0.12611091136932373, 0.9201034307479858],
        [0.9074696898460388, 0.1166452169418335],
    ]
    assert drawn.assign.tolist() == [
        [1, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0],
    ]
    assert DualTimestep() == DualTimestep(
        Uniform(), 0.25, "unsorted", False, None, 1, None, 0.0
    ), "the method as published"


@pytest.mark.parametrize(
    "shares", [(0.5, 0.25, 0.25), (0.0, 0.5, 0.5), (0.1, 0.0, 0.9), (0.1,) * 10]
)
def test_multiple_levels_are_independent_and_have_their_shares(shares):
    drawn = MultiTimestep(shares=shares).sample(8000, 8, keyed(1, "multi"))
    assert drawn.k == len(shares)
    counted = (
        torch.bincount(drawn.assign.flatten(), minlength=len(shares))
        / drawn.assign.numel()
    )
    assert counted.tolist() == pytest.approx(shares, abs=0.008)
    assert all(counted[j] == 0 for j, share in enumerate(shares) if share == 0)
    between = np.corrcoef(drawn.levels.T) - np.eye(len(shares))
    assert np.abs(between).max() < 0.05, "levels are independent"
    tokens = np.corrcoef(drawn.assign[:, :4].T) - np.eye(4)
    assert np.abs(tokens).max() < 0.05, "tokens are independent"


def test_diffusion_forcing_gives_every_token_its_own_independent_level():
    drawn = DiffusionForcing().sample(8000, 5, keyed(0, "forcing"))
    assert drawn.k == 5
    assert torch.equal(drawn.assign, torch.arange(5).expand(8000, 5))
    assert np.abs(np.corrcoef(drawn.per_token().T) - np.eye(5)).max() < 0.05
    lowest = drawn.cleanest().levels[:, 0].double().numpy()
    assert stats.kstest(lowest, stats.beta(1, 5).cdf).pvalue > 1e-3, (
        "the minimum of n uniform numbers"
    )


@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.7, 1.0])
def test_full_masking_mixes_the_density_with_pure_noise(mask_ratio):
    drawn = FullMasking(LogitNormal(), mask_ratio).sample(8000, 4, keyed(0, "masking"))
    tau = drawn.per_token()
    assert (tau == 1).float().mean() == pytest.approx(mask_ratio, abs=0.01)
    if mask_ratio < 1:
        rest = torch.logit(tau[:, 2][tau[:, 2] < 1]).double().numpy()
        assert stats.kstest(rest, stats.norm.cdf).pvalue > 1e-3
    assert torch.equal(drawn.cleanest().levels, drawn.levels[:, :1]), (
        "the teacher gets t"
    )
    assert (drawn.levels[:, 1] == 1).all()


@pytest.mark.parametrize(
    "inner",
    [SingleLevel(), DualTimestep(), MultiTimestep(), DiffusionForcing(), FullMasking()],
)
@pytest.mark.parametrize("max_level", [0.0, 0.2, 1.0])
def test_a_condition_has_its_own_level_and_leaves_the_others_unchanged(
    inner, max_level
):
    named = (0, 3, 4)
    drawn = Conditioned(inner, named, max_level).sample(4000, 9, keyed(0, "c"))
    without = inner.sample(4000, 9, keyed(0, "c"))
    is_given = torch.tensor([i in named for i in range(9)]).expand(4000, 9)
    assert drawn.k == without.k + 1
    assert drawn.condition == 1
    assert torch.equal(drawn.is_condition(), is_given)
    assert torch.equal(drawn.assign[~is_given], without.assign[~is_given])
    assert torch.equal(drawn.levels[:, :-1], without.levels)
    own = drawn.per_token()[:, 3]
    assert torch.equal(drawn.per_token()[:, 0], own), (
        "one level for the condition of a sample"
    )
    if max_level:
        assert (
            stats.kstest(own.double().numpy(), stats.uniform(0, max_level).cdf).pvalue
            > 1e-3
        )
    else:
        assert (own == 0).all()
    teacher = drawn.cleanest()
    assert torch.equal(teacher.per_token()[:, 3], own), (
        "the teacher gets the same condition"
    )
    assert torch.equal(teacher.levels[:, 0], without.levels.amin(1)), (
        "a clean condition does not make the rest clean"
    )


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_noise_levels_equal_loops(b, k, n, seed):
    levels = levels_of(b, k, n, seed)
    for i in range(b):
        for j in range(n):
            assert levels.per_token()[i, j] == levels.levels[i, levels.assign[i, j]]
        assert (
            levels.cleanest().per_token()[i] == min(levels.levels[i].tolist())
        ).all()
    assert levels.cleanest().k == 1
    assert levels.cleanest().assign.shape == (b, n)
    assert not levels.is_condition().any()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.data())
def test_levels_with_conditions_equal_loops(b, k, n, data):
    condition = data.draw(st.integers(0, k - 1))
    levels = levels_of(b, k, n, data.draw(st.integers(0, 99)), condition)
    teacher = levels.cleanest()
    assert teacher.k == 1 + condition
    assert teacher.condition == condition
    for i in range(b):
        lowest = min(levels.levels[i, : k - condition].tolist())
        for j in range(n):
            is_given = levels.assign[i, j].item() >= k - condition
            assert levels.is_condition()[i, j] == is_given
            assert teacher.is_condition()[i, j] == is_given
            assert teacher.per_token()[i, j] == (
                levels.per_token()[i, j] if is_given else lowest
            )
    # taking the cleanest level twice changes nothing
    again = teacher.cleanest()
    assert torch.equal(again.per_token(), teacher.per_token())
    assert again.condition == condition
    moved = levels.to("cpu")
    assert moved.condition == condition
    assert torch.equal(moved.per_token(), levels.per_token())


def test_moving_to_another_device_preserves_the_condition():
    moved = NoiseLevels(torch.rand(2, 3), torch.zeros(2, 4, dtype=torch.int64), 2).to(
        "meta"
    )
    assert moved.condition == 2
    assert moved.levels.device.type == moved.assign.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 20), st.integers(0, 99))
def test_levels_built_from_tokens_give_the_same_levels_back(dtype, b, n, values, seed):
    g = torch.Generator().manual_seed(seed)
    pool = torch.rand(values, generator=g, dtype=dtype)
    tau = pool[torch.randint(0, values, (b, n), generator=g)]
    levels = NoiseLevels.of_tokens(tau)
    assert torch.equal(levels.per_token(), tau)
    assert levels.levels.dtype == dtype
    assert levels.condition == 0
    assert levels.k == max(len(set(row)) for row in tau.tolist()), (
        "as few levels as possible"
    )
    assert levels.levels.tolist() == [
        (sorted(set(row)) + [max(row)] * levels.k)[: levels.k] for row in tau.tolist()
    ]
    assert torch.equal(levels.cleanest().levels[:, 0], tau.amin(1)), (
        "no sample gets the levels of another"
    )


@pytest.mark.parametrize(
    "tau, k",
    [
        ([[0.0, 1.0, 0.0, 1.0]], 2),
        ([[0.0, 0.0], [1.0, 1.0]], 1),
        ([[0.5]], 1),
        ([[0.3, 0.2, 0.1], [0.1, 0.1, 0.1]], 3),
        ([[1e-45, 0.0], [1.0, 1 - 2**-24]], 2),
        ([[0.0, -0.0]], 1),
    ],
)
def test_extreme_levels_of_tokens_are_grouped_exactly(tau, k):
    levels = NoiseLevels.of_tokens(torch.tensor(tau))
    assert levels.k == k
    assert torch.equal(levels.per_token(), torch.tensor(tau))


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_of_tokens_are_as_compact_as_the_schedule(name):
    drawn = SCHEDULES[name].sample(6, 24, keyed(0, name))
    again = NoiseLevels.of_tokens(drawn.per_token())
    assert torch.equal(again.per_token(), drawn.per_token())
    assert again.k <= drawn.k


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.1, 0.25, 0.5])
def test_dual_levels_are_independent_and_masks_are_binomial(density, mask_ratio):
    drawn = DualTimestep(density, mask_ratio).sample(20_000, 8, keyed(0, "levels"))
    (t, s), masked = drawn.levels.unbind(1), drawn.assign
    assert drawn.k == 2
    assert set(masked.unique().tolist()) <= {0, 1}
    share = masked.float()
    assert share.mean() == pytest.approx(mask_ratio, abs=0.005)
    # Bernoulli per token: the number of masked tokens varies as a binomial does, not
    # fixed, not shared
    assert share.sum(1).var() == pytest.approx(
        8 * mask_ratio * (1 - mask_ratio), rel=0.05, abs=1e-6
    )
    # unsorted and independent of each other and of the mask
    assert (s > t).float().mean() == pytest.approx(0.5, abs=0.015)
    assert abs(stats.spearmanr(t, s).statistic) < 0.03
    if mask_ratio:
        chosen = masked.bool()
        above = (s > t)[:, None].expand_as(chosen)[chosen].float().mean()
        assert above == pytest.approx(0.5, abs=0.02), (
            "masked tokens are noisier half of the time"
        )
    # every token's marginal is p(t), masked or not
    reference = density.sample((20_000,), keyed(1, "reference"))
    for token in (0, 7):
        assert stats.ks_2samp(drawn.per_token()[:, token], reference).pvalue > 1e-3


def test_an_unmasked_sample_still_has_two_levels():
    drawn = DualTimestep(mask_ratio=0.0).sample(50, 4, keyed(0, "levels"))
    assert torch.equal(drawn.per_token(), drawn.levels[:, :1].expand(50, 4))
    assert torch.equal(drawn.cleanest().levels[:, 0], drawn.levels.amin(1)), (
        "the teacher sees min(t, s), masked tokens or not"
    )


def test_single_and_dual_levels_share_t_under_one_generator():
    single, dual = (
        schedule.sample(64, 4, keyed(3, "levels"))
        for schedule in (SingleLevel(), DualTimestep())
    )
    assert torch.equal(single.levels[:, 0], dual.levels[:, 0])
    assert single.k == 1
    assert (single.assign == 0).all()


@pytest.mark.parametrize("ratio", [-0.01, 0.51, 1.0, float("nan")])
def test_mask_ratio_outside_0_to_half_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio is {ratio}.*\[0, 0.5\]"):
        DualTimestep(mask_ratio=ratio)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: DualTimestep(order="sorted"), "order is 'sorted'.*cleaner or noisier"),
        (lambda: DualTimestep(near=0.0), r"near is 0.0.*\(0, 1\]"),
        (lambda: DualTimestep(near=1.1), r"near is 1.1.*\(0, 1\]"),
        (lambda: DualTimestep(near=math.nan), "near is nan"),
        (lambda: DualTimestep(single_share=-0.1), r"single_share is -0.1.*\[0, 1\]"),
        (lambda: DualTimestep(single_share=math.nan), "single_share is nan"),
        (lambda: DualTimestep(block=2), "block is 2, grid is None.*rows, columns"),
        (lambda: DualTimestep(block=0, grid=(2, 2)), "block is 0"),
        (
            lambda: DualTimestep(block=2, grid=(4, 5)),
            r"block 2 does not divide grid \(4, 5\)",
        ),
        (
            lambda: DualTimestep(block=3, grid=(4, 6)),
            r"block 3 does not divide grid \(4, 6\)",
        ),
        (lambda: DualTimestep(grid=(0, 4)), r"does not divide grid \(0, 4\)"),
        (
            lambda: DualTimestep(grid=(4, 4)).sample(2, 15),
            "15 tokens do not fill a grid of 4 x 4 = 16",
        ),
        (
            lambda: DualTimestep(block=2, grid=(4, 4)).sample(2, 4),
            "4 tokens do not fill a grid of 4 x 4",
        ),
        (lambda: MultiTimestep(shares=()), "shares are"),
        (lambda: MultiTimestep(shares=(0.5, 0.6)), "shares are.*sum to 1"),
        (lambda: MultiTimestep(shares=(1.5, -0.5)), "shares are.*none may be negative"),
        (lambda: FullMasking(mask_ratio=1.01), r"mask_ratio is 1.01.*\[0, 1\]"),
        (lambda: FullMasking(mask_ratio=math.nan), "mask_ratio is nan"),
        (lambda: Conditioned(SingleLevel(), ()), r"tokens are \(\)"),
        (lambda: Conditioned(SingleLevel(), (2, -1)), r"tokens are \(2, -1\).*from 0"),
        (lambda: Conditioned(SingleLevel(), (0,), 1.2), r"max_level is 1.2.*\[0, 1\]"),
        (lambda: Conditioned(SingleLevel(), (0,), math.nan), "max_level is nan"),
        (
            lambda: Conditioned(SingleLevel(), (0, 4)).sample(2, 4),
            r"positions \(0, 4\) must exist among 4 tokens",
        ),
        (
            lambda: Conditioned(SingleLevel(), (0, 1, 1)).sample(2, 2),
            r"positions \(0, 1, 1\).*leave one",
        ),
        (lambda: NoiseLevels.of_tokens(torch.rand(3)), r"tau has shape \(3,\)"),
        (lambda: NoiseLevels.of_tokens(torch.rand(2, 0)), r"tau has shape \(2, 0\)"),
        (
            lambda: NoiseLevels.of_tokens(torch.tensor([[0.5, math.nan]])),
            "levels run from nan",
        ),
        (
            lambda: NoiseLevels.of_tokens(torch.tensor([[0.5, 1.5]])),
            "levels run from 0.5 to 1.5",
        ),
        (lambda: levels_of(2, 2, 3, condition=2), "condition is 2 of 2 levels"),
        (lambda: levels_of(2, 2, 3, condition=-1), "condition is -1 of 2 levels"),
    ],
)
def test_bad_settings_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "levels, assign, error, words",
    [
        (torch.rand(2, 2), torch.zeros(3, 4, dtype=torch.int64), ValueError, "one b"),
        (torch.rand(2), torch.zeros(2, 4, dtype=torch.int64), ValueError, "one b"),
        (
            torch.tensor([[1.2]]),
            torch.zeros(1, 4, dtype=torch.int64),
            ValueError,
            "levels run from 1.2",
        ),
        (
            torch.tensor([[float("nan")]]),
            torch.zeros(1, 4, dtype=torch.int64),
            ValueError,
            "nan",
        ),
        (
            torch.rand(1, 2),
            torch.full((1, 4), 2),
            ValueError,
            "assign.*there are 2 levels",
        ),
        (torch.rand(1, 2), torch.zeros(1, 4), TypeError, "int64"),
        (
            torch.zeros(1, 2, dtype=torch.int64),
            torch.zeros(1, 4, dtype=torch.int64),
            TypeError,
            "floats",
        ),
    ],
)
def test_bad_levels_are_refused(levels, assign, error, words):
    with pytest.raises(error, match=words):
        NoiseLevels(levels, assign)
