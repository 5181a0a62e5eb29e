"""What a classifier shows: predictions, confusions, and where its memories look."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from eanet.data.splits import Dataset
from eanet.nn.capture import capture_attention
from eanet.report.attention import salient_slots, slot_grid
from eanet.report.figures import COLORS, INK, MUTED, new_figure, picture, style_axes
from eanet.report.grids import image_grid, show_image
from eanet.report.page import Paragraph, Section, Table
from eanet.tasks.classification.samples import Sample
from eanet.tasks.classification.t2t_vit import T2TViT

__all__ = [
    "Results",
    "annotated",
    "attention_sections",
    "confusion_figure",
    "confusion_section",
    "examples_section",
    "slot_maps",
]

_BLUE, _ORANGE = COLORS[0], COLORS[1]
#: classes whose names and counts still fit into a drawn matrix
_MAX_NAMED_CLASSES, _MAX_COUNTED_CLASSES = 40, 20
#: predictions in a row
_PER_ROW = 6
#: edge to which small images are enlarged before a map is laid over them
_SHOWN_PIXELS = 192


@dataclass
class Results:
    """What a network said of the samples of a split.

    Args:
        split: the samples.
        split_name: ``test`` or ``validation``.
        indices: which samples of the split were looked at.
        labels: their true classes.
        probabilities: (samples, classes).
        class_names: in the order of the labels.
    """

    split: Dataset
    split_name: str
    indices: Sequence[int]
    labels: np.ndarray
    probabilities: np.ndarray
    class_names: Sequence[str]

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest class of each sample."""
        return self.probabilities.argmax(axis=1)

    def confusion(self) -> np.ndarray:
        """Return how many samples of each true class (rows) were given each class (columns)."""
        count = len(self.class_names)
        cells = self.labels * count + self.predicted
        return np.bincount(cells, minlength=count**2).reshape(count, count)

    def sample(self, position: int) -> Sample:
        """Return the sample at a position of these results, as stored."""
        return self.split[self.indices[position]]


def annotated(sample: Sample, record: Mapping[str, Any]) -> bytes:
    """Draw an image beside the probabilities of its likeliest classes.

    Args:
        sample: as read from its file.
        record: with ``top``, a list of ``label`` and ``probability``.

    Returns:
        A PNG file.
    """
    figure = new_figure(7.0, 3.2)
    figure.patch.set(facecolor="white", alpha=1.0)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    show_image(left, _enlarged(_as_array(sample.image)))
    names = [_shorten(entry["label"], 28) for entry in record["top"]]
    shares = [100 * entry["probability"] for entry in record["top"]]
    places = range(len(names))
    right.barh(places, shares, color=[_BLUE] + [MUTED] * (len(names) - 1), height=0.6)
    for place, share in zip(places, shares, strict=True):
        right.text(share + 1.5, place, f"{share:.1f} %", va="center", fontsize=9, color=INK)
    style_axes(right, title=f"{names[0]}, {shares[0]:.1f} %", xlabel="probability (%)")
    right.set_yticks(places, names, parse_math=False)
    right.set_ylim(len(names) - 0.4, -0.6)
    right.set_xlim(0, 118)
    right.set_xticks(range(0, 101, 25))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix; shades are shares of the true class, numbers are samples.

    Args:
        confusion: counts, true classes in rows.
        class_names: in the order of the rows.
    """
    count = len(class_names)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    named = count <= _MAX_NAMED_CLASSES
    edge = min(max(0.42 * count + 1.4, 3.5), 9.0)
    figure = new_figure(edge + 0.8, edge)
    axes = figure.subplots()
    shown = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    style_axes(axes, xlabel="predicted class", ylabel="true class")
    axes.grid(visible=False)
    if named:
        names = [_shorten(name, 18) for name in class_names]
        upright = max(map(len, names)) > 3
        axes.set_xticks(range(count), names, rotation=90 if upright else 0, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
    if count <= _MAX_COUNTED_CLASSES:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 0.5 else INK
            text = str(confusion[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("share of the true class (%)", fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=8, colors=MUTED, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure


def confusion_section(results: Results) -> Section:
    """Return the confusion matrix, the most frequent confusions and a table of the classes."""
    confusion, names = results.confusion(), results.class_names
    right, total = int(confusion.trace()), len(results.labels)
    words = (
        f"{right} of {total} samples of the {results.split_name} split are classified correctly "
        f"({100 * right / total:.2f} %)."
    )
    if total < len(results.split):
        words += f" They are an even choice out of {len(results.split)}."
    section = Section("Confusions", [Paragraph(words)])
    wrong = confusion * (1 - np.eye(len(names), dtype=int))
    caption = "Confusion matrix: rows are true classes, columns predicted ones."
    section.parts.append(picture(confusion_figure(confusion, names), caption, 760))
    order = [cell for cell in np.argsort(-wrong, axis=None, kind="stable") if wrong.flat[cell]]
    if order:
        pairs = [divmod(int(cell), len(names)) for cell in order[:10]]
        rows = [[names[true], names[given], int(wrong[true, given])] for true, given in pairs]
        section.parts.append(
            Table(["true class", "predicted class", "samples"], rows, "Most frequent confusions")
        )
    section.parts.append(_class_table(confusion, names))
    return section


def _class_table(confusion: np.ndarray, names: Sequence[str]) -> Table:
    """Return recall and precision of each class, the worst first where there are many."""
    hits, per_true, per_given = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    recall = hits / np.maximum(per_true, 1)
    order = np.argsort(recall, kind="stable")[:50] if len(names) > 50 else range(len(names))
    rows: list[list[str | int | float | None]] = [
        [
            names[index],
            int(per_true[index]),
            100 * float(recall[index]) if per_true[index] else None,
            100 * float(hits[index] / per_given[index]) if per_given[index] else None,
        ]
        for index in order
    ]
    caption = "Each class" if len(names) <= 50 else f"The 50 of {len(names)} classes found least"
    return Table(["class", "samples", "found (recall, %)", "right (precision, %)"], rows, caption)


def examples_section(results: Results, *, count: int = 12) -> Section:
    """Return samples that were classified wrong, the surest first, and some that were right.

    Args:
        results: what was predicted.
        count: samples of either kind.
    """
    sure = results.probabilities.max(axis=1)
    wrong = np.flatnonzero(results.predicted != results.labels)
    right = np.flatnonzero(results.predicted == results.labels)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:count]
    right = right[np.linspace(0, len(right) - 1, min(count, len(right))).astype(int)]
    section = Section("Predictions")
    for positions, words in (
        (wrong, "Wrong, the surest first: predicted class, probability, true class."),
        (right, "Right, an even choice: class and probability."),
    ):
        if len(positions):
            figure = _prediction_grid(results, positions.tolist())
            # one size of image whatever their number
            section.parts.append(picture(figure, words, 150 * min(_PER_ROW, len(positions))))
    if not len(wrong):
        section.parts.append(Paragraph("No sample was classified wrong."))
    return section


def _prediction_grid(results: Results, positions: Sequence[int]) -> Figure:
    """Draw samples with what was predicted and, where that is wrong, what is true."""
    images, titles, colors = [], [], []
    for position in positions:
        given, true = int(results.predicted[position]), int(results.labels[position])
        share = 100 * results.probabilities[position, given]
        title = f"{_shorten(results.class_names[given], 14)}  {share:.0f} %"
        if given != true:
            title = f"{title}\ntrue: {_shorten(results.class_names[true], 14)}"
        images.append(_enlarged(_as_array(results.sample(position).image)))
        titles.append(title)
        colors.append(INK if given == true else _ORANGE)
    return image_grid(images, titles, min(_PER_ROW, len(images)), title_colors=colors)


def attention_sections(
    results: Results,
    network: nn.Module,
    prepare: Callable[[Sample], Tensor],
    shown: Callable[[Sample], Image.Image | Tensor],
    *,
    num_images: int = 4,
    num_columns: int = 6,
) -> list[Section]:
    """Return maps of the memory slots over some images; nothing where the network has none.

    As in Figure 5 of arXiv 2105.02358: the attention of a slot over the patches, the class token
    left out, laid over the image.

    Args:
        results: whose samples are shown.
        network: the classifier, in evaluation mode.
        prepare: sample to a batch of one, normalized, on the network's device.
        shown: sample to the picture of what the network sees.
        num_images: rows of the first figures.
        num_columns: slots, or heads, side by side.
    """
    positions = np.linspace(0, len(results.labels) - 1, num_images).astype(int).tolist()
    samples = [results.sample(position) for position in dict.fromkeys(positions)]
    layers = [slot_maps(network, prepare(sample)) for sample in samples]
    if not layers[0]:
        return []
    images = [_enlarged(_as_array(shown(sample))) for sample in samples]
    names = [results.class_names[sample.label or 0] for sample in samples]
    blocks = [name for name in layers[0] if name.startswith("block")]
    section = Section(
        "Attention of the memories",
        [
            Paragraph(
                "Each map shows, for one row of the memories (a slot), its share at every patch "
                "of the image after both normalizations. Every map is stretched to the full "
                "range of colors, so patterns can be compared, not heights."
            )
        ],
    )
    if blocks:
        # (images, heads, slots, rows, columns)
        last = np.stack([maps[blocks[-1]] for maps in layers])
        mean = last.mean(axis=1)
        figure = slot_grid(images, mean, titles=names, slots=salient_slots(mean, num_columns))
        words = (
            f"Last block, mean of its {last.shape[1]} heads: the slots that differ most over the "
            "image."
        )
        section.parts.append(picture(figure, words))
        heads = np.unique(np.linspace(0, last.shape[1] - 1, num_columns).astype(int)).tolist()
        width = 130 * (len(heads) + 1)
        section.parts.append(picture(_head_figure(images, last, heads, names), _HEAD_WORDS, width))
    words = (
        f"From the first layer of the stem (top) to the last block, on one image ({names[0]}). "
        "Every layer has memories of its own; each row shows the slots that differ most there, "
        "from left to right, as the mean of its heads. Patches are smaller in the stem."
    )
    figure = _layer_figure(images[0], layers[0], num_columns)
    section.parts.append(picture(figure, words))
    section.parts.append(_concentration_table(layers[0]))
    return [section]


_HEAD_WORDS = "Last block, one slot for each of several heads: the one that differs most there."


def _head_figure(
    images: Sequence[np.ndarray], last: np.ndarray, heads: Sequence[int], names: Sequence[str]
) -> Figure:
    """Draw for each of some heads its most telling slot."""
    chosen = [salient_slots(last[:, head], 1)[0] for head in heads]
    maps = np.stack([last[:, head, slot] for head, slot in zip(heads, chosen, strict=True)], axis=1)
    titles = [f"head {head}\nslot {slot}" for head, slot in zip(heads, chosen, strict=True)]
    return slot_grid(images, maps, titles=names, slots=range(len(heads)), slot_titles=titles)


def _layer_figure(image: np.ndarray, layers: Mapping[str, np.ndarray], num_columns: int) -> Figure:
    """Draw the most telling slots of every layer, heads averaged, a row for each layer."""
    count = min(len(layers), 10)
    names = [list(layers)[place] for place in np.linspace(0, len(layers) - 1, count).astype(int)]
    means = [layers[name].mean(axis=0) for name in names]
    columns = min(num_columns, *(len(mean) for mean in means))
    chosen = [mean[salient_slots(mean[None], columns)] for mean in means]
    # one array for grids of several sizes: patches of the coarser are repeated
    rows, width = (max(maps.shape[axis] for maps in chosen) for axis in (1, 2))
    return slot_grid(
        [image] * count,
        np.stack([_repeated(maps, rows, width) for maps in chosen]),
        titles=names,
        slots=range(columns),
        slot_titles=[f"choice {place + 1}" for place in range(columns)],
    )


def _repeated(maps: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bring maps to a finer grid by repeating their patches."""
    row = np.arange(rows) * maps.shape[1] // rows
    column = np.arange(columns) * maps.shape[2] // columns
    return maps[:, row][:, :, column]


def _concentration_table(layers: Mapping[str, np.ndarray]) -> Table:
    """Return how unlike a uniform choice the attention over slots is, layer by layer."""
    rows: list[list[str | int | float | None]] = []
    for name, maps in layers.items():
        shares = maps / np.maximum(maps.sum(axis=1, keepdims=True), 1e-12)
        entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1).mean()
        slots = maps.shape[1]
        rows.append([name, slots, float(np.exp(entropy)), float(maps.max(axis=1).mean())])
    header = ["layer", "slots", "slots in use per patch", "largest share of one slot"]
    caption = (
        "Slots in use: the exponential of the mean entropy over the slots; their number would be "
        "no choice at all"
    )
    return Table(header, rows, caption)


@torch.no_grad()
def slot_maps(network: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    """Return where the memories of every layer look, (heads, slots, rows, columns) of one image.

    Args:
        network: the classifier, in evaluation mode. Attention among tokens is no map of slots and
            is left out; one without memories gives nothing.
        images: a batch of one, normalized.

    Returns:
        Name of a layer (``stem 1`` before ``block 1``) to the attention after both normalizations,
        laid out as the patches are; the class token is left out, as in Figure 5. Layers of the
        stem have one head.
    """
    if not isinstance(network, T2TViT):
        return {}
    with capture_attention(network) as maps:
        network(images)
    found: dict[str, np.ndarray] = {}
    rows, columns = images.shape[2:]
    splits: list[Any] = [*network.stem.splits]
    for number, split in enumerate(splits):
        rows, columns = split.grid(rows, columns)
        attention = maps.get(f"stem.blocks.{number}.attention")
        if attention is not None and network.stem_kind == "ea":
            found[f"stem {number + 1}"] = _on_grid(attention[0, None], rows, columns)
    for number in range(len(network.blocks)):
        attention = maps.get(f"blocks.{number}.attention")
        if attention is not None and network.mixer == "external":
            found[f"block {number + 1}"] = _on_grid(attention[0], rows, columns)
    return found


def _on_grid(attention: Tensor, rows: int, columns: int) -> np.ndarray:
    """Lay (heads, tokens, slots) out as (heads, slots, rows, columns), without class token."""
    patches = attention[:, -rows * columns :].float().cpu().numpy()
    return patches.transpose(0, 2, 1).reshape(*patches.shape[::2], rows, columns)


def _as_array(image: Image.Image | Tensor) -> np.ndarray:
    """Return an image as bytes, (height, width) or (height, width, 3)."""
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0).contiguous().cpu().numpy()
    return np.asarray(image)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Enlarge small images by whole pixels, and shrink very large ones, for drawing."""
    longest = max(image.shape[:2])
    if longest > 4 * _SHOWN_PIXELS:
        scale = 4 * _SHOWN_PIXELS / longest
        size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
        return np.asarray(Image.fromarray(image.squeeze()).resize(size, Image.Resampling.LANCZOS))
    factor = max(_SHOWN_PIXELS // longest, 1)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _shorten(text: str, length: int) -> str:
    """Cut a name that does not fit."""
    return text if len(text) <= length else text[: length - 1] + "…"
