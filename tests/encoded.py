"""Video files encoded by PyAV, for the tests of decoding."""

import io
from fractions import Fraction

import av
import numpy as np

AUDIO_CODECS = {
    "webm": ("libopus", "flt"),
    "mp4": ("aac", "fltp"),
    "avi": ("pcm_s16le", "s16"),
    "matroska": ("aac", "fltp"),
}
CODEC_OPTIONS = {
    "libx264": {"bf": "2"},
    "libvpx-vp9": {"lag-in-frames": "0"},
    "libvpx": {"lag-in-frames": "0"},
}


def video_frame(grey, size):
    return av.VideoFrame.from_ndarray(
        np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24"
    )


def encoded(
    frames,
    container="mp4",
    codec="mpeg4",
    times=None,
    base=1_000,
    size=(32, 32),
    audio=0.0,
    rate=10,
    muxer=(),
    form=None,
):
    """Return the bytes of a video file.

    frames: grey values, or arrays (h, w, 3); times: when each is shown, in 1 / base
    seconds, None for even steps; audio: seconds of a tone with the video; rate: frames
    a second; muxer: FFmpeg's options of the container; form: the pixel format.
    """
    written = io.BytesIO()
    with av.open(written, "w", format=container, options=dict(muxer)) as file:
        stream = file.add_stream(codec, rate=rate, options=CODEC_OPTIONS.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = *size, form or "yuv420p"
        stream.codec_context.time_base = Fraction(1, base)
        tone = None
        if audio:
            tone = file.add_stream(
                AUDIO_CODECS[container][0], rate=48_000, layout="mono"
            )
        for i, content in enumerate(frames):
            if isinstance(content, int):
                frame = video_frame(content, size)
            else:
                frame = av.VideoFrame.from_ndarray(content, format="rgb24")
            frame.pts = i * base // rate if times is None else times[i]
            frame.time_base = Fraction(1, base)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if tone:
            _encode_tone(file, tone, AUDIO_CODECS[container][1], audio)
    return written.getvalue()


def _encode_tone(file, stream, form, seconds):
    times = np.arange(int(48_000 * seconds)) / 48_000
    values = 0.3 * np.sin(2 * np.pi * 440 * times)[None]
    if form == "s16":
        values = (values * 32_767).astype(np.int16)
    else:
        values = values.astype(np.float32)
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
