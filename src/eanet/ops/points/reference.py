"""The definitions line by line: any type, any device, slow, and independent of other backends."""

import torch
from torch import Tensor

__all__ = ["ball_query", "farthest_point_sample", "nearest_neighbors"]


def _squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Return (batch, queries, points), by direct differences."""
    return (queries.unsqueeze(2) - points.unsqueeze(1)).square().sum(-1)


def farthest_point_sample(
    points: Tensor, num_samples: int, start: Tensor, valid: Tensor | None
) -> Tensor:
    """Return indices (batch, num_samples); see :func:`eanet.ops.points.farthest_point_sample`."""
    chosen = torch.zeros(points.shape[0], num_samples, dtype=torch.int64, device=points.device)
    for cloud in range(points.shape[0]):
        current = int(start[cloud])
        nearest = torch.full_like(points[cloud, :, 0], torch.inf)
        if valid is not None:
            nearest[~valid[cloud]] = -1.0  # below every distance: never the furthest
        for number in range(num_samples):
            chosen[cloud, number] = current
            difference = points[cloud] - points[cloud, current]
            nearest = torch.minimum(nearest, difference.square().sum(-1))
            current = int((nearest == nearest.max()).nonzero()[0])
    return chosen


def nearest_neighbors(
    queries: Tensor, points: Tensor, num_neighbors: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return indices and squared distances by (distance, index)."""
    distances = _squared_distances(queries, points)
    if mask is not None:
        distances = distances.masked_fill(~mask.unsqueeze(1), torch.inf)
    ordered, indices = distances.sort(dim=-1, stable=True)
    ordered, indices = ordered[..., :num_neighbors], indices[..., :num_neighbors]
    missing = ordered == torch.inf
    indices = torch.where(missing, indices[..., :1], indices)
    return indices, torch.where(missing, ordered[..., :1], ordered)


def ball_query(queries: Tensor, points: Tensor, num_samples: int, radius: float) -> Tensor:
    """Return indices (batch, queries, num_samples)."""
    distances = _squared_distances(queries, points)
    found = torch.zeros(*distances.shape[:2], num_samples, dtype=torch.int64, device=points.device)
    for cloud, row in torch.cartesian_prod(*map(torch.arange, distances.shape[:2])).view(-1, 2):
        within = (distances[cloud, row] <= radius * radius).nonzero().flatten()[:num_samples]
        first = within[0] if len(within) else distances[cloud, row].argmin()
        found[cloud, row] = first
        found[cloud, row, : len(within)] = within
    return found
