"""How the weights of a network are drawn at first."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["draw_weights", "kaiming_fan_out_", "normal_"]


def draw_weights(module: nn.Module, draw: Callable[[Tensor], Any]) -> None:
    """Draw the weights of all convolutions and linear layers of a module; biases become 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def kaiming_fan_out_(weight: Tensor) -> Tensor:
    """Draw from Normal(0, sqrt(2 / fan_out)), for layers before a ReLU."""
    return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def normal_(std: float) -> Callable[[Tensor], Tensor]:
    """Return what draws from Normal(0, std)."""
    return lambda weight: nn.init.normal_(weight, std=std)
