"""How PCT_Pytorch and its relatives call the parameters of our networks.

Two layouts are read: the classifier of PCT_Pytorch (``gather_local_0.conv1.weight``, ...), with or
without the ``module.`` that data parallel training leaves, and the part segmenter of the released
simple PCT (``encoder.sa1.q_conv.weight``, ``seg.convs1.weight``, ...). A file of EAT, which nobody
published, is written and read under the same names with ``query``, ``mk`` and ``mv``.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eanet.errors import UserError
from eanet.tasks.pointcloud.pct import PartSegmenter, PointClassifier

__all__ = ["attention_keys", "from_published", "published_keys"]

_WEIGHT_AND_BIAS = ("weight", "bias")
_NORM = (*_WEIGHT_AND_BIAS, "running_mean", "running_var", "num_batches_tracked")


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in _NORM}


def _linear(ours: str, theirs: str, *, bias: bool = False) -> dict[str, str]:
    parts = _WEIGHT_AND_BIAS if bias else _WEIGHT_AND_BIAS[:1]
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in parts}


def _pointwise(ours: str, conv: str, norm: str, *, bias: bool = False) -> dict[str, str]:
    return _linear(f"{ours}.linear", conv, bias=bias) | _norm(f"{ours}.norm", norm)


def attention_keys(layer: nn.Module, ours: str = "", theirs: str = "") -> dict[str, str]:
    """Return for the parameters of one attention layer what published files call them."""
    names = _linear("projection", "trans_conv", bias=True) | _norm("norm", "after_norm")
    if hasattr(layer, "query_key"):
        names |= _linear("query_key", "k_conv") | _linear("value", "v_conv", bias=True)
    elif hasattr(layer, "attention"):
        names |= {"attention.memory_key": "mk.weight", "attention.memory_value": "mv.weight"}
        if layer.attention.query is not None:  # pyright: ignore
            names |= _linear("attention.query", "query", bias=True)
    return {ours + name: theirs + their for name, their in names.items()}


def published_keys(model: PointClassifier | PartSegmenter) -> dict[str, str]:
    """Return for every entry of a network's state dict its name in a published file."""
    encoder = model.encoder
    if isinstance(model, PointClassifier):
        names = _pointwise("encoder.points.0", "conv1", "bn1")
        names |= _pointwise("encoder.points.1", "conv2", "bn2")
        for number in range(len(encoder.embedding.stages)):
            for part in ("1", "2"):
                ours, theirs = f"encoder.stages.{number}", f"gather_local_{number}"
                names |= _linear(f"{ours}.linear{part}", f"{theirs}.conv{part}")
                names |= _norm(f"{ours}.norm{part}", f"{theirs}.bn{part}")
        for number in range(len(encoder.middle)):
            theirs = ("pt_last.conv{0}", "pt_last.bn{0}")
            names |= _pointwise(
                f"encoder.middle.{number}", *(name.format(number + 1) for name in theirs)
            )
        names |= _pointwise("encoder.fuse", "conv_fuse.0", "conv_fuse.1")
        names |= _pointwise("head.0", "linear1", "bn6")
        names |= _pointwise("head.1", "linear2", "bn7", bias=True)
        names |= _linear("classifier", "linear3", bias=True)
        layers = "pt_last.sa{}."
    else:
        names = {}
        for number in ("0", "1"):
            theirs = f"encoder.embedding.{{}}{int(number) + 1}"
            names |= _pointwise(
                f"encoder.points.{number}", theirs.format("conv"), theirs.format("bn")
            )
        names |= _pointwise("encoder.fuse", "encoder.linear.0", "encoder.linear.1")
        names |= _pointwise("label", "seg.label_conv.0", "seg.label_conv.1")
        names |= _pointwise("head1", "seg.convs1", "seg.bns1", bias=True)
        names |= _pointwise("head2", "seg.convs2", "seg.bns2", bias=True)
        names |= _linear("classifier", "seg.convs3", bias=True)
        layers = "encoder.sa{}."
    if encoder.position is not None:
        names |= _linear("encoder.position", "pt_last.pos_xyz", bias=True)
    for number, layer in enumerate(encoder.layers):
        names |= attention_keys(layer, f"encoder.layers.{number}.", layers.format(number + 1))
    # the embedding is a module of the encoder here
    return {
        re.sub(r"^encoder\.(points|stages)\.", r"encoder.embedding.\1.", ours): theirs
        for ours, theirs in names.items()
    }


def from_published(
    model: PointClassifier | PartSegmenter, tensors: Mapping[str, Tensor], *, source: str
) -> dict[str, Tensor]:
    """Return the state dict of a network from published tensors.

    Args:
        model: the network to fill.
        tensors: by their published names; ``q_conv`` may be missing, being the same as ``k_conv``.
        source: what error messages call them.

    Raises:
        UserError: a tensor too few, too many or of another shape, or q and k that differ.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith(".q_conv.weight")]:
        query, key = tensors.pop(name), tensors.get(name.replace("q_conv", "k_conv"))
        if key is None or not torch.equal(query, key):
            raise UserError(f"{source}: {name!r} is not tied to its k_conv, as PCT's is")
    keys = published_keys(model)
    state = model.state_dict()
    counters = {theirs for theirs in keys.values() if theirs.endswith("num_batches_tracked")}
    missing = sorted(set(keys.values()) - counters - tensors.keys())
    unknown = sorted(tensors.keys() - set(keys.values()))
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown {unknown[0]!r}"
        raise UserError(
            f"{source}: {what} ({len(missing)} tensors missing, {len(unknown)} unknown)"
        )
    found: dict[str, Tensor] = {}
    for ours, theirs in keys.items():
        if theirs not in tensors:  # files from before PyTorch 0.4.1 have no counters
            found[ours] = state[ours]
            continue
        tensor = tensors[theirs]
        if theirs.endswith(("conv.weight", ".weight")) and tensor.ndim == 3:
            tensor = tensor.squeeze(2)  # 1x1 convolutions are linear maps here
        if ours.endswith("memory_value"):
            tensor = tensor.t().contiguous()
        if tensor.shape != state[ours].shape:
            raise UserError(
                f"{source}: {theirs!r} has shape {tuple(tensors[theirs].shape)}, "
                f"expected that of {tuple(state[ours].shape)}"
            )
        found[ours] = tensor
    return found
