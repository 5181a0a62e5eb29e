"""Soft splits: a picture cut into overlapping patches, and layers over them without the patches.

Patches of k x k pixels at distance s hold every pixel about (k / s)^2 times, and cutting them out
takes longer than what is done with them. With gamma, beta and eps of a layer norm over the C k^2
entries of a patch p, and W, b of the linear layer behind it::

    W (gamma (p - mean(p)) / sqrt(var(p) + eps) + beta) + b
        = (W' p) / sqrt(var(p) + eps) + (W beta + b),   W' = W gamma - rowmean(W gamma)

since the rows of W' sum to 0, which takes the mean out of every patch. ``W' p`` is a convolution.
The variance of a patch is that of each pixel's channels about their own mean, averaged over the
patch, plus the variance of those means: averages over windows of single-channel maps.

A patch's result does not change when one number is subtracted from all of it. The mean of the
picture is taken off first, since rounding errors of the convolution grow with what it sees; the
zeros around the picture are part of the patches and shifted alike. The variance of the means is
computed in float64: mean of squares minus square of mean loses the variance of an even patch in
float32, where it competes with eps.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from eanet.nn.memories import autocast_input, cast, full_precision

__all__ = ["SoftSplit", "centered_weight", "project_centered", "project_patches"]


class SoftSplit(nn.Module):
    """Cuts a picture into overlapping patches: (B, C, H, W) to (B, N, C k^2), row by row.

    The patch is laid out channel by channel, within a channel row by row. Zeros around the picture
    are part of the patches at its edge.

    Args:
        kernel: edge k of a patch in pixels.
        stride: distance of patches in pixels.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        if not 1 <= stride <= kernel:
            raise ValueError(f"a soft split needs 1 <= stride <= kernel, got {stride}, {kernel}")
        self.kernel, self.stride = kernel, stride
        # 2 for the patches of 7 at distance 4, 1 for those of 3 at distance 2
        self.padding = min((kernel - stride + 1) // 2, (kernel - 1) // 2)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of patches for a picture of some size."""
        rows, columns = (
            (length + 2 * self.padding - self.kernel) // self.stride + 1
            for length in (height, width)
        )
        return rows, columns

    def mask_grid(
        self, mask: Bool[Tensor, "batch height width"]
    ) -> Bool[Tensor, "batch rows columns"]:
        """Return which patches belong to the picture, of a mask of its pixels.

        A patch belongs to it where the picture by itself would have that patch: its last pixel
        may lie as far outside as the padding.
        """
        first = self.kernel - 1 - 2 * self.padding
        return mask[:, first :: self.stride, first :: self.stride]

    def forward(
        self, picture: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens patch"]:
        """Return the patches."""
        patches = F.unfold(picture, self.kernel, padding=self.padding, stride=self.stride)
        return patches.transpose(1, 2)

    def extra_repr(self) -> str:
        """Describe the split in a printed network."""
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}"


def centered_weight(
    norm: nn.LayerNorm, linear: nn.Linear
) -> tuple[Float[Tensor, "outputs patch"], Float[Tensor, " outputs"]]:
    """Return W' and the bias of ``linear(norm(p))``, at least in float32."""
    dtype = torch.promote_types(linear.weight.dtype, torch.float32)
    weight = linear.weight.to(dtype)
    scaled = weight * norm.weight.to(dtype)
    bias = weight @ norm.bias.to(dtype)
    if linear.bias is not None:
        bias = bias + linear.bias.to(dtype)
    return scaled - scaled.mean(dim=1, keepdim=True), bias


def project_centered(
    picture: Float[Tensor, "batch channels height width"],
    split: SoftSplit,
    weight: Float[Tensor, "outputs patch"],
    bias: Float[Tensor, " outputs"],
    *,
    eps: float,
) -> Float[Tensor, "batch tokens outputs"]:
    """Return ``W' p / sqrt(var(p) + eps) + bias`` of every patch, computed at least in float32.

    Args:
        picture: what is split.
        split: the soft split.
        weight: W', whose rows sum to 0; see :func:`centered_weight`.
        bias: added to the result.
        eps: of the layer norm.
    """
    with full_precision(picture):
        # in half precision W' would lose what makes its rows sum to 0
        wide = picture.to(torch.promote_types(picture.dtype, weight.dtype))
        # neither results nor gradients depend on what is subtracted
        mean = wide.detach().mean(dim=(1, 2, 3), keepdim=True)
        wide = F.pad(wide, (split.padding,) * 4) - mean
        kernel = _convolution_kernel(weight.to(wide.dtype), split)
        out = F.conv2d(wide, kernel, stride=split.stride)
        out = out * _inverse_deviation(wide, split, eps)
        out = (out + bias.to(wide.dtype).view(-1, 1, 1)).to(picture.dtype)
    return autocast_input(out).flatten(2).transpose(1, 2)


def project_patches(
    picture: Float[Tensor, "batch channels height width"], split: SoftSplit, linear: nn.Linear
) -> Float[Tensor, "batch tokens outputs"]:
    """Return ``linear(p)`` of every patch of a picture."""
    kernel = _convolution_kernel(linear.weight.to(picture.dtype), split)
    bias = cast(linear.bias, picture.dtype)
    out = F.conv2d(picture, kernel, bias, split.stride, split.padding)
    return out.flatten(2).transpose(1, 2)


def _convolution_kernel(weight: Tensor, split: SoftSplit) -> Tensor:
    """Return a matrix over patches as weights of a convolution.

    They lie channels last in memory; so does then the result, where tokens are together.
    """
    kernel = weight.unflatten(1, (-1, split.kernel, split.kernel))
    return kernel.contiguous(memory_format=torch.channels_last)


def _inverse_deviation(padded: Tensor, split: SoftSplit, eps: float) -> Tensor:
    """Return 1 / sqrt(variance + eps) of every patch, (batch, 1, rows, columns)."""
    means = padded.mean(dim=1, keepdim=True)
    within = (padded - means).square().mean(dim=1, keepdim=True)
    within = F.avg_pool2d(within, split.kernel, split.stride)
    # MPS has no float64, the runtimes that read ONNX no averages of it
    if padded.device.type == "mps" or torch.compiler.is_exporting():
        windows = F.unfold(means, split.kernel, stride=split.stride)
        between = (windows - windows.mean(dim=1, keepdim=True)).square().mean(dim=1)
        between = between.view_as(within)
    else:
        exact = means.double()
        average = F.avg_pool2d(exact, split.kernel, split.stride)
        between = F.avg_pool2d(exact.square(), split.kernel, split.stride) - average.square()
        # the rounding error of a variance of 0 may be below 0
        between = between.clamp(min=0.0).to(within.dtype)
    return torch.rsqrt(within + between + eps)
