"""Data sets of labeled images: folders, IDX files, CIFAR-10.

A data set is a class constructed with its folder and its arguments; its attribute ``splits`` holds
what it offers. Each split has ``labels``, known without decoding an image.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from eanet.data.files import IMAGE_SUFFIXES, decode_image, read_idx, require_root
from eanet.data.splits import Dataset, Splits, Subset, carve_validation
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.classification.samples import Sample

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

#: what published ImageNet models are trained with, and a fair guess for photographs
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: of the choice of test samples where a folder has none of its own; never the seed of a run
_TEST_SPLIT_SEED = 2105


@dataclass
class LabeledFiles:
    """Image files and their classes.

    Args:
        paths: the files.
        labels: class of each.
        mode: ``"L"`` or ``"RGB"``.
    """

    paths: Sequence[Path]
    labels: Sequence[int]
    mode: Literal["L", "RGB"] = "RGB"

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Decode one file."""
        path = self.paths[index]
        return Sample(decode_image(path, mode=self.mode), self.labels[index], str(path))


@dataclass
class LabeledArrays:
    """Images held in memory.

    Args:
        images: bytes, (samples, height, width) or (samples, height, width, 3).
        labels: class of each.
        name: how the data set is called in the names of its samples.
    """

    images: np.ndarray
    labels: Sequence[int]
    name: str

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Return one image."""
        image = Image.fromarray(self.images[index])
        return Sample(image, int(self.labels[index]), f"{self.name}[{index}]")


def labels_of(dataset: Dataset) -> list[int]:
    """Return the class of every sample, from what the data set knows without decoding."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return [labels[index] for index in dataset.indices]
    if isinstance(dataset, LabeledFiles | LabeledArrays):
        return [int(label) for label in dataset.labels]
    return [dataset[index].label for index in range(len(dataset))]


def pixel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of values scaled to 0..1.

    Args:
        images: bytes, (samples, height, width) or (samples, height, width, channels).
    """
    channels = 1 if images.ndim == 3 else images.shape[-1]
    flat = images.reshape(-1, channels) / np.float32(255)
    mean = flat.mean(axis=0, dtype=np.float64)
    std = flat.std(axis=0, dtype=np.float64)
    return mean.tolist(), np.maximum(std, 1e-3).tolist()


def _facts(
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Collect what a data set says of itself.

    Args:
        class_names: in the order of the labels.
        mean: of each channel, for values of 0..1.
        std: of each channel, for values of 0..1.
        image_size: height and width where all images share them.
    """
    return {
        "class_names": list(class_names),
        "num_classes": len(class_names),
        "in_channels": len(mean),
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "image_size": None if image_size is None else list(image_size),
    }


def _array_splits(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], class_names: Sequence[str], name: str
) -> Splits:
    """Make splits of arrays named ``train`` and ``test``."""
    images, labels = parts["train"]
    mean, std = pixel_statistics(images)
    test_images, test_labels = parts["test"]
    return Splits(
        train=LabeledArrays(images, labels.tolist(), f"{name}/train"),
        test=LabeledArrays(test_images, test_labels.tolist(), f"{name}/test"),
        facts=_facts(class_names, mean, std, (images.shape[1], images.shape[2])),
    )


def _subfolders(folder: Path) -> list[Path]:
    """Return the visible folders within a folder, by name."""
    return sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def _images_within(folder: Path) -> list[Path]:
    """Return the visible image files at any depth, by path."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.extend(
            Path(parent, name)
            for name in files
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        )
    return sorted(found)


@register_dataset("image_folder")
class ImageFolder:
    """A folder per class, in ``train``, ``val`` and ``test`` or in one folder that is divided.

    ``root/train/cat/1.jpg`` with ``val`` (or ``valid``, ``validation``) and ``test`` beside
    ``train``, either of them optional; or ``root/cat/1.jpg``, of which a fifth of each class,
    always the same, becomes the test split. Files are images by their suffix; hidden files and
    files of other suffixes are left out. Images may lie at any depth within their class.

    Args:
        root: the folder.
        in_channels: 3 for color; 1 turns all images grey.
        mean: of each channel, for values of 0..1; by default that of ImageNet.
        std: as ``mean``.
        test_fraction: share that becomes the test split where one folder is divided.

    Raises:
        UserError: a folder is missing or has no images, or the splits differ in their classes.
    """

    def __init__(
        self,
        root: str | None,
        *,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        test_fraction: float = 0.2,
    ) -> None:
        folder = require_root(root, "image_folder", "a folder per class")
        if in_channels not in (1, 3):
            raise UserError(f"image_folder: in_channels must be 1 or 3, got {in_channels}")
        self._mode: Literal["L", "RGB"] = "RGB" if in_channels == 3 else "L"
        parts = self._find_parts(folder)
        self.class_names = [entry.name for entry in _subfolders(parts.get("train", folder))]
        if len(self.class_names) < 2:
            raise UserError(
                f"{str(parts.get('train', folder))!r} must hold a folder per class, at least two; "
                f"found {self.class_names}"
            )
        splits = {name: self._read(part) for name, part in parts.items()}
        train = splits.get("train")
        if train is None:
            train, splits["test"] = self._divide(self._read(folder), test_fraction, folder)
        usual_mean, usual_std = IMAGENET_MEAN, IMAGENET_STD
        if in_channels == 1:
            # one grey channel, weighted as the conversion to grey weights the three
            usual_mean, usual_std = (0.459,), (0.225,)
        chosen = (tuple(mean or usual_mean), tuple(std or usual_std))
        if any(len(values) != in_channels for values in chosen) or min(chosen[1]) <= 0:
            raise UserError(
                f"image_folder: mean and std need {in_channels} values, std above 0; got {chosen}"
            )
        facts = _facts(self.class_names, *chosen, None)
        self.splits = Splits(train, splits.get("validation"), splits.get("test"), facts)

    @staticmethod
    def _find_parts(folder: Path) -> dict[str, Path]:
        """Return the folders of the splits by name; empty where one folder is to be divided."""
        spellings = {
            "train": ("train", "training"),
            "validation": ("val", "valid", "validation"),
            "test": ("test",),
        }
        parts = {
            name: folder / spelling
            for name, choices in spellings.items()
            for spelling in reversed(choices)
            if (folder / spelling).is_dir()
        }
        if parts and "train" not in parts:
            have = ", ".join(sorted(part.name for part in parts.values()))
            raise UserError(f"{str(folder)!r} has {have} but no folder 'train'")
        return parts

    def _read(self, folder: Path) -> LabeledFiles:
        """List the images of one split."""
        classes = [entry.name for entry in _subfolders(folder)]
        unlike = sorted(set(classes) ^ set(self.class_names))
        if unlike:
            raise UserError(
                f"{str(folder)!r} does not have the classes of the training folder; "
                f"only in one of them: {', '.join(unlike[:5])}"
            )
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = _images_within(folder / name)
            if not found:
                raise UserError(
                    f"class folder {str(folder / name)!r} has no images "
                    f"({', '.join(IMAGE_SUFFIXES)})"
                )
            paths += found
            labels += [label] * len(found)
        return LabeledFiles(paths, labels, self._mode)

    @staticmethod
    def _divide(
        whole: LabeledFiles, fraction: float, folder: Path
    ) -> tuple[LabeledFiles, LabeledFiles]:
        """Divide one folder into training and test files."""
        try:
            parts = carve_validation(whole.labels, len(whole), fraction, seed=_TEST_SPLIT_SEED)
        except ValueError as error:
            raise UserError(f"image_folder {str(folder)!r}: test_fraction: {error}") from error
        train, test = (
            LabeledFiles(
                [whole.paths[index] for index in part],
                [whole.labels[index] for index in part],
                whole.mode,
            )
            for part in parts
        )
        return train, test


class _IdxImages:
    """Images and labels in the four IDX files of MNIST and its kin.

    Args:
        root: the folder of the files, or one that holds them as torchvision lays them out.
    """

    name: str
    subfolder: str
    class_names: tuple[str, ...]

    def __init__(self, root: str | None) -> None:
        folder = require_root(root, self.name, "train-images-idx3-ubyte and its three companions")
        if (folder / self.subfolder / "raw").is_dir():
            folder = folder / self.subfolder / "raw"
        elif (folder / "raw").is_dir():
            folder = folder / "raw"
        parts = {"train": self._read(folder, "train"), "test": self._read(folder, "t10k")}
        self.splits = _array_splits(parts, self.class_names, self.name)

    def _read(self, folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
        """Read one split, checked."""
        files = [folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte"]
        files = [file if file.exists() else file.with_name(file.name + ".gz") for file in files]
        images, labels = (read_idx(file) for file in files)
        if images.ndim != 3 or images.dtype != np.uint8 or not len(images):
            raise UserError(f"{str(files[0])!r} does not hold 8-bit images: shape {images.shape}")
        if labels.shape != images.shape[:1]:
            raise UserError(
                f"{str(files[1])!r} holds {labels.shape[0]} labels for {len(images)} images"
            )
        _check_labels(labels, len(self.class_names), files[1])
        return images, labels.astype(np.int64)


def _check_labels(labels: np.ndarray, num_classes: int, file: Path) -> None:
    """Refuse labels outside the classes."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UserError(
            f"{str(file)!r}: label {labels[wrong[0]]} of sample {wrong[0]} is outside "
            f"0..{num_classes - 1}"
        )


@register_dataset("fashion_mnist")
class FashionMnist(_IdxImages):
    """Fashion-MNIST: grey pictures of clothes, 28 x 28, from its four IDX files."""

    name = "fashion_mnist"
    subfolder = "FashionMNIST"
    class_names = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip


@register_dataset("mnist")
class Mnist(_IdxImages):
    """MNIST: handwritten digits, 28 x 28, from its four IDX files."""

    name = "mnist"
    subfolder = "MNIST"
    class_names = tuple(str(digit) for digit in range(10))


@register_dataset("cifar10")
class Cifar10:
    """CIFAR-10: small photographs of ten classes, 32 x 32.

    From folders (``train/<class>/*.png``, ``test/<class>/*.png``) or from the binary version
    (``data_batch_1.bin`` ... ``test_batch.bin``). The version for Python is not read: its files
    are pickles, and reading a pickle runs what it says.

    Args:
        root: the folder.

    Raises:
        UserError: neither layout is found, or a file is not what it should be.
    """

    class_names = (
        "airplane", "automobile", "bird", "cat", "deer",
        "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    # of the 50,000 training images
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def __init__(self, root: str | None) -> None:
        folder = require_root(root, "cifar10", "train/ and test/, or the binary version")
        nested = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar10")
        folder = next((folder / name for name in nested if (folder / name).is_dir()), folder)
        if (folder / "train").is_dir():
            self.splits = ImageFolder(str(folder), mean=self.mean, std=self.std).splits
            self.splits.facts["image_size"] = [32, 32]
        elif (folder / "test_batch.bin").exists():
            train = [self._read(folder / f"data_batch_{part}.bin") for part in range(1, 6)]
            images = np.concatenate([part[0] for part in train])
            labels = np.concatenate([part[1] for part in train])
            parts = {"train": (images, labels), "test": self._read(folder / "test_batch.bin")}
            self.splits = _array_splits(parts, self.class_names, "cifar10")
        elif (folder / "data_batch_1").exists():
            raise UserError(
                f"{str(folder)!r} holds the pickled version of CIFAR-10, which is not read for "
                "safety; fetch the binary version (cifar-10-binary.tar.gz) instead"
            )
        else:
            raise UserError(
                f"{str(folder)!r} holds neither train/<class>/*.png nor the files of the binary "
                "version (data_batch_1.bin ... test_batch.bin)"
            )

    def _read(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        """Read one file of the binary version: a byte of label, then 3 x 32 x 32 bytes, each."""
        try:
            data = np.fromfile(file, dtype=np.uint8)
        except OSError as error:
            raise UserError(f"{str(file)!r} cannot be read: {error.strerror}") from error
        if not len(data) or len(data) % 3073:
            raise UserError(f"{str(file)!r} has {len(data)} bytes, not a multiple of 3073")
        records = data.reshape(-1, 3073)
        labels = records[:, 0].astype(np.int64)
        _check_labels(labels, len(self.class_names), file)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), labels
