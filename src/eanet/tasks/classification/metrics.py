"""What a classifier is judged by."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

__all__ = ["ClassificationMetrics"]


class ClassificationMetrics:
    """Accuracy, mean accuracy of the classes, top-5 accuracy, loss and the confusion matrix.

    Accumulates over batches and, when they are asked for, over processes.

    Args:
        num_classes: at least 2. Top-5 accuracy is left out below 6, where it says nothing.
        device: where the sums are kept.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "confusion": MulticlassConfusionMatrix(num_classes),
        }
        if num_classes > 5:
            metrics["top5_accuracy"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        # No shared states: they would be merged by comparing values, which waits for the device.
        self._metrics = MetricCollection(metrics, compute_groups=False).to(device)
        self._loss = MeanMetric().to(device)

    def update(self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]) -> None:
        """Add a batch.

        Args:
            logits: of every class.
            labels: true classes.
        """
        logits = logits.float()
        self._metrics.update(logits, labels)
        self._loss.update(F.cross_entropy(logits, labels), weight=len(labels))

    def compute(self) -> dict[str, float]:
        """Return the metrics of everything seen; accuracies are shares of 1."""
        values = self._metrics.compute()
        confusion = values.pop("confusion")
        numbers = {name: float(value) for name, value in values.items()}
        present = confusion.sum(dim=1) > 0
        recall = confusion.diagonal()[present] / confusion.sum(dim=1)[present]
        numbers["mean_class_accuracy"] = float(recall.mean())
        numbers["loss"] = float(self._loss.compute())
        return numbers

    def confusion_matrix(self) -> Int[Tensor, "true predicted"]:
        """Return how many samples of each class were given each class."""
        return self._metrics["confusion"].compute()
