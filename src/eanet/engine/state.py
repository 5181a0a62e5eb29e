"""What a run's networks and optimizers hold, as named tensors, and back.

Tensors are whole on the CPU whatever way the networks are spread, so a checkpoint of one process
can be continued by several and the other way round. Optimizer state goes by the parameters' names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eanet.engine.checkpoint import Checkpoint, checkpoint_path, newest_intact
from eanet.engine.distributed import copy_whole, whole
from eanet.engine.run_folder import RunFolder
from eanet.errors import UserError

__all__ = [
    "load_networks",
    "network_tensors",
    "optimizer_tensors",
    "restore_averages",
    "restore_network",
    "restore_optimizer",
    "tied_keys",
    "whole_on_cpu",
]


def whole_on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors whole on the CPU; all processes must call it together."""
    return {key: whole(tensor).cpu() for key, tensor in tensors.items()}


def tied_keys(network: nn.Module) -> dict[str, str]:
    """Return, for each further name of a shared parameter or buffer, its first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for key, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[key] = first[id(tensor)]
        else:
            first[id(tensor)] = key
    return tied


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network, each shared tensor once."""
    tied = tied_keys(network)
    state = {key: value for key, value in network.state_dict().items() if key not in tied}
    return _unshared(whole_on_cpu(state))


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that are views into the memory of another."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_view = storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        result[key] = tensor.clone() if is_view else tensor
    return result


def restore_network(network: nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy a saved state into a network that may be sharded.

    Raises:
        UserError: keys or shapes differ; the message names the first ones.
    """
    targets = network.state_dict()
    tied = tied_keys(network)
    wanted = {key: value for key, value in targets.items() if key not in tied}
    problems = [f"{key} is missing" for key in wanted if key not in tensors]
    problems += [f"{key} is unknown" for key in tensors if key not in wanted]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the network {tuple(target.shape)}"
        for key, target in wanted.items()
        if key in tensors and tensors[key].shape != target.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} is of another network: {'; '.join(problems[:3])}{more}")
    for key, target in wanted.items():
        copy_whole(target, tensors[key])


def optimizer_tensors(network: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as ``<quantity>/<parameter name>``.

    Raises:
        TypeError: it holds something that is not a tensor.
    """
    result: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        for quantity, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # a momentum before the first step
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {quantity!r} of {name} is not a tensor")
            result[f"{quantity}/{name}"] = whole(value).cpu()
    return result


def restore_optimizer(
    network: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], *, source: Path
) -> None:
    """Give an optimizer a saved state; its settings stay those it was built with.

    Raises:
        UserError: the state names a parameter that the optimizer does not have, or has a shape
            that fits neither the parameter nor a scalar.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in network.named_parameters() if id(p) in trained}
    optimizer.state.clear()
    for key, saved in tensors.items():
        quantity, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or saved.shape not in (parameter.shape, torch.Size([])):
            raise UserError(f"{source}: {key} does not fit any trained parameter of the network")
        if saved.shape == parameter.shape and quantity != "step":
            # the layout and the sharding of the parameter
            value = torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False)
            copy_whole(value, saved)
        else:
            fused = bool(optimizer.defaults.get("fused"))
            value = saved.clone().to(parameter.device if fused else "cpu")
        optimizer.state[parameter][quantity] = value


def restore_averages(
    averages: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, source: Path
) -> None:
    """Copy saved averages of weights into those of a run.

    Raises:
        UserError: names or shapes differ.
    """
    for key, target in averages.items():
        if key not in tensors or tensors[key].shape != target.shape:
            raise UserError(f"{source}: the averaged weights lack {key} {tuple(target.shape)}")
        copy_whole(target, tensors[key])


def load_networks(
    folder: RunFolder | Path | str,
    networks: Mapping[str, nn.Module],
    *,
    which: Literal["best", "last"] = "best",
    weights: Literal["raw", "ema"] | None = None,
) -> dict[str, Any]:
    """Load the weights of a run into networks, for evaluation, prediction or a new run.

    Args:
        folder: of the run.
        networks: as the run trained them, by name; changed in place.
        which: the checkpoint with the best validation, or the newest. The newest is taken where
            a run never validated.
        weights: as they were trained, or their average; ``None`` takes the ones that "best" was
            chosen by: the average where the run kept one.

    Returns:
        ``step``, ``weights`` ("raw" or "ema") and ``path`` of what was loaded.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it is of other networks.
    """
    path = folder.checkpoints if isinstance(folder, RunFolder) else Path(folder) / "checkpoints"
    checkpoint = newest_intact(path)
    if checkpoint is None:
        raise UserError(f"{path.parent} has no checkpoint; is it the folder of a run?")
    best = checkpoint.state["best"]
    if which == "best" and best is not None and best["step"] != checkpoint.step:
        checkpoint = Checkpoint.open(checkpoint_path(path, best["step"]))
    has_average = checkpoint.state["has_average"]
    if weights is None:
        weights = "ema" if has_average else "raw"
    if weights == "ema" and not has_average:
        raise UserError(f"{path.parent} keeps no averaged weights (train.ema_decay is 0); use raw")
    saved = set(checkpoint.state["networks"])
    if saved != set(networks):
        raise UserError(
            f"{checkpoint.path} is of another task: its networks are {sorted(saved)}, "
            f"not {sorted(networks)}"
        )
    for name, network in networks.items():
        tensors = checkpoint.tensors(f"network.{name}")
        if weights == "ema":
            tensors |= checkpoint.tensors(f"ema.{name}")
        restore_network(network, tensors, source=checkpoint.path / f"network.{name}.safetensors")
    return {"step": checkpoint.step, "weights": weights, "path": str(checkpoint.path)}
