"""Clouds to index: held in memory, or read from their files when they are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eanet.data.splits import Dataset, Subset
from eanet.errors import UserError
from eanet.tasks.pointcloud.point_files import read_points
from eanet.tasks.pointcloud.samples import Sample
from eanet.tasks.pointcloud.transforms import normalize_to_unit_sphere

__all__ = [
    "CloudArrays",
    "CloudFiles",
    "class_facts",
    "in_unit_sphere",
    "join_clouds",
    "labels_of",
]


@dataclass
class CloudArrays:
    """Clouds held in memory.

    Args:
        points: float32, (clouds, points, channels).
        labels: class or category of each cloud.
        parts: (clouds, points), or ``None``.
        name: how the data set is called in the names of its samples.
    """

    points: np.ndarray
    labels: Sequence[int]
    parts: np.ndarray | None
    name: str

    def __len__(self) -> int:
        """Return the number of clouds."""
        return len(self.points)

    def __getitem__(self, index: int) -> Sample:
        """Return one cloud."""
        parts = None if self.parts is None else torch.from_numpy(self.parts[index].astype(np.int64))
        points = torch.from_numpy(self.points[index])
        return Sample(points, int(self.labels[index]), parts, f"{self.name}[{index}]")


@dataclass
class CloudFiles:
    """Files of clouds or meshes; each is read when it is asked for, and brought to the unit sphere.

    Args:
        paths: the files.
        labels: class of each.
        in_channels: columns to take.
        part_column: column of the part, within a text file; ``None`` without parts.
        mesh_points: points sampled on a mesh.
        max_points: take the first so many; ``None`` for all.
    """

    paths: Sequence[Path]
    labels: Sequence[int]
    in_channels: int = 3
    part_column: int | None = None
    mesh_points: int = 2048
    max_points: int | None = None

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Read one file."""
        path = self.paths[index]
        parts = None
        if self.part_column is None:
            rows = read_points(path, in_channels=self.in_channels, mesh_points=self.mesh_points)
        else:
            table = read_points(path, in_channels=self.part_column + 1)
            rows, parts = table[:, : self.in_channels], table[:, self.part_column].long()
            if not torch.equal(parts.to(table.dtype), table[:, self.part_column]):
                raise UserError(f"{path}: column {self.part_column + 1} must hold whole numbers")
        if self.max_points is not None:
            rows = rows[: self.max_points]
            parts = None if parts is None else parts[: self.max_points]
        try:
            points = normalize_to_unit_sphere(rows)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        return Sample(points, int(self.labels[index]), parts, str(path))


def labels_of(dataset: Dataset) -> list[int]:
    """Return the class of every cloud, without reading any."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return [labels[index] for index in dataset.indices]
    assert isinstance(dataset, CloudArrays | CloudFiles)
    return [int(label) for label in dataset.labels]


def class_facts(
    class_names: Sequence[str], in_channels: int, *, unit_sphere: bool
) -> dict[str, Any]:
    """Collect what a data set says of itself."""
    return {
        "class_names": list(class_names),
        "num_classes": len(class_names),
        "in_channels": in_channels,
        "unit_sphere": unit_sphere,
    }


def in_unit_sphere(points: np.ndarray) -> bool:
    """Tell whether clouds have their mean about 0 and reach about radius 1."""
    largest = np.linalg.norm(points[:, :, :3], axis=2).max(axis=1)
    centers = np.abs(points[:, :, :3].mean(axis=1))
    return bool((np.abs(largest - 1) < 0.1).all() and (centers < 0.1).all())


def join_clouds(first: Any, second: Any) -> Any:
    """Return two splits of the same kind as one."""
    labels = [*first.labels, *second.labels]
    if isinstance(first, CloudFiles):
        return replace(first, paths=[*first.paths, *second.paths], labels=labels)
    parts = None if first.parts is None else np.concatenate([first.parts, second.parts])
    points = np.concatenate([first.points, second.points])
    return replace(first, points=points, labels=labels, parts=parts)
