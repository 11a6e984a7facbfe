"""An exported adapter opens with diffusers' own loader, also under the key names of
ComfyUI, and files that are no adapter are refused.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.method.adapters import add_lora, lora_file, trained_weights
from selfflow.method.diffusers_backbone import FAMILIES, DiffusersBackbone
from selfflow.method.options import LoraConfig, ModelConfig, ObjectiveConfig
from selfflow.training.config import Config, TrainConfig
from selfflow.training.export import export_diffusers, export_lora
from selfflow.training.loop import train
from selfflow.training.run import Run

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from test_diffusers import (  # noqa: E402
    CASES,
    condition_of,
    example,
    inputs_of,
    model_of,
)

LOADED = [name for name in CASES if name not in ("dit", "pixart")]
# diffusers' readers of ComfyUI's names
READERS = {
    "flux2": "Flux2LoraLoaderMixin",
    "flux": "FluxLoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "wan": "WanLoraLoaderMixin",
    "ltx": "LTXVideoLoraLoaderMixin",
}


def adapted(name, targets=("blocks",), **options):
    """A backbone with an adapter whose factors are not 0."""
    case = CASES[name]
    backbone = DiffusersBackbone(model_of(case), inputs_of(case)).eval()
    add_lora(backbone, LoraConfig(2, targets=targets, **options))
    for key, parameter in backbone.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    return case, backbone


@torch.no_grad()
def velocity(case, backbone):
    x, values, levels = example(case)
    return backbone(x, levels, condition_of(case, values)).velocity


@torch.no_grad()
def loaded_velocity(case, tensors):
    """The velocity of a plain base with an adapter that diffusers loads."""
    plain = model_of(case)
    plain.load_lora_adapter(tensors)
    return velocity(case, DiffusersBackbone(plain, inputs_of(case)).eval())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", LOADED)
def test_the_loader_of_diffusers_gives_the_same_velocity(name, dora):
    case, backbone = adapted(name, alpha=3.0, dora=dora)
    expected = velocity(case, backbone)
    tensors = lora_file(trained_weights(backbone), 3.0 / 2)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(loaded_velocity(case, tensors), expected, **close)
    base = velocity(case, DiffusersBackbone(model_of(case), inputs_of(case)).eval())
    assert (base - expected).abs().max() > 1e-2
    # without alpha the velocity differs
    unscaled = lora_file(trained_weights(backbone), 1.0)
    assert (loaded_velocity(case, unscaled) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", LOADED)
def test_the_names_for_comfyui_are_read_back_by_diffusers(name):
    case, backbone = adapted(name, alpha=3.0)
    kind = FAMILIES[case.family].model_class
    theirs = lora_file(trained_weights(backbone), 3.0 / 2, kind)
    reader = getattr(diffusers.loaders, READERS[case.family], None)
    if reader is None:
        module = diffusers.loaders.lora_pipeline
        reader = getattr(module, READERS[case.family])
    read = reader.lora_state_dict(dict(theirs))
    read = read[0] if isinstance(read, tuple) else read
    expected = lora_file(trained_weights(backbone), 3.0 / 2)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)
    first = "diffusion_model." if case.family in ("wan", "ltx") else "transformer."
    assert all(key.startswith(first) for key in theirs)


def test_names_of_wan_outside_its_blocks_are_translated_too():
    outside = ("time_proj", "linear_1", "linear_2")
    case, backbone = adapted("wan", ("blocks", *outside))
    weights = trained_weights(backbone)
    theirs = lora_file(weights, 1.0, "WanTransformer3DModel")
    names = {key.split(".")[1] for key in theirs}
    assert names == {"blocks", "time_projection", "time_embedding", "text_embedding"}
    reader = diffusers.loaders.lora_pipeline.WanLoraLoaderMixin
    read = reader.lora_state_dict(dict(theirs))
    expected = lora_file(weights, 1.0)
    assert all(torch.equal(read[key], expected[key]) for key in expected)


# ---------------------------------------------------------------- a run


def settings(name, model, **training):
    return Config(
        name=name,
        data=DataConfig("shapes", size=16, patch=4, condition="caption"),
        model=model,
        objective=ObjectiveConfig("self_flow", student_layer=1, teacher_layer=2),
        training=TrainConfig(
            steps=2,
            batch=4,
            lr=1e-2,
            validate_every=2,
            validation=4,
            sample_every=0,
            **training,
        ),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Flux2 that was trained here."""
    model = ModelConfig("flux2", heads=2, head_width=8, layers=1, single_layers=2)
    folder = tmp_path_factory.mktemp("base")
    return train(settings("base", model), folder, "cpu", bar=False)


def tuned(base, folder, **lora):
    config = settings(
        "tuned", base.config.model, start_from=str(base.path), ema={"fast": 0.5}
    )
    chosen = {"rank": 2, "alpha": 6.0, "targets": ("blocks",)} | lora
    return train(replace(config, lora=LoraConfig(**chosen)), folder, "cpu", bar=False)


def plain_velocity(model):
    torch.manual_seed(1)
    x = torch.randn(2, 16, 48)
    text = torch.randn(2, 5, 16)
    places = torch.cartesian_prod(
        torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)
    )
    letters = torch.stack([*[torch.zeros(5)] * 3, torch.arange(5.0)], 1)
    t = torch.full((2,), 0.3)
    with torch.no_grad():
        return model(x, text, t, places, letters, return_dict=False)[0]


@pytest.mark.parametrize("dora", [False, True])
def test_an_exported_adapter_on_its_base_is_the_average_of_the_run(
    base, tmp_path, dora, capsys
):
    run = tuned(base, tmp_path, dora=dora)
    exported_base = export_diffusers(base, tmp_path / "whole")
    place = tmp_path / "adapter"
    main(["export", str(run.path), str(place), "--layout", "lora", "--license", "mit"])
    assert "ComfyUI" in capsys.readouterr().out
    names = {path.name for path in place.iterdir()} - {"README.md", "config.json"}
    weights = "pytorch_lora_weights.safetensors"
    assert names == {weights} if dora else {weights, "comfyui.safetensors"}

    kind = diffusers.Flux2Transformer2DModel
    for average in ("teacher", "fast"):
        expected = run.average(average)
        if average != "teacher":
            export_lora(run, place, average=average)
        model = kind.from_pretrained(exported_base).eval()
        before = plain_velocity(model)
        model.load_lora_adapter(place, weight_name=weights)
        close = {"atol": 1e-5, "rtol": 1e-5}
        after = plain_velocity(model)
        torch.testing.assert_close(after, plain_velocity(expected.model), **close)
        assert (after - before).abs().max() > 1e-4
    stored = json.loads((place / "config.json").read_text())["lora"]
    assert stored["base"]["fingerprint"] == run.start["fingerprint"]
    with safe_open(place / weights, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["transformer.lora_alpha"] == header["transformer.r"] == 2
    card = (place / "README.md").read_text()
    assert "load_lora_adapter" in card
    assert "library_name: diffusers" in card
    assert ("DoRA" if dora else "LoRA") in card
    assert str(tmp_path) not in card
    half = export_lora(run, place, "bfloat16")
    assert {t.dtype for t in load_file(half / weights).values()} == {torch.bfloat16}


def test_a_run_without_an_adapter_is_refused_in_one_line(base, tmp_path, runs):
    run = tuned(base, tmp_path)
    for unadapted in (base, runs["tiny"]):
        with pytest.raises(ValueError, match="has no adapter .lora.rank."):
            export_lora(unadapted, tmp_path / "adapter")
    with pytest.raises(SystemExit):
        place = str(tmp_path / "adapter")
        main(["export", str(run.path), place, "--layout", "lora", "--push", "me/it"])
    # a new text width replaces a layer, which an adapter cannot hold
    reopened = Run.open(run.path, "cpu")
    reopened.start["left"] = {"model.context_embedder.weight": "condition"}
    with pytest.raises(ValueError, match="context_embedder began anew"):
        export_lora(reopened, tmp_path / "adapter")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        export_lora(run, tmp_path / "thesis")
    assert not (tmp_path / "adapter").exists()


def test_classes_without_a_loader_are_refused(base, tmp_path):
    run = tuned(base, tmp_path)
    reopened = Run.open(run.path, "cpu")
    case = CASES["pixart"]
    vars(reopened)["teacher"] = DiffusersBackbone(model_of(case), inputs_of(case))
    with pytest.raises(ValueError, match="no adapters into PixArtTransformer2DModel"):
        export_lora(reopened, tmp_path / "adapter")
