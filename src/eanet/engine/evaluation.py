"""The metrics of a task on a split."""
# torch leaves parts of these types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from eanet.data.loading import EvaluationBatches, derive_seed
from eanet.data.splits import Dataset
from eanet.engine.distributed import Processes, broadcast_state, gathered
from eanet.engine.task import Task

__all__ = [
    "TrainableTask",
    "autocast",
    "evaluate",
    "evaluate_unless",
    "evaluating",
    "show_progress",
]


class TrainableTask(Task, Protocol):
    """What the loop needs of a task beside :class:`~eanet.engine.task.Task`: its samples' way."""

    def train_transform(self, sample: Any) -> Any:
        """Return the sample augmented and ready for :meth:`collate`."""
        ...

    def evaluation_transform(self, sample: Any) -> Any:
        """Return the sample ready for :meth:`collate`, without any random choice."""
        ...

    def collate(self, samples: Sequence[Any]) -> Any:
        """Stack transformed samples into a batch."""
        ...


def autocast(device: torch.device, precision: Literal["float32", "bfloat16"]) -> torch.autocast:
    """Return the context in which networks run at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def evaluating(networks: Mapping[str, nn.Module]) -> Generator[None]:
    """Put networks in evaluation mode; every module gets its own mode back."""
    modes = [
        (module, module.training) for network in networks.values() for module in network.modules()
    ]
    for network in networks.values():
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    task: TrainableTask,
    dataset: Dataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    processes: Processes | None = None,
    seed: int = 0,
    precision: Literal["float32", "bfloat16"] = "float32",
    channels_last: bool = False,
    inspect: Callable[[Any], object] | None = None,
) -> dict[str, float]:
    """Return the metrics of a task's networks on a split.

    Every sample counts once, whatever the number of processes. Random numbers that a task draws
    (a generator's inputs) are a function of the seed; the state of torch's generators is restored.

    Args:
        task: its networks are moved to the device and left in the mode they were in.
        dataset: the split.
        batch_size: samples that go through the networks at a time.
        num_workers: loader processes.
        processes: of the run; ``None`` for this one on the CPU.
        seed: of what the task draws.
        precision: of the networks.
        channels_last: whether 4-D inputs are stored channels last.
        inspect: is shown the metrics as the task made them, on every process, when all samples
            have been added.

    Raises:
        UserError: the split is empty or a sample is unusable.
    """
    metrics = evaluate_unless(
        task,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        processes=processes or Processes(),
        seed=seed,
        precision=precision,
        channels_last=channels_last,
        stop=lambda: False,
        inspect=inspect,
    )
    assert metrics is not None
    return metrics


@torch.no_grad()
def evaluate_unless(
    task: TrainableTask,
    dataset: Dataset,
    *,
    batch_size: int,
    num_workers: int,
    processes: Processes,
    seed: int,
    precision: Literal["float32", "bfloat16"],
    channels_last: bool,
    stop: Callable[[], bool],
    inspect: Callable[[Any], object] | None = None,
) -> dict[str, float] | None:
    """Do the work of :func:`evaluate`; return ``None`` as soon as ``stop()`` is true."""
    device = processes.device
    batches = EvaluationBatches(
        dataset,
        transform=task.evaluation_transform,
        collate=task.collate,
        batch_size=batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    for network in task.networks.values():
        network.to(device)
        # running statistics may have gone their own way on each process
        broadcast_state(network, buffers_only=True)
    seeded = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with evaluating(task.networks), gathered(task.networks), seeded:
        torch.manual_seed(derive_seed("evaluation", seed, processes.rank))
        metrics = task.new_metrics(device)
        for batch in batches:
            if stop():
                break
            with autocast(device, precision):
                task.validation_step(batch.to(device, channels_last=channels_last), metrics)
    if processes.any(stop()):
        return None
    if inspect is not None:
        inspect(metrics)
    return {name: float(value) for name, value in metrics.compute().items()}


@torch.no_grad()
def show_progress(
    task: TrainableTask,
    folder: Path,
    *,
    step: int,
    metrics: Mapping[str, float],
    processes: Processes,
) -> list[str]:
    """Let a task that offers ``show_progress`` draw what its networks do after a validation.

    A task may offer ``show_progress(folder, step, metrics) -> Sequence[str]``: it writes pictures
    into the folder and returns lines to print. It is called by the main process, the networks in
    evaluation mode; what it draws from torch's generators does not change the training.

    Args:
        task: whose networks hold what was validated.
        folder: of the run.
        step: that were done.
        metrics: of the validation.
        processes: of the run; all of them must call this.

    Returns:
        The lines, on the main process.
    """
    show = getattr(task, "show_progress", None)
    if show is None:
        return []
    device = processes.device
    seeded = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with evaluating(task.networks), gathered(task.networks), seeded:
        return list(show(folder, step, metrics)) if processes.is_main else []
