"""What clouds are judged by: accuracies of classes, and intersection over union of parts.

The part metrics are our own: the protocol of ShapeNetPart averages within a shape over the parts of
its category, counts a part that is absent from prediction and truth as 1, and restricts the
prediction to the category's parts; no metric of torchmetrics does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassConfusionMatrix

__all__ = ["ClassMetrics", "PartMetrics", "restrict_to_category"]


class ClassMetrics:
    """Overall accuracy, mean class accuracy and loss.

    Mean class accuracy averages over the classes that occur (balanced accuracy).

    Args:
        num_classes: at least 2.
        device: where the sums are kept.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self._confusion = MulticlassConfusionMatrix(num_classes).to(device)
        self._loss = MeanMetric().to(device)

    def update(self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> None:
        """Add a batch."""
        self._confusion.update(logits, labels)
        self._loss.update(F.cross_entropy(logits.float(), labels), weight=len(labels))

    def compute(self) -> dict[str, float]:
        """Return the metrics of everything seen; accuracies are shares of 1."""
        confusion = self._confusion.compute().double()
        total = confusion.sum(1)
        recall = confusion.diagonal()[total > 0] / total[total > 0]
        return {
            "accuracy": float(confusion.trace() / total.sum()),
            "mean_class_accuracy": float(recall.mean()),
            "loss": float(self._loss.compute()),
        }


def _part_table(part_ranges: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    """Return which parts each category has, boolean (categories, parts)."""
    table = torch.zeros(len(part_ranges), max(end for _, end in part_ranges), dtype=torch.bool)
    for row, (start, end) in zip(table, part_ranges, strict=True):
        row[start:end] = True
    return table.to(device)


def restrict_to_category(
    logits: Float[Tensor, "batch points parts"],
    categories: Int[Tensor, " batch"],
    part_ranges: Sequence[Sequence[int]],
) -> Float[Tensor, "batch points parts"]:
    """Return logits that are -inf outside the parts of each cloud's category.

    Args:
        logits: of all parts.
        categories: of each cloud.
        part_ranges: first part of each category, and one beyond its last.
    """
    allowed = _part_table(part_ranges, logits.device)[categories]
    return logits.masked_fill(~allowed.unsqueeze(1), -torch.inf)


class _PartSums(Metric):
    """Sums over shapes that merge across processes."""

    full_state_update = False
    iou: Tensor
    shapes: Tensor
    correct: Tensor
    points: Tensor
    unmasked_correct: Tensor
    loss: Tensor

    def __init__(self, num_categories: int, num_parts: int) -> None:
        super().__init__()
        shapes = {
            "iou": (2, num_categories),
            "shapes": (num_categories,),
            "correct": (num_parts,),
            "points": (num_parts,),
            "unmasked_correct": (),
            "loss": (),
        }
        for name, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, **sums: Tensor) -> None:
        """Add to the sums by name."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """Return the sums of all processes."""
        names = ("iou", "shapes", "correct", "points", "unmasked_correct", "loss")
        return {name: getattr(self, name) for name in names}


class PartMetrics:
    """Instance mIoU (pIoU), class mIoU and accuracies of points, masked and unmasked.

    Masked predictions are restricted to the parts of the known category (PointNet's convention, the
    default of the paper's table); unmasked ones are not and stand under ``unmasked_...``.

    Args:
        part_ranges: first part of each category, and one beyond its last.
        device: where the sums are kept.
        category_names: adds the IoU of each category, under ``iou/<name>``.
    """

    def __init__(
        self,
        part_ranges: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        category_names: Sequence[str] | None = None,
    ) -> None:
        self.part_ranges = [list(pair) for pair in part_ranges]
        self.category_names = category_names
        self._table = _part_table(part_ranges, device)
        self._sums = _PartSums(*self._table.shape).to(device)
        self._sums.set_dtype(torch.float64)
        self._shapes: list[Tensor] = []

    def update(
        self,
        logits: Float[Tensor, "batch points parts"],
        parts: Int[Tensor, "batch points"],
        categories: Int[Tensor, " batch"],
        mask: Bool[Tensor, "batch points"] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            logits: of all parts, for every point.
            parts: true parts.
            categories: of each cloud.
            mask: True for points that count.
        """
        masked = restrict_to_category(logits, categories, self.part_ranges).argmax(2)
        unmasked = logits.argmax(2)
        counted = torch.ones_like(parts, dtype=torch.bool) if mask is None else mask
        ious = torch.stack(
            [self._shape_ious(found, parts, categories, counted) for found in (masked, unmasked)]
        )
        self._shapes.append(ious)
        num_categories, num_parts = self._table.shape
        per_category = torch.zeros(2, num_categories, dtype=torch.float64, device=ious.device)
        per_category.index_add_(1, categories, ious)
        right = (masked == parts) & counted
        losses = F.cross_entropy(logits[counted].float(), parts[counted], reduction="sum")
        self._sums.update(
            iou=per_category,
            shapes=torch.bincount(categories, minlength=num_categories).double(),
            correct=torch.bincount(parts[right], minlength=num_parts).double(),
            points=torch.bincount(parts[counted], minlength=num_parts).double(),
            unmasked_correct=((unmasked == parts) & counted).sum().double(),
            loss=losses.double(),
        )

    def _shape_ious(
        self, found: Tensor, parts: Tensor, categories: Tensor, counted: Tensor
    ) -> Tensor:
        """Return the IoU of each shape, averaged over the parts of its category."""
        batch, num_parts = len(parts), self._table.shape[1]
        rows = torch.arange(batch, device=parts.device).unsqueeze(1) * num_parts

        def count(labels: Tensor, chosen: Tensor) -> Tensor:
            cells = (rows + labels)[chosen]
            counts = torch.bincount(cells, minlength=batch * num_parts)
            return counts.view(batch, num_parts).double()

        both = count(parts, counted & (found == parts))
        union = count(parts, counted) + count(found, counted) - both
        iou = torch.where(union > 0, both / union.clamp(min=1), 1.0)
        own = self._table[categories].double()
        return (iou * own).sum(1) / own.sum(1)

    def shape_iou(self, *, masked: bool = True) -> Float[Tensor, " shapes"]:
        """Return the IoU of every shape that this process saw, in order."""
        return torch.cat(self._shapes, dim=1)[0 if masked else 1]

    def category_iou(self, *, masked: bool = True) -> Float[Tensor, " categories"]:
        """Return the mean IoU of each category; NaN where it has no shape."""
        sums = self._sums.compute()
        return sums["iou"][0 if masked else 1] / sums["shapes"]

    def compute(self) -> dict[str, float]:
        """Return the metrics of everything seen, as shares of 1."""
        sums: dict[str, Any] = self._sums.compute()
        present, seen = sums["shapes"] > 0, sums["points"] > 0
        numbers: dict[str, float] = {}
        for row, prefix in ((0, ""), (1, "unmasked_")):
            iou = sums["iou"][row]
            numbers[f"{prefix}instance_miou"] = float(iou.sum() / sums["shapes"].sum())
            per_category = iou[present] / sums["shapes"][present]
            numbers[f"{prefix}class_miou"] = float(per_category.mean())
        total = sums["points"].sum()
        numbers["point_accuracy"] = float(sums["correct"].sum() / total)
        numbers["unmasked_point_accuracy"] = float(sums["unmasked_correct"] / total)
        numbers["mean_part_accuracy"] = float((sums["correct"] / sums["points"])[seen].mean())
        numbers["loss"] = float(sums["loss"] / total)
        if self.category_names is not None:
            for name, value in zip(self.category_names, self.category_iou().tolist(), strict=True):
                if value == value:  # categories without a shape have none
                    numbers[f"iou/{name}"] = value
        return numbers
