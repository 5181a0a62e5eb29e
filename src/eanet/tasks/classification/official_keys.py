"""How the authors' files and those of T2T-ViT call the parameters of :class:`T2TViT`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from eanet.tasks.classification.t2t_vit import T2TViT

__all__ = ["Naming", "OfficialKey", "from_official", "official_keys", "to_official"]

#: The authors keep two stems with external attention whose layers are numbered from 0 and from 1;
#: ``linear_1`` is the value memory of one and the key memory of the other.
Naming = Literal["performer_file", "transformer_file"]


@dataclass(frozen=True)
class OfficialKey:
    """Where a parameter is found in an official state dict.

    Args:
        name: its key there.
        transposed: whether it is stored as the transpose: value memories are the weights of a
            linear layer there, (d, S), and rows of slots here, (S, d).
    """

    name: str
    transposed: bool = False


_WEIGHT_AND_BIAS = ("weight", "bias")


def _layer(ours: str, theirs: str, parts: tuple[str, ...] = _WEIGHT_AND_BIAS) -> dict[str, str]:
    """Name the parameters of a layer on both sides."""
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in parts}


def _stem_attention(kind: str, naming: Naming) -> dict[str, str]:
    """Name the parameters of a token block's attention and MLP, without prefixes."""
    mlp = _layer("mlp.expand", "mlp.fc1") | _layer("mlp.contract", "mlp.fc2")
    if kind == "performer":
        return {
            **_layer("attention.keys_queries_values", "kqv"),
            **_layer("attention.projection", "proj"),
            "attention.features": "w",
            **_layer("mlp.expand", "mlp.0"),
            **_layer("mlp.contract", "mlp.2"),
        }
    if kind == "transformer":
        return {
            **_layer("attention.qkv", "attn.qkv", ("weight",)),
            **_layer("attention.projection", "attn.proj"),
            **mlp,
        }
    first = 0 if naming == "performer_file" else 1
    return {
        **_layer("attention.query", "attn.q_linear"),
        "attention.memory_key": f"attn.linear_{first}.weight",
        "attention.memory_value": f"attn.linear_{first + 1}.weight",
        "attention.memory_value_bias": f"attn.linear_{first + 1}.bias",
        **_layer("attention.projection", "attn.proj"),
        **mlp,
    }


def _block_attention(kind: str) -> dict[str, str]:
    """Name the parameters of a backbone block's attention, without prefixes."""
    if kind == "self":
        return {
            **_layer("attention.qkv", "attn.qkv", ("weight",)),
            **_layer("attention.projection", "attn.proj"),
        }
    return {
        **_layer("attention.query", "attn.trans_dims"),
        "attention.memory_key": "attn.linear_0.weight",
        "attention.memory_key_bias": "attn.linear_0.bias",
        "attention.memory_value": "attn.linear_1.weight",
        "attention.memory_value_bias": "attn.linear_1.bias",
        **_layer("attention.projection", "attn.proj"),
    }


def official_keys(model: T2TViT, *, naming: Naming = "performer_file") -> dict[str, OfficialKey]:
    """Return for each parameter of a model where an official file keeps it.

    Args:
        model: with a class token, layer norm and a stem and mixer that were published.
        naming: which of the authors' two stems with external attention; no other model cares.

    Raises:
        ValueError: no official network is built like this one.
    """
    if model.class_token is None or "mlp" in (model.stem_kind, model.mixer):
        raise ValueError("official networks have a class token and attention in stem and backbone")
    names = {"class_token": "cls_token", "positions.table": "pos_embed"}
    names |= _layer("norm", "norm") | _layer("stem.projection", "tokens_to_token.project")
    if model.num_classes:
        names |= _layer("head", "head")
    norms = _layer("norm1", "norm1") | _layer("norm2", "norm2")
    for number in range(len(model.stem.blocks)):
        pairs = norms | _stem_attention(model.stem_kind, naming)
        prefix = f"tokens_to_token.attention{number + 1}."
        names |= {f"stem.blocks.{number}.{ours}": prefix + name for ours, name in pairs.items()}
    mlp = _layer("mlp.expand", "mlp.fc1") | _layer("mlp.contract", "mlp.fc2")
    for number in range(len(model.blocks)):
        pairs = norms | _block_attention(model.mixer) | mlp
        names |= {
            f"blocks.{number}.{ours}": f"blocks.{number}.{name}" for ours, name in pairs.items()
        }
    return {
        ours: OfficialKey(name, transposed=ours.endswith("memory_value"))
        for ours, name in names.items()
    }


def from_official(
    tensors: Mapping[str, Tensor], keys: Mapping[str, OfficialKey]
) -> dict[str, Tensor]:
    """Return the state dict of a model from official tensors.

    Args:
        tensors: by official key; others than those named are left out.
        keys: as :func:`official_keys` gave them.

    Raises:
        KeyError: a tensor is missing.
    """
    return {
        ours: tensors[key.name].t().contiguous() if key.transposed else tensors[key.name]
        for ours, key in keys.items()
    }


def to_official(
    tensors: Mapping[str, Tensor], keys: Mapping[str, OfficialKey]
) -> dict[str, Tensor]:
    """Return tensors of a model under their official keys; the inverse of :func:`from_official`.

    Args:
        tensors: by the names of the model: a state dict, or gradients.
        keys: as :func:`official_keys` gave them.
    """
    return {
        key.name: tensors[ours].t().contiguous() if key.transposed else tensors[ours]
        for ours, key in keys.items()
    }
