"""Launch the Triton kernel of furthest point sampling. Importing this module imports Triton."""

from typing import Any, Final

import torch
import triton  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from eanet.ops.points import kernels as _kernels

__all__ = ["farthest_point_sample"]

# a kernel's signature is not the one it is launched with
kernels: Final[Any] = _kernels

#: points of a tile: four for each thread of a program
_MAX_BLOCK = 2048


def farthest_point_sample(
    points: Tensor, num_samples: int, start: Tensor, valid: Tensor | None
) -> Tensor:
    """Return indices (batch, num_samples) of points of up to three dimensions.

    Raises:
        ValueError: the points have more dimensions, or are not on a GPU.
    """
    batch, num_points, dimensions = points.shape
    if dimensions > 3:
        raise ValueError(f"backend 'triton' samples in 3 dimensions or fewer, got {dimensions}")
    if not (points.is_cuda or kernels.INTERPRETED):
        raise ValueError(f"backend 'triton' needs points on a GPU, got {points.device}")
    axes = points.new_zeros(3, batch, num_points)
    axes[:dimensions] = points.permute(2, 0, 1)
    nearest = points.new_full((batch, num_points), torch.inf)
    if valid is not None:
        nearest.masked_fill_(~valid, -1.0)
    chosen = start.new_empty(batch, num_samples)
    block = min(triton.next_power_of_2(num_points), _MAX_BLOCK)
    with torch.cuda.device_of(points):
        kernels.farthest_point_sample[(batch,)](
            axes, nearest, start.contiguous(), chosen, batch, num_points, num_samples,
            BLOCK_N=max(block, 16), num_warps=8 if block >= 1024 else 4,
        )  # fmt: skip
    return chosen
