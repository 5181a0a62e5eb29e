"""Modules that run in chunks of tokens give what they give at once, with the same gradients."""

import copy

import pytest
import torch
from torch import nn

from eanet.nn.external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
)
from eanet.nn.streaming import stream

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}

TOKEN_MODULES = {
    "plain": lambda: ExternalAttention(12, 5),
    "algorithm_1": lambda: ExternalAttention(12, 5, residual="query", value_bias=True),
    "residual": lambda: ExternalAttention(12, 5, residual="input", tie_memory=True, eps=0.0),
    "softmax": lambda: ExternalAttention(12, 5, norm="softmax"),
    "narrow": lambda: ExternalAttention(6, 5, in_channels=40),
    "heads": lambda: MultiHeadExternalAttention(12, 5, num_heads=3, expansion=2),
    "softmax_heads": lambda: MultiHeadExternalAttention(12, 5, num_heads=4, norm="softmax"),
    "tied_heads": lambda: MultiHeadExternalAttention(12, 5, num_heads=2, tie_memory=True),
}
MAP_MODULES = {
    "authors": lambda: ExternalAttention2d(12, 5),
    "bare": lambda: ExternalAttention2d(12, 5, batch_norm=False, residual="none"),
    "biased": lambda: ExternalAttention2d(
        12, 5, batch_norm=False, projection_bias=True, activation="none"
    ),
    "narrow": lambda: ExternalAttention2d(12, 5, inner_channels=4, norm="softmax"),
}


def randomized(module, dtype):
    """Give all parameters and running statistics values that matter."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.add_(0.3 * torch.randn_like(tensor).abs())
    return module.to(dtype)


def run(module, x, mask, chunk_tokens):
    """Return result, gradients by name and buffers of a copy of the module."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    if chunk_tokens is None:
        out = module(x, mask)
    else:
        with stream(module, chunk_tokens=chunk_tokens):
            out = module(x, mask)
    torch.manual_seed(1)
    wanted = dict(module.named_parameters())
    gradients = torch.autograd.grad(out, [x, *wanted.values()], torch.randn_like(out))
    return {"out": out, "x": gradients[0], **dict(zip(wanted, gradients[1:], strict=True))}, dict(
        module.named_buffers()
    )


def assert_streams_equal(module, x, mask):
    expected, expected_buffers = run(module, x, mask, None)
    for chunk_tokens in (1, 7, 1000):
        found, buffers = run(module, x, mask, chunk_tokens)
        for name, tensor in expected.items():
            scale = max(1.0, tensor.abs().max().item())
            error = (found[name] - tensor).abs().max().item() / scale
            assert error <= TOLERANCE[x.dtype], (name, chunk_tokens, error)
        for name, tensor in expected_buffers.items():
            torch.testing.assert_close(buffers[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("name", TOKEN_MODULES)
def test_token_modules_stream_exactly(name, masked, dtype):
    module = randomized(TOKEN_MODULES[name](), dtype)
    x = torch.randn(2, 23, getattr(module, "in_channels", module.channels), dtype=dtype)
    mask = torch.rand(2, 23) > 0.3 if masked else None
    assert_streams_equal(module, x, mask)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("name", MAP_MODULES)
def test_map_modules_stream_exactly(name, masked, training, dtype):
    module = randomized(MAP_MODULES[name](), dtype).train(training)
    x = torch.randn(2, 12, 5, 7, dtype=dtype)
    mask = torch.rand(2, 5, 7) > 0.3 if masked else None
    assert_streams_equal(module, x, mask)
    assert_streams_equal(module, x.to(memory_format=torch.channels_last), mask)


def test_batch_norm_that_was_replaced_streams_too():
    module = randomized(ExternalAttention2d(12, 5), torch.float64)
    module.norm = nn.GroupNorm(3, 12, dtype=torch.float64)
    assert_streams_equal(module, torch.randn(2, 12, 5, 7, dtype=torch.float64), None)


@pytest.mark.parametrize("build", [*TOKEN_MODULES.values(), *MAP_MODULES.values()])
def test_fused_modules_stream(build):
    module = randomized(build(), torch.float64).eval()
    size = (5, 7) if isinstance(module, ExternalAttention2d) else ()
    width = getattr(module, "in_channels", module.channels)
    x = torch.randn(2, width, *size) if size else torch.randn(2, 35, width)
    x = x.double()
    mask = torch.rand(2, *(size or (35,))) > 0.3
    with torch.no_grad():
        expected = module(x, mask)
        with stream(module.fused(), chunk_tokens=8) as fused:
            assert (fused(x, mask) - expected).abs().max() < 1e-12


def test_stream_keeps_channels_last():
    module = ExternalAttention2d(12, 5).eval()
    x = torch.randn(2, 12, 5, 7).to(memory_format=torch.channels_last)
    with stream(module, chunk_tokens=8):
        assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_backward_may_follow_the_context():
    module = ExternalAttention(12, 5).double()
    x = torch.randn(1, 20, 12, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    with stream(module, chunk_tokens=3):
        loss = module(x).square().sum()
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_autocast_streams():
    module = ExternalAttention2d(12, 5).eval()
    x = torch.randn(1, 12, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        with stream(module, chunk_tokens=10):
            found = module(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


def test_stream_restores_what_was_set_before():
    network = nn.Sequential(ExternalAttention(8, 4), nn.ReLU(), ExternalAttention(8, 4))
    network[0].chunk_tokens = 50
    with pytest.raises(RuntimeError, match=r"inside \[9, 9\]"), stream(network, chunk_tokens=9):
        raise RuntimeError(f"inside {[network[index].chunk_tokens for index in (0, 2)]}")
    assert [network[0].chunk_tokens, network[2].chunk_tokens] == [50, None]


@pytest.mark.parametrize(
    "build",
    [
        lambda: ExternalAttention(8, 4, attention_dropout=0.1),
        lambda: ExternalAttention(8, 4, projection_dropout=0.1),
        lambda: MultiHeadExternalAttention(8, 4, num_heads=2, attention_dropout=0.1),
        lambda: MultiHeadExternalAttention(8, 4, num_heads=2, projection_dropout=0.1),
    ],
)
def test_dropout_in_training_is_refused(build):
    module, x = build(), torch.randn(1, 5, 8)
    with stream(module, chunk_tokens=2):
        with pytest.raises(ValueError, match="_dropout must be 0 to train in chunks"):
            module(x)
        module.eval()
        assert module(x).shape == x.shape


def test_mistakes_are_refused():
    with (
        pytest.raises(ValueError, match="Linear holds no external attention"),
        stream(nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"),
        stream(ExternalAttention(8, 4), chunk_tokens=0),
    ):
        pass
