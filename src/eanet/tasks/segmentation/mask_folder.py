"""A data set of one's own: a folder of images and a folder of masks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eanet.data.files import require_root
from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.segmentation.datasets import LabeledFiles, facts_of, paired
from eanet.tasks.segmentation.samples import IGNORE

__all__ = ["MaskFolder"]

_Color = tuple[int, int, int]


@register_dataset("mask_folder")
class MaskFolder:
    """Any folder of images and masks.

    ``root/<images>/<split>/...`` with ``root/<masks>/<split>/...``, the splits being ``train`` and,
    where they are there, ``val`` and ``test``; or without split folders. A part of the training
    images is set apart for validation where there is no ``val``. A mask has the name of its image,
    ending in ``.png``. Its values are the classes, 255 is ignored; or its colors are, when the
    classes have colors.

    Classes come from ``root/classes.json``, a list of names or a map from names to colors
    (``{"road": [128, 64, 128], ...}``, with ``"ignore"`` for what does not count), or from the
    arguments.

    Args:
        root: the folder.
        images: folder of the images within it.
        masks: folder of the masks within it.
        class_names: in the order of the labels; by default those of ``classes.json``.
        colors: the color of each class, in the same order, for masks that hold colors.
        ignore_label: a further raw label that is ignored.

    Raises:
        UserError: a folder, file or the names of the classes are missing.
    """

    def __init__(
        self,
        root: str | None,
        *,
        images: str = "images",
        masks: str = "masks",
        class_names: Sequence[str] | None = None,
        colors: Sequence[Sequence[int]] | None = None,
        ignore_label: int | None = None,
    ) -> None:
        folder = require_root(root, "mask_folder", "images, masks and classes.json")
        if class_names is None:
            classes = _read_classes(folder / "classes.json")
        elif colors is None or len(colors) == len(class_names):
            classes = dict(zip(class_names, colors or [None] * len(class_names), strict=True))
        else:
            raise UserError(f"mask_folder: {len(colors)} colors for {len(class_names)} class_names")
        names = [name for name, color in classes.items() if name != "ignore" or color is None]
        if not 2 <= len(names) <= IGNORE:
            raise UserError(f"mask_folder: there must be 2 to {IGNORE} classes, got {len(names)}")
        color_map = _color_map(classes, names)
        table = None
        if ignore_label is not None:
            if not 0 <= ignore_label <= 255:
                raise UserError(f"mask_folder: ignore_label must be 0 to 255, got {ignore_label}")
            table = np.arange(256).astype(np.uint8)
            table[ignore_label] = IGNORE
        parts = [name for name in ("train", "val", "test") if (folder / images / name).is_dir()]
        if parts and "train" not in parts:
            raise UserError(f"{str(folder / images)!r} has {', '.join(parts)} but no 'train'")
        found = {
            part: LabeledFiles(
                paired(folder / images / part, folder / masks / part, name="mask_folder"),
                len(names),
                table,
                color_map,
            )
            for part in parts or ["."]
        }
        facts = facts_of(names)
        if color_map is not None:
            for color, label in color_map.items():
                if label != IGNORE:
                    facts["palette"][label] = list(color)
        train = found["train" if parts else "."]
        self.splits = Splits(train, found.get("val"), found.get("test"), facts)


def _read_classes(file: Path) -> dict[str, Any]:
    """Read names of classes, and their colors where they have any."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"mask_folder: name the classes in {str(file)!r}, or as data.arguments.class_names"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    if isinstance(content, list):
        return dict.fromkeys(map(str, content))
    if isinstance(content, dict):
        return content
    raise UserError(f"{str(file)!r} must hold a list of names, or a map from names to colors")


def _color_map(classes: dict[str, Any], names: Sequence[str]) -> dict[_Color, int] | None:
    """Return the label of each color; ``None`` where classes have none.

    Raises:
        UserError: a color is none, or not that of one class alone.
    """
    if all(color is None for color in classes.values()):
        return None
    numbers = {name: label for label, name in enumerate(names)} | {"ignore": IGNORE}
    found: dict[_Color, int] = {}
    for name, color in classes.items():
        try:
            red, green, blue = (int(value) for value in color)
        except (TypeError, ValueError):
            raise UserError(
                f"mask_folder: the color of {name!r} must be [red, green, blue], got {color!r}"
            ) from None
        if (red, green, blue) in found:
            raise UserError(f"mask_folder: {name!r} has the color {color} of another class")
        found[red, green, blue] = numbers[name]
    return found
