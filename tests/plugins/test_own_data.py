"""Tensors and registered data sets of a user train, and their runs open elsewhere.

Unusable data are refused in one line.
"""

import json
import re
from pathlib import Path

import programs
import pytest
import torch
from shell import shell
from torch.utils.data import Dataset

from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.data.own import Own, splits_of
from selfflow.method.options import ModelConfig
from selfflow.registries import trial, use
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run

HERE = Path(__file__).parent


def test_tensors_train_and_their_run_is_sampled_and_reported_in_another_process(
    tmp_path,
):
    trained = programs.run(HERE / "own_tensors.py", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    sample, listed, report = shell(
        tmp_path,
        "sample runs/tensors --each 1 --steps 2 --device cpu".split(),
        "runs runs".split(),
        "report runs/tensors --device cpu".split(),
    )
    assert "4 samples are in" in sample.output, sample.errors
    assert listed.status == 0
    assert "damaged" not in listed.output
    assert report.status == 0, report.errors
    assert (tmp_path / "runs/tensors/report.html").is_file()
    stored = json.loads(
        (tmp_path / "runs/tensors/config.json").read_text(encoding="utf-8")
    )
    assert stored["config"]["data"]["name"] == "given"
    assert stored["outline"]["given"]["shapes"] == {"image": [1, 8, 8]}


def test_a_run_on_tensors_opens_only_with_its_own_data(tmp_path):
    images = torch.rand(60, 1, 8, 8) * 2 - 1
    run = train(
        Config("mine", training=TrainConfig(steps=2, batch=8)),
        tmp_path,
        data=images,
        bar=False,
    )
    assert run.sample([0], steps=1)["image"].shape == (1, 1, 8, 8)
    opened = Run.open(run.path, "cpu", data=images)
    samples = [
        opened.sources_of(split).data["given"].take(torch.arange(1)).signals["image"]
        for split in ("train", "test")
    ]
    for image in samples:
        assert (images == image).flatten(1).all(1).any()
    assert not torch.equal(*samples)
    with pytest.raises(
        ValueError, match=r"open it with the same data: Run.open\(path, data=...\)"
    ):
        Run.open(run.path, "cpu").sources_of("test")
    with pytest.raises(ValueError, match="was trained on other data than these"):
        Run.open(run.path, "cpu", data=images.flip(0))


def test_a_registered_torch_data_set_works_from_a_shell(
    tmp_path,
):
    file = HERE / "own_dataset.py"
    use(file)
    config = Config(
        "stripes",
        data=DataConfig("stripes"),
        model=ModelConfig(width=16, depth=2, heads=2),
        training=TrainConfig(steps=2, batch=8),
    )
    run = train(config, tmp_path / "runs", bar=False)
    assert run.sources.names == ("across", "down")
    lines = (
        "sample runs/stripes --each 1 --steps 2 --device cpu",
        "probe runs/stripes --samples 100 --device cpu",
        "report runs/stripes --device cpu",
    )
    answers = shell(tmp_path, *([*line.split(), "--use", file] for line in lines))
    for answer in answers:
        assert answer.status == 0, answer.errors
    assert "2 samples are in" in answers[0].output
    assert (tmp_path / "runs/stripes/report.html").is_file()


def test_its_options_are_settings_like_all_others(tmp_path, capsys):
    file = ["--use", str(HERE / "own_dataset.py")]
    small = [
        "--model.width",
        "16",
        "--model.depth",
        "2",
        "--model.heads",
        "2",
        "--training.steps",
        "1",
        "--training.batch",
        "8",
    ]
    with trial():
        main(
            [
                "train",
                *file,
                "--name",
                "thick",
                "--folder",
                str(tmp_path),
                "--data.0.name",
                "stripes",
                "--data.0.thickness",
                "3",
                "--data.0.share",
                "2",
                "--data.1.name",
                "notes",
                *small,
                "--device",
                "cpu",
            ]
        )
        stored = json.loads(
            (tmp_path / "thick/config.json").read_text(encoding="utf-8")
        )
        assert stored["use"] == file[1:]
        assert [data["name"] for data in stored["config"]["data"]] == [
            "stripes",
            "notes",
        ]
        opened = Run.open(tmp_path / "thick", "cpu")
        assert opened.config.datasets["stripes"].thickness == 3
        assert opened.config.datasets["stripes"].share == 2
        data = opened.sources_of("test").data["stripes"]
        image = data.take(torch.tensor([1])).signals["image"]
        assert (image > 0).sum() == 3 * 8
        for name, is_listed in (("stripes", True), ("digits", False)):
            capsys.readouterr()
            with pytest.raises(SystemExit):
                main(["train", *file, "--data.name", name, "--help"])
            assert ("of a stripe, pixels" in capsys.readouterr().out) == is_listed
        with pytest.raises(SystemExit):
            main(["train", *file, "--data.thickness", "3"])
        assert (
            "--data.thickness is an option of data set stripes; choose one by "
            "--data.name" in capsys.readouterr().err
        )
        with pytest.raises(ValueError, match="thickness is '3', expected int"):
            Config.from_dict({"data": {"name": "stripes", "thickness": "3"}})


def test_options_need_defaults_and_may_be_written_as_strings(tmp_path):
    file = tmp_path / "later.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from selfflow import register_dataset\n"
        "@dataclass(frozen=True)\nclass Options:\n    count: int = 3\n    share_of: "
        "tuple[float, ...] = ()\n"
        "@register_dataset('later', options=Options)\ndef later(config, split): ...\n"
        "@dataclass(frozen=True)\nclass Bad:\n    root: str\n"
        "if False:\n    register_dataset('bad', later, Bad)\n"
    )
    with trial():
        use(file)
        assert DataConfig("later", count=4, share_of=(0.5,)).count == 4
        with pytest.raises(ValueError, match="count is 2.5, expected int"):
            DataConfig("later", count=2.5)
        bad = tmp_path / "bad.py"
        bad.write_text(
            file.read_text()
            .replace("if False", "if True")
            .replace("'later'", "'sooner'")
        )
        with pytest.raises(
            ValueError,
            match="option root of data set 'bad' has no default; give it one in Bad",
        ):
            use(bad)


class Odd(Dataset):
    "Images of zeros, of which some items are replaced."

    def __init__(self, count=9, **changed):
        self.count = count
        self.changed = changed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.changed.get(f"item{index}", torch.zeros(1, 8, 8))


@pytest.mark.parametrize(
    "data, error, words",
    [
        (lambda: Odd(0), ValueError, "the data set has no items"),
        (
            lambda: Odd(item3=torch.zeros(1, 8, 9)),
            ValueError,
            "item 3 has {'image': (1, 8, 9)}, but item 0 has {'image': (1, 8, 8)}",
        ),
        (
            lambda: Odd(item4=torch.full((1, 8, 8), torch.nan)),
            ValueError,
            "item 4: image contains NaN or infinity",
        ),
        (
            lambda: Odd(item4=torch.full((1, 8, 8), 2.0)),
            ValueError,
            "item 4: values of image reach 2, expected [-1, 1]",
        ),
        (
            lambda: Odd(item0=torch.zeros(1, 8, 8, dtype=torch.uint8)),
            TypeError,
            "item 0: image is torch.uint8",
        ),
        (
            lambda: Odd(item0=torch.zeros(8, 8)),
            ValueError,
            "item 0 is a tensor (8, 8); expected an image (c, h, w)",
        ),
        (
            lambda: Odd(item2=(torch.zeros(1, 8, 8), 1)),
            ValueError,
            "some items have a label and others do not",
        ),
        (
            lambda: Odd(item0={"picture": torch.zeros(1, 8, 8)}),
            ValueError,
            "unknown signal 'picture'",
        ),
        (
            lambda: (torch.zeros(9, 1, 8, 8), torch.zeros(8).long()),
            ValueError,
            "image has 9, label has 8",
        ),
        (
            lambda: (torch.zeros(9, 1, 8, 8), torch.arange(9) - 1),
            ValueError,
            "a label is -1",
        ),
        (lambda: iter([1]), TypeError, "is not a data set; expected tensors"),
        (lambda: {"validation": torch.zeros(9, 1, 8, 8)}, ValueError, "but no 'train'"),
        (
            lambda: {
                "train": torch.zeros(9, 1, 8, 8),
                "validation": torch.zeros(9, 1, 4, 4),
            },
            ValueError,
            "validation has",
        ),
        (
            lambda: Odd(2),
            ValueError,
            "has 2 samples; it needs at least one for each of train",
        ),
    ],
)
def test_unusable_data_are_refused_in_one_line_before_training(
    tmp_path, data, error, words
):
    with pytest.raises(error, match=re.escape(words)) as raised:
        train(
            Config("bad", training=TrainConfig(steps=2, batch=8)),
            tmp_path,
            data=data(),
            bar=False,
        )
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bad").exists()


def test_a_changed_length_is_reported():
    items = Odd(9)
    own = Own(items)
    items.count = 8
    with pytest.raises(
        ValueError, match="had 9 items when it was opened and has 8 now"
    ):
        own.take(torch.arange(2))


def test_given_splits_are_used_and_share_their_classes():
    train_split = (torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    splits = splits_of(
        {
            "train": train_split,
            "validation": (torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])),
        }
    )
    assert {split: len(data) for split, data in splits.items()} == {
        "train": 4,
        "validation": 2,
    }
    assert splits["validation"].names == ("0", "1", "2")
    assert Own(train_split).fingerprint == Own(train_split).fingerprint


def test_the_fingerprint_of_random_items_depends_on_their_form():
    class Random(Odd):
        def __getitem__(self, index):
            return torch.rand(1, 8, 8)

    assert (
        Own(Random()).fingerprint
        == Own(Random()).fingerprint
        != Own(Random(8)).fingerprint
    )
