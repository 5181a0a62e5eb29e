"""Region proposals: where in an image there may be an object, of whatever class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from eanet.tasks.detection.anchors import Anchors
from eanet.tasks.detection.assignment import Matcher, sample_candidates
from eanet.tasks.detection.boxes import decode_boxes, encode_boxes
from eanet.tasks.detection.weights import draw_weights, normal_

__all__ = ["BoxLoss", "ProposalSettings", "RegionProposals", "box_loss", "flat_levels"]

BoxLoss = Literal["l1", "smooth_l1"]

#: offsets of anchors are not scaled
_STDS = (1.0, 1.0, 1.0, 1.0)


def box_loss(predicted: Tensor, wanted: Tensor, kind: BoxLoss, beta: float) -> Tensor:
    """Return the sum of L1 or smooth L1 losses of offsets."""
    if kind == "l1":
        return F.l1_loss(predicted, wanted, reduction="sum")
    return F.smooth_l1_loss(predicted, wanted, reduction="sum", beta=beta)


def flat_levels(maps: Sequence[Tensor], values: int) -> list[Tensor]:
    """Return the predictions of each level as (batch, anchors, values), in the anchors' order."""
    return [m.float().permute(0, 2, 3, 1).reshape(m.shape[0], -1, values) for m in maps]


@dataclass(frozen=True)
class ProposalSettings:
    """How proposals are learned and chosen.

    Args:
        loss: of the boxes.
        beta: where smooth L1 turns from square to linear.
        inside_only: whether anchors that cross the border of the image are left out of training.
        train_count: proposals of an image in training.
        test_count: and in evaluation.
        train_per_level: the best so many of each level come to suppression in training.
        test_per_level: and in evaluation.
        samples: anchors of an image that are learned from.
    """

    loss: BoxLoss = "l1"
    beta: float = 1 / 9
    inside_only: bool = False
    train_count: int = 1000
    test_count: int = 1000
    train_per_level: int = 2000
    test_per_level: int = 1000
    samples: int = 256


class RegionProposals(nn.Module):
    """The region proposal network: a 3x3 convolution, then objectness and offsets of each anchor.

    Args:
        channels: width of the feature maps.
        anchors: of all levels.
        settings: see there.
    """

    def __init__(self, channels: int, anchors: Anchors, settings: ProposalSettings) -> None:
        super().__init__()
        self.anchors, self.settings = anchors, settings
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors.per_cell, 1)
        self.offsets = nn.Conv2d(channels, 4 * anchors.per_cell, 1)
        draw_weights(self, normal_(0.01))
        self._match = Matcher(positive=0.7, negative=0.3, min_best=0.3)

    def predict(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits of objectness and offsets of all anchors, level by level."""
        hidden = [F.relu(self.convolution(feature)) for feature in features]
        scores = flat_levels([self.objectness(x) for x in hidden], 1)
        return scores, flat_levels([self.offsets(x) for x in hidden], 4)

    def forward(
        self,
        features: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return proposals and, with targets, losses.

        Args:
            features: of all levels.
            sizes: (height, width) of each image without padding.
            targets: with ``boxes`` for each image.

        Returns:
            For each image boxes (N, 4), best first; and the losses.
        """
        scores, deltas = self.predict(features)
        maps = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        device = features[0].device
        anchors = [self.anchors.grid(n, size, device=device) for n, size in enumerate(maps)]
        losses: dict[str, Tensor] = {}
        if targets is not None:
            usable = [self._usable(anchors, maps, size) for size in sizes]
            losses = self._losses(
                torch.cat(anchors), torch.cat(scores, 1)[..., 0], torch.cat(deltas, 1), usable,
                targets,
            )  # fmt: skip
        with torch.no_grad():
            proposals = [
                self._choose(
                    anchors,
                    [level[image, :, 0] for level in scores],
                    [level[image] for level in deltas],
                    size,
                )
                for image, size in enumerate(sizes)
            ]
        return proposals, losses

    def _usable(
        self, anchors: Sequence[Tensor], maps: Sequence[tuple[int, int]], image: tuple[int, int]
    ) -> Tensor:
        """Return which anchors of all levels an image may be trained on."""
        usable = torch.cat(
            [
                self.anchors.valid(level, size, image, device=anchors[0].device)
                for level, size in enumerate(maps)
            ]
        )
        if self.settings.inside_only:
            boxes, (height, width) = torch.cat(list(anchors)), image
            inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2] < width) & (boxes[:, 3] < height)
            usable = usable & inside
        return usable

    def _losses(
        self,
        anchors: Tensor,
        scores: Tensor,
        deltas: Tensor,
        usable: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return both losses, over the number of anchors drawn in the whole batch."""
        settings = self.settings
        objectness, box, count = scores.sum() * 0, deltas.sum() * 0, 0
        for image, target in enumerate(targets):
            (indices,) = usable[image].nonzero(as_tuple=True)
            assigned = self._match(anchors[indices], target["boxes"])
            positives, negatives = sample_candidates(assigned, settings.samples, 0.5)
            drawn = indices[torch.cat([positives, negatives])]
            labels = torch.zeros(len(drawn), device=drawn.device)
            labels[: len(positives)] = 1
            objectness = objectness + F.binary_cross_entropy_with_logits(
                scores[image, drawn], labels, reduction="sum"
            )
            objects = target["boxes"][assigned[positives]]
            places = indices[positives]
            wanted = encode_boxes(anchors[places], objects, _STDS)
            box = box + box_loss(deltas[image, places], wanted, settings.loss, settings.beta)
            count += len(drawn)
        return {"proposal_class": objectness / max(count, 1), "proposal_box": box / max(count, 1)}

    def _choose(
        self,
        anchors: Sequence[Tensor],
        scores: Sequence[Tensor],
        deltas: Sequence[Tensor],
        size: tuple[int, int],
    ) -> Tensor:
        """Return the proposals of one image: the best of each level, then suppression by level."""
        settings = self.settings
        per_level = settings.train_per_level if self.training else settings.test_per_level
        count = settings.train_count if self.training else settings.test_count
        boxes, values, levels = [], [], []
        for level, (grid, score, delta) in enumerate(zip(anchors, scores, deltas, strict=True)):
            best, places = score.sigmoid().topk(min(per_level, len(score)))
            boxes.append(decode_boxes(grid[places], delta[places], _STDS, clip=size))
            values.append(best)
            levels.append(torch.full_like(places, level))
        found = torch.cat(boxes)
        return found[batched_nms(found, torch.cat(values), torch.cat(levels), 0.7)[:count]]
