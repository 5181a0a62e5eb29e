"""What an experiment is: typed, frozen data without torch.

A :class:`Recipe` says everything a run depends on. Variants are made with
:func:`dataclasses.replace`; the command line overrides single fields (``--optim.lr 0.01``); the run
folder stores the resolved recipe as ``recipe.yaml``.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eanet.errors import UserError

__all__ = [
    "DataSpec",
    "ModelSpec",
    "OptimSpec",
    "ParameterGroup",
    "Recipe",
    "ScheduleSpec",
    "TrainSpec",
]


def _require(valid: bool, field_name: str, given: object, allowed: str) -> None:
    """Refuse a value of a recipe, naming the field as the command line spells it."""
    if not valid:
        raise UserError(f"{field_name} must be {allowed}, got {given!r}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which network, built how.

    Args:
        name: a registered model name (``eanet models`` lists them).
        arguments: constructor arguments as JSON values, beside those the data decides
            (``num_classes``, ``in_channels``).
        init: a run folder or weights file to start from; a head of another size is re-made.
            ``backbone:FILE`` fills the backbone alone, ``backbone:timm/NAME`` with timm's weights
            of that name, which are downloaded. ``published:FILE`` fills the whole network with
            weights that others published, where its task knows their names.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    init: str | None = None

    def __post_init__(self) -> None:
        _require(bool(self.name), "model.name", self.name, "a model's name")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which samples, and how they are fed.

    Args:
        name: a registered data set of the task.
        root: its folder; ``None`` for data that needs no download.
        arguments: further arguments of the data set, as JSON values.
        batch_size: samples per optimizer step over all processes; it is divided among processes
            and accumulation steps, so a step sees the same samples however many there are.
        num_workers: loader processes per training process; 0 loads in the training process.
        validation_fraction: the share of the training samples set apart when the data set has no
            validation split of its own, so that "best" is never chosen on test samples.
    """

    name: str
    root: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    batch_size: int = 64
    num_workers: int = 0
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        fraction = self.validation_fraction
        _require(0 < fraction < 1, "data.validation_fraction", fraction, "within (0, 1)")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Optimizer settings for the parameters whose names match.

    Args:
        match: a regular expression searched in the parameter's full name; the first group that
            matches takes the parameter.
        lr_scale: factor on the learning rate.
        weight_decay: weight decay of the group; ``None`` keeps that of the optimizer.
    """

    match: str
    lr_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """The optimizer of a network.

    Args:
        name: the algorithm.
        lr: base learning rate, before the schedule.
        weight_decay: decoupled for ``adamw``, added to the gradient for ``sgd`` and ``adam``.
        betas: coefficients of ``adamw`` and ``adam``.
        eps: denominator term of ``adamw`` and ``adam``.
        momentum: of ``sgd``.
        nesterov: whether ``sgd`` uses Nesterov's momentum.
        decay_vectors: whether biases, normalization scales and other vectors are decayed too;
            memories of external attention are matrices and always are.
        clip_norm: largest norm of the gradient of the whole network; ``None`` does not clip.
        groups: settings for some parameters by name.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    decay_vectors: bool = False
    clip_norm: float | None = None
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", self.lr, "above 0")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(
            all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "within [0, 1)"
        )
        _require(self.eps > 0, "optim.eps", self.eps, "above 0")
        clip = self.clip_norm
        _require(clip is None or clip > 0, "optim.clip_norm", clip, "above 0, or null")


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """How the learning rate moves; every optimizer of a run follows the same curve.

    Args:
        name: ``constant``, ``cosine`` (to ``min_lr``), ``poly`` ((1 - t)^power) or ``step``
            (times ``gamma`` at each milestone).
        interval: whether the rate changes at every step or at the start of every epoch.
        warmup: length of the linear warm-up, in units of ``warmup_interval``; it is not added to
            the clock of the curve, which runs from 0.
        warmup_interval: as ``interval``, for the warm-up; ``None`` for the same.
        warmup_lr: learning rate at the start of the warm-up, as a share of the base rate.
        min_lr: lowest learning rate of ``cosine`` and ``poly``, as a share of the base rate.
        power: exponent of ``poly``.
        milestones: when ``step`` decays, in units of ``interval``.
        gamma: factor of ``step``.
        cooldown: units of ``interval`` at ``min_lr`` after the curve has ended, counted within
            the length of the run.
        hold: the rate is held for this many units of ``interval`` and then catches up with the
            curve; 1 follows it all the time.
    """

    name: Literal["constant", "cosine", "poly", "step"] = "cosine"
    interval: Literal["step", "epoch"] = "step"
    warmup: int = 0
    warmup_interval: Literal["step", "epoch"] | None = None
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    power: float = 0.9
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    cooldown: int = 0
    hold: int = 1

    def __post_init__(self) -> None:
        _require(self.hold >= 1, "schedule.hold", self.hold, "1 or more")
        for name in ("warmup", "cooldown"):
            value = getattr(self, name)
            _require(value >= 0, f"schedule.{name}", value, "0 or more")
        for name in ("warmup_lr", "min_lr"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"schedule.{name}", value, "a share within [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The length of a run and how it is carried out.

    Args:
        epochs: length in passes over the training samples; give this or ``steps``.
        steps: length in optimizer steps.
        seed: every random choice of the run is a function of it.
        precision: ``bfloat16`` runs the networks under autocast; parameters stay float32.
        accumulate: micro-batches per optimizer step and process.
        channels_last: whether 4-D inputs and weights are stored channels last.
        compile: whether networks go through ``torch.compile``.
        parallel: how the networks are spread over the processes of ``torchrun``.
        ema_decay: decay of the exponential moving average of the weights; 0 keeps none.
        ema_ramp: whether the decay starts low, at (1 + t) / (10 + t), so that short runs profit.
        evaluate_every: epochs between validations (the last epoch is always validated); for a
            run counted in steps, steps between them.
        checkpoint_every_seconds: time between checkpoints; one is also written after every
            validation.
        non_finite: what a loss that is not finite does: stop with an error that names the step,
            or skip the step and count it.
    """

    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    channels_last: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    ema_decay: float = 0.0
    ema_ramp: bool = True
    evaluate_every: int = 1
    checkpoint_every_seconds: float = 600.0
    non_finite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        _require(
            (self.epochs is None) != (self.steps is None),
            "train.epochs and train.steps",
            (self.epochs, self.steps),
            "one of them a number and the other null",
        )
        for name in ("epochs", "steps", "accumulate", "evaluate_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name}", value, "1 or more")
        _require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "within [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment.

    Args:
        task: a folder of ``eanet/tasks``.
        model: the network.
        data: the samples.
        options: keyword arguments of the task's constructor (image size, augmentation, losses).
        optim: the optimizer of every network without an own entry in ``optim_by_network``.
        optim_by_network: optimizers of single networks, for tasks that train several.
        schedule: the learning-rate curve.
        train: length and manner of the run.
    """

    task: str
    model: ModelSpec
    data: DataSpec
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    optim: OptimSpec = field(default_factory=OptimSpec)
    optim_by_network: dict[str, OptimSpec] = field(default_factory=dict[str, OptimSpec])
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    train: TrainSpec = field(default_factory=lambda: TrainSpec(epochs=1))

    def smoke(self, *, model: ModelSpec, data: DataSpec, options: dict[str, Any]) -> "Recipe":
        """Return the same experiment in two steps, for tests.

        Args:
            model: a tiny model of the same family.
            data: data that needs no download.
            options: task options to replace, such as a smaller image size.
        """
        return replace(
            self,
            model=model,
            data=data,
            options={**self.options, **options},
            train=replace(self.train, epochs=None, steps=2, evaluate_every=1),
        )
