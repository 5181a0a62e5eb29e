"""From scored boxes to detections: threshold, suppression class by class, the best so many."""

from torch import Tensor
from torchvision.ops import batched_nms

__all__ = ["select_detections"]


def select_detections(
    boxes: Tensor, scores: Tensor, *, min_score: float, max_overlap: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the detections of an image, best first.

    Args:
        boxes: (N, 4), or (N, classes, 4) where each class has its own.
        scores: (N, classes).
        min_score: detections must score above it.
        max_overlap: of two detections of a class that overlap by more the better one is kept.
        limit: how many to keep.

    Returns:
        Boxes (M, 4), scores (M) and labels (M).
    """
    candidates, labels = (scores > min_score).nonzero(as_tuple=True)
    found = boxes[candidates] if boxes.ndim == 2 else boxes[candidates, labels]
    values = scores[candidates, labels]
    kept = batched_nms(found.float(), values.float(), labels, max_overlap)[:limit]
    return found[kept], values[kept], labels[kept]
