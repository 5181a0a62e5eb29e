"""Images made ready for a network: size, augmentation, normalization, mixing.

What happens to one image on its own (:func:`training_transform`, :func:`evaluation_transform`)
runs in the loader and ends in bytes. Mixing, normalization and erasing need the batch or run
faster on it; they are part of the training step and run on the network's device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from eanet.data.labeled_images import normalize
from eanet.tasks.classification.samples import Sample, image_to_tensor

__all__ = [
    "Augmentation",
    "SampleTransform",
    "erase",
    "evaluation_transform",
    "mix",
    "normalize",
    "training_transform",
]

Augmentation = Literal["none", "light", "flip", "nudge_flip", "crop_flip", "imagenet"]

_ImageTransform = Callable[[Image.Image], Image.Image]


class ResizeAndCrop:
    """Resizes the shorter side and cuts out the center, the usual way to evaluate.

    Args:
        size: edge of the square that comes out, in pixels.
        crop_fraction: ``size`` over the shorter side before the cut, within (0, 1].
    """

    def __init__(self, size: int, crop_fraction: float) -> None:
        self.size = size
        self.shorter_side = math.floor(size / crop_fraction)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the square; bicubic, as the published evaluation."""
        width, height = image.size
        shorter = min(width, height)
        if shorter != self.shorter_side:
            scaled = [int(self.shorter_side * length / shorter) for length in (width, height)]
            # the shorter side must come out exact whatever the division rounds
            scaled = [max(length, self.shorter_side) for length in scaled]
            image = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
        left = round((image.width - self.size) / 2)
        top = round((image.height - self.size) / 2)
        if (left, top) == (0, 0) and image.size == (self.size, self.size):
            return image
        return image.crop((left, top, left + self.size, top + self.size))


class SmallAffine:
    """Turns, shifts and stretches a little; what enters at the edge is black.

    For objects on a dark ground that fill their image, such as handwritten digits.

    Args:
        degrees: largest turn to either side.
        shift: largest shift, as a share of the edge.
        stretch: largest change of size, as a share.
        shear: largest shear in degrees.
    """

    def __init__(
        self, *, degrees: float = 10, shift: float = 0.1, stretch: float = 0.1, shear: float = 5
    ) -> None:
        self.degrees, self.shift, self.stretch, self.shear = degrees, shift, stretch, shear

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image under a random affine map."""
        turn, right, down, size, shear = (2 * torch.rand(5) - 1).tolist()
        angle, slant = math.radians(self.degrees * turn), math.tan(math.radians(self.shear * shear))
        scale = 1 / (1 + self.stretch * size)
        # output pixel -> input pixel, about the center
        a, b = scale * math.cos(angle), scale * (math.sin(angle) + slant)
        d, e = -scale * math.sin(angle), scale * math.cos(angle)
        x, y = image.width / 2, image.height / 2
        c = x - a * x - b * y + self.shift * right * image.width
        f = y - d * x - e * y + self.shift * down * image.height
        return image.transform(
            image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
        )


class PadCropFlip:
    """Crops after padding, and mirrors every other image.

    Args:
        size: edge of the image in pixels.
        margin: width of the padding on each side; 0 only mirrors.
    """

    def __init__(self, size: int, margin: int) -> None:
        self.size, self.margin = size, margin

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a random crop; what enters at the edge is black."""
        if self.margin:
            left, top = torch.randint(-self.margin, self.margin + 1, (2,)).tolist()
            image = image.crop((left, top, left + self.size, top + self.size))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class ImageNetAugmentation:
    """The augmentation of T2T-ViT: random crop, flip, RandAugment.

    Args:
        size: edge of the square that comes out.
    """

    def __init__(self, size: int) -> None:
        from timm.data.auto_augment import rand_augment_transform  # seconds to import

        self.crops = [
            v2.RandomResizedCrop(size, (0.08, 1.0), (3 / 4, 4 / 3), interpolation=interpolation)
            for interpolation in (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC)
        ]
        # Two of fifteen operations, each with probability 1/2, magnitude of N(9, 0.5). It draws
        # from the generators of Python and numpy, which the loader seeds for each sample too.
        self.rand_augment = rand_augment_transform(
            "rand-m9-mstd0.5-inc1",
            {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104)},
        )

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the augmented square."""
        image = self.crops[int(torch.randint(2, ()))](image)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.rand_augment(image.convert("RGB")).convert(image.mode)


@dataclass(frozen=True)
class SampleTransform:
    """A chain of transforms of images, as a transform of samples that ends in bytes.

    Args:
        steps: image to image, in order.
    """

    steps: Sequence[Callable[[Image.Image], Image.Image]]

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample with its image as a tensor of bytes."""
        image = sample.image
        if isinstance(image, Tensor):
            raise ValueError(f"sample {sample.name!r} has been transformed already")
        for step in self.steps:
            image = step(image)
        return sample.with_image(image_to_tensor(image))


def evaluation_transform(*, size: int, crop_fraction: float = 1.0) -> SampleTransform:
    """Return the transform of validation, test and prediction; it has no random choice.

    Args:
        size: edge of the square that comes out, in pixels.
        crop_fraction: see :class:`ResizeAndCrop`.
    """
    return SampleTransform([ResizeAndCrop(size, crop_fraction)])


def training_transform(augmentation: Augmentation, *, size: int) -> SampleTransform:
    """Return the transform of training samples.

    Args:
        augmentation: ``"none"``, ``"light"`` (small turns and shifts), ``"flip"`` (mirrored or
            not), ``"nudge_flip"`` (and shifted by up to a sixteenth of the edge), ``"crop_flip"``
            (by up to an eighth, as usual for CIFAR-10) or ``"imagenet"`` (random resized crop,
            flip, RandAugment).
        size: edge of the square that comes out, in pixels.

    Raises:
        ValueError: the name is unknown.
    """
    whole = ResizeAndCrop(size, 1.0)
    steps: dict[str, Callable[[], list[_ImageTransform]]] = {
        "none": lambda: [whole],
        "light": lambda: [whole, SmallAffine()],
        "flip": lambda: [whole, PadCropFlip(size, 0)],
        "nudge_flip": lambda: [whole, PadCropFlip(size, max(size // 16, 1))],
        "crop_flip": lambda: [whole, PadCropFlip(size, size // 8)],
        "imagenet": lambda: [ImageNetAugmentation(size)],
    }
    if augmentation not in steps:
        raise ValueError(f"augment must be one of {', '.join(steps)}; got {augmentation!r}")
    return SampleTransform(steps[augmentation]())


def mix(
    images: UInt8[Tensor, "batch channels height width"],
    targets: Float[Tensor, "batch classes"],
    *,
    mixup: float,
    cutmix: float,
) -> tuple[UInt8[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]:
    """Mix every image with the one at the mirrored place of the batch, and its target likewise.

    One share lambda serves the whole batch. Mixup (arXiv 1710.09412) blends the pixels and rounds
    them to bytes; CutMix (arXiv 1905.04899) puts a rectangle of the partner into the image and
    takes lambda anew from the area that lies within. Where both are on, either is as likely.

    Args:
        images: bytes.
        targets: probabilities.
        mixup: alpha of the distribution Beta(alpha, alpha) of lambda; 0 switches it off.
        cutmix: the same for CutMix.
    """
    cut = bool(torch.rand(()) < 0.5) if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cut else mixup
    if not alpha:
        return images, targets
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partners = images.flip(0)
    if cut:
        height, width = images.shape[2:]
        center_row, center_column = (int(torch.randint(length, ())) for length in (height, width))
        side = math.sqrt(1 - share)
        half_height, half_width = int(height * side) // 2, int(width * side) // 2
        top, bottom = max(center_row - half_height, 0), min(center_row + half_height, height)
        left, right = max(center_column - half_width, 0), min(center_column + half_width, width)
        images = images.clone()
        images[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        blend = share * images.float() + (1 - share) * partners.float()
        images = blend.round_().to(torch.uint8)
    return images, share * targets + (1 - share) * targets.flip(0)


def erase(
    images: Float[Tensor, "batch channels height width"], probability: float
) -> Float[Tensor, "batch channels height width"]:
    """Overwrite a rectangle of some images with normal noise (arXiv 1708.04896), in place.

    The area is 2 to 33 % of the image, the aspect log-uniform within 0.3 and 1 / 0.3.

    Args:
        images: normalized values.
        probability: of an image to lose a rectangle.
    """
    eraser = v2.RandomErasing(
        probability,
        scale=(0.02, 1 / 3),
        ratio=(0.3, 1 / 0.3),
        value="random",  # pyright: ignore[reportArgumentType]  documented, left out of its type
        inplace=True,
    )
    for image in images:
        eraser(image)
    return images
