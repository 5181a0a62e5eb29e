"""Time and memory against the number of tokens, both axes logarithmic."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from eanet.bench.sweep import Record
from eanet.report.figures import COLORS, INK, MUTED, new_figure, picture, style_axes

__all__ = ["draw_sweep"]

#: beside colors, so that many lines stay apart
_DASHES = ("solid", "dashed", "dotted")


def draw_sweep(
    records: Sequence[Record],
    folder: Path,
    *,
    limits: dict[tuple[str, int], float] | None = None,
) -> list[Path]:
    """Draw one picture for each group and mode: time on the left, memory on the right.

    Ours are thick lines. A line ends where its contender would have needed too much.

    Args:
        records: of a sweep.
        folder: where the PNG files go; it is made where it is missing.
        limits: least seconds of the functions by (mode, number of tokens).

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for group, mode in dict.fromkeys((record.group, record.mode) for record in records):
        chosen = [r for r in records if (r.group, r.mode) == (group, mode) and not r.left_out]
        if not chosen:
            continue
        figure = new_figure(11.0, 5.2)
        left, right = figure.subplots(1, 2)
        title = f"{group}s, {mode.replace('training', 'training step')}"
        _draw(left, chosen, lambda record: 1e3 * record.median_seconds)
        style_axes(left, title=f"{title}: time", xlabel="tokens N", ylabel="milliseconds")
        _draw(right, chosen, lambda record: record.peak_bytes / 2**20)
        style_axes(right, title=f"{title}: memory", xlabel="tokens N", ylabel="MiB beyond input")
        if limits and group == "function":
            points = sorted((n, 1e3 * s) for (m, n), s in limits.items() if m == mode)
            left.plot(*zip(*points, strict=True), color=MUTED, linewidth=1.0, label="limit")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, fontsize=8, labelcolor=INK,
            frameon=False,
        )  # fmt: skip
        path = folder / f"{group}-{mode}.png"
        path.write_bytes(picture(figure, title).data)
        written.append(path)
    return written


def _draw(axes: Axes, records: Sequence[Record], value: Callable[[Record], float]) -> None:
    """Draw a line for each contender through the sizes at which its value is above 0."""
    names = list(dict.fromkeys(record.name for record in records))
    for index, name in enumerate(names):
        points = sorted(
            (record.num_tokens, value(record))
            for record in records
            if record.name == name and value(record) > 0
        )
        if not points:
            continue
        ours = any(record.ours for record in records if record.name == name)
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=COLORS[index % len(COLORS)],
            linestyle=_DASHES[index // len(COLORS) % len(_DASHES)],
            linewidth=2.4 if ours else 1.2,
            marker="o",
            markersize=3.0,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    sizes = sorted({record.num_tokens for record in records})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, ha="right")
