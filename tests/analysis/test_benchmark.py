"""The published form computes what ours does; the benchmark counts what it reports."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.analysis.benchmark import (
    Case,
    _contenders,
    _seconds,
    bench,
    bench_table,
    count_flops,
    measure,
    peak_memory,
)
from selfflow.cli import main
from selfflow.draws import keyed
from selfflow.method.batch import Batch, Condition
from selfflow.method.objective import SelfFlow, make_teacher
from selfflow.method.per_token import PerTokenTransformer, PublishedSelfFlow
from selfflow.method.schedule import DualTimestep
from selfflow.method.transformer import Transformer, TransformerConfig

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 3), (4, 4)]),
    st.integers(2, 4),
    st.integers(0, 99),
    st.floats(0, 0.5),
)
def test_the_published_form_is_the_same_function(batch, grid, depth, seed, mask_ratio):
    torch.manual_seed(seed)
    ours = Transformer(TransformerConfig.of_image(3, grid, 16, depth, 2, classes=5))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = PerTokenTransformer(ours)
    teacher = make_teacher(ours)
    objective = SelfFlow(
        ours.config, DualTimestep(mask_ratio=mask_ratio), label_drop=0.5
    )
    rival = PublishedSelfFlow(ours.config, objective.schedule, label_drop=0.5)
    rival.load_state_dict(objective.state_dict())
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    x0 = torch.randn(batch, n, 3, generator=g)
    labels = torch.randint(0, 5, (batch,), generator=g)
    samples = Batch(x0, Condition(labels, 5), ours.config.parts)
    losses = (
        objective(ours, teacher, samples, partial(keyed, seed)).total,
        rival(theirs, make_teacher(theirs), samples, partial(keyed, seed)).total,
    )
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in theirs.named_parameters():
        name = name.replace("x_embedder.", "x_embedder.image.").replace(
            "final_layer.linear.", "final_layer.linear.image."
        )
        torch.testing.assert_close(
            ours.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-3
        )


def test_operations_follow_from_the_shapes():
    case = Case("tiny", tokens=16, batch=2)
    flops = {name: count_flops(step) for name, step in _contenders(case, CPU).items()}
    d, depth, n, b, k = 128, 6, 16, 2, 2
    # attention and MLP, forward
    block = 2 * b * n * (12 * d**2 + 2 * n * d)
    # modulation of one condition a sample
    once = 2 * b * 6 * d**2
    ends = 2 * b * n * 2 * 16 * d  # first and last layer
    time = 2 * b * (256 * d + d**2)  # of one level a sample
    sampling = depth * (block + once) + ends + 2 * b * 2 * d**2 + time
    assert flops["sampling"] == sampling
    per_token = depth * (block + n * once) + ends + n * (2 * b * 2 * d**2 + time)
    assert flops["sampling, published form"] == per_token
    # the first layer needs no gradient of its input
    assert flops["flow matching"] == pytest.approx(3 * sampling, rel=0.02)
    head = 3 * 2 * b * n * 4 * d**2
    assert flops["published form"] == pytest.approx(4 * per_token + head, rel=0.03)
    extra = (k - 1) * 3 * (depth * once + time)
    assert flops["Self-Flow"] == pytest.approx(
        3 * sampling + extra + sampling * 4 / 6 + head, rel=0.03
    )


def test_the_aims_in_operations_are_reached_at_the_sizes_of_the_field():
    steps = _contenders(Case("S", batch=1), CPU)
    ours, published, vanilla = (
        count_flops(steps[name])
        for name in ("Self-Flow", "published form", "flow matching")
    )
    assert ours <= 0.64 * published
    assert ours <= 1.27 * vanilla


def test_peak_memory_is_that_of_the_worst_moment():
    mebibyte = 2**18  # float32 numbers

    def function():
        kept = torch.empty(mebibyte)
        del kept
        first = torch.empty(2 * mebibyte)
        second = torch.empty(3 * mebibyte)
        del first, second
        return torch.empty(mebibyte)

    assert peak_memory(function, CPU) == pytest.approx(5 * 2**20, rel=0.01)


def test_modulation_per_token_is_gone_from_memory():
    steps = _contenders(Case("tiny", tokens=64, batch=8), CPU)
    for step in steps.values():
        step()
    peak = {
        name: peak_memory(steps[name], CPU)
        for name in ("Self-Flow", "published form", "flow matching")
    }
    per_token = 8 * 64 * 6 * 128 * 4 * 6  # bytes of (b, n, 6 d) in six blocks
    assert peak["Self-Flow"] < peak["published form"] - 0.9 * per_token
    assert peak["Self-Flow"] < 1.25 * peak["flow matching"]


def small_ceiling(precision, device):
    "From a small product; the test of the command measures the real one."
    n = 512
    a = torch.randn(n, n).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return lambda: 2 * n**3 / min(_seconds(lambda: a @ a, device) for _ in range(3))


def test_records_are_written_after_each_case(tmp_path, monkeypatch):
    monkeypatch.setattr("selfflow.analysis.benchmark._ceiling", small_ceiling)
    cases = [
        Case("tiny", tokens=4, batch=1),
        Case("tiny", tokens=4, batch=1, precision="bf16"),
    ]
    path = tmp_path / "new/b.json"
    records = bench(cases, path, rounds=2, device="cpu")
    assert json.loads(path.read_text()) == records
    assert [r["case"]["precision"] for r in records] == ["fp32", "bf16"]
    found = records[0]["results"]["Self-Flow"]
    assert found["seconds"] == sorted(found["seconds"])
    assert found["speed_ratio"][1] > 0
    assert 0 < found["ceiling_share"][1] < 2
    assert records[0]["results"]["published form"]["speed_ratio"] == [1, 1, 1]
    assert len(bench_table(records)) == 10
    monkeypatch.setattr("selfflow.analysis.benchmark._contenders", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(cases[:1], path)
    assert json.loads(path.read_text()) == records, "a failure leaves the old record"


def test_the_command(tmp_path, capsys):
    main(
        [
            "bench",
            "--sizes",
            "tiny",
            "--precisions",
            "fp32",
            "--tokens",
            "4",
            "--batch",
            "1",
            "--rounds",
            "1",
            "--output",
            str(tmp_path / "b.json"),
            "--device",
            "cpu",
        ]
    )
    assert "published form" in capsys.readouterr().out
    assert (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: Case("M"), "size is 'M'; known are S, B, L, XL and tiny"),
        (lambda: Case(tokens=15), "tokens 15 must be a square"),
        (lambda: Case(batch=0), "batch 0"),
        (lambda: Case(precision="fp8"), "precision is 'fp8'"),
        (lambda: measure(Case("tiny"), rounds=0), "rounds is 0"),
    ],
)
def test_bad_cases_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()
