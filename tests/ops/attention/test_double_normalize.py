"""Double normalization and external attention: exactness, gradients, masks, extreme inputs.

Every backend is compared with the equations in float64; the mutants at the end show that the
comparison would notice the usual mistakes.
"""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eanet.ops.attention import (
    BACKENDS,
    double_normalize,
    external_attention,
    multi_head_external_attention,
    reference,
    slot_softmax,
)

FAST_BACKENDS = sorted(set(BACKENDS) - {"reference"})
NORMS = ("double", "softmax")


@pytest.fixture(params=FAST_BACKENDS)
def backend(request):
    return request.param


def operands(batch, tokens, channels, slots, *, heads=1, dtype=torch.float64, scale=1.0):
    x = scale * torch.randn(batch, tokens, heads * channels, dtype=torch.float64)
    key, value = torch.randn(2, slots, channels, dtype=torch.float64)
    return tuple(tensor.to(dtype) for tensor in (x, key, value))


def padding_mask(batch, tokens, *, empty_last=False):
    mask = torch.rand(batch, tokens) > 0.3
    mask[:, 0] = True
    if empty_last:
        mask[-1] = False
    return mask


# --- against the equations -----------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [1e-9, 0.0, 1e-40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_backend_equals_the_equations(backend, dtype, norm, eps, masked, heads):
    operands64 = operands(3, 19, 5, 7, heads=heads, scale=3.0)
    key_bias, value_bias = torch.randn(7).double(), torch.randn(5).double()
    mask = padding_mask(3, 19, empty_last=True) if masked else None
    options = {"num_heads": heads, "norm": norm, "eps": eps, "mask": mask}

    expected, expected_map = reference.multi_head_external_attention(
        *operands64, memory_key_bias=key_bias, memory_value_bias=value_bias, **options
    )
    actual, actual_map = multi_head_external_attention(
        *(tensor.to(dtype) for tensor in operands64),
        memory_key_bias=key_bias.to(dtype),
        memory_value_bias=value_bias.to(dtype),
        return_attention=True,
        backend=backend,
        **options,
    )

    # logits here reach 30, whose spacing in float32 is 2e-6
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(actual_map.double(), expected_map, rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_those_of_the_equations(backend, dtype, norm, masked):
    tensors = operands(2, 11, 4, 6)
    mask = padding_mask(2, 11) if masked else None
    weights = torch.randn(2, 11, 4, dtype=torch.float64)

    def gradients(name, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        out = external_attention(*leaves, norm=norm, mask=mask, backend=name)
        return torch.autograd.grad(out, leaves, weights.to(dtype))

    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    for actual, expected in zip(
        gradients(backend, dtype), gradients("reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("norm", "heads", "masked", "eps"),
    [*itertools.product(NORMS, (1, 2), (False, True), (1e-9,)), ("double", 2, True, 0.0)],
)
def test_first_and_second_derivatives(norm, heads, masked, eps):
    x, key, value = (t.requires_grad_() for t in operands(2, 4, 2, 3, heads=heads))
    mask = padding_mask(2, 4, empty_last=True) if masked else None

    def function(x, key, value):
        return multi_head_external_attention(
            x, key, value, num_heads=heads, norm=norm, eps=eps, mask=mask
        )

    assert torch.autograd.gradcheck(function, (x, key, value))
    assert torch.autograd.gradgradcheck(function, (x, key, value))


def test_slot_mask_removes_slots(backend):
    logits = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    slot_mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    actual = double_normalize(logits, slot_mask=slot_mask, backend=backend)
    alone = double_normalize(logits[1:, :, :, [0, 2, 3]], backend="reference")
    torch.testing.assert_close(actual[1:, :, :, [0, 2, 3]], alone, rtol=0, atol=1e-14)
    assert (actual[1, :, :, [1, 4]] == 0).all()
    expected = double_normalize(logits, slot_mask=slot_mask, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_any_two_dimensions_may_be_tokens_and_slots(backend):
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = double_normalize(logits, token_dim=2, slot_dim=3, backend="reference")
    for token_dim, slot_dim in ((1, 2), (3, 1), (-1, -3), (2, 1)):
        moved = logits.movedim((2, 3), (token_dim, slot_dim))
        actual = double_normalize(moved, token_dim=token_dim, slot_dim=slot_dim, backend=backend)
        torch.testing.assert_close(
            actual.movedim((token_dim, slot_dim), (2, 3)), expected, rtol=0, atol=1e-14
        )


# --- exactness over many tokens ------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 7, 196, 4096, 65_536, 1_000_000])
def test_float32_is_exact_to_a_millionth(backend, num_tokens):
    logits = 3 * torch.randn(1, num_tokens, 8)
    expected = double_normalize(logits.double(), backend="reference")
    actual = double_normalize(logits, backend=backend)
    assert (actual.double() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("num_tokens", [1, 2, 196, 65_536, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1e-9, 0.0])
@pytest.mark.parametrize("std", [0.1, 12.0, 50.0])
def test_nothing_is_ever_not_finite(backend, num_tokens, dtype, eps, std):
    logits = std * torch.randn(1, num_tokens, 4)
    logits[:, :16] *= 30  # outlier tokens
    logits = logits.to(dtype).requires_grad_()
    attention = double_normalize(logits, eps=eps, backend=backend)
    assert attention.dtype == dtype
    assert attention.isfinite().all()
    assert ((attention >= 0) & (attention <= 1)).all()
    (gradient,) = torch.autograd.grad(attention, logits, torch.randn_like(attention))
    assert gradient.isfinite().all()
    if eps == 0:
        tolerance = 2 * torch.finfo(dtype).eps * logits.shape[2]
        assert (attention.double().sum(-1) - 1).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_largest_inputs_of_the_type(backend, dtype, norm):
    x = torch.full((1, 5, 8), 65504.0 if dtype == torch.float16 else 1e15).to(dtype)
    x[:, ::2] *= -1
    memory = torch.randn(4, 8).to(dtype)
    x.requires_grad_()
    out = external_attention(x, memory, norm=norm, backend=backend)
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("eps", [1e-9, 0.0])
def test_special_cases(backend, eps):
    equal = double_normalize(torch.ones(1, 6, 4), eps=eps, backend=backend)
    torch.testing.assert_close(equal, torch.full((1, 6, 4), 0.25))
    single = double_normalize(5 * torch.randn(1, 1, 4), eps=eps, backend=backend)
    torch.testing.assert_close(single, torch.full((1, 1, 4), 0.25))  # a softmax over one is 1
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 3] = True
    one = double_normalize(torch.randn(2, 6, 4), eps=eps, mask=mask, backend=backend)
    torch.testing.assert_close(one[0, 3], torch.full((4,), 0.25))
    one[0, 3] = 0
    assert (one == 0).all()


# --- properties ----------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(1, 5))


def random_operands(sizes, seed):
    batch, tokens, channels, slots = sizes
    torch.manual_seed(seed)
    return operands(batch, tokens, channels, slots, scale=2.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes, st.integers(0, 2**31), st.sampled_from(NORMS))
def test_permuted_tokens_give_permuted_results(sizes, seed, norm):
    x, key, value = random_operands(sizes, seed)
    order = torch.randperm(x.shape[1])
    out = external_attention(x, key, value, norm=norm)
    permuted = external_attention(x[:, order], key, value, norm=norm)
    torch.testing.assert_close(permuted, out[:, order], rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes, st.integers(0, 2**31), st.sampled_from(NORMS))
def test_samples_of_a_batch_do_not_touch_each_other(sizes, seed, norm):
    x, key, value = random_operands(sizes, seed)
    together = external_attention(x, key, value, norm=norm)
    alone = torch.cat([external_attention(sample[None], key, value, norm=norm) for sample in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes, st.integers(0, 2**31), st.integers(0, 9), st.sampled_from(NORMS))
def test_masked_batch_equals_one_by_one(sizes, seed, padding, norm):
    x, key, value = random_operands(sizes, seed)
    lengths = torch.randint(1, x.shape[1] + 1, (x.shape[0],)).tolist()
    x = torch.cat([x, torch.randn(x.shape[0], padding, x.shape[2]).double()], dim=1)
    mask = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
    together = external_attention(x, key, value, norm=norm, mask=mask)
    for i, length in enumerate(lengths):
        alone = external_attention(x[i : i + 1, :length], key, value, norm=norm)
        torch.testing.assert_close(together[i : i + 1, :length], alone, rtol=0, atol=1e-12)
        assert (together[i, length:] == 0).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes, st.integers(0, 2**31))
def test_a_constant_per_slot_cancels(sizes, seed):
    x, key, value = random_operands(sizes, seed)
    bias = 5 * torch.randn(key.shape[0], dtype=torch.float64)
    out = external_attention(x, key, value, eps=0.0)
    shifted = external_attention(x, key, value, memory_key_bias=bias, eps=0.0)
    torch.testing.assert_close(shifted, out, rtol=0, atol=1e-11)


def test_one_memory_serves_both_roles(backend):
    x, key, _ = operands(2, 9, 5, 4)
    single = external_attention(x, key, backend=backend)
    torch.testing.assert_close(single, external_attention(x, key, key.clone(), backend=backend))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 4, 5)}, ["(batch, tokens, channels)", "(2, 3, 4, 5)"]),
        ({"x": torch.zeros(2, 5, 7)}, ["7 channels", "(4, 3)"]),
        ({"memory_value": torch.zeros(5, 3)}, ["memory_value", "4 slots", "(5, 3)"]),
        ({"norm": "l2"}, ["norm", "'double'", "'softmax'", "'l2'"]),
        ({"eps": -1.0}, ["eps", "-1.0"]),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ["mask", "(2, 5)", "(2, 4)"]),
        ({"mask": torch.ones(2, 5)}, ["mask", "boolean", "torch.float32"]),
        ({"backend": "cuda"}, ["backend", "'cuda'", "eager", "reference"]),
    ],
)
def test_wrong_arguments_are_named(without_shape_checks, change, words):
    arguments = {"x": torch.zeros(2, 5, 3), "memory_key": torch.zeros(4, 3), **change}
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        external_attention(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_wrong_dimensions_are_named():
    with pytest.raises(ValueError, match="same dimension"):
        double_normalize(torch.zeros(2, 3, 4), token_dim=-1, slot_dim=2)
    with pytest.raises(ValueError, match="token_dim 3 is outside"):
        double_normalize(torch.zeros(2, 3, 4), token_dim=3)
    with pytest.raises(ValueError, match="first dimension is the batch"):
        double_normalize(torch.zeros(3, 4), mask=torch.ones(3, 4, dtype=torch.bool))


# --- mutants: what the comparison must notice ----------------------------------------------------


def swapped_axes(logits, eps=1e-9):
    return double_normalize(logits, token_dim=-1, slot_dim=-2, eps=eps)


def missing_second_norm(logits, eps=1e-9):
    return torch.softmax(logits, dim=-2)


def second_norm_over_tokens_again(logits, eps=1e-9):
    weights = torch.softmax(logits, dim=-2)
    return weights / (eps + weights.sum(-2, keepdim=True))


def slots_then_tokens(logits, eps=1e-9):
    weights = torch.softmax(logits, dim=-1)
    return weights / (eps + weights.sum(-2, keepdim=True))


def without_eps(logits, eps=1e-9):
    return double_normalize(logits, eps=0.0)


def only_slots(logits, eps=1e-9):
    return slot_softmax(logits)


def scaled(logits, eps=1e-9):
    return double_normalize(logits / 2, eps=eps)


def agrees_with_the_equations(normalize):
    """The check that mutants fail: ordinary logits, and an outlier that eps switches off."""
    logits = torch.randn(2, 12, 5, dtype=torch.float64)
    logits[:, 3] -= 25  # its sum over the slots is about 1e-11, far below eps
    expected = reference.double_normalize(logits)
    return (normalize(logits) - expected).abs().max() < 1e-9


def test_the_right_formula_agrees(backend):
    assert agrees_with_the_equations(lambda logits: double_normalize(logits, backend=backend))


@pytest.mark.parametrize(
    "mutant",
    [
        swapped_axes,
        missing_second_norm,
        second_norm_over_tokens_again,
        slots_then_tokens,
        without_eps,
        only_slots,
        scaled,
    ],
)
def test_mutants_are_noticed(mutant):
    assert not agrees_with_the_equations(mutant)


def test_leaving_the_mask_out_is_noticed():
    x, key, value = operands(1, 9, 4, 5)
    mask = torch.arange(9)[None] < 6
    alone = external_attention(x[:, :6], key, value)
    unmasked = external_attention(x, key, value)[:, :6]
    assert (unmasked - alone).abs().max() > 1e-3
    masked = external_attention(x, key, value, mask=mask)[:, :6]
    torch.testing.assert_close(masked, alone, rtol=0, atol=1e-13)
