"""Files of a folder are listed, described by tables, and opened or refused.

Nothing outside the folder is read, and splits depend on names alone.
"""

import hashlib
import io
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.data.datasets import SPLITS
from selfflow.data.files import (
    _ENDS,
    SIGNALS,
    SUFFIXES,
    Inside,
    Refused,
    Row,
    Skipped,
    carve,
    digest,
    kind_of,
    listing,
    natural,
    plain,
    refusing,
    rows,
    split_of,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "root/sub").mkdir(parents=True)
    (tmp_path / "root/sub/fine").write_bytes(b"fine")
    return (tmp_path / "root").resolve()


def reason_of(function, *arguments):
    with pytest.raises(Refused) as caught:
        function(*arguments)
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


def test_files_in_the_folder_and_links_to_them_are_opened(root):
    (root / "link").symlink_to(root / "sub/fine")
    (root / "relative").symlink_to("sub/fine")
    for name in ("sub/fine", "link", "relative", "sub/../sub/fine"):
        with Inside(root, name).open() as file:
            assert file.read() == b"fine"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("../outside", "leads out of the folder"),
        ("out", "leads out of the folder"),
        ("folder-out/outside", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("device", "leads out of the folder"),
        ("pipe", "is not a regular file"),
        ("sub", "is not a regular file"),
        ("circle", "cannot be opened"),
        ("missing", "cannot be opened"),
        ("a\0b", "cannot be opened"),
        ("x" * 5_000, "cannot be opened"),
    ],
)
def test_nothing_outside_the_folder_is_opened(root, name, reason):
    (root / "out").symlink_to(root.parent / "outside")
    (root / "folder-out").symlink_to(root.parent)
    (root / "device").symlink_to("/dev/zero")
    (root / "circle").symlink_to("circle")
    os.mkfifo(root / "pipe")
    assert reason_of(Inside(root, name).open) == reason


def test_a_device_is_not_opened():
    assert reason_of(Inside(Path("/dev"), "null").open) == "is not a regular file"


def test_a_file_that_becomes_a_pipe_while_opening_is_released(root, monkeypatch):
    os.mkfifo(root / "pipe")
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *rest: real(root / "pipe", flags, *rest)
    )
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert reason_of(Inside(root, "sub/fine").open) == "is not a regular file"
    assert not before or len(os.listdir("/proc/self/fd")) == before, (
        "the pipe is closed"
    )


def test_any_decoder_error_becomes_refused():
    for error in (
        OSError("x"),
        SyntaxError("x"),
        MemoryError(),
        RecursionError(),
        EOFError(),
        KeyError("x"),
    ):
        with (
            pytest.raises(Refused, match=f"reason .{type(error).__name__}"),
            refusing("reason"),
        ):
            raise error
    with pytest.raises(Refused, match="^first$"), refusing("second"):
        raise Refused("first")
    with pytest.raises(KeyboardInterrupt), refusing("reason"):
        raise KeyboardInterrupt


STARTS = {
    "PNG": PNG,
    "JPEG": b"\xff\xd8\xff\xe0",
    "GIF": b"GIF89a",
    "BMP": b"BM6",
    "WEBP": b"RIFF\x0a\x0a\x0a\x0aWEBPVP8 ",
    "WAV": b"RIFF\0\0\0\0WAVEfmt ",
    "AVI": b"RIFF\xff\xff\xff\xffAVI LIST",
    "MP4": b"\0\0\0\x20ftypisom",
    "FLAC": b"fLaC\0",
    "MATROSKA": b"\x1a\x45\xdf\xa3\1",
    "TIFF": b"II*\0\x08\0\0\0",
    "AVIF": b"\0\0\0\x1cftypmif1\0\0\0\0avifmiaf",
    "HEIF": b"\0\0\0\x1cftypheic\0\0\0\0mif1heic",
    "JPEG2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "PPM": b"P6 4 4 255 ",
    "MP3": b"\xff\xfb\x90\x64",
    "OGG": b"OggS\0\2",
    "AIFF": b"FORM\0\0\0\x20AIFFCOMM",
    "AU": b".snd\0\0\0\x18",
    "CAF": b"caff\0\1",
    "RF64": b"RF64\xff\xff\xff\xffWAVEds64",
    "M4A": b"\0\0\0\x20ftypM4A isom",
    "AAC": b"\xff\xf1\x50\x80",
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("kind", [*STARTS, "other"])
def test_kinds_depend_on_content_not_suffix(kind, signal):
    for suffix in ("", *SUFFIXES, ".PNG", ".txt"):
        file = io.BytesIO(STARTS.get(kind, b"hello, there") + bytes(50))
        # both begin alike
        both_mp4 = (kind, SUFFIXES.get(suffix)) == ("MP4", "M4A")
        expected = "M4A" if both_mp4 else kind
        if expected in SIGNALS[signal]:
            assert kind_of(file, signal, suffix) == expected, suffix
            assert file.tell() == 0
            continue
        reason = reason_of(kind_of, file, signal, suffix)
        if SUFFIXES.get(suffix.lower()) in SIGNALS[signal]:
            assert reason == "is not what its suffix says", suffix
        else:
            assert reason == f"cannot be read as {signal}", suffix


@pytest.mark.parametrize(
    "data, suffix, reason",
    [
        (b"\xff\x0a", ".jxl", "is JPEG XL, which is not read"),
        (b"\0\0\0\x0cJXL \r\n", ".jpg", "is JPEG XL, which is not read"),
        (b"%PDF-1.7", ".pdf", "is PDF, which is not read"),
        (b"PK\3\4", ".zip", "is an archive, which is not read"),
        (b"II*\0\x10\0\0\0CR", ".CR2", "is a camera's raw file, which is not read"),
    ],
)
def test_kinds_that_are_known_but_not_read_are_named(data, suffix, reason):
    assert reason_of(kind_of, io.BytesIO(data + bytes(50)), "image", suffix) == reason


def test_empty_and_too_large_files_are_refused(monkeypatch):
    assert reason_of(kind_of, io.BytesIO(), "image", ".png") == "is empty"
    monkeypatch.setattr("selfflow.data.files._FILE_BYTES", 100)
    assert reason_of(kind_of, io.BytesIO(PNG + bytes(93)), "image") == "is too large"
    assert kind_of(io.BytesIO(PNG + bytes(92)), "image") == "PNG"
    assert kind_of(io.BytesIO(STARTS["WAV"] + bytes(500)), "audio") == "WAV", (
        "of long audio only the beginning is read"
    )


def test_a_listing_is_sorted_and_names_what_is_skipped(root):
    (root / "/".join("abcdefghijk")).mkdir(parents=True)
    (root / "a/b/c/10.png").touch()
    (root / "a/b/c/9.png").touch()
    (root / ".hidden").mkdir()
    (root / ".hidden/x.png").touch()
    (root / "sub/.x.png").touch()
    (root / "sub/link").symlink_to(root / "sub/fine")
    (root / "sub/up").symlink_to(root)
    (root / "sub/nowhere").symlink_to(root / "missing")
    os.mkfifo(root / "sub/pipe")
    skipped = Skipped()
    files, folders = listing(root, skipped)
    assert files == ["a/b/c/9.png", "a/b/c/10.png", "sub/fine", "sub/link"]
    assert folders == ["/".join("abcdefgh"[:n]) for n in range(1, 9)] + ["sub"]
    assert {reason: sorted(names) for reason, names in skipped.items()} == {
        "is nested too deeply": ["a/b/c/d/e/f/g/h/i"],
        "is a link to a folder": ["sub/up"],
        "is not a regular file": ["sub/nowhere", "sub/pipe"],
    }


def test_a_folder_that_cannot_be_listed_is_counted(root, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "no")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    skipped = Skipped()
    assert listing(root, skipped) == ([], ["sub"])
    assert skipped == {"cannot be opened": ["sub"]}


def test_natural_order_sorts_numbers_by_value():
    names = ["10", "9", "a2b", "a10", "a2", "", "b", "1" * 9_000, "007", "7", "a02"]
    assert sorted(names, key=natural) == [
        "",
        "007",
        "7",
        "9",
        "10",
        "1" * 9_000,
        "a02",
        "a2",
        "a2b",
        "a10",
        "b",
    ]


@given(st.lists(st.text(max_size=8)))
def test_natural_order_depends_on_the_names_alone(names):
    backwards = names[::-1]
    assert sorted(names, key=natural) == sorted(backwards, key=natural)


@given(st.text(st.characters(codec=None), max_size=20))
def test_plain_text_can_be_encoded_and_stays_the_same(text):
    result = plain(text)
    result.encode()
    assert plain(result) == result
    if text.isascii():
        assert result == text


def test_plain_text_is_composed_and_half_characters_are_repaired():
    assert plain("e\u0301\ud83d\ude00\udc80") == "\u00e9\U0001f600\ufffd"


CSV = 'file,label,caption\na.png,cat,"a, b\n\u732b"\nsub/b.png,,\n'
JSONL = (
    '{"file_name": "a.png", "label": "cat", "text": "a, b\\n\u732b"}\n\n'
    '{"file": "sub/b.png", "label": "", "caption": ""}\n'
)


@pytest.mark.parametrize(
    "name, text",
    [
        ("metadata.csv", CSV),
        ("metadata.jsonl", JSONL),
        ("metadata.csv", "\ufeff" + CSV),
        ("labels.csv", CSV.replace("file", "filename").replace("label", "class")),
        (
            "labels.tsv",
            CSV.replace("a, b", "a; b").replace(",", "\t").replace("a; b", "a, b"),
        ),
        ("metadata.tsv", CSV),
        ("labels.jsonl", JSONL),
        (
            "metadata.csv",
            CSV.replace("a, b", "a| b").replace(",", ";").replace("a| b", "a, b"),
        ),
        ("metadata.csv", CSV.replace("file", "file_name").replace("caption", "text")),
    ],
)
def test_tables_of_every_format_are_read(root, name, text):
    (root / name).write_bytes(text.encode())
    skipped = Skipped()
    assert rows(root, "", skipped) == [
        Row("a.png", "cat", "a, b\n\u732b"),
        Row("sub/b.png", "", ""),
    ]
    assert not skipped
    assert rows(root, "sub", skipped) is None


def test_a_table_describes_its_own_folder(root):
    (root / "sub/metadata.csv").write_text("file\nx.png\n./y.png\n", encoding="utf-8")
    assert rows(root, "sub", Skipped()) == [
        Row("sub/x.png", None, None),
        Row("sub/y.png", None, None),
    ]


def test_bad_rows_are_counted(root):
    lines = [
        '{"file": "../x.png"}',
        '{"file": "/etc/passwd"}',
        '{"file": "a/../../x"}',
        '{"file": 3}',
        '{"label": "cat"}',
        "[1]",
        "{",
        "[" * 100_000,
        '{"file": "  "}',
        '{"file": "good.png", "label": 1.5, "caption": null}',
        "null",
        '"x"',
    ]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    skipped = Skipped()
    assert rows(root, "", skipped) == [Row("good.png", "1.5", None)]
    assert skipped == {
        "leads out of the folder": ["../x.png", "/etc/passwd", "a/../../x"],
        "does not name a file": ["metadata.jsonl"] * 3,
        "is damaged": [f"metadata.jsonl, line {n}" for n in (6, 7, 8, 12)],
    }


@pytest.mark.parametrize(
    "name, data, words",
    [
        (
            "metadata.csv",
            b"label,caption\ncat,x\n",
            "metadata.csv: has no column file .but 'label', 'caption'",
        ),
        ("metadata.csv", b"", "has no column file"),
        (
            "metadata.csv",
            b"file\n\xff\xfe.png\n",
            "utf-8.*is UTF-8 text with a column file",
        ),
        ("metadata.csv", b"file\n" + b"x" * 200_000, "field larger than field limit"),
        ("metadata.jsonl", b"\xff", "metadata.jsonl: .*utf-8"),
    ],
)
def test_invalid_tables_are_refused(root, name, data, words):
    (root / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        rows(root, "", Skipped())


def test_two_tables_a_link_and_a_large_table_are_refused(root, monkeypatch):
    (root / "metadata.csv").write_text("file\n", encoding="utf-8")
    (root / "metadata.jsonl").touch()
    with pytest.raises(
        ValueError, match="both metadata.csv and metadata.jsonl.*keep one"
    ):
        rows(root, "", Skipped())
    (root / "metadata.jsonl").unlink()
    monkeypatch.setattr("selfflow.data.files._FILE_BYTES", 4)
    with pytest.raises(ValueError, match="is too large"):
        rows(root, "", Skipped())
    (root / "metadata.csv").unlink()
    (root / "metadata.csv").symlink_to(root.parent / "outside")
    with pytest.raises(ValueError, match="leads out of the folder"):
        rows(root, "", Skipped())


@given(
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.integers(0, 10),
    st.integers(0, 10),
)
def test_splits_depend_on_the_name_alone(name, train, validation):
    total = train + validation + 1
    shares = (train / total, validation / total, 1 / total)
    composed = unicodedata.normalize("NFC", name).encode()
    place = int(hashlib.sha256(composed).hexdigest()[:14], 16) / 16**14
    expected = "test"
    if place < shares[0]:
        expected = "train"
    elif place < shares[0] + shares[1]:
        expected = "validation"
    assert split_of(name, shares) == expected
    assert split_of(name, (1.0, 0.0, 0.0)) == "train"
    assert split_of(name, (0.0, 0.0, 1.0)) == "test"


@given(
    st.sets(st.text(max_size=4), max_size=40),
    st.booleans(),
    st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0), (1, 0, 0)]),
)
def test_empty_splits_are_filled_from_the_others(names, given_folders, shares):
    splits = {
        name: "train" if given_folders else split_of(name, shares) for name in names
    }
    moved = carve(splits, shares, given_folders)
    assert moved == carve(dict(reversed(splits.items())), shares, given_folders), (
        "the order of the names does not matter"
    )
    filled = {**splits, **moved}
    requested = {split for split, share in zip(SPLITS, shares, strict=True) if share}
    assert {*filled} == names
    assert {*filled.values()} <= requested
    assert len(names) < 3 or {*filled.values()} == requested
    if {*splits.values()} == requested:
        assert not moved, "nothing moves where no split is empty"


def test_missing_splits_are_filled_from_train_and_stay_fixed():
    splits = {f"train/{i}": "train" for i in range(1_000)}
    splits |= {f"test/{i}": "test" for i in range(100)}
    moved = carve(splits, (0.8, 0.1, 0.1), given=True)
    assert {*moved.values()} == {"validation"}
    assert all(splits[name] == "train" for name in moved)
    assert 70 < len(moved) < 130
    added = {f"train/more{i}": "train" for i in range(500)}
    later = carve(splits | added, (0.8, 0.1, 0.1), given=True)
    assert {name: split for name, split in later.items() if name in splits} == moved, (
        "new files do not move the old ones"
    )
    assert not carve({"test/1": "test"}, (0.8, 0.1, 0.1), given=True), (
        "train is never filled from test"
    )


def test_splits_have_the_requested_shares():
    splits = [split_of(f"class/{n}.png", (0.7, 0.1, 0.2)) for n in range(4_000)]
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        error = (share * (1 - share) / 4_000) ** 0.5
        assert abs(splits.count(split) / 4_000 - share) < 4 * error


@settings(deadline=None)
@given(st.integers(0, 3 * _ENDS), st.integers(0, 3 * _ENDS - 1))
def test_digests_depend_on_size_and_both_ends(size, at):
    data = bytes(size)
    changed = data[:at] + b"x" + data[at + 1 :] if at < size else data + b"\0"
    unseen = _ENDS <= at < size - _ENDS
    assert (digest(data) == digest(changed)) == unseen


def test_digests_cover_files_videos_and_refused_sources(root):
    (root / "a").write_bytes(b"fine")
    assert (
        digest(Inside(root, "a"))
        == digest(b"fine")
        == digest(Inside(root, "sub/fine"))
        != digest(b"fine ")
    )
    assert digest((b"a", b"b")) not in (
        digest((b"b", b"a")),
        digest((b"ab",)),
        digest(b"ab"),
    )
    assert (
        digest(Inside(root, "missing"))
        == digest(Inside(root, "lost"))
        != digest(Inside(root, "../outside"))
    )
