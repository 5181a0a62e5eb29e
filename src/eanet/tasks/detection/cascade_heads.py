"""Second stage of Cascade R-CNN: three looks, each at what the one before made of a proposal."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eanet.tasks.detection.assignment import Matcher
from eanet.tasks.detection.boxes import decode_boxes
from eanet.tasks.detection.heads import (
    BOX_CELLS,
    MASK_CELLS,
    DrawnRegions,
    box_losses,
    draw_regions,
    mask_loss,
)
from eanet.tasks.detection.region_features import region_features
from eanet.tasks.detection.region_heads import Detections, HeadSettings, chosen_masks

__all__ = ["CascadeHeads"]


class _Stage(NamedTuple):
    overlap: float
    stds: tuple[float, float, float, float]
    weight: float


#: what counts as positive, the scale of offsets and the weight of the losses, stage by stage
_STAGES = (
    _Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    _Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    _Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


class CascadeHeads(nn.Module):
    """Three box heads, and as many mask heads where masks are predicted.

    All classes of a region share one box, so that a stage can refine without knowing the class.

    Args:
        settings: see there.
    """

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        self.boxes = nn.ModuleList(settings.box_head(class_specific=False) for _ in _STAGES)
        self.masks = nn.ModuleList(settings.mask_head() for _ in _STAGES if settings.masks)

    def losses(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the losses of a batch, weighted by stage."""
        settings = self.settings
        count, background = settings.samples, settings.num_classes
        losses: dict[str, Tensor] = {}
        for number, stage in enumerate(_STAGES):
            match = Matcher(stage.overlap, stage.overlap)
            drawn = [
                draw_regions(boxes, target, match, count=count, num_classes=background)
                for boxes, target in zip(proposals, targets, strict=True)
            ]
            boxes = [regions.boxes for regions in drawn]
            cut = region_features(features, settings.strides, boxes, BOX_CELLS)
            logits, offsets = self.boxes[number](cut)
            own = box_losses(
                logits, offsets, drawn, targets,
                stds=stage.stds, loss="smooth_l1", num_classes=background,
            )  # fmt: skip
            if settings.masks:
                positives = [regions.boxes[: len(regions.objects)] for regions in drawn]
                cut = region_features(features, settings.strides, positives, MASK_CELLS)
                own["mask"] = mask_loss(self.masks[number](cut), drawn, targets)
            for name, value in own.items():
                losses[f"stage{number + 1}_{name}"] = stage.weight * value
            if stage is not _STAGES[-1]:
                proposals = _refined(drawn, offsets.detach(), stage, sizes)
        return losses

    def look(self, regions: Tensor, detected: Tensor) -> None:
        """Run what has weights, for counting its cost; see :meth:`RegionHeads.look`."""
        for head in self.boxes:
            head(regions)
        for head in self.masks:
            head(detected)

    def detect(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Detections]:
        """Return the detections of each image, in the pixels of the batch.

        Classes come from the mean of the three stages' logits, boxes from the last stage, masks
        from the mean of the three stages' probabilities on the final boxes.
        """
        settings = self.settings
        counts = [len(boxes) for boxes in proposals]
        boxes = list(proposals)
        all_logits = []
        for head, stage in zip(self.boxes, _STAGES, strict=True):
            logits, offsets = head(region_features(features, settings.strides, boxes, BOX_CELLS))
            all_logits.append(logits)
            boxes = [
                decode_boxes(old, own[:, 0], stage.stds, clip=size)
                for old, own, size in zip(boxes, offsets.split(counts), sizes, strict=True)
            ]
        scores = torch.stack(all_logits).mean(0).split(counts)
        found = [settings.select(own, score) for own, score in zip(boxes, scores, strict=True)]
        if settings.masks:
            final = [detections["boxes"] for detections in found]
            cut = region_features(features, settings.strides, final, MASK_CELLS)
            stages = torch.stack([head(cut).sigmoid() for head in self.masks])
            chosen_masks(stages.mean(0), found)
        return found


def _refined(
    drawn: Sequence[DrawnRegions],
    offsets: Tensor,
    stage: _Stage,
    sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Return the regions of a stage moved by its offsets, without the objects' own boxes."""
    counts = [len(regions.boxes) for regions in drawn]
    return [
        decode_boxes(regions.boxes, own[:, 0], stage.stds, clip=size)[~regions.is_object]
        for regions, own, size in zip(drawn, offsets.split(counts), sizes, strict=True)
    ]
