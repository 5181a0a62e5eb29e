"""Turn a network into its faster form for inference."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["fuse"]

_Module = TypeVar("_Module", bound=nn.Module)


def fuse(model: _Module) -> _Module:
    """Return a copy of a network for inference, with every block folded that can be.

    A module that folds offers ``fused() -> Module``: external attention becomes two thin matrices
    with projections and batch norm inside. The copy is in evaluation mode and gives the same
    results up to rounding; the model itself is not touched. Parameters of folded blocks are
    frozen, and their state dict has other keys: save the model, not the copy.

    Args:
        model: a trained network, or a single block.

    >>> from eanet.nn.external_attention import ExternalAttention2d
    >>> fuse(nn.Sequential(ExternalAttention2d(16, 8)))[0]
    FusedExternalAttention2d(key=(8, 16), value=(16, 8))
    """
    copied = copy.deepcopy(model).eval()
    folded = _folded(copied)
    if folded is not copied:
        return folded  # pyright: ignore[reportReturnType]
    _fuse_children(copied)
    return copied


def _folded(module: nn.Module) -> nn.Module:
    """Return what a module folds into, or the module itself."""
    fold: Callable[[], nn.Module] | None = getattr(module, "fused", None)
    return module if fold is None else fold().eval()


def _fuse_children(module: nn.Module) -> None:
    """Replace, below a module, everything that folds."""
    for name, child in module.named_children():
        folded = _folded(child)
        if folded is child:
            _fuse_children(child)
        else:
            setattr(module, name, folded)
