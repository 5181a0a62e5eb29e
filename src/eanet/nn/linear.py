"""A linear layer that multiplies by the library that is fastest on a CPU."""

from jaxtyping import Float
from torch import Tensor, nn

from eanet.ops.attention.linear import linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose large float32 products on a CPU go to oneDNN.

    Parameters, initialization and results are those of PyTorch's layer, the latter up to rounding.

    >>> import torch
    >>> Linear(8, 3)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 3])
    """

    def forward(
        self, input: Float[Tensor, "*batch channels"]
    ) -> Float[Tensor, "*batch out_channels"]:
        """Map the last dimension."""
        return linear(input, self.weight, self.bias)
