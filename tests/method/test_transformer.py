"""Every variant of the velocity model equals a plain rewriting with a condition for
each token, in outputs, taps and gradients; bad input is refused.
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.method.batch import Condition
from selfflow.method.options import SIZES
from selfflow.method.schedule import DualTimestep, NoiseLevels
from selfflow.method.tokens import Part, grid_coordinates
from selfflow.method.transformer import Transformer, TransformerConfig

VARIANTS = [
    dict(zip(("positions", "mlp", "qk_norm", "modulation"), values, strict=True))
    for values in product(
        ("sincos", "rotary"), ("gelu", "swiglu"), (False, True), ("block", "shared")
    )
]
MODERN = VARIANTS[-1]
every_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values()))
)


def model_of(dtype=torch.float32, seed=0, std=0.1, **changes):
    torch.manual_seed(seed)
    shape = {
        "channels": 3,
        "grid": (2, 3),
        "width": 16,
        "depth": 3,
        "heads": 2,
        "classes": 5,
        **changes,
    }
    model = Transformer(TransformerConfig.of_image(**shape))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "_norm" in name else 0.0, std=std)
    return model.to(dtype)


def sincos_positions(coordinates, d):
    """The fixed code of MAE: sines and cosines of the column, then of the row."""
    omega = torch.tensor(
        [10_000 ** (-4 * i / d) for i in range(d // 4)], dtype=torch.float64
    )
    column = coordinates[..., 2:3] * omega
    row = coordinates[..., 1:2] * omega
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], -1)


def rotated(head, coordinates):
    """Pairs (i, i + e / 2) of a head as complex numbers, each rotated by its angle."""
    e = head.shape[-1]
    omega = torch.tensor(
        [2_000 ** (-8 * i / e) for i in range(e // 8)], dtype=torch.float64
    )
    angles = (coordinates[..., None] * omega).flatten(-2)
    z = torch.complex(head[..., : e // 2], head[..., e // 2 :]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([z.real, z.imag], -1)


def plain_forward(model, x, tau, y, layer, mask=None, coordinates=None):
    """DiT with a condition for every token, written as the papers write it, straight
    from the weights; mask: (b, n, n).
    """
    w = dict(model.named_parameters())
    config = model.config
    d = config.width
    places = (
        config.parts[0].coordinates() if coordinates is None else coordinates
    ).double()

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (
            h.var(-1, keepdim=True, unbiased=False) + 1e-6
        ).sqrt()

    def linear(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(h, name):
        return (
            h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
            if config.qk_norm
            else h
        )

    frequencies = torch.tensor(
        [10_000 ** (-i / 128) for i in range(128)], dtype=x.dtype
    )
    angles = tau[..., None] * frequencies
    code = torch.cat([angles.cos(), angles.sin()], -1)
    c = (
        linear(F.silu(linear(code, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        + w["y_embedder.weight"][y.values][:, None]
    )
    h = linear(x, "x_embedder.image")
    if config.positions == "sincos":
        h = h + sincos_positions(places, d)
    for i in range(config.depth):
        if config.modulation == "shared":
            modulation = (
                linear(F.silu(c), "adaLN_shared.1") + w[f"blocks.{i}.adaLN_bias"]
            )
        else:
            modulation = linear(F.silu(c), f"blocks.{i}.adaLN_modulation.1")
        b1, g1, a1, b2, g2, a2 = modulation.chunk(6, -1)
        q, k, v = linear(norm(h) * (1 + g1) + b1, f"blocks.{i}.attn.qkv").chunk(3, -1)
        heads = []
        for columns in torch.arange(d).chunk(config.heads):
            qh = rms(q[..., columns], f"blocks.{i}.attn.q_norm")
            kh = rms(k[..., columns], f"blocks.{i}.attn.k_norm")
            if config.positions == "rotary":
                qh = rotated(qh, places)
                kh = rotated(kh, places)
            scores = qh @ kh.transpose(-1, -2) / math.sqrt(len(columns))
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            heads.append(scores.softmax(-1) @ v[..., columns])
        h = h + a1 * linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        inner = linear(norm(h) * (1 + g2) + b2, f"blocks.{i}.mlp.fc1")
        if config.mlp == "swiglu":
            a, b = inner.chunk(2, -1)
            inner = a * torch.sigmoid(a) * b
        else:
            cubic = inner + 0.044715 * inner**3
            inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic))
        h = h + a2 * linear(inner, f"blocks.{i}.mlp.fc2")
        if i + 1 == layer:
            feature = h
    shift, scale = linear(F.silu(c), "final_layer.adaLN_modulation.1").chunk(2, -1)
    return linear(norm(h) * (1 + scale) + shift, "final_layer.linear.image"), feature


def random_batch(k, seed=0, b=4, n=6, condition=0, edges=False):
    """Tokens in float64, classes and levels of a batch."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, 3, generator=g, dtype=torch.float64)
    y = Condition(torch.randint(0, 6, (b,), generator=g), 5)
    values = torch.rand(b, k, generator=g, dtype=torch.float64)
    levels = NoiseLevels(
        values.round() if edges else values,
        torch.randint(0, k, (b, n), generator=g),
        condition,
    )
    return x, y, levels


def same_group(levels):
    """The mask of separated attention: a token attends to its own level and to every
    condition, a condition only to conditions.
    """
    key = levels.assign[:, None]
    query = levels.assign[:, :, None]
    first = levels.k - levels.condition
    return (key == query) & (query < first) | (key >= first)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6), st.integers(0, 1000), st.booleans(), st.sampled_from(VARIANTS)
)
def test_k_levels_equal_one_condition_per_token(k, seed, edges, variant):
    model = model_of(torch.float64, seed % 7, **variant)
    x, y, levels = random_batch(k, seed, edges=edges)
    # sinusoids are computed in float32, as in the published model: hence not to the
    # last digit of float64
    out = model(x, levels, y, taps=(2,))
    velocity, feature = plain_forward(model, x, levels.per_token(), y, layer=2)
    torch.testing.assert_close(out.velocity, velocity, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out.features[2], feature, atol=2e-6, rtol=1e-5)


@every_variant
@pytest.mark.parametrize("k, condition", [(4, 2), (6, 0)])
def test_separated_attention_is_the_plain_forward_pass_with_a_mask(
    variant, k, condition
):
    model = model_of(torch.float64, **variant)
    x, y, levels = random_batch(k, seed=k, condition=condition)
    out = model(x, levels, y, taps=(2,), separated=True)
    velocity, feature = plain_forward(
        model, x, levels.per_token(), y, 2, same_group(levels)
    )
    torch.testing.assert_close(out.velocity, velocity, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out.features[2], feature, atol=2e-6, rtol=1e-5)
    assert (out.velocity - model(x, levels, y).velocity).abs().max() > 1e-3, (
        "unlike full attention"
    )


def test_separation_changes_nothing_with_a_single_level():
    model = model_of(torch.float64)
    x, y, levels = random_batch(1)
    assert torch.equal(
        model(x, levels, y, separated=True).velocity, model(x, levels, y).velocity
    )


@every_variant
def test_the_order_of_tokens_is_only_in_their_coordinates(variant):
    model = model_of(torch.float64, **variant)
    x, y, levels = random_batch(2)
    coordinates = grid_coordinates((2, 3))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    expected = model(x, levels, y).velocity
    assert torch.equal(
        model(x, levels, y, coordinates=coordinates).velocity, expected
    ), "the grid is the default"
    shuffled = NoiseLevels(levels.levels, levels.assign[:, order])
    for places in (coordinates[order], coordinates[order].expand(4, -1, -1)):
        velocity = model(x[:, order], shuffled, y, coordinates=places).velocity
        torch.testing.assert_close(velocity, expected[:, order], atol=1e-9, rtol=1e-9)
    assert (
        model(x[:, order], shuffled, y).velocity - expected[:, order]
    ).abs().max() > 1e-3, "without coordinates the order matters"


@every_variant
def test_coordinates_off_the_grid_equal_the_plain_forward_pass(variant):
    model = model_of(torch.float64, **variant)
    x, y, levels = random_batch(3, n=9)
    coordinates = 10 * torch.rand(4, 9, 4, generator=torch.Generator().manual_seed(1))
    velocity, _ = plain_forward(
        model, x, levels.per_token(), y, 1, coordinates=coordinates
    )
    parts = (Part("image", 3, (1, 3, 3)),)
    torch.testing.assert_close(
        model(x, levels, y, coordinates=coordinates, parts=parts).velocity,
        velocity,
        atol=1e-5,
        rtol=1e-5,
    )
    larger = model_of(torch.float64, **variant, grid=(3, 3))  # the grid is in no weight
    expected = larger(x, levels, y).velocity
    actual = model(
        x, levels, y, coordinates=grid_coordinates((3, 3)), parts=parts
    ).velocity
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "shape", [(6, 3), (4,), (5, 4), (3, 6, 4), (1, 2, 6, 4), (2, 5, 4)]
)
@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_coordinates_of_another_shape_are_refused(shape, positions):
    model = model_of(positions=positions)
    with pytest.raises(
        ValueError, match=r"coordinates have shape \(.*expected \(6, 4\) or \(2, 6, 4\)"
    ):
        model(
            torch.zeros(2, 6, 3),
            DualTimestep().sample(2, 6),
            coordinates=torch.zeros(shape),
        )


@pytest.mark.parametrize("variant", [{}, MODERN], ids=["published", "modern"])
@pytest.mark.parametrize("separated", [False, True])
def test_gradients_equal_finite_differences(variant, separated):
    model = model_of(torch.float64, depth=2, **variant)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    levels = DualTimestep(mask_ratio=0.5).sample(2, 6, torch.Generator().manual_seed(0))
    y = Condition(torch.tensor([0, 5]), 5)
    wanted = (
        "blocks.0.adaLN_modulation.1.bias",
        "blocks.0.adaLN_bias",
        "blocks.1.attn.q_norm.weight",
        "y_embedder.weight",
        "t_embedder.mlp.2.bias",
    )
    inputs = [
        parameter for name, parameter in model.named_parameters() if name in wanted
    ]
    assert len(inputs) == (4 if variant else 3)
    forward = lambda x, *_: model(x, levels, y, separated=separated).velocity  # noqa: E731
    assert torch.autograd.gradcheck(forward, (x, *inputs), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", [{}, MODERN], ids=["published", "modern"])
def test_checkpointing_saves_memory_and_gives_the_same_bits(variant, precision):
    x, y, levels = random_batch(2)
    x = x.float()
    levels = NoiseLevels(levels.levels.float(), levels.assign)
    results = []
    saved = []
    for checkpointing in (False, True):
        model = model_of(**variant)
        sizes = {}
        model.checkpointing = checkpointing

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            out = model(x, levels, y, taps=(1, 3), separated=True)
            count = sum(sizes.values())
        loss = (
            out.velocity.float().square().sum()
            + out.features[1].sum()
            + out.features[3].square().sum()
        )
        loss.backward()
        results.append(
            [
                out.velocity,
                *out.features.values(),
                *(p.grad for p in model.parameters()),
            ]
        )
        saved.append(count)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert saved[1] < 0.5 * saved[0]


def test_nothing_is_checkpointed_without_gradients(monkeypatch):
    monkeypatch.setattr("selfflow.method.transformer.checkpoint", None)
    model = model_of(torch.float64)
    x, y, levels = random_batch(2)
    model.checkpointing = True
    with torch.no_grad():
        assert model(x, levels, y).velocity.isfinite().all()
    with pytest.raises(TypeError):
        model(x, levels, y)


@pytest.mark.parametrize(
    "size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)]
)
def test_the_published_sizes_have_their_numbers_of_parameters(size, millions):
    width, depth, heads = {
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "XL": (1152, 28, 16),
    }[size]
    config = TransformerConfig.of_size(
        size, (Part("image", 16, (1, 16, 16)),), classes=1000
    )
    assert (config.width, config.depth, config.heads, config.mlp_ratio) == (
        width,
        depth,
        heads,
        4,
    )
    counts = []
    for variant in ({}, {"mlp": "swiglu"}, {"modulation": "shared"}):
        with torch.device("meta"):
            model = Transformer(
                TransformerConfig.of_size(
                    size, (Part("image", 16, (1, 16, 16)),), classes=1000, **variant
                )
            )
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[0] == pytest.approx(millions * 1e6, rel=0.015)
    assert counts[1] == pytest.approx(counts[0], rel=0.01), (
        "SwiGLU is as large as the MLP"
    )
    assert (
        counts[0] - counts[2]
        == (depth - 1) * (6 * width**2 + 6 * width) - depth * 6 * width
    )
    with pytest.raises(ValueError, match="size is 'M'; known are S, B, L, XL"):
        TransformerConfig.of_size("M", (Part("image", 16, (1, 16, 16)),))
    assert set(SIZES) == {"S", "B", "L", "XL"}


@every_variant
def test_an_initialised_block_is_the_identity(variant):
    model = Transformer(
        TransformerConfig.of_image(
            channels=3, grid=(2, 3), width=16, depth=3, heads=2, classes=5, **variant
        )
    )
    x, _, levels = random_batch(2)
    x = x.float()
    levels = NoiseLevels(levels.levels.float(), levels.assign)
    out = model(x, levels, taps=(1, 2, 3))
    embedded = model.x_embedder.image(x) + (
        0 if variant["positions"] == "rotary" else model.positions
    )
    assert all(torch.equal(h, embedded) for h in out.features.values())
    assert (out.velocity == 0).all()
    out.velocity.sum().backward()
    assert model.final_layer.linear.image.bias.grad.abs().sum() > 0, (
        "its output can be trained"
    )


def test_a_model_in_bf16_takes_coordinates():
    model = model_of(torch.bfloat16)
    x = torch.randn(2, 6, 3).bfloat16()
    levels = DualTimestep().sample(2, 6)
    out = model(x, levels, coordinates=grid_coordinates((2, 3))).velocity
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, model(x, levels).velocity)


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity():
    model = Transformer(
        TransformerConfig.of_image(
            channels=3, grid=(2, 3), width=16, depth=3, heads=2, classes=5
        )
    )
    out = model(
        torch.randn(2, 6, 3),
        DualTimestep().sample(2, 6),
        Condition(torch.tensor([1, 2]), 5),
        taps=(1, 3),
    )
    assert (out.velocity == 0).all()
    assert torch.equal(out.features[1], out.features[3])
    assert all(
        (p == 0).all() for name, p in model.named_parameters() if name.endswith("bias")
    )
    assert model.y_embedder.weight.std().item() == pytest.approx(0.02, rel=0.3)
    bound = math.sqrt(6 / (16 + 64))  # xavier
    assert 0.9 * bound < model.blocks[0].mlp.fc1.weight.abs().max() <= bound


def test_stop_ends_at_the_last_tap_and_runs_no_deeper_layer():
    model = model_of()
    for parameter in [*model.blocks[2].parameters(), *model.final_layer.parameters()]:
        torch.nn.init.constant_(parameter, math.nan)
    out = model(
        torch.randn(2, 6, 3), DualTimestep().sample(2, 6), None, taps=(2, 1), stop=True
    )
    assert out.velocity is None
    assert list(out.features) == [1, 2]
    assert all(h.isfinite().all() for h in out.features.values())


def test_a_missing_condition_is_the_null_label():
    model = model_of()
    x = torch.randn(2, 6, 3)
    levels = DualTimestep().sample(2, 6)
    torch.testing.assert_close(
        model(x, levels).velocity,
        model(x, levels, Condition(torch.tensor([5, 5]), 5)).velocity,
    )
    assert not torch.allclose(
        model(x, levels).velocity,
        model(x, levels, Condition(torch.tensor([0, 1]), 5)).velocity,
    )


def test_conditions_are_dropped_at_their_rate_and_otherwise_unchanged():
    condition = Condition(torch.arange(5).repeat(4000), 5)
    dropped = condition.drop(
        0.1, lambda purpose: torch.Generator().manual_seed(0)
    ).values
    assert (dropped == 5).float().mean() == pytest.approx(0.1, abs=0.01)
    remaining = dropped != 5
    assert torch.equal(dropped[remaining], condition.values[remaining])
    never, always = (
        condition.drop(p, lambda purpose: torch.Generator().manual_seed(0)).values
        for p in (0.0, 1.0)
    )
    assert torch.equal(never, condition.values)
    assert (always == 5).all()


@pytest.mark.parametrize(
    "condition, error, words",
    [
        (
            lambda: Condition(torch.tensor([0, 6]), 5),
            ValueError,
            "labels run from 0 to 6, but classes from 0 to 4, and 5 means no class",
        ),
        (lambda: Condition(torch.tensor([0, -1]), 5), ValueError, "labels run from -1"),
        (
            lambda: Condition(torch.tensor([0.0, 1.0]), 5),
            TypeError,
            "not torch.float32",
        ),
        (
            lambda: Condition(torch.tensor([0]), 5),
            ValueError,
            r"class \(1,\) of 5 classes, the model expects class \(2,\) of 5",
        ),
        (
            lambda: Condition(torch.tensor([0, 1]), 4),
            ValueError,
            r"class \(2,\) of 4 classes, the model expects class \(2,\) of 5",
        ),
        (
            lambda: torch.tensor([0, 1]),
            TypeError,
            r"the condition is a Tensor; make labels \(b,\) a Condition",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused(condition, error, words):
    with pytest.raises(error, match=words):
        model_of()(torch.zeros(2, 6, 3), DualTimestep().sample(2, 6), condition())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"width": 18}, "width 18 must be divisible"),
        ({"heads": 3}, r"heads \(3\)"),
        ({"depth": 0}, "depth is 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"channels": 0}, "is no part of"),
        ({"mlp_ratio": math.nan}, "mlp_ratio is nan"),
        ({"positions": "alibi"}, "positions is 'alibi'; known are sincos, rotary"),
        ({"mlp": "relu"}, "mlp is 'relu'; known are gelu, swiglu"),
        ({"modulation": "none"}, "modulation is 'none'; known are block, shared"),
        ({"positions": "rotary", "heads": 4}, r"heads \(4\).* 32 would be"),
        ({"positions": "rotary", "width": 40}, "width 40.* 32 would be"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        model_of(**changes)


@pytest.mark.parametrize(
    "x, tokens, options, words",
    [
        (torch.zeros(2, 5, 3), 5, {}, r"\(2, 5, 3\), the model expects \(b, 6, 3\)"),
        (torch.zeros(2, 6, 3), 5, {}, r"levels are for \(2, 5\)"),
        (torch.zeros(2, 6, 3), 6, {"taps": (4,)}, r"no layer \[4\].*1 to 3"),
        (torch.zeros(2, 6, 3), 6, {"taps": (0,)}, r"no layer \[0\]"),
        (torch.zeros(2, 6, 3), 6, {"stop": True}, "stop=True needs taps"),
    ],
)
def test_tokens_levels_and_taps_that_do_not_fit_are_refused(x, tokens, options, words):
    with pytest.raises(ValueError, match=words):
        model_of()(x, DualTimestep().sample(2, tokens), **options)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_tokens_that_are_not_finite_are_refused(wrong):
    x = torch.zeros(2, 6, 3)
    x[1, 4, 2] = wrong
    with pytest.raises(ValueError, match="1 numbers of the tokens are NaN or infinite"):
        model_of()(x, DualTimestep().sample(2, 6))
