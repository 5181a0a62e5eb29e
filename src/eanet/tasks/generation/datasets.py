"""Data sets to learn to draw from: folders, Fashion-MNIST, MNIST, CIFAR-10, Tiny-ImageNet."""

from pathlib import Path
from typing import Any

from eanet.data import labeled_sets
from eanet.data.files import IMAGE_SUFFIXES
from eanet.data.labeled_images import LabeledFiles
from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.registry import register_dataset

__all__ = ["Cifar10", "FashionMnist", "ImageFolder", "Mnist", "TinyImageNet"]


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


@register_dataset("tiny_imagenet")
class TinyImageNet:
    """Tiny-ImageNet-200: photographs of 200 classes, 64 x 64, as it is published.

    ``train/<class>/images/*.JPEG``, and ``val/images/*.JPEG`` with their classes in
    ``val/val_annotations.txt``. Its validation images are the test split here, as in the paper's
    tables; labels of its own test images are not published. Class names come from ``words.txt``
    where it is there.

    Args:
        root: the folder.

    Raises:
        UserError: a file or folder is missing, or an annotation is of no class or file.
    """

    def __init__(self, root: str | None) -> None:
        if root is None:
            raise UserError("data set 'tiny_imagenet' needs a folder (data.root) with train/, val/")
        folder = Path(root).expanduser()
        if (folder / "tiny-imagenet-200").is_dir():
            folder = folder / "tiny-imagenet-200"
        for part in ("train", "val/images", "val/val_annotations.txt"):
            if not (folder / part).exists():
                raise UserError(f"data set 'tiny_imagenet': {folder / part} is missing")
        classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
        if len(classes) < 2:
            raise UserError(f"{folder / 'train'}: needs a folder per class, found {len(classes)}")
        self.splits = Splits(
            train=self._training_files(folder / "train", classes),
            test=self._validation_files(folder / "val", classes),
            facts=self._facts(folder, classes),
        )

    @staticmethod
    def _training_files(folder: Path, classes: list[str]) -> LabeledFiles:
        """List the training images class by class."""
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            inner = folder / name / "images"
            source = inner if inner.is_dir() else folder / name
            found = sorted(
                path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
            )
            if not found:
                raise UserError(f"{source}: the class has no images")
            paths += found
            labels += [label] * len(found)
        return LabeledFiles(paths, labels, "RGB")

    @staticmethod
    def _validation_files(folder: Path, classes: list[str]) -> LabeledFiles:
        """List the validation images in the order of the annotations."""
        number = {name: label for label, name in enumerate(classes)}
        annotations = folder / "val_annotations.txt"
        paths: list[Path] = []
        labels: list[int] = []
        for line, text in enumerate(annotations.read_text(encoding="utf-8").splitlines(), 1):
            if not text.strip():
                continue
            file, _, rest = text.partition("\t")
            name = rest.partition("\t")[0].strip()
            if name not in number:
                raise UserError(f"{annotations}, line {line}: {name!r} is none of the classes")
            paths.append(folder / "images" / file.strip())
            labels.append(number[name])
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is not None or not paths:
            raise UserError(f"{annotations}: {missing or 'no image'} is missing")
        return LabeledFiles(paths, labels, "RGB")

    @staticmethod
    def _facts(folder: Path, classes: list[str]) -> dict[str, Any]:
        """Say what the data is."""
        words = folder / "words.txt"
        names = dict.fromkeys(classes, "")
        if words.is_file():
            for text in words.read_text(encoding="utf-8").splitlines():
                key, _, name = text.partition("\t")
                if key in names:
                    names[key] = name.partition(",")[0].strip()
        return {
            "class_names": [name or key for key, name in names.items()],
            "num_classes": len(classes),
            "in_channels": 3,
            "mean": list(labeled_sets.IMAGENET_MEAN),
            "std": list(labeled_sets.IMAGENET_STD),
            "image_size": [64, 64],
        }
