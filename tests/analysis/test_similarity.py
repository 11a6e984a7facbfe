"""Similarity measures equal kernels written out in full, and the ladder detects planted
parts of features.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfflow.analysis.agreement import Compared, another, compare, mean_of_samples
from selfflow.analysis.saturation import (
    Ladder,
    _mean_directions,
    cosine_by_gap,
    fit_directions,
    ladder,
    look_up,
    saturation,
)
from selfflow.analysis.similarity import (
    cka,
    cknna,
    describe_layers,
    jackknife,
    self_similarity,
    similarities,
)
from selfflow.draws import keyed
from selfflow.figures.layers import (
    draw_ladder,
    draw_layers,
    draw_saturation,
    draw_similarities,
)
from selfflow.intervals import mean_interval
from selfflow.method.alignment import constant_cosine
from selfflow.method.batch import Batch, Condition
from selfflow.method.objective import (
    REPA,
    SRA,
    FlowMatching,
    LayerSync,
    SelfFlow,
    make_teacher,
)
from selfflow.method.transformer import Transformer, TransformerConfig
from selfflow.training.run import run_at

ALL_TOKENS = torch.ones(6, 4, dtype=torch.bool)


def features(n, d, seed=0, e=None):
    g = keyed(seed, "features")
    x = torch.randn(n, d, generator=g).double()
    return x, x @ torch.randn(d, e or d, generator=g).double() + torch.randn(
        n, e or d, generator=g
    )


def unbiased_as_written(a, b):
    "Equation 5 of Song et al. (2012) with full matrices, symmetric or not."
    n = len(a)
    one = np.ones(len(a))
    a = a - np.diag(np.diag(a))
    b = b - np.diag(np.diag(b))
    return (
        np.trace(a @ b)
        + one @ a @ one * (one @ b @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * one @ a @ b @ one
    )


def unbiased_by_centring(k, m):
    "The inner product of U-centred kernels (Szekely & Rizzo, 2014), by loops."
    n = len(k)

    def centre(m):
        m = np.array(m, float)
        np.fill_diagonal(m, 0)
        rows = m.sum(1)
        columns = m.sum(0)
        total = m.sum()
        out = np.zeros_like(m)
        for i in range(n):
            for j in range(n):
                if i != j:
                    out[i, j] = (
                        m[i, j]
                        - rows[i] / (n - 2)
                        - columns[j] / (n - 2)
                        + total / ((n - 1) * (n - 2))
                    )
        return out

    a = centre(k)
    b = centre(m)
    return sum(a[i, j] * b[j, i] for i in range(n) for j in range(n) if i != j) / (
        n * (n - 3)
    )


def ratio(hsic, first, second, between):
    return hsic(*between) / np.sqrt(hsic(*first) * hsic(*second))


@pytest.mark.parametrize(
    "n, d, e, seed", [(12, 3, 5, 0), (9, 20, 4, 1), (30, 2, 2, 2), (5, 7, 7, 3)]
)
def test_cka_is_the_correlation_of_centred_kernels(n, d, e, seed):
    x, y = features(n, d, seed, e)
    k, m = (values @ values.T for values in (x.numpy(), y.numpy()))
    assert cka(x, y) == pytest.approx(
        ratio(unbiased_by_centring, (k, k), (m, m), (k, m)), rel=1e-8
    )
    h = np.eye(n) - 1 / n
    plain = ratio(lambda a, b: np.trace(a @ h @ b @ h), (k, k), (m, m), (k, m))
    assert cka(x, y, unbiased=False) == pytest.approx(plain, rel=1e-8)


@pytest.mark.parametrize(
    "n, d, e, k, seed", [(40, 3, 5, 10, 0), (25, 6, 2, 4, 1), (60, 8, 8, 10, 2)]
)
@pytest.mark.parametrize("unit", [True, False])
def test_cknna_is_the_correlation_of_masked_kernels(n, d, e, k, seed, unit):
    x, y = features(n, d, seed, e)
    inputs = [
        values.numpy() / np.linalg.norm(values.numpy(), axis=1, keepdims=True)
        if unit
        else values.numpy()
        for values in (x, y)
    ]
    kernels = [values @ values.T for values in inputs]
    near = []
    for kernel in kernels:
        mask = np.zeros((n, n))
        for i in range(n):
            others = sorted(
                (j for j in range(n) if j != i),
                key=lambda j, i=i, kernel=kernel: -kernel[i, j],
            )
            mask[i, others[:k]] = 1
        near.append(mask)
    a, b = kernels
    shared = near[0] * near[1]
    expected = ratio(
        unbiased_as_written,
        (near[0] * a,) * 2,
        (near[1] * b,) * 2,
        (shared * a, shared * b),
    )
    assert cknna(x, y, k, unit) == pytest.approx(expected, rel=1e-8)
    assert cknna(x, y, k, unit, rows=7) == pytest.approx(expected, rel=1e-8), (
        "the result does not depend on the block size"
    )


@pytest.mark.parametrize("measure", [cka, cknna])
def test_similarity_ignores_rotation_scale_and_the_order_of_samples(measure):
    x, y = features(50, 6, 4)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=keyed(0, "turn")).double()).Q
    order = torch.randperm(50, generator=keyed(0, "order"))
    for equal_value in (measure(5 * x @ rotation, y), measure(x[order], y[order])):
        assert equal_value == pytest.approx(measure(x, y), rel=1e-7)
    assert measure(x, 0.1 * x @ rotation) == pytest.approx(1)
    assert cka(y, x) == pytest.approx(cka(x, y), rel=1e-7)
    assert cknna(y, x) == pytest.approx(cknna(x, y), abs=0.02)
    assert cka(x + 7, y - 3) == pytest.approx(cka(x, y), rel=1e-7), (
        "a common offset does not count"
    )
    stretched = x * torch.tensor([30.0, 1, 1, 1, 1, 1])
    assert abs(measure(stretched, y) - measure(x, y)) > 0.01, (
        "other scales are another representation"
    )


def test_unrelated_wide_features_have_no_similarity():
    pairs = [
        (features(60, 200, 2 * s)[0], features(60, 200, 2 * s + 1)[0])
        for s in range(10)
    ]
    assert (
        abs(np.mean([cka(*pair) for pair in pairs]))
        < 0.02
        < 0.7
        < np.mean([cka(*pair, unbiased=False) for pair in pairs])
    )
    assert np.mean([cknna(*pair) for pair in pairs]) == pytest.approx(
        10 / 59, abs=0.05
    ), "only neighbours by chance"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: cka(torch.randn(9, 3), torch.randn(8, 3)), "same n samples"),
        (lambda: cka(torch.randn(3, 3), torch.randn(3, 3)), "at least 4"),
        (lambda: cka(torch.randn(9, 4, 3), torch.randn(9, 4, 3)), "mean over tokens"),
        (lambda: cka(torch.full((9, 3), torch.nan), torch.randn(9, 3)), "27 values"),
        (lambda: cka(torch.ones(9, 3), torch.randn(9, 3)), "are equal"),
        (
            lambda: cknna(torch.randn(9, 3), torch.randn(9, 3), 9),
            "fewer than there are samples",
        ),
        (lambda: cknna(torch.randn(9, 3), torch.randn(9, 3), 1), "take at least 2"),
        (lambda: cknna(torch.zeros(30, 3), torch.randn(30, 3)), "do not differ"),
        (
            lambda: jackknife(cka, torch.randn(9, 3), torch.randn(9, 3), groups=10),
            "no more than",
        ),
        (lambda: self_similarity(torch.randn(2, 9, 3), (2, 4)), "expected"),
        (lambda: self_similarity(torch.randn(2, 2, 3), (2,)), "both kinds"),
        (lambda: another(torch.zeros(1).long(), False), "take more"),
        (
            lambda: fit_directions(
                torch.randn(1, 2, 3),
                [torch.zeros(1, 2).long()],
                [1],
                ALL_TOKENS[:1, :2],
            ),
            "take more",
        ),
        (lambda: draw_similarities({"a": np.eye(3)}, ["x", "y"]), "shape"),
        (lambda: draw_saturation([0, 1], {"student": [1, 1]}), "above 0"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_jackknife_of_a_mean_gives_students_interval():
    x = torch.randn(200, 1, generator=keyed(1, "x")).double()
    value, low, high = jackknife(lambda values: values.mean(), x, groups=200)
    # Student's, with 199 degrees of freedom
    half = 1.971957 * x.std().item() / 200**0.5
    assert value == pytest.approx(x.mean().item())
    assert (low, high) == pytest.approx((value - half, value + half))


def test_similarities_cover_every_pair():
    first, second = (
        {name: features(20, 4, seed)[0] for name, seed in pairs.items()}
        for pairs in ({1: 0, 2: 1}, {"a": 2, "b": 3, "c": 0})
    )
    table = similarities(first, second)
    assert table.shape == (2, 3)
    assert table.loc[1, "c"] == pytest.approx(1)
    assert table.loc[2, "b"] == cka(first[2], second["b"])
    own = similarities(first, measure=cknna)
    assert own.loc[1, 2] == cknna(first[1], first[2])
    assert own.loc[2, 1] == cknna(first[2], first[1])
    assert own.loc[1, 1] == pytest.approx(1)


@pytest.mark.parametrize(
    "grid, near, far", [((3, 4), 1, None), ((2, 3, 2), 1, 2), ((6,), 2, 4)]
)
def test_self_similarity_equals_loops(grid, near, far):
    places = list(np.ndindex(grid))
    x = torch.randn(3, len(places), 5, generator=keyed(0, "tokens"))
    limit = -(-sum(side - 1 for side in grid) // 2) if far is None else far
    for sample, actual in zip(
        x, self_similarity(x, grid, near, far, batch=2), strict=True
    ):
        cosines = {"near": [], "far": []}
        for i, p in enumerate(places):
            for j, q in enumerate(places):
                steps = sum(abs(a - b) for a, b in zip(p, q, strict=True))
                cosine = F.cosine_similarity(sample[i], sample[j], dim=0).item()
                cosines["near"] += [cosine] * (0 < steps <= near)
                cosines["far"] += [cosine] * (steps >= limit)
        assert actual.tolist() == pytest.approx(
            [np.mean(cosines["near"]), np.mean(cosines["far"])], abs=1e-6
        )


def test_the_description_of_layers_agrees_with_its_measures():
    x = 3 * torch.randn(20, 9, 4, generator=keyed(0, "x")) + 1
    row = describe_layers({7: x}, (3, 3)).loc[7]
    norms = x.norm(dim=-1).mean(1).double()
    assert row["common direction"] == pytest.approx(constant_cosine(x).item())
    assert row["norm"] == pytest.approx(norms.mean().item())
    assert (row["norm"], row["norm, low"], row["norm, high"]) == pytest.approx(
        mean_interval(norms)
    )
    assert row["local - distant"] == pytest.approx(row["local"] - row["distant"])
    assert len(draw_layers({"a": describe_layers({1: x, 2: x}, (3, 3))}).axes) == 4


# the parts of the student's cosine


def test_mean_directions_equal_loops():
    unit = F.normalize(torch.randn(6, 4, 3, generator=keyed(0, "unit")), dim=-1)
    place = torch.arange(4).expand(6, 4)
    bins = torch.tensor([0, 0, 1, 1, 1, 2])[:, None].expand(6, 4)
    counted = torch.rand(6, 4, generator=keyed(0, "counted")) < 0.7
    zero = torch.zeros(6, 4).long()
    directions = _mean_directions(
        unit, [zero, place, bins], [1, 4, 4], counted, prior=2.0
    )
    constant = unit[counted].mean(0)
    torch.testing.assert_close(directions[0][0], constant)
    for p in range(4):
        own = unit[:, p][counted[:, p]]
        by_place = (own.sum(0) + 2 * constant) / (len(own) + 2)
        torch.testing.assert_close(directions[1][p], by_place)
        for k in range(4):
            # no sample is in bin 3: there the coarser mean stays
            own = unit[:, p][counted[:, p] & (bins[:, 0] == k)]
            torch.testing.assert_close(
                directions[2][4 * p + k], (own.sum(0) + 2 * by_place) / (len(own) + 2)
            )
    torch.testing.assert_close(
        look_up(directions, [zero, place, bins], [1, 4, 4])[2][5, 1],
        directions[2][4 * 1 + 2],
    )


def planted(count, seed, image=1.0, answer=0.3):
    """Targets: the sum of a common vector and those of place, level and image.

    The student predicts all of it, but not exactly.
    """
    fixed = keyed(0, "planted")
    common, place, level = (
        torch.randn(*shape, 32, generator=fixed) for shape in ((1, 1), (1, 4), (5, 1))
    )
    g = keyed(seed, "planted samples")
    at = torch.randint(0, 5, (count,), generator=g)
    target = common + place + level[at] + image * torch.randn(count, 4, 32, generator=g)
    tau = (at / 5 + 0.1)[:, None].expand(count, 4)
    answers = {"another image": target.roll(1, 0)}
    predicted = target + answer * torch.randn(count, 4, 32, generator=g)
    return Compared(
        predicted,
        target,
        tau,
        tau,
        torch.ones(count, 4, dtype=torch.bool),
        torch.zeros(count).long(),
        answers,
    )


def test_the_ladder_detects_planted_parts_and_its_constant_is_exact():
    fitted = planted(1500, 1)
    scored = planted(400, 2)
    rungs = ladder(fitted, scored, bins=10)
    means = {name: np.nanmean(values) for name, values in rungs.cosines.items()}
    unit = F.normalize(fitted.target, dim=-1).flatten(0, 1)
    expected = (
        F.cosine_similarity(unit.mean(0, keepdim=True), scored.target.flatten(0, 1))
        .mean()
        .item()
    )
    assert means["constant"] == pytest.approx(expected, abs=1e-6)
    assert means["constant"] < means["place"] - 0.05 < means["place and level"] - 0.1
    assert rungs.floor == "place and level"
    assert means["place and level"] == pytest.approx((3 / 4) ** 0.5, abs=0.02)
    assert set(rungs.free) == {"constant", "place", "place and level", "another image"}
    # the rest comes from what the finest rung knows
    known = means["student"] - rungs.earned.mean()
    assert 0 < known < means["place and level"]
    assert "open without it" in rungs.verdict()
    assert len(draw_ladder(rungs.table()).axes) == 1


def test_the_verdict_recognises_blind_and_perfect_students():
    fitted = planted(1500, 1)
    scored = planted(300, 2)

    def keys(compared):
        return [
            torch.zeros_like(compared.tau).long(),
            torch.arange(4).expand_as(compared.tau),
            (5 * compared.tau).long(),
        ]

    means = fit_directions(
        F.normalize(fitted.target, dim=-1), keys(fitted), [1, 4, 5], fitted.counted
    )
    from_averages = look_up(means, keys(scored), [1, 4, 5])[-1]
    blind = ladder(fitted, replace(scored, predicted=from_averages), bins=10)
    assert "not significantly different from 0" in blind.verdict()
    assert abs(blind.earned.mean()) < 0.01
    all_known = ladder(planted(1500, 1), planted(300, 2, answer=0.01), bins=10)
    assert "little is left" in all_known.verdict()


def test_the_verdict_weighs_what_is_left_to_learn():
    def verdict(student, floor, **options):
        g = np.random.default_rng(0)
        cosines = {
            "constant": floor + 0.001 * g.normal(size=50),
            "student": student + 0.001 * g.normal(size=50),
        }
        return Ladder(
            7, cosines, ("constant",), np.zeros(50), None, {}, **options
        ).verdict()

    assert "nearly all" in verdict(0.52, 0.5)
    assert "still has something to teach" in verdict(0.8, 0.5)
    assert "gradients at the student's layer was 60%" in verdict(
        0.8, 0.5, gradient_share=0.6
    )
    assert "little is left" in verdict(0.99, 0.5)
    assert "is below 0" in verdict(0.4, 0.5)
    assert "cannot be told" not in verdict(0.4, 0.5)


def test_another_sample_has_the_same_label_and_is_never_the_same_sample():
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    chosen = another(labels, within=True)
    assert chosen.tolist()[3] == -1, "the only one of its label"
    for i, j in enumerate(chosen.tolist()):
        assert j == -1 or (labels[i] == labels[j] and i != j)
    assert sorted(another(labels, within=False).tolist()) == list(range(6))


def model(seed=0, **options):
    config = TransformerConfig.of_image(
        4, (4, 4), width=16, depth=4, heads=2, classes=3, **options
    )
    torch.manual_seed(seed)
    net = Transformer(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return config, net, make_teacher(net)


@pytest.mark.parametrize("kind", [SelfFlow, SRA, LayerSync, REPA])
def test_the_compared_cosine_equals_that_of_the_training_loss(kind):
    config, student, teacher = model()
    x0 = torch.randn(12, 16, 4, generator=keyed(0, "x0"))
    labels = torch.arange(12) % 3
    samples = Batch(x0, Condition(labels, 3), config.parts)
    options = (
        {
            "feature_width": 5,
            "encoder": lambda x: x.mean(1) @ torch.ones(4, 5) + torch.arange(5.0),
        }
        if kind is REPA
        else {}
    )
    objective = kind(config, **options)
    compared = compare(objective, student, teacher, samples, labels, "test", batch=12)
    losses = objective(
        student, teacher, samples, lambda what: keyed(0, f"agreement, test, {what}", 0)
    )
    assert compared.cosines().mean().item() == pytest.approx(
        1 - losses.rep_loss.item(), abs=1e-5
    )
    assert ("deeper layer, student's view" in compared.answers) == issubclass(
        kind, SelfFlow
    )
    if kind is SelfFlow:
        torch.testing.assert_close(
            (compared.tau - compared.level).flatten(), losses.alignment.gap
        )
    rolled = compare(
        objective,
        student,
        teacher,
        samples[torch.arange(12).roll(1)],
        labels,
        "test",
        batch=12,
    )
    # it gets the condition of the sample it predicts, not of the one it is given
    if kind is SelfFlow:
        assert not torch.equal(compared.answers["another image"], rolled.predicted)
    assert compared.missing["another image of its label"].sum() == 0


def test_objectives_without_features_have_no_saturation(runs):
    config, student, teacher = model()
    with pytest.raises(TypeError, match="compares no features"):
        samples = Batch(
            torch.randn(4, 16, 4), Condition(torch.zeros(4).long(), 3), config.parts
        )
        compare(
            FlowMatching(), student, teacher, samples, torch.zeros(4).long(), "test"
        )
    with pytest.raises(TypeError, match="flow_matching alone"):
        saturation(runs["vanilla"], 20, 20)


def test_saturation_is_repeatable_and_earlier_steps_can_be_opened(runs):
    run = runs["tiny"]
    result = saturation(run, 60, 40)
    assert result.step == 12
    assert result.sizes == {"fitted": 60, "scored": 40}
    assert len(result.cosines["student"]) == 40
    assert saturation(run, 60, 40).table().equals(result.table()), (
        "the same numbers each time"
    )
    logged = run.log["rep_gradient_share"].dropna()
    assert (result.gradient_share is None) == (not len(logged))
    earlier = run_at(run, 4)
    assert earlier.state()["step"] == 4
    assert run.state()["step"] == 12
    with pytest.raises(FileNotFoundError, match="step-00000008"):
        run_at(run, 5)


def test_each_gap_between_levels_has_its_own_constant():
    torch.manual_seed(0)
    level = torch.zeros(40, 1)
    gap = torch.tensor([0.05, 0.4]).repeat(20)[:, None]
    noisy = torch.zeros(40, 4, dtype=torch.bool)
    noisy[:, 0] = True
    target = torch.randn(40, 4, 8)
    wide = (gap > 0.1)[:, :, None]
    # features of samples with a wide gap have a common direction
    target = torch.where(wide, target + 9, target)
    compared = Compared(
        torch.where(noisy[..., None], -target, target),
        target,
        level + gap * noisy,
        level.expand(40, 4),
        torch.ones(40, 4, dtype=torch.bool),
        torch.zeros(40).long(),
    )
    table = cosine_by_gap(compared, compared).set_index(["tokens", "from"])
    assert table["cosine"].tolist() == pytest.approx([-1, -1, 1, 1])
    assert (table["samples"] == 20).all()
    assert (
        table.loc[("as clean", 0.25), "constant"]
        > 0.98
        > 0.5
        > table.loc[("as clean", 0.0), "constant"]
    )
    directions = F.normalize(target[::2, 0], dim=-1)
    assert table.loc[("noisier", 0.0), "constant"] == pytest.approx(
        directions.mean(0).norm().item(), abs=1e-5
    )


def test_a_mean_over_no_token_is_nan():
    means = mean_of_samples(
        torch.tensor([[1.0, torch.nan], [2.0, 4.0]]),
        torch.tensor([[True, False], [False, False]]),
    )
    assert means[0] == 1
    assert means[1].isnan()
