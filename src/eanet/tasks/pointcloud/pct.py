"""PCT and EAT: point cloud transformers for classification and part segmentation.

EAT is PCT (arXiv 2012.09688) with external attention in place of its self-attention (section 4.7,
arXiv 2105.02358). Both are built here from one encoder::

    points -> neighbor embedding, or two pointwise layers (simple form) -> two pointwise layers
           -> four attention layers in sequence -> all five results side by side -> 1024 channels

Clouds are (batch, points, channels), x, y, z first. Clouds of different sizes are padded and come
with a mask, True for points that take part (:func:`pad_clouds`).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from eanet.nn.linear import Linear
from eanet.ops.attention import Norm
from eanet.ops.attention.linear import linear
from eanet.tasks.pointcloud.attention import AttentionKind, ExternalForm, attention_layer
from eanet.tasks.pointcloud.embedding import (
    Activation,
    NeighborEmbedding,
    PointwiseLayer,
    activate,
)

__all__ = ["PartSegmenter", "PointClassifier", "PointEncoder", "pad_clouds"]

#: points of a batch beyond which evaluation goes over the widest maps in parts
_MAX_POINTS_AT_ONCE = 2**16


def pad_clouds(clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack clouds of different sizes: the points (batch, most points, channels), and the mask.

    >>> points, mask = pad_clouds([torch.ones(2, 3), torch.ones(4, 3)])
    >>> points.shape, mask.sum(1).tolist()
    (torch.Size([2, 4, 3]), [2, 4])
    """
    points = nn.utils.rnn.pad_sequence(list(clouds), batch_first=True)
    sizes = torch.tensor([len(cloud) for cloud in clouds], device=points.device)
    return points, torch.arange(points.shape[1], device=points.device) < sizes.unsqueeze(1)


def _check_points(points: Tensor, in_channels: int, min_points: int, mask: Tensor | None) -> None:
    """Refuse what is no batch of clouds, saying what it seems to be instead."""
    _check_layout(points, in_channels)
    if points.shape[1] < min_points:
        raise ValueError(
            f"the network needs clouds of at least {min_points} points, got {points.shape[1]}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != points.shape[:2]):
        raise ValueError(
            f"mask must be boolean of shape {tuple(points.shape[:2])} (True = takes part), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if points.is_meta or torch.compiler.is_compiling():
        return
    if mask is not None and not bool(mask.any(1).all()):
        raise ValueError("a cloud of the batch has no point that takes part")
    finite = torch.isfinite(points).all(2)
    if not bool((finite if mask is None else finite | ~mask).all()):
        raise ValueError("points hold NaN or infinite values")


def _check_layout(points: Tensor, in_channels: int) -> None:
    """Refuse another layout or type than (batch, points, channels) of floating point."""
    shape = tuple(points.shape)
    if points.ndim != 3 or points.shape[2] != in_channels:
        hint = ""
        if points.ndim == 3 and points.shape[1] == in_channels:
            hint = "; it seems to be (batch, channels, points): transpose(1, 2) first"
        elif points.ndim == 2:
            hint = "; a single cloud needs a batch dimension: points[None]"
        raise ValueError(f"points must be (batch, points, {in_channels}), got {shape}{hint}")
    if not points.is_floating_point():
        raise ValueError(f"points must be floating point, got {points.dtype}")
    if points.shape[0] == 0:
        raise ValueError("the batch holds no cloud")


class PointEncoder(nn.Module):
    """What classification and segmentation share: from points to ``out_channels`` features.

    Args:
        in_channels: values of each point, x, y, z first.
        attention: "external" (EAT), "offset" (PCT), "plain" (naive PCT) or "none".
        num_layers: attention layers.
        embedding: "neighbors" as the full PCT, "pointwise" as the simple and the naive one.
        width: channels of the first pointwise layers.
        stage_channels: channels of the neighbor embedding's stages.
        num_centers: points that each stage samples; ``None`` keeps all, in their order.
        num_neighbors: k of each stage.
        first_layers: pointwise layers before the stages.
        middle_layers: pointwise layers before the attention.
        position: add an embedding of the coordinates before every attention layer.
        out_channels: width of the result.
        num_slots: of external attention, as the following.
        query: project points first.
        form: see :mod:`eanet.tasks.pointcloud.attention`.
        norm: "double" or "softmax".
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        attention: AttentionKind = "external",
        num_layers: int = 4,
        embedding: Literal["neighbors", "pointwise"] = "neighbors",
        width: int = 64,
        stage_channels: Sequence[int] = (128, 256),
        num_centers: Sequence[int] | None = (512, 256),
        num_neighbors: Sequence[int] = (32, 32),
        first_layers: int = 2,
        middle_layers: int = 2,
        position: bool = False,
        out_channels: int = 1024,
        num_slots: int = 64,
        query: bool = True,
        form: ExternalForm = "offset",
        norm: Norm = "double",
    ) -> None:
        super().__init__()
        if in_channels < 3:
            raise ValueError(f"in_channels must be at least 3 (x, y, z), got {in_channels}")
        if embedding not in ("neighbors", "pointwise"):
            raise ValueError(f"embedding must be 'neighbors' or 'pointwise', got {embedding!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        neighbors = embedding == "neighbors"
        self.embedding = NeighborEmbedding(
            in_channels,
            width=width,
            stage_channels=tuple(stage_channels) if neighbors else (),
            num_centers=None if num_centers is None else tuple(num_centers) if neighbors else (),
            num_neighbors=tuple(num_neighbors) if neighbors else (),
            first_layers=first_layers,
        )
        channels = stage_channels[-1] if neighbors else width
        self.middle = nn.ModuleList(
            PointwiseLayer(channels, channels) for _ in range(middle_layers)
        )
        self.position = Linear(3, channels) if position else None
        self.layers = nn.ModuleList(
            attention_layer(
                attention, channels, num_slots=num_slots, query=query, form=form, norm=norm
            )
            for _ in range(num_layers)
        )
        # the full form has the embedding beside the layers
        self.keeps_embedding = neighbors
        joined = channels * (num_layers + neighbors)
        self.fuse = PointwiseLayer(joined, out_channels, activation="leaky_relu")

    @property
    def min_points(self) -> int:
        """How many points a cloud needs."""
        return self.embedding.min_points

    def features(
        self,
        points: Float[Tensor, "batch points in_channels"],
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return embedding and attention layers side by side, and their mask."""
        _check_points(points, self.in_channels, self.min_points, mask)
        embedded, coordinates, mask = self.embedding(points, mask)
        masks = () if mask is None else (mask,)
        x = embedded
        for layer in self.middle:
            x = layer(x, *masks)
        position = None if self.position is None else self.position(coordinates)
        found: list[Tensor] = []
        for layer in self.layers:
            x = layer(x if position is None else x + position, *masks)
            found.append(x)
        if self.keeps_embedding:
            found.append(embedded)
        return torch.cat([part.to(x.dtype) for part in found], dim=-1), mask

    def forward(
        self,
        points: Float[Tensor, "batch points in_channels"],
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> tuple[Float[Tensor, "batch centers out_channels"], Bool[Tensor, "batch centers"] | None]:
        """Return the features of every center, or of every point, and their mask."""
        joined, mask = self.features(points, mask)
        return self.fuse(joined, mask), mask


def _pool(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return maximum and mean over the points that take part."""
    if mask is None:
        return x.amax(1), x.mean(1)
    taking_part = mask.unsqueeze(2)
    largest = x.masked_fill(~taking_part, -torch.inf).amax(1)
    return largest, x.masked_fill(~taking_part, 0.0).sum(1) / taking_part.sum(1)


class _HeadLayer(nn.Module):
    """Linear map, batch norm over the clouds, activation, dropout."""

    def __init__(
        self, in_channels: int, channels: int, *, bias: bool, activation: Activation, dropout: float
    ) -> None:
        super().__init__()
        self.linear = Linear(in_channels, channels, bias=bias)
        self.norm = nn.BatchNorm1d(channels)
        self.activation: Activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch width"]:
        """Return the features of every cloud."""
        if self.norm.training and len(x) == 1:
            raise ValueError(
                "batch norm over clouds needs more than one cloud in a training batch, got 1"
            )
        return self.dropout(activate(self.norm(self.linear(x)), self.activation))


class PointClassifier(nn.Module):
    """A class for every cloud.

    Args:
        num_classes: classes; 0 returns the features before the last layer.
        in_channels: values of each point, x, y, z first.
        head_channels: widths of the head's two layers.
        head_activation: "leaky_relu" as PCT's PyTorch code, "relu" as that of the authors.
        dropout: probability in the head.
        encoder: further arguments of :class:`PointEncoder`.

    >>> network = PointClassifier(5, num_centers=(16, 8), num_neighbors=(4, 4)).eval()
    >>> network(torch.rand(2, 20, 3)).shape
    torch.Size([2, 5])
    """

    #: name and arguments, set by `eanet.create_model`; where published weights come from
    config: dict[str, Any]
    facts: dict[str, Any]

    def __init__(
        self,
        num_classes: int = 40,
        in_channels: int = 3,
        *,
        head_channels: Sequence[int] = (512, 256),
        head_activation: Activation = "leaky_relu",
        dropout: float = 0.5,
        **encoder: Any,
    ) -> None:
        super().__init__()
        self.encoder = PointEncoder(in_channels, **encoder)
        widths = (self.encoder.out_channels, *head_channels)
        self.head = nn.Sequential(
            *(
                # PCT's first layer has no bias
                _HeadLayer(
                    before, after, bias=number > 0, activation=head_activation, dropout=dropout
                )
                for number, (before, after) in enumerate(pairwise(widths))
            )
        )
        self.classifier = Linear(widths[-1], num_classes) if num_classes else nn.Identity()

    @property
    def min_points(self) -> int:
        """How many points a cloud needs."""
        return self.encoder.min_points

    def forward(
        self,
        points: Float[Tensor, "batch points in_channels"],
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Return logits.

        Args:
            points: clouds.
            mask: True for points that take part.

        Raises:
            ValueError: too few points, another layout, integers, NaN; in training a batch of one.
        """
        features, mask = self.encoder(points, mask)
        largest, _ = _pool(features, mask)
        return self.classifier(self.head(largest))


class PartSegmenter(nn.Module):
    """A part for every point, given the category of the object.

    Args:
        num_parts: parts of all categories together.
        num_categories: categories; 0 for a network that is not told the category.
        in_channels: values of each point, x, y, z first.
        label_channels: width of the category's embedding.
        head_channels: widths of the head's two layers.
        dropout: probability after the head's first layer.
        encoder: further arguments of :class:`PointEncoder`; nothing is sampled, so that features
            stay in the order of the points.

    >>> network = PartSegmenter(6, 2, num_neighbors=(4, 4)).eval()
    >>> network(torch.rand(2, 20, 3), torch.tensor([0, 1])).shape
    torch.Size([2, 20, 6])
    """

    config: dict[str, Any]
    facts: dict[str, Any]

    def __init__(
        self,
        num_parts: int = 50,
        num_categories: int = 16,
        in_channels: int = 3,
        *,
        label_channels: int = 64,
        head_channels: Sequence[int] = (512, 256),
        dropout: float = 0.5,
        **encoder: Any,
    ) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.encoder = PointEncoder(in_channels, **encoder, num_centers=None)
        width = self.encoder.out_channels
        self.label = (
            _HeadLayer(
                num_categories, label_channels, bias=False, activation="leaky_relu", dropout=0
            )
            if num_categories
            else None
        )
        joined = 3 * width + (label_channels if num_categories else 0)
        first, second = head_channels
        self.head1 = PointwiseLayer(joined, first, bias=True)
        self.dropout = nn.Dropout(dropout)
        self.head2 = PointwiseLayer(first, second, bias=True)
        self.classifier = Linear(second, num_parts)

    @property
    def min_points(self) -> int:
        """How many points a cloud needs."""
        return self.encoder.min_points

    def forward(
        self,
        points: Float[Tensor, "batch points in_channels"],
        categories: Int[Tensor, " batch"] | None = None,
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> Float[Tensor, "batch points parts"]:
        """Return logits of every point, in the order of the points.

        Args:
            points: clouds.
            categories: of each cloud, where the network is told.
            mask: True for points that take part; logits of others mean nothing.

        Raises:
            ValueError: as :meth:`PointClassifier.forward`, or categories are missing or unknown.
        """
        joined, mask = self.encoder.features(points, mask)
        labels = self._labels(categories, len(points), joined)
        if not self.training and joined.shape[0] * joined.shape[1] > _MAX_POINTS_AT_ONCE:
            return self._forward_in_parts(joined, labels, mask)
        features = self.encoder.fuse(joined, mask)
        shared = self._shared(*_pool(features, mask), labels)
        return self._point_logits(features, shared, mask)

    def _labels(self, categories: Tensor | None, batch: int, like: Tensor) -> Tensor | None:
        """Return the embedding of the categories."""
        if self.label is None:
            return None
        if categories is None or categories.shape != (batch,) or categories.is_floating_point():
            given = "none" if categories is None else f"{categories.dtype} {categories.shape}"
            raise ValueError(f"the network needs the category of each cloud (int64), got {given}")
        if not (categories.is_meta or torch.compiler.is_compiling()):
            wrong = (categories < 0) | (categories >= self.num_categories)
            if bool(wrong.any()):
                raise ValueError(
                    f"categories must be within 0..{self.num_categories - 1}, "
                    f"got {categories[wrong][0].item()}"
                )
        return self.label(F.one_hot(categories.long(), self.num_categories).to(like.dtype))

    def _shared(self, largest: Tensor, mean: Tensor, labels: Tensor | None) -> Tensor:
        """Return the first head layer's share of what is the same for all points of a cloud."""
        parts = [largest, mean] if labels is None else [largest, mean, labels]
        weight = self.head1.linear.weight[:, self.encoder.out_channels :]
        return linear(torch.cat(parts, dim=1), weight, self.head1.linear.bias)

    def _point_logits(self, features: Tensor, shared: Tensor, mask: Tensor | None) -> Tensor:
        """Return logits from the features of points and what their cloud adds."""
        weight = self.head1.linear.weight[:, : self.encoder.out_channels]
        x = self.head1.finish(linear(features, weight) + shared.unsqueeze(1), mask)
        return self.classifier(self.head2(self.dropout(x), mask))

    def _forward_in_parts(
        self, joined: Tensor, labels: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return the same logits for very large clouds: the widest maps are computed twice."""
        num_points = joined.shape[1]
        size = max(_MAX_POINTS_AT_ONCE // len(joined), 1)
        parts = [slice(first, first + size) for first in range(0, num_points, size)]
        largest = joined.new_full((len(joined), self.encoder.out_channels), -math.inf)
        total = torch.zeros_like(largest)
        for part in parts:
            features = self.encoder.fuse(joined[:, part])
            if mask is None:
                largest = torch.maximum(largest, features.amax(1))
                total += features.sum(1)
            else:
                taking_part = mask[:, part].unsqueeze(2)
                highest = features.masked_fill(~taking_part, -torch.inf).amax(1)
                largest = torch.maximum(largest, highest)
                total += features.masked_fill(~taking_part, 0.0).sum(1)
        count = num_points if mask is None else mask.sum(1, keepdim=True)
        shared = self._shared(largest, total / count, labels)
        logits = [
            self._point_logits(self.encoder.fuse(joined[:, part]), shared, None) for part in parts
        ]
        return torch.cat(logits, dim=1)
