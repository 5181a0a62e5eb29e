"""Look at attention maps while a network runs."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["capture_attention"]


@contextmanager
def capture_attention(model: nn.Module) -> Generator[dict[str, Tensor]]:
    """Collect the attention map of every attention module that runs inside the context.

    Maps are computed beside the forward pass, from the inputs of each module, without gradients
    and without dropout. Outside the context nothing is computed or kept.

    Args:
        model: a network; modules with ``attention_map(x, mask)`` are watched.

    Yields:
        A dictionary from module name to map: (B, N, S) for tokens, (B, H, N, S) with heads,
        (B, S, H, W) for feature maps, (B, H, N, N) for self-attention. A module that runs several
        times leaves its last map. A single block without a name is found under ``""``.

    >>> from eanet.nn.external_attention import ExternalAttention
    >>> network = nn.Sequential(ExternalAttention(8, 4))
    >>> with capture_attention(network) as maps:
    ...     _ = network(torch.zeros(1, 3, 8))
    >>> {name: tuple(attention.shape) for name, attention in maps.items()}
    {'0': (1, 3, 4)}
    """
    maps: dict[str, Tensor] = {}

    def watch(name: str, module: Any) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
            with torch.no_grad():
                maps[name] = module.attention_map(*args, **kwargs)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]
    handles = [watch(name, module) for name, module in modules if hasattr(module, "attention_map")]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
