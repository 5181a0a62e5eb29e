"""Data sets of labeled images: folders, IDX files, CIFAR-10; see :mod:`eanet.data.labeled_sets`."""

from eanet.data import labeled_sets
from eanet.data.labeled_images import LabeledArrays, LabeledFiles, labels_of, pixel_statistics
from eanet.registry import register_dataset

__all__ = [
    "Cifar10",
    "FashionMnist",
    "ImageFolder",
    "LabeledArrays",
    "LabeledFiles",
    "Mnist",
    "labels_of",
    "pixel_statistics",
]


@register_dataset("image_folder")
class ImageFolder(labeled_sets.ImageFolder):
    """A folder per class, in ``train``, ``val`` and ``test`` or in one folder that is divided."""


@register_dataset("fashion_mnist")
class FashionMnist(labeled_sets.FashionMnist):
    """Fashion-MNIST: grey pictures of clothes, 28 x 28, from its four IDX files."""


@register_dataset("mnist")
class Mnist(labeled_sets.Mnist):
    """MNIST: handwritten digits, 28 x 28, from its four IDX files."""


@register_dataset("cifar10")
class Cifar10(labeled_sets.Cifar10):
    """CIFAR-10: small photographs of ten classes, 32 x 32."""
