"""Cross entropy of all pixels: what counts, how much, and over how many it is averaged."""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from eanet.tasks.segmentation.samples import IGNORE

__all__ = ["Reduction", "pixel_loss"]

Reduction = Literal["all_pixels", "valid_pixels"]


def pixel_loss(
    logits: Float[Tensor, "batch classes height width"],
    labels: UInt8[Tensor, "batch height width"],
    *,
    reduction: Reduction = "all_pixels",
    class_weights: Tensor | None = None,
    ohem_threshold: float | None = None,
    ohem_min_pixels: int = 100_000,
) -> Tensor:
    """Return the cross entropy of every pixel, averaged.

    Args:
        logits: at the size of the labels.
        labels: classes; :data:`IGNORE` for pixels without one.
        reduction: "all_pixels" divides the sum by the number of all pixels, ignored ones too, as
            the authors and the mmsegmentation of their time do; a batch of ignored pixels gives 0.
            "valid_pixels" divides by the (weighted) number of labeled ones.
        class_weights: a factor for each class.
        ohem_threshold: online hard example mining (arXiv 1604.03540): only pixels whose true class
            has a probability below this count, and those next to them in difficulty until there
            are enough; others are treated as ignored.
        ohem_min_pixels: how many pixels of the batch are kept at least.

    Raises:
        ValueError: labels of another size or class than the logits.
    """
    if logits.shape[0] != labels.shape[0] or logits.shape[2:] != labels.shape[1:]:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}")
    targets = labels.long()
    losses = F.cross_entropy(
        logits, targets, weight=class_weights, ignore_index=IGNORE, reduction="none"
    )
    valid = labels != IGNORE
    if ohem_threshold is not None:
        valid = valid & _hard_pixels(logits, targets, valid, ohem_threshold, ohem_min_pixels)
        losses = losses * valid
    if reduction == "all_pixels":
        return losses.mean()
    if class_weights is None:
        total = valid.sum().to(losses.dtype)
    else:
        total = (class_weights[targets.masked_fill(~valid, 0)] * valid).sum()
    # no labeled pixel: a loss of 0 with gradients of 0
    return losses.sum() / total.clamp(min=torch.finfo(losses.dtype).tiny)


@torch.no_grad()
def _hard_pixels(
    logits: Tensor, targets: Tensor, valid: Tensor, threshold: float, min_pixels: int
) -> Tensor:
    """Return which pixels are among the hard ones."""
    probabilities = logits.softmax(dim=1)
    true = probabilities.gather(1, targets.masked_fill(~valid, 0).unsqueeze(1)).squeeze(1)
    true = true.masked_fill(~valid, torch.inf)
    count = min(min_pixels, int(valid.sum()))
    if count == 0:
        return valid
    least = true.flatten().kthvalue(count).values
    return true <= least.clamp(min=threshold)
