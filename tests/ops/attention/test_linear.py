"""The linear map by oneDNN: values and gradients of PyTorch's own, and never without a gradient."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from eanet.nn.linear import Linear
from eanet.ops.attention.linear import LEAST_MACS_WITH_GRADIENT, linear

#: (tokens, channels, out channels): either side wider, large enough for a gradient of its own
SHAPES = [(1100, 128, 192), (1100, 192, 128)]


def operands(tokens, channels, out_channels, dtype=torch.float32):
    torch.manual_seed(0)
    assert tokens * channels * out_channels >= LEAST_MACS_WITH_GRADIENT
    shapes = [(2, tokens // 2, channels), (out_channels, channels), (out_channels,)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, with_bias):
    found, exact = {}, {}
    for results, function, dtype in (
        (found, linear, torch.float32),
        (exact, F.linear, torch.float64),
    ):
        tensors = operands(*shape, dtype)
        out = function(*(tensors if with_bias else tensors[:2]))
        torch.manual_seed(1)
        cotangent = torch.randn(out.shape).to(dtype)
        gradients = torch.autograd.grad(out, tensors, cotangent, allow_unused=not with_bias)
        results |= dict(zip(("out", "tokens", "weight", "bias"), (out, *gradients), strict=True))
    assert type(found["out"].grad_fn).__name__ == "_LinearBackward"
    for name, expected in exact.items():
        if expected is None:
            assert found[name] is None
        else:
            scale = expected.abs().max().item()
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=3e-6 * scale)


def test_a_frozen_operand_gets_no_gradient():
    tokens, weight, bias = operands(*SHAPES[0])
    for frozen in (tokens, weight, bias):
        frozen.requires_grad_(False)
        linear(tokens, weight, bias).sum().backward()
        assert frozen.grad is None
        assert all(t.grad is not None for t in (tokens, weight, bias) if t is not frozen)
        for tensor in (tokens, weight, bias):
            tensor.requires_grad_().grad = None


def test_second_derivatives():
    def curvature(function):
        tokens, weight, bias = operands(*SHAPES[0])
        out = function(tokens, weight, bias)
        (gradient,) = torch.autograd.grad(out.square().mean(), tokens, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [tokens, weight, bias])

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operator without a gradient only warns
        found = curvature(linear)
    for actual, expected in zip(found, curvature(F.linear), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_autocast_and_other_types_are_left_to_torch():
    tokens, weight, bias = operands(*SHAPES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(tokens, weight, bias).dtype == torch.bfloat16
    doubled = linear(tokens.double(), weight.double(), bias.double())
    assert doubled.dtype == torch.float64


def test_the_layer_loads_what_torch_saved():
    torch.manual_seed(0)
    theirs, ours = torch.nn.Linear(8, 3), Linear(8, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x))
