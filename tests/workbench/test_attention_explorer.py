"""The attention explorer agrees with sums by hand, without a browser.

One forward pass serves all questions, and bad input is refused.
"""

import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from selfflow.analysis.attention import RELATIONS
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.method.options import ModelConfig
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.workbench import attention_scene
from selfflow.workbench.attention_explorer import (
    Window,
    draw,
    draw_caption,
    draw_layers,
    explore_attention,
    frames_in,
    laid_over,
)
from selfflow.workbench.attention_scene import (
    QUESTIONS,
    Forward,
    Watched,
    compute,
    describe,
    pieces_of,
    read,
)
from selfflow.workbench.boards import Board
from selfflow.workbench.controls import DARK
from selfflow.workbench.viewed_run import ViewedRun

VALUES = {
    "question": QUESTIONS[0],
    "tokens": [5],
    "layer": 2,
    "head": "mean",
    "t": 0.9,
    "s": 0.1,
    "mask_ratio": 0.25,
    "sample": 1,
    "seed": 3,
    "network": "EMA teacher",
    "separated": False,
    "frame": 1,
}
SHORT = TrainConfig(
    steps=2,
    batch=4,
    shards=1,
    validate_every=2,
    validation=4,
    save_every=2,
    sample_every=0,
)
SMALL = ModelConfig(width=16, depth=3, heads=2)
MORE = {
    "texts": DataConfig("shapes", size=16, patch=4, condition="caption"),
    "scenes": DataConfig("scenes", size=16, frames=8, patch=4),
    "audio": DataConfig("notes", condition="none"),
}


@pytest.fixture(scope="module")
def watched(runs):
    return Watched(ViewedRun(runs["tiny"], count=4))


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    configs = [
        Config(name=name, data=data, model=SMALL, training=SHORT)
        for name, data in MORE.items()
    ]
    return {
        config.name: train(config, folder, bar=False, device="cpu")
        for config in configs
    }


def attention_by_hand(model, layer, record):
    "Softmax of q k / sqrt(e), head by head, from the weights; without rotary code."
    block = model.blocks[layer - 1].attn
    x = record.x[0]
    q, k, _ = (x @ block.qkv.weight.T + block.qkv.bias).chunk(3, -1)
    wide = x.shape[-1] // block.heads
    return torch.stack(
        [
            (q[:, i : i + wide] @ k[:, i : i + wide].T / wide**0.5).softmax(-1)
            for i in range(0, x.shape[-1], wide)
        ]
    )


# weights and sums


def test_weights_are_the_softmax_of_queries_and_keys(watched):
    forward = compute(watched, VALUES).forward
    assert forward.seen[1].rotary is None
    for layer in forward.seen:
        torch.testing.assert_close(
            forward.weights(layer),
            attention_by_hand(forward.model, layer, forward.seen[layer]),
        )


def test_the_network_gets_the_inputs_of_training(watched):
    forward = compute(watched, VALUES).forward
    viewed = watched.viewed
    tau = forward.levels.per_token()[0]
    assert sorted(set(tau.tolist())) == pytest.approx([0.1, 0.9])
    torch.testing.assert_close(
        forward.xt,
        (1 - tau[:, None]) * viewed.x0[1] + tau[:, None] * viewed.noise(3)[0],
    )
    out = viewed.teacher(
        forward.xt[None], forward.levels, viewed.condition[[1]], taps=(1,)
    )
    again = forward.model(
        forward.xt[None], forward.levels, viewed.condition[[1]], taps=(1,)
    )
    torch.testing.assert_close(out.features[1], again.features[1])


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("separated", [False, True])
def test_rows_columns_and_mass_are_sums_by_hand(watched, question, separated):
    scene = compute(watched, {**VALUES, "question": question, "separated": separated})
    forward = scene.forward
    n = watched.viewed.tokens
    tau = forward.levels.per_token()[0].tolist()
    allowed = forward.visible
    assert allowed.all() != separated

    def relation(i, j):
        return 0 if i == j else 1 if tau[j] < tau[i] else 2 if tau[j] == tau[i] else 3

    lookers = range(n) if question == QUESTIONS[2] else [5]
    for weights, rows, masses in [
        (forward.weights(1), scene.rows[0], scene.masses[0]),
        (
            (allowed / allowed.sum(-1, keepdim=True))[None],
            scene.even[None],
            scene.even_masses[None],
        ),
    ]:
        for head in range(len(weights)):
            row = np.zeros(n)
            mass = np.zeros(len(RELATIONS))
            for i in lookers:
                for j in range(n):
                    value = (
                        weights[head, j, i].item()
                        if question == QUESTIONS[1]
                        else weights[head, i, j].item()
                    )
                    row[j] += value / len(lookers)
                    mass[relation(i, j)] += value / len(lookers)
            np.testing.assert_allclose(rows[head].numpy(), row, atol=1e-6)
            np.testing.assert_allclose(masses[head].numpy(), mass, atol=1e-6)
    if separated:
        assert scene.masses[..., [1, 3]].abs().max() == 0
        # masked tokens are not on the map
        assert question == QUESTIONS[2] or scene.relative.isnan().any()


def test_uniform_attention_is_1_everywhere(runs):
    watched = Watched(ViewedRun(runs["tiny"], count=2))
    for block in watched.networks["EMA teacher"].blocks:
        block.attn.qkv.weight.data.zero_()
        block.attn.qkv.bias.data.zero_()
    for question in QUESTIONS:
        scene = compute(watched, {**VALUES, "question": question})
        torch.testing.assert_close(scene.relative, torch.ones_like(scene.relative))
        torch.testing.assert_close(
            scene.of_head(scene.masses), scene.even_masses.expand(4, -1)
        )


def test_one_forward_serves_all_layers_heads_and_tokens(runs):
    watched = Watched(ViewedRun(runs["tiny"], count=4))
    for change in (
        {},
        {"layer": 4},
        {"head": 2},
        {"tokens": [0]},
        {"question": QUESTIONS[1]},
        {"question": QUESTIONS[2]},
    ):
        draw(compute(watched, {**VALUES, **change}))
    assert watched.forward.cache_info().misses == 1
    changes = (
        {"t": 0.5},
        {"s": 0.3},
        {"mask_ratio": 0.5},
        {"sample": 0},
        {"seed": 4},
        {"network": "student"},
        {"separated": True},
    )
    rows = [compute(watched, {**VALUES, **change}).rows for change in ({}, *changes)]
    assert watched.forward.cache_info().misses == 1 + len(changes)
    # each of them matters
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_weights_that_are_too_large_to_store_are_recomputed(watched, monkeypatch):
    scene = compute(watched, VALUES)
    monkeypatch.setattr(attention_scene, "_REMEMBERED", 0)
    again = compute(Watched(watched.viewed), VALUES)
    assert torch.equal(again.rows, scene.rows)
    assert not again.forward.known
    assert scene.forward.known


def test_other_explorers_of_the_same_run_are_not_recorded(watched):
    viewed = watched.viewed
    forward = watched.forward(0, 9, 0.7, 0.2, 0.25, "student", False, "")
    assert forward.model is not viewed.student
    before = forward.seen[1].x.clone()
    viewed.view(1, forward.levels, 5)
    assert torch.equal(forward.seen[1].x, before)
    assert not viewed.student.blocks[0].attn._forward_hooks


def test_mass_of_a_row_is_read_by_the_token_that_looks():
    weights = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]])
    relation = torch.tensor([[0, 1, 4], [3, 0, 4], [3, 1, 0]])
    row, mass = read(weights, relation, QUESTIONS[0], 1, 2)
    torch.testing.assert_close(
        (row, mass),
        (torch.tensor([[0.1, 0.2, 0.7]]), torch.tensor([[0.2, 0, 0, 0.1, 0.7]])),
    )
    row, mass = read(weights, relation, QUESTIONS[1], 1, 2)
    torch.testing.assert_close(
        (row, mass),
        (torch.tensor([[0.25, 0.2, 0.3]]), torch.tensor([[0.2, 0, 0, 0.25, 0.3]])),
    )
    # the caption does not count among those that look
    row, mass = read(weights, relation, QUESTIONS[2], 0, 2)
    torch.testing.assert_close(
        (row, mass),
        (
            torch.tensor([[0.3, 0.225, 0.475]]),
            torch.tensor([[0.35, 0.125, 0, 0.05, 0.475]]),
        ),
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer": 0}, "counted 1 to 4"),
        ({"layer": 10**9}, "counted 1 to 4"),
        ({"head": 3}, "counted 1 to 2"),
        ({"head": "first"}, "mean is the mean of all"),
        ({"tokens": []}, "0 tokens are chosen; click"),
        ({"tokens": [1, 2]}, "2 tokens"),
        ({"tokens": [16]}, "token 16"),
        ({"tokens": [-1]}, "token -1"),
        ({"sample": 4}, "sample is 4"),
        ({"sample": -1}, "sample is -1"),
        ({"t": 1.5}, "t is 1.5"),
        ({"s": float("nan")}, "s is nan"),
        ({"mask_ratio": 0.9}, "mask_ratio"),
        ({"question": "up"}, "question"),
        ({"network": "teachers"}, "EMA teacher"),
        ({"frame": 2}, "counted 1 to 1"),
        ({"frame": 0}, "counted 1 to 1"),
    ],
)
def test_bad_input_is_refused(watched, change, words):
    with pytest.raises(ValueError, match=words):
        draw(compute(watched, {**VALUES, **change}))


# descriptions


def test_the_description_names_token_target_and_share_on_cleaner_tokens(watched):
    scene = compute(watched, VALUES)
    row = scene.rows[1].mean(0)
    tau = scene.forward.levels.per_token()[0]
    noisy = int(torch.nonzero(tau == tau.max())[0])
    scene = compute(watched, {**VALUES, "tokens": [noisy]})
    row = scene.rows[1].mean(0)
    best = int(row.argmax())
    cleaner = row[tau < tau.max()].sum()
    names = watched.viewed.board.names
    for words in (
        f"layer 2, mean of heads: {names[noisy]} (level 0.90) attends most to "
        f"{names[best]} (level {tau[best]:.2f})",
        f"{16 * row.max():.1f} times",
        f"{cleaner:.0%} of the attention goes to cleaner tokens, uniform: 25%",
    ):
        assert words in describe(scene)
    assert "no token is cleaner" in describe(compute(watched, {**VALUES, "s": 0.9}))
    assert "comes from cleaner" in describe(
        compute(watched, {**VALUES, "tokens": [noisy], "question": QUESTIONS[1]})
    )
    assert "all tokens, on average, attend most to" in describe(
        compute(watched, {**VALUES, "question": QUESTIONS[2]})
    )


# images


@pytest.mark.parametrize(
    "config",
    [
        DataConfig("digits"),
        DataConfig("motion", size=16, frames=8),
        DataConfig("notes"),
        DataConfig("scenes", size=16, frames=8),
    ],
    ids=lambda c: c.name,
)
def test_a_window_shows_the_tokens_of_its_moment(config):
    sources = Sources(config, "validation")
    layout = sources.layouts[config.name]
    tokens = sources.take(config.name, torch.arange(1)).x0[0]
    frame = frames_in(layout) - 1
    window = Window(layout, frame)
    board = Board(layout)
    visible = set(window.owner.ravel())
    if config.name in ("digits", "notes"):
        assert frame == 0
        assert np.array_equal(window.owner, board.owner)
        assert np.array_equal(window.pixels(tokens), board.pixels(tokens))
    else:
        video = [part for part in layout.parts if part.name == "video"][0]
        last = set(
            range(video.tokens * (video.grid[0] - 1) // video.grid[0], video.tokens)
        )
        assert visible == last | set(range(video.tokens, len(tokens)))
    for token in (0, len(tokens) - 1):
        changed = tokens.clone()
        changed[token] = 1 - changed[token].abs()
        differs = (window.pixels(changed) != window.pixels(tokens)).any(-1)
        assert differs.any() == (token in visible)
        assert (window.owner[differs] == token).all()


def test_an_overlay_is_brightest_where_attention_is_highest(watched):
    board = watched.viewed.board
    x0 = torch.zeros_like(watched.viewed.x0[0])
    times = torch.zeros(16)
    times[3] = 4.0
    drawn = laid_over(board, x0, times).astype(int).sum(-1)
    assert drawn[board.owner == 3].min() > drawn[board.owner != 3].max()
    times[7] = torch.nan
    drawn = laid_over(board, x0, times)
    # a masked token is grey
    assert (np.ptp(drawn[board.owner == 7], axis=-1) == 0).all()


def test_images_depend_only_on_what_they_show(watched):
    scene = compute(watched, VALUES)
    before = draw(scene)
    after = draw(compute(watched, {**VALUES, "head": 1}))
    assert {name for name in before if before[name] != after[name]} == {
        "tokens",
        "layers",
        "inputs",
        "heads",
    }
    assert draw(scene) == before
    assert all(
        draw(scene, DARK)[name] != before[name]
        for name in ("layers", "inputs", "heads")
    )
    received = draw_layers(compute(watched, {**VALUES, "question": QUESTIONS[1]}))
    assert received.size == draw_layers(scene).size
    assert received.tobytes() != draw_layers(scene).tobytes()


# other kinds of runs


def test_captions_are_shown_and_long_ones_are_truncated(more):
    watched = Watched(ViewedRun(more["texts"], count=3))
    scene = compute(watched, {**VALUES, "caption": ""})
    assert "caption" in draw(scene)
    assert "the caption (uniform: " in describe(scene)
    stride = watched.config.caption_stride
    n = watched.viewed.tokens
    pieces = pieces_of(scene.forward, stride, len(scene.even) - n)
    assert "".join(pieces).startswith("a ")
    assert len(pieces) == watched.config.caption // stride
    torch.testing.assert_close(scene.masses[..., 4], scene.rows[..., n:].sum(-1))
    long_caption = "a red star " * 909 + "?"
    truncated = compute(watched, {**VALUES, "caption": long_caption})
    assert not torch.equal(truncated.rows, scene.rows)
    assert "10,000 characters, of which this is read" in describe(truncated)
    assert draw_caption(truncated).tobytes() != draw_caption(scene).tobytes()
    assert pieces_of(SimpleNamespace(text=None), 4, 3) == ["1", "2", "3"]


def test_a_token_of_either_part_is_shown_on_both(more):
    watched = Watched(ViewedRun(more["scenes"], count=2))
    clip = watched.slices["audio"].start
    descriptions = {
        token: describe(
            scene := compute(watched, {**VALUES, "tokens": [token], "frame": 3})
        )
        for token in (0, clip)
    }
    assert "video, moment 1" in descriptions[0]
    assert "audio, moment 1" in descriptions[clip]
    assert "goes to audio" in descriptions[0]
    pictures = draw(scene)
    assert pictures["audio"][:4] == b"RIFF"
    first_moment = draw(compute(watched, {**VALUES, "tokens": [clip], "frame": 1}))
    # the board has all moments
    assert first_moment["inputs"] != pictures["inputs"]
    assert first_moment["tokens"] == pictures["tokens"]


def test_the_player_continues_when_the_layer_changes(more):
    explorer = explore_attention(more["audio"], count=2, layer=1)
    heard = []
    explorer.pictures["audio"].observe(
        lambda change: heard.append(change["new"]), "value"
    )
    explorer.controls["layer"].value = 3
    explorer.settle()
    assert not heard
    assert "<audio" in explorer.pictures["audio"].value
    explorer.controls["sample"].value = 1
    explorer.settle()
    assert len(heard) == 1
    assert explorer.strip(width=660).image.width == 660


# the explorer


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_panel_shows_what_the_pure_functions_draw(runs):
    explorer = explore_attention(runs["tiny"], count=4, sample=1)
    for name, value in {
        "tokens": [7],
        "layer": 3,
        "head": 2,
        "t": 0.6,
        "s": 0.5,
        "question": QUESTIONS[1],
        "network": "student",
        "separated": True,
        "mask_ratio": 0.4,
        "seed": 8,
    }.items():
        explorer.controls[name].value = value
    explorer.settle()
    wanted = draw(compute(explorer.data.watched, {"frame": 1, **explorer.values()}))
    assert {
        name: bytes(explorer.pictures[name].value)
        for name in wanted
        if name != "tokens"
    } == {name: png for name, png in wanted.items() if name != "tokens"}
    assert bytes(explorer.controls["tokens"].picture) == wanted["tokens"]


def test_the_first_token_has_cleaner_ones(runs):
    scene = explore_attention(runs["tiny"], count=1).data
    assert scene.even_masses[1] > 0
    assert scene.forward.levels.per_token()[0, scene.token] == pytest.approx(0.8)


def test_clicking_a_token_selects_it(runs):
    explorer = explore_attention(runs["tiny"], count=2, question=QUESTIONS[2])
    explorer.controls["tokens"].value = [3]
    explorer.settle()
    assert explorer.controls["question"].value == QUESTIONS[0]
    assert explorer.data.token == 3
    explorer.controls["question"].value = QUESTIONS[1]
    explorer.controls["tokens"].value = [4]
    explorer.settle()
    assert explorer.controls["question"].value == QUESTIONS[1]
    assert explorer.data.token == 4


def test_errors_are_shown_and_the_panel_recovers(runs):
    explorer = explore_attention(runs["vanilla"], count=2)
    explorer.controls["tokens"].value = []
    explorer.settle()
    assert 'role="alert"' in explorer.message.value
    assert "click the one" in explorer.message.value
    explorer.controls["tokens"].value = [2]
    explorer.settle()
    assert 'role="status"' in explorer.message.value
    with pytest.raises(ValueError, match="control"):
        explore_attention(runs["vanilla"], count=2, depth=3)


def test_unusable_runs_are_reported_in_the_panel(runs, tmp_path):
    shutil.copytree(runs["tiny"].path, tmp_path / "written")
    # has begun, and has no checkpoint yet
    shutil.rmtree(tmp_path / "written/checkpoints")
    shutil.copytree(runs["tiny"].path, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    # a model of images, a config of audio
    config["config"]["data"] |= {"name": "notes"}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    for name, words in (
        ("", "holds no run"),
        ("absent", "holds no run"),
        ("written", "no intact checkpoint"),
        ("other", ""),
    ):
        explorer = explore_attention(tmp_path / name)
        assert (
            'role="alert"' in explorer.message.value
            and words in explorer.message.value
            and explorer.box.children
        ), name
    assert "data set" in explore_attention(runs["tiny"], data="motion").message.value
    assert explore_attention(str(runs["tiny"].path), count=2).pictures
    assert Run.open(runs["tiny"].path).path.exists()


def test_a_forward_knows_its_sizes(watched):
    scene = compute(watched, VALUES)
    assert isinstance(scene.forward, Forward)
    assert scene.rows.shape == (4, 2, 16)
    assert scene.masses.shape == (4, 2, 5)
    copy = replace(scene, values={**VALUES, "head": 2})
    torch.testing.assert_close(copy.relative[0], copy.relative[2])
