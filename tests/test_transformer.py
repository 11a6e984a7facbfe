"""The velocity model: compact conditioning against a plain rewriting, gradients, taps, bad input."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.schedule import DualTimestep, NoiseLevels
from selfflow.transformer import Transformer, TransformerConfig, drop_labels


def model_of(dtype=torch.float32, seed=0, std=0.1, **changes):
    torch.manual_seed(seed)
    shape = {"channels": 3, "grid": (2, 3), "width": 16, "depth": 3, "heads": 2, "classes": 5, **changes}
    model = Transformer(TransformerConfig(**shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.to(dtype)


def plain_forward(model, x, tau, y, layer):
    """DiT with a condition for every token, written as the papers write it, straight from the weights."""
    w, d = dict(model.named_parameters()), model.config.width

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def linear(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    angles = tau[..., None] * frequencies
    code = torch.cat([angles.cos(), angles.sin()], -1)
    c = linear(F.silu(linear(code, "t_embedder.mlp.0")), "t_embedder.mlp.2") + w["y_embedder.weight"][y][:, None]
    h = linear(x, "x_embedder") + model.positions
    for i in range(model.config.depth):
        b1, g1, a1, b2, g2, a2 = linear(F.silu(c), f"blocks.{i}.adaLN_modulation.1").chunk(6, -1)
        q, k, v = linear(norm(h) * (1 + g1) + b1, f"blocks.{i}.attn.qkv").chunk(3, -1)
        heads = []
        for part in torch.arange(d).chunk(model.config.heads):
            scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(len(part))
            heads.append(scores.softmax(-1) @ v[..., part])
        h = h + a1 * linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        inner = linear(norm(h) * (1 + g2) + b2, f"blocks.{i}.mlp.fc1")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        h = h + a2 * linear(inner, f"blocks.{i}.mlp.fc2")
        if i + 1 == layer:
            feature = h
    shift, scale = linear(F.silu(c), "final_layer.adaLN_modulation.1").chunk(2, -1)
    return linear(norm(h) * (1 + scale) + shift, "final_layer.linear"), feature


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_k_levels_equal_a_condition_per_token(k, seed, edges):
    model, g = model_of(torch.float64, seed % 7), torch.Generator().manual_seed(seed)
    x, y = torch.randn(4, 6, 3, generator=g, dtype=torch.float64), torch.randint(0, 6, (4,), generator=g)
    values = torch.rand(4, k, generator=g, dtype=torch.float64)
    levels = NoiseLevels(values.round() if edges else values, torch.randint(0, k, (4, 6), generator=g))
    # the sinusoid is computed in float32, as in the published model: hence not to the last digit of float64
    out = model(x, levels, y, taps=(2,))
    velocity, feature = plain_forward(model, x, levels.per_token(), y, layer=2)
    torch.testing.assert_close(out.velocity, velocity, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.features[2], feature, atol=1e-6, rtol=1e-5)


def test_gradients_in_float64():
    model = model_of(torch.float64, depth=2)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    levels, y = DualTimestep(mask_ratio=0.5).sample(2, 6), torch.tensor([0, 5])
    inputs = (model.blocks[0].adaLN_modulation[1].bias, model.y_embedder.weight, model.t_embedder.mlp[2].bias)
    assert torch.autograd.gradcheck(lambda x, *_: model(x, levels, y).velocity, (x, *inputs), atol=1e-6, rtol=1e-4)


def test_a_fresh_model_answers_zero_and_its_blocks_are_the_identity():
    model = Transformer(TransformerConfig(channels=3, grid=(2, 3), width=16, depth=3, heads=2, classes=5))
    out = model(torch.randn(2, 6, 3), DualTimestep().sample(2, 6), torch.tensor([1, 2]), taps=(1, 3))
    assert (out.velocity == 0).all() and torch.equal(out.features[1], out.features[3])
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.y_embedder.weight.std().item() == pytest.approx(0.02, rel=0.3)
    bound = math.sqrt(6 / (16 + 64))  # xavier
    assert 0.9 * bound < model.blocks[0].mlp.fc1.weight.abs().max() <= bound


def test_stop_ends_at_the_last_tap_and_touches_nothing_deeper():
    model = model_of()
    for parameter in [*model.blocks[2].parameters(), *model.final_layer.parameters()]:
        torch.nn.init.constant_(parameter, math.nan)
    out = model(torch.randn(2, 6, 3), DualTimestep().sample(2, 6), None, taps=(2, 1), stop=True)
    assert out.velocity is None and list(out.features) == [1, 2]
    assert all(h.isfinite().all() for h in out.features.values())


def test_no_condition_means_the_null_label():
    model, x, levels = model_of(), torch.randn(2, 6, 3), DualTimestep().sample(2, 6)
    assert model.null_label == 5
    torch.testing.assert_close(model(x, levels).velocity, model(x, levels, torch.tensor([5, 5])).velocity)
    assert not torch.allclose(model(x, levels).velocity, model(x, levels, torch.tensor([0, 1])).velocity)


def test_drop_labels_is_one_draw_per_sample():
    labels = torch.arange(5).repeat(4000)
    dropped = drop_labels(labels, 5, 0.1, torch.Generator().manual_seed(0))
    assert (dropped == 5).float().mean() == pytest.approx(0.1, abs=0.01)
    kept = dropped != 5
    assert torch.equal(dropped[kept], labels[kept])
    assert torch.equal(drop_labels(labels, 5, 0.0), labels) and (drop_labels(labels, 5, 1.0) == 5).all()


@pytest.mark.parametrize("labels, error, words", [
    (torch.tensor([0, 6]), ValueError, "labels run from 0 to 6; the model has classes 0 to 4 and the null label 5"),
    (torch.tensor([0, -1]), ValueError, "labels run from -1"),
    (torch.tensor([0]), ValueError, r"labels have shape \(1,\)"),
    (torch.tensor([0.0, 1.0]), TypeError, "labels are torch.float32"),
])
def test_bad_labels_are_refused(labels, error, words):
    with pytest.raises(error, match=words):
        model_of()(torch.zeros(2, 6, 3), DualTimestep().sample(2, 6), labels)


@pytest.mark.parametrize("changes, words", [({"width": 18}, "width 18 must be divisible"), ({"heads": 3}, r"heads \(3\)"),
                                            ({"depth": 0}, "depth is 0"), ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
                                            ({"channels": 0}, "channels is 0")])
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        model_of(**changes)


@pytest.mark.parametrize("x, tokens, options, words", [
    (torch.zeros(2, 5, 3), 5, {}, r"\(2, 5, 3\), the model expects \(b, 6, 3\)"),
    (torch.zeros(2, 6, 3), 5, {}, r"levels are for \(2, 5\)"),
    (torch.zeros(2, 6, 3), 6, {"taps": (4,)}, r"no layer \[4\].*1 to 3"),
    (torch.zeros(2, 6, 3), 6, {"taps": (0,)}, r"no layer \[0\]"),
    (torch.zeros(2, 6, 3), 6, {"stop": True}, "stop=True needs taps"),
])
def test_bad_calls_are_refused(x, tokens, options, words):
    with pytest.raises(ValueError, match=words):
        model_of()(x, DualTimestep().sample(2, tokens), **options)
