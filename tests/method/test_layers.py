"""Compact layers for several levels equal plain formulas in values and gradients and
store less; attention, positions and time embeddings equal their definitions.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from selfflow.method.layers import (
    Attention,
    Groups,
    TimestepEmbedder,
    TokenMap,
    attend,
    attend_within,
    collect,
    gated_add,
    modulated_norm,
    spread,
)
from selfflow.method.schedule import NoiseLevels
from selfflow.method.tokens import position_code, rotary_code, rotate, sinusoid

few_examples = settings(deadline=None, max_examples=20)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def levels_of(b, k, n, seed=0, condition=0):
    """Levels with a random assignment; some levels may have no token."""
    g = generator(seed)
    return NoiseLevels(
        torch.rand(b, k, generator=g),
        torch.randint(0, k, (b, n), generator=g),
        condition,
    )


def per_token(values, levels):
    """Values (b, k, d) for each token (b, n, d), by loops."""
    return torch.stack(
        [
            torch.stack([values[i, j] for j in row])
            for i, row in enumerate(levels.assign.tolist())
        ]
    )


def plain_norm(x, shift, scale):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    deviation = ((x - mean).square().sum(-1, keepdim=True) / x.shape[-1] + 1e-6).sqrt()
    return (1 + scale) * (x - mean) / deviation + shift


# from levels to tokens

sizes = st.tuples(
    st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000)
).map(lambda v: (v[0], min(v[1], v[2]), v[2], v[3]))


@few_examples
@given(sizes)
def test_spread_is_a_gather_and_collect_is_its_transpose(size):
    b, k, n, seed = size
    levels = levels_of(b, k, n, seed)
    g = generator(seed)
    tokens = TokenMap.of(levels)
    assert (tokens is None) == (k == 1)
    assert k == 1 or (tokens.onehot is None) == (k > 8)
    values = torch.randn(b, k, 5, generator=g, dtype=torch.float64)
    of_tokens = torch.randn(b, n, 5, generator=g, dtype=torch.float64)
    expected = per_token(values, levels)
    assert torch.equal(spread(values, tokens).expand_as(expected), expected)
    sums = torch.zeros_like(values)
    for i in range(b):
        for token, j in enumerate(levels.assign[i].tolist()):
            sums[i, j] += of_tokens[i, token]
    torch.testing.assert_close(collect(of_tokens, tokens, k), sums)


@few_examples
@given(sizes)
def test_compact_modulation_equals_one_condition_per_token(size):
    b, k, n, seed = size
    levels = levels_of(b, k, n, seed)
    g = generator(seed + 1)
    x, branch, upstream = (torch.randn(b, n, 12, generator=g) for _ in range(3))
    conditions = [torch.randn(b, k, 12, generator=g) for _ in range(3)]
    actual = []
    expected = []
    for out, compact in ((actual, True), (expected, False)):
        leaves = [
            values.clone().requires_grad_() for values in (x, branch, *conditions)
        ]
        if compact:
            tokens = TokenMap.of(levels)
            y = gated_add(
                modulated_norm(leaves[0], leaves[2], leaves[3], tokens),
                leaves[1],
                leaves[4],
                tokens,
            )
        else:
            shift, scale, gate = (per_token(values, levels) for values in leaves[2:])
            y = plain_norm(leaves[0], shift, scale) + gate * leaves[1]
        out += [y.detach(), *torch.autograd.grad(y, leaves, upstream)]
    torch.testing.assert_close(actual[:1], expected[:1], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(actual[1:], expected[1:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("k, condition", [(1, 0), (2, 0), (3, 1), (10, 0), (12, 2)])
def test_gradients_equal_finite_differences(k, condition):
    levels = levels_of(2, k, 12, seed=k, condition=condition)
    g = generator(k)
    x, branch = (
        torch.randn(2, 12, 3, generator=g, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    shift, scale, gate = (
        torch.randn(2, k, 3, generator=g, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    tokens = TokenMap.of(levels)
    assert torch.autograd.gradcheck(
        lambda *v: modulated_norm(*v, tokens), (x, shift, scale)
    )
    assert torch.autograd.gradcheck(lambda *v: gated_add(*v, tokens), (x, branch, gate))


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 3, 4, requires_grad=True)
    shift = torch.zeros(2, 1, 4, requires_grad=True)
    for y in (modulated_norm(x, shift, shift, None), gated_add(x, x, shift, None)):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("k", [1, 2, 10])
def test_autocast_computes_products_in_bf16_and_gradients_in_the_type_of_each_input(
    k,
):
    levels = levels_of(3, k, 16, seed=k)
    g = generator(k)
    tokens = TokenMap.of(levels)
    x, shift, scale = (
        torch.randn(3, 16, 32, generator=g),
        *torch.randn(2, 3, k, 32, generator=g),
    )
    branch = torch.randn(3, 16, 32, generator=g).bfloat16()
    gate = torch.randn(3, k, 32, generator=g).bfloat16()
    inputs = [tensor.requires_grad_() for tensor in (x, shift, scale, branch, gate)]
    with torch.autocast("cpu", torch.bfloat16):
        normed = modulated_norm(x, shift, scale, tokens)
        added = gated_add(x, branch, gate, tokens)
        (normed.float().square().sum() + added.square().sum()).backward()
    assert normed.dtype == torch.bfloat16
    assert added.dtype == torch.float32, "the residual stream stays in float32"
    assert [tensor.grad.dtype for tensor in inputs] == [
        tensor.dtype for tensor in inputs
    ]

    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    spread_out = [
        per_token(tensor, levels) for tensor in (doubles[1], doubles[2], doubles[4])
    ]
    exact = plain_norm(doubles[0], *spread_out[:2])
    total = doubles[0] + spread_out[2] * doubles[3]
    (exact.square().sum() + total.square().sum()).backward()
    torch.testing.assert_close(normed.double(), exact, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(added.double(), total, atol=1e-5, rtol=1e-5)
    for tensor, reference in zip(inputs, doubles, strict=True):
        error = (tensor.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < 0.01, error


def test_only_input_and_branch_are_stored_per_token():
    b = 2
    n = 16
    d = 8
    stored = []
    levels = levels_of(b, 3, n)
    tokens = TokenMap.of(levels)
    x, branch = (torch.randn(b, n, d, requires_grad=True) for _ in range(2))
    shift, scale, gate = (torch.randn(b, 3, d, requires_grad=True) for _ in range(3))

    def pack(tensor):
        if tensor.numel() >= b * n * d:
            stored.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        modulated_norm(x, shift, scale, tokens)
        assert stored == [x.data_ptr()]
        gated_add(x, branch, gate, tokens)
        assert stored == [x.data_ptr(), branch.data_ptr()]
        plain_norm(x, per_token(shift, levels), per_token(scale, levels))
        assert len(stored) > 4, "the plain formula stores several, so the hook works"


# attention


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("hidden", [False, True])
# small ones are computed by products, large ones by torch
@pytest.mark.parametrize("n, m", [(5, 5), (3, 9), (130, 130), (520, 520)])
def test_attention_equals_that_of_torch(dtype, tolerance, hidden, n, m):
    g = generator(n)
    q = torch.randn(2, n, 3, 8, generator=g).to(dtype).requires_grad_()
    k, v = (
        torch.randn(2, m, 3, 8, generator=g).to(dtype).requires_grad_()
        for _ in range(2)
    )
    visible = None
    if hidden:
        visible = torch.rand(2, m, generator=g) < 0.5
        visible[:, 0] = True
    mask = None if visible is None else visible[:, None, None].expand(2, 3, n, m)
    upstream = torch.randn(2, n, 3, 8, generator=g).to(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    out = attend(q, k, v, visible)
    reference = F.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in wide), mask
    ).transpose(1, 2)
    assert out.dtype == dtype
    assert out.shape == (2, n, 3, 8)
    torch.testing.assert_close(out.double(), reference, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    exact = torch.autograd.grad(reference, wide, upstream.double())
    for a, b in zip(gradients, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), b, atol=4 * tolerance, rtol=4 * tolerance
        )


def test_attention_under_autocast_is_close_to_float32():
    q, k, v = torch.randn(3, 2, 6, 3, 8, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*(tensor.bfloat16() for tensor in (q, k, v)))
    torch.testing.assert_close(out.float(), attend(q, k, v), atol=3e-2, rtol=3e-2)


def visible_by_loops(levels):
    """True where a query may attend to a key, (b, n, n): to its own level and to every
    condition.
    """
    b, n = levels.assign.shape
    generated = levels.k - levels.condition
    visible = torch.zeros(b, n, n, dtype=torch.bool)
    for i in range(b):
        for query in range(n):
            for key in range(n):
                query_level = levels.assign[i, query].item()
                key_level = levels.assign[i, key].item()
                visible[i, query, key] = key_level >= generated or (
                    query_level == key_level and query_level < generated
                )
    return visible


@few_examples
@given(
    st.integers(1, 3),
    st.integers(2, 24),
    st.integers(2, 24),
    st.integers(0, 3),
    st.integers(0, 1000),
    st.booleans(),
)
def test_attention_within_groups_equals_attention_with_a_mask(
    b, n, k, condition, seed, lopsided
):
    k = max(2, min(k, n))
    condition = min(condition, k - 1)
    levels = levels_of(b, k, n, seed, condition)
    g = generator(seed)
    if lopsided:  # one sample has a single level, so its other levels have no token
        levels.assign[0] = int(torch.randint(0, k, (), generator=g))
    q, k_, v, upstream = (
        torch.randn(b, n, 2, 4, generator=g, dtype=torch.float64, requires_grad=True)
        for _ in range(4)
    )
    out = attend_within(q, k_, v, Groups.of(levels))
    mask = visible_by_loops(levels)[:, None]
    expected = F.scaled_dot_product_attention(
        *(gradient.transpose(1, 2) for gradient in (q, k_, v)), mask
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    gradients = torch.autograd.grad(out, (q, k_, v), upstream)
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(
        gradients,
        torch.autograd.grad(expected, (q, k_, v), upstream),
        atol=1e-10,
        rtol=1e-10,
    )


def test_tokens_with_their_own_levels_attend_only_to_themselves():
    n = 9
    v = torch.randn(2, 9, 2, 4)
    levels = NoiseLevels(
        torch.rand(2, n),
        torch.stack([torch.randperm(n, generator=generator(i)) for i in range(2)]),
    )
    torch.testing.assert_close(attend_within(v, v, v, Groups.of(levels)), v)
    assert all(
        group.visible is None and len(group.rows) == 2
        for group in Groups.of(levels).groups
    )


def test_exact_counts_need_no_padding_and_other_counts_few_sizes():
    exact = NoiseLevels(
        torch.rand(3, 2),
        torch.tensor(
            [[0] * 30 + [1] * 10, [1] * 10 + [0] * 30, ([0, 1] * 10) + [0] * 20]
        ),
    )
    assert [(len(group.rows), group.visible) for group in Groups.of(exact).groups] == [
        (90, None),
        (30, None),
    ]
    padded = [
        group
        for seed in range(20)
        for group in Groups.of(levels_of(3, 2, 64, seed)).groups
        if group.visible is not None
    ]
    assert padded
    # few sizes, so few kernels to compile
    assert {len(group.rows) // 3 for group in padded} <= {16, 32, 48, 64}
    assert all(group.visible.sum(1).min() >= 1 for group in padded)


def test_conditions_are_visible_to_all_tokens_and_attend_only_to_conditions():
    levels = NoiseLevels(
        torch.tensor([[0.8, 0.5, 0.1, 0.0]]),
        torch.tensor([[0, 0, 1, 1, 2, 3]]),
        condition=2,
    )
    v = torch.eye(6)[None, :, None, :]
    weights = attend_within(
        torch.zeros(1, 6, 1, 6), torch.zeros(1, 6, 1, 6), v, Groups.of(levels)
    )[0, :, 0]
    a = [1 / 4, 1 / 4, 0, 0, 1 / 4, 1 / 4]
    b = [0, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4]
    torch.testing.assert_close(
        weights, torch.tensor([a, a, b, b, *[[0, 0, 0, 0, 1 / 2, 1 / 2]] * 2])
    )


# positions and levels


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("per_sample", [False, True])
def test_rotary_scores_depend_only_on_differences_along_every_axis(axis, per_sample):
    g = generator(axis)
    q, k = torch.randn(2, 1, 7, 2, 32, generator=g)
    places = 20 * torch.rand(7, 4, generator=g)
    moved = places.clone()
    moved[:, axis] += 13.0  # all tokens
    changed = places.clone()
    changed[3, axis] += 1.5  # a single token

    def scores(coordinates):
        code = rotary_code(coordinates[None] if per_sample else coordinates, 32)
        return torch.einsum("bnhe,bmhe->bhnm", rotate(q, code), rotate(k, code))

    torch.testing.assert_close(scores(moved), scores(places), atol=1e-4, rtol=1e-4)
    assert (scores(changed) - scores(places))[..., 3, 0].abs().min() > 1e-3
    torch.testing.assert_close(
        scores(changed)[..., 3, 3], scores(places)[..., 3, 3], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        rotate(q, rotary_code(places, 32)).norm(dim=-1), q.norm(dim=-1)
    )


def test_rotary_angles_equal_their_formula():
    code = rotary_code(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 16)
    angles = [place * 2000 ** (-i / 2) for place in (1, 2, 3, 4) for i in range(2)]
    torch.testing.assert_close(
        code[:, 0],
        torch.tensor([list(map(math.cos, angles)), list(map(math.sin, angles))]),
    )
    x = torch.arange(16.0).view(1, 1, 1, 16)
    rotated = rotate(x, code)[0, 0, 0]
    for i, angle in enumerate(angles):
        expected = complex(i, i + 8) * complex(math.cos(angle), math.sin(angle))
        torch.testing.assert_close(
            rotated[[i, i + 8]],
            torch.tensor([expected.real, expected.imag]),
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotation_preserves_the_precision(dtype):
    x = torch.randn(1, 5, 2, 16, generator=generator(), dtype=torch.float64).to(dtype)
    code = rotary_code(torch.rand(5, 4), 16)
    exact = rotate(x.double(), code.double())
    assert rotate(x, code).dtype == dtype
    torch.testing.assert_close(
        rotate(x, code), exact.to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps
    )


def test_the_position_code_equals_that_of_mae():
    code = position_code(torch.tensor([[9.0, 2.0, 3.0, 9.0]]), 16)[0]
    omega = [10_000 ** (-i / 4) for i in range(4)]
    expected = [
        f(place * w) for place in (3, 2) for f in (math.sin, math.cos) for w in omega
    ]
    torch.testing.assert_close(code, torch.tensor(expected))


def test_levels_are_embedded_without_scaling():
    code = sinusoid(torch.tensor([0.0, 0.25]), 6)
    angles = [0.25 * 10_000 ** (-i / 3) for i in range(3)]
    assert code[0].tolist() == [1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(
        code[1], torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
    )
    assert TimestepEmbedder(8).bfloat16()(torch.rand(2, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_neighbouring_levels_stay_distinct_under_autocast(std):
    levels = torch.linspace(0, 1, 1001)[None]
    torch.manual_seed(0)
    exact = TimestepEmbedder(32)
    coarse = TimestepEmbedder(32, fp32=False)
    with torch.no_grad():
        for layer in (exact.mlp[0], exact.mlp[2]):
            layer.weight.normal_(std=std)
            layer.bias.zero_()
    coarse.load_state_dict(exact.state_dict())
    expected = exact(levels)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = exact(levels)
        rounded = coarse(levels).float()
    torch.testing.assert_close(in_autocast, expected, rtol=0, atol=0)
    assert in_autocast.dtype == torch.float32
    assert len(in_autocast[0].unique(dim=0)) == 1001
    # runs of formats 1 to 3 have the other form, in which some levels are equal and
    # most steps between neighbours are wrong
    assert len(rounded[0].unique(dim=0)) < 1001
    true_steps = expected[0].diff(dim=0).norm(dim=1)
    steps = rounded[0].diff(dim=0).norm(dim=1)
    assert ((steps / true_steps - 1).abs() > 0.3).float().mean() > 0.9


def test_normalised_queries_and_keys_ignore_their_scale():
    torch.manual_seed(0)
    attention = Attention(16, 2, qk_norm=True)
    x = torch.randn(1, 5, 16)
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:32] *= 50
        attention.qkv.bias[:32] *= 50
    torch.testing.assert_close(attention(x), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        attention.q_norm.weight *= (
            0  # with all scores 0 the output is the mean of the values
        )
    values = attention.qkv(x)[..., 32:].mean(1, keepdim=True)
    torch.testing.assert_close(attention(x), attention.proj(values).expand(1, 5, 16))
