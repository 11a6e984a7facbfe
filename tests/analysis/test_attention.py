"""Attention maps equal the fused computation; mass between levels equals loops.

Planted attention is detected.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from selfflow.analysis.attention import (
    RELATIONS,
    attention_maps,
    attention_weights,
    compare_separated,
    grids_of,
    maps_by_part,
    mass,
    mass_between_levels,
    relations,
    summarise_mass,
    summarise_separated,
    visible_keys,
    watch_attention,
)
from selfflow.draws import keyed
from selfflow.figures.attention import (
    draw_mass,
    draw_on_audio,
    draw_on_image,
    draw_on_video,
    draw_separation,
)
from selfflow.method.batch import Condition
from selfflow.method.flow import interpolate
from selfflow.method.layers import Groups
from selfflow.method.schedule import Conditioned, DualTimestep, NoiseLevels, SingleLevel
from selfflow.method.tokens import Part
from selfflow.method.transformer import Transformer, TransformerConfig

PARTS = (Part("video", 4, (2, 3, 2), 2.0), Part("audio", 3, (5, 1, 1)))
BASE = TransformerConfig.of_image(4, (3, 4), width=32, depth=3, heads=2)
SHAPES = {
    "plain": BASE,
    "labels": replace(BASE, classes=3),
    "rotary": replace(BASE, positions="rotary"),
    "normed": replace(BASE, qk_norm=True, mlp="swiglu", modulation="shared"),
    "caption": replace(BASE, caption=5, positions="rotary", qk_norm=True),
    "vectors": replace(BASE, caption=5, caption_width=6),
    "parts": TransformerConfig(
        width=32, depth=3, heads=2, positions="rotary", parts=PARTS
    ),
    "parts and caption": TransformerConfig(
        width=32,
        depth=3,
        heads=2,
        positions="rotary",
        parts=PARTS,
        caption=4,
        caption_stride=1,
    ),
}
SCHEDULES = {
    "one level": SingleLevel(),
    "two levels": DualTimestep(mask_ratio=0.4),
    "and a condition": Conditioned(DualTimestep(mask_ratio=0.4), (0, 3, 4), 0.2),
}


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_of(config, schedule=SCHEDULES["two levels"], count=3, seed=0):
    g = keyed(seed, "batch")
    x = torch.randn(count, config.tokens, config.channels, generator=g)
    condition = None
    if config.caption:
        condition = Condition(
            torch.randn(count, config.caption, config.caption_width, generator=g)
            if config.caption_width
            else torch.randint(0, 256, (count, config.caption), generator=g)
        )
    elif config.classes:
        condition = Condition(
            torch.randint(0, config.classes, (count,), generator=g), config.classes
        )
    return x, schedule.sample(count, config.tokens, g), condition


@pytest.mark.parametrize("separated", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_applied_to_the_values_are_the_fused_output(shape, schedule, separated):
    model = model_of(SHAPES[shape])
    x, levels, condition = batch_of(SHAPES[shape], SCHEDULES[schedule])
    seen = watch_attention(model, x, levels, condition, separated=separated)
    assert list(seen) == [1, 2, 3]
    for number, given in seen.items():
        layer = model.blocks[number - 1].attn
        weights, values = attention_weights(layer, *given[:3])
        n = SHAPES[shape].tokens + SHAPES[shape].caption_tokens
        assert weights.shape == (3, 2, n, n)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, n))
        again = layer.proj(
            (weights @ values.transpose(1, 2)).transpose(1, 2).flatten(2)
        )
        torch.testing.assert_close(again, given.output, atol=1e-5, rtol=1e-5)
        some = torch.tensor([4, 0])
        torch.testing.assert_close(
            attention_weights(layer, *given[:3], some)[0], weights[:, :, some]
        )


def test_weights_of_one_head_by_loops():
    model = model_of(SHAPES["labels"])
    x, levels, labels = batch_of(SHAPES["labels"])
    seen = watch_attention(model, x, levels, labels, (2,))[2]
    layer = model.blocks[1].attn
    found, _ = attention_weights(layer, *seen[:3])
    q, k, _ = (
        part.detach().numpy().astype(float)
        for part in layer.qkv(seen.x).chunk(3, dim=-1)
    )
    for head in range(2):
        own = slice(16 * head, 16 * head + 16)
        scores = np.array(
            [[q[1, i, own] @ k[1, j, own] / 4 for j in range(12)] for i in range(12)]
        )
        expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        np.testing.assert_allclose(found[1, head].detach().numpy(), expected, atol=1e-5)


def test_a_longer_sequence_takes_another_fused_path_and_agrees():
    # 144 tokens: scaled_dot_product_attention
    config = replace(BASE, parts=(Part("image", 4, (1, 12, 12)),))
    model = model_of(config)
    x, levels, _ = batch_of(config)
    for separated in (False, True):
        seen = watch_attention(model, x, levels, layers=(3,), separated=separated)[3]
        weights, values = attention_weights(model.blocks[2].attn, *seen[:3])
        again = model.blocks[2].attn.proj(
            (weights @ values.transpose(1, 2)).transpose(1, 2).flatten(2)
        )
        torch.testing.assert_close(again, seen.output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["two levels", "and a condition"])
def test_what_is_visible_is_what_the_levels_say(schedule):
    _, levels, _ = batch_of(BASE, SCHEDULES[schedule], count=20)
    found = visible_keys(Groups.of(levels), 20)
    given = levels.is_condition()
    for sample in range(20):
        for i in range(12):
            for j in range(12):
                together = levels.assign[sample, i] == levels.assign[sample, j]
                assert found[sample, i, j] == (together or given[sample, j])


def test_looking_changes_nothing_and_leaves_nothing():
    model = model_of(SHAPES["caption"])
    x, levels, caption = batch_of(SHAPES["caption"])
    before = model(x, levels, caption).velocity
    maps = attention_maps(model, x, levels, caption, layers=(1, 3), batch=2)
    assert set(maps) == {1, 3}
    assert maps[1].shape == (3, 2, 14, 14)
    torch.testing.assert_close(
        model(x, levels, caption).velocity, before, atol=0, rtol=0
    )
    assert not any(block.attn._forward_hooks for block in model.blocks)
    with pytest.raises(ValueError, match="tokens have shape"):
        watch_attention(model, x[:, :3], levels, caption)
    assert not any(block.attn._forward_hooks for block in model.blocks), (
        "nor after a mistake"
    )
    whole = attention_maps(model, x, levels, caption, layers=(3,))[3]
    torch.testing.assert_close(maps[3], whole)
    torch.testing.assert_close(
        attention_maps(model, x, levels, caption, (3,), torch.tensor([7]))[3][:, :, 0],
        whole[:, :, 7],
    )


def test_separated_tokens_do_not_see_the_other_level():
    model, (x, levels, _) = model_of(BASE), batch_of(BASE, count=6)
    maps = attention_maps(model, x, levels, separated=True)[2]
    other = levels.assign[:, None, :, None] != levels.assign[:, None, None, :]
    assert (maps * other).abs().max() == 0
    assert (attention_maps(model, x, levels)[2] * other).max() > 0


def test_relations_and_mass_by_loops():
    g = keyed(0, "relations")
    _, levels, _ = batch_of(BASE, SCHEDULES["and a condition"], count=4)
    relation = relations(levels, 15)
    tau = levels.per_token()
    given = levels.is_condition()
    weights = torch.rand(4, 2, 15, 15, generator=g)
    found = mass(weights, relation)
    for sample in range(4):
        for i in range(12):
            expected = dict.fromkeys(RELATIONS, 0.0)
            for j in range(15):
                if i == j:
                    kind = "self"
                elif j >= 12 or given[sample, j]:
                    kind = "condition"
                else:
                    more = (tau[sample, j] - tau[sample, i]).sign().item()
                    kind = {1: "noisier", -1: "cleaner", 0: "same"}[more]
                assert RELATIONS[relation[sample, i, j]] == kind
                expected[kind] += weights[sample, 1, i, j].item()
            assert found[sample, 1, i].tolist() == pytest.approx(
                list(expected.values()), abs=1e-5
            )


def two_levels(count, n=12, seed=0):
    x0, x1 = torch.randn(2, count, n, 4, generator=keyed(seed, "pairs")).unbind()
    return x0, x1, DualTimestep(mask_ratio=0.4).sample(count, n, keyed(seed, "levels"))


def test_uniform_attention_has_no_preference_and_planted_preference_is_found():
    model = model_of(BASE)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:32].zero_()
            block.attn.qkv.bias[:32].zero_()
    x0, x1, levels = two_levels(30)
    even = mass_between_levels(model, x0, x1, levels)
    assert (even["mass"] - even["uniform"]).abs().max() < 1e-5
    assert (even["share"] - even["counted"]).abs().max() < 1e-5
    table = summarise_mass(even)
    assert table["excess"].abs().max() < 1e-5
    assert set(table["direction"]) == {
        "noisy to clean",
        "clean to noisy",
    }
    # a key of its own for clean tokens: the modulation of the first block knows the
    # level, so let it decide
    with torch.no_grad():
        block = model.blocks[0]
        block.adaLN_modulation[1].weight.zero_()
        block.adaLN_modulation[1].bias.zero_()
        # scale: what is normed is gone, only the shift stays
        block.adaLN_modulation[1].bias[32:64] = -1
        # shift of channel 0: the sum of the conditions' channels
        block.adaLN_modulation[1].weight[0] = 1
        block.attn.qkv.bias[:32] = 4
        block.attn.qkv.weight[32:64].zero_()
        block.attn.qkv.weight[32:64, 0] = 1
    found = mass_between_levels(model, x0, x1, levels, layers=(1,))
    excess = (
        found.assign(excess=found["share"] - found["counted"])
        .groupby("direction")["excess"]
        .mean()
    )
    assert excess["noisy to clean"] * excess["clean to noisy"] < 0, (
        "who gains in one way loses in the other"
    )
    assert excess.abs().min() > 0.01


def test_mass_by_hand_and_in_batches():
    model, (x0, x1, levels) = model_of(BASE), two_levels(9)
    found = mass_between_levels(model, x0, x1, levels, layers=(2,), batch=4)
    maps = attention_maps(
        model, interpolate(x0, x1, levels.per_token()), levels, layers=(2,)
    )[2].mean(1)
    tau = levels.per_token()
    for sample in range(9):
        noisy = tau[sample] == levels.levels[sample].max()
        if not noisy.any() or noisy.all():
            assert sample not in set(found["sample"])
            continue
        row = found.query("sample == @sample and direction == 'noisy to clean'").iloc[0]
        here = maps[sample][noisy]
        own = maps[sample].diagonal()[noisy]
        assert row["mass"] == pytest.approx(
            here[:, ~noisy].sum(1).mean().item(), abs=1e-5
        )
        assert row["share"] == pytest.approx(
            (here[:, ~noisy].sum(1) / (1 - own)).mean().item(), abs=1e-5
        )
        assert row["counted"] == pytest.approx((~noisy).sum().item() / 11)
        assert row["own"] == pytest.approx(own.mean().item(), abs=1e-5)
        assert row["uniform"] == pytest.approx((~noisy).sum().item() / 12)
        assert row["gap"] == pytest.approx(
            levels.levels[sample].diff().abs().item(), abs=1e-6
        )
    some = torch.arange(12) < 6
    among = mass_between_levels(model, x0, x1, levels, layers=(2,), among=some)
    sample = int(among["sample"].iloc[0])
    noisy = (tau[sample] == levels.levels[sample].max()) & some
    row = among.query("sample == @sample and direction == 'noisy to clean'").iloc[0]
    assert row["mass"] == pytest.approx(
        maps[sample][noisy][:, some & ~noisy].sum(1).mean().item(), abs=1e-5
    )
    assert row["counted"] == pytest.approx((some & ~noisy).sum().item() / 5)


def test_separated_error_is_that_of_a_separated_forward():
    model, (x0, x1, levels) = model_of(BASE), two_levels(7)
    found = compare_separated(model, x0, x1, levels, BASE.parts, batch=3)
    tau = levels.per_token()
    xt = interpolate(x0, x1, levels.per_token())
    for separated in (False, True):
        with torch.no_grad():
            error = (
                (model(xt, levels, separated=separated).velocity - (x1 - x0))
                .square()
                .mean(-1)
            )
        for row in found.itertuples():
            level = (
                levels.levels[row.sample].max()
                if row.tokens == "noisier"
                else levels.levels[row.sample].min()
            )
            value = row.separated if separated else row.full
            assert value == pytest.approx(
                error[row.sample][tau[row.sample] == level].mean().item(), rel=1e-4
            )
    assert (summarise_separated(found)["samples"] > 1).all()


def test_three_levels_are_not_two():
    x0, x1, _ = two_levels(4)
    one = SingleLevel().sample(4, 12, keyed(0, "levels"))
    with pytest.raises(ValueError, match="compares two"):
        mass_between_levels(model_of(BASE), x0, x1, one)
    with pytest.raises(ValueError, match="compares two"):
        compare_separated(model_of(BASE), x0, x1, one, BASE.parts)


def test_maps_lie_where_the_tokens_do():
    grids = grids_of(SHAPES["parts and caption"].parts)
    assert grids == {"video": (2, 3, 2), "audio": (5,)}
    weights = torch.arange(21.0)
    found = maps_by_part(weights, grids, relative=False)
    assert found["video"].flatten().tolist() == list(range(12))
    assert found["video"][1, 2, 0] == 10
    assert found["audio"].tolist() == [12, 13, 14, 15, 16]
    assert found["caption"].tolist() == [17, 18, 19, 20]
    assert maps_by_part(torch.full((2, 16), 1 / 16), {"image": (4, 4)})[
        "image"
    ].unique().tolist() == [1]


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda: attention_maps(model_of(BASE), *two_levels(2)[::2], layers=(4,)),
            "no layer",
        ),
        (
            lambda: relations(
                NoiseLevels(torch.tensor([[0.5]]), torch.zeros(1, 9).long()), 8
            ),
            "only 8",
        ),
        (lambda: maps_by_part(torch.ones(8), {"image": (3, 3)}), "9 tokens"),
        (
            lambda: draw_on_image(torch.zeros(3, 8, 8), torch.ones(1, 3, 3)),
            "do not fit",
        ),
        (
            lambda: draw_on_image(
                torch.zeros(3, 8, 8), torch.ones(1, 4, 4), token=(4, 0)
            ),
            "no token",
        ),
        (
            lambda: draw_on_video(torch.zeros(3, 4, 8, 8), torch.ones(1, 3, 4, 4)),
            "do not fit a video",
        ),
        (
            lambda: draw_on_audio(torch.zeros(10, 8), torch.ones(1, 3)),
            "do not fit a spectrum",
        ),
        (
            lambda: draw_on_audio(torch.zeros(10, 8), torch.ones(1, 4), token=4),
            "no moment",
        ),
        (
            lambda: draw_mass({"a": pd.DataFrame({"direction": ["clean to noisy"]})}),
            "no row of direction",
        ),
    ],
)
def test_what_cannot_be_is_said(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_what_is_drawn_is_what_was_measured():
    x0, x1, levels = two_levels(40)
    table = summarise_mass(mass_between_levels(model_of(BASE), x0, x1, levels))
    figure = draw_mass({"a": table, "b": table})
    own = table[
        (table["direction"] == "noisy to clean")
        & (table["gap"] == table["gap"].iloc[0])
    ]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), own["excess"])
    assert (
        len(
            draw_separation(
                {
                    "a": summarise_separated(
                        compare_separated(model_of(BASE), x0, x1, levels, BASE.parts)
                    )
                }
            ).axes
        )
        == 1
    )
