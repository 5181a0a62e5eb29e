"""Put an external attention block into a network that exists already."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eanet.nn.external_attention import ExternalAttention, ExternalAttention2d

__all__ = ["insert_external_attention"]

_Module = TypeVar("_Module", bound=nn.Module)

#: name of the inserted block below the module it follows
BLOCK_NAME = "external_attention"


def insert_external_attention(
    model: _Module,
    *,
    after: str | Sequence[str],
    channels: int | None = None,
    example_input: Tensor | None = None,
    num_slots: int = 64,
    **options: Any,
) -> _Module:
    """Insert blocks that change nothing at first: their last weights start at zero.

    The names of all parameters that exist stay as they are, so weights of the network load before
    or after the insertion; the new ones stand below ``<after>.external_attention``. A module whose
    result is a feature map gets an :class:`ExternalAttention2d` without the final ReLU, one whose
    result is a sequence of tokens an :class:`ExternalAttention`, both with the input as residual.

    Args:
        model: the network; it is changed in place.
        after: name of the module whose result the block refines, such as ``"layer4"``, or several.
        channels: width of that result, for a feature map whose width is known.
        example_input: an input of the network, to find width and kind of the result by running it.
        num_slots: number of memory slots.
        options: further arguments of the block.

    Returns:
        The network.

    Raises:
        ValueError: there is no such module, it has a block already, its result is neither a map
            nor tokens, or neither channels nor an example is given.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 16, 3)))
    >>> network = insert_external_attention(network, after="1", channels=16)
    >>> [name for name in network.state_dict() if "memory" in name]
    ['1.external_attention.memory_key', '1.external_attention.memory_value']
    """
    names = [after] if isinstance(after, str) else list(after)
    modules = {name: _find(model, name) for name in names}
    shapes = dict.fromkeys(names, (0, channels or 0, 0, 0))
    if example_input is not None:
        shapes = _result_shapes(model, modules, example_input)
    elif channels is None:
        raise ValueError("channels or example_input is needed, to know the width of the result")
    for name, module in modules.items():
        block = _new_block(name, shapes[name], num_slots, options)
        _attach(module, block, like=next(module.parameters(), None))
    return model


def _find(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule by name; the error lists the names one level below the network."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        known = ", ".join(child for child, _ in model.named_children())
        raise ValueError(f"after: there is no module {name!r}; the network has {known}") from None
    if BLOCK_NAME in dict(module.named_children()):
        raise ValueError(f"after: {name!r} has an external attention block already")
    return module


def _result_shapes(
    model: nn.Module, modules: dict[str, nn.Module], example_input: Tensor
) -> dict[str, tuple[int, ...]]:
    """Run the network once without changing it, and return the shapes of the modules' results."""
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            shapes[name] = tuple(output.shape) if isinstance(output, Tensor) else ()

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in modules.items()]
    training: dict[nn.Module, bool] = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example_input)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    for name in modules:
        if name not in shapes:
            raise ValueError(f"after: {name!r} did not run on the example")
    return shapes


def _new_block(
    name: str, shape: tuple[int, ...], num_slots: int, options: dict[str, Any]
) -> nn.Module:
    """Return a block for a result of some shape whose branch is zero at first."""
    if len(shape) == 4:
        options = {"activation": "none", **options}
        block = ExternalAttention2d(shape[1], num_slots, **options)
        last = block.projection if block.norm is None else block.norm
    elif len(shape) == 3:
        options = {"residual": "input", **options}
        block = ExternalAttention(shape[2], num_slots, **options)
        last = block.projection
    else:
        raise ValueError(f"after: the result of {name!r} is neither a map nor tokens: {shape}")
    if last is not None:
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    return block


def _attach(module: nn.Module, block: nn.Module, *, like: Tensor | None) -> None:
    """Make a block follow a module, in the type and on the device of its parameters."""
    if like is not None:
        block = block.to(like.device, like.dtype)
    block.train(module.training)
    module.add_module(BLOCK_NAME, block)
    # a Sequential runs its last child by itself
    if not isinstance(module, nn.Sequential):
        module.register_forward_hook(_apply_block)


def _apply_block(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """Refine the result of a module with the block below it."""
    return module.get_submodule(BLOCK_NAME)(output)
