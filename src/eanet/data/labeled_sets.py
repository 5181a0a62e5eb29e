"""Data sets of labeled images: folders, IDX files, CIFAR-10, built-in digits.

A data set is a class constructed with its folder and its arguments; its attribute ``splits`` holds
what it offers. Each split has ``labels``, known without decoding an image. A task offers those it
can learn from by registering a class of its own that inherits from one of these.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eanet.data.files import IMAGE_SUFFIXES, read_idx, require_root
from eanet.data.labeled_images import LabeledArrays, LabeledFiles, pixel_statistics
from eanet.data.splits import Splits, carve_validation
from eanet.errors import UserError

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Digits",
    "FashionMnist",
    "ImageFolder",
    "Mnist",
    "array_splits",
    "check_labels",
    "image_facts",
    "images_within",
    "list_class_folders",
    "subfolders",
]

#: what published ImageNet models are trained with, and a fair guess for photographs
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: of the choice of test samples where a folder has none of its own; never the seed of a run
_TEST_SPLIT_SEED = 2105
#: of the choice of the digits' test samples, so that every run is judged on the same ones
_DIGITS_SPLIT_SEED = 1797
_DIGITS_TEST_FRACTION = 0.2


def image_facts(
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


def array_splits(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], class_names: Sequence[str], name: str
) -> Splits:
    """Make splits of arrays named ``train`` and ``test``."""
    images, labels = parts["train"]
    mean, std = pixel_statistics(images)
    test_images, test_labels = parts["test"]
    return Splits(
        train=LabeledArrays(images, labels.tolist(), f"{name}/train"),
        test=LabeledArrays(test_images, test_labels.tolist(), f"{name}/test"),
        facts=image_facts(class_names, mean, std, (images.shape[1], images.shape[2])),
    )


def subfolders(folder: Path) -> list[Path]:
    """Return the visible folders within a folder, by name."""
    return sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def images_within(folder: Path) -> list[Path]:
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


def list_class_folders(
    folder: Path, class_names: Sequence[str], mode: Literal["L", "RGB"] = "RGB"
) -> LabeledFiles:
    """List the images of a folder that has a folder for each class.

    Args:
        folder: of one split.
        class_names: names of the folders, in the order of the labels.
        mode: how images are decoded.

    Raises:
        UserError: the folders are others, or one has no image.
    """
    unlike = sorted({entry.name for entry in subfolders(folder)} ^ set(class_names))
    if unlike:
        raise UserError(
            f"{str(folder)!r} does not have the classes of the training folder; "
            f"only in one of them: {', '.join(unlike[:5])}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = images_within(folder / name)
        if not found:
            raise UserError(
                f"class folder {str(folder / name)!r} has no images ({', '.join(IMAGE_SUFFIXES)})"
            )
        paths += found
        labels += [label] * len(found)
    return LabeledFiles(paths, labels, mode)


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
        self.class_names = [entry.name for entry in subfolders(parts.get("train", folder))]
        if len(self.class_names) < 2:
            raise UserError(
                f"{str(parts.get('train', folder))!r} must hold a folder per class, at least two; "
                f"found {self.class_names}"
            )
        splits = {
            name: list_class_folders(part, self.class_names, self._mode)
            for name, part in parts.items()
        }
        train = splits.get("train")
        if train is None:
            whole = list_class_folders(folder, self.class_names, self._mode)
            train, splits["test"] = self._divide(whole, test_fraction, folder)
        usual_mean, usual_std = IMAGENET_MEAN, IMAGENET_STD
        if in_channels == 1:
            # one grey channel, weighted as the conversion to grey weights the three
            usual_mean, usual_std = (0.459,), (0.225,)
        chosen = (tuple(mean or usual_mean), tuple(std or usual_std))
        if any(len(values) != in_channels for values in chosen) or min(chosen[1]) <= 0:
            raise UserError(
                f"image_folder: mean and std need {in_channels} values, std above 0; got {chosen}"
            )
        facts = image_facts(self.class_names, *chosen, None)
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
        self.splits = array_splits(parts, self.class_names, self.name)

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
        check_labels(labels, len(self.class_names), files[1])
        return images, labels.astype(np.int64)


def check_labels(labels: np.ndarray, num_classes: int, file: Path) -> None:
    """Refuse labels outside the classes."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UserError(
            f"{str(file)!r}: label {labels[wrong[0]]} of sample {wrong[0]} is outside "
            f"0..{num_classes - 1}"
        )


class FashionMnist(_IdxImages):
    """Fashion-MNIST: grey pictures of clothes, 28 x 28, from its four IDX files."""

    name = "fashion_mnist"
    subfolder = "FashionMNIST"
    class_names = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip


class Mnist(_IdxImages):
    """MNIST: handwritten digits, 28 x 28, from its four IDX files."""

    name = "mnist"
    subfolder = "MNIST"
    class_names = tuple(str(digit) for digit in range(10))


class Digits:
    """1,797 handwritten digits, 8 x 8 pixels of 17 grey levels (UCI; part of scikit-learn).

    The same fifth of each class is the test split of every run.

    Args:
        root: must be left out; nothing is read from disk but scikit-learn's own file.
    """

    def __init__(self, root: str | None = None) -> None:
        if root is not None:
            raise UserError(f"data set 'digits' is built in and takes no folder, got {root!r}")
        from sklearn.datasets import load_digits  # slow to import: only when asked for

        digits = load_digits(return_X_y=True)
        rows, labels = np.asarray(digits[0]), np.asarray(digits[1]).astype(int)
        images = np.rint(rows * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # stored as 0..16
        train, test = carve_validation(
            labels.tolist(), len(labels), _DIGITS_TEST_FRACTION, seed=_DIGITS_SPLIT_SEED
        )
        mean, std = pixel_statistics(images[train])
        self.splits = Splits(
            train=LabeledArrays(images[train], labels[train].tolist(), "digits/train"),
            test=LabeledArrays(images[test], labels[test].tolist(), "digits/test"),
            facts={
                "class_names": [str(digit) for digit in range(10)],
                "num_classes": 10,
                "in_channels": 1,
                "mean": mean,
                "std": std,
                "image_size": [8, 8],
            },
        )
