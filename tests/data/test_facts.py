"""Facts about files are cached: only changed and refused files are read again."""

import json
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from selfflow.data import folders
from selfflow.data.files import Facts, Inside, Refused
from selfflow.data.folders import Folder


@pytest.fixture
def opens(monkeypatch, tmp_path):
    "Names of the opened files; the cache starts empty, and the files are old."
    names = []
    real = Inside.open

    def opened(self):
        names.append(self.name)
        return real(self)

    monkeypatch.setattr(Inside, "open", opened)
    monkeypatch.setattr(
        "selfflow.data.files.user_cache_path", lambda name: tmp_path / "cache"
    )
    monkeypatch.setattr("selfflow.data.files._WORTH", 1)
    monkeypatch.setattr(Facts.save, "__defaults__", (1,))
    with patch("time.time", return_value=time.time() + 60):
        yield names


@pytest.fixture
def photos(tmp_path):
    for i in range(6):
        path = tmp_path / f"photos/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6 + i, 6), (20 * i,) * 3).save(path)
    (tmp_path / "photos/a/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    return tmp_path / "photos"


def everything(photos):
    data = Folder(photos, size=4, shares=(1, 0, 0))
    return data.fingerprint, dict(data.skipped), dict(data.sides), data.notes


def test_a_second_start_opens_only_files_that_were_refused(photos, opens):
    first = everything(photos)
    assert len(opens) == 13  # seven headers and six digests
    opens.clear()
    assert everything(photos) == first
    assert opens == ["a/broken.png"]


def test_a_file_is_read_once_the_package_it_needs_is_installed(
    photos, opens, monkeypatch
):
    real = folders.read_header

    def without(source, signal, timed=False):
        if source.name == "a/0.png":
            raise Refused("needs the package av: pip install 'selfflow[av]'")
        return real(source, signal, timed)

    monkeypatch.setattr(folders, "read_header", without)
    assert len(Folder(photos, size=4, shares=(1, 0, 0))) == 5
    monkeypatch.setattr(folders, "read_header", real)
    assert len(Folder(photos, size=4, shares=(1, 0, 0))) == 6


def test_another_version_reads_all_files_again(photos, opens, monkeypatch):
    everything(photos)
    opens.clear()
    monkeypatch.setattr("selfflow.data.files.__version__", "99")
    everything(photos)
    assert len(opens) == 13


def test_changed_files_are_read_again(photos, opens):
    first = everything(photos)
    opens.clear()
    Image.new("RGB", (9, 9)).save(photos / "a/2.png")
    (photos / "b/1.png").unlink()
    second = everything(photos)
    assert {*opens} == {"a/2.png", "a/broken.png"}
    assert second[0] != first[0]
    assert (9, 9) in second[2]
    assert (7, 6) not in second[2]


def test_files_written_just_now_are_not_cached(photos, opens):
    with patch("time.time", return_value=(photos / "a/0.png").stat().st_mtime):
        everything(photos)
    opens.clear()
    everything(photos)
    assert len(opens) == 13


@pytest.mark.parametrize("content", ["", "[]", '{"a/0.png": 3}', "[" * 99_999, "\0"])
def test_a_damaged_cache_is_ignored(photos, opens, content):
    expected = everything(photos)
    (cache_file,) = Path(photos.parent / "cache/facts").iterdir()
    assert json.loads(cache_file.read_text())
    cache_file.write_text(content)
    assert everything(photos) == expected


def test_a_cache_that_cannot_be_written_is_no_error(photos, opens):
    (photos.parent / "cache").write_text("in the way")
    assert everything(photos)[0]
