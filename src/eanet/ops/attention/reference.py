"""The paper's equations, line by line.

Slow and simple on purpose: every other backend is measured against these functions, run in
float64. Nothing of this package is imported here, so that a fault elsewhere cannot hide.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "double_normalize",
    "external_attention",
    "multi_head_external_attention",
    "slot_softmax",
]


def _along(vector_per_sample: Tensor, ndim: int, dim: int) -> Tensor:
    """Reshape a (batch, n) tensor so that it broadcasts along one dimension of a larger one."""
    shape = [1] * ndim
    shape[0], shape[dim] = vector_per_sample.shape
    return vector_per_sample.reshape(shape)


def double_normalize(
    logits: Float[Tensor, "..."],
    *,
    token_dim: int = -2,
    slot_dim: int = -1,
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    slot_mask: Bool[Tensor, "batch slots"] | None = None,
) -> Float[Tensor, "..."]:
    """Normalize over the tokens, then over the slots (Eq. 10-11, arXiv 2105.02358).

    See :func:`eanet.ops.attention.double_normalize` for the arguments.
    """
    takes_part = torch.ones_like(logits)
    if mask is not None:
        takes_part = takes_part * _along(mask, logits.ndim, token_dim)
    if slot_mask is not None:
        takes_part = takes_part * _along(slot_mask, logits.ndim, slot_dim)

    # Eq. 10: softmax over the tokens, for each slot
    largest = logits.masked_fill(takes_part == 0, -torch.inf).amax(token_dim, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    exponentials = torch.exp((logits - largest).masked_fill(takes_part == 0, 0.0)) * takes_part
    total = exponentials.sum(token_dim, keepdim=True)
    over_tokens = exponentials / total.masked_fill(total == 0, 1.0)

    # Eq. 11: divide by the sum over the slots, for each token
    total = eps + over_tokens.sum(slot_dim, keepdim=True)
    nothing_takes_part = takes_part.amax(slot_dim, keepdim=True) == 0
    return over_tokens / total.masked_fill(nothing_takes_part, 1.0)


def slot_softmax(
    logits: Float[Tensor, "..."],
    *,
    token_dim: int = -2,
    slot_dim: int = -1,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    slot_mask: Bool[Tensor, "batch slots"] | None = None,
) -> Float[Tensor, "..."]:
    """Softmax over the slots of each token, the norm of Eq. 1 and of row 6 in Table 1."""
    takes_part = torch.ones_like(logits)
    if slot_mask is not None:
        takes_part = takes_part * _along(slot_mask, logits.ndim, slot_dim)
    largest = logits.masked_fill(takes_part == 0, -torch.inf).amax(slot_dim, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    exponentials = torch.exp((logits - largest).masked_fill(takes_part == 0, 0.0)) * takes_part
    total = exponentials.sum(slot_dim, keepdim=True)
    attention = exponentials / total.masked_fill(total == 0, 1.0)
    if mask is not None:
        attention = attention * _along(mask, logits.ndim, token_dim)
    return attention


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
    """Attend from tokens to memories (Eq. 5-11); return the result and the attention map."""
    logits = x @ memory_key.transpose(0, 1)  # Eq. 9
    if memory_key_bias is not None:
        logits = logits + memory_key_bias
    if norm == "double":
        attention = double_normalize(logits, eps=eps, mask=mask)
    else:
        attention = slot_softmax(logits, mask=mask)
    values = memory_key if memory_value is None else memory_value  # Eq. 6, Eq. 8
    output = attention @ values
    if memory_value_bias is not None:
        output = output + memory_value_bias
    if mask is not None:
        output = output * mask.unsqueeze(-1)
    return output, attention


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
    """Apply external attention head by head with shared memories (Eq. 12-14, without W_o)."""
    outputs: list[Tensor] = []
    attentions: list[Tensor] = []
    for head in x.chunk(num_heads, dim=-1):
        output, attention = external_attention(
            head,
            memory_key,
            memory_value,
            memory_key_bias=memory_key_bias,
            memory_value_bias=memory_value_bias,
            norm=norm,
            eps=eps,
            mask=mask,
        )
        outputs.append(output)
        attentions.append(attention)
    return torch.cat(outputs, dim=-1), torch.stack(attentions, dim=1)
