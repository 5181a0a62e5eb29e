"""The layers under torch.compile, torch.export, checkpointing and on the meta device."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eanet.nn.external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
)
from eanet.nn.fusion import fuse
from eanet.nn.self_attention import SelfAttention

pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Forget earlier graphs: the shape checks' wrapper is one function for all layers."""
    torch.compiler.reset()


LAYERS = {
    "tokens": (lambda: ExternalAttention(8, 4), (2, 5, 8)),
    "query residual": (
        lambda: ExternalAttention(4, 6, in_channels=8, residual="query", value_bias=True),
        (2, 5, 8),
    ),
    "map": (lambda: ExternalAttention2d(8, 4), (2, 8, 3, 5)),
    "heads": (lambda: MultiHeadExternalAttention(8, 4, num_heads=2), (2, 5, 8)),
    "self-attention": (lambda: SelfAttention(8, num_heads=2, norm="double"), (2, 5, 8)),
    "fused map": (lambda: fuse(ExternalAttention2d(8, 4)), (2, 8, 3, 5)),
    "fused heads": (lambda: fuse(MultiHeadExternalAttention(8, 4, num_heads=2)), (2, 5, 8)),
}
all_layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


@all_layers
def test_exported_program_computes_the_same(make, shape):
    layer = make().eval()
    x = torch.randn(*shape)
    batch = torch.export.Dim("batch", min=1, max=64)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    dynamic = {0: batch, 1: tokens} if len(shape) == 3 else {0: batch, 2: tokens}
    program = torch.export.export(layer, (x,), dynamic_shapes=(dynamic,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-6)
    larger = torch.randn(*(size + 3 * (dim in dynamic) for dim, size in enumerate(shape)))
    torch.testing.assert_close(program.module()(larger), layer(larger), rtol=0, atol=1e-6)


@all_layers
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_layer_computes_the_same_in_one_graph(make, shape, masked, training):
    layer = make().double().train(training)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    mask = torch.rand(shape[0], *(shape[1:2] if len(shape) == 3 else shape[2:])) > 0.3
    masks = (mask,) if masked else ()
    out, wanted = compiled(x, *masks), layer(other, *masks)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    if any(parameter.requires_grad for parameter in layer.parameters()):
        out.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=1e-12)
        for (name, parameter), twin in zip(
            layer.named_parameters(), compiled.parameters(), strict=True
        ):
            assert twin.grad is not None, name
            torch.testing.assert_close(twin.grad, parameter.grad, rtol=0, atol=1e-11, msg=name)
    for buffer, twin in zip(layer.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(twin, buffer, rtol=0, atol=1e-12)


@all_layers
def test_meta_device(make, shape):
    with torch.device("meta"):
        layer = make()
        assert layer(torch.empty(*shape)).device.type == "meta"
        assert layer.train()(torch.empty(*shape)).device.type == "meta"
        assert layer.attention_map(torch.empty(*shape)).device.type == "meta"


@all_layers
def test_checkpointed_layer_has_the_same_gradients(make, shape):
    layer = make().double().eval()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (actual,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
