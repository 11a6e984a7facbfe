"""Inpainting, paths and the playground agree with references; bad input is refused."""

import io
import json
import shutil
import threading
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from PIL import Image

from selfflow.data.options import DataConfig
from selfflow.draws import keyed
from selfflow.method.flow import interpolate
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.method.sampling import sample, shown, time_grid
from selfflow.registries import register_sampler, samplers, trial
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.workbench.paths import Settings, SideBySide, estimate, path_of
from selfflow.workbench.playground import compute, describe, draw, explore, player

VALUES = {
    "condition": 3,
    "steps": 3,
    "method": "euler",
    "shift": 1.0,
    "cfg_scale": 1.0,
    "seed": 0,
    "count": 2,
    "progress": 50,
    "sample": 1,
    "given_as": "as trained",
    "level": 0.0,
    "inpaint": False,
    "tokens": [],
}


@pytest.fixture(scope="module")
def side(runs):
    return SideBySide(runs)


# inpainting


def curl(x, t):
    "A velocity that couples all tokens and depends on the levels."
    t = t[..., None] if t.ndim else t
    return torch.tanh(x + x.mean(1, keepdim=True) - t) + 0.3 * t


def drawn(name, *shape):
    return torch.randn(*shape, generator=keyed(0, name), dtype=torch.float64)


METHODS_HERE = [method for method in samplers if method != "dopri5"]


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("level", [0.0, 0.2, None])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_given_tokens_return_and_none_given_is_plain_sampling(method, level, shift):
    x1 = drawn("x1", 3, 5, 2)
    x0 = drawn("x0", 3, 5, 2)
    noise = drawn("noise", 3, 3, 5, 2)
    known = torch.tensor(
        [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool
    )
    options = {"steps": 4, "method": method, "shift": shift, "noise": noise}
    states = sample(
        curl,
        x1,
        x0=x0,
        start=(~known).double(),
        kept_level=level,
        trajectory=True,
        **options,
    )
    assert torch.equal(states[:, known], x0[known].expand(5, -1, -1))
    assert not torch.isclose(states[-1], x0)[~known].all(-1).any()
    assert torch.equal(states[0][~known], x1[~known])
    torch.testing.assert_close(states[-1, 1], sample(curl, x1, **options)[1])
    # v is not asked for
    assert torch.equal(
        sample(None, x1, x0=x0, start=torch.zeros(5), kept_level=level, **options), x0
    )


@pytest.mark.parametrize("level", [0.0, 0.2, None])
def test_the_model_gets_tokens_at_the_right_levels(level):
    x1 = drawn("x1", 2, 4, 3)
    x0 = drawn("x0", 2, 4, 3)
    known = torch.tensor([True, False, True, False])
    calls = []

    def spy(x, t):
        calls.append((x, t))
        return curl(x, t)

    states = sample(
        spy, x1, 4, x0=x0, start=(~known).double(), kept_level=level, trajectory=True
    )
    for (x, t), clock, state in zip(calls, time_grid(4)[:-1], states[:-1], strict=True):
        a = clock.item() if level is None else level
        assert t.shape == (2, 4)
        assert t[:, 0].tolist() == pytest.approx([a, a])
        assert (t[:, 1] == clock).all()
        torch.testing.assert_close(
            x[:, known], interpolate(x0, x1, a)[:, known], atol=1e-6, rtol=1e-6
        )
        assert torch.equal(x[:, ~known], state[:, ~known])


# paths


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"method": "sde"},
        {"method": "heun", "cfg_scale": 3.0},
        {"shift": 4.0, "steps": 1},
        {"method": "sde", "options": (("last", 0.2),)},
    ],
)
def test_a_path_ends_at_what_run_sample_draws(side, asked):
    settings = Settings(condition=5, count=3, seed=7, **{"steps": 3, **asked})
    options = {
        name: getattr(settings, name)
        for name in ("steps", "method", "shift", "cfg_scale", "seed")
    }
    options |= settings.options
    for name, run in side.runs.items():
        path = path_of(side, name, settings)
        assert path.states.shape == (
            settings.steps + 1,
            3,
            side.tokens,
            4,
        )
        assert path.evaluations == (
            settings.steps * (2 if settings.method == "heun" else 1)
        )
        assert torch.equal(
            side.layout.unpatchify(path.states[-1])["image"],
            run.sample(torch.full((3,), 5), **options)["image"],
        )
        looks = estimate(side, name, settings, [0, settings.steps], sample=2)
        assert torch.equal(looks[-1], path.states[-1, 2])
        assert not torch.equal(looks[0], path.states[0, 2])
    first, second = (path_of(side, name, settings) for name in side.runs)
    assert torch.equal(first.states[0], second.states[0])
    assert not torch.equal(first.states[-1], second.states[-1])
    assert path_of(side, name, settings) is second  # remembered


def test_an_estimate_is_one_euler_step_to_the_data(side):
    settings = Settings(steps=1, condition=None, count=1)
    path = path_of(side, "vanilla", settings)
    torch.testing.assert_close(
        estimate(side, "vanilla", settings, [0])[0], path.states[-1, 0]
    )


@pytest.mark.parametrize(
    "given_as, clean",
    [
        ("as trained", (True, False)),
        ("clean", (True, True)),
        ("noised along", (False, False)),
    ],
)
def test_given_tokens_are_shown_as_in_training_or_as_requested(side, given_as, clean):
    settings = Settings(
        steps=3, count=2, sample=2, redrawn=(0, 5), given_as=given_as, method="sde"
    )
    kept_tokens = [token for token in range(side.tokens) if token not in (0, 5)]
    for name, wanted in zip(("tiny", "vanilla"), clean, strict=True):
        path = path_of(side, name, settings)
        assert path.shown_clean is wanted
        assert torch.equal(
            path.states[-1][:, kept_tokens], side.x0[2, kept_tokens].expand(2, -1, -1)
        )
        looks = estimate(side, name, settings, [0, 2], sample=1)
        assert torch.equal(
            looks[:, kept_tokens], side.x0[2, kept_tokens].expand(2, -1, -1)
        )


def test_unusable_runs_are_left_out_with_the_reason(runs, tmp_path):
    folder = tmp_path / "runs"
    for name, run in runs.items():
        shutil.copytree(run.path, folder / name)
    clips = Config(
        name="audio",
        data=DataConfig("notes"),
        model=ModelConfig(width=16, depth=4, heads=2),
        objective=ObjectiveConfig("flow_matching"),
    )
    # a run whose first checkpoint is still being written
    (folder / "written/checkpoints").mkdir(parents=True)
    shutil.copy(runs["tiny"].path / "config.json", folder / "written")
    (folder / "written/checkpoints/.step-00000004-ab").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text("{")
    other = folder / "zz_other"  # a checkpoint of another modality
    shutil.copytree(runs["vanilla"].path, other)
    stored = json.loads((other / "config.json").read_text())
    stored["config"]["data"]["name"] = clips.data.name
    (other / "config.json").write_text(json.dumps(stored))
    side = SideBySide.of(folder, device="cpu")
    assert set(side.runs) == {"tiny", "vanilla"}
    assert set(side.left_out) == {
        "written",
        "broken",
        "zz_other",
    }
    assert "no intact checkpoint yet" in side.left_out["written"]
    assert "cannot be used" in side.left_out["broken"]
    assert "draws audio" in side.left_out["zz_other"]
    assert "the others image (16 tokens of 4)" in side.left_out["zz_other"]
    words = describe(compute(side, {**VALUES, "runs": ("tiny",)}))
    assert "left out: written (" in words
    assert "zz_other" in words
    with pytest.raises(ValueError, match="written: .*no intact checkpoint yet"):
        SideBySide({"written": Run.open(folder / "written", "cpu")})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10**12}, "steps is 1000000000000"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"shift": 0.0}, "shift is 0"),
        ({"cfg_scale": float("inf")}, "cfg_scale is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1e300}, "seed is 1e"),
        ({"count": 10**9}, "count is"),
        ({"method": "leap"}, "leap"),
        ({"condition": 99}, "99"),
        ({"condition": "a red star"}, "there is no class 'a red star'"),
        ({"sample": 10**6}, "sample is 1000000, but there are"),
        ({"inpaint": True, "tokens": [99]}, "token 99 was painted, but there are 16"),
        ({"progress": 300}, "progress is 300"),
        ({"level": -1.0}, "level is -1"),
        ({"given_as": "?"}, "way to show given tokens"),
        ({"runs": ()}, "0 runs are chosen"),
        ({"runs": ("nobody",)}, "nobody"),
    ],
)
def test_values_out_of_range_are_refused(side, changes, words):
    with pytest.raises(ValueError, match=words):
        compute(side, {**VALUES, **changes})


# the playground


def test_images_and_words_follow_from_the_values_alone(side):
    for changes in (
        {},
        {"progress": 0},
        {"progress": 100, "method": "sde"},
        {"inpaint": True, "tokens": [1, 2]},
        {"steps": 1},
    ):
        values = {**VALUES, **changes}
        scene = compute(side, values)
        pictures = draw(scene)
        assert set(pictures) == {"tokens", "views", "history"}
        assert draw(compute(side, dict(values))) == pictures
        assert (
            Image.open(io.BytesIO(pictures["views"])).width
            == Image.open(io.BytesIO(pictures["history"])).width
            == 1380
        )
        assert scene.index == round(values["progress"] * values["steps"] / 100)
    assert (
        draw(compute(side, VALUES))["views"]
        != draw(compute(side, {**VALUES, "progress": 0}))["views"]
    )
    assert "class 3; 3 steps of euler, 3 evaluations" in describe(compute(side, VALUES))


@pytest.mark.parametrize(
    "tokens, words",
    [
        ([], "no token is painted: all are given"),
        (list(range(16)), "all tokens are painted"),
        (
            [4, 5],
            "2 of 16 tokens are drawn anew, the others given by sample 1: clean at "
            "level 0 (tiny), noised along (vanilla)",
        ),
    ],
)
def test_masks_of_no_token_and_of_all_tokens(side, tokens, words):
    scene = compute(side, {**VALUES, "inpaint": True, "tokens": tokens})
    assert words in describe(scene)
    for path in scene.paths.values():
        same = (path.states[-1] == side.x0[1]).all(-1).all(0)
        assert same.tolist() == [token not in tokens for token in range(16)]
    if len(tokens) == 16:
        plain = compute(side, VALUES)
        assert all(
            torch.equal(scene.paths[name].states, plain.paths[name].states)
            for name in plain.paths
        )


def test_missing_guidance_is_reported(side):
    words = describe(compute(side, {**VALUES, "condition": -1, "cfg_scale": 4.0}))
    assert (
        "without guidance: tiny, vanilla (there is no condition to guide towards)"
        in words
    )
    assert words.startswith("unconditional")


def test_the_widget_shows_what_the_function_draws_and_survives_errors(side):
    explorer = explore(side, steps=3, count=2, sample=1, condition=3)
    controls = explorer.controls
    for name, value in {
        "progress": 40,
        "method": "sde",
        "shift": 2.0,
        "cfg_scale": 3.0,
        "seed": 5,
        "condition": 7,
        "steps": 4,
    }.items():
        controls[name].value = value
        explorer.settle(60)
        pictures = draw(compute(side, explorer.values()))
        assert all(
            bytes(explorer.pictures[name].value) == pictures[name]
            for name in ("views", "history")
        )
    controls["tokens"].value = [3]  # painting turns inpainting on
    explorer.settle(60)
    assert controls["inpaint"].value
    assert "1 of 16 tokens are drawn anew" in explorer.message.value
    assert (
        bytes(controls["tokens"].picture)
        == draw(compute(side, explorer.values()))["tokens"]
    )
    controls["runs"].value = ()
    explorer.settle(60)
    assert 'role="alert"' in explorer.message.value
    assert "choose 1 to 4" in explorer.message.value
    controls["runs"].value = ("vanilla",)
    explorer.settle(60)
    assert 'role="status"' in explorer.message.value
    assert explorer.data.names == ["vanilla"]
    controls["steps"].value = 10**9  # the widget keeps it within its range
    assert controls["steps"].value == 100
    controls["steps"].value = 2
    explorer.settle(60)
    assert explorer.strip({"progress": 0}).image.width == 900


@dataclass(frozen=True)
class KickOptions:
    strength: float = 0.0
    late: bool = False
    direction: Literal["up", "down"] = "up"
    moments: tuple[int, ...] = ()  # no control fits it


def kicked_step(velocity_fn, x, t, t_next, strength, late, direction, moments):
    "An Euler step, with a constant added to the first or the last ones."
    kick = strength if late == bool(t <= 0.5) else 0.0
    sign = 1 if direction == "up" else -1
    return x + (t_next - t) * velocity_fn(x, t) + sign * kick


def test_options_of_a_users_sampler_become_controls(side):
    with trial():
        register_sampler("kicked", kicked_step, options=KickOptions)
        explorer = explore(
            side, steps=2, count=1, method="kicked", options={"kicked": {"late": True}}
        )
        options = explorer.controls["options"]
        strength, late, direction = options.children
        names = [control.description for control in options.children]
        assert names == ["strength", "late", "direction"]
        assert late.value is True
        strength.value = 0.5
        direction.value = "down"
        explorer.settle(60)
        settings = explorer.data.settings
        assert dict(settings.options) == options.value["kicked"]
        assert "kicked (strength 0.5, late True, direction down)" in describe(
            explorer.data
        )
        path = path_of(side, "tiny", settings)
        sampled = side.runs["tiny"].sample(
            torch.tensor([0]), steps=2, method="kicked", **options.value["kicked"]
        )
        drawn = side.layout.unpatchify(path.states[-1])["image"]
        assert torch.equal(drawn, sampled["image"])
        plain = path_of(side, "tiny", Settings(steps=2, count=1, condition=0))
        assert not torch.equal(path.states[-1], plain.states[-1])


def test_only_options_of_the_chosen_sampler_are_shown_and_count(side):
    explorer = explore(side, steps=2, count=1)
    controls = explorer.controls
    assert not controls["options"].children
    assert explorer.data.settings.options == ()
    controls["method"].value = "sde"
    (last,) = controls["options"].children
    last.value = 0.2
    explorer.settle(60)
    path = explorer.data.paths["tiny"]
    assert path.levels.tolist() == pytest.approx([1.0, 0.2, 0.0])
    last.value = 2.0
    explorer.settle(60)
    assert 'role="alert"' in explorer.message.value
    controls["method"].value = "euler"
    explorer.settle(60)
    assert 'role="status"' in explorer.message.value
    with pytest.raises(ValueError, match="unknown option of sde 'frist'"):
        controls["options"].value = {"sde": {"frist": 0.1}}


def test_changes_from_several_threads_end_at_the_last(side):
    explorer = explore(side, steps=2, count=1)

    def move(name, values):
        for value in values:
            explorer.controls[name].value = value

    threads = [
        threading.Thread(target=move, args=pair)
        for pair in (
            ("progress", range(0, 101, 4)),
            ("seed", range(30)),
            ("tokens", [[i] for i in range(16)]),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    explorer.settle(120)
    assert explorer.values()["seed"] == 29
    assert explorer.values()["tokens"] == [15]
    assert (
        bytes(explorer.pictures["views"].value)
        == draw(compute(side, explorer.values()))["views"]
    )


def test_a_folder_without_a_run_is_reported_in_the_panel(tmp_path):
    for folder, words in (
        (tmp_path, "holds no run yet"),
        (tmp_path / "nowhere", "there is no folder"),
    ):
        explorer = explore(folder)
        assert 'role="alert"' in explorer.message.value
        assert words in explorer.message.value
        assert not explorer.pictures


# captions, videos, audio

SMALL = TrainConfig(
    steps=1,
    batch=2,
    shards=1,
    validate_every=1,
    validation=2,
    save_every=1,
    sample_every=0,
)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    "A run of captions, one of videos and one of audio, a step each."
    folder = tmp_path_factory.mktemp("others")
    size = ModelConfig(width=16, depth=4, heads=2)
    data = {
        "shapes": DataConfig("shapes", size=16, patch=4, condition="caption"),
        "motion": DataConfig("motion", size=16, patch=8, frames=8),
        "notes": DataConfig("notes", columns=8),
    }
    runs = {
        name: train(
            Config(name=name, data=each, model=size, training=SMALL),
            folder,
            bar=False,
            device="cpu",
        )
        for name, each in data.items()
    }
    return {name: SideBySide({name: run}, count=2) for name, run in runs.items()}


def test_a_caption_of_ten_thousand_characters_is_truncated_with_a_message(others):
    side = others["shapes"]
    long = "a small red star " * 600
    scene = compute(side, {**VALUES, "condition": long})
    assert (
        f"the caption has {len(long):,} characters, of which this is read: "
        "'a small red star" in describe(scene)
    )
    cut = compute(side, {**VALUES, "condition": scene.read})
    assert torch.equal(cut.paths["shapes"].states, scene.paths["shapes"].states)
    assert len(describe(scene)) < 1000
    assert "unconditional" in describe(compute(side, {**VALUES, "condition": "  \n "}))
    assert "\u2603" in describe(compute(side, {**VALUES, "condition": "\u2603 <b>"}))
    explorer = explore(side, steps=1, count=1)
    assert explorer.controls["condition"].value == side.captions[0]
    assert "runs" not in explorer.controls
    explorer.controls["condition"].value = "<script>" + 10_000 * "x"
    explorer.settle(60)
    assert "the caption has 10,008 characters" in explorer.message.value
    assert "<script>" not in explorer.message.value


def test_videos_move_and_audio_can_be_played(others):
    values = {**VALUES, "steps": 1, "condition": 0}
    video = draw(compute(others["motion"], values))["video"]
    moving = Image.open(io.BytesIO(video))
    assert moving.format == "WEBP"
    assert moving.n_frames == 8
    clip = draw(compute(others["notes"], values))["audio-1"]
    assert clip[:4] == b"RIFF"
    assert clip[8:12] == b"WAVE"
    for name, kind, value in (
        ("motion", "video", video),
        ("notes", "audio-1", player(clip, "notes, sample 1").encode()),
    ):
        explorer = explore(
            others[name], steps=1, count=2, condition=0, progress=50, sample=1
        )
        shown_value = explorer.pictures[kind].value
        assert (
            shown_value.encode() if isinstance(shown_value, str) else bytes(shown_value)
        ) == value
        assert explorer.strip({"progress": 0}).image.width == 900


def test_a_label_of_a_player_is_escaped():
    assert "<b>" not in player(b"RIFF", "<b>")


def test_shown_keeps_the_state_where_nothing_is_given():
    x1 = drawn("x1", 2, 3, 1)
    x0 = drawn("x0", 2, 3, 1)
    x, tau = shown(
        x1, torch.tensor([0.3, 0.9]), x0, x1, torch.zeros(2, 3, dtype=torch.bool)
    )
    assert torch.equal(x, x1)
    assert tau[:, 0].tolist() == pytest.approx([0.3, 0.9])


def test_settings_can_be_a_key():
    assert hash(Settings(redrawn=(1, 2))) == hash(replace(Settings(), redrawn=(1, 2)))
