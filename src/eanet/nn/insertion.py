"""Put an external attention block into a network that exists already."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from eanet.nn.channel_norms import ChannelAffine, ValidGroupNorm
from eanet.nn.external_attention import ExternalAttention
from eanet.nn.padding import ImageSizes, PaddedExternalAttention2d, find_image_sizes

__all__ = ["BLOCK_NAME", "BranchNorm", "insert_external_attention"]

_Module = TypeVar("_Module", bound=nn.Module)

#: name of the inserted block below the module it follows
BLOCK_NAME = "external_attention"

BranchNorm = Literal["affine", "batch", "group", "none"]


def insert_external_attention(
    model: _Module,
    *,
    after: str | Sequence[str],
    channels: int | None = None,
    example_input: Any = None,
    num_slots: int = 64,
    branch_norm: BranchNorm = "affine",
    **options: Any,
) -> _Module:
    """Insert blocks that change nothing at first: their last weights start at zero.

    The names of all parameters that exist stay as they are, so weights of the network load before
    or after the insertion; the new ones stand below ``<after>.external_attention``. A module whose
    result is a feature map gets an :class:`ExternalAttention2d` without the final ReLU, one whose
    result is a sequence of tokens an :class:`ExternalAttention`, both with the input as residual.
    Where the result is that of a ReLU, ``activation="relu"`` gives the authors' block, and the
    network still computes to the bit what it did.

    Padding. A network that pads images of several sizes to one batch must say which part of it is
    image, or an image's result would depend on its neighbors. torchvision's detectors do so by
    themselves once a block is inserted; elsewhere use :func:`eanet.nn.padding.image_sizes`.

    Args:
        model: the network; it is changed in place.
        after: name of the module whose result the block refines, such as ``"layer4"``, or several.
            The last parts of a name are enough where they belong to one module alone.
        channels: width of that result, for a feature map whose width is known.
        example_input: an input of the network, to find width and kind of the result by running it.
        num_slots: number of memory slots.
        branch_norm: what follows the branch of a feature map: a weight and bias for each channel;
            batch norm; group norm in up to 32 groups; or nothing. Batch norm is an ordinary one,
            which learns its statistics even where those of the network are frozen. Neither of
            them counts padding.
        options: further arguments of the block, such as ``inner_channels=512``.

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
    names: list[str] = [after] if isinstance(after, str) else list(after)
    modules: dict[str, nn.Module] = {}
    for name in names:
        full_name, module = _find(model, name)
        modules[full_name] = module
    shapes = dict.fromkeys(modules, (0, channels or 0, 0, 0))
    if example_input is not None:
        shapes = _result_shapes(model, modules, example_input)
    elif channels is None:
        raise ValueError("channels or example_input is needed, to know the width of the result")
    record = find_image_sizes(model)
    if record is None:
        record = ImageSizes()
        _watch_batching(model, record)
    for name, module in modules.items():
        if len(shapes[name]) == 4:
            block = _map_block(shapes[name][1], num_slots, branch_norm, record, options)
        else:
            block = _token_block(name, shapes[name], num_slots, options)
        _attach(module, block, like=next(module.parameters(), None))
    return model


def _find(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return a submodule with its full name; the error lists names one level below the network."""
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]
    found = dict(modules)
    if name not in found:
        matches = [full for full in found if full.endswith(f".{name}")]
        if len(matches) > 1:
            raise ValueError(f"after: {name!r} could be any of {', '.join(matches)}")
        if not matches:
            known = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"after: there is no module {name!r}; the network has {known}")
        name = matches[0]
    if any(child == BLOCK_NAME for child, _ in found[name].named_children()):
        raise ValueError(f"after: {name!r} has an external attention block already")
    return name, found[name]


class _NoteSizes:
    """Notes the sizes that torchvision's batching of images (``model.transform``) returns."""

    def __init__(self, record: ImageSizes) -> None:
        self.record = record

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Look at the result of the transform: images of one size and what was padded."""
        batch = output[0]
        self.record.set(batch.image_sizes, tuple(batch.tensors.shape[-2:]))


class _ForgetSizes:
    """Clears the record after each pass, and after one that failed."""

    def __init__(self, record: ImageSizes) -> None:
        self.record = record

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Clear."""
        self.record.clear()


def _watch_batching(model: nn.Module, record: ImageSizes) -> None:
    """Let torchvision's detectors fill in the record; hooks are objects that copies take along."""
    transform = getattr(model, "transform", None)
    if isinstance(transform, nn.Module) and hasattr(transform, "batch_images"):
        transform.register_forward_hook(_NoteSizes(record))
        model.register_forward_hook(_ForgetSizes(record), always_call=True)


def _result_shapes(
    model: nn.Module, modules: dict[str, nn.Module], example_input: Any
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


def _map_block(
    channels: int, num_slots: int, norm: BranchNorm, record: ImageSizes, options: dict[str, Any]
) -> nn.Module:
    """Return a block for feature maps whose branch is zero at first."""
    if norm not in ("affine", "batch", "group", "none"):
        raise ValueError(f"branch_norm must be 'affine', 'batch', 'group' or 'none', got {norm!r}")
    options = {"activation": "none", "batch_norm": norm == "batch"} | options
    block = PaddedExternalAttention2d(channels, num_slots, record=record, **options)
    if norm == "affine":
        block.norm = ChannelAffine(channels)
    elif norm == "group":
        groups = max(count for count in range(1, 33) if channels % count == 0)
        block.norm = ValidGroupNorm(groups, channels)
    _silence(block.projection if block.norm is None else block.norm)
    return block


def _token_block(
    name: str, shape: tuple[int, ...], num_slots: int, options: dict[str, Any]
) -> nn.Module:
    """Return a block for tokens whose branch is zero at first."""
    if len(shape) != 3:
        raise ValueError(f"after: the result of {name!r} is neither a map nor tokens: {shape}")
    options = {"residual": "input"} | options
    block = ExternalAttention(shape[2], num_slots, **options)
    _silence(block.projection)
    return block


def _silence(last: nn.Module | None) -> None:
    """Zero the last layer of a branch, and it alone: of two zero factors neither would learn."""
    if last is None:
        raise ValueError("a block without projection and norm has no last weights to start at zero")
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


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
