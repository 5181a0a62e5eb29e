"""The two memories of external attention as parameters, and what all its modules check."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from eanet.nn.initialization import initialize_memories_
from eanet.nn.streaming import StreamedModule
from eanet.ops.attention import Norm, check_norm

__all__ = [
    "MemoryInit",
    "MemoryModule",
    "autocast_input",
    "bias_of",
    "cast",
    "check_positive",
    "check_tokens",
    "flat_view",
    "full_precision",
    "project_values",
]

#: whether the values start as a copy of the keys
MemoryInit = Literal["shared", "independent"]


class MemoryModule(StreamedModule):
    """Base of the modules that own the memories M_k and M_v.

    Args:
        num_slots: S, the number of memory rows.
        width: d, the length of a memory row.
        norm: "double" or "softmax".
        eps: of the double normalization.
        memory_init: "shared" starts M_v as a copy of M_k, as the authors' code does.
        tie_memory: use one parameter, ``memory_key``, for both memories (Eq. 5-6).
        key_bias: give each slot a bias, added to its logit.
        value_bias: give the result of the second product a bias.
    """

    memory_key: nn.Parameter
    memory_value: nn.Parameter | None
    memory_key_bias: nn.Parameter | None
    memory_value_bias: nn.Parameter | None

    def __init__(
        self,
        num_slots: int,
        width: int,
        *,
        norm: Norm,
        eps: float,
        memory_init: MemoryInit,
        tie_memory: bool,
        key_bias: bool,
        value_bias: bool,
    ) -> None:
        super().__init__()
        check_norm(norm, eps)
        check_positive(num_slots=num_slots, width=width)
        if memory_init not in ("shared", "independent"):
            raise ValueError(f"memory_init must be 'shared' or 'independent', got {memory_init!r}")
        self.num_slots = num_slots
        self.normalization: Norm = norm
        self.eps = eps
        self.memory_init: MemoryInit = memory_init
        self.tie_memory = tie_memory
        self.memory_key = nn.Parameter(torch.empty(num_slots, width))
        # one real parameter rather than two that share storage: an alias is lost on deepcopy and
        # on a change of type, and safetensors refuses it
        self.memory_value = None if tie_memory else nn.Parameter(torch.empty(num_slots, width))
        self.memory_key_bias = nn.Parameter(torch.zeros(num_slots)) if key_bias else None
        self.memory_value_bias = nn.Parameter(torch.zeros(width)) if value_bias else None

    @property
    def values(self) -> Tensor:
        """M_v, which is M_k where the memory is tied."""
        return self.memory_key if self.memory_value is None else self.memory_value

    def initialize_memories_(self, std: float) -> None:
        """Draw the memories with a standard deviation and set their biases to 0."""
        initialize_memories_(
            self.memory_key, self.memory_value, std=std, shared=self.memory_init == "shared"
        )
        for bias in (self.memory_key_bias, self.memory_value_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        tied = ", tie_memory=True" if self.tie_memory else ""
        width = self.memory_key.shape[1]
        return f"num_slots={self.num_slots}, width={width}, norm={self.normalization!r}{tied}"


def check_positive(**sizes: int) -> None:
    """Refuse sizes below 1, naming the argument."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_tokens(x: Tensor, channels: int, module: str) -> None:
    """Refuse anything but (batch, tokens, channels) of the right width."""
    if x.ndim == 4:
        raise ValueError(
            f"{module} takes (batch, tokens, {channels}), got a 4-D tensor {tuple(x.shape)}; "
            "for (batch, channels, height, width) use ExternalAttention2d"
        )
    if x.ndim != 3 or x.shape[2] != channels:
        raise ValueError(f"{module} takes (batch, tokens, {channels}), got {tuple(x.shape)}")


def autocast_input(x: Tensor) -> Tensor:
    """Return x in the type of an active autocast region, as a matrix product would cast it."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast: products of weights and normalizations stay precise."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the tensor in another type, ``None`` for ``None``."""
    return None if tensor is None else tensor.to(dtype)


def flat_view(buffer: Tensor | None) -> Tensor | None:
    """View a buffer (batch, channels, height, width) as (batch, channels, tokens).

    Raises:
        ValueError: its rows do not lie one behind the other.
    """
    if buffer is None:
        return None
    try:
        return buffer.view(*buffer.shape[:2], -1)
    except RuntimeError as error:
        raise ValueError(
            f"out must be contiguous or channels_last, got strides {buffer.stride()}"
        ) from error


def bias_of(layer: nn.Linear | nn.Conv2d) -> Tensor | None:
    """Return the bias of a layer, which PyTorch's types claim it always has."""
    return layer.bias


def project_values(
    values: Tensor, value_bias: Tensor | None, projection: nn.Linear | nn.Conv2d | None
) -> tuple[Tensor, Tensor | None]:
    """Fold the output projection into the memory values.

    Args:
        values: M_v (slots, width).
        value_bias: added to the second product, before the projection.
        projection: a linear layer or a 1x1 convolution, or nothing.

    Returns:
        ``W M_v^T`` (out channels, slots) and the bias of the result.
    """
    if projection is None:
        return values.transpose(0, 1), value_bias
    weight, bias = projection.weight.flatten(1), projection.bias
    if value_bias is not None:
        projected = weight @ value_bias
        bias = projected if bias is None else bias + projected
    return weight @ values.transpose(0, 1), bias
