"""Training curves out of the records of a run.

A record is a JSON object of one line of ``metrics.jsonl``: ``step``, ``kind`` (``"train"`` or
``"validation"``) and named numbers, such as ``{"step": 10, "kind": "train", "loss": 2.3,
"lr": 0.001}`` or ``{"step": 100, "kind": "validation", "accuracy": 0.9, "ema/accuracy": 0.91}``.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from eanet.errors import UserError
from eanet.report.figures import COLORS, MUTED, new_figure, style_axes

__all__ = ["read_records", "training_curves"]

_Panel = Literal["losses", "metrics", "others", "rates"]

_TITLES: dict[_Panel, str] = {
    "losses": "Loss",
    "metrics": "Metrics",
    "others": "Other numbers",
    "rates": "Learning rate",
}
#: what says when and how fast, not how well
_CLOCKS = {"step", "kind", "epoch", "seconds", "samples", "time"}
_CLOCK_ENDINGS = ("_seconds", "_per_second", "_bytes")
#: a number with one of these in its name is a loss
_LOSS_WORDS = ("loss", "entropy", "hinge", "penalty", "divergence", "likelihood")
#: a series with more points than this is drawn smoothed, its values faint behind
_MOST_PLAIN_POINTS = 100


@dataclass
class _Series:
    """The values of one number over the run."""

    key: str
    kind: str
    steps: list[int] = field(default_factory=list[int])
    values: list[float] = field(default_factory=list[float])

    @property
    def name(self) -> tuple[str, str]:
        """What was measured on which samples, whatever the weights; it has one color."""
        return self.key.removeprefix("ema/"), self.kind

    @property
    def averaged(self) -> bool:
        """Whether it was measured with the averaged weights."""
        return self.key.startswith("ema/")


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a run.

    A last line without its end is left out: the run was stopped, or still goes on, while writing.

    Args:
        path: ``metrics.jsonl`` of a run folder.

    Raises:
        UserError: the file cannot be read, or a line is not a record.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}, line {number}: not an object with a whole number 'step'")
        records.append(record)
    return records


def training_curves(
    records: Iterable[Mapping[str, Any]], *, best_step: int | None = None
) -> Figure:
    """Draw the numbers of a run over its steps.

    Losses, metrics and learning rates each have a panel; a number that is neither and leaves
    [0, 1] has its place among others, so that it does not press the metrics flat. Values that are
    not finite leave gaps. Losses are drawn on a logarithmic axis where they span more than a
    factor of 30.

    Args:
        records: see the module; times and counters are left out.
        best_step: where to draw a line for the weights that were kept.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels = _sort_into_panels(_collect(records))
    if not panels:
        raise ValueError("the records hold no numbers to draw")
    figure, places = _lay_out(list(panels))
    for panel, series in panels.items():
        axes = places[panel]
        shown = _limit(series)
        title = _TITLES[panel]
        if len(shown) < len(series):
            title += f" ({len(shown)} of {len(series)})"
        style_axes(axes, title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        colors = dict(zip(_names(shown), COLORS, strict=False))
        for one in shown:
            _draw(axes, one, panel, colors[one.name])
        if panel == "losses":
            _choose_scale(axes, shown)
        if best_step is not None:
            axes.axvline(best_step, color=MUTED, linewidth=1, linestyle=":")
        _explain(axes, panel, shown, colors, has_best=best_step is not None)
    return figure


def _collect(records: Iterable[Mapping[str, Any]]) -> list[_Series]:
    """Gather the values of each number, in the order in which the numbers first appear."""
    found: dict[tuple[str, str], _Series] = {}
    for record in records:
        kind = str(record.get("kind", "train"))
        for key, value in record.items():
            leaf = key.rpartition("/")[2]
            if leaf in _CLOCKS or leaf.endswith(_CLOCK_ENDINGS):
                continue
            # JSON has no number for what is not finite; records hold null in its place
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                continue
            series = found.setdefault((kind, key), _Series(key, kind))
            series.steps.append(int(record["step"]))
            series.values.append(math.nan if value is None or math.isinf(value) else float(value))
    return [one for one in found.values() if not all(map(math.isnan, one.values))]


def _sort_into_panels(series: Sequence[_Series]) -> dict[_Panel, list[_Series]]:
    """Return the series of each panel that has any, in the order of drawing."""
    panels: dict[_Panel, list[_Series]] = {name: [] for name in _TITLES}
    for one in series:
        panels[_panel_of(one)].append(one)
    return {name: found for name, found in panels.items() if found}


def _panel_of(series: _Series) -> _Panel:
    parts = series.key.lower().split("/")
    if "lr" in parts or "learning_rate" in parts:
        return "rates"
    if any(word in parts[-1] for word in _LOSS_WORDS):
        return "losses"
    if "norm" in parts[-1]:
        return "others"
    within = all(0 <= value <= 1 for value in series.values if not math.isnan(value))
    return "metrics" if within else "others"


def _lay_out(panels: Sequence[_Panel]) -> tuple[Figure, dict[_Panel, Axes]]:
    """Place two panels in a row; one alone in its row takes the whole of it."""
    rows = [list(panels[start : start + 2]) for start in range(0, len(panels), 2)]
    # what says least is at the end, and flat
    heights = [1.7 if row == ["rates"] else 2.4 if "rates" in row[1:] else 3.0 for row in rows]
    figure = new_figure(9.0, sum(heights))
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr]
    mosaic: Any = [row if len(row) == 2 else row * 2 for row in rows]
    places: Any = figure.subplot_mosaic(mosaic, height_ratios=heights)
    return figure, places


def _names(series: Sequence[_Series]) -> list[tuple[str, str]]:
    """Return the names that get a color of their own, in order."""
    return list(dict.fromkeys(one.name for one in series))


def _limit(series: Sequence[_Series]) -> list[_Series]:
    """Return the series of the first names, as many as there are colors."""
    kept = _names(series)[: len(COLORS)]
    return [one for one in series if one.name in kept]


def _draw(axes: Axes, series: _Series, panel: _Panel, color: str) -> None:
    """Draw one series: solid, but dashed where it was validated with the raw weights."""
    style: dict[str, Any] = {"color": color, "linewidth": 1.6, "gid": f"{series.kind} {series.key}"}
    if panel != "rates" and len(series.values) > _MOST_PLAIN_POINTS:
        axes.plot(series.steps, series.values, color=color, linewidth=0.7, alpha=0.25)
        window = max(3, len(series.values) // 40)
        axes.plot(series.steps, _smooth(series.values, window), **style)
        return
    validated = series.kind == "validation"
    axes.plot(
        series.steps,
        series.values,
        linestyle="--" if validated and not series.averaged else "-",
        marker="o" if validated or len(series.values) == 1 else "",
        markersize=3,
        **style,
    )


def _explain(
    axes: Axes,
    panel: _Panel,
    shown: Sequence[_Series],
    colors: Mapping[tuple[str, str], str],
    *,
    has_best: bool,
) -> None:
    """Add a legend: a line for each color, one for dashes, one for the kept weights."""
    if panel == "rates" and len(colors) == 1:
        return  # the title says it
    keys = {key for key, _ in colors}
    entries: list[Line2D] = []
    for (key, kind), color in colors.items():
        both = panel == "losses" or len(keys) < len(colors) or kind == "train"
        label = f"{key}, {kind}" if both else key
        entries.append(Line2D([], [], color=color, linewidth=1.6, label=label))
    if any(one.averaged for one in shown):
        label = "dashed: without averaging of weights"
        entries.append(Line2D([], [], color=MUTED, linewidth=1.2, linestyle="--", label=label))
    if has_best:
        entries.append(
            Line2D([], [], color=MUTED, linewidth=1, linestyle=":", label="kept weights")
        )
    legend = axes.legend(
        handles=entries, fontsize=8, handlelength=1.8, framealpha=0.6, edgecolor="none"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the finite values around each point; windows are cut at the ends."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    kernel = np.ones(2 * (window // 2) + 1)
    sums = np.convolve(np.where(finite, array, 0.0), kernel, mode="same")
    counts = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist()


def _choose_scale(axes: Axes, series: Sequence[_Series]) -> None:
    """Take a logarithmic axis where positive losses span orders of magnitude."""
    values = [value for one in series for value in one.values if not math.isnan(value)]
    if min(values) > 0 and max(values) / min(values) > 30:
        axes.set_yscale("log")
