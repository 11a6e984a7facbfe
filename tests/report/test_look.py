"""The page made before training presents the samples that training will use."""

import re

import pytest
from PIL import Image

from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.report.look import look
from selfflow.training.config import Config, TrainConfig


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["file,caption"]
    for i in range(20):
        Image.new("RGB", (12, 8), (10 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{'a long ' * i}red number {i}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "<b>.txt").write_text("a note")
    return folder


def table(page, words):
    (part,) = [
        part
        for part in page.parts
        if part["kind"] == "table" and words in part["caption"]
    ]
    return part["frame"]


def test_the_page_shows_samples_captions_and_skipped_files(photos):
    data = DataConfig(
        "folder", path=str(photos), condition="caption", caption=16, patch=4
    )
    page = look(Config(data=data, training=TrainConfig(batch=4)), count=10)
    samples = table(page, "files of these samples")
    assert len(samples) == 10
    assert set(samples["image in the file"]) == {"PNG, 12 x 8"}
    for _, row in samples.iterrows():
        assert row["model input"] == row["caption"][:16]
    cut = sum(len(text) > 16 for text in samples["caption"])
    html = page.html()
    assert f"{cut} of 10 captions are longer than 16 bytes" in html
    skipped = table(page, "not used")
    assert {"'broken.png'", "'<b>.txt'"} <= set(skipped["which"])
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "the page is one file"


def test_a_longer_page_begins_with_the_same_samples(photos):
    config = Config(
        data=DataConfig("folder", path=str(photos)), training=TrainConfig(batch=3)
    )
    names = [
        table(look(config, count), "files of these samples")["sample"].tolist()
        for count in (2, 7)
    ]
    assert names[0] == names[1][:2]
    assert len(set(names[1])) == 7


@pytest.mark.parametrize("name", ["digits", "notes", "scenes"])
def test_every_kind_of_signal_is_shown(name):
    config = Config(data=DataConfig(name), training=TrainConfig(batch=4))
    html = look(config, 3).html()
    assert html.count("data:image/png") == 1
    assert ("data:audio/wav" in html) == (name != "digits")


def test_the_command_writes_one_file(photos, tmp_path, capsys):
    page = tmp_path / "page.html"
    main(["look", str(photos), "--data.height", "8", "--output", str(page)])
    assert "image 3 x 8 x 32" in page.read_text()
    assert str(page) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["look", "nowhere"])
    assert "there is no folder nowhere" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one"):
        look(Config(), 0)
