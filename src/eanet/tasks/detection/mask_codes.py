"""Outlines and run-length codes of masks, by COCO's conventions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as codes

from eanet.tasks.detection.samples import Segmentation

__all__ = ["decode_mask", "encode_mask", "segmentation_problem"]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return the compressed run-length code of a mask, as JSON values.

    Args:
        mask: (height, width), true inside.
    """
    code = codes.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = code["counts"]
    return {
        "size": [int(length) for length in code["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def decode_mask(segmentation: Segmentation, size: tuple[int, int]) -> np.ndarray:
    """Return a mask (height, width) of bytes, 0 or 1.

    Args:
        segmentation: polygons, whose union is taken, or a run-length code; checked before.
        size: (height, width) of the image.
    """
    height, width = size
    if isinstance(segmentation, list):
        parts: Any = codes.frPyObjects(segmentation, height, width)
        code = codes.merge(parts)
    elif isinstance(segmentation["counts"], list):
        code = codes.frPyObjects([segmentation], height, width)[0]
    else:
        code = segmentation
    return np.ascontiguousarray(codes.decode(code))


def segmentation_problem(segmentation: Any, size: tuple[int, int]) -> str | None:
    """Return what is wrong with a segmentation, or ``None``.

    Args:
        segmentation: as read from a file.
        size: (height, width) of the image.
    """
    if isinstance(segmentation, list):
        return _polygon_problem(segmentation)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "segmentation is neither polygons nor a run-length code with size and counts"
    if list(segmentation["size"]) != list(size):
        return (
            f"run-length code of size {segmentation['size']} (height, width) in an image of "
            f"{list(size)}"
        )
    counts = segmentation["counts"]
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    if (
        not isinstance(runs, list)
        or not all(isinstance(run, int) and run >= 0 for run in runs)
        or sum(runs) != size[0] * size[1]
    ):
        return f"counts of the run-length code do not add up to the {size[0] * size[1]} pixels"
    return None


def _polygon_problem(polygons: Sequence[Any]) -> str | None:
    if not polygons:
        return "segmentation is empty"
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(
            isinstance(value, int | float) and math.isfinite(value) for value in polygon
        )
        if not numbers:
            return "a polygon is not a list of finite numbers"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon has {len(polygon)} numbers; it needs x and y of 3 points or more"
    return None


def _decompressed(text: str) -> list[int] | None:
    """Return the runs of a compressed code: five bits a character, differences to the last but one.

    Returns:
        ``None`` where the text is no such code.
    """
    runs: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        more = True
        while more:
            if place == len(text) or not 48 <= ord(text[place]) < 112:
                return None
            bits = ord(text[place]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            place, shift = place + 1, shift + 5
            if not more and bits & 0x10:
                value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
