"""Second stage of Faster and Mask R-CNN: one look at each proposal."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eanet.tasks.detection.assignment import Matcher
from eanet.tasks.detection.boxes import decode_boxes
from eanet.tasks.detection.heads import (
    BOX_CELLS,
    MASK_CELLS,
    BoxHead,
    MaskHead,
    box_losses,
    draw_regions,
    mask_loss,
)
from eanet.tasks.detection.region_features import region_features
from eanet.tasks.detection.selection import select_detections

__all__ = ["Detections", "HeadSettings", "RegionHeads", "chosen_masks"]

#: one image's ``boxes`` (N, 4), ``scores`` (N), ``labels`` (N) and, where masks are predicted,
#: ``mask_probabilities`` (N, 28, 28)
Detections = dict[str, Tensor]

_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class HeadSettings:
    """What the heads of all stages share.

    Args:
        num_classes: without the background.
        channels: width of the feature maps.
        strides: of the levels that regions are cut from.
        masks: whether masks are predicted.
        hidden: width of the fully connected layers.
        mask_width: width of the mask head.
        mask_depth: number of its convolutions.
        samples: regions of an image that are learned from.
        min_score: detections score above it.
        max_overlap: of detections of one class.
        max_detections: of an image.
    """

    num_classes: int
    channels: int
    strides: tuple[int, ...]
    masks: bool
    hidden: int = 1024
    mask_width: int = 256
    mask_depth: int = 4
    samples: int = 512
    min_score: float = 0.05
    max_overlap: float = 0.5
    max_detections: int = 100

    def box_head(self, *, class_specific: bool) -> BoxHead:
        """Return a new head for class and box."""
        return BoxHead(
            self.channels, self.num_classes, hidden=self.hidden, class_specific=class_specific
        )

    def mask_head(self) -> MaskHead:
        """Return a new head for masks."""
        return MaskHead(
            self.channels, self.num_classes, width=self.mask_width, depth=self.mask_depth
        )

    def select(self, boxes: Tensor, logits: Tensor) -> Detections:
        """Return the detections of an image, best first."""
        found, scores, labels = select_detections(
            boxes,
            logits.softmax(1)[:, :-1],
            min_score=self.min_score,
            max_overlap=self.max_overlap,
            limit=self.max_detections,
        )
        return {"boxes": found, "scores": scores, "labels": labels}


class RegionHeads(nn.Module):
    """Draws regions and learns from them, or turns proposals into detections.

    Args:
        settings: see there.
    """

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        self.box = settings.box_head(class_specific=True)
        self.mask = settings.mask_head() if settings.masks else None
        # with masks an object's best proposals are its own even where another overlaps them more
        self._match = Matcher(0.5, 0.5, min_best=0.5 if settings.masks else None)

    def losses(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the losses of a batch; ``sizes`` are of no use here."""
        del sizes
        settings = self.settings
        count, background = settings.samples, settings.num_classes
        drawn = [
            draw_regions(boxes, target, self._match, count=count, num_classes=background)
            for boxes, target in zip(proposals, targets, strict=True)
        ]
        cut = region_features(features, settings.strides, [r.boxes for r in drawn], BOX_CELLS)
        logits, offsets = self.box(cut)
        losses = box_losses(
            logits, offsets, drawn, targets, stds=_STDS, loss="l1", num_classes=background
        )
        if self.mask is not None:
            positives = [regions.boxes[: len(regions.objects)] for regions in drawn]
            cut = region_features(features, settings.strides, positives, MASK_CELLS)
            losses["mask"] = mask_loss(self.mask(cut), drawn, targets)
        return losses

    def look(self, regions: Tensor, detected: Tensor) -> None:
        """Run what has weights, for counting its cost.

        Args:
            regions: features that boxes are read from.
            detected: features that masks are read from.
        """
        self.box(regions)
        if self.mask is not None:
            self.mask(detected)

    def detect(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Detections]:
        """Return the detections of each image, in the pixels of the batch."""
        settings = self.settings
        cut = region_features(features, settings.strides, proposals, BOX_CELLS)
        logits, offsets = self.box(cut)
        counts = [len(boxes) for boxes in proposals]
        found = [
            settings.select(decode_boxes(boxes, own, _STDS, clip=size), scores)
            for boxes, own, scores, size in zip(
                proposals, offsets.split(counts), logits.split(counts), sizes, strict=True
            )
        ]
        if self.mask is not None:
            boxes = [detections["boxes"] for detections in found]
            cut = region_features(features, settings.strides, boxes, MASK_CELLS)
            chosen_masks(self.mask(cut).sigmoid(), found)
        return found


def chosen_masks(probabilities: Tensor, found: Sequence[Detections]) -> None:
    """Give each detection the mask of its class.

    Args:
        probabilities: (detections of all images, classes, cells, cells).
        found: the detections; ``mask_probabilities`` are added.
    """
    start = 0
    for detections in found:
        labels = detections["labels"]
        part = probabilities[start : start + len(labels)]
        start += len(labels)
        detections["mask_probabilities"] = part[
            torch.arange(len(labels), device=labels.device), labels
        ]
