"""Heads that look at one region at a time: its class and box, and its mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eanet.tasks.detection.assignment import Matcher, sample_candidates
from eanet.tasks.detection.boxes import encode_boxes
from eanet.tasks.detection.instance_masks import mask_targets
from eanet.tasks.detection.region_proposals import BoxLoss, box_loss
from eanet.tasks.detection.weights import draw_weights, kaiming_fan_out_, normal_

__all__ = [
    "BOX_CELLS",
    "MASK_CELLS",
    "BoxHead",
    "DrawnRegions",
    "MaskHead",
    "box_losses",
    "draw_regions",
    "mask_loss",
]

#: edge of the features of a region that class and box, or its mask, are read from
BOX_CELLS, MASK_CELLS = 7, 14


class BoxHead(nn.Module):
    """Two fully connected layers, then classes (background last) and offsets of the box.

    Args:
        channels: width of the feature maps.
        num_classes: without the background.
        hidden: width of the two layers.
        class_specific: whether each class has offsets of its own.
    """

    def __init__(
        self, channels: int, num_classes: int, *, hidden: int, class_specific: bool
    ) -> None:
        super().__init__()
        self.num_boxes = num_classes if class_specific else 1
        self.layer1 = nn.Linear(channels * BOX_CELLS**2, hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.classes = nn.Linear(hidden, num_classes + 1)
        self.offsets = nn.Linear(hidden, 4 * self.num_boxes)
        draw_weights(self, nn.init.xavier_uniform_)
        draw_weights(self.classes, normal_(0.01))
        draw_weights(self.offsets, normal_(0.001))

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, classes + 1) and offsets (N, boxes, 4) of regions (N, C, 7, 7)."""
        x = F.relu(self.layer2(F.relu(self.layer1(regions.flatten(1)))))
        return self.classes(x).float(), self.offsets(x).float().reshape(len(x), self.num_boxes, 4)


class MaskHead(nn.Module):
    """Convolutions, a deconvolution to twice the size, and a mask for each class.

    Args:
        channels: width of the feature maps.
        num_classes: without the background.
        width: of the convolutions.
        depth: number of convolutions.
    """

    def __init__(
        self, channels: int, num_classes: int, *, width: int = 256, depth: int = 4
    ) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width if place else channels, width, 3, padding=1) for place in range(depth)
        )
        self.deconvolution = nn.ConvTranspose2d(width if depth else channels, width, 2, stride=2)
        self.logits = nn.Conv2d(width, num_classes, 1)
        draw_weights(self, kaiming_fan_out_)

    def forward(self, regions: Tensor) -> Tensor:
        """Return logits (N, classes, 28, 28) of regions (N, C, 14, 14)."""
        x = regions
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return self.logits(F.relu(self.deconvolution(x))).float()


@dataclass
class DrawnRegions:
    """Regions of one image that are learned from, positives first.

    Args:
        boxes: (N, 4).
        labels: (N), that of the background for negatives.
        objects: (positives), the object of each positive.
        is_object: (N), whether a region is the box of an object itself.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    is_object: Tensor


def draw_regions(
    proposals: Tensor,
    target: dict[str, Tensor],
    match: Matcher,
    *,
    count: int,
    num_classes: int,
) -> DrawnRegions:
    """Add the boxes of the objects to the proposals of an image, and draw regions to learn from.

    Args:
        proposals: (N, 4).
        target: with ``boxes`` and ``labels``.
        match: assigns proposals to objects; an object's own box is its own in any case.
        count: regions to draw, at most a quarter of them positive.
        num_classes: the label of the background.
    """
    objects = target["boxes"].to(proposals.dtype)
    own = torch.arange(len(objects), device=proposals.device)
    candidates = torch.cat([objects, proposals])
    assigned = torch.cat([own, match(proposals, objects)])
    positives, negatives = sample_candidates(assigned, count, 0.25)
    drawn = torch.cat([positives, negatives])
    labels = torch.full((len(drawn),), num_classes, device=drawn.device)
    labels[: len(positives)] = target["labels"][assigned[positives]]
    return DrawnRegions(
        candidates[drawn], labels, assigned[positives], is_object=drawn < len(objects)
    )


def box_losses(
    logits: Tensor,
    offsets: Tensor,
    drawn: Sequence[DrawnRegions],
    targets: Sequence[dict[str, Tensor]],
    *,
    stds: Sequence[float],
    loss: BoxLoss,
    num_classes: int,
) -> dict[str, Tensor]:
    """Return the losses of class and box, both over the number of regions drawn in the batch."""
    labels = torch.cat([regions.labels for regions in drawn])
    count = max(len(labels), 1)
    (places,) = (labels < num_classes).nonzero(as_tuple=True)
    wanted = torch.cat(
        [
            encode_boxes(
                regions.boxes[: len(regions.objects)],
                target["boxes"][regions.objects].to(regions.boxes.dtype),
                stds,
            )
            for regions, target in zip(drawn, targets, strict=True)
        ]
    )
    slots = labels[places] if offsets.shape[1] > 1 else torch.zeros_like(places)
    return {
        "class": F.cross_entropy(logits, labels, reduction="sum") / count,
        "box": box_loss(offsets[places, slots], wanted, loss, beta=1.0) / count,
    }


def mask_loss(
    logits: Tensor, drawn: Sequence[DrawnRegions], targets: Sequence[dict[str, Tensor]]
) -> Tensor:
    """Return the mean over the pixels of all positives, each in the mask of its class.

    Args:
        logits: (positives of all images, classes, cells, cells).
        drawn: regions of each image.
        targets: with ``masks``.
    """
    if not len(logits):
        return logits.sum()
    wanted = torch.cat(
        [
            mask_targets(
                target["masks"],
                regions.boxes[: len(regions.objects)],
                regions.objects,
                logits.shape[-1],
            )
            for regions, target in zip(drawn, targets, strict=True)
        ]
    )
    labels = torch.cat([regions.labels[: len(regions.objects)] for regions in drawn])
    places = torch.arange(len(labels), device=labels.device)
    return F.binary_cross_entropy_with_logits(logits[places, labels], wanted)
