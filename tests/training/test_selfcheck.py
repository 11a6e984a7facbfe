"""Training in several processes is compared with one; differences are detected."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY

from selfflow.cli import main
from selfflow.training import selfcheck
from selfflow.training.loop import train
from selfflow.training.selfcheck import Check, compare_runs


def test_differences_are_printed_and_set_the_exit_status(monkeypatch, capsys):
    command = ["selfcheck", "--processes", "4", "--device", "cpu", "--parallel", "ddp"]

    def launch(config, count, folder, device):
        return train(config, folder, device, bar=False)

    monkeypatch.setattr(selfcheck, "launch", launch)
    monkeypatch.setattr(selfcheck, "_STEPS", 4)
    main(command)
    lines = [line for line in capsys.readouterr().out.splitlines() if "apart" in line]
    assert len(lines) == 6
    assert all(line.endswith(": ok") for line in lines)
    assert lines[0] == "ddp, 4 processes: losses 0.0e+00 apart (limit 1e-04): ok"
    assert lines[3].startswith("ddp, 4 processes, resumed by one: losses ")
    monkeypatch.setitem(selfcheck._LIMITS, "weights", -1.0)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    assert capsys.readouterr().out.count("DIFFERENT") == 2


@pytest.mark.parametrize("count", [0, 1])
def test_one_process_leaves_nothing_to_compare(capsys, count):
    with pytest.raises(SystemExit):
        main(["selfcheck", "--processes", str(count)])
    assert f"processes is {count}, but it takes 2 or more" in capsys.readouterr().err


def test_no_parallelism_leaves_nothing_to_compare():
    with pytest.raises(ValueError, match="parallel is empty; name ddp, fsdp"):
        next(selfcheck.selfcheck(2, "cpu", ()))


def test_runs_of_other_lengths_are_not_compared(runs, tmp_path):
    short = replace(TINY, training=replace(TINY.training, steps=2, save_every=2))
    with pytest.raises(ValueError, match="has logged 2 steps and .* 12; train both"):
        compare_runs(train(short, tmp_path, "cpu", bar=False), runs["tiny"])


def test_nan_is_a_difference():
    assert not Check("losses", float("nan"), 1.0).passed
    assert Check("losses", 1.0, 1.0).passed
    assert selfcheck._apart(torch.ones(2), torch.tensor([1.0, 2.0])) == pytest.approx(
        5**-0.5
    )
