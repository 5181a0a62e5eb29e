"""RetinaNet: classes and offsets of every anchor in one stage, trained with the focal loss."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from eanet.tasks.detection.anchors import Anchors
from eanet.tasks.detection.assignment import IGNORED, Matcher
from eanet.tasks.detection.backbone import Backbone
from eanet.tasks.detection.boxes import decode_boxes, encode_boxes
from eanet.tasks.detection.detector import Detector
from eanet.tasks.detection.region_heads import Detections
from eanet.tasks.detection.region_proposals import box_loss, flat_levels
from eanet.tasks.detection.selection import select_detections
from eanet.tasks.detection.weights import draw_weights, normal_

__all__ = ["RetinaNet"]

_STDS = (1.0, 1.0, 1.0, 1.0)
#: probability of an object that every anchor starts with
_PRIOR = 0.01


class RetinaNet(Detector):
    """Two towers of convolutions, shared by all levels, on the pyramid from stride 8 on.

    Args:
        backbone: images to feature maps.
        num_classes: there is no background class.
        depth: convolutions of a tower.
        min_score: detections score above it.
        max_overlap: of detections of one class.
        max_detections: of an image.
        per_level: anchors of each level that are looked at for detections.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        depth: int = 4,
        min_score: float = 0.05,
        max_overlap: float = 0.5,
        max_detections: int = 100,
        per_level: int = 1000,
    ) -> None:
        super().__init__(backbone, num_classes)
        scales = tuple(4 * 2 ** (octave / 3) for octave in range(3))
        self.anchors = Anchors(tuple(backbone.strides), scales=scales)
        self.min_score, self.max_overlap = min_score, max_overlap
        self.max_detections, self.per_level = max_detections, per_level
        width, cell = backbone.channels, self.anchors.per_cell
        self.class_tower = _tower(width, depth)
        self.box_tower = _tower(width, depth)
        self.classes = nn.Conv2d(width, cell * num_classes, 3, padding=1)
        self.offsets = nn.Conv2d(width, cell * 4, 3, padding=1)
        for part in (self.class_tower, self.box_tower, self.classes, self.offsets):
            draw_weights(part, normal_(0.01))
        bias = torch.full((cell * num_classes,), -math.log((1 - _PRIOR) / _PRIOR))
        self.classes.bias = nn.Parameter(bias)
        self._match = Matcher(positive=0.5, negative=0.4, min_best=0.0)

    def _predict(
        self, features: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return anchors, logits and offsets of each level."""
        logits = flat_levels(
            [self.classes(self.class_tower(x)) for x in features], self.num_classes
        )
        offsets = flat_levels([self.offsets(self.box_tower(x)) for x in features], 4)
        grids = [
            self.anchors.grid(level, (x.shape[-2], x.shape[-1]), device=x.device)
            for level, x in enumerate(features)
        ]
        return grids, logits, offsets

    def look(self, features: list[Tensor]) -> None:
        """Run what has weights, for counting its cost."""
        self._predict(features)

    def losses(
        self,
        features: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return both losses, over the number of positive anchors in the batch."""
        grids, level_logits, level_offsets = self._predict(features)
        anchors = torch.cat(grids)
        logits, offsets = torch.cat(level_logits, 1), torch.cat(level_offsets, 1)
        class_loss, offset_loss, count = logits.sum() * 0, offsets.sum() * 0, 0
        for image, target in enumerate(targets):
            valid = torch.cat(
                [
                    self.anchors.valid(
                        level, (x.shape[-2], x.shape[-1]), sizes[image], device=x.device
                    )
                    for level, x in enumerate(features)
                ]
            )
            (usable,) = valid.nonzero(as_tuple=True)
            assigned = self._match(anchors[usable], target["boxes"])
            known = assigned != IGNORED
            positive = assigned >= 0
            wanted = torch.zeros(len(usable), self.num_classes, device=logits.device)
            labels = target["labels"][assigned[positive]]
            wanted[positive.nonzero().flatten(), labels] = 1
            class_loss = class_loss + sigmoid_focal_loss(
                logits[image, usable[known]], wanted[known], alpha=0.25, gamma=2, reduction="sum"
            )
            places = usable[positive]
            moves = encode_boxes(anchors[places], target["boxes"][assigned[positive]], _STDS)
            offset_loss = offset_loss + box_loss(offsets[image, places], moves, "l1", 1.0)
            count += len(places)
        return {"class": class_loss / max(count, 1), "box": offset_loss / max(count, 1)}

    @torch.no_grad()
    def detect(self, features: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        """Return the detections of each image."""
        grids, logits, offsets = self._predict(features)
        return [
            self._detect_one(
                grids,
                [level[image].sigmoid() for level in logits],
                [level[image] for level in offsets],
                size,
            )
            for image, size in enumerate(sizes)
        ]

    def _detect_one(
        self,
        grids: Sequence[Tensor],
        scores: Sequence[Tensor],
        offsets: Sequence[Tensor],
        size: tuple[int, int],
    ) -> Detections:
        """Return the detections of one image: of each level, the anchors with the best class."""
        boxes, values = [], []
        for grid, score, offset in zip(grids, scores, offsets, strict=True):
            best = score.max(1).values.topk(min(self.per_level, len(score))).indices
            boxes.append(decode_boxes(grid[best], offset[best], _STDS, clip=size))
            values.append(score[best])
        found, kept, labels = select_detections(
            torch.cat(boxes),
            torch.cat(values),
            min_score=self.min_score,
            max_overlap=self.max_overlap,
            limit=self.max_detections,
        )
        return {"boxes": found, "scores": kept, "labels": labels}


def _tower(width: int, depth: int) -> nn.Sequential:
    """Return 3x3 convolutions, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)
