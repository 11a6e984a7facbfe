"""Training reduces the loss, resumes bit for bit, and refuses bad input first."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, VANILLA, assert_same, parts_of
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import selfflow.data.sources
from selfflow.data.datasets import ImageSet, digits
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.draws import keyed
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.method.schedule import DualTimestep, NoiseLevels
from selfflow.training.batches import (
    batch_indices,
    channel_warnings,
    loss_by_level,
    validation_losses,
)
from selfflow.training.checkpoint import write_checkpoint
from selfflow.training.config import TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.training.state import compile_blocks, start_state, train_step
from selfflow.training.watching import Following


def test_both_objectives_fall_and_stay_finite(tmp_path):
    longer = replace(
        TINY.training, steps=80, batch=32, lr=3e-3, validate_every=40, save_every=80
    )
    for config in (TINY, VANILLA):
        log = train(replace(config, training=longer), tmp_path).log
        # measures logged only at validation steps
        periodic = log.columns[log.isna().any()]
        validated = log["step"].isin([40, 80])
        assert {"validation_flow_loss"} <= set(periodic)
        assert log.loc[~validated, periodic].isna().all().all()
        if config is TINY:
            assert {
                "cosine_gap_0",
                "feature_std",
                "effective_rank",
                "rep_gradient_share",
                "validation_flow_loss",
            } <= set(periodic)
            assert log.loc[validated, "rep_gradient_share"].between(0.001, 0.999).all()
            assert log.loc[validated, "effective_rank"].between(1, 16).all()
        assert log["flow_loss"].tail(10).mean() < 0.75 * log["flow_loss"].head(5).mean()
        assert log["validation_flow_loss"].dropna().is_monotonic_decreasing
    assert log.columns.tolist() == [
        "step",
        "total",
        "flow_loss",
        "grad_norm",
        "lr",
        "validation_flow_loss",
        "flow_loss_by_level",
    ]


@pytest.mark.parametrize("config", [TINY, VANILLA], ids=lambda c: c.name)
@pytest.mark.parametrize("removed", [[12], [12, 8], [12, 8, 4]])
def test_resuming_gives_the_uninterrupted_run_bit_for_bit(
    runs, tmp_path, config, removed
):
    uninterrupted = runs[config.name]
    shutil.copytree(uninterrupted.path, tmp_path / config.name)
    for step in removed:
        shutil.rmtree(tmp_path / config.name / f"checkpoints/step-{step:08d}")
    torch.manual_seed(123)  # the global stream plays no part
    resumed = train(config, tmp_path)
    assert_same(uninterrupted, resumed)


SMALL = replace(
    TINY,
    name="small",
    model=ModelConfig(width=8, depth=3, heads=1),
    training=TrainConfig(
        steps=4, batch=8, log_every=1, validate_every=3, validation=64, save_every=2
    ),
)
EVERY = [
    (name, {"schedule": schedule})
    for name in ("self_flow", "flow_matching", "sra", "layer_sync")
    for schedule in ("single", "dual", "diffusion_forcing", "full_masking")
] + [
    ("repa", {}),
    ("sra2", {"rep_warmup": 0.5}),
    ("self_transcendence", {"rep_until": 0.5}),
    ("repa", {"schedule": "dual", "rep_tokens": "noisier", "distance": "smooth_l1"}),
    (
        "self_flow",
        {
            "levels": 3,
            "density": "logit_normal",
            "density_shift": 2.0,
            "noisy_share": 0.2,
            "distance": "l2",
            "normalise": "standardised",
        },
    ),
    (
        "self_flow",
        {
            "mask_ratio": 0.5,
            "order": "cleaner",
            "exact": True,
            "near": 0.3,
            "block": 2,
            "single_share": 0.3,
            "separated": True,
            "density": "plateau_logit_normal",
        },
    ),
    (
        "sra",
        {
            "schedule": "dual",
            "flow_tokens": "masked",
            "rep_tokens": "masked",
            "normalise": "centred",
        },
    ),
    (
        "flow_matching",
        {
            "schedule": "dual",
            "mask_ratio": 0.5,
            "separated": True,
            "flow_tokens": "noisier",
        },
    ),
]


def outside(tokens):
    "Features of an external encoder, bit for bit the same in every batch."
    return torch.cat([tokens * 2, -tokens], dim=-1)


@pytest.mark.parametrize(
    "name, switches",
    EVERY,
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_every_objective_and_schedule_trains_and_resumes_bit_for_bit(
    tmp_path, name, switches
):
    config = replace(SMALL, objective=ObjectiveConfig(name, **switches))
    features = outside if name == "repa" else None
    run = train(config, tmp_path / "whole", features=features)
    assert run.log["step"].tolist() == [1, 2, 3, 4]
    assert run.log[["total", "flow_loss", "grad_norm"]].notna().all().all()
    assert ("cosine" in run.log) == (name != "flow_matching")
    assert run.log["grad_norm"].min() > 0
    start = start_state(config, run.sources, torch.device("cpu"), 8)
    assert not torch.equal(
        start.student.blocks[0].attn.proj.weight, run.model.blocks[0].attn.proj.weight
    )
    shutil.copytree(run.path, tmp_path / "again/small")
    shutil.rmtree(tmp_path / "again/small/checkpoints/step-00000004")
    # a tensor of features gives the same run as a function
    if features is not None:
        features = outside(first_batch(config, 1078).x0)
    assert_same(run, train(config, tmp_path / "again", features=features))


def test_checkpointing_trains_the_same_run_bit_for_bit(runs, tmp_path):
    again = train(
        replace(TINY, training=replace(TINY.training, checkpointing=True)), tmp_path
    )
    assert_same(runs["tiny"], again)
    assert start_state(
        again.config, again.sources, torch.device("cpu")
    ).student.checkpointing


def test_an_interrupted_run_resumes_from_its_checkpoint(runs, tmp_path, monkeypatch):
    real = train_step
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr("selfflow.training.loop.train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path)
    monkeypatch.undo()
    assert_same(runs["tiny"], train(TINY, tmp_path))


def test_sampling_from_a_run_in_the_middle_changes_nothing(runs, tmp_path):
    half = train(TINY, tmp_path)
    shutil.rmtree(half.path / "checkpoints/step-00000012")
    half.sample(torch.tensor([1, 2]), steps=3)
    validation_losses(half.teacher, TINY)
    expected = parts_of(runs["tiny"])
    actual = parts_of(train(TINY, tmp_path))
    assert all(torch.equal(expected[k], actual[k]) for k in expected)


def test_the_data_of_each_split_are_opened_once(tmp_path, monkeypatch):
    opened = []
    start = Sources.__init__

    def counted(self, config, split="train", data=None):
        opened.append(split)
        start(self, config, split, data)

    monkeypatch.setattr(Sources, "__init__", counted)
    with_samples = replace(TINY.training, sample_every=TINY.training.steps)
    train(replace(TINY, training=with_samples), tmp_path)
    assert opened == ["train", "validation"]


def test_a_finished_run_is_returned_as_it_is(runs):
    before = {p: p.stat().st_mtime_ns for p in runs["tiny"].path.rglob("*.safetensors")}
    train(TINY, runs["tiny"].path.parent)
    assert before == {
        p: p.stat().st_mtime_ns for p in runs["tiny"].path.rglob("*.safetensors")
    }


def test_the_arms_are_paired():
    sources = Sources(TINY.data)
    self_flow, flow_matching = (
        start_state(config, sources, torch.device("cpu")) for config in (TINY, VANILLA)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            self_flow.student.parameters(),
            flow_matching.student.parameters(),
            strict=True,
        )
    )
    other = start_state(replace(TINY, seed=1), sources, torch.device("cpu"))
    assert not torch.equal(
        self_flow.student.x_embedder.image.weight, other.student.x_embedder.image.weight
    )


def test_the_teacher_is_the_average_after_the_step():
    sources = Sources(TINY.data)
    state = start_state(TINY, sources, torch.device("cpu"))
    before = state.teacher.x_embedder.image.bias.clone()
    train_step(state, TINY, first_batch())
    decay = 0.5 ** (1 / (TINY.training.ema_half_life * TINY.training.steps))
    expected = decay * before + (1 - decay) * state.student.x_embedder.image.bias
    torch.testing.assert_close(state.teacher.x_embedder.image.bias, expected)
    assert not state.teacher.training
    assert state.step == 1


def test_every_sample_once_per_epoch_in_an_order_of_the_seed():
    steps = [batch_indices(50, 16, seed=3, step=step) for step in range(25)]
    everything = torch.cat(steps)
    for epoch in everything.split(50):
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(everything[:50], everything[50:100])
    assert not torch.equal(
        everything[:50],
        torch.cat([batch_indices(50, 16, 4, step) for step in range(4)])[:50],
    )
    # a batch larger than the data goes on into the next epochs
    assert len(batch_indices(5, 16, 0, 0)) == 16


def test_bf16_trains(tmp_path):
    run = train(
        replace(TINY, name="bf16", training=replace(TINY.training, precision="bf16")),
        tmp_path,
    )
    log = run.log
    reference = train(TINY, tmp_path).log
    assert log["flow_loss"].tolist() == pytest.approx(
        reference["flow_loss"].tolist(), rel=0.02
    )
    assert log["flow_loss"].tolist() != reference["flow_loss"].tolist()
    # the same weights, drawn in fp32
    in_float32 = Run(run.path, TINY, run.inputs, run.device)
    low_precision, full_precision = (
        opened.sample(torch.arange(4), steps=4, cfg_scale=2.0)["image"]
        for opened in (run, in_float32)
    )
    assert low_precision.dtype == torch.float32
    assert not torch.equal(low_precision, full_precision)
    torch.testing.assert_close(low_precision, full_precision, atol=0.05, rtol=0.05)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path, monkeypatch
):
    original = batch_indices

    def poisoned(count, batch, seed, step, *rest):
        if step == 6:
            poison.fill_(float("nan"))
        return original(count, batch, seed, step, *rest)

    poison = torch.zeros(1)
    monkeypatch.setattr("selfflow.training.batches.batch_indices", poisoned)
    monkeypatch.setattr(
        "selfflow.method.alignment.velocity", lambda x0, x1: x1 - x0 + poison
    )
    with pytest.raises(
        FloatingPointError, match="step 7 is not finite.*Earlier checkpoints are intact"
    ):
        train(TINY, tmp_path)
    run = Run.open(tmp_path / "tiny")
    assert run.latest().name == "step-00000004"
    assert run.log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.writer() is None
    report = json.loads((run.path / "not_finite.json").read_text())
    samples = original(len(digits("train")), 16, TINY.seed, 6)
    assert report["step"] == 7
    assert "step 7 is not finite" in report["message"]
    assert report["samples"] == samples.tolist()
    assert report["labels"] == digits("train").labels[samples].tolist()
    levels = [
        DualTimestep().sample(2, 16, keyed(TINY.seed, "levels", 6, shard)).per_token()
        for shard in range(8)
    ]
    assert report["levels"]["tokens"] == torch.cat(levels).histc(20, 0, 1).tolist()
    assert sum(report["levels"]["tokens"]) == 256
    monkeypatch.undo()
    assert_same(train(TINY, tmp_path / "whole"), train(TINY, tmp_path))
    assert not (run.path / "not_finite.json").exists(), "training got past the step"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 1, "lr": 1e38}, "step 1 is not finite: "),
        (
            {"steps": 1, "lr": 1e38, "validate_every": 9, "sample_every": 0},
            "step 1 is not finite: it left NaN or infinite",
        ),
        ({"lr": 1e38, "save_every": 2}, "is not finite"),
        ({"lr": 1e6, "sample_every": 1}, "is not finite"),
        ({"lr": 1e6, "validate_every": 1}, "is not finite"),
        ({"lr": 1e6}, "is not finite"),
    ],
    ids=["last step", "save alone", "save", "sample grid", "validation", "loss"],
)
def test_divergence_has_one_message_wherever_it_is_detected(tmp_path, changes, message):
    values = {
        "steps": 30,
        "batch": 8,
        "validation": 20,
        "save_every": 1,
        "sample_every": 0,
        "log_every": 1,
        **changes,
    }
    config = replace(TINY, training=TrainConfig(**values))
    with pytest.raises(
        FloatingPointError, match=f"^step .*{message}|^{message}"
    ) as error:
        train(config, tmp_path)
    assert "A smaller training.lr or training.clip" in str(error.value)
    assert "look at the data" not in str(error.value)
    run = Run.open(tmp_path / "tiny")
    report = json.loads((run.path / "not_finite.json").read_text())
    assert str(error.value).startswith(report["message"])
    assert f"step {report['step']} is" in report["message"]
    assert (
        report["samples"]
        == batch_indices(
            len(digits("train")), 8, TINY.seed, report["step"] - 1
        ).tolist()
    )
    last = run.latest()
    assert last is None or run.state()["step"] < report["step"]
    for path in run.checkpoints():
        assert all(
            value.isfinite().all()
            for part in path.glob("*.safetensors")
            for value in load_file(part).values()
        )
    following = Following(run.path)
    following.read()
    assert not following.finished
    assert (
        f"stopped at step {report['step']}: the loss was not finite" in following.state
    )


def test_a_non_finite_checkpoint_is_not_resumed(tmp_path):
    run = train(
        replace(TINY, training=replace(TINY.training, steps=8, save_every=4)), tmp_path
    )
    path = run.latest()
    tensors = {part.stem: load_file(part) for part in path.glob("*.safetensors")}
    next(iter(tensors["teacher"].values())).fill_(torch.nan)
    state = run.state()
    shutil.rmtree(path)
    write_checkpoint(path, tensors, state)
    with pytest.raises(
        ValueError,
        match=r"step-00000008 contains NaN or infinite numbers \(teacher\).*Delete "
        r"this folder",
    ):
        train(run.config, tmp_path)
    shutil.rmtree(path)
    assert train(run.config, tmp_path).state()["step"] == 8


@pytest.mark.parametrize(
    "part, field",
    [
        (TrainConfig, "lr"),
        (TrainConfig, "weight_decay"),
        (TrainConfig, "ema_half_life"),
        (TrainConfig, "cooldown"),
        (TrainConfig, "warmup"),
        (TrainConfig, "eps"),
        (ObjectiveConfig, "rep_weight"),
        (ObjectiveConfig, "density_mean"),
        (ObjectiveConfig, "density_std"),
        (ObjectiveConfig, "density_shift"),
        (ObjectiveConfig, "near"),
        (ModelConfig, "mlp_ratio"),
    ],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(part, field, value):
    with pytest.raises(ValueError, match=field):
        part(**{field: value})


def test_a_gradient_may_be_clipped_at_infinity_but_not_at_nan():
    assert TrainConfig(clip=float("inf")).clip == float("inf")
    with pytest.raises(ValueError, match="clip is nan"):
        TrainConfig(clip=float("nan"))


def first_batch(config=TINY, count=16):
    return Sources(config.data).take(config.data.name, torch.arange(count))


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_features_that_are_not_finite_are_named_by_their_step(where):
    state = start_state(TINY, Sources(TINY.data), torch.device("cpu"))
    with torch.no_grad():
        getattr(state, where).x_embedder.image.weight.fill_(torch.nan)
    before = state.student.blocks[0].attn.qkv.weight.clone()
    with pytest.raises(FloatingPointError, match="step 1 is not finite"):
        train_step(state, TINY, first_batch(), diagnose=True)
    assert torch.equal(state.student.blocks[0].attn.qkv.weight, before)
    assert state.step == 0


def test_every_step_draws_its_own_numbers():
    state = start_state(TINY, Sources(TINY.data), torch.device("cpu"))
    seeds = []
    forward = state.objective.forward

    def recording(student, teacher, batch, draw, *more):
        seeds.append(
            [
                [shard(purpose).initial_seed() for shard in draw]
                for purpose in ("noise", "levels", "label drop")
            ]
        )
        return forward(student, teacher, batch, draw, *more)

    state.objective.forward = recording
    for _ in range(3):
        train_step(state, TINY, first_batch())
    assert seeds == [
        [
            [
                keyed(TINY.seed, purpose, step, shard).initial_seed()
                for shard in range(8)
            ]
            for purpose in ("noise", "levels", "label drop")
        ]
        for step in range(3)
    ]


def test_training_continues_after_steps_without_counted_tokens():
    config = replace(
        TINY, objective=ObjectiveConfig(mask_ratio=1e-9, rep_tokens="masked")
    )
    state = start_state(config, Sources(config.data), torch.device("cpu"))
    values = train_step(state, config, first_batch(), diagnose=True)
    assert values["rep_loss"] == 0
    assert "cosine" not in values
    assert values["flow_loss"] > 0
    assert state.step == 1


# compilation


def random_state(config=TINY):
    state = start_state(config, Sources(config.data), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (state.student, state.teacher):
            for parameter in model.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return state


def snapshot(state):
    slots = {
        f"{name}/{k}": v
        for name, p in state.named_parameters().items()
        for k, v in state.optimizer.state.get(p, {}).items()
    }
    parts = {
        "student": state.student,
        "teacher": state.teacher,
        "objective": state.objective,
    }
    tensors = {
        f"{n}.{k}": v.clone()
        for n, part in parts.items()
        for k, v in part.state_dict().items()
    } | slots
    return tensors, state.step, torch.get_rng_state()


def assert_unchanged(state, before):
    tensors, step, stream = snapshot(state)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[k], before[0][k]) for k in tensors)
    assert step == before[1]
    assert torch.equal(stream, before[2])
    assert all(
        p.grad is None
        for part in (state.student, state.teacher, state.objective)
        for p in part.parameters()
    )


def no_compiler(after=0):
    "A torch.compile whose functions fail after `after` calls."
    calls = []

    def compiled(function, **_):
        def call(*args, **options):
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError("no C++ compiler found\nand much more")
            return function(*args, **options)

        return call

    return compiled


# at the first block of the student, or at one of the teacher
@pytest.mark.parametrize("after", [0, 5])
def test_without_a_compiler_blocks_run_uncompiled(monkeypatch, after):
    eager = random_state()
    state = random_state()
    before = snapshot(state)
    monkeypatch.setattr(torch, "compile", no_compiler(after))
    assert (
        compile_blocks(state, TINY, first_batch())
        == "RuntimeError: no C++ compiler found"
    )
    assert_unchanged(state, before)
    for _ in range(2):
        assert train_step(state, TINY, first_batch()) == train_step(
            eager, TINY, first_batch()
        )


def test_a_successful_trial_compilation_leaves_the_state_unchanged(monkeypatch):
    state = random_state()
    before = snapshot(state)
    monkeypatch.setattr(torch, "compile", no_compiler(after=10**6))
    assert compile_blocks(state, TINY, first_batch()) is None
    assert_unchanged(state, before)
    assert all(
        block._compiled_call_impl is not None
        for model in (state.student, state.teacher)
        for block in model.blocks
    )


def test_a_run_reports_why_it_is_not_compiled_and_trains_the_same(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "compile", no_compiler())
    config = replace(TINY, training=replace(TINY.training, compile=True))
    run = train(config, tmp_path)
    assert (
        "training without compiled blocks (RuntimeError: no C++ compiler found)"
        in capsys.readouterr().out
    )
    assert_same(runs["tiny"], run)
    train(config, tmp_path)
    assert "without compiled blocks" not in capsys.readouterr().out, (
        "a finished run compiles nothing"
    )


NARROW = replace(
    TINY,
    name="narrow",
    data=DataConfig("digits", patch=8),
    model=ModelConfig(width=16, depth=2, heads=2),
    objective=ObjectiveConfig("flow_matching"),
    training=replace(TINY.training, steps=2, save_every=1),
)


def test_tokens_with_more_channels_than_the_model_is_wide_are_reported_once(
    tmp_path, capsys
):
    run = train(NARROW, tmp_path)
    assert capsys.readouterr().out == (
        "narrow: a token of image has 64 channels, but the model is 16 wide, so at "
        "least "
        "75% of the noise stays in the error of the velocity; use a smaller "
        "data.patch, "
        "or model.width 64 or more\n"
    )
    train(NARROW, tmp_path)
    shutil.rmtree(run.latest())
    train(NARROW, tmp_path)
    assert capsys.readouterr().out == "narrow: resuming from step 1\n", (
        "a finished run prints nothing"
    )
    train(
        replace(NARROW, name="fits", model=ModelConfig(width=64, depth=1, heads=2)),
        tmp_path,
    )
    assert "channels" not in capsys.readouterr().out


def test_the_warning_names_the_parts_that_do_not_fit():
    data = DataConfig("scenes", patch=8, size=16, frames=8, columns=2)
    for width, smaller_settings in (
        (16, {"video": "data.patch or data.span", "audio": "data.columns"}),
        (1_024, {}),
    ):
        sources = Sources(data)
        channels = {part.name: part.channels for part in sources.parts}
        warnings = channel_warnings(width, sources)
        assert len(warnings) == len(smaller_settings)
        for line, (name, smaller) in zip(
            warnings, smaller_settings.items(), strict=True
        ):
            assert f"token of {name} has {channels[name]} channels" in line
            assert f"use a smaller {smaller}, or" in line


def test_the_rank_of_a_velocity_is_the_width_of_the_model():
    sources = Sources(NARROW.data)
    state = start_state(NARROW, sources, torch.device("cpu"))
    for parameter in state.student.parameters():
        torch.nn.init.normal_(
            parameter, std=0.3, generator=keyed(0, str(tuple(parameter.shape)))
        )
    x = torch.randn(500, 1, 64, generator=keyed(0, "x"))
    levels = NoiseLevels.single(torch.rand(500, generator=keyed(0, "t")), 1)
    velocity = state.student(x, levels).velocity.detach()[:, 0]
    assert torch.linalg.matrix_rank(velocity - velocity.mean(0), rtol=1e-4) == 16


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler"
)
def test_compiled_blocks_give_the_same_losses():
    config = replace(
        SMALL,
        objective=ObjectiveConfig("flow_matching", schedule="dual", mask_ratio=0.5),
    )
    eager = random_state(config)
    state = random_state(config)
    before = snapshot(state)
    graphs = counters["stats"]["unique_graphs"]
    assert compile_blocks(state, config, first_batch(config)) is None
    assert_unchanged(state, before)
    assert (
        counters["stats"]["unique_graphs"] == graphs + 1 and not counters["graph_break"]
    ), "all blocks share one graph"
    for _ in range(3):
        actual, expected = (
            train_step(each, config, first_batch(config)) for each in (state, eager)
        )
        assert actual == pytest.approx(expected, rel=1e-5)
    for a, b in zip(
        state.student.parameters(), eager.student.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# invalid input is refused

FEATURES = torch.zeros(1078, 16, 5)


@pytest.mark.parametrize(
    "name, features, words",
    [
        (
            "repa",
            None,
            "needs features of an encoder: train.config, features=....* or selfflow "
            "train --features FILE",
        ),
        (
            "self_flow",
            FEATURES,
            "objective 'self_flow' takes no features of an external encoder",
        ),
        ("flow_matching", outside, "'flow_matching' takes no features"),
        ("repa", FEATURES[:-1], "features of 1077 samples, but 1078 training samples"),
        ("repa", torch.zeros(359, 5), "features of 359 samples"),
        (
            "repa",
            FEATURES[:, :-1],
            r"features have shape \(1, 15, 5\), expected \(1, 16, 5\)",
        ),
        ("repa", torch.zeros(1078, 4, 4, 5), r"\(1, 4, 4, 5\), expected"),
        ("repa", torch.zeros(1078), r"\(1,\), expected"),
        (
            "repa",
            torch.full((1078, 5), torch.nan),
            "5390 numbers of the encoder's features are NaN",
        ),
        ("repa", lambda tokens: tokens[:, :3], r"\(1, 3, 4\), expected \(1, 16, 4\)"),
    ],
)
def test_features_that_do_not_fit_are_refused_before_a_folder_is_made(
    tmp_path, name, features, words
):
    with pytest.raises(ValueError, match=words):
        train(
            replace(SMALL, objective=ObjectiveConfig(name)), tmp_path, features=features
        )
    assert not list(tmp_path.iterdir())


def test_a_block_that_does_not_divide_the_grid_is_refused_before_a_folder_is_made(
    tmp_path,
):
    with pytest.raises(ValueError, match=r"block 3 does not divide grid \(4, 4\)"):
        train(replace(SMALL, objective=ObjectiveConfig(block=3)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_loss_by_level_is_per_sample_and_does_not_depend_on_the_batch_size():
    model = random_state().student
    batch = first_batch(count=12)
    x0 = batch.x0
    x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    losses = loss_by_level(model, batch, x1, [0.2, 0.9], size=7)
    torch.testing.assert_close(losses, loss_by_level(model, batch, x1, [0.2, 0.9]))
    v = model(
        0.1 * x0[3:4] + 0.9 * x1[3:4],
        NoiseLevels.single(torch.tensor([0.9]), 16),
        batch.condition[3:4],
    ).velocity
    torch.testing.assert_close(losses[1, 3], (v - x1[3] + x0[3]).square().mean())


def with_data(monkeypatch, only=None, **change):
    def broken(config, split):
        good = digits(split)
        if only not in (None, split):
            return good
        return ImageSet(
            **{
                "images": good.images,
                "labels": good.labels,
                "names": good.names,
                **change,
            }
        )

    monkeypatch.setattr(selfflow.data.sources, "_open_digits", broken)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"images": torch.full((1078, 1, 8, 8), torch.nan)}, ValueError, "NaN"),
        (
            {"images": torch.zeros(1078, 1, 8, 8, dtype=torch.int32)},
            TypeError,
            "torch.int32",
        ),
        ({"labels": torch.full((1078,), 10)}, ValueError, "outside 0 to 9"),
        (
            {"images": torch.zeros(1078, 1, 9, 9)},
            ValueError,
            "not divisible by patch 2",
        ),
    ],
)
def test_bad_data_is_refused_before_a_folder_is_made(
    tmp_path, monkeypatch, change, error, words
):
    with_data(monkeypatch, only="train", **change)
    with pytest.raises(error, match=words):
        train(TINY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_validation_data_is_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    with_data(
        monkeypatch, only="validation", images=torch.full((359, 1, 8, 8), torch.nan)
    )
    with pytest.raises(ValueError, match="NaN"):
        train(TINY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(TINY, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "config, words",
    [
        (replace(TINY, data=DataConfig(patch=3)), "not divisible by patch 3"),
        (replace(TINY, model=ModelConfig(width=18, depth=4)), "width 18"),
    ],
)
def test_bad_sizes_are_refused_before_a_folder_is_made(tmp_path, config, words):
    with pytest.raises(ValueError, match=words):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_device_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        train(TINY, tmp_path, device="gpu")
    assert not list(tmp_path.iterdir())


def test_the_default_is_the_quickstart():
    assert TrainConfig().steps == 1000
    assert ModelConfig().width == 96


class Watcher:
    "A user's callback."

    def __init__(self, fails_at=None):
        self.events = []
        self.fails_at = fails_at

    def on_step(self, moment):
        self.events.append(("step", moment.step, set(moment.values)))
        if moment.step == self.fails_at:
            raise LookupError("the user's own")

    def on_validation(self, moment):
        self.events.append(
            ("validation", moment.step, moment.values["validation_flow_loss"])
        )

    def on_sample(self, moment):
        self.events.append(("sample", moment.step))

    def on_checkpoint(self, moment):
        moment.values["events"] = len(self.events)
        self.events.append(("checkpoint", moment.step))

    def on_end(self, moment):
        self.events.append(("end", moment.step, moment.error))


def test_a_callback_receives_every_event_and_changes_nothing(runs, tmp_path):
    watcher = Watcher()
    run = train(TINY, tmp_path, callbacks=[watcher])
    assert_same(runs["tiny"], run)
    events = {
        kind: [event[1] for event in watcher.events if event[0] == kind]
        for kind, *_ in watcher.events
    }
    training = TINY.training
    assert events["step"] == list(range(1, training.steps + 1))
    assert events["end"] == [training.steps]
    assert events["checkpoint"] == [
        step for step in events["step"] if step % training.save_every == 0
    ]
    assert events["validation"]
    assert watcher.events[-1] == ("end", training.steps, None)
    assert run.state()["events"] == len(watcher.events) - 2, (
        "values added by a callback are saved"
    )


@pytest.mark.parametrize("step, saved", [(2, None), (6, 4)])
def test_a_callback_that_fails_ends_the_training_in_order(runs, tmp_path, step, saved):
    failing = Watcher(step)
    bystander = Watcher()
    with pytest.raises(LookupError, match="the user's own"):
        train(TINY, tmp_path, callbacks=[failing, bystander])
    run = Run.open(tmp_path / "tiny")
    assert run.writer() is None
    assert (run.state()["step"] if saved else None) == saved
    assert isinstance(bystander.events[-1][2], LookupError)
    assert bystander.events[-1][0] == failing.events[-1][0] == "end"
    assert run.log["step"].tolist() == list(range(1, step + 1))
    assert not list(run.path.rglob(".*-*"))
    assert_same(runs["tiny"], train(TINY, tmp_path))


def test_a_callback_that_would_never_be_called_is_refused(tmp_path):
    class Misspelt:
        on_stp = print

    for callback, message in (
        (
            Misspelt(),
            "unknown method of callback Misspelt 'on_stp'.*Did you mean 'on_step'",
        ),
        (print, "has none of the methods on_step, on_validation"),
    ):
        with pytest.raises(ValueError, match=message):
            train(TINY, tmp_path, callbacks=[callback])
    assert not list(tmp_path.iterdir())
