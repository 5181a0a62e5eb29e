"""What a task must offer. Read this first.

The loop in :mod:`eanet.engine.trainer` knows a task only as a :class:`Task`: networks to train,
a step that yields :class:`Update` objects, and metrics. :class:`VisualTask` adds what
:mod:`eanet.run` needs beside the loop: data, prediction, pictures.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from eanet.data.splits import Splits
from eanet.report.page import Section

__all__ = ["Batch", "Metrics", "Task", "Update", "VisualTask"]


class Batch(Protocol):
    """Samples stacked for a network; each task owns its class."""

    def to(self, device: torch.device, *, channels_last: bool = False) -> Self:
        """Return the batch on a device; 4-D images channels last where asked."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...


class Metrics(Protocol):
    """Metrics that accumulate over batches and over processes (torchmetrics or alike)."""

    def compute(self) -> dict[str, float]:
        """Return the metrics of everything seen, the same on every process."""
        ...


@dataclass
class Update:
    """One optimizer step of one network.

    Args:
        network: the key in :attr:`Task.networks` whose optimizer steps.
        losses: named scalar losses; their sum is differentiated, each is logged.
        numbers: further scalars to log, not differentiated.
    """

    network: str
    losses: Mapping[str, Tensor]
    numbers: Mapping[str, Tensor | float] | None = None


class Task(Protocol):
    """What the training loop needs.

    The trainer may replace the entries of :attr:`networks` by wrapped ones (DDP, compiled) while
    it trains and by averaged ones while it validates. A task therefore always calls
    ``self.networks[name]`` and never keeps a network in another attribute for the forward pass.
    """

    networks: dict[str, nn.Module]
    #: fresh batches that one step consumes: 1, or more for a GAN with several critic updates
    batches_per_step: int
    #: the metric that chooses the best checkpoint, and which way is better
    best_metric: str
    best_mode: Literal["max", "min"]

    def training_step(self, batches: Sequence[Any], step: int) -> Iterator[Update]:
        """Yield the updates of one step, in order.

        The loop differentiates each update's losses, steps the optimizer of its network and only
        then asks for the next one, so that a later update sees the weights of the earlier.
        With accumulation the generators of the micro-batches advance side by side.

        Args:
            batches: ``batches_per_step`` batches on the device of the networks.
            step: number of the step, from 0.
        """
        ...

    def new_metrics(self, device: torch.device) -> Metrics:
        """Return empty metrics for one validation."""
        ...

    def validation_step(self, batch: Any, metrics: Any) -> None:
        """Add one batch to the metrics; the networks are in evaluation mode, without gradients."""
        ...


class VisualTask(Task, Protocol):
    """What :mod:`eanet.run` needs of a room in ``eanet/tasks`` beside the loop.

    Args:
        model: the network(s) as one module, as :func:`eanet.create_model` returned it.
        facts: what the data said of itself: class names, channels, mean and standard deviation.
        options: the keyword arguments of ``Recipe.options``.
    """

    #: the model and data that `Recipe.smoke` trains, and options to replace
    smoke_model: ClassVar[str]
    smoke_data: ClassVar[str]
    smoke_options: ClassVar[dict[str, Any]]

    #: how the paper's tables call `best_metric`, and the factor to their unit
    published_metric: ClassVar[tuple[str, float]]

    # A task may name metrics in `last_metrics`: those of the newest checkpoint are then reported
    # beside those of the best one, under "last/...".

    model: nn.Module
    facts: dict[str, Any]

    def __init__(self, model: nn.Module, facts: Mapping[str, Any], **options: Any) -> None: ...

    @classmethod
    def model_arguments(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor arguments that the data decides, such as ``num_classes``."""
        ...

    def train_transform(self, sample: Any) -> Any:
        """Return the sample augmented and ready for :meth:`collate`.

        Random choices come from the global generator of torch, which the loader seeds for each
        sample from (seed, epoch, index).
        """
        ...

    def evaluation_transform(self, sample: Any) -> Any:
        """Return the sample ready for :meth:`collate`, without any random choice."""
        ...

    def collate(self, samples: Sequence[Any]) -> Any:
        """Stack transformed samples into a batch."""
        ...

    def read_file(self, path: Path) -> Any:
        """Read one file to predict on as a sample without a target."""
        ...

    def predict_batch(self, batch: Any) -> list[dict[str, Any]]:
        """Return one record for each sample of the batch.

        Values are JSON; those under names that begin with an underscore may be anything: they are
        for :meth:`save_prediction` and are not written into the tables.
        """
        ...

    def save_prediction(self, sample: Any, record: Mapping[str, Any], stem: Path) -> list[Path]:
        """Write the annotated picture(s) of one prediction; return the files written.

        Args:
            sample: what :meth:`read_file` returned.
            record: what :meth:`predict_batch` said of it.
            stem: path without suffix for the files.
        """
        ...

    def baselines(self, splits: Splits) -> dict[str, float]:
        """Return scores of simple methods on the test split, to print beside the network's."""
        ...

    def report_sections(self, splits: Splits, device: torch.device) -> list[Section]:
        """Return the task's own part of a run's page: pictures, tables, attention maps."""
        ...
