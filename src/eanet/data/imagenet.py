"""ImageNet and Tiny-ImageNet as their archives unpack: validation labels in a file."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from eanet.data.files import require_root
from eanet.data.labeled_images import LabeledFiles
from eanet.data.labeled_sets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    image_facts,
    images_within,
    list_class_folders,
    subfolders,
)
from eanet.data.splits import Splits
from eanet.errors import UserError

__all__ = ["ImageNet", "TinyImageNet"]


class ImageNet:
    """ImageNet-1k (ILSVRC 2012), or some of its classes; labels in the order of folders.

    ``train/<wnid>/*.JPEG`` and, as validation split, ``val/<wnid>/*.JPEG`` or ``val/*.JPEG`` with
    ``LOC_val_solution.csv`` or ``val.txt`` (a file's name and its class, by number from 0 or by
    wnid, in each line) beside it or above. ``LOC_synset_mapping.txt`` (a wnid and its words in each
    line) names the classes where it is there.

    Args:
        root: the folder, or that of the whole archive (``ILSVRC/Data/CLS-LOC/train``).

    Raises:
        UserError: a folder is missing or has no images, or the labels are not those of the images.
    """

    def __init__(self, root: str | None) -> None:
        top = require_root(root, "imagenet", "train and val, a folder per class in the former")
        nested = top / "ILSVRC" / "Data" / "CLS-LOC"
        folder = nested if nested.is_dir() else top
        classes = _classes(folder / "train")
        places = (folder, top)
        solution, listed = _first(places, "LOC_val_solution.csv"), _first(places, "val.txt")
        labels: Mapping[str, str] | None = None
        if solution is not None:
            labels = _read_solution(solution)
        elif listed is not None:
            labels = _read_columns(listed, minimum=2)
        file = solution or listed
        validation = _read_validation(folder / "val", classes, labels, file)
        names = _read_words(_first(places, "LOC_synset_mapping.txt"), classes)
        facts = image_facts(names, IMAGENET_MEAN, IMAGENET_STD, None)
        self.splits = Splits(list_class_folders(folder / "train", classes), validation, facts=facts)


class TinyImageNet:
    """Tiny-ImageNet: 200 classes of ImageNet at 64 x 64 pixels, 500 training images each.

    ``train/<wnid>/images/*.JPEG``, and as test split ``val/images/*.JPEG`` with
    ``val/val_annotations.txt``, or ``val/<wnid>/*.JPEG``; the labels of the folder ``test`` were
    never published. ``words.txt`` names the classes where it is there.

    Args:
        root: the folder, or the one that holds ``tiny-imagenet-200``.

    Raises:
        UserError: a folder is missing or has no images, or the labels are not those of the images.
    """

    # of its training images, as widely used
    mean, std = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)

    def __init__(self, root: str | None) -> None:
        folder = require_root(root, "tiny_imagenet", "train, val and words.txt")
        nested = folder / "tiny-imagenet-200"
        folder = nested if nested.is_dir() else folder
        classes = _classes(folder / "train")
        file = folder / "val" / "val_annotations.txt"
        if (folder / "val" / "images").is_dir() and not file.is_file():
            raise UserError(f"{str(file)!r} is missing; it holds the classes of val/images")
        labels = _read_columns(file, minimum=2) if file.is_file() else None
        images = folder / "val" / "images" if labels is not None else folder / "val"
        test = _read_validation(images, classes, labels, file if file.is_file() else None)
        words = folder / "words.txt"
        names = _read_words(words if words.is_file() else None, classes)
        facts = image_facts(names, self.mean, self.std, (64, 64))
        self.splits = Splits(list_class_folders(folder / "train", classes), test=test, facts=facts)


def _first(folders: Sequence[Path], name: str) -> Path | None:
    """Return the first file of a name."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _classes(folder: Path) -> list[str]:
    """Return the folders of the training images."""
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} does not exist; it holds the training images")
    classes = [entry.name for entry in subfolders(folder)]
    if len(classes) < 2:
        raise UserError(f"{str(folder)!r} must hold a folder per class, found {classes}")
    return classes


def _read_validation(
    folder: Path, classes: Sequence[str], labels: Mapping[str, str] | None, file: Path | None
) -> LabeledFiles:
    """List images in folders of their classes, or flat with the label of each by its name.

    Args:
        folder: of the images.
        classes: wnids in the order of the labels.
        labels: name of an image, with or without suffix, to wnid or number.
        file: where the labels were read.
    """
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} does not exist; it holds the validation images")
    if subfolders(folder):
        return list_class_folders(folder, classes)
    if labels is None or file is None:
        raise UserError(
            f"{str(folder)!r} has no folder per class, and no file with the labels is beside it"
        )
    paths = images_within(folder)
    if not paths:
        raise UserError(f"{str(folder)!r} has no images")
    if len(labels) != len(paths):
        raise UserError(
            f"{str(file)!r} has labels of {len(labels)} images, {str(folder)!r} holds {len(paths)}"
        )
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    found: list[int] = []
    for path in paths:
        label = labels.get(path.name, labels.get(path.stem))
        if label is None:
            raise UserError(f"{str(file)!r} has no label of {str(path)!r}")
        number = numbers.get(label, int(label) if label.isdecimal() else -1)
        if not 0 <= number < len(classes):
            raise UserError(
                f"{str(file)!r}: the label {label!r} of {path.name!r} is none of the "
                f"{len(classes)} training folders"
            )
        found.append(number)
    return LabeledFiles(paths, found)


def _lines(file: Path) -> list[str]:
    """Return the lines of a text that hold something."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} cannot be read as text: {error}") from error


def _read_columns(file: Path, *, minimum: int) -> dict[str, str]:
    """Read lines of a name, a label and perhaps more, parted by white space."""
    labels: dict[str, str] = {}
    for number, line in enumerate(_lines(file), start=1):
        columns = line.split()
        if len(columns) < minimum:
            raise UserError(f"{str(file)!r}, line {number}: expected a name and a label: {line!r}")
        name = Path(columns[0]).name
        if name in labels:
            raise UserError(f"{str(file)!r}, line {number}: {name!r} has a label already")
        labels[name] = columns[1]
    return labels


def _read_solution(file: Path) -> dict[str, str]:
    """Read ``ImageId,PredictionString``, the latter beginning with the wnid."""
    labels: dict[str, str] = {}
    for number, row in enumerate(csv.reader(_lines(file)), start=1):
        if number == 1 and row[:1] == ["ImageId"]:
            continue
        if len(row) < 2 or not row[1].split():
            raise UserError(f"{str(file)!r}, line {number}: expected an image and its class")
        labels[row[0]] = row[1].split()[0]
    return labels


def _read_words(file: Path | None, classes: Sequence[str]) -> list[str]:
    """Return the first word of each class; its wnid where words are missing or not unique."""
    if file is None:
        return list(classes)
    words: dict[str, str] = {}
    for line in _lines(file):
        wnid, _, text = line.replace("\t", " ", 1).partition(" ")
        words[wnid] = text.partition(",")[0].strip()
    names = [words.get(wnid) or wnid for wnid in classes]
    return [
        name if names.count(name) == 1 else f"{name} ({wnid})"
        for name, wnid in zip(names, classes, strict=True)
    ]
