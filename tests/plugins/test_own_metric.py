"""A metric in a user's own file: measured, kept, printed and reported by another
process; what it does wrong is one line.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selfflow.analysis.distances import measure
from selfflow.registries import metrics

OWN = Path(__file__).parent / "own_metric.py"


def shell(use, *args):
    command = [sys.executable, "-m", "selfflow.cli", *map(str, args), "--use", str(use)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_an_own_metric_is_measured_and_reported(runs, tmp_path):
    folder = shutil.copytree(runs["tiny"].path, tmp_path / "run")
    done = shell(
        OWN,
        "metrics",
        folder,
        "--count",
        24,
        "--steps",
        2,
        "--resamples",
        4,
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    assert "distance of means" in done.stdout and "Frechet distance" in done.stdout
    stored = json.loads((folder / "metrics.json").read_text())
    for samples in ("drawn", "floor"):
        measured = stored[samples]["distance of means"]
        low, high = measured["interval"]
        assert low < measured["value"] < high
    assert (
        stored["drawn"]["distance of means"]["value"]
        > stored["floor"]["distance of means"]["value"]
    )
    # the numbers are in the folder, so the report needs no user's file
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "selfflow.cli",
            "report",
            str(folder),
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "distance of means" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "body, message",
    [
        ("1 / 0", "metric 'mine' failed: ZeroDivisionError"),
        ("'many'", "metric 'mine' returned 'many'; expected a number"),
        ("{'precision': 1.0}", "both return precision"),
    ],
)
def test_mistakes_of_a_metric_are_reported_in_one_line(runs, tmp_path, body, message):
    file = tmp_path / "mine.py"
    file.write_text(
        "from selfflow import register_metric\n\n@register_metric('mine')\n"
        f"def mine(real, drawn):\n    return {body}\n"
    )
    folder = shutil.copytree(runs["tiny"].path, tmp_path / "run")
    done = shell(
        file,
        "metrics",
        folder,
        "--count",
        12,
        "--steps",
        1,
        "--resamples",
        0,
        "--device",
        "cpu",
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    assert not (folder / "metrics.json").exists()


def test_unknown_metrics_and_a_second_one_of_a_name_are_refused():
    real = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match="kernel distance"):
        measure("kernel distanse", real, real)
    with pytest.raises(ValueError, match="'kernel distance' is registered twice"):
        metrics.register("kernel distance", lambda real, drawn: 0.0)
