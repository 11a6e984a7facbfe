"""Streams: an order that needs no state, hostile shards, and the way to a run."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from unittest.mock import patch

import numpy as np
import pyarrow
import pytest
import torch
from conftest import assert_same
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from scipy.io import wavfile

from selfflow.cli import main
from selfflow.data import streams
from selfflow.data.datasets import SPLITS, View
from selfflow.data.lanes import Lanes
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources, load
from selfflow.data.streams import Fault, Row, Stream, expand_braces, tar_rows
from selfflow.data.tables import TableStream, open_stream
from selfflow.method.options import ModelConfig
from selfflow.report.look import look
from selfflow.training.batches import Batches
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train


def png(grey, side=6):
    written = io.BytesIO()
    Image.new("L", (side, side), grey).save(written, format="PNG")
    return written.getvalue()


def tar(members, **fields):
    "A tar file; a member whose content is a TarInfo is added as it is."
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", **fields) as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def shard(path, first, count=20, classes=True):
    members = []
    for i in range(first, first + count):
        members.append((f"{i:04d}.png", png(i)))
        if classes:
            members.append((f"{i:04d}.cls", str(i % 3).encode()))
            members.append((f"{i:04d}.txt", f"number {i}".encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(members))


@pytest.fixture
def place(tmp_path):
    "Six shards of 20 pictures; their greys count from 0 to 119."
    for number in range(6):
        shard(tmp_path / "shards" / f"{number:03d}.tar", 20 * number)
    (tmp_path / "shards" / "classes.txt").write_text("red\ngreen\nblue\n")
    return tmp_path / "shards"


def settings(place, **options):
    return DataConfig(
        "stream", path=str(place), height=4, width=4, channels=1, buffer=8, **options
    )


def greys(signal):
    return ((signal[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def seen(place, steps, rank=0, processes=1, workers=0, seed=0, **options):
    "Greys of the batches of some steps."
    config = Config(
        data=settings(place, **options),
        training=TrainConfig(steps=max(steps) + 1, batch=12, shards=4),
        seed=seed,
    )
    batches = Batches(Sources(config.data), config, rank, processes)
    layout = batches.sources.layouts["stream"]
    loader = (
        batches.loader(steps[0], workers)
        if workers
        else map(batches.__getitem__, steps)
    )
    return [greys(layout.unpatchify(batch.x0)["image"]) for batch in loader]


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_every_lane_goes_through_its_shards_once_an_epoch(sizes, lanes, window, seed):
    order = Lanes(len(sizes), sizes.__getitem__, lanes, window)
    found = [order.find(seed, place) for place in range(3 * sum(sizes))]
    for lane in range(order.lanes):
        own = found[lane :: order.lanes]
        assert [f.epoch for f in own] == sorted(f.epoch for f in own)
        last = own[-1].epoch
        for epoch in {f.epoch for f in own} - {last}:
            rows = [(f.shard, f.row) for f in own if f.epoch == epoch]
            shards = {shard for shard, _ in rows}
            expected = {(s, row) for s in shards for row in range(sizes[s])}
            assert len(rows) == len(expected) and {*rows} == expected
    epochs = min(found[lane - order.lanes :][0].epoch for lane in range(order.lanes))
    for epoch in range(epochs):  # those that all lanes have left
        rows = [(f.shard, f.row) for f in found if f.epoch == epoch]
        assert len(rows) == len({*rows}) == sum(sizes)


@given(st.integers(1, 4), st.integers(1, 9), st.lists(st.integers(0, 400), min_size=1))
def test_a_place_needs_nothing_from_before(lanes, window, places):
    sizes = [7, 0, 12, 3, 9]
    order = Lanes(5, sizes.__getitem__, lanes, window)
    straight = [order.find(3, place) for place in range(401)]
    fresh = Lanes(5, sizes.__getitem__, lanes, window)
    assert [fresh.find(3, place) for place in places] == [straight[p] for p in places]


def test_only_shards_that_are_reached_are_counted():
    counted = []
    order = Lanes(1_000, lambda shard: counted.append(shard) or 500, 4, 100)
    for place in range(64):
        order.find(0, place)
    assert len({*counted}) == 4


def test_windows_mix_and_epochs_differ():
    order = Lanes(4, lambda shard: 50, 2, 25)
    found = [order.find(0, place) for place in range(400)]
    first = [(f.shard, f.row) for f in found[:200]]
    assert first != sorted(first) and {*first} == {
        (f.shard, f.row) for f in found[200:]
    }
    assert first != [(f.shard, f.row) for f in found[200:]]
    assert first != [tuple(order.find(1, place)[1:]) for place in range(200)]


def test_batches_are_the_same_for_any_workers_and_processes(place):
    steps = range(12)
    alone = seen(place, steps)
    assert len({*alone[0]}) == 12 and alone[0] != alone[1]
    assert seen(place, steps, workers=2) == alone
    halves = [seen(place, steps, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone
    assert seen(place, steps, seed=1) != alone
    for first in (1, 7, 11):  # in the first epoch and in the second
        assert seen(place, range(first, 12)) == alone[first:]
        assert seen(place, range(first, 12), workers=2) == alone[first:]


def test_a_process_reads_its_own_lanes(place):
    data = Stream(place, lanes=4, size=4)
    for step in range(5):
        for rank, places in enumerate(data.places(step, 8).chunk(2)):
            assert {int(p) % 4 // 2 for p in places} == {rank}


def test_training_resumes_exactly(place, tmp_path):
    config = Config(
        name="whole",
        data=settings(place, patch=2, flip=True),
        model=ModelConfig(width=16, depth=2, heads=2),
        training=TrainConfig(
            steps=6, batch=8, validate_every=6, validation=8, save_every=3
        ),
    )
    whole = train(config, tmp_path, bar=False)
    halved = replace(config, name="halved")

    class Stop:
        def on_step(self, moment):
            if moment.step == 3:
                moment.run.request("stop")

    stopped = train(halved, tmp_path, bar=False, callbacks=[Stop()])
    assert stopped.state()["step"] < 6
    resumed = train(halved, tmp_path, workers=1, bar=False)
    assert_same(whole, resumed)


def test_classes_captions_and_splits(place):
    data = {split: Stream(place, size=4, channels=1, split=split) for split in SPLITS}
    numbers = {
        s: greys(d.take(torch.arange(len(d))).signals["image"]) for s, d in data.items()
    }
    assert sorted(sum(numbers.values(), [])) == list(range(120))
    train = data["train"]
    assert train.names == ("red", "green", "blue") and train.complete
    taken = train.take(torch.arange(len(train)))
    assert taken.labels.tolist() == [n % 3 for n in numbers["train"]]
    assert taken.captions == tuple(f"number {n}" for n in numbers["train"])
    assert torch.equal(train.labels, taken.labels)
    # training sees the training split alone
    places = torch.arange(400)
    trained = greys(train.take(places, View(0, places)).signals["image"])
    assert {*trained} == {*numbers["train"]}


def test_folders_of_splits_count_and_missing_ones_are_filled(tmp_path):
    shard(tmp_path / "train/0.tar", 0, 60)
    shard(tmp_path / "val/0.tar", 100, 5)
    data = {
        split: Stream(tmp_path, size=4, channels=1, split=split) for split in SPLITS
    }
    numbers = {
        s: greys(d.take(torch.arange(len(d))).signals["image"]) for s, d in data.items()
    }
    assert sorted(numbers["validation"]) == list(range(100, 105))
    assert numbers["test"] and sorted(numbers["train"] + numbers["test"]) == list(
        range(60)
    )


def test_known_samples_are_few_and_from_many_shards(place):
    data = Stream(place, size=4, channels=1, known=12)
    assert len(data) == 12 and not data.complete
    assert len({shard for shard, _ in data.entries}) == 6
    everything = Stream(place, size=4, channels=1, known=0)
    assert everything.complete and len(everything) > 80


def test_names_of_classes(place, capsys):
    (place / "classes.txt").unlink()
    assert Stream(place, size=4).names == ("",)
    assert "data.classes" in capsys.readouterr().out
    assert Stream(place, size=4, classes=("3",)).names == ("0", "1", "2")
    with pytest.raises(ValueError, match="has the name of another"):
        Stream(place, size=4, classes=("a", "a"))
    # 2 is not a class: those samples are replaced
    data = Stream(place, size=4, channels=1, classes=("a", "b"))
    taken = data.take(torch.arange(len(data)))
    assert {*taken.labels.tolist()} == {0, 1} and {*data.labels.tolist()} == {-1, 0, 1}
    assert "has no class" in capsys.readouterr().out


def test_json_gives_label_and_caption(tmp_path):
    members = [("a.png", png(1)), ("a.json", b'{"label": "x", "caption": " one "}')]
    members += [("b.png", png(2)), ("b.json", b'{"class": 1, "text": "two"}')]
    members += [("c.png", png(3)), ("c.json", b"[" * 100_000)]
    (tmp_path / "0.tar").write_bytes(tar(members))
    data = Stream(tmp_path, size=4, classes=("x", "y"), shares=(1, 0, 0))
    taken = data.take(torch.arange(2))
    assert taken.labels.tolist() == [0, 1] and taken.captions == ("one", "two")
    data.take(torch.arange(3))
    assert "has a text that cannot be read" in data.broken["0.tar/c"]


def special(name, kind, **fields):
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return name, member


def test_hostile_members_are_left_out(tmp_path, capsys):
    bomb = b"cos\nsystem\n(S'exit'\ntR."
    members = [
        ("good.png", png(1)),
        ("/etc/absolute.png", png(2)),
        ("../above.png", png(3)),
        ("a/../../above.png", png(4)),
        special("link.png", tarfile.SYMTYPE, linkname="/etc/passwd"),
        special("hard.png", tarfile.LNKTYPE, linkname="good.png"),
        special("pipe.png", tarfile.FIFOTYPE),
        special("device.png", tarfile.CHRTYPE),
        special("folder", tarfile.DIRTYPE),
        ("both.png", png(5)),
        ("both.pyd", bomb),
        ("both.pickle", bomb),
        ("both.mask.pth", bomb),
        ("only.pkl", bomb),
        ("empty.png", b""),
        ("words.txt", b"no picture"),
        ("last.png", png(6)),
    ]
    (tmp_path / "0.tar").write_bytes(tar(members))
    data = Stream(tmp_path, size=4, channels=1, shares=(1, 0, 0))
    counts = {reason: len(names) for reason, names in data.skipped.items()}
    assert counts == {
        "leads out of the shard": 3,
        "is no regular file": 4,
        "is pickled, and never opened": 4,
        "has no image": 1,
    }
    told = capsys.readouterr().out
    assert all(f"{reason} ({count})" in told for reason, count in counts.items())
    assert len(data) == 4  # the empty picture is found when it is decoded
    places = torch.arange(40)
    trained = greys(data.take(places, View(0, places)).signals["image"])
    assert {*trained} == {1, 5, 6} and len(data.broken) == 1


def test_a_shard_that_ends_early_is_used_up_to_there(place, capsys):
    content = (place / "003.tar").read_bytes()
    (place / "003.tar").write_bytes(content[: len(content) // 2])
    (place / "004.tar").write_bytes(b"this is no archive" * 100)
    (place / "005.tar").write_bytes(b"")
    data = Stream(place, size=4, channels=1, shares=(1, 0, 0))
    assert 60 < len(data) < 80
    assert data.skipped == {
        "ends early or is damaged": ["003.tar"],
        "is not a tar file": ["004.tar", "005.tar"],
    }
    told = capsys.readouterr().out
    assert "is not a tar file (2): '004.tar', '005.tar'" in told
    places = torch.arange(200)
    assert len(data.take(places, View(0, places))) == 200


@pytest.mark.parametrize("at", range(0, 3 * 512, 77))
def test_a_damaged_byte_raises_nothing(at):
    content = bytearray(tar([("a.png", png(1)), ("b.png", png(2))]))
    content[at] ^= 0xFF
    rows = [*tar_rows(io.BytesIO(bytes(content)))]
    assert all(isinstance(row, Row | Fault) for row in rows)


def test_long_names_and_other_formats_are_read():
    name = "x" * 200 + "/" + "y" * 150
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        content = tar([(f"{name}.PNG", png(1))], format=form)
        (row,) = tar_rows(io.BytesIO(content))
        offset, size = row.members["png"]
        assert row.key == name and content[offset : offset + size] == png(1)


def test_a_broken_picture_is_replaced_in_the_same_way_everywhere(place):
    content = (place / "002.tar").read_bytes()
    (place / "002.tar").write_bytes(content.replace(png(45), bytes(len(png(45)))))
    alone = seen(place, range(8))
    assert all(45 not in batch for batch in alone)
    assert [seen(place, [step])[0] for step in range(8)] == alone
    assert seen(place, range(8), workers=2) == alone


def test_what_was_counted_before_is_not_read_again(place, monkeypatch, tmp_path):
    monkeypatch.setattr("selfflow.data.files.user_cache_path", lambda name: tmp_path)
    for path in place.glob("*.tar"):
        os.utime(path, (0, 0))
    later = patch("time.time", return_value=time.time() + 60)
    monkeypatch.setattr(streams, "_WORTH", 1)
    with later:
        expected = seen(place, [500])
        assert [*tmp_path.glob("facts/*.json")]
        data = Stream(place, size=4, channels=1, known=1)
        listed = []
        walk = Stream._walk
        monkeypatch.setattr(
            Stream, "_walk", lambda self, n: listed.append(n) or walk(self, n)
        )
        data.order.find(0, 6_000)
        assert not listed
        # a shard that has changed is counted again
        shard(place / "000.tar", 0, 30)
        assert seen(place, [500]) != expected and listed


def test_the_count_of_a_damaged_shard_is_not_kept(place, monkeypatch, tmp_path):
    monkeypatch.setattr("selfflow.data.files.user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(streams, "_WORTH", 1)
    whole = (place / "000.tar").read_bytes()
    (place / "000.tar").write_bytes(whole[: len(whole) // 2])
    for path in place.glob("*.tar"):
        os.utime(path, (0, 0))
    with patch("time.time", return_value=time.time() + 60):
        data = Stream(place, size=4, channels=1)
        assert all(data._count(number) for number in range(6))
    (kept,) = tmp_path.glob("facts/*.json")
    facts = json.loads(kept.read_text())
    assert facts.pop(str(place / "000.tar"))[1] == {}
    assert all(own for _, own in facts.values())


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
def test_a_compressed_shard_is_refused_with_a_remedy(name, tmp_path):
    content = tar([("a.png", png(1))])
    (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f"is compressed.*gzip -dc.*{name}"):
        Stream(tmp_path)
    (tmp_path / "1.tar").write_bytes(content)
    assert len(Stream(tmp_path, shares=(1, 0, 0))) == 1


def test_shards_that_vanish_end_in_one_line(place):
    data = Stream(place, size=4)
    for path in place.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="6 shards has a sample; are they still"):
        data.take(torch.arange(4), View(0, torch.arange(4)))


def test_patterns(place):
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    with pytest.raises(ValueError, match="stands for no shard"):
        expand_braces("{3..1}.tar")
    for bomb in ("{0..99999999999}", "{0..99999}" * 6):
        with pytest.raises(ValueError, match="more than 100,000"):
            expand_braces(bomb)
    data = load("stream", path=str(place / "{000..002}.tar"), height=4, width=4)
    assert len(data.shards) == 3 and data.names == ("red", "green", "blue")
    data = load("stream", path=str(place / "004.tar"), height=4, width=4)
    assert len(data.shards) == 1
    # shards of one name in two folders are different shards
    shard(place.parent / "more/004.tar", 0)
    pattern = str(place.parent / "{shards,more}/004.tar")
    data = load("stream", path=pattern, height=4, width=4)
    assert len({data.name_of(key) for key in data.entries}) == len(data)
    with pytest.raises(FileNotFoundError, match="selfflow relocate"):
        load("stream", path=str(place / "{7..9}.tar"))


def test_what_a_stream_cannot_do_is_said(place, tmp_path):
    with pytest.raises(ValueError, match="data.aspect"):
        settings(place, aspect=2)
    with pytest.raises(ValueError, match="data.crop"):
        settings(place, signals=("audio",), crop="all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .tar file"):
        Stream(tmp_path / "empty")


def test_a_command_runs_only_with_a_flag_on_the_command(place, tmp_path, capsys):
    command = f"touch {tmp_path}/ran; cat {place}/00{{0..5}}.tar"
    config = tmp_path / "config.json"
    options = {"name": "stream", "path": f"pipe:{command}", "height": 4, "width": 4}
    config.write_text(json.dumps({"data": options | {"channels": 1, "classes": ["3"]}}))
    output = str(tmp_path / "look.html")
    with pytest.raises(SystemExit):
        main(["look", "--config", str(config), "--output", output])
    assert "--allow-pipe" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    arguments = ["look", "--config", str(config), "--output", output, "--allow-pipe"]
    program = "import sys; from selfflow.cli import main; main(sys.argv[1:])"
    environment = {k: v for k, v in os.environ.items() if k != "SELFFLOW_PIPES_ALLOWED"}
    subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, check=True
    )
    assert (tmp_path / "ran").exists() and (tmp_path / "look.html").exists()


def test_commands_give_what_files_give(place, monkeypatch, capfd):
    monkeypatch.setenv("SELFFLOW_PIPES_ALLOWED", "1")
    monkeypatch.setattr(streams, "_SPOOLED", 2)
    pattern = f"pipe:cat {place}/00{{0..5}}.tar"
    piped = seen(pattern, range(8), classes=("3",), known=0)
    assert sorted({*sum(piped, [])}) and piped == seen(pattern, range(8), workers=2)
    failing = Stream(f"pipe:head -c 9000 {place}/000.tar; exit 3", size=4, known=0)
    assert 0 < len(failing) < 20
    told = capfd.readouterr().out
    assert "status 3" in told and "ends early or is damaged" in told


def test_a_page_shows_what_a_stream_gives(place):
    config = Config(data=settings(place, patch=2), training=TrainConfig(batch=8))
    page = look(config, 16).html()
    first = seen(place, [0])[0]
    assert "6 shards" in page or "stream" in page
    assert any(f"{n // 20:03d}.tar/{n:04d}" in page for n in first)


def test_a_stream_is_encoded_whole(place, tmp_path, capsys):
    arguments = [str(place), str(tmp_path / "latents"), "--autoencoder", "haar"]
    size = ["--data.height", "8", "--data.width", "8", "--data.known", "5"]
    main(["encode", *arguments, *size, "--splits", "train", "--device", "cpu"])
    count = len(Stream(place, known=0))
    assert f"train: {count} samples as latents" in capsys.readouterr().out


def test_a_stream_can_be_sent_to_another_process(place):
    data = Stream(place, size=4, channels=1)
    places = torch.arange(30)
    expected = data.take(places, View(0, places)).signals["image"]
    sent = ForkingPickler.loads(ForkingPickler.dumps(data))
    assert torch.equal(sent.take(places, View(0, places)).signals["image"], expected)


def test_audio_and_pairs(tmp_path):
    def wav(value, count):
        written = io.BytesIO()
        wavfile.write(written, 8_000, np.full(count, value, np.float32))
        return written.getvalue()

    members = [
        ("a.wav", wav(0.1, 9_000)),
        ("b.wav", wav(0.2, 100)),
        ("c.wav", wav(0, 0)),
    ]
    (tmp_path / "0.tar").write_bytes(tar(members))
    data = Stream(tmp_path, ("audio",), shares=(1, 0, 0), samples=1_024, crop="centre")
    places = torch.arange(12)
    waves = data.take(places, View(0, places)).signals["audio"]
    assert waves.shape == (12, 1_024) and len(data.broken) == 1
    (fault,) = data.broken.values()
    assert "its length is zero" in fault


def table(first, count=20):
    "Rows with a picture, its class and a caption, as the package datasets stores them."
    images = [{"bytes": png(i), "path": None} for i in range(first, first + count)]
    labels = [i % 3 for i in range(first, first + count)]
    columns = {"image": images, "label": labels, "text": [f"n {n}" for n in labels]}
    features = {"label": {"names": ["red", "green", "blue"], "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    return pyarrow.table(columns).replace_schema_metadata({"huggingface": about})


@pytest.fixture(params=["parquet", "arrow"])
def tables(request, tmp_path):
    "Six files of 20 pictures; their greys count from 0 to 119."
    (tmp_path / "tables").mkdir()
    for number in range(6):
        path = tmp_path / f"tables/{number:03d}.{request.param}"
        rows = table(20 * number)
        if request.param == "parquet":
            parquet.write_table(rows, path, row_group_size=7)
            continue
        with pyarrow.ipc.new_stream(path, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=7)
    (tmp_path / "tables/cache-0.arrow").write_bytes(b"of the package datasets")
    return tmp_path / "tables"


def test_tables_stream_like_shards(tables):
    alone = seen(tables, range(12))
    assert seen(tables, range(12), workers=2) == alone
    halves = [seen(tables, range(12), rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone
    assert seen(tables, range(7, 12)) == alone[7:]
    data = open_stream(settings(tables), "train")
    taken = data.take(torch.arange(len(data)))
    assert data.names == ("red", "green", "blue") and not data.skipped
    assert taken.labels.tolist() == [n % 3 for n in greys(taken.signals["image"])]
    assert taken.captions == tuple(f"n {n}" for n in taken.labels.tolist())
    assert torch.equal(data.labels, taken.labels)
    assert {*sum(alone, [])} == {*greys(taken.signals["image"])}


def test_broken_tables_and_rows_are_skipped(tables):
    last = sorted(tables.glob("00*"))[-1]
    last.write_bytes(last.read_bytes()[:-600])
    rows = table(0, 6).set_column(1, "label", [[0, 1, 2, 7, None, 0]])
    images = rows["image"].to_pylist()
    images[0], images[1]["bytes"] = None, b"no picture"
    images[5] = {"bytes": None, "path": "../above.png"}
    rows = rows.set_column(0, "image", [images])
    parquet.write_table(rows, tables / "100.parquet")
    parquet.write_table(rows.drop_columns("image"), tables / "101.parquet")
    data = TableStream(tables, size=4, channels=1, shares=(1, 0, 0))
    faults = {reason for reason, names in data.skipped.items() if names == [last.name]}
    assert len(faults) == 1 and data.skipped["has no column image"] == ["101.parquet"]
    places = torch.arange(300)
    sent = ForkingPickler.loads(ForkingPickler.dumps(data))
    trained = greys(sent.take(places, View(0, places)).signals["image"])
    reasons = [v for k, v in sent.broken.items() if k.startswith("100.parquet")]
    assert len(reasons) == 5 and {*range(20, 100)} <= {*trained}
