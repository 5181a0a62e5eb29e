"""Boxes as corners (x1, y1, x2, y2): overlap, and offsets from one box to another."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["box_overlaps", "clip_boxes", "decode_boxes", "encode_boxes"]

#: a side grows or shrinks by this factor at most: log of 1000 / 16
_MAX_LOG_RATIO = math.log(1000 / 16)


def box_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of every pair; boxes without area overlap nothing.

    Args:
        first: (M, 4).
        second: (N, 4).

    Returns:
        (M, N), within [0, 1].
    """
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    intersection = (high - low).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1] - intersection
    return intersection / union.clamp(min=1e-6)


def encode_boxes(boxes: Tensor, targets: Tensor, stds: Sequence[float]) -> Tensor:
    """Return the offsets (dx, dy, dw, dh) that lead from boxes to targets.

    dx = (center of target - center of box) / width / std, dw = log(ratio of widths) / std, and
    the same in y.

    Args:
        boxes: (N, 4), with positive sides.
        targets: (N, 4), with positive sides.
        stds: what each offset is divided by.
    """
    sizes, wanted = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, 2:] + targets[:, :2] - boxes[:, 2:] - boxes[:, :2]) / 2 / sizes
    return torch.cat([shift, torch.log(wanted / sizes)], 1) / boxes.new_tensor(stds)


def decode_boxes(
    boxes: Tensor, deltas: Tensor, stds: Sequence[float], *, clip: tuple[int, int] | None = None
) -> Tensor:
    """Return boxes moved and stretched by offsets; the inverse of :func:`encode_boxes`.

    dw and dh are limited to +- log(1000 / 16).

    Args:
        boxes: (N, 4).
        deltas: (N, ..., 4): one offset for each box, or several.
        stds: as for encoding.
        clip: (height, width) of the image to clip to; ``None`` does not clip.

    Returns:
        Boxes of the shape of ``deltas``.
    """
    deltas = deltas * deltas.new_tensor(stds)
    boxes = boxes.reshape(len(boxes), *[1] * (deltas.ndim - 2), 4)
    centers, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    centers = centers + deltas[..., :2] * sizes
    halves = sizes * deltas[..., 2:].clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp() / 2
    decoded = torch.cat([centers - halves, centers + halves], -1)
    return decoded if clip is None else clip_boxes(decoded, clip)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes cut to an image.

    Args:
        boxes: (..., 4).
        size: (height, width).
    """
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)
