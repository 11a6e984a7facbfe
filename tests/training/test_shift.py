"""Samples are drawn with the shift of the levels in training."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from test_formats import RUNS

from selfflow.analysis.sample_metrics import run_metrics
from selfflow.cli import main
from selfflow.method.options import ObjectiveConfig
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.training.samples import write_samples
from selfflow.workbench.playground import explore

SHIFTED = replace(
    TINY,
    name="shifted",
    objective=ObjectiveConfig(density="logit_normal", density_shift=4.0),
    training=replace(TINY.training, steps=4, sample_every=4),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trained = train(SHIFTED, tmp_path_factory.mktemp("shifted"), "cpu", bar=False)
    return Run.open(trained.path, "cpu")


@pytest.fixture
def shifts(monkeypatch):
    "The shifts that the sampler was asked for."
    import selfflow.training.run

    real = selfflow.training.run.sample
    asked = []
    monkeypatch.setattr(
        selfflow.training.run,
        "sample",
        lambda v, x, steps, method, shift, **more: (
            asked.append(shift) or real(v, x, steps, method, shift, **more)
        ),
    )
    return asked


def test_the_default_is_that_of_training_and_can_be_chosen(run, shifts):
    labels = torch.arange(3)
    default = run.sample(labels, steps=3)["image"]
    assert torch.equal(default, run.sample(labels, steps=3, shift=4.0)["image"])
    assert not torch.equal(default, run.sample(labels, steps=3, shift=1.0)["image"])
    assert shifts == [4.0, 4.0, 1.0]
    assert run.shift == 4.0
    video = run.sample_history()[-1][1]
    assert torch.equal(run.draw_sample_grid(run.teacher)[0], video)
    assert shifts[3:] == [4.0]


def test_a_run_without_a_shift_has_an_even_grid(shifts, tmp_path):
    plain = train(
        replace(TINY, name="plain", training=replace(TINY.training, steps=2)),
        tmp_path,
        "cpu",
        bar=False,
    )
    plain.sample([0], steps=2)
    assert set(shifts) == {1.0}
    assert plain.shift == 1


def test_an_old_run_keeps_its_even_grid(tmp_path, shifts):
    shutil.copytree(RUNS / "caption", tmp_path / "caption")
    old = Run.open(tmp_path / "caption", "cpu")
    assert old.config.objective.density_shift == 4.63
    assert old.shift == 1
    old.sample(["a red circle"], steps=2)
    assert shifts == [1.0]


def test_files_records_and_lines_give_the_number(run, shifts, capsys):
    assert "-shift-4-" in write_samples(run, torch.arange(2), steps=2)[1].name
    assert (
        "-shift-" not in write_samples(run, torch.arange(2), steps=2, shift=1.0)[1].name
    )
    main(
        [
            "sample",
            str(run.path),
            "--labels",
            "1",
            "--each",
            "1",
            "--steps",
            "2",
            "--device",
            "cpu",
        ]
    )
    assert "-shift-4-" in (printed := capsys.readouterr().out)
    assert "; shift 4\n" in printed
    assert run_metrics(run, 16, steps=2, resamples=0).recipe["shift"] == 4
    assert json.loads((run.path / "metrics.json").read_text())["recipe"]["shift"] == 4
    main(
        [
            "metrics",
            str(run.path),
            "--count",
            "16",
            "--steps",
            "2",
            "--shift",
            "2",
            "--resamples",
            "0",
            "--device",
            "cpu",
        ]
    )
    assert "shift 2.0" in capsys.readouterr().out
    assert shifts == [4.0, 1.0, 4.0, 4.0, 2.0]


def test_the_playground_begins_with_it(run):
    assert explore(run).controls["shift"].value == 4.0
