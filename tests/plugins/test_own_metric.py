"""A metric in a user's own file: measured, kept, printed and reported by another process; what it does wrong is one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from shell import shell

from selfflow.analysis.distances import measure
from selfflow.registries import metrics

OWN = Path(__file__).parent / "own_metric.py"


MEASURED = ["--steps", "2", "--device", "cpu"]


def test_a_metric_of_ones_own_is_measured_and_reported(runs, tmp_path):
    folder = shutil.copytree(runs["tiny"].path, tmp_path / "run")
    few = ["--count", "24", "--resamples", "4", *MEASURED]
    # its numbers are in the folder, so the report needs no user's file
    measured, reported = shell(
        tmp_path,
        ["metrics", folder, *few, "--use", OWN],
        ["report", folder, "--device", "cpu"],
    )
    assert measured.status == 0, measured.errors
    assert "distance of means" in measured.output
    assert "Frechet distance" in measured.output
    assert reported.status == 0, reported.errors
    assert "distance of means" in (folder / "report.html").read_text()
    stored = json.loads((folder / "metrics.json").read_text())
    for samples in ("drawn", "floor"):
        measured = stored[samples]["distance of means"]
        low, high = measured["interval"]
        assert low < measured["value"] < high
    assert (
        stored["drawn"]["distance of means"]["value"]
        > stored["floor"]["distance of means"]["value"]
    )


def test_what_a_metric_does_wrong_is_one_line(runs, tmp_path):
    wrong = {
        "1 / 0": "metric 'mine' failed: ZeroDivisionError",
        "'many'": "metric 'mine' returned 'many'; expected a number",
        "{'precision': 1.0}": "both return precision",
    }
    folder = shutil.copytree(runs["tiny"].path, tmp_path / "run")
    commands = []
    for number, body in enumerate(wrong):
        file = tmp_path / f"mine{number}.py"
        file.write_text(
            "from selfflow import register_metric\n\n@register_metric('mine')\n"
            f"def mine(real, drawn):\n    return {body}\n"
        )
        few = ["--count", "12", "--resamples", "0", *MEASURED]
        commands.append(["metrics", folder, *few, "--use", file])
    for answer, message in zip(shell(tmp_path, *commands), wrong.values(), strict=True):
        assert message in answer.refusal
    assert not (folder / "metrics.json").exists()


def test_unknown_metrics_and_a_second_one_of_a_name_are_refused():
    real = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match="kernel distance"):
        measure("kernel distanse", real, real)
    with pytest.raises(ValueError, match="'kernel distance' is registered twice"):
        metrics.register("kernel distance", lambda real, drawn: 0.0)
