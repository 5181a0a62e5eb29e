"""How long a run is and how the learning rate moves, both functions of the step alone."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from eanet.errors import UserError
from eanet.recipe import ScheduleSpec, TrainSpec

__all__ = ["Timetable", "learning_rate_factor"]


@dataclass(frozen=True)
class Timetable:
    """The length of a run in steps, and where its epochs and validations fall.

    Steps are numbered from 0; ``done`` counts the steps that are complete.

    Args:
        total_steps: length of the run.
        batches_per_epoch: training batches in one pass over the samples.
        batches_per_step: training batches that one step takes.
        evaluate_every: distance of validations.
        counts_epochs: whether that distance is in epochs, otherwise in steps.
    """

    total_steps: int
    batches_per_epoch: int
    batches_per_step: int
    evaluate_every: int
    counts_epochs: bool

    @classmethod
    def of(cls, spec: TrainSpec, *, batches_per_epoch: int, batches_per_step: int) -> Self:
        """Work out the timetable of a recipe.

        Raises:
            UserError: the recipe gives both epochs and steps, neither, or a length below 1.
        """
        if (spec.epochs is None) == (spec.steps is None):
            raise UserError(
                "give the length of the run as train.epochs or as train.steps, one of them; "
                f"got epochs={spec.epochs}, steps={spec.steps}"
            )
        for name in ("epochs", "steps", "evaluate_every"):
            value = getattr(spec, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} must be at least 1, got {value}")
        if spec.steps is not None:
            total = spec.steps
        else:
            total = math.ceil((spec.epochs or 0) * batches_per_epoch / batches_per_step)
        return cls(
            total,
            batches_per_epoch,
            batches_per_step,
            spec.evaluate_every,
            counts_epochs=spec.steps is None,
        )

    def epoch(self, step: int) -> int:
        """Return the epoch that a step's first batch belongs to."""
        return step * self.batches_per_step // self.batches_per_epoch

    @property
    def total_epochs(self) -> int:
        """Number of epochs that the run touches."""
        return self.epoch(self.total_steps - 1) + 1

    def validates_after(self, done: int) -> bool:
        """Return whether a validation follows the step that makes ``done`` complete."""
        if done == self.total_steps:
            return True
        if not self.counts_epochs:
            return done % self.evaluate_every == 0
        period = self.evaluate_every
        return self.epoch(done) // period > self.epoch(done - 1) // period


def learning_rate_factor(spec: ScheduleSpec, timetable: Timetable) -> Callable[[int], float]:
    """Return the factor on the base learning rate as a function of the step.

    With time t in units of ``spec.interval``, T the length of the run less the cool-down, m the
    lowest rate as a share of the base rate and p the exponent:

    - ``cosine``: m + (1 - m) (1 + cos(pi t / T)) / 2, and m from T on
    - ``poly``: m + (1 - m) (1 - t / T)^p, and m from T on
    - ``step``: ``gamma`` to the number of milestones passed
    - ``constant``: 1

    During the warm-up the factor rises linearly from ``warmup_lr`` to 1 instead; the clock t of
    the curve is not shifted by it. With ``hold`` the clock t moves in steps of that many units.

    Raises:
        UserError: a field is out of its range.
    """
    _check(spec)
    by_epoch = spec.interval == "epoch"
    warms_by_epoch = (spec.warmup_interval or spec.interval) == "epoch"
    length = timetable.total_epochs if by_epoch else timetable.total_steps
    curve_length = length - (spec.cooldown if spec.name in ("cosine", "poly") else 0)
    milestones = sorted(spec.milestones)

    def decaying(share: float) -> float:
        return spec.min_lr + (1.0 - spec.min_lr) * share

    def factor(step: int) -> float:
        warm = timetable.epoch(step) if warms_by_epoch else step
        if warm < spec.warmup:
            return spec.warmup_lr + warm * (1.0 - spec.warmup_lr) / spec.warmup
        time = timetable.epoch(step) if by_epoch else step
        time -= time % spec.hold
        match spec.name:
            case "constant":
                return 1.0
            case "step":
                return spec.gamma ** bisect_right(milestones, time)
            case _ if time >= curve_length:
                return spec.min_lr
            case "cosine":
                return decaying(0.5 * (1.0 + math.cos(math.pi * time / curve_length)))
            case "poly":
                return decaying((1.0 - time / curve_length) ** spec.power)

    return factor


def _check(spec: ScheduleSpec) -> None:
    if spec.hold < 1:
        raise UserError(f"schedule.hold must be 1 or more, got {spec.hold}")
    for name in ("warmup", "cooldown"):
        if getattr(spec, name) < 0:
            raise UserError(f"schedule.{name} must be 0 or more, got {getattr(spec, name)}")
    for name in ("warmup_lr", "min_lr"):
        value = getattr(spec, name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"schedule.{name} is a share of the base rate in [0, 1], got {value}")
    if spec.name not in ("constant", "cosine", "poly", "step"):
        raise UserError(f"schedule.name must be constant, cosine, poly or step, got {spec.name!r}")
    if spec.warmup_interval not in ("step", "epoch", None):
        raise UserError(
            f"schedule.warmup_interval must be step, epoch or null, got {spec.warmup_interval!r}"
        )
    if spec.interval not in ("step", "epoch"):
        raise UserError(f"schedule.interval must be step or epoch, got {spec.interval!r}")
