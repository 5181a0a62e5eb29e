"""Which object a candidate box is to learn, and which candidates are looked at."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eanet.tasks.detection.boxes import box_overlaps

__all__ = ["IGNORED", "NEGATIVE", "Matcher", "sample_candidates"]

#: a candidate without an object, and one that is left out of the loss
NEGATIVE, IGNORED = -1, -2


@dataclass(frozen=True)
class Matcher:
    """Assigns candidates to objects by their overlap (MaxIoU).

    A candidate whose best overlap is below ``negative`` has no object, one at ``positive`` or
    above learns its best object, those in between are ignored. With ``min_best`` every object, in
    order, also takes all candidates that attain its own best overlap, ties included, where that
    is at least ``min_best``; a later object overrules an earlier one.

    Args:
        positive: least overlap of a positive.
        negative: overlap below which a candidate is negative.
        min_best: see above; ``None`` for not doing so.
    """

    positive: float
    negative: float
    min_best: float | None = None

    def __call__(self, candidates: Tensor, objects: Tensor) -> Tensor:
        """Return for each candidate the index of its object, :data:`NEGATIVE` or :data:`IGNORED`.

        Args:
            candidates: (N, 4).
            objects: (M, 4); there may be none.
        """
        if not len(objects):
            return torch.full((len(candidates),), NEGATIVE, device=candidates.device)
        if not len(candidates):
            return torch.empty(0, dtype=torch.int64, device=candidates.device)
        overlaps = box_overlaps(objects, candidates)
        best, assigned = overlaps.max(0)
        assigned = assigned.where(best >= self.positive, IGNORED)
        assigned[best < self.negative] = NEGATIVE
        if self.min_best is not None:
            attained = overlaps.max(1, keepdim=True).values
            takes = (overlaps == attained) & (attained >= self.min_best)
            numbers = torch.arange(len(objects), device=objects.device)[:, None]
            last = numbers.where(takes, NEGATIVE).max(0).values
            assigned = last.where(last >= 0, assigned)
        return assigned


def sample_candidates(assigned: Tensor, count: int, positive_share: float) -> tuple[Tensor, Tensor]:
    """Draw candidates to learn from, at random.

    Args:
        assigned: what a :class:`Matcher` returned.
        count: how many in all; negatives fill up.
        positive_share: largest share of positives.

    Returns:
        Indices of the positives and of the negatives drawn.
    """
    positives = _draw(torch.nonzero(assigned >= 0).flatten(), int(count * positive_share))
    negatives = _draw(torch.nonzero(assigned == NEGATIVE).flatten(), count - len(positives))
    return positives, negatives


def _draw(indices: Tensor, count: int) -> Tensor:
    """Return some of the indices, or all where there are no more."""
    if len(indices) <= count:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]
