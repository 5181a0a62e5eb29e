"""The Triton kernels on a CPU; ``test_kernels.py`` runs this file in a process of its own.

Triton decides once, when it is imported, whether kernels are compiled or interpreted, for the whole
process. The variable cannot be set for some tests only: kernels that torch compiles for a GPU in
other tests would be interpreted too.
"""

import warnings
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from eanet.nn.external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
)
from eanet.nn.streaming import stream
from eanet.ops.attention import (
    custom_op,
    eager,
    external_attention,
    kernel_tiles,
    kernels,
    launch,
    multi_head_external_attention,
    operators,
    reference,
    tiling,
)
from eanet.ops.attention.heuristics import Tilings
from eanet.ops.attention.tiling import Tiling
from tests.ops.attention.kernel_cases import (
    CASES,
    MUTANTS,
    NAMES,
    RESIDENT,
    RESIDENT_CASES,
    Case,
    allowed_error,
    check,
    check_dropout,
    check_masked_tokens_beside_small_logits,
    check_resident,
    mutant,
    operands,
    run,
    same_on_another_tiling,
    with_map,
)

CPU = torch.device("cpu")
_TILING = Tiling(block_tokens=16, block_channels=16, num_warps=4)
#: several parts for each pair in the forward pass
SMALL = Tilings(
    statistics=_TILING,
    mix=replace(_TILING, block_tokens=32),
    attention_gradient=_TILING,
    key_gradient=_TILING,
    value_gradient=replace(_TILING, block_tokens=32),
    statistics_programs=8,
    num_programs=6,
)


def _round_to_bfloat16(convert):
    """Let the interpreter round to bfloat16 as GPUs do; it cuts digits off."""

    def rounded(tile, tile_type, target, rounding):
        if tile_type == tl.float32 and target == tl.bfloat16:
            halves = torch.from_numpy(tile.copy()).bfloat16().view(torch.uint16)
            return halves.numpy()
        return convert(tile, tile_type, target, rounding)

    return rounded


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    monkeypatch.setattr(
        interpreter, "_convert_float", _round_to_bfloat16(interpreter._convert_float)
    )


def test_kernels_are_interpreted():
    assert kernels.INTERPRETED, "set TRITON_INTERPRET=1"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_equations(case):
    check(case, CPU)


@pytest.mark.parametrize("case", RESIDENT_CASES, ids=str)
def test_kernels_that_hold_a_memory_equal_the_equations(case, monkeypatch):
    # parts of several tiles, in a time that the interpreter can do
    monkeypatch.setattr(tiling, "device_limits", lambda device: (6, 232_448))
    case = replace(case, tokens=min(case.tokens, 304))
    check_resident(case, CPU, monkeypatch)
    if case.batch == 1:  # parts of the statistics that the first pass joins
        check_resident(case, CPU, monkeypatch, most_parts=0)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_notices(name):
    case, changes = MUTANTS[name]
    assert case in CASES, "the right call has to pass"
    with pytest.raises(AssertionError, match="error"):
        check(case, CPU, mutant(changes))


@pytest.mark.parametrize(
    "case",
    [
        Case(mask="sample empty"),
        Case(norm="softmax", heads=2),
        Case(residual=True, dtype=torch.float16, mask="padded"),
    ],
    ids=str,
)
def test_parts_add_up_to_the_whole(monkeypatch, case):
    monkeypatch.setattr(launch, "choose_tilings", lambda *_: SMALL)
    case = same_on_another_tiling(case)
    if case.residual:
        case = Case(**{**vars(case), "value_channels": case.channels})
    assert tiling.split_tokens(case.tokens, 2, 16)[0] > 1
    check(case, CPU)


@triton.jit
def combine(
    partial, statistics, num_pairs, num_slots, num_splits,
    BLOCK_S: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Run what the last part of a pair runs."""
    pair = tl.program_id(0)
    largest, total = kernel_tiles.combine_parts(
        partial, pair, num_pairs, num_slots, num_splits, BLOCK_S, BLOCK_SPLITS
    )
    kernel_tiles.store_statistics(statistics, largest, total, pair, num_pairs, num_slots, BLOCK_S)


def test_more_parts_than_a_tile_holds():
    num_pairs, num_splits, num_slots = 2, 5, 3
    largest = torch.randn(num_pairs, num_splits, num_slots)
    largest[:, :2, 1] = -torch.inf  # parts without valid tokens come first
    largest[1, :, 2] = -torch.inf  # and a slot of a pair has none at all
    total = 1 + torch.rand(num_pairs, num_splits, num_slots)
    total[largest == -torch.inf] = 0
    statistics = torch.empty(2, num_pairs, num_slots)
    combine[(num_pairs,)](
        torch.stack([largest, total]), statistics, num_pairs, num_slots, num_splits,
        BLOCK_S=16, BLOCK_SPLITS=2,
    )  # fmt: skip
    found = statistics[0].double() + statistics[1].double().log()
    expected = (largest.double() + total.double().log()).logsumexp(1)
    expected[1, 2] = 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["double", "softmax"])
def test_dropout_drops_the_same_entries_in_both_passes(norm, dtype):
    case = Case(norm=norm, dtype=dtype, tokens=60, heads=2, mask="padded")
    check_dropout(case, CPU, 0.3)
    # few slots: the map is kept for the backward pass
    check_dropout(replace(case, slots=10, channels=40), CPU, 0.3)


def test_masked_tokens_beside_small_logits():
    check_masked_tokens_beside_small_logits(CPU)


def test_dropout_follows_its_seed():
    x, memory = torch.randn(1, 30, 4), torch.randn(10, 4)

    def drop(**options):
        return custom_op.fused_external_attention(x, memory, attention_dropout=0.5, **options)[0]

    low, high = (torch.tensor([seed]) for seed in (3, 3 + 2**32))
    torch.testing.assert_close(drop(seed=low), drop(seed=low), rtol=0, atol=0)
    assert not torch.equal(drop(seed=low), drop(seed=high))
    # without a seed, torch's own generator decides
    torch.manual_seed(5)
    first, second = drop(), drop()
    torch.manual_seed(5)
    assert torch.equal(first, drop())
    assert not torch.equal(first, second)


def test_a_sample_does_not_depend_on_its_batch():
    tensors, mask = operands(Case(mask="padded", batch=3), CPU)
    x, memory = tensors["x"], tensors["memory_key"]
    together = external_attention(x, memory, mask=mask, backend="triton")
    alone = external_attention(x[1:2], memory, mask=mask[1:2], backend="triton")
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)


def test_masked_tokens_may_hold_anything():
    tensors, mask = operands(Case(mask="padded"), CPU)
    memory = tensors["memory_key"].requires_grad_()
    dirty = tensors["x"].masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    out = external_attention(dirty, memory, mask=mask, backend="triton")
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(memory.grad).all()
    assert torch.isfinite(dirty.grad).all()


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_one_output_alone(which):
    case = Case(mask="padded", heads=2)
    tensors, mask = operands(case, CPU)

    def gradients(module, dtype):
        leaves = [tensors[n].to(dtype).requires_grad_() for n in ("x", "memory_key")]
        outputs = module.multi_head_external_attention(*leaves, num_heads=2, mask=mask)
        # the gradient of a sum is expanded from one number: its strides are 0
        return torch.autograd.grad((outputs[which] ** 2).sum() + outputs[which].sum(), leaves)

    for actual, expected in zip(
        gradients(custom_op, torch.float32), gradients(reference, torch.float64), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_one_output_alone_of_kernels_that_hold_a_memory(which, monkeypatch):
    monkeypatch.setattr(tiling, "device_limits", lambda device: (6, 232_448))
    case = Case(**RESIDENT | {"tokens": 304}, biases=False)
    tensors, _ = operands(case, CPU)
    weights = torch.randn(case.batch, 1, case.tokens, case.slots).bfloat16()

    def gradients(module, dtype):
        leaves = [tensors[n].to(dtype).requires_grad_() for n in NAMES[:3]]
        outputs = module.multi_head_external_attention(*leaves, num_heads=1)
        # the gradient of a sum is expanded from one number: its strides are 0
        loss = outputs[0].sum() if which == 0 else (outputs[1] * weights.to(dtype)).sum()
        return torch.autograd.grad(loss, leaves, materialize_grads=True)

    exact, plain = gradients(reference, torch.float64), gradients(eager, torch.bfloat16)
    actual = gradients(custom_op, torch.bfloat16)
    for found, near, expected in zip(actual, plain, exact, strict=True):
        error, plain_error, scale = (
            tensor.abs().max().item()
            for tensor in (found.double() - expected, near.double() - expected, expected)
        )
        assert error <= allowed_error(plain_error, scale, torch.bfloat16)


def test_biases_may_stay_float32_beside_half_memories():
    x = torch.ones(1, 700, 40, dtype=torch.float16)
    memories = [torch.randn(4, 40, dtype=torch.float16).requires_grad_() for _ in range(2)]
    bias = torch.zeros(40, requires_grad=True)
    out = external_attention(x, *memories, memory_value_bias=bias, backend="triton")
    # sums beyond 65504, the end of float16
    (gradient,) = torch.autograd.grad(out, bias, torch.full_like(out, 100.0))
    assert torch.equal(gradient, torch.full_like(bias, 70_000.0))


def test_memories_may_stay_float32_beside_half_tokens():
    case = Case(dtype=torch.bfloat16, heads=2)
    tensors, mask = operands(case, CPU)

    def gradients(memory_dtype):
        mixed = {n: t if n == "x" else t.to(memory_dtype) for n, t in tensors.items()}
        return run(with_map, case, mixed, mask)

    float32, bfloat16 = gradients(torch.float32), gradients(torch.bfloat16)
    assert float32["result"].dtype == torch.bfloat16
    torch.testing.assert_close(float32["result"], bfloat16["result"], rtol=0, atol=0)
    assert float32["gradient of memory_key"].dtype == torch.float32
    assert bfloat16["gradient of memory_key"].dtype == torch.bfloat16


def test_autocast_casts_as_a_product_does():
    x, memory = torch.randn(1, 9, 4), torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = external_attention(x, memory, backend="triton")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert memory.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 7, 4), (2, 0, 4)])
def test_nothing_gives_nothing(shape):
    x, memory = torch.randn(shape, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = external_attention(x, memory, backend="triton")
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape
    assert (memory.grad == 0).all()


def test_the_layout_of_x_is_kept():
    x = torch.randn(2, 6, 9).transpose(1, 2).requires_grad_()
    out = external_attention(x, torch.randn(5, 6), backend="triton")
    out.sum().backward()
    assert out.stride() == x.stride()
    out = external_attention(x.detach().contiguous(), torch.randn(5, 6), backend="triton")
    assert out.is_contiguous()


# --- the operators -------------------------------------------------------------------------------

OPERATOR_CASES = [
    Case(tokens=9, mask="padded", heads=2, batch=1),
    Case(tokens=9, norm="softmax", layout="tokens last"),
    Case(tokens=9, tied=True, value_channels=12, biases=False, eps=0.0),
]


# torch asks tensors inside a graph for their gradients when it traces
not_a_leaf = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@not_a_leaf
@pytest.mark.parametrize(
    ("case", "dropout"), list(zip(OPERATOR_CASES, (0.5, 0.0, 0.0), strict=True)), ids=str
)
def test_operators_pass_all_checks(case, dropout, without_shape_checks):
    tensors, mask = operands(case, CPU)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors.values()]
    leaves[2] = leaves[1] if leaves[2] is None else leaves[2]
    seed = torch.tensor([11]) if dropout else None
    options = (case.heads, case.norm, case.eps, dropout, False)
    arguments = (*leaves, mask, seed, *options, dropout > 0, dropout > 0)
    torch.library.opcheck(torch.ops.eanet.external_attention.default, arguments)
    out, attention, *kept = torch.ops.eanet.external_attention.default(*arguments)
    kept = [kept[0], attention, kept[1]] if dropout else [kept[0], None, None]
    x, key, value, key_bias, _ = (None if leaf is None else leaf.detach() for leaf in leaves)
    torch.library.opcheck(
        torch.ops.eanet.external_attention_backward.default,
        (
            out.detach(), attention.detach() if dropout else None, x, key, value, key_bias, mask,
            seed, *(None if tensor is None else tensor.detach() for tensor in kept), *options,
        ),
    )  # fmt: skip


class Watch(TorchDispatchMode):
    """Writes down the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    """Writes down the functions that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def test_a_mode_of_functions_sees_the_operator():
    with WatchFunctions() as watch:
        external_attention(torch.randn(2, 9, 8), torch.randn(5, 8), backend="triton")
    assert "eanet.external_attention.default" in watch.seen


def test_who_watches_sees_operators():
    x, memory = torch.randn(2, 9, 8, requires_grad=True), torch.randn(5, 8)
    with Watch() as watch:
        external_attention(x, memory, backend="triton").sum().backward()
    assert "eanet.external_attention.default" in watch.seen
    assert "eanet.external_attention_backward.default" in watch.seen


def test_what_a_tensor_stands_for_counts():
    memory = torch.randn(5, 8)
    negative = torch.randn(2, 9, 8, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(
        external_attention(negative, memory, backend="triton"),
        external_attention(negative.clone(), memory, backend="eager"),
    )
    x = torch.randn(2, 9, 8, requires_grad=True)
    out = external_attention(x, memory, backend="triton")
    cotangents = torch.randn(3, 2, 9, 8)
    mapped = torch.autograd.grad(out, x, cotangents, retain_graph=True, is_grads_batched=True)[0]
    one_by_one = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in cotangents]
    torch.testing.assert_close(mapped, torch.stack(one_by_one))
    nothing = torch._efficientzerotensor(out.shape)
    assert not torch.autograd.grad(out, x, nothing)[0].any()


def test_a_trace_holds_the_operator(without_shape_checks):
    x, memory = torch.randn(2, 9, 8), torch.randn(5, 8)

    def attend(x, memory):
        return external_attention(x, memory, backend="triton")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes are checked with Python's numbers
        traced = torch.jit.trace(attend, (x, memory))
    assert "eanet::external_attention" in str(traced.graph)
    torch.testing.assert_close(traced(x, memory), attend(x, memory))


def test_functions_are_mapped():
    x, memory = torch.randn(3, 9, 8), torch.randn(5, 8)
    attend = torch.func.vmap(lambda x: external_attention(x[None], memory, backend="triton")[0])
    with pytest.warns(UserWarning, match="batching rule"):  # PyTorch goes sample by sample
        mapped = attend(x)
    torch.testing.assert_close(mapped, external_attention(x, memory, backend="triton"))


@not_a_leaf
def test_compiles_without_a_break(without_shape_checks):
    x, memory = torch.randn(2, 9, 8, requires_grad=True), torch.randn(5, 4, requires_grad=True)

    def function(x, memory):
        out = multi_head_external_attention(x * 2, memory, num_heads=2, backend="triton")
        return torch.relu(out).square().sum()

    expected = torch.autograd.grad(function(x, memory), (x, memory))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    actual = torch.autograd.grad(compiled(x, memory), (x, memory))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    longer = torch.randn(2, 13, 8, requires_grad=True)
    torch.testing.assert_close(compiled(longer, memory), function(longer, memory), rtol=0, atol=0)


def test_no_map_is_kept_for_the_backward_pass():
    tokens, slots = 50, 40
    x, memory = torch.randn(1, tokens, 4, requires_grad=True), torch.randn(slots, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        external_attention(x, memory, backend="triton")
    assert kept
    assert all(shape.numel() < tokens * slots for shape in kept)


@pytest.mark.parametrize("norm", ["double", "softmax"])
def test_second_derivatives_equal_those_of_the_eager_backend(norm):
    x, memory = torch.randn(2, 5, 8, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    found = {}
    for backend in ("triton", "eager"):
        out = multi_head_external_attention(x, memory, num_heads=2, norm=norm, backend=backend)
        first = torch.autograd.grad(out.square().sum(), (x, memory), create_graph=True)
        loss = sum(gradient.square().sum() for gradient in first)
        found[backend] = first + torch.autograd.grad(loss, (x, memory))
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_second_derivatives_of_dropout_are_refused():
    x, memory = torch.randn(1, 5, 4, requires_grad=True), torch.randn(3, 4)
    out, _ = custom_op.fused_external_attention(x, memory, attention_dropout=0.5)
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("norm", ["double", "softmax"])
def test_other_functions_of_the_backend(norm):
    logits = torch.randn(2, 5, 7)
    name = "double_normalize" if norm == "double" else "slot_softmax"
    assert torch.equal(getattr(custom_op, name)(logits), getattr(eager, name)(logits))


# --- modules -------------------------------------------------------------------------------------

MODULES = {
    "tokens": lambda: (ExternalAttention(12, 5, value_bias=True), (2, 9, 12)),
    "tokens, softmax, residual": lambda: (
        ExternalAttention(12, 5, norm="softmax", residual="input"), (2, 9, 12)),
    "map": lambda: (ExternalAttention2d(12, 5).eval(), (2, 12, 5, 4)),
    "map in training": lambda: (ExternalAttention2d(12, 5), (2, 12, 5, 4)),
    "map without batch norm": lambda: (ExternalAttention2d(12, 5, batch_norm=False), (2, 12, 5, 4)),
    "heads": lambda: (MultiHeadExternalAttention(12, 5, num_heads=4, expansion=2), (2, 9, 12)),
    "heads, softmax": lambda: (
        MultiHeadExternalAttention(12, 5, num_heads=4, norm="softmax"), (2, 9, 12)),
}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_modules_call_the_kernels(make, masked, monkeypatch):
    """Values and gradients as with the eager backend; statistics of a batch stay with that."""
    torch.manual_seed(0)
    module, shape = make()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(shape, requires_grad=True)
    mask = None
    if masked:
        mask = torch.arange(9 if len(shape) == 3 else 20).lt(7).expand(2, -1)
        mask = mask if len(shape) == 3 else mask.unflatten(1, shape[2:])
    calls, launch = [], operators._launch_for
    monkeypatch.setattr(operators, "_launch_for", lambda x: calls.append(x) or launch(x))
    found = {}
    for module.backend in ("eager", "triton"):
        out = module(x, mask)
        gradients = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        found[module.backend] = [out, *gradients]
    statistics = getattr(module, "norm", None) is not None and module.training
    assert bool(calls) != (statistics and isinstance(module, ExternalAttention2d))
    for one, other in zip(found["triton"], found["eager"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * other.abs().max().item())


def test_streams_and_the_eager_backend_leave_the_kernels_alone(monkeypatch):
    monkeypatch.setattr(operators, "_launch_for", None)
    module, shape = MODULES["heads"]()
    module(torch.randn(shape))  # chosen by the device: a CPU
    with stream(module, chunk_tokens=4):
        module.backend = "triton"
        module(torch.randn(shape))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 3, 4, dtype=torch.float64)}, "float32, float16 and bfloat16"),
        ({"memory_key": torch.zeros(257, 4)}, "up to 256 slots, got 257"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be within \[0, 1\), got 1.0"),
        ({"residual": True, "memory_value": torch.zeros(6, 5)}, "4 channels, got 5"),
    ],
)
def test_refuses(changes, message):
    arguments = {"x": torch.zeros(1, 3, 4), "memory_key": torch.zeros(6, 4)} | changes
    with pytest.raises(ValueError, match=message):
        custom_op.fused_external_attention(**arguments)


# --- values of the authors' code -----------------------------------------------------------------


def linear(parameters, name, x):
    """Apply a linear layer or 1x1 convolution of the original to (batch, tokens, channels)."""
    weight = parameters[f"{name}.weight"]
    bias = parameters.get(f"{name}.bias")
    return torch.nn.functional.linear(x, weight.reshape(weight.shape[:2]), bias)


def memories(parameters):
    """Return memory key, memory value and their biases in our shapes."""
    key, value = parameters["linear_0.weight"], parameters["linear_1.weight"]
    return {
        "memory_key": key.reshape(key.shape[:2]),
        "memory_value": value.reshape(value.shape[:2]).transpose(0, 1),
        "memory_key_bias": parameters.get("linear_0.bias"),
        "memory_value_bias": parameters.get("linear_1.bias"),
    }


def compare(case, out, expected, parameters, x, gradients):
    """Compare result and gradients; what cancels has no true gradient to compare with."""
    case.assert_output(out, expected)
    case.assert_gradient(x.grad, gradients.pop("x"), "x")
    assert gradients.keys() == {n for n, p in parameters.items() if p.requires_grad}
    for name, value in gradients.items():
        if name in ("conv1.bias", "linear_0.bias") and value.abs().max() < 1e-6:
            assert parameters[name].grad is None or parameters[name].grad.abs().max() < 1e-3
        else:
            case.assert_gradient(parameters[name].grad.reshape(value.shape), value, name)


@pytest.mark.golden("segmentation.ea_block")
def test_block_equals_the_original(golden_case):
    io = {name: tensor.float() for name, tensor in golden_case.tensors("io").items()}
    parameters = {name: t.float() for name, t in golden_case.tensors("weights").items()
                  if t.is_floating_point()}  # fmt: skip
    buffers = {n: parameters.pop(n) for n in list(parameters) if "running" in n}
    for parameter in parameters.values():
        parameter.requires_grad_()
    x = io["in.x"].clone().requires_grad_()
    queries = linear(parameters, "conv1", x.flatten(2).transpose(1, 2))
    out = external_attention(queries, **memories(parameters), backend="triton")
    out = linear(parameters, "conv2.0", out).transpose(1, 2).unflatten(2, x.shape[2:])
    out = torch.nn.functional.batch_norm(
        out, buffers["conv2.1.running_mean"], buffers["conv2.1.running_var"],
        parameters["conv2.1.weight"], parameters["conv2.1.bias"],
    )  # fmt: skip
    out = torch.relu(out + x)
    (out * io["in.cotangent"]).sum().backward()
    compare(
        golden_case, out, io["eval.out"], parameters, x, golden_case.starting_with("grad_eval.")
    )


def check_multi_head(case, x, cotangent, expected, parameters, gradients):
    """Compare the multi-head module, whose projections are plain linear layers."""
    parameters = {name: t.float().requires_grad_() for name, t in parameters.items()}
    x = x.float().requires_grad_()
    queries = linear(parameters, "trans_dims", x)
    num_heads = queries.shape[2] // parameters["linear_0.weight"].shape[1]
    out = multi_head_external_attention(
        queries, **memories(parameters), num_heads=num_heads, backend="triton"
    )
    out = linear(parameters, "proj", out)
    (out * cotangent.float()).sum().backward()
    compare(case, out, expected, parameters, x, gradients)


@pytest.mark.golden("segmentation.mh_attention")
def test_multi_head_equals_the_original(golden_case):
    io = golden_case.tensors("io")
    check_multi_head(
        golden_case, io["in.x"], io["in.cotangent"], io["eval.out"],
        golden_case.tensors("weights"), golden_case.starting_with("grad_eval."),
    )  # fmt: skip


@pytest.mark.golden("classification.mea")
def test_mea_equals_the_original(golden_case):
    tensors = golden_case.tensors()
    check_multi_head(
        golden_case, tensors["input.x"], tensors["input.loss_weight"], tensors["output64.y"],
        golden_case.starting_with("param."), golden_case.starting_with("grad64."),
    )  # fmt: skip


def test_cases_cover_every_option():
    assert {case.heads for case in CASES} == {1, 4}
    assert {1, 8, 64, 100, 256} <= {case.slots for case in CASES}
    assert {case.mask for case in CASES} == {"none", "padded", "sample empty", "all empty"}
    assert {case.layout for case in CASES} == {"channels last", "tokens last", "sliced"}
    assert {case.dtype for case in CASES} == {torch.float32, torch.float16, torch.bfloat16}
