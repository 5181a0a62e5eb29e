"""Images and their labels made ready for training: scale, crop, mirror, colors, padding.

Published recipes resample in ways of their own; a :data:`Convention` names one:

================  ===========================================  ===============================
convention        images                                       labels
================  ===========================================  ===============================
authors           bilinear, corner pixels aligned              pixel floor(i / ratio)
mmsegmentation    bilinear, pixel centers aligned, as bytes    pixel floor(i * old / new)
smooth            as that, with antialiasing when shrinking    pixel floor(i * old / new)
================  ===========================================  ===============================

The authors pad before they mirror, the others after.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from eanet.data.labeled_images import image_to_tensor, normalize
from eanet.tasks.segmentation.samples import IGNORE, Sample

__all__ = [
    "Convention",
    "TrainingTransform",
    "fit_scale",
    "next_size",
    "pad",
    "photometric",
    "resize_image",
    "resize_labels",
]

Convention = Literal["authors", "mmsegmentation", "smooth"]
CONVENTIONS = ("authors", "mmsegmentation", "smooth")


def resize_image(images: Tensor, size: tuple[int, int], convention: Convention) -> Tensor:
    """Return images or logits at another size, bilinear.

    Args:
        images: floating point, (batch, channels, height, width) or without batch.
        size: height and width.
        convention: see the top of this module.
    """
    if tuple(images.shape[-2:]) == size:
        return images
    batched = images if images.ndim == 4 else images.unsqueeze(0)
    out = F.interpolate(
        batched,
        size,
        mode="bilinear",
        align_corners=convention == "authors",
        antialias=convention == "smooth",
    )
    return out if images.ndim == 4 else out.squeeze(0)


def resize_labels(
    labels: Tensor, size: tuple[int, int], convention: Convention, *, ratio: float | None = None
) -> Tensor:
    """Return labels (height, width) at another size, the nearest pixel.

    Args:
        labels: of any integer type.
        size: height and width.
        convention: see the top of this module.
        ratio: of the new size to the old before it was rounded, which the authors' way needs.
    """
    if tuple(labels.shape) == size:
        return labels
    values = labels.float()[None, None]
    if convention == "authors" and ratio is not None:
        resized = F.interpolate(
            values, scale_factor=ratio, mode="nearest", recompute_scale_factor=False
        )
    else:
        resized = F.interpolate(values, size, mode="nearest")
    return resized[0, 0].to(labels.dtype)


def fit_scale(height: int, width: int, scale: Sequence[float]) -> float:
    """Return the factor that fits an image into a scale (long side, short side), ratio kept."""
    return min(max(scale) / max(height, width), min(scale) / min(height, width))


def next_size(side: int, modulus: int) -> int:
    """Return the smallest size of at least ``side`` that is 1 more than a multiple.

    >>> [next_size(side, 8) for side in (64, 65, 66)]
    [65, 65, 73]
    """
    return -(-(side - 1) // modulus) * modulus + 1


def pad(x: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """Return a tensor filled up at bottom and right to at least a size.

    Args:
        x: (..., height, width).
        size: least height and width.
        fill: 0 for normalized images, which is their mean color; :data:`IGNORE` for labels.
    """
    height, width = (max(least - side, 0) for least, side in zip(size, x.shape[-2:], strict=True))
    return F.pad(x, (0, width, 0, height), value=fill) if height or width else x


def photometric(image: Tensor) -> Tensor:
    """Return bytes (3, height, width) with brightness, contrast, saturation and hue changed.

    As mmsegmentation's PhotoMetricDistortion: brightness moves by up to 32, contrast and
    saturation by factors within 0.5 and 1.5, hue by up to a tenth of a turn; each with probability
    1/2; contrast comes before or after the two others.
    """

    def chance() -> bool:
        return bool(torch.rand(()) < 0.5)

    def factor() -> float:
        return float(torch.empty(()).uniform_(0.5, 1.5))

    def contrast(pixels: Tensor) -> Tensor:
        return (pixels * factor()).clamp_(0, 255).floor_() if chance() else pixels

    pixels = image.float()
    if chance():
        pixels = (pixels + float(torch.empty(()).uniform_(-32, 32))).clamp_(0, 255).floor_()
    contrast_first = chance()
    if contrast_first:
        pixels = contrast(pixels)
    saturate, turn = chance(), chance()
    if saturate or turn:
        array = pixels.byte().permute(1, 2, 0).numpy()
        hsv = np.asarray(Image.fromarray(array).convert("HSV")).astype(np.float32)
        if saturate:
            hsv[..., 1] = np.minimum(hsv[..., 1] * factor(), 255)
        if turn:
            shift = int(torch.randint(-18, 18, ())) / 180 * 256
            hsv[..., 0] = (hsv[..., 0] + shift) % 256
        changed = Image.fromarray(hsv.astype(np.uint8), mode="HSV").convert("RGB")
        pixels = image_to_tensor(changed).float()
    if not contrast_first:
        pixels = contrast(pixels)
    return pixels.byte()


@dataclass(frozen=True)
class TrainingTransform:
    """The random changes of a training sample.

    Args:
        crop_size: height and width of what comes out.
        mean: of the normalization.
        std: of the normalization.
        scale: (long side, short side) that an image fits into before the random factor; ``None``
            for its own size.
        ratios: least and largest random factor on the size.
        ratio_step: distance of the factors to choose from; ``None`` for any within the range.
        max_class_share: a crop in which one class has more than this share of the labeled pixels
            is drawn again, up to ten times; 1 takes the first.
        mirror: probability to mirror left and right.
        distort_colors: whether :func:`photometric` is applied.
        convention: of resampling, see the top of this module.
    """

    crop_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    scale: tuple[int, int] | None = None
    ratios: tuple[float, float] = (1.0, 1.0)
    ratio_step: float | None = None
    max_class_share: float = 1.0
    mirror: float = 0.5
    distort_colors: bool = False
    convention: Convention = "authors"

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample with an image of normalized float32, both of ``crop_size``."""
        if isinstance(sample.image, Tensor) or sample.labels is None:
            raise ValueError(
                f"sample {sample.name!r} has been transformed already or has no labels"
            )
        image = image_to_tensor(sample.image)
        labels = torch.as_tensor(sample.labels)
        image, labels = self._scaled(image, labels)
        if self.convention == "authors":
            image, labels = self._padded(image, labels)
        top, left = self._choose_crop(labels)
        height, width = self.crop_size
        image = image[:, top : top + height, left : left + width]
        labels = labels[top : top + height, left : left + width]
        if torch.rand(()) < self.mirror:
            image, labels = v2.functional.hflip(image), v2.functional.hflip(labels)
        if self.distort_colors:
            image = photometric(image.byte() if image.dtype == torch.uint8 else _bytes(image, self))
        if image.dtype == torch.uint8:
            image = normalize(image, self.mean, self.std)
        image, labels = self._padded(image, labels)
        return replace(sample, image=image.contiguous(), labels=labels.contiguous())

    def _ratio(self, height: int, width: int) -> float:
        low, high = self.ratios
        base = 1.0 if self.scale is None else fit_scale(height, width, self.scale)
        if low == high:
            return base * low
        if self.ratio_step is None:
            return base * float(torch.empty(()).uniform_(low, high))
        steps = round((high - low) / self.ratio_step)
        # rounded, so that a grid of tenths holds 0.6 and not 0.6000000000000001
        return base * round(low + self.ratio_step * int(torch.randint(steps + 1, ())), 10)

    def _scaled(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return image and labels at a random size; what was resampled comes out normalized."""
        height, width = labels.shape
        ratio = self._ratio(height, width)
        if self.convention == "authors":
            image = normalize(image, self.mean, self.std)
            size = math.floor(height * ratio), math.floor(width * ratio)
        else:
            size = int(height * ratio + 0.5), int(width * ratio + 0.5)
        size = max(size[0], 1), max(size[1], 1)
        if size == (height, width):
            return image, labels
        labels = resize_labels(labels, size, self.convention, ratio=ratio)
        if self.convention == "authors":
            return resize_image(image, size, self.convention), labels
        resized = resize_image(image.float(), size, self.convention)
        return resized.round_().clamp_(0, 255).byte(), labels

    def _padded(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return pad(image, self.crop_size, 0), pad(labels, self.crop_size, IGNORE)

    def _choose_crop(self, labels: Tensor) -> tuple[int, int]:
        """Return top and left of a crop, whose commonest class is not too common."""
        height, width = (min(c, s) for c, s in zip(self.crop_size, labels.shape, strict=True))
        top = left = 0
        for _ in range(10 if self.max_class_share < 1 else 1):
            top = int(torch.randint(labels.shape[0] - height + 1, ()))
            left = int(torch.randint(labels.shape[1] - width + 1, ()))
            if self.max_class_share >= 1:
                break
            counts = torch.bincount(labels[top : top + height, left : left + width].flatten())
            counts = counts[:IGNORE]
            present = int((counts > 0).sum())
            if present > 1 and float(counts.max()) < self.max_class_share * float(counts.sum()):
                break
        return top, left


def _bytes(image: Tensor, transform: TrainingTransform) -> Tensor:
    """Return a normalized image as bytes again."""
    std = torch.tensor(list(transform.std)).view(-1, 1, 1)
    mean = torch.tensor(list(transform.mean)).view(-1, 1, 1)
    return ((image * std + mean) * 255).round_().clamp_(0, 255).byte()
