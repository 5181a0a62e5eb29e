"""External attention over chunks of tokens: exact from any source, refusing sources that change."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eanet.ops.attention import chunked, multi_head_external_attention
from eanet.ops.attention.chunked import chunked_external_attention_block
from eanet.ops.attention.chunks import SlotStatistics
from eanet.ops.attention.streaming import external_attention_chunks, external_attention_streaming

BATCH, TOKENS, SLOTS, CHANNELS, VALUE_CHANNELS = 2, 29, 5, 4, 3
NAMES = ("x", "memory_key", "memory_value", "memory_key_bias", "memory_value_bias")


def operands(*, heads=1, tokens=TOKENS, batch=BATCH, scale=1.0):
    """Return tokens, memories and biases in float64, by name."""
    shapes = [
        (batch, tokens, heads * CHANNELS),
        (SLOTS, CHANNELS),
        (SLOTS, VALUE_CHANNELS),
        (SLOTS,),
        (VALUE_CHANNELS,),
    ]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return dict(zip(NAMES, [tensors[0] * scale, *tensors[1:]], strict=True))


def padding_mask(tokens=TOKENS):
    mask = torch.rand(BATCH, tokens) > 0.3
    mask[-1] = False  # a sample without any valid token
    return mask


def results(attend, tensors, dtype, **options):
    """Return result and gradients of all tensors, as float64."""
    leaves = {
        name: tensor.detach().clone().to(dtype).requires_grad_() for name, tensor in tensors.items()
    }
    biases = {name: leaves[name] for name in NAMES[3:]}
    out = attend(*(leaves[name] for name in NAMES[:3]), **options, **biases)
    torch.manual_seed(7)
    cotangent = torch.randn(out.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(
        out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=True
    )
    found = dict(zip(leaves, gradients, strict=True))
    return {"result": out.detach().double()} | {
        name: torch.zeros_like(leaves[name]).double() if gradient is None else gradient.double()
        for name, gradient in found.items()
    }


def by_reference(*arguments, **options):
    return multi_head_external_attention(*arguments, backend="reference", **options)


def by_eager(*arguments, **options):
    return multi_head_external_attention(*arguments, backend="eager", **options)


def assert_within_rule(tensors, dtype, *, chunk_tokens, **options):
    """Allow twice the error of the direct path, and four units in the last place of the scale."""
    exact = results(by_reference, tensors, torch.float64, **options)
    direct = results(by_eager, tensors, dtype, **options)
    found = results(
        external_attention_streaming, tensors, dtype, chunk_tokens=chunk_tokens, **options
    )
    for name, expected in exact.items():
        allowed = 2 * (direct[name] - expected).abs().max()
        # rounding of a gradient has the scale of the terms it sums, of which the largest is known
        allowed += 4 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
        assert (found[name] - expected).abs().max() <= allowed, name


@pytest.mark.parametrize("chunk_tokens", [1, 8, 1000])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("norm", "eps"), [("double", 1e-9), ("double", 0.0), ("double", 1e-39), ("softmax", 1e-9)]
)
def test_values_and_all_gradients(norm, eps, heads, masked, chunk_tokens, dtype):
    assert_within_rule(
        operands(heads=heads),
        dtype,
        chunk_tokens=chunk_tokens,
        num_heads=heads,
        norm=norm,
        eps=eps,
        mask=padding_mask() if masked else None,
    )


@pytest.mark.parametrize("eps", [1e-9, 0.0])
def test_large_logits(eps, dtype):
    tensors = operands(scale=30.0)
    if dtype == torch.float32:
        assert_within_rule(tensors, dtype, chunk_tokens=4, num_heads=1, eps=eps)
    else:  # the reference itself has the rounding error of large logits
        exact = results(by_reference, tensors, dtype, num_heads=1, eps=eps)
        found = results(external_attention_streaming, tensors, dtype, chunk_tokens=4, eps=eps)
        largest_logit = (tensors["x"] @ tensors["memory_key"].T).abs().max().item()
        for name, expected in exact.items():
            allowed = 4 * torch.finfo(dtype).eps * largest_logit * expected.abs().max().clamp(min=1)
            assert (found[name] - expected).abs().max() <= allowed, name
    tensors["x"][:, 3] *= 1e4
    found = results(external_attention_streaming, tensors, dtype, chunk_tokens=4, eps=eps)
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_a_masked_token_may_hold_anything_finite(dtype):
    tensors, mask = operands(), padding_mask()
    options = {"mask": mask, "chunk_tokens": 4, "eps": 0.0}
    expected = results(external_attention_streaming, tensors, dtype, **options)
    tensors["x"] = torch.where(mask.unsqueeze(-1), tensors["x"], 1e30)
    found = results(external_attention_streaming, tensors, dtype, **options)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_and_none(tokens):
    tensors = operands(tokens=tokens)
    found = results(external_attention_streaming, tensors, torch.float64, chunk_tokens=4)
    if tokens:
        exact = results(by_reference, tensors, torch.float64, num_heads=1)
        for name, expected in exact.items():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-14)
    else:
        assert found["result"].shape == (BATCH, 0, VALUE_CHANNELS)
        assert all(not found[name].any() for name in NAMES)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(half):
    tensors = {name: tensor.to(half).double() for name, tensor in operands().items()}
    exact = results(by_reference, tensors, torch.float64, num_heads=1)
    found = results(external_attention_streaming, tensors, half, chunk_tokens=8)
    for name, expected in exact.items():
        scale = max(1.0, expected.abs().max().item())
        # one rounding of the result and one of the incoming gradient
        assert (found[name] - expected).abs().max() <= 4 * torch.finfo(half).eps * scale, name


def test_autocast_does_not_reach_inside():
    tensors = operands()
    plain = results(external_attention_streaming, tensors, torch.float32, chunk_tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(external_attention_streaming, tensors, torch.float32, chunk_tokens=8)
        (array,) = external_attention_chunks(
            tensors["x"].numpy(), tensors["memory_key"].float(), tensors["memory_value"].float()
        )
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor), name
    assert array.dtype == torch.float32


# the compiler itself looks at the gradients of intermediate tensors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_networks_may_stream(without_shape_checks):
    tensors = operands()
    arguments = [tensors[name].requires_grad_() for name in NAMES[:3]]

    def attend(*arguments):
        return external_attention_streaming(*arguments, chunk_tokens=8)

    outs = [attend(*arguments), torch.compile(attend, backend="eager")(*arguments)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(out.square().sum(), arguments) for out in outs]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_strided_tokens():
    tensors = operands()
    contiguous = external_attention_streaming(*list(tensors.values())[:3], chunk_tokens=8)
    x = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not x.is_contiguous()
    strided = external_attention_streaming(
        x, tensors["memory_key"], tensors["memory_value"], chunk_tokens=8
    )
    torch.testing.assert_close(strided, contiguous, rtol=0, atol=1e-14)


def test_one_memory_for_both_roles_gets_both_gradients():
    tensors = operands()
    key = tensors["memory_key"].requires_grad_()
    gradients = [
        torch.autograd.grad(attend(tensors["x"], key, None, **options).square().sum(), key)[0]
        for attend, options in [
            (by_reference, {"num_heads": 1}),
            (external_attention_streaming, {"chunk_tokens": 8}),
        ]
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["double", "softmax"])
def test_gradcheck(norm):
    leaves = [tensor.requires_grad_() for tensor in operands(heads=2, tokens=5).values()]
    mask = torch.rand(BATCH, 5) > 0.3

    def attend(x, key, value, key_bias, value_bias):
        return external_attention_streaming(
            x,
            key,
            value,
            memory_key_bias=key_bias,
            memory_value_bias=value_bias,
            num_heads=2,
            norm=norm,
            eps=1e-3,
            mask=mask,
            chunk_tokens=2,
        )

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("wanted", NAMES[:3])
def test_gradient_of_one_tensor_alone(wanted):
    tensors = operands()
    all_gradients = results(external_attention_streaming, tensors, torch.float64, chunk_tokens=8)
    tensors[wanted].requires_grad_()
    arguments = [tensors[name] for name in NAMES[:3]]
    biases = {name: tensors[name] for name in NAMES[3:]}
    out = external_attention_streaming(*arguments, chunk_tokens=8, **biases)
    torch.manual_seed(7)
    (found,) = torch.autograd.grad(out, tensors[wanted], torch.randn_like(out))
    assert torch.equal(found, all_gradients[wanted])


def test_a_second_derivative_is_refused():
    tensors = operands()
    x = tensors["x"].requires_grad_()
    out = external_attention_streaming(x, tensors["memory_key"], chunk_tokens=8)
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_nothing_of_the_size_of_the_attention_is_kept():
    tokens, slots = 1000, 64
    x = torch.randn(1, tokens, 4, requires_grad=True)
    key = torch.randn(slots, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        external_attention_streaming(x, key, chunk_tokens=100)
    assert sum(tensor.numel() for tensor in kept) <= x.numel() + 2 * key.numel()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.booleans())
def test_any_division_into_chunks_gives_the_same(lengths, as_arrays):
    torch.manual_seed(0)
    tensors = operands(tokens=sum(lengths), heads=2)
    arguments = [tensors[name] for name in NAMES[1:3]]
    expected = by_reference(tensors["x"], *arguments, num_heads=2)

    def chunks():
        for part in tensors["x"].split(lengths, dim=1):
            yield part.numpy() if as_arrays else part

    out = torch.full_like(expected, torch.nan)
    found = external_attention_streaming(chunks, *arguments, num_heads=2, out=out)
    assert found is out
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memory_maps_in_and_out(tmp_path, mode):
    tensors = operands()
    x = tensors["x"].numpy()
    source = np.memmap(tmp_path / "tokens", x.dtype, "w+", shape=x.shape)
    source[:] = x
    source.flush()
    source = np.memmap(tmp_path / "tokens", x.dtype, mode, shape=x.shape)
    shape = (BATCH, TOKENS, VALUE_CHANNELS)
    out = np.memmap(tmp_path / "result", np.float64, "w+", shape=shape)
    mask = padding_mask()
    arguments = [tensors[name] for name in NAMES[1:3]]
    found = external_attention_streaming(
        source, *arguments, mask=mask.numpy(), chunk_tokens=8, out=out
    )
    assert found is out
    expected = by_reference(tensors["x"], *arguments, num_heads=1, mask=mask)
    np.testing.assert_allclose(
        np.fromfile(tmp_path / "result").reshape(shape), expected, atol=1e-14
    )
    assert np.array_equal(source, x)


def test_pages_that_were_handed_back_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("eanet.ops.attention.streaming._MAPPED_BYTES", 1)
    test_memory_maps_in_and_out(tmp_path, "r+")


def test_stored_half_precision_is_read_as_the_memories_are():
    tensors = operands()
    x = tensors["x"].numpy().astype(np.float16)
    key = tensors["memory_key"]
    found = external_attention_streaming(x, key, chunk_tokens=8)
    assert found.dtype == torch.float64
    expected = by_reference(torch.from_numpy(x).double(), key, num_heads=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_results_are_yielded_chunk_by_chunk():
    tensors = operands(heads=2)
    arguments = [tensors[name] for name in NAMES[:3]]
    mask = padding_mask()
    pieces = list(external_attention_chunks(*arguments, num_heads=2, mask=mask, chunk_tokens=8))
    assert [piece.shape[1] for piece in pieces] == [8, 8, 8, 5]
    expected = by_reference(*arguments, num_heads=2, mask=mask)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-14)


def test_the_caller_keeps_its_own_gradient_mode_between_results():
    tensors = operands()
    key = tensors["memory_key"].requires_grad_()
    pieces = external_attention_chunks(tensors["x"], key, chunk_tokens=8)
    assert not next(pieces).requires_grad
    assert torch.is_grad_enabled()
    assert not next(pieces).requires_grad


@pytest.mark.parametrize(("norm", "passes"), [("double", 2), ("softmax", 1)])
def test_how_often_the_tokens_are_read(norm, passes):
    tensors, calls = operands(), itertools.count()

    def chunks():
        next(calls)
        return tensors["x"].split(7, dim=1)

    pieces = external_attention_chunks(chunks, tensors["memory_key"], norm=norm)
    assert next(calls) == 0  # nothing is read before it is asked for
    list(pieces)
    assert next(calls) == passes + 1


def consume(chunks, tensors, **options):
    return list(external_attention_chunks(chunks, tensors["memory_key"], **options))


def test_an_exhausted_iterator_is_refused():
    tensors = operands()
    parts = tensors["x"].split(7, dim=1)
    iterator = iter(parts)
    with pytest.raises(ValueError, match="same iterator twice"):
        consume(lambda: iterator, tensors)
    spent = iter(parts)
    # a new generator each time, around an iterator that is not
    with pytest.raises(ValueError, match=r"ended after 0 of 29 tokens.*fresh iterator"):
        consume(lambda: (part for part in spent), tensors)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda x: x[:, :20], "ended after 20 of 29 tokens"),
        (lambda x: torch.cat([x, x], dim=1), "more than the 29 tokens"),
        (lambda x: x + 1e-3 * torch.randn_like(x), "other tokens than the first"),
        (lambda x: x * torch.nan, "other tokens than the first"),
        (lambda x: x[:1], "batch size of the first, 2"),
    ],
    ids=["shorter", "longer", "other", "not_a_number", "batch"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_second_pass_that_differs_is_refused(second, message, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in operands().items()}
    passes = iter([tensors["x"], second(tensors["x"])])
    with pytest.raises(ValueError, match=message):
        consume(lambda: next(passes).split(7, dim=1), tensors)


def test_the_same_chunks_again_are_accepted_whatever_they_hold():
    tensors = operands(scale=1e3)
    mask = padding_mask()
    consume(lambda: tensors["x"].split(7, dim=1), tensors, mask=mask, eps=0.0)
    tensors["x"][0, 3] = torch.nan
    pieces = consume(lambda: tensors["x"].split(7, dim=1), tensors)
    assert torch.cat(pieces, dim=1)[0].isnan().all()
    assert torch.cat(pieces, dim=1)[1].isfinite().all()


def _mistakes():
    tensors = operands()
    x, key = tensors["x"], tensors["memory_key"]
    call = external_attention_streaming
    return {
        "a callable that returns a fresh iterator of chunks": lambda: call(iter([x]), key),
        "need out, or external_attention_chunks": lambda: call(lambda: [x], key),
        r"\(batch, tokens, 4\) for 1 heads": lambda: call(x[..., :3], key),
        r"tokens must be \(batch, tokens, 4\)": lambda: call(lambda: [x[0]], key, out=x),
        "floating-point": lambda: call(x.long(), key),
        "a chunk must be a tensor or an array, got list": lambda: call(lambda: [[1]], key, out=x),
        "num_heads must be at least 1": lambda: call(x, key, num_heads=0),
        r"memory_key must be \(slots": lambda: call(x, key[0]),
        "memory_value must be": lambda: call(x, key, key[:2]),
        "norm must be": lambda: call(x, key, norm="other"),
        "eps must be": lambda: call(x, key, eps=-1.0),
        "chunk_tokens must be at least 1": lambda: call(x, key, chunk_tokens=0),
        r"out must have shape \(2, 29, 4\)": lambda: call(x, key, out=x[:, :5]),
        r"out must have shape \(2, 29, 4\), got \(2, 30": lambda: call(
            lambda: [x], key, out=torch.zeros(2, 30, 4)
        ),
        r"or more tokens, got \(2, 5, 4\)": lambda: call(lambda: [x], key, out=x[:, :5]),
        "out records no gradients": lambda: call(x, key.clone().requires_grad_(), out=x.clone()),
        "mask must have shape": lambda: call(x, key, mask=torch.ones(2, 5, dtype=torch.bool)),
        "mask must be boolean": lambda: call(x.numpy(), key, mask=np.ones((2, 29))),
        "does not fit chunks": lambda: call(x.numpy(), key, mask=np.ones((2, 5), dtype=bool)),
        "mask has 40 tokens, the chunks have 29": lambda: call(
            x.numpy(), key, mask=np.ones((2, 40), dtype=bool)
        ),
    }


@pytest.mark.parametrize("message", _mistakes())
def test_mistakes_are_refused(message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        _mistakes()[message]()


def test_block_refuses_what_the_direct_one_refuses():
    x, key, value = torch.randn(1, 4, 9), torch.randn(6, 4), torch.randn(3, 6)
    for options, message in [
        ({"residual": True}, "residual needs 4"),
        ({"residual": False, "num_groups": 4}, "does not divide 6 slots"),
    ]:
        with pytest.raises(ValueError, match=message):
            chunked_external_attention_block(x, key, value, chunk_tokens=3, relu=False, **options)


def test_the_comparison_notices_statistics_that_are_not_rescaled(monkeypatch):
    def forget(self, maximum):
        self.maximum = maximum

    monkeypatch.setattr(SlotStatistics, "_rescale", forget)
    with pytest.raises(AssertionError):
        assert_within_rule(operands(), torch.float64, chunk_tokens=4, num_heads=1)


def test_the_comparison_notices_a_sum_over_tokens_that_is_left_out(monkeypatch):
    last_pass = chunked._Backward._last_pass
    monkeypatch.setattr(
        chunked._Backward, "_last_pass", lambda self, sums: last_pass(self, torch.zeros_like(sums))
    )
    with pytest.raises(AssertionError):
        assert_within_rule(operands(), torch.float64, chunk_tokens=4, num_heads=1)
