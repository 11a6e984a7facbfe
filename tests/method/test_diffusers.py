"""Backbones from diffusers compute what the plain models compute, give each token its
own noise level, and train, resume and export; unsuitable inputs are refused.
"""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from selfflow.analysis.attention import watch_attention
from selfflow.analysis.benchmark import flops_per_step
from selfflow.data.options import DataConfig
from selfflow.draws import keyed
from selfflow.method.backbone import Inputs, ability, check_backbone
from selfflow.method.batch import Batch, Condition
from selfflow.method.build import build_backbone, build_objective
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.method.schedule import NoiseLevels
from selfflow.method.tokens import Part
from selfflow.training.config import Config, TrainConfig
from selfflow.training.export import export, export_diffusers, load
from selfflow.training.loop import train

diffusers = pytest.importorskip("diffusers")

from selfflow.method.diffusers_backbone import (  # noqa: E402
    FAMILIES,
    DiffusersBackbone,
    embed_times,
    read_model,
)

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 16}
IMAGE = Part("image", 12, (1, 4, 4))  # 3 channels in patches of 2
VIDEO = Part("video", 12, (2, 4, 4))
TEXT, WIDTH = 5, 24  # tokens of a text, their width


def image_of(tokens):
    return F.fold(tokens.mT, (8, 8), 2, stride=2)


def tokens_of(image):
    return F.unfold(image, 2, stride=2).mT


def per_frame(function, signals):
    return torch.stack([function(signal) for signal in signals], 2)


def plain_flux2(model, x, text, t):
    places = torch.cartesian_prod(
        torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)
    )
    letters = torch.stack([*[torch.zeros(TEXT)] * 3, torch.arange(float(TEXT))], 1)
    return model(x, text, t, places, letters, return_dict=False)[0]


def plain_flux(model, x, text, t):
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    places = places.reshape(16, 3)
    return model(
        x, text, text.mean(1), t, places, torch.zeros(TEXT, 3), return_dict=False
    )[0]


def plain_sd3(model, x, text, t):
    out = model(image_of(x), text, text.mean(1), 1000 * t, return_dict=False)[0]
    return tokens_of(out)


def plain_wan(model, x, text, t):
    video = per_frame(image_of, x.split(16, dim=1))
    out = model(video, 1000 * t, text, return_dict=False)[0]
    return torch.cat([tokens_of(frame) for frame in out.unbind(2)], 1)


def plain_ltx(model, x, text, t):
    mask = torch.ones(len(x), TEXT)
    return model(x, text, 1000 * t, mask, 2, 4, 4, return_dict=False)[0]


def plain_dit(model, x, labels, t):
    return tokens_of(
        model(image_of(x), 1000 * t, class_labels=labels, return_dict=False)[0]
    )


def plain_pixart(model, x, text, t):
    return tokens_of(model(image_of(x), text, 1000 * t, return_dict=False)[0])


@dataclass(frozen=True)
class Case:
    family: str
    plain: Any
    config: dict
    part: Part = IMAGE
    classes: int = 0
    depth: int = 2


_STREAMS = {"in_channels": 12, "num_layers": 1, "num_single_layers": 2}
_PATCHES = {"in_channels": 3, "out_channels": 3, "patch_size": 2, "num_layers": 2}
_SD3 = {
    **_PATCHES,
    "sample_size": 8,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": 4,
}
CASES = {
    "flux2": Case(
        "flux2",
        plain_flux2,
        {
            **_STREAMS,
            "joint_attention_dim": WIDTH,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
            "guidance_embeds": False,
        },
        depth=3,
    ),
    "wan": Case(
        "wan",
        plain_wan,
        {
            **_PATCHES,
            "patch_size": (1, 2, 2),
            "text_dim": WIDTH,
            "freq_dim": 32,
            "ffn_dim": 32,
            "rope_max_seq_len": 32,
        },
        VIDEO,
    ),
    "ltx": Case(
        "ltx",
        plain_ltx,
        {
            "in_channels": 12,
            "out_channels": 12,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": WIDTH,
        },
        VIDEO,
    ),
    "sd3": Case("sd3", plain_sd3, _SD3),
    "sd3.5": Case(
        "sd3",
        plain_sd3,
        {**_SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    ),
    "flux": Case(
        "flux",
        plain_flux,
        {
            **_STREAMS,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "axes_dims_rope": (4, 6, 6),
        },
        depth=3,
    ),
    "dit": Case(
        "dit",
        plain_dit,
        {**_PATCHES, "sample_size": 8, "num_embeds_ada_norm": 4},
        classes=4,
    ),
    "pixart": Case(
        "pixart",
        plain_pixart,
        {
            **_PATCHES,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": WIDTH,
        },
    ),
}
# without and with the scale of published weights
LTX_SCALES = [("ltx", None), ("ltx", (0.5, 8, 16))]
every_family = pytest.mark.parametrize("name", CASES)


def inputs_of(case):
    if case.classes:
        return Inputs((case.part,), classes=case.classes)
    return Inputs((case.part,), caption=TEXT, caption_width=WIDTH)


def model_of(case, attention=True):
    torch.manual_seed(0)
    kind = getattr(diffusers, FAMILIES[case.family].model_class)
    model = kind(**SHAPE, **case.config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if attention:
        return model
    for key, parameter in model.named_parameters():
        if ".to_out.0." in key or ".to_add_out." in key:
            torch.nn.init.zeros_(parameter)
    for block in getattr(model, "single_transformer_blocks", []):
        last = block.proj_out if hasattr(block, "proj_out") else block.attn.to_out
        last.weight.data[:, :32] = 0  # columns of the attention, before the MLP's
    return model


def example(case, seed=1):
    """Tokens, the values of a condition, and two levels for each sample."""
    torch.manual_seed(seed)
    n = case.part.tokens
    x = torch.randn(2, n, 12)
    if case.classes:
        values = torch.tensor([1, 3])
    else:
        values = torch.randn(2, TEXT, WIDTH)
    levels = torch.tensor([[0.3, 0.8], [0.6, 0.1]])
    return x, values, NoiseLevels(levels, torch.randint(2, (2, n)))


def condition_of(case, values):
    return Condition(values, case.classes)


def close(actual, expected, rtol=1e-5, atol=2e-6):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@every_family
@torch.no_grad()
def test_one_level_gives_the_plain_model_and_closing_restores_it(name):
    case = CASES[name]
    x, values, two = example(case)
    model = model_of(case)
    keys = list(model.state_dict())
    t = two.levels[:, 0]
    expected = case.plain(model, x, values, t)
    backbone = DiffusersBackbone(model, inputs_of(case))
    condition = condition_of(case, values)
    velocity = backbone(x, NoiseLevels.single(t, x.shape[1]), condition).velocity
    scale = expected.abs().max()
    assert scale > 1e-3
    assert (velocity - expected).abs().max() <= 1e-6 * scale
    # two levels, of which all tokens have the first
    first = NoiseLevels(two.levels, torch.zeros_like(two.assign))
    close(backbone(x, first, condition).velocity, expected)
    # a plain call of the adapted model is still that of diffusers
    assert torch.equal(case.plain(model, x, values, t), expected)
    backbone.close()
    assert list(model.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(case.plain(model, x, values, t), expected)
    with pytest.raises(ValueError, match="closed"):
        backbone(x, two, condition)


@every_family
@torch.no_grad()
def test_without_attention_each_token_is_at_its_own_level(name):
    case = CASES[name]
    x, values, two = example(case)
    model = model_of(case, attention=False)
    alone = [case.plain(model, x, values, level) for level in two.levels.T]
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    backbone = DiffusersBackbone(model, inputs_of(case))
    mixed = backbone(x, two, condition_of(case, values)).velocity
    close(mixed, torch.where(two.assign[..., None] == 0, *alone))


@every_family
@torch.no_grad()
def test_taps_equal_the_hidden_states_of_diffusers_and_stop_skips_the_rest(name):
    case = CASES[name]
    x, values, two = example(case)
    model = model_of(case)
    expected = {}

    def keep(layer):
        def hook(module, args, output):
            hidden = output[1] if isinstance(output, tuple) else output
            expected[layer] = hidden[:, -x.shape[1] :]

        return hook

    lists = FAMILIES[case.family].block_lists
    blocks = [block for kind in lists for block in getattr(model, kind)]
    hooks = [
        block.register_forward_hook(keep(layer))
        for layer, block in enumerate(blocks, 1)
    ]
    t = two.levels[:, 0]
    case.plain(model, x, values, t)
    for hook in hooks:
        hook.remove()
    backbone = DiffusersBackbone(model, inputs_of(case))
    assert backbone.depth == case.depth == len(blocks)
    assert backbone.width == 32
    layers = tuple(range(1, case.depth + 1))
    levels = NoiseLevels.single(t, x.shape[1])
    condition = condition_of(case, values)
    output = backbone(x, levels, condition, taps=layers)
    for layer in layers:
        close(output.features[layer], expected[layer])
    ran = []
    watch = blocks[-1].register_forward_hook(lambda *args: ran.append(1))
    stopped = backbone(x, levels, condition, taps=(1,), stop=True)
    watch.remove()
    assert stopped.velocity is None
    assert not ran
    assert list(stopped.features) == [1]
    assert torch.equal(stopped.features[1], output.features[1])
    for block in blocks:
        assert not block._forward_hooks
    check_backbone(backbone, Batch(x, condition, (case.part,)), (1, case.depth))


@every_family
def test_gradients_are_the_same_with_checkpointing_and_in_a_copy(name):
    case = CASES[name]
    x, values, two = example(case)
    backbone = DiffusersBackbone(model_of(case), inputs_of(case)).train()
    teacher = copy.deepcopy(backbone).requires_grad_(False)
    condition = condition_of(case, values)

    def gradients(stop=False):
        backbone.zero_grad()
        output = backbone(x, two, condition, taps=(1, 2), stop=stop)
        loss = output.features[2].square().mean()
        if not stop:
            loss = loss + output.velocity.square().mean()
        loss.backward()
        return [
            None if parameter.grad is None else parameter.grad.clone()
            for parameter in backbone.parameters()
        ], output

    plain, output = gradients()
    stopped, _ = gradients(stop=True)
    backbone.checkpointing = True
    assert backbone.checkpointing
    assert not teacher.checkpointing
    checkpointed, checkpointed_output = gradients()
    assert torch.equal(checkpointed_output.velocity, output.velocity)
    for a, b in zip(plain, checkpointed, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    checkpointed, _ = gradients(stop=True)
    for a, b in zip(stopped, checkpointed, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    # a copy has levels, modules and forwards of its own
    with torch.no_grad():
        copied = teacher(x, two.cleanest(), condition).velocity
        for parameter in backbone.parameters():
            parameter.zero_()
        assert torch.equal(teacher(x, two.cleanest(), condition).velocity, copied)
    own = {id(module) for module in teacher.modules()}
    assert teacher._replaced
    assert all(id(module) in own for module in teacher._replaced)
    assert all(module.forward.__self__ is module for module in teacher._replaced)


@every_family
@torch.no_grad()
def test_time_is_embedded_once_per_level(name):
    case = CASES[name]
    x, values, two = example(case)
    model = model_of(case)
    rows = []
    mlps = [
        module
        for module in model.modules()
        if type(module).__name__ == "TimestepEmbedding"
    ]
    for module in mlps:
        module.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    backbone = DiffusersBackbone(model, inputs_of(case))
    backbone(x, two, condition_of(case, values))
    text = FAMILIES[case.family].modulates_text
    assert rows
    assert max(rows) == 2 * (2 + text)  # two samples, and the level of the text
    # operations of one more level, against those of a level for each token
    operations = []
    n = x.shape[1]
    for levels in (
        NoiseLevels.single(two.levels[:, 0], n),
        two,
        NoiseLevels(torch.rand(2, n), torch.arange(n).expand(2, n)),
    ):
        with FlopCounterMode(display=False) as counter:
            backbone(x, levels, condition_of(case, values))
        operations.append(counter.get_total_flops())
    # each further level costs the same, so two cost one or two n-ths of n
    per_level = (operations[2] - operations[0]) / (n - 1 + text)
    assert operations[1] - operations[0] == pytest.approx(per_level * (1 + text))


@every_family
@torch.no_grad()
def test_close_levels_stay_distinct_in_bf16(name):
    case = CASES[name]
    x, values, _ = example(case)
    x = x[:1].expand(2, -1, -1)
    values = values[:1].expand(2, *values.shape[1:])
    near = torch.tensor([0.682, 0.6835])
    levels = NoiseLevels.single(near, x.shape[1])
    backbone = DiffusersBackbone(model_of(case).bfloat16(), inputs_of(case))
    vectors = []
    for module in backbone.modules():
        if type(module).__name__ == "TimestepEmbedding":
            module.register_forward_hook(lambda m, args, out: vectors.append(out))
    output = backbone(x, levels, condition_of(case, values))
    assert output.velocity.dtype == torch.float32
    assert vectors
    assert all(v.dtype == torch.float32 for v in vectors)
    assert not torch.equal(vectors[0][0], vectors[0][1])
    if case.family.startswith("flux"):  # diffusers rounds before it multiplies by 1000
        rounded = near.bfloat16() * 1000
        assert rounded[0] == rounded[1]


@pytest.mark.parametrize("name, scale", [("flux2", None), ("flux", None), *LTX_SCALES])
@torch.no_grad()
def test_permuted_tokens_and_places_permute_the_output(name, scale):
    case = CASES[name]
    x, values, two = example(case)
    more = {"place_scale": scale} if scale else {}
    backbone = DiffusersBackbone(model_of(case), inputs_of(case), **more)
    condition = condition_of(case, values)
    order = torch.randperm(case.part.tokens)
    last = case.depth
    expected = backbone(x, two, condition, taps=(last,))
    permuted = backbone(
        x[:, order],
        NoiseLevels(two.levels, two.assign[:, order]),
        condition,
        taps=(last,),
        coordinates=case.part.coordinates()[order],
    )
    close(permuted.velocity, expected.velocity[:, order])
    close(permuted.features[last], expected.features[last][:, order])
    unmoved = backbone(x[:, order], two, condition).velocity
    assert not torch.allclose(unmoved, expected.velocity[:, order], atol=1e-4)


@torch.no_grad()
def test_wan_permutes_with_its_rotary_table():
    case = CASES["wan"]
    x, values, two = example(case)
    model = model_of(case)
    backbone = DiffusersBackbone(model, inputs_of(case))
    expected = backbone(x, two, condition_of(case, values)).velocity
    order = torch.randperm(32)
    model.rope.register_forward_hook(
        lambda module, args, out: tuple(table[:, order] for table in out)
    )
    levels = NoiseLevels(two.levels, two.assign[:, order])
    permuted = backbone(x[:, order], levels, condition_of(case, values)).velocity
    close(permuted, expected[:, order])


@torch.no_grad()
def test_published_ltx_weights_get_places_in_seconds_and_pixels(tmp_path):
    case = CASES["ltx"]
    x, values, two = example(case)
    model = model_of(case)
    t = two.levels[:, 0]
    mask = torch.ones(2, TEXT)
    # as its pipeline calls it, at 25 frames a second
    scale = (8 / 25, 32, 32)
    expected = model(
        x, values, 1000 * t, mask, 2, 4, 4, rope_interpolation_scale=scale
    )[0]
    model.save_pretrained(tmp_path)
    options = ModelConfig("ltx", folder=str(tmp_path))
    read = build_backbone(options, inputs_of(case)).eval()
    levels = NoiseLevels.single(t, 32)
    condition = condition_of(case, values)
    close(read(x, levels, condition).velocity, expected)
    assert (expected - case.plain(model, x, values, t)).abs().max() > 1e-3
    # the same places, given one by one
    given = read(x, levels, condition, coordinates=VIDEO.coordinates()).velocity
    close(given, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ltx", "pixart"])
@torch.no_grad()
def test_the_padding_of_a_text_is_masked(name):
    case = CASES[name]
    x, values, two = example(case)
    short = values.clone()
    short[:, 3:] = 0
    model = model_of(case)
    t = two.levels[:, 0]
    levels = NoiseLevels.single(t, x.shape[1])
    # the plain model, of a text without its padding
    masked = model_kwargs(case, x, short[:, :3], t)
    expected = model(**masked)[0]
    if name == "pixart":
        expected = tokens_of(expected)
    backbone = DiffusersBackbone(model, inputs_of(case))
    close(backbone(x, levels, condition_of(case, short)).velocity, expected, atol=1e-5)
    # a text of padding alone still gives finite numbers, those of no condition
    none = backbone(x, levels, condition_of(case, torch.zeros_like(short))).velocity
    assert none.isfinite().all()
    assert torch.equal(none, backbone(x, levels).velocity)


def model_kwargs(case, x, text, t):
    common = {"encoder_hidden_states": text, "return_dict": False}
    if case.family == "pixart":
        return {"hidden_states": image_of(x), "timestep": 1000 * t, **common}
    return {
        "hidden_states": x,
        "timestep": 1000 * t,
        "encoder_attention_mask": torch.ones(text.shape[:2]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        **common,
    }


@pytest.mark.parametrize("name", ["sd3", "flux"])
@torch.no_grad()
def test_a_pooled_text_vector_reaches_the_model(name):
    case = CASES[name]
    config = {**case.config, "pooled_projection_dim": 7}
    model = model_of(replace(case, config=config))
    x, values, two = example(case)
    inputs = replace(inputs_of(case), pooled=7)
    backbone = DiffusersBackbone(model, inputs)
    pooled = torch.randn(2, 7)
    received = []
    watch = model.time_text_embed.text_embedder.register_forward_hook(
        lambda module, args, out: received.append(args[0])
    )
    condition = Condition(values, pooled=pooled)
    first = backbone(x, two, condition).velocity
    backbone(x, two)
    watch.remove()
    assert torch.equal(received[0], pooled)
    assert not received[1].any()
    changed = Condition(values, pooled=torch.randn(2, 7))
    assert not torch.allclose(first, backbone(x, two, changed).velocity, atol=1e-4)
    with pytest.raises(ValueError, match="with pooled vectors"):
        backbone(x, two, Condition(values))
    backbone.close()
    with pytest.raises(ValueError, match="9 wide"):
        DiffusersBackbone(model, replace(inputs, pooled=9))
    with pytest.raises(ValueError, match="takes no pooled vector"):
        DiffusersBackbone(
            model_of(CASES["wan"]), replace(inputs_of(CASES["wan"]), pooled=7)
        )
    # a new model is made for the width of the data
    options = ModelConfig(name, heads=2, head_width=16, layers=1)
    made = build_backbone(options, replace(inputs, pooled=9))
    assert made.model.config.pooled_projection_dim == 9


def test_a_pooled_vector_follows_its_sample():
    values = torch.randn(4, 3, 5)
    pooled = torch.randn(4, 2)
    condition = Condition(values, pooled=pooled)
    rows = torch.tensor([2, 0])
    assert torch.equal(condition[rows].pooled, pooled[rows])
    joined = condition[:1].cat(condition[1:])
    assert torch.equal(joined.pooled, pooled)
    assert "pooled vectors (4, 2)" in str(joined)
    assert not condition.unconditional().pooled.any()
    dropped = condition.drop(0.5, lambda purpose: keyed(1, purpose))
    gone = ~dropped.values.any(-1).any(-1)
    assert 0 < gone.sum() < 4
    assert torch.equal(~dropped.pooled.any(-1), gone)
    assert torch.equal(dropped.pooled[~gone], pooled[~gone])


def test_unsupported_features_are_refused_with_the_reason():
    case = CASES["flux2"]
    backbone = DiffusersBackbone(model_of(case), inputs_of(case))
    x, values, two = example(case)
    for purpose in ("training.compile", "training.optimizer muon"):
        with pytest.raises(ValueError, match=f"{purpose} needs: .* code of diffusers"):
            ability(backbone, "blocks", purpose)
    with pytest.raises(ValueError, match="no attention maps"):
        watch_attention(backbone, x, two, condition_of(case, values))


@torch.no_grad()
def test_text_gets_the_mean_level_or_is_clean():
    case = CASES["flux2"]
    x, values, two = example(case)
    model = model_of(case)
    levels = []
    model.time_guidance_embed.time_proj.register_forward_hook(
        lambda module, args, out: levels.append(args[0].view(2, -1) / 1000)
    )
    for level in ("mean", "clean"):
        with DiffusersBackbone(model, inputs_of(case), level) as backbone:
            backbone(x, two, condition_of(case, values))
    close(levels[0], torch.cat([two.levels, two.per_token().mean(1, keepdim=True)], 1))
    close(levels[1], F.pad(two.levels, (0, 1)))


def test_label_dropout_of_diffusers_is_off():
    case = CASES["dit"]
    x, values, two = example(case)
    backbone = DiffusersBackbone(model_of(case), inputs_of(case)).train()
    for block in backbone.model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 1.0
    trained = backbone(x, two, condition_of(case, values)).velocity
    evaluated = backbone.eval()(x, two, condition_of(case, values)).velocity
    assert torch.equal(trained, evaluated)
    dropped = backbone(x, two).velocity
    null = condition_of(case, torch.tensor([4, 4]))
    assert torch.equal(dropped, backbone(x, two, null).velocity)
    assert not torch.equal(dropped, evaluated)


@torch.no_grad()
def test_guidance_of_a_distilled_model_reaches_the_model():
    case = CASES["flux2"]
    x, values, two = example(case)
    config = {**case.config, "guidance_embeds": True}
    model = model_of(Case("flux2", None, config))
    t = two.levels[:, 0]
    results = []
    for guidance in (1.0, 4.0):
        with DiffusersBackbone(model, inputs_of(case), guidance=guidance) as backbone:
            levels = NoiseLevels.single(t, 16)
            results.append(backbone(x, levels, condition_of(case, values)).velocity)
    assert not torch.allclose(*results, atol=1e-4)


def test_time_embeddings_equal_those_of_diffusers():
    model = model_of(CASES["flux2"])
    embed = model.time_guidance_embed
    t = torch.rand(3, 4) * 1000
    expected = embed(t.flatten(), None).view(3, 4, -1)
    assert torch.equal(
        embed_times(embed.time_proj, embed.timestep_embedder, t), expected
    )


# ---------------------------------------------------------------- by name and folder


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["class", "caption", "none"])
def test_a_config_builds_each_family_with_a_zero_output(name, kind):
    family = FAMILIES[name]
    part = Part("signal", 12, (2 if family.video else 1, 4, 4))
    inputs = {
        "class": Inputs((part,), classes=3),
        "caption": Inputs((part,), caption=9),
        "none": Inputs((part,)),
    }[kind]
    config = ModelConfig(name, heads=2, head_width=16, layers=2)
    if name == "dit" and kind == "caption":
        with pytest.raises(ValueError, match="classes, but no captions"):
            build_backbone(config, inputs)
        return
    torch.manual_seed(0)
    backbone = build_backbone(config, inputs)
    x = torch.randn(2, part.tokens, 12)
    check_backbone(backbone, _batch(backbone, x), (1, 2))
    levels = NoiseLevels.single(torch.rand(2), part.tokens)
    output = backbone(x, levels)
    assert output.velocity.count_nonzero() == 0
    with pytest.raises(ValueError, match="the backbone expects"):
        backbone(x, levels, Condition(torch.zeros(2, 3, 7)))


def _batch(backbone, x):
    values, pooled = backbone._values(x, None)
    condition = Condition(values, backbone.inputs.classes, pooled)
    return Batch(x, condition, backbone.inputs.parts)


@pytest.mark.parametrize("name", ["flux2", "wan", "sd3", "sd3.5", "flux"])
def test_a_folder_gives_its_weights_or_its_sizes_alone(name, tmp_path):
    case = CASES[name]
    name = case.family
    x, values, two = example(case)
    model = model_of(case)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read = build_backbone(ModelConfig(name, folder=str(tmp_path)), inputs_of(case))
    direct = DiffusersBackbone(model, inputs_of(case))
    with torch.no_grad():
        condition = condition_of(case, values)
        assert torch.equal(
            read.eval()(x, two, condition).velocity, direct(x, two, condition).velocity
        )
    # only its sizes, fitted to other data
    part = Part(case.part.name, 24, case.part.grid)
    config = ModelConfig(name, folder=str(tmp_path), start="random")
    resized = build_backbone(config, Inputs((part,), classes=3))
    assert resized.depth == case.depth
    assert resized.inputs.channels == 24


def test_unsuitable_folders_are_refused(tmp_path):
    case = CASES["flux2"]
    good = tmp_path / "good"
    model_of(case).save_pretrained(good, max_shard_size="40KB")

    def refused(folder, name="flux2"):
        with pytest.raises(ValueError) as error:
            read_model(folder, name)
        return str(error.value)

    assert "there is no folder" in refused(tmp_path / "nothing")
    assert "is no model" in refused(tmp_path)
    assert "holds a Flux2Transformer2DModel" in refused(good, "wan")
    shards = sorted(good.glob("*.safetensors"))
    data = shards[1].read_bytes()
    shards[1].unlink()
    assert shards[1].name in refused(good)
    shards[1].write_bytes(data[: len(data) // 2])
    assert "cannot be read" in refused(good)
    shards[1].write_bytes(data)
    config = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps({**config, "num_single_layers": 3}))
    assert "do not fit config.json" in refused(good)
    (good / "config.json").write_text("{}")
    assert "does not name a class" in refused(good)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(config))
    assert "has no weights" in refused(pickled)
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "is a pickle" in refused(pickled)
    noise = tmp_path / "noise"
    model_of(CASES["dit"]).save_pretrained(noise)
    assert "predict noise" in refused(noise, "dit")
    options = ModelConfig("dit", folder=str(noise), start="random")
    assert build_backbone(options, Inputs((IMAGE,), classes=7)).depth == 2
    with pytest.raises(ValueError, match="leave one of them out"):
        ModelConfig("dit", folder=str(noise), layers=3)


def test_unsuitable_inputs_are_refused():
    case = CASES["flux2"]
    model = model_of(case)
    two_parts = Inputs((IMAGE, Part("audio", 12, (4, 1, 1))), caption=TEXT)
    with pytest.raises(ValueError, match="image, audio together"):
        DiffusersBackbone(model, two_parts)
    with pytest.raises(ValueError, match="must be the same"):
        DiffusersBackbone(model, Inputs((Part("image", 8, (1, 4, 4)),)))
    with pytest.raises(ValueError, match="vectors are 7 wide"):
        DiffusersBackbone(model, Inputs((IMAGE,), caption=5, caption_width=7))
    with pytest.raises(ValueError, match="no adapter"):
        DiffusersBackbone(torch.nn.Linear(1, 1), inputs_of(case))
    with pytest.raises(ValueError, match="2 time steps"):
        sd3 = {"name": "sd3", "heads": 2, "head_width": 16, "layers": 1}
        build_backbone(ModelConfig(**sd3), Inputs((VIDEO,)))
    with pytest.raises(ValueError, match="divisible by 8"):
        ModelConfig("flux2", head_width=12)
    backbone = DiffusersBackbone(model, inputs_of(case))
    with pytest.raises(ValueError, match="in use"):
        DiffusersBackbone(model, inputs_of(case))
    x, _, two = example(case)
    for wrong, message in (
        (lambda: backbone(x[:, :3], two), "tokens have shape"),
        (lambda: backbone(x, two, taps=(4,)), "no layer"),
        (lambda: backbone(x, two, stop=True), "needs taps"),
        (lambda: backbone(x, two, parts=(VIDEO,)), "was made for"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    # fewer blocks than the layers asked for
    deep = ObjectiveConfig("self_flow", student_layer=2, teacher_layer=9)
    with pytest.raises(ValueError, match="9"):
        objective = build_objective(deep, backbone, ((IMAGE,),))
        layers = (objective.teacher_layer,)
        check_backbone(backbone, _batch(backbone, x), layers)


# ---------------------------------------------------------------- a run


def test_a_tiny_flux2_trains_on_captions_resumes_bit_for_bit_and_is_exported(tmp_path):
    config = Config(
        name="flux2",
        data=DataConfig("shapes", size=16, patch=4, condition="caption"),
        model=ModelConfig("flux2", heads=2, head_width=8, layers=1, single_layers=2),
        objective=ObjectiveConfig("self_flow", student_layer=1, teacher_layer=2),
        training=TrainConfig(
            steps=4,
            batch=4,
            log_every=1,
            validate_every=4,
            validation=4,
            save_every=2,
            sample_every=0,
            checkpointing=True,
        ),
    )
    uninterrupted = train(config, tmp_path / "uninterrupted", device="cpu", bar=False)
    student = uninterrupted.load("model")
    assert any(name.startswith("model.single_transformer_blocks") for name in student)
    assert student["model.proj_out.weight"].count_nonzero() > 0
    shutil.copytree(uninterrupted.path, tmp_path / "resumed" / "flux2")
    shutil.rmtree(tmp_path / "resumed" / "flux2" / "checkpoints" / "step-00000004")
    resumed = train(config, tmp_path / "resumed", device="cpu", bar=False)
    for part in ("model", "teacher", "objective", "optimizer"):
        expected = uninterrupted.load(part)
        actual = resumed.load(part)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert uninterrupted.log_path.read_text() == resumed.log_path.read_text()
    opened = load(export(resumed, tmp_path / "exported"), "cpu")
    torch.manual_seed(0)
    samples = opened.sample(["a red circle"], steps=2)["image"]
    assert samples.shape[1:] == (3, 16, 16)
    assert samples.isfinite().all()
    # diffusers opens its own layout, and so does a run that starts from a folder
    place = export_diffusers(opened, tmp_path / "plain", license="mit")
    x = torch.randn(2, 16, 48)
    text = torch.randn(2, TEXT, 16)
    plain = diffusers.Flux2Transformer2DModel.from_pretrained(place).eval()
    ours = read_model(place, "flux2").eval()
    with torch.no_grad():
        expected = plain_flux2(resumed.evaluated.model, x, text, torch.full((2,), 0.3))
        for model in (plain, ours):
            assert torch.equal(
                plain_flux2(model, x, text, torch.full((2,), 0.3)), expected
            )
    card = (place / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert f"import {type(plain).__name__}" in card
    assert export_diffusers(resumed, place, "bfloat16") == place
    half = diffusers.Flux2Transformer2DModel.from_pretrained(
        place, torch_dtype=torch.bfloat16
    )
    assert torch.equal(half.proj_out.weight, plain.proj_out.weight.bfloat16())
    with pytest.raises(ValueError, match="not empty and holds no exported model"):
        export_diffusers(resumed, opened.path)
    # fewer blocks than the layers asked for
    deep = ObjectiveConfig("self_flow", student_layer=1, teacher_layer=4)
    with pytest.raises(ValueError, match="4"):
        train(replace(config, name="deep", objective=deep), tmp_path, bar=False)
    assert not (tmp_path / "deep" / "checkpoints").exists()


def test_the_options_import_neither_torch_nor_diffusers():
    code = (
        "import sys; from selfflow.method.options import ModelConfig; "
        "ModelConfig('flux2', single_layers=3); "
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flops_of_a_step_are_counted_for_models_by_name_and_from_a_folder(tmp_path):
    model_of(CASES["flux2"]).save_pretrained(tmp_path)
    models = [
        ModelConfig(name, heads=2, head_width=16, layers=2) for name in ("flux2", "wan")
    ]
    for model in (*models, ModelConfig("flux2", folder=str(tmp_path))):
        config = Config(model=model, training=TrainConfig(batch=2))
        part = VIDEO if model.name == "wan" else IMAGE
        assert flops_per_step(config, Inputs((part,), caption=TEXT)) > 1e6
