"""Adapters: one base for two models, gradients under checkpointing, every family, DoRA,
merging and targets.
"""

import copy

import pytest
import torch
from test_diffusers import CASES, condition_of, example, inputs_of, model_of
from torch import nn

from selfflow.method.adapters import (
    PRESETS,
    add_lora,
    find_targets,
    fingerprint,
    merge_lora,
    trained_weights,
)
from selfflow.method.backbone import Output, check_backbone
from selfflow.method.batch import Batch, Condition
from selfflow.method.diffusers_backbone import DiffusersBackbone
from selfflow.method.objective import make_teacher, update_ema
from selfflow.method.options import LoraConfig
from selfflow.method.schedule import NoiseLevels
from selfflow.method.tokens import Part
from selfflow.method.transformer import Transformer, TransformerConfig

peft = pytest.importorskip("peft")


def transformer():
    torch.manual_seed(0)
    shape = TransformerConfig.of_image(4, (4, 4), width=32, depth=3, heads=4, classes=5)
    model = Transformer(shape)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 16, 4, generator=generator)
    levels = NoiseLevels(
        torch.tensor([[0.8, 0.3], [0.6, 0.1]]), torch.arange(16).expand(2, 16) % 2
    )
    return x, levels, Condition(torch.tensor([1, 3]), 5)


def pair(**options):
    student = transformer()
    add_lora(student, LoraConfig(rank=2, **options), ["y_embedder.weight"])
    return student, make_teacher(student)


def step(student, teacher, given=None, decay=0.9):
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    optimizer.zero_grad()
    student(*(given or inputs())).velocity.square().mean().backward()
    optimizer.step()
    update_ema(teacher, student, decay)


def bytes_of(*models):
    values = {p.data_ptr(): p for model in models for p in model.parameters()}
    return sum(p.numel() * p.element_size() for p in values.values())


@pytest.mark.parametrize("dora", [False, True])
def test_two_models_cost_one_base_and_two_adapters(dora):
    student, teacher = pair(dora=dora)
    for _ in range(2):
        step(student, teacher)
    trained = sum(
        p.numel() * p.element_size() for p in student.parameters() if p.requires_grad
    )
    assert bytes_of(student, teacher) == bytes_of(student) + trained
    # the embedding that begins anew is trained itself, so it is no part of the base
    embedding = student.y_embedder.weight
    frozen = bytes_of(transformer()) - embedding.numel() * embedding.element_size()
    assert bytes_of(student, teacher) == frozen + 2 * trained
    weights = trained_weights(student)
    assert weights.keys() == trained_weights(teacher).keys()
    assert sum(v.numel() * v.element_size() for v in weights.values()) == trained


@pytest.mark.parametrize("dora", [False, True])
def test_the_teacher_differs_after_the_first_step_and_the_base_never(dora):
    student, teacher = pair(dora=dora)
    base = fingerprint({n: student.state_dict()[n] for n in student.base_names})
    with torch.no_grad():
        torch.testing.assert_close(
            student(*inputs()).velocity, transformer()(*inputs()).velocity
        )
        assert torch.equal(student(*inputs()).velocity, teacher(*inputs()).velocity)
    step(student, teacher)
    with torch.no_grad():
        apart = student(*inputs()).velocity - teacher(*inputs()).velocity
        moved = teacher(*inputs()).velocity - transformer()(*inputs()).velocity
    assert apart.abs().max() > 1e-3
    assert moved.abs().max() > 1e-4
    assert not any(p.requires_grad for p in teacher.parameters())
    assert base == fingerprint({n: teacher.state_dict()[n] for n in teacher.base_names})


def test_zeroed_multipliers_leave_dora_active_and_the_teacher_alone():
    for dora in (False, True):
        student, teacher = pair(dora=dora)
        for _ in range(3):
            step(student, teacher)
        base = transformer()
        base.y_embedder.load_state_dict(student.y_embedder.state_dict())
        with torch.no_grad():
            before = teacher(*inputs()).velocity
            for module in student.modules():
                if hasattr(module, "scaling"):
                    module.scaling = dict.fromkeys(module.scaling, 0.0)
            apart = student(*inputs()).velocity - base(*inputs()).velocity
            assert torch.equal(teacher(*inputs()).velocity, before)
        # so a base made of zeroed multipliers would not be the base with DoRA
        assert (apart.abs().max() > 1e-3) == dora


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_equal_with_checkpointing_while_the_teacher_runs(dora):
    gradients = []
    for checkpointing in (False, True):
        student, teacher = pair(dora=dora)
        step(student, teacher)
        student.checkpointing = checkpointing
        student.zero_grad()
        output = student(*inputs(), taps=(1,))
        with torch.no_grad():  # between the student's forward and its backward
            target = teacher(*inputs(1), taps=(2,), stop=True).features[2]
        loss = output.velocity.square().mean()
        loss = loss + (output.features[1] - target).square().mean()
        loss.backward()
        gradients.append([p.grad for p in student.parameters() if p.requires_grad])
        assert all(p.grad is None for p in teacher.parameters())
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
        assert plain.abs().max() > 0


@pytest.mark.parametrize("dora", [False, True])
def test_merged_equals_base_and_adapter(dora):
    student, teacher = pair(dora=dora, targets=("blocks",), alpha=4.0)
    for _ in range(3):
        step(student, teacher)
    expected = teacher(*inputs()).velocity
    merged = merge_lora(copy.deepcopy(teacher))
    assert merged.state_dict().keys() == transformer().state_dict().keys()
    torch.testing.assert_close(
        merged(*inputs()).velocity, expected, atol=1e-6, rtol=1e-5
    )
    broken = copy.deepcopy(teacher)
    name = next(name for name in trained_weights(broken) if "lora_A" in name)
    broken.get_parameter(name).fill_(torch.nan)
    with pytest.raises(ValueError, match="adapter of blocks.0"):
        merge_lora(broken)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_family_trains_adapters_of_its_blocks(case):
    student = DiffusersBackbone(model_of(case), inputs_of(case))
    found = {preset: find_targets(student, [preset]) for preset in PRESETS}
    assert len(found["attention"]) >= 2 * case.depth
    assert len(found["mlp"]) >= 1
    assert {*found["attention"], *found["mlp"]} <= {*found["blocks"]}
    assert not {*found["attention"]} & {*found["mlp"]}
    layers = "|".join(student.family.block_lists)
    assert all(name.split(".")[1] in layers for name in found["blocks"])
    add_lora(student, LoraConfig(rank=2, targets=("attention", "mlp")))
    teacher = make_teacher(student)
    trained = trained_weights(student)
    assert len(trained) == 2 * len({*found["attention"], *found["mlp"]})
    assert bytes_of(student, teacher) == bytes_of(student) + sum(
        value.numel() * 4 for value in trained.values()
    )
    x, values, two = example(case)
    condition = condition_of(case, values)
    step(student, teacher, (x, two, condition))
    with torch.no_grad():
        after = student(x, two, condition).velocity
        assert (after - teacher(x, two, condition).velocity).abs().max() > 1e-5
        merged = merge_lora(copy.deepcopy(student))
        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(merged(x, two, condition).velocity, after, **close)


def test_factors_are_in_float32_whatever_the_base_is():
    student = transformer().to(torch.bfloat16)
    add_lora(student, LoraConfig(rank=2))
    kinds = {name: p.dtype for name, p in student.named_parameters()}
    assert all((k == torch.float32) == (".lora_" in n) for n, k in kinds.items())


def test_unknown_targets_name_the_nearest_ones():
    model = transformer()
    with pytest.raises(ValueError, match=r"lora.targets.*'qvk'.*Did you mean 'qkv'"):
        add_lora(model, LoraConfig(rank=2, targets=("attention", "qvk")))
    assert all(p.requires_grad for p in model.parameters()), "nothing was changed"
    assert find_targets(model, ["attn.qkv"]) == [
        f"blocks.{n}.attn.qkv" for n in range(3)
    ]
    with pytest.raises(ValueError, match="begin anew"):
        targets = LoraConfig(rank=2, targets=("x_embedder.image",))
        add_lora(model, targets, ["x_embedder.image.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_backbone_that_overflows_says_why(dtype):
    class Overflowing(nn.Module):
        width, depth = 8, 2

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x, levels, condition=None, taps=(), stop=False, parts=()):
            features = torch.full((*x.shape[:2], 8), 1e4, dtype=dtype)
            product = features * 10  # 1e5 is beyond float16
            return Output(None if stop else x, dict.fromkeys(taps, product))

    x, _, condition = inputs()
    batch = Batch(x, condition, (Part("image", 4, (1, 4, 4)),))
    if dtype == torch.float32:
        return check_backbone(Overflowing(), batch)
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        check_backbone(Overflowing(), batch)
