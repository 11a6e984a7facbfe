"""The trained models of the project open, draw samples and match their cards."""

import re

import pytest

from selfflow.analysis.features import FeatureStore
from selfflow.cli import main
from selfflow.shipped import shipped
from selfflow.training.models import model, models

NAMES = models()["model"].tolist()
LIMIT = 40e6  # bytes of all models together


@pytest.mark.parametrize("name", NAMES)
def test_a_model_draws_finite_samples_and_its_card_has_measurements(name):
    run = model(name, "cpu")
    assert run.config.name == name
    captioned = run.config.shared.condition == "caption"
    labels = ["a red ring"] if captioned else [0]
    for signal in run.sample(labels, steps=2).values():
        assert signal.isfinite().all()
    card = (run.path / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert f"Seed {run.config.seed}," in card
    for measure, value in run.exported["metrics"].items():
        assert f"| {measure} | {value:.4g} |" in card


def test_models_come_in_pairs_that_differ_in_the_objective_alone():
    for data, pair in models().groupby("data"):
        assert set(pair["objective"]) == {"flow_matching", "self_flow"}, data
        first, second = (model(name, "cpu").config for name in pair["model"])
        assert pair["steps"].nunique() == 1
        assert first.seed == second.seed
        assert first.data == second.data
        assert first.model == second.model
        assert first.training.batch == second.training.batch


def test_samples_and_measurements_are_stored_in_the_cache_not_with_the_model(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = model("fashion-self-flow", "cpu")
    before = sorted(path.name for path in run.path.iterdir())
    main(["sample", str(run.path), "--steps", "2", "--labels", "0"])
    assert str(tmp_path) in capsys.readouterr().out
    assert run.records.is_relative_to(tmp_path)
    assert any((run.records / "samples").glob("*.safetensors"))
    assert FeatureStore.of(run).folder == run.records / "features"
    main(
        ["metrics", str(run.path), "--count", "12", "--steps", "1", "--resamples", "0"]
    )
    assert (run.records / "metrics.json").is_file()
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_all_models_together_are_small():
    files = shipped("models").glob("*/*")
    assert sum(file.stat().st_size for file in files) < LIMIT


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=re.escape(", ".join(NAMES))):
        model("imagenet")


def test_the_shell_lists_them(capsys):
    main(["models"])
    output = capsys.readouterr().out
    assert all(name in output for name in NAMES)
