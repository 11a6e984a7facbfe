"""Latents on the disk are the standardised latents of the autoencoder.

Encoding survives kills and full disks, and damage is detected and repaired.
"""

import errno
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import at_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from selfflow import cli
from selfflow.data.autoencoder import Haar
from selfflow.data.datasets import Examples, ImageSet, Made, digits
from selfflow.data.latents import (
    Latents,
    Mirrored,
    _moments,
    _pooled,
    _read_index,
    _write_index,
    encode_latents,
)
from selfflow.data.options import DataConfig
from selfflow.data.sources import open_dataset
from selfflow.disk import NotWritten
from selfflow.method.options import ModelConfig
from selfflow.method.tokens import ImagePatches
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train

DATA = digits()[:50]
CAPTIONS = (
    "a ball",
    "",
    "zwölf Bälle",
    "\U0001f3b1 \u00e9\u0301",
    "0" * 300,
    "\0",
    "half a \ud83d pair",
)


class CountingHaar(Haar):
    """Counts batches, and may fail at the k-th one or damage its latents."""

    def __init__(self, at=None, change=None):
        self.batches = []
        self.at = at
        self.change = change
        self.devices = []

    def to(self, device):
        self.devices.append(str(device))
        return self

    def encode(self, signals):
        self.batches.append(len(signals))
        if len(self.batches) == self.at:
            raise KeyboardInterrupt
        z = super().encode(signals)
        return z if self.change is None else self.change(z)


class Pairs:
    "Autoencoder of audio (b, samples): its pairs are latents (b, 2, samples / 2)."

    signal, fingerprint = "audio", "pairs"

    def to(self, device):
        return self

    def latent_shape(self, shape):
        return 2, shape[0] // 2

    def encode(self, signals):
        return torch.stack([signals[:, ::2] + 3, 5 * signals[:, 1::2]], 1)

    def decode(self, latents):
        return torch.stack([latents[:, 0] - 3, latents[:, 1] / 5], 2).flatten(1)


@dataclass(frozen=True)
class Scenes(Made):
    "Images with audio, factors and unusual captions."

    names = ("low", "high")
    shapes = {"image": (1, 4, 2), "audio": (6,)}

    def take(self, indices):
        numbers = self.numbers("all", indices, 16)
        signals = {
            "image": numbers[:, :8].reshape(-1, 1, 4, 2) * 2 - 1,
            "audio": numbers[:, 8:14] * 2 - 1,
        }
        return Examples(
            signals,
            (numbers[:, 14] > 0.5).long(),
            tuple(CAPTIONS[i % len(CAPTIONS)] for i in indices.tolist()),
            {
                "pitch": numbers[:, 15],
                "place": (numbers[:, :6] * 9).long().reshape(-1, 2, 3),
            },
        )


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def encode(folder, data=DATA, coder=None, **options):
    "Encode into shards of ten, in batches of four."
    options = {"batch": 4, "shard_size": 10, "device": "cpu", "bar": False} | options
    return encode_latents(data, coder or Haar(), folder, **options)


@pytest.fixture(scope="module")
def latents_folder(tmp_path_factory):
    "A finished folder of latents; tests must not change it."
    folder = tmp_path_factory.mktemp("finished")
    encode(folder)
    return folder


@pytest.fixture
def latents_copy(latents_folder, tmp_path):
    "A copy of the finished folder that a test may change."
    return Path(shutil.copytree(latents_folder, tmp_path / "copy"))


# encoding and reading


def test_a_pretrained_backbone_gets_the_scale_of_its_autoencoder(latents_folder):
    rows = torch.arange(50)
    z = Haar().encode(DATA.images)
    unscaled = Latents(latents_folder, scale="autoencoder", autoencoder=Haar())
    signals = unscaled.take(rows).signals
    assert torch.equal(signals["image"], z)
    assert torch.equal(unscaled.decode(signals)["image"], Haar().decode(z))
    assert not torch.equal(Latents(latents_folder).take(rows).signals["image"], z)
    assert unscaled.fingerprint != Latents(latents_folder).fingerprint
    opened = open_dataset(
        DataConfig("latents", path=str(latents_folder), scale="autoencoder"), "train"
    )
    assert opened.fingerprint == unscaled.fingerprint
    with pytest.raises(ValueError, match="data.scale"):
        DataConfig("latents", path=str(latents_folder), scale="own")


def standardised(images):
    "Return the latents, standardised by channel, in float64."
    z = Haar().encode(images).double().numpy()
    return (z - z.mean((0, 2, 3), keepdims=True)) / z.std((0, 2, 3), keepdims=True)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 49), max_size=30))
def test_samples_may_be_taken_in_any_order(latents_folder, indices):
    latents = Latents(latents_folder, check=False)
    examples = latents.take(torch.tensor(indices, dtype=torch.int64))
    assert len(examples) == len(indices)
    assert examples.signals["image"].dtype == torch.float32
    expected = torch.tensor(standardised(DATA.images)[indices])
    torch.testing.assert_close(
        examples.signals["image"].double(), expected, atol=1e-5, rtol=1e-5
    )
    assert examples.labels.tolist() == [int(DATA.labels[i]) for i in indices]
    assert examples.labels.dtype == torch.int64
    assert examples.captions == tuple(DATA.names[DATA.labels[i]] for i in indices)
    assert examples.factors == {}


def test_latents_are_a_data_set(latents_folder):
    latents = Latents(latents_folder, autoencoder=Haar())
    assert len(latents) == 50
    assert latents.shapes == {"image": (4, 4, 4)}
    assert latents.names == DATA.names
    everything = latents.take(torch.arange(50)).signals
    deviation, mean = torch.std_mean(
        everything["image"].double(), (0, 2, 3), correction=0
    )
    torch.testing.assert_close(deviation, torch.ones(4).double(), atol=1e-5, rtol=0)
    assert mean.abs().max() < 1e-5
    torch.testing.assert_close(
        latents.decode(everything)["image"], DATA.images, atol=1e-5, rtol=0
    )
    assert ImagePatches(*latents.shapes["image"], 2).patchify(
        everything["image"]
    ).shape == (50, 4, 16)
    for wrong in ([50], [-1], [3, 1000]):
        with pytest.raises(IndexError, match="of 50"):
            latents.take(torch.tensor(wrong))


@pytest.mark.parametrize("shard_size, batch", [(1, 1), (7, 3), (20, 20), (1000, 6)])
@pytest.mark.parametrize("encode_audio", [True, False])
def test_signals_factors_and_captions_are_preserved(
    tmp_path, shard_size, batch, encode_audio
):
    data = Scenes(count=20)
    coders = [Haar(), Pairs()] if encode_audio else Haar()
    latents = encode_latents(
        data,
        coders,
        tmp_path,
        batch=batch,
        shard_size=shard_size,
        device="cpu",
        bar=False,
    )
    assert len(contents(tmp_path / "train")) == 1 + -(-20 // shard_size)
    assert latents.shapes == {
        "image": (4, 2, 1),
        "audio": (2, 3) if encode_audio else (6,),
    }
    assert latents.names == ("low", "high")
    chosen = torch.tensor([19, 0, 6, 7, 6])
    actual = latents.take(chosen)
    expected = data.take(chosen)
    assert actual.captions == tuple(
        text.replace("\ud83d", "?") for text in expected.captions
    )
    assert torch.equal(actual.labels, expected.labels)
    assert actual.factors.keys() == expected.factors.keys()
    for name, values in expected.factors.items():
        assert torch.equal(actual.factors[name], values)
        assert actual.factors[name].dtype == values.dtype
    assert encode_audio or torch.equal(
        actual.signals["audio"], expected.signals["audio"]
    ), "audio without an autoencoder is stored unchanged"
    for name, signals in latents.decode(actual.signals).items():
        torch.testing.assert_close(
            signals, expected.signals[name], atol=1e-5, rtol=1e-5
        )
    if encode_audio:
        audio = latents.take(torch.arange(20)).signals["audio"].double()
        torch.testing.assert_close(
            torch.stack(torch.std_mean(audio, (0, 2), correction=0)),
            torch.tensor([[1.0, 1], [0, 0]]).double(),
            atol=1e-5,
            rtol=0,
        )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(0, 99),
    st.sampled_from([0.0, 1e3]),
)
def test_pooled_moments_equal_those_of_all_values(sizes, seed, offset):
    z = (
        torch.randn(sum(sizes), 3, 2, generator=torch.Generator().manual_seed(seed))
        * torch.tensor([1.0, 5, 0])[:, None]
        + offset
    )
    mean, variance = _pooled(sizes, [_moments(shard) for shard in z.split(sizes)])
    values = z.double().numpy().transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(variance, values.var(1), rtol=1e-6, atol=1e-10)


def test_a_constant_channel_is_only_centred(tmp_path):
    flat = ImageSet(
        torch.full((5, 1, 4, 4), 0.25), torch.zeros(5, dtype=torch.int64), ("flat",)
    )
    latents = encode(tmp_path, flat)
    taken = latents.take(torch.arange(5)).signals
    assert torch.equal(taken["image"], torch.zeros(5, 4, 2, 2))
    assert torch.equal(latents.decode(taken)["image"], flat.images)


def test_missing_captions_become_empty(tmp_path):
    class WithoutCaptions(ImageSet):
        def take(self, indices):
            return Examples(super().take(indices).signals, self.labels[indices], ())

    data = WithoutCaptions(DATA.images, DATA.labels, DATA.names)
    assert encode(tmp_path, data).take(torch.tensor([11, 2])).captions == ("", "")


def test_other_splits_are_standardised_by_the_training_set(tmp_path):
    validation = ImageSet(DATA.images[:7] / 2, DATA.labels[:7], DATA.names)
    with pytest.raises(
        ValueError,
        match="no complete training split, whose mean and variance all splits need; "
        "encode",
    ):
        encode(tmp_path, validation, split="validation")
    assert not list(tmp_path.iterdir())
    train = encode(tmp_path)
    z = Haar().encode(DATA.images).double()
    mean = z.mean((0, 2, 3), keepdim=True)
    deviation = z.std((0, 2, 3), keepdim=True, correction=0)
    expected = (Haar().encode(validation.images) - mean) / deviation
    latents = encode(tmp_path, validation, split="validation")
    taken = latents.take(torch.arange(7)).signals
    torch.testing.assert_close(taken["image"].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        latents.decode(taken)["image"], validation.images, atol=1e-5, rtol=0
    )
    assert latents.fingerprint != train.fingerprint
    shutil.rmtree(tmp_path / "train")
    encode(tmp_path, ImageSet(DATA.images / 3, DATA.labels, DATA.names))
    assert Latents(tmp_path, "validation").fingerprint != latents.fingerprint, (
        "the same files are standardised differently"
    )
    shutil.rmtree(tmp_path / "train")
    coder = Haar()
    coder.fingerprint = "another"
    encode(tmp_path, coder=coder)
    with pytest.raises(
        ValueError,
        match="training split in .* has other latents: autoencoders are .*another.* "
        "there",
    ):
        Latents(tmp_path, "validation")


def test_a_fingerprint_depends_on_the_values_that_are_read(latents_folder, tmp_path):
    first = Latents(latents_folder).fingerprint
    coder = Haar()
    coder.fingerprint = "another"
    assert len(first) == 16
    assert encode(tmp_path / "again").fingerprint == first
    others = [
        encode(tmp_path / "1", DATA[:49]),
        encode(tmp_path / "2", DATA[list(range(49, -1, -1))]),
        encode(tmp_path / "3", coder=coder),
        encode(tmp_path / "4", ImageSet(DATA.images * 0.999, DATA.labels, DATA.names)),
    ]
    assert len({first, *(latents.fingerprint for latents in others)}) == 5


def test_only_requested_samples_are_read_into_memory(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is read from /proc")
    data = Scenes(count=64)
    object.__setattr__(
        data,
        "take",
        lambda indices: Examples(
            {"image": torch.ones(len(indices), 1, 512, 256)}, indices, ()
        ),
    )
    object.__setattr__(data, "shapes", {"image": (1, 512, 256)})
    latents = encode_latents(
        data, Haar(), tmp_path, shard_size=64, device="cpu", bar=False
    )
    size = (tmp_path / "train/shard-00000.safetensors").stat().st_size
    assert size > 32 * 2**20

    def memory_in_use():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return 1024 * int(line.split()[1])

    latents.take(torch.tensor([0]))
    before = memory_in_use()
    held = [latents.take(torch.tensor([i])) for i in (63, 5)]
    assert memory_in_use() - before < size / 4
    assert len(held) == 2


def test_data_workers_read_the_same_latents(latents_folder):
    latents = Latents(latents_folder)
    chosen = [torch.tensor([i, 49 - i]) for i in range(6)]
    latents.take(chosen[0])

    class Batches:
        def __getitem__(self, step):
            return latents.take(chosen[step]).signals["image"]

    fetched = list(
        DataLoader(
            Batches(),
            sampler=range(6),
            batch_size=None,
            num_workers=2,
            generator=torch.Generator(),
        )
    )
    for values, indices in zip(fetched, chosen, strict=True):
        assert torch.equal(values, latents.take(indices).signals["image"])


# kills


@pytest.mark.parametrize("at", [1, 4, 15])
def test_an_interrupted_encoding_resumes(latents_folder, tmp_path, at):
    first = CountingHaar(at)
    second = CountingHaar()
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, coder=first)
    finished = sorted((tmp_path / "train").glob("shard-*"))
    assert len(finished) == (at - 1) // 3
    assert not list((tmp_path / "train").glob(".*"))
    before = [path.stat().st_mtime_ns for path in finished]
    with pytest.raises(
        FileNotFoundError,
        match="only a part of its latents" if finished else "no latents",
    ):
        Latents(tmp_path)
    encode(tmp_path, coder=second)
    assert contents(tmp_path / "train") == contents(latents_folder / "train")
    assert second.batches == [4, 4, 2] * (5 - len(finished))
    assert [path.stat().st_mtime_ns for path in finished] == before


def test_a_kill_before_each_single_call_costs_one_shard_at_most(tmp_path):
    ended = signal.SIGKILL
    k = 0
    data = DATA[:11]
    encode(tmp_path, data)
    expected = contents(tmp_path / "train")
    while ended == signal.SIGKILL:
        folder = tmp_path / str(k)
        k = k + 1
        if (pid := os.fork()) == 0:
            try:
                with at_call(k, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                    encode(folder, data)
            finally:
                os._exit(1 if sys.exc_info()[0] else 0)
        status = os.waitpid(pid, 0)[1]
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        assert ended or status == 0
        finished = len(list(folder.glob("train/shard-*")))
        coder = CountingHaar()
        if (folder / "train/index.json").exists():
            assert contents(folder / "train")["index.json"] == expected["index.json"]
        latents = encode(folder, data, coder)
        encoded = {(): 0, (1,): 1, (4, 4, 2, 1): 2}[tuple(coder.batches)]
        assert encoded in (2 - finished, 3 - finished), (
            "a shard that was not yet recorded is encoded again"
        )
        assert contents(folder / "train") == expected
        assert len(latents) == 11
    assert k > 20


def test_a_full_disk_at_any_call_is_reported_and_costs_nothing(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    encode(tmp_path, DATA[:11])
    expected = contents(tmp_path / "train")
    for k in range(1, 200):
        folder = tmp_path / str(k)
        raised = None
        (folder / "train").mkdir(parents=True)
        with at_call(k, full) as calls:
            try:
                encode(folder, DATA[:11])
            except OSError as error:
                raised = error
        if len(calls) < k:
            break
        if raised is not None:
            assert raised.errno == errno.ENOSPC
            assert isinstance(raised, NotWritten)
            assert "No space left" in str(raised)
            assert not list(folder.rglob(".*")), "temporary files are removed"
        encode(folder, DATA[:11])
        assert contents(folder / "train") == expected
    assert k > 20
    assert raised is None


def test_finished_latents_are_not_encoded_again(latents_copy):
    def times_and_inodes():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_ino)
            for path in [latents_copy / "train", *(latents_copy / "train").iterdir()]
        }

    before = times_and_inodes()
    coder = CountingHaar()
    latents = encode(latents_copy, coder=coder)
    assert times_and_inodes() == before
    assert not coder.batches
    assert not coder.devices
    assert len(latents) == 50


def test_the_autoencoder_works_on_the_requested_device(tmp_path):
    first = CountingHaar()
    second = CountingHaar()
    encode(tmp_path / "a", coder=first, device="cpu")
    encode(tmp_path / "b", coder=second, device="auto")
    assert first.devices == ["cpu"]
    assert second.devices == ["cuda" if torch.cuda.is_available() else "cpu"]


# refusals


def other_coder():
    coder = Haar()
    coder.fingerprint = "another"
    return coder


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"data": digits("test")[:50]},
            f"data: {DATA.fingerprint} there, {digits('test')[:50].fingerprint} "
            f"requested",
        ),
        (
            {"coder": other_coder()},
            f"autoencoders: .*{Haar.fingerprint}.* there, .*another.* requested",
        ),
        ({"shard_size": 9}, "shard_size: 10 there, 9 requested"),
        ({"data": DATA[:49]}, "count: 50 there, 49 requested"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_latents_of_something_else_do_not_resume(latents_copy, finished, change, words):
    if not finished:
        shutil.rmtree(latents_copy / "train")
        with pytest.raises(KeyboardInterrupt):
            encode(latents_copy, coder=CountingHaar(8))
    before = contents(latents_copy / "train")
    with pytest.raises(
        ValueError,
        match=f"holds latents of something else.*{words}.*Use another folder",
    ):
        encode(latents_copy, **change)
    assert contents(latents_copy / "train") == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"batch": 0}, "batch is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"split": "valid"}, "unknown split 'valid'"),
        ({"coder": Pairs()}, "unknown signal of these data 'audio'; known are image"),
        ({"coder": [Haar(), Pairs()]}, "unknown signal of these data 'audio'"),
        (
            {"data": Scenes("test", 5), "split": "train"},
            "these are the test data, to be encoded as train; use split='test'",
        ),
        (
            {
                "data": ImageSet(
                    torch.zeros(2, 1, 3, 4), torch.zeros(2, dtype=torch.int64), ("a",)
                )
            },
            "even h and w",
        ),
        (
            {"coder": CountingHaar(change=lambda z: z[:, :3])},
            r"shape \[3, 4, 4\], expected \[4, 4, 4\].* samples 0 to 3",
        ),
    ],
)
def test_invalid_data_are_not_encoded(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        encode(tmp_path, **change)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_latents_are_refused_and_finished_shards_remain(tmp_path, value):
    coder = CountingHaar(
        change=lambda z: torch.where(torch.tensor(len(coder.batches) == 5), value, z)
    )
    with pytest.raises(
        ValueError,
        match="latents of image .* NaN or infinite, in samples 14 to 17; check these "
        "samples",
    ):
        encode(tmp_path, coder=coder)
    assert sorted(contents(tmp_path / "train")) == [
        "shard-00000.safetensors",
        "unfinished.json",
    ]


def test_decoding_needs_the_autoencoder_that_encoded(latents_folder, tmp_path):
    latents = Latents(latents_folder)
    with pytest.raises(
        ValueError, match="decoding image needs the autoencoder that encoded it"
    ):
        latents.decode(latents.take(torch.arange(2)).signals)
    with pytest.raises(
        ValueError, match=f"encoded by autoencoder {Haar.fingerprint}, not by another"
    ):
        Latents(latents_folder, autoencoder=other_coder())
    with pytest.raises(ValueError, match="unknown signal of these data 'audio'"):
        Latents(latents_folder, autoencoder=Pairs())
    with pytest.raises(ValueError, match="not a local folder"):
        Latents(latents_folder, autoencoder=str(tmp_path))
    encode_latents(
        Scenes(count=4), Haar(), tmp_path / "scenes", device="cpu", bar=False
    )
    with pytest.raises(
        ValueError, match="audio in .* was encoded by autoencoder None, not by pairs"
    ):
        Latents(tmp_path / "scenes", autoencoder=[Haar(), Pairs()])


# damage


def damaged(content, kind, position):
    flipped = (
        content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    )
    return {
        "flip": flipped,
        "cut": content[:position],
        "empty": b"",
        "longer": content + b"\0",
        "missing": None,
    }[kind]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["flip", "flip", "cut", "empty", "longer", "missing"]),
    st.integers(0, 10**6),
    st.integers(0, 4),
)
def test_damage_of_any_shard_is_detected_and_repaired(
    latents_copy, kind, position, number
):
    path = latents_copy / f"train/shard-{number:05d}.safetensors"
    good = path.read_bytes()
    bad = damaged(good, kind, position % len(good))
    path.unlink() if bad is None else path.write_bytes(bad)
    words = {"flip": "was changed", "missing": "is missing"}.get(
        kind, f"has .* bytes instead of {len(good)}"
    )
    with pytest.raises(
        ValueError,
        match=f"1 shards in .* are damaged: {path.name} {words}.*Encode again; intact "
        f"shards are kept",
    ):
        Latents(latents_copy)
    if kind == "flip":
        assert len(Latents(latents_copy, check=False)) == 50, (
            "a flipped bit does not change the size"
        )
    else:
        with pytest.raises(ValueError, match=path.name):
            Latents(latents_copy, check=False)
    coder = CountingHaar()
    encode(latents_copy, coder=coder)
    assert coder.batches == [4, 4, 2]
    assert path.read_bytes() == good
    assert len(Latents(latents_copy)) == 50


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["flip", "flip", "flip", "cut", "empty"]),
    st.integers(0, 10**6),
    st.sampled_from(["index", "unfinished"]),
)
def test_damage_of_an_index_is_detected(
    latents_folder, latents_copy, kind, position, name
):
    path = latents_copy / f"train/{name}.json"
    good = (latents_folder / "train/index.json").read_bytes()
    bad = damaged(good, kind, position % len(good))
    path.write_bytes(bad)
    try:
        same = json.loads(bad) == json.loads(good)  # only white space changed
    except ValueError:
        same = False
    if not same:
        with pytest.raises(
            ValueError,
            match=f"{name}.json cannot be used: .*Remove its folder and encode again",
        ):
            Latents(latents_copy) if name == "index" else encode(latents_copy)
    else:
        assert len(Latents(latents_copy)) == 50
    path.write_bytes(good)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{not json",
        "[" * 100000,
        '{"format": 2}',
        '{"format": 1}',
        "\xff",
    ],
)
def test_an_invalid_index_is_refused(latents_copy, text):
    (latents_copy / "train/index.json").write_text(text, encoding="latin-1")
    for call in (Latents, encode):
        with pytest.raises(ValueError, match="index.json cannot be used"):
            call(latents_copy)


def test_an_unknown_format_is_reported(latents_copy):
    index = _read_index(latents_copy / "train/index.json")
    del index["fingerprint"]
    _write_index(latents_copy / "train/index.json", index | {"format": 7})
    with pytest.raises(ValueError, match="its format is 7, and only 1 is known"):
        Latents(latents_copy)


def test_missing_latents_are_reported(tmp_path, latents_copy):
    with pytest.raises(FileNotFoundError, match="holds no latents; run encode_latents"):
        Latents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown split"):
        Latents(latents_copy, "valid")
    (latents_copy / "validation").mkdir()
    shutil.copy(
        latents_copy / "train/index.json", latents_copy / "validation/index.json"
    )
    with pytest.raises(
        ValueError,
        match="5 shards in .*validation are damaged: shard-00000.safetensors is "
        "missing",
    ):
        Latents(latents_copy, "validation")


def test_an_open_data_set_does_not_read_replaced_shards(latents_copy):
    """The folder is encoded again while it is open: each reads its own files."""
    old = Latents(latents_copy)
    before = old.take(torch.arange(50)).signals["image"]
    shutil.rmtree(latents_copy / "train")
    new = encode(latents_copy, ImageSet(-DATA.images, DATA.labels, DATA.names))
    torch.testing.assert_close(
        new.take(torch.arange(50)).signals["image"], -before, atol=1e-5, rtol=0
    )
    assert torch.equal(old.take(torch.arange(50)).signals["image"], before)


def test_the_files_contain_what_their_index_records(latents_folder):
    assert sorted(contents(latents_folder / "train")) == [
        "index.json",
        *(f"shard-{i:05d}.safetensors" for i in range(5)),
    ]
    with safe_open(latents_folder / "train/shard-00004.safetensors", "pt") as file:
        assert sorted(file.keys()) == [
            "captions",
            "captions.begins",
            "labels",
            "signals.image",
        ]
        torch.testing.assert_close(
            file.get_tensor("signals.image"), Haar().encode(DATA.images[40:])
        )
    index = json.loads((latents_folder / "train/index.json").read_text())
    assert index["data"] == DATA.fingerprint
    assert index["autoencoders"] == {"image": Haar.fingerprint}
    assert [record["count"] for record in index["shards"]] == [10] * 5
    assert index["signals"] == {"image": [1, 8, 8]}


# half precision, mirrored samples, several processes and the command line


@pytest.mark.parametrize("dtype, step", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_rounds_the_latents(latents_folder, tmp_path, dtype, step):
    # the latents of digits themselves are exact in half precision
    coder = CountingHaar(change=lambda z: z / 3)
    latents = encode(tmp_path / "half", coder=coder, dtype=dtype)
    raw = load_file(tmp_path / "half/train/shard-00000.safetensors")["signals.image"]
    assert raw.dtype == getattr(torch, dtype)
    values = latents.take(torch.arange(50)).signals["image"]
    exact = Latents(latents_folder).take(torch.arange(50)).signals["image"]
    assert values.dtype == torch.float32
    assert not torch.equal(values, exact)
    torch.testing.assert_close(values, exact, rtol=4 * step, atol=8 * step)
    # the mean is that of the rounded values
    assert values.double().mean((0, 2, 3)).abs().max() < 1e-6
    with pytest.raises(ValueError, match=f"dtype: {dtype} there, float32 requested"):
        encode(tmp_path / "half")
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        encode(tmp_path, dtype="float8")


def test_values_beyond_half_precision_are_refused(tmp_path):
    loud = CountingHaar(change=lambda z: z * 1e6)
    with pytest.raises(
        ValueError, match="beyond the range of float16, in samples 0 to"
    ):
        encode(tmp_path, coder=loud, dtype="float16")
    assert encode(tmp_path, coder=loud, dtype="bfloat16")


def test_an_index_without_a_dtype_still_opens_and_resumes(latents_folder, latents_copy):
    assert "dtype" not in json.loads((latents_copy / "train/index.json").read_text())
    (latents_copy / "train/shard-00002.safetensors").unlink()
    encode(latents_copy)
    assert contents(latents_copy / "train") == contents(latents_folder / "train")


def test_mirrored_samples_follow_the_others(tmp_path):
    mirrored = Mirrored(DATA)
    latents = encode(tmp_path, mirrored)
    assert len(latents) == 100
    assert latents.labels[50:].equal(latents.labels[:50])
    images = latents.take(torch.tensor([3, 53, 49, 99]))
    decoded = Latents(tmp_path, autoencoder=Haar()).decode(images.signals)["image"]
    torch.testing.assert_close(decoded[::2], DATA.images[[3, 49]], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded[1::2], decoded[::2].flip(-1))
    with pytest.raises(ValueError, match="data: .* there, .* requested"):
        encode(tmp_path, DATA)
    scenes = Mirrored(Scenes("train", 4))
    assert (
        scenes.take(torch.tensor([5]))
        .signals["audio"]
        .equal(scenes.take(torch.tensor([1])).signals["audio"])
    )
    with pytest.raises(ValueError, match="only images and videos can be mirrored"):
        Mirrored(SimpleNamespace(shapes={"audio": (6,)}))


def test_the_command_resumes_with_several_processes_and_trains(
    latents_folder, tmp_path, capsys
):
    command = ["encode", "digits", str(tmp_path / "z"), "--autoencoder", "haar"]
    command += ["--shard-size", "400", "--device", "cpu", "--splits", "train"]
    cli.main([*command, "--processes", "2"])
    with pytest.raises(SystemExit):
        cli.main([*command, "--flips"])
    printed = capsys.readouterr()
    assert "train: 1,078 samples as latents (image 4 x 4 x 4)" in printed.out
    assert "holds latents of something else" in printed.err
    expected = contents(tmp_path / "z/train")
    by_one_process = encode(tmp_path / "alone", digits(), batch=32, shard_size=400)
    assert expected == contents(tmp_path / "alone/train")
    assert len(by_one_process) == 1078
    # a lost shard, as after a kill: the same command writes the same files
    (tmp_path / "z/train/shard-00001.safetensors").unlink()
    cli.main([*command, "--splits", "train", "validation"])
    assert contents(tmp_path / "z/train") == expected
    data = DataConfig("latents", path=str(tmp_path / "z"))
    run = train(
        Config(
            data=data,
            model=ModelConfig(width=32, depth=4, heads=2),
            training=TrainConfig(steps=1, batch=4),
        ),
        tmp_path / "runs",
    )
    # sampled latents are decoded to images
    file = str(tmp_path / "samples.npz")
    options = ["--npz", file, "--n", "2", "--steps", "1", "--device", "cpu"]
    with pytest.raises(SystemExit):
        cli.main(["sample", str(run.path), *options])
    assert "--autoencoder FOLDER" in capsys.readouterr().err
    cli.main(["sample", str(run.path), *options, "--autoencoder", "haar"])
    with np.load(file) as samples:
        assert samples["arr_0"].shape == (2, 8, 8, 3)
