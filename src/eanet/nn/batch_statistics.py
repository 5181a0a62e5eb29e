"""Batch norm for a block that computes the statistics itself."""

import torch
from torch import Tensor, nn

from eanet.ops.attention.block import BatchStatistics

__all__ = ["fold_running_statistics", "update_running_statistics", "uses_batch_statistics"]

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm


def uses_batch_statistics(norm: BatchNorm) -> bool:
    """Tell whether the layer normalizes with the statistics of the batch."""
    return norm.training or norm.running_mean is None


def fold_running_statistics(norm: BatchNorm, value: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a batch norm that uses its running statistics into the product before it.

    Args:
        norm: the layer; gradients reach its weight and bias.
        value: matrix (channels, slots) whose product is normalized.

    Returns:
        The matrix with the scale inside, and the bias (channels).
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    bias = -scale * norm.running_mean
    if norm.affine:
        bias = norm.bias + bias
    return scale.unsqueeze(1) * value, bias


@torch.no_grad()
def update_running_statistics(norm: BatchNorm, statistics: BatchStatistics) -> None:
    """Move the running statistics towards those of a batch, as PyTorch's layers do.

    A batch without any valid token leaves them as they are.
    """
    if not norm.training or not norm.track_running_stats:
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    dtype = norm.running_mean.dtype
    count = statistics.count
    if norm.momentum is None:
        weight = 1.0 / norm.num_batches_tracked.to(dtype)
    else:
        weight = torch.full((), norm.momentum, dtype=dtype, device=count.device)
    weight = weight * (count > 0)
    unbiased = statistics.variance * (count / (count - 1).clamp(min=1.0))
    norm.running_mean.lerp_(statistics.mean.to(dtype), weight)
    norm.running_var.lerp_(unbiased.to(dtype), weight)
