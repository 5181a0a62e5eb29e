"""Layers whose weight is divided by its largest singular value (arXiv 1802.05957).

The power iteration follows PyTorch-StudioGAN, whose results the paper compares with: per forward
pass in training mode v first, then u, with eps 1e-6. It is carried out by the forward pass alone,
so that looking at a weight, copying a network or saving it changes nothing.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eanet.nn.memories import full_precision

__all__ = ["Conv2d", "ConvTranspose2d", "Embedding", "Linear", "SpectralNorm", "normalized_weight"]

#: of the norms in the power iteration
_EPS = 1e-6


class SpectralNorm(nn.Module):
    """An estimate of the largest singular value of a weight: sigma = u^T W v.

    Args:
        weight: W, seen as a matrix (first dimension, all others). Only its shape is used: it stays
            a parameter of the layer it belongs to.
        eps: of the norms in the power iteration.

    >>> weight = torch.eye(3) * 2.0
    >>> norm = SpectralNorm(weight)
    >>> _ = [norm.iterate(weight) for _ in range(20)]
    >>> bool(torch.isclose(norm(weight)[0, 0], torch.tensor(1.0)))
    True
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, *, eps: float = _EPS) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.eps = eps
        for name, size in (("u", rows), ("v", columns)):
            start = F.normalize(torch.randn(size, device=weight.device), dim=0, eps=eps)
            self.register_buffer(name, start)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Carry out one step of the power iteration: v, then u."""
        matrix = weight.detach().flatten(1)
        with full_precision(matrix):
            self.v.copy_(F.normalize(torch.mv(matrix.t(), self.u), dim=0, eps=self.eps))
            self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0, eps=self.eps))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight over sigma; u and v take part as constants."""
        with full_precision(weight):
            # copies: the next iteration writes into u and v before this pass is differentiated
            u, v = self.u.clone(), self.v.clone()
            return weight / torch.dot(u, torch.mv(weight.flatten(1), v))


def normalized_weight(layer: nn.Module, weight: Tensor, norm: SpectralNorm | None) -> Tensor:
    """Return what a layer computes with; in training mode the power iteration goes on first.

    Args:
        layer: says whether it trains.
        weight: its parameter.
        norm: of the weight, or ``None`` for a weight that is used as it is.
    """
    if norm is None:
        return weight
    if layer.training:
        norm.iterate(weight)
    return norm(weight)


def _orthogonal_(weight: Tensor) -> None:
    """Start from a matrix with orthonormal rows or columns, as all networks here do."""
    nn.init.orthogonal_(weight)


class Conv2d(nn.Conv2d):
    """A convolution with or without spectral norm, orthogonal at the start, biases 0."""

    def __init__(self, *args: Any, spectral_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spectral_norm = SpectralNorm(self.weight) if spectral_norm else None

    def reset_parameters(self) -> None:
        """Draw the weight."""
        _orthogonal_(self.weight)
        if self.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        weight = normalized_weight(self, self.weight, self.spectral_norm)
        return self._conv_forward(input, weight, self.bias)


class Linear(nn.Linear):
    """A linear layer with or without spectral norm, orthogonal at the start, biases 0."""

    def __init__(self, *args: Any, spectral_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spectral_norm = SpectralNorm(self.weight) if spectral_norm else None

    def reset_parameters(self) -> None:
        """Draw the weight."""
        _orthogonal_(self.weight)
        if self.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map the last dimension."""
        return F.linear(input, normalized_weight(self, self.weight, self.spectral_norm), self.bias)


class Embedding(nn.Embedding):
    """One vector per class, with or without spectral norm over the table, orthogonal at first."""

    def __init__(self, *args: Any, spectral_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spectral_norm = SpectralNorm(self.weight) if spectral_norm else None

    def reset_parameters(self) -> None:
        """Draw the table."""
        _orthogonal_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Look classes up."""
        return F.embedding(input, normalized_weight(self, self.weight, self.spectral_norm))


class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with or without spectral norm over its output channels."""

    def __init__(self, *args: Any, spectral_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.weight.transpose(0, 1)
        self.spectral_norm = SpectralNorm(weight) if spectral_norm else None

    def reset_parameters(self) -> None:
        """Draw the weight."""
        _orthogonal_(self.weight)
        if self.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve, doubling or otherwise enlarging the map."""
        if output_size is not None:
            raise ValueError("output_size is not offered")
        weight = normalized_weight(self, self.weight.transpose(0, 1), self.spectral_norm)
        assert not isinstance(self.padding, str)
        return F.conv_transpose2d(
            input,
            weight.transpose(0, 1),
            self.bias,
            self.stride,
            cast("tuple[int, int]", self.padding),
            self.output_padding,
            self.groups,
            self.dilation,
        )
