"""Self-Flow derived again from its equations, and every trap of the method as a test."""
import math

import pytest
import torch
import torch.nn.functional as F

from selfflow.flow import keyed
from selfflow.objective import (FlowMatching, Losses, Projector, SelfFlow, default_layers, ema_decay, loss_by_level,
                                make_teacher, update_ema)
from selfflow.schedule import DualTimestep, NoiseLevels, SingleLevel
from selfflow.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(channels=3, grid=(2, 3), width=16, depth=4, heads=2, classes=5)


def random_model(seed):
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def student():
    return random_model(0)


@pytest.fixture
def teacher():
    return make_teacher(random_model(1))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randn(32, 6, 3, generator=g), torch.randint(0, 5, (32,), generator=g)


def draws(seed=0):
    return lambda purpose: keyed(seed, purpose)


class Watched:
    "A model that remembers how it was called."

    def __init__(self, model):
        self.model, self.calls, self.null_label = model, [], model.null_label

    def __call__(self, *args, **options):
        self.calls.append((*args, options))
        return self.model(*args, **options)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("layers", [(1, 3), (2, 4), (1, 2)])
@pytest.mark.parametrize("rep_weight", [0.8, 0.0])
def test_losses_derived_again(student, teacher, batch, mask_ratio, layers, rep_weight):
    x0, labels = batch
    torch.manual_seed(0)
    objective = SelfFlow(CONFIG, DualTimestep(mask_ratio=mask_ratio), *layers, rep_weight=rep_weight, label_drop=0.3)
    losses = objective(student, teacher, x0, labels, draws())

    x1 = torch.randn(x0.shape, generator=keyed(0, "noise"))
    drawn = objective.schedule.sample(32, 6, keyed(0, "levels"))
    y = torch.where(torch.rand(32, generator=keyed(0, "label drop")) < 0.3, 5, labels)
    t, s = drawn.levels.T
    flow, cosines, directions = 0.0, [], []
    w1, b1, w2, b2 = objective.projector.parameters()
    for i in range(32):
        tau = torch.stack([s[i] if drawn.assign[i, n] else t[i] for n in range(6)])
        low = min(t[i], s[i])
        xt = torch.stack([(1 - tau[n]) * x0[i, n] + tau[n] * x1[i, n] for n in range(6)])[None]
        out = student(xt, NoiseLevels(tau[None], torch.arange(6)[None]), y[i:i + 1], taps=(layers[0],))
        flow = flow + ((out.velocity[0] - (x1[i] - x0[i])) ** 2).sum() / (32 * 6 * 3)
        xc = ((1 - low) * x0[i] + low * x1[i])[None]
        h = teacher(xc, NoiseLevels.single(low[None], 6), y[i:i + 1], taps=(layers[1],)).features[layers[1]][0]
        p = F.silu(out.features[layers[0]][0] @ w1.T + b1) @ w2.T + b2
        for n in range(6):
            cosines.append((p[n] @ h[n]) / (p[n].norm() * h[n].norm()))
            directions.append(h[n] / h[n].norm())
    cosine = torch.stack(cosines).mean()
    torch.testing.assert_close(losses.flow_loss, flow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.rep_loss, 1 - cosine, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, flow + rep_weight * (1 - cosine), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.constant_cosine, torch.stack(directions).mean(0).norm(), rtol=1e-4, atol=1e-5)


def test_flow_matching_derived_again(student, teacher, batch):
    x0, labels = batch
    losses = FlowMatching(SingleLevel(), label_drop=0.0)(student, teacher, x0, labels, draws())
    x1 = torch.randn(x0.shape, generator=keyed(0, "noise"))
    t = torch.rand(32, generator=keyed(0, "levels"))[:, None, None]
    out = student((1 - t) * x0 + t * x1, NoiseLevels.single(t[:, 0, 0], 6), labels)
    torch.testing.assert_close(losses.total, ((out.velocity - (x1 - x0)) ** 2).mean())
    assert losses.rep_loss is None and list(losses.floats()) == ["total", "flow_loss"]


def test_constant_cosine_is_reached_by_the_mean_direction_and_by_no_other():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(40, 6, 8, generator=g) + 1.0
    best = F.normalize(h, dim=-1).mean((0, 1))

    def reach(p):
        return F.cosine_similarity(p.expand_as(h), h, dim=-1).mean()
    torch.testing.assert_close(reach(best), best.norm())
    assert all(reach(best + 0.1 * torch.randn(8, generator=g)) < best.norm() for _ in range(50))


def test_the_two_views_share_noise_and_labels_and_the_teacher_sees_the_cleaner_level(student, teacher, batch):
    x0, labels = batch
    student, teacher = Watched(student), Watched(teacher)
    objective = SelfFlow(CONFIG, label_drop=0.5)
    objective(student, teacher, x0, labels, draws())
    (xs, levels, ys, _), (xc, clean, yc, options) = student.calls[0], teacher.calls[0]
    assert torch.equal(ys, yc) and 5 in ys and (ys != 5).any()
    assert clean.k == 1 and torch.equal(clean.levels[:, 0], levels.levels.amin(1))
    assert options["stop"] and options["taps"] == (objective.teacher_layer,)
    tau, low = levels.per_token()[..., None], clean.per_token()[..., None]
    noise_s, noise_c = (xs - (1 - tau) * x0) / tau, (xc - (1 - low) * x0) / low
    usable = (low > 0.05).expand_as(noise_s)
    torch.testing.assert_close(noise_s[usable], noise_c[usable], atol=1e-4, rtol=1e-4)


def test_gradient_reaches_student_and_head_and_never_the_teacher(student, teacher, batch):
    objective = SelfFlow(CONFIG, student_layer=2, teacher_layer=3)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective(student, teacher, *batch, draws()).rep_loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters())
    assert [block.attn.qkv.weight.grad is not None for block in student.blocks] == [True, True, False, False]
    assert student.final_layer.linear.weight.grad is None
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())


def test_the_cosine_is_in_float32_under_autocast(student, teacher, batch):
    with torch.autocast("cpu", torch.bfloat16):
        losses = SelfFlow(CONFIG)(student, teacher, *batch, draws())
    assert {getattr(losses, name).dtype for name in ("total", "flow_loss", "rep_loss", "cosine")} == {torch.float32}


def test_ema_closed_form():
    student, decay = random_model(0), 0.9
    teacher = make_teacher(student)
    history = [{name: p.detach().clone() for name, p in student.named_parameters()}]
    for step in range(5):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        update_ema(teacher, student, decay)
        history.append({name: p.detach().clone() for name, p in student.named_parameters()})
    weights = [decay**5] + [(1 - decay) * decay ** (5 - i) for i in range(1, 6)]
    assert sum(weights) == pytest.approx(1)
    for name, average in teacher.named_parameters():
        expected = sum(w * h[name] for w, h in zip(weights, history, strict=True))
        torch.testing.assert_close(average, expected, atol=1e-5, rtol=1e-4)


def test_half_life():
    assert ema_decay(100) ** 100 == pytest.approx(0.5)
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="half_life"):
            ema_decay(wrong)


def test_the_teacher_is_a_copy_that_shares_nothing(student):
    teacher = make_teacher(student)
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("depth, layers", [(28, (8, 20)), (12, (4, 8)), (6, (2, 4)), (4, (1, 3)), (2, (1, 2))])
def test_default_layers(depth, layers):
    assert default_layers(depth) == layers


@pytest.mark.parametrize("layers", [(3, 3), (4, 2), (0, 2), (1, 5)])
def test_layers_that_do_not_fit_are_refused(layers):
    with pytest.raises(ValueError, match=f"student_layer {layers[0]} and teacher_layer {layers[1]} do not fit"):
        SelfFlow(CONFIG, None, *layers)


def test_the_head_is_the_published_one():
    shapes = [tuple(p.shape) for p in Projector(16).parameters()]
    assert shapes == [(32, 16), (32,), (16, 32), (16,)] and isinstance(Projector(16)[1], torch.nn.SiLU)


def test_loss_by_level_is_per_sample_and_does_not_depend_on_the_batch_size(student, batch):
    x0, labels = batch
    x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    losses = loss_by_level(student, x0, labels, x1, [0.2, 0.9], batch=7)
    torch.testing.assert_close(losses, loss_by_level(student, x0, labels, x1, [0.2, 0.9]))
    v = student(0.1 * x0[3:4] + 0.9 * x1[3:4], NoiseLevels.single(torch.tensor([0.9]), 6), labels[3:4]).velocity
    torch.testing.assert_close(losses[1, 3], (v - x1[3] + x0[3]).square().mean())


def test_losses_floats_leaves_out_what_is_absent():
    assert Losses(torch.tensor(1.0), torch.tensor(1.0)).floats() == {"total": 1.0, "flow_loss": 1.0}
