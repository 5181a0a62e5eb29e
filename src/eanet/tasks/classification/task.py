"""Image classification as a task: losses, predictions, baselines, the report."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eanet import registry
from eanet.data.files import decode_image
from eanet.data.splits import Dataset, Splits
from eanet.engine.task import Update
from eanet.report.page import Section
from eanet.tasks.classification import pictures, transforms
from eanet.tasks.classification.datasets import labels_of
from eanet.tasks.classification.metrics import ClassificationMetrics
from eanet.tasks.classification.samples import Batch, Sample, collate

__all__ = ["ClassificationTask"]

#: values that the nearest-neighbor baseline may hold: 256 MiB of float32
_MAX_BASELINE_VALUES = 2**26
#: samples that the report looks at; larger sets are sampled evenly
_MAX_REPORT_SAMPLES = 5000
_REPORT_BATCH = 128


@registry.register_task
class ClassificationTask:
    """One label per image.

    Args:
        model: gives logits of ``facts["num_classes"]`` classes.
        facts: of the data set: ``class_names``, ``num_classes``, ``in_channels``, ``mean``,
            ``std``.
        image_size: edge of the square the network sees, in pixels.
        augment: see :func:`eanet.tasks.classification.transforms.training_transform`.
        crop_fraction: evaluation resizes the shorter side to ``image_size / crop_fraction`` and
            cuts out the center.
        label_smoothing: share of the target spread evenly over all classes.
        mixup: alpha of mixup, see :func:`eanet.tasks.classification.transforms.mix`.
        cutmix: alpha of CutMix.
        erasing: probability of a training image to lose a random rectangle.

    Raises:
        ValueError: an option is outside its range.
    """

    smoke_model: ClassVar[str] = "eamlp_tiny"
    smoke_data: ClassVar[str] = "digits"
    smoke_options: ClassVar[dict[str, Any]] = {"image_size": 32}
    published_metric: ClassVar[tuple[str, float]] = ("top-1 accuracy (%)", 100.0)

    batches_per_step = 1
    best_metric = "accuracy"
    best_mode: Literal["max", "min"] = "max"

    def __init__(
        self,
        model: nn.Module,
        facts: Mapping[str, Any],
        *,
        image_size: int = 224,
        augment: transforms.Augmentation = "none",
        crop_fraction: float = 1.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        erasing: float = 0.0,
    ) -> None:
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size must be a positive integer, got {image_size!r}")
        if not 0 < crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be within (0, 1], got {crop_fraction}")
        for name, value in (("label_smoothing", label_smoothing), ("erasing", erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be within [0, 1], got {value}")
        if mixup < 0 or cutmix < 0:
            raise ValueError(f"mixup and cutmix must be at least 0, got {mixup} and {cutmix}")
        self.model = model
        self.networks: dict[str, nn.Module] = {"model": model}
        self.facts = dict(facts)
        self.class_names: list[str] = list(facts["class_names"])
        self.num_classes = len(self.class_names)
        self.label_smoothing, self.erasing = label_smoothing, erasing
        self.mixup, self.cutmix = mixup, cutmix
        self._train_transform = transforms.training_transform(augment, size=image_size)
        self._evaluation_transform = transforms.evaluation_transform(
            size=image_size, crop_fraction=crop_fraction
        )

    # data

    @classmethod
    def model_arguments(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number of classes and of image channels."""
        return {"num_classes": facts["num_classes"], "in_channels": facts["in_channels"]}

    def train_transform(self, sample: Sample) -> Sample:
        """Return the sample augmented, its image as bytes."""
        return self._train_transform(sample)

    def evaluation_transform(self, sample: Sample) -> Sample:
        """Return the sample resized and cut, its image as bytes."""
        return self._evaluation_transform(sample)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack transformed samples."""
        return collate(samples)

    def read_file(self, path: Path) -> Sample:
        """Read an image in the mode the network was trained on.

        Raises:
            UserError: the file is no readable image.
        """
        mode = "L" if self.facts["in_channels"] == 1 else "RGB"
        return Sample(decode_image(path, mode=mode), None, str(path))

    # training and validation

    def training_step(self, batches: Sequence[Batch], step: int) -> Iterator[Update]:
        """Yield the one update: cross entropy with soft targets where asked."""
        del step
        (batch,) = batches
        labels = _labels(batch)
        images = batch.images
        targets: Tensor = labels
        if self.mixup or self.cutmix:
            targets = F.one_hot(labels, self.num_classes).float()
            images, targets = transforms.mix(images, targets, mixup=self.mixup, cutmix=self.cutmix)
        inputs = self._normalize(images)
        if self.erasing:
            inputs = transforms.erase(inputs, self.erasing)
        logits = self.networks["model"](inputs).float()
        # smoothing after mixing equals mixing smoothed targets: both are linear
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        yield Update("model", {"loss": loss}, {"accuracy": accuracy})

    def new_metrics(self, device: torch.device) -> ClassificationMetrics:
        """Return empty metrics for one validation."""
        return ClassificationMetrics(self.num_classes, device)

    def validation_step(self, batch: Batch, metrics: ClassificationMetrics) -> None:
        """Add one batch to the metrics."""
        metrics.update(self._logits(batch), _labels(batch))

    def _normalize(self, images: Tensor) -> Tensor:
        return transforms.normalize(images, self.facts["mean"], self.facts["std"])

    def _logits(self, batch: Batch) -> Tensor:
        return self.networks["model"](self._normalize(batch.images)).float()

    # prediction

    def predict_batch(self, batch: Batch) -> list[dict[str, Any]]:
        """Return for each image the likeliest class and up to five classes with probabilities."""
        probabilities = self._logits(batch).softmax(dim=1).cpu()
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
        """Write the image beside the probabilities of the likeliest classes as ``<stem>.png``."""
        file = stem.with_name(stem.name + ".png")
        file.write_bytes(pictures.annotated(sample, record))
        return [file]

    # report

    def baselines(self, splits: Splits) -> dict[str, float]:
        """Return the accuracy on the test split of always the commonest class, and of 1-NN.

        The nearest neighbor is found among the training samples by the distance of raw pixels; it
        is left out where images differ in size or are too many.
        """
        test = splits.test if splits.test is not None else splits.validation
        if test is None:
            return {}
        train_labels, labels = np.array(labels_of(splits.train)), np.array(labels_of(test))
        commonest = np.bincount(train_labels).argmax()
        scores = {"commonest_class_accuracy": float((labels == commonest).mean())}
        size = splits.facts.get("image_size")
        values = (len(labels) + len(train_labels)) * int(np.prod(size or [0]))
        if size and values * splits.facts["in_channels"] <= _MAX_BASELINE_VALUES:
            from sklearn.neighbors import KNeighborsClassifier  # slow to import

            neighbors = KNeighborsClassifier(n_neighbors=1)
            neighbors.fit(_pixels(splits.train), train_labels)
            predicted = neighbors.predict(_pixels(test))
            scores["nearest_neighbor_accuracy"] = float((predicted == labels).mean())
        return scores

    @torch.no_grad()
    def report_sections(self, splits: Splits, device: torch.device) -> list[Section]:
        """Return confusions, sample predictions and attention maps, on the test split."""
        name = "test" if splits.test is not None else "validation"
        split = splits.named().get(name)
        if split is None or not len(split):
            return []
        count = min(len(split), _MAX_REPORT_SAMPLES)
        indices = np.linspace(0, len(split) - 1, count).astype(int).tolist()
        network = self.networks["model"]
        probabilities, labels = [], []
        for start in range(0, count, _REPORT_BATCH):
            chosen = indices[start : start + _REPORT_BATCH]
            batch = self.collate([self.evaluation_transform(split[index]) for index in chosen])
            batch = batch.to(device)
            probabilities.append(self._logits(batch).softmax(dim=1).cpu())
            labels.append(_labels(batch).cpu())
        results = pictures.Results(
            split=split,
            split_name=name,
            indices=indices,
            labels=torch.cat(labels).numpy(),
            probabilities=torch.cat(probabilities).numpy(),
            class_names=self.class_names,
        )
        return [
            pictures.confusion_section(results),
            pictures.examples_section(results),
            *pictures.attention_sections(
                results,
                network,
                lambda sample: self._normalize(
                    self.collate([self.evaluation_transform(sample)]).images.to(device)
                ),
                lambda sample: self.evaluation_transform(sample).image,
            ),
        ]


def _labels(batch: Batch) -> Tensor:
    """Return the labels of a batch, which must be known."""
    if batch.labels is None:
        raise ValueError("the batch has samples without a label")
    return batch.labels


def _pixels(dataset: Dataset) -> np.ndarray:
    """Return all images as rows of float32."""
    rows = [np.asarray(dataset[index].image) for index in range(len(dataset))]
    return np.stack(rows).reshape(len(rows), -1).astype(np.float32)
