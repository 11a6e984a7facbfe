"""Notes sound as their factors say and are the same in every batch."""

import io
import math
import wave

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.data.audio import LogMel, Mdct, onsets_of, pitch_of
from selfflow.data.datasets import SPLITS
from selfflow.data.notes import (
    _AMPLITUDES,
    _FADES,
    PITCHES,
    TIMBRES,
    Notes,
    note_name,
    synthesise,
    to_wav,
    within_full_scale,
)


def note_by_loops(pitch, timbre, attack, vibrato, loudness, phase, samples, rate):
    """Return one note, sine by sine, with its frequency summed in small steps."""
    base = 440 * 2 ** ((pitch - 69) / 12)
    share = 2 ** (vibrato / 12) - 1
    fine = (np.arange(samples * 16) + 0.5) / (16 * rate)
    frequency = base * (1 + share * np.sin(2 * np.pi * 6 * fine))
    turns = np.concatenate([[0], np.cumsum(frequency) / (16 * rate)])[:-1][::16]
    theta = 2 * np.pi * (phase + turns)
    seconds = np.arange(samples) / rate
    harmonics = [
        (k, a)
        for k, a in enumerate(_AMPLITUDES[timbre], start=1)
        if k * base * (1 + share) < rate / 2
    ]
    circle = np.linspace(0, 2 * np.pi, 20_001)
    peak = np.abs(sum(a * np.sin(k * circle) for k, a in harmonics)).max()
    fade, overtone_fade = _FADES[timbre]
    tones = sum(
        a / peak * np.exp(-overtone_fade * k * seconds) * np.sin(k * theta)
        for k, a in harmonics
    )
    rise = np.array([math.sin(math.pi / 2 * min(1, s / attack)) ** 2 for s in seconds])
    fall = np.array(
        [
            math.sin(math.pi / 2 * min(1, (samples / rate - s) / 0.03)) ** 2
            for s in seconds
        ]
    )
    return 10 ** (loudness / 20) * np.exp(-fade * seconds) * rise * fall * tones


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.tuples(
            st.floats(60, 83),
            st.integers(0, 5),
            st.floats(0.004, 0.2),
            st.sampled_from([0, 0.2, 0.5, 1]),
            st.floats(-30, 0),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([(1000, 4000), (2048, 8000), (3000, 22_050)]),
)
def test_a_note_equals_its_definition(notes, size):
    samples, rate = size
    pitch, timbre, *others = (
        torch.tensor(values) for values in zip(*notes, strict=True)
    )
    waves = synthesise(pitch, timbre, *others, samples=samples, rate=rate)
    assert waves.dtype == torch.float32
    assert waves.shape == (len(notes), samples)
    factors = [values.tolist() for values in (pitch, timbre, *others)]
    for note, values in zip(waves, zip(*factors, strict=True), strict=True):
        np.testing.assert_allclose(
            note, note_by_loops(*values, samples, rate), atol=2e-4
        )


@pytest.mark.parametrize("timbre", range(len(TIMBRES)))
def test_full_scale_is_reached_and_never_passed(timbre):
    pitch = torch.arange(40, 90, 0.7)
    others = [torch.full_like(pitch, value) for value in (0.005, 0.3, 0.0)]
    waves = synthesise(
        pitch,
        torch.full(pitch.shape, timbre),
        *others,
        phase=torch.linspace(0, 1, len(pitch)),
    )
    assert waves.abs().max() <= 1
    if _FADES[timbre] == (0, 0):
        assert waves.abs().amax(1).min() > 0.97, (
            "samples at a rate of 8000 may miss the peak itself"
        )


@pytest.mark.parametrize("pitch", [60, 71, 77, 83])
@pytest.mark.parametrize("timbre, vibrato", [(1, 0.0), (2, 0.0), (3, 0.5), (2, 0.5)])
def test_nothing_is_aliased(pitch, timbre, vibrato):
    (wave,) = synthesise(
        *(torch.tensor([value]) for value in (pitch, timbre, 0.05, vibrato, 0.0))
    )
    power = torch.fft.rfft(wave * torch.hann_window(8192)).square().abs()
    base = 440 * 2 ** ((pitch - 69) / 12)
    hz = torch.arange(4097) * 8000 / 8192
    k = torch.arange(1, 17)
    k = k[k * base * 2 ** (vibrato / 12) < 4000]
    width = 40 + (0.04 * k * base if vibrato else 0)
    near = ((hz[:, None] - k * base).abs() < width).any(1)
    assert near.float().mean() < (1 if vibrato else 0.4)
    assert power[~near].sum() < 1e-6 * power.sum()
    if _AMPLITUDES[timbre][k[-1] - 1] != 0:
        highest = near & (hz > (k[-1] - 0.5) * base)
        assert power[highest].sum() > 1e-6 * power.sum()


def test_pitches_have_names():
    assert [note_name(p) for p in (21, 60, 61, 70, 83, 108)] == [
        "A0",
        "C4",
        "C#4",
        "A#4",
        "B5",
        "C8",
    ]
    assert len(Notes.names) == len(set(Notes.names)) == len(PITCHES) == 24
    assert Notes.names[0] == "C4"
    assert len(TIMBRES) == len(_AMPLITUDES) == len(_FADES)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_batch_follows_the_interface(split, length):
    data = Notes(split, 500, samples=8192 if length != 3 else 8190, length=length)
    assert len(data) == 500
    assert data.shapes == {"audio": (data.samples,)}
    batch = data.take(torch.tensor([3, 499, 0]))
    wave = batch.signals["audio"]
    factors = batch.factors
    assert wave.shape == (3, data.samples)
    assert wave.dtype == torch.float32
    assert wave.abs().max() <= 1
    assert len(batch) == 3
    shape = (3,) if length == 1 else (3, length)
    assert factors["pitch"].shape == factors["phase"].shape == shape
    assert {name: values.dtype for name, values in factors.items()} == {
        "pitch": torch.int64,
        "timbre": torch.int64,
        "attack": torch.float32,
        "vibrato": torch.float32,
        "loudness": torch.float32,
        "phase": torch.float32,
    }
    for name in ("timbre", "attack", "vibrato", "loudness"):
        assert factors[name].shape == (3,)
    assert torch.equal(batch.labels, factors["pitch"].view(3, length)[:, 0] - 60)
    assert batch.labels.dtype == torch.int64
    all_pitches = factors["pitch"].view(3, length).tolist()
    for caption, pitches, timbre, vibrato, loudness in zip(
        batch.captions,
        all_pitches,
        factors["timbre"],
        factors["vibrato"],
        factors["loudness"],
        strict=True,
    ):
        level = "loud" if loudness >= -12 else "soft"
        names = ", ".join(Notes.names[p - 60] for p in pitches)
        ending = " with vibrato" if vibrato > 0 else ""
        assert caption == f"a {level} {TIMBRES[timbre]} plays {names}{ending}"
        assert len(caption.encode("ascii")) <= 64


@pytest.mark.parametrize("length", [1, 4])
def test_a_sample_depends_on_its_index_alone(length):
    data = Notes(length=length)
    batch = data.take(torch.arange(40))
    for some in ([7], [39, 0, 7, 7], list(range(30, 40))):
        taken = data.take(torch.tensor(some))
        torch.testing.assert_close(
            taken.signals["audio"], batch.signals["audio"][some], rtol=0, atol=1e-6
        )
        assert taken.captions == tuple(batch.captions[i] for i in some)
        assert torch.equal(taken.labels, batch.labels[some])
        for name, values in taken.factors.items():
            assert torch.equal(values, batch.factors[name][some]), name
    torch.testing.assert_close(
        Notes(count=41, length=length).take(torch.tensor([40])).factors,
        data.take(torch.tensor([40])).factors,
    )
    empty = data.take(torch.zeros(0, dtype=torch.int64))
    assert empty.signals["audio"].shape == (0, 8192)
    assert len(empty) == 0
    assert empty.captions == ()
    with pytest.raises(IndexError, match="100000"):
        data.take(torch.tensor([100_000]))


def test_factors_reproduce_a_note_and_each_note_of_a_sequence():
    single = Notes().take(torch.arange(9))
    torch.testing.assert_close(
        synthesise(**single.factors), single.signals["audio"], rtol=0, atol=1e-6
    )
    sequence = Notes(length=2).take(torch.arange(9))
    for k in range(2):
        factors = {
            name: values[:, k] if values.ndim == 2 else values
            for name, values in sequence.factors.items()
        }
        note = sequence.signals["audio"][:, 4096 * k : 4096 * (k + 1)]
        torch.testing.assert_close(
            synthesise(**factors, samples=4096), note, rtol=0, atol=1e-6
        )


def test_splits_share_nothing_and_options_change_the_data():
    drawn = [Notes(split, 300).take(torch.arange(300)) for split in SPLITS]
    phases = torch.cat([batch.factors["phase"] for batch in drawn])
    assert len(phases.unique()) > 895
    kinds = [
        Notes(),
        Notes("test"),
        Notes(count=5),
        Notes(rate=16_000),
        Notes(samples=4096),
        Notes(length=2),
    ]
    assert len({kind.fingerprint for kind in kinds}) == len(kinds)
    assert Notes().fingerprint == Notes("train").fingerprint


def test_factors_have_their_documented_distributions_and_are_independent():
    batch = Notes(rate=4000, samples=800).take(torch.arange(4000))
    factors = {name: values.double() for name, values in batch.factors.items()}
    for name, kinds in (("pitch", 24), ("timbre", 6)):
        counts = batch.factors[name].sub(batch.factors[name].min()).bincount()
        assert len(counts) == kinds
        expected = 4000 / kinds
        chi_squared = ((counts - expected).square() / expected).sum()
        assert chi_squared < 2.2 * kinds + 10
    assert 0.005 <= factors["attack"].min()
    assert factors["attack"].max() <= 0.08
    assert abs(factors["attack"].log().mean() - math.log(0.02)) < 0.05, (
        "the attack is uniform in its logarithm"
    )
    still = factors["vibrato"] == 0
    assert abs(still.double().mean() - 0.5) < 0.03
    assert 0.2 <= factors["vibrato"][~still].min()
    assert factors["vibrato"].max() <= 0.5
    assert -24 <= factors["loudness"].min() < -23
    assert -1 < factors["loudness"].max() <= 0
    correlation = torch.corrcoef(torch.stack(list(factors.values()))) - torch.eye(6)
    assert correlation.abs().max() < 0.06
    assert len(set(batch.captions)) > 24 * 6 * 4 * 0.98, (
        "nearly every combination of coarse factors has its caption"
    )


@pytest.mark.parametrize("codec", ["none", "log-mel", "mdct"])
def test_the_measured_pitch_is_the_requested_one(codec):
    batch = Notes("validation").take(torch.arange(200))
    waves = batch.signals["audio"]
    form = {"log-mel": LogMel(rounds=8), "mdct": Mdct(power=0.5)}.get(codec)
    waves = form.decode(form.encode(waves)) if form else waves
    off = 12 * (pitch_of(waves, 8000) / 440).log2() + 69 - batch.factors["pitch"]
    assert (off.abs() < 0.5).float().mean() >= 0.98
    if codec == "mdct":
        torch.testing.assert_close(waves, batch.signals["audio"], atol=1e-5, rtol=0)


def test_spectra_of_notes_are_near_mean_0_and_variance_1():
    waves = Notes().take(torch.arange(200)).signals["audio"]
    for form, most in ((LogMel(), 4), (Mdct(), 60), (Mdct(power=0.5), 20)):
        spectra = form.encode(waves)
        assert abs(spectra.mean()) < 0.1
        assert 0.8 < spectra.std() < 1.25
        assert spectra.abs().max() < most, form
    assert (LogMel().encode(waves) > 3).float().mean() < 0.01


def test_the_notes_of_a_sequence_begin_at_equal_steps():
    batch = Notes(length=4).take(torch.arange(60))
    percussive = (batch.factors["timbre"] >= 4) & (batch.factors["attack"] < 0.03)
    onsets = onsets_of(batch.signals["audio"][percussive], 8000)
    correct = [
        len(times) == 4 and np.abs(times.numpy() - 0.256 * np.arange(4)).max() < 0.02
        for times in onsets
    ]
    assert len(correct) > 5
    assert np.mean(correct) >= 0.9


@pytest.mark.parametrize(
    "options, words",
    [
        ({"split": "tests"}, "Did you mean 'test'"),
        ({"count": 0}, "count is 0"),
        ({"rate": 2000}, "rate is 2000.*4000"),
        ({"length": 0}, "length is 0"),
        ({"length": 5}, "length is 5"),
        (
            {"length": 3},
            "8192 samples are not 3 equal notes of 0.2 s or more; use 8193",
        ),
        ({"samples": 1000}, "1000 samples are not 1 equal notes.*use 1600"),
        (
            {"samples": 3200, "length": 4},
            "3200 samples are not 4 equal notes.*use 6400",
        ),
        ({"samples": -5}, "use 1600"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Notes(**options)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"timbre": [0, 6]}, "timbre runs from 0 to 6, outside 0 to 5: flute"),
        ({"timbre": [-1, 0]}, "timbre runs from -1"),
        ({"attack": [0.1, 0.0]}, "attack is 0"),
        ({"attack": [math.nan, 0.1]}, "attack is nan"),
        ({"vibrato": [-0.1, 0]}, "vibrato is -0.1"),
        ({"loudness": [0.0, 3.0]}, "loudness is 3, but must be at most 0 dB"),
        ({"loudness": [math.nan, 0]}, "loudness is nan"),
        ({"pitch": [60, 108]}, "a note of 4186 Hz needs a rate above 8000 Hz"),
        ({"pitch": [math.nan, 60.0]}, "a note of nan Hz"),
    ],
)
def test_notes_out_of_range_are_refused(change, words):
    good = {
        "pitch": [60.0, 61.0],
        "timbre": [0, 1],
        "attack": [0.1, 0.1],
        "vibrato": [0.0, 0.0],
        "loudness": [0.0, 0.0],
    }
    with pytest.raises(ValueError, match=words):
        synthesise(
            **{name: torch.tensor(values) for name, values in (good | change).items()}
        )


@pytest.mark.parametrize("bits, tolerance", [(16, 1 / 32767), (8, 1 / 127)])
def test_a_wav_file_contains_the_audio(bits, tolerance):
    audio = torch.linspace(-1.5, 1.5, 301)
    with wave.open(io.BytesIO(to_wav(audio, 11_025, bits))) as file:
        assert file.getframerate() == 11_025
        assert file.getnchannels() == 1
        assert file.getsampwidth() == bits // 8
        assert file.getnframes() == 301
        data = file.readframes(301)
    values = (
        np.frombuffer(data, "<i2") / 32767
        if bits == 16
        else (np.frombuffer(data, "u1") - 128.0) / 127
    )
    # scaled down, not clipped
    np.testing.assert_allclose(values, audio / 1.5, atol=tolerance)
    for values, depth in ((audio[None], bits), (audio, 12), (audio * math.nan, bits)):
        with pytest.raises(ValueError, match="cannot be written with"):
            to_wav(values, bits=depth)


def test_waves_share_one_factor_and_soft_ones_stay_unchanged():
    waves = torch.stack([torch.linspace(-5, 5, 11), torch.linspace(-1, 1, 11)])
    quieter, factor = within_full_scale(waves)
    assert factor == 0.2
    torch.testing.assert_close(quieter, waves / 5)
    soft = waves[1]
    unchanged, factor = within_full_scale(soft)
    assert unchanged is soft
    assert factor == 1 == within_full_scale(torch.zeros(0, 4))[1]
