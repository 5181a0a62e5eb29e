"""Data sets of images with objects: COCO's form, and that of PASCAL VOC."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eanet.data.files import decode_image, require_root
from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.detection.annotations import ImageRecord, Invalid, read_coco
from eanet.tasks.detection.samples import Instance, Sample
from eanet.tasks.detection.voc import class_names_of, read_voc

__all__ = ["AnnotatedImages", "Coco", "Voc", "is_trainable", "object_facts", "trainable"]

#: of published ImageNet models, which detectors start from
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: images with a shorter side are not trained on
_MIN_TRAINED_SIDE = 32


@dataclass
class AnnotatedImages:
    """Image files and their objects.

    Args:
        records: of the images, checked.
        source: the annotations, for messages.
    """

    records: Sequence[ImageRecord]
    source: Path

    @property
    def batch_groups(self) -> list[int]:
        """Whether each image is wider than high: wide and high ones do not share a batch."""
        return [int(record.size[1] > record.size[0]) for record in self.records]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Decode one image, stored or turned upright, whichever has the size that was annotated.

        Raises:
            UserError: the file is no image, or neither has that size.
        """
        record = self.records[index]
        for upright in (False, True):
            image = decode_image(record.path, mode="RGB", upright=upright)
            if (image.height, image.width) == record.size:
                return Sample(image, record.instances, str(record.path), record.number, record.size)
        raise UserError(
            f"{self.source}: image {record.number} should have {record.size[1]} x "
            f"{record.size[0]} pixels, {str(record.path)!r} has {image.width} x {image.height}"
        )


def is_trainable(instance: Instance, size: tuple[int, int]) -> bool:
    """Return whether an object is learned from: no crowd, and no sliver within its image."""
    x, y, width, height = instance.box
    inside = min(x + width, size[1]) > max(x, 0) and min(y + height, size[0]) > max(y, 0)
    return not instance.is_crowd and instance.area > 0 and min(width, height) >= 1 and inside


def trainable(images: AnnotatedImages, *, keep_empty: bool) -> AnnotatedImages:
    """Return the images that are trained on.

    Args:
        images: all images of a training split.
        keep_empty: whether images without an object stay, as examples of where nothing is.

    Raises:
        UserError: none is left.
    """
    kept: list[ImageRecord] = []
    left_out: list[str] = []
    for record in images.records:
        good = [instance for instance in record.instances if is_trainable(instance, record.size)]
        large = min(record.size) >= _MIN_TRAINED_SIDE
        if large and (good or (keep_empty and not record.instances)):
            kept.append(record)
        elif record.instances:
            number = record.instances[0].number
            left_out.append(f"{record.path.name} (annotation {number})")
    if not any(record.instances for record in kept):
        first = next((x for record in images.records for x in record.instances), None)
        crowd = first is not None and first.is_crowd
        what = (
            f"annotation {first.number} and all others are crowds"
            if crowd and first
            else ("it has no object of a pixel or more")
        )
        raise UserError(f"{images.source}: nothing to train on: {what}")
    if left_out:
        warnings.warn(
            f"{images.source}: {len(left_out)} image(s) have crowds or slivers alone, or are too "
            f"small, and are not trained on: {', '.join(left_out[:5])}"
            f"{', ...' if len(left_out) > 5 else ''}",
            stacklevel=2,
        )
    return AnnotatedImages(kept, images.source)


def object_facts(
    categories: Mapping[int, str], splits: Sequence[AnnotatedImages], *, has_masks: bool
) -> dict[str, Any]:
    """Collect what a data set says of itself.

    Args:
        categories: names by number, in the order of the labels.
        splits: of the data.
        has_masks: whether every object has a mask.
    """
    return {
        "class_names": list(categories.values()),
        "category_ids": list(categories),
        "num_classes": len(categories),
        "in_channels": 3,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "has_masks": has_masks,
        "num_instances": [sum(len(r.instances) for r in split.records) for split in splits],
    }


def _has_masks(splits: Sequence[AnnotatedImages]) -> bool:
    """Return whether every object that is no crowd has a mask."""
    instances = [x for split in splits for record in split.records for x in record.instances]
    return bool(instances) and all(x.segmentation for x in instances if not x.is_crowd)


@register_dataset("coco")
class Coco:
    """Images and objects in COCO's form.

    ``annotations/instances_train2017.json`` with images in ``train2017``, and the same for
    ``val2017``; a year may be missing from the names. A ``test`` split of that form is used where
    it has annotations.

    Args:
        root: the folder.
        val_as: whether ``val`` is the validation split, which chooses the best checkpoint, or the
            test split, in which case a part of ``train`` is set apart to choose by.
        invalid: "stop" refuses annotations that cannot be meant, "drop" leaves them out.
        keep_empty: train on images without objects too.

    Raises:
        UserError: a file is missing or an annotation cannot be meant; the message names it.
    """

    def __init__(
        self,
        root: str | None,
        *,
        val_as: Literal["validation", "test"] = "validation",
        invalid: Invalid = "stop",
        keep_empty: bool = False,
    ) -> None:
        folder = require_root(root, "coco", "annotations/instances_train2017.json and train2017/")
        if val_as not in ("validation", "test"):
            raise UserError(f"data.arguments.val_as must be validation or test, got {val_as!r}")
        parts: dict[str, AnnotatedImages] = {}
        categories: dict[int, str] = {}
        for split, names in {"train": ("train2017", "train"), "val": ("val2017", "val"),
                             "test": ("test2017", "test")}.items():  # fmt: skip
            files = [folder / "annotations" / f"instances_{name}.json" for name in names]
            file = next((file for file in files if file.is_file()), None)
            if file is None:
                if split == "train":
                    raise UserError(f"data set 'coco': there is no {files[0]}, nor {files[1].name}")
                continue
            images = folder / file.stem.removeprefix("instances_")
            records, found = read_coco(file, images, invalid=invalid)
            if categories and found != categories:
                raise UserError(f"{file}: has other categories than the training annotations")
            categories = found
            parts[split] = AnnotatedImages(records, file)
        if val_as == "test" and "val" in parts:
            parts["test"] = parts.pop("val")
        facts = object_facts(
            categories, list(parts.values()), has_masks=_has_masks(list(parts.values()))
        )
        self.splits = Splits(
            trainable(parts["train"], keep_empty=keep_empty),
            parts.get("val"),
            parts.get("test"),
            facts,
        )


@register_dataset("voc")
class Voc:
    """Images and boxes in the form of PASCAL VOC.

    ``Annotations/*.xml``, ``JPEGImages`` and the lists ``ImageSets/Main/{train,val,test}.txt``, of
    which ``val`` and ``test`` may be missing.

    Args:
        root: the folder.
        class_names: in the order of the labels; ``None`` takes all that occur, by name.
        invalid: "stop" refuses annotations that cannot be meant, "drop" leaves them out.
        keep_empty: train on images without objects too.

    Raises:
        UserError: a file is missing or an annotation cannot be meant; the message names it.
    """

    def __init__(
        self,
        root: str | None,
        *,
        class_names: Sequence[str] | None = None,
        invalid: Invalid = "stop",
        keep_empty: bool = False,
    ) -> None:
        folder = require_root(root, "voc", "Annotations/, JPEGImages/ and ImageSets/Main/")
        lists = folder / "ImageSets" / "Main"
        names = [name for name in ("train", "val", "test") if (lists / f"{name}.txt").is_file()]
        if "train" not in names:
            raise UserError(f"data set 'voc': there is no {lists / 'train.txt'}")
        classes = list(class_names) if class_names else class_names_of(folder, names)
        if not classes:
            raise UserError(f"{folder / 'Annotations'}: there is no object of any class")
        parts = {
            name: AnnotatedImages(read_voc(folder, name, classes, invalid=invalid), folder)
            for name in names
        }
        categories = dict(enumerate(classes, start=1))
        self.splits = Splits(
            trainable(parts["train"], keep_empty=keep_empty),
            parts.get("val"),
            parts.get("test"),
            object_facts(categories, list(parts.values()), has_masks=False),
        )
