"""Which processes and devices there are, and how networks are spread over them.

Everything that scales is PyTorch's own; this module only chooses: ``torchrun`` starts the
processes, DDP copies a network to each of them, FSDP2 (``fully_shard``) divides it among them.
"""

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from eanet.errors import UserError

__all__ = [
    "Processes",
    "broadcast_state",
    "copy_whole",
    "exchanges_gradients",
    "gathered",
    "join_processes",
    "spread",
    "whole",
]


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of a run.

    Args:
        rank: number of this process.
        world_size: number of processes.
        device: where this process computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes, the same on each."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def from_main(self, value: int) -> int:
        """Return the main process's integer on every process."""
        if self.world_size == 1:
            return value
        number = torch.tensor(value, dtype=torch.int64)
        dist.broadcast(number, src=0)
        return int(number)

    def any(self, flag: bool) -> bool:
        """Return on every process whether the flag is set on one of them."""
        return self.sum([float(flag)])[0] > 0


@contextmanager
def join_processes(device: str = "auto") -> Generator[Processes]:
    """Join the processes that ``torchrun`` started, or run alone where it did not.

    Args:
        device: ``auto`` takes a GPU where there is one; ``cpu``, ``cuda`` (each process of a
            machine takes its own), or any name that torch knows.

    Raises:
        UserError: there is no such device here.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = _choose_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    starts_group = world_size > 1 and not dist.is_initialized()
    if starts_group:
        # control values travel through gloo, so that reading them does not wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend)
    try:
        yield Processes(rank, world_size, chosen)
    finally:
        if starts_group:
            dist.destroy_process_group()


def _choose_device(name: str, *, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {name!r}: this machine has no GPU that torch can use; use cpu")
        index = device.index if ":" in name else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(
                f"device cuda:{index} does not exist, there are {torch.cuda.device_count()}; "
                "start no more processes per machine than it has GPUs"
            )
        return torch.device("cuda", index)
    return device


def broadcast_state(network: nn.Module, *, buffers_only: bool = False) -> None:
    """Give every process the main one's parameters and buffers of a network."""
    if not dist.is_initialized():
        return
    tensors: list[Tensor] = list(network.buffers())
    if not buffers_only:
        tensors += [parameter.detach() for parameter in network.parameters()]
    for tensor in tensors:
        # a channels-last tensor has to travel through a contiguous one
        sent = tensor.contiguous()
        dist.broadcast(sent, src=0)
        if sent is not tensor:
            tensor.copy_(sent)


def spread(
    network: nn.Module,
    processes: Processes,
    *,
    parallel: Literal["ddp", "fsdp"],
    broadcast_buffers: bool,
) -> nn.Module:
    """Spread a network over the processes; it starts from the main one's weights everywhere.

    Args:
        network: on this process's device; with ``fsdp`` it is changed in place.
        processes: of the run.
        parallel: ``ddp`` keeps a copy on each, ``fsdp`` divides parameters, gradients and
            optimizer state among them.
        broadcast_buffers: whether DDP copies the main process's buffers at each forward pass; not
            possible where one backward pass goes through several networks.

    Returns:
        What to call in place of the network; the network itself when there is one process or
        nothing to train.
    """
    if processes.world_size == 1:
        return network
    broadcast_state(network)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    if parallel == "ddp":
        devices = [processes.device] if processes.device.type == "cuda" else None
        return DistributedDataParallel(
            network, device_ids=devices, broadcast_buffers=broadcast_buffers
        )
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    _shard(network, mesh)
    return network


def _shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the blocks of a network, then what is left of it, as units that travel together."""
    blocks = [
        block
        for module in network.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
        if any(True for _ in block.parameters())
    ]
    # a parameter that two units share would have to live in both
    owners: dict[int, int] = {}
    for block in blocks:
        for parameter in set(block.parameters()):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    if all(count == 1 for count in owners.values()):
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


@contextmanager
def exchanges_gradients(networks: Iterable[nn.Module], exchange: bool) -> Generator[None]:
    """Compute a micro-batch; only the last one of a step exchanges the gradients of DDP."""
    with ExitStack() as stack:
        for network in networks:
            if isinstance(network, DistributedDataParallel) and not exchange:
                stack.enter_context(network.no_sync())
        yield


@contextmanager
def gathered(networks: Mapping[str, nn.Module]) -> Generator[None]:
    """Hold sharded networks whole on every process, for as many forward passes as each needs.

    A forward pass of a sharded network waits for the other processes; in a validation they may
    have different numbers of batches.
    """
    units = [
        module
        for network in networks.values()
        for module in network.modules()
        if isinstance(module, FSDPModule)
    ]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece; all processes must ask for a sharded one at the same time."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a tensor in one piece, the same on every process, into one that may be sharded."""
    if isinstance(target, DTensor):
        source = source.to(device=target.device, dtype=target.dtype)
        # every process holds the source: each takes its own part
        source = distribute_tensor(
            source, target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(source)
