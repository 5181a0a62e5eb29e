"""The authors' names of EANet's tensors, and ours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eanet import registry
from eanet.errors import UserError

__all__ = [
    "build_official",
    "from_official",
    "implied_arguments",
    "is_official",
    "load_official",
    "to_official",
]

#: beginnings of names: theirs, ours
_PREFIXES = {
    "extractor.0.": "backbone.conv1.",
    "extractor.1.": "backbone.bn1.",
    "extractor.4.": "backbone.layer1.",
    "extractor.5.": "backbone.layer2.",
    "extractor.6.": "backbone.layer3.",
    "extractor.7.": "backbone.layer4.",
    "fc0.conv.": "reduce.conv.",
    "fc0.bn.": "reduce.norm.",
    "linu.conv1.": "attention.query.",
    "linu.linear_0.weight": "attention.memory_key",
    "linu.linear_1.weight": "attention.memory_value",
    "linu.conv2.0.": "attention.projection.",
    "linu.conv2.1.": "attention.norm.",
    "fc1.0.conv.": "refine.conv.",
    "fc1.0.bn.": "refine.norm.",
    "fc2.": "classifier.",
}
#: what tells a file of EANet from others
_MARK = "linu.linear_0.weight"
#: blocks of stage 3 tell the depth
_DEPTH_OF_BLOCKS = {6: "resnet50", 23: "resnet101", 36: "resnet152"}


def is_official(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors bear the names of the authors' EANet."""
    return _MARK in _bare(tensors)


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefix that training on several GPUs leaves."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def implied_arguments(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """Return the constructor arguments that tensors imply; the output stride is not among them.

    Raises:
        UserError: they are of another network.
    """
    given = _bare(tensors)
    blocks = {name.split(".")[2] for name in given if name.startswith("extractor.6.")}
    for name in (
        _MARK,
        "extractor.0.0.weight",
        "fc0.conv.weight",
        "fc1.0.conv.weight",
        "fc2.weight",
    ):
        if name not in given:
            raise UserError(f"{source}: not an EANet: it has no {name!r}")
    if len(blocks) not in _DEPTH_OF_BLOCKS:
        raise UserError(f"{source}: not an EANet: its third stage has {len(blocks)} blocks")
    return {
        "backbone": _DEPTH_OF_BLOCKS[len(blocks)],
        "in_channels": given["extractor.0.0.weight"].shape[1],
        "num_classes": given["fc2.weight"].shape[0],
        "num_slots": given[_MARK].shape[0],
        "channels": given["fc0.conv.weight"].shape[0],
        "refine_channels": given["fc1.0.conv.weight"].shape[0],
    }


def from_official(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Return tensors under our names.

    The authors' two memories are (slots, channels, 1) and (channels, slots, 1); each is copied, so
    that no two of the results share storage and none depends on the order of the names.

    Raises:
        UserError: a name is unknown.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in _bare(tensors).items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise UserError(f"{source}: not an EANet: it has the unknown tensor {name!r}")
        if name.startswith("linu.linear_"):
            tensor = tensor.squeeze(-1)
            tensor = tensor.T if name.startswith("linu.linear_1") else tensor
        renamed[_PREFIXES[prefix] + name[len(prefix) :]] = tensor.clone(
            memory_format=torch.contiguous_format
        )
    return renamed


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors under the authors' names.

    Raises:
        UserError: the authors' code has no name for one of them.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = next((t for t, ours in _PREFIXES.items() if name.startswith(ours)), None)
        if theirs is None:
            raise UserError(f"cannot be exported: the authors' code has no name for {name!r}")
        if name.startswith("attention.memory_"):
            tensor = tensor.T if name.endswith("value") else tensor
            tensor = tensor.unsqueeze(-1)
        renamed[theirs + name[len(_PREFIXES[theirs]) :]] = tensor.contiguous()
    return renamed


def load_official(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Fill a network from tensors under the authors' names, strictly.

    Where the network ties its memories (``tie_memory``) the two given ones must be equal. A file
    without counts of seen batches is taken.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or memories to be tied differ.
    """
    state = from_official(tensors, source=source)
    own = model.state_dict()
    if "attention.memory_value" not in own:
        value = state.pop("attention.memory_value", None)
        if value is not None and not torch.equal(value, state["attention.memory_key"]):
            raise UserError(f"{source}: its two memories differ, the network has one for both")
    state |= {n: own[n] for n in own.keys() - state.keys() if n.endswith("num_batches_tracked")}
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown {unknown[0]!r}"
        raise UserError(
            f"{source}: {what} ({len(missing)} tensors missing, {len(unknown)} unknown)"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{source}: {name!r} would have shape {tuple(tensor.shape)}, "
                f"the network has {tuple(own[name].shape)}"
            )
    model.load_state_dict(state)


def build_official(tensors: Mapping[str, Tensor], *, source: str, output_stride: int) -> nn.Module:
    """Build the network that tensors under the authors' names are of, and fill it.

    Args:
        tensors: by the authors' names.
        source: what error messages call them.
        output_stride: 8, 16 or 32; no tensor tells it.

    Raises:
        UserError: they are of another network, or one is missing, unknown or of another shape.
    """
    arguments = implied_arguments(tensors, source=source)
    arguments["output_stride"] = output_stride
    model: nn.Module = registry.create_model("eanet_resnet50", **arguments)
    if next(iter(tensors.values())).dtype == torch.float64:
        model.double()  # float32 would round
    load_official(model, tensors, source=source)
    return model
