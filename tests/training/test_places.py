"""Runs and their data can lie anywhere, be renamed and be moved."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.data.sources import Outline, Sources
from selfflow.method.options import ModelConfig
from selfflow.report.report import run_report
from selfflow.report.run_sections import run_section
from selfflow.training.checkpoint import compare_runs
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run


def pictures(folder, seed=0):
    generator = np.random.default_rng(seed)
    for name in ("bright", "dark"):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                folder / name / f"{i}.png"
            )
    return folder


def config(path="photos", name="own", **data):
    data = DataConfig("folder", path=path, height=8, width=8, patch=4, **data)
    return Config(
        name,
        data=data,
        model=ModelConfig(width=48, depth=2, heads=2),
        training=TrainConfig(
            steps=4, batch=8, validation=4, save_every=2, sample_every=2
        ),
    )


@pytest.fixture
def trained(tmp_path, monkeypatch):
    "A run whose data were named by a relative path, and another working directory."
    home = tmp_path / "home"
    pictures(home / "photos")
    monkeypatch.chdir(home)
    run = train(config(), "runs", "cpu", bar=False)
    monkeypatch.chdir("/")
    return home / run.path


def test_a_relative_path_is_made_absolute_when_a_config_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DataConfig("folder", path="photos").path == str(tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert DataConfig("folder", path="~/photos").path == str(tmp_path / "me/photos")
    assert DataConfig("shapes", condition="caption", encoder="t5").encoder == str(
        tmp_path / "t5"
    )
    assert DataConfig("digits").encoder == ""
    assert Config(data=DataConfig("folder", path="x")) == Config(
        data=DataConfig("folder", path=str(tmp_path / "x"))
    )


def test_a_folder_is_opened_once_for_each_split_of_a_training(tmp_path, capsys):
    train(
        config(str(pictures(tmp_path / "photos"))), tmp_path / "runs", "cpu", bar=False
    )
    output = capsys.readouterr().out
    assert [
        output.count(f"of split {split},") for split in ("train", "validation", "test")
    ] == [1, 1, 0]


def test_a_run_is_used_from_any_folder_and_samples_without_its_data(trained, capsys):
    stored = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert stored["outline"]["folder"]["names"] == ["bright", "dark"]
    assert stored["outline"]["folder"]["shapes"] == {"image": [3, 8, 8]}
    before = Run.open(trained, "cpu").sample(["dark", 0], steps=2)["image"]
    shutil.move(trained.parents[1] / "photos", trained.parents[1] / "moved")
    capsys.readouterr()
    run = Run.open(trained, "cpu")
    assert torch.equal(run.sample(["dark", 0], steps=2)["image"], before)
    assert run.draw_sample_grid(run.teacher)[1].tolist() == [0, 1]
    main(
        [
            "sample",
            str(trained),
            "--labels",
            "dark",
            "--each",
            "2",
            "--steps",
            "2",
            "--device",
            "cpu",
        ]
    )
    assert "2 samples are in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the outline of a run's data"):
        run.sources.take("folder", torch.arange(1))


def test_data_that_moved_are_named_once(trained, capsys):
    home = trained.parents[1]
    shutil.move(home / "photos", home / "moved")
    again = ["train", "--config", str(trained / "config.json"), "--device", "cpu"]
    for command in (["probe", str(trained), "--device", "cpu"], again):
        with pytest.raises(SystemExit):
            main(command)
        printed = capsys.readouterr().err
        assert f"there are no data at {home / 'photos'}" in printed
        assert "selfflow relocate RUN NEW_PATH" in printed
    other = pictures(home / "other", seed=1)
    with pytest.raises(SystemExit):
        main(["relocate", str(trained), str(other)])
    assert "contains a run with" in capsys.readouterr().err
    assert Run.open(trained, "cpu").config.data.path == str(home / "photos")
    main(["relocate", str(trained), str(home / "moved")])
    assert (
        f"data.path: {home / 'photos'} -> {home / 'moved'} from here on"
        in capsys.readouterr().out
    )
    assert len(Sources(Run.open(trained, "cpu").config.data, "test").data["folder"]) > 0
    shutil.rmtree(trained / "checkpoints/step-00000004")
    main(again)
    assert "resuming from step 2" in capsys.readouterr().out
    assert Run.open(trained, "cpu").state()["step"] == 4
    shutil.move(home / "moved", home / "again")
    shutil.rmtree(trained / "checkpoints/step-00000004")
    main([*again, "--data.path", str(home / "again")])
    printed = capsys.readouterr().out
    assert f"data.path: {home / 'moved'} -> {home / 'again'} from here on" in printed
    assert "resuming from step 2" in printed


def test_the_place_may_change_only_where_the_data_are_known_to_be_the_same(tmp_path):
    def stored(path, data):
        return {"config": {"data": {"path": path}}, "inputs": {}, "data": data}

    assert compare_runs(
        tmp_path, stored("a", {"train": "1"}), stored("b", {"train": "1"})
    ) == {"data.path": ("a", "b")}
    for there, asked in (
        ({}, {"train": "1"}),
        ({}, {}),
        ({"train": "1"}, {"train": "2"}),
    ):
        with pytest.raises(
            ValueError, match="data.path: 'a' in the folder, 'b' requested"
        ):
            compare_runs(tmp_path, stored("a", there), stored("b", asked))


def test_two_folders_are_two_data_sets_and_each_may_move(tmp_path, capsys):
    first, second = (
        config(str(pictures(tmp_path / name, seed))).data
        for seed, name in enumerate(("first", "second"))
    )
    run = train(
        replace(config(), data=(first, replace(second, share=2))),
        tmp_path / "runs",
        "cpu",
        bar=False,
    )
    assert list(run.sources.data) == list(run.outline) == ["folder", "folder-2"]
    assert len(run.sources.names) == 4
    shutil.move(tmp_path / "second", tmp_path / "third")
    assert run.sample(["dark"], steps=1, data="folder-2")["image"].shape == (1, 3, 8, 8)
    with pytest.raises(
        ValueError, match="was trained on folder, folder-2; name the one that has moved"
    ):
        run.relocate(tmp_path / "third")
    main(["relocate", str(run.path), str(tmp_path / "third"), "--data", "folder-2"])
    assert (
        f"data.1.path: {tmp_path / 'second'} -> {tmp_path / 'third'} from here on"
        in capsys.readouterr().out
    )
    assert len(Run.open(run.path, "cpu").sources_of("test").data["folder-2"]) > 0
    with pytest.raises(ValueError, match="different data"):
        run.relocate(tmp_path / "first", "folder-2")


@pytest.mark.parametrize("name", ["mein läuf 2", "run #1 (best) 'x' $HOME", "運転"])
def test_a_run_folder_of_any_name_resumes_and_is_sampled(trained, name, capsys):
    folder = trained.rename(trained.with_name(name))
    shutil.rmtree(folder / "checkpoints/step-00000004")
    main(["train", "--config", str(folder / "config.json"), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "resuming from step 2" in printed
    assert f"selfflow sample {Run.open(folder, 'cpu').quoted}" in printed
    assert Run.open(folder, "cpu").state()["step"] == 4
    assert sorted(p.name for p in folder.parent.iterdir()) == [name]
    main(["sample", str(folder), "--steps", "1", "--each", "1", "--device", "cpu"])
    main(["runs", str(folder.parent)])
    assert name[:4] in capsys.readouterr().out


def test_an_older_run_opens_its_data_and_gets_an_outline_on_resuming(trained, capsys):
    file = trained / "config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    outline = stored.pop("outline")
    file.write_text(json.dumps(stored), encoding="utf-8")
    run = Run.open(trained, "cpu")
    assert run.outline == {}
    assert len(run.sources.data["folder"].take(torch.arange(2))) == 2
    train(run.config, trained.parent, "cpu", bar=False)
    assert json.loads(file.read_text(encoding="utf-8"))["outline"] == outline


def test_an_outline_has_captions_that_are_not_trained_on(tmp_path):
    pictures(tmp_path / "photos")
    with_captions = train(
        replace(config(str(tmp_path / "photos"), "told", condition="caption")),
        tmp_path,
        "cpu",
        bar=False,
    )
    outline = Run.open(with_captions.path, "cpu").outline["folder"]
    assert isinstance(outline, Outline) and set(outline.captions) == {
        "bright",
        "dark",
    }, "from all over the data"
    shutil.rmtree(tmp_path / "photos")
    grid, *_ = Run.open(with_captions.path, "cpu").draw_sample_grid(
        with_captions.teacher
    )
    assert grid.shape[0] == len(outline.captions)
    options = "--steps 1 --each 1 --device cpu".split()
    main(["sample", str(with_captions.path), *options])


def test_runs_on_the_same_data_at_two_places_are_compared(trained, monkeypatch, capsys):
    home = trained.parents[1]
    shutil.copytree(home / "photos", home / "copy")
    other = train(config(str(home / "copy"), "other"), trained.parent, "cpu", bar=False)
    first = Run.open(trained, "cpu")
    second = Run.open(other.path, "cpu")
    assert first.config.data != second.config.data
    assert first.trained_on == second.trained_on
    assert (
        "could not"
        not in run_report({"a": first, "b": second}, sections=(run_section,)).html()
    )
    first.data.clear()  # a run that knows no fingerprint
    with pytest.raises(ValueError, match="all runs must have the same data"):
        run_report({"a": first, "b": second}, sections=(run_section,))
