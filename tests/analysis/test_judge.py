"""Judges and plain measurements read the factors of samples correctly, and their
verdicts equal loops.
"""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from selfflow.analysis import judge as module
from selfflow.analysis.factors import (
    CLASS,
    HEADS,
    Reader,
    courses,
    covered,
    directions_seen,
    known,
    pitch_errors,
    unrolled,
)
from selfflow.analysis.judge import (
    bounce_verdict,
    compared,
    followed,
    judge_for,
    on_samples,
    train_judge_for,
)
from selfflow.data.datasets import subset
from selfflow.data.options import DataConfig
from selfflow.data.scenes import Scenes, sound_on_bounce
from selfflow.data.shapes import KINDS, SYMMETRY, Shapes, draw_figures
from selfflow.data.sources import load
from selfflow.draws import keyed
from selfflow.shipped import shipped
from selfflow.training.config import Config

NAMES = tuple(HEADS)
LEAST = {  # accuracy on test samples, where it is below 0.97
    ("shapes", "place"): 0.95,  # thirds of 5.3 pixels
    ("emblems", "place"): 0.92,  # thirds of 2.7 pixels
    ("fashion", "class"): 0.88,  # a shirt looks like a coat
}
NETWORKS = tuple(name for name in HEADS if name != "digits")


def samples_of(name, count=96, split="test"):
    return load(name, split).take(torch.arange(count))


@pytest.fixture(scope="module")
def judges():
    return {name: judge_for(name) for name in NAMES}


@pytest.fixture(scope="module")
def examples():
    return {name: samples_of(name) for name in NAMES}


# factors


@pytest.mark.parametrize("name", NETWORKS)
def test_known_factors_are_those_the_captions_name(name, examples):
    words = {
        factor: names
        for heads in HEADS[name].values()
        for factor, names in heads.items()
    }
    factors = known(name, examples[name])
    assert list(factors) == list(words)
    assert set(CLASS[name]) <= set(factors)
    for index, caption in enumerate(examples[name].captions):
        described = {
            factor: words[factor][values[index]] for factor, values in factors.items()
        }
        assert all(word in caption for word in described.values()), caption
        if name in ("shapes", "emblems"):
            figure = f"{described['colour']} {described['kind']}"
            assert f" {figure} on a {described['ground']} " in caption
            assert caption.endswith(f" ground, {described['place']}")
        if name == "motion":
            assert f"a {described['colour']} " in caption
            assert described["direction"] == " ".join(caption.split(",")[0].split()[4:])


def test_unknown_data_sets_have_no_judge():
    for call in (
        partial(judge_for, "folder"),
        partial(known, "folder", None),
        partial(train_judge_for, "folder"),
    ):
        known_names = "digits, fashion, shapes, emblems, motion, notes, scenes"
        with pytest.raises(
            ValueError,
            match=f"unknown data set with a judge 'folder'; known are {known_names}",
        ):
            call()


# views


@pytest.mark.parametrize("colour, ground", [(0, 2), (5, 6), (7, 1), (2, 4)])
def test_the_cover_of_a_plain_image_is_its_figure(colour, ground):
    kinds = torch.arange(8)
    images = draw_figures(kinds, colour, ground, size=48)
    under, over = (
        draw_figures(0, c, g, size=48)[0, :, *place]
        for c, g, place in ((0, ground, (0, 0)), (colour, 0, (24, 24)))
    )
    # p - g = m (c - g), by least squares
    points = (images - under[:, None, None]).permute(1, 0, 2, 3).reshape(3, -1).numpy()
    expected = np.linalg.lstsq((over - under).numpy()[:, None], points, rcond=None)[
        0
    ].reshape(8, 48, 48)
    np.testing.assert_allclose(covered(images)[:, 0], expected, atol=0.05)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 3), st.floats(-1, 1), st.integers(0, 900))
def test_a_cover_ignores_brightness_and_contrast_and_treats_a_still_video_alike(
    factor, offset, index
):
    image = Shapes("test").take(torch.tensor([index])).signals["image"]
    cover = covered(image)
    assert cover.shape == (1, 1, 32, 32)
    assert 0 <= cover.min()
    assert cover.max() <= 1
    torch.testing.assert_close(
        covered(image * factor + offset), cover, atol=2e-3, rtol=0
    )
    torch.testing.assert_close(
        covered(image[:, :, None].expand(1, 3, 5, 32, 32)),
        cover[:, :, None].expand(1, 1, 5, 32, 32),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_turning_a_figure_shifts_its_polar_form_and_moving_it_does_not(kind):
    turns = torch.arange(4) * math.pi / 2
    forms = unrolled(
        covered(
            draw_figures(
                kind,
                0,
                7,
                scale=0.4,
                x=torch.tensor([0.5, 0.4, 0.5, 0.55]),
                y=torch.tensor([0.5, 0.55, 0.45, 0.5]),
                angle=turns,
                size=80,
            )
        )
    )
    assert forms.shape == (4, 1, 16, 32)
    # anticlockwise on the screen, where rows run down, is towards smaller angles
    for k in range(1, 4):
        assert (forms[k] - forms[0].roll(-8 * k, -1)).abs().mean() < 0.02
    if SYMMETRY[kind] in (1, 3, 5):
        assert (forms[1] - forms[0]).abs().mean() > 0.02, "without the shift it differs"


def test_courses_are_projections_of_the_cover_on_both_axes():
    video = torch.zeros(1, 1, 8, 32, 32)
    video[0, 0, 2, 5:9, 20:22] = 1  # 4 rows of 2 columns, in one frame
    course = courses(video)
    assert course.shape == (1, 2, 8, 32)
    assert course[:, :, [0, 1, 3, 4, 5, 6, 7]].eq(0).all()
    assert course[0, 0, 2].nonzero().flatten().tolist() == [20, 21]
    assert course[0, 0, 2, 20] == 0.5
    assert course[0, 1, 2].nonzero().flatten().tolist() == [5, 6, 7, 8]
    assert course[0, 1, 2, 5] == 0.25
    assert courses(torch.zeros(2, 1, 8, 16, 16)).eq(0).all()


# plain measures


@pytest.mark.parametrize("midi", [60, 66.3, 71.8, 83])
def test_the_pitch_error_of_a_sine_is_in_semitones(midi):
    hz = 440 * 2 ** ((midi - 69) / 12)
    wave = torch.sin(2 * math.pi * hz * torch.arange(8192, dtype=torch.float64) / 8000)[
        None
    ].float()
    assert pitch_errors(wave, 8000, round(midi)).item() == pytest.approx(
        midi - round(midi), abs=0.03
    )
    bad = torch.cat([wave, torch.zeros_like(wave), wave * math.nan])
    assert pitch_errors(bad, 8000, torch.full((3,), 60)).isnan().tolist() == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("direction", range(8))
@pytest.mark.parametrize("start, late", [((0.5, 0.5), 0), ((0.05, 0.93), 3)])
def test_the_direction_of_a_moving_square_is_recognised(direction, start, late):
    "A square drawn by loops, wrapping at the edges; the first frames may be empty."
    angle = direction * math.pi / 4
    video = np.full((1, 3, 16, 32, 32), -0.5, np.float32)
    for frame in range(late, 16):
        x = (start[0] + 0.04 * frame * math.cos(angle)) * 32
        y = (start[1] - 0.04 * frame * math.sin(angle)) * 32
        for row in range(round(y) - 3, round(y) + 3):
            for column in range(round(x) - 3, round(x) + 3):
                video[0, :, frame, row % 32, column % 32] = (0.9, 0.1, 0.3)
    assert directions_seen(torch.tensor(video)).tolist() == [direction]


def test_a_still_video_has_no_direction_and_other_shapes_are_refused():
    still = torch.full((3, 3, 16, 32, 32), -0.5)
    still[1, :, :, 10:16, 10:16] = 0.7
    still[2] = math.nan
    assert directions_seen(still).tolist() == [-1, -1, -1]
    for shape in ((2, 3, 7, 32, 32), (2, 1, 16, 32, 32), (3, 16, 32, 32)):
        with pytest.raises(ValueError, match="8 frames or more"):
            directions_seen(torch.zeros(shape))


def test_plain_measures_are_right_for_nearly_all_test_samples(examples):
    errors = pitch_errors(
        examples["notes"].signals["audio"], 8000, examples["notes"].factors["pitch"]
    )
    assert (errors.abs() < 0.5).float().mean() > 0.97
    assert (
        directions_seen(examples["motion"].signals["video"])
        == examples["motion"].labels
    ).float().mean() > 0.97


# verdicts


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 1000))
def test_chance_is_the_mean_over_all_other_requests(count, classes, seed):
    generator = keyed(seed, "test")
    answers, wanted = (
        {
            name: torch.randint(classes, (count,), generator=generator)
            for name in ("a", "b")
        }
        for _ in range(2)
    )
    verdict = compared(answers, wanted, {"a": 0.9}, rolls=count)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    hits = {
        name: [int(answers[name][i] == wanted[name][j]) for i, j in pairs]
        for name in answers
    }
    hits["all"] = [a * b for a, b in zip(hits["a"], hits["b"], strict=True)]
    for name, matches in hits.items():
        assert verdict.chance[name] == pytest.approx(
            sum(matches) / len(pairs), abs=1e-6
        )
    direct = [[answers[n][i] == wanted[n][i] for n in "ab"] for i in range(count)]
    assert verdict.right["all"].tolist() == [all(row) for row in direct]
    assert verdict.shares["a"].value == pytest.approx(
        sum(row[0].item() for row in direct) / count
    )


def test_a_verdict_reports_shares_chance_and_accuracy():
    verdict = compared(
        {"kind": torch.tensor([0, 1, 2, 3])},
        {"kind": torch.tensor([0, 1, 2, 0])},
        {"kind": 0.98, "all": 0.97},
    )
    assert "right in 75.0%" in str(verdict)
    assert "of real ones 97.0%" in str(verdict)
    assert "n = 4" in str(verdict)
    table = verdict.table()
    assert table["factor"].tolist() == ["kind", "all"]
    assert table["of real ones"].tolist() == ["98.0%", "97.0%"]
    assert "<table" in verdict._repr_html_()
    assert str(verdict) in verdict._repr_html_()
    # chance needs a second request
    single = compared({"a": torch.tensor([1])}, {"a": torch.tensor([1])}, {})
    assert (
        json.loads(json.dumps(single.to_dict(), allow_nan=False))["factors"]["a"][
            "chance"
        ]
        is None
    )


def test_the_share_of_sounds_on_bounces_and_its_chance_equal_loops():
    clips = Scenes("validation").take(torch.arange(12)).signals
    waves = clips["audio"].clone()
    waves[:3] = waves[:3].roll(1, 0)
    verdict = bounce_verdict(clips["video"], waves, rolls=11)
    hits, heard, seen = sound_on_bounce(clips["video"], waves, 15.625, 8000)
    assert torch.equal(verdict.right["sound on bounce"], hits)
    assert not hits[:3].all()
    assert hits[3:].all()
    shifted = [
        sound_on_bounce(clips["video"], waves[torch.arange(12) - d], 15.625, 8000)[0]
        .float()
        .mean()
        for d in range(1, 12)
    ]
    assert verdict.chance["sound on bounce"] == pytest.approx(float(sum(shifted)) / 11)
    assert verdict.recipe == {
        "tolerance": 1.0,
        "bounces heard": heard.mean().item(),
        "sounds seen": seen.mean().item(),
    }


# judges


@pytest.mark.parametrize("name", NETWORKS)
def test_shipped_judges_fit_the_data_and_are_accurate(name, judges, examples):
    judge = judges[name]
    path = shipped(f"judges/{name}.safetensors")
    assert path.exists()
    assert path.stat().st_size < 400_000
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["judge"])
        assert {file.get_tensor(key).dtype for key in file.keys()} <= {
            torch.float16,
            torch.int64,
            torch.uint8,
        }
    assert metadata["data"] == load(name).fingerprint, (
        "the data changed: train and ship another judge"
    )
    assert metadata["accuracy"] == judge.accuracy
    assert judge.correct.shape == (
        1000,
        len(judge.names),
    )
    test = load(name, "test")
    measured = test.take(subset(test, len(judge.correct))[:96])
    right = known(name, measured)
    read = judge.read(measured.signals)
    for column, (factor, words) in enumerate(judge.names.items()):
        least = LEAST.get((name, factor), 0.97)
        assert judge.accuracy[factor] >= least
        correct = read[factor] == right[factor]
        assert (correct != judge.correct[:96, column].bool()).sum() <= 1, (
            "the stored measurement is reproducible"
        )
        assert read[factor].dtype == torch.int64
        assert 0 <= read[factor].min()
        assert read[factor].max() < len(words)


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_read_independently_and_only_if_finite(name, judges, examples):
    signals = {
        signal: values[:5].clone() for signal, values in examples[name].signals.items()
    }
    before = judges[name].read(signals)
    alone = judges[name].read(
        {signal: values[3:4] for signal, values in signals.items()}
    )
    for values in signals.values():
        values[1].view(-1)[7] = math.nan
    after = judges[name].read(signals)
    for factor in before:
        assert after[factor][1] == -1
        assert alone[factor] == before[factor][3] == after[factor][3]


def test_only_present_signals_are_read_and_wrong_shapes_are_refused(judges, examples):
    scenes = examples["scenes"].signals
    assert list(judges["scenes"].read({"audio": scenes["audio"]})) == ["material_heard"]
    for name, signals, words in (
        ("scenes", {}, "reads audio and video, but the signals are none"),
        ("shapes", {"video": scenes["video"]}, "judge of shapes reads image"),
        (
            "shapes",
            {"image": torch.zeros(2, 1, 8, 9)},
            r"image has shape \(2, 1, 8, 9\), expected \(b, 3, h, w\)",
        ),
        ("motion", {"video": torch.zeros(2, 3, 32, 32)}, r"expected \(b, 3, f, h, w\)"),
        (
            "notes",
            {"audio": torch.zeros(0, 8192)},
            r"expected \(b, samples\), not empty",
        ),
        (
            "digits",
            {"image": torch.zeros(2, 1, 8, 9)},
            r"expected \(b, 1, 8, 8\), not empty",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            judges[name].read(signals)


def test_the_judge_of_digits_is_chosen_on_validation_without_test_images(
    monkeypatch, examples
):
    fitted = []

    class Fixed:
        support_vectors_ = np.zeros((1, 64))

        def __init__(self, C, gamma):
            self.strength = C

        def fit(self, images, labels):
            fitted.append(images)
            return self

        def score(self, images, labels):
            np.testing.assert_array_equal(
                images, load("digits", "validation").images.flatten(1)
            )
            return {1.0: 0.5, 10.0: 0.9, 100.0: 0.7}[self.strength]

        def predict(self, images):
            return np.full(len(images), int(self.strength))

    with monkeypatch.context() as patched:
        patched.setattr(module, "SVC", Fixed)
        chosen = train_judge_for("digits")
    assert chosen.read(examples["digits"].signals)["digit"].eq(10).all()
    assert all(
        np.array_equal(images, load("digits", "train").images.flatten(1))
        for images in fitted
    )
    assert len(fitted) == 3


def test_digits_are_recognised_and_wrong_labels_are_not_confirmed(judges):
    judge = judges["digits"]
    test = load("digits", "test")
    assert judge.own(["digit"]).value > 0.97
    assert "n = 360" in str(judge.own(["digit"]))
    for shift, least, most in ((0, 0.97, 1), (1, 0, 0.03)):
        verdict = followed(
            judge, {"image": test.images}, {"digit": (test.labels + shift) % 10}
        )
        assert least <= verdict.shares["digit"].value <= most
        assert torch.equal(verdict.right["digit"], verdict.right["all"])
    assert judge.fingerprint == judge_for("digits").fingerprint


def test_requested_factors_are_checked(judges, examples):
    judge = judges["shapes"]
    images = examples["shapes"].signals
    wanted = known("shapes", examples["shapes"])
    verdict = followed(
        judge, images, {"kind": wanted["kind"], "colour": wanted["colour"]}
    )
    assert set(verdict.right) == {"kind", "colour", "all"}
    assert verdict.own["kind"] == judge.accuracy["kind"]
    kind_and_colour = judge.correct[:, [0, 1]].all(1).float().mean().item()
    assert verdict.own["all"] == pytest.approx(kind_and_colour)
    for request, words in (
        ({}, "asked for nothing"),
        ({"size": wanted["kind"]}, "asked for size, but .* reads kind"),
        ({"kind": wanted["kind"][:3]}, r"kind has shape \(3,\)"),
        ({"kind": wanted["kind"].float()}, "float32"),
    ):
        with pytest.raises(ValueError, match=words):
            followed(judge, images, request)


def test_training_a_judge_is_repeatable_and_leaves_the_global_random_state(tmp_path):
    state = torch.get_rng_state()
    first = train_judge_for("shapes", steps=2, batch=8, tests=40)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = train_judge_for("shapes", steps=2, batch=8, tests=40)
    assert first.fingerprint == second.fingerprint
    assert first.correct.shape == (40, 4)
    first.save(tmp_path / "deep/x.safetensors")
    loaded = module._load(tmp_path / "deep/x.safetensors", "shapes", Shapes())
    assert loaded.fingerprint == first.fingerprint
    assert loaded.accuracy == first.accuracy


@pytest.mark.parametrize("view", [view for name in NETWORKS for view in HEADS[name]])
@pytest.mark.parametrize("size, frames", [(16, 8), (48, 24)])
def test_samples_of_any_size_are_read(view, size, frames):
    heads = next(heads[view] for heads in HEADS.values() if view in heads)
    shapes = {
        "image": (2, 1 if view == "grey" else 3, size, size),
        "video": (2, 3, frames, size, size),
        "audio": (2, 512 * frames),
    }
    reader = Reader(view, heads, 8000).eval()
    values = torch.rand(shapes[reader.signal], generator=keyed(0, view))
    answers = reader.read(values)
    assert {factor: values.shape for factor, values in answers.items()} == (
        dict.fromkeys(heads, (2,))
    )


def test_a_judge_of_another_size_is_trained_once_and_bad_files_are_reported(
    tmp_path, monkeypatch, capsys
):
    quick = partial(train_judge_for, steps=1, batch=4, tests=8)
    calls = []
    monkeypatch.setattr(
        module, "train_judge_for", lambda *args: calls.append(args) or quick(*args)
    )
    data = DataConfig("shapes", size=16)
    first = judge_for("shapes", data, tmp_path)
    (file,) = tmp_path.iterdir()
    assert len(calls) == 1
    assert judge_for("shapes", data, tmp_path).fingerprint == first.fingerprint
    assert len(calls) == 1
    (message,) = capsys.readouterr().out.splitlines()
    assert message == (
        "Training a judge of shapes (800 steps, a minute or two on a CPU), because the "
        "one that comes with the project is for other sizes. It will be stored in "
        f"{file}."
    )
    data_of_file = file.read_bytes()
    for damaged in (
        data_of_file[:-100],
        b"",
        b"{}" * 40,
        save({"x": torch.zeros(2)}),
        data_of_file.replace(b"correct", b"corrupt"),
    ):
        file.write_bytes(damaged)
        assert judge_for("shapes", data, tmp_path).fingerprint == first.fingerprint
        assert file.read_bytes() == data_of_file
        assert f"{file.name} is not used: it cannot be read" in capsys.readouterr().out
    stale = tmp_path / "ship/shapes.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(data_of_file)  # of other data
    monkeypatch.setattr(module, "shipped", lambda name: stale)
    assert judge_for("shapes", None, tmp_path).data == Shapes().fingerprint
    assert len(calls) == 7
    refused, trained = capsys.readouterr().out.splitlines()
    assert (
        f"data {first.data} is not {Shapes().fingerprint}; another judge of shapes"
        in refused
    )
    assert f"because {stale} cannot be used" in trained


@pytest.mark.parametrize(
    "name, condition, factors",
    [
        ("shapes", "caption", {"kind", "colour", "ground", "place", "all"}),
        ("shapes", "class", {"kind", "all"}),
        ("motion", "class", {"direction", "all", "direction, tracked"}),
        ("notes", "class", {"pitch", "all", "pitch, measured"}),
        ("motion", "caption", {"direction", "colour", "all", "direction, tracked"}),
        ("notes", "caption", {"pitch", "timbre", "all", "pitch, measured"}),
        (
            "scenes",
            "class",
            {"material_seen", "material_heard", "all", "sound on bounce"},
        ),
    ],
)
def test_samples_of_a_run_are_judged_against_their_conditions(
    tmp_path, name, condition, factors
):
    "The run is a stand-in that draws what is requested, but not for the last two."
    source = load(name, "test")
    requested = {}

    def draw(conditions, **options):
        requested.update(conditions=conditions, options=options)
        index = torch.arange(12)
        signals = source.take(torch.where(index < 10, index, 700 + index)).signals
        return signals

    run = SimpleNamespace(
        records=tmp_path,
        sample=draw,
        state=lambda: {"step": 7},
        shift=3.0,
        config=Config(
            data=DataConfig(
                name, patch=2 if name == "notes" else 8, condition=condition
            )
        ),
    )
    verdict = on_samples(run, count=12, steps=3, cfg_scale=1.5, seed=4)
    examples = source.take(torch.arange(12))
    assert list(requested["conditions"]) == list(
        examples.captions if condition == "caption" else examples.labels
    )
    assert requested["options"] == {
        "steps": 3,
        "cfg_scale": 1.5,
        "seed": 4,
        "shift": 3.0,
        "data": name,
    }
    assert set(verdict.right) == factors
    for factor, right in verdict.right.items():
        assert right[:10].float().mean() >= (
            0.9 if factor in ("place", "all") else 1
        ), factor
        assert factor in ("place", "all") or verdict.own[factor] > 0.97
    assert not verdict.right["all"][10:].all()
    written = json.loads((tmp_path / "judged.json").read_text())
    assert written == verdict.to_dict()
    assert set(written["factors"]) == factors
    recipe = {
        "data": name,
        "count": 12,
        "steps": 3,
        "shift": 3.0,
        "cfg_scale": 1.5,
        "seed": 4,
        "step": 7,
        "judge": judge_for(name).fingerprint,
    }
    assert written["recipe"].items() >= recipe.items()


def test_a_run_without_conditions_is_not_judged(tmp_path):
    run = SimpleNamespace(
        path=tmp_path, config=Config(data=DataConfig("shapes", condition="none"))
    )
    with pytest.raises(ValueError, match="trained without conditions"):
        on_samples(run)
