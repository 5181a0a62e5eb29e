"""The attention layers beyond the reference values: switches, masks, dead biases, ties, types."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

from eanet.bench.block import PaperBlock
from eanet.nn.capture import capture_attention
from eanet.nn.external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
)
from eanet.nn.fusion import fuse
from eanet.nn.self_attention import SelfAttention
from eanet.nn.streaming import stream
from eanet.ops.attention import double_normalize, reference, slot_softmax
from eanet.ops.attention.block import BatchNormArguments
from eanet.ops.attention.block import external_attention_block as block_function
from eanet.ops.attention.block_function import BlockOperands, BlockOptions, composed_block

TOKENS = {
    "plain": lambda **k: ExternalAttention(12, 5, **k),
    "single memory": lambda **k: ExternalAttention(12, 5, query=False, projection=False, **k),
    "input residual": lambda **k: ExternalAttention(12, 5, residual="input", **k),
    "query residual": lambda **k: ExternalAttention(
        8, 5, in_channels=12, residual="query", value_bias=True, **k
    ),
    "narrow, many slots": lambda **k: ExternalAttention(4, 9, in_channels=12, **k),
    "multi-head": lambda **k: MultiHeadExternalAttention(12, 5, num_heads=3, expansion=2, **k),
}
MODULES = {
    "tokens": (lambda **k: ExternalAttention(8, 4, **k), (2, 5, 8)),
    "map": (lambda **k: ExternalAttention2d(8, 4, **k), (2, 8, 3, 3)),
    "heads": (lambda **k: MultiHeadExternalAttention(8, 4, num_heads=2, **k), (2, 5, 8)),
}


NORMS = ("double", "softmax")


def randomize(module):
    """Draw all parameters widely, biases included, so that nothing is close to uniform."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
        elif name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return module.double()


def equations(layer, x, mask=None):
    """The token layers written out with the reference functions."""
    options = {"norm": layer.normalization, "eps": layer.eps, "mask": mask}
    if isinstance(layer, MultiHeadExternalAttention):
        out, _ = reference.multi_head_external_attention(
            layer.query(x),
            layer.memory_key,
            layer.values,
            num_heads=layer.num_heads,
            memory_key_bias=layer.memory_key_bias,
            memory_value_bias=layer.memory_value_bias,
            **options,
        )
        residual = 0
    else:
        query = x if layer.query is None else layer.query(x)
        out, _ = reference.external_attention(
            query,
            layer.memory_key,
            layer.values,
            memory_value_bias=layer.memory_value_bias,
            **options,
        )
        residual = {"none": 0, "input": x, "query": query}[layer.residual]
    if layer.projection is not None:
        out = layer.projection(out)
    if mask is not None:
        out = out * mask.unsqueeze(-1)
    return residual + out


# --- token layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_token_layers_equal_the_equations(make, norm, tied, masked):
    layer = randomize(make(norm=norm, tie_memory=tied))
    x = torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 7) > 0.3 if masked else None
    if masked:
        mask[-1] = False
    weights = torch.randn(3, 7, layer.channels, dtype=torch.float64)
    leaves = [x, *layer.parameters()]

    expected = equations(layer, x, mask)
    expected_gradients = torch.autograd.grad(
        expected, leaves, weights, allow_unused=True, materialize_grads=True
    )
    actual = layer(x, mask)
    gradients = torch.autograd.grad(actual, leaves, weights)

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    for name, gradient, wanted in zip(
        ["x", *dict(layer.named_parameters())], gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10, msg=name)
    torch.testing.assert_close(fuse(layer)(x, mask), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS)
def test_results_keep_the_memory_layout_of_tokens(make):
    out = make()(torch.randn(2, 7, 12))
    assert out.is_contiguous()


def test_dropout_drops_attention_and_branch_in_training_only():
    layer = ExternalAttention(
        8, 4, residual="query", attention_dropout=0.5, projection_dropout=0.5, value_bias=True
    )
    randomize(layer)
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    query = layer.query(x)
    layer.train()
    dropped = (layer(x) - query == 0).double().mean()
    assert 0.4 < dropped < 0.6  # of the branch, before the residual
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), equations(layer, x))
    layer.train().projection_dropout = 0.0
    layer.attention_dropout = 1e-12  # the path with dropout, dropping nothing
    torch.testing.assert_close(layer(x), equations(layer, x))


# --- the 2-D block -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"inner_channels": 4},
        {"query": False},
        {"projection": False},
        {"batch_norm": False, "projection_bias": True},
        {"residual": "none"},
        {"activation": "none"},
        {"tie_memory": True},
    ],
    ids=str,
)
def test_block_parts_can_be_left_out(training, norm, switches):
    block = randomize(ExternalAttention2d(6, 5, norm=norm, **switches)).train(training)
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    query = x if block.query is None else block.query(x)
    logits = torch.einsum("sc,bchw->bshw", block.memory_key, query).flatten(2)
    if norm == "double":
        attention = reference.double_normalize(logits, token_dim=2, slot_dim=1)
    else:
        attention = torch.softmax(logits, dim=1)
    expected = torch.einsum("sc,bsn->bcn", block.values, attention)
    expected = expected.view(2, -1, 4, 3)
    if block.projection is not None:
        expected = block.projection(expected)
    if block.norm is not None:
        expected = copy.deepcopy(block.norm)(expected)
    if block.residual == "input":
        expected = expected + x
    if block.activation == "relu":
        expected = expected.relu()
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(block.attention_map(x).flatten(2), attention, rtol=0, atol=1e-13)
    if not training:
        torch.testing.assert_close(fuse(block)(x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", list(itertools.product((0, 1), NORMS, (0, 1), (0, 1), (0, 1))))
def test_block_function_gradients(options):
    batch_norm, norm, residual, relu, channels_last = options
    shapes = [(2, 3, 4), (2, 3), (3, 2), (2,), (3,), (3,)]
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.tensor([[True, True, False, True], [False] * 4])

    def function(x, key, value, key_bias, bias, scale):
        if channels_last:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return block_function(
            x,
            key,
            value,
            key_bias=key_bias,
            norm=norm,
            mask=mask,
            residual=bool(residual),
            relu=bool(relu),
            **({"batch_norm": BatchNormArguments(scale, bias)} if batch_norm else {"bias": bias}),
        )[0]

    used = tensors if batch_norm else tensors[:5]
    full = used + tensors[len(used) :]
    assert torch.autograd.gradcheck(lambda *t: function(*t, *full[len(t) :]), used)
    if not relu and not channels_last and not residual:
        assert torch.autograd.gradgradcheck(lambda *t: function(*t, *full[len(t) :]), used)


def test_batch_statistics_come_out_exactly_for_memories_that_hardly_differ():
    # at the start of training attention is nearly uniform and the branch nearly constant, so
    # that its variance is a small difference
    torch.manual_seed(1)
    block = ExternalAttention2d(64, 64)
    x = torch.randn(2, 64, 20, 20)
    exact = PaperBlock(copy.deepcopy(block).double())(x.double())
    plain = PaperBlock(copy.deepcopy(block))(x)
    ours = block(x)
    assert (ours - exact).abs().max() <= 4 * (plain - exact).abs().max()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_running_statistics_move_as_in_pytorch(momentum, track):
    block = ExternalAttention2d(6, 5).double()
    block.norm = nn.BatchNorm2d(6, momentum=momentum, track_running_stats=track).double()
    paper = PaperBlock(copy.deepcopy(block))
    for _ in range(3):
        x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
        torch.testing.assert_close(block(x), paper(x), rtol=0, atol=1e-12)
    for (name, buffer), other in zip(
        block.norm.named_buffers(), paper.block.norm.buffers(), strict=True
    ):
        torch.testing.assert_close(buffer, other, rtol=0, atol=1e-13, msg=name)
    torch.testing.assert_close(block.eval()(x), paper.eval()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_padding_behind_a_mask_changes_nothing(training):
    block = randomize(ExternalAttention2d(6, 5)).train(training)
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(1, 6, 5, 3, dtype=torch.float64)], dim=3)
    mask = (torch.arange(7) < 4).expand(1, 5, 7)
    other = copy.deepcopy(block)
    alone, together = other(x), block(padded, mask)
    torch.testing.assert_close(together[..., :4], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together[..., 4:], padded[..., 4:].relu())
    for buffer, wanted in zip(block.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=0, atol=1e-13)
    unmasked = copy.deepcopy(block)(padded)[..., :4]
    assert (unmasked - alone).abs().max() > 1e-3
    torch.testing.assert_close(
        block.attention_map(padded, mask)[..., :4], block.attention_map(x), rtol=0, atol=1e-13
    )


def test_a_batch_without_any_valid_position():
    block = randomize(ExternalAttention2d(6, 5)).train()
    before = block.norm.running_var.clone()
    x = torch.randn(1, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    out = block(x, torch.zeros(1, 2, 2, dtype=torch.bool))
    torch.testing.assert_close(out, x.relu())
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    torch.testing.assert_close(block.norm.running_var, before, rtol=0, atol=0)


def test_one_position_is_refused_in_training_as_pytorch_does():
    with pytest.raises(ValueError, match="more than one position"):
        ExternalAttention2d(4, 2).train()(torch.zeros(1, 4, 1, 1))


def test_another_norm_may_take_the_place_of_batch_norm():
    block = randomize(ExternalAttention2d(6, 5))
    block.norm = nn.GroupNorm(2, 6).double()
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(block(x), PaperBlock(block)(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(fuse(block)(x), block(x))


def test_channels_last_maps_stay_channels_last():
    block = randomize(ExternalAttention2d(6, 5)).eval()
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    last = x.to(memory_format=torch.channels_last)
    out = block(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, block(x), rtol=0, atol=1e-13)


# --- dead biases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS)
def test_every_parameter_gets_a_gradient(make):
    layer = randomize(make())
    layer(torch.randn(2, 7, 12, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        dead = name == "memory_key_bias" or (
            name == "query.bias" and getattr(layer, "residual", "none") != "query"
        )
        assert (parameter.grad.abs().max() == 0) == dead, name


def test_biases_are_alive_without_the_double_norm():
    layer = randomize(MultiHeadExternalAttention(12, 5, num_heads=3, norm="softmax"))
    layer(torch.randn(2, 7, 12, dtype=torch.float64)).square().sum().backward()
    assert layer.memory_key_bias.grad.abs().max() > 1e-3
    assert layer.query.bias.grad.abs().max() > 1e-3


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_half_types_stay_close_and_finite(make, shape, dtype, training):
    module = make().train(training)
    x = torch.randn(*shape)
    exact = copy.deepcopy(module)(x)
    half = copy.deepcopy(module).to(dtype)
    half_x = x.to(dtype).requires_grad_()
    out = half(half_x)
    out.float().square().sum().backward()
    assert out.dtype == dtype
    assert half_x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in half.parameters())
    scale = exact.abs().max()
    assert (out.float() - exact).abs().max() <= 20 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("training", [False, True])
def test_autocast(make, shape, training):
    module = make().train(training)
    x = torch.randn(*shape, requires_grad=True)
    exact = copy.deepcopy(module)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    assert (out.float() - exact).abs().max() <= 0.05 * exact.abs().max()


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: ExternalAttention(8)(torch.zeros(2, 8, 3, 3)),
            ["ExternalAttention2d", "(2, 8, 3, 3)"],
        ),
        (lambda: ExternalAttention(8)(torch.zeros(2, 3, 9)), ["tokens, 8", "(2, 3, 9)"]),
        (
            lambda: ExternalAttention2d(8)(torch.zeros(2, 3, 8)),
            ["height", "(2, 3, 8)", "ExternalAttention"],
        ),
        (lambda: ExternalAttention2d(8)(torch.zeros(2, 7, 3, 3)), ["8, height", "(2, 7, 3, 3)"]),
        (
            lambda: MultiHeadExternalAttention(8, num_heads=2)(torch.zeros(1, 2, 3)),
            ["8", "(1, 2, 3)"],
        ),
        (lambda: MultiHeadExternalAttention(8, num_heads=3), ["num_heads 3", "32"]),
        (lambda: SelfAttention(8, num_heads=3), ["num_heads 3", "8"]),
        (lambda: ExternalAttention(8, 0), ["num_slots", "0"]),
        (lambda: ExternalAttention(8, norm="l1"), ["norm", "'l1'"]),
        (lambda: ExternalAttention(8, residual="yes"), ["residual", "'yes'"]),
        (lambda: ExternalAttention(8, memory_init="x"), ["memory_init", "'x'"]),
        (lambda: ExternalAttention(8, in_channels=9, residual="input"), ["in_channels", "9"]),
        (lambda: ExternalAttention2d(8, inner_channels=4, query=False), ["inner_channels 4"]),
        (lambda: ExternalAttention2d(8, projection_bias=True), ["batch_norm"]),
        (
            lambda: ExternalAttention2d(8)(torch.zeros(2, 8, 3, 3), torch.ones(2, 9) > 0),
            ["mask", "(2, 3, 3)", "(2, 9)"],
        ),
    ],
)  # fmt: skip
def test_wrong_use_is_named(without_shape_checks, call, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


# --- mutants of the layers -----------------------------------------------------------------------


def heads_interleaved(layer, x):
    layer = copy.deepcopy(layer)
    order = torch.arange(24).view(3, 8).t().flatten()
    layer.query.weight.data = layer.query.weight.data[order]
    layer.query.bias.data = layer.query.bias.data[order]
    return layer(x)


def first_token_left_out(layer, x):
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, 0] = False
    return layer(x, mask)


def tied_values(layer, x):
    layer = copy.deepcopy(layer)
    layer.memory_value.data = layer.memory_key.data
    return layer(x)


def softmax_over_slots(layer, x):
    layer = copy.deepcopy(layer)
    layer.normalization = "softmax"
    return layer(x)


@pytest.mark.parametrize(
    "mutant", [heads_interleaved, first_token_left_out, tied_values, softmax_over_slots]
)
def test_mutants_of_the_multi_head_layer_are_noticed(mutant):
    layer = randomize(MultiHeadExternalAttention(12, 5, num_heads=3, expansion=2))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    expected = equations(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)
    assert (mutant(layer, x)[:, 1:] - expected[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"memory_bias": False}, {"tie_memory": True}])
def test_both_ways_to_compute_heads_agree(norm, options):
    layer = randomize(MultiHeadExternalAttention(12, 5, num_heads=3, norm=norm, **options))
    x = torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    weights = [x, *layer.parameters()]
    found = []
    for forward in (lambda: layer._forward_thin(x, None), lambda: layer._forward_by_head(x, None)):
        out = forward()
        found.append([out, *torch.autograd.grad(out.square().sum(), weights)])
    for thin, by_head in zip(*found, strict=True):
        torch.testing.assert_close(thin, by_head, rtol=1e-9, atol=1e-9)


def test_both_ways_to_compute_heads_drop_attention_alike():
    layer = MultiHeadExternalAttention(8, 4, num_heads=2, attention_dropout=0.5)
    x = torch.randn(64, 9, 8)
    assert not torch.equal(layer._forward_thin(x, None), layer._forward_thin(x, None))
    with torch.no_grad():
        means = [
            torch.stack([forward() for _ in range(100)]).mean(0)
            for forward in (
                lambda: layer._forward_thin(x, None),
                lambda: layer._forward_by_head(x, None),
            )
        ]
        layer.eval()
        torch.testing.assert_close(means[0], layer(x), rtol=0, atol=1e-3)
        torch.testing.assert_close(means[1], layer(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "slots", "options", "tokens", "thin"),
    [
        (256, 64, {"num_heads": 16}, 1576, True),  # EAMLP-7, 8 images of 224 pixels in training
        (256, 64, {"num_heads": 16}, 197, False),  # one image: forming the matrices costs more
        (256, 128, {"num_heads": 16}, 10**6, False),  # twice the slots: no saving at any size
        (64, 16, {"num_heads": 16, "expansion": 2}, 4096, False),
    ],
)
def test_the_way_with_fewer_multiplications_is_taken(channels, slots, options, tokens, thin):
    layer = MultiHeadExternalAttention(channels, slots, **options)
    assert layer._thin_is_cheaper(tokens) == thin
    width = layer.query.out_features
    by_head = 2 * tokens * width * (channels + slots)
    matrices = 2 * channels * layer.num_heads * slots * tokens + 2 * channels * width * slots
    assert (matrices < by_head) == thin


def test_double_norm_differs_from_softmax_and_composed_form_agrees():
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    key, value = torch.randn(5, 4).double(), torch.randn(4, 5).double()
    options = BlockOptions("double", 1e-9, None, True, True)
    composed, _, _ = composed_block(BlockOperands(x, key, value, None, None, None, None), options)
    torch.testing.assert_close(block_function(x, key, value)[0], composed, rtol=0, atol=1e-13)
    logits = torch.randn(2, 9, 5)
    assert (double_normalize(logits) - slot_softmax(logits)).abs().max() > 0.05


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_go_to_a_buffer(fused, layout):
    block = ExternalAttention2d(12, 5).eval()
    torch.nn.init.normal_(block.norm.bias)
    module = block.fused() if fused else block
    x = torch.randn(2, 12, 6, 4).contiguous(memory_format=layout)
    buffer = torch.empty_like(x)
    with torch.no_grad():
        expected = module(x)
        assert module(x, out=buffer) is buffer
        torch.testing.assert_close(buffer, expected, rtol=0, atol=0)
        with capture_attention(module):
            assert module(x, out=x) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_results_of_tokens_go_to_a_buffer(fused):
    layer = ExternalAttention(12, 5, residual="input").eval()
    layer = layer.fused() if fused else layer
    x, buffer = torch.randn(2, 9, 12), torch.empty(2, 9, 12)
    with torch.no_grad():
        assert layer(x, out=buffer) is buffer
        torch.testing.assert_close(buffer, layer(x))


def test_buffers_that_cannot_be_used_are_refused():
    block, x = ExternalAttention2d(4, 3).eval(), torch.zeros(1, 4, 3, 2)
    with pytest.raises(ValueError, match="no_grad"):
        block(x, out=torch.empty_like(x))
    with torch.no_grad(), pytest.raises(ValueError, match="contiguous or channels_last"):
        block(x, out=torch.empty(1, 4, 3, 4)[..., :2])
    with torch.no_grad(), stream(block), pytest.raises(ValueError, match="chunks"):
        block(x, out=torch.empty_like(x))
