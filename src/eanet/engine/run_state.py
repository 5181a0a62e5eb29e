"""Where a run stands, and how it is put into a checkpoint and taken out again."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from eanet.engine.checkpoint import Checkpoint, prune_checkpoints, save_checkpoint
from eanet.engine.distributed import Processes
from eanet.engine.ema import AveragedWeights
from eanet.engine.run_folder import RunFolder
from eanet.engine.state import (
    network_tensors,
    optimizer_tensors,
    restore_averages,
    restore_network,
    restore_optimizer,
    whole_on_cpu,
)

__all__ = ["RunState", "Trained"]


@dataclass
class RunState:
    """The numbers of a run; with the tensors of :class:`Trained`, all that a resume needs.

    Args:
        step: steps done.
        seconds: time spent on them, validations included.
        skipped_updates: updates left out because they were not finite.
        skips_in_a_row: of these, the last ones without a good update between.
        sums: of the numbers logged since the last record.
        counts: how many of each.
        validated: value of ``step`` at the last validation.
        metrics: of the last validation.
        best: ``step``, ``weights``, ``metric``, ``value`` and ``metrics`` of the best validation.
    """

    step: int = 0
    seconds: float = 0.0
    skipped_updates: int = 0
    skips_in_a_row: int = 0
    sums: dict[str, float] = field(default_factory=dict[str, float])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    validated: int = 0
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    best: dict[str, Any] | None = None

    def add(self, numbers: Mapping[str, float]) -> None:
        """Add numbers to the sums of the current record."""
        for key, number in numbers.items():
            self.sums[key] = self.sums.get(key, 0.0) + number
            self.counts[key] = self.counts.get(key, 0) + 1

    def take_means(self) -> dict[str, float]:
        """Return the means since the last record and start another."""
        means = {key: total / self.counts[key] for key, total in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        return means

    def note_validation(
        self,
        metrics: Mapping[str, float],
        *,
        metric: str,
        mode: Literal["max", "min"],
        weights: Literal["raw", "ema"],
    ) -> None:
        """Remember a validation, and that it is the best so far if it is.

        Args:
            metrics: of the raw weights, and of the averaged ones with ``ema/`` before the name;
                empty where a run has no validation split.
            metric: the one that chooses.
            mode: which way is better.
            weights: whose metric chooses.
        """
        self.validated = self.step
        self.metrics = dict(metrics)
        if not metrics:
            return
        value = metrics[metric if weights == "raw" else f"ema/{metric}"]
        sign = 1.0 if mode == "max" else -1.0
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best["value"]):
            self.best = {
                "step": self.step,
                "weights": weights,
                "metric": metric,
                "value": value,
                "metrics": dict(metrics),
            }

    def result(self) -> dict[str, Any]:
        """Return what a finished run reports."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "skipped_updates": self.skipped_updates,
            "metrics": dict(self.metrics),
            "best": self.best,
        }


@dataclass(frozen=True)
class Trained:
    """What training changes.

    Args:
        networks: by name.
        optimizers: of those that are trained.
        averages: of their weights, where the run keeps them.
    """

    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    averages: AveragedWeights | None

    def save(
        self,
        state: RunState,
        folder: RunFolder,
        *,
        continuation: Mapping[str, Any],
        processes: Processes,
    ) -> None:
        """Write a checkpoint, then delete those that are no longer needed.

        Args:
            state: of the run.
            folder: of the run.
            continuation: what :func:`~eanet.engine.continuation.check_continuation` compares.
            processes: all of them must call this; the main one writes.

        Raises:
            UserError: the disk is full or may not be written to.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, network in self.networks.items():
            tensors[f"network.{name}"] = network_tensors(network)
            if name in self.optimizers:
                tensors[f"optimizer.{name}"] = optimizer_tensors(network, self.optimizers[name])
            if self.averages is not None:
                tensors[f"ema.{name}"] = whole_on_cpu(self.averages.weights[name])
        if processes.is_main:
            facts = {
                "networks": sorted(self.networks),
                "has_average": self.averages is not None,
                "continuation": continuation,
            }
            save_checkpoint(folder.checkpoints, tensors, {**asdict(state), **facts})
            best_step = None if state.best is None else state.best["step"]
            prune_checkpoints(folder.checkpoints, best_step=best_step)
        # nobody goes on, and perhaps reads the folder, before it is complete
        processes.sum([0.0])

    def restore(self, checkpoint: Checkpoint) -> RunState:
        """Take everything from a checkpoint.

        Raises:
            UserError: it is of other networks; the message names the first differences.
        """
        for name, network in self.networks.items():
            path = checkpoint.path / f"network.{name}.safetensors"
            restore_network(network, checkpoint.tensors(path.stem), source=path)
            if name in self.optimizers:
                path = checkpoint.path / f"optimizer.{name}.safetensors"
                optimizer = self.optimizers[name]
                restore_optimizer(network, optimizer, checkpoint.tensors(path.stem), source=path)
            if self.averages is not None:
                path = checkpoint.path / f"ema.{name}.safetensors"
                averages = self.averages.weights[name]
                restore_averages(averages, checkpoint.tensors(path.stem), source=path)
        known = {each.name for each in fields(RunState)}
        return RunState(**{k: v for k, v in checkpoint.state.items() if k in known})
