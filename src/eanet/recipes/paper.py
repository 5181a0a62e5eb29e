"""The paper's tables beside what was measured: ``eanet recipes --table 2``.

:data:`ROWS` holds every figure of tables 1 to 12 of arXiv 2105.02358 as published.
:func:`format_table` sets a table beside the runs in ``results/``, a folder with one JSON file for
each measured run and metric::

    {"recipe": "classification_imagenet/eamlp_7", "metric": "top-1 accuracy (%)", "value": 69.1,
     "seed": 0, "commit": "1f0c3de", "hardware": "8 x A100", "seconds": 91000.0,
     "command": "eanet train classification_imagenet/eamlp_7"}

A run stands beside a published figure when its recipe and its metric are those of the row,
letter for letter: the metric's name holds the unit, so a share is never set beside a percentage.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eanet.errors import UserError
from eanet.recipes.paper_tables import CAPTIONS, ROWS, PaperRow

__all__ = ["CAPTIONS", "ROWS", "PaperRow", "format_table", "read_result", "rows"]

#: what a file in the results folder must say, and as which type
_RESULT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "recipe": str,
    "metric": str,
    "value": (int, float),
    "seed": int,
    "commit": str,
    "hardware": str,
    "seconds": (int, float),
    "command": str,
}

#: values by (recipe, metric), then by seed
_Results = dict[tuple[str, str], dict[int, list[float]]]


def rows(table: int) -> list[PaperRow]:
    """Return the figures of one table in printed order.

    Raises:
        UserError: the paper has no such table.

    >>> [figure.value for figure in rows(8) if figure.row == "EAGAN (Ours)"]
    [14.105, 8.63]
    """
    found = [figure for figure in ROWS if figure.table == table]
    if not found:
        known = ", ".join(map(str, CAPTIONS))
        raise UserError(f"the paper has no table {table}; its tables are {known}")
    return found


def format_table(table: int, results_folder: Path | None = None) -> str:
    """Return a table as aligned plain text: paper, ours, difference.

    Ours is the mean over seeds, with the sample standard deviation where there are several seeds;
    runs that share a seed are averaged first and count as one. The difference is ours minus the
    paper's.

    Args:
        table: number of the table.
        results_folder: the folder of measured runs; ``None`` takes ``results/`` of the checkout
            this package runs from, if there is one.

    Raises:
        UserError: there is no such table or folder, or a file in it is not a result.
    """
    figures = rows(table)
    folder = _default_results_folder() if results_folder is None else results_folder
    results = {} if folder is None else _read_results(folder)
    decimals = {
        metric: max(_num_decimals(figure.value) for figure in figures if figure.metric == metric)
        for metric in dict.fromkeys(figure.metric for figure in figures)
    }
    notes: dict[str, int] = {}
    lines: list[Sequence[str]] = [
        ("row", "metric", "paper", "ours", "difference", "recipe, or why there is none", "note")
    ]
    for figure in figures:
        paper = "-" if figure.value is None else f"{figure.value:.{decimals[figure.metric]}f}"
        ours, difference = _compare(figure, results, decimals[figure.metric] + 1)
        marks = [notes.setdefault(note, len(notes) + 1) for note in figure.note.splitlines()]
        source = figure.recipe or figure.reason
        lines.append(
            (figure.row, figure.metric, paper, ours, difference, source, ", ".join(map(str, marks)))
        )
    text = [f"Table {table}: {CAPTIONS[table]}", "", *_align(lines, right=(2, 4))]
    if notes:
        text += ["", *(f"[{number}] {note}" for note, number in notes.items())]
    return "\n".join(text)


def _num_decimals(value: float | None) -> int:
    """Return how many digits after the point a figure was published with, trailing zeros aside."""
    return 0 if value is None or value == int(value) else len(repr(value).partition(".")[2])


def _compare(figure: PaperRow, results: _Results, decimals: int) -> tuple[str, str]:
    """Return what was measured for a row and its distance from the paper, or "-"."""
    by_seed = results.get((figure.recipe or "", figure.metric), {})
    if not by_seed:
        return "-", "-"
    values = [statistics.fmean(repeats) for repeats in by_seed.values()]
    mean = statistics.fmean(values)
    if len(values) == 1:
        ours = f"{mean:.{decimals}f} (1 seed)"
    else:
        spread = statistics.stdev(values)
        ours = f"{mean:.{decimals}f} ± {spread:.{decimals}f} ({len(values)} seeds)"
    return ours, "-" if figure.value is None else f"{mean - figure.value:+.{decimals}f}"


def _align(lines: Sequence[Sequence[str]], *, right: Sequence[int]) -> list[str]:
    """Pad cells to columns, those in ``right`` on the left, with a rule under the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [padded[0], "  ".join("-" * width for width in widths), *padded[1:]]


def _default_results_folder() -> Path | None:
    """Return ``results/`` of the checkout, or ``None`` for a package installed elsewhere."""
    checkout = Path(__file__).resolve().parents[3]
    folder = checkout / "results"
    return folder if (checkout / "pyproject.toml").is_file() and folder.is_dir() else None


def _read_results(folder: Path) -> _Results:
    """Read the measured runs of a folder.

    Raises:
        UserError: the folder is missing, or a file is not a result.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of results")
    results: _Results = {}
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        key = (result["recipe"], result["metric"])
        results.setdefault(key, {}).setdefault(result["seed"], []).append(result["value"])
    return results


def read_result(path: Path) -> dict[str, Any]:
    """Read one result and check its fields.

    Raises:
        UserError: the file is no result; the message names the file and the field.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file that can be read: {error}") from error
    if not isinstance(result, dict):
        raise UserError(f"{path}: a result is a JSON object, got {type(result).__name__}")
    for name, kind in _RESULT_FIELDS.items():
        if name not in result:
            raise UserError(f"{path}: field {name!r} is missing from the result")
        value = result[name]
        wanted = "text" if kind is str else "a whole number" if kind is int else "a finite number"
        # Python counts true as 1 and reads NaN from JSON; neither is a measurement
        valid = isinstance(value, kind) and not isinstance(value, bool)
        if not valid or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{path}: field {name!r} must be {wanted}, got {value!r}")
    return result
