"""Norms for the branch of an inserted block, which know nothing of the padding of a batch."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["ChannelAffine", "ValidGroupNorm"]


class ChannelAffine(nn.Module):
    """A weight and a bias for each channel, without any statistics.

    What a batch norm is that is frozen at mean 0 and variance 1: nothing in it depends on the
    batch, so that small batches and padding cannot disturb it.

    Args:
        channels: width of the feature map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Become the identity."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def fold(self, value: Float[Tensor, "channels slots"]) -> tuple[Tensor, Tensor]:
        """Return the matrix before this layer with the weight inside, and the bias."""
        return self.weight.unsqueeze(1) * value, self.bias

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Scale and shift each channel."""
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ValidGroupNorm(nn.GroupNorm):
    """Group norm with statistics over the valid positions alone.

    Without a mask it is PyTorch's layer. With one, the result at a valid position is what the
    layer would give for the image cut to its valid positions.
    """

    def forward(
        self,
        input: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalize; values at masked positions are of no meaning."""
        if mask is None:
            return super().forward(input)
        x = input
        grouped = x.reshape(x.shape[0], self.num_groups, -1, *x.shape[2:])
        weight = mask[:, None, None].to(x.dtype)
        count = (mask.flatten(1).sum(1).clamp(min=1) * grouped.shape[2]).to(x.dtype)
        count = count.view(-1, 1, 1, 1, 1)
        mean = (grouped * weight).sum((2, 3, 4), keepdim=True) / count
        centered = (grouped - mean) * weight
        variance = centered.square().sum((2, 3, 4), keepdim=True) / count
        normalized = (centered * torch.rsqrt(variance + self.eps)).reshape(x.shape)
        return normalized * self.weight[:, None, None] + self.bias[:, None, None]
