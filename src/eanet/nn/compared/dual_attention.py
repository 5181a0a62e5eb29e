"""Dual attention of DANet (DA): among positions, and among channels."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eanet.nn.compared.feature_maps import check_feature_map
from eanet.nn.memories import check_positive

__all__ = ["DualAttention"]


class DualAttention(nn.Module):
    """Add a map that attends among positions to one that attends among channels.

    Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019. With X of C channels and
    N positions, and a learned factor in each branch that starts at 0::

        position:  A = softmax over keys of (W_q X)^T (W_k X)      (N x N)
                   p = conv_relu(gamma_p * (W_v X) A^T + X)
        channel:   E = X X^T,  A = softmax(max of each row of E - E)    (C x C)
                   c = conv_relu(gamma_c * A X + X)
        y = p + c

    where ``conv_relu`` is a 3x3 convolution, batch norm and ReLU. 5,048,962 parameters at 512
    channels; multiply-adds (19 C^2 + C d) N + (C + d) N^2 + 2 C^2 N + C d N with d query channels.

    Args:
        channels: C, width of the input and of the result.
        query_channels: d, width of queries and keys; ``None`` for ``channels // 8``, at least 1.

    Raises:
        ValueError: a width is below 1.

    >>> DualAttention(16)(torch.zeros(2, 16, 5, 4)).shape
    torch.Size([2, 16, 5, 4])
    """

    def __init__(self, channels: int, *, query_channels: int | None = None) -> None:
        super().__init__()
        query_channels = max(channels // 8, 1) if query_channels is None else query_channels
        check_positive(channels=channels, query_channels=query_channels)
        self.channels = self.out_channels = channels
        self.query = nn.Conv2d(channels, query_channels, 1)
        self.key = nn.Conv2d(channels, query_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.position_gamma = nn.Parameter(torch.zeros(1))
        self.channel_gamma = nn.Parameter(torch.zeros(1))
        self.position_output = _conv_relu(channels)
        self.channel_output = _conv_relu(channels)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend among positions and among channels, and add the two."""
        check_feature_map(x, self.channels, type(self).__name__)
        position = self.position_gamma * self._attend_to_positions(x) + x
        channel = self.channel_gamma * self._attend_to_channels(x) + x
        return self.position_output(position) + self.channel_output(channel)

    def _attend_to_positions(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)
        key = self.key(x).flatten(2)
        value = self.value(x).flatten(2)
        attention = (query.transpose(1, 2) @ key).softmax(dim=-1)
        return (value @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])

    def _attend_to_channels(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        energy = tokens @ tokens.transpose(1, 2)
        # the largest weight goes to the channel that is least like this one
        attention = (energy.amax(dim=-1, keepdim=True) - energy).softmax(dim=-1)
        return (attention @ tokens).reshape(x.shape)


def _conv_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
