"""The block function where it works in parts and tiles, and with a buffer of the caller."""

import pytest
import torch

from eanet.ops.attention import external_attention, multi_head_external_attention
from eanet.ops.attention.block import BatchNormArguments, external_attention_block
from eanet.ops.attention.block_function import BlockOperands, BlockOptions, composed_block

CASES = {
    "plain": {"bias": None, "scale": None, "batch_norm_eps": None, "relu": True},
    "bias": {"bias": True, "scale": None, "batch_norm_eps": None, "relu": False},
    "batch norm": {"bias": True, "scale": True, "batch_norm_eps": 1e-5, "relu": True},
}


def block_operands(tokens, layout="channels first", dtype=torch.float32, batch=1):
    """Return x, key, value, bias, scale and a mask; wide logits, some samples end early."""
    torch.manual_seed(tokens)
    channels, slots = 32, 6
    x = torch.randn(batch, channels, tokens, dtype=dtype)
    if layout == "token-major":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    key = 0.5 * torch.randn(slots, channels, dtype=dtype)
    value = torch.randn(channels, slots, dtype=dtype)
    bias, scale = torch.randn(2, channels, dtype=dtype)
    mask = torch.arange(tokens) < torch.tensor([[tokens - tokens // 3]] * batch)
    return x, key, value, bias, scale, mask


def run_block(operands, options, function):
    """Return result, statistics and the gradients of all tensors."""
    tensors = [t.detach().requires_grad_() if torch.is_tensor(t) else t for t in operands[:6]]
    out, mean, variance = function(BlockOperands(*tensors, operands.mask), options)
    torch.manual_seed(1)
    cotangent = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    wanted = [tensor for tensor in tensors if tensor is not None]
    return [out, mean, variance, *torch.autograd.grad(out, wanted, cotangent)]


def direct(operands, options):
    """Call the public function as ``composed_block`` is called."""
    x, key, value, key_bias, bias, scale, mask = operands
    batch_norm = None
    if options.batch_norm_eps is not None:
        batch_norm = BatchNormArguments(scale, bias, options.batch_norm_eps)
    out, statistics = external_attention_block(
        x, key, value, key_bias=key_bias, bias=None if batch_norm else bias, batch_norm=batch_norm,
        norm=options.norm, eps=options.eps, mask=mask, residual=options.residual, relu=options.relu,
    )  # fmt: skip
    if statistics is None:
        return out, x.new_zeros(0), x.new_zeros(0)
    return out, statistics.mean, statistics.variance


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["channels first", "token-major"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_many_parts_equal_the_composed_form_in_float64(case, layout, masked):
    tokens = 2 * 16384 + 1235  # three parts, and tiles of a map of more than 2^19 entries
    x, key, value, bias, scale, mask = block_operands(tokens, layout)
    operands = BlockOperands(
        x, key, value, None, bias if case["bias"] else None, scale if case["scale"] else None,
        mask if masked else None,
    )  # fmt: skip
    options = BlockOptions("double", 1e-9, case["batch_norm_eps"], True, case["relu"])
    exact = BlockOperands(*(t.double() if t is not None and t.is_floating_point() else t
                            for t in operands))  # fmt: skip
    expected = run_block(exact, options, composed_block)
    composed = run_block(operands, options, composed_block)
    for name, actual, other, right in zip(
        range(len(expected)), run_block(operands, options, direct), composed, expected, strict=True
    ):
        if right.numel():
            error, usual = ((t.double() - right).norm() / right.norm() for t in (actual, other))
            assert error < 2 * usual + 4 * torch.finfo(torch.float32).eps, (name, error, usual)
    in_float64 = run_block(exact, options, direct)
    for actual, right in zip(in_float64, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-11 * max(1, right.numel()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["channels first", "token-major"])
@pytest.mark.parametrize(("slots", "value_channels"), [(6, 32), (40, 32), (6, 3)])
def test_inference_keeps_nothing_and_gives_the_same(slots, value_channels, layout, masked):
    """Whether or not the exponentials find room in the result."""
    x, *_, mask = block_operands(20_000, layout)
    key, value = 0.5 * torch.randn(slots, 32), torch.randn(value_channels, slots)
    bias = torch.randn(value_channels)
    options = BlockOptions("double", 1e-9, None, value_channels == 32, True)
    operands = BlockOperands(x, key, value, None, bias, None, mask if masked else None)
    exact = BlockOperands(*(t.double() if t is not None and t.is_floating_point() else t
                            for t in operands))  # fmt: skip
    expected, _, _ = composed_block(exact, options)
    usual = composed_block(operands, options)[0].double() - expected
    for given in (operands, exact):
        out, _, _ = direct(given, options)
        allowed = 2 * usual.abs().max() + 4 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (out.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("layout", ["channels first", "token-major"])
@pytest.mark.parametrize("tokens", [1, 50, 40_000])
def test_a_buffer_of_the_caller_takes_the_result(tokens, layout):
    x, key, value, bias, _, mask = block_operands(tokens, layout, batch=2)
    arguments = {"bias": bias, "mask": mask}
    expected, _ = external_attention_block(x, key, value, **arguments)
    buffer = torch.full_like(x, torch.nan)
    found, _ = external_attention_block(x, key, value, **arguments, out=buffer)
    assert found is buffer
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    external_attention_block(x, key, value, **arguments, out=x)  # in place
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 50, 18_000])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_the_functions_take_a_buffer(tokens, num_heads):
    torch.manual_seed(0)
    x, key = torch.randn(2, tokens, num_heads * 24), torch.randn(16, 24)
    value, bias = torch.randn(16, 20), torch.randn(20)
    arguments = {"num_heads": num_heads, "memory_value_bias": bias}
    expected = multi_head_external_attention(x, key, value, **arguments)
    out = torch.full((2, tokens, num_heads * 20), torch.nan)
    assert multi_head_external_attention(x, key, value, **arguments, out=out) is out
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=1e-6)
    if num_heads == 1:
        buffer = torch.full_like(out, torch.nan)
        external_attention(x, key, value, memory_value_bias=bias, out=buffer)
        torch.testing.assert_close(buffer, out, rtol=0, atol=0)


def test_a_buffer_is_for_the_result_of_the_eager_form(without_shape_checks):
    x, key, out = torch.randn(1, 5, 4), torch.randn(3, 4), torch.empty(1, 5, 4)
    for arguments, message in (
        ({"return_attention": True}, "result alone"),
        ({"backend": "reference"}, "for backend='eager', got 'reference'"),
        ({"out": torch.empty(1, 5, 8)[..., ::2]}, "contiguous"),
        ({"out": torch.empty(1, 6, 4)}, r"= \(1, 5, 4\), got \(1, 6, 4\)"),
        ({"out": torch.empty(1, 5, 4, dtype=torch.float64)}, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            external_attention(x, key, **{"out": out, **arguments})
    with pytest.raises(ValueError, match="no_grad"):
        external_attention(x.requires_grad_(), key, out=out)


def test_a_buffer_that_does_not_fit_is_refused(without_shape_checks):
    x, key, value, *_ = block_operands(10)
    wide = torch.randn(1, 32, 20)
    for given, out, message in (
        (x, torch.empty(1, 32, 9), r"out must be \(1, 32, 10\)"),
        (x, torch.empty(1, 32, 10, dtype=torch.float64), "float64"),
        (wide[..., :10], wide[..., 5:15], "x itself or have memory of its own"),
        (x.requires_grad_(), torch.empty(1, 32, 10), "no_grad"),
    ):
        with pytest.raises(ValueError, match=message):
            external_attention_block(given, key, value, out=out)


def test_a_recorded_gradient_is_the_same():
    """Products by oneDNN have no gradient of their own: one that is recorded must not use them."""
    torch.manual_seed(0)
    x, key, value = torch.randn(1, 8, 4096), torch.randn(64, 8), torch.randn(8, 64)
    leaves = [tensor.requires_grad_() for tensor in (x, key, value)]
    out, _ = external_attention_block(*leaves, batch_norm=BatchNormArguments(None, None))
    usual = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    recorded = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    for found, expected in zip(recorded, usual, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-4 * scale)


#: tokens of few entries, of one part, and of several parts of which the last is short
@pytest.mark.parametrize("tokens", [1, 50, 3000, 18_000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_heads", "norm"), [(1, "double"), (3, "double"), (3, "softmax")])
def test_heads_side_by_side_equal_the_reference(tokens, masked, num_heads, norm):
    torch.manual_seed(tokens)
    shapes = [(2, tokens, num_heads * 24), (9, 24), (9, 16), (9,), (16,)]
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    mask = torch.arange(tokens) < torch.tensor([[tokens - tokens // 3], [0]])
    cotangent = torch.randn(2, tokens, num_heads * 16, dtype=torch.float64)
    found = {}
    arguments = {
        "num_heads": num_heads,
        "memory_key_bias": leaves[3],
        "memory_value_bias": leaves[4],
        "norm": norm,
        "mask": mask if masked else None,
    }
    for backend in ("reference", "eager"):
        out = multi_head_external_attention(*leaves[:3], **arguments, backend=backend)
        found[backend] = [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]
        with torch.no_grad():
            alone = multi_head_external_attention(*leaves[:3], **arguments, backend=backend)
        torch.testing.assert_close(alone, out, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(found["eager"], found["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_no_tokens_give_nothing():
    x = torch.zeros(2, 4, 0, requires_grad=True)
    key, value = torch.ones(3, 4, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    out, _ = external_attention_block(x, key, value)
    gradients = torch.autograd.grad(out.sum(), [x, key, value])
    assert out.shape == x.shape
    assert multi_head_external_attention(x.mT, key[:, :2], num_heads=2).shape == (2, 0, 4)
    assert all((gradient == 0).all() for gradient in gradients)
