"""Videos as files, encoded by PyAV itself, for the tests of what reads them."""

import io
from fractions import Fraction

import av
import numpy as np

SOUNDS = {
    "webm": ("libopus", "flt"),
    "mp4": ("aac", "fltp"),
    "avi": ("pcm_s16le", "s16"),
    "matroska": ("aac", "fltp"),
}
OPTIONS = {
    "libx264": {"bf": "2"},
    "libvpx-vp9": {"lag-in-frames": "0"},
    "libvpx": {"lag-in-frames": "0"},
}


def picture(grey, size):
    return av.VideoFrame.from_ndarray(
        np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24"
    )


def encoded(
    pictures,
    container="mp4",
    codec="mpeg4",
    times=None,
    base=1_000,
    size=(32, 32),
    sound=0.0,
    rate=10,
    muxer=(),
    form=None,
):
    """The bytes of a film.

    pictures: greys, or arrays (h, w, 3); times: when each is shown, in 1 / base
    seconds, None: even ones; sound: seconds of a tone beside it; rate: pictures a
    second; muxer: FFmpeg's options of the container; form: of the pixels.
    """
    written = io.BytesIO()
    with av.open(written, "w", format=container, options=dict(muxer)) as file:
        stream = file.add_stream(codec, rate=rate, options=OPTIONS.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = *size, form or "yuv420p"
        stream.codec_context.time_base = Fraction(1, base)
        tone = (
            file.add_stream(SOUNDS[container][0], rate=48_000, layout="mono")
            if sound
            else None
        )
        for i, shown in enumerate(pictures):
            frame = (
                picture(shown, size)
                if isinstance(shown, int)
                else av.VideoFrame.from_ndarray(shown, format="rgb24")
            )
            frame.pts = i * base // rate if times is None else times[i]
            frame.time_base = Fraction(1, base)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if tone:
            _encode_tone(file, tone, SOUNDS[container][1], sound)
    return written.getvalue()


def _encode_tone(file, stream, form, seconds):
    values = (
        0.3 * np.sin(np.arange(int(48_000 * seconds)) * 2 * np.pi * 440 / 48_000)[None]
    )
    values = (
        (values * 32_767).astype(np.int16)
        if form == "s16"
        else values.astype(np.float32)
    )
    step = stream.codec_context.frame_size or 960
    for at in range(0, values.shape[1], step):
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(values[:, at : at + step]), format=form, layout="mono"
        )
        frame.sample_rate = 48_000
        frame.pts = at
        frame.time_base = Fraction(1, 48_000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode())
