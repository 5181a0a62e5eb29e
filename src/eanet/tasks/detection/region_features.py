"""Features of regions: each cut from the pyramid level that suits its size."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

__all__ = ["region_features", "region_levels"]

#: regions up to twice this edge (in pixels) come from the finest level
_FINEST_EDGE = 56


def region_levels(boxes: Tensor, num_levels: int) -> Tensor:
    """Return the level of each region: floor(log2(sqrt(area) / 56 + 1e-6)), within the levels.

    Args:
        boxes: (N, 4).
        num_levels: of the pyramid that regions are cut from.
    """
    edges = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0).sqrt()
    levels = torch.floor(torch.log2(edges / _FINEST_EDGE + 1e-6))
    return levels.clamp(0, num_levels - 1).long()


def region_features(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Sequence[Tensor],
    size: int,
) -> Tensor:
    """Return the features of all regions of a batch (RoIAlign, aligned, adaptive sampling).

    Args:
        features: the levels that regions are cut from, finest first.
        strides: of the levels.
        boxes: for each image (N, 4).
        size: edge of the result in cells.

    Returns:
        (regions of all images, channels, size, size), in float32.
    """
    numbers = [torch.full((len(b), 1), float(n), device=b.device) for n, b in enumerate(boxes)]
    flat = torch.cat(list(boxes)).detach()
    regions = torch.cat([torch.cat(numbers).to(flat.dtype), flat], 1)
    levels = region_levels(flat, len(features))
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    result = flat.new_zeros(len(flat), features[0].shape[1], size, size, dtype=dtype)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        (places,) = (levels == level).nonzero(as_tuple=True)
        cut = roi_align(
            feature.to(dtype),
            regions[places].to(dtype),
            size,
            spatial_scale=1 / stride,
            sampling_ratio=0,
            aligned=True,
        )
        result = result.index_put((places,), cut)
    return result
