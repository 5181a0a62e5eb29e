"""Semantic segmentation as a task: data, losses, evaluation, predictions, the report."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from eanet import registry
from eanet.data.files import decode_image
from eanet.data.labeled_images import image_to_tensor, normalize
from eanet.data.splits import Splits
from eanet.engine.task import Update
from eanet.report.page import Section
from eanet.tasks.segmentation import pictures
from eanet.tasks.segmentation.inference import Protocol, segment
from eanet.tasks.segmentation.losses import Reduction, pixel_loss
from eanet.tasks.segmentation.metrics import SegmentationMetrics, scores
from eanet.tasks.segmentation.samples import IGNORE, Batch, Sample, collate
from eanet.tasks.segmentation.transforms import Convention, TrainingTransform

__all__ = ["SegmentationTask"]

#: scores that are held at a time: 256 MiB of float32
_MAX_SCORE_VALUES = 2**26
#: training images that a baseline looks at
_MAX_BASELINE_IMAGES = 200


@registry.register_task
class SegmentationTask:
    """A class for every pixel.

    Args:
        model: gives logits of the size of its images.
        facts: of the data set: ``class_names``, ``in_channels``, ``mean``, ``std``, ``palette``.
        crop_size: height and width of training crops.
        scale: (long side, short side) that an image fits into, in training before the random
            factor, and in evaluation; ``None`` keeps its own size.
        ratios: least and largest random factor on the size of a training image.
        ratio_step: distance of the factors to choose from; ``None`` for any in the range.
        max_class_share: see :class:`eanet.tasks.segmentation.transforms.TrainingTransform`.
        flip: probability of a training image to be mirrored left and right.
        distort_colors: change brightness, contrast, saturation and hue of training images.
        convention: how images and labels are resampled: "authors", "mmsegmentation", "smooth".
        reduction: see :func:`eanet.tasks.segmentation.losses.pixel_loss`, as the next three.
        class_weights: a factor for each class in the loss.
        ohem_threshold: of online hard example mining; ``None`` switches it off.
        ohem_min_pixels: of online hard example mining.
        auxiliary_weight: factor on the loss of the auxiliary head, where the network has one.
        scales: see :class:`eanet.tasks.segmentation.inference.Protocol`, as the next five.
        mirror: in evaluation, add a mirrored pass.
        merge: how passes are added.
        size_modulus: of padding in evaluation.
        window: of a sliding window in evaluation.
        window_stride: of a sliding window in evaluation.

    Raises:
        ValueError: an option is outside its range.
    """

    smoke_model: ClassVar[str] = "eanet_tiny"
    smoke_data: ClassVar[str] = "drawn_scenes"
    smoke_options: ClassVar[dict[str, Any]] = {
        "crop_size": [32, 32],
        "scale": None,
        "window": None,
        "window_stride": None,
        "class_weights": None,
    }
    published_metric: ClassVar[tuple[str, float]] = ("mIoU (%)", 100.0)

    batches_per_step = 1
    best_metric = "mean_iou"
    best_mode: Literal["max", "min"] = "max"

    def __init__(
        self,
        model: nn.Module,
        facts: Mapping[str, Any],
        *,
        crop_size: Sequence[int] = (513, 513),
        scale: Sequence[int] | None = None,
        ratios: Sequence[float] = (1.0, 1.0),
        ratio_step: float | None = None,
        max_class_share: float = 1.0,
        flip: float = 0.5,
        distort_colors: bool = False,
        convention: Convention = "authors",
        reduction: Reduction = "all_pixels",
        class_weights: Sequence[float] | None = None,
        ohem_threshold: float | None = None,
        ohem_min_pixels: int = 100_000,
        auxiliary_weight: float = 0.4,
        scales: Sequence[float] = (1.0,),
        mirror: bool = False,
        merge: Literal["logits", "probabilities"] = "logits",
        size_modulus: int | None = None,
        window: Sequence[int] | None = None,
        window_stride: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.networks: dict[str, nn.Module] = {"model": model}
        self.facts = dict(facts)
        self.class_names: list[str] = list(facts["class_names"])
        self.palette: list[list[int]] = facts["palette"]
        _check_range("flip", flip, 0, 1)
        _check_range("max_class_share", max_class_share, 0, 1)
        if reduction not in ("all_pixels", "valid_pixels"):
            raise ValueError(f"reduction must be 'all_pixels' or 'valid_pixels', got {reduction!r}")
        if class_weights is not None and len(class_weights) != len(self.class_names):
            raise ValueError(
                f"{len(class_weights)} class_weights for {len(self.class_names)} classes"
            )
        self._loss_options: dict[str, Any] = {
            "reduction": reduction,
            "ohem_threshold": ohem_threshold,
            "ohem_min_pixels": ohem_min_pixels,
        }
        self._class_weights = None if class_weights is None else torch.tensor(list(class_weights))
        self.auxiliary_weight = auxiliary_weight
        base = None if scale is None else _pair_of(scale, "scale")
        self.protocol = Protocol(
            scales=tuple(scales),
            mirror=mirror,
            merge=merge,
            base_scale=base,
            size_modulus=size_modulus,
            window=None if window is None else _pair_of(window, "window"),
            window_stride=None
            if window_stride is None
            else _pair_of(window_stride, "window_stride"),
            convention=convention,
        )
        if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1]:
            raise ValueError(f"ratios must be 0 < least <= largest, got {ratios}")
        self._train_transform = TrainingTransform(
            crop_size=_pair_of(crop_size, "crop_size"),
            mean=facts["mean"],
            std=facts["std"],
            scale=base,
            ratios=(ratios[0], ratios[1]),
            ratio_step=ratio_step,
            max_class_share=max_class_share,
            mirror=flip,
            distort_colors=distort_colors,
            convention=convention,
        )

    # data

    @classmethod
    def model_arguments(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number of classes and of image channels."""
        return {"num_classes": facts["num_classes"], "in_channels": facts["in_channels"]}

    def train_transform(self, sample: Sample) -> Sample:
        """Return a random crop, normalized."""
        return self._train_transform(sample)

    def evaluation_transform(self, sample: Sample) -> Sample:
        """Return the whole image as bytes; what else evaluation does to it needs the device."""
        image = sample.image
        tensor = image if isinstance(image, Tensor) else image_to_tensor(image)
        return Sample(tensor, sample.labels, sample.name)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack transformed samples, whatever their sizes."""
        return collate(samples)

    def read_file(self, path: Path) -> Sample:
        """Read an image to predict on.

        Raises:
            UserError: the file is no readable image.
        """
        mode = "L" if self.facts["in_channels"] == 1 else "RGB"
        return Sample(decode_image(path, mode=mode), None, str(path))

    # training and validation

    def training_step(self, batches: Sequence[Batch], step: int) -> Iterator[Update]:
        """Yield the one update: cross entropy of all pixels, and of the auxiliary head."""
        del step
        (batch,) = batches
        labels = _labels(batch)
        network = self.networks["model"]
        images = self._normalized(batch.images)
        losses: dict[str, Tensor] = {}
        if getattr(self.model, "auxiliary", None) is None:
            logits = network(images).float()
        else:
            logits, auxiliary = network(images, with_auxiliary=True)
            logits = logits.float()
            losses["auxiliary_loss"] = self.auxiliary_weight * self._loss(auxiliary, labels)
        losses = {"loss": self._loss(logits, labels), **losses}
        valid = labels != IGNORE
        right = ((logits.detach().argmax(dim=1) == labels) & valid).sum()
        yield Update("model", losses, {"pixel_accuracy": right / valid.sum().clamp(min=1)})

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = self._class_weights
        return pixel_loss(
            logits.float(),
            labels,
            class_weights=None if weights is None else weights.to(logits.device),
            **self._loss_options,
        )

    def _normalized(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        return normalize(images, self.facts["mean"], self.facts["std"])

    def new_metrics(self, device: torch.device) -> SegmentationMetrics:
        """Return empty metrics for one validation."""
        return SegmentationMetrics(self.class_names, device)

    def validation_step(self, batch: Batch, metrics: SegmentationMetrics) -> None:
        """Add a batch; every image is judged at its own size."""
        found = self.class_scores(batch)
        labels = _labels(batch)
        for number, (scored, (height, width)) in enumerate(zip(found, batch.sizes, strict=True)):
            own = labels[number, :height, :width]
            passes = len(self.protocol.scales) * (1 + self.protocol.mirror)
            if self.protocol.merge == "probabilities":
                logits = (scored / passes).clamp(min=1e-12).log()
            else:
                logits = scored / passes
            loss = pixel_loss(logits.unsqueeze(0), own.unsqueeze(0), reduction="valid_pixels")
            metrics.update(scored.argmax(dim=0), own, loss)

    def class_scores(self, batch: Batch) -> Iterator[Tensor]:
        """Yield the scores (classes, height, width) of each image, by the protocol.

        Few images at a time go through the network where they are large, so that scores of many
        megapixels do not have to be held for a whole batch.
        """
        values = len(self.class_names) * batch.images.shape[2] * batch.images.shape[3]
        step = max(1, _MAX_SCORE_VALUES // values)
        for start in range(0, len(batch), step):
            yield from segment(
                self.networks["model"],
                self._normalized(batch.images[start : start + step]),
                batch.sizes[start : start + step],
                self.protocol,
                takes_masks=getattr(self.model, "takes_masks", False),
            )

    # prediction

    def predict_batch(self, batch: Batch) -> list[dict[str, Any]]:
        """Return for each image the share of each class that occurs, the largest first."""
        records: list[dict[str, Any]] = []
        for name, scored in zip(batch.names, self.class_scores(batch), strict=True):
            predicted = scored.argmax(dim=0).to(torch.uint8).cpu().numpy()
            shares = np.bincount(predicted.ravel(), minlength=len(self.class_names))
            order = [int(label) for label in np.argsort(-shares, kind="stable") if shares[label]]
            records.append(
                {
                    "file": name,
                    "height": predicted.shape[0],
                    "width": predicted.shape[1],
                    "classes": [
                        {
                            "label": self.class_names[label],
                            "share": float(shares[label] / predicted.size),
                        }
                        for label in order
                    ],
                    "_mask": predicted,
                }
            )
        return records

    def save_prediction(self, sample: Sample, record: Mapping[str, Any], stem: Path) -> list[Path]:
        """Write an overlay with a legend, a mask in colors, and the classes as an index image.

        The files are ``<stem>.png``, ``<stem>.color.png`` and ``<stem>.index.png``; the last is a
        palette image whose values are the classes.
        """
        assert not isinstance(sample.image, Tensor)
        return pictures.write_prediction(
            np.asarray(sample.image.convert("RGB")),
            record["_mask"],
            class_names=self.class_names,
            palette=self.palette,
            stem=stem,
        )

    # report

    def baselines(self, splits: Splits) -> dict[str, float]:
        """Return the mean IoU on the test split of each pixel's commonest class in training.

        "Commonest class" gives one class everywhere; "commonest class of the place" that of the
        same relative place in the image, on a grid of 32 x 32.
        """
        test = splits.test if splits.test is not None else splits.validation
        if test is None:
            return {}
        count = len(self.class_names)
        grid = np.zeros((32, 32, count), dtype=np.int64)
        for index in _spread(len(splits.train), _MAX_BASELINE_IMAGES):
            labels = np.asarray(splits.train[index].labels)
            small = labels[_places(labels.shape[0])][:, _places(labels.shape[1])]
            rows, columns = np.nonzero(small != IGNORE)
            np.add.at(grid, (rows, columns, small[rows, columns]), 1)
        local, overall = grid.argmax(axis=2), int(grid.sum(axis=(0, 1)).argmax())
        confusions = np.zeros((2, count, count), dtype=np.int64)
        for index in _spread(len(test), _MAX_BASELINE_IMAGES):
            labels = np.asarray(test[index].labels)
            height, width = labels.shape
            placed = local[np.arange(height) * 32 // height][:, np.arange(width) * 32 // width]
            for confusion, guess in zip(
                confusions, (np.full_like(placed, overall), placed), strict=True
            ):
                valid = labels != IGNORE
                cells = labels[valid].astype(np.int64) * count + guess[valid]
                confusion += np.bincount(cells, minlength=count**2).reshape(count, count)
        names = ("commonest_class_mean_iou", "commonest_class_of_the_place_mean_iou")
        return {
            name: scores(torch.from_numpy(confusion))["mean_iou"]
            for name, confusion in zip(names, confusions, strict=True)
        }

    @torch.no_grad()
    def report_sections(self, splits: Splits, device: torch.device) -> list[Section]:
        """Return the table of classes, sample predictions and attention maps."""
        name = "test" if splits.test is not None else "validation"
        split = splits.named().get(name)
        if split is None or not len(split):
            return []
        return pictures.report_sections(self, split, name, device)


def _places(length: int) -> np.ndarray:
    """Return the middle pixel of each of 32 stretches of a side."""
    return ((np.arange(32) + 0.5) * length / 32).astype(int)


def _spread(length: int, count: int) -> list[int]:
    """Return up to ``count`` indices, evenly spread."""
    return sorted(set(np.linspace(0, length - 1, min(count, length)).astype(int).tolist()))


def _labels(batch: Batch) -> Tensor:
    """Return the labels of a batch, which must be known."""
    if batch.labels is None:
        raise ValueError("the batch has samples without labels")
    return batch.labels


def _pair_of(values: Sequence[int], name: str) -> tuple[int, int]:
    """Return two positive integers."""
    if len(values) != 2 or not all(isinstance(v, int) and v >= 1 for v in values):
        raise ValueError(f"{name} must be two positive integers, got {values!r}")
    return values[0], values[1]


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be within [{low}, {high}], got {value}")
