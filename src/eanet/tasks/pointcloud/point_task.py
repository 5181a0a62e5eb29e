"""What both tasks on point clouds share: how clouds are read, chosen, augmented and voted on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.tasks.pointcloud.point_files import read_points
from eanet.tasks.pointcloud.samples import Batch, Sample, collate
from eanet.tasks.pointcloud.transforms import (
    Augmentation,
    PointChoice,
    choose_points,
    normalize_to_unit_sphere,
)

__all__ = [
    "PointTask",
    "Votes",
    "known_targets",
    "reported_split",
    "spread_smoothing",
    "transformed_batches",
]


#: of the order in which points of a file are taken; a constant, so that predictions repeat
_FILE_SEED = 2105
#: points sampled on the surface of a mesh file
_MESH_POINTS = 2048


def spread_smoothing(share: float, num_classes: int) -> float:
    """Return PyTorch's ``label_smoothing`` for a share spread over the *other* classes.

    PCT's code gives the true class 1 - share and divides the share among the rest; PyTorch divides
    it among all classes.

    >>> round(spread_smoothing(0.2, 40), 6)
    0.205128
    """
    return share * num_classes / (num_classes - 1)


class Votes:
    """Metrics of a plain pass, and of the mean over several scales under ``voted_...``."""

    def __init__(self, plain: Any, voted: Any | None) -> None:
        self.plain, self.voted = plain, voted

    def update(self, plain: Tensor, voted: Tensor | None, *targets: Tensor | None) -> None:
        """Add one batch: logits of the plain pass, those of the votes where asked, targets."""
        self.plain.update(plain, *targets)
        if self.voted is not None:
            assert voted is not None
            self.voted.update(voted, *targets)

    def compute(self) -> dict[str, float]:
        """Return the metrics of everything seen."""
        numbers = self.plain.compute()
        if self.voted is not None:
            voted = {f"voted_{name}": value for name, value in self.voted.compute().items()}
            # the loss of averaged probabilities is none that anything was trained on
            numbers |= {name: value for name, value in voted.items() if name != "voted_loss"}
        return numbers


class PointTask:
    """What both tasks share: data, chosen points, augmentation, voting, files.

    Args:
        model: a network of this room.
        facts: of the data set.
        num_points: points of a training cloud; ``None`` for all that are stored.
        evaluation_points: points of a validation, test or predicted cloud; ``None`` for all.
        point_choice: which points a training cloud gets: the "first", as PCT, or "random" ones.
        augment: arguments of :class:`eanet.tasks.pointcloud.transforms.Augmentation`.
        label_smoothing: share of the target spread over the other classes.
        vote_scales: factors of the coordinates whose probabilities are averaged in evaluation, on
            top of the plain pass (PCT: 0.7, 0.8, ... 1.4).
        random_votes: further factors, drawn within 0.8 and 1.2.
    """

    batches_per_step = 1
    best_mode: Literal["max", "min"] = "max"
    #: published figures are of the best epoch by some, of the last by others: both are reported
    last_metrics: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model: nn.Module,
        facts: Mapping[str, Any],
        *,
        num_points: int | None,
        evaluation_points: int | None,
        point_choice: PointChoice,
        augment: Mapping[str, Any] | None,
        label_smoothing: float,
        vote_scales: Sequence[float],
        random_votes: int,
    ) -> None:
        for name, value in (("num_points", num_points), ("evaluation_points", evaluation_points)):
            if value is not None and value < model.min_points:  # pyright: ignore
                raise ValueError(
                    f"{name} must be at least {model.min_points}, which the network needs, "
                    f"got {value}"
                )
        if point_choice not in ("first", "random"):
            raise ValueError(f"point_choice must be 'first' or 'random', got {point_choice!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be within [0, 1), got {label_smoothing}")
        if any(scale <= 0 for scale in vote_scales) or random_votes < 0:
            raise ValueError(
                f"vote_scales must be above 0 and random_votes at least 0, got {vote_scales} and "
                f"{random_votes}"
            )
        unknown = set(augment or ()) - set(Augmentation.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"augment has no {sorted(unknown)[0]!r}; it has "
                f"{', '.join(Augmentation.__dataclass_fields__)}"
            )
        self.model = model
        self.networks: dict[str, nn.Module] = {"model": model}
        self.facts = dict(facts)
        self.class_names: list[str] = list(facts["class_names"])
        self.num_points, self.evaluation_points = num_points, evaluation_points
        self.point_choice: PointChoice = point_choice
        self.augment = Augmentation(**(augment or {}))
        self.label_smoothing = label_smoothing
        self.vote_scales, self.random_votes = tuple(vote_scales), random_votes

    # data

    def train_transform(self, sample: Sample) -> Sample:
        """Return some points of the sample, augmented."""
        sample = choose_points(sample, self.num_points, self.point_choice)
        return sample.with_points(self.augment(sample.points))

    def evaluation_transform(self, sample: Sample) -> Sample:
        """Return the first points of the sample, without any random choice.

        Raises:
            UserError: the cloud has fewer points than the network needs.
        """
        wanted = len(sample)
        if self.evaluation_points is not None:
            wanted = min(wanted, self.evaluation_points)
        least: int = self.model.min_points  # pyright: ignore
        if wanted < least:
            raise UserError(
                f"{sample.name}: has {len(sample)} points, the network needs at least {least}"
            )
        return choose_points(sample, wanted, "first")

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack transformed samples."""
        return collate(samples)

    def read_file(self, path: Path) -> Sample:
        """Read a cloud, or a mesh whose surface is sampled, as the data set's clouds are.

        Points come in a fixed random order, so that the first ones are spread over the object.
        A cloud is brought to the unit sphere where those of the data set are.

        Raises:
            UserError: the file is no readable cloud or mesh.
        """
        points = read_points(path, in_channels=self.facts["in_channels"], mesh_points=_MESH_POINTS)
        if self.facts.get("unit_sphere", True):
            try:
                points = normalize_to_unit_sphere(points)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from error
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(_FILE_SEED))
        return Sample(points[order], None, None, str(path))

    # evaluation

    def _probabilities(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def _vote(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return logarithms of the probabilities averaged over scales, ``None`` without votes."""
        scales = list(self.vote_scales)
        scales += (0.8 + 0.4 * torch.rand(self.random_votes)).tolist()
        if not scales:
            return None
        total = torch.zeros_like(logits)
        for scale in scales:
            points = torch.cat([batch.points[..., :3] * scale, batch.points[..., 3:]], dim=2)
            total += self._evaluated_logits(batch, points).softmax(-1)
        return (total / len(scales)).log()

    def _logits(self, batch: Batch, points: Tensor) -> Tensor:
        raise NotImplementedError

    def _evaluated_logits(self, batch: Batch, points: Tensor) -> Tensor:
        return self._logits(batch, points)


def known_targets(tensor: Tensor | None) -> Tensor:
    """Return targets of a batch, which must be known."""
    if tensor is None:
        raise ValueError("the batch has samples without a target")
    return tensor


def reported_split(splits: Splits) -> Any:
    """Return the split that the report shows."""
    split = splits.test if splits.test is not None else splits.validation
    return split if split is not None and len(split) else None


def transformed_batches(task: PointTask, split: Any, device: torch.device) -> Iterator[Batch]:
    """Yield the samples of a split in batches, in order."""
    for start in range(0, len(split), 16):
        stop = min(start + 16, len(split))
        samples = [task.evaluation_transform(split[index]) for index in range(start, stop)]
        yield task.collate(samples).to(device)
