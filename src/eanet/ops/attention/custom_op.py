"""The backend "triton": external attention on a GPU in two passes over the tokens.

Registers the kernels as operators of torch, with shapes for tracing and with gradients, so that
``torch.compile`` carries them as they are. Triton itself is imported when the backend is first
used: importing this module needs neither Triton nor a GPU.

Autocast does not reach into an operator. As a matrix product would, the functions here cast the
tokens to the type of an active autocast region; memories and biases may stay float32.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import Parameter

from eanet.ops.attention import eager

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "double_normalize",
    "external_attention",
    "fused_external_attention",
    "multi_head_external_attention",
    "result_only",
    "slot_softmax",
    "suits",
]

# logits that are given do not need the tokens: nothing is gained by another kernel
double_normalize = eager.double_normalize
slot_softmax = eager.slot_softmax

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_SLOTS = 256


def suits(x: Tensor, num_slots: int) -> bool:
    """Tell whether the kernels are the better choice: tensors on a GPU that they can take.

    A network that is exported keeps to operations that every runtime knows.
    """
    return (
        x.is_cuda
        and x.dtype in _DTYPES
        and num_slots <= _MAX_SLOTS
        and not torch.compiler.is_exporting()
        and importlib.util.find_spec("triton") is not None
    )


def _launch_for(x: Tensor) -> "ModuleType":
    """Import the launches, and refuse tensors that the kernels cannot take.

    Raises:
        ValueError: Triton is missing, or the device or type of x is not one the kernels run on.
    """
    try:
        from eanet.ops.attention import kernels, launch
    except ImportError as error:
        raise ValueError(
            "backend 'triton' needs the package triton, which PyTorch brings on Linux; "
            "use backend='eager'"
        ) from error
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"backend 'triton' takes float32, float16 and bfloat16, got {x.dtype}; "
            "use backend='eager'"
        )
    if not (x.is_cuda or (x.device.type == "cpu" and kernels.INTERPRETED)):
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, got {x.device}; use backend='eager' "
            "(TRITON_INTERPRET=1, set before Python starts, runs the kernels slowly on a CPU)"
        )
    return launch


def _new_tokens(x: Tensor, width: int) -> Tensor:
    """Allocate (batch, tokens, width) with tokens or channels innermost, as in x."""
    batch, num_tokens, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, width, num_tokens)).transpose(1, 2)
    return x.new_empty((batch, num_tokens, width))


def _compute_forward(
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_key_bias: Tensor | None,
    memory_value_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    norm: str,
    eps: float,
    dropout: float,
    residual: bool,
    with_attention: bool,
    with_denominator: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result, and for the backward pass attention, statistics and denominator.

    Those that are not wanted, or do not exist under the norm, are empty.
    """
    launch = _launch_for(x)
    outputs = _allocate(
        x, memory_key, memory_value, num_heads, norm, with_attention, with_denominator
    )
    out, attention, statistics, denominator = outputs
    if x.numel() == 0 or out.numel() == 0:
        for output in outputs[1:]:
            output.zero_()
        return outputs
    found = launch.forward(
        x,
        memory_key,
        memory_value,
        memory_key_bias,
        memory_value_bias,
        mask,
        seed,
        launch.Problem(num_heads, norm, eps, dropout, residual),
        out=out,
        attention=attention if with_attention else None,
        denominator=denominator if denominator.numel() else None,
    )
    return out, attention, statistics if found is None else found, denominator


_forward = torch.library.custom_op("eanet::external_attention", _compute_forward, mutates_args=())


def _allocate(
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    num_heads: int,
    norm: str,
    with_attention: bool,
    with_denominator: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the outputs of the forward operator."""
    batch, num_tokens, _ = x.shape
    num_slots = memory_key.shape[0]
    out = _new_tokens(x, num_heads * memory_value.shape[1])
    attention_shape = (batch, num_heads, num_tokens, num_slots) if with_attention else (0,)
    double = norm == "double"
    statistics_shape = (2, batch * num_heads, num_slots) if double else (0,)
    denominator_shape = attention_shape[:3] if double and with_denominator else (0,)
    return (
        out,
        x.new_empty(attention_shape),
        x.new_empty(statistics_shape, dtype=torch.float32),
        x.new_empty(denominator_shape, dtype=torch.float32),
    )


@_forward.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_key_bias: Tensor | None,
    memory_value_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    norm: str,
    eps: float,
    dropout: float,
    residual: bool,
    with_attention: bool,
    with_denominator: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate(x, memory_key, memory_value, num_heads, norm, with_attention, with_denominator)


def _compute_backward(
    grad_out: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_key_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    attention: Tensor | None,
    denominator: Tensor | None,
    num_heads: int,
    norm: str,
    eps: float,
    dropout: float,
    residual: bool,
    with_value_bias: bool = True,
    sums_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x, and those that are sums over tokens.

    They are those of both memories and of the value bias side by side, and of the key bias.
    """
    launch = _launch_for(x)
    gradients = _allocate_gradients(x, memory_key, memory_value, memory_key_bias, sums_dtype)
    grad_x, grad_memories, grad_key_bias = gradients
    if x.numel() == 0 or grad_out.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    launch.backward(
        grad_out,
        grad_attention,
        x,
        memory_key,
        memory_value,
        memory_key_bias,
        mask,
        seed,
        statistics if norm == "double" else None,
        launch.Problem(num_heads, norm, eps, dropout, residual),
        kept=None if attention is None or denominator is None else (attention, denominator),
        with_value_bias=with_value_bias,
        grad_x=grad_x,
        grad_memories=grad_memories,
        grad_key_bias=None if memory_key_bias is None else grad_key_bias,
    )
    return gradients


_backward = torch.library.custom_op(
    "eanet::external_attention_backward", _compute_backward, mutates_args=()
)


def _allocate_gradients(
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_key_bias: Tensor | None,
    sums_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the outputs of the backward operator."""
    num_sums = memory_key.numel() + memory_value.numel() + memory_value.shape[1]
    return (
        _new_tokens(x, x.shape[2]),
        x.new_empty((num_sums,), dtype=sums_dtype),
        x.new_empty((0 if memory_key_bias is None else memory_key.shape[0],), dtype=torch.float32),
    )


@_backward.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    grad_out: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_key_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    attention: Tensor | None,
    denominator: Tensor | None,
    num_heads: int,
    norm: str,
    eps: float,
    dropout: float,
    residual: bool,
    with_value_bias: bool = True,
    sums_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_gradients(x, memory_key, memory_value, memory_key_bias, sums_dtype)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Keep the operands and the statistics, and where it is small the attention."""
    ctx.options = inputs[7:12]  # heads, norm, eps, dropout, residual
    _, attention, statistics, denominator = output
    kept = (attention, denominator) if inputs[13] else (None, None)
    ctx.save_for_backward(*inputs[:7], statistics, *kept)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_attention: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return one gradient for each argument of the forward operator."""
    x, memory_key, memory_value, key_bias, value_bias, mask, seed, *kept = ctx.saved_tensors
    num_heads = ctx.options[0]
    if torch.is_grad_enabled():  # second derivatives are wanted
        return _differentiate_twice(ctx, grad_out, grad_attention)
    if grad_out is None:
        grad_out = x.new_zeros((*x.shape[:2], num_heads * memory_value.shape[1]))
    if grad_attention is not None and grad_attention.numel() == 0:
        grad_attention = None
    # sums are rounded once, where all that are written together have the same type
    dtypes = {t.dtype for t in (memory_key, memory_value, value_bias) if t is not None}
    sums_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    tensors = (
        grad_out, grad_attention, x, memory_key, memory_value, key_bias, mask, seed, *kept,
    )  # fmt: skip
    compute: Any = _compute_backward if _is_plain(*tensors) else _backward
    gradients_of_operands: tuple[Tensor, Tensor, Tensor] = compute(
        *tensors, *ctx.options, value_bias is not None, sums_dtype
    )
    grad_x, sums, grad_key_bias = gradients_of_operands
    shapes = (memory_key.shape, memory_value.shape, memory_value.shape[1:])
    parts = torch.split(sums, [shape.numel() for shape in shapes])
    grad_key, grad_value, grad_value_bias = (
        part.view(shape) for part, shape in zip(parts, shapes, strict=True)
    )
    operands = (x, memory_key, memory_value, key_bias, value_bias)
    found = (grad_x, grad_key, grad_value, grad_key_bias, grad_value_bias)
    gradients = [
        None if operand is None else gradient.to(operand.dtype)
        for operand, gradient in zip(operands, found, strict=True)
    ]
    return (*gradients, *(None for _ in range(9)))


def _differentiate_twice(
    ctx: Any, grad_out: Tensor | None, grad_attention: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return gradients that have gradients, by way of the eager form."""
    x, memory_key, memory_value, key_bias, value_bias, mask, *_ = ctx.saved_tensors
    # a memory that is both has a gradient as either
    memory_key, memory_value = memory_key.view_as(memory_key), memory_value.view_as(memory_value)
    num_heads, norm, eps, dropout, residual = ctx.options
    if dropout > 0:
        raise ValueError("attention_dropout has no second derivative here; use backend='eager'")
    out, attention = eager.multi_head_external_attention(
        x, memory_key, memory_value, num_heads=num_heads, memory_key_bias=key_bias,
        memory_value_bias=value_bias, norm=norm, eps=eps, mask=mask,
    )  # fmt: skip
    results = [(out + x if residual else out, grad_out), (attention, grad_attention)]
    results = [(result, grad) for result, grad in results if grad is not None and grad.numel()]
    operands = (x, memory_key, memory_value, key_bias, value_bias)
    wanted = [operand for operand in operands if operand is not None and operand.requires_grad]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in results],
            wanted,
            [grad for _, grad in results],
            create_graph=True,
            materialize_grads=True,
        )
    )
    gradients = [
        next(found) if operand is not None and operand.requires_grad else None
        for operand in operands
    ]
    return (*gradients, *(None for _ in range(9)))


_forward.register_autograd(  # pyright: ignore[reportUnknownMemberType]
    _differentiate, setup_context=_setup_context
)


class _Direct(torch.autograd.Function):
    """The operator without its registration, which costs more than a kernel of few tokens.

    See ``docs/decisions/0014-calls-without-the-operator.md``.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute and keep; a ``setup_context`` of its own would have arguments bound by name."""
        outputs = _compute_forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_differentiate)


def _is_plain(*tensors: Tensor | None) -> bool:
    """Tell whether these are tensors with memory of their own, and nobody traces what is done.

    Tracers, fake tensors, the meta device, tensors that stand for several or for the negative of
    what is in memory, ``torch.func`` and modes that count or record need the operator.
    """
    watchers: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    return (
        not torch.compiler.is_compiling()
        and watchers._get_tracing_state() is None
        and not watchers._are_functorch_transforms_active()
        and watchers._len_torch_dispatch_stack() == 0
        and watchers._len_torch_function_stack() == 0
        and all(tensor is None or _has_memory(tensor) for tensor in tensors)
    )


def _has_memory(tensor: Tensor) -> bool:
    """Tell whether what is in the memory of a tensor are its numbers."""
    return (
        type(tensor) in (Tensor, Parameter)
        and not tensor.is_meta
        and not tensor.is_neg()
        and not tensor._is_zerotensor()  # pyright: ignore[reportPrivateUsage]
        and torch._C._has_storage(tensor)  # pyright: ignore[reportPrivateUsage]
    )


def _needs_gradient(*operands: Tensor | None) -> bool:
    """Tell whether a backward pass can follow."""
    return torch.is_grad_enabled() and any(
        operand is not None and operand.requires_grad for operand in operands
    )


def fused_external_attention(
    x: Float[Tensor, "batch tokens channels"],
    memory_key: Float[Tensor, "slots head_channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    num_heads: int = 1,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: str = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    attention_dropout: float = 0.0,
    seed: Int64[Tensor, " 1"] | None = None,
    residual: bool = False,
    return_attention: bool = False,
) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch heads tokens slots"] | None]:
    """Compute external attention (Eq. 5-14, arXiv 2105.02358) with all that the kernels fuse.

    The attention map does not exist in memory unless it is asked for, or a backward pass follows
    and it takes at most a quarter of the memory of x. Second derivatives go by way of the eager
    form; with dropout there are none.

    Args:
        x: tokens, any strides; the result has tokens or channels innermost as x has.
        memory_key: M_k, up to 256 slots.
        memory_value: M_v; ``None`` uses M_k.
        num_heads: heads that share the memories.
        memory_key_bias: added to the logits; cancels under "double", where its gradient is 0.
        memory_value_bias: added to the result of valid tokens.
        norm: "double" or "softmax".
        eps: of the double normalization, within [0, 1).
        mask: True for tokens that take part; from the others only the residual is left.
        attention_dropout: probability to drop an entry of the attention before it mixes values.
        seed: of the dropout; drawn from torch's generator where not given.
        residual: add x; needs results as wide as x.
        return_attention: return the map too, as it is before dropout.

    Raises:
        ValueError: device, type, number of slots, dropout or the width for a residual do not fit.
    """
    values = memory_key if memory_value is None else memory_value
    if not 0 <= attention_dropout < 1:
        raise ValueError(f"attention_dropout must be within [0, 1), got {attention_dropout}")
    if residual and values.shape[1] * num_heads != x.shape[2]:
        raise ValueError(
            f"a residual needs results as wide as x, {x.shape[2]} channels, "
            f"got {values.shape[1] * num_heads}"
        )
    device = x.device.type
    if device != "meta" and x.dtype in _DTYPES and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if attention_dropout == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    # the map spares the backward pass a reading of x, where it is small beside x; of one slot or
    # one token the gradient nearly cancels, which takes all digits
    operands = (x, memory_key, values, memory_key_bias, memory_value_bias)
    differentiable = _needs_gradient(*operands)
    num_slots, num_channels = memory_key.shape
    keeps = differentiable and 1 < num_slots <= num_channels // 4 and x.shape[1] > 1
    if not _is_plain(*operands, mask, seed):
        compute = _forward
    elif differentiable:
        compute = _Direct.apply
    else:
        compute = _compute_forward
    out, attention, _, _ = compute(
        *operands,
        mask,
        seed,
        num_heads,
        norm,
        eps,
        attention_dropout,
        residual,
        return_attention or keeps,
        keeps,
    )
    return out, attention if return_attention else None


def external_attention(
    x: Float[Tensor, "batch tokens channels"],
    memory_key: Float[Tensor, "slots channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: str = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch tokens value_channels"], Float[Tensor, "batch tokens slots"]]:
    """Attend from tokens to memories; return the result and the attention map."""
    output, attention = multi_head_external_attention(
        x,
        memory_key,
        memory_value,
        num_heads=1,
        memory_key_bias=memory_key_bias,
        memory_value_bias=memory_value_bias,
        norm=norm,
        eps=eps,
        mask=mask,
    )
    return output, attention.squeeze(1)


def multi_head_external_attention(
    x: Float[Tensor, "batch tokens channels"],
    memory_key: Float[Tensor, "slots head_channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    num_heads: int,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: str = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch heads tokens slots"]]:
    """Apply external attention to each head; return the result and the attention map."""
    output, attention = fused_external_attention(
        x,
        memory_key,
        memory_value,
        num_heads=num_heads,
        memory_key_bias=memory_key_bias,
        memory_value_bias=memory_value_bias,
        norm=norm,
        eps=eps,
        mask=mask,
        return_attention=True,
    )
    assert attention is not None
    return output, attention


def result_only(
    x: Float[Tensor, "batch tokens channels"],
    memory_key: Float[Tensor, "slots head_channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    num_heads: int = 1,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: str = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens width"]:
    """Return the result alone: no attention map is written to memory."""
    output, _ = fused_external_attention(
        x,
        memory_key,
        memory_value,
        num_heads=num_heads,
        memory_key_bias=memory_key_bias,
        memory_value_bias=memory_value_bias,
        norm=norm,
        eps=eps,
        mask=mask,
    )
    return output
