"""Each objective gives the losses and gradients of an independent derivation from its
equations, sample by sample and token by token, and the teacher never learns.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from selfflow.draws import keyed
from selfflow.method.batch import Batch, Condition
from selfflow.method.losses import BatchStats, Losses
from selfflow.method.objective import (
    REPA,
    SRA,
    SRA2,
    FeatureObjective,
    FlowMatching,
    LayerSync,
    Projector,
    SelfFlow,
    default_layers,
    ema_decay,
    make_teacher,
    update_ema,
)
from selfflow.method.schedule import (
    Conditioned,
    DiffusionForcing,
    DualTimestep,
    FullMasking,
    NoiseLevels,
    SingleLevel,
)
from selfflow.method.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig.of_image(
    channels=3, grid=(2, 3), width=16, depth=4, heads=2, classes=5
)


def random_model(seed, config=CONFIG):
    torch.manual_seed(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def student():
    return random_model(0)


@pytest.fixture
def teacher():
    return make_teacher(random_model(1))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(2)
    x0 = torch.randn(12, 6, 3, generator=g)
    labels = torch.randint(0, 5, (12,), generator=g)
    return Batch(x0, Condition(labels, 5), CONFIG.parts)


def draws(seed=0):
    return lambda purpose: keyed(seed, purpose)


class Watched:
    """A model that records its calls and outputs."""

    def __init__(self, model):
        self.model = model
        self.calls = []
        self.outputs = []
        self.config = model.config

    def __call__(self, *args, **options):
        self.calls.append((*args, options))
        self.outputs.append(self.model(*args, **options))
        return self.outputs[-1]


class NoTeacher:
    """Fails if an objective without a teacher calls one."""

    def __call__(self, *args, **options):
        raise AssertionError("this objective has no teacher")


def counts(which, level, levels, generated):
    """True if a token counts in the loss.

    level: the index of its level among those of its sample; generated: how many of
    these levels, the first ones, belong to generated tokens.
    """
    if level >= generated:
        return False
    return {
        "all": True,
        "masked": level > 0,
        "noisier": bool(levels[level] > min(levels[:generated])),
    }[which]


def distance(name, p, h):
    if name == "cosine":
        return 1 - (p @ h) / (p.norm() * h.norm())
    gap = (p - h).abs()
    if name == "l2":
        return (gap**2).mean()
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


def derive(objective, student, teacher, batch, features=None, offset=None):
    """Flow loss, representation loss, mean cosine, mean direction and gaps between the
    levels, computed sample by sample and token by token.

    features: given for REPA; offset: given for SRA. With neither and without a teacher
    the objective is LayerSync.
    """
    x0 = batch.x0
    b, n, _ = x0.shape
    x1 = torch.randn(x0.shape, generator=keyed(0, "noise"))
    drawn = objective.schedule.sample(b, n, keyed(0, "levels"))
    dropped = torch.rand(b, generator=keyed(0, "label drop")) < objective.label_drop
    y = Condition(torch.where(dropped, 5, batch.condition.values), 5)
    lower = torch.rand(b, 1, generator=keyed(0, "teacher level"))
    generated = drawn.k - drawn.condition
    weights = list(objective.projector.parameters())
    flow = []
    predictions = []
    targets = []
    gaps = []
    for i in range(b):
        sample_levels = NoiseLevels(
            drawn.levels[i : i + 1], drawn.assign[i : i + 1], drawn.condition
        )
        tau = torch.stack([drawn.levels[i, j] for j in drawn.assign[i]])
        xt = torch.stack(
            [(1 - tau[k]) * x0[i, k] + tau[k] * x1[i, k] for k in range(n)]
        )[None]
        out = student(
            xt,
            sample_levels,
            y[i : i + 1],
            taps=objective.taps,
            separated=objective.separated,
        )
        flow.append(((out.velocity[0] - (x1[i] - x0[i])) ** 2).sum(1) / 3)
        low = min(drawn.levels[i, :generated])
        if offset is not None:
            low = max(low - offset * lower[i, 0], torch.tensor(0.0))
        teacher_tau = torch.stack(
            [tau[k] if drawn.assign[i, k] >= generated else low for k in range(n)]
        )
        if features is not None:
            h = features[i]
            teacher_tau = torch.zeros(n)
            h = h.expand(n, -1) if h.ndim == 1 else h
        elif teacher is None:
            h = out.features[objective.teacher_layer][0].detach()
            teacher_tau = tau
        else:
            xc = torch.stack(
                [
                    (1 - teacher_tau[k]) * x0[i, k] + teacher_tau[k] * x1[i, k]
                    for k in range(n)
                ]
            )[None]
            with torch.no_grad():
                h = teacher(
                    xc,
                    NoiseLevels(teacher_tau[None], torch.arange(n)[None]),
                    y[i : i + 1],
                    taps=(objective.teacher_layer,),
                ).features[objective.teacher_layer][0]
        p = out.features[objective.student_layer][0]
        for k in range(0, len(weights), 2):
            p = (F.silu(p) if k else p) @ weights[k].T + weights[k + 1]
        predictions.append(p)
        targets.append(h)
        gaps.append(tau - teacher_tau)
    targets = torch.stack(targets)
    if objective.normalise != "raw":
        targets = targets - targets.mean((0, 1))
    if objective.normalise == "standardised":
        targets = targets / (targets**2).mean((0, 1)).sqrt()
    flow_counted = []
    rep_counted = []
    for i in range(b):
        levels = drawn.levels[i].tolist()
        for k in range(n):
            level = drawn.assign[i, k].item()
            if counts(objective.flow_tokens, level, levels, generated):
                flow_counted.append((i, k))
            if counts(objective.rep_tokens, level, levels, generated):
                rep_counted.append((i, k))
    rep = []
    cosine = []
    directions = []
    for i, k in rep_counted:
        target = targets[i, k]
        rep.append(distance(objective.distance, predictions[i][k], target))
        cosine.append(1 - distance("cosine", predictions[i][k], target))
        directions.append(target / target.norm())
    flow = torch.stack([flow[i][k] for i, k in flow_counted]).mean()
    direction = torch.stack(directions).mean(0).norm()
    gap = torch.stack([gaps[i][k] for i, k in rep_counted])
    return flow, torch.stack(rep).mean(), torch.stack(cosine).mean(), direction, gap


def check(objective, student, teacher, batch, features=None, given=None, offset=None):
    """Compare values and gradients of an objective with `derive`.

    given: the features that come with the batch.
    """
    losses = objective(
        student,
        teacher if teacher is not None else NoTeacher(),
        replace(batch, features=given),
        draws(),
    )
    flow, rep, cosine, direction, gap = derive(
        objective, student, teacher, batch, features, offset
    )
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(losses.flow_loss, flow, **close)
    torch.testing.assert_close(losses.rep_loss, rep, **close)
    torch.testing.assert_close(losses.total, flow + objective.rep_weight * rep, **close)
    means = losses.alignment.means()
    assert means == pytest.approx(
        {"cosine": cosine.item(), "constant_cosine": direction.item()}, abs=1e-4
    )
    torch.testing.assert_close(losses.alignment.gap, gap)
    trained = [*student.parameters(), *objective.parameters()]
    actual = torch.autograd.grad(losses.total, trained)
    expected = torch.autograd.grad(flow + objective.rep_weight * rep, trained)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "mask_ratio, layers, rep_weight",
    [
        (0.0, (1, 3), 0.8),
        (0.25, (2, 4), 0.8),
        (0.5, (1, 2), 0.8),
        (0.5, (1, 3), 0.0),
    ],
)
def test_self_flow_equals_its_derivation(
    student, teacher, batch, mask_ratio, layers, rep_weight
):
    torch.manual_seed(0)
    check(
        SelfFlow(
            CONFIG,
            DualTimestep(mask_ratio=mask_ratio),
            *layers,
            rep_weight=rep_weight,
            label_drop=0.3,
        ),
        student,
        teacher,
        batch,
    )


HALF = DualTimestep(mask_ratio=0.5)


@pytest.mark.parametrize(
    "schedule, options",
    [
        (HALF, {"flow_tokens": "masked"}),
        (HALF, {"flow_tokens": "noisier", "rep_tokens": "masked"}),
        (HALF, {"rep_tokens": "noisier"}),
        (HALF, {"distance": "smooth_l1"}),
        (HALF, {"distance": "l2", "normalise": "centred"}),
        (HALF, {"normalise": "centred"}),
        (
            HALF,
            {
                "normalise": "standardised",
                "distance": "smooth_l1",
                "rep_tokens": "masked",
            },
        ),
        (HALF, {"separated": True}),
        (DualTimestep(mask_ratio=0.5, single_share=0.5), {"separated": True}),
        (DualTimestep(mask_ratio=0.5, order="cleaner"), {"flow_tokens": "masked"}),
        (DiffusionForcing(), {"rep_tokens": "noisier"}),
        (FullMasking(), {"flow_tokens": "noisier"}),
        (SingleLevel(), {}),
        (Conditioned(HALF, (0,), 0.2), {}),
        (
            Conditioned(HALF, (0, 3), 0.9),
            {"flow_tokens": "masked", "rep_tokens": "noisier", "separated": True},
        ),
        (Conditioned(SingleLevel(), (5,), 0.9), {"separated": True}),
    ],
)
@pytest.mark.parametrize("kind", [SelfFlow, SRA])
def test_every_option_equals_its_derivation(
    student, teacher, batch, schedule, options, kind
):
    torch.manual_seed(0)
    check(
        kind(CONFIG, schedule, **options),
        student,
        teacher,
        batch,
        offset=0.2 if kind is SRA else None,
    )


@pytest.mark.parametrize("offset", [0.0, 0.2, 1.0])
def test_sra_equals_its_derivation(student, teacher, batch, offset):
    torch.manual_seed(0)
    objective = SRA(
        CONFIG, offset=offset, student_layer=1, teacher_layer=4, label_drop=0.3
    )
    assert objective.schedule == SingleLevel()
    assert objective.rep_weight == 0.8
    check(objective, student, teacher, batch, offset=offset)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": HALF, "rep_tokens": "noisier", "normalise": "standardised"},
        {"distance": "l2", "student_layer": 2, "teacher_layer": 4},
    ],
)
def test_layer_sync_equals_its_derivation(student, batch, options):
    objective = LayerSync(CONFIG, **options)
    assert not list(objective.parameters())
    assert not objective.state_dict()
    assert objective.rep_weight == 0.2
    check(objective, student, None, batch)


def test_layer_sync_trains_only_the_blocks_below_its_student_layer(student, batch):
    objective = LayerSync(CONFIG, student_layer=2, teacher_layer=4)
    losses = objective(student, NoTeacher(), batch, draws())
    assert not losses.alignment.target.requires_grad
    assert not losses.alignment.predicted.requires_grad
    losses.rep_loss.backward()
    assert [block.attn.qkv.weight.grad is not None for block in student.blocks] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("way", ["with the batch", "encoder", "module"])
def test_repa_equals_its_derivation(student, batch, pooled, way):
    torch.manual_seed(0)
    weights = torch.nn.Linear(3, 7)

    def encoder(x0):
        return weights(x0).mean(1) if pooled else weights(x0)

    module = (
        torch.nn.Sequential(weights, torch.nn.Tanh())
        if way == "module" and not pooled
        else None
    )
    features = (module or encoder)(batch.x0).detach()
    objective = REPA(
        CONFIG,
        7,
        {"with the batch": None, "encoder": encoder, "module": module or encoder}[way],
        HALF,
        head_width=9,
        rep_tokens="masked",
    )
    assert objective.student_layer == 1
    assert objective.rep_weight == 0.5
    check(
        objective,
        student,
        None,
        batch,
        features,
        given=features if way == "with the batch" else None,
    )
    assert weights.weight.grad is None


def test_the_encoder_of_repa_is_neither_trained_nor_saved_nor_converted(student, batch):
    encoder = torch.nn.Linear(3, 7)
    objective = REPA(CONFIG, 7, encoder, head_width=9)
    before = encoder.weight.clone()
    parameters = [*student.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    objective(student, NoTeacher(), batch, draws()).total.backward()
    optimizer.step()
    assert all(p.grad is not None for p in parameters), "everything else is trained"
    assert encoder.weight.grad is None
    assert torch.equal(encoder.weight, before)
    assert not any(p is q for p in parameters for q in encoder.parameters())
    assert [tuple(v.shape) for v in objective.state_dict().values()] == [
        (9, 16),
        (9,),
        (9, 9),
        (9,),
        (7, 9),
        (7,),
    ]
    objective.double()
    assert encoder.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": HALF, "rep_tokens": "noisier", "student_layer": 4},
        {"distance": "l2", "normalise": "standardised"},
    ],
)
def test_sra_2_equals_its_derivation(student, batch, options):
    torch.manual_seed(0)
    objective = SRA2(CONFIG, 3, **options)
    assert objective.rep_weight == 0.5
    check(objective, student, None, batch, batch.x0)


def test_a_layer_beyond_the_depth_of_the_model_is_refused():
    for build in (partial(SRA2, CONFIG, 3), partial(REPA, CONFIG, 7)):
        with pytest.raises(ValueError, match="student_layer is 5, but the model has"):
            build(student_layer=5)


@pytest.mark.parametrize(
    "shares, weights",
    [
        ({}, [0.8] * 6),
        ({"rep_warmup": 0.4}, [0, 0.4, 0.8, 0.8, 0.8, 0.8]),
        ({"rep_decay": 0.4}, [0.8, 0.8, 0.8, 0.8, 0.4, 0.002]),
        ({"rep_until": 0.5}, [0.8, 0.8, 0.8, 0, 0, 0]),
        (
            {"rep_warmup": 0.4, "rep_decay": 0.2, "rep_until": 0.7},
            [0, 0.4, 0.8, 0.4, 0, 0],
        ),
    ],
)
def test_the_representation_weight_rises_falls_and_ends_as_configured(
    student, teacher, batch, shares, weights
):
    objective = SelfFlow(CONFIG, **shares)
    points = (0, 0.2, 0.4, 0.6, 0.8, 0.999)
    for progress, weight in zip(points, weights, strict=True):
        stats = BatchStats({}, progress=progress)
        losses = objective(student, teacher, batch, draws(), stats)
        assert objective.rep_weight_at(progress) == pytest.approx(weight)
        torch.testing.assert_close(
            losses.total, losses.flow_loss + weight * losses.rep_loss
        )
    losses = objective(student, teacher, batch, draws())
    torch.testing.assert_close(losses.total, losses.flow_loss + 0.8 * losses.rep_loss)


@pytest.mark.parametrize(
    "features, words",
    [
        (torch.zeros(12, 6, 8), r"\(12, 6, 8\), expected \(12, 6, 7\)"),
        (torch.zeros(11, 7), r"\(11, 6, 7\), expected"),
        (torch.zeros(12, 8), r"\(12, 6, 8\), expected"),
        (torch.zeros(12), r"\(12,\), expected"),
        (torch.zeros(12, 1, 6, 7), r"\(12, 1, 6, 7\), expected"),
        (None, r"needs features with every batch, or an encoder"),
    ],
)
def test_features_that_do_not_fit_are_refused(student, batch, features, words):
    with pytest.raises(ValueError, match=words):
        REPA(CONFIG, 7, head_width=9)(
            student, NoTeacher(), replace(batch, features=features), draws()
        )


def test_flow_matching_equals_its_derivation(student, batch):
    x0 = batch.x0
    losses = FlowMatching(SingleLevel(), label_drop=0.0)(
        student, NoTeacher(), batch, draws()
    )
    x1 = torch.randn(x0.shape, generator=keyed(0, "noise"))
    t = torch.rand(12, generator=keyed(0, "levels"))[:, None, None]
    out = student(
        (1 - t) * x0 + t * x1, NoiseLevels.single(t[:, 0, 0], 6), batch.condition
    )
    torch.testing.assert_close(losses.total, ((out.velocity - (x1 - x0)) ** 2).mean())
    assert losses.rep_loss is None
    assert losses.alignment is None
    assert list(losses.floats()) == ["total", "flow_loss"]


@pytest.mark.parametrize("separated", [False, True])
@pytest.mark.parametrize("which", ["all", "masked", "noisier"])
def test_flow_loss_of_chosen_tokens_equals_its_derivation(
    student, batch, separated, which
):
    x0 = batch.x0
    schedule = Conditioned(HALF, (1,), 0.5)
    losses = FlowMatching(schedule, 0.0, which, separated)(
        student, NoTeacher(), batch, draws()
    )
    levels = schedule.sample(12, 6, keyed(0, "levels"))
    x1 = torch.randn(x0.shape, generator=keyed(0, "noise"))
    tau = levels.per_token()[..., None]
    xt = (1 - tau) * x0 + tau * x1
    out = student(xt, levels, batch.condition, separated=separated)
    error = (out.velocity - (x1 - x0)) ** 2
    counted = [
        error[i, k].mean()
        for i in range(12)
        for k in range(6)
        if counts(which, levels.assign[i, k], levels.levels[i], 2)
    ]
    assert 0 < len(counted) <= 60
    torch.testing.assert_close(losses.total, torch.stack(counted).mean())


@pytest.mark.parametrize("kind", [SelfFlow, SRA])
def test_both_views_share_noise_and_labels_and_the_teacher_gets_the_cleaner_level(
    student, teacher, batch, kind
):
    x0 = batch.x0
    student = Watched(student)
    teacher = Watched(teacher)
    objective = kind(CONFIG, HALF, label_drop=0.5, separated=True)
    objective(student, teacher, batch, draws())
    xs, levels, ys, student_options = student.calls[0]
    xc, clean, yc, options = teacher.calls[0]
    assert torch.equal(ys.values, yc.values)
    assert 5 in ys.values
    assert (ys.values != 5).any()
    cleanest = levels.levels.amin(1)
    assert clean.k == 1
    if kind is SelfFlow:
        assert torch.equal(clean.levels[:, 0], cleanest)
    else:
        assert (clean.levels[:, 0] <= cleanest).all()
        assert (cleanest - clean.levels[:, 0]).max() > 0.05
    assert options == {
        "taps": (objective.teacher_layer,),
        "stop": True,
        "parts": CONFIG.parts,
    }, "it stops there and is never separated"
    assert student_options["separated"]
    assert len(student.calls) == len(teacher.calls) == 1
    tau = levels.per_token()[..., None]
    low = clean.per_token()[..., None]
    noise_s = (xs - (1 - tau) * x0) / tau
    noise_c = (xc - (1 - low) * x0) / low
    usable = (low > 0.05).expand_as(noise_s)
    torch.testing.assert_close(noise_s[usable], noise_c[usable], atol=1e-4, rtol=1e-4)


def test_samples_with_a_single_level_still_give_the_teacher_the_lower_of_two(
    student, teacher, batch
):
    student = Watched(student)
    teacher = Watched(teacher)
    schedule = DualTimestep(mask_ratio=0.5, single_share=1.0)
    SelfFlow(CONFIG, schedule)(student, teacher, batch, draws())
    levels = student.calls[0][1]
    clean = teacher.calls[0][1]
    assert (levels.per_token() == levels.levels[:, :1]).all(), "all tokens at t"
    assert torch.equal(clean.levels[:, 0], levels.levels.amin(1))
    assert (clean.levels[:, 0] < levels.levels[:, 0]).any()


@pytest.mark.parametrize("kind", [SelfFlow, SRA])
def test_gradients_reach_the_student_and_the_head_but_never_the_teacher(
    student, teacher, batch, kind
):
    objective = kind(CONFIG, student_layer=2, teacher_layer=3)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective(student, teacher, batch, draws()).rep_loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters())
    assert [block.attn.qkv.weight.grad is not None for block in student.blocks] == [
        True,
        True,
        False,
        False,
    ]
    assert student.final_layer.linear.image.weight.grad is None
    assert all(
        torch.equal(value, teacher.state_dict()[name]) for name, value in before.items()
    )


def test_a_teacher_whose_parameters_require_gradients_gets_none(student, batch):
    unfrozen = random_model(1)
    SelfFlow(CONFIG)(student, unfrozen, batch, draws()).total.backward()
    assert all(p.grad is None for p in unfrozen.parameters())


@pytest.mark.parametrize(
    "make",
    [
        SelfFlow,
        LayerSync,
        lambda config: REPA(config, 7, torch.nn.Linear(3, 7), head_width=9),
    ],
    ids=["self_flow", "layer_sync", "repa"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_share_equals_that_of_two_backward_passes(
    student, teacher, batch, make, checkpointing
):
    student.checkpointing = checkpointing
    watched = Watched(student)
    objective = make(CONFIG)
    losses = objective(watched, teacher, batch, draws())
    assert "rep_gradient_share" not in losses.floats(diagnose=True), (
        "unknown before the backward pass"
    )
    hidden = watched.outputs[0].features[objective.student_layer]
    (flow,) = torch.autograd.grad(losses.flow_loss, hidden, retain_graph=True)
    (rep,) = torch.autograd.grad(
        objective.rep_weight * losses.rep_loss, hidden, retain_graph=True
    )
    losses.total.backward()
    share = (rep.norm() / (rep.norm() + flow.norm())).item()
    assert 0 < share < 1
    assert losses.floats(diagnose=True)["rep_gradient_share"] == pytest.approx(
        share, rel=1e-4
    )


def test_a_representation_loss_without_weight_has_a_gradient_share_of_zero(
    student, teacher, batch
):
    losses = SelfFlow(CONFIG, rep_weight=0.0)(student, teacher, batch, draws())
    losses.total.backward()
    assert losses.floats(diagnose=True)["rep_gradient_share"] == 0


@pytest.mark.parametrize(
    "make",
    [
        SelfFlow,
        SRA,
        LayerSync,
        lambda config: REPA(config, 7, torch.nn.Linear(3, 7), head_width=9),
    ],
    ids=["self_flow", "sra", "layer_sync", "repa"],
)
def test_losses_are_in_float32_under_autocast(student, teacher, batch, make):
    torch.manual_seed(0)
    objective = make(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(student, teacher, batch, draws())
    exact = objective(student, teacher, batch, draws())
    assert {
        getattr(losses, name).dtype for name in ("total", "flow_loss", "rep_loss")
    } == {torch.float32}
    assert {
        getattr(losses.alignment, name).dtype for name in ("predicted", "target", "gap")
    } == {torch.float32}
    torch.testing.assert_close(losses.total, exact.total, rtol=0.05, atol=0)


def test_losses_without_counted_tokens_are_zero_and_not_logged(student, teacher, batch):
    objective = SelfFlow(
        CONFIG, DualTimestep(mask_ratio=0.0), flow_tokens="masked", rep_tokens="masked"
    )
    losses = objective(student, teacher, batch, draws())
    losses.total.backward()
    scalars = losses.floats(diagnose=True)
    assert scalars["total"] == scalars["flow_loss"] == scalars["rep_loss"] == 0
    assert "cosine" not in scalars
    assert all(map(math.isfinite, scalars.values()))
    assert all(p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("kind", [SelfFlow, SRA, LayerSync])
def test_masked_tokens_need_a_mask(student, teacher, batch, kind):
    for which in ("flow_tokens", "rep_tokens"):
        objective = kind(CONFIG, SingleLevel(), **{which: "masked"})
        with pytest.raises(ValueError, match="with one level no token is"):
            objective(student, teacher, batch, draws())


def test_unknown_distances_and_offsets_are_refused():
    with pytest.raises(
        ValueError, match="distance is 'l1'; known are cosine, smooth_l1, l2"
    ):
        SelfFlow(CONFIG, distance="l1")
    for offset in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"offset is {offset}"):
            SRA(CONFIG, offset=offset)
    for layer in (0, 5):
        with pytest.raises(
            ValueError,
            match=f"student_layer is {layer}, but the model has layers 1 to 4",
        ):
            REPA(CONFIG, 7, student_layer=layer)
    assert issubclass(REPA, FeatureObjective)
    assert REPA(CONFIG, 7, student_layer=4, head_width=9).taps == (4,)


def test_the_ema_equals_its_closed_form():
    student = random_model(0)
    decay = 0.9
    teacher = make_teacher(student)
    history = [{name: p.detach().clone() for name, p in student.named_parameters()}]
    for step in range(5):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                )
        update_ema(teacher, student, decay)
        history.append(
            {name: p.detach().clone() for name, p in student.named_parameters()}
        )
    weights = [decay**5] + [(1 - decay) * decay ** (5 - i) for i in range(1, 6)]
    assert sum(weights) == pytest.approx(1)
    for name, average in teacher.named_parameters():
        expected = sum(w * h[name] for w, h in zip(weights, history, strict=True))
        torch.testing.assert_close(average, expected, atol=1e-5, rtol=1e-4)


def test_an_average_halves_within_its_half_life():
    assert ema_decay(100) ** 100 == pytest.approx(0.5)
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="half_life"):
            ema_decay(wrong)


def test_the_teacher_is_a_copy_that_shares_no_memory(student):
    teacher = make_teacher(student)
    assert not {p.data_ptr() for p in teacher.parameters()} & {
        p.data_ptr() for p in student.parameters()
    }
    assert all(
        torch.equal(a, b)
        for a, b in zip(teacher.parameters(), student.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "depth, layers",
    [(28, (8, 20)), (12, (4, 8)), (6, (2, 4)), (4, (1, 3)), (2, (1, 2))],
)
def test_default_layers_follow_from_the_depth(depth, layers):
    assert default_layers(depth) == layers


@pytest.mark.parametrize(
    "depth, layers", [(28, (8, 16)), (12, (4, 7)), (4, (1, 2)), (2, (1, 2))]
)
def test_default_layers_of_layer_sync_follow_from_the_depth(depth, layers):
    objective = LayerSync(
        TransformerConfig.of_image(
            channels=3, grid=(2, 3), width=16, depth=depth, heads=2
        )
    )
    assert (
        (objective.student_layer, objective.teacher_layer) == layers == objective.taps
    )


@pytest.mark.parametrize(
    "kind, layers",
    [
        (SelfFlow, (3, 3)),
        (SelfFlow, (4, 2)),
        (SelfFlow, (0, 2)),
        (SelfFlow, (1, 5)),
        (SRA, (3, 3)),
        (LayerSync, (4, 2)),
    ],
)
def test_layers_that_do_not_fit_are_refused(kind, layers):
    with pytest.raises(
        ValueError,
        match=f"student_layer {layers[0]} and teacher_layer {layers[1]} do not fit",
    ):
        kind(CONFIG, None, *layers)


def test_the_projector_has_the_published_shapes():
    shapes = [tuple(p.shape) for p in Projector(16).parameters()]
    assert shapes == [(32, 16), (32,), (16, 32), (16,)]
    assert isinstance(Projector(16)[1], torch.nn.SiLU)


def test_losses_are_logged_as_plain_floats(student, teacher, batch):
    assert Losses(torch.tensor(1.0), torch.tensor(1.0)).floats(diagnose=True) == {
        "total": 1.0,
        "flow_loss": 1.0,
    }
    losses = SelfFlow(CONFIG)(student, teacher, batch, draws())
    few = losses.floats()
    many = losses.floats(diagnose=True)
    assert list(few) == ["total", "flow_loss", "rep_loss", "cosine", "constant_cosine"]
    assert few["cosine"] == pytest.approx(1 - few["rep_loss"], abs=1e-6)
    assert few["total"] == losses.total.item()
    assert few.items() < many.items()
    assert {
        "feature_std",
        "effective_rank",
        "cosine_gap_0",
    } < set(many)
    assert all(isinstance(value, float) for value in many.values())
