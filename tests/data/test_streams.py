"""Streams read the samples of tar shards in an order that needs no state.

Damaged and hostile shards do no harm, and training on a stream resumes exactly.
"""

import gzip
import io
import json
import os
import tarfile
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from unittest.mock import patch

import numpy as np
import programs
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
from selfflow.options import looked_at
from selfflow.report.look import look
from selfflow.training.batches import Batches
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train


def png(grey, side=6):
    written = io.BytesIO()
    Image.new("L", (side, side), grey).save(written, format="PNG")
    return written.getvalue()


def tar_file(members, **fields):
    "Return a tar file; a member whose content is a TarInfo is added unchanged."
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


def write_shard(path, first, count=20, classes=True):
    members = []
    for i in range(first, first + count):
        members.append((f"{i:04d}.png", png(i)))
        if classes:
            members.append((f"{i:04d}.cls", str(i % 3).encode()))
            members.append((f"{i:04d}.txt", f"number {i}".encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_file(members))


@pytest.fixture
def shard_folder(tmp_path):
    "Six shards of 20 images each, whose greys run from 0 to 119."
    for number in range(6):
        write_shard(tmp_path / "shards" / f"{number:03d}.tar", 20 * number)
    (tmp_path / "shards" / "classes.txt").write_text("red\ngreen\nblue\n")
    return tmp_path / "shards"


def settings(shard_folder, **options):
    return DataConfig(
        "stream",
        path=str(shard_folder),
        height=4,
        width=4,
        channels=1,
        buffer=8,
        **options,
    )


def greys(signal):
    return ((signal[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def greys_of_steps(
    shard_folder, steps, rank=0, processes=1, workers=0, seed=0, **options
):
    "Return the greys of the batches of some steps."
    config = Config(
        data=settings(shard_folder, **options),
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
def test_every_lane_reads_its_shards_once_an_epoch(sizes, lanes, window, seed):
    order = Lanes(len(sizes), sizes.__getitem__, lanes, window)
    samples = [order.find(seed, place) for place in range(3 * sum(sizes))]
    for lane in range(order.lanes):
        of_lane = samples[lane :: order.lanes]
        assert [sample.epoch for sample in of_lane] == sorted(
            sample.epoch for sample in of_lane
        )
        last = of_lane[-1].epoch
        for epoch in {sample.epoch for sample in of_lane} - {last}:
            rows = [
                (sample.shard, sample.row)
                for sample in of_lane
                if sample.epoch == epoch
            ]
            shards = {write_shard for write_shard, _ in rows}
            expected = {(s, row) for s in shards for row in range(sizes[s])}
            assert len(rows) == len(expected)
            assert {*rows} == expected
    epochs = min(samples[lane - order.lanes :][0].epoch for lane in range(order.lanes))
    for epoch in range(epochs):  # those that all lanes have finished
        rows = [
            (sample.shard, sample.row) for sample in samples if sample.epoch == epoch
        ]
        assert len(rows) == len({*rows}) == sum(sizes)


@given(st.integers(1, 4), st.integers(1, 9), st.lists(st.integers(0, 400), min_size=1))
def test_a_sample_is_determined_by_its_place_alone(lanes, window, places):
    sizes = [7, 0, 12, 3, 9]
    order = Lanes(5, sizes.__getitem__, lanes, window)
    in_order = [order.find(3, place) for place in range(401)]
    fresh = Lanes(5, sizes.__getitem__, lanes, window)
    assert [fresh.find(3, place) for place in places] == [in_order[p] for p in places]


def test_only_shards_that_are_read_are_counted():
    counted = []
    order = Lanes(1_000, lambda write_shard: counted.append(write_shard) or 500, 4, 100)
    for place in range(64):
        order.find(0, place)
    assert len({*counted}) == 4


def test_rows_are_shuffled_and_epochs_differ():
    order = Lanes(4, lambda write_shard: 50, 2, 25)
    samples = [order.find(0, place) for place in range(400)]
    first = [(sample.shard, sample.row) for sample in samples[:200]]
    assert first != sorted(first)
    assert {*first} == {(sample.shard, sample.row) for sample in samples[200:]}
    assert first != [(sample.shard, sample.row) for sample in samples[200:]]
    assert first != [tuple(order.find(1, place)[1:]) for place in range(200)]


def test_batches_are_the_same_for_any_workers_and_processes(shard_folder):
    steps = range(12)
    expected = greys_of_steps(shard_folder, steps)
    assert len({*expected[0]}) == 12
    assert expected[0] != expected[1]
    assert greys_of_steps(shard_folder, steps, workers=2) == expected
    halves = [greys_of_steps(shard_folder, steps, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == expected
    assert greys_of_steps(shard_folder, steps, seed=1) != expected
    for first in (1, 7, 11):  # in the first and in the second epoch
        assert greys_of_steps(shard_folder, range(first, 12)) == expected[first:]
        assert (
            greys_of_steps(shard_folder, range(first, 12), workers=2)
            == expected[first:]
        )


def test_a_process_reads_its_own_lanes(shard_folder):
    data = Stream(shard_folder, lanes=4, size=4)
    for step in range(5):
        for rank, places in enumerate(data.places(step, 8).chunk(2)):
            assert {int(p) % 4 // 2 for p in places} == {rank}


def test_training_resumes_exactly(shard_folder, tmp_path):
    config = Config(
        name="uninterrupted",
        data=settings(shard_folder, patch=2, flip=True),
        model=ModelConfig(width=16, depth=2, heads=2),
        training=TrainConfig(
            steps=6, batch=8, validate_every=6, validation=8, save_every=3
        ),
    )
    expected = train(config, tmp_path, bar=False)
    interrupted = replace(config, name="interrupted")

    class Stop:
        def on_step(self, moment):
            if moment.step == 3:
                moment.run.request("stop")

    stopped = train(interrupted, tmp_path, bar=False, callbacks=[Stop()])
    assert stopped.state()["step"] < 6
    resumed = train(interrupted, tmp_path, workers=1, bar=False)
    assert_same(expected, resumed)


def test_classes_captions_and_splits_are_read(shard_folder):
    data = {
        split: Stream(shard_folder, size=4, channels=1, split=split) for split in SPLITS
    }
    numbers = {
        s: greys(d.take(torch.arange(len(d))).signals["image"]) for s, d in data.items()
    }
    assert sorted(sum(numbers.values(), [])) == list(range(120))
    train = data["train"]
    assert train.names == ("red", "green", "blue")
    assert train.complete
    taken = train.take(torch.arange(len(train)))
    assert taken.labels.tolist() == [n % 3 for n in numbers["train"]]
    assert taken.captions == tuple(f"number {n}" for n in numbers["train"])
    assert torch.equal(train.labels, taken.labels)
    # training reads only the training split
    places = torch.arange(400)
    trained = greys(train.take(places, View(0, places)).signals["image"])
    assert {*trained} == {*numbers["train"]}


def test_folders_are_splits_and_missing_ones_are_filled(tmp_path):
    write_shard(tmp_path / "train/0.tar", 0, 60)
    write_shard(tmp_path / "val/0.tar", 100, 5)
    data = {
        split: Stream(tmp_path, size=4, channels=1, split=split) for split in SPLITS
    }
    numbers = {
        s: greys(d.take(torch.arange(len(d))).signals["image"]) for s, d in data.items()
    }
    assert sorted(numbers["validation"]) == list(range(100, 105))
    assert numbers["test"]
    assert sorted(numbers["train"] + numbers["test"]) == list(range(60))


def test_known_samples_are_few_and_from_many_shards(shard_folder):
    data = Stream(shard_folder, size=4, channels=1, known=12)
    assert len(data) == 12
    assert not data.complete
    assert len({write_shard for write_shard, _ in data.entries}) == 6
    everything = Stream(shard_folder, size=4, channels=1, known=0)
    assert everything.complete
    assert len(everything) > 80


def test_class_names_are_read_or_given(shard_folder, capsys):
    (shard_folder / "classes.txt").unlink()
    assert Stream(shard_folder, size=4).names == ("",)
    assert "data.classes" in capsys.readouterr().out
    assert Stream(shard_folder, size=4, classes=("3",)).names == ("0", "1", "2")
    with pytest.raises(ValueError, match="has the name of another"):
        Stream(shard_folder, size=4, classes=("a", "a"))
    # 2 is not a class: its samples are replaced
    data = Stream(shard_folder, size=4, channels=1, classes=("a", "b"))
    taken = data.take(torch.arange(len(data)))
    assert {*taken.labels.tolist()} == {0, 1}
    assert {*data.labels.tolist()} == {-1, 0, 1}
    assert "has no class" in capsys.readouterr().out


def test_labels_and_captions_are_read_from_json(tmp_path):
    members = [("a.png", png(1)), ("a.json", b'{"label": "x", "caption": " one "}')]
    members += [("b.png", png(2)), ("b.json", b'{"class": 1, "text": "two"}')]
    members += [("c.png", png(3)), ("c.json", b"[" * 100_000)]
    (tmp_path / "0.tar").write_bytes(tar_file(members))
    data = Stream(tmp_path, size=4, classes=("x", "y"), shares=(1, 0, 0))
    taken = data.take(torch.arange(2))
    assert taken.labels.tolist() == [0, 1]
    assert taken.captions == ("one", "two")
    data.take(torch.arange(3))
    assert "has a text that cannot be read" in data.broken["0.tar/c"]


def special(name, kind, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return name, info


def test_hostile_members_are_skipped(tmp_path, capsys):
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
        ("words.txt", b"no image"),
        ("last.png", png(6)),
    ]
    (tmp_path / "0.tar").write_bytes(tar_file(members))
    data = Stream(tmp_path, size=4, channels=1, shares=(1, 0, 0))
    counts = {reason: len(names) for reason, names in data.skipped.items()}
    assert counts == {
        "leads out of the shard": 3,
        "is no regular file": 4,
        "is pickled, and never opened": 4,
        "has no image": 1,
    }
    printed = capsys.readouterr().out
    for reason, count in counts.items():
        assert f"{reason} ({count})" in printed
    assert len(data) == 4  # the empty image is only noticed when it is decoded
    places = torch.arange(40)
    trained = greys(data.take(places, View(0, places)).signals["image"])
    assert {*trained} == {1, 5, 6}
    assert len(data.broken) == 1


def test_a_truncated_shard_is_used_up_to_its_end(shard_folder, capsys):
    content = (shard_folder / "003.tar").read_bytes()
    (shard_folder / "003.tar").write_bytes(content[: len(content) // 2])
    (shard_folder / "004.tar").write_bytes(b"this is no archive" * 100)
    (shard_folder / "005.tar").write_bytes(b"")
    data = Stream(shard_folder, size=4, channels=1, shares=(1, 0, 0))
    assert 60 < len(data) < 80
    assert data.skipped == {
        "ends early or is damaged": ["003.tar"],
        "is not a tar file": ["004.tar", "005.tar"],
    }
    printed = capsys.readouterr().out
    assert "is not a tar file (2): '004.tar', '005.tar'" in printed
    places = torch.arange(200)
    assert len(data.take(places, View(0, places))) == 200


@pytest.mark.parametrize("at", range(0, 3 * 512, 77))
def test_a_damaged_byte_raises_nothing(at):
    content = bytearray(tar_file([("a.png", png(1)), ("b.png", png(2))]))
    content[at] ^= 0xFF
    rows = [*tar_rows(io.BytesIO(bytes(content)))]
    assert all(isinstance(row, Row | Fault) for row in rows)


def test_long_names_and_other_formats_are_read():
    name = "x" * 200 + "/" + "y" * 150
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        content = tar_file([(f"{name}.PNG", png(1))], format=form)
        (row,) = tar_rows(io.BytesIO(content))
        offset, size = row.members["png"]
        assert row.key == name
        assert content[offset : offset + size] == png(1)


def test_a_damaged_image_is_replaced_by_the_same_sample_everywhere(shard_folder):
    content = (shard_folder / "002.tar").read_bytes()
    (shard_folder / "002.tar").write_bytes(
        content.replace(png(45), bytes(len(png(45))))
    )
    expected = greys_of_steps(shard_folder, range(8))
    assert all(45 not in batch for batch in expected)
    assert [greys_of_steps(shard_folder, [step])[0] for step in range(8)] == expected
    assert greys_of_steps(shard_folder, range(8), workers=2) == expected


def test_counts_are_cached_until_a_shard_changes(shard_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("selfflow.data.files.user_cache_path", lambda name: tmp_path)
    for path in shard_folder.glob("*.tar"):
        os.utime(path, (0, 0))
    later = patch("time.time", return_value=time.time() + 60)
    monkeypatch.setattr(streams, "_WORTH", 1)
    with later:
        expected = greys_of_steps(shard_folder, [500])
        assert [*tmp_path.glob("facts/*.json")]
        data = Stream(shard_folder, size=4, channels=1, known=1)
        walked = []
        walk = Stream._walk
        monkeypatch.setattr(
            Stream, "_walk", lambda self, n: walked.append(n) or walk(self, n)
        )
        data.order.find(0, 6_000)
        assert not walked
        # a changed shard is counted again
        write_shard(shard_folder / "000.tar", 0, 30)
        assert greys_of_steps(shard_folder, [500]) != expected
        assert walked


def test_the_count_of_a_damaged_shard_is_not_cached(
    shard_folder, monkeypatch, tmp_path
):
    monkeypatch.setattr("selfflow.data.files.user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(streams, "_WORTH", 1)
    content = (shard_folder / "000.tar").read_bytes()
    (shard_folder / "000.tar").write_bytes(content[: len(content) // 2])
    for path in shard_folder.glob("*.tar"):
        os.utime(path, (0, 0))
    with patch("time.time", return_value=time.time() + 60):
        data = Stream(shard_folder, size=4, channels=1)
        assert all(data._count(number) for number in range(6))
    (cache_file,) = tmp_path.glob("facts/*.json")
    facts = json.loads(cache_file.read_text())
    assert facts.pop(str(shard_folder / "000.tar"))[1] == {}
    assert all(counts for _, counts in facts.values())


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
def test_a_compressed_shard_is_refused_with_a_remedy(name, tmp_path):
    content = tar_file([("a.png", png(1))])
    (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f"is compressed.*gzip -dc.*{name}"):
        Stream(tmp_path)
    (tmp_path / "1.tar").write_bytes(content)
    assert len(Stream(tmp_path, shares=(1, 0, 0))) == 1


def test_missing_shards_are_reported_in_one_line(shard_folder):
    data = Stream(shard_folder, size=4)
    for path in shard_folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="6 shards has a sample; are they still"):
        data.take(torch.arange(4), View(0, torch.arange(4)))


def test_patterns_name_several_shards(shard_folder):
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    with pytest.raises(ValueError, match="stands for no shard"):
        expand_braces("{3..1}.tar")
    for bomb in ("{0..99999999999}", "{0..99999}" * 6):
        with pytest.raises(ValueError, match="more than 100,000"):
            expand_braces(bomb)
    data = load("stream", path=str(shard_folder / "{000..002}.tar"), height=4, width=4)
    assert len(data.shards) == 3
    assert data.names == ("red", "green", "blue")
    data = load("stream", path=str(shard_folder / "004.tar"), height=4, width=4)
    assert len(data.shards) == 1
    # shards of the same name in two folders are different
    write_shard(shard_folder.parent / "more/004.tar", 0)
    pattern = str(shard_folder.parent / "{shards,more}/004.tar")
    data = load("stream", path=pattern, height=4, width=4)
    assert len({data.name_of(key) for key in data.entries}) == len(data)
    with pytest.raises(FileNotFoundError, match="selfflow relocate"):
        load("stream", path=str(shard_folder / "{7..9}.tar"))


def test_unsupported_settings_are_refused(shard_folder, tmp_path):
    with pytest.raises(ValueError, match="data.aspect"):
        settings(shard_folder, aspect=2)
    with pytest.raises(ValueError, match="data.crop"):
        settings(shard_folder, signals=("audio",), crop="all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .tar file"):
        Stream(tmp_path / "empty")


def test_a_command_runs_only_with_a_flag_on_the_command(shard_folder, tmp_path, capsys):
    command = f"touch {tmp_path}/ran; cat {shard_folder}/00{{0..5}}.tar"
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
    done = programs.run("-c", program, *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "look.html").exists()


def test_commands_give_the_same_samples_as_files(shard_folder, monkeypatch, capfd):
    monkeypatch.setenv("SELFFLOW_PIPES_ALLOWED", "1")
    monkeypatch.setattr(streams, "_SPOOLED", 2)
    pattern = f"pipe:cat {shard_folder}/00{{0..5}}.tar"
    piped = greys_of_steps(pattern, range(8), classes=("3",), known=0)
    assert sorted({*sum(piped, [])})
    assert piped == greys_of_steps(pattern, range(8), workers=2)
    failing = Stream(
        f"pipe:head -c 9000 {shard_folder}/000.tar; exit 3", size=4, known=0
    )
    assert 0 < len(failing) < 20
    printed = capfd.readouterr().out
    assert "status 3" in printed
    assert "ends early or is damaged" in printed


def test_a_page_shows_the_samples_of_a_stream(shard_folder):
    config = Config(data=settings(shard_folder, patch=2), training=TrainConfig(batch=8))
    page = look(config, 16).html()
    first = greys_of_steps(shard_folder, [0])[0]
    assert "6 shards" in page or "stream" in page
    assert any(f"{n // 20:03d}.tar/{n:04d}" in page for n in first)


def test_all_samples_of_a_stream_are_encoded(shard_folder, tmp_path, capsys):
    arguments = [str(shard_folder), str(tmp_path / "latents"), "--autoencoder", "haar"]
    size = ["--data.height", "8", "--data.width", "8", "--data.known", "5"]
    main(["encode", *arguments, *size, "--splits", "train", "--device", "cpu"])
    count = len(Stream(shard_folder, known=0))
    assert f"train: {count} samples as latents" in capsys.readouterr().out


def test_a_stream_can_be_sent_to_another_process(shard_folder):
    data = Stream(shard_folder, size=4, channels=1)
    places = torch.arange(30)
    expected = data.take(places, View(0, places)).signals["image"]
    sent = ForkingPickler.loads(ForkingPickler.dumps(data))
    assert torch.equal(sent.take(places, View(0, places)).signals["image"], expected)


def test_audio_is_read_and_empty_audio_is_refused(tmp_path):
    def wav(value, count):
        written = io.BytesIO()
        wavfile.write(written, 8_000, np.full(count, value, np.float32))
        return written.getvalue()

    members = [
        ("a.wav", wav(0.1, 9_000)),
        ("b.wav", wav(0.2, 100)),
        ("c.wav", wav(0, 0)),
    ]
    (tmp_path / "0.tar").write_bytes(tar_file(members))
    data = Stream(tmp_path, ("audio",), shares=(1, 0, 0), samples=1_024, crop="centre")
    places = torch.arange(12)
    waves = data.take(places, View(0, places)).signals["audio"]
    assert waves.shape == (12, 1_024)
    assert len(data.broken) == 1
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
    alone = greys_of_steps(tables, range(12))
    assert greys_of_steps(tables, range(12), workers=2) == alone
    halves = [greys_of_steps(tables, range(12), rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone
    assert greys_of_steps(tables, range(7, 12)) == alone[7:]
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


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.arrow"])
def test_look_takes_shards_and_folders_of_them_for_a_stream(tmp_path, name):
    file = tmp_path / name
    file.touch()
    for data in (file, tmp_path):
        options = ["--data.name", "stream", "--data.path", str(data)]
        assert looked_at(["look", str(data)]) == ["look", str(data), *options]
