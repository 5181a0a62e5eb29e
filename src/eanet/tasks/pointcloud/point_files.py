"""Point cloud and mesh files to points, safely: every refusal names the file.

=====================  =========================================================================
file                   what comes out
=====================  =========================================================================
OFF, OBJ, STL          a mesh: points sampled evenly by area on its surface, always the same ones
PLY                    a mesh likewise; a PLY without faces: its vertices
XYZ, TXT, PTS, CSV     rows of numbers, separated by blanks, commas or semicolons; ``#`` begins a
                       comment; a first line with one number, the count of points, is skipped
NPY, NPZ               floating point, (points, channels); of an NPZ the array ``points``, or its
                       only one; nothing pickled is read
=====================  =========================================================================

Files of more columns than the network takes lose the last ones; fewer are refused. Textures and
materials that a mesh names are not opened.
"""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eanet.errors import UserError

__all__ = ["POINT_SUFFIXES", "check_points", "read_points"]

_MESHES = (".obj", ".off", ".ply", ".stl")
_TABLES = (".csv", ".pts", ".txt", ".xyz")
_ARRAYS = (".npy", ".npz")
#: what a folder of clouds is searched for
POINT_SUFFIXES = (*_MESHES, *_TABLES, *_ARRAYS)

#: a file of this size holds some twenty million points; a larger one is a mistake, or an attack
_MAX_BYTES = 2**30
_SURFACE_SEED = 2105


def read_points(
    path: str | os.PathLike[str], *, in_channels: int = 3, mesh_points: int = 2048
) -> Tensor:
    """Return the points of a file, float32, (points, in_channels).

    Args:
        path: the file; its ending says its format.
        in_channels: columns to take; 3 for x, y, z.
        mesh_points: points sampled on a mesh.

    Raises:
        UserError: the file is missing, damaged, of another kind, or its points are unusable.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in POINT_SUFFIXES:
        raise UserError(
            f"{path}: not a point cloud or mesh by its ending; known: {', '.join(POINT_SUFFIXES)}"
        )
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not 0 < size <= _MAX_BYTES:
        raise UserError(f"{path}: has {size} bytes; a file of points has 1 to {_MAX_BYTES}")
    if suffix in _ARRAYS:
        points = _read_array(path)
    elif suffix in _TABLES:
        points = _read_table(path)
    else:
        points = _read_mesh(path, in_channels, mesh_points)
    return check_points(points, str(path), in_channels=in_channels)


def check_points(points: np.ndarray, name: str, *, in_channels: int = 3) -> Tensor:
    """Return an array as float32 points, refusing what is no usable cloud.

    Args:
        points: any array.
        name: of the file, for the error.
        in_channels: columns wanted.

    Raises:
        UserError: integers, another layout, too few columns or points, or NaN.
    """
    if not np.issubdtype(points.dtype, np.floating):
        raise UserError(
            f"{name}: coordinates are {points.dtype}; save them as floating point (float32)"
        )
    if points.ndim != 2:
        raise UserError(f"{name}: expected (points, columns), got an array of shape {points.shape}")
    if points.shape[0] in (3, 6) and points.shape[1] > 6:
        raise UserError(
            f"{name}: expected (points, columns), got {points.shape}, which seems to be transposed"
        )
    if points.shape[1] < in_channels:
        raise UserError(
            f"{name}: has {points.shape[1]} columns, {in_channels} are needed "
            f"({'x, y, z' if in_channels == 3 else 'x, y, z and further ones'})"
        )
    if len(points) < 2:
        raise UserError(f"{name}: has {len(points)} point(s); a cloud needs more")
    points = points[:, :in_channels]
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(wrong):
        raise UserError(
            f"{name}: point {wrong[0]} is NaN or infinite ({len(wrong)} such points); remove them"
        )
    with np.errstate(over="ignore"):
        narrow = points.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise UserError(f"{name}: coordinates exceed the range of float32")
    if (points[:, :3] == points[0, :3]).all():
        raise UserError(f"{name}: all {len(points)} points are the same")
    if (narrow[:, :3] == narrow[0, :3]).all():
        raise UserError(
            f"{name}: all {len(points)} points are the same in float32; move them near the origin, "
            "or scale them"
        )
    return torch.from_numpy(narrow)


def _read_array(path: Path) -> np.ndarray:
    """Read an NPY or NPZ file."""
    try:
        found: Any = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            names = list(found.files)
            if "points" not in names and len(names) != 1:
                raise UserError(
                    f"{path}: holds the arrays {', '.join(names) or '(none)'}; one must be 'points'"
                )
            return np.asarray(found["points" if "points" in names else names[0]])
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, MemoryError) as error:
        raise UserError(f"{path}: not a readable NumPy file of numbers: {error}") from error


def _read_table(path: Path) -> np.ndarray:
    """Read rows of numbers."""
    try:
        text = path.read_text(encoding="utf-8", errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file of points: {error}") from error
    lines = text.replace(",", " ").replace(";", " ").splitlines()
    first = next((number for number, line in enumerate(lines) if line.split("#")[0].strip()), None)
    if first is None:
        raise UserError(f"{path}: holds no points")
    if lines[first].strip().isdecimal():  # the count of points, as PTS and some XYZ files begin
        lines = lines[first + 1 :]
    if not any(line.split("#")[0].strip() for line in lines):
        raise UserError(f"{path}: holds no points")
    try:
        return np.loadtxt(lines, dtype=np.float64, ndmin=2)
    except ValueError as error:
        why = str(error).partition("; use")[0]  # what follows is advice on NumPy's arguments
        raise UserError(f"{path}: rows must be numbers, equally many in each: {why}") from error


def _read_mesh(path: Path, in_channels: int, mesh_points: int) -> np.ndarray:
    """Sample the surface of a mesh, or take the vertices of one without faces."""
    import trimesh  # slow to import

    data = path.read_bytes()
    if path.suffix.lower() == ".off":
        data = _mend_off(data)
    try:
        # from memory and without a resolver: no other file is opened
        found: Any = trimesh.load(
            io.BytesIO(data),
            file_type=path.suffix[1:].lower(),
            process=False,
            skip_materials=True,
        )
        if isinstance(found, trimesh.Scene):
            found = found.to_mesh()
        vertices = np.asarray(found.vertices, dtype=np.float64)
        faces = np.asarray(getattr(found, "faces", np.zeros((0, 3), int)))
        normals = getattr(found, "face_normals", None) if in_channels >= 6 else None
        if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
            raise ValueError("a face names a vertex that does not exist")
        if not len(faces):
            return vertices
        if not np.isfinite(vertices).all():
            raise UserError(f"{path}: a vertex is NaN or infinite")
        if not found.area > 0:
            raise UserError(f"{path}: the mesh has no surface (its area is 0)")
        sampled: Any = trimesh.sample.sample_surface(found, mesh_points, seed=_SURFACE_SEED)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: not a readable {path.suffix[1:].upper()} file: {error}"
        ) from error
    points = np.asarray(sampled[0], dtype=np.float64)
    return points if normals is None else np.hstack([points, np.asarray(normals)[sampled[1]]])


def _mend_off(data: bytes) -> bytes:
    """Part the first line of an OFF file where the counts follow without a break (ModelNet)."""
    if data[:3] == b"OFF" and data[3:4] not in (b"\n", b"\r", b" ", b""):
        return b"OFF\n" + data[3:]
    return data
