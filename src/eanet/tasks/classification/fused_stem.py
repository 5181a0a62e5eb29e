"""A token block of the stem, folded for inference."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from eanet.nn.memories import autocast_input
from eanet.ops.attention.linear import linear
from eanet.tasks.classification.soft_split import SoftSplit, centered_weight, project_centered

__all__ = ["FusedTokenBlock"]


class FusedTokenBlock(nn.Module):
    """The inference form of ``TokenBlock``; made by its ``fused()``.

    The first norm and the layer that the attention begins with are one convolution over the
    picture and averages over its windows; the attention goes on from there.

    Args:
        norm1: the norm over patches.
        linear: the layer that the attention began with.
        attention: what follows that layer, called with a mask.
        norm2: the norm before the MLP.
        mlp: the MLP.
        branch_bias: bias of the attention's branch, where it can be added before the attention.
    """

    def __init__(
        self,
        norm1: nn.LayerNorm,
        linear: nn.Linear,
        attention: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        *,
        branch_bias: Float[Tensor, " channels"] | None = None,
    ) -> None:
        super().__init__()
        with torch.no_grad():
            weight, bias = centered_weight(norm1, linear)
            if branch_bias is not None:
                bias = bias + branch_bias
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.branch_bias = (
            None if branch_bias is None else nn.Parameter(branch_bias, requires_grad=False)
        )
        self.eps = norm1.eps
        self.attention = attention
        self.norm2, self.mlp = norm2, mlp

    def forward(
        self,
        x: Tensor,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        split: SoftSplit | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the narrowed tokens; arguments as before folding."""
        if split is None:
            # what the norm returns sums to 0, so that W' acts on it as W gamma does
            normalized = F.layer_norm(x, x.shape[-1:], eps=self.eps)
            weight, bias = self.weight.to(normalized.dtype), self.bias.to(normalized.dtype)
            projected = autocast_input(linear(normalized, weight, bias).to(x.dtype))
        else:
            projected = project_centered(x, split, self.weight, self.bias, eps=self.eps)
        y = self.attention(projected, mask)
        if mask is not None and self.branch_bias is not None:
            # what takes no part gets nothing from the branch
            y = y - self.branch_bias.to(y.dtype) * ~mask.unsqueeze(-1)
        return y + self.mlp(self.norm2(y))

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        return f"weight={tuple(self.weight.shape)}"
