"""From tokens to attention rows (batch, slots, tokens): logits, and their normalization.

``attention_rows`` is made of ordinary differentiable operations. ``normalized_rows`` is the fast
form for a function that brings its own gradient: it normalizes in the buffer in which the rows
stay, part by part, so that a part is still in the cache for the next step.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.ops.attention import eager
from eanet.ops.attention.thin_products import empty_map, parts, rows_from_map

__all__ = [
    "FEW_ENTRIES",
    "NormalizedRows",
    "attention_of_logits",
    "attention_rows",
    "block_logits",
    "divide_by_slots_",
    "exponentials",
    "normalized_rows",
    "parts_of",
]

#: entries of a map below which an operation costs what it takes to start it, more or less
FEW_ENTRIES = 1 << 19
#: tokens that are normalized together on a CPU: 64 slots of them take 4 MiB
_PART_TOKENS = 1 << 14


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


class NormalizedRows(NamedTuple):
    """Attention without a history of gradients.

    Attributes:
        buffer: (batch, slots or one more, tokens), at least float32, lying as the tokens do.
        denominator: of Eq. 11, (batch, 1, tokens); ``None`` under the norm "softmax".
        num_slots: the rows of the buffer that hold attention; one more is left to the caller.
    """

    buffer: Tensor
    denominator: Tensor | None
    num_slots: int

    @property
    def attention(self) -> Tensor:
        """The attention (batch, slots, tokens)."""
        return self.buffer[:, : self.num_slots]


def parts_of(x: Tensor, most: int = _PART_TOKENS) -> list[slice]:
    """Return the tokens of a map in the parts that are worked on together on a CPU."""
    in_parts = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return list(parts(x.shape[2], most)) if in_parts else [slice(0, x.shape[2])]


def normalized_rows(
    x: Float[Tensor, "batch channels tokens"],
    key: Float[Tensor, "slots channels"],
    key_bias: Float[Tensor, " slots"] | None,
    *,
    norm: Literal["double", "softmax"],
    eps: float,
    mask: Bool[Tensor, "batch tokens"] | None,
    with_bias_row: bool,
) -> NormalizedRows:
    """Compute attention into one buffer.

    Args:
        x: tokens.
        key: compared with them.
        key_bias: added to the logits.
        norm: "double" or "softmax".
        eps: of the double normalization.
        mask: True for tokens that take part.
        with_bias_row: append a row that is 1 for tokens that take part: its column in the second
            product is the bias.
    """
    num_slots = key.shape[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    buffer = empty_map(x, num_slots + with_bias_row, dtype)
    if with_bias_row:
        buffer[:, num_slots] = 1.0 if mask is None else mask.to(dtype)
    rows = NormalizedRows(buffer, None, num_slots)
    if norm == "double" and eager.eps_dominates_underflow(eps, dtype):
        # without key_bias, which the softmax over the tokens cancels
        return rows._replace(denominator=_double_normalize(x, key, rows.attention, eps, mask))
    logits = block_logits(x, key, key_bias)
    if norm == "double":
        broadcast_mask = None if mask is None else mask.unsqueeze(1)
        attention, denominator = eager.normalize(logits, 2, 1, eps, broadcast_mask)
    else:
        attention = eager.slot_softmax(logits, token_dim=-1, slot_dim=-2, mask=mask)
        denominator = None
    rows.attention.copy_(attention)
    return rows._replace(denominator=denominator)


def _double_normalize(
    x: Tensor, key: Tensor, attention: Tensor, eps: float, mask: Tensor | None
) -> Tensor:
    """Fill ``attention`` as Eq. 11 has it, and return its denominator."""
    denominator = attention.new_empty((x.shape[0], 1, x.shape[2]))
    if attention.numel() == 0:
        return denominator
    if mask is None and x.numel() <= FEW_ENTRIES:
        # few operations: to start each costs more than the numbers it goes through
        logits = _logits(x, key, attention.dtype)
        divide_by_slots_(torch.softmax(logits, dim=-1, out=attention), eps, denominator)
        return denominator
    for part, factor in exponentials(x, key, attention, mask):
        rows = attention[..., part].mul_(factor)
        divide_by_slots_(rows, eps, denominator[..., part])
    return denominator


def exponentials(
    x: Tensor, key: Tensor, out: Tensor, mask: Tensor | None
) -> list[tuple[slice, Tensor]]:
    """Write the exponentials of the logits to ``out``, and return what makes them a softmax.

    Each part is exponentiated with its own largest logit, which one factor for each slot and part
    corrects afterwards: exp(l - m) / total = exp(l - m_part) * exp(m_part - m) / total.

    Returns:
        The parts of the tokens with their factors (batch, slots, 1), 1 / total of Eq. 10 included.
    """
    maxima: list[Tensor] = []
    sums: list[Tensor] = []
    all_parts = parts_of(x)
    for part in all_parts:
        logits = _logits(x[..., part], key, out.dtype)
        part_mask = None if mask is None else ~mask[:, part].unsqueeze(1)
        if part_mask is not None:
            # a finite value, so that a sample without any valid token gives no inf - inf
            logits.masked_fill_(part_mask, torch.finfo(logits.dtype).min)
        maxima.append(logits.amax(-1, keepdim=True))
        logits.sub_(maxima[-1]).exp_()
        if part_mask is not None:
            logits.masked_fill_(part_mask, 0.0)
        sums.append(logits.sum(-1, keepdim=True))
        out[..., part] = logits
    part_maxima = torch.cat(maxima, dim=-1)  # (B, S, parts)
    factors = torch.exp(part_maxima - part_maxima.amax(-1, keepdim=True))
    # the largest exponential is 1, so the clamp changes samples without valid tokens alone
    factors /= (torch.cat(sums, dim=-1) * factors).sum(-1, keepdim=True).clamp_(min=1.0)
    return [(part, factors[..., i : i + 1]) for i, part in enumerate(all_parts)]


def divide_by_slots_(rows: Tensor, eps: float, denominator: Tensor | None = None) -> Tensor:
    """Normalize over the slots (Eq. 11) in place, and keep the divisor where there is a place."""
    if denominator is None:
        return rows.div_(rows.sum(1, keepdim=True).add_(eps))
    torch.sum(rows, 1, keepdim=True, out=denominator).add_(eps)
    return rows.div_(denominator)


def _logits(x: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits of some tokens in a type of at least float32."""
    if x.dtype == torch.float16:  # its range ends at 65504, which sums of products exceed
        x = x.float()
    return rows_from_map(key.to(x.dtype), x).to(dtype)
