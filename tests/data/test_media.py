"""Videos that PyAV reads: frames are chosen by time, and damaged files are refused."""

import io
import struct
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY
from encoded import encoded, video_frame
from hypothesis import given, settings
from hypothesis import strategies as st

import selfflow.data.decoding as decoding
from selfflow.data.decoding import Form, Header, frame_indices, read, read_header
from selfflow.data.files import Inside, Refused
from selfflow.data.folders import Folder
from selfflow.data.options import DataConfig
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.training.loop import train

GREYS = [0, 40, 80, 120, 160, 200]
KINDS = [
    ("mp4", "mpeg4"),
    ("mp4", "libx264"),
    ("webm", "libvpx-vp9"),
    ("webm", "libvpx"),
    ("matroska", "libx264"),
    ("avi", "mpeg4"),
]


def available(codec):
    try:
        av.codec.Codec(codec, "w")
    except (ValueError, av.error.FFmpegError):
        return False
    return True


def each(*kinds):
    "Parametrise a test by containers and codecs; skip codecs FFmpeg cannot encode."
    return pytest.mark.parametrize(
        "container, codec",
        [
            pytest.param(
                *kind,
                marks=pytest.mark.skipif(
                    not available(kind[1]), reason="this FFmpeg cannot encode it"
                ),
            )
            for kind in kinds or KINDS
        ],
    )


def greys(video):
    "Return the grey of each frame; each frame must be of one grey."
    assert video.dtype == torch.uint8
    assert (video.int() - video[:1, :, :1, :1].int()).abs().max() <= 6
    return video.float().mean((0, 2, 3))


def assert_shows(data, form, expected, tolerance=4):
    read_header(data, "video")
    actual = greys(read(data, "video", form))
    assert len(actual) == form.frames
    assert (actual - torch.tensor(expected)).abs().max() <= tolerance, actual


def reason_of(data, function=read, form=None):
    with pytest.raises(Refused) as caught:
        function(data, "video", *([form or Form(8, 4)] if function is read else []))
    return caught.value.reason


# By time


@each()
@pytest.mark.parametrize("audio", [0, 0.5])
def test_constant_frame_rates_are_followed_with_and_without_audio(
    container, codec, audio
):
    data = encoded(GREYS, container, codec, rate=10, base=10, audio=audio)
    assert_shows(data, Form(8, 6, 10), GREYS)
    assert_shows(data, Form(8, 3, 5), GREYS[1::2])
    assert_shows(data, Form(8, 2, 1_000), [0, 0])
    assert_shows(data, Form(8, 6), GREYS)
    assert_shows(data, Form(8, 12), np.repeat(GREYS, 2).tolist())


# when each frame is shown, in ms; the last lasts the 100 ms of the rate
UNEVEN = [0, 20, 520, 540, 840, 870]


@each(*[kind for kind in KINDS if kind[0] != "avi"], ("matroska", "ffv1"))
@pytest.mark.parametrize("first", [0, 3_000])
@pytest.mark.parametrize(
    "frames, fps", [(4, None), (12, None), (9, 10), (50, 50), (2, 4)]
)
def test_variable_frame_rates_follow_time_not_count(
    container, codec, first, frames, fps
):
    data = encoded(GREYS, container, codec, [first + time for time in UNEVEN], rate=10)
    slot = 1_000 / fps if fps else 970 / frames
    middles = [(i + 0.5) * slot + 1e-3 for i in range(frames)]
    expected = [
        GREYS[max(k for k in range(6) if UNEVEN[k] <= middle)] for middle in middles
    ]
    assert frames < 12 or expected != [GREYS[i * 6 // frames] for i in range(frames)], (
        "choosing frames evenly would give another result"
    )
    assert_shows(data, Form(8, frames, fps), expected)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=12),
    st.integers(1, 20),
    st.sampled_from([None, 3, 10, 25]),
)
def test_any_timestamps_are_followed(gaps, frames, fps):
    times = [sum(gaps[:i]) for i in range(len(gaps))]
    data = encoded(
        [20 * i for i in range(len(gaps))], "matroska", "ffv1", times, rate=10
    )
    chosen = frame_indices(
        [time / 1_000 for time in times], (times[-1] + 100) / 1_000, frames, fps
    )
    assert_shows(data, Form(4, frames, fps), [20 * i for i in chosen], tolerance=1)


@each()
def test_short_videos_repeat_their_last_frame(container, codec):
    assert_shows(encoded([90], container, codec, base=10), Form(8, 5), [90] * 5)
    assert_shows(encoded([90], container, codec, base=10), Form(8, 5, 30), [90] * 5)
    assert_shows(
        encoded([90, 180], container, codec, base=10), Form(8, 5, 10), [90] + [180] * 4
    )


def test_a_last_frame_of_unknown_duration_lasts_like_the_previous_one(
    monkeypatch,
):
    # the rate says that the last frame lasts 1 ms
    data = encoded(GREYS[:4], "matroska", "ffv1", [0, 1_000, 2_000, 3_000], rate=1_000)
    real = decoding._container

    class WithoutDurations:
        def __init__(self, container):
            self.container = container
            self.decode = container.decode
            self.duration = container.duration

        def demux(self, stream):
            for packet in self.container.demux(stream):
                packet.duration = 0
                yield packet

    @decoding.contextmanager
    def container(*arguments):
        with real(*arguments) as (opened, stream):
            yield WithoutDurations(opened), stream

    assert_shows(data, Form(4, 4), [0, 40, 40, 80])
    monkeypatch.setattr(decoding, "_container", container)
    assert_shows(data, Form(4, 4), [0, 40, 80, 120])


def test_frames_cut_by_an_edit_list_are_not_shown():
    data = encoded(
        GREYS,
        "mp4",
        "libx264",
        [-200, -100, 0, 100, 200, 300],
        muxer={"avoid_negative_ts": "disabled"},
    )
    with av.open(io.BytesIO(data)) as file:
        assert sum(packet.is_discard for packet in file.demux(video=0)) == 2
    assert_shows(data, Form(8, 4), GREYS[2:])
    assert_shows(data, Form(8, 4, 10), GREYS[2:])


def test_with_fps_only_the_requested_beginning_is_decoded():
    data = bytearray(encoded([10 * i for i in range(20)], "mp4", "mpeg4"))
    end = data.rindex(b"moov") - 4
    with av.open(io.BytesIO(data)) as file:
        at = [packet.pos for packet in file.demux(video=0) if packet.pos is not None]
    data[at[8] : end] = bytes(end - at[8])  # the rest is damaged
    assert_shows(bytes(data), Form(8, 5, 10), [0, 10, 20, 30, 40], tolerance=6)
    assert reason_of(bytes(data)) == "cannot be decoded"


# Size, rotation and several streams


@each(("mp4", "mpeg4"), ("webm", "libvpx-vp9"), ("webm", "libvpx"))
@pytest.mark.parametrize("size", [(33, 17), (17, 33), (1, 1), (3, 64), (65, 2)])
def test_videos_with_odd_sides_are_read(container, codec, size):
    assert_shows(
        encoded(GREYS, container, codec, size=size), Form(8, 6, 10), GREYS, tolerance=6
    )


@pytest.mark.parametrize("form", ["yuv444p", "yuv420p10le", "yuvj420p"])
@pytest.mark.skipif(not available("libx264"), reason="this FFmpeg cannot encode it")
def test_all_pixel_formats_are_read(form):
    assert_shows(
        encoded(GREYS, "mp4", "libx264", form=form), Form(8, 6, 10), GREYS, tolerance=6
    )


def quarters(size, values=((0, 80), (160, 240))):
    return np.kron(
        np.array(values, np.uint8), np.ones((size // 2, size // 2), np.uint8)
    )[..., None].repeat(3, 2)


@each(("mp4", "mpeg4"), ("mp4", "libx264"))
@pytest.mark.parametrize(
    "matrix, expected",
    [
        ((1, 0, 0, 1), [0, 80, 160, 240]),
        ((0, 1, -1, 0), [160, 0, 240, 80]),
        ((-1, 0, 0, -1), [240, 160, 80, 0]),
        ((0, -1, 1, 0), [80, 240, 0, 160]),
    ],
)
def test_videos_are_rotated_as_declared(container, codec, matrix, expected):
    """Rotation by the matrix of ISO 14496-12, 8.3.2: x' = a x + c y, y' = b x + d y."""
    data = encoded([quarters(32)] * 3, container, codec)

    def rows(a, b, c, d):
        return struct.pack(
            ">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30
        )

    at = data.index(b"tkhd")
    assert data.count(rows(1, 0, 0, 1), at) == 1
    video = read(
        data[:at] + data[at:].replace(rows(1, 0, 0, 1), rows(*matrix)),
        "video",
        Form(32, 2),
    ).float()
    corners = video[0, 0, 8::16, 8::16].flatten()
    assert (corners - torch.tensor(expected)).abs().max() <= 6


def test_the_central_square_of_a_wide_video_is_used():
    border = np.full((32, 16, 3), 255, np.uint8)
    wide = np.concatenate([border, quarters(32), border], 1)
    video = read(encoded([wide] * 2, size=(64, 32)), "video", Form(32, 1)).float()
    expected = torch.tensor([[0.0, 80], [160, 240]])
    assert (video[:, 0, 8::16, 8::16] - expected).abs().max() <= 6


def with_cover(cover, video):
    "Return an MP4 file with audio and, if requested, cover art and a video."
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as file:
        streams = []
        for codec, form, grey, requested in (
            ("mjpeg", "yuvj420p", 255, cover),
            ("mpeg4", "yuv420p", 50, video),
        ):
            if requested:
                stream = file.add_stream(codec, rate=10)
                stream.width, stream.height, stream.pix_fmt = 32, 32, form
                streams.append((stream, grey))
        if cover:
            streams[0][0].disposition = av.stream.Disposition.attached_pic
        tone = file.add_stream("aac", rate=48_000, layout="mono")
        for stream, grey in streams:
            frame = video_frame(grey, (32, 32))
            frame.pts = 0
            frame.time_base = Fraction(1, 10)
            file.mux(stream.encode(frame))
            file.mux(stream.encode())
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1_024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = 48_000, 0
        file.mux(tone.encode(frame))
        file.mux(tone.encode())
    return written.getvalue()


def test_cover_art_is_not_a_video():
    assert_shows(with_cover(True, True), Form(8, 2), [50, 50])
    for function in (read_header, read):
        assert (
            reason_of(with_cover(True, False), function)
            == reason_of(with_cover(False, False), function)
            == "is no video"
        )


def test_the_container_is_chosen_by_content_and_not_guessed_by_ffmpeg(monkeypatch):
    opened = set()
    real = av.open
    files = [encoded(GREYS, container) for container in ("mp4", "matroska", "avi")]
    monkeypatch.setattr(
        av,
        "open",
        lambda file, mode, format: (
            opened.add(format) or real(file, mode=mode, format=format)
        ),
    )
    for data in files:
        read(data, "video", Form(8, 2))
    assert opened == {"mov", "matroska", "avi"}
    playlist = b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"
    assert reason_of(playlist) == "cannot be read as video"
    assert reason_of(b"\0\0\0\x08ftypisom" + playlist) == "cannot be decoded"


# Damage

CONTAINERS = [
    ("mp4", {}),
    ("mp4", {"movflags": "faststart"}),
    ("mp4", {"movflags": "frag_every_frame+empty_moov"}),
    ("matroska", {}),
    ("webm", {}),
    ("avi", {}),
]


def video_file(container, muxer, tmp_path):
    codec = "libvpx" if container == "webm" else "mpeg4"
    if muxer.get("movflags") == "faststart":  # FFmpeg does this only with files
        with (
            av.open(str(tmp_path / "video.mp4"), "w", options=muxer) as file,
            av.open(io.BytesIO(encoded(GREYS))) as source,
        ):
            stream = file.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    file.mux(packet)
        return (tmp_path / "video.mp4").read_bytes()
    return encoded(GREYS, container, codec, muxer=muxer, base=10)


@pytest.mark.parametrize("container, muxer", CONTAINERS)
def test_truncated_videos_are_refused_by_their_header(container, muxer, tmp_path):
    data = video_file(container, muxer, tmp_path)
    assert_shows(data, Form(8, 6, 10), GREYS)
    assert_shows(data + bytes(100), Form(8, 6, 10), GREYS)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        cut = data[: int(len(data) * share)]
        assert (
            reason_of(cut, read_header)
            == reason_of(cut)
            == "is shorter than it declares"
        ), share
    assert reason_of(data[:40], read_header) in (
        "is shorter than it declares",
        "cannot be decoded",
    )


def test_live_recordings_declare_no_length():
    live = encoded(GREYS, "matroska", "mpeg4", muxer={"live": "1"})
    assert b"\x18\x53\x80\x67\x01" + b"\xff" * 7 in live, "a segment of unknown length"
    assert_shows(live, Form(8, 6, 10), GREYS)
    avi = encoded(GREYS, "avi", "mpeg4", base=10)
    for unknown in (bytes(4), b"\xff" * 4):
        assert_shows(avi[:4] + unknown + avi[8:], Form(8, 6, 10), GREYS)


def test_mp4_with_64_bit_lengths_and_many_boxes_is_read():
    data = encoded(GREYS)
    at = data.index(b"mdat") - 4
    assert data[at - 8 : at] == b"\0\0\0\x08free", (
        "FFmpeg leaves space for a 64-bit length"
    )
    length = struct.unpack(">I", data[at : at + 4])[0]
    for declared, reason in (
        (length + 8, None),
        (length + len(data), "is shorter"),
        (2**64 - 1, "is shorter"),
    ):
        long = (
            data[: at - 8] + struct.pack(">I4sQ", 1, b"mdat", declared) + data[at + 8 :]
        )
        assert reason or read(long, "video", Form(8, 2)).shape == (3, 2, 8, 8)
        assert not reason or reason_of(long, read_header).startswith(reason)
    for count in (1_000, 2**17 + 1):  # more than the reader looks at
        boxes = struct.pack(">I4s", 8, b"free") * count
        many = data[: at + length] + boxes + data[at + length :]
        assert_shows(many, Form(8, 6, 10), GREYS)


def two_sizes(container, codec, first, second):
    "Return a video whose later frames have another size than its header says."
    written = io.BytesIO()
    with av.open(written, "w", format=container) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *first, "yuv420p"
        file.start_encoding()
        for half, size in enumerate((first, second)):
            coder = av.CodecContext.create(codec, "w")
            coder.width, coder.height = size
            coder.pix_fmt = "yuv420p"
            coder.time_base = Fraction(1, 10)
            coder.framerate = 10
            packets = []
            for i in range(3):
                frame = video_frame(60 * half + 20 * i, size)
                frame.pts = 3 * half + i
                frame.time_base = Fraction(1, 10)
                packets += coder.encode(frame)
            for packet in packets + coder.encode():
                packet.stream = stream
                file.mux(packet)
    return written.getvalue()


@each(
    ("webm", "libvpx-vp9"),
    ("webm", "libvpx"),
    ("mp4", "mpeg4"),
    ("matroska", "libx264"),
)
def test_headers_that_declare_fewer_pixels_do_no_harm(container, codec, monkeypatch):
    data = two_sizes(container, codec, (16, 16), (64, 64))
    assert_shows(data, Form(8, 6, 10), [0, 20, 40, 60, 80, 100])
    monkeypatch.setattr(decoding, "_PIXELS", 1_000)
    assert reason_of(data, form=Form(8, 6)) == "cannot be decoded", (
        "FFmpeg refuses before it allocates memory"
    )
    monkeypatch.setattr(decoding, "_PIXELS", 2**26)
    monkeypatch.setattr(decoding, "_VIDEO_PIXELS", 6 * 64 * 64 - 1)
    assert reason_of(data, form=Form(8, 6)) == "is too long a video"


def test_videos_that_are_too_long_or_large_are_refused(monkeypatch):
    data = encoded(GREYS)
    monkeypatch.setattr(decoding, "_VIDEO_PIXELS", 3 * 32 * 32)
    assert reason_of(data) == "is too long a video"
    assert_shows(data, Form(8, 3, 10), GREYS[:3])
    monkeypatch.setattr(decoding, "_PIXELS", 1_000)
    assert reason_of(data, read_header) == reason_of(data) == "declares too many pixels"


@settings(deadline=None, max_examples=50)
@given(st.data(), st.sampled_from(["mp4", "matroska", "avi"]))
def test_damaged_videos_are_either_read_or_refused(data, container):
    changed = bytearray(SHORT_VIDEOS[container])
    changed = changed[: data.draw(st.integers(12, len(changed)))]
    for _ in range(data.draw(st.integers(0, 6))):
        # half of the changes are in the header
        limit = min(len(changed), data.draw(st.sampled_from([600, 10**6])))
        place = data.draw(st.integers(0, limit - 1))
        changed[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    for function in (lambda *a: read_header(*a[:2]), read):
        try:
            result = function(bytes(changed), "video", Form(5, 4))
        except Refused:
            continue
        assert isinstance(result, Header) or result.shape == (3, 4, 5, 5)


SHORT_VIDEOS = {
    container: encoded(GREYS, container, "mpeg4", base=10, audio=0.2)
    for container in ("mp4", "matroska", "avi")
}


def test_videos_in_a_folder_are_read(tmp_path):
    (tmp_path / "video.mp4").write_bytes(SHORT_VIDEOS["mp4"])
    assert_shows(Inside(tmp_path.resolve(), "video.mp4"), Form(8, 6, 10), GREYS)
    (tmp_path / "video.mkv").write_bytes(SHORT_VIDEOS["mp4"])
    assert_shows(Inside(tmp_path.resolve(), "video.mkv"), Form(8, 6, 10), GREYS)
    (tmp_path / "text.mkv").write_text("hello")
    assert (
        reason_of(Inside(tmp_path.resolve(), "text.mkv"))
        == "is not what its suffix says"
    )


def write_clip(path, video, level=0.3, rate=44_100, channels=2, suffix="wav"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video)
    soundfile.write(
        path.with_suffix(f".{suffix}"),
        np.full((rate // 2, channels), level),
        rate,
        subtype="PCM_16" if suffix == "flac" else "FLOAT",
    )


def test_a_run_survives_bad_videos_and_audio(tmp_path, capsys):
    data = tmp_path / "clips"
    kinds = {
        "mp4": ("mp4", 44_100, 2),
        "mkv": ("matroska", 8_000, 1),
        "avi": ("avi", 48_000, 6),
    }
    for i in range(24):
        suffix, (container, rate, channels) = list(kinds.items())[i % 3]
        times = None if suffix == "avi" else UNEVEN[:4]
        write_clip(
            data / "train/cat" / f"{i}.{suffix}",
            encoded(GREYS[:4], container, "mpeg4", times, audio=0.2 * (i % 2)),
            0.3,
            rate,
            channels,
            "flac" if i % 2 else "wav",
        )
    for split in ("validation", "test"):
        write_clip(data / f"{split}/cat/good.mp4", encoded(GREYS))
    bad = data / "train/cat"
    video = encoded(GREYS, audio=0.2)
    # the header is intact, the frames are not
    damaged = video[:200] + bytes(len(video) // 3) + video[200 + len(video) // 3 :]
    for name, content in {
        "cut.mp4": video[:-20],
        "empty.mp4": b"",
        "text.mkv": b"hello",
        "other.avi": video,
        "late.mp4": damaged,
    }.items():
        write_clip(bad / name, content)
    write_clip(bad / "nan.mp4", video, np.nan)
    write_clip(bad / "silent.mp4", video, 0.0)
    write_clip(bad / "lone.mp4", video)
    (bad / "lone.wav").unlink()
    config_of_data = DataConfig(
        "folder",
        path=str(data),
        signals=("video", "audio"),
        height=8,
        width=8,
        frames=4,
        patch=4,
        columns=4,
    )
    config = replace(
        TINY,
        data=config_of_data,
        model=ModelConfig(width=32, depth=2, heads=2),
        objective=ObjectiveConfig("flow_matching"),
        training=replace(TINY.training, steps=4, batch=16),
    )
    run = train(config, tmp_path / "runs", "cpu", bar=False)
    printed = capsys.readouterr().out
    assert run.log["flow_loss"].notna().all()
    assert len(run.log) == 4
    for words in (
        "clips: 28 samples (video, audio) of split train",
        "read by content, not by suffix (1)",
        "has no audio of its name (1)",
        "is empty (1)",
        "is shorter than it declares (1)",
        "is not what its suffix says (1)",
        "'train/cat/silent' is silent",
        "the next good sample is used",
    ):
        assert words in printed
    folder = Folder(data, ("video", "audio"), size=8, frames=4)
    folder.take(torch.arange(28))
    assert folder.broken.keys() == {
        "train/cat/late",
        "train/cat/nan",
    }
    assert folder.silent.keys() == {"train/cat/silent"}
