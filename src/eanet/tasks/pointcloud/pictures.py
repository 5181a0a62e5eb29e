"""What the room shows: clouds colored by class scores, parts, and the attention of slots."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from eanet.nn.capture import capture_attention
from eanet.ops.points import nearest_neighbors
from eanet.report.attention import salient_slots
from eanet.report.figures import COLORS, INK, MUTED, new_figure, picture, style_axes
from eanet.report.page import Paragraph, Section, Table
from eanet.tasks.pointcloud.metrics import PartMetrics
from eanet.tasks.pointcloud.pct import PartSegmenter, PointClassifier
from eanet.tasks.pointcloud.samples import Sample

__all__ = [
    "Inspection",
    "classification_sections",
    "draw_attention",
    "draw_class",
    "draw_parts",
    "inspect_classifier",
    "inspect_segmenter",
    "part_sections",
]

_Array = NDArray[Any]

#: points drawn of a cloud; more are too fine to be seen
_MAX_DRAWN = 4096
#: turn about the vertical axis and tilt of the camera, in degrees
_TURN, _TILT = 35.0, 20.0
#: more parts than the palette of the reports has colors are told apart by these
_MORE_COLORS = ("#8c564b", "#7f7f7f", "#bcbd22", "#9467bd", "#17becf")
_PART_COLORS = (*COLORS, *_MORE_COLORS)
#: from little to much, ever darker, so that little stands back on a light ground
_HEAT = LinearSegmentedColormap.from_list("heat", ["#d3d8de", "#f2b25c", "#d55e00", "#6b1200"])
#: clouds of so many points are drawn with the size of dots that is asked for
_DOT_POINTS = 1024


@dataclass
class Inspection:
    """What a network did with one cloud.

    Args:
        centers: coordinates of the points that attention sees, (centers, 3).
        attention: share of each slot at each center, (layers, centers, slots); ``None`` where the
            network has no external attention.
        evidence: share of each center in the score of a class, (centers); ``None`` for parts.
    """

    centers: _Array
    attention: _Array | None
    evidence: _Array | None = None


def _external_maps(maps: Mapping[str, Tensor]) -> _Array | None:
    """Return the maps of memory slots; attention among points has none."""
    found = [
        attention[0].float().cpu().numpy()
        for name, attention in maps.items()
        if name.endswith(".attention") or attention.shape[1] != attention.shape[2]
    ]
    return np.stack(found) if found else None


def inspect_classifier(network: nn.Module, points: Tensor, label: int) -> Inspection:
    """Look into a classifier while it sees one cloud.

    The evidence of a center is how much of the class's score, to first order, comes in through the
    channels whose maximum the center gives.

    Args:
        network: the classifier, in evaluation mode.
        points: (points, channels).
        label: the class whose score is explained.
    """
    assert isinstance(network, PointClassifier)
    device = next(network.parameters()).device
    centers: list[Tensor] = []
    handle = network.encoder.embedding.register_forward_hook(
        lambda _module, _inputs, out: centers.append(out[1])
    )
    with torch.no_grad(), capture_attention(network) as maps:
        features, _ = network.encoder(points[None].to(device))
    handle.remove()
    # plain tensors, so that a gradient can be asked for within inference mode
    with torch.inference_mode(False), torch.enable_grad():
        pooled, where = features[0].clone().max(0)
        pooled = pooled.detach().requires_grad_()
        score = network.classifier(network.head(pooled[None]))[0, label]
        (gradient,) = torch.autograd.grad(score, pooled)
    credit = (gradient * pooled.detach()).clamp(min=0)
    evidence = torch.zeros(features.shape[1], device=device).index_add_(0, where, credit)
    return Inspection(
        centers[0][0].float().cpu().numpy(), _external_maps(maps), evidence.cpu().numpy()
    )


def inspect_segmenter(network: nn.Module, points: Tensor, category: int) -> Inspection:
    """Look into a part segmenter while it sees one cloud.

    Args:
        network: the segmenter, in evaluation mode.
        points: (points, channels).
        category: of the cloud.
    """
    assert isinstance(network, PartSegmenter)
    device = next(network.parameters()).device
    with torch.no_grad(), capture_attention(network) as maps:
        network(points[None].to(device), torch.tensor([category], device=device))
    return Inspection(points[:, :3].cpu().numpy(), _external_maps(maps))


def _project(points: _Array) -> tuple[_Array, _Array]:
    """Return picture coordinates of points and their depth, the nearest largest; y is up."""
    turn, tilt = np.radians(_TURN), np.radians(_TILT)
    x = points[:, 0] * np.cos(turn) + points[:, 2] * np.sin(turn)
    away = -points[:, 0] * np.sin(turn) + points[:, 2] * np.cos(turn)
    y = points[:, 1] * np.cos(tilt) - away * np.sin(tilt)
    return np.stack([x, y], axis=1), away * np.cos(tilt) + points[:, 1] * np.sin(tilt)


def draw_cloud(
    axes: Axes,
    points: _Array,
    colors: _Array,
    *,
    title: str = "",
    title_color: str = INK,
    dot: float = 5.0,
    heights: _Array | None = None,
) -> None:
    """Draw a cloud; what is further away is smaller, and paler unless colors stand for heights.

    Args:
        axes: where to draw.
        points: (points, 3), y up.
        colors: (points, 3), red, green, blue within 0..1.
        title: plain text above it.
        title_color: of the title.
        dot: area of a point in square points of print, for clouds of some thousand points; those
            of smaller clouds are larger.
        heights: what the colors stand for, (points); the highest are drawn above all others.
    """
    if len(points) > _MAX_DRAWN:
        chosen = np.linspace(0, len(points) - 1, _MAX_DRAWN).astype(int)
        points, colors = points[chosen], colors[chosen]
        heights = None if heights is None else heights[chosen]
    flat, depth = _project(points)
    order = np.argsort(depth if heights is None else heights, kind="stable")
    near = ((depth - depth.min()) / max(float(np.ptp(depth)), 1e-6))[:, None]
    if heights is None:
        kept = 0.55 + 0.45 * near
        colors = colors * kept + (1 - kept) * 0.93
    dot *= float(np.clip(_DOT_POINTS / len(points), 0.7, 2.0))
    axes.scatter(
        flat[order, 0],
        flat[order, 1],
        s=dot * (0.6 + 0.8 * near[order, 0]),
        c=colors[order],
        linewidths=0,
    )
    axes.margins(0.05)
    axes.set_aspect("equal", adjustable="datalim")  # the title stays where the others are
    axes.set_axis_off()
    axes.set_title(title, fontsize=8.5, color=title_color, parse_math=False)


def _draw_heat(
    axes: Axes,
    values: _Array,
    points: _Array,
    centers: _Array,
    *,
    title: str = "",
    dot: float = 5.0,
) -> None:
    """Draw a cloud colored by values at centers, see :func:`_heat`."""
    heights = _heat(values, points, centers)
    draw_cloud(axes, points, _HEAT(heights)[:, :3], title=title, dot=dot, heights=heights)


def _draw_key(figure: Figure, axes: Any, *, shrink: float) -> None:
    """Draw what the colors of heights mean, below some axes."""
    key = figure.colorbar(
        ScalarMappable(cmap=_HEAT),
        ax=axes,
        location="bottom",
        shrink=shrink,
        aspect=30,
        pad=0.02,
        ticks=[0, 1],
    )
    key.ax.set_xticklabels(["little", "much"], fontsize=8, color=INK)
    key.ax.tick_params(length=0)
    key.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _heat(values: _Array, points: _Array, centers: _Array) -> _Array:
    """Return heights of points within 0..1 from values at centers: those of the nearest."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12)
    if points.shape != centers.shape or not np.array_equal(points, centers):
        query, known = (torch.from_numpy(np.ascontiguousarray(x)).float()[None]
                        for x in (points, centers))  # fmt: skip
        count = min(3, len(centers))
        indices, squared = nearest_neighbors(query, known, count)
        weights = 1 / (squared[0].numpy() + 1e-4)
        scaled = (scaled[indices[0].numpy()] * weights).sum(1) / weights.sum(1)
    return scaled


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.patch.set(facecolor="white", alpha=1.0)
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def draw_class(points: Tensor, record: Mapping[str, Any], found: Inspection) -> bytes:
    """Draw a cloud colored by what spoke for its class, beside the likeliest classes; a PNG file.

    Args:
        points: what the network saw.
        record: with ``top``, a list of ``label`` and ``probability``.
        found: see :func:`inspect_classifier`.
    """
    assert found.evidence is not None
    figure = new_figure(7.5, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    names = [_shorten(entry["label"], 28) for entry in record["top"]]
    shares = [100 * entry["probability"] for entry in record["top"]]
    own = points[:, :3].numpy()
    # the square root, for evidence is concentrated in few points
    evidence = np.sqrt(found.evidence)
    _draw_heat(left, evidence, own, found.centers, title=f"what speaks for {names[0]}", dot=7)
    _draw_key(figure, left, shrink=0.5)
    places = range(len(names))
    right.barh(places, shares, color=[COLORS[0]] + [MUTED] * (len(names) - 1), height=0.6)
    for place, share in zip(places, shares, strict=True):
        right.text(share + 1.5, place, f"{share:.1f} %", va="center", fontsize=9, color=INK)
    style_axes(right, title=f"{names[0]}, {shares[0]:.1f} %", xlabel="probability (%)")
    right.set_yticks(places, names, parse_math=False)
    right.set_ylim(len(names) - 0.4, -0.6)
    right.set_xlim(0, 118)
    right.set_xticks(range(0, 101, 25))
    return _png(figure)


def _part_colors(parts: _Array) -> _Array:
    """Return the color of each point's part."""
    table = np.array([to_rgb(color) for color in _PART_COLORS])
    return table[parts % len(table)]


def draw_parts(points: Tensor, parts: _Array, names: Sequence[str], title: str) -> bytes:
    """Draw a cloud colored by parts, with their names and numbers of points; a PNG file.

    Args:
        points: (points, channels).
        parts: of each point, 0 for the first part of the category.
        names: of the category's parts.
        title: plain text above the cloud.
    """
    figure = new_figure(7.0, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    draw_cloud(left, points[:, :3].numpy(), _part_colors(parts), title=title, dot=7)
    right.set_axis_off()
    step = min(0.12, 0.9 / max(len(names), 1))
    for number, name in enumerate(names):
        height = 0.5 + step * ((len(names) - 1) / 2 - number)
        color = _PART_COLORS[number % len(_PART_COLORS)]
        right.scatter([0.04], [height], s=60, color=color, transform=right.transAxes)
        label = f"{_shorten(name, 28)}: {int((parts == number).sum())} points"
        right.text(
            0.1, height, label, va="center", fontsize=9, color=INK, transform=right.transAxes,
            parse_math=False,
        )  # fmt: skip
    right.set_xlim(0, 1)
    right.set_ylim(0, 1)
    return _png(figure)


def attention_figure(points: _Array, found: Inspection, *, num_slots: int = 6) -> Figure:
    """Draw the most telling slots of the first and the last attention layer over a cloud.

    Args:
        points: (points, 3).
        found: with attention.
        num_slots: slots side by side.
    """
    assert found.attention is not None
    layers = sorted({0, len(found.attention) - 1})
    count = min(num_slots, found.attention.shape[2])
    width, height = np.ptp(_project(points)[0], axis=0)
    tall = float(np.clip(height / max(width, 1e-6), 0.5, 1.1))  # of a wide cloud no empty rows
    figure = new_figure(1.6 * count, (1.5 * tall + 0.25) * len(layers) + 0.35)
    cells = figure.subplots(len(layers), count, squeeze=False)
    for row, layer in zip(cells, layers, strict=True):
        maps = found.attention[layer].T  # (slots, centers)
        for axes, slot in zip(row, salient_slots(maps[None, :, None], count), strict=False):
            title = f"layer {layer + 1}, slot {slot}"
            _draw_heat(axes, maps[slot], points, found.centers, title=title, dot=3)
    _draw_key(figure, cells, shrink=0.3)
    return figure


def draw_attention(points: Tensor, found: Inspection) -> bytes:
    """Return :func:`attention_figure` as a PNG file."""
    return _png(attention_figure(points[:, :3].cpu().numpy(), found))


# the page of a run

_ATTENTION_WORDS = (
    "Share of a slot of the memories at every point, dark where it is large; first and last "
    "attention layer, the slots that differ most over the cloud. Each picture has the full range "
    "of colors, so patterns can be compared, not heights."
)


def _attention_sections(
    inspected: Sequence[tuple[str, _Array, Inspection]],
) -> list[Section]:
    """Return pictures of slots, nothing for networks without external attention."""
    if not inspected or inspected[0][2].attention is None:
        return []
    section = Section("Attention of the memories", [Paragraph(_ATTENTION_WORDS)])
    for name, points, found in inspected:
        section.parts.append(picture(attention_figure(points, found), name))
    return [section]


def classification_sections(
    network: nn.Module,
    samples: Sequence[Sample],
    labels: _Array,
    probabilities: _Array,
    class_names: Sequence[str],
    device: torch.device,
) -> list[Section]:
    """Return confusions, clouds with predictions, and attention.

    Args:
        network: the classifier, in evaluation mode.
        samples: what it saw.
        labels: true classes.
        probabilities: (samples, classes).
        class_names: in the order of the labels.
        device: of the network.
    """
    predicted = probabilities.argmax(axis=1)
    right = int((predicted == labels).sum())
    words = (
        f"{right} of {len(labels)} clouds are classified correctly "
        f"({100 * right / len(labels):.2f} %)."
    )
    rows: list[list[str | int | float | None]] = []
    for number, name in enumerate(class_names):
        own = labels == number
        if not own.any():
            continue
        wrong = np.bincount(predicted[own & (predicted != labels)], minlength=len(class_names))
        worst = class_names[int(wrong.argmax())] if wrong.any() else ""
        rows.append([name, int(own.sum()), 100 * float((predicted[own] == number).mean()), worst])
    confusions = Section(
        "Classes",
        [
            Paragraph(words),
            Table(["class", "clouds", "found (%)", "most often taken for"], rows, "Each class"),
        ],
    )
    sure = probabilities.max(axis=1)
    wrong_ones = np.flatnonzero(predicted != labels)
    wrong_ones = wrong_ones[np.argsort(-sure[wrong_ones], kind="stable")][:12]
    right_ones = np.flatnonzero(predicted == labels)
    right_ones = right_ones[
        np.linspace(0, len(right_ones) - 1, min(12, len(right_ones))).astype(int)
    ]
    examples = Section("Predictions")
    for chosen, caption in (
        (wrong_ones, "Wrong, the surest first: predicted class, probability, true class."),
        (right_ones, "Right, an even choice. Dark points spoke for the class."),
    ):
        if len(chosen):
            cells: list[_Cell] = []
            for index in chosen.tolist():
                given = int(predicted[index])
                found = inspect_classifier(network, samples[index].points, given)
                own = samples[index].points[:, :3].numpy()
                assert found.evidence is not None
                title = f"{_shorten(class_names[given], 16)} {100 * sure[index]:.0f} %"
                if given != labels[index]:
                    title += f"\ntrue: {_shorten(class_names[int(labels[index])], 16)}"
                heights = _heat(np.sqrt(found.evidence), own, found.centers)
                cells.append(_Cell(own, _HEAT(heights)[:, :3], title, heights))
            examples.parts.append(picture(_grid(cells), caption))
    positions = np.linspace(0, len(samples) - 1, min(3, len(samples))).astype(int)
    inspected = [
        (
            class_names[int(labels[index])],
            samples[index].points[:, :3].numpy(),
            inspect_classifier(network, samples[index].points, int(predicted[index])),
        )
        for index in positions
    ]
    del device  # inspections move clouds to the network themselves
    return [confusions, examples, *_attention_sections(inspected)]


@dataclass
class _Cell:
    """A cloud of a grid; the fields are arguments of :func:`draw_cloud`."""

    points: _Array
    colors: _Array
    title: str
    heights: _Array | None = None


def _grid(cells: Sequence[_Cell], columns: int = 6) -> Figure:
    """Draw clouds in rows."""
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    figure = new_figure(1.6 * columns, 1.85 * rows)
    for axes, cell in zip(
        figure.subplots(rows, columns, squeeze=False).ravel(),
        [*cells, *[None] * (rows * columns - len(cells))],
        strict=True,
    ):
        if cell is None:
            axes.set_axis_off()
        else:
            draw_cloud(
                axes, cell.points, cell.colors, title=cell.title, dot=3, heights=cell.heights
            )
    return figure


def part_sections(
    network: nn.Module,
    shown: Sequence[tuple[Sample, _Array]],
    metrics: PartMetrics,
    labels: _Array,
    facts: Mapping[str, Any],
    device: torch.device,
) -> list[Section]:
    """Return the IoU of categories, clouds with true and predicted parts, and attention.

    Args:
        network: the segmenter, in evaluation mode.
        shown: clouds and the predicted part of each point.
        metrics: of the split.
        labels: categories of the split.
        facts: of the data set.
        device: of the network.
    """
    names, ranges = facts["class_names"], facts["part_ranges"]
    masked, unmasked = metrics.category_iou().tolist(), metrics.category_iou(masked=False).tolist()
    counts = np.bincount(labels, minlength=len(names))
    rows: list[list[str | int | float | None]] = [
        [name, int(counts[number]), 100 * masked[number], 100 * unmasked[number]]
        for number, name in enumerate(names)
        if counts[number]
    ]
    header = ["category", "clouds", "IoU (%)", "IoU, any part allowed (%)"]
    table = Section("Categories", [Table(header, rows, "Each category, in the order of the data")])
    cells = []
    for sample, predicted in shown:
        assert sample.parts is not None
        assert sample.label is not None
        start = ranges[sample.label][0]
        own, truth = sample.points[:, :3].numpy(), sample.parts.numpy()
        name = _shorten(names[sample.label], 16)
        agree = 100 * float((predicted == truth).mean())
        cells.append(_Cell(own, _part_colors(truth - start), f"{name}, true"))
        title = f"{name}, {agree:.0f} % right"
        cells.append(_Cell(own, _part_colors(predicted - start), title))
    examples = Section("Predictions", [picture(_grid(cells), "True and predicted parts.")])
    inspected = [
        (
            names[sample.label],
            sample.points[:, :3].numpy(),
            inspect_segmenter(network, sample.points, int(sample.label or 0)),
        )
        for sample, _ in list(shown)[:3]
    ]
    del device
    return [table, examples, *_attention_sections(inspected)]
