"""What a segmentation is judged by, all from one confusion matrix over the whole set."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from eanet.tasks.segmentation.samples import IGNORE

__all__ = ["SegmentationMetrics", "class_iou", "scores"]

#: data sets with more classes get their table in the report alone
_MAX_LISTED_CLASSES = 40


class SegmentationMetrics:
    """Mean IoU, pixel accuracy, mean accuracy, frequency-weighted IoU and the IoU of the classes.

    Accumulates over batches and, when they are asked for, over processes. The confusion matrix is
    torchmetrics'; its own IoU leaves other classes out of the mean than the published protocol.

    Args:
        class_names: in the order of the labels.
        device: where the sums are kept.
    """

    def __init__(self, class_names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.class_names = list(class_names)
        count = len(self.class_names)
        self._confusion = MulticlassConfusionMatrix(
            max(count, 2), ignore_index=IGNORE, validate_args=False
        ).to(device)
        self._loss = MeanMetric().to(device)

    def update(
        self,
        predicted: Int[Tensor, "*shape"] | UInt8[Tensor, "*shape"],
        labels: UInt8[Tensor, "*shape"],
        loss: Tensor | float | None = None,
    ) -> None:
        """Add pixels.

        Args:
            predicted: class of each pixel.
            labels: true class, :data:`IGNORE` for pixels that do not count.
            loss: mean loss of these pixels.
        """
        self._confusion.update(predicted.flatten().long(), labels.flatten().long())
        if loss is not None:
            self._loss.update(loss)

    def compute(self) -> dict[str, float]:
        """Return the metrics of everything seen, shares of 1."""
        confusion = self.confusion_matrix()
        numbers = scores(confusion)
        if self._loss.update_called:
            numbers["loss"] = float(self._loss.compute())
        if len(self.class_names) <= _MAX_LISTED_CLASSES:
            for name, value in zip(self.class_names, class_iou(confusion).tolist(), strict=False):
                if value == value:  # a class that occurs nowhere has none
                    numbers[f"iou/{name}"] = value
        return numbers

    def confusion_matrix(self) -> Int[Tensor, "true predicted"]:
        """Return how many pixels of each class were given each class."""
        return self._confusion.compute()


def class_iou(confusion: Int[Tensor, "true predicted"]) -> Float[Tensor, " classes"]:
    """Return intersection over union of each class; NaN for one neither labeled nor predicted."""
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(dim=1) + confusion.sum(dim=0) - confusion.diagonal())


def scores(confusion: Int[Tensor, "true predicted"]) -> dict[str, float]:
    """Return the four scores of a confusion matrix, as shares of 1.

    ``mean_iou`` is the mean over all classes that are labeled or predicted somewhere, background
    too; ``mean_accuracy`` the mean share of a class that was found, over labeled classes.
    """
    per_class = confusion.sum(dim=1).double()
    total = per_class.sum()
    iou = class_iou(confusion)
    recall = confusion.diagonal().double() / per_class
    present = per_class > 0
    return {
        "mean_iou": float(iou.nanmean()),
        "pixel_accuracy": float(confusion.diagonal().sum() / total),
        "mean_accuracy": float(recall.nanmean()),
        "frequency_weighted_iou": float((per_class[present] * iou[present]).sum() / total),
    }
