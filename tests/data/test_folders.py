"""Folders and Hugging Face data sets: which files and rows become samples.

Files that cannot be used are skipped, replaced and reported, and harm nothing.
"""

import io
import json
import os
import re
import shutil
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from encoded import encoded
from PIL import Image
from scipy.io import wavfile
from torch.utils.data import DataLoader

from selfflow.data.datasets import SPLITS
from selfflow.data.files import split_of
from selfflow.data.folders import Folder, HuggingFace
from selfflow.data.stored import Entry, Stored
from selfflow.training.config import Config
from selfflow.training.loop import train

ALL = {"shares": (1, 0, 0)}


def write_image(path, grey=100, size=(6, 6), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3).save(path, **options)


def write_audio(path, value=0.5, rate=8_000, count=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, np.full(count, value, np.float32))


def write_video(path, greys=(0, 100, 200)):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.new("L", (6, 6), grey) for grey in greys)
    first.save(path, save_all=True, append_images=rest, duration=100)


def greys(data, signal="image"):
    return [
        round((value.item() + 1) * 127.5)
        for value in data.take(torch.arange(len(data))).signals[signal].flatten(1)[:, 0]
    ]


@pytest.fixture
def photos(tmp_path):
    for i in range(12):
        label = ("cat", "dog", "10", "9")[i % 4]
        suffix = ("png", "bmp", "gif", "webp")[i % 4]
        write_image(tmp_path / "photos" / label / f"{i}.{suffix}", 20 * i)
    return tmp_path / "photos"


def test_a_folder_is_a_data_set(photos):
    data = Folder(photos, size=5, **ALL)
    taken = data.take(torch.tensor([0, 11, 3, 3]))
    assert len(data) == 12
    assert data.names == ("9", "10", "cat", "dog")
    assert data.shapes == {"image": (3, 5, 5)}
    assert taken.signals["image"].dtype == torch.float32
    assert taken.signals["image"].shape == (4, 3, 5, 5)
    assert taken.labels.dtype == torch.int64
    assert taken.captions == tuple(data.names[label] for label in taken.labels)
    assert [entry.name for entry in data.entries[:3]] == [
        "9/3.webp",
        "9/7.webp",
        "9/11.webp",
    ], "in natural order"
    assert torch.equal(taken.signals["image"][2], taken.signals["image"][3])
    assert data.take(torch.zeros(0, dtype=torch.int64)).signals["image"].shape == (
        0,
        3,
        5,
        5,
    )
    expected = [60, 140, 220, 40, 120, 200, 0, 80, 160, 20, 100, 180]
    assert np.abs(np.subtract(greys(data), expected)).max() <= 2


@pytest.mark.parametrize("indices", [[12], [-1], [0, 99]])
def test_missing_indices_are_refused(photos, indices):
    with pytest.raises(IndexError, match=r"samples .* of 12"):
        Folder(photos, **ALL).take(torch.tensor(indices))


def test_changing_a_sample_leaves_the_data_unchanged(photos):
    data = Folder(photos, **ALL)
    data.take(torch.tensor([5])).signals["image"].fill_(9)
    assert data.take(torch.tensor([5])).signals["image"].max() <= 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"path": "nowhere"}, "nowhere is not a folder; give the path"),
        (
            {"signals": ("picture",)},
            "unknown signal 'picture'; known are image, video, audio",
        ),
        ({"signals": "images"}, "unknown signal 'images'.*Did you mean 'image'"),
        ({"signals": ()}, r"signals are \(\), expected one or several"),
        ({"signals": ("image", "image")}, "each once"),
        ({"split": "valid"}, "unknown split 'valid'"),
        ({"captions": "yes"}, "unknown captions 'yes'; known are auto, class, none"),
        ({"size": 0}, "size is 0"),
        ({"size": 31.5}, "size is 31.5"),
        ({"frames": -1}, "frames is -1"),
        ({"fps": 0}, "fps is 0"),
        ({"rate": 1}, "rate is 1"),
        ({"samples": 0}, "samples is 0"),
        ({"shares": (0.5, 0.6, 0.1)}, "shares are"),
        ({"shares": (0.5, 0.5)}, "expected three"),
        (
            {"signals": "audio"},
            "no sample of split 'train'; it holds 3 '.webp', 3 '.gif', 3 '.png', 3 "
            "'.bmp'; not used: cannot",
        ),
        (
            {"signals": ("image", "audio")},
            r"no sample.*has no audio of its name \(12\)",
        ),
    ],
)
def test_invalid_settings_are_refused(photos, change, words):
    with pytest.raises(ValueError, match=words):
        Folder(**{"path": photos} | change)


def test_an_empty_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match="no sample of split 'train'; it holds no files"
    ):
        Folder(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        Folder(tmp_path / "file")


# Splits


def test_every_sample_stays_in_one_split(photos):
    for i in range(100):
        shutil.copy(photos / "cat/0.png", photos / f"cat/more{i}.png")

    def names_of_splits(folder):
        return {
            split: [entry.name for entry in Folder(folder, split=split).entries]
            for split in SPLITS
        }

    before = names_of_splits(photos)
    assert sorted(sum(before.values(), [])) == sorted(
        str(p.relative_to(photos)) for p in photos.rglob("*.*")
    )
    for split, names in before.items():
        assert all(
            split_of(name.rsplit(".", 1)[0], (0.8, 0.1, 0.1)) == split for name in names
        )
    for i in range(30):
        write_image(photos / f"ant/{i}.png")
    after = names_of_splits(photos)
    assert all(set(names) <= set(after[split]) for split, names in before.items())
    shutil.copytree(photos, photos.parent / "elsewhere")
    assert names_of_splits(photos.parent / "elsewhere") == after


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_subfolders_named_after_splits_are_the_splits(tmp_path, name, capsys):
    for split, count in (("train", 3), (name, 2), ("extra", 1)):
        for i in range(count):
            write_image(tmp_path / split / "deep/er" / f"{i}.png", 10 * count)
    write_image(tmp_path / name / "cat/x.png")
    write_image(tmp_path / "top.png")
    train, validation, test = (Folder(tmp_path, split=split) for split in SPLITS)
    assert (len(train), len(validation), len(test)) == (
        2,
        3,
        1,
    )
    assert train.names == validation.names == ("cat", "deep")
    assert train.skipped == {
        "lies outside the split folders": ["extra/deep/er/0.png", "top.png"]
    }
    out = capsys.readouterr().out
    assert (
        "there is no test split: 1 of the training samples, chosen by a hash of their "
        "names, are used" in out
    )
    assert "no sample of class 'cat'" in out
    assert (
        "not used: lies outside the split folders (2): 'extra/deep/er/0.png', 'top.png'"
        in out
    )
    with pytest.raises(
        ValueError,
        match="no sample of split 'test'; no sample of class 'cat', 'deep'; not used: "
        "lies outside",
    ):
        Folder(tmp_path, split="test", **ALL)


def test_an_empty_split_is_named_in_the_error(photos):
    with pytest.raises(
        ValueError,
        match="photos has no sample of split 'test'; no sample of class '9', '10', "
        "'cat', 'dog'",
    ):
        Folder(photos, split="test", **ALL)


# Classes, captions and tables


def test_a_folder_of_one_image_has_its_class_but_not_every_split(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no sample of split 'validation'$"):
        Folder(tmp_path, split="validation")


def test_classes_without_samples_are_reported(photos, capsys):
    (photos / "empty/below").mkdir(parents=True)
    for i in range(7):
        (photos / f"none{i}").mkdir()
    data = Folder(photos, **ALL)
    assert "empty" not in data.names
    assert (
        "no sample of class 'empty', 'none0', 'none1', 'none2', 'none3' and 3 more"
        in capsys.readouterr().out
    )


def test_files_next_to_class_folders_have_no_class(photos, capsys):
    write_image(photos / "lone.png")
    data = Folder(photos, **ALL)
    assert data.names == ("", "9", "10", "cat", "dog")
    assert "class '' holds what is in no class folder" in capsys.readouterr().out
    for name in ("cat", "dog", "9", "10"):
        shutil.rmtree(photos / name)
    alone = Folder(photos, **ALL)
    assert alone.names == ("",)
    assert alone.take(torch.tensor([0])).captions == ("",)
    assert "1 samples (image) of split train, no classes" in capsys.readouterr().out


TABLE = [
    {
        "file": "cat/0.png",
        "label": "zebra",
        "caption": "\u732b \U0001f408 \u0430\u0438",
    },
    {"file": "dog/1", "label": 7},
    {"file": "10/2.gif", "label": "zebra", "caption": "  "},
    {"file": "9/3.webp", "caption": "half \ud83d"},
    {"file": "cat/4.jpg", "label": "x"},
    {"file": "cat/0.png", "label": "again"},
    {"file": "../photos/dog/5.bmp", "label": "x"},
]


def test_a_table_lists_files_labels_and_captions(photos):
    (photos / "metadata.jsonl").write_text(
        "\n".join(map(json.dumps, TABLE)), encoding="utf-8"
    )
    data = Folder(photos, **ALL)
    taken = data.take(torch.arange(4))
    assert data.names == ("", "7", "zebra")
    assert dict(
        zip([entry.name for entry in data.entries], taken.captions, strict=True)
    ) == {
        "9/3.webp": "half \ufffd",
        "10/2.gif": "zebra",
        "cat/0.png": "\u732b \U0001f408 \u0430\u0438",
        "dog/1.bmp": "7",
    }
    assert [data.names[label] for label in taken.labels] == ["", "zebra", "zebra", "7"]
    assert data.skipped.pop("is not in the table")
    assert data.skipped == {
        "leads out of the folder": ["../photos/dog/5.bmp"],
        "is in the table but missing": ["cat/4.jpg"],
        "is in the table twice": ["cat/0.png"],
    }
    assert set(
        Folder(photos, captions="class", **ALL).take(torch.arange(4)).captions
    ) == {"", "zebra", "7"}
    assert set(
        Folder(photos, captions="none", **ALL).take(torch.arange(4)).captions
    ) == {""}


def test_a_table_without_labels_keeps_the_folders_as_classes(photos):
    (photos / "metadata.csv").write_text(
        "file_name,text\ncat/0.png,hello\n9/3.webp,\n", encoding="utf-8"
    )
    data = Folder(photos, **ALL)
    assert data.names == ("9", "cat")
    assert data.take(torch.arange(2)).captions == (
        "9",
        "hello",
    )


def test_a_table_without_existing_files_is_refused(photos):
    (photos / "metadata.csv").write_text(
        "file,label\n/etc/passwd,x\n", encoding="utf-8"
    )
    with pytest.raises(
        ValueError,
        match=r"no sample of split.*leads out of the folder \(1\).*is not in the table "
        r"\(12\)",
    ):
        Folder(photos)


def test_each_split_folder_may_have_a_table(tmp_path):
    for split in ("train", "test"):
        write_image(tmp_path / split / "a.png")
        (tmp_path / split / "metadata.csv").write_text(
            f"file_name,text,label\na.png,from {split},{split}\n", encoding="utf-8"
        )
    data = Folder(tmp_path, split="test")
    assert data.names == ("test", "train")
    assert data.take(torch.tensor([0])).captions == ("from test",)


def test_names_may_be_in_any_script_or_not_be_text(tmp_path):
    for name in ("caf\u00e9", "cafe\u0301 2", "\u732b", "a b'\"", "x\ny"):
        write_image(tmp_path / name / "\u00fc.png")
    os.makedirs(os.fsencode(tmp_path) + b"/\xff\xfe")
    shutil.copy(
        tmp_path / "\u732b/\u00fc.png", os.fsencode(tmp_path) + b"/\xff\xfe/\xfd.png"
    )
    data = Folder(tmp_path, **ALL)
    assert len(data) == 6
    assert all(name.encode() for name in data.names)
    assert "caf\u00e9 2" in data.names
    assert len(data.take(torch.arange(6))) == 6
    assert len(data.fingerprint) == 16


# Hostile files


def write_hostile_files(folder):
    write_image(folder / "good.png", 50)
    png_bytes = (folder / "good.png").read_bytes()
    for name, data in {
        "empty.png": b"",
        "text.png": b"hello",
        "png.jpg": png_bytes,
        "head.png": png_bytes[:20],
        "junk.bmp": bytes(99),
    }.items():
        (folder / name).write_bytes(data)
    write_image(folder / "bomb.gif")
    (folder / "bomb.gif").write_bytes(
        b"GIF89a\xff\xff\xff\xff" + (folder / "bomb.gif").read_bytes()[10:]
    )
    (folder.parent / "outside.png").write_bytes(png_bytes)
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "within.png").symlink_to(folder / "good.png")
    (folder / "nowhere.png").symlink_to(folder / "missing.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "up").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    write_image(folder / "/".join("123456789") / "deep.png")


def test_hostile_files_are_counted_and_harm_nothing(tmp_path, capsys):
    write_hostile_files(tmp_path / "data")
    data = Folder(tmp_path / "data", **ALL)
    assert [entry.name for entry in data.entries] == [
        "good.png",
        "png.jpg",
        "within.png",
    ]
    assert greys(data) == [50, 50, 50]
    assert {reason: sorted(names) for reason, names in data.skipped.items()} == {
        "is not a regular file": ["nowhere.png", "pipe.png", "zero.png"],
        "is a link to a folder": ["up"],
        "is nested too deeply": ["1/2/3/4/5/6/7/8/9"],
        "declares too many pixels": ["bomb.gif"],
        "is empty": ["empty.png"],
        "cannot be decoded": ["head.png"],
        "leads out of the folder": ["out.png"],
        "is not what its suffix says": ["junk.bmp", "text.png"],
    }
    out = capsys.readouterr().out
    assert out.startswith(
        "data: 3 samples (image) of split train, no classes; no sample of class '1'; "
        "read by content"
    )
    assert out.count("\n") == 1
    assert "is not what its suffix says (2): 'junk.bmp', 'text.png'" in out


def test_a_folder_of_hostile_files_only_is_refused(tmp_path):
    write_hostile_files(tmp_path / "data")
    for name in ("good.png", "within.png", "png.jpg"):
        (tmp_path / "data" / name).unlink()
    with pytest.raises(ValueError, match=r"no sample of split 'train'.*is empty \(1\)"):
        Folder(tmp_path / "data", **ALL)


def test_files_damaged_later_are_replaced_and_reported_once(photos, capsys):
    data = Folder(photos, **ALL)
    names = [entry.name for entry in Folder(photos, **ALL).entries]
    expected = greys(Folder(photos, **ALL))
    (photos / names[1]).unlink()
    (photos / names[2]).write_bytes(b"")
    os.remove(photos / names[5])
    os.mkfifo(photos / names[5])
    (photos / names[11]).write_bytes((photos / names[11]).read_bytes()[:-9])
    capsys.readouterr()
    expected[1] = expected[2] = expected[3]
    expected[5], expected[11] = expected[6], expected[0]
    assert greys(data) == expected == greys(data), (
        "after the last sample comes the first"
    )
    assert (
        data.take(torch.tensor([11])).labels == data.take(torch.tensor([0])).labels == 0
    )
    assert list(data.broken) == [names[1], names[2], names[5], names[11]]
    assert data.broken[names[2]] == "is empty"
    assert data.broken[names[5]] == "is not a regular file"
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith(f"photos: {names[1]!r} cannot be opened (FileNotFoundError")
    fresh = Folder(photos, **ALL)
    assert torch.equal(
        data.take(torch.tensor([1])).signals["image"],
        fresh.take(torch.tensor([1])).signals["image"],
    )


def test_many_broken_files_print_little_and_no_good_file_is_an_error(tmp_path, capsys):
    for i in range(120):
        write_image(tmp_path / "data" / f"{i}.png")
    data = Folder(tmp_path / "data", cache=0, **ALL)
    for i in range(119):
        (tmp_path / "data" / f"{i}.png").unlink()
    capsys.readouterr()
    assert len(data.take(torch.arange(120))) == 120
    assert len(data.broken) == 119
    out = capsys.readouterr().out.splitlines()
    assert [re.findall(r"\((\d+) such so far\)", line) for line in out] == [
        [],
        ["10"],
        ["100"],
    ]
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(
        RuntimeError,
        match="none of the 120 samples of .* can be decoded; does the folder still "
        "exist",
    ):
        data.take(torch.tensor([3]))


# Audio


def test_nan_is_replaced_and_silence_is_reported(tmp_path, capsys):
    write_audio(tmp_path / "s/a.wav", 0.25, 16_000, 400)
    write_audio(tmp_path / "s/b.wav", np.nan)
    write_audio(tmp_path / "s/c.wav", 0.0)
    write_audio(tmp_path / "s/d.wav", 5e-5)
    write_audio(tmp_path / "s/e.wav", 0.5, count=10)
    data = Folder(tmp_path / "s", "audio", samples=100, **ALL)
    assert data.shapes == {"audio": (100,)}
    assert not data.skipped
    taken = data.take(torch.arange(5)).signals["audio"]
    data.take(torch.arange(5))
    assert taken.dtype == torch.float32
    assert taken.isfinite().all()
    assert (taken[0, 20:80] - 0.25).abs().max() < 0.01
    assert not taken[1].any()
    assert not taken[2].any()
    assert (taken[4, :10] == 0.5).all()
    assert not taken[4, 10:].any(), "short audio is padded with silence"
    assert data.broken == {"b.wav": "holds NaN or infinity"}
    assert list(data.silent) == [
        "c.wav",
        "d.wav",
    ]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "s: 'b.wav' holds NaN or infinity; the next good sample is used",
        "s: 'c.wav' is silent; it is used",
    ]


def test_audio_of_any_rate_and_channels_is_read(tmp_path):
    for rate, channels in ((8_000, 1), (44_100, 2), (48_000, 6), (5_512, 1)):
        audio_file = 0.4 * np.sin(2 * np.pi * 300 * np.arange(2 * rate) / rate)
        wavfile.write(
            tmp_path / f"{rate}.wav",
            rate,
            (np.repeat(audio_file[:, None], channels, 1) * 32_767).astype(np.int16),
        )
    data = Folder(tmp_path, "audio", rate=8_000, samples=8_000, **ALL)
    spectra = torch.fft.rfft(data.take(torch.arange(4)).signals["audio"]).abs()
    assert spectra.argmax(1).tolist() == [300] * 4
    assert (spectra.amax(1) / 4_000 - 0.4).abs().max() < 0.01


def test_flac_without_soundfile_names_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(50))
    write_audio(tmp_path / "b.wav")
    assert Folder(tmp_path, "audio", **ALL).skipped == {
        "needs the package soundfile: pip install 'selfflow[av]'": ["a.flac"]
    }
    assert (
        "needs the package soundfile: pip install 'selfflow[av]' (1)"
        in capsys.readouterr().out
    )


# Videos and pairs


def test_videos_are_files_or_folders_of_numbered_images(tmp_path):
    write_video(tmp_path / "walk/file.gif")
    for i in range(12):
        # without leading zeros: f10 comes after f9
        write_image(tmp_path / "walk/frames" / f"f{i}.png", 20 * i)
        write_image(tmp_path / "not/a-video" / f"{'abcdefghijkl'[i]}.png")
        write_image(tmp_path / "run" / f"{i}.png", 20 * i)
        write_image(tmp_path / "has/inner" / f"{i}.png")
    write_image(tmp_path / "has/inner/deeper/x.png")
    write_image(tmp_path / "walk/one/1.png")
    data = Folder(tmp_path, "video", size=4, frames=4, **ALL)
    assert [entry.name for entry in data.entries] == [
        "run",
        "walk/file.gif",
        "walk/frames",
    ]
    assert data.names == ("", "walk")
    taken = data.take(torch.arange(3))
    assert taken.signals["video"].shape == (3, 3, 4, 4, 4)
    assert data.shapes == {"video": (3, 4, 4, 4)}
    corners = taken.signals["video"][:, 0, :, 0, 0]
    assert ((corners + 1) * 127.5).round().int().tolist() == [
        [20, 80, 140, 200],
        [0, 100, 100, 200],
        [20, 80, 140, 200],
    ]
    assert len(Folder(tmp_path, **ALL)) == 12 * 4 + 3, (
        "as images, each frame is a sample"
    )


def test_a_video_with_a_bad_first_frame_is_skipped_later_ones_replaced(
    tmp_path,
):
    for name in ("a", "b", "c"):
        for i in range(3):
            write_image(tmp_path / name / f"{i}.png", 50 * i)
    (tmp_path / "a/0.png").write_bytes(b"")
    (tmp_path / "b/1.png").write_bytes(b"x")
    data = Folder(tmp_path, "video", frames=3, **ALL)
    assert data.skipped == {"is empty": ["a"]}
    assert len(data) == 2
    assert len(data.take(torch.arange(2))) == 2
    assert data.broken.keys() == {"b"}


def test_videos_and_audio_with_the_same_stem_are_pairs(tmp_path, capsys):
    for name in ("x/one", "x/two.b", "y/three"):
        write_audio(tmp_path / f"{name}.wav", 0.5)
    write_video(tmp_path / "x/one.gif")
    write_video(tmp_path / "x/two.b.webp")
    write_image(tmp_path / "x/one.png")
    for i in range(2):
        write_image(tmp_path / "y/three" / f"{i}.png")
    write_audio(tmp_path / "x/lone.wav")
    write_video(tmp_path / "z/lone.gif")
    write_video(tmp_path / "x/one.webp")
    data = Folder(tmp_path, ("video", "audio"), frames=2, samples=50, **ALL)
    assert [entry.name for entry in data.entries] == [
        "x/one",
        "x/two.b",
        "y/three",
    ]
    assert data.names == ("x", "y")
    assert {
        key: value.shape for key, value in data.take(torch.arange(3)).signals.items()
    } == {"video": (3, 3, 2, 32, 32), "audio": (3, 50)}
    assert data.skipped.pop("cannot be read as video or audio") == ["x/one.png"]
    assert data.skipped == {
        "has the same name as another file": ["x/one.webp"],
        "has no video of its name": ["x/lone"],
        "has no audio of its name": ["z/lone"],
    }
    out = capsys.readouterr().out
    assert "no sample of class 'z'" in out
    assert (
        "videos and audio differ in length; with fps 320 they would be equally long"
        in out
    )
    Folder(tmp_path, ("video", "audio"), frames=2, samples=50, fps=320, **ALL)
    assert "not of the same length" not in capsys.readouterr().out


def test_a_stem_is_in_one_split_whatever_the_signals(tmp_path):
    for i in range(40):
        write_audio(tmp_path / f"{i}.wav")
        write_video(tmp_path / f"{i}.gif")
    for split in SPLITS:
        stems = [
            {
                Path(entry.name).stem
                for entry in Folder(
                    tmp_path, signals, split, shares=(0.5, 0.25, 0.25)
                ).entries
            }
            for signals in ("audio", "video", "image", ("video", "audio"))
        ]
        assert stems[0] == stems[1] == stems[2] == stems[3]


def test_a_class_folder_named_like_a_split_is_not_a_video(tmp_path):
    for i in range(3):
        write_image(tmp_path / "train" / f"{i}.png")
    write_video(tmp_path / "train/a.gif")
    assert [entry.name for entry in Folder(tmp_path, "video").entries] == [
        "train/a.gif"
    ]


# Fingerprints, memory, workers


def test_a_fingerprint_depends_on_content_and_settings(photos):
    def fingerprint(folder=photos, **options):
        return Folder(folder, **{**ALL, **options}).fingerprint

    first = fingerprint()
    shutil.copytree(photos, photos.parent / "copy")
    os.utime(photos / "cat/0.png", (0, 0))
    assert (
        fingerprint()
        == fingerprint(photos.parent / "copy")
        == first
        == fingerprint(cache=0)
        == fingerprint(rate=16_000)
    )
    others = [
        fingerprint(size=16),
        fingerprint(captions="none"),
        fingerprint(shares=(0.5, 0.25, 0.25)),
        fingerprint(signals="video"),
    ]
    (photos / "cat/0.png").write_bytes((photos / "cat/0.png").read_bytes() + b"\0")
    others.append(fingerprint())
    (photos / "cat/0.png").rename(photos / "cat/new.png")
    others.append(fingerprint())
    (photos / "cat").rename(photos / "tac")
    others.append(fingerprint())
    (photos / "metadata.csv").write_text(
        "file,caption\ntac/new.png,x\n", encoding="utf-8"
    )
    others.append(fingerprint())
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    "cache, count", [(0, 0), (3 * 25 - 1, 0), (3 * 25, 1), (3 * 25 * 5, 5), (10**9, 12)]
)
def test_recent_samples_are_cached_within_the_limit(photos, cache, count, monkeypatch):
    import selfflow.data.stored as stored

    data = Folder(photos, size=5, cache=cache, **ALL)
    calls = []
    real = stored.read
    monkeypatch.setattr(
        stored, "read", lambda *arguments: calls.append(1) or real(*arguments)
    )
    images = data.take(torch.arange(12)).signals["image"]
    assert len(data.decoded) == count
    assert [index for index, _ in data.decoded] == list(range(12 - count, 12))
    assert len(calls) == 12
    cached = data.take(torch.arange(12 - count, 12)).signals["image"]
    assert len(calls) == 12
    assert torch.equal(cached, images[12 - count :])


def test_workers_give_the_same_images(photos):
    data = Folder(photos, **ALL)

    class Batches:
        def __len__(self):
            return 4

        def __getitem__(self, step):
            return data.take(torch.arange(3 * step, 3 * step + 3)).signals["image"]

    images = torch.cat(list(DataLoader(Batches(), batch_size=None, num_workers=2)))
    assert torch.equal(images, data.take(torch.arange(12)).signals["image"])


def test_a_store_without_samples_or_a_find_method_is_refused():
    class Empty(Stored):
        def find(self):
            return [], ["nothing here"]

    with pytest.raises(ValueError, match="no sample of split 'train'; nothing here"):
        Empty(".")
    with pytest.raises(NotImplementedError):
        Stored(".")


# Hugging Face: data sets written by the package itself

LABELS = datasets.ClassLabel(names=["b", "a"])
NAMED = {
    "image": datasets.Image(),
    "label": LABELS,
    "text": datasets.Value("string"),
    "other": datasets.Value("int64"),
}
# as Image and Audio, but stored without conversion
STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
datasets.disable_progress_bars()


def png(grey, size=(6, 6)):
    written = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(written, format="PNG")
    return {"bytes": written.getvalue(), "path": "anywhere.png"}


def audio_file(
    rate=8_000, count=300, channels=1, kind="WAV", subtype="FLOAT", value=None
):
    values = (
        0.5 * np.sin(2 * np.pi * 440 * np.arange(count) / rate)
        if value is None
        else np.full(count, value)
    )
    written = io.BytesIO()
    soundfile.write(
        written,
        np.repeat(values[:, None], channels, 1),
        rate,
        format=kind,
        subtype=subtype,
    )
    return written.getvalue()


def rows_of(count, first=0):
    return [
        {
            "image": png(first + 10 * i),
            "label": i % 2,
            "text": f"number {first + i}",
            "other": 0,
        }
        for i in range(count)
    ]


@pytest.fixture
def stored(tmp_path):
    "A function that stores rows, or splits of rows, and returns the folder."

    def table(rows, features):
        dataset = datasets.Dataset.from_dict(
            {name: [row[name] for row in rows] for name in features},
            datasets.Features(
                {
                    name: (
                        datasets.Value("string")
                        if isinstance(rows[0][name], str)
                        else STRUCT
                    )
                    if isinstance(kind, datasets.Audio)
                    else kind
                    for name, kind in features.items()
                }
            ),
        )
        # written directly, audio would need torchcodec
        for name, kind in features.items():
            dataset = (
                dataset.cast_column(name, kind)
                if isinstance(kind, datasets.Audio)
                else dataset
            )
        return dataset

    def store(rows, features=NAMED):
        tables = (
            datasets.DatasetDict(
                {
                    split: table(rows_of_split, features)
                    for split, rows_of_split in rows.items()
                }
            )
            if isinstance(rows, dict)
            else table(rows, features)
        )
        path = tmp_path / f"stored{len(list(tmp_path.iterdir()))}"
        tables.save_to_disk(str(path))
        return path

    return store


def test_a_hugging_face_folder_is_a_data_set(stored):
    path = stored({"train": rows_of(4), "valid": rows_of(2, 50)})
    data = HuggingFace(path, size=4, carve=False)
    taken = data.take(torch.arange(4))
    assert data.names == ("b", "a")
    assert taken.labels.tolist() == [0, 1, 0, 1]
    assert greys(data) == [0, 10, 20, 30]
    assert taken.captions == (
        "number 0",
        "number 1",
        "number 2",
        "number 3",
    )
    assert data.shapes == {"image": (3, 4, 4)}
    assert greys(HuggingFace(path, split="validation", size=4, captions="class")) == [
        50,
        60,
    ]
    with pytest.raises(ValueError, match="has no split 'test', but 'train', 'valid'"):
        HuggingFace(path, split="test", carve=False)


def test_cache_files_do_not_count_but_runs_that_counted_them_resume(
    stored, tmp_path, capsys
):
    video = [{"video": [png(10 * i), png(10 * i)], "label": i % 2} for i in range(8)]
    features = {"video": datasets.Sequence(datasets.Image()), "label": LABELS}
    path = stored(dict.fromkeys(SPLITS, video), features)
    before = HuggingFace(path, "video", size=4, frames=2).fingerprint
    config = Config.from_dict(
        {
            "name": "old",
            "defaults": 3,
            "model": {"width": 32, "depth": 2, "heads": 2},
            "data": {
                "name": "huggingface",
                "path": str(path),
                "signals": ["video"],
                "height": 4,
                "width": 4,
                "frames": 2,
                "patch": 2,
                "carve": False,
            },
            "training": {"steps": 2, "batch": 4, "sample_every": 0},
        }
    )
    run = train(config, tmp_path, "cpu", bar=False)
    assert run.data["train"] == before
    assert len([*path.rglob("cache-*.arrow")]) == 2
    counted = {
        split: HuggingFace(path, "video", split, 4, 2).earlier_fingerprints[1]
        for split in ("train", "validation")
    }
    assert counted["train"] != before
    assert HuggingFace(path, "video", size=4, frames=2).fingerprint == before
    HuggingFace(path, "video", "test", 4, 2)  # as a probe does
    written = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(written | {"data": counted}))
    longer = replace(config, training=replace(config.training, steps=4))
    assert train(longer, tmp_path, "cpu", bar=False).state()["step"] == 4
    (path / "train/another").write_text("a file that is no cache")
    with pytest.raises(ValueError, match="different data"):
        train(
            replace(config, training=replace(config.training, steps=6)),
            tmp_path,
            "cpu",
            bar=False,
        )


def test_rows_without_splits_are_split_by_a_hash(stored):
    path = stored(rows_of(25), {"image": datasets.Image()})
    greys_of_splits = {
        split: greys(HuggingFace(path, split=split, shares=(0.6, 0.2, 0.2)))
        for split in SPLITS
    }
    assert sorted(sum(greys_of_splits.values(), [])) == [10 * i for i in range(25)]
    for split, values in greys_of_splits.items():
        for grey in values:
            assert split_of(f"row {grey // 10}", (0.6, 0.2, 0.2)) == split
    data = HuggingFace(path, **ALL)
    assert data.names == ("",)
    assert set(data.take(torch.arange(5)).captions) == {""}


def test_columns_and_labels_may_have_other_names_and_types(stored):
    features = {
        "img": datasets.Image(),
        "kind": datasets.Value("string"),
        "sentence": datasets.Value("string"),
    }
    rows = [
        {"img": png(i), "kind": kind, "sentence": sentence}
        for i, (kind, sentence) in enumerate(
            [
                ("10", "x"),
                ("9", None),
                (None, "\u732b \U0001f408 e\u0301 "),
                ("9", ""),
                ("only here", "z"),
            ]
        )
    ]
    data = HuggingFace(
        stored({"train": rows[:3], "test": rows[3:]}, features),
        columns={"image": "img", "label": "kind", "caption": "sentence"},
        carve=False,
    )
    assert data.names == ("", "9", "10", "only here")
    assert data.take(torch.arange(3)).labels.tolist() == [2, 1, 0]
    assert data.take(torch.arange(3)).captions == ("x", "9", "\u732b \U0001f408 \u00e9")
    with pytest.raises(
        ValueError,
        match="has no column 'image', but 'img', 'kind', 'sentence'; name the image by "
        "columns=",
    ):
        HuggingFace(data.path)
    with pytest.raises(ValueError, match="has no column 'imag'"):
        HuggingFace(data.path, columns={"image": "imag"})
    with pytest.raises(
        ValueError, match="unknown column 'images'.*Did you mean 'image'"
    ):
        HuggingFace(data.path, columns={"images": "img"})


def test_columns_of_the_wrong_type_are_refused(stored):
    rows = [{**row, "several": ["x", "y"]} for row in rows_of(3)]
    path = stored(rows, {**NAMED, "several": datasets.List(datasets.Value("string"))})
    for name in ("label", "caption"):
        for column in ("several", "image"):
            with pytest.raises(
                ValueError,
                match=f"column '{column}' of .* cannot be the {name}: it holds "
                f"(List|Image)",
            ):
                HuggingFace(path, columns={name: column})
    for column, reason in (
        ("label", "is not an image"),
        ("text", "cannot be opened"),
        ("several", "cannot be opened"),
    ):
        data = HuggingFace(path, columns={"image": column}, **ALL)
        with pytest.raises(RuntimeError, match="none of the 3 samples"):
            data.take(torch.arange(1))
        assert all(
            why.startswith((reason, "cannot be")) for why in data.broken.values()
        ), data.broken
    listed = stored(
        [{"image": png(1), "text": ["x"], "label": ["y"]}],
        {
            "image": datasets.Image(),
            **dict.fromkeys(("text", "label"), datasets.List(datasets.Value("string"))),
        },
    )
    assert HuggingFace(listed, **ALL).names == ("",), (
        "a list named label or text is not used as one"
    )


def test_all_kinds_of_cells_are_read(stored):
    values = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    for feature, cell in (
        (datasets.Image(), Image.fromarray(values)),
        (datasets.Image(), values),
        (datasets.Value("binary"), None),
        (STRUCT, None),
        (datasets.Array3D((6, 6, 3), "uint8"), values),
        (
            datasets.List(datasets.List(datasets.List(datasets.Value("int16")))),
            values.tolist(),
        ),
    ):
        written = io.BytesIO()
        Image.fromarray(values).save(written, format="PNG")
        if cell is None:
            encoded_image = written.getvalue()
            cell = encoded_image
            if feature is STRUCT:
                cell = {"bytes": encoded_image, "path": None}
        data = HuggingFace(stored([{"image": cell}], {"image": feature}), size=6, **ALL)
        taken = ((data.take(torch.tensor([0])).signals["image"][0] + 1) * 127.5).round()
        assert np.array_equal(taken, values.transpose(2, 0, 1))
        assert not data.broken


def test_images_and_audio_in_separate_files_are_stored_with_the_rows(stored, tmp_path):
    write_image(tmp_path / "x.png", 50)
    write_audio(tmp_path / "x.wav", 0.25)
    path = stored(
        [{"image": str(tmp_path / "x.png"), "audio": str(tmp_path / "x.wav")}],
        {"image": datasets.Image(), "audio": datasets.Audio()},
    )
    (tmp_path / "x.png").unlink()
    (tmp_path / "x.wav").unlink()
    data = HuggingFace(path, ("image", "audio"), samples=100, **ALL)
    assert greys(data) == [50]
    assert (data.take(torch.tensor([0])).signals["audio"] == 0.25).all()


def test_audio_is_decoded_without_torchcodec(stored, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    files = [
        audio_file(),
        audio_file(44_100, 2_000, 2),
        audio_file(48_000, 2_000, 6, "WAV", "PCM_24"),
        audio_file(22_050, 1_000, 1, "FLAC", "PCM_16"),
        audio_file(count=5),
        audio_file(value=0.0),
        audio_file(value=np.nan),
        audio_file()[:90],
        b"",
        audio_file(kind="OGG", subtype="VORBIS")[:99],
        audio_file(),
    ]
    path = stored(
        [{"audio": {"bytes": data, "path": None}, "text": None} for data in files],
        {
            "audio": datasets.Audio(sampling_rate=16_000),
            "text": datasets.Value("string"),
        },
    )
    data = HuggingFace(path, "audio", samples=300, **ALL)
    taken = data.take(torch.arange(len(files))).signals["audio"]
    assert taken.shape == (11, 300)
    assert taken.isfinite().all()
    for i in range(4):
        assert (taken[i, 50:250] - taken[0, 50:250]).abs().max() < 0.01, (
            "at the requested rate, not the column's"
        )
    assert taken[4, :5].any()
    assert not taken[4, 5:].any()
    assert not taken[5].any()
    assert all(torch.equal(taken[i], taken[10]) for i in range(6, 10))
    assert {name: why.split(" (")[0] for name, why in data.broken.items()} == {
        "row 6": "holds NaN or infinity",
        "row 7": "is shorter than it declares",
        "row 8": "is empty",
        "row 9": "cannot be decoded",
    }
    assert list(data.silent) == ["row 5"]
    assert "'row 5' is silent; it is used" in capsys.readouterr().out


def test_audio_stored_as_numbers_is_read(stored):
    values = (0.5 * np.sin(np.arange(300))).astype(np.float32)
    for feature, array in (
        (datasets.List(datasets.Value("float32")), values),
        (datasets.Array2D((2, 300), "float32"), np.stack([values, values])),
    ):
        path = stored(
            [{"audio": {"array": array, "sampling_rate": 8_000}}],
            {"audio": {"array": feature, "sampling_rate": datasets.Value("int32")}},
        )
        data = HuggingFace(path, "audio", samples=300, **ALL)
        assert np.allclose(
            data.take(torch.tensor([0])).signals["audio"][0], values, atol=1e-6
        )
        assert not data.broken


def test_videos_in_a_table_are_read(stored):
    video = encoded([0, 100], times=[0, 100])
    for feature, cell in (
        (datasets.List(datasets.Image()), [png(0), png(100)]),
        (datasets.Video(), {"bytes": video, "path": None}),
        (datasets.List(datasets.Value("binary")), [png(0)["bytes"], png(100)["bytes"]]),
        (datasets.Value("binary"), video),
    ):
        data = HuggingFace(
            stored([{"video": cell}], {"video": feature}), "video", frames=2, **ALL
        )
        greys = (
            data.take(torch.tensor([0])).signals["video"][0, 0, :, 0, 0] + 1
        ) * 127.5
        assert (greys - torch.tensor([0, 100])).abs().max() <= 2
        assert not data.broken


def test_frames_are_checked_before_they_are_decoded(stored):
    bomb = png(0)["bytes"].replace(
        b"IHDR\0\0\0\x06\0\0\0\x06", b"IHDR\0\0\x40\0\0\0\x40\0"
    )
    crc = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    bomb = bomb[:29] + crc + bomb[33:]
    path = stored(
        [
            {"video": [{"bytes": data, "path": None}] * 2}
            for data in (bomb, png(7)["bytes"])
        ],
        {"video": datasets.List(datasets.Image())},
    )
    data = HuggingFace(path, "video", frames=2, **ALL)
    data.take(torch.arange(2))
    assert data.broken.keys() == {"row 0"}
    assert data.broken["row 0"].startswith("declares too many pixels")


PLAIN = datasets.List(datasets.List(datasets.Value("float64")))


@pytest.mark.parametrize(
    "feature, cell, reason",
    [
        (STRUCT, {"bytes": None, "path": "/etc/passwd"}, "leads out of the folder"),
        (STRUCT, {"bytes": None, "path": "../outside.png"}, "leads out of the folder"),
        (STRUCT, {"bytes": None, "path": None}, "is missing"),
        (datasets.Image(), None, "is missing"),
        (STRUCT, None, "is missing"),
        (datasets.Value("string"), "missing.png", "cannot be opened"),
        (datasets.Value("string"), "link.png", "leads out of the folder"),
        (datasets.Image(), {"bytes": b"", "path": "x"}, "is empty"),
        (
            datasets.Image(),
            {"bytes": png(10)["bytes"][:45], "path": None},
            "cannot be decoded",
        ),
        (
            datasets.Value("binary"),
            b"hello there, this is text",
            "cannot be read as image",
        ),
        (
            datasets.List(datasets.List(datasets.Value("int64"))),
            [[300] * 4] * 4,
            "is not an image",
        ),
        (
            datasets.List(datasets.List(datasets.Value("int64"))),
            [[-1] * 4] * 4,
            "is not an image",
        ),
        (PLAIN, [[0.5] * 4] * 4, "is not an image"),
        (PLAIN, [], "cannot be read"),
    ],
)
def test_rows_that_cannot_be_read_are_replaced(stored, tmp_path, feature, cell, reason):
    good = {"string": "good.png", "binary": png(10)["bytes"]}.get(
        getattr(feature, "dtype", None), png(10)
    )
    good = [[10] * 4] * 4 if isinstance(feature, datasets.List) else good
    rows = [{"image": cell, "label": 0}, {"image": good, "label": 1}]
    path = stored(rows, {"image": feature, "label": LABELS})
    write_image(path / "good.png", 10)
    write_image(tmp_path / "outside.png")
    (path / "link.png").symlink_to(tmp_path / "outside.png")
    data = HuggingFace(path, **ALL)
    if feature is PLAIN:
        with pytest.raises(RuntimeError, match="none of the 2 samples"):
            data.take(torch.arange(2))
    else:
        assert data.take(torch.arange(2)).labels.tolist() == [1, 1]
        assert list(data.broken) == ["row 0"]
    assert data.broken["row 0"].startswith(reason)


@pytest.mark.parametrize("label", [-1, None])
def test_rows_without_a_label_are_replaced(stored, label):
    data = HuggingFace(
        stored([{**rows_of(1)[0], "label": label}, rows_of(2)[1]]), **ALL
    )
    assert greys(data) == [10, 10]
    assert data.broken["row 0"].startswith("has no label")


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: shutil.rmtree(path) or path.mkdir(),
        lambda path: (path / "state.json").write_text("{"),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "dataset_info.json").write_text("[]"),
        lambda path: (path / "data-00000-of-00001.arrow").unlink(),
        lambda path: os.truncate(path / "data-00000-of-00001.arrow", 0),
        lambda path: os.truncate(path / "data-00000-of-00001.arrow", 300),
        lambda path: os.truncate(
            path / "data-00000-of-00001.arrow",
            (path / "data-00000-of-00001.arrow").stat().st_size - 200,
        ),
        lambda path: (path / "data-00000-of-00001.arrow").write_bytes(bytes(5_000)),
    ],
)
def test_missing_or_damaged_folders_are_reported_in_one_line(stored, harm):
    path = stored(rows_of(3))
    harm(path)
    with pytest.raises(
        ValueError,
        match="was not written by save_to_disk of the package datasets, or it is "
        "damaged",
    ):
        HuggingFace(path)


def test_a_data_set_without_rows_is_refused(stored):
    # the package writes such data sets, but cannot read them
    for rows in ([], {"train": rows_of(2), "test": []}):
        with pytest.raises(
            ValueError,
            match="was not written by save_to_disk of the package datasets, or it is "
            "damaged",
        ):
            HuggingFace(stored(rows))
    with pytest.raises(ValueError, match="has no sample of split 'test'"):
        HuggingFace(stored(rows_of(2)), split="test", **ALL)


def test_a_data_set_with_tables_outside_its_folder_is_refused(stored):
    path = stored(rows_of(2))
    elsewhere = stored(rows_of(2, 100))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(
        json.dumps(
            {
                **state,
                "_data_files": [
                    {"filename": f"../{elsewhere.name}/data-00000-of-00001.arrow"}
                ],
            }
        )
    )
    with pytest.raises(ValueError, match="names tables outside this folder"):
        HuggingFace(path)
    (path / "state.json").write_text(json.dumps(state))
    (path / "data-00000-of-00001.arrow").unlink()
    (path / "data-00000-of-00001.arrow").symlink_to(
        elsewhere / "data-00000-of-00001.arrow"
    )
    with pytest.raises(ValueError, match="names tables outside this folder"):
        HuggingFace(path)


def test_a_format_set_before_saving_makes_no_difference(tmp_path):
    table = datasets.Dataset.from_list(rows_of(3), features=datasets.Features(NAMED))
    for kind in ("torch", "numpy"):
        table.with_format(kind).save_to_disk(str(tmp_path / kind))
        data = HuggingFace(tmp_path / kind, **ALL)
        assert greys(data) == [0, 10, 20]
        assert data.take(torch.arange(3)).labels.tolist() == [0, 1, 0]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        HuggingFace(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        HuggingFace("hf://somewhere")


def test_the_fingerprint_depends_on_the_stored_rows_and_the_settings(stored):
    path = stored(rows_of(6))
    first = HuggingFace(path, **ALL).fingerprint
    assert (
        first
        == HuggingFace(path, **ALL).fingerprint
        != HuggingFace(path, shares=(0.9, 0.1, 0)).fingerprint
    )
    assert first != HuggingFace(path, columns={"caption": "other"}, **ALL).fingerprint
    rows = rows_of(6)
    rows[2]["image"] = png(21)
    shutil.rmtree(path)
    stored(rows).rename(path)
    assert first != HuggingFace(path, **ALL).fingerprint


def test_workers_give_the_same_rows(stored):
    data = HuggingFace(stored(rows_of(8)), **ALL)

    class Batches:
        def __len__(self):
            return 4

        def __getitem__(self, step):
            return data.take(torch.arange(2 * step, 2 * step + 2)).signals["image"]

    images = torch.cat(list(DataLoader(Batches(), batch_size=None, num_workers=2)))
    assert torch.equal(images, data.take(torch.arange(8)).signals["image"])


def test_a_folder_lists_entries(photos):
    assert all(
        isinstance(entry, Entry) and entry.sources.keys() == {"image"}
        for entry in Folder(photos).entries
    )
