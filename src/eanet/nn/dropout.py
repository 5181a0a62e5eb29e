"""Dropout whose random numbers cost little on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Dropout", "dropout"]

#: one 64-bit word of the generator decides over four entries, to 16 bits each
_LEVELS = 1 << 16
#: below this share of 65536 the rounding of the probability would show
_LEAST_LEVEL = 64


def dropout(x: Tensor, probability: float, training: bool = True) -> Tensor:
    """Zero entries with a probability and scale the others so that the mean stays.

    PyTorch draws a number in double precision for every entry, which takes most of the time of a
    dropout on a CPU. Here 16 random bits decide, so the probability is rounded to a multiple of
    2^-16; the scale is that of the rounded one, so the mean is exact. On other devices, in
    compiled code and for probabilities near 0 or 1 it is PyTorch's own.

    Args:
        x: of any shape.
        probability: of an entry to become 0, within [0, 1].
        training: whether anything is dropped at all.

    >>> _ = torch.manual_seed(0)
    >>> dropped = dropout(torch.ones(1000, 100), 0.25)
    >>> sorted({round(value, 4) for value in dropped.unique().tolist()})
    [0.0, 1.3333]
    """
    level = round(probability * _LEVELS)
    drawn_here = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (training and drawn_here and _LEAST_LEVEL <= level <= _LEVELS - _LEAST_LEVEL):
        return F.dropout(x, probability, training)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)
    noise = (draws >= level - _LEVELS // 2).to(x.dtype)
    return x * noise.mul_(_LEVELS / (_LEVELS - level))


class Dropout(nn.Dropout):
    """The same as a module."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop entries in training."""
        return dropout(input, self.p, self.training)
