"""A run can start from weights of another run, a backbone or a checkpoint.

Weights that do not fit are refused; runs with adapters resume, open and export.
"""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_same, parts_of
from safetensors.torch import load_file, save_file

from selfflow.analysis.benchmark import flops_per_step
from selfflow.analysis.preflight import preflight
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.disk import sha256
from selfflow.method import reference
from selfflow.method.backbone import Inputs
from selfflow.method.objective import Projector
from selfflow.method.options import LoraConfig, ModelConfig, ObjectiveConfig
from selfflow.method.schedule import NoiseLevels
from selfflow.method.tokens import Part
from selfflow.method.transformer import Transformer, TransformerConfig
from selfflow.training.config import Config, TrainConfig
from selfflow.training.export import export, load
from selfflow.training.finetuning import start_report, start_weights
from selfflow.training.loop import train
from selfflow.training.run import Run, new_backbone, run_at
from selfflow.training.state import start_state

CPU = torch.device("cpu")


def beginning(place, rank=0, name="next", **options):
    training = replace(
        TINY.training, start_from=str(place), steps=4, save_every=2, validate_every=4
    )
    training = replace(training, sample_every=0)
    lora = LoraConfig(rank, **options)
    return replace(TINY, name=name, training=training, lora=lora)


def resumed(config, uninterrupted, folder):
    "Train again from the checkpoint of step 2 in a copy of a run."
    shutil.copytree(uninterrupted.path, folder / config.name)
    shutil.rmtree(folder / config.name / "checkpoints/step-00000004")
    return train(config, folder, "cpu", bar=False)


def test_a_run_begins_with_the_average_of_another_and_then_does_not_need_it(
    runs, tmp_path, capsys
):
    origin = tmp_path / "origin"
    shutil.copytree(runs["tiny"].path, origin)
    config = beginning(f"{origin}@8")
    state = start_state(config, Sources(config.data), CPU)
    earlier = run_at(runs["tiny"], 8)
    for model in (state.student, state.teacher):
        for name, value in earlier.load("teacher").items():
            assert torch.equal(model.state_dict()[name], value)
    for name, value in earlier.load("objective").items():
        assert torch.equal(state.objective.state_dict()[name], value)
    run = train(config, tmp_path / "whole", "cpu", bar=False)
    report = capsys.readouterr().out
    assert "of run" in report
    assert "step 8" in report
    assert "objective: taken" in report
    stored = json.loads((run.path / "config.json").read_text())["start"]
    assert stored["kind"] == "run"
    assert stored["step"] == 8
    assert not stored["left"]
    before = earlier.load("teacher")["blocks.0.attn.qkv.weight"]
    assert not torch.equal(run.load("model")["blocks.0.attn.qkv.weight"], before)
    shutil.rmtree(origin)
    assert_same(run, resumed(config, run, tmp_path / "again"))
    # without a checkpoint nothing is lost, but the origin is needed
    shutil.rmtree(tmp_path / "again/next/checkpoints")
    with pytest.raises(ValueError, match="origin"):
        train(config, tmp_path / "again", "cpu", bar=False)
    shutil.copytree(earlier.path, origin)
    with pytest.raises(ValueError, match="different settings"):
        train(beginning(f"{origin}@4"), tmp_path / "whole", "cpu", bar=False)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_resume_bit_for_bit_and_are_exported_as_one_model(
    runs, tmp_path, dora
):
    pytest.importorskip("peft")
    base = export(runs["tiny"], tmp_path / "base")
    config = beginning(base, rank=2, dora=dora)
    if dora:  # recomputed in the backward pass
        checkpointing = replace(config.training, checkpointing=True)
        config = replace(config, training=checkpointing)
    run = train(config, tmp_path / "whole", "cpu", bar=False)
    assert_same(run, resumed(config, run, tmp_path / "again"))

    parts = {name for name in parts_of(run) if name.startswith(("model", "teacher"))}
    assert all(".lora_" in name for name in parts)
    assert any("magnitude" in name for name in parts) == dora
    state = json.loads((run.checkpoint / "state.json").read_text())
    assert state["base"] == run.start["fingerprint"]
    student = run.load("model")
    teacher = run.load("teacher")
    assert any(not torch.equal(student[name], teacher[name]) for name in student)

    # base and adapter merged are the state that trains
    trained = start_state(config, Sources(config.data), CPU)
    trained.restore(run.checkpoint)
    batch = Sources(config.data).take("digits", torch.arange(4))
    levels = NoiseLevels.single(torch.full((4,), 0.5), batch.x0.shape[1])
    inputs = (batch.x0, levels, batch.condition)
    exported = load(export(run, tmp_path / "exported"), "cpu")
    (tmp_path / "base").rename(tmp_path / "moved")  # an export stands alone
    with torch.no_grad():
        expected = trained.teacher.eval()(*inputs).velocity
        for opened in (run.teacher, exported.teacher):
            torch.testing.assert_close(
                opened(*inputs).velocity, expected, atol=1e-6, rtol=1e-5
            )
            assert opened.state_dict().keys() == runs["tiny"].load("teacher").keys()

    with pytest.raises(ValueError, match="base cannot be read.*base"):
        Run.open(run.path, "cpu").teacher  # noqa: B018
    # the same base elsewhere is as good; another one is refused
    moved = replace(config.training, start_from=str(tmp_path / "moved"))
    again = replace(config, training=moved)
    shutil.rmtree(run.path / "checkpoints/step-00000004")
    assert train(again, tmp_path / "whole", "cpu", bar=False).teacher is not None
    export(run_at(runs["tiny"], 4), tmp_path / "moved")
    for attempt in (
        lambda: Run.open(run.path, "cpu").teacher,
        lambda: preflight(Run.open(run.path, "cpu"), device="cpu"),
        lambda: train(again, tmp_path / "whole", "cpu", bar=False),
    ):
        with pytest.raises(ValueError, match="have changed since"):
            attempt()


def test_adapters_of_a_backbone_object_that_is_passed_to_train(runs, tmp_path):
    pytest.importorskip("peft")
    backbone = copy.deepcopy(runs["tiny"].teacher).requires_grad_(True)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    training = replace(TINY.training, steps=4, save_every=2, validate_every=4)
    training = replace(training, sample_every=0)
    model = ModelConfig("given")
    lora = LoraConfig(2, targets=("mlp",))
    config = replace(TINY, name="own", model=model, lora=lora, training=training)
    run = train(config, tmp_path / "whole", "cpu", bar=False, backbone=backbone)
    assert run.start["kind"] == "given backbone"
    assert not run.start["left"]
    assert all(".lora_" in name for name in run.load("model"))
    merged = run.teacher.state_dict()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), "the object itself is not changed"
        adapted = ".mlp.fc" in name and name.endswith("weight")
        assert torch.equal(merged[name], value) != adapted, name
    shutil.copytree(run.path, tmp_path / "again" / "own")
    shutil.rmtree(tmp_path / "again/own/checkpoints/step-00000004")
    again = train(config, tmp_path / "again", "cpu", bar=False, backbone=backbone)
    assert_same(run, again)
    # an object with other weights is no base of these adapters
    shutil.rmtree(tmp_path / "again/own/checkpoints/step-00000004")
    changed = copy.deepcopy(backbone)
    changed.blocks[0].mlp.fc1.bias.data += 1
    with pytest.raises(ValueError, match="have changed since"):
        train(config, tmp_path / "again", "cpu", bar=False, backbone=changed)


def test_layers_that_depend_on_the_data_may_differ_and_are_named(runs):
    config = beginning(runs["tiny"].path)
    inputs_there = runs["tiny"].inputs
    wider = Inputs((replace(inputs_there.parts[0], channels=12),), classes=3)
    for inputs, expected in (
        (replace(inputs_there, classes=3), {"y_embedder"}),
        (wider, {"y_embedder", "x_embedder.image", "final_layer.linear.image"}),
    ):
        model = new_backbone(config, inputs)
        untouched = {name: value.clone() for name, value in model.state_dict().items()}
        start, _ = start_weights(model, config)
        assert {name.rpartition(".")[0] for name in start["left"]} == expected
        before = runs["tiny"].load("teacher")
        for name, value in model.state_dict().items():
            source = untouched if name in start["left"] else before
            assert torch.equal(value, source[name]), name
        assert "condition: 4 x 16 here, 11 x 16 there" in "\n".join(start_report(start))
        model = new_backbone(replace(config, lora=LoraConfig(2)), inputs)
        start_weights(model, replace(config, lora=LoraConfig(2)))
        free = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name in free if ".lora_" not in name} == {*start["left"]}


def test_starts_that_do_not_fit_are_refused_before_there_is_a_folder(runs, tmp_path):
    run = runs["tiny"]
    broken = export(run, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["blocks.1.mlp.fc1.bias"][0] = torch.nan
    save_file(weights, broken / "model.safetensors")
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    wan = tmp_path / "wan"
    wan.mkdir()
    (wan / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')

    def refused(place, model=TINY.model, lora=None):
        config = replace(beginning(place), model=model, lora=lora or LoraConfig())
        with pytest.raises(ValueError) as error:
            train(config, tmp_path / "runs", "cpu", bar=False)
        assert not (tmp_path / "runs" / "next").exists()
        return str(error.value)

    assert "there is no" in refused(tmp_path / "nothing")
    assert "Did you mean 'fashion-self-flow'" in refused("fashion-selfflow")
    assert "is no run" in refused(tmp_path / "empty")
    assert "pytorch_model.bin is a pickle" in refused(pickled)
    assert "is damaged" in refused(broken)
    assert "no checkpoint of step 5" in refused(f"{run.path}@5")
    assert "WanTransformer3DModel" in refused(wan)
    deeper = refused(run.path, replace(TINY.model, depth=6))
    assert "depth is 6 here, 4 there" in deeper
    assert "nothing was loaded" in deeper
    heads = refused(run.path, replace(TINY.model, heads=1))
    assert "heads is 1 here, 2 there" in heads, "no shape shows this difference"
    assert "Did you mean 'qkv'" in refused(run.path, lora=LoraConfig(2, None, ("qvk",)))
    stored = json.loads((broken / "config.json").read_text())
    stored["exported"]["sha256"] = sha256(broken / "model.safetensors")
    (broken / "config.json").write_text(json.dumps(stored))
    assert "NaN or infinite numbers" in refused(broken)


def test_conflicting_settings_of_a_start_are_refused():
    with pytest.raises(ValueError, match="leave one of them out"):
        Config(
            model=ModelConfig("wan", folder="a"), training=TrainConfig(start_from="b")
        )
    with pytest.raises(ValueError, match="no trained weights to adapt"):
        Config(lora=LoraConfig(4))


def test_the_published_checkpoint_begins_a_run(tmp_path):
    part = Part("image", 4, (1, 4, 4))
    inputs = Inputs((part,), classes=10)
    torch.manual_seed(1)
    shape = TransformerConfig((part,), classes=10, width=16, depth=4, heads=2)
    published = Transformer(shape)
    projector = Projector(16)
    published.open_gates()
    file = tmp_path / "published.safetensors"
    reference.save(file, published, projector)
    config = beginning(file)
    model = new_backbone(config, inputs)
    start, head = start_weights(model, config)
    assert start["kind"] == "published checkpoint"
    assert not start["left"]
    for name, value in published.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    assert torch.equal(head["projector.0.weight"], projector[0].weight)
    more_heads = replace(config, model=replace(config.model, heads=4))
    with pytest.raises(ValueError, match="heads is 4 here, 2 there"):
        start_weights(new_backbone(more_heads, inputs), more_heads)


# ---------------------------------------------------------------- diffusers


def of_diffusers(folder):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.Flux2Transformer2DModel(
        in_channels=48,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    model.save_pretrained(folder)
    return model


def on_captions(name, model, **training):
    return Config(
        name=name,
        data=DataConfig("shapes", size=16, patch=4, condition="caption"),
        model=model,
        objective=ObjectiveConfig("self_flow", student_layer=1, teacher_layer=2),
        training=TrainConfig(
            batch=4,
            log_every=1,
            validate_every=4,
            validation=4,
            save_every=2,
            sample_every=0,
            **training,
        ),
    )


def test_a_run_from_a_folder_of_diffusers_opens_and_resumes_without_it(tmp_path):
    of_diffusers(tmp_path / "folder")
    model = ModelConfig("flux2", folder=str(tmp_path / "folder"))
    config = on_captions("full", model, steps=2)
    run = train(config, tmp_path, "cpu", bar=False)
    assert run.start["shape"]["in_channels"] == 48
    assert run.start["fingerprint"]
    shutil.rmtree(tmp_path / "folder")
    opened = Run.open(run.path, "cpu")
    assert flops_per_step(opened.config, opened.inputs, start=opened.start) > 1e6
    samples = opened.sample(["a red circle"], steps=2)["image"]
    assert samples.isfinite().all()
    assert load(export(opened, tmp_path / "exported"), "cpu").teacher.depth == 3
    longer = replace(config, training=replace(config.training, steps=3))
    assert train(longer, tmp_path, "cpu", bar=False).state()["step"] == 3


def test_adapters_on_a_folder_of_diffusers_train_the_new_text_layers_too(tmp_path):
    pytest.importorskip("peft")
    model = of_diffusers(tmp_path / "folder")
    config = on_captions(
        "adapted",
        ModelConfig("flux2"),
        steps=2,
        start_from=str(tmp_path / "folder"),
        checkpointing=True,
    )
    config = replace(config, lora=LoraConfig(2, targets=("attention", "mlp")))
    run = train(config, tmp_path, "cpu", bar=False)
    new_layers = {name.split(".")[1] for name in run.start["left"]}
    assert new_layers == {"embedder", "context_embedder"}
    stored = {name for name in run.load("teacher") if ".lora_" not in name}
    assert stored == {*run.start["left"]}
    merged = Run.open(run.path, "cpu").teacher.state_dict()
    key = "transformer_blocks.0.ff.linear_in.weight"
    change = merged[f"model.{key}"] - model.state_dict()[key]
    assert 0 < change.abs().max() < 0.1
    untouched = "x_embedder.weight"
    assert torch.equal(merged[f"model.{untouched}"], model.state_dict()[untouched])
    assert opened_samples(run).isfinite().all()


def opened_samples(run):
    return Run.open(run.path, "cpu").sample(["a red circle"], steps=1)["image"]


def test_operations_of_adapters_are_fewer_and_need_no_folder(runs):
    pytest.importorskip("peft")
    config = beginning(runs["tiny"].path)
    full = flops_per_step(config, runs["tiny"].inputs)
    adapted = flops_per_step(replace(config, lora=LoraConfig(2)), runs["tiny"].inputs)
    assert 0.5 * full < adapted < 0.95 * full
