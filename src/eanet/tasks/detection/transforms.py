"""From a sample as stored to what the network sees, and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eanet.tasks.detection.boxes import clip_boxes
from eanet.tasks.detection.datasets import is_trainable
from eanet.tasks.detection.mask_codes import decode_mask
from eanet.tasks.detection.samples import Instance, Sample

__all__ = [
    "Augmentation",
    "augment",
    "normalize",
    "prepare",
    "resized_size",
    "target_of",
    "to_original",
]


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    Args:
        sizes: shorter sides to choose from.
        max_size: limit of the longer side.
        horizontal_flip: probability to mirror left and right.
        vertical_flip: probability to mirror up and down, for images without an up.
    """

    sizes: Sequence[int]
    max_size: int
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0


def resized_size(size: tuple[int, int], shorter: int, longest: int) -> tuple[int, int]:
    """Return (height, width) with the shorter side as asked, unless the longer one gets too long.

    >>> resized_size((480, 640), 800, 1333), resized_size((300, 900), 800, 1333)
    ((800, 1067), (444, 1333))
    """
    scale = min(shorter / min(size), longest / max(size))
    height, width = (max(int(length * scale + 0.5), 1) for length in size)
    return height, width


def prepare(sample: Sample, *, shorter: int, longest: int) -> Tensor:
    """Return the image as bytes (3, height, width), resized bilinearly without smoothing."""
    image = torch.from_numpy(np.array(sample.image).transpose(2, 0, 1).copy())
    size = resized_size((image.shape[1], image.shape[2]), shorter, longest)
    if size == tuple(image.shape[1:]):
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)
    return resized[0].round().to(torch.uint8)


def target_of(
    instances: Sequence[Instance],
    original: tuple[int, int],
    size: tuple[int, int],
    *,
    masks: bool,
) -> dict[str, Tensor]:
    """Return what a network is to learn of an image.

    Args:
        instances: its objects; crowds and slivers are left out.
        original: (height, width) as stored.
        size: (height, width) as the network sees it.
        masks: whether masks are learned; masks are resized by nearest neighbor.
    """
    kept = [instance for instance in instances if is_trainable(instance, original)]
    corners = torch.tensor([instance.box for instance in kept], dtype=torch.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    scale_y, scale_x = (new / old for new, old in zip(size, original, strict=True))
    corners *= torch.tensor([scale_x, scale_y, scale_x, scale_y])
    target = {
        "boxes": clip_boxes(corners, size),
        "labels": torch.tensor([instance.label for instance in kept], dtype=torch.int64),
    }
    if masks:
        stack = torch.zeros(len(kept), *original, dtype=torch.uint8)
        for place, instance in zip(stack, kept, strict=True):
            if instance.segmentation is None:
                raise ValueError(f"annotation {instance.number} has no mask")
            place.copy_(torch.from_numpy(decode_mask(instance.segmentation, original)))
        if size != original and len(kept):
            stack = F.interpolate(stack[None], size, mode="nearest-exact")[0]
        elif size != original:
            stack = stack.new_zeros(0, *size)
        target["masks"] = stack
    return target


def augment(sample: Sample, how: Augmentation, *, masks: bool) -> Sample:
    """Return a training sample, varied at random."""
    place = int(torch.randint(len(how.sizes), ())) if len(how.sizes) > 1 else 0
    image = prepare(sample, shorter=how.sizes[place], longest=how.max_size)
    size = (image.shape[1], image.shape[2])
    target = target_of(sample.instances or (), sample.size, size, masks=masks)
    for probability, axis in ((how.horizontal_flip, 2), (how.vertical_flip, 1)):
        if float(torch.rand(())) < probability:
            image, target = image.flip(axis), _mirrored(target, axis, size)
    return sample.prepared(image, target)


def _mirrored(target: dict[str, Tensor], axis: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return boxes and masks of a mirrored image."""
    low, length = (0, size[1]) if axis == 2 else (1, size[0])
    boxes = target["boxes"].clone()
    boxes[:, low], boxes[:, low + 2] = (
        length - target["boxes"][:, low + 2],
        length - target["boxes"][:, low],
    )
    mirrored = {**target, "boxes": boxes}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(axis)
    return mirrored


def normalize(
    images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
) -> list[Tensor]:
    """Return images of bytes as float32 with the mean and spread that the network expects."""
    shift = torch.tensor(mean, device=images[0].device)[:, None, None]
    scale = torch.tensor(std, device=images[0].device)[:, None, None]
    return [(image.float() / 255 - shift) / scale for image in images]


def to_original(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Return boxes in the pixels of the stored image, clipped to it.

    Args:
        boxes: (N, 4), in the pixels of the image that the network saw.
        size: (height, width) of that image.
        original: (height, width) of the stored one.
    """
    scale_y, scale_x = (old / new for old, new in zip(original, size, strict=True))
    return clip_boxes(boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y]), original)
