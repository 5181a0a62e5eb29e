"""Which parts belong to which category, and what they are called.

The parts of all categories are numbered together, those of one category in a row, so that a range
says which parts a cloud of a category can have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eanet.errors import UserError
from eanet.tasks.pointcloud.clouds import CloudArrays, CloudFiles
from eanet.tasks.pointcloud.list_files import lines_of, read_json

__all__ = ["numbered_parts", "part_facts", "parts_of_arrays", "ranges_of_files"]


def part_facts(part_names: Sequence[str], part_ranges: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Collect what a data set says of its parts."""
    return {
        "part_names": list(part_names),
        "num_parts": len(part_names),
        "part_ranges": [list(pair) for pair in part_ranges],
    }


def parts_of_arrays(
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
    names = numbered_parts(class_names, ranges)
    given = folder / "part_names.json"
    if given.is_file():
        try:
            for category, parts in read_json(given).items():
                for part, number in parts.items():
                    names[int(number)] = f"{category}: {part}"
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{given}: must give for each category a table of part names and numbers below "
                f"{len(names)}: {error}"
            ) from error
    return part_facts(names, ranges)


def numbered_parts(class_names: Sequence[str], ranges: Sequence[Sequence[int]]) -> list[str]:
    """Return names for parts that have none."""
    names = [f"part {number}" for number in range(ranges[-1][1])]
    for category, (start, end) in zip(class_names, ranges, strict=True):
        names[start:end] = [f"{category} part {part + 1}" for part in range(end - start)]
    return names


def _part_owners(folder: Path, found: dict[str, CloudArrays]) -> dict[int, int]:
    """Return the category of each part, by the folder's table or else by the labels."""
    table = folder / "overallid_to_catid_partid.json"
    if table.is_file():
        entries = read_json(table)
        synsets = _synsets(folder)
        try:
            pairs = entries.items() if isinstance(entries, dict) else enumerate(entries)
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
    return [line.split()[-1] for line in lines_of(table)] if table.is_file() else []


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


def ranges_of_files(files: CloudFiles, num_categories: int) -> list[list[int]]:
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
