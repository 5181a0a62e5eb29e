"""What can be found without learning: connected regions that differ from the ground."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from eanet.tasks.detection.mask_codes import encode_mask
from eanet.tasks.detection.samples import Sample

__all__ = ["commonest_label", "otsu_threshold", "threshold_regions"]

#: regions that are looked at, the largest first, and their least area in pixels
_MAX_REGIONS, _MIN_AREA = 100, 9


def commonest_label(samples: Sequence[Sample]) -> int:
    """Return the class with the most objects."""
    labels = [instance.label for sample in samples for instance in sample.instances or ()]
    return int(np.bincount(labels).argmax()) if labels else 0


def otsu_threshold(values: np.ndarray) -> int:
    """Return the threshold of bytes that best divides them in two groups (Otsu, 1979).

    It maximizes the variance between the groups, values up to the threshold and those above.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nan_to_num(between).argmax())


def threshold_regions(image: np.ndarray) -> list[dict[str, Any]]:
    """Return the connected regions of the rarer side of the threshold, the largest scoring most.

    Args:
        image: bytes, (height, width, 3).

    Returns:
        For each region ``score``, ``bbox`` and ``segmentation``.
    """
    grey = np.rint(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    bright = grey > otsu_threshold(grey)
    inside = bright if bright.mean() <= 0.5 else ~bright
    numbered = np.empty(inside.shape, dtype=np.int32)
    ndimage.label(inside, output=numbered)
    areas = np.bincount(numbered.ravel())[1:]
    boxes = ndimage.find_objects(numbered)
    found: list[dict[str, Any]] = []
    for place in np.argsort(-areas, kind="stable")[:_MAX_REGIONS].tolist():
        if areas[place] < _MIN_AREA:
            break
        rows, columns = boxes[place]
        box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
        found.append(
            {
                "score": float(areas[place] / inside.size),
                "bbox": [float(value) for value in box],
                "segmentation": encode_mask(numbered == place + 1),
            }
        )
    return found
