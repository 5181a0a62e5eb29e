"""Parameters that exist for parity but cannot change the result."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["attach_zero_gradient"]


class _AttachZeroGradient(torch.autograd.Function):
    """Pass a tensor on; in the backward pass give further tensors a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *dead: Tensor) -> Tensor:
        ctx.shapes = [(parameter.shape, parameter.dtype, parameter.device) for parameter in dead]
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes
        ]
        return grad_outputs[0], *zeros


def attach_zero_gradient(tensor: Tensor, *dead: Tensor | None) -> Tensor:
    """Return the tensor, connected so that dead parameters receive a gradient of zeros.

    A bias before a softmax over the tokens adds the same to every token and cancels. It is kept
    because published weights have it, and left out of the forward pass because it would only add
    rounding noise. Without a gradient, though, data-parallel training would wait for it for ever.

    Args:
        tensor: any tensor on the way to the result; a small one, for it is copied.
        dead: the parameters; ``None`` and frozen ones are passed over.
    """
    parameters = [
        parameter for parameter in dead if parameter is not None and parameter.requires_grad
    ]
    if not parameters or not torch.is_grad_enabled():
        return tensor
    return _AttachZeroGradient.apply(tensor, *parameters)  # pyright: ignore[reportReturnType]
