"""Clouds made ready for a network: chosen points, augmentation. Nothing is changed in place.

Random choices come from torch's global generator, which the loader seeds for each sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.errors import UserError
from eanet.tasks.pointcloud.samples import Sample

__all__ = [
    "Augmentation",
    "PointChoice",
    "Rotation",
    "choose_points",
    "drop_points",
    "jitter",
    "normalize_to_unit_sphere",
    "rotate",
    "scale_and_shift",
]

#: turns about the vertical axis, any rotation, or none
Rotation = Literal["none", "vertical", "any"]
#: which points of a stored cloud a training sample gets
PointChoice = Literal["first", "random"]

_Points = Float[Tensor, "points channels"]
_AXES = {"x": 0, "y": 1, "z": 2}


def normalize_to_unit_sphere(points: _Points) -> _Points:
    """Return the cloud with its mean at 0 and its furthest point at distance 1.

    Raises:
        ValueError: all points are the same, or they lie too far apart for their type.
    """
    centered = points[:, :3] - points[:, :3].double().mean(0).to(points.dtype)
    largest = centered.abs().max()
    if not largest > 0:
        raise ValueError("all points are the same")
    if largest.isinf():
        raise ValueError(f"coordinates differ by more than {points.dtype} can hold")
    radius = centered.norm(dim=1).max()
    if radius.isinf() or radius == 0:  # a square overflowed, or vanished
        centered = centered / largest
        radius = centered.norm(dim=1).max()
    return torch.cat([centered / radius, points[:, 3:]], dim=1)


def scale_and_shift(
    points: _Points, scale: Float[Tensor, "3"], shift: Float[Tensor, "3"]
) -> _Points:
    """Return the cloud with its coordinates times a scale plus a shift, axis by axis."""
    coordinates = points[:, :3] * scale.to(points.dtype) + shift.to(points.dtype)
    return torch.cat([coordinates, points[:, 3:]], dim=1)


def drop_points(points: _Points, dropped: Bool[Tensor, " points"]) -> _Points:
    """Return the cloud with dropped points overwritten by the first one.

    Their number stays, so that clouds still stack; networks see the first point many times.
    """
    return torch.where(dropped.unsqueeze(1), points[:1], points)


def jitter(points: _Points, deviation: float, *, limit: float = 3.0) -> _Points:
    """Return the cloud with normal noise on its coordinates, cut at ``limit`` deviations."""
    noise = (deviation * torch.randn(len(points), 3)).clamp(-limit * deviation, limit * deviation)
    return torch.cat([points[:, :3] + noise, points[:, 3:]], dim=1)


def rotate(points: _Points, rotation: Rotation, *, up: str = "y") -> _Points:
    """Return the cloud under a random rotation; normals (channels 3 to 5) turn along.

    Args:
        points: with x, y, z, and normals where there are six channels.
        rotation: "vertical" turns about the axis ``up``, "any" is uniform over all rotations.
        up: "x", "y" or "z".
    """
    if rotation == "none":
        return points
    if rotation == "vertical":
        angle = 2 * math.pi * float(torch.rand(()))
        first, second = (axis for axis in range(3) if axis != _AXES[up])
        matrix = torch.eye(3)
        matrix[first, first] = matrix[second, second] = math.cos(angle)
        matrix[first, second], matrix[second, first] = math.sin(angle), -math.sin(angle)
    else:
        # the orthogonal factor of a normal matrix is uniform once its signs are fixed
        matrix, triangle = torch.linalg.qr(torch.randn(3, 3))
        matrix = matrix * triangle.diagonal().sign()
        matrix[:, 0] *= torch.linalg.det(matrix)
    turned = [points[:, start : start + 3] @ matrix for start in (0, 3)[: points.shape[1] // 3]]
    return torch.cat([*turned, points[:, 3 * len(turned) :]], dim=1)


def choose_points(sample: Sample, num_points: int | None, choice: PointChoice) -> Sample:
    """Return a sample with so many of its points, labels along.

    Args:
        sample: a cloud.
        num_points: how many; ``None`` for all.
        choice: the first, or a random choice without replacement in random order.

    Raises:
        UserError: the cloud has fewer points.
    """
    wanted = len(sample) if num_points is None else num_points
    if len(sample) < wanted:
        raise UserError(
            f"{sample.name}: has {len(sample)} points, {wanted} are wanted; "
            f"set options.num_points to at most {len(sample)}"
        )
    if choice == "random":
        return sample.take(torch.randperm(len(sample))[:wanted])
    return sample if wanted == len(sample) else sample.take(torch.arange(wanted))


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training cloud, in this order.

    Args:
        rotation: "none", "vertical" or "any".
        up: the vertical axis.
        point_dropout: largest share of dropped points; the share is uniform below it (PCT: 0.875).
        scale: smallest and largest factor of each axis (PCT: 2/3 and 3/2).
        shift: largest shift of each axis to either side (PCT: 0.2).
        jitter: standard deviation of the noise on coordinates.

    Raises:
        ValueError: a value is outside its range.
    """

    rotation: Rotation = "none"
    up: str = "y"
    point_dropout: float = 0.0
    scale: Sequence[float] = (1.0, 1.0)
    shift: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.rotation not in ("none", "vertical", "any"):
            raise ValueError(f"rotation must be none, vertical or any, got {self.rotation!r}")
        if self.up not in _AXES:
            raise ValueError(f"up must be x, y or z, got {self.up!r}")
        if not 0 <= self.point_dropout < 1:
            raise ValueError(f"point_dropout must be within [0, 1), got {self.point_dropout}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two factors above 0 in order, got {self.scale}")
        if self.shift < 0 or self.jitter < 0:
            raise ValueError(
                f"shift and jitter must be at least 0, got {self.shift} and {self.jitter}"
            )

    def __call__(self, points: _Points) -> _Points:
        """Return a changed copy."""
        points = rotate(points, self.rotation, up=self.up)
        if self.point_dropout:
            share = self.point_dropout * torch.rand(())
            points = drop_points(points, torch.rand(len(points)) <= share)
        low, high = self.scale
        if (low, high) != (1, 1) or self.shift:
            scale = low + (high - low) * torch.rand(3)
            points = scale_and_shift(points, scale, self.shift * (2 * torch.rand(3) - 1))
        return jitter(points, self.jitter) if self.jitter else points
