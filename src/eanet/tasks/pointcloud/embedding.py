"""From points to features: pointwise layers and the neighbor embedding of PCT."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from eanet.nn.batch_statistics import update_running_statistics, uses_batch_statistics
from eanet.nn.linear import Linear
from eanet.nn.transformer import TokenBatchNorm
from eanet.ops.attention.block import BatchStatistics
from eanet.ops.attention.linear import linear
from eanet.ops.points import farthest_point_sample, gather_points, nearest_neighbors
from eanet.tasks.pointcloud.aggregation import (
    NormArguments,
    NormStatistics,
    aggregate_neighbors,
    compose_neighbors,
)

__all__ = ["Activation", "LocalAggregation", "NeighborEmbedding", "PointwiseLayer", "activate"]

Activation = Literal["relu", "leaky_relu", "none"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation in place; "leaky_relu" has slope 0.2."""
    if activation == "relu":
        return torch.relu_(x)
    return F.leaky_relu_(x, 0.2) if activation == "leaky_relu" else x


class PointwiseLayer(nn.Module):
    """Linear map, batch norm over all points, activation.

    Args:
        in_channels: width of the input.
        channels: width of the result.
        bias: of the linear map; batch norm makes it dead weight, published networks have some.
        activation: "relu", "leaky_relu" (slope 0.2) or "none".
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        bias: bool = False,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.linear = Linear(in_channels, channels, bias=bias)
        self.norm = TokenBatchNorm(channels)
        self.activation: Activation = activation

    def forward(
        self,
        x: Float[Tensor, "batch points in_channels"],
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> Float[Tensor, "batch points channels"]:
        """Return the features of every point."""
        return self.finish(self.linear(x), mask)

    def finish(
        self,
        x: Float[Tensor, "batch points channels"],
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> Float[Tensor, "batch points channels"]:
        """Return the features, for callers that apply the linear map themselves."""
        masks = () if mask is None else (mask,)
        return activate(self.norm(x, *masks), self.activation)


class LocalAggregation(nn.Module):
    """One stage of the neighbor embedding: what surrounds each center, as one feature.

    ``max_j relu(norm2(W2 relu(norm1(W1 (f_j - f_i, f_i)))))``, computed as
    :mod:`eanet.tasks.pointcloud.aggregation` says. Both linear maps have no bias.

    Args:
        in_channels: width of the points' features.
        channels: width of the result.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.linear1 = Linear(2 * in_channels, channels, bias=False)
        self.norm1 = TokenBatchNorm(channels)
        self.linear2 = Linear(channels, channels, bias=False)
        self.norm2 = TokenBatchNorm(channels)

    def forward(
        self,
        features: Float[Tensor, "batch points in_channels"],
        centers: Int[Tensor, "batch centers"] | None,
        neighbors: Int[Tensor, "batch centers num_neighbors"],
        mask: Bool[Tensor, "batch centers"] | None = None,
    ) -> Float[Tensor, "batch centers channels"]:
        """Aggregate the neighbors of each center.

        Args:
            features: of all points.
            centers: which points are centers; ``None`` for all in their order.
            neighbors: indices of points for each center.
            mask: True for centers that count in the statistics of batch norm.
        """
        relative, own = self.linear1.weight.split(self.in_channels, dim=1)
        near = linear(features, relative)
        at_centers = features if centers is None else gather_points(features, centers)
        own = linear(at_centers, own - relative)
        arguments = (near, own, neighbors, self.linear2.weight)
        norms = (_arguments_of(self.norm1), _arguments_of(self.norm2))
        masked = mask is not None and uses_batch_statistics(self.norm1)
        if masked or torch.compiler.is_compiling() or near.device.type == "meta":
            out, *found = compose_neighbors(*arguments, *norms, mask=mask if masked else None)
        else:
            out, *found = aggregate_neighbors(*arguments, *norms)
        num_centers = neighbors.shape[0] * neighbors.shape[1] if mask is None else mask.sum()
        for norm, statistics in zip((self.norm1, self.norm2), found, strict=True):
            _update(norm, statistics, num_centers * neighbors.shape[2])
        return out


def _arguments_of(norm: nn.BatchNorm1d) -> NormArguments:
    """Return what the aggregation needs of a batch norm."""
    if uses_batch_statistics(norm):
        return NormArguments(norm.weight, norm.bias, norm.eps)
    return NormArguments(norm.weight, norm.bias, norm.eps, norm.running_mean, norm.running_var)


def _update(norm: nn.BatchNorm1d, statistics: NormStatistics, count: int | Tensor) -> None:
    """Move the running statistics of a norm that trains."""
    if norm.training:
        number = torch.as_tensor(count, dtype=statistics.mean.dtype, device=statistics.mean.device)
        update_running_statistics(norm, BatchStatistics(*statistics, number))


class NeighborEmbedding(nn.Module):
    """The neighbor embedding of PCT: features of points from what surrounds them, in stages.

    Each stage samples furthest points as centers, or keeps all points in their order where
    features for every point are wanted, and aggregates the nearest neighbors of each.

    Args:
        in_channels: width of the points' features, coordinates among them.
        width: channels of the pointwise layers before the stages.
        stage_channels: channels of each stage.
        num_centers: points that each stage samples; ``None`` keeps all.
        num_neighbors: k of each stage.
        first_layers: 2 pointwise layers, or 1.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        width: int,
        stage_channels: tuple[int, ...],
        num_centers: tuple[int, ...] | None,
        num_neighbors: tuple[int, ...],
        first_layers: int,
    ) -> None:
        super().__init__()
        if not len(stage_channels) == len(num_neighbors) == len(num_centers or stage_channels):
            raise ValueError(
                "stage_channels, num_centers and num_neighbors need one value for each stage, got "
                f"{stage_channels}, {num_centers}, {num_neighbors}"
            )
        self.num_centers, self.num_neighbors = num_centers, num_neighbors
        self.points = nn.ModuleList(
            PointwiseLayer(in_channels if number == 0 else width, width)
            for number in range(first_layers)
        )
        self.stages = nn.ModuleList(
            LocalAggregation(before, after)
            for before, after in zip((width, *stage_channels), stage_channels, strict=False)
        )

    @property
    def min_points(self) -> int:
        """Return how many points a cloud needs."""
        return max([*(self.num_centers or (1,))[:1], *self.num_neighbors[:1]], default=1)

    def forward(
        self,
        points: Float[Tensor, "batch points in_channels"],
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch centers channels"],
        Float[Tensor, "batch centers 3"],
        Bool[Tensor, "batch centers"] | None,
    ]:
        """Return features of the last stage's centers, their coordinates, and their mask.

        A center that is sampled twice, of a cloud with fewer points than centers, counts twice.
        """
        coordinates, features = points[..., :3], points
        for layer in self.points:
            features = layer(features, *(() if mask is None else (mask,)))
        neighbors = None
        for number, stage in enumerate(self.stages):
            if self.num_centers is None:
                # all stages look at the same points; with the same k, at the same neighbors
                k = self.num_neighbors[number]
                if neighbors is None or neighbors.shape[2] != k:
                    neighbors, _ = nearest_neighbors(coordinates, coordinates, k, mask=mask)
                features = stage(features, None, neighbors, mask)
                continue
            centers = farthest_point_sample(coordinates, self.num_centers[number], mask=mask)
            chosen = gather_points(coordinates, centers)
            neighbors, _ = nearest_neighbors(
                chosen, coordinates, self.num_neighbors[number], mask=mask
            )
            features = stage(features, centers, neighbors)
            # every center is a point that takes part: nothing is masked from here on
            coordinates, mask = chosen, None
        return features, coordinates, mask
