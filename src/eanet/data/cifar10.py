"""CIFAR-10 in each of the layouts it comes in."""

from pathlib import Path

import numpy as np

from eanet.data.files import require_root
from eanet.data.labeled_sets import (
    ImageFolder,
    array_splits,
    check_labels,
)
from eanet.data.pickled_arrays import read_pickled_dictionary
from eanet.errors import UserError

__all__ = ["Cifar10"]

_Arrays = tuple[np.ndarray, np.ndarray]


class Cifar10:
    """CIFAR-10: small photographs of ten classes, 32 x 32.

    From folders (``train/<class>/*.png``, ``test/<class>/*.png``), from the binary version
    (``data_batch_1.bin`` ... ``test_batch.bin``) or from that for Python (``data_batch_1`` ...
    ``test_batch``), whose pickles are read without running what they say
    (:mod:`eanet.data.pickled_arrays`).

    Args:
        root: the folder, or the one that holds it as the archive unpacks.

    Raises:
        UserError: no layout is found, or a file is not what it should be.
    """

    class_names = (
        "airplane", "automobile", "bird", "cat", "deer",
        "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    # of the 50,000 training images
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def __init__(self, root: str | None) -> None:
        folder = require_root(root, "cifar10", "train/ and test/, or the batches of the archive")
        nested = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar10")
        folder = next((folder / name for name in nested if (folder / name).is_dir()), folder)
        if (folder / "train").is_dir():
            self.splits = ImageFolder(str(folder), mean=self.mean, std=self.std).splits
            self.splits.facts["image_size"] = [32, 32]
            return
        for suffix, read in ((".bin", self._read_binary), ("", self._read_pickled)):
            if (folder / f"test_batch{suffix}").exists():
                train = [read(folder / f"data_batch_{part}{suffix}") for part in range(1, 6)]
                images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
                parts = {"train": (images, labels), "test": read(folder / f"test_batch{suffix}")}
                self.splits = array_splits(parts, self.class_names, "cifar10")
                return
        raise UserError(
            f"{str(folder)!r} holds neither train/<class>/*.png nor the batches of CIFAR-10 "
            "(data_batch_1.bin ... test_batch.bin, or data_batch_1 ... test_batch)"
        )

    def _read_binary(self, file: Path) -> _Arrays:
        """Read one file of the binary version: a byte of label, then 3 x 32 x 32 bytes, each."""
        try:
            data = np.fromfile(file, dtype=np.uint8)
        except OSError as error:
            raise UserError(f"{str(file)!r} cannot be read: {error.strerror}") from error
        if not len(data) or len(data) % 3073:
            raise UserError(f"{str(file)!r} has {len(data)} bytes, not a multiple of 3073")
        records = data.reshape(-1, 3073)
        return self._checked(records[:, 1:], records[:, 0].astype(np.int64), file)

    def _read_pickled(self, file: Path) -> _Arrays:
        """Read one file of the version for Python: rows of 3 x 32 x 32 bytes, and labels."""
        batch = read_pickled_dictionary(file)
        data, labels = batch.get("data"), batch.get("labels")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise UserError(f"{str(file)!r}: 'data' is no array of rows of 3072 bytes")
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise UserError(f"{str(file)!r}: 'labels' is no list of numbers")
        if len(labels) != len(data) or not labels:
            raise UserError(f"{str(file)!r} holds {len(labels)} labels for {len(data)} images")
        return self._checked(data, np.array(labels, dtype=np.int64), file)

    def _checked(self, rows: np.ndarray, labels: np.ndarray, file: Path) -> _Arrays:
        """Return images (samples, 32, 32, 3) and labels that name a class."""
        check_labels(labels, len(self.class_names), file)
        images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), labels
