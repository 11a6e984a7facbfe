"""Sample files contain what was requested."""

import json
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from selfflow.analysis.features import Items
from selfflow.analysis.saturation import saturation
from selfflow.cli import main
from selfflow.data.notes import PITCHES, note_name
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources, class_number
from selfflow.figures.dashboard import draw_sample_history
from selfflow.figures.layers import draw_ladder
from selfflow.method.options import ModelConfig
from selfflow.report.sample_sections import _plane_colours
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.training.samples import to_draw, write_samples

TINY = {
    "model": ModelConfig(width=32, depth=2, heads=2),
    "training": TrainConfig(steps=2, batch=8, validation=4, sample_every=0),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    data = {
        "notes": DataConfig("notes"),
        "motion": DataConfig("motion", size=16, frames=8, patch=8),
        "told": DataConfig("shapes", size=16, patch=8, condition="caption"),
    }
    return {
        name: train(Config(name, data=config, **TINY), folder, "cpu", bar=False)
        for name, config in data.items()
    }


# classes by name


def test_a_class_is_a_name_or_a_number():
    names = ("Ankle boot", "Sneaker", "7", "Bag")
    assert [
        class_number(label, names)
        for label in ("Sneaker", "7", 0, "3", torch.tensor(1))
    ] == [1, 2, 0, 3, 1]
    for wrong, words in (
        ("Snaeker", "there is no class 'Snaeker'; did you mean 'Sneaker'?"),
        ("ankle Boot", "did you mean 'Ankle boot'?"),
        ("xyz", "classes are Ankle boot, Sneaker, 7, Bag"),
        ("-1", "no class -1: labels run from"),
        (10, r"there is no class 10: labels run from 0 to 3 \(Ankle boot"),
    ):
        with pytest.raises(ValueError, match=words):
            class_number(wrong, names)


def test_samples_are_drawn_by_name(runs, capsys):
    run = runs["notes"]
    assert to_draw(run, "notes", ("C4", "23", "B5"), each=2).tolist() == [
        0,
        0,
        23,
        23,
        23,
        23,
    ]
    by_name = run.sample(["D4", 0], steps=1)
    by_number = run.sample(torch.tensor([2, 0]), steps=1)
    assert torch.equal(by_name["audio"], by_number["audio"])
    with pytest.raises(SystemExit):
        main(["sample", str(run.path), "--labels", "H4", "--device", "cpu"])
    assert "there is no class 'H4'; classes are C4, C#4, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", str(run.path), "--labels", "24", "--device", "cpu"])
    assert "there is no class 24: labels run from 0 to 23" in capsys.readouterr().err
    for asked, name, words in (
        ({"captions": ("a cat",)}, "notes", "trained with classes, not captions"),
        ({"labels": ("1",)}, "told", "trained with captions, not classes"),
    ):
        with pytest.raises(ValueError, match=words):
            to_draw(runs[name], runs[name].config.data.name, **asked)


# what is written


def peak(file) -> int:
    with wave.open(str(file)) as opened:
        return int(
            np.abs(
                np.frombuffer(opened.readframes(opened.getnframes()), "<i2").astype(int)
            ).max()
        )


def test_every_audio_sample_is_a_file_and_none_is_clipped(runs, monkeypatch, capsys):
    run = runs["notes"]
    steps = torch.tensor([[1.0, -0.5, 0.25]] + [[0.1, 0.2, 0.3]] * 101)
    loud = 5 * steps.repeat_interleave(2731, 1)[:, :8192]
    monkeypatch.setattr(
        run, "sample", lambda labels, *args, **options: {"audio": loud[: len(labels)]}
    )
    _, file = write_samples(run, ["C4", "D4", "D4"])
    clips = sorted(file.parent.glob(f"{file.stem}-*.wav"))
    assert [path.name[-8:] for path in clips] == ["-000.wav", "-001.wav", "-002.wav"]
    assert [peak(path) for path in clips] == [32767, 9830, 9830], (
        "one factor for all of a call"
    )
    assert (
        "the sounds reach 5 times full scale, so all WAV files are scaled by 0.2"
        in capsys.readouterr().out
    )
    with safe_open(file, "pt") as stored:
        assert torch.equal(stored.get_tensor("audio"), loud[:3]), (
            "numbers stay as they were drawn"
        )
        assert json.loads(stored.metadata()["asked"]) == ["C4", "D4", "D4"]
        assert stored.metadata()["sound_factor"] == "0.2"
    _, file = write_samples(run, torch.zeros(102, dtype=torch.int64))
    assert len(list(file.parent.glob(f"{file.stem}-*.wav"))) == 100
    printed = capsys.readouterr().out
    assert "100 of 102 sounds are written" in printed
    assert "100 of 102 images are written" in printed
    monkeypatch.setattr(
        run,
        "sample",
        lambda labels, *args, **options: {"audio": loud[: len(labels)] / 5},
    )
    _, file = write_samples(run, ["C4"], seed=1)
    assert peak(next(file.parent.glob(f"{file.stem}-*.wav"))) == 32767
    assert "loudness" not in capsys.readouterr().out


def test_videos_and_captions_are_laid_out_as_requested(runs):
    _, file = write_samples(runs["motion"], torch.tensor([0, 0, 3, 3]), steps=1)
    wide, high = Image.open(file.with_suffix(".png")).size
    assert wide < 1100 and high == 4 * (6 * 16 + 4), (
        "four strips of eight frames, 16 x 16 pixels each, drawn six times as large"
    )
    assert Image.open(file.with_suffix(".webp")).n_frames == 8
    _, file = write_samples(
        runs["told"], ["a red star"] * 2 + ["a blue disk"] * 2, steps=1
    )
    with safe_open(file, "pt") as stored:
        assert (
            json.loads(stored.metadata()["asked"])
            == ["a red star"] * 2 + ["a blue disk"] * 2
        )


# names, not numbers


def test_points_are_coloured_by_names_and_the_rarest_of_many_classes_are_joined():
    class Data:
        names = tuple(f"class {i}" for i in range(40))

    def items(labels, name="folder"):
        return SimpleNamespace(
            factors={"class": torch.tensor(labels)}, data=Data(), name=name
        )

    factor, values = _plane_colours(items([0, 14, 3, 14]))
    assert factor == "class"
    assert values.tolist() == [
        "class 0",
        "class 14",
        "class 3",
        "class 14",
    ]
    factor, values = _plane_colours(items([*range(40), *range(27)]))
    assert len(set(values)) == 28
    assert (values == "13 others").sum() == 13
    assert values[0] == "class 0"
    factor, values = _plane_colours(
        Items(Sources(DataConfig("notes"), "test"), count=30)
    )
    assert factor == "pitch"
    assert set(values) <= set(map(note_name, PITCHES))
    moved = SimpleNamespace(
        factors={"speed": torch.tensor([0.5, 0.1])}, data=Data(), name="folder"
    )
    assert _plane_colours(moved)[1].tolist() == pytest.approx([0.5, 0.1]), (
        "a number stays one"
    )


def test_the_sample_history_has_names_below(runs, tmp_path):
    video = [(2, torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]))]
    (axis,) = draw_sample_history(
        video, names=("T-shirt", "a very long name of a class")
    ).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == [
        "T-shirt",
        "a very long\nname of a...",
        "2",
    ]
    run = Run.open(runs["notes"].path, "cpu")
    assert run.class_names[:2] == ("C4", "C#4")
    assert Run.open(runs["told"].path, "cpu").class_names == ()


def test_audio_is_not_called_an_image(runs):
    result = saturation(runs["notes"], 8, 8)
    assert "image" not in result.verdict()
    assert result.table()["answer"].str.contains("another audio").any()
    assert "knows the audio" in result.table()
    assert len(draw_ladder(result.table()).axes) == 1
