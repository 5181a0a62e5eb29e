"""The Triton kernels on a GPU: the cases of the interpreter, and sizes only a GPU can take.

Run by ``make test-gpu``.
"""

import warnings
from dataclasses import replace

import pytest
import torch

from eanet.nn.external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
)
from eanet.ops.attention import custom_op, external_attention, operators
from tests.ops.attention.kernel_cases import (
    CASES,
    MUTANTS,
    RESIDENT_CASES,
    Case,
    check,
    check_dropout,
    check_masked_tokens_beside_small_logits,
    check_resident,
    mutant,
    operands,
    with_map,
)

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    from eanet.ops.attention import kernels

    assert not kernels.INTERPRETED, "unset TRITON_INTERPRET: it would run the kernels on the CPU"
    # float32 keeps its digits in the plain products that the kernels are compared with
    torch.backends.cuda.matmul.allow_tf32 = False
    # the first product of the thread that runs backward passes warns that it makes a context
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
        matrix = torch.ones(2, 2, device="cuda", requires_grad=True)
        (matrix @ matrix).sum().backward()
    return torch.device("cuda")


def needs_memory(gibibytes):
    available = torch.cuda.get_device_properties(0).total_memory / 2**30
    if available < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, this one has {available:.0f}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_equations(case, gpu):
    # more samples than on a CPU: the largest error of few elements is a matter of luck
    check(replace(case, batch=max(case.batch, 8)), gpu)


@pytest.mark.parametrize("case", RESIDENT_CASES, ids=str)
def test_kernels_that_hold_a_memory_equal_the_equations(case, gpu, monkeypatch):
    check_resident(case, gpu, monkeypatch)
    wide = {"channels": 300, "value_channels": 300, "slots": 64, "tokens": 5008}
    check_resident(replace(case, **wide), gpu, monkeypatch)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_notices(name, gpu):
    case, changes = MUTANTS[name]
    with pytest.raises(AssertionError, match="error"):
        check(case, gpu, mutant(changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["double", "softmax"])
def test_dropout_drops_the_same_entries_in_both_passes(norm, dtype, gpu):
    case = Case(norm=norm, dtype=dtype, tokens=300, heads=2, mask="padded")
    check_dropout(case, gpu, 0.3)
    # few slots: the map is kept for the backward pass
    check_dropout(replace(case, channels=40), gpu, 0.3)


def test_masked_tokens_beside_small_logits(gpu):
    check_masked_tokens_beside_small_logits(gpu)


@pytest.mark.parametrize("layout", ["tokens last", "channels last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_block_of_a_segmentation_network(dtype, layout, gpu):
    """8 x 512 x 128 x 128, the size that the speed of the kernels is stated for."""
    needs_memory(40)
    case = Case(
        dtype=dtype, batch=8, tokens=128 * 128, channels=512, value_channels=512, slots=64,
        layout=layout, biases=False, residual=True,
    )  # fmt: skip
    check(case, gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_of_a_classifier(dtype, gpu):
    check(
        Case(dtype=dtype, batch=64, tokens=197, channels=64, value_channels=64, slots=64, heads=16),
        gpu,
    )


def test_a_million_tokens(gpu):
    check(Case(batch=1, tokens=2**20, channels=64, value_channels=64, slots=64), gpu)


@pytest.mark.parametrize("layout", ["tokens last", "channels last"])
@pytest.mark.parametrize("channels", [640, 512])  # 512: kernels that hold a memory on chip
def test_more_elements_than_32_bits_count(channels, layout, gpu):
    needs_memory(70)
    tokens, slots = 2**22 + 64, 16
    shape = (1, tokens, channels) if layout == "channels last" else (1, channels, tokens)
    x = torch.randn(shape, device=gpu, dtype=torch.bfloat16)
    x = x if layout == "channels last" else x.transpose(1, 2)
    memory = channels**-0.5 * torch.randn(slots, channels, device=gpu, dtype=torch.bfloat16)
    x.requires_grad_()
    out = external_attention(x, memory, backend="triton")
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    # the end of the tensors, where an offset of 32 bits would point elsewhere
    with torch.no_grad():
        logits = (x[0] @ memory.T).double()
        logits -= logits.logsumexp(0)
        attention = torch.softmax(logits[-100:], dim=1)
        expected = attention @ memory.double()
    scale = expected.abs().max()
    assert (out[0, -100:].double() - expected).abs().max() <= 0.02 * scale
    assert torch.isfinite(gradient).all()
    assert gradient[0, -100:].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_repeats_to_the_bit(dtype, gpu):
    case = Case(dtype=dtype, batch=4, tokens=5000, channels=64, value_channels=64, heads=2)
    tensors, _ = operands(case, gpu)
    leaves = [tensors[name].requires_grad_() for name in ("x", "memory_key", "memory_value")]

    def run():
        out, _ = with_map(*leaves, num_heads=2)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    first = run()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


# torch asks tensors inside a graph for their gradients when it traces
not_a_leaf = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@not_a_leaf
@pytest.mark.parametrize("norm", ["double", "softmax"])
def test_operators_pass_all_checks(norm, gpu, without_shape_checks):
    tensors, mask = operands(Case(norm=norm, mask="padded", heads=2), gpu)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    seed = torch.tensor([11], device=gpu)
    torch.library.opcheck(
        torch.ops.eanet.external_attention.default,
        (*leaves, mask, seed, 2, norm, 1e-9, 0.3, False, True, True),
    )


@not_a_leaf
@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor")
def test_compiles_without_a_break(gpu, without_shape_checks):
    x = torch.randn(2, 300, 64, device=gpu, requires_grad=True)
    memory = torch.randn(10, 64, device=gpu, requires_grad=True)

    def function(x, memory):
        out = external_attention(torch.relu(x), memory, backend="triton")
        return torch.relu(out).square().mean()

    expected = torch.autograd.grad(function(x, memory), (x, memory))
    compiled = torch.compile(function, fullgraph=True)
    actual = torch.autograd.grad(compiled(x, memory), (x, memory))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("token_dtype", "tokens"),
    # the second has a second pass that is launched early, after memories were cast
    [(torch.float32, 300), (torch.bfloat16, 20_000)],
)
def test_a_cuda_graph_replays_it(token_dtype, tokens, gpu):
    x = torch.randn(2, tokens, 64, device=gpu, dtype=token_dtype)
    memory = torch.randn(10, 64, device=gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled before the capture
        external_attention(x, memory, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = external_attention(x, memory, backend="triton")
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        memory.copy_(torch.randn_like(memory))
        graph.replay()
    torch.testing.assert_close(out, external_attention(x, memory, backend="triton"))


def test_memory_stays_below_one_map(gpu):
    """Forward without a map: nothing of the size of tokens times slots is allocated."""
    x = torch.randn(1, 2**18, 16, device=gpu)
    memory = torch.randn(256, 16, device=gpu)
    external_attention(x, memory, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = custom_op.result_only(x, memory)
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert extra < 2**18 * 256 * 4 / 8, f"{extra / 2**20:.0f} MiB beyond the result"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (ExternalAttention(64, 16, residual="input"), (2, 300, 64)),
        lambda: (ExternalAttention2d(64, 16, batch_norm=False), (2, 64, 20, 15)),
        lambda: (ExternalAttention2d(64, 16), (2, 64, 20, 15)),
        lambda: (MultiHeadExternalAttention(64, 16, num_heads=4, expansion=2), (2, 300, 64)),
    ],
)
def test_modules_take_the_kernels_by_themselves(make, training, gpu, monkeypatch):
    module, shape = make()
    module.to(gpu).train(training)
    x = torch.randn(shape, device=gpu, requires_grad=True)
    calls, launch = [], operators._launch_for
    monkeypatch.setattr(operators, "_launch_for", lambda x: calls.append(x) or launch(x))
    found = {}
    for module.backend in (None, "eager"):
        out = module(x)
        found[module.backend] = [out, *torch.autograd.grad(out.square().sum(), x)]
    # the statistics of a batch are the eager form's
    assert bool(calls) != (training and getattr(module, "norm", None) is not None)
    for one, other in zip(found[None], found["eager"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
