"""Several kinds of tokens in one sequence, captions and conditions give what plain
rewritings give; sizes and parts that do not fit are refused.
"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.data.datasets import caption_bytes, caption_text
from selfflow.draws import keyed, numbered
from selfflow.method.alignment import flow_error
from selfflow.method.batch import Batch, Condition
from selfflow.method.build import (
    _given_tokens,
    _mask_ratio_of,
    build_objective,
    build_schedule,
)
from selfflow.method.layers import TokenMap
from selfflow.method.objective import FlowMatching, SelfFlow, make_teacher
from selfflow.method.options import ObjectiveConfig
from selfflow.method.schedule import Conditioned, DualTimestep, NoiseLevels, SingleLevel
from selfflow.method.tokens import (
    PAD,
    ImagePatches,
    Layout,
    Part,
    TokenSlices,
    VideoPatches,
)
from selfflow.method.transformer import Context, Transformer, TransformerConfig

few_examples = settings(max_examples=25, deadline=None)
VIDEO = Part("video", 6, (3, 2, 1), 2.0)
AUDIO = Part("audio", 4, (6, 1, 1), 1.0)
BOTH = {
    "parts": (VIDEO, AUDIO),
    "width": 32,
    "depth": 3,
    "heads": 2,
    "positions": "rotary",
}


def model_of(std=0.2, **changes):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**BOTH | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def batch(b=3, n=12, c=6):
    return torch.randn(b, n, c, generator=keyed(0, "tokens"))


# tokens


@few_examples
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_patches_of_videos_follow_their_formula_and_round_trip(
    b, moments, rows, columns, patch, span
):
    cut = VideoPatches(2, moments * span, rows * patch, columns * patch, patch, span)
    videos = torch.randn(b, 2, moments * span, rows * patch, columns * patch)
    tokens = cut.patchify(videos)
    part = cut.part()
    assert tokens.shape == (b, part.tokens, part.channels)
    assert torch.equal(cut.unpatchify(tokens), videos)
    for n, (t, h, w, place) in enumerate(part.coordinates().tolist()):
        f = round((t + 0.5) / span - 0.5)
        expected = videos[
            :,
            :,
            f * span : (f + 1) * span,
            round(h) * patch : (round(h) + 1) * patch,
            round(w) * patch : (round(w) + 1) * patch,
        ]
        assert torch.equal(tokens[:, n], expected.flatten(1))
        assert place == 0
        assert t == pytest.approx(sum(range(f * span, (f + 1) * span)) / span), (
            "the mean time of its frames"
        )


def test_a_layout_concatenates_parts_and_pads_narrow_tokens():
    layout = Layout(
        {"image": ImagePatches(1, 4, 4, 2), "video": VideoPatches(3, 2, 4, 4, 2, 1)}
    )
    signals = {
        "image": torch.randn(2, 1, 4, 4),
        "video": torch.randn(2, 3, 2, 4, 4),
        "more": torch.zeros(1),
    }
    tokens = layout.patchify(signals)
    assert tokens.shape == (2, layout.tokens, layout.channels) == (2, 12, 12)
    assert not tokens[:, :4, 4:].any()
    restored = layout.unpatchify(tokens + torch.where(tokens == 0, 7.0, 0.0))
    assert torch.equal(restored["image"], signals["image"])
    assert torch.equal(restored["video"], signals["video"])
    places = TokenSlices.of(layout.parts)
    assert places.slices == {
        "image": slice(0, 4),
        "video": slice(4, 12),
    }
    assert places.widths.tolist() == 4 * [4] + 8 * [12]
    assert layout.preview(signals).shape == (2, 3, 8 + 4, 8)
    with pytest.raises(ValueError, match="has image, video, but there is no video"):
        layout.patchify({"image": signals["image"]})


def test_given_signals_start_as_clean_tokens():
    layout = Layout(
        {"video": VideoPatches(3, 4, 4, 4, 2, 2), "image": ImagePatches(1, 4, 4, 2)}
    )
    video = torch.randn(2, 3, 4, 4, 4)
    image = torch.randn(2, 1, 4, 4)
    x0, start = layout.known_tokens({"image": image}, 2)
    assert start.tolist() == 8 * [1] + 4 * [0]
    assert torch.equal(layout.unpatchify(x0)["image"], image)
    x0, start = layout.known_tokens({"first_frame": video[:, :, :2]}, 2)
    assert start.tolist() == 4 * [0] + 8 * [1]
    assert torch.equal(layout.unpatchify(x0)["video"][:, :, :2], video[:, :, :2])
    with pytest.raises(
        ValueError, match="audio is given, but the sequence consists of video, image"
    ):
        layout.known_tokens({"audio": video}, 2)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Part("no word", 1, (1, 1, 1)), "needs a word"),
        (lambda: Part("a", 0, (1, 1, 1)), "above 0"),
        (lambda: Part("a", 1, (1, 1)), "moments, rows and columns"),
        (lambda: Part("a", 1, (1, 1, 1), 0.0), "ticks above 0"),
        (
            lambda: VideoPatches(3, 5, 4, 4, 2, 2),
            "frames 5 is not divisible by patch 2",
        ),
        (
            lambda: VideoPatches(3, 4, 4, 6, 4, 2),
            "width 6 is not divisible by patch 4; choose a patch from",
        ),
        (
            lambda: VideoPatches(3, 4, 4, 4, 2, 2).patchify(torch.zeros(1, 3, 4, 4, 6)),
            "videos have shape",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# captions


@few_examples
@given(st.text(max_size=40), st.integers(1, 20))
def test_captions_in_any_script_are_cut_between_characters(text, length):
    (row,) = caption_bytes([text], length)
    known = text.encode("utf-8", "replace").decode()
    assert row.shape == (length,)
    assert known.startswith(caption_text(row))
    rest = known[len(caption_text(row)) :]
    assert not rest or len((caption_text(row) + rest[0]).encode()) > length, (
        "not one more character would fit"
    )


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("level", ["mean", "clean"])
def test_caption_tokens_join_the_sequence_at_their_own_level(positions, level):
    """The reference is the same network with one longer sequence and a condition for
    each token.
    """
    model = model_of(
        0.1,
        parts=(Part("image", 4, (1, 2, 2)),),
        positions=positions,
        caption=5,
        caption_level=level,
        caption_stride=2,
    )
    x = torch.randn(3, 4, 4)
    caption = Condition(caption_bytes(["a", "two", "longest"], 5))
    levels = DualTimestep(mask_ratio=0.5).sample(3, 4, keyed(0, "levels"))
    out = model(x, levels, caption, taps=(1, 3))
    tau = levels.per_token()
    own = (
        torch.zeros(3, 3)
        if level == "clean"
        else tau.mean(1, keepdim=True).expand(3, 3)
    )
    every = NoiseLevels(torch.cat([tau, own], 1), torch.arange(7).expand(3, 7))
    h = model.x_embedder.image(x)
    text = model.caption_embedder(caption.values)
    places = torch.nn.functional.pad(torch.tensor([[1.0], [3.0], [5.0]]), (3, 0))
    if positions == "sincos":
        h = h + model.positions
        text = text + model.caption_positions
        rotary = None
    else:
        rotary = torch.cat([model.positions, model._positions(places)], dim=-2)
    h = torch.cat([h, text], 1)
    c = (
        model.t_embedder(every.levels)
        + model.y_embedder(torch.zeros(3, dtype=torch.int64))[:, None]
    )
    for block in model.blocks:
        h = block(h, Context(c, TokenMap.of(every), rotary))
    torch.testing.assert_close(out.features[3], h[:, :4], atol=1e-4, rtol=1e-4)
    velocity = model.final_layer(h, c, TokenMap.of(every), {"image": slice(0, 4)}, 4)
    torch.testing.assert_close(out.velocity, velocity, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(
        out.velocity, model(x, levels, caption[[2, 1, 0]]).velocity
    ), "the caption matters"
    null = Condition(torch.full((3, 5), PAD))
    assert torch.equal(model(x, levels, null).velocity, model(x, levels).velocity)
    early = model(x, levels, caption, taps=(1,), stop=True)
    assert torch.equal(early.features[1], out.features[1])


def test_captions_can_be_vectors_of_a_text_encoder():
    model = model_of(caption=3, caption_width=7)
    vectors = torch.randn(2, 3, 7)
    levels = NoiseLevels.single(torch.tensor([0.2, 0.8]), 12)
    assert model(batch(2), levels, Condition(vectors)).velocity.shape == (2, 12, 6)
    assert torch.equal(
        model(batch(2), levels).velocity,
        model(batch(2), levels, Condition(torch.zeros(2, 3, 7))).velocity,
    )
    with pytest.raises(
        ValueError,
        match=r"condition is text \(2, 3\), the model expects vectors \(2, 3, 7\)",
    ):
        model(batch(2), levels, Condition(torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(
        TypeError, match=r"or vectors \(b, l, e\), not torch.int64 \(2, 3, 7\)"
    ):
        Condition(torch.zeros(2, 3, 7, dtype=torch.int64))


def test_a_caption_is_dropped_entirely_or_not_at_all():
    captions = caption_bytes(["some words"] * 4000, 12)
    dropped = Condition(captions).drop(0.3, lambda purpose: keyed(0, purpose)).values
    is_dropped = (dropped == PAD).all(1)
    assert abs(is_dropped.float().mean() - 0.3) < 0.03
    assert torch.equal(dropped[~is_dropped], captions[~is_dropped])


# the model


def test_each_part_has_its_own_projections_and_ignores_padding():
    model = model_of()
    x = batch()
    levels = DualTimestep(mask_ratio=0.5).sample(3, 12, keyed(0, "levels"))
    out = model(x, levels).velocity
    padded = x.clone()
    padded[:, 6:, 4:] = 9.0
    assert torch.equal(out, model(padded, levels).velocity)
    assert not out[:, 6:, 4:].any()
    assert out[:, 6:, :4].all()
    video_model = Transformer(TransformerConfig(**BOTH | {"parts": (VIDEO,)}))
    state = {
        name: value for name, value in model.state_dict().items() if "audio" not in name
    }
    video_model.load_state_dict(state)
    video_levels = NoiseLevels(levels.levels, levels.assign[:, :6])
    expected = video_model(x[:, :6], video_levels).velocity
    torch.testing.assert_close(
        model(x[:, :6], video_levels, parts=(VIDEO,)).velocity, expected
    )


def test_each_part_of_a_model_can_be_used_alone():
    model = model_of()
    clip = torch.randn(2, 6, 4)
    out = model(clip, NoiseLevels.single(torch.rand(2), 6), parts=(AUDIO,))
    assert out.velocity.shape == (2, 6, 4)
    with pytest.raises(ValueError, match="tokens have shape .*expects \\(b, 6, 4\\)"):
        model(batch(), NoiseLevels.single(torch.rand(3), 12), parts=(AUDIO,))
    with pytest.raises(
        ValueError,
        match="was not built with Part.name='image'.*, "
        "but with Part.name='video'.*audio",
    ):
        model(
            clip,
            NoiseLevels.single(torch.rand(2), 6),
            parts=(Part("image", 4, (1, 6, 1)),),
        )


def test_a_config_of_parts_survives_json():
    config = TransformerConfig(**BOTH, caption=7)
    assert (config.channels, config.tokens) == (6, 12)
    assert TransformerConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"positions": "sincos"}, "neither time nor several parts; take rotary"),
        ({"caption": 3, "classes": 2}, "choose one of the two"),
        ({"caption_level": "low"}, "caption_level is 'low'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**BOTH | changes)


# losses


def test_padding_does_not_count_in_the_loss():
    x0, x1, v = (torch.randn(2, 12, 6) for _ in range(3))
    widths = TokenSlices.of((VIDEO, AUDIO)).widths
    error = flow_error(v, x0, x1, widths)
    for n in range(12):
        w = int(widths[n])
        torch.testing.assert_close(
            error[:, n], (v - x1 + x0)[:, n, :w].square().mean(-1)
        )


@pytest.mark.parametrize(
    "weights", [None, {"audio": 0.25}, {"video": 2.0, "audio": 0.0}]
)
def test_weights_of_parts_apply_to_their_tokens_in_every_loss(weights):
    model = model_of()
    x = batch(4)
    samples = Batch(x, Condition(torch.zeros(4, dtype=torch.int64)), (VIDEO, AUDIO))
    draw = lambda purpose: keyed(0, purpose)  # noqa: E731
    objective = SelfFlow(
        model.config, student_layer=1, teacher_layer=2, weights=weights
    )
    teacher = make_teacher(model)
    losses = objective(model, teacher, samples, draw)
    noised = objective.noise_batch(samples, draw)
    out = objective.predict(model, noised, (1,))
    w = torch.tensor(
        [(weights or {}).get(name, 1.0) for name in 6 * ["video"] + 6 * ["audio"]]
    )
    error = flow_error(
        out.velocity, x, noised.x1, TokenSlices.of((VIDEO, AUDIO)).widths
    )
    torch.testing.assert_close(losses.flow_loss, (error * w).mean())
    torch.testing.assert_close(losses.by_part["video"], error[:, :6].mean())
    target, _ = objective.target(teacher, noised, out.features, draw)
    cosine = torch.nn.functional.cosine_similarity(
        objective.projector(out.features[1]), target, dim=-1
    )
    torch.testing.assert_close(
        losses.rep_loss, ((1 - cosine) * w).mean(), atol=1e-6, rtol=1e-5
    )


def test_alternating_sequences_have_their_own_schedules():
    config = ObjectiveConfig("self_flow", student_layer=1, teacher_layer=2)
    objective = build_objective(config, TransformerConfig(**BOTH), ((VIDEO,), (AUDIO,)))
    assert objective.schedule_of((VIDEO,)).mask_ratio == 0.1
    assert objective.schedule_of((AUDIO,)).mask_ratio == 0.5
    joint = build_objective(config, TransformerConfig(**BOTH), ((VIDEO, AUDIO),))
    assert joint.schedule_of((VIDEO, AUDIO)).mask_ratio == 6 * (0.1,) + 6 * (0.5,)
    model = model_of()
    samples = Batch(
        torch.randn(2, 6, 4), Condition(torch.zeros(2, dtype=torch.int64)), (AUDIO,)
    )
    losses = objective(
        model, make_teacher(model), samples, lambda purpose: keyed(0, purpose)
    )
    assert losses.total.isfinite()
    assert not losses.by_part


# schedules


def test_each_token_can_have_its_own_mask_ratio():
    ratios = (0.0, 0.1, 0.5, 0.5)
    levels = DualTimestep(mask_ratio=ratios).sample(20_000, 4, keyed(0, "levels"))
    torch.testing.assert_close(
        levels.assign.float().mean(0), torch.tensor(ratios), atol=0.012, rtol=0
    )
    repeated, single = (
        DualTimestep(mask_ratio=ratio).sample(50, 4, keyed(1, "levels"))
        for ratio in (4 * (0.3,), 0.3)
    )
    assert torch.equal(repeated.assign, single.assign)
    assert torch.equal(repeated.levels, single.levels)
    for options, words in (
        ({"mask_ratio": (0.1, 0.7)}, "mask_ratio is 0.7"),
        ({"mask_ratio": (0.1,), "exact": True}, "one mask_ratio"),
    ):
        with pytest.raises(ValueError, match=words):
            DualTimestep(**options)
    with pytest.raises(ValueError, match="2 mask ratios for 3 tokens"):
        DualTimestep(mask_ratio=(0.1, 0.2)).sample(1, 3)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_sample_is_conditioned_on_one_set_of_tokens_or_none(share):
    schedule = Conditioned(
        SingleLevel(), ((0, 1), (2, 3, 4)), max_level=0.2, share=share
    )
    levels = schedule.sample(10_000, 6, keyed(0, "levels"))
    given = levels.is_condition()
    rows, counts = given.long().unique(dim=0, return_counts=True)
    expected = {
        (0, 0, 0, 0, 0, 0): 1 - share,
        (1, 1, 0, 0, 0, 0): share / 2,
        (0, 0, 1, 1, 1, 0): share / 2,
    }
    shares = {
        tuple(row): count / 10_000
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
    }
    assert set(shares) == {row for row, probability in expected.items() if probability}
    assert all(
        abs(shares[row] - probability) < 0.02
        for row, probability in expected.items()
        if probability
    )
    assert (levels.per_token()[given] <= 0.2).all()
    assert levels.cleanest().k == 2
    torch.testing.assert_close(
        levels.cleanest().per_token()[given], levels.per_token()[given]
    )


def test_given_tokens_follow_from_the_parts():
    assert _given_tokens("first_frame", (VIDEO, AUDIO)) == ((0, 1),)
    assert _given_tokens("audio", (VIDEO, AUDIO)) == (tuple(range(6, 12)),)
    assert _given_tokens("either", (VIDEO, AUDIO)) == (
        tuple(range(6)),
        tuple(range(6, 12)),
    )
    image = Part("image", 4, (1, 2, 2))
    for name, parts in (
        ("audio", (AUDIO,)),
        ("first_frame", (AUDIO,)),
        ("either", (VIDEO,)),
        ("first_frame", (image,)),
    ):
        with pytest.raises(
            ValueError, match=f"given is '{name}', but the sequence consists of"
        ):
            _given_tokens(name, parts)
    config = ObjectiveConfig(given="either", given_share=0.5)
    assert build_schedule(config, (VIDEO, AUDIO)).share == 0.5
    assert _mask_ratio_of(replace(config, mask_ratio=0.3), (VIDEO, AUDIO)) == 0.3


def test_given_tokens_do_not_count_in_flow_matching():
    model = model_of()
    x = batch(64)
    objective = FlowMatching(
        Conditioned(SingleLevel(), (tuple(range(6)), tuple(range(6, 12))))
    )
    samples = Batch(x, Condition(torch.zeros(64, dtype=torch.int64)), (VIDEO, AUDIO))
    losses = objective(model, None, samples, lambda purpose: keyed(0, purpose))
    noised = objective.noise_batch(samples, lambda purpose: keyed(0, purpose))
    out = objective.predict(model, noised)
    error = flow_error(
        out.velocity, x, noised.x1, TokenSlices.of((VIDEO, AUDIO)).widths
    )
    counted = ~noised.levels.is_condition()
    torch.testing.assert_close(losses.flow_loss, error[counted].mean())
    torch.testing.assert_close(
        losses.by_part["audio"], error[:, 6:][counted[:, 6:]].mean()
    )


# numbers by index


@few_examples
@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_numbers_by_index_depend_only_on_purpose_and_index(indices, count, more):
    index = torch.tensor(indices)
    numbers = numbered("a", index, count)
    assert numbers.dtype == torch.float32
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    assert torch.equal(
        numbers,
        torch.cat(
            [
                numbered("a", index[i : i + 1], count + more)[:, :count]
                for i in range(len(index))
            ]
        ),
    )
    assert not torch.equal(numbered("b", index, 50), numbered("a", index, 50))


def test_numbers_by_index_are_uniform_and_independent():
    numbers = numbered("x", torch.arange(40_000), 5).double()
    counts = torch.stack([column.histc(20, 0, 1) for column in numbers.T])
    assert ((counts - 2000).square() / 2000).sum(1).max() < 50, (
        "chi-squared with 19 degrees of freedom: one in 10,000 is above"
    )
    shifted = torch.cat([numbers[:-1], numbers[1:]], dim=1)
    assert (torch.corrcoef(shifted.T) - torch.eye(10)).abs().max() < 0.03
