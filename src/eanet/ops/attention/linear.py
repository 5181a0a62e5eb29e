"""A linear map of tokens whose large products on a CPU go to oneDNN, with a gradient.

It does what ``torch.nn.functional.linear`` does. Which library multiplies, and why, stands in
:mod:`eanet.ops.attention.thin_products`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eanet.ops.attention.thin_products import multiply, sum_over_tokens, uses_onednn

__all__ = ["LEAST_MACS", "LEAST_MACS_WITH_GRADIENT", "linear"]

#: multiply-adds below which PyTorch's own takes less time, without a gradient and with one
LEAST_MACS, LEAST_MACS_WITH_GRADIENT = 1 << 23, 1 << 24


def linear(
    tokens: Float[Tensor, "*batch channels"],
    weight: Float[Tensor, "out_channels channels"],
    bias: Float[Tensor, " out_channels"] | None = None,
) -> Float[Tensor, "*batch out_channels"]:
    """Return ``tokens @ weight^T + bias``.

    Args:
        tokens: of any number of dimensions, the last of which is mapped.
        weight: one row for each channel of the result.
        bias: added to every token.
    """
    macs = tokens.numel() * weight.shape[0]
    elsewhere = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if elsewhere or macs < LEAST_MACS:
        return F.linear(tokens, weight, bias)
    if uses_onednn(tokens, weight, bias):
        return _by_onednn(tokens, weight, bias)
    with torch.no_grad():
        worthwhile = macs >= LEAST_MACS_WITH_GRADIENT and uses_onednn(tokens, weight, bias)
    if worthwhile:
        return _Linear.apply(tokens, weight, bias)  # pyright: ignore[reportReturnType]
    return F.linear(tokens, weight, bias)


def _by_onednn(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # a transposed weight takes longer than one that is copied first
    flat = tokens.contiguous().view(-1, tokens.shape[-1])
    return multiply(flat, weight.contiguous().t(), bias).view(*tokens.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """The same with a gradient, whose products take the same way."""

    @staticmethod
    def forward(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _by_onednn(tokens, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        tokens_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
        grad_tokens = linear(grad, weight.t()) if tokens_wanted else None
        grad_weight = grad_bias = None
        # (1, channels, tokens)
        source, rows = (map_.flatten(0, -2).t().unsqueeze(0) for map_ in (grad, tokens))
        if weight_wanted and weight.shape[1] <= weight.shape[0]:
            total = sum_over_tokens(rows, source, with_total=bias_wanted)
            grad_weight = total[: weight.shape[1]].t()
            grad_bias = total[-1] if bias_wanted else None
        elif weight_wanted:  # the thinner of the two is copied
            grad_weight = sum_over_tokens(source, rows)
        if bias_wanted and grad_bias is None:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_tokens, grad_weight, grad_bias
