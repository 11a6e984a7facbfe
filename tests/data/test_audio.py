"""Spectra equal their definitions and decode back to audio.

Pitch and onsets are measured correctly, and invalid input is refused.
"""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.data.audio import (
    LogMel,
    Mdct,
    fit_length,
    onsets_of,
    pitch_of,
    resample,
    to_mono,
)

RATE = 8000


def noise(*shape, seed=0, dtype=torch.float32):
    return 0.3 * torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def mdct_by_hand(wave, bins):
    """Return the spectrum of one wave, by loops, with steep windows at both ends."""
    columns = len(wave) // bins
    spectrum = np.zeros((bins, columns))
    for k in range(columns):
        for j in range(bins):
            for n in range(2 * bins):
                place = k * bins - bins // 2 + n
                if not 0 <= place < len(wave):
                    continue
                steep = k == 0 and n < bins or k == columns - 1 and n >= bins
                weight = 1 if steep else math.sin(math.pi / (2 * bins) * (n + 0.5))
                angle = math.pi / bins * (n + 0.5 + bins / 2) * (j + 0.5)
                spectrum[j, k] += (
                    math.sqrt(2 / bins) * weight * wave[place] * math.cos(angle)
                )
    return spectrum


@pytest.mark.parametrize(
    "bins, columns", [(2, 1), (2, 3), (4, 1), (4, 5), (6, 2), (16, 4)]
)
def test_mdct_equals_its_definition(bins, columns):
    waves = noise(2, bins * columns, seed=bins, dtype=torch.float64)
    spectra = Mdct(bins * columns, bins=bins, scale=1).encode(waves)
    for wave, spectrum in zip(waves, spectra, strict=True):
        np.testing.assert_allclose(
            spectrum, mdct_by_hand(wave.numpy(), bins), atol=1e-13
        )


@pytest.mark.parametrize("bins, columns", [(2, 1), (2, 4), (8, 1), (8, 2), (10, 7)])
def test_mdct_is_orthogonal_and_square(bins, columns):
    samples = bins * columns
    matrix = (
        Mdct(samples, bins=bins, scale=1)
        .encode(torch.eye(samples, dtype=torch.float64))
        .flatten(1)
    )
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(samples, dtype=torch.float64), atol=1e-13, rtol=0
    )
    inverse = Mdct(samples, bins=bins, scale=1).decode(
        torch.eye(samples, dtype=torch.float64).reshape(samples, bins, columns)
    )
    # the inverse is the transpose
    torch.testing.assert_close(
        inverse.flatten(1), matrix.T.contiguous(), atol=1e-13, rtol=0
    )


@settings(deadline=None, max_examples=20)
@given(
    half=st.integers(1, 40),
    columns=st.integers(1, 9),
    batch=st.integers(1, 3),
    power=st.floats(0.3, 1),
    scale=st.floats(0.01, 100),
    seed=st.integers(0, 99),
)
def test_mdct_round_trips_exactly(half, columns, batch, power, scale, seed):
    form = Mdct(2 * half * columns, bins=2 * half, power=power, scale=scale)
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        waves = noise(batch, form.samples, seed=seed, dtype=dtype).clamp(-1, 1)
        spectra = form.encode(waves)
        assert spectra.shape == (batch, *form.shape)
        assert spectra.dtype == dtype
        assert (form.decode(spectra) - waves).abs().max() <= most
    values = noise(batch, *form.shape, seed=seed + 1, dtype=torch.float64)
    plain = replace(form, power=1.0)
    # any values are the spectrum of some audio
    torch.testing.assert_close(plain.encode(plain.decode(values)), values)


def test_power_and_scale_change_the_values_as_defined():
    waves = noise(2, 512, dtype=torch.float64)
    plain = Mdct(512, bins=32, scale=1).encode(waves)
    changed = Mdct(512, bins=32, scale=3, power=0.5).encode(waves)
    np.testing.assert_allclose(
        changed, 3 * np.sign(plain.numpy()) * np.sqrt(np.abs(plain.numpy())), atol=1e-12
    )
    torch.testing.assert_close(plain.square().sum((1, 2)), waves.square().sum(1))
    white = Mdct(scale=1).encode(noise(20, 8192) / 0.3)
    assert abs(white.std() - 1) < 0.01
    assert abs((white**4).mean() - 3) < 0.1, (
        "the spectrum of white noise is white noise"
    )


@pytest.mark.parametrize("place", [0, 5, 511, 512, 1000, 2047])
@pytest.mark.parametrize("form", [Mdct(2048, bins=128), LogMel(2048, bins=40)])
def test_columns_follow_the_time_of_the_audio(form, place):
    waves = torch.zeros(1, 2048)
    waves[0, place] = 1
    spectra = form.encode(waves)[0]
    loudness = (
        (spectra - spectra.min()).square().sum(0)
        if isinstance(form, LogMel)
        else spectra.square().sum(0)
    )
    centre = (loudness.argmax() + 0.5) * form.step
    assert abs(centre - place - 0.5) <= form.step / 2 + 1
    assert form.seconds_per_column == form.step / RATE


def log_mel_by_hand(wave, form):
    """Return the log-mel spectrum by numpy, with triangles at equal steps in mel."""
    half = form.window // 2
    window = np.sin(np.pi * np.arange(form.window) / form.window) ** 2
    mels = np.linspace(0, 2595 * np.log10(1 + form.rate / 2 / 700), form.bins + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    hz = np.arange(half + 1) * form.rate / form.window
    columns = []
    for k in range(form.shape[1]):
        middle = k * form.hop + form.hop // 2
        frame = np.pad(wave, half)[middle : middle + 2 * half]
        magnitudes = np.abs(np.fft.rfft(frame * window)) / (window.sum() / 2)
        bands = []
        for low, top, high in zip(edges, edges[1:], edges[2:], strict=False):
            rise = (hz - low) / (top - low)
            fall = (high - hz) / (high - top)
            triangle = np.minimum(rise, fall).clip(0)
            bands.append((triangle * magnitudes).sum())
        columns.append((np.log(np.array(bands) + form.floor) - form.mean) / form.std)
    return np.array(columns).T


@pytest.mark.parametrize(
    "form",
    [
        LogMel(2048, bins=20, window=256, hop=64),
        LogMel(1536),
        LogMel(1024, 16_000, 32, 256, 512, 1e-3, -1, 2),
    ],
)
def test_log_mel_equals_its_definition(form):
    waves = noise(2, form.samples, dtype=torch.float64)
    spectra = form.encode(waves)
    for wave, spectrum in zip(waves, spectra, strict=True):
        # the bands are computed in float32
        np.testing.assert_allclose(
            spectrum, log_mel_by_hand(wave.numpy(), form), atol=2e-5
        )
    torch.testing.assert_close(
        form.encode(waves.float()), spectra.float(), atol=1e-4, rtol=0
    )


def test_log_mel_of_a_sine_is_near_one_and_of_silence_at_the_floor():
    form = LogMel()
    wave = torch.sin(2 * math.pi * 1000 * torch.arange(8192) / RATE)[None]
    level = (form.encode(wave) * form.std + form.mean).exp()
    assert 0.5 < level.amax(1).median() < 2, (
        "a sine at full scale has a level of about 1"
    )
    torch.testing.assert_close(
        form.encode(torch.zeros(1, 8192)),
        torch.full((1, 64, 64), (math.log(1e-4) + 7.9) / 2.2),
    )
    assert form.decode(form.encode(torch.zeros(1, 8192))).abs().max() < 1e-3
    assert form.encode(torch.zeros(1, 8192)).min() > -3
    assert form.encode(wave).max() < 4


@pytest.mark.parametrize(
    "form",
    [
        LogMel(),
        LogMel(4096, bins=48, hop=64, window=256),
        LogMel(8192, 16_000, 80, 256, 1024),
    ],
)
def test_log_mel_decodes_approximately_and_reproducibly(form):
    seconds = torch.arange(form.samples) / form.rate
    waves = torch.stack(
        [
            0.5 * torch.sin(2 * math.pi * hz * seconds) * torch.exp(-seconds * 3)
            for hz in (300, 440, 1234)
        ]
    )
    spectra = form.encode(waves)
    decoded = form.decode(spectra)
    assert decoded.shape == waves.shape
    assert torch.equal(decoded, form.decode(spectra))
    assert (form.encode(decoded) - spectra).square().mean().sqrt() < 0.3
    off = 12 * torch.log2(
        pitch_of(decoded, form.rate) / torch.tensor([300.0, 440, 1234])
    )
    assert off.abs().max() < 0.3
    ratio = decoded.square().mean(1).sqrt() / waves.square().mean(1).sqrt()
    assert (ratio.log10() * 20).abs().max() < 3, (
        "the loudness changes by less than 3 dB"
    )


def test_any_spectrum_decodes_to_finite_audio():
    assert LogMel().decode(torch.full((1, 64, 64), 1e4)).isfinite().all()
    assert LogMel().decode(torch.full((1, 64, 64), -1e4)).abs().max() == 0


@pytest.mark.parametrize("kind, bins", [(Mdct, 32), (LogMel, 31)])
def test_a_batch_equals_single_waves_and_gradients_follow_inference(kind, bins):
    waves = noise(3, 1024)
    with torch.inference_mode():
        form = kind(1024, bins=bins)  # used nowhere else: its tables are made here
        together = form.encode(waves)
    torch.testing.assert_close(
        torch.cat([form.encode(wave[None]) for wave in waves]), together.clone()
    )
    trainable = waves.clone().requires_grad_()
    # tables made in inference mode can be used here
    form.encode(trainable).square().sum().backward()
    assert trainable.grad.isfinite().all()
    assert trainable.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "kind, change, words",
    [
        (
            LogMel,
            {"samples": 8191},
            "8191 samples at rate 8000 are not whole columns of 128.*choose columns of "
            "128 and 8192",
        ),
        (Mdct, {"samples": 8191}, "8191 samples.*columns of 128 and 8192.*fit_length"),
        (LogMel, {"samples": 256}, "window is 512.*two hops.*256 samples; choose 512"),
        (LogMel, {"window": 200}, "window is 200"),
        (LogMel, {"window": 511}, "window is 511, expected an even number"),
        (LogMel, {"hop": 0}, "columns of 0"),
        (
            LogMel,
            {"hop": 127, "samples": 1270},
            "columns of 127, an even number; .* of 128",
        ),
        (LogMel, {"bins": 200}, "200 bins are too narrow for a window of 512"),
        (LogMel, {"floor": 0}, "floor 0"),
        (LogMel, {"std": -1.0}, "std -1.0"),
        (LogMel, {"rounds": 0}, "rounds 0"),
        (LogMel, {"bins": 0}, "bins 0"),
        (LogMel, {"rate": 0}, "rate 0"),
        (Mdct, {"rate": -1}, "rate -1"),
        (Mdct, {"samples": 0}, "0 samples"),
        (Mdct, {"bins": 0}, "columns of 0"),
        (Mdct, {"bins": 1}, "columns of 1, an even"),
        (Mdct, {"bins": 64, "samples": 32}, "32 samples"),
        (Mdct, {"power": 0}, "power is 0"),
        (Mdct, {"power": 1.5}, "power is 1.5"),
        (Mdct, {"scale": 0}, "scale is 0"),
        (Mdct, {"scale": math.nan}, "scale is nan"),
        (LogMel, {"floor": math.nan}, "floor nan"),
    ],
)
def test_invalid_settings_are_refused(kind, change, words):
    with pytest.raises(ValueError, match=words):
        kind(**change)


@pytest.mark.parametrize("form", [Mdct(1024), LogMel(1024)])
@pytest.mark.parametrize(
    "waves, words",
    [
        (
            torch.zeros(2, 1023),
            r"waves have shape \(2, 1023\), expected \(b, 1024\); fit_length\(x, "
            r"1024\)",
        ),
        (torch.zeros(1024), r"\(1024,\)"),
        (torch.zeros(2, 1, 1024), r"\(2, 1, 1024\)"),
        (torch.zeros(0, 1024), r"\(0, 1024\)"),
        (
            torch.zeros(2, 1024, dtype=torch.int16),
            "torch.int16, expected torch.float32.*32768",
        ),
        (torch.zeros(2, 1024, dtype=torch.bfloat16), "bfloat16"),
        (
            torch.tensor([[0.0], [math.nan]]).expand(2, 1024),
            r"1 waves contain NaN or infinity, first at \[1\]",
        ),
        (torch.full((1, 1024), math.inf), "NaN or infinity"),
    ],
)
def test_invalid_audio_is_refused(form, waves, words):
    with pytest.raises(ValueError, match=words):
        form.encode(waves)


@pytest.mark.parametrize("form", [Mdct(1024), LogMel(1024)])
def test_invalid_spectra_are_refused(form):
    with pytest.raises(
        ValueError, match=r"spectra have shape .* expected \(b, (64|128), 8\)"
    ):
        form.decode(torch.zeros(2, 8, form.bins))
    with pytest.raises(ValueError, match="1 spectra contain NaN"):
        form.decode(torch.full((1, *form.shape), math.nan))


def test_the_mdct_works_without_torchaudio(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    for call in (
        lambda: LogMel(4096, hop=256, window=1024, bins=33),
        lambda: resample(torch.zeros(1, 100), 16_000, 8000),
    ):
        with pytest.raises(ImportError, match=r"torchaudio==2.11.*torch<2.15"):
            call()
    assert Mdct(1024).decode(Mdct(1024).encode(noise(1, 1024))).shape == (1, 1024)


@pytest.mark.parametrize(
    "rate, new_rate",
    [
        (44_100, 8000),
        (16_000, 8000),
        (11_025, 8000),
        (8000, 22_050),
        (48_000, 44_100),
        (8000, 8000),
    ],
)
def test_resampling_preserves_the_tone_and_removes_high_frequencies(rate, new_rate):
    seconds = torch.arange(rate, dtype=torch.float64) / rate
    resampled = resample(torch.sin(2 * math.pi * 700 * seconds), rate, new_rate)
    expected = torch.sin(
        2 * math.pi * 700 * torch.arange(new_rate, dtype=torch.float64) / new_rate
    )
    assert resampled.shape == expected.shape
    assert (resampled - expected)[200:-200].abs().max() < 0.005
    if new_rate <= rate / 2:
        high = resample(torch.sin(2 * math.pi * 0.48 * rate * seconds), rate, new_rate)
        assert high[200:-200].abs().max() < 0.02


@pytest.mark.parametrize(
    "rates",
    [
        (0, 8000),
        (8000, -1),
        (8000.0, 16_000),
        ("8000", 16_000),
        (44_101, 8000),
        (8000, 10**9 + 7),
    ],
)
def test_invalid_rates_are_refused(rates):
    with pytest.raises(ValueError, match="whole numbers above 0|takes a table of"):
        resample(torch.zeros(1, 10), *rates)


def test_audio_is_mixed_to_mono_and_fitted_to_a_length():
    waves = noise(2, 10)
    torch.testing.assert_close(to_mono(waves), (waves[0] + waves[1]) / 2)
    assert torch.equal(fit_length(waves, 4), waves[:, :4])
    assert torch.equal(fit_length(waves, 10), waves)
    assert torch.equal(fit_length(waves, 12), torch.cat([waves, torch.zeros(2, 2)], 1))
    assert fit_length(waves[0, :0], 3).sum() == 0
    for bad in (waves[0], waves[None], waves[:0]):
        with pytest.raises(ValueError, match="channels of a waveform have shape"):
            to_mono(bad)
    with pytest.raises(ValueError, match="samples is 0"):
        fit_length(waves, 0)


def tones(hz, amplitudes, vibrato=0.0, samples=8192, rate=RATE, decay=0.0):
    """Return sums of overtones; vibrato is the relative swing of the frequency."""
    seconds = torch.arange(samples, dtype=torch.float64) / rate
    swing = 2 * math.pi * 6  # six times a second
    warped = seconds + vibrato * (1 - torch.cos(swing * seconds)) / swing
    angle = 2 * math.pi * torch.as_tensor(hz, dtype=torch.float64)[:, None] * warped
    waves = torch.zeros_like(angle)
    for k, amplitude in enumerate(amplitudes, start=1):
        waves += amplitude * torch.sin(k * angle + k)
    return waves * torch.exp(-decay * seconds)


@pytest.mark.parametrize(
    "amplitudes", [(1,), (1, 0.7, 0.5), (1, 0, 0.6), (0.4, 0.2, 1), (0, 1, 1)]
)
@pytest.mark.parametrize("vibrato, decay", [(0, 0), (0.03, 8.0)])
@pytest.mark.parametrize(
    "rate, samples, level",
    [(8000, 8192, 0.5), (16_000, 8192, 0.01), (22_050, 11_025, 1.0)],
)
def test_pitch_is_estimated_correctly(amplitudes, vibrato, decay, rate, samples, level):
    played = 82.5 * 2 ** (torch.arange(0, 47, 1.7, dtype=torch.float64) / 12)
    notes = tones(played, amplitudes, vibrato, samples, rate, decay)
    # a constant offset does not matter
    waves = level * notes + 0.1 * level
    off = 12 * torch.log2(pitch_of(waves, rate) / played)
    assert off.abs().max() < 0.5
    assert (pitch_of(waves.float(), rate) - pitch_of(waves, rate)).abs().max() < 1


def test_a_low_tone_in_noise_is_not_taken_for_a_high_one():
    played = torch.linspace(65, 300, 40, dtype=torch.float64)
    waves = tones(played, (1,)) + noise(40, 8192) / 2
    off = 12 * (pitch_of(waves, RATE) / played).log2()
    assert off.abs().max() < 0.5


def test_silence_and_noise_have_no_pitch():
    waves = torch.cat(
        [
            torch.zeros(1, 8192),
            torch.full((1, 8192), 0.5),
            noise(1, 8192),
            1e-5 * tones([440], (1,)).float(),
        ]
    )
    assert pitch_of(waves, RATE).isnan().all()
    with_tone = torch.cat([waves, tones([440], (1,)).float()])
    assert abs(pitch_of(with_tone, RATE)[-1] - 440) < 1, (
        "the rest of the batch does not matter"
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"low": 0}, "low is 0"),
        ({"low": 500.0, "high": 400.0}, "low is 500.0 and high is 400.0"),
        ({"high": 4001.0}, "half the rate"),
        ({"low": 1.0}, "two periods of 1.0 Hz; use low >= 2"),
    ],
)
def test_invalid_search_ranges_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        pitch_of(noise(1, 8192), RATE, **change)
    with pytest.raises(ValueError, match="NaN"):
        pitch_of(torch.full((1, 8192), math.nan), RATE)


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("seed", range(4))
def test_onsets_of_struck_notes_are_exact_to_10_ms(rate, seed):
    draw = np.random.default_rng(seed)
    seconds = torch.arange(rate) / rate
    waves = torch.zeros(8, rate)
    truth = []
    for wave in waves:
        begins = np.cumsum(draw.uniform(0.07, 0.3, draw.integers(1, 6)))
        truth.append(begins[begins < 0.95])
        for begin in truth[-1]:
            after = seconds - begin
            strike = (
                torch.sin(2 * math.pi * draw.uniform(200, 1500) * after)
                * (after >= 0)
                * draw.uniform(0.2, 1)
            )
            wave += strike * torch.exp(-draw.uniform(8, 40) * after.clamp(min=0))
    onsets = onsets_of(waves, rate)
    assert sum(map(len, onsets)) == sum(map(len, truth)), "none is invented or missed"
    for measured, expected in zip(onsets, truth, strict=True):
        assert np.abs(measured.numpy() - expected).max() < 0.01


def test_silence_and_soft_notes_have_no_onset():
    seconds = torch.arange(4000) / RATE
    struck = torch.exp(-20 * seconds) * torch.sin(2 * math.pi * 500 * seconds)
    # a second note, 40 dB softer, while the first still sounds
    soft = struck + 0.01 * torch.cat([torch.zeros(2000), struck[:2000]])
    at_0, silent, faint, two_notes = onsets_of(
        torch.stack([struck, torch.zeros(4000), 1e-4 * struck, soft]), RATE
    )
    assert at_0.tolist() == pytest.approx([0], abs=0.004)
    assert len(silent) == 0
    assert len(faint) == 0
    assert two_notes.tolist() == pytest.approx([0], abs=0.004)
    assert len(onsets_of(noise(3, 5), RATE)) == 3, "short waves are accepted"
    for change in ({"threshold": 0}, {"threshold": 1.1}, {"gap": 0}, {"gap": math.nan}):
        with pytest.raises(ValueError, match="threshold is .* and gap"):
            onsets_of(noise(1, 800), RATE, **change)
    with pytest.raises(ValueError, match="expected \\(b, n\\)"):
        onsets_of(noise(800), RATE)
