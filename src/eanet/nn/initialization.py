"""How weights start: the authors' rules for the 2-D block and for transformers."""

import math

import torch
from torch import Tensor, nn

__all__ = ["initialize_fan_out_", "initialize_memories_", "initialize_transformer_"]


@torch.no_grad()
def initialize_fan_out_(weight: Tensor) -> None:
    """Draw from Normal(0, sqrt(2 / fan_out)), fan_out = output channels times kernel area."""
    fan_out = weight.shape[0] * math.prod(weight.shape[2:])
    nn.init.normal_(weight, std=math.sqrt(2 / fan_out))


@torch.no_grad()
def initialize_memories_(
    memory_key: Tensor, memory_value: Tensor | None, *, std: float, shared: bool
) -> None:
    """Draw the memories; the values start as a copy of the keys or independently.

    Args:
        memory_key: M_k (slots, channels).
        memory_value: M_v, or ``None`` where it is the same parameter as M_k.
        std: standard deviation.
        shared: start M_v as a copy of M_k. Where their widths differ they are independent.
    """
    nn.init.normal_(memory_key, std=std)
    if memory_value is None:
        return
    if shared and memory_value.shape == memory_key.shape:
        memory_value.copy_(memory_key)
    else:
        nn.init.normal_(memory_value, std=std)


@torch.no_grad()
def initialize_transformer_(module: nn.Module, *, std: float = 0.02) -> None:
    """Start every linear layer, layer norm and memory of a transformer as T2T-ViT does.

    Weights of linear layers and memories are drawn from Normal(0, std), biases are 0, norms are
    the identity. Modules with memories are asked through their ``initialize_memories_(std)``.

    Args:
        module: the network; all its submodules are visited.
        std: standard deviation; 0.02 in T2T-ViT and EAMLP.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            _zero_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif hasattr(part, "initialize_memories_"):
            part.initialize_memories_(std)  # pyright: ignore[reportCallIssue]


def _zero_(bias: Tensor | None) -> None:
    """Set a bias to 0 where there is one."""
    if bias is not None:
        nn.init.zeros_(bias)
