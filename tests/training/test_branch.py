"""A branch goes on from the full state of another run, exactly."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_same

from selfflow.cli import main
from selfflow.training import loop as training
from selfflow.training.loop import train
from selfflow.training.run import Run

TRUNK = replace(
    TINY,
    name="trunk",
    training=replace(
        TINY.training,
        ema_half_life=3.0,
        ema={"long": 6.0},
        power_ema=(0.1,),
        snapshot_every=4,
        keep_every=4,
        sample_every=0,
    ),
)


def cooled(name="cooled", **changes):
    changes = {"steps": 11, "cooldown": 3, **changes}
    return replace(TRUNK, name=name, training=replace(TRUNK.training, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(TRUNK, folder, "cpu", bar=False)
    return folder


def test_a_branch_equals_a_run_planned_that_way_from_the_start(
    folder, tmp_path, capsys
):
    source = folder / "trunk/checkpoints/step-00000008"
    trunk = (folder / "trunk/config.json").read_bytes()
    run = train(cooled(), folder, "cpu", bar=False, branch_from=source)
    assert "cooled: branches from" in capsys.readouterr().out
    assert (folder / "trunk/config.json").read_bytes() == trunk
    planned = train(cooled(), tmp_path, "cpu", bar=False)
    assert_same(planned, run)
    assert [p.name for p in run.snapshots()] == [p.name for p in planned.snapshots()]
    assert run.timing["step"].tolist() == planned.timing["step"].tolist()
    assert Run.open(run.path, "cpu").branch == {"run": "trunk", "step": 8}
    # it needs the trunk no more, and the same call resumes it
    shutil.copytree(run.path, tmp_path / "alone/cooled")
    shutil.rmtree(tmp_path / "alone/cooled/checkpoints/step-00000011")
    gone = tmp_path / "gone/trunk/checkpoints/step-00000008"
    again = train(cooled(), tmp_path / "alone", "cpu", bar=False, branch_from=gone)
    assert_same(planned, again)


def test_branches_that_do_not_fit_are_refused_and_leave_nothing(folder, monkeypatch):
    source = folder / "trunk/checkpoints/step-00000008"

    def refused(config, words, source=source):
        with pytest.raises((ValueError, OSError), match=words):
            train(config, folder, "cpu", bar=False, branch_from=source)

    refused(replace(cooled("other"), seed=1), "seed: 0 in the trunk, 1 in the branch")
    refused(cooled("other", batch=8), "training.batch")
    refused(cooled("other", ema={"long": 5.0}), "training.ema.long")
    refused(cooled("other", steps=7), "past the 7 steps of other")
    refused(cooled("other"), "neither a run nor a checkpoint", folder / "nothing")
    refused(replace(TRUNK, name="trunk"), "holds no branch")
    (folder / "empty").mkdir()
    shutil.copy(folder / "trunk/config.json", folder / "empty")
    refused(cooled("other"), "no checkpoint to resume from", folder / "empty")
    thin = folder / "thin/checkpoints/step-00000008"
    shutil.copytree(source, thin)
    (thin / "optimizer.safetensors").unlink()
    shutil.copy(folder / "trunk/config.json", folder / "thin")
    refused(cooled("other"), "it has no optimiser .training.keep_optimizers.", thin)

    def full(*args):
        raise OSError(28, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_checkpoint", full)
        refused(cooled("other"), "branch .*other could not be written")
    assert not (folder / "other").exists()
    (folder / "other").mkdir()
    (folder / "other/thesis.txt").write_text("mine")
    refused(cooled("other"), "not empty and holds no run")
    shutil.rmtree(folder / "other")
    (folder / "damaged").mkdir()
    damaged = folder / "damaged/checkpoints/step-00000008"
    shutil.copytree(source, damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    shutil.copy(folder / "trunk/config.json", folder / "damaged")
    refused(cooled("other"), "cannot be branched from: model.safetensors", damaged)


def test_each_seed_is_a_separate_run_and_resumes(tmp_path, capsys):
    sizes = "--model.width 16 --model.depth 4 --model.heads 2 --training.batch 8"
    line = (
        f"train --name tiny --folder {tmp_path} --device cpu --seeds 3 5 {sizes} "
        "--training.steps 2 --training.validation 8 --training.log-every 1"
    ).split()
    main(line)
    printed = capsys.readouterr().out
    runs = [Run.open(tmp_path / f"tiny-seed{seed}", "cpu") for seed in (3, 5)]
    losses = [run.log["validation_flow_loss"].iloc[-1] for run in runs]
    mean = sum(losses) / 2
    assert [run.config.seed for run in runs] == [3, 5]
    assert losses[0] != losses[1]
    assert f"validation flow loss: {mean:.4f} +- " in printed
    assert "2 seeds" in printed
    alone = replace(runs[0].config, name="alone")
    single = train(alone, tmp_path, "cpu", bar=False)
    for name, value in single.load("model").items():
        assert torch.equal(value, runs[0].load("model")[name])
    shutil.rmtree(runs[1].path)
    before = (runs[0].path / "log.jsonl").stat().st_mtime_ns
    main(line)
    assert (runs[0].path / "log.jsonl").stat().st_mtime_ns == before
    assert (
        json.loads((tmp_path / "tiny-seed5/config.json").read_text())["config"]["seed"]
        == 5
    )
