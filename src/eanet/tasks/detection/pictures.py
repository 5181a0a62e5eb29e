"""What a detector shows: boxes and masks over images, precision by class, where memories look."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from eanet.nn.capture import capture_attention
from eanet.report.attention import salient_slots, slot_grid
from eanet.report.figures import COLORS, new_figure, picture, style_axes
from eanet.report.grids import image_grid
from eanet.report.page import Paragraph, Section, Table
from eanet.tasks.detection.coco_scores import CocoScores
from eanet.tasks.detection.mask_codes import decode_mask
from eanet.tasks.detection.samples import Sample

__all__ = ["annotated", "attention_sections", "drawn", "examples_section", "scores_section"]

#: longer side that small images are enlarged to before lines are drawn
_SHOWN_PIXELS = 480
#: detections of lower scores are left out of pictures
_MIN_SHOWN_SCORE = 0.5
_MASK_OPACITY = 0.45
#: objects of one class whose names are worth their place in a picture
_MAX_NAMED = 12
#: categories named in a table or drawn as curves
_MAX_CLASSES_TABLED, _MAX_CURVES = 90, 7


def drawn(
    image: Image.Image, found: Sequence[Mapping[str, Any]], *, names: bool = True
) -> np.ndarray:
    """Draw objects over an image.

    Args:
        image: RGB.
        found: each with ``bbox`` (x, y, width, height), ``label``, ``class`` and, where known,
            ``score`` and ``segmentation``.
        names: whether names and scores stand at the boxes.

    Returns:
        Bytes, (height, width, 3); small images are enlarged.
    """
    factor = max(1, round(_SHOWN_PIXELS / max(image.size)))
    size = (image.height, image.width)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    colors = [_color(entry["class"]) for entry in found]
    for entry, color in zip(found, colors, strict=True):
        if entry.get("segmentation"):
            inside = decode_mask(entry["segmentation"], size).astype(bool)
            pixels[inside] = (1 - _MASK_OPACITY) * pixels[inside] + _MASK_OPACITY * np.array(color)
    canvas = Image.fromarray(pixels.astype(np.uint8))
    canvas = canvas.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    line = max(2, max(canvas.size) // 320)
    font = ImageFont.load_default(size=max(11, max(canvas.size) // 30))
    for entry, color in zip(found, colors, strict=True):
        x, y, width, height = (factor * value for value in entry["bbox"])
        draw.rectangle((x, y, x + width, y + height), outline=color, width=line)
        if not names:
            continue
        text = str(entry["label"])
        if "score" in entry:
            text += f" {entry['score']:.2f}"
        place = (x + line, max(y - font.getbbox("A")[3] - 2, 0))
        left, top, right, bottom = draw.textbbox(place, text, font=font)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=color)
        draw.text(place, text, fill=_ink(color), font=font)
    return np.asarray(canvas)


def _color(label: int) -> tuple[int, int, int]:
    """Return the color of a class; colors repeat, the name beside a box tells."""
    text = COLORS[label % (len(COLORS) - 1)]  # black is left out
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _ink(color: tuple[int, int, int]) -> str:
    """Return black or white, whichever is read more easily on a color."""
    return "black" if np.dot(color, (0.299, 0.587, 0.114)) > 140 else "white"


def annotated(sample: Sample, found: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the detections in an image that score well.

    Returns:
        A PNG file.
    """
    assert isinstance(sample.image, Image.Image)
    shown = [entry for entry in found if entry["score"] >= _MIN_SHOWN_SCORE]
    buffer = io.BytesIO()
    one_class = len({entry["class"] for entry in shown}) <= 1
    names = not (one_class and len(shown) > _MAX_NAMED)
    Image.fromarray(drawn(sample.image, shown[::-1], names=names)).save(buffer, format="PNG")
    return buffer.getvalue()


def truth_of(sample: Sample, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the objects of a sample in the form that :func:`drawn` takes."""
    return [
        {
            "bbox": instance.box,
            "label": class_names[instance.label] + (" (crowd)" if instance.is_crowd else ""),
            "class": instance.label,
            "segmentation": instance.segmentation,
        }
        for instance in sample.instances or ()
    ]


def examples_section(
    samples: Sequence[Sample],
    records: Sequence[Sequence[Mapping[str, Any]]],
    class_names: Sequence[str],
    split_name: str,
) -> Section:
    """Show some images twice: the truth above, the detections below."""
    names = len(class_names) > 1
    truth = [
        drawn(_image(sample), truth_of(sample, class_names), names=names) for sample in samples
    ]
    shown = [[e for e in record if e["score"] >= _MIN_SHOWN_SCORE][::-1] for record in records]
    found = [
        drawn(_image(sample), record, names=names)
        for sample, record in zip(samples, shown, strict=True)
    ]
    titles = ["annotated"] * len(truth) + ["found"] * len(found)
    figure = image_grid(truth + found, titles, columns=len(truth), cell_inches=9 / len(truth))
    caption = (
        f"Images of the {split_name} split: what is annotated, and what was found with a score of "
        f"{_MIN_SHOWN_SCORE} or more."
    )
    return Section("Detections", [picture(figure, caption)])


def _image(sample: Sample) -> Image.Image:
    assert isinstance(sample.image, Image.Image)
    return sample.image


def scores_section(
    scores: Mapping[str, CocoScores], categories: Mapping[int, str], split_name: str
) -> Section:
    """Show AP by class, and precision over recall of the commonest classes at IoU 0.5."""
    parts: list[Any] = []
    header = ["class", *(f"{name} {n}" for name in scores for n in ("AP", "AP50", "AP75"))]
    rows = [
        [
            name,
            *(
                100 * value if value >= 0 else None
                for found in scores.values()
                for value in found.per_class[number].values()
            ),
        ]
        for number, name in list(categories.items())[:_MAX_CLASSES_TABLED]
    ]
    caption = f"Average precision by class on the {split_name} split, in percent."
    parts.append(Table(header, rows, caption))
    figure = new_figure(4.4 * len(scores), 3.2)
    for axes, (kind, found) in zip(
        figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True
    ):
        known = [n for n in range(len(categories)) if found.precision[:, n].max() > -1]
        for place, number in enumerate(known[:_MAX_CURVES]):
            name = list(categories.values())[number]
            axes.plot(np.linspace(0, 1, 101), found.precision[:, number], label=name,
                      color=COLORS[place % len(COLORS)], linewidth=1.4)  # fmt: skip
        style_axes(axes, title=f"{kind}, IoU 0.5", xlabel="recall", ylabel="precision")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.03)
        if known:
            axes.legend(fontsize=7, frameon=False)
    parts.append(picture(figure, "Precision over recall at an overlap of 0.5."))
    return Section("Scores by class", parts)


@torch.no_grad()
def attention_sections(
    samples: Sequence[Sample],
    network: nn.Module,
    inputs: Callable[[Sample], list[Tensor]],
    *,
    num_slots: int = 6,
) -> list[Section]:
    """Show where the memories of the block look, image by image.

    Args:
        samples: of one size.
        network: a detector; one without external attention has nothing to show.
        inputs: makes the network's input of a sample.
        num_slots: slots to show.
    """
    if len(samples) > 4:
        samples = samples[:4]
    maps: list[Tensor] = []
    for sample in samples:
        with capture_attention(network) as captured:
            network(inputs(sample))
        found = [value for name, value in captured.items() if "external_attention" in name]
        if not found:
            return []
        maps.append(found[0][0].float().cpu())
    if len({tuple(own.shape) for own in maps}) > 1:
        samples, maps = samples[:1], maps[:1]
    stacked = torch.stack(maps).numpy()
    slots = salient_slots(stacked, num_slots)
    figure = slot_grid([np.asarray(_image(sample)) for sample in samples], stacked, slots=slots)
    text = (
        "Each map shows, for one memory slot of the block after the last stage of the backbone, "
        "its share of the attention at every position. Shown are the slots that tell positions "
        f"apart most, of {stacked.shape[1]}."
    )
    return [Section("External attention", [Paragraph(text), picture(figure, "Maps of slots.")])]
