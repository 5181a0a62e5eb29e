"""Point clouds as two tasks: a class for each cloud, and a part for each point."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eanet import registry
from eanet.data.splits import Splits
from eanet.engine.task import Update
from eanet.errors import UserError
from eanet.report.page import Section
from eanet.tasks.pointcloud import baselines, pictures
from eanet.tasks.pointcloud.clouds import labels_of
from eanet.tasks.pointcloud.metrics import ClassMetrics, PartMetrics, restrict_to_category
from eanet.tasks.pointcloud.point_task import (
    PointTask,
    Votes,
    known_targets,
    reported_split,
    spread_smoothing,
    transformed_batches,
)
from eanet.tasks.pointcloud.samples import Batch, Sample
from eanet.tasks.pointcloud.transforms import PointChoice

__all__ = ["PartSegmentationTask", "PointClassificationTask"]


@registry.register_task
class PointClassificationTask(PointTask):
    """A class for every cloud.

    Args:
        model: gives logits of ``facts["num_classes"]`` classes.
        facts: of the data set: ``class_names``, ``num_classes``, ``in_channels``.
        num_points: points of a training cloud; ``None`` for all that are stored.
        evaluation_points: points of another cloud; by default as ``num_points``.
        point_choice: "first" points of a training cloud, as PCT, or "random" ones.
        augment: arguments of :class:`eanet.tasks.pointcloud.transforms.Augmentation`.
        label_smoothing: share of the target spread over the other classes, as PCT's code does.
        vote_scales: factors whose probabilities are averaged in evaluation, beside the plain pass.
        random_votes: further factors, drawn within 0.8 and 1.2.

    Raises:
        ValueError: an option is outside its range.
    """

    smoke_model: ClassVar[str] = "eat_cls_tiny"
    smoke_data: ClassVar[str] = "solids"
    smoke_options: ClassVar[dict[str, Any]] = {"num_points": 64}
    published_metric: ClassVar[tuple[str, float]] = ("overall accuracy (%)", 100.0)
    best_metric = "accuracy"
    last_metrics = ("accuracy", "mean_class_accuracy")

    def __init__(
        self,
        model: nn.Module,
        facts: Mapping[str, Any],
        *,
        num_points: int | None = 1024,
        evaluation_points: int | None = None,
        point_choice: PointChoice = "first",
        augment: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        vote_scales: Sequence[float] = (),
        random_votes: int = 0,
    ) -> None:
        super().__init__(
            model,
            facts,
            num_points=num_points,
            evaluation_points=num_points if evaluation_points is None else evaluation_points,
            point_choice=point_choice,
            augment=augment,
            label_smoothing=label_smoothing,
            vote_scales=vote_scales,
            random_votes=random_votes,
        )
        self.num_classes = len(self.class_names)

    @classmethod
    def model_arguments(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number of classes and of channels."""
        return {"num_classes": facts["num_classes"], "in_channels": facts["in_channels"]}

    def training_step(self, batches: Sequence[Batch], step: int) -> Iterator[Update]:
        """Yield the one update: cross entropy."""
        del step
        (batch,) = batches
        labels = known_targets(batch.labels)
        logits = self._logits(batch, batch.points)
        smoothing = spread_smoothing(self.label_smoothing, self.num_classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        yield Update("model", {"loss": loss}, {"accuracy": accuracy})

    def new_metrics(self, device: torch.device) -> Votes:
        """Return empty metrics for one validation."""
        voted = self.vote_scales or self.random_votes
        return Votes(
            ClassMetrics(self.num_classes, device),
            ClassMetrics(self.num_classes, device) if voted else None,
        )

    def validation_step(self, batch: Batch, metrics: Votes) -> None:
        """Add one batch to the metrics."""
        logits = self._logits(batch, batch.points)
        metrics.update(logits, self._vote(batch, logits), known_targets(batch.labels))

    def _logits(self, batch: Batch, points: Tensor) -> Tensor:
        return self.networks["model"](points, batch.mask).float()

    def predict_batch(self, batch: Batch) -> list[dict[str, Any]]:
        """Return for each cloud the likeliest class and up to five classes with probabilities."""
        probabilities = self._logits(batch, batch.points).softmax(dim=1).cpu()
        values, indices = probabilities.topk(min(5, self.num_classes), dim=1)
        return [
            {
                "file": name,
                "label": self.class_names[best[0]],
                "probability": shares[0],
                "top": [
                    {"label": self.class_names[index], "probability": share}
                    for index, share in zip(best, shares, strict=True)
                ],
            }
            for name, best, shares in zip(
                batch.names, indices.tolist(), values.tolist(), strict=True
            )
        ]

    def save_prediction(self, sample: Sample, record: Mapping[str, Any], stem: Path) -> list[Path]:
        """Write the cloud with what spoke for its class, and attention of slots, as PNG files."""
        prepared = self.evaluation_transform(sample)
        label = self.class_names.index(record["label"])
        found = pictures.inspect_classifier(self.networks["model"], prepared.points, label)
        files = [stem.with_name(stem.name + ".png")]
        files[0].write_bytes(pictures.draw_class(prepared.points, record, found))
        if found.attention is not None:
            files.append(stem.with_name(stem.name + "-attention.png"))
            files[1].write_bytes(pictures.draw_attention(prepared.points, found))
        return files

    def baselines(self, splits: Splits) -> dict[str, float]:
        """Return the accuracy of the commonest class, and of a forest on distance histograms."""
        return baselines.classification_baselines(splits)

    @torch.no_grad()
    def report_sections(self, splits: Splits, device: torch.device) -> list[Section]:
        """Return confusions, clouds with their predictions, and attention of slots."""
        split = reported_split(splits)
        if split is None:
            return []
        batches = transformed_batches(self, split, device)
        probabilities = [self._logits(batch, batch.points).softmax(1).cpu() for batch in batches]
        labels = np.array(labels_of(split))
        return pictures.classification_sections(
            self.networks["model"],
            [self.evaluation_transform(split[index]) for index in range(len(split))],
            labels,
            torch.cat(probabilities).numpy(),
            self.class_names,
            device,
        )


@registry.register_task("pointcloud_parts")
class PartSegmentationTask(PointTask):
    """A part for every point of a cloud whose category is known.

    Args:
        model: gives logits of ``facts["num_parts"]`` parts.
        facts: of the data set: ``class_names`` (categories), ``part_names``, ``part_ranges``
            (first part of each category, and one beyond its last), ``in_channels``.
        num_points: points of a training cloud; ``None`` for all that are stored.
        evaluation_points: points of another cloud; ``None`` for all that are stored. Where they
            are at least twice ``num_points``, a cloud is divided into portions, each spread over
            all of it, and every portion is segmented by itself: as dense as in training.
        point_choice: "first" points of a training cloud, as PCT, or "random" ones.
        augment: arguments of :class:`eanet.tasks.pointcloud.transforms.Augmentation`.
        label_smoothing: share of the target spread over the other parts.
        vote_scales: factors whose probabilities are averaged in evaluation, beside the plain pass.
        random_votes: further factors, drawn within 0.8 and 1.2.

    Raises:
        ValueError: an option is outside its range, or the data has no parts.
    """

    smoke_model: ClassVar[str] = "eat_parts_tiny"
    smoke_data: ClassVar[str] = "solids"
    smoke_options: ClassVar[dict[str, Any]] = {"num_points": 64, "evaluation_points": 64}
    published_metric: ClassVar[tuple[str, float]] = ("pIoU (%)", 100.0)
    best_metric = "instance_miou"
    last_metrics = ("instance_miou", "class_miou")

    def __init__(
        self,
        model: nn.Module,
        facts: Mapping[str, Any],
        *,
        num_points: int | None = 2048,
        evaluation_points: int | None = None,
        point_choice: PointChoice = "first",
        augment: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        vote_scales: Sequence[float] = (),
        random_votes: int = 0,
    ) -> None:
        if "part_ranges" not in facts:
            raise ValueError("the data set has no parts; task 'pointcloud' classifies its clouds")
        super().__init__(
            model,
            facts,
            num_points=num_points,
            evaluation_points=evaluation_points,
            point_choice=point_choice,
            augment=augment,
            label_smoothing=label_smoothing,
            vote_scales=vote_scales,
            random_votes=random_votes,
        )
        self.part_names: list[str] = list(facts["part_names"])
        self.part_ranges: list[list[int]] = [list(pair) for pair in facts["part_ranges"]]
        self._point_parts: dict[str, np.ndarray] = {}

    @classmethod
    def model_arguments(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number of parts, of categories and of channels.

        Raises:
            UserError: the data set has no parts.
        """
        if "num_parts" not in facts:
            raise UserError(
                "the data set has no parts; task 'pointcloud' classifies its clouds (task: ...)"
            )
        return {
            "num_parts": facts["num_parts"],
            "num_categories": facts["num_classes"],
            "in_channels": facts["in_channels"],
        }

    def training_step(self, batches: Sequence[Batch], step: int) -> Iterator[Update]:
        """Yield the one update: cross entropy over all parts, whatever the category."""
        del step
        (batch,) = batches
        parts = known_targets(batch.parts)
        logits = self._logits(batch, batch.points)
        if batch.mask is not None:
            logits, parts = logits[batch.mask], parts[batch.mask]
        logits, parts = logits.flatten(0, -2), parts.flatten()
        smoothing = spread_smoothing(self.label_smoothing, logits.shape[1])
        loss = F.cross_entropy(logits, parts, label_smoothing=smoothing)
        accuracy = (logits.detach().argmax(dim=1) == parts).float().mean()
        yield Update("model", {"loss": loss}, {"point_accuracy": accuracy})

    def new_metrics(self, device: torch.device) -> Votes:
        """Return empty metrics for one validation."""
        plain = PartMetrics(self.part_ranges, device, self.class_names)
        voted = self.vote_scales or self.random_votes
        return Votes(plain, PartMetrics(self.part_ranges, device) if voted else None)

    def validation_step(self, batch: Batch, metrics: Votes) -> None:
        """Add one batch to the metrics."""
        logits = self._evaluated_logits(batch, batch.points)
        voted = self._vote(batch, logits)
        metrics.update(
            logits, voted, known_targets(batch.parts), known_targets(batch.labels), batch.mask
        )

    def _logits(self, batch: Batch, points: Tensor) -> Tensor:
        return self.networks["model"](points, known_targets(batch.labels), batch.mask).float()

    def _evaluated_logits(self, batch: Batch, points: Tensor) -> Tensor:
        """Return logits of all points, portion by portion where a cloud is divided."""
        portions = self._portions(points.shape[1])
        if len(portions) == 1 or batch.mask is not None:
            return self._logits(batch, points)
        logits = [self._logits(batch, points[:, portion]) for portion in portions]
        joined = logits[0].new_empty(*points.shape[:2], logits[0].shape[2])
        for portion, values in zip(portions, logits, strict=True):
            joined[:, portion] = values
        return joined

    # prediction

    def predict_batch(self, batch: Batch) -> list[dict[str, Any]]:
        """Return for each cloud its category and how many points each of its parts has.

        A category is taken from the name of the file's folder where that is one; otherwise every
        category is tried and the one whose parts get the surest prediction is taken.
        """
        self._point_parts.clear()  # only the pictures of the latest batch can be asked for
        records: list[dict[str, Any]] = []
        for number, name in enumerate(batch.names):
            points = batch.points[number]
            if batch.mask is not None:
                points = points[batch.mask[number]]
            folder = Path(name).parent.name
            category = self.class_names.index(folder) if folder in self.class_names else None
            if batch.labels is not None:
                category = int(batch.labels[number])
            chosen, sure = (category, None) if category is not None else self._guess(points)
            parts = self._segment(points, chosen)
            self._point_parts[name] = parts
            counts = np.bincount(parts, minlength=len(self.part_names))
            start, end = self.part_ranges[chosen]
            records.append(
                {
                    "file": name,
                    "category": self.class_names[chosen],
                    "category_is": "given" if category is not None else "guessed",
                    **({} if sure is None else {"mean_probability": sure}),
                    "points": len(parts),
                    "parts": {
                        self.part_names[part]: int(counts[part]) for part in range(start, end)
                    },
                }
            )
        return records

    def _portions(self, num_points: int) -> list[Tensor]:
        """Divide points into portions about as dense as the clouds the network was trained on.

        Clouds with less than twice as many points stay whole. The order of points is random in
        the data sets and in what is read from a file, so every portion is spread over the object.
        """
        count = max(num_points // (self.num_points or num_points), 1)
        return [torch.arange(first, num_points, count) for first in range(count)]

    def _guess(self, points: Tensor) -> tuple[int, float]:
        """Return the category whose parts are predicted most surely, and how surely."""
        portion = points[self._portions(len(points))[0]]
        scores = []
        for category in range(len(self.class_names)):
            labels = torch.tensor([category], device=points.device)
            logits = self.networks["model"](portion[None], labels).float()
            start, end = self.part_ranges[category]
            scores.append(logits.softmax(2)[0, :, start:end].amax(1).mean())
        best = int(torch.stack(scores).argmax())
        return best, float(scores[best])

    def _segment(self, points: Tensor, category: int) -> np.ndarray:
        """Return the part of each point, portion by portion."""
        labels = torch.tensor([category], device=points.device)
        parts = np.zeros(len(points), dtype=np.int64)
        for portion in self._portions(len(points)):
            logits = self.networks["model"](points[portion][None], labels)
            restricted = restrict_to_category(logits, labels, self.part_ranges)
            parts[portion.numpy()] = restricted[0].argmax(1).cpu().numpy()
        return parts

    def save_prediction(self, sample: Sample, record: Mapping[str, Any], stem: Path) -> list[Path]:
        """Write the parts as a picture, every point with its part, and attention of slots."""
        prepared = self.evaluation_transform(sample)
        parts = self._point_parts[sample.name]
        category = self.class_names.index(record["category"])
        portion = prepared.points[self._portions(len(prepared.points))[0]]
        found = pictures.inspect_segmenter(self.networks["model"], portion, category)
        start, end = self.part_ranges[category]
        names = [
            name.removeprefix(f"{record['category']}: ") for name in self.part_names[start:end]
        ]
        files = [stem.with_name(stem.name + ending) for ending in (".png", "-parts.npz")]
        sure = record.get("mean_probability")
        known = record["category_is"] + ("" if sure is None else f", parts {100 * sure:.0f} % sure")
        title = f"{record['category']} ({known})"
        files[0].write_bytes(pictures.draw_parts(prepared.points, parts - start, names, title))
        np.savez_compressed(
            files[1], points=prepared.points.numpy(), parts=parts, part_names=self.part_names
        )
        if found.attention is not None:
            files.append(stem.with_name(stem.name + "-attention.png"))
            files[2].write_bytes(pictures.draw_attention(portion, found))
        return files

    def baselines(self, splits: Splits) -> dict[str, float]:
        """Return the scores of always the commonest part of the category, and of nearest points."""
        return baselines.part_baselines(splits, self.part_ranges, len(self.part_names))

    @torch.no_grad()
    def report_sections(self, splits: Splits, device: torch.device) -> list[Section]:
        """Return the IoU of each category, clouds with true and predicted parts, and attention."""
        split = reported_split(splits)
        if split is None:
            return []
        metrics = PartMetrics(self.part_ranges, device, self.class_names)
        shown: list[tuple[Sample, np.ndarray]] = []
        wanted = set(np.linspace(0, len(split) - 1, min(len(split), 8)).astype(int).tolist())
        number = 0
        for batch in transformed_batches(self, split, device):
            logits = self._evaluated_logits(batch, batch.points)
            labels = known_targets(batch.labels)
            metrics.update(logits, known_targets(batch.parts), labels, batch.mask)
            found = restrict_to_category(logits, labels, self.part_ranges).argmax(2).cpu()
            for row in found:
                if number in wanted:
                    sample = self.evaluation_transform(split[number])
                    shown.append((sample, row[: len(sample)].numpy()))
                number += 1
        return pictures.part_sections(
            self.networks["model"],
            shown,
            metrics,
            np.array(labels_of(split)),
            self.facts,
            device,
        )
