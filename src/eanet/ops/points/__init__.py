"""Geometry of point clouds, as functions: sampling, neighbors, grouping, interpolation.

Arguments are checked here; the work is done by a backend. ``reference`` holds the definitions line
by line, ``eager`` is the fast path in plain PyTorch and the default on a CPU, ``triton`` samples
furthest points with a kernel of our own and is the default on a GPU.

All functions compute with direct differences in float32 (float64 where coordinates are), never by
way of ``|a|^2 + |b|^2 - 2ab``, which is wrong away from the origin. They run outside autocast. Of
points equally far the lowest index wins. Sampling and neighbors return indices (int64), have no
gradient, and are single operators for ``torch.compile`` and ``torch.export``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from eanet.ops.points import custom_op, eager, reference

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "ball_query",
    "farthest_point_sample",
    "gather_points",
    "group_differences",
    "interpolate",
    "nearest_neighbors",
]

#: backends that run on any device
BACKENDS: Final[dict[str, ModuleType]] = {"reference": reference, "eager": eager}
#: backends that need a GPU
GPU_BACKENDS: Final = ("triton",)


def _function(backend: str | None, name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation by name; the registered operator, which chooses, for ``None``."""
    if backend is None:
        return operator
    if backend in BACKENDS:
        return getattr(BACKENDS[backend], name)
    if backend in GPU_BACKENDS and hasattr(custom_op, f"{name}_on_gpu"):
        return getattr(custom_op, f"{name}_on_gpu")
    known = sorted({*BACKENDS, *GPU_BACKENDS})
    raise ValueError(f"backend of {name} must be one of {known}, got {backend!r}")


def _coordinates(points: Tensor, name: str) -> Tensor:
    """Return coordinates as float32 or float64 without a graph, refusing what is none."""
    if points.ndim != 3:
        raise ValueError(f"{name} must be (batch, points, dimensions), got {tuple(points.shape)}")
    if not points.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {points.dtype}")
    points = points.detach()
    return points if points.dtype == torch.float64 else points.float()


def _check_mask(mask: Tensor | None, points: Tensor) -> None:
    """Refuse a mask that is not boolean or not of the points."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != points.shape[:2]):
        raise ValueError(
            f"mask must be boolean of shape {tuple(points.shape[:2])} (True = takes part), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def _check_pair(queries: Tensor, points: Tensor) -> None:
    """Refuse queries that do not belong to the points."""
    if queries.shape[0] != points.shape[0] or queries.shape[2] != points.shape[2]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and points {tuple(points.shape)} differ in batch or "
            "dimensions"
        )
    if queries.dtype != points.dtype:
        raise ValueError(f"queries are {queries.dtype}, points {points.dtype}")


def _check_count(name: str, count: int, num_points: int) -> None:
    """Refuse to choose fewer than one or more than all points."""
    if not 1 <= count <= num_points:
        raise ValueError(f"{name} must be within 1..{num_points} (the points given), got {count}")


def farthest_point_sample(
    points: Float[Tensor, "batch points dimensions"],
    num_samples: int,
    *,
    start: int | Int64[Tensor, " batch"] = 0,
    mask: Bool[Tensor, "batch points"] | None = None,
    min_norm2: float | None = None,
    backend: str | None = None,
) -> Int64[Tensor, "batch num_samples"]:
    """Choose points one by one, each as far as can be from those chosen before.

    The first is ``start``; each further one has the largest squared distance to its nearest chosen
    point. A cloud whose points are all chosen or duplicates returns its first point again.

    Args:
        points: coordinates.
        num_samples: how many to choose, up to the number of points.
        start: index of the first, one for all clouds or one each.
        mask: True for points that take part; others are never chosen. A cloud whose start does not
            take part begins at its first point that does.
        min_norm2: leave points whose squared norm is at most this out, as the CUDA code of
            PointNet++ does with 1e-3; ``start`` is chosen all the same.
        backend: "reference", "eager" or "triton"; by default whatever suits the device.

    Raises:
        ValueError: more samples than points, a start outside the cloud, or another shape or type.

    >>> cloud = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [5, 0, 0], [2, 0, 0]]])
    >>> farthest_point_sample(cloud, 3)
    tensor([[0, 2, 3]])
    """
    coordinates = _coordinates(points, "points")
    batch, num_points, _ = points.shape
    _check_count("num_samples", num_samples, num_points)
    _check_mask(mask, points)
    if isinstance(start, int):
        if not 0 <= start < num_points:
            raise ValueError(f"start must be within 0..{num_points - 1}, got {start}")
        first = torch.full((batch,), start, dtype=torch.int64, device=points.device)
    else:
        if start.shape != (batch,) or start.dtype != torch.int64:
            raise ValueError(f"start must be {batch} indices (int64), got {tuple(start.shape)}")
        first = start.to(points.device)
    valid = mask
    if min_norm2 is not None:
        far = coordinates.square().sum(2) > min_norm2
        valid = far if mask is None else far & mask
    if mask is not None:
        taken = mask.gather(1, first.unsqueeze(1)).squeeze(1)
        first = torch.where(taken, first, mask.to(torch.int8).argmax(1))
    run = _function(backend, "farthest_point_sample", custom_op.farthest_point_sample)
    return run(coordinates, num_samples, first, valid)


def nearest_neighbors(
    queries: Float[Tensor, "batch queries dimensions"],
    points: Float[Tensor, "batch points dimensions"],
    num_neighbors: int,
    *,
    mask: Bool[Tensor, "batch points"] | None = None,
    backend: str | None = None,
) -> tuple[
    Int64[Tensor, "batch queries num_neighbors"], Float[Tensor, "batch queries num_neighbors"]
]:
    """Find the nearest points of each query, itself included where it is one of the points.

    Args:
        queries: coordinates.
        points: coordinates.
        num_neighbors: k, up to the number of points.
        mask: True for points that may be neighbors. A cloud with fewer than k of them repeats the
            nearest.
        backend: "reference" or "eager"; by default whatever suits the device.

    Returns:
        Indices by ascending distance (the order of equal distances is not specified), and squared
        distances.

    Raises:
        ValueError: more neighbors than points, or another shape or type.

    >>> line = torch.arange(5.0).view(1, 5, 1)
    >>> nearest_neighbors(line[:, :1], line, 3)[1]
    tensor([[[0., 1., 4.]]])
    """
    queries, points = _coordinates(queries, "queries"), _coordinates(points, "points")
    _check_pair(queries, points)
    _check_count("num_neighbors", num_neighbors, points.shape[1])
    _check_mask(mask, points)
    run = _function(backend, "nearest_neighbors", custom_op.nearest_neighbors)
    return run(queries, points, num_neighbors, mask)


def ball_query(
    queries: Float[Tensor, "batch queries dimensions"],
    points: Float[Tensor, "batch points dimensions"],
    num_samples: int,
    radius: float,
    *,
    backend: str | None = None,
) -> Int64[Tensor, "batch queries num_samples"]:
    """Find the first points, by index, within a distance of each query.

    A ball with fewer points is filled up with its first one, an empty ball with the nearest point.

    Args:
        queries: coordinates.
        points: coordinates.
        num_samples: indices for each query.
        radius: of the ball; a point on its surface lies within.
        backend: "reference" or "eager".

    Raises:
        ValueError: a radius below 0, more samples than points, or another shape or type.

    >>> line = torch.arange(5.0).view(1, 5, 1)
    >>> ball_query(line[:, 3:4], line, 3, 1.0)
    tensor([[[2, 3, 4]]])
    """
    queries, points = _coordinates(queries, "queries"), _coordinates(points, "points")
    _check_pair(queries, points)
    _check_count("num_samples", num_samples, points.shape[1])
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    run = _function(backend, "ball_query", eager.ball_query)
    return run(queries, points, num_samples, radius)


def gather_points(
    values: Float[Tensor, "batch points channels"], indices: Int[Tensor, "batch *chosen"]
) -> Float[Tensor, "batch *chosen channels"]:
    """Take values of points by index, cloud by cloud, with gradients.

    Args:
        values: coordinates or features.
        indices: within each cloud, any further dimensions.

    >>> gather_points(torch.arange(6.0).view(1, 3, 2), torch.tensor([[2, 0]]))
    tensor([[[4., 5.],
             [0., 1.]]])
    """
    batch, num_points, channels = values.shape
    offset = torch.arange(batch, device=indices.device) * num_points
    flat = (indices.flatten(1) + offset.unsqueeze(1)).flatten()
    # embedding's backward adds up in one pass; that of fancy indexing sorts
    return F.embedding(flat, values.reshape(-1, channels)).view(*indices.shape, channels)


def group_differences(
    features: Float[Tensor, "batch points channels"],
    centers: Int[Tensor, "batch centers"] | None,
    neighbors: Int[Tensor, "batch centers num_neighbors"],
) -> Float[Tensor, "batch centers num_neighbors twice_channels"]:
    """Describe neighbors relative to their center: ``(f_j - f_i, f_i)`` side by side.

    Networks here never build this tensor, see
    :func:`eanet.tasks.pointcloud.aggregation.aggregate_neighbors`; it defines what they compute.

    Args:
        features: of all points.
        centers: which points are centers; ``None`` for all in their order.
        neighbors: for each center.
    """
    own = features if centers is None else gather_points(features, centers)
    own = own.unsqueeze(2).expand(-1, -1, neighbors.shape[2], -1)
    return torch.cat([gather_points(features, neighbors) - own, own], dim=-1)


def interpolate(
    features: Float[Tensor, "batch known channels"],
    known: Float[Tensor, "batch known dimensions"],
    queries: Float[Tensor, "batch queries dimensions"],
    *,
    num_neighbors: int = 3,
    power: int = 2,
    backend: str | None = None,
) -> Float[Tensor, "batch queries channels"]:
    """Carry features to other points: the mean of the nearest, weighted by inverse distance.

    Weights are ``1 / (d^power + 1e-8)``, divided by their sum; features have gradients,
    coordinates none.

    Args:
        features: at the known points.
        known: their coordinates.
        queries: where features are wanted.
        num_neighbors: how many known points count.
        power: 2 as in PointNet++'s PyTorch code, 1 as in its CUDA package.
        backend: of :func:`nearest_neighbors`.

    Raises:
        ValueError: power is neither 1 nor 2, or sizes do not fit.

    >>> known = torch.tensor([[[0.0], [1.0]]])
    >>> interpolate(known, known, torch.tensor([[[0.5]]]), num_neighbors=2)
    tensor([[[0.5000]]])
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if features.shape[:2] != known.shape[:2]:
        raise ValueError(
            f"features {tuple(features.shape)} and known {tuple(known.shape)} differ in points"
        )
    indices, distances = nearest_neighbors(queries, known, num_neighbors, backend=backend)
    weights = 1 / ((distances if power == 2 else distances.sqrt()) + 1e-8)
    weights = (weights / weights.sum(2, keepdim=True)).to(features.dtype)
    return (gather_points(features, indices) * weights.unsqueeze(-1)).sum(2)
