"""Long recordings, mixed rates and channels and unequal loudness are handled.

What was cut, mixed, scaled or skipped is reported in one line.
"""

import io
from dataclasses import asdict

import numpy as np
import pytest
import torch
from encoded import encoded
from scipy.io import wavfile

from selfflow.data.decoding import Form, at_loudness, read_header
from selfflow.data.files import Refused
from selfflow.data.folders import Folder
from selfflow.data.options import DataConfig
from selfflow.data.sources import Outline, open_dataset

ALL = {"shares": (1, 0, 0)}


def wav(seconds, rate=8_000, channels=1, level=0.5, pitch=440):
    time = np.arange(int(seconds * rate)) / rate
    tone = np.rint(level * np.sin(2 * np.pi * pitch * time) * 32_767).astype(np.int16)
    written = io.BytesIO()
    wavfile.write(written, rate, np.stack([tone] * channels, 1))
    return written.getvalue()


@pytest.fixture
def recordings(tmp_path):
    for name, content in {
        "long": wav(3.5, 44_100, 2),
        "quiet": wav(1, 8_000, level=0.01),
        "short": wav(0.5, 16_000),
        "empty": wav(0),
        "cut": wav(2)[:-100],
    }.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
    return tmp_path


def test_one_line_reports_what_was_cut_mixed_and_skipped(recordings, capsys):
    data = Folder(recordings, "audio", samples=8_000, crop="all", **ALL)
    (line,) = capsys.readouterr().out.splitlines()
    assert len(data) == 6
    for words in (
        "1 of 3 audio files are longer than 1 s: all are cut into 6 windows",
        "2 of 3 audio files are resampled from 44,100, 16,000 to 8,000 Hz",
        "1 of 3 audio files have several channels, which are mixed down",
        "holds no audio (1): 'empty.wav'",
        "is shorter than it declares (1): 'cut.wav'",
    ):
        assert words in line
    # every window of the long recording, at the same pitch and level
    waves = data.take(torch.arange(len(data))).signals["audio"]
    at_440 = [torch.fft.rfft(wave).abs().argmax().item() for wave in waves[:4]]
    assert at_440 == [440] * 4
    assert waves[:4].abs().amax(1).allclose(torch.tensor(0.5), atol=0.02)


def test_the_record_of_a_run_holds_these_notes(recordings):
    (recordings / "train").mkdir()
    for file in recordings.glob("*.wav"):
        file.rename(recordings / "train" / file.name)
    config = DataConfig(
        "folder",
        path=str(recordings),
        signals=("audio",),
        seconds=1.024,
        crop="all",
        carve=False,
    )
    train = open_dataset(config, "train")
    outline = Outline.of(train, train)
    assert any("are cut into" in note for note in outline.notes)
    assert Outline(**asdict(outline)) == outline
    record = asdict(outline)
    del record["notes"]  # as in older runs
    assert Outline(**record).notes == ()


@pytest.mark.parametrize("loudness", ["peak", "rms", "lufs"])
def test_all_files_get_one_loudness_and_nothing_is_clipped(recordings, loudness):
    plain = Folder(recordings, "audio", samples=4_000, **ALL)
    data = Folder(recordings, "audio", samples=4_000, loudness=loudness, **ALL)
    before = plain.take(torch.arange(3)).signals["audio"]
    after = data.take(torch.arange(3)).signals["audio"]
    assert before.abs().amax(1).max() > 40 * before.abs().amax(1).min()
    peaks = after.abs().amax(1)
    assert peaks.max() < 1.15 * peaks.min()
    assert peaks.max() <= 1
    factors = (after * before).sum(1) / before.square().sum(1)
    torch.testing.assert_close(after, before * factors[:, None], atol=1e-4, rtol=1e-4)
    assert data.fingerprint != plain.fingerprint
    same = Folder(recordings, "audio", samples=4_000, loudness="none", **ALL)
    assert same.fingerprint == plain.fingerprint


def test_silence_clicks_and_short_audio_have_a_loudness():
    silence = np.zeros(100, np.float32)
    click = np.eye(1, 8_000, dtype=np.float32)[0]
    for loudness in ("peak", "rms", "lufs"):
        assert at_loudness(silence, 8_000, loudness) is silence
        assert np.abs(at_loudness(click, 8_000, loudness)).max() <= 1
    short = np.sin(np.arange(200, dtype=np.float32)) / 20
    louder = at_loudness(short, 8_000, "lufs")
    assert 1.2 < np.abs(louder).max() / np.abs(short).max() < 4
    loud = 3 * np.sin(np.arange(8_000, dtype=np.float32))
    assert np.abs(at_loudness(loud, 8_000, "rms")).max() < 0.2  # not clipped first
    with pytest.raises(ValueError, match="unknown loudness 'loud'"):
        Form(loudness="loud")
    with pytest.raises(ValueError, match="data.loudness"):
        DataConfig("folder", path="x", signals=("audio",), loudness="loud")


def test_audio_of_zero_length_is_refused_in_any_container():
    soundfile = pytest.importorskip("soundfile")
    files = {"wav": wav(0)}
    for kind in ("flac", "ogg"):
        written = io.BytesIO()
        soundfile.write(written, np.zeros((0, 1)), 8_000, format=kind)
        files[kind] = written.getvalue()
    for kind, content in files.items():
        with pytest.raises(Refused) as refused:
            read_header(content, "audio")
        assert kind != "wav" or "its length is zero" in str(refused.value)


def test_a_message_on_long_videos_explains_how_to_cut_clips(tmp_path, capsys):
    times = [0, 100, 1_900, 2_000, 9_000]  # ms: a variable frame rate
    (tmp_path / "a.mp4").write_bytes(encoded([0, 60, 120, 180, 240], times=times))
    Folder(tmp_path, "video", frames=4, size=8, **ALL)
    assert "4 frames are spread over all of it" in capsys.readouterr().out
    data = Folder(tmp_path, "video", frames=4, fps=4, size=8, crop="all", **ALL)
    assert "all are cut into 9 windows" in capsys.readouterr().out
    videos = data.take(torch.tensor([0, 2])).signals["video"]
    greys = (videos.mean((1, 3, 4)) + 1) * 127.5
    # by time: the second frame is shown from 0.1 s to 1.9 s, the fourth for 7 s
    expected = [[60] * 4, [180] * 4]
    assert (greys - torch.tensor(expected)).abs().max() < 8, greys
