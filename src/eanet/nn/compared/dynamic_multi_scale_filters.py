"""Dynamic multi-scale filters of DMNet (DM)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eanet.nn.compared.feature_maps import check_feature_map
from eanet.nn.memories import check_positive

__all__ = ["DynamicMultiScaleFilters"]


class DynamicMultiScaleFilters(nn.Module):
    """Convolve each image with filters made from that image, at several sizes.

    He et al., "Dynamic Multi-Scale Filters for Semantic Segmentation", ICCV 2019. One
    :class:`DynamicFilter` for each kernel size in parallel, their results concatenated.
    12 C^2 parameters without norms (3,145,728 at 512 channels), 3,160,064 with; multiply-adds
    (8 C^2 + 84 C) N + 84 C^2 with the four sizes of the default, whose filters have 84 entries.

    Args:
        channels: C, width of the input; the result has ``len(kernel_sizes) * C`` channels.
        kernel_sizes: sides of the filters, odd.
        norm: "none", or "batch" for batch norms, and biases in the filters, as published code has.

    Raises:
        ValueError: there is no kernel size, one is even, a number is below 1 or ``norm`` unknown.

    >>> DynamicMultiScaleFilters(16)(torch.zeros(2, 16, 5, 4)).shape
    torch.Size([2, 64, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_sizes: Sequence[int] = (1, 3, 5, 7),
        norm: Literal["none", "batch"] = "none",
    ) -> None:
        super().__init__()
        check_positive(channels=channels, num_kernel_sizes=len(kernel_sizes))
        self.channels = channels
        self.out_channels = channels * len(kernel_sizes)
        self.filters = nn.ModuleList(
            DynamicFilter(channels, kernel_size=size, norm=norm) for size in kernel_sizes
        )

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Concatenate the results of all filter sizes."""
        check_feature_map(x, self.channels, type(self).__name__)
        return torch.cat([dynamic_filter(x) for dynamic_filter in self.filters], dim=1)


class DynamicFilter(nn.Module):
    """Convolve each channel of each image with a filter of its own.

    With filters of k x k entries::

        F = W_f average of X in a grid of k x k cells    (C x k x k)
        y = W_o relu(depthwise convolution of W_r X with F)

    With ``norm="batch"`` a batch norm follows W_r, the depthwise convolution and W_o, each with a
    ReLU behind it.

    Args:
        channels: C, width of the input and of the result.
        kernel_size: k, odd.
        norm: see :class:`DynamicMultiScaleFilters`.

    Raises:
        ValueError: the size is even, a number is below 1 or ``norm`` unknown.
    """

    def __init__(
        self, channels: int, *, kernel_size: int, norm: Literal["none", "batch"] = "none"
    ) -> None:
        super().__init__()
        check_positive(channels=channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd to keep the size of a map, got {kernel_size}"
            )
        if norm not in ("none", "batch"):
            raise ValueError(f"norm must be 'none' or 'batch', got {norm!r}")
        self.kernel_size = kernel_size
        self.filter = nn.Conv2d(channels, channels, 1, bias=norm == "batch")
        self.reduction = _convolution(channels, norm)
        self.filtered = (
            nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()) if norm == "batch" else nn.ReLU()
        )
        self.fusion = _convolution(channels, norm)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Make the filters of each image and apply them to it."""
        batch, channels, height, width = x.shape
        filters = self.filter(F.adaptive_avg_pool2d(x, self.kernel_size))
        # every (image, channel) becomes a group of its own, so one call serves the whole batch
        filtered = F.conv2d(
            self.reduction(x).reshape(1, batch * channels, height, width),
            filters.reshape(batch * channels, 1, self.kernel_size, self.kernel_size),
            padding=self.kernel_size // 2,
            groups=batch * channels,
        )
        return self.fusion(self.filtered(filtered.reshape(batch, channels, height, width)))


def _convolution(channels: int, norm: str) -> nn.Module:
    """Return a 1x1 convolution, with batch norm and ReLU where there is a norm."""
    convolution = nn.Conv2d(channels, channels, 1, bias=False)
    if norm == "none":
        return convolution
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())
