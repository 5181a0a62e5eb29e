"""Annotation files, checked before the first step: every refusal names file and annotation.

What cannot be meant stops at once: values that are not finite, negative sides, unknown labels, a
number used twice, missing files, run-length codes of another image. What data sets are known to
hold and what can be left out without a change of meaning is left out with a warning that names it:
boxes without area, boxes wholly outside their image, images with crowds alone.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eanet.errors import UserError
from eanet.tasks.detection.mask_codes import segmentation_problem
from eanet.tasks.detection.samples import Instance

__all__ = ["Findings", "ImageRecord", "Invalid", "check_box", "read_coco"]

Invalid = Literal["stop", "drop"]

#: how far a box may reach beyond its image without a word: annotations are rounded
_TOLERANCE_PIXELS = 1.0
#: places that a warning names before it only counts
_PLACES_NAMED = 5


@dataclass
class ImageRecord:
    """An image file and its objects.

    Args:
        path: the file.
        number: of the image within its data set.
        size: (height, width) as the annotations say.
        instances: its objects.
    """

    path: Path
    number: int
    size: tuple[int, int]
    instances: tuple[Instance, ...] = ()


@dataclass
class Findings:
    """What was found wrong in a file.

    Args:
        source: the file.
        invalid: "stop" raises at the first annotation that cannot be meant; "drop" leaves such
            annotations out and says so.
    """

    source: Path
    invalid: Invalid = "stop"
    _noted: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def __post_init__(self) -> None:
        if self.invalid not in ("stop", "drop"):
            raise UserError(f"data.arguments.invalid must be stop or drop, got {self.invalid!r}")

    def fail(self, where: str, what: str) -> None:
        """Refuse an annotation that cannot be meant.

        Raises:
            UserError: unless such annotations are to be dropped.
        """
        if self.invalid == "stop":
            raise UserError(
                f"{self.source}: {where}: {what}; correct it, or leave such annotations out with "
                "--data.arguments.invalid drop"
            )
        self.note(f"left out, {what.partition(':')[0]}", where)

    def note(self, what: str, where: str) -> None:
        """Note what was done with an annotation."""
        self._noted.setdefault(what, []).append(where)

    def report(self) -> None:
        """Warn of what was done, a line for each kind."""
        for what, places in self._noted.items():
            named = ", ".join(places[:_PLACES_NAMED])
            more = f" and {len(places) - _PLACES_NAMED} more" if len(places) > _PLACES_NAMED else ""
            warnings.warn(f"{self.source}: {what}: {named}{more}", stacklevel=2)


def check_box(
    box: Any, size: tuple[int, int], where: str, findings: Findings
) -> tuple[float, float, float, float] | None:
    """Return a box (x, y, width, height) as numbers, or ``None`` where it is left out.

    A box that reaches beyond its image keeps its numbers here; training clips it.

    Raises:
        UserError: it cannot be meant.
    """
    if not isinstance(box, list | tuple) or len(box) != 4:
        findings.fail(where, f"bbox is not a list of four numbers: {box!r}")
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
        findings.fail(where, f"bbox has a value that is not a finite number: {list(box)}")
        return None
    x, y, width, height = map(float, box)
    if width < 0 or height < 0:
        findings.fail(where, f"bbox has a negative side (x, y, width, height): {list(box)}")
        return None
    if width == 0 or height == 0:
        findings.note("left out, the box has no area", where)
        return None
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        findings.note("left out, the box lies outside its image", where)
        return None
    beyond = max(-x, -y, x + width - size[1], y + height - size[0])
    if beyond > _TOLERANCE_PIXELS:
        findings.note("clipped for training, the box reaches beyond its image", where)
    return x, y, width, height


def read_coco(
    file: Path, folder: Path, *, invalid: Invalid = "stop"
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Read and check an annotation file of COCO's form.

    Args:
        file: the JSON file.
        folder: where its images are.
        invalid: see :class:`Findings`.

    Returns:
        The images by their numbers, and the names of the categories by theirs, in ascending order.

    Raises:
        UserError: the file is not what it should be; the message names the annotation.
    """
    content = _read_object(file)
    categories = _categories(content, file)
    records = _images(content, file, folder)
    labels = {number: label for label, number in enumerate(categories)}
    findings = Findings(file, invalid)
    found: dict[int, list[Instance]] = {number: [] for number in records}
    _refuse_duplicates(content["annotations"], "annotation", file)
    for annotation in content["annotations"]:
        where = f"annotation {annotation.get('id')}"
        record = records.get(annotation.get("image_id"))
        if record is None:
            findings.fail(where, f"there is no image {annotation.get('image_id')!r}")
            continue
        where += f" (image {record.number}, {record.path.name})"
        instance = _instance(annotation, record, labels, where, findings)
        if instance is not None:
            found[record.number].append(instance)
    findings.report()
    for number, instances in found.items():
        records[number].instances = tuple(instances)
    return [records[number] for number in sorted(records)], categories


def _read_object(file: Path) -> dict[str, Any]:
    """Read the file and check that its three lists are there."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: a COCO annotation file is an object, this is a list or value")
    for name in ("images", "annotations", "categories"):
        entries = content.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{file}: has no list {name!r} of objects")
        refuse_odd_numbers(entries, name, file)
    return content


def refuse_odd_numbers(entries: Sequence[Any], what: str, file: Path) -> None:
    """Refuse entries whose ids are lists or objects, which no other entry can name.

    Raises:
        UserError: naming the place in the list.
    """
    for place, entry in enumerate(entries):
        for name in ("id", "image_id", "category_id"):
            number = entry.get(name) if isinstance(entry, dict) else None
            if number is not None and not isinstance(number, int | float | str):
                raise UserError(
                    f"{file}: {what}, place {place} of the list: {name} must be a number, "
                    f"got {number!r}"
                )


def _categories(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Return the names of the categories by number."""
    if not content["categories"]:
        raise UserError(f"{file}: 'categories' is empty: there is no class to learn")
    _refuse_duplicates(content["categories"], "category", file)
    for category in content["categories"]:
        if not isinstance(category.get("id"), int) or not isinstance(category.get("name"), str):
            raise UserError(f"{file}: a category needs a whole number and a name: {category}")
    return {
        category["id"]: category["name"]
        for category in sorted(content["categories"], key=lambda category: category["id"])
    }


def _images(content: Mapping[str, Any], file: Path, folder: Path) -> dict[int, ImageRecord]:
    """Return the images by number; their files must exist."""
    _refuse_duplicates(content["images"], "image", file)
    records: dict[int, ImageRecord] = {}
    for image in content["images"]:
        number, name = image.get("id"), image.get("file_name")
        size = (image.get("height"), image.get("width"))
        if not isinstance(number, int) or not isinstance(name, str):
            raise UserError(f"{file}: an image needs a whole number and a file_name: {image}")
        if not all(isinstance(length, int) and length > 0 for length in size):
            raise UserError(f"{file}: image {number} ({name}): height and width are {size}")
        path = folder / name
        if not path.is_file():
            raise UserError(f"{file}: image {number}: there is no file {str(path)!r}")
        records[number] = ImageRecord(path, number, (int(size[0]), int(size[1])))
    return records


def _refuse_duplicates(entries: Sequence[Mapping[str, Any]], what: str, file: Path) -> None:
    """Refuse a number that two entries have."""
    numbers = [entry.get("id") for entry in entries]
    if None in numbers:
        raise UserError(f"{file}: {what} at place {numbers.index(None)} of its list has no 'id'")
    twice = [number for number, count in Counter(numbers).items() if count > 1]
    if twice:
        count = numbers.count(twice[0])
        raise UserError(f"{file}: {what} {twice[0]}: this id is used {count} times")


def _instance(
    annotation: Mapping[str, Any],
    record: ImageRecord,
    labels: Mapping[int, int],
    where: str,
    findings: Findings,
) -> Instance | None:
    """Return one object, or ``None`` where it is left out."""
    category = annotation.get("category_id")
    if category is None or category not in labels:
        known = list(labels)
        shown = f"{known[:3]}...{known[-1:]}" if len(known) > 4 else known
        what = "has no category_id" if category is None else f"unknown category_id {category!r}"
        findings.fail(where, f"{what}: the file's categories are {shown}")
        return None
    box = check_box(annotation.get("bbox"), record.size, where, findings)
    if box is None:
        return None
    segmentation = annotation.get("segmentation") or None
    if segmentation is not None:
        problem = segmentation_problem(segmentation, record.size)
        if problem is not None:
            findings.fail(where, problem)
            return None
    area = annotation.get("area", box[2] * box[3])
    if not isinstance(area, int | float) or not math.isfinite(area) or area < 0:
        findings.fail(where, f"area is no number of 0 or more: {area!r}")
        return None
    crowd = bool(annotation.get("iscrowd", 0))
    return Instance(labels[category], box, float(area), crowd, segmentation, annotation["id"])
