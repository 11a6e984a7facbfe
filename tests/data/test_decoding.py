"""Images, audio and video decode to the requested form; damaged files are refused."""

import io
import math
import struct
import sys
import warnings
import wave
import zlib
from fractions import Fraction

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import wavfile
from scipy.signal import resample_poly

from selfflow.data.decoding import Form, Header, frame_indices, read, read_header
from selfflow.data.files import Inside, Refused


def encoded(image, kind, **options):
    written = io.BytesIO()
    image.save(written, format=kind, **options)
    return written.getvalue()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def reason_of(data, signal, form=None, function=read):
    with pytest.raises(Refused) as caught:
        if function is read:
            read(data, signal, form or Form())
        else:
            function(data, signal)
    return caught.value.reason


# Form


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": 8.5},
        {"size": True},
        {"size": "32"},
        {"size": 10**9},
        {"frames": 0},
        {"samples": 0},
        {"samples": 2**40},
        {"rate": 999},
        {"rate": 10**6},
        {"fps": 0},
        {"fps": math.nan},
        {"fps": math.inf},
        {"fps": "12"},
    ],
)
def test_invalid_forms_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is {change[name]!r}, expected"):
        Form(**change)


def test_a_form_gives_the_shape_of_each_signal():
    assert Form((4, 9), 5).shapes(("video", "image")) == {
        "video": (3, 5, 4, 9),
        "image": (3, 4, 9),
    }
    with pytest.raises(ValueError, match="size is 0, expected"):
        Form((8, 0))
    assert Form(9, 5, None, 8_000, 77).shapes(("audio", "video", "image")) == {
        "audio": (77,),
        "video": (3, 5, 9, 9),
        "image": (3, 9, 9),
    }


# Images


@pytest.mark.parametrize(
    "size, wanted",
    [((12, 20), (12, 8)), ((12, 20), (6, 20)), ((20, 12), (4, 12)), ((14, 6), (14, 6))],
)
def test_the_central_crop_has_the_requested_aspect_ratio(size, wanted):
    values = pixels(*size, 3)
    image = read(encoded(Image.fromarray(values), "PNG"), "image", Form(wanted))
    top = (size[0] - wanted[0]) // 2
    left = (size[1] - wanted[1]) // 2
    crop = values[top : top + wanted[0], left : left + wanted[1]]
    assert np.array_equal(image, crop.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "height, width, wanted",
    [(7, 13, (3, 5)), (640, 427, (32, 48)), (1, 9, (5, 7)), (333, 1000, (31, 17))],
)
def test_images_are_scaled_to_any_aspect_ratio(height, width, wanted):
    image = read(
        encoded(Image.new("RGB", (width, height), (200, 100, 50)), "PNG"),
        "image",
        Form(wanted),
    )
    assert image.shape == (3, *wanted)
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [200, 100, 50]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("height, width", [(8, 8), (8, 13), (12, 8)])
def test_the_central_square_at_the_same_size_is_exact(kind, height, width):
    values = pixels(height, width, 3)
    image = read(
        encoded(
            Image.fromarray(values),
            kind,
            **({"lossless": True} if kind == "WEBP" else {}),
        ),
        "image",
        Form(8),
    )
    top = (height - 8) // 2
    left = (width - 8) // 2
    expected = values[top : top + 8, left : left + 8].transpose(2, 0, 1)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 8, 8)
    assert image.is_contiguous()
    if (height - 8) % 2 == (width - 8) % 2 == 0:
        assert np.array_equal(image, expected)
    else:  # the crop begins at half a pixel
        assert np.abs(image.numpy().mean() - expected.mean()) < 30


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from(["PNG", "BMP", "GIF", "JPEG", "WEBP"]),
)
def test_any_size_is_scaled_and_a_plain_image_stays_plain(width, height, size, kind):
    image = read(
        encoded(Image.new("RGB", (width, height), (200, 100, 50)), kind),
        "image",
        Form(size),
    )
    assert image.shape == (3, size, size)
    assert (image.int() - torch.tensor([200, 100, 50])[:, None, None]).abs().max() <= 3


def test_shrinking_averages_pixels():
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = read(
        encoded(Image.fromarray(board.astype(np.uint8)), "PNG"), "image", Form(8)
    )
    assert (image.float() - 127.5).abs().max() < 4, (
        "a fine chequerboard becomes grey, not black or white"
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_orientation_in_the_exif_data_is_applied(orientation, kind):
    upright = pixels(8, 8, 3)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(
        Image.fromarray(np.ascontiguousarray(stored)),
        kind,
        exif=exif,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert np.array_equal(read(data, "image", Form(8)), upright.transpose(2, 0, 1))


def test_transparent_pixels_become_white():
    alpha = np.zeros((4, 4, 4), np.uint8)
    alpha[..., 0], alpha[0, :, 3], alpha[1, :, 3] = 200, 255, 128
    image = read(encoded(Image.fromarray(alpha), "PNG"), "image", Form(4))
    assert image[:, 0, 0].tolist() == [200, 0, 0]
    assert image[:, 3, 0].tolist() == [255, 255, 255]
    expected = [round((c * 128 + 255 * 127) / 255) for c in (200, 0, 0)]
    assert np.abs(np.subtract(image[:, 1, 0].tolist(), expected)).max() <= 1
    index = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    index.putpalette([10, 20, 30, 40, 50, 60])
    image = read(encoded(index, "PNG", transparency=0), "image", Form(2))
    assert image[:, 0, 0].tolist() == [255] * 3
    assert image[:, 0, 1].tolist() == [40, 50, 60]
    grey = read(
        encoded(Image.fromarray(pixels(4, 4)).convert("LA"), "PNG"), "image", Form(4)
    )
    assert np.array_equal(grey[0], pixels(4, 4))
    assert torch.equal(grey[0], grey[2])


@pytest.mark.parametrize(
    "mode, kind",
    [
        ("1", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("P", "GIF"),
        ("P", "BMP"),
        ("RGBA", "WEBP"),
    ],
)
def test_images_of_every_mode_are_read(mode, kind):
    data = encoded(Image.new("RGB", (10, 10), "white").convert(mode), kind)
    assert read(data, "image", Form(5)).min() >= 250


def test_sixteen_bit_images_are_scaled_to_eight_bits():
    values = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    image = read(encoded(Image.fromarray(values), "PNG"), "image", Form(8))
    assert np.array_equal(image[1], np.rint(values / 257).astype(np.uint8))


def test_a_large_jpeg_is_decoded_smaller_with_nearly_the_same_result():
    smooth = Image.fromarray(pixels(12, 12, 3)).resize(
        (1_200, 1_200), Image.Resampling.BICUBIC
    )
    small = read(encoded(smooth, "JPEG", quality=95), "image", Form(24))
    exact = read(encoded(smooth, "PNG"), "image", Form(24))
    assert (small.float() - exact.float()).abs().mean() < 2


def chunk(name, data):
    return (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
    )


def png_of_size(width, height):
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1_000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "width, height",
    [(2**13 + 1, 2**13), (2**31 - 1, 2**31 - 1), (2**27, 1)],
)
def test_too_large_images_are_refused_by_their_header(width, height):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            reason_of(png_of_size(width, height), "image") == "declares too many pixels"
        )
        assert (
            reason_of(png_of_size(width, height), "image", function=read_header)
            == "declares too many pixels"
        )


def test_a_gif_may_not_declare_a_large_screen():
    data = encoded(Image.new("L", (4, 4)), "GIF")
    assert (
        reason_of(data[:6] + b"\xff\xff\xff\xff" + data[10:], "image")
        == "declares too many pixels"
    )


@settings(deadline=None, max_examples=50)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "WAV"]))
def test_damaged_files_are_either_read_or_refused(data, kind):
    if kind == "WAV":
        original = wav(pixels(300, 2).astype("<i2"), 1, 16)
        signals = ["audio"]
    else:
        frames = [Image.fromarray(pixels(9, 7, 3, seed=i)) for i in range(3)]
        options = {}
        if kind in ("GIF", "WEBP"):
            options = {"save_all": True, "append_images": frames[1:]}
        original = encoded(frames[0], kind, **options)
        signals = ["image", "video"] if kind in ("GIF", "WEBP") else ["image"]
    changed = bytearray(original[: data.draw(st.integers(12, len(original)))])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    form = Form(5, 4, None, 8_000, 50)
    for signal in signals:
        for function in (lambda *a: read_header(*a[:2]), read):
            try:
                result = function(bytes(changed), signal, form)
            except Refused:
                continue
            if not isinstance(result, Header):
                assert result.shape == form.shapes([signal])[signal]


# Audio


def wav(
    values,
    tag,
    bits,
    rate=8_000,
    before=b"",
    claim=None,
    channels=None,
    block=None,
    form=None,
):
    channels = channels or values.shape[1]
    block = block if block is not None else channels * bits // 8
    form = form or struct.pack(
        "<HHIIHH", tag, channels, rate, rate * block % 2**32, block, bits
    )
    data = values.tobytes()
    body = before + b"fmt " + struct.pack("<I", len(form)) + form + b"data"
    body += struct.pack("<I", len(data) if claim is None else claim) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 5])
def test_pcm_written_by_the_standard_library_is_read(width, channels):
    full = 2 ** (8 * width - 1)
    middle = full if width == 1 else 0  # eight bits are unsigned
    numbers = np.random.default_rng(1).integers(-full, full, (200, channels)) + middle
    numbers[0] = middle - full
    numbers[1] = middle + full - 1
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(8_000)
        for number in numbers.ravel():
            file.writeframes(int(number).to_bytes(width, "little", signed=width > 1))
    expected = ((numbers - middle) / full).mean(1)
    audio = read(written.getvalue(), "audio", Form(samples=256))
    assert audio.dtype == torch.float32
    assert np.allclose(audio[:200], expected, atol=1e-6)
    assert not audio[200:].any()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_wav_written_by_scipy_is_read(dtype):
    values = np.random.default_rng(2).uniform(-0.99, 0.99, 300)
    scaled = values
    if dtype == "uint8":
        scaled = values * 127 + 128
    elif dtype.startswith("int"):
        scaled = values * np.iinfo(dtype).max
    written = io.BytesIO()
    wavfile.write(written, 8_000, scaled.astype(dtype))
    assert np.allclose(
        read(written.getvalue(), "audio", Form(samples=300)),
        values,
        atol=0.02 if dtype == "uint8" else 1e-4,
    )


def test_extensible_wav_and_extra_chunks_are_read():
    values = np.arange(-50, 50, dtype="<i2")[:, None] * 300
    guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    form = (
        struct.pack("<HHIIHH", 0xFFFE, 1, 8_000, 16_000, 2, 16)
        + struct.pack("<HHI", 22, 16, 4)
        + guid
    )
    for before in (b"", b"LIST\x03\0\0\0abc\0", b"JUNK\0\0\0\0" * 5):
        audio = read(
            wav(values, 0, 16, form=form, before=before), "audio", Form(samples=100)
        )
        assert np.allclose(audio, values[:, 0] / 2**15)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000]),
    st.sampled_from([4_000, 8_000, 16_000, 22_050, 44_100]),
    st.integers(1, 900),
    st.integers(1, 3),
)
def test_reading_a_part_equals_reading_the_whole_file(rate, wanted, samples, channels):
    values = (
        np.random.default_rng(rate + samples)
        .uniform(-0.4, 0.4, (12_000, channels))
        .astype("<f4")
    )
    ratio = Fraction(wanted, rate)
    expected = resample_poly(
        values.mean(1, dtype=np.float64), ratio.numerator, ratio.denominator
    )[:samples]
    audio = read(
        wav(values, 3, 32, rate=rate), "audio", Form(rate=wanted, samples=samples)
    )
    assert np.allclose(audio[: len(expected)], expected, atol=1e-5)
    assert not audio[len(expected) :].any()


@pytest.mark.parametrize("rate", [8_001, 44_101, 399_989, 1_009])
def test_unusual_rates_keep_the_pitch(rate):
    values = 0.5 * np.sin(2 * np.pi * 200 * np.arange(2 * rate) / rate)[:, None]
    audio = read(
        wav(values.astype("<f4"), 3, 32, rate=rate), "audio", Form(samples=8_000)
    )
    assert torch.fft.rfft(audio).abs().argmax() == 200
    assert torch.fft.rfft(audio).abs().max() > 0.45 * 4_000


def test_values_beyond_full_scale_are_clipped():
    audio = read(
        wav(np.array([[3.0], [-2.0], [0.5]], "<f4"), 3, 32), "audio", Form(samples=4)
    )
    assert audio.tolist() == [1, -1, 0.5, 0]


SILENCE = np.zeros((100, 1), "<i2")


@pytest.mark.parametrize(
    "data, reason",
    [
        (wav(np.full((50, 1), np.nan, "<f4"), 3, 32), "holds NaN or infinity"),
        (wav(np.array([[0.0], [np.inf]], "<f4"), 3, 32), "holds NaN or infinity"),
        (
            wav(np.array([[0.0, 0.0], [0.0, np.nan]], "<f8"), 3, 64),
            "holds NaN or infinity",
        ),
        (wav(np.array([[1e300]], "<f8"), 3, 64), "holds NaN or infinity"),
        (wav(np.array([[32_768.0]], "<f4"), 3, 32), "is too loud"),
        (wav(SILENCE, 1, 16, claim=2**32 - 1), "is shorter than it declares"),
        (wav(SILENCE, 1, 16, claim=201), "is shorter than it declares"),
        (wav(SILENCE, 1, 16)[:-1], "is shorter than it declares"),
        (wav(SILENCE, 1, 16)[:36], "is shorter than it declares"),
        (
            wav(SILENCE, 1, 16, before=b"LIST\xff\xff\xff\xff"),
            "is shorter than it declares",
        ),
        (
            wav(SILENCE, 1, 16, before=b"JUNK\0\0\0\0" * 2_000),
            "is shorter than it declares",
        ),
        (wav(SILENCE, 1, 16, rate=0), "has a strange sample rate"),
        (wav(SILENCE, 1, 16, rate=999), "has a strange sample rate"),
        (wav(SILENCE, 1, 16, rate=2**32 - 1), "has a strange sample rate"),
        (wav(SILENCE, 2, 16), "is WAV of an unknown form"),
        (wav(SILENCE, 1, 12), "is WAV of an unknown form"),
        (
            wav(SILENCE, 1, 16, channels=65_535, block=65_534),
            "is WAV of an unknown form",
        ),
        (wav(SILENCE, 1, 16, channels=65), "is WAV of an unknown form"),
        (wav(SILENCE, 1, 16, block=0), "is WAV of an unknown form"),
        (wav(SILENCE[:0], 1, 16), "holds no audio"),
        (wav(SILENCE, 1, 16, form=b"\1\0"), "cannot be decoded"),
        (b"RIFF\0\0\0\0WAVE", "is shorter than it declares"),
        (b"", "is empty"),
        (b"RIFX\0\0\0\0WAVEfmt ", "cannot be read as audio"),
    ],
)
def test_invalid_audio_is_refused(data, reason):
    assert reason_of(data, "audio") == reason
    if "NaN" not in reason and "loud" not in reason:
        assert reason_of(data, "audio", function=read_header) == reason
    else:
        read_header(data, "audio")


@pytest.mark.parametrize(
    "module, data, signal",
    [("soundfile", b"fLaC....", "audio"), ("av", b"\0\0\0\x20ftypisom", "video")],
)
def test_a_missing_package_is_named(monkeypatch, module, data, signal):
    monkeypatch.setitem(sys.modules, module, None)
    for function in (read_header, read):
        assert (
            reason_of(data, signal, function=function)
            == f"needs the package {module}: pip install 'selfflow[av]'"
        )


def audio_file(values, rate, kind, subtype):
    file = io.BytesIO()
    soundfile.write(file, values, rate, format=kind, subtype=subtype)
    return file.getvalue()


FORMS = [
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAVEX", "PCM_24"),
    ("WAVEX", "FLOAT"),
]


@pytest.mark.parametrize("kind, subtype", FORMS)
@pytest.mark.parametrize("rate", [8_000, 44_100])
@pytest.mark.parametrize("channels", [1, 6])
def test_files_written_by_libsndfile_preserve_pitch_and_loudness(
    kind, subtype, rate, channels
):
    tone = (
        0.5
        * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)[:, None]
        * np.linspace(1, 0.5, channels)
    )
    data = audio_file(tone, rate, kind, subtype)
    read_header(data, "audio")
    spectrum = torch.fft.rfft(read(data, "audio", Form(samples=8_000))).abs() / 4_000
    assert spectrum.argmax() == 440
    assert abs(spectrum.max() - (0.5 if channels == 1 else 0.375)) < 0.005


@pytest.mark.parametrize("kind, subtype", FORMS)
@pytest.mark.parametrize("rate, count", [(8_000, 7), (44_100, 3), (48_000, 1)])
def test_short_audio_is_padded_with_silence(kind, subtype, rate, count):
    values = np.random.default_rng(count).uniform(-0.5, 0.5, (count, 2))
    audio = read(audio_file(values, rate, kind, subtype), "audio", Form(samples=100))
    end = -(-count * 8_000 // rate)
    assert audio.shape == (100,)
    assert audio.isfinite().all()
    assert not audio[end:].any()
    assert rate != 8_000 or np.allclose(audio[:count], values.mean(1), atol=1e-4)


@pytest.mark.parametrize("kind, subtype", FORMS)
def test_silence_is_read_and_nan_is_refused(kind, subtype):
    assert not read(
        audio_file(np.zeros((500, 2)), 44_100, kind, subtype),
        "audio",
        Form(samples=300),
    ).any()
    if subtype in ("FLOAT", "DOUBLE"):
        values = np.zeros((500, 2))
        values[100, 1] = np.nan
        assert (
            reason_of(audio_file(values, 8_000, kind, subtype), "audio")
            == "holds NaN or infinity"
        )
        assert not read(
            audio_file(values, 8_000, kind, subtype), "audio", Form(samples=50)
        ).any(), "samples that are not needed are not read"


def test_damaged_flac_and_false_headers_are_refused():
    values = np.random.default_rng(3).uniform(-0.5, 0.5, (4_000, 2))
    data = audio_file(values, 8_000, "FLAC", "PCM_24")
    assert np.allclose(
        read(data, "audio", Form(samples=500)), values.mean(1)[:500], atol=1e-6
    )

    # STREAMINFO: 20 bits for the rate, 3 for the channels, 5 for the bits, 36 for the
    # frames
    def with_header(rate=8_000, frames=4_000):
        return (
            data[:18]
            + (rate << 44 | 1 << 41 | 23 << 36 | frames).to_bytes(8, "big")
            + data[26:]
        )

    assert with_header() == data
    for function in (read_header, read):
        assert (
            reason_of(with_header(rate=999), "audio", function=function)
            == "has a strange sample rate"
        )
        assert reason_of(data[:30], "audio", function=function) == "cannot be decoded"
    cut = ("cannot be decoded", "is shorter than it declares")
    for frames in (2**36 - 1, 0, 5_000):  # 0 stands for a live recording
        assert (
            reason_of(with_header(frames=frames), "audio", Form(samples=6_000)) in cut
        )
        assert np.allclose(
            read(with_header(frames=frames), "audio", Form(samples=500)),
            values.mean(1)[:500],
            atol=1e-6,
        )
    assert reason_of(data[: len(data) // 2], "audio") in cut


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_damaged_flac_is_either_read_or_refused(data):
    changed = bytearray(
        audio_file(
            np.random.default_rng(4).uniform(-0.5, 0.5, (600, 2)),
            44_100,
            "FLAC",
            "PCM_16",
        )
    )
    changed = changed[: data.draw(st.integers(12, len(changed)))]
    for _ in range(data.draw(st.integers(0, 4))):
        # half of the changes are in the header
        limit = min(len(changed), data.draw(st.sampled_from([60, 10**6])))
        place = data.draw(st.integers(0, limit - 1))
        changed[place] = data.draw(st.integers(0, 255))
    for function in (lambda *a: read_header(*a[:2]), read):
        try:
            result = function(bytes(changed), "audio", Form(samples=100))
        except Refused:
            continue
        if not isinstance(result, Header):
            assert result.shape == (100,)
            assert result.isfinite().all()


# Video


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 2_000), min_size=1, max_size=30),
    st.integers(1, 40),
    st.sampled_from([None, 1, 5, 24, 25, 30]),
    st.sampled_from([0, 5_000]),
)
def test_each_time_step_takes_the_frame_at_its_middle(durations, count, fps, first):
    # milliseconds, exact
    starts = [first + sum(durations[:i]) for i in range(len(durations) + 1)]
    step = Fraction(1_000, fps) if fps else Fraction(starts[-1] - first, count)
    seconds = [start / 1_000 for start in starts]
    for i, frame in enumerate(frame_indices(seconds[:-1], seconds[-1], count, fps)):
        middle = first + (i + Fraction("0.500001")) * step
        assert frame == max(k for k in range(len(durations)) if starts[k] <= middle)


@pytest.mark.parametrize("fps", [10, 30, 24, 7])
def test_half_the_rate_takes_every_second_frame(fps):
    starts = [i / fps for i in range(100)]
    assert (
        frame_indices(starts, 100 / fps, 50, fps / 2)
        == frame_indices(starts, 100 / fps, 50)
        == list(range(1, 100, 2))
    )


@given(st.integers(1, 50), st.integers(1, 5))
def test_videos_with_equal_durations_are_sampled_evenly(count, times):
    assert frame_indices(range(count), count, count) == list(range(count))
    assert frame_indices(range(count), count, count * times) == [
        i for i in range(count) for _ in range(times)
    ]
    assert frame_indices(range(count), count, count, fps=1) == list(range(count))


def animation(greys, durations, kind):
    frames = [Image.new("RGB", (6, 6), (grey,) * 3) for grey in greys]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        **options,
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
@pytest.mark.parametrize("frames, fps", [(4, None), (5, 10), (9, 2), (3, 100)])
def test_animations_follow_their_durations(kind, frames, fps):
    greys = [0, 50, 100, 150, 200, 250]
    durations = [20, 500, 20, 300, 30, 200]
    starts = np.cumsum([0, *durations]) / 1_000
    expected = [
        greys[k] for k in frame_indices(list(starts[:-1]), starts[-1], frames, fps)
    ]
    video = read(animation(greys, durations, kind), "video", Form(3, frames, fps))
    assert video.dtype == torch.uint8
    assert video.shape == (3, frames, 3, 3)
    assert video[0, :, 1, 1].tolist() == expected
    assert (video == video[:1, :, :1, :1]).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_a_still_image_is_a_constant_video(kind):
    video = read(encoded(Image.new("RGB", (4, 4), "white"), kind), "video", Form(2, 3))
    assert video.shape == (3, 3, 2, 2)
    assert video.min() > 250
    assert torch.equal(
        read(animation([9, 99, 199], 50, kind), "image", Form(2)),
        torch.full((3, 2, 2), 9, dtype=torch.uint8),
    )


def test_a_gif_without_durations_has_ten_frames_a_second():
    data = animation([0, 100, 200], 0, "GIF")
    assert read(data, "video", Form(2, 3, 10))[0, :, 0, 0].tolist() == [0, 100, 200]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_videos_that_are_too_long_are_refused(kind, monkeypatch):
    data = animation([0, 50, 100, 150, 200], 100, kind)
    monkeypatch.setattr("selfflow.data.decoding._FRAMES", 4)
    assert reason_of(data, "video", Form(2, 2)) == "is too long a video"
    assert read(data, "video", Form(2, 2, 10))[0, :, 0, 0].tolist() == [0, 50], (
        "a short beginning of it is read"
    )
    monkeypatch.setattr("selfflow.data.decoding._FRAMES", 100)
    monkeypatch.setattr("selfflow.data.decoding._VIDEO_PIXELS", 4 * 36)
    assert reason_of(data, "video", Form(2, 2)) == "is too long a video"


def test_a_list_of_images_is_a_video(tmp_path):
    names = []
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(
            encoded(Image.new("L", (5, 4), 40 * i), "PNG")
        )
        names.append(Inside(tmp_path.resolve(), f"{i}.png"))
    read_header(tuple(names), "video")
    assert read(tuple(names), "video", Form(2, 3))[0, :, 0, 0].tolist() == [
        40,
        120,
        200,
    ]
    assert read(tuple(names), "video", Form(2, 12, fps=5))[1, :, 1, 1].tolist() == [
        40 * (i // 2) for i in range(12)
    ]
    (tmp_path / "3.png").write_text("no image")
    assert reason_of(tuple(names), "video", Form(2, 3)) == "is not what its suffix says"
