"""Lists and tables that lie beside clouds: which files a split has, and what things are called."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eanet.errors import UserError

__all__ = ["files_of_split", "lines_of", "read_json"]


def _natural_order(path: Path) -> list[Any]:
    """Sort ``train2`` before ``train10``."""
    return [int(text) if text.isdecimal() else text for text in re.split(r"(\d+)", path.name)]


def files_of_split(folder: Path, lists: Sequence[str], patterns: Sequence[str]) -> list[Path]:
    """Return the HDF5 files of a split: those its list names, or all of a pattern, in order."""
    for name in lists:
        if not (folder / name).is_file():
            continue
        # lists hold the paths of somebody else's folder: only the last part counts
        names = [Path(line.strip()).name for line in lines_of(folder / name)]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder / name}: {missing[0]!r} is not in the folder")
        return [folder / name for name in names]
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return sorted(found, key=_natural_order)


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file: {error}") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from error
