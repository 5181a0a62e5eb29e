"""Gather neighbors, two layers, maximum: the local feature of PCT without its grouped tensors.

PCT describes neighbor j of center i by ``(f_j - f_i, f_i)``, applies two layers (linear map, batch
norm, ReLU) and takes the maximum over the neighbors. Three identities make that cheap:

1. The first linear map ``[W1 W2]`` of that pair is ``W1 f_j + (W2 - W1) f_i``: it is applied to all
   points before anything is gathered, ``u = W1 f`` and ``v = (W2 - W1) f``, and the pair becomes
   ``h = u_j + v_i``. The affine part of the batch norm goes into u and v as well.
2. Batch norm and ReLU are monotonous in each channel: the maximum over the neighbors is taken of
   the second linear map's output (of its negative where the norm's scale is negative), and norm
   and ReLU work on one value instead of k.
3. Both batch norms' gradients are affine in what they normalize, so sums over neighbors reduce to
   sums that u, v and the maxima already give.

So the k-expanded tensors live in tiles that fit a cache, forward and backward; nothing of that size
is kept between the passes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eanet.nn.memories import full_precision
from eanet.ops.attention.linear import linear
from eanet.ops.points import gather_points

__all__ = ["NormArguments", "NormStatistics", "aggregate_neighbors", "compose_neighbors"]

#: bytes of a tile of (centers, neighbors, channels)
_TILE_ON_CPU = 2**19
#: on a GPU a tile must fill the device
_TILE_ON_GPU = 2**28


class NormArguments(NamedTuple):
    """A batch norm: scale, shift, eps, and mean and variance unless they are the batch's."""

    weight: Tensor
    bias: Tensor
    eps: float
    mean: Tensor | None = None
    variance: Tensor | None = None


class NormStatistics(NamedTuple):
    """What a batch norm saw: mean and biased variance of each channel."""

    mean: Tensor
    variance: Tensor


def aggregate_neighbors(
    near: Tensor,
    own: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    first_norm: NormArguments,
    second_norm: NormArguments,
) -> tuple[Tensor, NormStatistics, NormStatistics]:
    """Compute ``max_j relu(norm2(W relu(norm1(near_j + own_i))))`` over the neighbors j of i.

    Args:
        near: u, (batch, points, channels).
        own: v, (batch, centers, channels).
        neighbors: indices of points, (batch, centers, k).
        weight: W, (out channels, channels).
        first_norm: over all pairs; with its mean and variance, or those of the batch are taken.
        second_norm: likewise.

    Returns:
        The result (batch, centers, out channels), and the statistics of both norms.
    """
    batch_statistics = first_norm.mean is None
    near, own = (x if x.dtype == torch.float64 else x.float() for x in (near, own))
    with full_precision(near):
        found = _Aggregate.apply(
            near, own, neighbors, weight,
            first_norm.weight, first_norm.bias, second_norm.weight, second_norm.bias,
            (first_norm.eps, second_norm.eps, batch_statistics),
            first_norm.mean, first_norm.variance, second_norm.mean, second_norm.variance,
        )  # fmt: skip
    out, *statistics = found  # pyright: ignore[reportGeneralTypeIssues]
    return out, NormStatistics(*statistics[:2]), NormStatistics(*statistics[2:])


def compose_neighbors(
    near: Tensor,
    own: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    first_norm: NormArguments,
    second_norm: NormArguments,
    mask: Tensor | None = None,
) -> tuple[Tensor, NormStatistics, NormStatistics]:
    """Do the work of :func:`aggregate_neighbors` with ordinary operations, for compilers.

    Args:
        near: see there.
        own: see there.
        neighbors: see there.
        weight: see there.
        first_norm: see there.
        second_norm: see there.
        mask: (batch, centers), True for centers that count in the statistics of the batch.
    """
    pairs = gather_points(near, neighbors) + own.unsqueeze(2)
    hidden, first = _normalize(pairs, first_norm, mask)
    outer, second = _normalize(linear(torch.relu(hidden), weight), second_norm, mask)
    return torch.relu(outer).amax(2), first, second


def _normalize(
    x: Tensor, norm: NormArguments, mask: Tensor | None
) -> tuple[Tensor, NormStatistics]:
    """Apply a batch norm to (batch, centers, neighbors, channels)."""
    mean, variance = norm.mean, norm.variance
    if mean is None or variance is None:
        if mask is None:
            variance, mean = torch.var_mean(x, (0, 1, 2), correction=0)
        else:
            pairs = mask.view(*mask.shape, 1, 1)
            count = mask.sum().clamp(min=1) * x.shape[2]
            mean = x.masked_fill(~pairs, 0.0).sum((0, 1, 2)) / count
            centered = (x - mean).masked_fill(~pairs, 0.0)
            variance = centered.square().sum((0, 1, 2)) / count
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    statistics = NormStatistics(mean.detach(), variance.detach())
    return x * scale + (norm.bias - mean * scale), statistics


class _Tiles:
    """Cuts (cloud, centers) into tiles and gathers pairs tile by tile into one buffer."""

    def __init__(self, near: Tensor, own: Tensor, neighbors: Tensor) -> None:
        self.batch, self.num_centers, channels = own.shape
        self.num_neighbors = neighbors.shape[2]
        limit = _TILE_ON_CPU if near.device.type == "cpu" else _TILE_ON_GPU
        per_center = self.num_neighbors * channels * near.element_size()
        total = self.batch * self.num_centers
        self.size = min(max(limit // per_center, 1), total)
        self.ranges = [
            (first, min(first + self.size, total)) for first in range(0, total, self.size)
        ]
        offset = torch.arange(self.batch, device=near.device) * near.shape[1]
        self.flat = (neighbors + offset.view(-1, 1, 1)).view(-1)
        self.buffer = near.new_empty(self.size * self.num_neighbors, channels)

    def indices(self, first: int, last: int) -> Tensor:
        """Return which rows of all points the pairs of a tile take."""
        return self.flat[first * self.num_neighbors : last * self.num_neighbors]

    def pairs(self, near: Tensor, own: Tensor, first: int, last: int) -> Tensor:
        """Return ``near_j + own_i`` (centers, neighbors, channels), valid until the next call."""
        rows = self.buffer[: (last - first) * self.num_neighbors]
        torch.index_select(near, 0, self.indices(first, last), out=rows)
        return rows.view(last - first, self.num_neighbors, -1).add_(own[first:last].unsqueeze(1))


class _Aggregate(torch.autograd.Function):
    """The function in tiles; the names of the letters are those of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        near: Tensor,
        own: Tensor,
        neighbors: Tensor,
        weight: Tensor,
        gamma1: Tensor,
        beta1: Tensor,
        gamma2: Tensor,
        beta2: Tensor,
        options: tuple[float, float, bool],
        mean1: Tensor | None,
        variance1: Tensor | None,
        mean2: Tensor | None,
        variance2: Tensor | None,
    ) -> tuple[Tensor, ...]:
        eps1, eps2, batch_statistics = options
        u, v = near.reshape(-1, near.shape[2]), own.reshape(-1, own.shape[2])
        tiles = _Tiles(near, own, neighbors)
        num_pairs = neighbors.numel()
        if batch_statistics:
            uses = torch.bincount(tiles.flat, minlength=len(u)).to(u.dtype)
            mean1 = (uses @ u + tiles.num_neighbors * v.sum(0)) / num_pairs
            variance1 = torch.zeros_like(mean1)
            centered = v - mean1
            for first, last in tiles.ranges:
                variance1 += tiles.pairs(u, centered, first, last).square_().sum((0, 1))
            variance1 /= num_pairs
        assert mean1 is not None
        assert variance1 is not None
        scale1 = gamma1 * torch.rsqrt(variance1 + eps1)
        scaled = (u * scale1, v * scale1 + (beta1 - mean1 * scale1))
        sign = torch.where(gamma2 < 0, -1.0, 1.0).to(u.dtype)
        signed = weight * sign.unsqueeze(1)
        highest = v.new_empty(len(v), weight.shape[0])
        pivot = None
        sums = v.new_zeros(2, weight.shape[0])
        for first, last in tiles.ranges:
            hidden = tiles.pairs(*scaled, first, last).relu_().flatten(0, 1)
            if batch_statistics:
                if pivot is None:  # sums of squares about a value near the mean keep their digits
                    pivot = signed @ hidden.mean(0)
                outer = torch.addmm(-pivot, hidden, signed.t())
                sums[0] += outer.sum(0)
                highest[first:last] = outer.view(last - first, -1, len(sign)).amax(1)
                sums[1] += outer.square_().sum(0)
            else:
                outer = hidden @ signed.t()
                highest[first:last] = outer.view(last - first, -1, len(sign)).amax(1)
        if batch_statistics:
            assert pivot is not None
            shift = sums[0] / num_pairs
            variance2 = (sums[1] / num_pairs - shift.square()).clamp(min=0.0)
            mean2 = sign * (shift + pivot)
            highest += pivot
        assert mean2 is not None
        assert variance2 is not None
        highest *= sign
        scale2 = gamma2 * torch.rsqrt(variance2 + eps2)
        out = torch.addcmul(beta2 - mean2 * scale2, highest, scale2).relu_()
        ctx.options = options
        ctx.save_for_backward(
            near, own, neighbors, weight, gamma1, beta1, gamma2,
            mean1, variance1, mean2, variance2, highest, out,
        )  # fmt: skip
        found = (mean1, variance1, mean2, variance2)
        statistics = tuple(tensor.clone() for tensor in found)
        ctx.mark_non_differentiable(*statistics)
        return out.view(*own.shape[:2], -1), *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (
            near, own, neighbors, weight, gamma1, beta1, gamma2,
            mean1, variance1, mean2, variance2, highest, out,
        ) = ctx.saved_tensors  # fmt: skip
        eps1, eps2, batch_statistics = ctx.options
        u, v = near.reshape(-1, near.shape[2]), own.reshape(-1, own.shape[2])
        tiles = _Tiles(near, own, neighbors)
        num_pairs = neighbors.numel()

        grad = grad_outputs[0].reshape(out.shape)
        grad = torch.ops.aten.threshold_backward(grad.contiguous(), out, 0)
        inverse2 = torch.rsqrt(variance2 + eps2)
        scale2 = gamma2 * inverse2
        grad_beta2 = grad.sum(0)
        grad_gamma2 = (grad * (highest - mean2)).sum(0) * inverse2
        # the batch norm's gradient at every pair: alpha + slope * y, plus `peak` at the maxima
        slope = alpha = None
        if batch_statistics:
            slope = -scale2 * inverse2 * grad_gamma2 / num_pairs
            alpha = -scale2 * grad_beta2 / num_pairs - slope * mean2
        inverse1 = torch.rsqrt(variance1 + eps1)
        scale1 = gamma1 * inverse1
        scaled = (u * scale1, v * scale1 + (beta1 - mean1 * scale1))
        sign = torch.where(gamma2 < 0, -1.0, 1.0).to(u.dtype)
        signed = weight * sign.unsqueeze(1)
        grad_weight = torch.zeros_like(weight)
        grad_u, grad_v = torch.zeros_like(u), torch.zeros_like(v)
        peak = grad * scale2
        for first, last in tiles.ranges:
            hidden = tiles.pairs(*scaled, first, last).relu_().flatten(0, 1)
            outer = (hidden @ signed.t()).view(last - first, -1, len(sign))
            # maxima anew: the same product in another call may differ in its last bit
            at_peak = (outer == outer.amax(1, keepdim=True)).to(outer.dtype)
            at_peak.mul_((peak[first:last] / at_peak.sum(1)).unsqueeze(1))
            if slope is not None and alpha is not None:
                at_peak.add_(outer.mul_(slope * sign).add_(alpha))
            grad_outer = at_peak.flatten(0, 1)
            grad_weight.addmm_(grad_outer.t(), hidden)
            grad_hidden = torch.ops.aten.threshold_backward(grad_outer @ weight, hidden, 0)
            grad_u.index_add_(0, tiles.indices(first, last), grad_hidden)
            grad_v[first:last] = grad_hidden.view(last - first, tiles.num_neighbors, -1).sum(1)
        # so far with respect to the scaled u and v
        grad_beta1 = grad_v.sum(0)
        grad_gamma1 = ((grad_u * u).sum(0) + (grad_v * v).sum(0) - grad_beta1 * mean1) * inverse1
        grad_u, grad_v = grad_u * scale1, grad_v * scale1
        if batch_statistics:
            _add_norm_gradient(
                grad_u, grad_v, u, v, tiles,
                offset=-scale1 * grad_beta1 / num_pairs,
                slope=-scale1 * inverse1 * grad_gamma1 / num_pairs, mean=mean1,
            )  # fmt: skip
        return (
            grad_u.view(near.shape), grad_v.view(own.shape), None, grad_weight,
            grad_gamma1, grad_beta1, grad_gamma2, grad_beta2, *[None] * 5,
        )  # fmt: skip


def _add_norm_gradient(
    grad_u: Tensor,
    grad_v: Tensor,
    u: Tensor,
    v: Tensor,
    tiles: _Tiles,
    *,
    offset: Tensor,
    slope: Tensor,
    mean: Tensor,
) -> None:
    """Add the gradient ``offset + slope * (u_j + v_i - mean)`` of every pair to its u and v."""
    k = tiles.num_neighbors
    uses = torch.bincount(tiles.flat, minlength=len(u)).to(u.dtype).unsqueeze(1)
    centered = u - mean
    own_sums = torch.zeros_like(u)  # for each point the v of all centers it is a neighbor of
    for first, last in tiles.ranges:
        rows = v[first:last].unsqueeze(1).expand(-1, k, -1).reshape(-1, v.shape[1])
        own_sums.index_add_(0, tiles.indices(first, last), rows)
        near_sums = centered.index_select(0, tiles.indices(first, last)).view(last - first, k, -1)
        grad_v[first:last] += k * offset + slope * (near_sums.sum(1) + k * v[first:last])
    grad_u += uses * offset + slope * (uses * centered + own_sums)
