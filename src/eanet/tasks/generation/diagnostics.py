"""Whether the attention inside a generator or critic is alive."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eanet.tasks.generation.attention import GatedExternalAttention2d, GatedSelfAttention2d

__all__ = ["watch_attention"]


@contextmanager
def watch_attention(network: nn.Module, prefix: str) -> Generator[dict[str, float]]:
    """Measure every attention layer that runs inside the context.

    For the layer after block n, under ``<prefix>/attention<n>_...``: ``gamma``; ``branch``, the
    root mean square of the branch before it is multiplied by gamma; ``share``, that of gamma times
    the branch over that of the input; ``evenness``, the entropy of a position's attention over its
    largest possible value. A share near 0 is a layer that does nothing.

    Args:
        network: a generator or a critic.
        prefix: of the names.

    Yields:
        The numbers, there when the context ends; of the last pass where there are several.
    """
    numbers: dict[str, float] = {}

    def watch(name: str, layer: Any) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            with torch.no_grad():
                x = args[0].float()
                gated = out.float() - x
                gamma = float(layer.gamma)
                # at gamma 0 the branch has to be looked at through another gamma
                branch = gated / gamma if abs(gamma) > 1e-3 else _branch(layer, x)
                numbers[f"{name}_gamma"] = gamma
                numbers[f"{name}_branch"] = _rms(branch)
                numbers[f"{name}_share"] = abs(gamma) * _rms(branch) / max(_rms(x), 1e-12)
                numbers[f"{name}_evenness"] = _entropy(layer, args[0])

        return layer.register_forward_hook(hook)

    handles = [
        watch(f"{prefix}/attention{path.rpartition('.')[2]}", module)
        for path, module in network.named_modules()
        if isinstance(module, GatedSelfAttention2d | GatedExternalAttention2d)
    ]
    try:
        yield numbers
    finally:
        for handle in handles:
            handle.remove()


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _branch(layer: Any, x: Tensor) -> Tensor:
    """Return a layer's branch with gamma at 1."""
    gamma = layer.gamma.clone()
    layer.gamma.fill_(1.0)
    try:
        return type(layer).forward(layer, x).float() - x
    finally:
        layer.gamma.copy_(gamma)


def _entropy(layer: Any, x: Tensor) -> float:
    """Return the mean entropy of a layer's attention over its largest possible value."""
    attention = layer.attention_map(x).float()
    # slots stand before the positions, keys behind them
    dim = 1 if isinstance(layer, GatedExternalAttention2d) else -1
    entropy = -(attention * attention.clamp(min=1e-12).log()).sum(dim=dim).mean()
    return float(entropy / torch.tensor(float(attention.shape[dim])).log())
