"""What a segmenter shows: masks over images, a legend, the classes, where its memories look."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from eanet.data.splits import Dataset
from eanet.nn.external_attention import ExternalAttention2d
from eanet.report.attention import salient_slots, slot_grid
from eanet.report.figures import INK, new_figure, picture
from eanet.report.grids import image_grid, show_image
from eanet.report.page import Paragraph, Section, Table
from eanet.tasks.segmentation.metrics import SegmentationMetrics, class_iou
from eanet.tasks.segmentation.samples import IGNORE

if TYPE_CHECKING:
    from eanet.tasks.segmentation.task import SegmentationTask

__all__ = ["color_mask", "overlay_mask", "report_sections", "write_prediction"]

#: images of a split whose classes the table of the report counts
_MAX_COUNTED = 200
_NUM_EXAMPLES, _NUM_ATTENTION = 5, 4
#: smallest edge at which pictures are shown
_SHOWN_PIXELS = 192


def color_mask(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Return labels in colors, (height, width, 3); ignored pixels are nearly white."""
    table = np.array([list(color) for color in palette], dtype=np.uint8)
    table = np.concatenate([table, np.full((256 - len(table), 3), 224, dtype=np.uint8)])
    table[IGNORE] = 224
    return table[labels]


def overlay_mask(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]], *, opacity: float = 0.6
) -> np.ndarray:
    """Return the colors of the labels over a gray image, with the outlines of regions drawn."""
    gray = image @ np.array([0.299, 0.587, 0.114])
    colors = color_mask(labels, palette)
    mixed = (1 - opacity) * gray[..., None] + opacity * colors
    edge = np.zeros(labels.shape, dtype=bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    mixed[edge] = 255
    return np.rint(mixed).astype(np.uint8)


def write_prediction(
    image: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
    stem: Path,
) -> list[Path]:
    """Write overlay with legend, color mask and index image; return the three files.

    Args:
        image: bytes, (height, width, 3).
        labels: bytes, (height, width).
        class_names: in the order of the labels.
        palette: a color for each label.
        stem: path without suffix.
    """
    files = [stem.with_name(stem.name + ending) for ending in (".png", ".color.png", ".index.png")]
    files[0].write_bytes(_with_legend(image, labels, class_names, palette))
    Image.fromarray(color_mask(labels, palette)).save(files[1])
    index = Image.fromarray(labels, mode="P")
    colors = [list(color) for color in palette] + [[224] * 3] * (256 - len(palette))
    index.putpalette([value for color in colors for value in color])
    index.save(files[2])
    return files


def _with_legend(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> bytes:
    """Draw image and overlay side by side, and the classes that occur by share."""
    ratio = min(max(image.shape[0] / image.shape[1], 0.3), 2.0)
    figure = new_figure(9.5, 3.6 * ratio + 0.2)
    figure.patch.set(facecolor="white", alpha=1.0)
    left, right = figure.subplots(1, 2)
    show_image(left, image)
    show_image(right, overlay_mask(image, labels, palette))
    shares = np.bincount(labels.ravel(), minlength=256) / labels.size
    shown = [int(label) for label in np.argsort(-shares, kind="stable")[:14] if shares[label]]
    names = [f"{class_names[label]}  {100 * shares[label]:.1f} %" for label in shown]
    handles = _legend(names, [palette[label] for label in shown])
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def _legend(names: Sequence[str], colors: Sequence[Sequence[int]]) -> list[Patch]:
    """Return the entries of a legend: a box of each color, and its name as plain text."""
    return [
        Patch(
            facecolor=(red / 255, green / 255, blue / 255),
            edgecolor=INK,
            linewidth=0.5,
            label=name.replace("$", r"\$"),
        )
        for name, (red, green, blue) in zip(names, colors, strict=True)
    ]


def report_sections(
    task: "SegmentationTask", split: Dataset, split_name: str, device: torch.device
) -> list[Section]:
    """Return the sections of a run's page.

    Args:
        task: its network is in evaluation mode, on the device.
        split: the samples to show.
        split_name: ``test`` or ``validation``.
        device: of the network.
    """
    count = min(len(split), _MAX_COUNTED)
    indices = np.linspace(0, len(split) - 1, count).astype(int).tolist()
    examples = set(np.linspace(0, count - 1, min(_NUM_EXAMPLES, count)).astype(int).tolist())
    metrics = SegmentationMetrics(task.class_names, device)
    shown: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for place, index in enumerate(indices):
        sample = split[index]
        batch = task.collate([task.evaluation_transform(sample)]).to(device)
        (scored,) = task.class_scores(batch)
        predicted = scored.argmax(dim=0).to(torch.uint8)
        assert batch.labels is not None
        metrics.update(predicted, batch.labels[0])
        if place in examples:
            image = np.asarray(sample.image.convert("RGB"))
            shown.append((image, np.asarray(sample.labels), predicted.cpu().numpy()))
    sections = [
        _class_section(metrics, task, split_name, count, len(split)),
        _example_section(shown, task),
    ]
    notes = task.facts.get("notes", [])
    if notes:
        sections[0].parts.append(Paragraph(" ".join(f"Note: {note}." for note in notes)))
    if isinstance(getattr(task.model, "attention", None), ExternalAttention2d):
        chosen = [indices[i] for i in np.linspace(0, count - 1, _NUM_ATTENTION).astype(int)]
        samples = [split[index] for index in dict.fromkeys(chosen)]
        sections.append(_attention_section(task, samples, device))
    return sections


def _class_section(
    metrics: SegmentationMetrics,
    task: "SegmentationTask",
    split_name: str,
    count: int,
    total: int,
) -> Section:
    """Return the scores of each class, and which class it is mistaken for most."""
    confusion = metrics.confusion_matrix().cpu()
    iou = class_iou(confusion).tolist()
    labeled, given = confusion.sum(dim=1).tolist(), confusion.sum(dim=0).tolist()
    pixels = max(sum(labeled), 1)
    rows: list[list[str | int | float | None]] = []
    for label, name in enumerate(task.class_names):
        hits = int(confusion[label, label])
        wrong = confusion[label].clone()
        wrong[label] = 0
        rows.append(
            [
                name,
                100 * labeled[label] / pixels,
                None if iou[label] != iou[label] else 100 * iou[label],
                100 * hits / labeled[label] if labeled[label] else None,
                100 * hits / given[label] if given[label] else None,
                task.class_names[int(wrong.argmax())] if int(wrong.sum()) else "-",
            ]
        )
    words = f"Counted over {count} of {total} images of the {split_name} split."
    header = ["class", "pixels (%)", "IoU (%)", "found (%)", "right (%)", "mistaken most for"]
    return Section("Classes", [Paragraph(words), Table(header, rows, "Each class")])


def _example_section(
    shown: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], task: "SegmentationTask"
) -> Section:
    """Return images beside their true and their predicted classes, under a legend."""
    images: list[np.ndarray] = []
    for image, labels, predicted in shown:
        row = (image, color_mask(labels, task.palette), color_mask(predicted, task.palette))
        errors = color_mask(predicted, task.palette)
        valid = labels != IGNORE
        errors[valid & (labels == predicted)] = 60
        errors[~valid] = 224
        images += [_enlarged(part) for part in (*row, errors)]
    titles = ["image", "true", "predicted", "mistakes"] + [""] * (len(images) - 4)
    figure = image_grid(images, titles, 4, cell_inches=2.0)
    occurring = np.unique(np.concatenate([labels.ravel() for _, labels, _ in shown]))
    labels = [label for label in occurring.tolist() if label != IGNORE]
    handles = _legend(
        [task.class_names[label] for label in labels], [task.palette[label] for label in labels]
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    caption = (
        "Images, true classes, predicted classes, and the mistakes in the color of what was "
        "predicted; light gray is ignored, dark gray right."
    )
    return Section("Predictions", [picture(figure, caption, 900)])


def _attention_section(
    task: "SegmentationTask", samples: Sequence[Any], device: torch.device
) -> Section:
    """Return the maps of Figure 4: slots over images, before and after the second normalization."""
    shares: list[np.ndarray] = []
    saliencies: list[np.ndarray] = []
    images: list[np.ndarray] = []
    side: tuple[int, int] | None = None
    for sample in samples:
        attention, saliency = attention_maps(task, sample, device)
        side = side or (attention.shape[1], attention.shape[2])
        for maps, found in ((shares, attention), (saliencies, saliency)):
            # one size for all rows of the figure
            maps.append(_map_at(found, side))
        images.append(_enlarged(np.asarray(sample.image.convert("RGB"))))
    share, saliency = np.stack(shares), np.stack(saliencies)
    slots = salient_slots(share, 6)
    section = Section(
        "Attention of the memories",
        [
            Paragraph(
                "Each map belongs to one row of the memories (a slot), the same in a column. Every "
                "map is stretched to the full range of colors: patterns can be compared, not "
                "heights. The slots shown differ most over the images."
            ),
            picture(
                slot_grid(images, share, slots=slots),
                "After both normalizations: the share of the slot among all slots at a position.",
            ),
            picture(
                slot_grid(images, saliency, slots=slots),
                "After the softmax over the positions alone: where the slot looks.",
            ),
        ],
    )
    if task.model.attention.normalization != "double":  # pyright: ignore
        del section.parts[2]
    return section


def attention_maps(
    task: "SegmentationTask", sample: Any, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return the maps of all slots on one image, (slots, height, width) of the backbone's map.

    Args:
        task: with external attention in its network.
        sample: as stored.
        device: of the network.

    Returns:
        A, after both normalizations, and the softmax over the positions alone (Eq. 10).
    """
    model: Any = task.model
    found: dict[str, Tensor] = {}

    def look(module: Any, args: tuple[Tensor, ...]) -> None:
        found["share"] = module.attention_map(*args)[0]
        found["saliency"] = module.saliency_map(*args)[0]

    handle = model.attention.register_forward_pre_hook(look)
    try:
        batch = task.collate([task.evaluation_transform(sample)]).to(device)
        with torch.no_grad():
            list(task.class_scores(batch))
    finally:
        handle.remove()
    return found["share"].cpu().numpy(), found["saliency"].cpu().numpy()


def _map_at(maps: np.ndarray, side: tuple[int, int]) -> np.ndarray:
    """Return maps at another size."""
    tensor = torch.from_numpy(maps).float()[None]
    return torch.nn.functional.interpolate(tensor, side, mode="bilinear")[0].numpy()


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Return small pictures with every pixel repeated."""
    factor = max(1, round(_SHOWN_PIXELS / min(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
