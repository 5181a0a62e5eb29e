"""The external attention block as one differentiable function: its passes over the tokens.

Kept for the backward pass are x, the result (for the ReLU), and rows of (slots, tokens). Of the
maps of (channels, tokens) the forward pass reads x twice and writes the result; the backward pass
rectifies the gradient into a fresh map, reads it twice and x once, and turns it into the gradient
of x where it lies. Equations: ``docs/explanation/numerics.md``.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eanet.ops.attention import eager
from eanet.ops.attention.attention_rows import (
    PART_COLUMNS,
    block_logits,
    by_token,
    normalize_tokens,
    normalized_rows,
    parts_of,
    token_logits,
)
from eanet.ops.attention.thin_products import (
    empty_map,
    is_token_major,
    map_from_rows,
    rows_from_map,
    sum_over_tokens,
    tail,
)

__all__ = [
    "BlockFunction",
    "BlockOperands",
    "BlockOptions",
    "ForwardPass",
    "composed_block",
    "inference_pass",
    "num_valid",
]


#: tokens whose products are summed at once: sums of parts round less than one long sum
_MOMENT_TOKENS = 1 << 12


class BlockOptions(NamedTuple):
    """What the block does, apart from its tensors."""

    norm: Literal["double", "softmax"]
    eps: float
    batch_norm_eps: float | None
    residual: bool
    relu: bool
    num_heads: int = 1  # H, without batch norm if there are several


class BlockOperands(NamedTuple):
    """The tensors of a block; ``bias`` is the batch norm's shift where there is one.

    With several heads, the columns of x are the heads of one token after the other.
    """

    x: Tensor  # (B, C, N * H)
    key: Tensor  # (S, C)
    value: Tensor  # (V, S)
    key_bias: Tensor | None  # (S)
    bias: Tensor | None  # (V)
    scale: Tensor | None  # (V)
    mask: Tensor | None  # (B, N)


class ForwardPass(NamedTuple):
    """The result, and what a backward pass needs beside the operands.

    Attributes:
        out: (B, V, N * H).
        mean: of the branch (V), empty without batch norm.
        variance: likewise.
        rows: attention (B, S, N * H), in the type of x.
        weight: of the second product (V, S), with batch norm inside.
        denominator: of Eq. 11, (B, 1, N * H).
        moments: mean (S) and covariance (S, S) of the attention, with batch norm.
    """

    out: Tensor
    mean: Tensor
    variance: Tensor
    rows: Tensor
    weight: Tensor
    denominator: Tensor | None
    moments: tuple[Tensor, Tensor] | None = None


def num_valid(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the number of tokens that take part in the batch, as a scalar."""
    if mask is not None:
        return mask.sum().to(dtype)
    return torch.full((), x.shape[0] * x.shape[2], dtype=dtype, device=x.device)


def _centered(attention: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention less its mean, and 0 where a token takes no part."""
    centered = attention - mean.unsqueeze(-1)
    return centered if mask is None else centered.masked_fill(~mask.unsqueeze(1), 0.0)


def _count(operands: BlockOperands, dtype: torch.dtype) -> Tensor:
    """Return what sums over tokens are divided by."""
    return num_valid(operands.x, operands.mask, dtype).clamp(min=1.0)


def _moments(operands: BlockOperands, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (S) and covariance (S, S) of attention over tokens.

    Rows are centered before they are multiplied: no small number is formed from large ones.
    """
    count, mask = _count(operands, attention.dtype), operands.mask
    mean = attention.sum(dim=(0, 2)) / count
    covariance = attention.new_zeros((attention.shape[1], attention.shape[1]))
    for part in parts_of(operands.x, _MOMENT_TOKENS):
        centered = _centered(attention[..., part], mean, _part(mask, part))
        covariance = covariance + sum_over_tokens(centered, centered)
    return mean, covariance / count


def _part(mask: Tensor | None, part: slice) -> Tensor | None:
    return None if mask is None else mask[:, part]


def _value_moments(value: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (V) of ``value @ attention`` from the moments of attention."""
    value = value.to(mean.dtype)
    # a quadratic form of a covariance is not negative, but its rounding error may be
    return (value * mean).sum(1), ((value @ covariance) * value).sum(1).clamp(min=0.0)


def _fold_batch_norm(
    operands: BlockOperands, moments: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight and bias of the second product with batch norm inside, mean and variance."""
    mean_attention, covariance = moments
    mean, variance = _value_moments(operands.value, mean_attention, covariance)
    factor = torch.rsqrt(variance + eps)
    if operands.scale is not None:
        factor = factor * operands.scale
    bias = -factor * mean
    if operands.bias is not None:
        bias = operands.bias + bias
    return factor.unsqueeze(1) * operands.value, bias, mean, variance


def composed_block(operands: BlockOperands, options: BlockOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Form the block from ordinary operations: for compilers, exporters and second derivatives.

    Returns:
        The result, mean and variance as in :class:`ForwardPass`.
    """
    x, weight, bias = operands.x, operands.value, operands.bias
    attention = _composed_attention(operands, options)
    mean = variance = attention.new_zeros(0)
    if options.batch_norm_eps is not None:
        moments = _moments(operands, attention)
        weight, bias, mean, variance = _fold_batch_norm(operands, moments, options.batch_norm_eps)
    rows, weight = attention.to(x.dtype), weight.to(x.dtype)
    if is_token_major(x):
        out = F.linear(rows.transpose(1, 2), weight).transpose(1, 2)
    else:
        out = torch.bmm(weight.expand(x.shape[0], *weight.shape), rows)
    if bias is not None:
        shift = bias.to(x.dtype).unsqueeze(-1)
        mask = _column_mask(operands, options)
        if mask is not None:
            shift = shift * mask.unsqueeze(1)
        out = out + shift
    if options.residual:
        out = out + x
    return (torch.relu(out) if options.relu else out), mean.detach(), variance.detach()


def _composed_attention(operands: BlockOperands, options: BlockOptions) -> Tensor:
    """Return the attention (B, S, N * H), at least in float32, lying as x does."""
    x, key, key_bias = operands.x, operands.key, operands.key_bias
    if is_token_major(x):
        heads = by_token(x, options.num_heads).permute(0, 2, 3, 1)
        logits = token_logits(heads, key, key_bias)
        attention = normalize_tokens(logits, norm=options.norm, eps=options.eps, mask=operands.mask)
        return attention.flatten(1, 2).transpose(1, 2)
    logits = by_token(block_logits(x, key, key_bias), options.num_heads)
    attention = eager.normalize_logits(
        logits, norm=options.norm, token_dim=2, slot_dim=1, eps=options.eps, mask=operands.mask
    )
    return attention.flatten(2)


def inference_pass(
    operands: BlockOperands, options: BlockOptions, out: Tensor | None = None
) -> ForwardPass:
    """Compute the block where nothing is kept for a backward pass.

    On a CPU the attention of many tokens waits in the memory of the result.
    """
    x, num_slots, width = operands.x, operands.key.shape[0], operands.value.shape[0]
    many = x.device.type == "cpu" and x.shape[0] * x.shape[2] > PART_COLUMNS
    # without anything to add, a product may itself be the result, which saves more
    at_once = out is None and not options.residual and not options.relu and width > 2 * num_slots
    if not many or at_once or not is_token_major(x) or options.batch_norm_eps is not None:
        return forward_pass(operands, options, out)
    out = empty_map(x, width) if out is None else out
    separate = out.data_ptr() != x.data_ptr() and out.dtype in (torch.float32, torch.float64)
    return forward_pass(operands, options, out, tail(out, num_slots) if separate else None)


def forward_pass(
    operands: BlockOperands,
    options: BlockOptions,
    out: Tensor | None = None,
    place: Tensor | None = None,
) -> ForwardPass:
    """Compute the block without recording gradients.

    Args:
        operands: its tensors.
        options: what it does.
        out: memory for the result.
        place: memory for the attention, see :func:`eanet.ops.attention.thin_products.tail`.
    """
    x = operands.x
    attention, denominator = normalized_rows(
        x,
        operands.key,
        operands.key_bias,
        norm=options.norm,
        eps=options.eps,
        mask=operands.mask,
        num_heads=options.num_heads,
        place=place,
    )
    weight, bias = operands.value, operands.bias
    mean = variance = attention.new_zeros(0)
    moments = None
    if options.batch_norm_eps is not None:
        moments = _moments(operands, attention)
        weight, bias, mean, variance = _fold_batch_norm(operands, moments, options.batch_norm_eps)
    rows, weight = attention.to(x.dtype), weight.to(x.dtype).contiguous()
    out = map_from_rows(
        weight,
        rows,
        like=x,
        base=x if options.residual else None,
        bias=None if bias is None else bias.to(x.dtype),
        mask=_column_mask(operands, options),
        relu=options.relu,
        out=out,
    )
    return ForwardPass(out, mean, variance, rows, weight, denominator, moments)


def _column_mask(operands: BlockOperands, options: BlockOptions) -> Tensor | None:
    """Return the mask for the columns of x (B, N * H)."""
    mask = operands.mask
    return None if mask is None else mask.repeat_interleave(options.num_heads, dim=1)


class BlockFunction(torch.autograd.Function):
    """The block with a backward pass that touches each map as seldom as it can."""

    @staticmethod
    def forward(  # noqa: D102 - of torch
        ctx: Any, options: BlockOptions, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = BlockOperands(*tensors)  # pyright: ignore[reportArgumentType]
        found = forward_pass(operands, options)
        ctx.options = options
        kept = found.out if options.relu else None
        moments = found.moments or (None, None)
        ctx.save_for_backward(*tensors, found.rows, found.weight, found.denominator, kept, *moments)
        ctx.mark_non_differentiable(found.mean, found.variance)
        return found.out, found.mean, found.variance

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        saved = ctx.saved_tensors  # unpacked once: a checkpoint recomputes them only once
        operands = BlockOperands(*saved[:7])
        if torch.is_grad_enabled():  # second derivatives are wanted
            gradients = _composed_backward(operands, ctx.options, grad_outputs[0])
        else:
            x_wanted = ctx.needs_input_grad[1]
            gradients = _fast_backward(operands, ctx.options, saved[7:], grad_outputs[0], x_wanted)
        return None, *gradients, None


def _composed_backward(
    operands: BlockOperands, options: BlockOptions, grad_out: Tensor
) -> list[Tensor | None]:
    """Return differentiable gradients of the tensors, by way of the composed form."""
    tensors = operands[:6]
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    out, _, _ = composed_block(operands, options)
    gradients = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
    return [
        next(gradients) if tensor is not None and tensor.requires_grad else None
        for tensor in tensors
    ]


def _fast_backward(
    operands: BlockOperands,
    options: BlockOptions,
    saved: tuple[Any, ...],
    grad_out: Tensor,
    x_wanted: bool,
) -> list[Tensor | None]:
    """Return the gradients of x, key, value, key bias, bias and scale."""
    rows, weight, denominator, out, *moments = saved
    x, num_slots = operands.x, operands.key.shape[0]
    grad = _before_relu(grad_out, out, x)
    attention = rows if rows.dtype == torch.float64 else rows.float()
    with_bias = operands.bias is not None or options.batch_norm_eps is not None
    grad_weight = sum_over_tokens(
        rows, grad, with_total=with_bias, mask=_column_mask(operands, options)
    )
    grad_weight = grad_weight.transpose(0, 1).to(attention.dtype)
    grad_rows = rows_from_map(weight.t().contiguous(), grad).to(attention.dtype)
    grad_value, grad_scale = grad_weight[:, :num_slots], None
    grad_bias = grad_weight[:, num_slots] if with_bias else None
    by_moments = None
    if options.batch_norm_eps is not None:
        grad_value, grad_scale, by_moments = _batch_norm_backward(
            operands, options.batch_norm_eps, (moments[0], moments[1]), grad_weight
        )
    _normalize_backward_(grad_rows, attention, denominator, by_moments, operands, options.num_heads)
    grad_key_bias = grad_rows.sum((0, 2)) if operands.key_bias is not None else None
    grad_logits = grad_rows.to(x.dtype)
    grad_key = sum_over_tokens(grad_logits, x)
    grad_x = None
    if x_wanted:
        key = operands.key.to(x.dtype).t().contiguous()
        # the rectified gradient is our own and is overwritten
        own = grad if options.residual and grad is not grad_out else None
        base = grad if options.residual else None
        grad_x = map_from_rows(key, grad_logits, like=x, base=base, out=own)
    gradients = [grad_x, grad_key, grad_value, grad_key_bias, grad_bias, grad_scale]
    return [
        None if tensor is None or gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, operands[:6], strict=True)
    ]


def _before_relu(grad_out: Tensor, out: Tensor | None, x: Tensor) -> Tensor:
    """Return the gradient before the ReLU, lying as x does."""
    if out is not None:
        grad = empty_map(x, out.shape[1])
        torch.ops.aten.threshold_backward.grad_input(grad_out, out, 0, grad_input=grad)
        return grad
    if is_token_major(grad_out) == is_token_major(x) and 0 not in grad_out.stride():
        return grad_out
    return empty_map(x, grad_out.shape[1]).copy_(grad_out)


class _ByMoments(NamedTuple):
    """What batch norm adds to the gradient of attention: ``matrix @ (A - mean) + offset``."""

    matrix: Tensor  # (S, S)
    mean: Tensor  # (S)
    offset: Tensor  # (S)


def _normalize_backward_(
    grad: Tensor,
    attention: Tensor,
    denominator: Tensor | None,
    by_moments: _ByMoments | None,
    operands: BlockOperands,
    num_heads: int,
) -> None:
    """Turn the gradient of attention (B, S, N * H) into that of the logits, in place.

    With P = attention * denominator, the softmax over the tokens: no quotient by a small number is
    formed, so the gradient is finite wherever the attention is.
    """
    sums = grad.new_zeros((*grad.shape[:2], 1, num_heads))
    parts = parts_of(operands.x, num_heads * max(1, PART_COLUMNS // num_heads))
    for part in parts:
        rows, mixed = attention[..., part], grad[..., part]
        if by_moments is not None:
            centered = _centered(rows, by_moments.mean, _part(operands.mask, part))
            mixed.add_(rows_from_map(by_moments.matrix, centered))
            mixed.add_(by_moments.offset.unsqueeze(-1))
        mixed.sub_((rows * mixed).sum(1, keepdim=True)).mul_(rows)
        sums.add_(by_token(mixed, num_heads).sum(2, keepdim=True))
    if denominator is not None:
        for part in parts:
            over_tokens = by_token(attention[..., part] * denominator[..., part], num_heads)
            by_token(grad[..., part], num_heads).addcmul_(over_tokens, sums, value=-1)


def _batch_norm_backward(
    operands: BlockOperands, eps: float, moments: tuple[Tensor, Tensor], grad_weight: Tensor
) -> tuple[Tensor, Tensor, _ByMoments]:
    """Return the gradients of value and scale, and the part that reaches attention by moments."""
    mean_attention, covariance = moments
    count, value = _count(operands, covariance.dtype), operands.value.to(covariance.dtype)
    mean, variance = _value_moments(value, mean_attention, covariance)
    inverse_std = torch.rsqrt(variance + eps)
    scale = torch.ones_like(mean) if operands.scale is None else operands.scale.to(mean.dtype)
    factor = scale * inverse_std
    grad_value, grad_bias = grad_weight[:, :-1], grad_weight[:, -1]

    # weight = factor * value and bias = shift - factor * mean
    grad_factor = (grad_value * value).sum(1) - grad_bias * mean
    grad_mean = -grad_bias * factor
    grad_variance = -0.5 * scale * inverse_std**3 * grad_factor
    # mean = value @ mean_attention and variance = diag(value @ covariance @ value^T)
    weighted = grad_variance.unsqueeze(1) * value
    grad_value = factor.unsqueeze(1) * grad_value
    grad_value = grad_value + torch.outer(grad_mean, mean_attention) + 2 * (weighted @ covariance)
    grad_covariance = (2 / count) * (value.transpose(0, 1) @ weighted)
    by_moments = _ByMoments(grad_covariance, mean_attention, (grad_mean @ value) / count)
    return grad_value, grad_factor * inverse_std, by_moments
