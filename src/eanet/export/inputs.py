"""What a network is fed when it is exported, and which sizes stay open.

A network of any task is understood if it states ``input_shape``, the shape of one sample without
its batch axis, and takes one tensor:

==============  ==========================  ==================================================
numbers stated  meaning                     open beside the batch
==============  ==========================  ==================================================
1               a vector, such as a latent  nothing
2               points or tokens            the axis that ``input_open_axes`` names, else nothing
3               channels, height, width     height and width
==============  ==========================  ==================================================

A network may state other open axes as ``input_open_axes``: axis of a sample (0 is the first after
the batch) to its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eanet.errors import UserError

__all__ = ["InputSpec", "input_spec"]


@dataclass(frozen=True)
class InputSpec:
    """One input tensor.

    Args:
        name: as other programs will call it.
        shape: of one sample, without the batch axis.
        open_axes: axis of the batch tensor (0 is the batch) to its name; the rest is fixed.
    """

    name: str
    shape: tuple[int, ...]
    open_axes: Mapping[int, str]

    def example(
        self, batch: int = 2, sizes: Mapping[int, int] | None = None, *, seed: int = 0
    ) -> Tensor:
        """Return normally distributed values.

        Args:
            batch: samples.
            sizes: axis of the batch tensor to a size other than that of ``shape``.
            seed: of the values.
        """
        shape = [batch, *self.shape]
        for axis, size in (sizes or {}).items():
            shape[axis] = size
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def input_spec(model: nn.Module, *, size: Sequence[int] | None = None) -> InputSpec:
    """Return what a network is fed.

    Args:
        model: the network.
        size: sizes of the open axes beside the batch, in order (height and width of an image) in
            the place of those it states.

    Raises:
        UserError: the network does not state its input, or ``size`` does not fit it.
    """
    stated = getattr(model, "input_shape", None)
    name = type(model).__name__
    if stated is None or not 1 <= len(stated) <= 3:
        raise UserError(
            f"{name} does not state an `input_shape` of one tensor (1 to 3 numbers); a network "
            "that takes several inputs cannot be exported whole"
        )
    shape = [int(number) for number in stated]
    by_default = {1: "height", 2: "width"} if len(shape) == 3 else {}
    own: Mapping[int, str] = getattr(model, "input_open_axes", by_default)
    if size is not None:
        if len(size) != len(own):
            raise UserError(
                f"{name} has {len(own)} open axes beside the batch, got {len(size)} sizes"
            )
        for axis, number in zip(sorted(own), size, strict=True):
            shape[axis] = number
    open_axes = {0: "batch"} | {axis + 1: own[axis] for axis in sorted(own)}
    kind = {1: "vectors", 2: "points", 3: "images"}[len(shape)]
    return InputSpec(kind, tuple(shape), open_axes)
