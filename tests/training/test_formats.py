"""Runs of earlier formats open, sample, probe and resume with the same numbers."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.options import starting_point
from selfflow.training.config import Config, flatten
from selfflow.training.loop import train
from selfflow.training.run import Run

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUNS = FIXTURES / "runs/format-3"
sys.path.insert(0, str(FIXTURES))
from write_runs import config_of, features_of, measured  # noqa: E402

EXPECTED = {
    folder: json.loads((FIXTURES / "runs" / folder / "expected.json").read_text())
    for folder in ("format-3", "format-4")
}


@pytest.mark.parametrize(
    ("folder", "kind"),
    [(folder, kind) for folder, kinds in EXPECTED.items() for kind in kinds],
)
def test_an_older_run_resumes_samples_and_probes_as_before(
    folder, kind, tmp_path, monkeypatch
):
    shutil.copytree(FIXTURES / "runs" / folder / kind, tmp_path / kind)
    shutil.copytree(RUNS / "latents-data", tmp_path / "latents-data")
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
    actual = measured(run)
    expected = EXPECTED[folder][kind]
    for name, values in expected["samples"].items():
        assert actual["samples"][name] == pytest.approx(
            values, rel=near, abs=20 * near
        ), name
    assert actual["probe"] == pytest.approx(expected["probe"], rel=1e-3, abs=0.03)


def test_an_old_run_keeps_its_defaults(tmp_path, capsys):
    shutil.copytree(RUNS / "digits", tmp_path / "digits")
    old = Run.open(tmp_path / "digits", "cpu").config
    asked = replace(old, defaults=4)
    assert old.defaults == 3
    assert Config().defaults == 4
    assert not Run.open(tmp_path / "digits", "cpu").teacher.t_embedder.fp32
    with pytest.raises(ValueError, match="defaults: 3 in the folder, 4 requested"):
        Run.create(tmp_path / "digits", asked, Run.open(tmp_path / "digits").inputs)
    for _ in range(2):  # of format 3, then of the present one
        run = train(asked, tmp_path, "cpu", bar=False)
        assert run.config == old
        assert run.state()["step"] == 8
        assert (
            "digits: resumes with defaults 3, as it began\n" in capsys.readouterr().out
        )
    with pytest.raises(ValueError, match="sincos"):  # a second data set is not left out
        train(
            replace(asked, data=(asked.data, DataConfig("notes"))),
            tmp_path,
            "cpu",
            bar=False,
        )
    capsys.readouterr()
    new = train(replace(asked, name="new"), tmp_path, "cpu", bar=False)
    assert new.teacher.t_embedder.fp32
    assert new.config.defaults == 4
    assert "defaults" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="defaults: 4 in the folder, 3 requested"):
        train(replace(new.config, defaults=3), tmp_path, "cpu", bar=False)


def test_the_command_line_keeps_an_old_runs_defaults(tmp_path, capsys):
    shutil.copytree(RUNS / "digits", tmp_path / "digits")
    config = starting_point(
        ["train", "--config", str(tmp_path / "digits/config.json")]
    )["config"]
    assert config.defaults == 3
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in flatten(config_of("digits").explicit()).items()
    ]
    main(["train", "--folder", str(tmp_path), "--device", "cpu", *options])
    assert "as it began" in capsys.readouterr().out
    assert Run.open(tmp_path / "digits").config.defaults == 3


@pytest.mark.parametrize("value", [0, 2, 5])
def test_other_defaults_are_refused(value):
    with pytest.raises(ValueError, match=f"defaults is {value}; use 4, or 3"):
        Config(defaults=value)
