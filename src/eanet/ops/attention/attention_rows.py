"""From tokens to attention rows (batch, slots, tokens): logits, and their normalization.

``attention_rows`` is made of ordinary differentiable operations. ``normalized_rows`` is the fast
form for a function that brings its own gradient: it normalizes logits where they lie. Its rows may
hold several heads, whose columns of a token stand side by side: (batch, slots, tokens * heads).
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.ops.attention import eager
from eanet.ops.attention.linear import linear
from eanet.ops.attention.thin_products import parts, rows_from_map

__all__ = [
    "PART_COLUMNS",
    "attention_rows",
    "block_logits",
    "by_token",
    "normalize_tokens",
    "normalized_rows",
    "parts_of",
    "token_logits",
]

#: columns that are normalized together on a CPU: 64 slots of them take 4 MiB
PART_COLUMNS = 1 << 14


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
    logits = block_logits(x, key, key_bias)
    return eager.normalize_logits(logits, norm=norm, token_dim=-1, slot_dim=-2, eps=eps, mask=mask)


def block_logits(x: Tensor, key: Tensor, key_bias: Tensor | None) -> Tensor:
    """Return ``key @ x + key_bias`` (batch, slots, tokens), at least in float32."""
    x, key = _in_range(x, key)
    logits = _at_least_float32(torch.bmm(key.expand(x.shape[0], *key.shape), x))
    return logits if key_bias is None else logits + key_bias.to(logits.dtype).unsqueeze(-1)


def token_logits(
    tokens: Float[Tensor, "*batch channels"],
    key: Float[Tensor, "slots channels"],
    key_bias: Float[Tensor, " slots"] | None,
) -> Float[Tensor, "*batch slots"]:
    """Return ``tokens @ key^T + key_bias``, at least in float32."""
    logits = _at_least_float32(linear(*_in_range(tokens, key)))
    return logits if key_bias is None else logits + key_bias.to(logits.dtype)


def normalize_tokens(
    logits: Float[Tensor, "batch tokens *heads slots"],
    *,
    norm: Literal["double", "softmax"],
    eps: float,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens *heads slots"]:
    """Return the attention of logits of at least float32, which may be overwritten.

    The slots of a token stay side by side: a softmax copies what does not lie in the order of its
    dimensions.
    """
    recorded = torch.is_grad_enabled() and logits.requires_grad
    by_quotient = norm == "double" and eager.eps_dominates_underflow(eps, logits.dtype)
    if recorded or not by_quotient or torch.compiler.is_compiling():
        return eager.normalize_logits(
            logits, norm=norm, token_dim=1, slot_dim=-1, eps=eps, mask=mask
        )
    heads = logits.unsqueeze(2) if logits.ndim == 3 else logits
    rows = heads.permute(0, 3, 1, 2)  # (B, S, N, H)
    _double_normalize_(rows, eps, None if mask is None else mask[:, None, :, None])
    return logits


def _in_range(x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the type of x, or in float32 if sums of products could leave its range."""
    if x.dtype == torch.float16:  # which ends at 65504
        x = x.float()
    return x, key.to(x.dtype)


def _at_least_float32(logits: Tensor) -> Tensor:
    """Return logits in the type they are normalized in."""
    return logits if logits.dtype == torch.float64 else logits.float()


def parts_of(x: Tensor, most: int = PART_COLUMNS) -> list[slice]:
    """Return the third dimension in the parts that are worked on together on a CPU."""
    in_parts = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return list(parts(x.shape[2], most)) if in_parts else [slice(0, x.shape[2])]


def by_token(rows: Tensor, num_heads: int) -> Tensor:
    """Return rows (..., columns) as a view (..., tokens, heads)."""
    return rows.view(*rows.shape[:-1], rows.shape[-1] // num_heads, num_heads)


def normalized_rows(
    x: Float[Tensor, "batch channels columns"],
    key: Float[Tensor, "slots channels"],
    key_bias: Float[Tensor, " slots"] | None,
    *,
    norm: Literal["double", "softmax"],
    eps: float,
    mask: Bool[Tensor, "batch tokens"] | None,
    num_heads: int,
    place: Float[Tensor, "batch slots columns"] | None = None,
) -> tuple[Float[Tensor, "batch slots columns"], Float[Tensor, "batch 1 columns"] | None]:
    """Compute attention in the place of its logits, without a history of gradients.

    Args:
        x: tokens, or the heads of one token after the other.
        key: compared with them.
        key_bias: added to the logits.
        norm: "double" or "softmax".
        eps: of the double normalization.
        mask: True for tokens that take part.
        num_heads: columns of x that belong to a token; each is normalized among its like.
        place: memory for the attention, at least float32; by default its own.

    Returns:
        Attention, at least in float32 and lying as the tokens do; and the denominator of Eq. 11,
        which the norm "softmax" does not have.
    """
    x, key = _in_range(x, key)
    if place is None:
        rows = _at_least_float32(rows_from_map(key, x))
    else:
        rows = place
        for part in parts_of(x):
            rows[..., part] = rows_from_map(key, x[..., part])
    logits = by_token(rows, num_heads)
    mask = None if mask is None else mask[:, None, :, None]
    if norm == "double" and eager.eps_dominates_underflow(eps, logits.dtype):
        # without key_bias, which the softmax over the tokens cancels
        return rows, _double_normalize_(logits, eps, mask).flatten(2)
    if key_bias is not None:
        logits.add_(key_bias.to(logits.dtype)[:, None, None])
    if norm == "double":
        attention, denominator = eager.normalize(logits, 2, 1, eps, mask)
        logits.copy_(attention)
        return rows, denominator.flatten(2)
    logits.copy_(torch.softmax(logits, dim=1))
    if mask is not None:
        logits.masked_fill_(~mask, 0.0)
    return rows, None


def _double_normalize_(logits: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """Turn logits (B, S, N, H) into attention (Eq. 10-11) in place, and return its denominator."""
    denominator = logits.new_empty((logits.shape[0], 1, *logits.shape[2:]))
    if logits.numel() == 0:
        return denominator
    on_cpu = logits.device.type == "cpu"
    if on_cpu and mask is None and logits.shape[2] <= eager.MOST_TOKENS_OF_SOFTMAX:
        _softmax_over_tokens_(logits)
        _divide_by_slots_(logits, eps, denominator)
        return denominator
    for part, factor in _exponentials_(logits, mask):
        _divide_by_slots_(logits[:, :, part].mul_(factor), eps, denominator[:, :, part])
    return denominator


def _softmax_over_tokens_(logits: Tensor) -> None:
    """Apply Eq. 10 to (B, S, N, H) in place, in the order in which its dimensions lie.

    A softmax copies what lies otherwise, and is slow where a dimension of one entry is last.
    """
    if logits.stride(1) == 1:
        lying, dim = logits.permute(0, 2, 3, 1), 1
    else:
        lying, dim = logits.flatten(2) if logits.shape[3] == 1 else logits, 2
    torch.softmax(lying, dim=dim, out=lying)


def _exponentials_(logits: Tensor, mask: Tensor | None) -> list[tuple[slice, Tensor]]:
    """Turn logits (B, S, N, H) into exponentials, and return what makes them a softmax.

    Each part is exponentiated with its own largest logit, which one factor for each slot and part
    corrects afterwards: exp(l - m) / total = exp(l - m_part) * exp(m_part - m) / total.

    Returns:
        The parts of the tokens with their factors (B, S, 1, H), 1 / total of Eq. 10 included.
    """
    maxima: list[Tensor] = []
    sums: list[Tensor] = []
    all_parts = parts_of(logits, max(1, PART_COLUMNS // logits.shape[3]))
    for part in all_parts:
        rows = logits[:, :, part]
        part_mask = None if mask is None else ~mask[:, :, part]
        if part_mask is not None:
            # a finite value, so that a sample without any valid token gives no inf - inf
            rows.masked_fill_(part_mask, torch.finfo(rows.dtype).min)
        maxima.append(rows.amax(2, keepdim=True))
        rows.sub_(maxima[-1]).exp_()
        if part_mask is not None:
            rows.masked_fill_(part_mask, 0.0)
        sums.append(rows.sum(2, keepdim=True))
    part_maxima = torch.cat(maxima, dim=2)  # (B, S, parts, H)
    factors = torch.exp(part_maxima - part_maxima.amax(2, keepdim=True))
    # the largest exponential is 1, so the clamp changes samples without valid tokens alone
    factors /= (torch.cat(sums, dim=2) * factors).sum(2, keepdim=True).clamp_(min=1.0)
    # factors with gaps between them would be multiplied one by one
    apart = [factors[:, :, i : i + 1].contiguous() for i in range(len(all_parts))]
    return list(zip(all_parts, apart, strict=True))


def _divide_by_slots_(rows: Tensor, eps: float, denominator: Tensor) -> None:
    """Normalize over the slots (Eq. 11) in place, and keep the divisor."""
    torch.sum(rows, 1, keepdim=True, out=denominator)
    rows.div_(denominator.add_(eps))
