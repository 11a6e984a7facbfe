"""An exported model opens without data or run and gives the samples of the run."""

import json

import huggingface_hub
import programs
import pytest
import torch
from safetensors.torch import load_file, save_file

from selfflow.cli import main
from selfflow.training.export import Model, export, export_diffusers, load
from selfflow.training.loop import train
from selfflow.training.run import Run, run_at
from selfflow.training.watching import Listing


def test_samples_of_an_export_are_those_of_the_run_in_another_process(runs, tmp_path):
    run = runs["tiny"]
    place = export(run, tmp_path / "model")
    script = (
        "import sys, torch\nfrom selfflow import load\nfrom safetensors.torch import "
        "save_file\n"
        "model = load(sys.argv[1], 'cpu')\nsave_file({'images': model.sample([1, 2, "
        "3], steps=3)['image']}, sys.argv[2])"
    )
    loaded = programs.run("-c", script, place, tmp_path / "drawn", cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert torch.equal(
        load_file(tmp_path / "drawn")["images"], run.sample([1, 2, 3], steps=3)["image"]
    )
    assert {path.name for path in place.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert load(place, "cpu").class_names == run.class_names
    assert load(place, "cpu").state()["step"] == 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_computes_in_float32(runs, tmp_path, dtype):
    run = runs["tiny"]
    half = load(export(run, tmp_path / "model", dtype), "cpu")
    assert {
        value.dtype
        for value in load_file(tmp_path / "model/model.safetensors").values()
    } == {getattr(torch, dtype)}
    assert {value.dtype for value in half.teacher.parameters()} == {torch.float32}
    drawn = half.sample([1, 2], steps=3)["image"]
    torch.testing.assert_close(
        drawn, run.sample([1, 2], steps=3)["image"], atol=0.05, rtol=0.05
    )
    assert not torch.equal(drawn, run.sample([1, 2], steps=3)["image"])


def test_the_card_names_data_steps_and_losses(runs, tmp_path):
    run = runs["tiny"]
    place = export(run, tmp_path / "model", metrics={"accuracy": 0.75}, license="mit")
    card = (place / "README.md").read_text()
    assert "| accuracy | 0.75 |" in card
    assert "\nmit\n" in card
    assert f"on {run.timing['device'].iloc[-1]}" in card
    again = export(load(place, "cpu"), tmp_path / "again")
    assert "| accuracy | 0.75 |" in (again / "README.md").read_text()
    config = json.loads((place / "config.json").read_text())
    for name in ("metrics", "seconds", "device", "objective_sha256"):
        del config["exported"][name]  # as an earlier version wrote it
    (place / "config.json").write_text(json.dumps(config))
    earlier = export(load(place, "cpu"), tmp_path / "earlier")
    assert "training time not logged" in (earlier / "README.md").read_text()
    assert f"{run.log['validation_flow_loss'].dropna().iloc[-1]:.4f}" in card
    assert "12 steps" in card
    assert "digits" in card
    header = huggingface_hub.ModelCard(card).data.to_dict()
    (result,) = huggingface_hub.ModelCard(card).data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_name) == (
        "accuracy",
        0.75,
        "digits",
    )
    assert header["pipeline_tag"] == "unconditional-image-generation"
    assert header["library_name"] == "selfflow"
    assert header["license"] == "mit"
    assert "flow-matching" in header["tags"]


def test_an_export_of_an_earlier_step_has_the_losses_and_cost_of_that_step(
    runs, tmp_path
):
    run = runs["tiny"]
    step = int(run.checkpoints()[0].name.removeprefix("step-"))
    card = (export(run_at(run, step), tmp_path / "model") / "README.md").read_text()
    losses = run.log.query("step <= @step")["flow_loss"].dropna()
    assert f"{step} steps" in card
    assert f"{losses.iloc[-1]:.4f}" in card
    assert step < run.config.training.steps


def test_an_export_replaces_an_export_and_nothing_else(runs, tmp_path):
    place = export(runs["tiny"], tmp_path / "model")
    assert export(load(place, "cpu"), place, "bfloat16") == place
    assert load(place, "cpu").state()["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for there in (foreign, runs["tiny"].path, foreign / "thesis.txt"):
        with pytest.raises(
            ValueError, match="is not empty and holds no exported model"
        ):
            export(runs["tiny"], there)
    assert (foreign / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        export(runs["tiny"], tmp_path / "other", "float8")


def test_invalid_exports_are_refused_in_one_line(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is a training run, not an exported model"):
        load(runs["tiny"].path)
    place = export(runs["tiny"], tmp_path / "tiny")
    with pytest.raises(
        ValueError, match="holds an exported model, which cannot be trained"
    ):
        train(runs["tiny"].config, tmp_path)
    weights = load_file(place / "model.safetensors")
    next(iter(weights.values())).flatten()[0] += 1
    save_file(weights, place / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load(place)
    (place / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        load(place)
    stored = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(stored | {"format": 99}))
    with pytest.raises(ValueError, match="it has format 99"):
        load(place)


def test_an_export_is_listed_as_an_export(runs, tmp_path):
    place = export(runs["tiny"], tmp_path / "exported")
    with pytest.raises(FileNotFoundError, match="no optimizer"):
        load(place, "cpu").load("optimizer")
    listing = Listing(tmp_path)
    listing.look()
    assert listing.runs["exported"].state == "exported at step 12"
    assert Run.open(place, "cpu").sample([1], steps=1)["image"].isfinite().all()


def test_the_head_goes_with_the_weights_and_is_compared_with_its_checksum(
    runs, tmp_path
):
    run = runs["tiny"]
    place = export(run, tmp_path / "model")
    model = load(place, "cpu")
    for name, value in run.load("objective").items():
        assert torch.equal(model.load("objective")[name], value)
    again = load(export(model, tmp_path / "again"), "cpu")
    assert again.load("objective").keys() == run.load("objective").keys()
    with pytest.raises(FileNotFoundError, match="which has no optimizer"):
        model.load("optimizer")
    (place / "objective.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="objective.safetensors is damaged"):
        load(place, "cpu").load("objective")
    plain = load(export(runs["vanilla"], tmp_path / "vanilla"), "cpu")
    with pytest.raises(FileNotFoundError, match="which has no objective"):
        plain.load("objective")


# ---------------------------------------------------------------- the Hub


def test_a_saved_model_opens_again_also_from_its_own_folder(runs, tmp_path):
    model = load(export(runs["tiny"], tmp_path / "model", license="mit"), "cpu")
    assert isinstance(model, Model)
    (tmp_path / "model/probes.json").write_text("{}")  # a record, which stays here
    model.save_pretrained(tmp_path / "saved")
    saved = Model.from_pretrained(str(tmp_path / "saved"), device="cpu")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == FILES
    drawn = model.sample([1, 2], steps=2)["image"]
    assert torch.equal(saved.sample([1, 2], steps=2)["image"], drawn)
    assert saved.exported == model.exported
    assert saved.config == model.config
    before = (tmp_path / "saved/config.json").read_bytes()
    saved.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/config.json").read_bytes() == before
    with pytest.raises(ValueError, match="is a training run"):
        Model.from_pretrained(runs["tiny"].path)


FILES = {"config.json", "model.safetensors", "objective.safetensors", "README.md"}


def test_a_push_sends_four_files_and_a_download_asks_for_them(
    runs, tmp_path, monkeypatch, capsys
):
    sent = {}

    class Hub:  # in place of huggingface_hub.HfApi
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            sent.update(options, repo_id=repo_id)
            sent["files"] = {p.name: p.read_bytes() for p in folder_path.iterdir()}
            return "https://huggingface.co/me/tiny/commit/1"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    place = tmp_path / "model"
    main(
        ["export", str(runs["tiny"].path), str(place), "--license", "mit"]
        + ["--push", "me/tiny"]
    )
    assert (
        "uploaded: https://huggingface.co/me/tiny/commit/1" in capsys.readouterr().out
    )
    assert (sent["repo_id"], sent["repo_type"], sent["token"]) == (
        "me/tiny",
        "model",
        None,
    )
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    assert sent["files"].keys() == FILES
    assert sent["files"] == files

    def snapshot(repo_id, allow_patterns, revision, **options):
        assert (repo_id, revision) == ("me/tiny", "v1")
        assert {*allow_patterns} == FILES
        return str(place)

    def config_file(repo_id, filename, **options):
        return str(place / filename)

    monkeypatch.setattr("selfflow.training.export.snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", config_file)
    model = Model.from_pretrained("me/tiny", revision="v1", device="cpu")
    drawn = runs["tiny"].sample([1], steps=2)["image"]
    assert torch.equal(model.sample([1], steps=2)["image"], drawn)


def test_the_layout_of_diffusers_is_for_its_backbones(runs, tmp_path):
    with pytest.raises(ValueError, match="which is no model of diffusers"):
        export_diffusers(runs["tiny"], tmp_path / "model")
    assert not (tmp_path / "model").exists()
