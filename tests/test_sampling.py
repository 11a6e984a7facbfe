"""Samplers on a Gaussian mixture whose velocity is known exactly; guidance; bad input."""
import pytest
import torch

from selfflow.flow import keyed, shift
from selfflow.sampling import guided_velocity, sample, time_grid
from selfflow.schedule import NoiseLevels
from selfflow.transformer import Transformer, TransformerConfig

MEANS, STD, WEIGHTS = torch.tensor([-2.0, 1.0], dtype=torch.float64), 0.5, torch.tensor([0.3, 0.7], dtype=torch.float64)


def mixture_velocity(x, t):
    "E[x1 - x0 | xt = x] for x0 from two Gaussians: per component by Gaussian conditioning, weighted by responsibility."
    variance = (1 - t) ** 2 * STD**2 + t**2
    offset = x[:, None] - (1 - t) * MEANS
    responsibility = torch.softmax(WEIGHTS.log() - offset.square() / (2 * variance), dim=1)
    x1, x0 = t * offset / variance, MEANS + (1 - t) * STD**2 * offset / variance
    return (responsibility * (x1 - x0)).sum(1)


@pytest.fixture(scope="module")
def start():
    return torch.randn(4000, generator=keyed(0, "start"), dtype=torch.float64)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_order_of_convergence(start, method, order, alpha):
    x1 = start[start.abs() < 2][:200]
    exact = sample(mixture_velocity, x1, 3000, "heun")
    error = [(sample(mixture_velocity, x1, n, method, shift=alpha) - exact).abs().mean() for n in (80, 160, 320)]
    slopes = [(a / b).log2().item() for a, b in zip(error, error[1:], strict=False)]
    assert slopes == pytest.approx([order, order], abs=0.25)


def test_samples_are_distributed_as_the_data(start):
    x0 = sample(mixture_velocity, start, 100, "heun")
    assert (x0 < -0.5).double().mean() == pytest.approx(0.3, abs=0.03)
    assert x0.mean() == pytest.approx(0.3 * -2 + 0.7 * 1, abs=0.08)
    assert x0[x0 > 0].std() == pytest.approx(0.5, abs=0.05)


def test_the_grid_runs_from_noise_to_data():
    grid = time_grid(5)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all() and len(grid) == 6
    torch.testing.assert_close(time_grid(5, 2.0), shift(grid, 2.0))


def test_trajectory_holds_every_state(start):
    path = sample(mixture_velocity, start[:5], 7, trajectory=True)
    assert path.shape == (8, 5) and torch.equal(path[0], start[:5])
    assert torch.equal(path[-1], sample(mixture_velocity, start[:5], 7))


@pytest.mark.parametrize("method, calls", [("euler", 6), ("heun", 12)])
def test_number_of_evaluations(method, calls):
    seen = []
    sample(lambda x, t: seen.append(float(t)) or x, torch.zeros(1), 6, method)
    assert len(seen) == calls and seen[0] == 1.0 and min(seen) >= 0


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(channels=3, grid=(2, 2), width=16, depth=2, heads=2, classes=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_guidance_derived_again(model):
    x, t, labels = torch.randn(3, 4, 3), torch.tensor(0.4), torch.tensor([0, 3, 2])
    levels = NoiseLevels.single(t.expand(3), 4)
    label, null = model(x, levels, labels).velocity, model(x, levels, torch.full((3,), 4)).velocity
    for scale in (0.0, 1.0, 1.5, 4.0):
        expected = null + scale * (label - null)
        torch.testing.assert_close(guided_velocity(model, labels, scale)(x, t), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(guided_velocity(model)(x, t), null)


@pytest.mark.parametrize("wrong, words", [
    (lambda m: sample(lambda x, t: x, torch.zeros(1), 0), "steps is 0"),
    (lambda m: sample(lambda x, t: x, torch.zeros(1), 5, "rk4"), "method is 'rk4'; known are euler, heun"),
    (lambda m: sample(lambda x, t: x, torch.zeros(1), 5, shift=0.0), "alpha"),
    (lambda m: guided_velocity(m, torch.tensor([4])), "classes 0 to 3"),
    (lambda m: guided_velocity(m, torch.tensor([-1])), "labels run from -1"),
    (lambda m: guided_velocity(m, None, 2.0), "guidance needs labels"),
])
def test_bad_input_is_refused(model, wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong(model)
