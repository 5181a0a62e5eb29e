"""The Triton kernels as operators of torch: shapes for tracing, gradients, and calls without them.

``torch.compile`` carries the operators as they are. Triton itself is imported when one is first
called: importing this module needs neither Triton nor a GPU.
"""

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter

from eanet.ops.attention import eager
from eanet.ops.attention.tiling import Problem

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["DTYPES", "attend"]

#: of tokens that the kernels take
DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


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
    if x.dtype not in DTYPES:
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
        Problem(num_heads, norm, eps, dropout, residual),
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
        Problem(num_heads, norm, eps, dropout, residual),
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


def attend(
    *operands: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    norm: str,
    eps: float,
    dropout: float,
    residual: bool,
    with_attention: bool,
    with_denominator: bool,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:
    """Call the operator, or what is behind it where nobody watches.

    Args:
        operands: x (batch, tokens, heads * C), M_k (S, C), M_v (S, V), biases of the keys (S) and
            of the values (V), each bias ``None`` where there is none.
        mask: boolean (batch, tokens), True for tokens that take part.
        seed: of the dropout, an int64 tensor of one element; without it nothing is dropped.
        num_heads: heads that share the memories.
        norm: "double" or "softmax".
        eps: of the double normalization.
        dropout: probability to drop an entry of the attention.
        residual: add x.
        with_attention: write the map; the backward pass reads it ``with_denominator``.
        with_denominator: write and keep what the backward pass needs to read x once.
        differentiable: whether a gradient can be asked for.

    Returns:
        Result (batch, tokens, heads * V), and the map (batch, heads, tokens, S) or nothing, (0,).

    Raises:
        ValueError: Triton is missing, or the device or type of x is not one the kernels run on.
    """
    compute: Any = _forward
    if _is_plain(*operands, mask, seed):
        compute = _Direct.apply if differentiable else _compute_forward
    out, attention, *_ = compute(
        *operands, mask, seed, num_heads, norm, eps, dropout, residual,
        with_attention, with_denominator,
    )  # fmt: skip
    return out, attention
