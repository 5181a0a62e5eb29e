"""Names of weights in PyTorch-StudioGAN (commit c98d0e9) for the weights of our networks.

Its generators and critics count attention layers among their blocks, and its spectral norm keeps
the parameter as ``weight_orig`` beside ``weight_u`` and ``weight_v``.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from eanet.tasks.generation.attention import GatedExternalAttention2d, GatedSelfAttention2d
from eanet.tasks.generation.conditional_norm import ConditionalBatchNorm2d
from eanet.tasks.generation.critics import (
    ConvCritic,
    ConvCriticBlock,
    CriticBlock,
    CriticInputBlock,
    ResNetCritic,
)
from eanet.tasks.generation.generators import (
    ConvGenerator,
    ConvGeneratorBlock,
    GeneratorBlock,
    ResNetGenerator,
)

__all__ = ["from_studiogan", "studiogan_keys"]

#: for each module of ours the names of its parts there
_PARTS: dict[type[nn.Module], dict[str, str]] = {
    GeneratorBlock: {
        "norm1": "bn1",
        "norm2": "bn2",
        "conv1": "conv2d1",
        "conv2": "conv2d2",
        "shortcut": "conv2d0",
    },
    CriticInputBlock: {
        "norm1": "bn1",
        "shortcut_norm": "bn0",
        "conv1": "conv2d1",
        "conv2": "conv2d2",
        "shortcut": "conv2d0",
    },
    CriticBlock: {
        "norm1": "bn1",
        "norm2": "bn2",
        "shortcut_norm": "bn0",
        "conv1": "conv2d1",
        "conv2": "conv2d2",
        "shortcut": "conv2d0",
    },
    ConvGeneratorBlock: {"conv": "deconv0", "norm": "bn0"},
    ConvCriticBlock: {"conv1": "conv0", "conv2": "conv1", "norm1": "bn0", "norm2": "bn1"},
    ConditionalBatchNorm2d: {"norm": "bn", "gain": "embed0", "bias": "embed1"},
    GatedSelfAttention2d: {
        "query": "conv1x1_theta",
        "key": "conv1x1_phi",
        "value": "conv1x1_g",
        "projection": "conv1x1_attn",
        "gamma": "sigma",
    },
    ResNetGenerator: {"linear": "linear0", "norm": "bn4", "conv": "conv2d5"},
    ResNetCritic: {"linear": "linear1", "embedding": "embedding"},
    ConvGenerator: {"linear": "linear0", "conv": "conv4"},
    ConvCritic: {"conv": "conv1", "norm": "bn1", "linear": "linear1"},
}


def _parts(network: nn.Module) -> Mapping[str, str]:
    """Return the names of a module's own parts."""
    return next((names for kind, names in _PARTS.items() if isinstance(network, kind)), {})


def _prefixes(network: nn.Module) -> dict[str, str]:
    """Return for every module inside a network its name there, where it has one."""
    names = {"": ""}
    places = [int(place) for place in getattr(network, "attentions", {})]
    for path, _ in network.named_modules():
        if not path:
            continue
        parent, _, last = path.rpartition(".")
        if path in ("blocks", "attentions"):
            continue
        if parent == "blocks":
            number = int(last) + sum(place <= int(last) for place in places)
            names[path] = f"blocks.{number}.0"
        elif parent == "attentions":
            number = int(last) + sum(place < int(last) for place in places)
            names[path] = f"blocks.{number}.0"
        elif parent in names:
            part = _parts(network.get_submodule(parent)).get(last)
            if part is not None:
                names[path] = f"{names[parent]}.{part}".lstrip(".")
    return names


def studiogan_keys(network: nn.Module) -> dict[str, str]:
    """Return for every entry of a network's state its name in PyTorch-StudioGAN.

    Args:
        network: a generator, a critic, or one of their blocks.

    Raises:
        ValueError: the network holds external attention, which has no counterpart there.
    """
    if any(isinstance(module, GatedExternalAttention2d) for module in network.modules()):
        raise ValueError("external attention has no counterpart in PyTorch-StudioGAN")
    prefixes = _prefixes(network)
    keys: dict[str, str] = {}
    for key in network.state_dict():
        path, _, last = key.rpartition(".")
        if path.rpartition(".")[2] == "spectral_norm":
            owner = path.rpartition(".")[0]
            keys[key] = f"{prefixes[owner]}.weight_{last}".lstrip(".")
            continue
        owner_module = network.get_submodule(path)
        own = _parts(owner_module).get(last, last)
        if last == "weight" and getattr(owner_module, "spectral_norm", None) is not None:
            own = "weight_orig"
        keys[key] = f"{prefixes[path]}.{own}".lstrip(".")
    return keys


def from_studiogan(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state for :meth:`~torch.nn.Module.load_state_dict` out of one of StudioGAN's.

    Args:
        network: ours of the same architecture.
        tensors: a generator's or critic's state, a prefix ``module.`` of parallel training aside.

    Raises:
        ValueError: a key is missing, unknown, or has another number of values.
    """
    given = {re.sub(r"^module\.", "", key): tensor for key, tensor in tensors.items()}
    state = network.state_dict()
    keys = studiogan_keys(network)
    missing = sorted(set(keys.values()) - set(given))
    unknown = sorted(set(given) - set(keys.values()))
    if missing or unknown:
        raise ValueError(f"the weights are of another network: missing {missing[:3]}, "
                         f"unknown {unknown[:3]}")  # fmt: skip
    result: dict[str, Tensor] = {}
    for key, name in keys.items():
        tensor = given[name]
        if tensor.numel() != state[key].numel():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the network {tuple(state[key].shape)}"
            )
        result[key] = tensor.reshape(state[key].shape)
    return result
