"""Annotations in the form of PASCAL VOC: one XML file an image."""

import xml.etree.ElementTree as ElementTree  # what files hold is looked at before it is parsed
from collections.abc import Sequence
from pathlib import Path

from eanet.data.files import IMAGE_SUFFIXES
from eanet.errors import UserError
from eanet.tasks.detection.annotations import Findings, ImageRecord, Invalid, check_box
from eanet.tasks.detection.samples import Instance

__all__ = ["class_names_of", "read_voc"]


def read_voc(
    root: Path, split: str, class_names: Sequence[str], *, invalid: Invalid = "stop"
) -> list[ImageRecord]:
    """Read and check the images of a split.

    Boxes are counted from 1 in these files: corners lose one pixel. Objects marked ``difficult``
    become crowds: they are not trained on, and finding them counts neither way.

    Args:
        root: the folder with ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``.
        split: a file there, without its suffix.
        class_names: in the order of the labels.
        invalid: see :class:`~eanet.tasks.detection.annotations.Findings`.

    Raises:
        UserError: a file is missing or not what it should be; the message names the object.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    records: list[ImageRecord] = []
    findings = Findings(root / "Annotations", invalid)
    for number, stem in enumerate(_stems(root, split), start=1):
        file = root / "Annotations" / f"{stem}.xml"
        tree = _parse(file)
        size = (_whole(tree, "size/height", file), _whole(tree, "size/width", file))
        instances: list[Instance] = []
        for place, node in enumerate(tree.iter("object"), start=1):
            where = f"object {place} of {file.name}"
            name = (node.findtext("name") or "").strip()
            if name not in labels:
                findings.fail(where, f"unknown class {name!r}: known are {', '.join(labels)}")
                continue
            box = check_box(_box(node), size, where, findings)
            if box is not None:
                difficult = (node.findtext("difficult") or "0").strip() == "1"
                instances.append(
                    Instance(labels[name], box, box[2] * box[3], difficult, None, where)
                )
        records.append(ImageRecord(_image(root, stem, tree), number, size, tuple(instances)))
    findings.report()
    return records


def class_names_of(root: Path, splits: Sequence[str]) -> list[str]:
    """Return the names of all classes that occur in some splits, in alphabetical order."""
    names = {
        (node.findtext("name") or "").strip()
        for split in splits
        for stem in _stems(root, split)
        for node in _parse(root / "Annotations" / f"{stem}.xml").iter("object")
    }
    return sorted(names)


def _stems(root: Path, split: str) -> list[str]:
    """Return the names of the images of a split."""
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: the list of a split cannot be read: {error}") from error
    return [line.split()[0] for line in lines if line.strip()]


def _parse(file: Path) -> ElementTree.Element:
    try:
        text = file.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise UserError(f"{file}: an annotation defines no entities; this file is not read")
        return ElementTree.fromstring(text)  # noqa: S314 (no entities, see above)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: cannot be read as XML: {error}") from error


def _whole(tree: ElementTree.Element, path: str, file: Path) -> int:
    text = (tree.findtext(path) or "").strip()
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{file}: {path} is {text!r}, not a positive whole number")
    return int(text)


def _box(node: ElementTree.Element) -> list[float] | str:
    """Return (x, y, width, height), or what stands in their place."""
    texts = [node.findtext(f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = (float(text or "missing") - 1 for text in texts)
    except ValueError:
        return f"bndbox {texts}"
    return [x0, y0, x1 - x0, y1 - y0]


def _image(root: Path, stem: str, tree: ElementTree.Element) -> Path:
    """Return the file of an image, which must exist."""
    folder = root / "JPEGImages"
    named = Path((tree.findtext("filename") or "").strip()).name
    for name in (named, *(stem + suffix for suffix in IMAGE_SUFFIXES)):
        if name and (folder / name).is_file():
            return folder / name
    raise UserError(f"{root / 'Annotations' / stem}.xml: there is no image {stem!r} in {folder}")
