"""What a detector is judged by: COCO's numbers, for boxes and where there are any for masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from eanet.tasks.detection.coco_scores import CocoScores, Kind, coco_scores
from eanet.tasks.detection.samples import Sample

__all__ = ["DetectionMetrics"]


class DetectionMetrics:
    """Collects detections and truth over batches and processes.

    Args:
        categories: names by number, in the order of the labels.
        masks: whether masks are compared too.
    """

    def __init__(self, categories: Mapping[int, str], *, masks: bool) -> None:
        self.categories = dict(categories)
        self.kinds: dict[str, Kind] = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
        self._numbers = list(self.categories)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []

    def update(self, sample: Sample, detections: Sequence[Mapping[str, Any]]) -> None:
        """Add an image.

        Args:
            sample: with its objects.
            detections: ``category_id``, ``score``, ``bbox`` and, for masks, ``segmentation``.
        """
        height, width = sample.size
        self._images.append({"id": sample.number, "height": height, "width": width})
        for instance in sample.instances or ():
            annotation = {
                "image_id": sample.number,
                "category_id": self._numbers[instance.label],
                "bbox": list(instance.box),
                "area": instance.area,
                "iscrowd": int(instance.is_crowd),
            }
            if instance.segmentation is not None:
                annotation["segmentation"] = instance.segmentation
            self._annotations.append(annotation)
        self._results += [{"image_id": sample.number, **found} for found in detections]

    def truth(self) -> dict[str, Any]:
        """Return the objects of all images seen, on every process, as a COCO annotation file."""
        annotations = _from_all_processes(self._annotations)
        annotations.sort(key=lambda annotation: annotation["image_id"])  # stable
        return {
            "images": sorted(_from_all_processes(self._images), key=lambda image: image["id"]),
            # the evaluator takes number 0 for "unmatched"
            "annotations": [{**x, "id": place} for place, x in enumerate(annotations, start=1)],
            "categories": [{"id": n, "name": name} for n, name in self.categories.items()],
        }

    def results(self) -> list[dict[str, Any]]:
        """Return the detections of all images seen, on every process, as COCO results."""
        return sorted(_from_all_processes(self._results), key=lambda found: found["image_id"])

    def scores(self) -> dict[str, CocoScores]:
        """Return the scores of boxes and of masks."""
        truth, results = self.truth(), self.results()
        return {
            # without their boxes masks are ranked by their own area
            name: coco_scores(truth, results, kind, mask_area=True)
            for name, kind in self.kinds.items()
        }

    def compute(self) -> dict[str, float]:
        """Return the twelve numbers of each kind, and AP with all classes taken for one."""
        truth, results = self.truth(), self.results()
        values: dict[str, float] = {}
        for name, kind in self.kinds.items():
            found = coco_scores(truth, results, kind, mask_area=True)
            values |= {f"{name}_{number}": value for number, value in found.numbers.items()}
            any_class = coco_scores(truth, results, kind, class_agnostic=True, mask_area=True)
            values[f"{name}_AP_class_agnostic"] = any_class.numbers["AP"]
        return values


def _from_all_processes(own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of all processes, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(own)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return [entry for part in gathered for entry in part]
