"""Adaptive pyramid context of APCNet (APC)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eanet.nn.compared.feature_maps import check_feature_map
from eanet.nn.memories import check_positive

__all__ = ["AdaptivePyramidContext"]


class AdaptivePyramidContext(nn.Module):
    """Give each position a learned mixture of the cells of several coarse grids.

    He et al., "Adaptive Pyramid Context Network for Semantic Segmentation", CVPR 2019. One
    :class:`AdaptiveContext` for each scale in parallel, their results concatenated. 2,130,994
    parameters at 512 channels; multiply-adds (4 C^2 + 100 C) N + 50 C^2 with the four scales of
    the default, whose grids have 50 cells together.

    Args:
        channels: C, width of the input; the result has ``len(scales) * C`` channels.
        scales: sides of the grids.

    Raises:
        ValueError: there is no scale, or a number is below 1.

    >>> AdaptivePyramidContext(16)(torch.zeros(2, 16, 5, 4)).shape
    torch.Size([2, 64, 5, 4])
    """

    def __init__(self, channels: int, *, scales: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        check_positive(channels=channels, num_scales=len(scales))
        self.channels = channels
        self.out_channels = channels * len(scales)
        self.contexts = nn.ModuleList(AdaptiveContext(channels, scale=scale) for scale in scales)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Concatenate the contexts of all scales."""
        check_feature_map(x, self.channels, type(self).__name__)
        return torch.cat([context(x) for context in self.contexts], dim=1)


class AdaptiveContext(nn.Module):
    """Give each position a mixture of the cells of one grid.

    With a grid of s x s cells::

        R = relu(bn(W_r X))                            (C x N)
        Y = relu(bn(W_p average of each cell of X))    (C x s^2)
        A = sigmoid(W_g (R + mean of R) + b)           (s^2 x N)
        y = Y A + R

    Args:
        channels: C, width of the input and of the result.
        scale: s, side of the grid.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, channels: int, *, scale: int) -> None:
        super().__init__()
        check_positive(channels=channels, scale=scale)
        self.scale = scale
        self.reduction = nn.Conv2d(channels, channels, 1, bias=False)
        self.reduction_norm = nn.BatchNorm2d(channels)
        self.pooled = nn.Conv2d(channels, channels, 1, bias=False)
        self.pooled_norm = _PooledBatchNorm(channels)
        self.affinity = nn.Conv2d(channels, scale * scale, 1)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Mix the cells for each position."""
        reduced = self.reduction_norm(self.reduction(x)).relu()
        cells = self.pooled(F.adaptive_avg_pool2d(x, self.scale))
        cells = self.pooled_norm(cells).relu().flatten(2)
        affinity = self.affinity(reduced + reduced.mean(dim=(2, 3), keepdim=True)).sigmoid()
        return (cells @ affinity.flatten(2)).unflatten(2, x.shape[2:]) + reduced


class _PooledBatchNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a batch has one value for each channel.

    At scale 1 a single image is pooled to a single value, whose variance says nothing; PyTorch
    refuses to normalize with it, which would forbid training with one image for each process.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == self.num_features:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)
