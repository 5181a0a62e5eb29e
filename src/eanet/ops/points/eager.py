"""The fast path in plain PyTorch: the CPU, and what a GPU does without kernels of our own.

Coordinates are taken apart into contiguous rows x, y, z, so that every operation runs over long
vectors. Distances are computed in tiles that fit a cache; no (queries, points) matrix of a large
cloud is ever whole. On a CPU, neighbors come from the search tree of SciPy where that is installed:
two to three times faster for the usual clouds, and the only way for a million points.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["ball_query", "farthest_point_sample", "nearest_neighbors"]

#: entries of a tile of distances, 1 MiB of float32: what a core's cache holds
_TILE_ON_CPU = 2**18
#: on a GPU a tile must fill the device
_TILE_ON_GPU = 2**26
#: distances of a cloud below which building a tree does not pay
_LEAST_FOR_TREE = 2**14
#: queries of a cloud from which starting threads pays
_LEAST_FOR_THREADS = 2**14


def farthest_point_sample(
    points: Tensor, num_samples: int, start: Tensor, valid: Tensor | None
) -> Tensor:
    """Return indices (batch, num_samples); see :func:`eanet.ops.points.farthest_point_sample`."""
    axes = [axis.contiguous() for axis in points.unbind(2)]
    nearest = torch.full_like(axes[0], torch.inf)
    if valid is not None:
        nearest.masked_fill_(~valid, -1.0)  # below every distance: never the furthest
    distance, difference = torch.empty_like(nearest), torch.empty_like(nearest)
    chosen = start.new_empty(num_samples, len(points), 1)
    current = start.unsqueeze(1)
    for number in range(num_samples):
        chosen[number] = current
        if number + 1 == num_samples:
            break
        torch.sub(axes[0], axes[0].gather(1, current), out=distance)
        distance.mul_(distance)
        for axis in axes[1:]:
            torch.sub(axis, axis.gather(1, current), out=difference)
            distance.addcmul_(difference, difference)
        torch.minimum(nearest, distance, out=nearest)
        current = nearest.argmax(1, keepdim=True)  # of equal ones the first
    return chosen.squeeze(2).transpose(0, 1).contiguous()


def _tiles(queries: Tensor, points: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of clouds and of queries whose distances make up a tile."""
    batch, num_queries, _ = queries.shape
    limit = _TILE_ON_CPU if points.device.type == "cpu" else _TILE_ON_GPU
    rows = max(1, limit // max(points.shape[1], 1))
    clouds = max(1, rows // max(num_queries, 1))
    for first in range(0, batch, clouds):
        for row in range(0, num_queries, rows):
            yield slice(first, first + clouds), slice(row, row + rows)


def _squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Return (clouds, queries, points), by direct differences, axis by axis."""
    total = queries[:, :, :1] - points[:, :, 0].unsqueeze(1)
    total.mul_(total)
    for axis in range(1, points.shape[2]):
        difference = queries[:, :, axis : axis + 1] - points[:, :, axis].unsqueeze(1)
        total.addcmul_(difference, difference)
    return total


@functools.cache
def _tree_class() -> Any:
    """Return SciPy's search tree, ``None`` where SciPy is not installed."""
    try:
        from scipy.spatial import KDTree  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return None
    return KDTree


def nearest_neighbors(
    queries: Tensor, points: Tensor, num_neighbors: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return indices and squared distances by ascending distance."""
    large = queries.shape[1] * points.shape[1] >= _LEAST_FOR_TREE
    # in many dimensions a tree visits every point
    if large and points.device.type == "cpu" and points.shape[2] <= 3 and _tree_class():
        return neighbors_by_tree(queries, points, num_neighbors, mask)
    return neighbors_by_distance(queries, points, num_neighbors, mask)


def neighbors_by_tree(
    queries: Tensor, points: Tensor, num_neighbors: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return indices and squared distances from a search tree of each cloud, in float64."""
    shape = (*queries.shape[:2], num_neighbors)
    indices, distances = torch.empty(shape, dtype=torch.int64), queries.new_empty(shape)
    workers = torch.get_num_threads() if shape[1] >= _LEAST_FOR_THREADS else 1
    numbers = range(1, num_neighbors + 1)  # a list keeps the last dimension where it is one
    for cloud in range(shape[0]):
        members = None if mask is None else mask[cloud].nonzero().squeeze(1)
        known = points[cloud] if members is None else points[cloud, members]
        tree = _tree_class()(known.numpy())
        answer: Any = tree.query(queries[cloud].numpy(), list(numbers), workers=workers)
        found, rows = torch.as_tensor(answer[0]), torch.as_tensor(answer[1])
        if members is not None:  # too few points: the tree gives index len(known), infinitely far
            missing = rows == len(known)
            rows = torch.where(missing, rows[:, :1], rows)
            found = torch.where(missing, found[:, :1], found)
            rows = members[rows]
        indices[cloud], distances[cloud] = rows, found.square()
    return indices, distances


def neighbors_by_distance(
    queries: Tensor, points: Tensor, num_neighbors: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return indices and squared distances from all distances, in tiles."""
    shape = (*queries.shape[:2], num_neighbors)
    indices = torch.empty(shape, dtype=torch.int64, device=points.device)
    distances = queries.new_empty(shape)
    points = points.transpose(1, 2).contiguous().transpose(1, 2)  # axes innermost: long rows
    for clouds, rows in _tiles(queries, points):
        tile = _squared_distances(queries[clouds, rows], points[clouds])
        if mask is not None:
            tile.masked_fill_(~mask[clouds].unsqueeze(1), torch.inf)
        found = tile.topk(num_neighbors, dim=-1, largest=False, sorted=True)
        distances[clouds, rows], indices[clouds, rows] = found
    if mask is not None:
        missing = distances == torch.inf
        indices = torch.where(missing, indices[..., :1], indices)
        distances = torch.where(missing, distances[..., :1], distances)
    return indices, distances


def ball_query(queries: Tensor, points: Tensor, num_samples: int, radius: float) -> Tensor:
    """Return indices (batch, queries, num_samples)."""
    shape = (*queries.shape[:2], num_samples)
    found = torch.empty(shape, dtype=torch.int64, device=points.device)
    num_points = points.shape[1]
    numbers = torch.arange(num_points, device=points.device)
    for clouds, rows in _tiles(queries, points):
        tile = _squared_distances(queries[clouds, rows], points[clouds])
        within = torch.where(tile <= radius * radius, numbers, num_points)
        first = within.topk(num_samples, dim=-1, largest=False, sorted=True).values
        filler = torch.where(first[..., :1] < num_points, first[..., :1], tile.argmin(-1, True))
        found[clouds, rows] = torch.where(first < num_points, first, filler)
    return found
