"""Every kind of image, audio and video file is read by its content and cropped.

Unused and odd files are reported, and twelve samples are enough to train.
"""

import io
import sys
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY
from encoded import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selfflow.data.datasets import SPLITS
from selfflow.data.decoding import Form, Header, read, read_header
from selfflow.data.files import SUFFIXES, Inside, Refused
from selfflow.data.folders import Folder, HuggingFace
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.data.stored import begins_of
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.training.config import Config
from selfflow.training.loop import train
from selfflow.training.samples import write_samples

ALL = {"shares": (1, 0, 0)}
# 32 x 24, blue and orange; no installed package writes HEIC
HEIC = Path(__file__).parents[1] / "fixtures/two_colours.heic"
IMAGES = [
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "AVIF",
    "JPEG2000",
    "PPM",
    "HEIF",
]
AUDIO = [
    ("WAV", "PCM_16"),
    ("WAV", "ULAW"),
    ("WAV", "ALAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("FLAC", "PCM_16"),
    ("MP3", "MPEG_LAYER_III"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("RF64", "PCM_16"),
    ("M4A", "aac"),
    ("M4A", "alac"),
    ("AAC", "aac"),
]


def image_file(kind, size=(32, 24), colours=((20, 40, 200), (200, 100, 50)), **options):
    "Return an image file with two halves of one colour each."
    if kind == "HEIF":
        return HEIC.read_bytes()
    image = Image.new("RGB", size, colours[1])
    image.paste(colours[0], (0, 0, size[0] // 2, size[1]))
    written = io.BytesIO()
    image.save(written, format=kind, **options)
    return written.getvalue()


def audio_file(values, rate, kind, subtype):
    "Return an audio file of values (n, channels)."
    written = io.BytesIO()
    if kind not in ("M4A", "AAC"):
        soundfile.write(written, values, rate, format=kind, subtype=subtype)
        return written.getvalue()
    with av.open(written, "w", format={"M4A": "ipod", "AAC": "adts"}[kind]) as file:
        stream = file.add_stream(subtype, rate=rate, layout="mono")
        form = "s16p" if subtype == "alac" else "fltp"
        for at in range(0, len(values), 1_024):
            block = values[at : at + 1_024].mean(1)[None]
            if subtype == "alac":
                block = (block * 32_767).astype(np.int16)
            else:
                block = block.astype(np.float32)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(block), format=form, layout="mono"
            )
            frame.sample_rate = rate
            frame.pts = at
            frame.time_base = Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return written.getvalue()


def tones(rate, pitches=(300, 600, 900, 1_200, 1_500), seconds=1.0, channels=2):
    "Return tones, one after another, as values (n, channels)."
    time = np.arange(int(rate * seconds)) / rate
    return np.concatenate(
        [0.4 * np.sin(2 * np.pi * pitch * time) for pitch in pitches]
    )[:, None].repeat(channels, 1)


def pitch(values):
    return torch.fft.rfft(values).abs().argmax().item() * 8_000 / len(values)


# Kinds of images


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_any_kind_are_read_by_content(kind, tmp_path, capsys):
    data = image_file(kind)
    image = read(data, "image", Form(16))
    assert image.shape == (3, 16, 16)
    assert read_header(data, "image") == Header(kind, (32, 24))
    for x, colour in ((3, (20, 40, 200)), (12, (200, 100, 50))):
        assert (image[:, 8, x].int() - torch.tensor(colour)).abs().max() <= 12
    suffixes = [suffix for suffix, of in SUFFIXES.items() if of == kind]
    names = [f"a/{i}{suffix}" for i, suffix in enumerate(suffixes)] + [
        "a/none",
        "a/other.xyz",
        "a/UPPER" + suffixes[0].upper(),
    ]
    wrong = "a/wrong.jpg" if kind != "JPEG" else "a/wrong.png"
    (tmp_path / "a").mkdir()
    for name in (*names, wrong):
        (tmp_path / name).write_bytes(data)
    folder = Folder(tmp_path, size=16, **ALL)
    assert {entry.name for entry in folder.entries} == {*names, wrong}
    assert not folder.skipped
    images = folder.take(torch.arange(len(folder))).signals["image"]
    assert all(torch.equal(image, images[0]) for image in images)
    assert not folder.broken
    assert f"read by content, not by suffix (1): '{wrong}'" in capsys.readouterr().out


def test_heic_names_its_package_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(
        Refused, match=r"needs the package pi_heif: pip install 'selfflow\[heif\]'"
    ):
        read_header(HEIC.read_bytes(), "image")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "AVIF", "JPEG2000", "WEBP"])
def test_grey_stays_grey_with_one_channel(kind):
    image = read(
        image_file(kind, colours=((90, 90, 90), (200, 200, 200))),
        "image",
        Form(16, channels=1),
    )
    assert image.shape == (1, 16, 16)
    assert abs(int(image[0, 8, 3]) - 90) <= 6
    assert abs(int(image[0, 8, 12]) - 200) <= 6
    video = read(encoded([0, 100], times=[0, 100]), "video", Form(8, 2, channels=1))
    assert video.shape == (1, 2, 8, 8)
    assert abs(video[0, 1].float().mean() - 100) < 4
    with pytest.raises(ValueError, match="channels is 2"):
        Form(channels=2)


@pytest.mark.parametrize(
    "values, expected",
    [
        ((0, 1), [0, 255]),
        ((0.25, 0.5), [64, 128]),
        ((0, 300), None),
        ((-1, 1), None),
        ((float("nan"), 1), None),
    ],
)
def test_floating_point_numbers_from_0_to_1_are_brightness(values, expected):
    written = io.BytesIO()
    Image.fromarray(np.float32(values)[None].repeat(2, 0)).save(written, format="TIFF")
    if expected is None:
        with pytest.raises(Refused, match="holds numbers outside 0 to 1"):
            read(written.getvalue(), "image", Form(2))
    else:
        assert read(written.getvalue(), "image", Form(2))[1, 0].tolist() == expected


# Odd and unused files


def test_unused_files_are_counted_and_named(tmp_path, capsys):
    for name, data in {
        "fine.png": image_file("PNG"),
        "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(99),
        "desktop.ini": b"x",
        ".DS_Store": b"x",
        "notes.txt": b"x",
        "._fine.png": b"\0\5",
        "x.jxl": b"\xff\x0a" + bytes(99),
        "a.nef": image_file("TIFF"),
        "sub/labels.csv": b"file\n",
        "s.wav": audio_file(tones(8_000), 8_000, "WAV", "PCM_16"),
        "e": b"",
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        "a.zip": b"PK\3\4" + bytes(99),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    folder = Folder(tmp_path, **ALL)
    assert {reason: sorted(names) for reason, names in folder.skipped.items()} == {
        "cannot be read as image": ["Thumbs.db", "desktop.ini", "notes.txt", "s.wav"],
        "is JPEG XL, which is not read": ["x.jxl"],
        "is a camera's raw file, which is not read": ["a.nef"],
        "is empty": ["e"],
        "cannot be decoded": ["phone.heic"],
        "is a table of another name or place than metadata.csv": ["sub/labels.csv"],
        "is an archive, which is not read": ["a.zip"],
    }
    out = capsys.readouterr().out
    assert (
        "cannot be read as image (4): 'Thumbs.db', 'desktop.ini', 'notes.txt', ..."
        in out
    )
    assert "(1): 'x.jxl'" in out


def test_odd_images_are_reported(tmp_path, capsys):
    for name, size in (
        ("pixel", (1, 1)),
        ("strip", (300, 5)),
        ("wide", (120, 41)),
        ("fine", (90, 60)),
    ):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    Folder(tmp_path, size=64, **ALL)
    out = capsys.readouterr().out
    assert (
        "more than three times too long or too wide: only the middle is used (1): "
        "'strip.png'" in out
    )
    assert (
        "smaller than half of 64 x 64 pixels: enlarged (2): 'pixel.png', 'strip.png'"
        in out
    )
    assert "all images are grey; data.channels 1 keeps them grey" in out
    data = Folder(tmp_path, size=64, channels=1, **ALL)
    assert data.shapes == {"image": (1, 64, 64)}
    assert "grey" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text",
    [
        ("labels.csv", "filename,class\n1.png,x\n2.png,y\n"),
        ("labels.tsv", "file\tlabel\n1.png\tx\n2.png\ty\n"),
        ("metadata.tsv", "path\tlabel\n1\tx\n2\ty\n"),
    ],
)
def test_tables_of_other_names_give_classes(tmp_path, name, text):
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(image_file("PNG"))
    (tmp_path / name).write_text(text)
    folder = Folder(tmp_path, **ALL)
    assert folder.names == ("x", "y")
    assert not folder.skipped


# Audio


@pytest.mark.parametrize(
    "kind, subtype, rate",
    [(*kind, 48_000) for kind in AUDIO]
    + [("MP3", "MPEG_LAYER_III", 16_000), ("M4A", "aac", 16_000)],
)
def test_audio_of_any_kind_is_read_from_any_moment(kind, subtype, rate, tmp_path):
    data = audio_file(tones(rate), rate, kind, subtype)
    header = read_header(data, "audio")
    assert header.kind == kind
    assert header.seconds == pytest.approx(5, abs=1.5 if kind == "AAC" else 0.1)
    form = Form(samples=4_000)
    for begin, expected in ((0, 300), (1.25, 600), (2.2, 900), (4.3, 1_500)):
        audio = read(data, "audio", form, begin)
        assert audio.shape == (4_000,)
        assert pitch(audio) == expected
        assert 0.35 < audio[1_000:3_000].abs().max() < 0.5
    # the pitch changes in the middle of this window
    half = read(data, "audio", Form(samples=8_000), 1.5)
    assert pitch(half[:3_600]) == pytest.approx(600, abs=3)
    assert pitch(half[4_400:8_000]) == pytest.approx(900, abs=3)
    for suffix in ("", ".mp3", f".{kind.lower()}"):
        (tmp_path / f"a{suffix}").write_bytes(data)
        if kind != "M4A" or suffix != ".aac":
            assert torch.equal(
                read(Inside(tmp_path.resolve(), f"a{suffix}"), "audio", form),
                read(data, "audio", form),
            )


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([8_000, 11_025, 44_100, 48_000]),
    st.integers(0, 12_000),
    st.integers(50, 600),
)
def test_reading_from_a_later_moment_equals_that_part_of_the_file(rate, place, samples):
    written = io.BytesIO()
    values = np.random.default_rng(place).normal(0, 0.1, 2 * rate)
    smooth = np.convolve(values, np.hanning(41) / 20, "same").clip(-1, 1)
    soundfile.write(written, smooth, rate, format="WAV", subtype="FLOAT")
    complete = read(written.getvalue(), "audio", Form(samples=16_000))
    later = read(written.getvalue(), "audio", Form(samples=samples), place / 8_000)
    assert (later - complete[place : place + samples]).abs().max() < (
        1e-6 if rate == 8_000 else 0.02
    )


@settings(deadline=None, max_examples=60)
@given(
    st.data(),
    st.sampled_from(
        [(kind, "image") for kind in IMAGES[5:]]
        + [(form, "audio") for form in AUDIO[1:]]
    ),
)
def test_damaged_files_of_the_other_kinds_are_either_read_or_refused(data, kind):
    kind, signal = kind
    original = (
        image_file(kind)
        if signal == "image"
        else audio_file(tones(8_000, (300,), 0.2, 1), 16_000, *kind)
    )
    changed = bytearray(original[: data.draw(st.integers(12, len(original)))])
    for _ in range(data.draw(st.integers(0, 5))):
        # half of the changes are in the header
        limit = min(len(changed), data.draw(st.sampled_from([80, 10**6])))
        place = data.draw(st.integers(0, limit - 1))
        changed[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    form = Form(5, samples=100)
    for function in (lambda *a: read_header(*a[:2]), read, lambda *a: read(*a, 0.1)):
        try:
            result = function(bytes(changed), signal, form)
        except Refused:
            continue
        if not isinstance(result, Header):
            assert result.shape == form.shapes([signal])[signal]
            assert result.isfinite().all()


# Crops


@given(st.floats(0, 100), st.floats(0.1, 10), st.text(max_size=5))
def test_windows_lie_within_the_file_and_leave_no_gap(length, window, name):
    rest = max(0.0, length - window)
    assert begins_of(name, length, window, "start") == [0]
    assert begins_of(name, length, window, "centre") == [rest / 2]
    (begin,) = begins_of(name, length, window, "random")
    assert 0 <= begin <= rest
    assert begins_of(name, length, window, "random") == [begin]
    begins = begins_of(name, length, window, "all")
    assert begins[0] == 0
    assert begins[-1] <= rest + 1e-9
    assert all(
        b - a <= 1.101 * window for a, b in zip(begins, begins[1:], strict=False)
    )
    assert begins[-1] + 1.101 * window >= length, "the last window reaches the end"


@pytest.fixture
def audio_folder(tmp_path):
    "Three audio files of one, three and five seconds; the pitch changes each second."
    for name, pitches in (
        ("short", (300,)),
        ("long", (300, 600, 900)),
        ("longer", (300, 600, 900, 1_200, 1_500)),
    ):
        (tmp_path / f"{name}.wav").write_bytes(
            audio_file(tones(8_000, pitches), 8_000, "WAV", "PCM_16")
        )
    return tmp_path


@pytest.mark.parametrize(
    "crop, expected",
    [
        ("start", [300, 300, 300]),
        ("centre", [600, 900, 300]),
        ("all", [300, 600, 900, 300, 600, 900, 1_200, 1_500, 300]),
    ],
)
def test_a_crop_is_the_requested_part(audio_folder, crop, expected, capsys):
    data = Folder(audio_folder, "audio", samples=8_000, crop=crop, **ALL)
    assert (
        list(map(pitch, data.take(torch.arange(len(data))).signals["audio"]))
        == expected
    )
    out = capsys.readouterr().out
    assert "2 of 3 audio files are longer than 1 s: " in out
    assert {
        "start": "only their start is used; data.crop all uses every window, "
        "data.seconds 2 takes more",
        "centre": "only their middle is used",
        "all": "all are cut into 9 windows",
    }[crop] in out
    assert len({entry.name for entry in data.entries}) == len(data)


def test_a_random_window_depends_on_the_name_and_is_the_same_in_every_run(
    audio_folder,
):
    first, second = (
        Folder(audio_folder, "audio", samples=4_000, crop="random", **ALL)
        for _ in range(2)
    )
    taken = first.take(torch.arange(3)).signals["audio"]
    assert torch.equal(taken, second.take(torch.arange(3)).signals["audio"])
    assert first.fingerprint == second.fingerprint
    assert len({entry.begin for entry in first.entries}) == 3
    assert not torch.equal(taken[0], taken[1])
    assert (
        first.fingerprint
        != Folder(audio_folder, "audio", samples=4_000, **ALL).fingerprint
    )


def test_windows_of_a_file_stay_in_its_split(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.wav").write_bytes(
            audio_file(tones(8_000, (300, 600)), 8_000, "WAV", "PCM_16")
        )
    files = []
    for split in SPLITS:
        data = Folder(tmp_path, "audio", split, samples=8_000, crop="all")
        files.append({entry.name.split(" ")[0] for entry in data.entries})
    assert sum(map(len, files)) == len(set().union(*files)) == 12
    assert all(files)


@pytest.mark.parametrize("container", ["mp4", "gif"])
@pytest.mark.parametrize(
    "crop, expected",
    [
        ("start", [[0, 20, 40, 60]]),
        ("centre", [[80, 100, 120, 140]]),
        ("all", [[0, 20, 40, 60], [80, 100, 120, 140], [160, 180, 200, 220]]),
    ],
)
def test_videos_with_fps_are_cropped_by_time(
    tmp_path, container, crop, expected, capsys
):
    greys = list(range(0, 240, 20))
    if container == "gif":
        first, *rest = (Image.new("L", (16, 16), grey) for grey in greys)
        first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=100)
    else:
        (tmp_path / "a.mp4").write_bytes(
            encoded(greys, container, "mpeg4", [100 * i for i in range(12)])
        )
    data = Folder(tmp_path, "video", frames=4, fps=10, size=8, crop=crop, **ALL)
    videos = data.take(torch.arange(len(data))).signals["video"]
    greys_read = (videos.mean((1, 3, 4)) + 1) * 127.5
    assert (greys_read - torch.tensor(expected)).abs().max() < 5
    assert "1 of 1 videos are longer than 0.4 s: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "crop, count", [("start", 3), ("centre", 3), ("random", 3), ("all", 9)]
)
def test_rows_of_hugging_face_are_cropped_and_counted(
    audio_folder, tmp_path, crop, count, capsys
):
    rows = [
        {"audio": {"bytes": (audio_folder / f"{name}.wav").read_bytes(), "path": None}}
        for name in ("long", "longer", "short")
    ]
    features = datasets.Features(
        {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "stored"))
    data = HuggingFace(
        tmp_path / "stored", "audio", samples=8_000, crop=crop, carve=False
    )
    taken = data.take(torch.arange(len(data))).signals["audio"]
    assert len(data) == count
    assert "2 of 3 audio files are longer than 1 s: " in capsys.readouterr().out
    if crop != "random":
        assert pitch(taken[1]) == {"start": 300, "centre": 900, "all": 600}[crop]
    assert not data.broken


# Splits and training on few samples


@pytest.mark.parametrize("layout", ["flat", "train", "train+test", "train+validation"])
@pytest.mark.parametrize("store", ["folder", "huggingface"])
def test_twelve_images_are_enough_to_train(tmp_path, layout, store, capsys):
    datasets.disable_progress_bars()
    path = tmp_path / "data"
    splits = layout.split("+")
    colours = [((9 * i, 20, 200), (200, 9 * i, 50)) for i in range(12)]
    files = [image_file("PNG", colours=pair) for pair in colours]
    if store == "folder":
        for split in splits:
            for i, data in enumerate(files):
                folder = path / ("" if split == "flat" else split)
                file = folder / "xy"[i % 2] / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
    else:
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
        )
        rows = [
            {"image": {"bytes": data, "path": None}, "label": i % 2}
            for i, data in enumerate(files)
        ]
        table = datasets.Dataset.from_list(rows, features=features)
        if layout != "flat":
            table = datasets.DatasetDict(dict.fromkeys(splits, table))
        table.save_to_disk(str(path))
    config = DataConfig(store, path=str(path), height=8, width=8, patch=4)
    sizes = [len(Sources(config, split).data[store]) for split in SPLITS]
    assert sum(sizes) == 12 * len(splits)
    assert min(sizes) >= 1
    assert (
        "chosen by a hash of their names, are used" in capsys.readouterr().out
        or layout == "flat"
    )
    config = Config(
        "few",
        data=config,
        model=ModelConfig(width=32, depth=2, heads=2),
        objective=ObjectiveConfig("flow_matching"),
        # a batch larger than the data set
        training=replace(TINY.training, steps=3, batch=32),
    )
    run = train(config, tmp_path / "runs", "cpu", bar=False)
    assert run.log["flow_loss"].notna().all()
    assert len(run.sample([0, 0])["image"]) == 2


def test_three_good_files_are_enough_for_three_splits(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(image_file("PNG"))
    for i in range(10):
        (tmp_path / f"bad{i}.png").write_bytes(b"no image")
    assert [len(Folder(tmp_path, split=split)) for split in SPLITS] == [1, 1, 1]
    with pytest.raises(ValueError, match="no sample of split"):
        for split in SPLITS:
            Folder(tmp_path, split=split, carve=False)


# Settings of audio


def write_tone(path, rate, seconds, pitch):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        tone = 0.4 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
        file.writeframes((tone * 32_767).astype("<i2").tobytes())


@pytest.mark.parametrize(
    "rate, seconds, columns, sound",
    [
        (44_100, 0.3, 4, "mel"),
        (22_050, 0.5, 3, "mdct"),
        (4_000, 1.0, 1, "mel"),
    ],
)
def test_audio_of_another_rate_and_length_trains_and_is_written_at_that_rate(
    tmp_path, rate, seconds, columns, sound
):
    (tmp_path / "data").mkdir()
    for i in range(12):
        write_tone(tmp_path / f"data/{i}.wav", 44_100, 1, 300 + 20 * i)
    data = DataConfig(
        "folder",
        path=str(tmp_path / "data"),
        signals=("audio",),
        rate=rate,
        seconds=seconds,
        columns=columns,
        sound=sound,
    )
    sources = Sources(data)
    length = sources.data["folder"].shapes["audio"][0]
    assert abs(length / rate - seconds) < 0.02 * columns
    assert sources.data["folder"].rate == rate
    codec = sources.layouts["folder"].patches["audio"].codec
    assert codec.rate == rate
    assert 0.008 <= codec.seconds_per_column <= 0.0161
    waves = sources.data["folder"].take(torch.tensor([0])).signals["audio"]
    if sound == "mdct":
        torch.testing.assert_close(
            codec.decode(codec.encode(waves)), waves, atol=1e-4, rtol=0
        )
    else:
        decoded = codec.decode(codec.encode(waves))
        before = torch.fft.rfft(waves).abs()[0].argmax() * rate / length
        after = torch.fft.rfft(decoded).abs()[0].argmax() * rate / length
        assert abs(before - after) < 12, "the pitch is preserved"
    config = Config(
        "tones",
        data=data,
        model=ModelConfig(width=32, depth=2, heads=2),
        objective=ObjectiveConfig("flow_matching"),
        training=replace(TINY.training, steps=3, batch=8),
    )
    run = train(config, tmp_path / "runs", "cpu", bar=False)
    _, file = write_samples(run, [0, 0], steps=2)
    with wave.open(str(file.with_name(f"{file.stem}-000.wav"))) as written:
        assert written.getframerate() == rate
        assert written.getnframes() == length
        assert run.log["flow_loss"].notna().all()


def test_fingerprints_have_not_changed(tmp_path):
    for i in range(40):
        (tmp_path / "xy"[i % 2]).mkdir(exist_ok=True)
        with wave.open(str(tmp_path / "xy"[i % 2] / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 11_025, 0, "NONE", ""))
            file.writeframes(
                (np.sin(np.arange(20_000) * (i + 1) / 99) * 9_999)
                .astype("<i2")
                .tobytes()
            )
    config = DataConfig("folder", path=str(tmp_path), signals=("audio",))
    assert [
        (Sources(config, split).fingerprint, len(Sources(config, split).data["folder"]))
        for split in SPLITS
    ] == [("43a24beb84ce45c9", 31), ("f17f7089f85d00e5", 2), ("8833756c5b323b86", 7)], (
        "as before the settings of audio were added"
    )


def test_grey_images_and_videos_train_with_one_channel(tmp_path):
    for i in range(12):
        first, *rest = (Image.new("L", (8, 8), grey) for grey in (10 * i, 10 * i + 40))
        first.save(
            tmp_path / f"{i}.gif", save_all=True, append_images=rest, duration=100
        )
    for signal in ("image", "video"):
        data = DataConfig(
            "folder",
            path=str(tmp_path),
            signals=(signal,),
            height=8,
            width=8,
            frames=2,
            patch=4,
            channels=1,
        )
        config = Config(
            signal,
            data=data,
            model=ModelConfig(width=32, depth=2, heads=2),
            objective=ObjectiveConfig("flow_matching"),
            training=replace(TINY.training, steps=3, batch=8),
        )
        run = train(config, tmp_path / "runs", "cpu", bar=False)
        images, file = write_samples(run, [0, 0], steps=2)
        assert images.shape[:2] == (2, 1)
        assert file.with_suffix(".png").exists()


def test_the_default_number_of_samples_has_not_changed():
    data = DataConfig("folder", path="x")
    assert data.samples == replace(data, columns=64).samples == 8_192
    assert replace(data, rate=16_000, seconds=2).samples == 31_744, "62 tokens of 32 ms"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rate": 10}, "data.rate is 10"),
        ({"seconds": 0.0}, "seconds"),
        ({"fps": -1.0}, "data.fps"),
        ({"crop": "middle"}, "unknown crop"),
        ({"channels": 2}, "data.channels is 2; use 3"),
        ({"signals": ("video", "audio"), "fps": 12.0}, "or data.seconds to 1.333"),
    ],
)
def test_invalid_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DataConfig("folder", path="x", **change)


def test_video_with_audio_has_the_requested_length(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_bytes(
            encoded(
                list(range(0, 240, 20)), "mp4", "mpeg4", [100 * k for k in range(12)]
            )
        )
        write_tone(tmp_path / f"{i}.wav", 8_000, 1.2, 440)
    config = DataConfig(
        "folder",
        path=str(tmp_path),
        signals=("video", "audio"),
        frames=4,
        height=8,
        width=8,
        patch=4,
        seconds=0.512,
    )
    data = Sources(replace(config, crop="all")).data["folder"]
    assert data.fps == pytest.approx(4 / 0.512)
    assert data.shapes["audio"] == (4_096,)
    assert [round(entry.begin, 3) for entry in data.entries] == [0, 0.344, 0.688]
    assert Sources(replace(config, fps=7.8)).data["folder"].fps == 7.8
