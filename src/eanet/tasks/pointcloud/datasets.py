"""Data sets of clouds: ModelNet40 and ShapeNetPart in both their formats, and any folder of files.

Numbers of classes, categories and parts are taken from the data, never from constants, so that any
data set in one of these layouts is read.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eanet.data.files import require_root
from eanet.data.splits import Dataset, Splits, Subset, carve_validation
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.pointcloud.hdf5_files import read_hdf5
from eanet.tasks.pointcloud.point_files import POINT_SUFFIXES, read_points
from eanet.tasks.pointcloud.samples import Sample
from eanet.tasks.pointcloud.transforms import normalize_to_unit_sphere

__all__ = ["CloudArrays", "CloudFiles", "ModelNet", "PointFolder", "ShapeNetPart", "labels_of"]

#: of the choice of test samples where a folder has none of its own; never the seed of a run
_TEST_SPLIT_SEED = 2105


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


def part_facts(part_names: Sequence[str], part_ranges: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Collect what a data set says of its parts."""
    return {
        "part_names": list(part_names),
        "num_parts": len(part_names),
        "part_ranges": [list(pair) for pair in part_ranges],
    }


def _in_unit_sphere(points: np.ndarray) -> bool:
    """Tell whether clouds have their mean about 0 and reach about radius 1."""
    largest = np.linalg.norm(points[:, :, :3], axis=2).max(axis=1)
    centers = np.abs(points[:, :, :3].mean(axis=1))
    return bool((np.abs(largest - 1) < 0.1).all() and (centers < 0.1).all())


def _natural_order(path: Path) -> list[Any]:
    """Sort ``train2`` before ``train10``."""
    return [int(text) if text.isdecimal() else text for text in re.split(r"(\d+)", path.name)]


def _files_of(folder: Path, lists: Sequence[str], patterns: Sequence[str]) -> list[Path]:
    """Return the HDF5 files of a split: those its list names, or all of a pattern, in order."""
    for name in lists:
        if not (folder / name).is_file():
            continue
        # lists hold the paths of somebody else's folder: only the last part counts
        names = [Path(line.strip()).name for line in _lines(folder / name)]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder / name}: {missing[0]!r} is not in the folder")
        return [folder / name for name in names]
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return sorted(found, key=_natural_order)


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file: {error}") from error


def _read_split(
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


@register_dataset("modelnet40")
class ModelNet:
    """ModelNet40 and all in its layouts: HDF5 files of 2,048 points, or resampled text files.

    HDF5 (``modelnet40_ply_hdf5_2048``): ``ply_data_train*.h5`` and ``ply_data_test*.h5``, or
    ``train*.h5`` and ``test*.h5``, with the keys ``data`` and ``label``; ``shape_names.txt`` names
    the classes. Text (``modelnet40_normal_resampled``): ``<class>/<class>_0001.txt`` with lines
    ``x,y,z,nx,ny,nz``, and lists ``*train.txt``, ``*test.txt``, ``*shape_names.txt``; clouds are
    brought to the unit sphere. A validation split is carved out of the training clouds.

    Args:
        root: the folder.
        in_channels: 3, or 6 for the normals of the text files.
        max_points: of a text file take the first so many points; 0 for all.

    Raises:
        UserError: the folder has neither layout, or a file is damaged.
    """

    def __init__(self, root: str | None, *, in_channels: int = 3, max_points: int = 2048) -> None:
        folder = require_root(root, "modelnet40", "HDF5 or resampled text files")
        self._hdf5 = {
            split: _files_of(
                folder, [f"{split}_files.txt"], [f"ply_data_{split}*.h5", f"{split}*.h5"]
            )
            for split in ("train", "test")
        }
        if self._hdf5["train"]:
            self.splits = self._read_hdf5(folder, in_channels)
        elif list(folder.glob("*_train.txt")):
            self.splits = self._read_text(folder, in_channels, max_points or None)
        else:
            raise UserError(
                f"{folder}: neither ply_data_train*.h5 nor *_train.txt, so no ModelNet40 layout"
            )

    def _read_hdf5(self, folder: Path, in_channels: int) -> Splits:
        if in_channels != 3:
            raise UserError(f"{folder}: HDF5 clouds have 3 channels, in_channels={in_channels}")
        names = folder / "shape_names.txt"
        class_names = _lines(names) if names.is_file() else None
        count = None if class_names is None else len(class_names)
        train = _read_split(self._hdf5["train"], f"{folder.name}/train", count, parts=False)
        if class_names is None:
            class_names = [f"class {number}" for number in range(max(train.labels) + 1)]
        test = None
        if self._hdf5["test"]:
            test = _read_split(
                self._hdf5["test"], f"{folder.name}/test", len(class_names), parts=False
            )
        facts = class_facts(class_names, 3, unit_sphere=_in_unit_sphere(train.points))
        return Splits(train, None, test, facts)

    def _read_text(self, folder: Path, in_channels: int, max_points: int | None) -> Splits:
        if in_channels not in (3, 6):
            raise UserError(f"modelnet40: in_channels must be 3 or 6, got {in_channels}")
        (list_file, *_) = sorted(folder.glob("*_train.txt"))
        prefix = list_file.name.removesuffix("_train.txt")
        listed = {
            split: _lines(folder / f"{prefix}_{split}.txt")
            for split in ("train", "test")
            if (folder / f"{prefix}_{split}.txt").is_file()
        }
        names = folder / f"{prefix}_shape_names.txt"
        class_names = (
            _lines(names)
            if names.is_file()
            else sorted({name.rpartition("_")[0] for name in listed["train"]})
        )
        splits = {}
        for split, shapes in listed.items():
            classes = [name.rpartition("_")[0] for name in shapes]
            unknown = sorted(set(classes) - set(class_names))
            if unknown:
                raise UserError(f"{names}: lacks the class {unknown[0]!r} of {list_file.name}")
            splits[split] = CloudFiles(
                [folder / kind / f"{name}.txt" for kind, name in zip(classes, shapes, strict=True)],
                [class_names.index(kind) for kind in classes],
                in_channels,
                max_points=max_points,
            )
        facts = class_facts(class_names, in_channels, unit_sphere=True)
        return Splits(splits["train"], None, splits.get("test"), facts)


@register_dataset("shapenet_part")
class ShapeNetPart:
    """ShapeNetPart and all in its layouts: HDF5 files, or text files with normals.

    HDF5 (``hdf5_data``): ``ply_data_{train,val,test}*.h5`` with the keys ``data``, ``label`` and
    ``pid`` (or ``seg``); ``all_object_categories.txt`` names the categories,
    ``overallid_to_catid_partid.json`` says which parts each has. Text
    (``shapenetcore_partanno_segmentation_benchmark_v0_normal``): ``<synset>/<id>.txt`` with lines
    ``x y z nx ny nz part``, ``synsetoffset2category.txt`` and
    ``train_test_split/shuffled_*_file_list.json``; clouds are brought to the unit sphere.

    Args:
        root: the folder.
        in_channels: 3, or 6 for the normals of the text files.
        train_on_validation: as the paper, learn from the validation clouds too; then a validation
            split is carved out of both.

    Raises:
        UserError: the folder has neither layout, or a file is damaged.
    """

    def __init__(
        self,
        root: str | None,
        *,
        in_channels: int = 3,
        train_on_validation: bool = False,
    ) -> None:
        folder = require_root(root, "shapenet_part", "HDF5 or text files with parts")
        files = {
            name: _files_of(
                folder, [f"{split}_hdf5_file_list.txt"], [f"ply_data_{split}*.h5", f"{split}*.h5"]
            )
            for name, split in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
        if files["train"]:
            if in_channels != 3:
                raise UserError(f"{folder}: HDF5 clouds have 3 channels, in_channels={in_channels}")
            found, facts = self._read_hdf5(folder, files)
        elif (folder / "synsetoffset2category.txt").is_file():
            found, facts = self._read_text(folder, in_channels)
        else:
            raise UserError(
                f"{folder}: neither ply_data_train*.h5 nor synsetoffset2category.txt, so no "
                "ShapeNetPart layout"
            )
        train, validation = found["train"], found.get("validation")
        if train_on_validation and validation is not None:
            train, validation = _joined(train, validation), None
        self.splits = Splits(train, validation, found.get("test"), facts)

    def _read_hdf5(
        self, folder: Path, files: dict[str, list[Path]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        found = {
            name: _read_split(paths, f"{folder.name}/{name}", None, parts=True)
            for name, paths in files.items()
            if paths
        }
        table = folder / "all_object_categories.txt"
        if table.is_file():
            class_names = [line.split()[0] for line in _lines(table)]
        else:
            most = max(max(split.labels) for split in found.values())
            class_names = [f"category {number}" for number in range(most + 1)]
        facts = class_facts(class_names, 3, unit_sphere=_in_unit_sphere(found["train"].points))
        return found, facts | _hdf5_parts(folder, found, class_names)

    def _read_text(self, folder: Path, in_channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
        if in_channels not in (3, 6):
            raise UserError(f"shapenet_part: in_channels must be 3 or 6, got {in_channels}")
        pairs = [line.split() for line in _lines(folder / "synsetoffset2category.txt")]
        class_names, synsets = [pair[0] for pair in pairs], [pair[-1] for pair in pairs]
        found: dict[str, Any] = {}
        for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
            listed = folder / "train_test_split" / f"shuffled_{split}_file_list.json"
            if not listed.is_file():
                continue
            shapes = [Path(entry).parts[-2:] for entry in _read_json(listed)]
            unknown = sorted({synset for synset, _ in shapes} - set(synsets))
            if unknown:
                raise UserError(f"{listed}: the synset {unknown[0]!r} is of no category")
            found[name] = CloudFiles(
                [folder / synset / f"{shape}.txt" for synset, shape in shapes],
                [synsets.index(synset) for synset, _ in shapes],
                in_channels,
                part_column=6,
            )
        if "train" not in found:
            raise UserError(f"{folder}: train_test_split has no shuffled_train_file_list.json")
        ranges = _ranges_of_files(found["train"], len(class_names))
        names = _numbered_parts(class_names, ranges)
        facts = class_facts(class_names, in_channels, unit_sphere=True)
        return found, facts | part_facts(names, ranges)


def _joined(first: Any, second: Any) -> Any:
    """Return two splits of the same kind as one."""
    labels = [*first.labels, *second.labels]
    if isinstance(first, CloudFiles):
        return CloudFiles(
            [*first.paths, *second.paths], labels, first.in_channels, first.part_column
        )
    points = np.concatenate([first.points, second.points])
    return CloudArrays(points, labels, np.concatenate([first.parts, second.parts]), first.name)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from error


def _hdf5_parts(
    folder: Path, found: dict[str, CloudArrays], class_names: list[str]
) -> dict[str, Any]:
    """Return names and ranges of the parts, from the folder's table or else from the labels."""
    ranges = _ranges(_part_owners(folder, found), len(class_names), folder)
    for name, split in found.items():
        bounds = np.array(ranges)[np.array(split.labels)]
        assert split.parts is not None
        wrong = (split.parts < bounds[:, :1]) | (split.parts >= bounds[:, 1:])
        if wrong.any():
            row, point = np.argwhere(wrong)[0]
            raise UserError(
                f"{folder}: cloud {row} of {name} is of {class_names[split.labels[row]]!r} but has "
                f"a point of part {split.parts[row, point]}"
            )
    names = _numbered_parts(class_names, ranges)
    given = folder / "part_names.json"
    if given.is_file():
        for category, parts in _read_json(given).items():
            for part, number in parts.items():
                names[int(number)] = f"{category}: {part}"
    return part_facts(names, ranges)


def _numbered_parts(class_names: Sequence[str], ranges: Sequence[Sequence[int]]) -> list[str]:
    """Return names for parts that have none."""
    names = [f"part {number}" for number in range(ranges[-1][1])]
    for category, (start, end) in zip(class_names, ranges, strict=True):
        names[start:end] = [f"{category} part {part + 1}" for part in range(end - start)]
    return names


def _part_owners(folder: Path, found: dict[str, CloudArrays]) -> dict[int, int]:
    """Return the category of each part, by the folder's table or else by the labels."""
    table = folder / "overallid_to_catid_partid.json"
    if table.is_file():
        entries = _read_json(table)
        pairs = entries.items() if isinstance(entries, dict) else enumerate(entries)
        synsets = _synsets(folder)
        try:
            return {int(part): synsets.index(str(entry[0])) for part, entry in pairs}
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{table}: does not name categories of the folder: {error}") from error
    owners: dict[int, int] = {}
    for split in found.values():
        assert split.parts is not None
        for label, parts in zip(split.labels, split.parts, strict=True):
            owners |= dict.fromkeys(np.unique(parts).tolist(), label)
    return owners


def _synsets(folder: Path) -> list[str]:
    """Return the identifiers of the categories in order."""
    table = folder / "all_object_categories.txt"
    return [line.split()[-1] for line in _lines(table)] if table.is_file() else []


def _ranges(owners: dict[int, int], num_categories: int, source: Path) -> list[list[int]]:
    """Return first part and one beyond the last of each category; parts must stand together."""
    ranges: list[list[int]] = []
    for category in range(num_categories):
        own = sorted(part for part, owner in owners.items() if owner == category)
        start = ranges[-1][1] if ranges else 0
        if not own or own[0] < start or own != list(range(own[0], own[-1] + 1)):
            raise UserError(
                f"{source}: parts of category {category} must be numbers in a row after those of "
                f"the category before, got {own}"
            )
        ranges.append([own[0], own[-1] + 1])
    return ranges


def _ranges_of_files(files: CloudFiles, num_categories: int) -> list[list[int]]:
    """Return the ranges of parts that occur, reading clouds until every category was seen often."""
    owners: dict[int, int] = {}
    seen = np.zeros(num_categories, dtype=int)
    for index, label in enumerate(files.labels):
        if seen[label] >= 40:  # the rarest part of ShapeNetPart is in every fifth cloud
            continue
        seen[label] += 1
        parts = files[index].parts
        assert parts is not None
        owners |= dict.fromkeys(parts.unique().tolist(), label)
    return _ranges(owners, num_categories, files.paths[0].parent.parent)


@register_dataset("point_folder")
class PointFolder:
    """A folder per class with OFF, PLY, OBJ, STL, XYZ, TXT, PTS, CSV, NPY or NPZ files.

    ``root/train/<class>/...`` with ``test`` (and ``val``) beside ``train``;
    ``root/<class>/{train,test}/...`` as the original ModelNet has it; or ``root/<class>/...``, of
    which a fifth of each class, always the same, becomes the test split. Meshes are sampled on
    their surface; every cloud is brought to the unit sphere.

    Args:
        root: the folder.
        in_channels: columns of the files to take, x, y, z first; of a mesh 6 for normals.
        mesh_points: points sampled on a mesh.
        test_fraction: share that becomes the test split where one folder is divided.

    Raises:
        UserError: a folder is missing or has no clouds, or the splits differ in their classes.
    """

    def __init__(
        self,
        root: str | None,
        *,
        in_channels: int = 3,
        mesh_points: int = 2048,
        test_fraction: float = 0.2,
    ) -> None:
        folder = require_root(root, "point_folder", "a folder per class")
        self._settings = {"in_channels": in_channels, "mesh_points": mesh_points}
        class_first = not (folder / "train").is_dir()
        top = folder if class_first else folder / "train"
        class_names = sorted(
            entry.name for entry in top.iterdir() if entry.is_dir() and entry.name[0] != "."
        )
        if len(class_names) < 2:
            raise UserError(
                f"{top}: must hold a folder per class, at least two; found {class_names}"
            )
        splits: dict[str, CloudFiles | None] = {}
        for name, spelling in (("train", "train"), ("validation", "val"), ("test", "test")):
            folders = [
                folder / kind / spelling if class_first else folder / spelling / kind
                for kind in class_names
            ]
            splits[name] = self._read(folders) if any(f.is_dir() for f in folders) else None
        if splits["train"] is None:
            whole = self._read([folder / kind for kind in class_names])
            splits["train"], splits["test"] = self._divide(whole, test_fraction, folder)
        facts = class_facts(class_names, in_channels, unit_sphere=True)
        assert splits["train"] is not None
        self.splits = Splits(splits["train"], splits["validation"], splits["test"], facts)

    def _read(self, folders: Sequence[Path]) -> CloudFiles:
        """List the files of one split."""
        paths: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = sorted(
                path
                for path in folder.rglob("*")
                if path.suffix.lower() in POINT_SUFFIXES and not path.name.startswith(".")
            )
            if not found:
                raise UserError(f"{folder}: holds no clouds ({', '.join(POINT_SUFFIXES)})")
            paths += found
            labels += [label] * len(found)
        return CloudFiles(paths, labels, **self._settings)

    def _divide(
        self, whole: CloudFiles, fraction: float, folder: Path
    ) -> tuple[CloudFiles, CloudFiles]:
        """Divide one folder into training and test files."""
        try:
            train, test = carve_validation(
                list(whole.labels), len(whole), fraction, seed=_TEST_SPLIT_SEED
            )
        except ValueError as error:
            raise UserError(f"point_folder {str(folder)!r}: test_fraction: {error}") from error
        first, second = (
            CloudFiles(
                [whole.paths[index] for index in part],
                [whole.labels[index] for index in part],
                **self._settings,
            )
            for part in (train, test)
        )
        return first, second
