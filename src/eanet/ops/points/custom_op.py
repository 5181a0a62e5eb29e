"""Sampling and neighbors as operators of torch: one node each when a network is traced.

The operators choose by device: a CPU runs :mod:`.eager`, a GPU samples furthest points with the
kernel of :mod:`.kernels` where Triton is there. Their results are indices, so there is nothing to
differentiate, and autocast does not reach in.
"""

import torch
from torch import Tensor

from eanet.ops.points import eager

__all__ = ["farthest_point_sample", "farthest_point_sample_on_gpu", "nearest_neighbors"]


def farthest_point_sample_on_gpu(
    points: Tensor, num_samples: int, start: Tensor, valid: Tensor | None
) -> Tensor:
    """Sample with the Triton kernel.

    Raises:
        ValueError: Triton is missing, or the points are neither on a GPU nor interpreted.
    """
    try:
        from eanet.ops.points import launch
    except ImportError as error:
        raise ValueError(
            "backend 'triton' needs the package triton, which PyTorch brings on Linux; "
            "use backend='eager'"
        ) from error
    return launch.farthest_point_sample(points, num_samples, start, valid)


@torch.library.custom_op("eanet::farthest_point_sample", mutates_args=())
def farthest_point_sample(
    points: Tensor, num_samples: int, start: Tensor, valid: Tensor | None
) -> Tensor:
    """Return indices (batch, num_samples); see :func:`eanet.ops.points.farthest_point_sample`."""
    if points.is_cuda and points.shape[2] <= 3:
        try:
            return farthest_point_sample_on_gpu(points, num_samples, start, valid)
        except ValueError:  # no Triton on this platform: slower, the same result
            pass
    return eager.farthest_point_sample(points, num_samples, start, valid)


@farthest_point_sample.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(points: Tensor, num_samples: int, start: Tensor, valid: Tensor | None) -> Tensor:
    del valid
    return start.new_empty((points.shape[0], num_samples))


@torch.library.custom_op("eanet::nearest_neighbors", mutates_args=())
def nearest_neighbors(
    queries: Tensor, points: Tensor, num_neighbors: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return indices and squared distances; see :func:`eanet.ops.points.nearest_neighbors`."""
    return eager.nearest_neighbors(queries, points, num_neighbors, mask)


@nearest_neighbors.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    queries: Tensor, points: Tensor, num_neighbors: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    del points, mask
    shape = (queries.shape[0], queries.shape[1], num_neighbors)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape)
