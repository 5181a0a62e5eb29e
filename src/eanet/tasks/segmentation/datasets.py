"""Data sets of images with a class for every pixel.

A data set is a class constructed with its folder and its arguments; its attribute ``splits`` holds
what it offers. Files are paired and counted when it is opened, and read when they are asked for.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eanet.data.files import IMAGE_SUFFIXES, decode_image, decode_indices, require_root
from eanet.data.labeled_sets import IMAGENET_MEAN, IMAGENET_STD
from eanet.data.splits import Dataset, Splits
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.segmentation.class_names import (
    ADE20K,
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_TRAIN_IDS,
    VOC,
    palette,
)
from eanet.tasks.segmentation.samples import IGNORE, Sample

__all__ = [
    "Ade20k",
    "CamVid",
    "Cityscapes",
    "LabeledFiles",
    "PascalVoc",
    "facts_of",
    "paired",
]


@dataclass(frozen=True)
class LabeledFiles:
    """Pairs of an image file and a file of labels.

    Args:
        pairs: the files.
        num_classes: labels are below this, or :data:`IGNORE`.
        label_map: for each of the 256 raw values the label; ``None`` where they are the same.
        colors: color to label, for label files that hold colors; ``None`` for index images.
    """

    pairs: Sequence[tuple[Path, Path]]
    num_classes: int
    label_map: np.ndarray | None = None
    colors: Mapping[tuple[int, int, int], int] | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read one pair.

        Raises:
            UserError: a file cannot be read, the two differ in size, or a label is out of range.
        """
        image_file, label_file = self.pairs[index]
        image = decode_image(image_file, mode="RGB")
        labels = self._read_labels(label_file)
        if labels.shape != (image.height, image.width):
            raise UserError(
                f"mask {str(label_file)!r} is {labels.shape[1]} x {labels.shape[0]} pixels, its "
                f"image {str(image_file)!r} {image.width} x {image.height}; they must be equal"
            )
        return Sample(image, labels, str(image_file))

    def _read_labels(self, path: Path) -> np.ndarray:
        if self.colors is not None:
            return self._labels_of_colors(path)
        raw = decode_indices(path)
        highest = int(raw.max())
        if highest > 255:
            raise UserError(
                f"mask {str(path)!r}: label {highest} is out of range: classes are 0 to "
                f"{self.num_classes - 1}, {IGNORE} is ignored"
            )
        labels = raw.astype(np.uint8)
        if self.label_map is not None:
            labels = self.label_map[labels]
        wrong = labels[(labels >= self.num_classes) & (labels != IGNORE)]
        if wrong.size:
            raise UserError(
                f"mask {str(path)!r}: label {int(wrong[0])} is out of range: classes are 0 to "
                f"{self.num_classes - 1}, {IGNORE} is ignored"
            )
        return labels

    def _labels_of_colors(self, path: Path) -> np.ndarray:
        assert self.colors is not None
        rgb = np.asarray(decode_image(path, mode="RGB")).astype(np.int64)
        codes = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        labels = np.full(codes.shape, -1, dtype=np.int16)
        for (red, green, blue), label in self.colors.items():
            labels[codes == (red << 16 | green << 8 | blue)] = label
        unknown = codes[labels < 0]
        if unknown.size:
            code = int(unknown[0])
            raise UserError(
                f"mask {str(path)!r}: the color {code >> 16, code >> 8 & 255, code & 255} belongs "
                f"to no class ({unknown.size} pixels); add it to the map of colors"
            )
        return labels.astype(np.uint8)


def _find_within(folder: Path, inner: str, name: str) -> Path:
    """Return the folder that holds an entry: the one given, or one or two levels below it."""
    for candidate in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
        if (candidate / inner).exists():
            return candidate
    raise UserError(f"data set {name!r}: {str(folder)!r} has no {inner!r}")


def facts_of(class_names: Sequence[str], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Collect what a data set says of itself."""
    return {
        "class_names": list(class_names),
        "num_classes": len(class_names),
        "in_channels": 3,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "palette": [list(color) for color in palette(class_names)],
        "notes": list(notes),
    }


def _compare_counts(
    name: str, found: Mapping[str, Dataset], published: Mapping[str, int]
) -> list[str]:
    """Say where a split is not as large as the published one; such results are not comparable."""
    other = [
        f"{split} {len(found[split]):,} of {count:,}"
        for split, count in published.items()
        if split in found and len(found[split]) != count
    ]
    if not other:
        return []
    note = (
        f"{name}: not the published number of images ({', '.join(other)}); results are not "
        "comparable with published ones"
    )
    warnings.warn(note, stacklevel=3)
    return [note]


def paired(
    images: Path, masks: Path, *, name: str, mask_name: Callable[[Path], str] | None = None
) -> list[tuple[Path, Path]]:
    """Return image files with their masks, by the names of the images.

    Args:
        images: folder that is searched at any depth.
        masks: folder with the same folders inside.
        name: of the data set, for messages.
        mask_name: file name of a mask for an image; by default the same stem with ``.png``.

    Raises:
        UserError: there are no images, or one has no mask.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"data set {name!r}: the folder {str(folder)!r} does not exist")
    files = sorted(
        path
        for path in images.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise UserError(f"data set {name!r}: {str(images)!r} holds no images; the split is empty")
    pairs: list[tuple[Path, Path]] = []
    for path in files:
        wanted = mask_name(path) if mask_name else f"{path.stem}.png"
        mask = masks / path.relative_to(images).parent / wanted
        if not mask.is_file():
            raise UserError(f"data set {name!r}: image {str(path)!r} has no mask {str(mask)!r}")
        pairs.append((path, mask))
    return pairs


def _read_ids(path: Path, name: str) -> list[str]:
    """Read the lines of a list of samples."""
    if not path.is_file():
        raise UserError(f"data set {name!r}: the list {str(path)!r} does not exist")
    ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not ids:
        raise UserError(f"data set {name!r}: the list {str(path)!r} is empty; so is the split")
    return ids


@register_dataset("voc2012")
class PascalVoc:
    """PASCAL VOC 2012: 20 classes and background, with the masks of SBD where they lie there.

    ``JPEGImages``, ``ImageSets/Segmentation/<split>.txt`` and ``SegmentationClass``; with SBD
    ``SegmentationClassAug`` (index images of all ids) and ``trainaug.txt``. A mask is taken from
    ``SegmentationClassAug`` if it is there. The test images have no masks; predict on them and
    pack them with :func:`eanet.tasks.segmentation.submission.pack_voc`.

    Args:
        root: ``VOCdevkit/VOC2012``, or a folder above it.
        train: the training split: "trainaug" (10,582), "train" (1,464) or "trainval" (2,913,
            which holds the validation images too: scores on them then say nothing).

    Raises:
        UserError: a folder, list or file is missing.
    """

    published = {"train": 1464, "trainaug": 10582, "val": 1449, "trainval": 2913}  # noqa: RUF012

    def __init__(self, root: str | None, *, train: str = "trainaug") -> None:
        if train not in ("train", "trainaug", "trainval"):
            raise UserError(f"voc2012: train must be train, trainaug or trainval, got {train!r}")
        given = require_root(root, "voc2012", "JPEGImages and ImageSets")
        self._folder = _find_within(given, "JPEGImages", "voc2012")
        found = {name: self._read(name) for name in (train, "val")}
        notes = _compare_counts("voc2012", found, self.published)
        self.splits = Splits(found[train], found["val"], None, facts_of(VOC, notes))

    def _read(self, split: str) -> LabeledFiles:
        ids = _read_ids(self._folder / "ImageSets" / "Segmentation" / f"{split}.txt", "voc2012")
        pairs: list[tuple[Path, Path]] = []
        for name in ids:
            image = self._folder / "JPEGImages" / f"{name}.jpg"
            masks = [
                self._folder / folder / f"{name}.png"
                for folder in ("SegmentationClassAug", "SegmentationClass")
            ]
            mask = next((mask for mask in masks if mask.is_file()), None)
            if not image.is_file() or mask is None:
                missing = masks[0] if image.is_file() else image
                raise UserError(f"voc2012: {split}.txt names {name!r}, but {missing} is missing")
            pairs.append((image, mask))
        return LabeledFiles(pairs, len(VOC))


@register_dataset("ade20k")
class Ade20k:
    """ADE20K, the scene parsing challenge of 2016: 150 classes; raw label 0 is ignored.

    Args:
        root: ``ADEChallengeData2016`` with ``images`` and ``annotations``, or a folder above it.

    Raises:
        UserError: a folder or file is missing.
    """

    published = {"training": 20210, "validation": 2000}  # noqa: RUF012

    def __init__(self, root: str | None) -> None:
        given = require_root(root, "ade20k", "images and annotations")
        folder = _find_within(given, "annotations", "ade20k")
        # label - 1, and 0 becomes "ignored"
        shift = np.concatenate([[IGNORE], np.arange(255)]).astype(np.uint8)
        found = {
            split: LabeledFiles(
                paired(folder / "images" / split, folder / "annotations" / split, name="ade20k"),
                len(ADE20K),
                shift,
            )
            for split in self.published
        }
        notes = _compare_counts("ade20k", found, self.published)
        self.splits = Splits(found["training"], found["validation"], None, facts_of(ADE20K, notes))


@register_dataset("cityscapes")
class Cityscapes:
    """Cityscapes: 19 classes of street scenes, 1024 x 2048, fine annotations.

    Args:
        root: the folder of ``leftImg8bit`` and ``gtFine``. Masks are ``*_labelTrainIds.png`` where
            they were made, else the raw ``*_labelIds.png``.

    Raises:
        UserError: a folder or file is missing.
    """

    published = {"train": 2975, "val": 500}  # noqa: RUF012

    def __init__(self, root: str | None) -> None:
        given = require_root(root, "cityscapes", "leftImg8bit and gtFine")
        folder = _find_within(given, "leftImg8bit", "cityscapes")
        found = {split: self._read(folder, split) for split in self.published}
        notes = _compare_counts("cityscapes", found, self.published)
        self.splits = Splits(found["train"], found["val"], None, facts_of(CITYSCAPES, notes))

    @staticmethod
    def _read(folder: Path, split: str) -> LabeledFiles:
        masks = folder / "gtFine" / split
        prepared = next(masks.rglob("*_gtFine_labelTrainIds.png"), None) is not None
        ending = "labelTrainIds" if prepared else "labelIds"
        pairs = paired(
            folder / "leftImg8bit" / split,
            masks,
            name="cityscapes",
            mask_name=lambda path: (
                path.name.removesuffix("_leftImg8bit.png") + f"_gtFine_{ending}.png"
            ),
        )
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[list(CITYSCAPES_TRAIN_IDS)] = np.arange(len(CITYSCAPES), dtype=np.uint8)
        return LabeledFiles(pairs, len(CITYSCAPES), None if prepared else table)


@register_dataset("camvid")
class CamVid:
    """CamVid in SegNet's form: 11 classes of street scenes, 360 x 480; label 11 is ignored.

    ``train``, ``val``, ``test`` with images and ``trainannot``, ``valannot``, ``testannot`` with
    index images of the same names.

    Args:
        root: the folder of these six, or a folder above it.

    Raises:
        UserError: a folder or file is missing.
    """

    published = {"train": 367, "val": 101, "test": 233}  # noqa: RUF012

    def __init__(self, root: str | None) -> None:
        given = require_root(root, "camvid", "train, trainannot, val, valannot, test, testannot")
        folder = _find_within(given, "trainannot", "camvid")
        table = np.arange(256).astype(np.uint8)
        table[len(CAMVID)] = IGNORE
        found = {
            split: LabeledFiles(
                paired(folder / split, folder / f"{split}annot", name="camvid"), len(CAMVID), table
            )
            for split in self.published
        }
        notes = _compare_counts("camvid", found, self.published)
        self.splits = Splits(found["train"], found["val"], found["test"], facts_of(CAMVID, notes))
