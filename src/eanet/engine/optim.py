"""From :class:`~eanet.recipe.OptimSpec` to an optimizer with parameter groups."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from eanet.errors import UserError
from eanet.recipe import OptimSpec

__all__ = ["build_optimizer", "is_decayed", "parameter_groups", "set_learning_rate"]

#: last parts of the names of learned tokens, which are offsets like biases whatever their shape
_TOKENS = ("class_token", "cls_token")


def is_decayed(name: str, parameter: torch.Tensor, *, decay_vectors: bool = False) -> bool:
    """Return whether weight decay applies to a parameter.

    Vectors and scalars (biases, normalization scales), everything whose name ends in ``bias``, and
    class tokens are left out unless ``decay_vectors`` asks for them. Memories of external
    attention are matrices and are decayed.
    """
    last = name.rpartition(".")[2]
    is_offset = parameter.ndim <= 1 or last.endswith("bias") or last in _TOKENS
    return decay_vectors or not is_offset


def parameter_groups(network: nn.Module, spec: OptimSpec) -> list[dict[str, Any]]:
    """Divide the trainable parameters of a network into optimizer groups.

    Args:
        network: frozen parameters are left out; a parameter with two names goes by its first.
        spec: ``groups`` are tried in order, the first match takes the parameter.

    Returns:
        Groups with ``params``, ``param_names``, ``lr``, ``lr_scale`` and ``weight_decay``; every
        trainable parameter is in exactly one.

    Raises:
        UserError: a group's expression is invalid or takes no parameter.
    """
    patterns = [_compiled(group.match, place) for place, group in enumerate(spec.groups)]
    members: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in _trainable(network):
        place = next((i for i, p in enumerate(patterns) if p.search(name)), len(patterns))
        decayed = is_decayed(name, parameter, decay_vectors=spec.decay_vectors)
        members.setdefault((place, decayed), []).append((name, parameter))
    for place, group in enumerate(spec.groups):
        if (place, True) not in members and (place, False) not in members:
            names = ", ".join(name for name, _ in list(_trainable(network))[:6])
            raise UserError(
                f"optim.groups[{place}].match {group.match!r} takes no trainable parameter "
                f"that an earlier group left; names are like: {names}"
            )
    result: list[dict[str, Any]] = []
    for (place, decayed), parameters in sorted(members.items(), key=lambda item: item[0]):
        own = spec.groups[place] if place < len(spec.groups) else None
        decay = spec.weight_decay if own is None or own.weight_decay is None else own.weight_decay
        scale = 1.0 if own is None else own.lr_scale
        result.append(
            {
                "params": [parameter for _, parameter in parameters],
                "param_names": [name for name, _ in parameters],
                "lr": spec.lr * scale,
                "lr_scale": scale,
                "weight_decay": decay if decayed else 0.0,
            }
        )
    return result


def _trainable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in network.named_parameters() if p.requires_grad)


def _compiled(pattern: str, place: int) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"optim.groups[{place}].match {pattern!r} is no regular expression: {error}"
        ) from error


def build_optimizer(network: nn.Module, spec: OptimSpec) -> Optimizer:
    """Build the optimizer of a network.

    Args:
        network: has at least one trainable parameter.
        spec: see its fields.

    Raises:
        UserError: a value is out of its range, or a group matches nothing.
    """
    groups = parameter_groups(network, spec)
    trained = [parameter for group in groups for parameter in group["params"]]
    # one pass over memory per parameter instead of one per arithmetic operation; torch has no
    # such kernel of SGD for sharded parameters
    fused = {parameter.device.type for parameter in trained} <= {"cpu", "cuda"}
    if spec.name == "sgd" and any(isinstance(parameter, DTensor) for parameter in trained):
        fused = False
    try:
        match spec.name:
            case "adamw":
                return AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)
            case "adam":
                return Adam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)
            case "sgd":
                return SGD(
                    groups,
                    lr=spec.lr,
                    momentum=spec.momentum,
                    nesterov=spec.nesterov,
                    fused=fused,
                )
    except ValueError as error:
        raise UserError(f"optim: {error}") from error
    raise UserError(f"optim.name must be adamw, adam or sgd, got {spec.name!r}")


def set_learning_rate(optimizer: Optimizer, spec: OptimSpec, factor: float) -> None:
    """Set each group's rate to ``spec.lr * lr_scale * factor``."""
    for group in optimizer.param_groups:
        group["lr"] = spec.lr * group["lr_scale"] * factor
