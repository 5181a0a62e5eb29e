"""HDF5 files of clouds, safely: only arrays that lie in the file itself are read.

HDF5 lets a file name others (external storage, external links, virtual data sets) whose content
would be read as if it were its own. Such a file is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eanet.errors import UserError

__all__ = ["Hdf5Clouds", "read_hdf5"]

#: entries of an array: ten times ShapeNetPart in one file
_MAX_ENTRIES = 2**31


@dataclass
class Hdf5Clouds:
    """What one file holds.

    Args:
        points: float32, (clouds, points, 3).
        labels: int64, (clouds).
        parts: as stored, (clouds, points), or ``None``.
    """

    points: np.ndarray
    labels: np.ndarray
    parts: np.ndarray | None


def read_hdf5(path: Path, *, parts: bool) -> Hdf5Clouds:
    """Read the clouds of a file.

    Args:
        path: the file, with the keys ``data``, ``label`` and, for parts, ``pid`` or ``seg``.
        parts: whether parts are wanted.

    Raises:
        UserError: the file is damaged, lacks a key, refers to others, or holds unusable values.
    """
    import h5py  # slow to import, and only these files need it

    try:
        with h5py.File(path, "r") as file:
            points = _read(file, ["data"], path)
            labels = _read(file, ["label"], path)
            found = _read(file, ["pid", "seg"], path) if parts else None
    except UserError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: not a readable HDF5 file: {error}") from error
    if points.ndim != 3 or points.shape[2] != 3 or not np.issubdtype(points.dtype, np.floating):
        raise UserError(
            f"{path}: 'data' must be floating point (clouds, points, 3), got {points.dtype} "
            f"{points.shape}"
        )
    if not len(points) or points.shape[1] < 2:
        raise UserError(f"{path}: 'data' holds no clouds: {points.shape}")
    points = points.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=(1, 2)))
    if len(wrong):
        raise UserError(f"{path}: cloud {wrong[0]} holds NaN or infinite values")
    same = np.flatnonzero((points == points[:, :1]).all(axis=(1, 2)))
    if len(same):
        raise UserError(f"{path}: all points of cloud {same[0]} are the same")
    if labels.size != len(points) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: 'label' must hold {len(points)} whole numbers, got {labels.dtype} "
            f"{labels.shape}"
        )
    labels = labels.reshape(-1).astype(np.int64)
    if labels.min() < 0:
        raise UserError(f"{path}: 'label' has the negative value {labels.min()}")
    if found is not None and (
        found.shape != points.shape[:2] or not np.issubdtype(found.dtype, np.integer)
    ):
        raise UserError(
            f"{path}: parts must be whole numbers {points.shape[:2]}, "
            f"got {found.dtype} {found.shape}"
        )
    return Hdf5Clouds(points, labels, found)


def _read(file: Any, names: list[str], path: Path) -> np.ndarray:
    """Read one array under the first of some names that exists."""
    import h5py

    name = next((name for name in names if name in file), None)
    if name is None:
        known = ", ".join(file.keys()) or "nothing"
        raise UserError(f"{path}: has no {' or '.join(map(repr, names))}; it has {known}")
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise UserError(f"{path}: {name!r} is a link to elsewhere, which is not followed")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: {name!r} is a group, not an array")
    if dataset.is_virtual or dataset.external:
        raise UserError(f"{path}: {name!r} is stored in other files, which are not opened")
    if dataset.size is None or dataset.size > _MAX_ENTRIES:
        raise UserError(f"{path}: {name!r} claims {dataset.size} values")
    return np.asarray(dataset[()])
