"""Batch norm of the result of external attention, from the moments of its attention.

The result is linear in the attention, so mean and variance of its V channels follow from mean and
covariance of the S slots, and the normalization itself becomes part of the second product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eanet.ops.attention.chunks import accumulation_dtype

__all__ = ["AttentionMoments", "FoldedBatchNorm"]


class AttentionMoments:
    """Mean (S) and covariance (S, S) of attention over tokens, gathered chunk by chunk.

    Each chunk is centered on its own mean and then combined (the pairwise update of Chan, Golub
    and LeVeque), so that no small variance is formed as the difference of large numbers.
    """

    def __init__(self, num_slots: int, like: Tensor) -> None:
        dtype = accumulation_dtype(like.device)
        self.count = 0
        self.mean = like.new_zeros(num_slots, dtype=dtype)
        self._scatter = like.new_zeros((num_slots, num_slots), dtype=dtype)

    def add(self, attention: Tensor, mask: Tensor | None) -> None:
        """Take in a chunk of attention (G, S, n)."""
        num_samples, _, tokens = attention.shape
        count = num_samples * tokens if mask is None else int(mask.sum())
        if count == 0:
            return
        mean = attention.sum((0, 2), dtype=self.mean.dtype) / count
        centered = attention - mean.to(attention.dtype).unsqueeze(-1)
        if mask is not None:
            centered.masked_fill_(~mask, 0.0)
        self._scatter += torch.bmm(centered, centered.transpose(1, 2)).sum(0, dtype=mean.dtype)
        share = count / (self.count + count)
        difference = mean - self.mean
        self._scatter += torch.outer(difference, difference) * (self.count * share)
        self.mean += difference * share
        self.count += count

    @property
    def covariance(self) -> Tensor:
        """The biased covariance."""
        return self._scatter / max(self.count, 1)


@dataclass(frozen=True)
class FoldedBatchNorm:
    """Batch norm folded into the second product, with what its gradient needs."""

    moments: AttentionMoments
    eps: float

    def fold(
        self, value: Tensor, scale: Tensor | None, shift: Tensor | None, *moments: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weight (V, S), bias, mean and variance (V); all small, all differentiable.

        ``moments`` are mean and covariance of attention, those gathered by default.
        """
        mean_attention, covariance = moments or (self.moments.mean, self.moments.covariance)
        mean = value @ mean_attention
        # a quadratic form of a covariance is not negative, but its rounding error may be
        variance = ((value @ covariance) * value).sum(1).clamp(min=0.0)
        factor = torch.rsqrt(variance + self.eps)
        if scale is not None:
            factor = factor * scale
        bias = -factor * mean if shift is None else shift - factor * mean
        return factor.unsqueeze(1) * value, bias, mean, variance

    def gradients(
        self,
        tensors: tuple[Tensor, Tensor | None, Tensor | None],
        grad_weight: Tensor,
        grad_bias: Tensor,
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """Return gradients of (value, scale, shift), and the attention's as a linear function.

        The latter is ``matrix @ attention + offset`` with a matrix (S, S) and an offset (S, 1).
        """
        dtype = self.moments.mean.dtype
        leaves = [
            None if tensor is None else tensor.detach().to(dtype).requires_grad_()
            for tensor in tensors
        ]
        moments = [self.moments.mean.clone(), self.moments.covariance]
        for tensor in moments:
            tensor.requires_grad_()
        value, scale, shift = leaves
        assert value is not None
        wanted = [tensor for tensor in [*leaves, *moments] if tensor is not None]
        with torch.enable_grad():
            weight, bias, _, _ = self.fold(value, scale, shift, *moments)
            found = list(torch.autograd.grad((weight, bias), wanted, (grad_weight, grad_bias)))
        grad_mean, grad_covariance = found[-2:]
        gradients = iter(found)
        matrix = (grad_covariance + grad_covariance.transpose(0, 1)) / max(self.moments.count, 1)
        offset = grad_mean / max(self.moments.count, 1) - matrix @ self.moments.mean
        return (
            [None if leaf is None else next(gradients) for leaf in leaves],
            matrix,
            offset.unsqueeze(-1),
        )
