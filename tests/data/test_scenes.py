"""Bouncing balls follow a simulation, and their audio follows the bounces."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.data.datasets import SPLITS
from selfflow.data.scenes import (
    _LOUDEST,
    _RADII,
    _SPEEDS,
    GROUNDS,
    MATERIALS,
    PITCHES,
    Scenes,
    _onsets,
    draw_ball,
    impact_sound,
    impacts,
    impacts_seen,
    matched,
    sound_on_bounce,
    trajectory,
)
from selfflow.draws import keyed

NONE = float("nan")


@pytest.fixture(scope="module")
def clips():
    return Scenes("validation").take(torch.arange(256))


def simulated_flight(start, velocity, radius, moments, dt=1e-4):
    """Return positions and impacts of a flight simulated in small steps."""
    place = list(start)
    direction = list(velocity)
    r = radius
    places = []
    hits = []
    for step in range(round(max(moments) / dt) + 1):
        if len(places) < len(moments) and step >= round(moments[len(places)] / dt):
            places.append(tuple(place))
        for axis in (0, 1):
            place[axis] += direction[axis] * dt
            outside = max(r - place[axis], place[axis] - (1 - r))
            # it met the wall `outside / speed` before the end of this step
            if outside > 0:
                speed = abs(direction[axis])
                hits.append(((step + 1) * dt - outside / speed, speed))
                place[axis] += 2 * outside * (1 if place[axis] < 0.5 else -1)
                direction[axis] = -direction[axis]
    return places, sorted(hits)


@pytest.mark.parametrize("index", range(6))
def test_flights_and_impacts_equal_a_simulation(clips, index):
    factors = {name: values[index] for name, values in clips.factors.items()}
    moments = [(frame + 0.5) / 15.625 for frame in range(16)]
    start = factors["position"][0] - factors["velocity"] * moments[0]
    radius = factors["radius"].item()
    # the first impact comes after the first frame and a half, so the flight up to the
    # first frame is straight
    places, hits = simulated_flight(
        start.tolist(), factors["velocity"].tolist(), radius, [*moments, 1.024]
    )
    np.testing.assert_allclose(factors["position"], places[:16], atol=4e-4)
    times = factors["impact_times"]
    times = times[times.isfinite()].tolist()
    speeds = factors["impact_speeds"]
    speeds = speeds[speeds.isfinite()].tolist()
    hits = [hit for hit in hits if hit[0] < 1.024]
    assert len(hits) == len(times)
    np.testing.assert_allclose(times, [time for time, _ in hits], atol=2e-4)
    np.testing.assert_allclose(speeds, [speed for _, speed in hits], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.floats(0.05, 0.3),
    st.floats(0.1, 3),
)
def test_a_ball_stays_in_its_box_and_turns_at_impacts(x, y, vx, vy, radius, seconds):
    radius = torch.tensor([radius], dtype=torch.float64)
    start = radius + (1 - 2 * radius) * torch.tensor([[x, y]], dtype=torch.float64)
    velocity = torch.tensor([[vx, vy]], dtype=torch.float64)
    path = trajectory(
        start, velocity, radius, torch.linspace(0, seconds, 200, dtype=torch.float64)
    )[0]
    assert (path >= radius - 1e-9).all()
    assert (path <= 1 - radius + 1e-9).all()
    times, speeds = impacts(start, velocity, radius, seconds, 64)
    assert torch.equal(times.isfinite(), speeds.isfinite())
    assert (times[0].diff().nan_to_num(0) >= 0).all()
    assert not (times < 0).any()
    assert not (times >= seconds).any()
    width = 1 - 2 * radius.item()
    # as many impacts as crossings of the box, or one more
    for axis, wanted in ((0, abs(vx)), (1, abs(vy))):
        count = (speeds == wanted).sum().item() / (2 if abs(vx) == abs(vy) else 1)
        assert (
            math.floor(seconds * wanted / width - 1e-9)
            <= count
            <= math.floor(seconds * wanted / width + 1e-9) + 1
        ), axis
    impact_times = times[times.isfinite()]
    at_wall = trajectory(start, velocity, radius, impact_times)[0]
    assert (torch.minimum(at_wall - radius, 1 - radius - at_wall).amin(1) < 1e-9).all()


def test_a_ball_at_rest_has_no_impact_and_too_many_are_refused():
    start = torch.tensor([[0.5, 0.1]])
    radius = torch.tensor([0.1])
    times, speeds = impacts(start, torch.zeros(1, 2), radius, 5.0, 3)
    assert times.shape == (1, 3)
    assert times.isnan().all()
    assert speeds.isnan().all()
    torch.testing.assert_close(
        trajectory(start, torch.zeros(1, 2), radius, torch.arange(3.0)),
        start[:, None].expand(1, 3, 2),
    )
    with pytest.raises(ValueError, match="more than 2 impacts within 2.0 s.*slower"):
        impacts(start, torch.tensor([[1.0, 1.0]]), radius, 2.0, 2)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_the_centre_of_mass_is_the_position(size):
    "Each pixel is weighted by its difference from the background."
    data = Scenes("test", size=size, frames=8)
    clips = data.take(torch.arange(5))
    for video, positions in zip(
        clips.signals["video"].numpy(), clips.factors["position"].numpy(), strict=True
    ):
        for frame, (x, y) in enumerate(positions):
            image = video[:, frame]
            # a corner that the ball does not cover
            corner = image[:, :1, :1] if x > 0.4 or y > 0.4 else image[:, -1:, -1:]
            weight = np.abs(image - corner).sum(0)
            rows, columns = np.mgrid[:size, :size]
            assert abs((weight * columns).sum() / weight.sum() + 0.5 - x * size) < 0.1
            assert abs((weight * rows).sum() / weight.sum() + 0.5 - y * size) < 0.1


def test_the_covered_area_is_that_of_the_disc():
    radius = torch.linspace(*_RADII, 5)
    video = draw_ball(
        torch.full((5, 1, 2), 0.45),
        radius,
        torch.full((5,), 2),
        torch.zeros(5, dtype=torch.int64),
        64,
    )
    # stone is plain: red 0.60 on grey 0.18
    share = (video[:, 0, 0] - video[:, 0, 0, :1, :1]) / (2 * (0.60 - 0.18))
    torch.testing.assert_close(
        share.mean((1, 2)), math.pi * radius**2, rtol=0.01, atol=0
    )


def test_materials_differ_and_contrast_with_the_background():
    material, ground = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    video = draw_ball(
        torch.full((25, 1, 2), 0.5), torch.full((25,), 0.12), material, ground, 32
    )
    assert video.shape == (25, 3, 1, 32, 32)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    ball = video[:, :, 0, 13:19, 13:19].mean((2, 3))
    background = video[:, :, 0, 0, 0]
    assert ((ball - background).norm(dim=1) > 0.5).all()
    assert torch.pdist(ball[ground == 0]).min() > 0.3
    assert torch.pdist(background[material == 0]).min() > 0.2


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_the_audio_is_the_sum_of_decaying_partials(rate):
    "Computed by loops, from the table in the notebook."
    pitch = 950.0
    ratios = (1, 1.62, 2.43)
    shares = (0.65, 0.25, 0.10)
    decay = 0.012
    times = [0.01003, 0.0500017]
    speeds = [2.0, 1.1]
    samples = rate // 10
    expected = np.zeros(samples)
    for time, speed in zip(times, speeds, strict=True):
        for n in range(samples):
            since = n / rate - time
            if since < 0:
                continue
            for ratio, share in zip(ratios, shares, strict=True):
                fade = share * math.exp(-since * ratio / decay)
                sine = math.sin(2 * math.pi * pitch * ratio * since)
                expected[n] += _LOUDEST * speed / _SPEEDS[1] * fade * sine
    audio = impact_sound(
        torch.tensor([2]),
        torch.tensor([[*times, NONE]], dtype=torch.float64),
        torch.tensor([[*speeds, NONE]], dtype=torch.float64),
        samples,
        rate,
    )
    assert audio.shape == (1, samples)
    assert audio.is_contiguous()
    np.testing.assert_allclose(audio[0], expected, atol=2e-6)


def test_two_loudest_impacts_at_once_stay_in_range():
    at_once = torch.full((5, 2), _SPEEDS[1] / math.sqrt(2))
    audio = impact_sound(torch.arange(5), torch.full((5, 2), 0.1), at_once, 4000, 8000)
    assert 0.5 < audio.abs().max() <= 1
    silence = impact_sound(
        torch.arange(5), torch.full((5, 2), NONE), torch.full((5, 2), NONE), 4000, 8000
    )
    assert torch.equal(silence, torch.zeros(5, 4000))


def test_impacts_are_heard_at_their_time_pitch_and_loudness(clips):
    """Silence before the first impact, then onset, pitch and loudness of each."""
    measured = []
    impact_times = clips.factors["impact_times"].tolist()
    impact_speeds = clips.factors["impact_speeds"].tolist()
    for wave, material, times, speeds in zip(
        clips.signals["audio"].numpy(),
        clips.labels.tolist(),
        impact_times,
        impact_speeds,
        strict=True,
    ):
        assert not wave[: math.floor(times[0] * 8000)].any()
        for k, (time, speed) in enumerate(zip(times, speeds, strict=True)):
            if math.isnan(time):
                continue
            first = math.ceil(time * 8000)
            # 60 ms: shorter than the gap between impacts, which is a frame
            after_impact = wave[first : first + 480]
            spectrum = np.abs(
                np.fft.rfft(
                    after_impact
                    * np.hanning(2 * len(after_impact))[len(after_impact) :],
                    8000,
                )
            )
            assert abs(spectrum[50:].argmax() + 50 - PITCHES[material]) < 40, (
                MATERIALS[material],
                time,
            )
            before = np.square(wave[max(0, first - 16) : first]).sum()
            assert np.square(wave[first : first + 16]).sum() > 3 * before, (
                "the energy rises within 2 ms"
            )
            if k == 0:
                measured.append((material, speed, np.abs(after_impact[:160]).max()))
    for index in range(len(MATERIALS)):
        speed, peak = np.array([entry[1:] for entry in measured if entry[0] == index]).T
        assert len(speed) > 20
        assert np.corrcoef(speed, peak)[0, 1] > 0.95
        assert (peak / speed).std() < 0.1 * (peak / speed).mean()


def test_clips_keep_the_documented_limits():
    for split in SPLITS:
        data = Scenes(split)
        factors = [data.take(rows).factors for rows in torch.arange(1000).split(250)]
        times = torch.cat([batch["impact_times"] for batch in factors])
        frames = torch.cat([batch["impact_frames"] for batch in factors])
        speeds = torch.cat([batch["impact_speeds"] for batch in factors])
        counts = times.isfinite().sum(1)
        assert counts.min() == 1
        assert (counts <= 4).float().mean() > 0.98
        assert counts.unique().numel() >= 4
        impact_frames = times[times.isfinite()] * data.fps
        assert impact_frames.min() >= 1.5 - 1e-4
        assert impact_frames.max() <= 14.5 + 1e-4
        gaps = times.diff(dim=1)
        assert gaps[gaps.isfinite()].min() * data.fps >= 1 - 1e-4
        shares = torch.histc(impact_frames, 13, 1.5, 14.5) / len(impact_frames)
        assert (shares - 1 / 13).abs().max() < 0.025, (
            "impacts are spread evenly over the clip"
        )
        for row, marked in zip(times[:64].tolist(), frames[:64], strict=True):
            expected = {int(time * data.fps) for time in row if not math.isnan(time)}
            assert expected == set(marked.nonzero().flatten().tolist())
        assert speeds[speeds.isfinite()].min() > _SPEEDS[0] * math.sin(
            math.radians(24.9)
        )


def test_factors_are_drawn_evenly_and_independently():
    data = Scenes(count=4096)
    clips = [data.take(rows) for rows in torch.arange(4096).split(256)]
    factors = {
        name: torch.cat([batch.factors[name] for batch in clips])
        for name in clips[0].factors
    }
    table = torch.zeros(5, 5).index_put_(
        (factors["material"], factors["ground"]), torch.ones(4096), accumulate=True
    )
    assert (table / 4096 - 0.04).abs().max() < 0.013
    assert len(GROUNDS) == len(MATERIALS) == 5
    numbers = torch.stack(
        [
            factors["material"].float(),
            factors["ground"].float(),
            factors["radius"],
            factors["speed"],
        ]
    )
    assert (torch.corrcoef(numbers) - torch.eye(4)).abs().max() < 0.07
    for name, (low, high) in (("radius", _RADII), ("speed", _SPEEDS)):
        assert low <= factors[name].min()
        assert factors[name].max() <= high
        assert (
            torch.histc(factors[name], 4, low, high) / 4096 - 0.25
        ).abs().max() < 0.03
    torch.testing.assert_close(factors["velocity"].norm(dim=1), factors["speed"])
    assert torch.equal(
        torch.cat([batch.labels for batch in clips]), factors["material"]
    )


def test_a_clip_depends_on_its_index_alone(clips):
    data = Scenes("validation")
    chosen = data.take(torch.tensor([200, 3, 77]))
    for name, values in (clips.signals | clips.factors).items():
        assert torch.equal(
            values[[200, 3, 77]].nan_to_num(-1),
            (chosen.signals | chosen.factors)[name].nan_to_num(-1),
        ), name
    assert chosen.captions == tuple(clips.captions[k] for k in (200, 3, 77))
    audio = torch.cat(
        [Scenes(split).take(torch.arange(50)).signals["audio"] for split in SPLITS]
    )
    assert len(audio.unique(dim=0)) == 150
    empty = data.take(torch.arange(0))
    assert len(empty) == 0
    assert empty.signals["video"].shape == (0, 3, 16, 32, 32)
    assert empty.captions == ()
    assert (
        replace(data, size=16).fingerprint
        != data.fingerprint
        == Scenes("validation").fingerprint
    )
    with pytest.raises(IndexError, match="1000"):
        data.take(torch.tensor([1000]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 24, "frames": 8},
        {"fps": 16, "rate": 16000},
        {"frames": 40},
        {"fps": 31.25, "frames": 32},
    ],
)
def test_signals_have_their_shapes_and_range(options):
    data = Scenes("test", 100, **options)
    clips = data.take(torch.arange(32))
    assert {
        name: tuple(values.shape[1:]) for name, values in clips.signals.items()
    } == data.shapes
    for values in clips.signals.values():
        assert values.dtype == torch.float32
        assert values.abs().max() <= 1
    assert data.samples * data.fps == data.frames * data.rate
    assert clips.factors["impact_times"].shape == (32, data.most)
    assert (clips.factors["impact_times"].isfinite().sum(1) > 0).all()
    hits, _, _ = sound_on_bounce(
        clips.signals["video"], clips.signals["audio"], data.fps, data.rate
    )
    assert hits.float().mean() > 0.96


def test_captions_describe_the_factors(clips):
    for index, caption in enumerate(clips.captions):
        assert caption.isascii()
        assert len(caption) <= 64
        words = caption.replace(",", "").split()
        factors = {name: values[index] for name, values in clips.factors.items()}
        assert words[1] == ("large" if factors["radius"] > 0.125 else "small")
        assert words[2] == MATERIALS[factors["material"]]
        assert words[5] == ("fast" if factors["speed"] > 1.5 else "slowly")
        assert words[8] == GROUNDS[factors["ground"]]
        count = factors["impact_times"].isfinite().sum().item()
        assert " ".join(words[10:]) == {1: "once", 2: "twice"}.get(
            count, f"{count} times"
        )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"size": 8}, "size is 8.*whole number of at least 16"),
        ({"size": 32.0}, "size is 32.0.*whole"),
        ({"frames": 4}, "frames is 4"),
        ({"fps": 8}, "fps is 8.*number of at least 12"),
        ({"fps": NONE}, "fps is nan"),
        ({"rate": 4000}, "rate is 4000.*at least 7500"),
        ({"fps": math.inf}, "fps is inf"),
        ({"fps": "16"}, "fps is '16'"),
        ({"fps": 15}, "533.333 samples.*fps = 15.0093"),
        ({"fps": 20000}, "0.4 samples.*fps = 8000"),
        ({"split": "valid"}, "unknown split"),
        ({"count": 0}, "at least one sample"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Scenes(**options)


def test_bounces_and_onsets_are_measured_from_pixels_and_audio(clips):
    known = clips.factors["impact_times"]
    for measured, error in (
        (impacts_seen(clips.signals["video"], 15.625), 0.006),
        (_onsets(clips.signals["audio"], 8000), 0.002),
    ):
        for row, times in zip(measured.tolist(), known.tolist(), strict=True):
            actual = [time for time in row if not math.isnan(time)]
            expected = [time for time in times if not math.isnan(time)]
            assert actual == pytest.approx(expected, abs=error)


def test_the_measure_separates_matching_from_other_audio(clips):
    videos = clips.signals["video"]
    waves = clips.signals["audio"]
    hits, heard, seen = sound_on_bounce(videos, waves, 15.625, 8000)
    assert hits.shape == (256,)
    assert hits.dtype == torch.bool
    assert hits.all()
    assert (heard == 1).all()
    assert (seen == 1).all()
    hits, heard, seen = sound_on_bounce(videos, waves.roll(1, 0), 15.625, 8000)
    assert hits.float().mean() < 0.06
    assert 0.25 < heard.mean() < 0.45
    assert 0.25 < seen.mean() < 0.45
    late = torch.roll(waves, round(1.3 * 512), 1)
    assert not sound_on_bounce(videos, late, 15.625, 8000)[0].any()
    assert (
        sound_on_bounce(videos, late, 15.625, 8000, tolerance=1.6)[0].float().mean()
        > 0.8
    )
    noise = torch.randn(videos.shape, generator=keyed(0, "noise"))
    assert (
        sound_on_bounce(videos + 0.1 * noise, waves, 15.625, 8000)[0].float().mean()
        > 0.95
    )
    assert sound_on_bounce(0.5 * noise, waves, 15.625, 8000)[0].float().mean() < 0.1, (
        "noise shows no ball"
    )


def test_without_bounces_or_onsets_there_is_no_hit(clips):
    videos = clips.signals["video"][:3]
    waves = clips.signals["audio"][:3]
    for video, audio in (
        (torch.zeros_like(videos), waves),
        (videos, torch.zeros_like(waves)),
        (videos * NONE, waves),
        (videos, waves * NONE),
        (videos[:, :, :1].expand_as(videos), waves),
    ):
        hits, heard, seen = sound_on_bounce(video, audio, 15.625, 8000)
        assert not hits.any()
        assert torch.equal(heard, torch.zeros(3))
        assert torch.equal(seen, torch.zeros(3))
    one_bad = torch.cat([videos[:1] * NONE, videos[1:]])
    assert sound_on_bounce(one_bad, waves, 15.625, 8000)[0].tolist() == [
        False,
        True,
        True,
    ], "a bad clip does not affect the others"
    assert sound_on_bounce(videos[:0], waves[:0], 15.625, 8000)[0].shape == (0,)
    assert sound_on_bounce(videos.bfloat16(), waves.bfloat16(), 15.625, 8000)[0].all()


def test_matches_are_counted_in_both_directions():
    bounces = torch.tensor(
        [
            [0.2, 0.5, 0.8],
            [0.2, NONE, NONE],
            [0.2, 0.5, NONE],
            [NONE, NONE, NONE],
            [0.3, NONE, NONE],
        ]
    )
    onsets = torch.tensor(
        [[0.21, 0.79], [0.2, 0.4], [0.51, 0.19], [0.5, NONE], [NONE, NONE]]
    )
    hits, heard, seen = matched(bounces, onsets, 0.05)
    assert hits.tolist() == [False, False, True, False, False]
    assert heard.tolist() == pytest.approx([2 / 3, 1, 1, 0, 0])
    assert seen.tolist() == pytest.approx([1, 0.5, 1, 0, 0])


@pytest.mark.parametrize(
    "videos, waves, words",
    [
        ((2, 3, 16, 32, 32), (3, 8192), "2 videos.*3 audio clips"),
        ((2, 3, 16, 32, 32), (2, 16384), "1.024 s.*2.048 s.*fps and rate"),
        (
            (2, 1, 16, 32, 32),
            (2, 8192),
            r"\(2, 1, 16, 32, 32\), expected \(b, 3, f, h, w\)",
        ),
        ((2, 3, 2, 32, 32), (2, 1024), "4 frames"),
    ],
)
def test_videos_and_audio_that_do_not_fit_are_refused(videos, waves, words):
    with pytest.raises(ValueError, match=words):
        sound_on_bounce(torch.zeros(videos), torch.zeros(waves), 15.625, 8000)


def test_the_clips_of_this_version_never_change():
    "A change to the clips needs another VERSION."
    clips = Scenes("test").take(torch.arange(4))
    assert Scenes.VERSION == 1
    assert clips.captions == (
        "a small stone ball bounces slowly in a brown box, twice",
        "a large wood ball bounces fast in a blue box, 3 times",
        "a large rubber ball bounces slowly in a brown box, twice",
        "a small rubber ball bounces slowly in a green box, once",
    )
    times = clips.factors["impact_times"]
    expected = [0.2964, 0.4015, 0.3737, 0.4560, 0.8394, 0.4613, 0.7862, 0.2828]
    assert times[times.isfinite()].tolist() == pytest.approx(expected, abs=1e-4)
    assert clips.signals["audio"].abs().mean(1).tolist() == pytest.approx(
        [0.0023, 0.0081, 0.0053, 0.0026], abs=1e-4
    )
    assert clips.signals["video"].mean((1, 2, 3, 4)).tolist() == pytest.approx(
        [-0.6392, -0.6124, -0.6301, -0.7146], abs=1e-4
    )
