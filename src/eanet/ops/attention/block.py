"""External attention between two thin matrices, with batch norm, residual and ReLU in one step.

With K = M_k W_1 and V = W_2 M_v^T the whole block is two products with the feature map::

    out = relu(x + scale * (V A) + shift),   A = norm(K x)

so the C x C projections never touch the N positions. In training the statistics of the batch norm
follow from the mean and the covariance of the S attention rows, which are small, and no pass over
a (channels, tokens) map is needed for them. The derivation is in ``README.md`` beside this file.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.ops.attention import custom_op, eager
from eanet.ops.attention.block_function import (
    BlockFunction,
    BlockOperands,
    BlockOptions,
    composed_block,
    inference_pass,
    num_valid,
)
from eanet.ops.attention.linear import LEAST_MACS, LEAST_MACS_WITH_GRADIENT

__all__ = ["BatchNormArguments", "BatchStatistics", "external_attention_block", "result_only"]


class BatchNormArguments(NamedTuple):
    """Batch normalization with statistics of the batch: scale and shift (channels), and its eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5


class BatchStatistics(NamedTuple):
    """What the batch norm saw: mean and biased variance (channels), and how many tokens."""

    mean: Tensor
    variance: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


def external_attention_block(
    x: Float[Tensor, "batch channels tokens"],
    key: Float[Tensor, "slots channels"],
    value: Float[Tensor, "out_channels slots"],
    *,
    key_bias: Float[Tensor, " slots"] | None = None,
    bias: Float[Tensor, " out_channels"] | None = None,
    batch_norm: BatchNormArguments | None = None,
    norm: Literal["double", "softmax"] = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    residual: bool = True,
    relu: bool = True,
    out: Float[Tensor, "batch out_channels tokens"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch out_channels tokens"], BatchStatistics | None]:
    """Compute ``relu(x + batch_norm(value @ norm(key @ x + key_bias) + bias))``.

    Args:
        x: feature maps; a (batch, tokens, channels) tensor may be given transposed, its result
            then has the same strides.
        key: memory keys times the query projection.
        value: output projection times the memory values.
        key_bias: added to the logits; ``None`` where the norm cancels it.
        bias: added after the second product; not together with ``batch_norm``.
        batch_norm: normalize with the statistics of this batch (training).
        norm: "double" or "softmax".
        eps: of the double normalization.
        mask: True for tokens that take part; the branch gives 0 for others, and batch norm leaves
            them out.
        residual: add x.
        relu: rectify the result.
        out: a buffer for the result, where no gradients are recorded; it may be x itself. A fresh
            result of many MiB costs about as much time as the computation, since the system hands
            out its memory page by page.
        backend: "eager", or "triton" for the kernels; ``None`` takes the kernels on a GPU. Batch
            statistics and ``out`` are the matter of "eager", whatever is asked for.

    Returns:
        The result, and the statistics of the batch where ``batch_norm`` is given.

    Raises:
        ValueError: both ``bias`` and ``batch_norm``, or a residual of another width; or ``out``
            does not fit the result, overlaps x in part, or gradients are recorded.
    """
    if batch_norm is not None and bias is not None:
        raise ValueError("bias and batch_norm exclude each other: batch norm removes a bias")
    if residual and value.shape[0] != x.shape[1]:
        raise ValueError(f"a residual needs {x.shape[1]} output channels, got {value.shape[0]}")
    options = BlockOptions(
        norm, eps, None if batch_norm is None else batch_norm.eps, residual, relu
    )
    shift, scale = (bias, None) if batch_norm is None else (batch_norm.bias, batch_norm.weight)
    operands = BlockOperands(x, key, value, key_bias, shift, scale, mask)
    if backend not in (None, "eager", "triton"):
        raise ValueError(f"backend must be 'eager' or 'triton', got {backend!r}")
    wants_kernels = backend == "triton" or (backend is None and custom_op.suits(x, key.shape[0]))
    if wants_kernels and batch_norm is None and out is None:
        return _by_kernels(operands, options), None
    if out is not None:
        _check_out(out, operands)
    result, mean, variance = _by_eager(operands, options, out)
    if batch_norm is None:
        return result, None
    return result, BatchStatistics(mean, variance, num_valid(x, mask, mean.dtype))


def _by_eager(
    operands: BlockOperands, options: BlockOptions, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return result, mean and variance of plain PyTorch."""
    if out is None and torch.compiler.is_compiling():
        return composed_block(operands, options)
    if out is not None or not _records_gradients(operands):
        passed = inference_pass(operands, options, out)
        return passed.out, passed.mean, passed.variance
    return BlockFunction.apply(options, *operands)  # pyright: ignore[reportReturnType]


def _by_kernels(operands: BlockOperands, options: BlockOptions) -> Tensor:
    """Return the result of the Triton kernels."""
    out, _ = custom_op.fused_external_attention(
        operands.x.transpose(1, 2),
        operands.key,
        operands.value.transpose(0, 1),
        memory_key_bias=operands.key_bias,
        memory_value_bias=operands.bias,
        norm=options.norm,
        eps=options.eps,
        mask=operands.mask,
        residual=options.residual,
    )
    if options.relu:
        out = torch.relu(out) if out.requires_grad else out.relu_()
    return out.transpose(1, 2)


def result_only(
    x: Float[Tensor, "batch tokens channels"],
    memory_key: Float[Tensor, "slots head_channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    num_heads: int = 1,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: Literal["double", "softmax"] = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    out: Float[Tensor, "batch tokens width"] | None = None,
) -> Float[Tensor, "batch tokens width"]:
    """Compute external attention of any number of heads where nobody wants the map.

    Arguments as for :func:`eanet.ops.attention.multi_head_external_attention`.
    """
    if out is None and torch.is_autocast_enabled(x.device.type):
        return eager.multi_head_external_attention(
            x, memory_key, memory_value, num_heads=num_heads, memory_key_bias=memory_key_bias,
            memory_value_bias=memory_value_bias, norm=norm, eps=eps, mask=mask,
        )[0]  # fmt: skip
    value = memory_key if memory_value is None else memory_value
    batch, tokens, _ = x.shape
    if out is None and mask is None and _is_little_work(x, memory_key, value, eps):
        heads = x if num_heads == 1 else x.reshape(batch, tokens, num_heads, -1)
        logits = F.linear(heads, memory_key, memory_key_bias)
        attention = torch.softmax(logits, dim=1 if norm == "double" else -1)
        if norm == "double":
            attention = attention / (attention.sum(-1, keepdim=True) + eps)
        out = F.linear(attention, value.transpose(0, 1), memory_value_bias)
        return out if num_heads == 1 else out.flatten(2)
    # the heads of a token lie side by side, and become columns without a copy
    columns = x.reshape(batch, tokens * num_heads, memory_key.shape[1]).transpose(1, 2)
    options = BlockOptions(norm, eps, None, residual=False, relu=False, num_heads=num_heads)
    operands = BlockOperands(
        columns, memory_key, value.transpose(0, 1), memory_key_bias, memory_value_bias, None, mask
    )
    place = None
    if out is not None:
        place = _as_columns(out, (batch, tokens, num_heads * value.shape[1]), num_heads)
        _check_out(place, operands)
    result, _, _ = _by_eager(operands, options, place)
    if out is not None:
        return out
    return result.transpose(1, 2).reshape(batch, tokens, num_heads * value.shape[1])


def _as_columns(out: Tensor, shape: tuple[int, int, int], num_heads: int) -> Tensor:
    """View a buffer (batch, tokens, width) as (batch, channels, tokens * heads).

    Raises:
        ValueError: it has another shape, or gaps.
    """
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, (batch, tokens, width) = {shape}, "
            f"got {tuple(out.shape)} with strides {out.stride()}"
        )
    return out.view(shape[0], shape[1] * num_heads, shape[2] // num_heads).transpose(1, 2)


def _is_little_work(x: Tensor, key: Tensor, value: Tensor, eps: float) -> bool:
    """Tell whether the equations as written are exact, and faster than what saves products."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, key, value))
    return (
        0 < x.numel() * key.shape[0] < (2 * LEAST_MACS_WITH_GRADIENT if recorded else LEAST_MACS)
        and x.shape[1] <= eager.MOST_TOKENS_OF_SOFTMAX
        and x.device.type == "cpu"
        and x.dtype == key.dtype == value.dtype
        and x.dtype in (torch.float32, torch.float64)
        and eager.eps_dominates_underflow(eps, x.dtype)
        and not torch.compiler.is_compiling()
    )


def _records_gradients(operands: BlockOperands) -> bool:
    """Tell whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in operands
    )


def _check_out(out: Tensor, operands: BlockOperands) -> None:
    """Refuse a buffer that cannot take the result.

    Raises:
        ValueError: shape, type or device differ, it overlaps x in part, or gradients are recorded.
    """
    x, value = operands.x, operands.value
    shape = (x.shape[0], value.shape[0], x.shape[2])
    if tuple(out.shape) != shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be {shape}, {x.dtype} on {x.device}, "
            f"got {tuple(out.shape)}, {out.dtype} on {out.device}"
        )
    if torch.is_grad_enabled() and (out.requires_grad or _records_gradients(operands)):
        raise ValueError("out takes no part in gradients: use it under torch.no_grad()")
    same_place = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    if not same_place and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        raise ValueError("out must be x itself or have memory of its own")
