"""Published weights, loaded into our model, give the numbers of the published code and
of an independent forward pass; files and models that do not fit are refused.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# the published file is a pickle; only tests write one, to read it back
from torch import save as write_pt

from selfflow.method import reference
from selfflow.method.batch import Condition
from selfflow.method.objective import Projector
from selfflow.method.reference import (
    PUBLISHED,
    _published_config,
    export,
    fold_time,
    infer_config,
    layout,
    load,
    save,
)
from selfflow.method.sampling import guided_velocity, sample
from selfflow.method.schedule import NoiseLevels
from selfflow.method.tokens import Part
from selfflow.method.transformer import Transformer, TransformerConfig

FILES = [
    Path(__file__).parents[1] / f"fixtures/reference_dit_small_{half}.safetensors"
    for half in ("blocks", "rest")
]
EXACT = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def fixture():
    return load_file(FILES[0]) | load_file(FILES[1])


@pytest.fixture(scope="module")
def meta():
    with safe_open(FILES[0], "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def config(meta):
    return json.loads(meta["config"])


@pytest.fixture
def weights(fixture):
    return {
        name.removeprefix("weights."): value.clone()
        for name, value in fixture.items()
        if name.startswith("weights.")
    }


@pytest.fixture
def loaded(weights, config):
    return load(weights, config)


def embed(u, width=256):
    """Cosines, then sines, of u (..., ) at falling frequencies, in float64."""
    f = torch.tensor(
        [math.exp(-math.log(10_000) * i / (width // 2)) for i in range(width // 2)],
        dtype=torch.float64,
    )
    return torch.cat(
        [torch.cos(u.double()[..., None] * f), torch.sin(u.double()[..., None] * f)],
        dim=-1,
    )


def published_forward(weights, config, x, tau, y):
    """The published function in float64, written from its description: each token has
    its own condition, and no module of ours is used.
    """
    w = {name: value.double() for name, value in weights.items()}
    d = config["hidden_size"]
    heads = config["num_heads"]
    p = config["patch_size"]

    def linear(name, h):
        return h @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def norm(h, shift, scale):
        return F.layer_norm(h, (d,), eps=1e-6) * (1 + scale) + shift

    h = linear("x_embedder.proj", x.double()) + w["pos_embed"]
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", embed(1 - tau))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y][:, None])
    features = []
    for i in range(config["depth"]):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(
            f"blocks.{i}.adaLN_modulation.1", c
        ).split(d, dim=-1)
        q, k, v = (
            chunk.unflatten(-1, (heads, -1)).transpose(1, 2)
            for chunk in linear(f"blocks.{i}.attn.qkv", norm(h, shift1, scale1)).split(
                d, dim=-1
            )
        )
        mixed = (
            torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d // heads), dim=-1) @ v
        )
        h = h + gate1 * linear(
            f"blocks.{i}.attn.proj", mixed.transpose(1, 2).flatten(2)
        )
        h = h + gate2 * linear(
            f"blocks.{i}.mlp.fc2",
            F.gelu(
                linear(f"blocks.{i}.mlp.fc1", norm(h, shift2, scale2)),
                approximate="tanh",
            ),
        )
        features.append(h)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(d, dim=-1)
    out = linear("final_layer.linear", norm(h, shift, scale))
    channels = config["in_channels"] * (2 if config["learn_sigma"] else 1)
    velocity = torch.empty_like(x, dtype=torch.float64)
    for channel in range(config["in_channels"]):
        for row in range(p):
            for column in range(p):
                velocity[..., (channel * p + row) * p + column] = -out[
                    ..., (row * p + column) * channels + channel
                ]
    return velocity, features


def sde(velocity, x, noise, points=12, last=0.04):
    """The published sampler, step by step, in its own time u = 1 - t."""
    grid = torch.linspace(0, 1 - last, points)

    def drift(x, u):
        w = -velocity(x, 1 - u)
        sigma = 1 - u
        return w + sigma * (u * w - x) / (sigma**2 + u * sigma)

    for i in range(points - 1):
        du = grid[1] - grid[0]
        sigma = 1 - grid[i]
        x = x + drift(x, grid[i]) * du + torch.sqrt(2 * sigma * du) * noise[i]
    return x + last * drift(x, grid[-1])


# --- equality with the published code's numbers


def levels_of(fixture):
    return {
        "single": NoiseLevels.single(fixture["input.t"], 16),
        "dual": NoiseLevels(
            torch.stack([fixture["input.t"], fixture["input.s"]], dim=1),
            fixture["input.mask"].long(),
        ),
        "per token": NoiseLevels(
            fixture["input.tau"], torch.arange(16).expand(3, -1).contiguous()
        ),
    }


def condition_of(fixture, model):
    return Condition(fixture["input.y"], model.config.classes)


@pytest.mark.parametrize(
    "levels, output",
    [("single", "homogeneous"), ("dual", "dual"), ("per token", "dual")],
)
@torch.no_grad()
def test_the_velocity_equals_the_published_one(fixture, loaded, levels, output):
    velocity = loaded[0](
        fixture["input.x"], levels_of(fixture)[levels], condition_of(fixture, loaded[0])
    ).velocity
    torch.testing.assert_close(velocity, fixture[f"output.velocity.{output}"], **EXACT)


@torch.no_grad()
def test_the_features_equal_the_published_ones(fixture, meta, loaded):
    model, projector = loaded
    student = int(meta["student_layer"])
    teacher = int(meta["teacher_layer"])
    levels = levels_of(fixture)["dual"]
    out = model(
        fixture["input.x"], levels, condition_of(fixture, model), taps=(student,)
    )
    torch.testing.assert_close(
        projector(out.features[student]),
        fixture["output.features.student_projected"],
        **EXACT,
    )
    out = model(
        fixture["input.x"],
        levels.cleanest(),
        condition_of(fixture, model),
        taps=(teacher,),
        stop=True,
    )
    torch.testing.assert_close(
        out.features[teacher], fixture["output.features.teacher_raw"], **EXACT
    )


@torch.no_grad()
def test_the_published_sampler_reproduces_the_published_samples(fixture, loaded):
    samples = sde(
        guided_velocity(loaded[0], condition_of(fixture, loaded[0])),
        fixture["input.sde.x1"],
        fixture["input.sde.noise"],
    )
    torch.testing.assert_close(samples, fixture["output.sde.samples"], **EXACT)


def test_our_sampler_reproduces_the_published_samples(fixture, loaded):
    velocity = guided_velocity(loaded[0], condition_of(fixture, loaded[0]))
    samples = sample(
        velocity,
        fixture["input.sde.x1"],
        steps=12,
        method="sde",
        noise=fixture["input.sde.noise"],
    )
    torch.testing.assert_close(samples, fixture["output.sde.samples"], **EXACT)


def test_the_independent_forward_pass_equals_the_published_one(
    fixture, weights, config
):
    arguments = fixture["input.x"], fixture["input.tau"], fixture["input.y"]
    velocity, features = published_forward(weights, config, *arguments)
    torch.testing.assert_close(
        velocity.float(), fixture["output.velocity.dual"], **EXACT
    )
    assert len(features) == 3


# --- any layout, against the independent forward pass


@st.composite
def configs(draw):
    patch = draw(st.sampled_from([1, 2, 3]))
    heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "input_size": draw(st.integers(1, 3)) * patch,
        "patch_size": patch,
        "in_channels": draw(st.integers(1, 4)),
        "hidden_size": 4 * heads * draw(st.integers(1, 2)),
        "depth": draw(st.integers(1, 2)),
        "num_heads": heads,
        "mlp_ratio": draw(st.sampled_from([1.0, 2.5, 4.0])),
        "num_classes": draw(st.integers(1, 5)),
        "learn_sigma": draw(st.booleans()),
        "compatibility_mode": True,
    }


def random_weights(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in layout(config).items()
    }
    side = config["input_size"] // config["patch_size"]
    quarter = config["hidden_size"] // 4
    frequencies = [10_000 ** (-i / quarter) for i in range(quarter)]
    positions = []
    for row in range(side):
        for column in range(side):
            # columns before rows, sines before cosines
            position = []
            for axis in (column, row):
                position += [math.sin(axis * frequency) for frequency in frequencies]
                position += [math.cos(axis * frequency) for frequency in frequencies]
            positions.append(position)
    made["pos_embed"] = torch.tensor([positions])
    return made


def random_input(config, seed=1):
    generator = torch.Generator().manual_seed(seed)
    n = (config["input_size"] // config["patch_size"]) ** 2
    c = config["in_channels"] * config["patch_size"] ** 2
    return (
        torch.randn(2, n, c, generator=generator),
        torch.rand(2, n, generator=generator),
        torch.randint(config["num_classes"], (2,), generator=generator),
    )


@settings(max_examples=20, deadline=None)
@given(configs())
def test_any_layout_computes_the_published_function(config):
    weights, (x, tau, y) = random_weights(config), random_input(config)
    model, projector = load(weights, config)
    velocity, features = published_forward(weights, config, x, tau, y)
    levels = NoiseLevels(tau, torch.arange(tau.shape[1]).expand(2, -1).contiguous())
    with torch.no_grad():
        out = model(
            x, levels, Condition(y, model.config.classes), taps=(config["depth"],)
        )
    torch.testing.assert_close(out.velocity.double(), velocity, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        out.features[config["depth"]].double(), features[-1], atol=1e-3, rtol=1e-3
    )
    assert (
        sum(p.numel() for p in projector.parameters())
        == 4 * config["hidden_size"] ** 2 + 3 * config["hidden_size"]
    )


@settings(max_examples=10, deadline=None)
@given(configs())
def test_loading_and_exporting_weights_is_a_round_trip(config):
    weights = random_weights(config)
    known = {name: config[name] for name in ("patch_size", "num_heads")}
    model, projector = load(weights, known)  # the rest is read off the shapes
    assert (
        _published_config(
            model.config,
            {"patch_size": config["patch_size"], "learn_sigma": config["learn_sigma"]},
        )
        == config
    )
    exported = export(model, projector, config)
    rows = len(weights["final_layer.linear.bias"])
    used = (
        torch.arange(rows) % (rows // config["patch_size"] ** 2) < config["in_channels"]
    )
    for name, value in weights.items():
        if name.startswith("final_layer.linear."):
            assert not exported[name][~used].any()
            exported[name] = exported[name][used]
            value = value[used]
        torch.testing.assert_close(exported[name], value, atol=1e-6, rtol=1e-6)
    again, _ = load(export(model, None, config), config)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            again.state_dict()[name], value, atol=1e-6, rtol=1e-6
        )


def test_folding_reverses_time_and_folding_twice_changes_nothing():
    weight = torch.randn(5, 256, dtype=torch.float64)
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(
        embed(t) @ fold_time(weight).T, embed(1 - t.double()) @ weight.T
    )
    torch.testing.assert_close(fold_time(fold_time(weight)), weight)
    assert (fold_time(weight) - weight).abs().max() > 0.1


# --- the layout


def test_the_layout_equals_the_published_one():
    d = 1152
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 16),
        "x_embedder.proj.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
    }

    def linear(name, rows, columns):
        expected.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    linear("t_embedder.mlp.0", d, 256)
    linear("t_embedder.mlp.2", d, d)
    for i in range(28):
        linear(f"blocks.{i}.attn.qkv", 3 * d, d)
        linear(f"blocks.{i}.attn.proj", d, d)
        linear(f"blocks.{i}.mlp.fc1", 4 * d, d)
        linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    linear("final_layer.linear", 2 * 2 * 8, d)
    linear("projector.linear1", 2 * d, d)
    linear("projector.linear2", d, 2 * d)
    assert layout(PUBLISHED) == expected
    assert len(expected) == 296
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in expected.items()}
    assert infer_config(weights) == PUBLISHED


def test_the_layout_equals_that_of_the_fixture(weights, config):
    assert layout(config) == {
        name: tuple(value.shape) for name, value in weights.items()
    }


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_the_heads_of_a_published_width_are_known(width, heads):
    shape = PUBLISHED | {"hidden_size": width, "depth": 1, "num_heads": heads}
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in layout(shape).items()}
    assert infer_config(weights) == shape
    assert infer_config(weights, {"num_heads": 8})["num_heads"] == 8


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 3000))
def test_the_inferred_mlp_ratio_gives_the_width_back(quarter, hidden):
    weights = {
        "pos_embed": torch.empty(1, 4, 4 * quarter, device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(hidden, 4 * quarter, device="meta"),
    }
    ratio = infer_config(weights, {"num_heads": 1})["mlp_ratio"]
    assert int(4 * quarter * ratio) == hidden  # how the transformer computes it


# --- what is accepted


def assert_same(model, expected):
    assert model.config == expected.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {f"module.{name}": value for name, value in w.items()},
        lambda w: {"model": w},
        lambda w: {
            "state_dict": {f"module.{name}": value for name, value in w.items()}
        },
        lambda w: {
            "ema": w,
            "model": {name: value + 1 for name, value in w.items()},
            "step": 3,
        },
        lambda w: (
            w
            | {
                "x_embedder.proj.weight": w["x_embedder.proj.weight"].reshape(
                    48, 4, 2, 2
                )
            }
        ),
        lambda w: {name: value.double() for name, value in w.items()},
        lambda w: {name: torch.nn.Parameter(value) for name, value in w.items()},
    ],
    ids=[
        "prefix",
        "model",
        "state_dict",
        "ema",
        "convolution",
        "float64",
        "parameters",
    ],
)
def test_wrapped_weights_load_alike(weights, config, loaded, wrap):
    model, projector = load(wrap(weights), config)
    assert_same(model, loaded[0])
    assert all(map(torch.equal, projector.parameters(), loaded[1].parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_into_float32(weights, config, loaded, dtype):
    model, _ = load({name: value.to(dtype) for name, value in weights.items()}, config)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value, loaded[0].state_dict()[name], atol=0.02, rtol=0.01
        )
    assert torch.equal(model.positions, loaded[0].positions)


def test_weights_load_without_a_projector(weights, config, loaded):
    model, projector = load(
        {
            name: value
            for name, value in weights.items()
            if not name.startswith("projector")
        },
        config,
    )
    assert projector is None
    assert_same(model, loaded[0])
    assert not any(name.startswith("projector") for name in export(model))


def test_a_loaded_model_can_be_trained(weights, config, loaded):
    model, projector = loaded
    assert not model.training
    assert not projector.training
    expected = TransformerConfig.of_image(
        16, (4, 4), width=48, depth=3, heads=4, mlp_ratio=4.0, classes=10
    )
    assert model.config == expected
    assert all(
        p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu"
        for p in model.parameters()
    )
    assert model.positions.device.type == "cpu"
    assert "positions" not in model.state_dict()
    model(
        torch.randn(1, 16, 16), NoiseLevels.single(torch.tensor([0.5]), 16)
    ).velocity.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_loading_shares_no_memory_and_draws_no_random_number(weights, config):
    weights_before = {name: value.clone() for name, value in weights.items()}
    state = torch.get_rng_state()
    model, projector = load(weights, config)
    assert torch.equal(torch.get_rng_state(), state)
    written = export(model, projector)
    written_before = {name: value.clone() for name, value in written.items()}
    with torch.no_grad():
        for parameter in (
            *model.parameters(),
            *projector.parameters(),
            model.positions,
        ):
            parameter.zero_()
    assert all(
        torch.equal(weights[name], weights_before[name])
        and torch.equal(written[name], written_before[name])
        for name in weights
    )


# --- what is refused


def without(name):
    return lambda w: {key: value for key, value in w.items() if key != name}


@pytest.mark.parametrize(
    "change, words",
    [
        (without("pos_embed"), "missing pos_embed"),
        (without("t_embedder.mlp.0.weight"), "missing t_embedder.mlp.0.weight"),
        (without("projector.linear1.weight"), "missing projector.linear1.weight"),
        (without("blocks.1.attn.qkv.bias"), "missing blocks.1.attn.qkv.bias$"),
        (
            lambda w: w | {"blocks.3.attn.qkv.bias": torch.zeros(144)},
            "unexpected blocks.3.attn.qkv.bias$",
        ),
        (
            lambda w: w | {"cls_token": torch.zeros(1)},
            "nothing was loaded: unexpected cls_token$",
        ),
        (
            lambda w: w | {"module.pos_embed": w["pos_embed"]},
            "unexpected module.pos_embed",
        ),
        (
            lambda w: w | {"blocks.2.mlp.fc2.weight": torch.zeros(192, 48)},
            r"shape \(192, 48\) instead of \(48, 192\)",
        ),
        (
            lambda w: w | {"x_embedder.proj.weight": torch.zeros(48, 2, 4, 2)},
            r"\(48, 2, 4, 2\) instead of \(48, 16\)",
        ),
        (
            lambda w: w | {"pos_embed": w["pos_embed"][0]},
            r"pos_embed has shape \(16, 48\) instead of",
        ),
        (
            lambda w: w | {"pos_embed": w["pos_embed"].roll(1, 1)},
            "pos_embed differs by up to",
        ),
        (
            lambda w: w | {"pos_embed": w["pos_embed"] * math.nan},
            "pos_embed differs by up to nan",
        ),
        (
            lambda w: w | {"x_embedder.proj.bias": torch.zeros(48, dtype=torch.int64)},
            "torch.int64 instead of floats",
        ),
        (lambda w: w | {"epoch": 3, "name": "x"}, "but epoch, name are something else"),
        (lambda w: w | {3: torch.zeros(1)}, "but 3 are something else"),
        (lambda w: {"model": {}}, "none of the published names is among the 0 given"),
        (lambda w: {"conv1.weight": torch.zeros(1)}, "begin with conv1.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, config, change, words):
    with pytest.raises(ValueError, match=words):
        load(change(weights), config)


def test_all_problems_are_reported_at_once(weights, config):
    weights["a"] = torch.zeros(1)
    weights["b"] = torch.zeros(1)
    weights["blocks.0.mlp.fc1.bias"] = torch.zeros(5)
    weights["final_layer.linear.bias"] = torch.zeros(16)
    del weights["x_embedder.proj.bias"]
    del weights["projector.linear2.bias"]
    with pytest.raises(ValueError) as caught:
        load(weights, config)
    message = str(caught.value)
    for words in (
        "unexpected a",
        "unexpected b",
        "missing x_embedder.proj.bias",
        "missing projector.linear2.bias",
        "blocks.0.mlp.fc1.bias has shape (5,) instead of (192,)",
        "final_layer.linear.bias has shape (16,) instead of (32,)",
    ):
        assert message.count(words) == 1, message
    assert message.count(";") == 5


def test_a_large_block_number_is_reported_not_allocated(weights):
    weights["blocks.900000000.attn.qkv.bias"] = torch.zeros(144)
    with pytest.raises(
        ValueError,
        match="unexpected blocks.900000000.attn.qkv.bias; "
        "missing blocks.3.attn.qkv.weight;",
    ):
        load(weights, {"num_heads": 4})


@pytest.mark.parametrize(
    "config, words",
    [
        (
            None,
            "heads cannot be seen in the weights, and width 48 is none of 384, 768, "
            "1024, 1152",
        ),
        (
            {"num_heads": 4, "headz": 4},
            "config has headz, but the published arguments are input_size,",
        ),
        (
            {"num_heads": 4, "patch_size": 3},
            "tokens of 16 numbers are no patches of 3 x 3",
        ),
        ({"num_heads": 4, "patch_size": 0}, "no patches of 0 x 0"),
        ({"num_heads": 5}, "width 48 must be divisible by heads"),
        ({"num_heads": 4, "depth": 4}, "missing blocks.3.attn.qkv.weight"),
        ({"num_heads": 4, "num_classes": 1001}, r"\(11, 48\) instead of \(1001, 48\)"),
        ({"num_heads": 4, "learn_sigma": False}, r"\(32, 48\) instead of \(16, 48\)"),
        ({"num_heads": 4, "compatibility_mode": False}, "compatibility_mode is False"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(weights, config, words):
    with pytest.raises(ValueError, match=words):
        load(weights, config)


# --- files


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth", "old pt"])
def test_weights_are_read_from_every_format(tmp_path, weights, config, loaded, kind):
    path = tmp_path / f"weights.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(weights, path)
    else:
        write_pt(
            {"model": weights, "step": 5},
            path,
            _use_new_zipfile_serialization=kind != "old pt",
        )
    assert_same(load(str(path), config)[0], loaded[0])
    assert_same(load(path, config)[0], loaded[0])
    if kind == "safetensors":
        path.unlink()  # no longer needed
    assert (
        loaded[0](torch.zeros(1, 16, 16), NoiseLevels.single(torch.ones(1), 16))
        .velocity.isfinite()
        .all()
    )


def test_saving_and_loading_is_a_round_trip(tmp_path, config, loaded):
    path = tmp_path / "new/weights.safetensors"
    save(path, *loaded)
    model, projector = load(path)  # the heads are in the file
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert model.config == loaded[0].config
    for ours, theirs in zip((model, projector), loaded, strict=True):
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(
                value, theirs.state_dict()[name], atol=1e-7, rtol=1e-6
            )
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["config"]) == config


class Trap:
    """An object whose unpickling would leave a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "suffix, write, words",
    [
        (
            ".pt",
            lambda p: write_pt({"model": Trap(p.with_name("trace"))}, p),
            "no dict of tensors",
        ),
        (".pt", lambda p: write_pt([torch.zeros(3)], p), "no dict of tensors"),
        (
            ".pt",
            lambda p: write_pt({"args": {"lr": 1}}, p),
            "but args are something else",
        ),
        (".pt", lambda p: p.write_bytes(b"no tensors"), "cannot be read"),
        (".pth", lambda p: p.write_bytes(b""), "cannot be read"),
        (".safetensors", lambda p: p.write_bytes(b""), "cannot be read"),
        (
            ".safetensors",
            lambda p: save_file({"a": torch.zeros(1)}, p, metadata={"config": "{"}),
            "cannot be read",
        ),
        (
            ".safetensors",
            lambda p: save_file({"a": torch.zeros(1)}, p, metadata={"config": "[1]"}),
            "cannot be read",
        ),
        (
            ".ckpt",
            lambda p: p.write_bytes(b""),
            r"ends in '.ckpt'; weights are read from .safetensors, .pt and .pth",
        ),
        ("", lambda p: p.write_bytes(b""), "ends in ''"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, suffix, write, words):
    path = tmp_path / f"weights{suffix}"
    write(path)
    with pytest.raises(ValueError, match=words):
        load(path, {"num_heads": 4})
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, weights, config, suffix, share):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else write_pt)(weights, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="cannot be read"):
        load(path, config)


def test_missing_files_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*absent.pt"):
        load(tmp_path / "absent.pt")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="folder.safetensors"):
        load(tmp_path / "folder.safetensors")


def test_the_old_file_survives_a_failed_write(tmp_path, loaded, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save(path, *loaded)
    before = path.read_bytes()

    def half(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(reference, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save(path, *loaded)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(
        ValueError, match="ends in '.pt'; weights are written as .safetensors"
    ):
        save(tmp_path / "weights.pt", *loaded)


# --- what the published form cannot express


@dataclass(frozen=True)
class ModernConfig(TransformerConfig):
    positions: str = "sincos"
    mlp: str = "gelu"
    qk_norm: bool = False
    modulation: str = "block"


@pytest.mark.parametrize(
    "option",
    [
        {},
        {"positions": "rotary"},
        {"mlp": "swiglu"},
        {"qk_norm": True},
        {"modulation": "shared"},
    ],
)
def test_models_that_the_published_form_cannot_express_are_refused(option):
    shape = {
        "parts": (Part("image", 4, (1, 2, 2)),),
        "width": 16,
        "depth": 1,
        "heads": 2,
    }
    if not option:
        assert _published_config(ModernConfig(**shape)) == _published_config(
            TransformerConfig(**shape)
        )
        return
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"the published form has no {name}={value!r}"):
        _published_config(ModernConfig(**shape, **option))


@pytest.mark.parametrize(
    "shape, known, words",
    [
        (
            {"channels": 4, "grid": (2, 3)},
            {},
            "grid is 2 x 3, but the published form knows square ones alone",
        ),
        (
            {"channels": 3, "grid": (2, 2)},
            {},
            "tokens of 3 numbers are no patches of 2 x 2",
        ),
        (
            {"channels": 4, "grid": (2, 2)},
            {"depth": 7, "input_size": 4},
            "config does not describe this model: depth is 1, not 7$",
        ),
        ({"channels": 4, "grid": (2, 2)}, {"classes": 7}, "config has classes"),
    ],
)
def test_models_that_cannot_be_written_are_refused(shape, known, words):
    model = Transformer(TransformerConfig.of_image(**shape, width=16, depth=1, heads=2))
    with pytest.raises(ValueError, match=words):
        export(model, config=known)


def test_a_projector_of_another_width_is_refused(loaded):
    with pytest.raises(
        ValueError,
        match=r"projector.linear1.weight has shape \(32, 16\) instead of \(96, 48\)",
    ):
        export(loaded[0], Projector(16))


def test_tokens_of_single_pixels_are_exported():
    model = Transformer(
        TransformerConfig.of_image(channels=3, grid=(2, 2), width=16, depth=1, heads=2)
    )
    written = export(model, config={"patch_size": 1, "learn_sigma": False})
    assert written["final_layer.linear.weight"].shape == (3, 16)
    assert load(written, {"patch_size": 1, "num_heads": 2})[0].config == model.config
