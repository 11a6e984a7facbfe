"""A batch in pieces gives the losses, gradient and log of the whole batch."""

from dataclasses import replace

import pytest
import torch

from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.draws import keyed
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.settings import own_settings
from selfflow.training.batches import Batches
from selfflow.training.config import Config, TrainConfig
from selfflow.training.state import start_state, train_step

SMALL = {"size": 16, "frames": 8, "patch": 8, "columns": 8}
DATA = {
    "digits": DataConfig(),
    "motion": DataConfig("motion", **SMALL),
    "scenes": DataConfig("scenes", weight={"audio": 0.5}, **SMALL),
    "in turn": (DataConfig("notes", columns=8), DataConfig("shapes", size=16, patch=8)),
}
STEPS = 2


def logged(config: Config) -> tuple[list[dict], list[torch.Tensor]]:
    "Everything that some steps log, and the weights after them."
    sources = Sources(config.data)
    width = 5 if config.objective.name == "repa" else 1
    state = start_state(config, sources, torch.device("cpu"), width)
    with torch.no_grad():  # as after some training: every layer has an effect
        for name, parameter in state.named_parameters().items():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=keyed(0, name))
            )
    batches = Batches(sources, config)
    logs = []
    for step in range(STEPS):
        features = (
            torch.randn(8, 5, generator=keyed(0, "features", step))
            if width > 1
            else None
        )
        logs.append(
            train_step(
                state,
                config,
                replace(batches[step], features=features),
                diagnose=step > 0,
            )
        )
    return logs, [parameter.detach() for parameter in state.named_parameters().values()]


COUNTED = ("all", "masked", "noisier")


def combinations():
    """Objectives, normalisations, counted tokens, conditions and kinds of data: each
    with each of every other kind somewhere.
    """
    for i, name in enumerate(("self_flow", "sra", "layer_sync", "repa")):
        schedule = {} if name == "self_flow" else {"schedule": "dual"}
        for j, normalise in enumerate(("raw", "centred", "standardised")):
            tokens = COUNTED[(i + j) % 3]
            options = {
                "normalise": normalise,
                "rep_tokens": tokens,
                "flow_tokens": tokens,
                **schedule,
            }
            yield (
                f"digits {name} {normalise} {tokens}",
                "digits",
                ObjectiveConfig(name, **options),
            )
    for i, (data, given) in enumerate(
        (
            ("motion", "first_frame"),
            ("scenes", "either"),
            ("scenes", "audio"),
            ("scenes", "first_frame"),
            ("scenes", ""),
            ("in turn", ""),
        )
    ):
        for j, tokens in enumerate(COUNTED):
            name = ("flow_matching", "self_flow")[(i + j) % 2]
            objective = ObjectiveConfig(
                name, schedule="dual", flow_tokens=tokens, given=given
            )
            yield f"{data} {name} {given or 'nothing'} {tokens}", data, objective
    yield (
        "scenes sra given centred",
        "scenes",
        ObjectiveConfig("sra", given="either", normalise="centred", distance="l2"),
    )
    yield (
        "scenes forcing",
        "scenes",
        ObjectiveConfig(
            schedule="diffusion_forcing", normalise="standardised", mask_ratio=0.25
        ),
    )
    yield (
        "digits single share",
        "digits",
        ObjectiveConfig(single_share=0.5, rep_tokens="noisier", distance="smooth_l1"),
    )


@pytest.mark.parametrize(
    "data, objective", [pytest.param(*rest, id=name) for name, *rest in combinations()]
)
def test_pieces_give_what_the_whole_batch_gives(data, objective):
    config = Config(
        data=DATA[data],
        objective=objective,
        model=ModelConfig(width=16, depth=4, heads=1),
        training=TrainConfig(steps=STEPS, batch=8, shards=8, lr=1e-3),
    )
    undivided, weights = logged(config)
    for pieces in (2, 8):
        divided, others = logged(
            replace(config, training=replace(config.training, accumulate=pieces))
        )
        for step, (values, expected) in enumerate(zip(divided, undivided, strict=True)):
            assert values.keys() == expected.keys()
            # the second step starts from weights that rounding has moved
            for name in expected:
                near = 1e-6 if step == 0 else 2e-4
                assert values[name] == pytest.approx(
                    expected[name], rel=near, abs=near
                ), (pieces, step, name)


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig(), ObjectiveConfig("layer_sync", normalise="standardised")],
)
def test_pieces_in_bf16_use_statistics_of_the_whole_batch(objective):
    config = Config(
        objective=objective,
        model=ModelConfig(width=16, depth=4, heads=1),
        training=TrainConfig(steps=STEPS, batch=8, shards=8, precision="bf16"),
    )
    undivided, _ = logged(config)
    divided, _ = logged(
        replace(config, training=replace(config.training, accumulate=4))
    )
    assert divided[0] == {
        name: pytest.approx(value, rel=0.01) for name, value in undivided[0].items()
    }


def test_the_target_is_computed_twice_only_if_it_is_normalised(monkeypatch):
    from selfflow.method.transformer import Transformer

    real = Transformer.forward
    passes = []
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda self, *a, **k: passes.append(self.training) or real(self, *a, **k),
    )
    counted = {}
    for normalise in ("raw", "centred"):
        passes.clear()
        config = Config(
            objective=ObjectiveConfig(normalise=normalise),
            model=ModelConfig(width=16, depth=4, heads=1),
            training=TrainConfig(steps=STEPS, batch=8, shards=8, accumulate=4),
        )
        logged(config)
        counted[normalise] = (passes.count(True) // STEPS, passes.count(False) // STEPS)
    assert counted == {"raw": (4, 4), "centred": (4, 8)}


def test_no_cosine_exceeds_one():
    from selfflow.method.alignment import constant_cosine
    from selfflow.method.losses import Alignment

    with own_settings():
        rows = torch.rand(1, 7, generator=keyed(0, "row")).expand(1000, 7).contiguous()
        assert constant_cosine(rows) <= 1
        assert Alignment(rows, rows, torch.zeros(1000)).means()["constant_cosine"] <= 1
