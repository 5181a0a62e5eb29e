"""Masks of instances: what the mask branch is to learn, and its result put into the image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

__all__ = ["MASK_SIZE", "mask_targets", "paste_mask", "paste_masks"]

#: edge of the masks that networks predict, in cells
MASK_SIZE = 28


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, size: int = MASK_SIZE) -> Tensor:
    """Return the part of each object's mask within a box, in cells (RoIAlign, then >= 0.5).

    Args:
        masks: (objects, height, width), of bytes or truth values.
        boxes: (N, 4), in the pixels of the masks.
        objects: (N), the object of each box.
        size: edge of the result in cells.

    Returns:
        (N, size, size), 0 or 1 in the type of the boxes.
    """
    regions = torch.cat([objects[:, None].to(boxes.dtype), boxes], 1)
    cut = roi_align(masks[:, None].to(boxes.dtype), regions, size, 1.0, 0, aligned=True)
    return (cut[:, 0] >= 0.5).to(boxes.dtype)


def _weights(low: float, high: float, cells: int, pixels: range, like: Tensor) -> Tensor:
    """Return what each cell contributes to each pixel along one axis, (pixels, cells).

    Bilinear: the center of pixel x lies at (x + 0.5 - low) / (high - low) of the box, and cells
    beyond the border are 0.
    """
    centers = torch.arange(pixels.start, pixels.stop, device=like.device, dtype=like.dtype) + 0.5
    positions = (centers - low) / (high - low) * cells - 0.5
    distances = positions[:, None] - torch.arange(cells, device=like.device, dtype=like.dtype)
    return (1 - distances.abs()).clamp(min=0)


def _reach(low: float, high: float, cells: int, length: int) -> range:
    """Return the pixels that a box of cells reaches along one axis: half a cell further."""
    margin = (high - low) / cells / 2
    return range(
        min(max(math.floor(low - margin), 0), length),
        min(max(math.ceil(high + margin), 0), length),
    )


def paste_mask(
    probabilities: Tensor, box: Sequence[float], size: tuple[int, int]
) -> tuple[Tensor, range, range]:
    """Sample a mask at the center of every pixel that its box reaches.

    Args:
        probabilities: (cells, cells).
        box: in the pixels of the image, not rounded.
        size: (height, width) of the image.

    Returns:
        The probabilities of the pixels, and the rows and columns these stand in; all others are 0.
    """
    x0, y0, x1, y1 = box
    cells = probabilities.shape[-1]
    if not (x1 > x0 and y1 > y0 and all(map(math.isfinite, box))):
        return probabilities[:0, :0], range(0), range(0)
    rows, columns = _reach(y0, y1, cells, size[0]), _reach(x0, x1, cells, size[1])
    down = _weights(y0, y1, cells, rows, probabilities)
    across = _weights(x0, x1, cells, columns, probabilities)
    return down @ probabilities @ across.T, rows, columns


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], *, threshold: float | None = 0.5
) -> Tensor:
    """Put masks into an image.

    Args:
        probabilities: (N, cells, cells).
        boxes: (N, 4), in the pixels of the image.
        size: (height, width) of the image.
        threshold: probability from which on a pixel belongs to the object; ``None`` returns
            probabilities.

    Returns:
        (N, height, width), truth values or probabilities.
    """
    dtype = probabilities.dtype if threshold is None else torch.bool
    result = torch.zeros(len(boxes), *size, dtype=dtype, device=boxes.device)
    for whole, mask, box in zip(result, probabilities, boxes.tolist(), strict=True):
        pasted, rows, columns = paste_mask(mask, box, size)
        part = whole[rows.start : rows.stop, columns.start : columns.stop]
        part.copy_(pasted if threshold is None else pasted >= threshold)
    return result
