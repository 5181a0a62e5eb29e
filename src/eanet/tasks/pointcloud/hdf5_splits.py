"""A split that is spread over HDF5 files, as one array."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eanet.errors import UserError
from eanet.tasks.pointcloud.clouds import CloudArrays
from eanet.tasks.pointcloud.hdf5_files import read_hdf5

__all__ = ["read_split"]


def read_split(
    files: Sequence[Path], name: str, num_classes: int | None, *, parts: bool
) -> CloudArrays:
    """Read the files of a split into one array."""
    found = [read_hdf5(file, parts=parts) for file in files]
    sizes = {(cloud.points.shape[1], cloud.points.shape[2]) for cloud in found}
    if len(sizes) > 1:
        raise UserError(f"{files[0].parent}: files of one split differ in points: {sorted(sizes)}")
    labels = np.concatenate([cloud.labels for cloud in found])
    if num_classes is not None and labels.max() >= num_classes:
        raise UserError(
            f"{files[0].parent}: label {labels.max()} is outside 0..{num_classes - 1}, the classes "
            "that the list of names has"
        )
    all_parts = None
    if parts:
        all_parts = np.concatenate([cloud.parts for cloud in found if cloud.parts is not None])
    return CloudArrays(
        np.concatenate([cloud.points for cloud in found]), labels.tolist(), all_parts, name
    )
