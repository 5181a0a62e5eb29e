"""External attention between two thin matrices, with batch norm, residual and ReLU in one step.

With K = M_k W_1 and V = W_2 M_v^T the whole block is two products with the feature map::

    out = relu(x + scale * (V A) + shift),   A = norm(K x)

so the C x C projections never touch the N positions. In training the statistics of the batch norm
follow from the mean and the covariance of the S attention rows, which are small, and no pass over
a (channels, tokens) map is needed for them. The derivation is in ``README.md`` beside this file.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.ops.attention import eager

__all__ = [
    "BatchNormArguments",
    "BatchStatistics",
    "attention_of_logits",
    "attention_rows",
    "block_logits",
    "external_attention_block",
]


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


class _Options(NamedTuple):
    """What the block does, apart from its tensors."""

    norm: Literal["double", "softmax"]
    eps: float
    batch_norm_eps: float | None
    residual: bool
    relu: bool


class _Operands(NamedTuple):
    """The tensors of a block; ``bias`` is the batch norm's shift where there is one."""

    x: Tensor  # (B, C, N)
    key: Tensor  # (S, C)
    value: Tensor  # (V, S)
    key_bias: Tensor | None  # (S)
    bias: Tensor | None  # (V)
    scale: Tensor | None  # (V)
    mask: Tensor | None  # (B, N)


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

    Returns:
        The result, and the statistics of the batch where ``batch_norm`` is given.

    Raises:
        ValueError: both ``bias`` and ``batch_norm``, or a residual of another width.
    """
    if batch_norm is not None and bias is not None:
        raise ValueError("bias and batch_norm exclude each other: batch norm removes a bias")
    if residual and value.shape[0] != x.shape[1]:
        raise ValueError(f"a residual needs {x.shape[1]} output channels, got {value.shape[0]}")
    options = _Options(norm, eps, None if batch_norm is None else batch_norm.eps, residual, relu)
    shift, scale = (bias, None) if batch_norm is None else (batch_norm.bias, batch_norm.weight)
    operands = _Operands(x, key, value, key_bias, shift, scale, mask)
    if torch.compiler.is_compiling():
        out, mean, variance = _composed(operands, options)
    else:
        out, mean, variance = _Block.apply(options, x, key, value, key_bias, shift, scale, mask)
    if batch_norm is None:
        return out, None
    return out, BatchStatistics(mean, variance, _num_valid(x, mask, mean.dtype))


def attention_rows(
    x: Float[Tensor, "batch channels tokens"],
    key: Float[Tensor, "slots channels"],
    *,
    key_bias: Float[Tensor, " slots"] | None = None,
    norm: Literal["double", "softmax"] = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch slots tokens"]:
    """Return the attention A of a block, at least in float32, with gradients."""
    return attention_of_logits(block_logits(x, key, key_bias), norm=norm, eps=eps, mask=mask)


def attention_of_logits(
    logits: Float[Tensor, "... slots tokens"],
    *,
    norm: Literal["double", "softmax"] = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "... slots tokens"]:
    """Normalize logits whose tokens are last and whose slots stand before them."""
    if norm == "double":
        return eager.double_normalize(logits, token_dim=-1, slot_dim=-2, eps=eps, mask=mask)
    return eager.slot_softmax(logits, token_dim=-1, slot_dim=-2, mask=mask)


def block_logits(x: Tensor, key: Tensor, key_bias: Tensor | None) -> Tensor:
    """Return ``key @ x + key_bias`` (batch, slots, tokens), at least in float32."""
    if x.dtype == torch.float16:  # its range ends at 65504, which sums of products exceed
        x, key = x.float(), key.float()
    logits = torch.bmm(key.to(x.dtype).expand(x.shape[0], *key.shape), x)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits if key_bias is None else logits + key_bias.to(logits.dtype).unsqueeze(-1)


def _num_valid(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the number of tokens that take part in the batch, as a scalar."""
    if mask is not None:
        return mask.sum().to(dtype)
    return torch.full((), x.shape[0] * x.shape[2], dtype=dtype, device=x.device)


def _moments(attention: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean (S) and covariance (S, S) of attention over tokens, centered rows, and count."""
    count = _num_valid(attention, mask, attention.dtype).clamp(min=1.0)
    mean = attention.sum(dim=(0, 2)) / count
    centered = attention - mean.unsqueeze(-1)
    if mask is not None:
        centered = centered.masked_fill(~mask.unsqueeze(1), 0.0)
    covariance = torch.bmm(centered, centered.transpose(1, 2)).sum(0) / count
    return mean, covariance, centered, count


def _value_moments(value: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (V) of ``value @ attention`` from the moments of attention."""
    value = value.to(mean.dtype)
    # a quadratic form of a covariance is not negative, but its rounding error may be
    return value @ mean, ((value @ covariance) * value).sum(1).clamp(min=0.0)


def _with_bias_slot(attention: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Append a slot that is 1 on valid tokens, whose column of values is the bias."""
    batch, num_slots, tokens = attention.shape
    rows = attention.new_empty((batch, num_slots + 1, tokens), dtype=dtype)
    rows[:, :num_slots] = attention
    rows[:, num_slots] = 1.0 if mask is None else mask.to(dtype)
    return rows


def _fold_batch_norm(
    operands: _Operands, attention: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight and bias of the second product with batch norm inside, mean and variance."""
    mean_attention, covariance, _, _ = _moments(attention, operands.mask)
    mean, variance = _value_moments(operands.value, mean_attention, covariance)
    factor = torch.rsqrt(variance + eps)
    if operands.scale is not None:
        factor = factor * operands.scale
    bias = -factor * mean
    if operands.bias is not None:
        bias = operands.bias + bias
    return factor.unsqueeze(1) * operands.value, bias, mean, variance


def _composed(operands: _Operands, options: _Options) -> tuple[Tensor, Tensor, Tensor]:
    """Form the block from ordinary operations: for compilers, exporters and second derivatives."""
    x = operands.x
    attention = attention_rows(
        x,
        operands.key,
        key_bias=operands.key_bias,
        norm=options.norm,
        eps=options.eps,
        mask=operands.mask,
    )
    weight, bias = operands.value, operands.bias
    mean = variance = attention.new_zeros(0)
    if options.batch_norm_eps is not None:
        weight, bias, mean, variance = _fold_batch_norm(operands, attention, options.batch_norm_eps)
    out = _second_product(x, weight.to(x.dtype), attention.to(x.dtype))
    if bias is not None:
        shift = bias.to(x.dtype).unsqueeze(-1)
        out = out + (shift if operands.mask is None else shift * operands.mask.unsqueeze(1))
    if options.residual:
        out = out + x
    return (torch.relu(out) if options.relu else out), mean.detach(), variance.detach()


def _second_product(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Return ``weight @ rows`` (batch, out channels, tokens), channels last where x is."""
    weight = weight.expand(rows.shape[0], *weight.shape)
    if x.shape[1] > 1 and x.stride(1) == 1:
        return torch.bmm(rows.transpose(1, 2), weight.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(weight, rows)


class _Block(torch.autograd.Function):
    """The block with a backward pass that touches each (channels, tokens) map as seldom as it can.

    Kept for the backward pass: x, the result (for the ReLU), and tensors of (slots, tokens).
    """

    @staticmethod
    def forward(
        ctx: Any, options: _Options, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = _Operands(*tensors)  # pyright: ignore[reportArgumentType]
        x, mask = operands.x, operands.mask
        logits = block_logits(x, operands.key, operands.key_bias)
        denominator = None
        if options.norm == "double":
            broadcast_mask = None if mask is None else mask.unsqueeze(1)
            attention, denominator = eager.normalize(logits, 2, 1, options.eps, broadcast_mask)
        else:
            attention = eager.slot_softmax(logits, token_dim=-1, slot_dim=-2, mask=mask)
        weight, bias = operands.value, operands.bias
        mean = variance = attention.new_zeros(0)
        if options.batch_norm_eps is not None:
            weight, bias, mean, variance = _fold_batch_norm(
                operands, attention, options.batch_norm_eps
            )
        weight, rows = weight.to(x.dtype), attention
        if bias is not None:
            weight = torch.cat([weight, bias.to(x.dtype).unsqueeze(1)], dim=1)
            rows = _with_bias_slot(attention, mask, x.dtype)
        rows = rows.to(x.dtype)
        if options.residual:
            out = torch.empty_like(x)  # the strides of x, so that tokens stay tokens
            torch.baddbmm(x, weight.expand(x.shape[0], *weight.shape), rows, out=out)
        else:
            out = _second_product(x, weight, rows)
        if options.relu:
            out.relu_()
        ctx.options = options
        kept = out if options.relu else None
        ctx.save_for_backward(*tensors, rows, weight, denominator, kept)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # unpacked once: a checkpoint recomputes them only once
        operands = _Operands(*saved[:7])
        if torch.is_grad_enabled():  # second derivatives are wanted
            gradients = _composed_backward(operands, ctx.options, grad_outputs[0])
        else:
            gradients = _fast_backward(operands, ctx.options, saved[7:], grad_outputs[0])
        return None, *gradients, None


def _composed_backward(
    operands: _Operands, options: _Options, grad_out: Tensor
) -> list[Tensor | None]:
    """Return differentiable gradients of the tensors, by way of the composed form."""
    tensors = [
        operands.x, operands.key, operands.value, operands.key_bias, operands.bias, operands.scale
    ]  # fmt: skip
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    out, _, _ = _composed(operands, options)
    gradients = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
    return [
        next(gradients) if tensor is not None and tensor.requires_grad else None
        for tensor in tensors
    ]


def _fast_backward(
    operands: _Operands,
    options: _Options,
    saved: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    grad_out: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of x, key, value, key bias, bias and scale."""
    rows, weight, denominator, out = saved
    x, num_slots = operands.x, operands.key.shape[0]
    batch = x.shape[0]
    grad = grad_out if out is None else torch.ops.aten.threshold_backward(grad_out, out, 0)
    attention = rows[:, :num_slots]
    if attention.dtype != torch.float64:
        attention = attention.float()
    grad_weight = torch.bmm(grad, rows.transpose(1, 2)).sum(0).to(attention.dtype)
    transposed = weight[:, :num_slots].transpose(0, 1).expand(batch, num_slots, -1)
    grad_attention = torch.bmm(transposed, grad).to(attention.dtype)
    grad_value, grad_scale = grad_weight[:, :num_slots], None
    grad_bias = grad_weight[:, num_slots] if rows.shape[1] > num_slots else None
    if options.batch_norm_eps is not None:
        grad_value, grad_scale, grad_attention = _batch_norm_backward(
            operands, options.batch_norm_eps, attention, grad_attention, grad_weight
        )
    if denominator is not None:
        grad_logits = eager.normalize_backward(attention, denominator, grad_attention, 2, 1)
    else:
        mean = (attention * grad_attention).sum(1, keepdim=True)
        grad_logits = attention * (grad_attention - mean)
    grad_key_bias = grad_logits.sum((0, 2)) if operands.key_bias is not None else None
    grad_logits = grad_logits.to(x.dtype)
    grad_key = torch.bmm(grad_logits, x.transpose(1, 2)).sum(0)
    key = operands.key.to(x.dtype).transpose(0, 1).expand(batch, -1, num_slots)
    if not options.residual:
        grad_x = torch.bmm(key, grad_logits)
    elif out is not None:  # the rectified gradient is our own and may be overwritten
        grad_x = grad.baddbmm_(key, grad_logits)
    else:
        grad_x = torch.baddbmm(grad, key, grad_logits)
    gradients = [grad_x, grad_key, grad_value, grad_key_bias, grad_bias, grad_scale]
    tensors = [
        x, operands.key, operands.value, operands.key_bias, operands.bias, operands.scale
    ]  # fmt: skip
    return [
        None if tensor is None or gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


def _batch_norm_backward(
    operands: _Operands,
    eps: float,
    attention: Tensor,
    grad_attention: Tensor,
    grad_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value and scale, and that of attention with the part by moments."""
    mean_attention, covariance, centered, count = _moments(attention, operands.mask)
    value = operands.value.to(attention.dtype)
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
    grad_mean_attention = grad_mean @ value
    grad_covariance = (2 / count) * (value.transpose(0, 1) @ weighted)
    grad_attention = torch.baddbmm(
        grad_attention, grad_covariance.expand(centered.shape[0], *covariance.shape), centered
    )
    grad_attention.add_((grad_mean_attention / count).unsqueeze(-1))
    return grad_value, grad_factor * inverse_std, grad_attention
