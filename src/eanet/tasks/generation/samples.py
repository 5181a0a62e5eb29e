"""What travels through this room: a labeled image, and many of them stacked as bytes."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from eanet.data.labeled_images import Batch, Sample, collate, image_to_tensor

__all__ = [
    "Augmentation",
    "Batch",
    "Sample",
    "collate",
    "image_transform",
    "to_bytes",
    "to_unit_range",
]

#: of training images: nothing, or mirroring every other one
Augmentation = Literal["none", "flip"]


def image_transform(size: int, *, augment: Augmentation = "none") -> Callable[[Sample], Sample]:
    """Return what makes a stored image ready: the middle square, bicubically resized, as bytes.

    Args:
        size: edge in pixels; images of that size stay as they are.
        augment: random choices come from the global generator of torch.

    Raises:
        ValueError: an unknown augmentation.
    """
    if augment not in ("none", "flip"):
        raise ValueError(f"augment must be 'none' or 'flip', got {augment!r}")

    def transform(sample: Sample) -> Sample:
        image = sample.image
        assert isinstance(image, Image.Image)
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        if augment == "flip" and torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return sample.with_image(image_to_tensor(image))

    return transform


def to_unit_range(images: Tensor) -> Float[Tensor, "batch channels height width"]:
    """Return bytes as float32 within [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Float[Tensor, "batch channels height width"]) -> np.ndarray:
    """Return images within [-1, 1] as bytes, (batch, height, width, channels), rounded."""
    levels = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
