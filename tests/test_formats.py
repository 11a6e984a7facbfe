"""Runs that earlier versions wrote open, sample, probe and go on with the numbers they had then."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from selfflow.run import Run
from selfflow.training import train

RUNS = Path(__file__).parent / "fixtures/runs/format-3"
sys.path.insert(0, str(RUNS.parents[1]))
from write_runs import KINDS, features_of, measured  # noqa: E402

EXPECTED = json.loads((RUNS / "expected.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_format_3_goes_on_samples_and_probes_as_it_did(kind, tmp_path, monkeypatch):
    for name in (kind, "latents-data"):
        shutil.copytree(RUNS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)  # where the relative path of the latents leads
    before = Run.open(kind, "cpu")
    logged = before.log.set_index("step")
    run = train(before.config, tmp_path, "cpu", features_of(kind), bar=False)
    again = run.log.set_index("step")
    near = 2e-3 if kind == "bf16" else 2e-5
    assert again.index.tolist() == list(range(1, 9))
    for column in ("total", "flow_loss", "grad_norm", "validation_flow_loss"):
        assert again[column].dropna().tolist() == pytest.approx(
            logged[column].dropna().tolist(), near
        ), column
    found, expected = measured(run), EXPECTED[kind]
    for name, values in expected["samples"].items():
        assert found["samples"][name] == pytest.approx(values, rel=near, abs=20 * near), name
    assert found["probe"] == pytest.approx(expected["probe"], rel=1e-3, abs=0.03)
