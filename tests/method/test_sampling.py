"""Samplers reach the known answer where the velocity is known exactly, guidance equals
its formula, known tokens come back unchanged, and bad input is refused.
"""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, kstest

from selfflow.draws import keyed
from selfflow.method.batch import Condition
from selfflow.method.flow import interpolate, shift
from selfflow.method.sampling import guided_velocity, sample, time_grid
from selfflow.method.schedule import NoiseLevels
from selfflow.method.transformer import Transformer, TransformerConfig
from selfflow.registries import samplers

MEANS = torch.tensor([-2.0, 1.0], dtype=torch.float64)
STD = 0.5
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MU = torch.tensor([0.5, -1.0], dtype=torch.float64)
SIGMA = torch.tensor([[1.0, 0.9], [0.9, 1.5]], dtype=torch.float64)


def randn(*shape, seed=0, purpose="draw", dtype=torch.float64):
    return torch.randn(*shape, generator=keyed(seed, purpose), dtype=dtype)


def mixture_velocity(x, t):
    """E[x1 - x0 | xt = x] for x0 from two Gaussians: per component by Gaussian
    conditioning, weighted by responsibility.
    """
    variance = (1 - t) ** 2 * STD**2 + t**2
    offset = x[:, None] - (1 - t) * MEANS
    responsibility = torch.softmax(
        WEIGHTS.log() - offset.square() / (2 * variance), dim=1
    )
    x1 = t * offset / variance
    x0 = MEANS + (1 - t) * STD**2 * offset / variance
    return (responsibility * (x1 - x0)).sum(1)


def mixture_draws(count, seed):
    first = torch.rand(count, generator=keyed(seed, "component")) < WEIGHTS[0]
    return torch.where(first, *MEANS) + STD * randn(count, seed=seed, purpose="data")


def token_velocity(x, tau):
    """E[x1 - x0 | x] for (b, 2, 1) tokens at levels (b, 2), by conditioning the joint
    Gaussian of (x0, x1) and x.
    """
    a = 1 - tau
    s = tau
    c11 = a[:, 0] ** 2 * SIGMA[0, 0] + s[:, 0] ** 2
    c22 = a[:, 1] ** 2 * SIGMA[1, 1] + s[:, 1] ** 2
    c12 = a[:, 0] * a[:, 1] * SIGMA[0, 1]
    d = x[..., 0] - a * MU
    det = c11 * c22 - c12**2
    # C^-1 d, 2 x 2 by hand
    w = (
        torch.stack([c22 * d[:, 0] - c12 * d[:, 1], c11 * d[:, 1] - c12 * d[:, 0]], 1)
        / det[:, None]
    )
    return (s * w - MU - (a * w) @ SIGMA)[..., None]


@pytest.fixture(scope="module")
def start():
    return randn(4000, purpose="start")


@pytest.fixture(scope="module")
def exact(start):
    """200 points of noise and the data they end at."""
    x1 = start[start.abs() < 2][:200]
    return x1, sample(mixture_velocity, x1, 3000, "heun")


# order of convergence, distribution, grids


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("midpoint", 2)])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_samplers_converge_at_their_order(exact, method, order, alpha):
    x1, x0 = exact
    error = [
        (sample(mixture_velocity, x1, n, method, shift=alpha) - x0).abs().mean()
        for n in (80, 160, 320)
    ]
    slopes = [(a / b).log2().item() for a, b in zip(error, error[1:], strict=False)]
    assert slopes == pytest.approx([order, order], abs=0.25)


def test_samples_are_distributed_as_the_data(start):
    x0 = sample(mixture_velocity, start, 100, "heun")
    assert (x0 < -0.5).double().mean() == pytest.approx(0.3, abs=0.03)
    assert x0.mean() == pytest.approx(0.3 * -2 + 0.7 * 1, abs=0.08)
    assert x0[x0 > 0].std() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_the_sde_has_the_marginals_of_the_path_at_every_time(start, alpha):
    path = sample(
        mixture_velocity,
        start,
        250,
        "sde",
        shift=alpha,
        generator=keyed(0, "steps"),
        trajectory=True,
    )
    levels = time_grid(250, alpha, last=0.04, dtype=torch.float64)
    for i in (60, 125, 200, 250):
        true = interpolate(
            mixture_draws(4000, i), randn(4000, seed=i, purpose="noise"), levels[i]
        )
        assert ks_2samp(path[i], true).pvalue > 0.02, levels[i]
    # the noise decides too: with the ODE the end is a function of the start
    ode = sample(mixture_velocity, start, 50, "heun")
    memory = [
        torch.corrcoef(torch.stack([start, end]))[0, 1] for end in (ode, path[-1])
    ]
    assert memory[0] > 0.9
    assert 0.3 < memory[1] < 0.7


def test_the_test_of_marginals_detects_a_missing_score(start):
    """Noise without the score, the likeliest mistake, is detected at once."""
    x = start
    grid = time_grid(250, last=0.04, dtype=torch.float64)
    for i in range(125):
        dt = grid[i + 1] - grid[i]
        x = (
            x
            + dt * mixture_velocity(x, grid[i])
            + (-2 * grid[i] * dt).sqrt() * randn(4000, seed=i)
        )
    true = interpolate(
        mixture_draws(4000, 125), randn(4000, seed=125, purpose="noise"), grid[125]
    )
    assert ks_2samp(x, true).pvalue < 1e-6


@pytest.mark.parametrize("steps", [2, 12, 250])
def test_the_sde_equals_its_derivation_in_its_own_time(steps):
    x1 = randn(20, seed=1)
    noise = randn(steps - 1, 20, seed=2)
    u = torch.linspace(0, 0.96, steps, dtype=torch.float64)
    du = u[1] - u[0]
    x = x1
    for i in range(steps):
        w = -mixture_velocity(x, 1 - u[i])
        sigma = 1 - u[i]
        score = (u[i] * w - x) / (sigma**2 + u[i] * sigma)
        drift = w + sigma * score
        x = (
            x + 0.04 * drift
            if i == steps - 1
            else x + drift * du + (2 * sigma * du).sqrt() * noise[i]
        )
    for given_as in (noise, lambda i: noise[i]):
        torch.testing.assert_close(
            sample(mixture_velocity, x1, steps, "sde", noise=given_as),
            x,
            atol=1e-11,
            rtol=0,
        )


def test_the_generator_draws_the_noise_of_the_sde_step_by_step():
    x1 = randn(30)
    stream = keyed(3, "steps")
    noise = torch.stack(
        [torch.randn(30, generator=stream, dtype=torch.float64) for _ in range(9)]
    )
    state = torch.random.get_rng_state()
    got = sample(mixture_velocity, x1, 10, "sde", generator=keyed(3, "steps"))
    assert torch.equal(got, sample(mixture_velocity, x1, 10, "sde", noise=noise))
    assert not torch.equal(
        got, sample(mixture_velocity, x1, 10, "sde", generator=keyed(4, "steps"))
    )
    assert torch.equal(torch.random.get_rng_state(), state), (
        "the global stream is left alone"
    )


def test_the_grid_runs_from_noise_to_data():
    grid = time_grid(5)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert len(grid) == 6
    torch.testing.assert_close(time_grid(5, 2.0), shift(grid, 2.0))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.63])
@pytest.mark.parametrize("steps", [2, 3, 250])
def test_the_last_step_begins_at_its_level(steps, alpha):
    grid = time_grid(steps, alpha, last=0.04, dtype=torch.float64)
    assert len(grid) == steps + 1
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert grid[-2] == pytest.approx(0.04, abs=1e-12)
    # the inverse of a t / (1 + (a - 1) t)
    unshifted = grid[:-1] / (alpha - (alpha - 1) * grid[:-1])
    torch.testing.assert_close(unshifted.diff(), unshifted.diff()[:1].expand(steps - 1))
    if alpha == 1:
        torch.testing.assert_close(
            grid[:-1], 1 - torch.linspace(0, 0.96, steps, dtype=torch.float64)
        )


@pytest.mark.parametrize("method", tuple(samplers))
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_a_trajectory_holds_every_state(start, method, alpha):
    noise = randn(6, 5, purpose="noise")
    path = sample(
        mixture_velocity, start[:5], 7, method, alpha, trajectory=True, noise=noise
    )
    assert path.shape == (8, 5)
    assert torch.equal(path[0], start[:5])
    assert torch.equal(
        path[-1], sample(mixture_velocity, start[:5], 7, method, alpha, noise=noise)
    )
    if method == "dopri5":  # each state lies on the path, at the level of the grid
        fine = sample(
            mixture_velocity, start[:5], 7 * 400, "heun", alpha, trajectory=True
        )[::400]
        torch.testing.assert_close(path, fine, atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    "method, calls", [("euler", 6), ("heun", 12), ("midpoint", 12), ("sde", 6)]
)
def test_each_sampler_evaluates_the_velocity_as_often_as_stated(method, calls):
    levels = []
    sample(
        lambda x, t: levels.append(float(t)) or x,
        torch.zeros(1),
        6,
        method,
        generator=keyed(0, "steps"),
    )
    assert len(levels) == calls
    assert levels[0] == 1.0
    assert min(levels) >= 0


@pytest.mark.parametrize("method", tuple(samplers))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_states_keep_their_precision_and_levels_have_at_least_float32(method, dtype):
    x1 = randn(2, 3, 4).to(dtype)
    level_types = set()

    def velocity(x, t):
        assert x.dtype == dtype
        level_types.add(t.dtype)
        return -x

    for known in (
        {},
        {"x0": torch.zeros_like(x1), "start": torch.tensor([0.0, 0.5, 1.0])},
    ):
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if method == "dopri5" else {}
        out = sample(
            velocity, x1, 4, method, generator=keyed(0, "steps"), **tolerance, **known
        )
        assert out.dtype == dtype
        assert out.isfinite().all()
    assert level_types == {torch.promote_types(dtype, torch.float32)}


# adaptive steps


def test_dopri5_agrees_with_many_small_steps_at_levels_in_0_to_1(exact):
    levels = []

    def velocity(x, t):
        levels.append(float(t))
        return mixture_velocity(x, t)

    x1, x0 = exact
    for tolerance in (1e-4, 1e-8):
        levels.clear()
        got = sample(velocity, x1, 1, "dopri5", rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got, x0, atol=max(50 * tolerance, 2e-6), rtol=0)
        # from data to noise, and no level outside
        assert 0 <= min(levels) < 1e-9
        assert max(levels) == 1
        assert len(levels) < 1000


def test_dopri5_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ValueError, match=r"pip install 'selfflow\[ode\]'"):
        sample(mixture_velocity, torch.zeros(2), method="dopri5")


@pytest.mark.parametrize(
    "velocity, tolerance",
    [
        (lambda x, t: x * math.nan, 1e-5),
        (lambda x, t: torch.sin(1e3 * x), 1e-12),
    ],
)
def test_dopri5_reports_that_it_failed(velocity, tolerance):
    with pytest.raises(ValueError, match="dopri5 found no step that meets"):
        sample(velocity, torch.ones(2), method="dopri5", rtol=tolerance, atol=tolerance)


# known tokens


@pytest.mark.parametrize(
    "method, steps, atol",
    [
        ("euler", 2000, 5e-3),
        ("heun", 200, 1e-3),
        ("midpoint", 200, 1e-3),
        ("dopri5", 1, 1e-3),
    ],
)
def test_a_given_token_leads_the_second_to_its_conditional_distribution(
    method, steps, atol
):
    """With x0[0] = k the ODE of the second token is that of N(m, s^2) and takes noise
    z to m + s z.
    """
    x0 = randn(50, 2, 1, seed=1)
    x1 = randn(50, 2, 1, seed=2)
    got = sample(
        token_velocity, x1, steps, method, x0=x0, start=torch.tensor([0.0, 1.0])
    )
    mean = MU[1] + SIGMA[0, 1] / SIGMA[0, 0] * (x0[:, 0] - MU[0])
    std = (SIGMA[1, 1] - SIGMA[0, 1] ** 2 / SIGMA[0, 0]).sqrt()
    assert torch.equal(got[:, 0], x0[:, 0])
    torch.testing.assert_close(got[:, 1], mean + std * x1[:, 1], atol=atol, rtol=0)


def test_the_sde_draws_from_the_conditional_distribution():
    x0 = randn(4000, 2, 1, seed=1)
    x1 = randn(4000, 2, 1, seed=2)
    got = sample(
        token_velocity,
        x1,
        250,
        "sde",
        x0=x0,
        start=torch.tensor([1.0, 0.0]),
        generator=keyed(0, "steps"),
    )
    mean = MU[0] + SIGMA[0, 1] / SIGMA[1, 1] * (x0[:, 1] - MU[1])
    std = (SIGMA[0, 0] - SIGMA[0, 1] ** 2 / SIGMA[1, 1]).sqrt()
    assert torch.equal(got[:, 1], x0[:, 1])
    z = ((got[:, 0] - mean) / std)[:, 0]
    assert kstest(z, "norm").pvalue > 0.02
    assert abs(torch.corrcoef(torch.stack([z, x0[:, 1, 0]]))[0, 1]) < 0.05


@pytest.mark.parametrize("method, steps", [("heun", 60), ("sde", 250), ("dopri5", 1)])
def test_a_partly_known_pair_ends_as_a_pair_of_the_data(method, steps):
    """Levels that run down one after the other keep the joint distribution: the pair is
    whitened and tested in four directions.
    """
    root = torch.linalg.cholesky(SIGMA)
    x0 = MU[:, None] + root @ randn(4000, 2, 1, seed=1)
    x1 = randn(4000, 2, 1, seed=2)
    got = sample(
        token_velocity,
        x1,
        steps,
        method,
        x0=x0,
        start=torch.tensor([0.4, 1.0]),
        generator=keyed(0, "steps"),
    )
    white = torch.linalg.solve_triangular(root, got - MU[:, None], upper=False)[..., 0]
    for direction in (
        [1.0, 0.0],
        [0.0, 1.0],
        [0.5**0.5, 0.5**0.5],
        [0.5**0.5, -(0.5**0.5)],
    ):
        assert (
            kstest(white @ torch.tensor(direction, dtype=torch.float64), "norm").pvalue
            > 0.02
        )
    # the token known at level 0.4 has not moved far from its value
    assert torch.corrcoef(torch.stack([got[:, 0, 0], x0[:, 0, 0]]))[0, 1] > 0.6


def test_dopri5_follows_the_path_of_tokens_that_start_at_different_levels():
    x0 = randn(6, 2, 1, seed=1)
    x1 = randn(6, 2, 1, seed=2)
    levels = torch.rand(6, 2, generator=keyed(0, "levels"))
    fine = sample(
        token_velocity, x1, 10 * 300, "heun", x0=x0, start=levels, trajectory=True
    )[::300]
    got = sample(
        token_velocity,
        x1,
        10,
        "dopri5",
        x0=x0,
        start=levels,
        trajectory=True,
        rtol=1e-7,
        atol=1e-7,
    )
    torch.testing.assert_close(got, fine, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", tuple(samplers))
def test_a_start_of_1_everywhere_is_plain_sampling(method):
    x0 = randn(3, 2, 1, seed=1)
    x1 = randn(3, 2, 1, seed=2)
    noise = randn(7, 3, 2, 1, seed=3)

    def velocity(x, t):
        return token_velocity(x, t if t.ndim else t.expand(3, 2))

    plain = sample(velocity, x1, 8, method, noise=noise, trajectory=True, shift=2.0)
    for start in (torch.ones(2), torch.ones(3, 2)):
        assert torch.equal(
            sample(
                velocity,
                x1,
                8,
                method,
                noise=noise,
                trajectory=True,
                shift=2.0,
                x0=x0,
                start=start,
            ),
            plain,
        )


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_known_tokens_wait_and_come_back_bit_for_bit(data):
    method = data.draw(st.sampled_from(tuple(samplers)))
    b, n, c, steps = (data.draw(st.integers(low, 4)) for low in (1, 1, 1, 2))
    shape = data.draw(st.sampled_from([(n,), (b, n)]))
    start = torch.tensor(
        data.draw(
            st.lists(
                st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0]) | st.floats(0, 1, width=32),
                min_size=math.prod(shape),
                max_size=math.prod(shape),
            )
        )
    ).reshape(shape)
    x0 = randn(b, n, c, seed=1, dtype=torch.float32)
    x1 = randn(b, n, c, seed=2, dtype=torch.float32)
    x0[0] = -0.0  # the sum of -0.0 and 0.0 would be 0.0
    x1[0] = x1[0].abs()
    begins = start.expand(b, n)
    known = begins == 0
    levels = []

    def velocity(x, t):
        assert x.shape == (b, n, c)
        assert t.shape == (b, n)
        levels.append(t)
        v = torch.sin(3 * x) + t[..., None]
        # the velocity of a known token does not matter
        return torch.where(known[..., None], math.nan, v)

    path = sample(
        velocity,
        x1,
        steps,
        method,
        x0=x0,
        start=start,
        generator=keyed(0, "steps"),
        trajectory=True,
    )
    assert path.shape == (steps + 1, b, n, c)
    assert not path.isnan().any()
    assert torch.equal(
        path[-1][known].view(torch.int32), x0[known].view(torch.int32)
    ), "-0.0 stays -0.0"
    grid = time_grid(steps, last=0.04 if method == "sde" else 0.0)
    before = (1 - begins[..., None]) * x0 + begins[..., None] * x1
    for t, state in zip(grid, path, strict=True):
        waiting = (begins <= t) & (begins < 1)
        assert torch.equal(state[waiting], before[waiting]), (
            "a token waits, unchanged, until its time comes"
        )
    for t in levels:
        assert (t <= begins).all()
        # halfway through the step in which a token starts, that token has gone half of
        # its shorter way
        if method != "midpoint":
            assert torch.equal(t, begins.clamp(max=t.max())), (
                "the levels are min(start, t) for one t"
            )


@pytest.mark.parametrize("method, calls", [("euler", 5), ("heun", 10), ("sde", 6)])
def test_steps_in_which_no_token_moves_are_free(method, calls):
    x0 = randn(2, 3, 1, seed=1)
    x1 = randn(2, 3, 1, seed=2)
    levels = []
    sample(
        lambda x, t: levels.append(float(t.max())) or x,
        x1,
        10,
        method,
        x0=x0,
        start=torch.tensor([0.0, 0.5, 0.2]),
        generator=keyed(0, "steps"),
    )
    assert len(levels) == calls
    assert max(levels) == pytest.approx(0.5)
    unchanged = sample(
        lambda x, t: 1 / 0,
        x1,
        10,
        method,
        x0=x0,
        start=torch.zeros(3),
        generator=keyed(0, "steps"),
    )
    assert torch.equal(unchanged, x0)


# guidance


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig.of_image(
            channels=3, grid=(2, 2), width=16, depth=2, heads=2, classes=4
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def forwards(model):
    """List of (samples, levels), one for each forward pass of the model."""
    calls = []
    model.register_forward_pre_hook(
        lambda module, inputs: calls.append((len(inputs[0]), inputs[1]))
    )
    return calls


def test_guidance_equals_its_formula(model):
    x = torch.randn(3, 4, 3)
    t = torch.tensor(0.4)
    condition = Condition(torch.tensor([0, 3, 2]), 4)
    levels = NoiseLevels.single(t.expand(3), 4)
    label = model(x, levels, condition).velocity
    null = model(x, levels, condition.unconditional()).velocity
    for scale in (0.0, 1.0, 1.5, 4.0):
        expected = null + scale * (label - null)
        # one level, one per sample, one per token
        for t_ in (t, t.expand(3), t.expand(3, 4)):
            torch.testing.assert_close(
                guided_velocity(model, condition, scale)(x, t_),
                expected,
                atol=1e-5,
                rtol=1e-4,
            )
    torch.testing.assert_close(guided_velocity(model)(x, t), null)


def test_guidance_at_levels_per_token_equals_its_formula(model):
    x = torch.randn(3, 4, 3)
    condition = Condition(torch.tensor([0, 3, 2]), 4)
    tau = torch.rand(3, 4)
    levels = NoiseLevels(tau, torch.arange(4).expand(3, 4))
    label = model(x, levels, condition).velocity
    null = model(x, levels, condition.unconditional()).velocity
    torch.testing.assert_close(
        guided_velocity(model, condition, 2.5)(x, tau),
        null + 2.5 * (label - null),
        atol=1e-5,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        guided_velocity(model, condition)(x, tau), label, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6), (0.0, 0.35), (0.75, 1.0)])
def test_guidance_acts_and_costs_only_in_its_interval(model, forwards, interval):
    x = torch.randn(3, 4, 3)
    condition = Condition(torch.tensor([0, 3, 2]), 4)
    limited, always, never = (
        guided_velocity(model, condition, *more)
        for more in ((3.0, interval), (3.0,), ())
    )
    for t in torch.linspace(0, 1, 11):
        inside = interval[0] - 1e-6 < t.item() < interval[1] + 1e-6
        forwards.clear()
        v = limited(x, t)
        assert [samples for samples, _ in forwards] == [6 if inside else 3]
        assert torch.equal(v, (always if inside else never)(x, t))
        assert not torch.equal(v, (never if inside else always)(x, t))


def test_the_noisiest_token_decides_whether_a_sample_is_guided(model):
    x = torch.randn(2, 4, 3)
    condition = Condition(torch.tensor([0, 3]), 4)
    tau = torch.tensor([[0.0, 0.3, 0.5, 0.5], [0.0, 0.3, 0.5, 0.9]])
    limited, always, never = (
        guided_velocity(model, condition, *more)(x, tau)
        for more in ((3.0, (0.2, 0.6)), (3.0,), ())
    )
    torch.testing.assert_close(limited, torch.stack([always[0], never[1]]))
    assert (always - never).abs().amax((1, 2)).min() > 1e-3


def test_levels_reach_the_model_exactly_and_compactly(model, forwards):
    x1 = torch.randn(3, 4, 3)
    x0 = torch.randn(3, 4, 3)
    condition = Condition(torch.tensor([0, 3, 2]), 4)
    sample(
        guided_velocity(model, condition, 2.0),
        x1,
        5,
        x0=x0,
        start=torch.tensor([0.0, 1.0, 1.0, 0.0]),
    )
    assert [levels.k for _, levels in forwards] == [2] * 5
    for (_, levels), t in zip(forwards, torch.linspace(1, 0, 6)[:-1], strict=True):
        assert torch.equal(
            levels.per_token(), torch.stack([0 * t, t, t, 0 * t]).expand(6, 4)
        )
    forwards.clear()
    tau = torch.rand(3, 4)
    guided_velocity(model, condition)(x1, tau)
    ((_, levels),) = forwards
    assert levels.k == 4
    assert torch.equal(levels.per_token(), tau)


def zero(x, t):
    return torch.zeros_like(x)


X = torch.zeros(2, 3, 1)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda m: sample(zero, torch.zeros(1), 0), "steps is 0"),
        (
            lambda m: sample(zero, torch.zeros(1), 1, "sde", generator=keyed(0, "s")),
            "steps is 1, but .* at least 2, one from t = 1",
        ),
        (
            lambda m: sample(zero, torch.zeros(1), 5, "rk4"),
            "unknown sampler 'rk4'; known are euler, heun, midpoint, sde, dopri5",
        ),
        (lambda m: sample(zero, torch.zeros(1), 5, shift=0.0), "alpha"),
        (
            lambda m: sample(
                zero,
                torch.zeros(1),
                5,
                "sde",
                shift=0.0,
                generator=keyed(0, "s"),
            ),
            "alpha",
        ),
        (lambda m: time_grid(5, last=1.0), r"last is 1.0"),
        (lambda m: sample(zero, X + math.nan), "x1 has 6 values that are NaN"),
        (
            lambda m: sample(
                zero,
                X,
                x0=X.index_fill(1, torch.tensor([2]), math.inf),
                start=torch.zeros(3),
            ),
            "x0 has 2 values",
        ),
        (lambda m: sample(zero, X, x0=X), "x0 and start belong together"),
        (
            lambda m: sample(zero, X, start=torch.zeros(3)),
            "x0 and start belong together",
        ),
        (
            lambda m: sample(zero, X, x0=X[:1], start=torch.zeros(3)),
            r"x0 is \(1, 3, 1\) torch.float32",
        ),
        (
            lambda m: sample(zero, X, x0=X.double(), start=torch.zeros(3)),
            "torch.float64.*one dtype",
        ),
        (
            lambda m: sample(zero, X[0], x0=X[0], start=torch.zeros(3)),
            r"both are \(b, n, c\)",
        ),
        (
            lambda m: sample(zero, X, x0=X, start=torch.zeros(2)),
            r"start has shape \(2,\), expected .* \(2, 3\) or \(3,\)",
        ),
        (
            lambda m: sample(zero, X, x0=X, start=torch.tensor([0.0, 1.5, 1])),
            "start runs from 0 to 1.5, outside",
        ),
        (
            lambda m: sample(zero, X, x0=X, start=torch.tensor([0.0, -0.1, 1])),
            "start runs from -0.1 to 1, outside",
        ),
        (
            lambda m: sample(zero, X, x0=X, start=torch.tensor([0.0, math.nan, 1])),
            "start runs from nan",
        ),
        (
            lambda m: sample(zero, X, x0=X, start=torch.zeros(3), kept_level=1.5),
            "kept_level is 1.5, outside",
        ),
        (lambda m: sample(zero, X, 5, "sde"), "give generator=keyed"),
        (
            lambda m: sample(zero, X, 5, "sde", noise=torch.zeros(5, 2, 3, 1)),
            r"\(5, 2, 3, 1\), expected \(4, 2, 3, 1\)",
        ),
        (
            lambda m: sample(zero, X, 5, "sde", noise=lambda i: torch.zeros(3)),
            r"step's noise has shape \(3,\)",
        ),
        (lambda m: sample(zero, X, 5, "dopri5", rtol=0.0), "rtol is 0.0"),
        (lambda m: guided_velocity(m, None, 2.0), "guidance needs a condition"),
        (
            lambda m: guided_velocity(m, Condition(torch.tensor([1]), 4), math.inf),
            "cfg_scale is inf",
        ),
        (
            lambda m: guided_velocity(
                m, Condition(torch.tensor([1]), 4), 2.0, (0.6, 0.2)
            ),
            r"interval is \(0.6, 0.2\)",
        ),
        (
            lambda m: guided_velocity(
                m, Condition(torch.tensor([1]), 4), 2.0, (0.5, 0.5)
            ),
            "interval",
        ),
        (
            lambda m: guided_velocity(
                m, Condition(torch.tensor([1]), 4), 2.0, (-0.1, 0.5)
            ),
            "interval",
        ),
        (
            lambda m: guided_velocity(
                m, Condition(torch.tensor([1]), 4), 2.0, (0.1, 1.5)
            ),
            "interval",
        ),
        (
            lambda m: guided_velocity(
                m, Condition(torch.tensor([1]), 4), 2.0, (math.nan, 1.0)
            ),
            "interval",
        ),
        (
            lambda m: guided_velocity(m, Condition(torch.tensor([1]), 4), 2.0, (0.5,)),
            "interval",
        ),
    ],
)
def test_bad_input_is_refused(model, wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong(model)
