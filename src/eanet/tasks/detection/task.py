"""Object detection and instance segmentation as a task: losses, predictions, scores, the report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from eanet import registry
from eanet.data.files import decode_image
from eanet.data.splits import Splits
from eanet.engine.task import Update
from eanet.recipe import Recipe
from eanet.report.page import Section
from eanet.tasks.detection import baselines, pictures
from eanet.tasks.detection.detector import pad_images
from eanet.tasks.detection.instance_masks import paste_masks
from eanet.tasks.detection.mask_codes import encode_mask
from eanet.tasks.detection.metrics import DetectionMetrics
from eanet.tasks.detection.samples import Batch, Sample, collate
from eanet.tasks.detection.transforms import Augmentation, augment, normalize, prepare, to_original

__all__ = ["DetectionTask"]

#: images that the report scores, and those it shows
_MAX_REPORT_SAMPLES, _SHOWN_SAMPLES = 500, 4
_REPORT_BATCH = 8


@registry.register_task
class DetectionTask:
    """Boxes and, where the network predicts them, masks of objects.

    Args:
        model: one of :mod:`eanet.tasks.detection.models`.
        facts: of the data set: ``class_names``, ``category_ids``, ``mean``, ``std``, ``has_masks``.
        image_size: shorter side that images are resized to, in pixels.
        max_size: limit of the longer side.
        train_sizes: shorter sides that training chooses from at random; empty for ``image_size``.
        horizontal_flip: probability to mirror a training image left and right.
        vertical_flip: probability to mirror it up and down, for images without an up.

    Raises:
        ValueError: an option is outside its range, or the data have no masks to learn.
    """

    smoke_model: ClassVar[str] = "mask_rcnn_tiny"
    smoke_data: ClassVar[str] = "scenes"
    smoke_options: ClassVar[dict[str, Any]] = {
        "image_size": 64,
        "max_size": 96,
        "train_sizes": [],
    }
    published_metric: ClassVar[tuple[str, float]] = ("box AP (%)", 100.0)

    batches_per_step = 1
    best_metric = "box_AP"
    best_mode: Literal["max", "min"] = "max"

    def __init__(
        self,
        model: nn.Module,
        facts: Mapping[str, Any],
        *,
        image_size: int = 800,
        max_size: int = 1333,
        train_sizes: Sequence[int] = (),
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
    ) -> None:
        for size in (image_size, max_size, *train_sizes):
            if not isinstance(size, int) or size < 32:
                raise ValueError(f"image sizes must be integers of 32 or more, got {size!r}")
        if max_size < image_size:
            raise ValueError(f"max_size {max_size} is smaller than image_size {image_size}")
        flips = {"horizontal_flip": horizontal_flip, "vertical_flip": vertical_flip}
        for name, value in flips.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be within [0, 1], got {value}")
        self.masks = _predicts_masks(model)
        if self.masks and not facts["has_masks"]:
            raise ValueError(
                "the network learns masks and this data set has boxes alone; "
                "take faster_rcnn, cascade_rcnn or retinanet"
            )
        self.model = model
        self.networks: dict[str, nn.Module] = {"model": model}
        self.facts = dict(facts)
        self.class_names: list[str] = list(facts["class_names"])
        self.category_ids: list[int] = list(facts["category_ids"])
        self.image_size, self.max_size = image_size, max_size
        self.augmentation = Augmentation(
            tuple(train_sizes) or (image_size,), max_size, horizontal_flip, vertical_flip
        )

    @property
    def categories(self) -> dict[int, str]:
        """The names of the categories by their numbers in COCO's files."""
        return dict(zip(self.category_ids, self.class_names, strict=True))

    @staticmethod
    def recorded_figures(
        recipe: Recipe, metrics: Mapping[str, float]
    ) -> list[tuple[str, str, float]]:
        """Return which metrics a run is recorded by: AP and AP50 of boxes and of masks."""
        del recipe
        figures = [
            (f"{kind}_{number}", f"{kind} {number} (%)", 100.0)
            for kind in ("box", "mask")
            for number in ("AP", "AP50")
        ]
        return [figure for figure in figures if figure[0] in metrics]

    # data

    @classmethod
    def model_arguments(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number of classes."""
        return {"num_classes": facts["num_classes"]}

    def train_transform(self, sample: Sample) -> Sample:
        """Return the sample varied at random, with what is to be learned of it."""
        return augment(sample, self.augmentation, masks=self.masks)

    def evaluation_transform(self, sample: Sample) -> Sample:
        """Return the sample resized; its objects stay as annotated."""
        return sample.prepared(prepare(sample, shorter=self.image_size, longest=self.max_size))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Put transformed samples together."""
        return collate(samples)

    def read_file(self, path: Path) -> Sample:
        """Read an image.

        Raises:
            UserError: the file is no readable image.
        """
        image = decode_image(path, mode="RGB")
        return Sample(image, None, str(path), 0, (image.height, image.width))

    # training and validation

    def training_step(self, batches: Sequence[Batch], step: int) -> Iterator[Update]:
        """Yield the one update: the losses of proposals and heads."""
        del step
        (batch,) = batches
        images, sizes = self._padded(batch.images)
        losses = self.networks["model"](images, batch.targets, sizes)
        yield Update("model", losses)

    def new_metrics(self, device: torch.device) -> DetectionMetrics:
        """Return empty metrics for one validation."""
        del device  # scores are computed on the CPU
        return DetectionMetrics(self.categories, masks=self.masks)

    def validation_step(self, batch: Batch, metrics: DetectionMetrics) -> None:
        """Add one batch to the metrics."""
        for sample, found in zip(batch.samples, self._detect(batch), strict=True):
            metrics.update(sample, found)

    def _padded(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        return pad_images(normalize(images, self.facts["mean"], self.facts["std"]))

    @torch.no_grad()
    def _detect(self, batch: Batch) -> list[list[dict[str, Any]]]:
        """Return the detections of each image in COCO's form, in the pixels of the stored image."""
        images, sizes = self._padded(batch.images)
        found = self.networks["model"](images, None, sizes)
        return [
            self._entries(detections, size, sample.size)
            for detections, size, sample in zip(found, sizes, batch.samples, strict=True)
        ]

    def _entries(
        self, found: Mapping[str, Tensor], size: tuple[int, int], original: tuple[int, int]
    ) -> list[dict[str, Any]]:
        """Return the detections of one image."""
        # few and small: on a GPU every one of the many steps of pasting a mask would be waited for
        found = {key: value.cpu() for key, value in found.items()}
        corners = to_original(found["boxes"].float(), size, original)
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        entries: list[dict[str, Any]] = [
            {"category_id": self.category_ids[label], "score": score, "bbox": box}
            for label, score, box in zip(
                found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True
            )
        ]
        if "mask_probabilities" in found:
            for entry, probabilities, box in zip(
                entries, found["mask_probabilities"].float(), corners, strict=True
            ):
                mask = paste_masks(probabilities[None], box[None], original)[0]
                entry["segmentation"] = encode_mask(mask.numpy())
        return entries

    # prediction

    def predict_batch(self, batch: Batch) -> list[dict[str, Any]]:
        """Return for each image its detections, best first."""
        return [
            {"file": sample.name, "detections": [self._named(entry) for entry in found]}
            for sample, found in zip(batch.samples, self._detect(batch), strict=True)
        ]

    def _named(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return a detection with the name of its class."""
        label = self.category_ids.index(entry["category_id"])
        return {"label": self.class_names[label], "class": label, **entry}

    def save_prediction(self, sample: Sample, record: Mapping[str, Any], stem: Path) -> list[Path]:
        """Write the image with its detections, and beside it the same as COCO results.

        In ``<stem>.json`` an image is known by the name of its file, without suffix.
        """
        image = stem.with_name(stem.name + ".png")
        image.write_bytes(pictures.annotated(sample, record["detections"]))
        table = stem.with_name(stem.name + ".json")
        own = ("category_id", "bbox", "score", "segmentation")
        results = [
            {"image_id": Path(sample.name).stem, **{key: x[key] for key in own if key in x}}
            for x in record["detections"]
        ]
        table.write_text(json.dumps(results) + "\n", encoding="utf-8")
        return [image, table]

    # report

    def baselines(self, splits: Splits) -> dict[str, float]:
        """Return the scores of connected regions brighter or darker than the rest (Otsu)."""
        test = splits.test if splits.test is not None else splits.validation
        if test is None:
            return {}
        count = min(len(test), _MAX_REPORT_SAMPLES)
        samples = [test[index] for index in range(count)]
        metrics = DetectionMetrics(self.categories, masks=self.masks)
        commonest = baselines.commonest_label(samples)
        for sample in samples:
            entries = baselines.threshold_regions(np.asarray(sample.image))
            found = [{"category_id": self.category_ids[commonest], **entry} for entry in entries]
            metrics.update(sample, found)
        values = metrics.compute()
        names = [f"{kind}_{n}" for kind in metrics.kinds for n in ("AP", "AP50")]
        return {f"otsu_regions_{name}": values[name] for name in names}

    @torch.no_grad()
    def report_sections(self, splits: Splits, device: torch.device) -> list[Section]:
        """Return detections, scores by class and attention maps, on the test split."""
        name = "test" if splits.test is not None else "validation"
        split = splits.named().get(name)
        if split is None or not len(split):
            return []
        count = min(len(split), _MAX_REPORT_SAMPLES)
        indices = np.linspace(0, len(split) - 1, count).astype(int).tolist()
        metrics = self.new_metrics(device)
        records: list[list[dict[str, Any]]] = []
        for start in range(0, count, _REPORT_BATCH):
            chosen = indices[start : start + _REPORT_BATCH]
            batch = self.collate([self.evaluation_transform(split[index]) for index in chosen])
            for sample, found in zip(batch.samples, self._detect(batch.to(device)), strict=True):
                metrics.update(sample, found)
                records.append([self._named(entry) for entry in found])
        places = np.linspace(0, count - 1, min(_SHOWN_SAMPLES, count)).astype(int).tolist()
        shown = [split[indices[place]] for place in places]

        def inputs(sample: Sample) -> list[Tensor]:
            image = self.evaluation_transform(sample).image
            assert isinstance(image, Tensor)
            return normalize([image.to(device)], self.facts["mean"], self.facts["std"])

        return [
            pictures.examples_section(
                shown, [records[place] for place in places], self.class_names, name
            ),
            pictures.scores_section(metrics.scores(), self.categories, name),
            *pictures.attention_sections(shown, self.networks["model"], inputs),
        ]


def _predicts_masks(model: nn.Module) -> bool:
    """Tell whether a detector has a branch for masks."""
    settings = getattr(getattr(model, "heads", None), "settings", None)
    return bool(settings is not None and settings.masks)
