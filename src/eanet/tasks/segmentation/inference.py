"""From a network to the class scores of images: windows, several scales, mirroring."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eanet.tasks.segmentation.transforms import (
    CONVENTIONS,
    Convention,
    fit_scale,
    next_size,
    resize_image,
)

__all__ = ["Protocol", "segment"]

_Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Protocol:
    """How an image is segmented.

    Args:
        scales: factors on the size of the image; one pass for each.
        mirror: a second pass of each, mirrored left and right.
        merge: passes are summed as "logits" (the authors) or as "probabilities" (mmsegmentation).
        base_scale: (long side, short side) that the image is fitted into first; ``None`` for its
            own size.
        size_modulus: the image of every pass is filled up at bottom and right with its mean color
            until height and width are 1 more than a multiple of this; ``None`` does not.
        window: height and width of a sliding window; ``None`` for the whole image at once.
        window_stride: its step down and to the right.
        convention: of resampling, see :mod:`eanet.tasks.segmentation.transforms`.

    Raises:
        ValueError: an argument is outside its range.
    """

    scales: Sequence[float] = (1.0,)
    mirror: bool = False
    merge: Literal["logits", "probabilities"] = "logits"
    base_scale: tuple[int, int] | None = None
    size_modulus: int | None = None
    window: tuple[int, int] | None = None
    window_stride: tuple[int, int] | None = None
    convention: Convention = "authors"

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be positive factors, got {self.scales}")
        if self.merge not in ("logits", "probabilities"):
            raise ValueError(f"merge must be 'logits' or 'probabilities', got {self.merge!r}")
        if self.convention not in CONVENTIONS:
            raise ValueError(
                f"convention must be one of {', '.join(CONVENTIONS)}; got {self.convention!r}"
            )
        if (self.window is None) != (self.window_stride is None):
            raise ValueError("window and window_stride go together")
        if self.size_modulus is not None and self.size_modulus < 1:
            raise ValueError(f"size_modulus must be 1 or more, got {self.size_modulus}")

    def size_of_pass(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """Return the size that an image is resized to in the pass of a scale."""
        if self.base_scale is not None:
            factor = fit_scale(height, width, [scale * side for side in self.base_scale])
            size = int(height * factor + 0.5), int(width * factor + 0.5)
        elif self.convention == "authors":
            size = int(scale * height), int(scale * width)
        else:
            size = int(height * scale + 0.5), int(width * scale + 0.5)
        return max(size[0], 1), max(size[1], 1)


def segment(
    network: _Network,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    protocol: Protocol,
    *,
    takes_masks: bool = False,
    out_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """Return the class scores (classes, height, width) of each image.

    The result for an image does not depend on what shares its batch: images of unlike size run
    together under a mask where the network takes one, and else in groups of one size.

    Args:
        network: normalized images (and ``mask``) to logits of the same size.
        images: normalized, (batch, channels, height, width); anything beyond an image.
        sizes: height and width of each image.
        protocol: how.
        takes_masks: whether ``network(images, mask)`` gives what each image gives alone.
        out_sizes: size of the scores of each image; its own by default.
    """
    wanted = list(sizes) if out_sizes is None else list(out_sizes)
    whole = protocol.window is None and len(set(sizes)) > 1
    if takes_masks and whole:
        return _sum_passes(network, images, sizes, wanted, protocol)
    results: list[Tensor | None] = [None] * len(images)
    for size in dict.fromkeys(sizes):
        members = [number for number, own in enumerate(sizes) if own == size]
        group = images[members, :, : size[0], : size[1]]
        found = _sum_passes(
            network, group, [size] * len(members), [wanted[m] for m in members], protocol
        )
        for member, scores in zip(members, found, strict=True):
            results[member] = scores
    return [scores for scores in results if scores is not None]


def _sum_passes(
    network: _Network,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    wanted: Sequence[tuple[int, int]],
    protocol: Protocol,
) -> list[Tensor]:
    """Return the scores of images over all passes."""
    totals: list[Tensor] = []
    for scale in protocol.scales:
        for mirrored in (False, True) if protocol.mirror else (False,):
            found = _one_pass(network, images, sizes, protocol, scale, mirrored=mirrored)
            found = [
                resize_image(logits, size, _upward(protocol.convention))
                for logits, size in zip(found, wanted, strict=True)
            ]
            if protocol.merge == "probabilities":
                found = [logits.softmax(dim=0) for logits in found]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    return totals


def _upward(convention: Convention) -> Convention:
    """Return the convention for logits, which are never smoothed."""
    return "mmsegmentation" if convention == "smooth" else convention


def _one_pass(
    network: _Network,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    protocol: Protocol,
    scale: float,
    *,
    mirrored: bool,
) -> list[Tensor]:
    """Return the logits of each image at the size of one pass, turned back."""
    inputs: list[Tensor] = []
    for image, (height, width) in zip(images, sizes, strict=True):
        own = resize_image(
            image[:, :height, :width],
            protocol.size_of_pass(height, width, scale),
            protocol.convention,
        )
        inputs.append(own.flip(-1) if mirrored else own)
    shapes = [(own.shape[1], own.shape[2]) for own in inputs]
    frames = shapes
    if protocol.size_modulus is not None:
        modulus = protocol.size_modulus
        frames = [
            (next_size(rows, modulus), next_size(columns, modulus)) for rows, columns in shapes
        ]
    height, width = (max(frame[axis] for frame in frames) for axis in (0, 1))
    stacked = torch.stack(
        [F.pad(own, (0, width - own.shape[2], 0, height - own.shape[1])) for own in inputs]
    )
    if len(set(frames)) > 1:
        mask = torch.zeros(len(frames), height, width, dtype=torch.bool, device=images.device)
        for place, (rows, columns) in zip(mask, frames, strict=True):
            place[:rows, :columns] = True
        logits = network(stacked, mask)
    elif protocol.window is not None:
        logits = _slide(network, stacked, protocol)
    else:
        logits = network(stacked)
    results = [
        _at_least_float(own[:, :rows, :columns])
        for own, (rows, columns) in zip(logits, shapes, strict=True)
    ]
    return [own.flip(-1) if mirrored else own for own in results]


def _slide(network: _Network, images: Tensor, protocol: Protocol) -> Tensor:
    """Return logits averaged over the windows that cover a pixel.

    Windows start at multiples of the stride; those that would stand over the border are moved
    back, and an image smaller than the window is one window.
    """
    assert protocol.window is not None
    assert protocol.window_stride is not None
    total: Any = None
    size: tuple[int, int] = (images.shape[2], images.shape[3])
    tops, lefts = (
        _starts(side, window, stride)
        for side, window, stride in zip(size, protocol.window, protocol.window_stride, strict=True)
    )
    count = images.new_zeros(1, 1, *size)
    for top in tops:
        for left in lefts:
            rows = slice(top, min(top + protocol.window[0], size[0]))
            columns = slice(left, min(left + protocol.window[1], size[1]))
            logits = _at_least_float(network(images[:, :, rows, columns]))
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *size)
            total[:, :, rows, columns] += logits
            count[:, :, rows, columns] += 1
    return total / count


def _at_least_float(logits: Tensor) -> Tensor:
    """Return logits of half precision as float32, others as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Return where windows start along one side."""
    if side <= window:
        return [0]
    number = -(-(side - window) // stride) + 1
    return [min(place * stride, side - window) for place in range(number)]
