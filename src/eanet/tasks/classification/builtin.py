"""Data that needs no download: the handwritten digits that scikit-learn brings."""

import numpy as np

from eanet.data.splits import Splits, carve_validation
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.classification.datasets import LabeledArrays, pixel_statistics

__all__ = ["Digits"]

#: of the choice of the test samples; a constant, so that every run is judged on the same ones
_TEST_SPLIT_SEED = 1797
_TEST_FRACTION = 0.2


@register_dataset("digits")
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
            labels.tolist(), len(labels), _TEST_FRACTION, seed=_TEST_SPLIT_SEED
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
