"""The backend "triton": external attention on a GPU in two passes over the tokens.

The kernels are operators of torch (``operators.py``), so that ``torch.compile`` carries them as
they are. Importing this module needs neither Triton nor a GPU.

Autocast does not reach into an operator. As a matrix product would, the functions here cast the
tokens to the type of an active autocast region; memories and biases may stay float32.
"""

import importlib.util

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from eanet.ops.attention import eager, operators
from eanet.ops.attention.heuristics import MAX_SLOTS

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


def suits(x: Tensor, num_slots: int) -> bool:
    """Tell whether the kernels are the better choice: tensors on a GPU that they can take.

    A network that is exported keeps to operations that every runtime knows.
    """
    return (
        x.is_cuda
        and x.dtype in operators.DTYPES
        and num_slots <= MAX_SLOTS
        and not torch.compiler.is_exporting()
        and importlib.util.find_spec("triton") is not None
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
    if device != "meta" and x.dtype in operators.DTYPES and torch.is_autocast_enabled(device):
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
    out, attention = operators.attend(
        *operands,
        mask=mask,
        seed=seed,
        num_heads=num_heads,
        norm=norm,
        eps=eps,
        dropout=attention_dropout,
        residual=residual,
        with_attention=return_attention or keeps,
        with_denominator=keeps,
        differentiable=differentiable,
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
