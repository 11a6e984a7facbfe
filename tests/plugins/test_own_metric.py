"""A user's metric is measured, stored and reported; its errors are one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from shell import shell

from selfflow.analysis.distances import measure
from selfflow.registries import metrics

OWN = Path(__file__).parent / "own_metric.py"


SMALL = ["--count", 12, "--resamples", 0, "--device", "cpu"]


def test_a_users_metric_is_measured_and_reported(runs, tmp_path):
    folder = shutil.copytree(runs["tiny"].path, tmp_path / "run")
    sizes = ["--count", 24, "--steps", 2, "--resamples", 4, "--device", "cpu"]
    (answer,) = shell(tmp_path, ["metrics", folder, *sizes, "--use", OWN])
    assert answer.status == 0, answer.errors
    assert "distance of means" in answer.output
    assert "Frechet distance" in answer.output
    stored = json.loads((folder / "metrics.json").read_text())
    for samples in ("drawn", "floor"):
        measured = stored[samples]["distance of means"]
        low, high = measured["interval"]
        assert low < measured["value"] < high
    drawn = stored["drawn"]["distance of means"]["value"]
    floor = stored["floor"]["distance of means"]["value"]
    assert drawn > floor
    # the values are in the folder, so the report does not need the user's file
    (answer,) = shell(tmp_path, ["report", folder, "--device", "cpu"])
    assert answer.status == 0, answer.errors
    assert "distance of means" in (folder / "report.html").read_text()


ERRORS = {
    "1 / 0": "metric 'mine' failed: ZeroDivisionError",
    "'many'": "metric 'mine' returned 'many'; expected a number",
    "{'precision': 1.0}": "both return precision",
}


def test_errors_of_a_metric_are_reported_in_one_line(runs, tmp_path):
    folder = shutil.copytree(runs["tiny"].path, tmp_path / "run")
    commands = []
    for number, body in enumerate(ERRORS):
        file = tmp_path / f"mine_{number}.py"
        file.write_text(
            "from selfflow import register_metric\n\n@register_metric('mine')\n"
            f"def mine(real, drawn):\n    return {body}\n"
        )
        commands.append(["metrics", folder, *SMALL, "--steps", 1, "--use", file])
    answers = shell(tmp_path, *commands)
    for answer, message in zip(answers, ERRORS.values(), strict=True):
        assert message in answer.refusal
    assert not (folder / "metrics.json").exists()


def test_unknown_metrics_and_a_repeated_name_are_refused():
    real = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match="kernel distance"):
        measure("kernel distanse", real, real)
    with pytest.raises(ValueError, match="'kernel distance' is registered twice"):
        metrics.register("kernel distance", lambda real, drawn: 0.0)
