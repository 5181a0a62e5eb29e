"""COCO's twelve numbers for boxes and for masks, by the evaluator of faster-coco-eval.

It computes what pycocotools computes, thresholds in float64 included, several times faster. Entries
without any ground truth are -1, as there.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from eanet.errors import UserError
from eanet.tasks.detection.annotations import refuse_odd_numbers
from eanet.tasks.detection.mask_codes import segmentation_problem

__all__ = ["NUMBERS", "CocoScores", "coco_scores", "evaluate_files", "read_results"]

#: in the order of pycocotools
NUMBERS: tuple[str, ...] = (
    "AP", "AP50", "AP75", "APs", "APm", "APl",
    "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip

Kind = Literal["bbox", "segm"]


@dataclass
class CocoScores:
    """What an evaluation found.

    Args:
        numbers: the twelve, by name.
        per_class: AP, AP50 and AP75 of each category, by its number.
        precision: at IoU 0.5, (101 recalls, categories); -1 where a category has no objects.
    """

    numbers: dict[str, float]
    per_class: dict[int, dict[str, float]]
    precision: np.ndarray


def coco_scores(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kind: Kind,
    *,
    class_agnostic: bool = False,
    mask_area: bool = False,
) -> CocoScores:
    """Compare detections with the truth.

    Args:
        truth: ``images``, ``annotations`` and ``categories`` of a COCO annotation file. The area of
            an object is that of its annotation, for boxes too.
        results: detections with ``image_id``, ``category_id``, ``score`` and ``bbox`` or
            ``segmentation``, in COCO's form of results.
        kind: whether boxes or masks are compared.
        class_agnostic: whether a detection of any category may match an object.
        mask_area: for masks whose entries have a ``bbox`` too, whether a detection is small, medium
            or large by the area of its mask. By default it is that of its box, as in pycocotools;
            APs, APm and APl depend on it.
    """
    annotations = [{"iscrowd": 0, **annotation} for annotation in truth["annotations"]]
    entries = [dict(entry) for entry in results]
    if kind == "segm" and mask_area:
        for entry in entries:
            entry.pop("bbox", None)
    ground = COCO({**truth, "annotations": annotations})
    evaluation = COCOeval_faster(
        ground, ground.loadRes(entries), iouType=kind, print_function=_say_nothing
    )
    evaluation.params.useCats = int(not class_agnostic)
    evaluation.run()
    precision = evaluation.eval["precision"]  # IoU, recall, category, area, number of detections
    categories = evaluation.params.catIds if not class_agnostic else []
    per_class = {
        int(number): {
            "AP": _mean(precision[:, :, place, 0, -1]),
            "AP50": _mean(precision[0, :, place, 0, -1]),
            "AP75": _mean(precision[5, :, place, 0, -1]),
        }
        for place, number in enumerate(categories)
    }
    numbers = dict(zip(NUMBERS, map(float, evaluation.stats[:12]), strict=True))
    return CocoScores(numbers, per_class, np.asarray(precision[0, :, :, 0, -1]))


def _say_nothing(*_: Any) -> None:
    """Take the evaluator's messages."""


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is known, or -1."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def evaluate_files(
    truth: Path,
    results: Path,
    *,
    kind: Kind,
    class_agnostic: bool = False,
    mask_area: bool = False,
) -> tuple[CocoScores, dict[int, str]]:
    """Evaluate a results file against an annotation file.

    Returns:
        The scores, and the names of the categories by number.

    Raises:
        UserError: a file is not what it should be; the message names the entry.
    """
    content = _read_truth(truth, kind)
    entries = read_results(results, content, kind)
    scores = coco_scores(content, entries, kind, class_agnostic=class_agnostic, mask_area=mask_area)
    return scores, {category["id"]: str(category["name"]) for category in content["categories"]}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error


def _read_truth(file: Path, kind: Kind) -> dict[str, Any]:
    """Read an annotation file and check what an evaluation needs of it."""
    content = _read(file)
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{file}: has no list {name!r}")
        refuse_odd_numbers(content[name], name, file)
    sizes = {
        image.get("id"): (image.get("height"), image.get("width")) for image in content["images"]
    }
    numbers: set[Any] = set()
    for annotation in content["annotations"]:
        where = f"{file}: annotation {annotation.get('id')}"
        if annotation.get("id") is None or annotation["id"] in numbers:
            raise UserError(f"{where}: its id is missing or used before")
        numbers.add(annotation["id"])
        if annotation.get("image_id") not in sizes:
            raise UserError(f"{where}: there is no image {annotation.get('image_id')!r}")
        if not _is_number(annotation.get("area")) or annotation.get("category_id") is None:
            raise UserError(f"{where}: needs an area and a category_id")
        if not _is_box(annotation.get("bbox")):
            raise UserError(f"{where}: bbox is not four finite numbers: {annotation.get('bbox')}")
        if kind == "segm":
            size = sizes[annotation["image_id"]]
            problem = segmentation_problem(annotation.get("segmentation"), size)
            if problem is not None:
                raise UserError(f"{where}: {problem}")
    return content


def read_results(file: Path, truth: Mapping[str, Any], kind: Kind) -> list[dict[str, Any]]:
    """Read a results file and check every entry.

    Raises:
        UserError: the file is no list of detections in these images; the message names the entry.
    """
    entries = _read(file)
    if not isinstance(entries, list):
        raise UserError(f"{file}: a results file is a list of detections")
    refuse_odd_numbers(entries, "detections", file)
    sizes = {image["id"]: [image.get("height"), image.get("width")] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    unknown: set[Any] = set()
    for place, entry in enumerate(entries):
        problem = _entry_problem(entry, sizes, kind)
        if problem is not None:
            raise UserError(f"{file}: entry {place}: {problem}")
        if entry.get("category_id") not in categories:
            unknown.add(entry.get("category_id"))
    if unknown:
        warnings.warn(
            f"{file}: detections of categories that the annotations do not have count nowhere: "
            f"{sorted(map(str, unknown))}",
            stacklevel=2,
        )
    return entries


def _entry_problem(entry: Any, sizes: Mapping[Any, list[Any]], kind: Kind) -> str | None:
    """Return what is wrong with a detection, or ``None``."""
    if not isinstance(entry, dict) or entry.get("image_id") not in sizes:
        given = entry.get("image_id") if isinstance(entry, dict) else entry
        return f"the annotations have no image {given!r}"
    if not _is_number(entry.get("score")):
        return f"score is no finite number: {entry.get('score')!r}"
    if "bbox" in entry and not _is_box(entry["bbox"]):
        return f"bbox is not four finite numbers: {entry['bbox']!r}"
    code: Any = entry.get("segmentation")
    if kind == "bbox" and "bbox" in entry:
        return None
    if kind == "bbox" and code is None:
        return "has neither bbox nor segmentation"
    known = isinstance(code, dict) and {"size", "counts"} <= code.keys()
    size = sizes[entry["image_id"]]
    if not known or list(code["size"]) != size:
        return f"needs a segmentation: a run-length code of size {size}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
