"""Data sets of labeled images; :mod:`eanet.data` reads them."""

from eanet.data import cifar10, imagenet, labeled_sets
from eanet.data.labeled_images import LabeledArrays, LabeledFiles, labels_of, pixel_statistics
from eanet.registry import register_dataset

__all__ = [
    "Cifar10",
    "FashionMnist",
    "ImageFolder",
    "ImageNet",
    "LabeledArrays",
    "LabeledFiles",
    "Mnist",
    "TinyImageNet",
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
class Cifar10(cifar10.Cifar10):
    """CIFAR-10: small photographs of ten classes, 32 x 32."""


@register_dataset("tiny_imagenet")
class TinyImageNet(imagenet.TinyImageNet):
    """Tiny-ImageNet: 200 classes of ImageNet at 64 x 64 pixels."""


@register_dataset("imagenet")
class ImageNet(imagenet.ImageNet):
    """ImageNet-1k (ILSVRC 2012), or some of its classes."""
