"""The fast path in plain PyTorch: CPU, GPU, export, and the fallback everywhere.

Logits are laid out with the tokens last, (batch, heads, slots, tokens), so that the softmax over
the tokens, the longest axis, runs over memory that lies together. Half-precision logits are
normalized in float32. The derivation is in ``README.md`` beside this file.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "MOST_TOKENS_OF_SOFTMAX",
    "double_normalize",
    "external_attention",
    "multi_head_external_attention",
    "normalize_logits",
    "slot_softmax",
]

#: torch.softmax adds up in order on a CPU: within 5e-7 of the exact attention for so many float32
#: tokens, but 8e-6 off for a million, where torch.sum, which adds pairwise, stays within 4e-7
MOST_TOKENS_OF_SOFTMAX = 16_384
#: logits below which a function with a gradient of its own costs more than it saves
_FEW_LOGITS = 1 << 18


def _along(vector_per_sample: Tensor, ndim: int, dim: int) -> Tensor:
    """Reshape a (batch, n) tensor so that it broadcasts along one dimension of a larger one."""
    shape = [1] * ndim
    shape[0], shape[dim] = vector_per_sample.shape
    return vector_per_sample.reshape(shape)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the type to normalize in: eps = 1e-9 is zero in float16, and bfloat16 has 3 digits."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def eps_dominates_underflow(eps: float, dtype: torch.dtype) -> bool:
    """Tell whether probabilities too small for the type vanish beside eps anyway.

    Then the quotient of Eq. 11 can be formed as written; otherwise it needs logarithms.
    """
    limits = torch.finfo(dtype)
    return eps >= limits.tiny / limits.eps


def _is_small(logits: Tensor, token_dim: int, eps: float) -> bool:
    """Tell whether Eq. 10 and 11 as written are exact, and faster than what saves memory."""
    return (
        logits.numel() <= _FEW_LOGITS
        and logits.shape[token_dim] <= MOST_TOKENS_OF_SOFTMAX
        and logits.dtype in (torch.float32, torch.float64)
        and eps_dominates_underflow(eps, logits.dtype)
    )


def _normalize_quotient(
    logits: Tensor,
    token_dim: int,
    slot_dim: int,
    eps: float,
    mask: Tensor | None,
    slot_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the attention and its denominator, Eq. 11 as written; works in place on a copy."""
    logits = logits.to(_at_least_float32(logits.dtype))
    if mask is not None:
        # a finite value, so that a sample without any valid token gives no inf - inf
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if logits.shape[token_dim] <= MOST_TOKENS_OF_SOFTMAX:
        weights = torch.softmax(logits, dim=token_dim)
        if mask is not None:
            weights.masked_fill_(~mask, 0.0)
    else:
        weights = (logits - logits.amax(token_dim, keepdim=True)).exp_()
        if mask is not None:
            weights.masked_fill_(~mask, 0.0)
        # the largest exponential is 1, so the clamp changes samples without valid tokens alone
        weights.div_(weights.sum(token_dim, keepdim=True).clamp_(min=1.0))
    if slot_mask is not None:
        weights.masked_fill_(~slot_mask, 0.0)
    denominator = weights.sum(slot_dim, keepdim=True).add_(eps)
    return weights.div_(denominator), denominator


def _normalize_logarithm(
    logits: Tensor,
    token_dim: int,
    slot_dim: int,
    eps: float,
    mask: Tensor | None,
    slot_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the attention and its denominator by way of logarithms, which never underflows.

    The quotient of Eq. 11 is a softmax over the slots of l - logsumexp_tokens(l) with one more
    entry, log(eps), that is dropped afterwards.
    """
    logits = logits.to(_at_least_float32(logits.dtype))
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    log_weights = logits - logits.amax(token_dim, keepdim=True)
    exponentials = log_weights.exp()
    if mask is not None:
        exponentials.masked_fill_(~mask, 0.0)
    log_weights.sub_(exponentials.sum(token_dim, keepdim=True).clamp_(min=1.0).log_())
    if slot_mask is not None:
        log_weights.masked_fill_(~slot_mask, torch.finfo(logits.dtype).min)
    largest = log_weights.amax(slot_dim, keepdim=True)
    if eps > 0:
        largest.clamp_(min=math.log(eps))
    weights = log_weights.sub_(largest).exp_()
    if mask is not None:
        weights.masked_fill_(~mask, 0.0)
    if slot_mask is not None:
        weights.masked_fill_(~slot_mask, 0.0)
    total = weights.sum(slot_dim, keepdim=True)
    if eps > 0:
        total.add_(torch.exp(math.log(eps) - largest))
    # one entry of the sum is 1 unless nothing takes part, where 0 / 1 is wanted
    total.clamp_(min=1.0)
    return weights.div_(total), largest.exp_().mul_(total)


class _DoubleNormalize(torch.autograd.Function):
    """Double normalization that keeps one tensor of the logits' size for the backward pass.

    The denominator is an output too, and the backward pass uses differentiable operations on the
    two outputs alone: so second derivatives come for free.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        token_dim: int,
        slot_dim: int,
        eps: float,
        mask: Tensor | None,
        slot_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return normalize(logits, token_dim, slot_dim, eps, mask, slot_mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, ctx.token_dim, ctx.slot_dim = inputs[:3]
        ctx.dtype = logits.dtype
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_attention, grad_denominator = grad_outputs
        attention, denominator = ctx.saved_tensors
        grad = normalize_backward(
            attention, denominator, grad_attention, ctx.token_dim, ctx.slot_dim, grad_denominator
        )
        return grad.to(ctx.dtype), None, None, None, None, None


def normalize(
    logits: Tensor,
    token_dim: int,
    slot_dim: int,
    eps: float,
    mask: Tensor | None,
    slot_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention and the denominator of Eq. 11, without recording gradients.

    Masks have the shape they broadcast with. Both results are at least float32.
    """
    dtype = _at_least_float32(logits.dtype)
    form = _normalize_quotient if eps_dominates_underflow(eps, dtype) else _normalize_logarithm
    return form(logits, token_dim, slot_dim, eps, mask, slot_mask)


def normalize_backward(
    attention: Tensor,
    denominator: Tensor,
    grad_attention: Tensor | None,
    token_dim: int,
    slot_dim: int,
    grad_denominator: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the logits from the two results of :func:`normalize`.

    With P = attention * denominator, the softmax over the tokens: no quotient by a small number is
    formed, so the gradient is finite wherever the attention is.
    """
    over_tokens = attention * denominator
    if grad_attention is None:
        weighted = torch.zeros_like(attention)
    else:
        weighted = attention * grad_attention
        mean = weighted.sum(slot_dim, keepdim=True)
        if torch.is_grad_enabled():  # second derivatives are wanted
            weighted = attention * (grad_attention - mean)
        else:
            torch.sub(grad_attention, mean, out=weighted).mul_(attention)
    if grad_denominator is not None:
        weighted = weighted + over_tokens * grad_denominator
    sums = weighted.sum(token_dim, keepdim=True)
    if torch.is_grad_enabled():
        return torch.addcmul(weighted, over_tokens, sums, value=-1)
    return weighted.addcmul_(over_tokens, sums, value=-1)


def _normalize_composed(
    logits: Tensor,
    token_dim: int,
    slot_dim: int,
    eps: float,
    mask: Tensor | None,
    slot_mask: Tensor | None,
) -> Tensor:
    """Form the same result from ordinary operations, for compilers and exporters.

    Not by torch.softmax, whose sum over a million float32 tokens is off by 1e-5 on a CPU, while
    torch.sum adds pairwise.
    """
    logits = logits.to(_at_least_float32(logits.dtype))
    lowest = torch.finfo(logits.dtype).min
    if mask is not None:
        logits = logits.masked_fill(~mask, lowest)
    log_weights = logits - logits.detach().amax(token_dim, keepdim=True)
    weights = torch.exp(log_weights)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    total = weights.sum(token_dim, keepdim=True).clamp(min=1.0)
    dropped_entry: Tensor | float = 0.0
    by_quotient = eps_dominates_underflow(eps, logits.dtype)
    if by_quotient:
        weights = weights / total
    else:
        log_weights = log_weights - torch.log(total)
        if slot_mask is not None:
            log_weights = log_weights.masked_fill(~slot_mask, lowest)
        largest = log_weights.detach().amax(slot_dim, keepdim=True)
        if eps > 0:
            largest = largest.clamp(min=math.log(eps))
            dropped_entry = torch.exp(math.log(eps) - largest)
        weights = torch.exp(log_weights - largest)
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
    if slot_mask is not None:
        weights = weights.masked_fill(~slot_mask, 0.0)
    total = weights.sum(slot_dim, keepdim=True)
    if by_quotient:
        return weights / (total + eps)
    return weights / (total + dropped_entry).clamp(min=1.0)


def double_normalize(
    logits: Float[Tensor, "..."],
    *,
    token_dim: int = -2,
    slot_dim: int = -1,
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    slot_mask: Bool[Tensor, "batch slots"] | None = None,
) -> Float[Tensor, "..."]:
    """Normalize over the tokens, then over the slots; float32 inside for half types.

    See :func:`eanet.ops.attention.double_normalize` for the arguments.
    """
    token_dim, slot_dim = token_dim % logits.ndim, slot_dim % logits.ndim
    if mask is not None:
        mask = _along(mask, logits.ndim, token_dim)
    if slot_mask is not None:
        slot_mask = _along(slot_mask, logits.ndim, slot_dim)
    if torch.compiler.is_compiling():
        attention = _normalize_composed(logits, token_dim, slot_dim, eps, mask, slot_mask)
    elif mask is None and slot_mask is None and _is_small(logits, token_dim, eps):
        over_tokens = torch.softmax(logits, dim=token_dim)
        attention = over_tokens / (over_tokens.sum(slot_dim, keepdim=True) + eps)
    else:
        attention = _DoubleNormalize.apply(logits, token_dim, slot_dim, eps, mask, slot_mask)[0]  # pyright: ignore[reportOptionalSubscript]
    return attention.to(logits.dtype)


def slot_softmax(
    logits: Float[Tensor, "..."],
    *,
    token_dim: int = -2,
    slot_dim: int = -1,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    slot_mask: Bool[Tensor, "batch slots"] | None = None,
) -> Float[Tensor, "..."]:
    """Softmax over the slots of each token; float32 inside for half types."""
    scores = logits.to(_at_least_float32(logits.dtype))
    if slot_mask is not None:
        slot_mask = _along(slot_mask, logits.ndim, slot_dim)
        scores = scores.masked_fill(~slot_mask, torch.finfo(scores.dtype).min / 2)
    attention = torch.softmax(scores, dim=slot_dim)
    if slot_mask is not None:
        attention = attention.masked_fill(~slot_mask, 0.0)
    if mask is not None:
        attention = attention.masked_fill(~_along(mask, logits.ndim, token_dim), 0.0)
    return attention.to(logits.dtype)


def attention_logits(
    x: Float[Tensor, "*batch channels tokens"], key: Float[Tensor, "slots channels"]
) -> Float[Tensor, "*batch slots tokens"]:
    """Compare tokens with keys (Eq. 9), tokens last.

    float16 reaches only 65504, which sums of products exceed: its logits are float32.
    """
    if x.dtype == torch.float16:
        return torch.matmul(key.float(), x.float())
    return torch.matmul(key, x)


def normalize_logits(
    logits: Float[Tensor, "..."],
    *,
    norm: str,
    token_dim: int,
    slot_dim: int,
    eps: float,
    mask: Bool[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "..."]:
    """Apply the norm of that name: "double" or "softmax" over the slots."""
    if norm == "double":
        return double_normalize(logits, token_dim=token_dim, slot_dim=slot_dim, eps=eps, mask=mask)
    return slot_softmax(logits, token_dim=token_dim, slot_dim=slot_dim, mask=mask)


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
    """Apply external attention to each head; the map is a view of (batch, heads, slots, tokens)."""
    heads = x.reshape(*x.shape[:2], num_heads, -1).permute(0, 2, 3, 1)
    logits = attention_logits(heads, memory_key)
    if memory_key_bias is not None:
        logits = logits + memory_key_bias.to(logits.dtype).unsqueeze(-1)
    attention = normalize_logits(logits, norm=norm, token_dim=-1, slot_dim=-2, eps=eps, mask=mask)
    attention = attention.to(x.dtype).transpose(-1, -2)
    values = memory_key if memory_value is None else memory_value
    output = torch.matmul(attention, values)
    if memory_value_bias is not None:
        output = output + memory_value_bias
    output = output.transpose(1, 2).flatten(2)
    if mask is not None:
        output = output.masked_fill(~mask.unsqueeze(-1), 0.0)
    return output, attention
