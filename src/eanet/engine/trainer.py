"""THE training loop: every task is trained by :class:`Trainer`, read from top to bottom.

A run is a function of its recipe and its data. What a step does depends on (seed, step) and on the
state that a checkpoint holds, on nothing else, so a run that was killed and continued ends with the
same bits as one that was not.
"""
# torch leaves parts of these types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from eanet.data.loading import BatchPlan, MicroBatch, TrainingBatches, derive_seed, seed_generators
from eanet.data.splits import Splits, batch_groups
from eanet.engine.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    newest_intact,
)
from eanet.engine.continuation import check_continuation, continuation_facts
from eanet.engine.distributed import Processes, exchanges_gradients, spread, whole
from eanet.engine.ema import AveragedWeights
from eanet.engine.evaluation import TrainableTask, autocast, evaluate_unless, show_progress
from eanet.engine.interruption import Interrupted, SignalWatch, watch_signals
from eanet.engine.optim import build_optimizer, set_learning_rate
from eanet.engine.progress import Journal
from eanet.engine.run_folder import RunFolder, environment
from eanet.engine.run_state import RunState, Trained
from eanet.engine.schedule import Timetable, learning_rate_factor
from eanet.engine.task import Update
from eanet.errors import UserError, unknown_name
from eanet.recipe import OptimSpec, Recipe

__all__ = ["NonFiniteLossError", "Trainer"]

#: steps that a record of the training losses averages over
_STEPS_PER_RECORD = 10
#: updates in a row that may be skipped before the run is given up
_SKIPS_IN_A_ROW = 100


class NonFiniteLossError(UserError):
    """A loss or gradient was infinite or not a number."""


class Trainer:
    """Trains the networks of a task as a recipe says.

    Args:
        task: its networks are moved to the device and trained in place.
        recipe: see its fields; ``model``, ``data.name`` and ``options`` are only recorded.
        folder: takes checkpoints, ``metrics.jsonl`` and ``environment.json``.
        splits: samples to train on and, where there are any, to choose the best checkpoint by.
        processes: of the run; ``None`` for this one on the CPU.
        quiet: whether nothing is shown.
        tensorboard: whether TensorBoard's event files are written.

    Raises:
        UserError: the recipe asks for something impossible; the message names the field.
    """

    def __init__(
        self,
        task: TrainableTask,
        recipe: Recipe,
        folder: RunFolder,
        *,
        splits: Splits,
        processes: Processes | None = None,
        quiet: bool = False,
        tensorboard: bool = True,
    ) -> None:
        self.task, self.recipe, self.folder, self.splits = task, recipe, folder, splits
        self.processes = processes or Processes()
        self.state = RunState()
        self._quiet, self._tensorboard = quiet, tensorboard
        _check(recipe, task)
        spec = recipe.train
        self.plan = BatchPlan(
            len(splits.train), recipe.data.batch_size, spec.seed, batch_groups(splits.train)
        )
        self.timetable = Timetable.of(
            spec,
            batches_per_epoch=self.plan.batches_per_epoch,
            batches_per_step=task.batches_per_step,
        )
        self._rate_factor = learning_rate_factor(recipe.schedule, self.timetable)

        #: the networks themselves, as they are saved
        self.networks = dict(task.networks)
        for network in self.networks.values():
            network.to(self.processes.device)
            if spec.channels_last:
                network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            network.train()
        self._spread = {
            name: spread(
                network,
                self.processes,
                parallel=spec.parallel,
                broadcast_buffers=len(self.networks) == 1,
            )
            for name, network in self.networks.items()
        }
        #: what the task calls while it trains, and while it is evaluated: never through DDP,
        #: whose forward pass may wait for processes that have no more batches
        self._called = self._compiled(self._spread)
        self._evaluated = self._compiled(self.networks)
        self._specs: dict[str, OptimSpec] = {
            name: recipe.optim_by_network.get(name, recipe.optim)
            for name, network in self.networks.items()
            if any(parameter.requires_grad for parameter in network.parameters())
        }
        self.optimizers = {
            name: build_optimizer(self.networks[name], own) for name, own in self._specs.items()
        }
        self.averages = (
            AveragedWeights(self.networks, decay=spec.ema_decay, ramp=spec.ema_ramp)
            if spec.ema_decay
            else None
        )
        self.trained = Trained(self.networks, self.optimizers, self.averages)

    def fit(self, *, resume: bool = True) -> dict[str, Any]:
        """Train to the end of the run, from its newest checkpoint where it has one.

        Afterwards the task's networks hold the weights of the last step;
        :func:`~eanet.engine.state.load_networks` loads the best.

        Args:
            resume: whether a run that has checkpoints is continued; otherwise it is an error.

        Returns:
            ``step``, ``seconds``, ``skipped_updates``, ``metrics`` (of the last validation) and
            ``best`` (see :class:`~eanet.engine.run_state.RunState`), as JSON values.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint has been written.
            NonFiniteLossError: a loss was not finite, and the recipe says to stop then.
            UserError: the folder is in use or of another run, the disk is full, or a sample is
                unusable.
        """
        total = self.timetable.total_steps
        with ExitStack() as stack:
            if self.processes.is_main:
                stack.enter_context(self.folder.lock())
            signals = stack.enter_context(watch_signals())
            self._restore(resume=resume)
            journal = stack.enter_context(
                Journal(
                    self.folder if self.processes.is_main else None,
                    done=self.state.step,
                    total=total,
                    batch_size=self.recipe.data.batch_size * self.task.batches_per_step,
                    tensorboard=self._tensorboard,
                    quiet=self._quiet,
                )
            )
            if self.state.step == total and not self._validation_is_due():
                journal.say(f"{self.folder.path}: the run is finished, step {total} of {total}")
                return self.state.result()
            if self.state.step:
                journal.say(f"{self.folder.path}: going on from step {self.state.step} of {total}")
            elif self.processes.is_main:
                self.folder.write_json(self.folder.environment, environment())
            self._loop(stack.enter_context(closing(self._batches())), journal, signals)
        return self.state.result()

    def _batches(self) -> Generator[MicroBatch]:
        """Return the micro-batches of this process from the current step on."""
        data = self.recipe.data
        return iter(
            TrainingBatches(
                self.splits.train,
                self.plan,
                transform=self.task.train_transform,
                collate=self.task.collate,
                start=self.state.step * self.task.batches_per_step,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
                accumulate=self.recipe.train.accumulate,
                num_workers=data.num_workers,
                pin_memory=self.processes.device.type == "cuda",
            )
        )

    def _loop(self, stream: Iterator[MicroBatch], journal: Journal, signals: SignalWatch) -> None:
        """Train, validate and save until the last step is done."""
        state, seconds_before, start = self.state, self.state.seconds, time.monotonic()
        last_save = start
        stop = False
        while state.step < self.timetable.total_steps or self._validation_is_due():
            # due at once where a run was interrupted between a step and its validation
            if not self._validation_is_due():
                self._train_step(state.step, self._micro_batches(stream))
                state.step += 1
                state.seconds = seconds_before + time.monotonic() - start
                self._record(journal)
                journal.step(state.step)
            save = time.monotonic() - last_save >= self.recipe.train.checkpoint_every_seconds
            wishes = self.processes.sum([float(signals.caught), float(save)])
            stop, save = wishes[0] > 0, wishes[1] > 0
            if not stop and self._validation_is_due():
                stop = not self._validate(journal, signals)
                state.seconds = seconds_before + time.monotonic() - start
                save = True
            if stop or save:
                self._save(journal)
                last_save = time.monotonic()
            if stop:
                raise Interrupted(
                    f"{self.folder.path}: stopped by a signal after step {state.step} of "
                    f"{self.timetable.total_steps}, saved; the same command goes on from here"
                )

    def _validation_is_due(self) -> bool:
        step = self.state.step
        return self.state.validated != step and step > 0 and self.timetable.validates_after(step)

    def _micro_batches(self, stream: Iterator[MicroBatch]) -> list[list[MicroBatch]]:
        """Return the batches of one step, micro-batch by micro-batch."""
        accumulate = self.recipe.train.accumulate
        taken = list(islice(stream, self.task.batches_per_step * accumulate))
        return [taken[part::accumulate] for part in range(accumulate)]

    # One step

    def _train_step(self, step: int, micro_batches: Sequence[Sequence[MicroBatch]]) -> None:
        """Carry out the updates of a step; each sees the weights that the one before left."""
        factor = self._rate_factor(step)
        for name, optimizer in self.optimizers.items():
            set_learning_rate(optimizer, self._specs[name], factor)
        seed = derive_seed("step", self.recipe.train.seed, step, self.processes.rank)
        seed_generators(seed, device=self.processes.device)
        buffers = self._copied_buffers()
        with self._task_calls(self._called):
            generators = [
                iter(self.task.training_step(self._on_device(batches), step))
                for batches in micro_batches
            ]
            while (computed := self._differentiate(generators)) is not None:
                name, values = computed
                if not self._may_step(name, values, step, micro_batches):
                    self._write_back(buffers)
                    self.state.skipped_updates += 1
                    self.state.skips_in_a_row += 1
                else:
                    self.optimizers[name].step()
                    self.state.skips_in_a_row = 0
                for network in self.networks.values():
                    # all of them: a generator's loss leaves gradients in the critic too
                    network.zero_grad(set_to_none=True)
        if self.averages is not None:
            self.averages.update(step)

    def _differentiate(
        self, generators: Sequence[Iterator[Update]]
    ) -> tuple[str, dict[str, Tensor]] | None:
        """Ask every micro-batch for its next update and accumulate the gradients.

        The gradients are those of the mean over the micro-batches, so that they equal the ones of
        the whole batch for losses that are means over samples.

        Returns:
            The network's name and the means of the losses and numbers, or ``None`` at the end.
        """
        names: set[str | None] = set()
        values: dict[str, Tensor] = {}
        share = 1.0 / len(generators)
        for place, generator in enumerate(generators):
            is_last = place == len(generators) - 1
            with exchanges_gradients(self._spread.values(), is_last):
                with autocast(self.processes.device, self.recipe.train.precision):
                    update = next(generator, None)
                names.add(None if update is None else update.network)
                if update is None:
                    continue
                loss = sum(
                    update.losses.values(), start=torch.zeros((), device=self.processes.device)
                )
                (loss * share).backward()
            for key, value in _named_values(update, loss).items():
                values[key] = values.get(key, 0.0) + value * share
        if len(names) != 1:
            raise RuntimeError(f"micro-batches of one step yield different updates: {names}")
        name = names.pop()
        return None if name is None else (name, values)

    def _may_step(
        self,
        name: str,
        values: dict[str, Tensor],
        step: int,
        micro_batches: Sequence[Sequence[MicroBatch]],
    ) -> bool:
        """Clip the gradients, log the numbers, and say whether the update may be carried out.

        Every process comes to the same answer.
        """
        groups = self.optimizers[name].param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise RuntimeError(f"the losses of an update of network {name!r} do not depend on it")
        values["gradient_norm"] = whole(get_total_norm(gradients))
        dtype = torch.float32 if self.processes.device.type == "mps" else torch.float64
        local = torch.stack([value.to(dtype) for value in values.values()]).tolist()
        sums = self.processes.sum(local)
        numbers = {k: v / self.processes.world_size for k, v in zip(values, sums, strict=True)}
        if not all(math.isfinite(numbers[key]) for key in ("loss", "gradient_norm")):
            self._refuse(name, numbers, step, micro_batches)
            return False
        prefix = f"{name}/" if len(self.optimizers) > 1 else ""
        self.state.add({prefix + key: number for key, number in numbers.items()})
        limit, norm = self._specs[name].clip_norm, numbers["gradient_norm"]
        if limit is not None and norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / (norm + 1e-6))
        return True

    def _refuse(
        self,
        name: str,
        numbers: Mapping[str, float],
        step: int,
        micro_batches: Sequence[Sequence[MicroBatch]],
    ) -> None:
        """Stop at an update that is not finite, unless the recipe says to skip it.

        Raises:
            NonFiniteLossError: see above, or too many updates in a row have been skipped.
        """
        skips = self.recipe.train.non_finite == "skip"
        if skips and self.state.skips_in_a_row + 1 < _SKIPS_IN_A_ROW:
            return
        record = self.folder.path / f"non_finite_rank{self.processes.rank}.json"
        samples = [key for parts in micro_batches for part in parts for key in part.samples]
        self.folder.write_json(
            record,
            {
                "step": step,
                "network": name,
                "numbers": {key: str(value) for key, value in numbers.items()},
                "epochs_and_samples": samples,
            },
        )
        shown = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        remedy = (
            f"{_SKIPS_IN_A_ROW} updates in a row were skipped"
            if skips
            else "train.non_finite=skip leaves such updates out"
        )
        raise NonFiniteLossError(
            f"step {step}: the update of network {name!r} is not finite ({shown}); {remedy}; "
            f"a lower optim.lr or optim.clip_norm may help; the samples are listed in {record}"
        )

    def _record(self, journal: Journal) -> None:
        """Log the means since the last record, every few steps."""
        state = self.state
        if state.step % _STEPS_PER_RECORD and state.step != self.timetable.total_steps:
            return
        numbers = state.take_means()
        for name in self.optimizers:
            key = f"{name}/lr" if len(self.optimizers) > 1 else "lr"
            numbers[key] = self._specs[name].lr * self._rate_factor(state.step - 1)
        numbers["epoch"] = self.timetable.epoch(state.step)
        numbers["seconds"] = state.seconds
        journal.train(state.step, numbers)

    # Networks

    def _compiled(self, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        if not self.recipe.train.compile:
            return dict(networks)
        return {name: cast("nn.Module", torch.compile(net)) for name, net in networks.items()}

    @contextmanager
    def _task_calls(self, networks: Mapping[str, nn.Module]) -> Generator[None]:
        """Let the task call other modules under the names of its networks."""
        self.task.networks.update(networks)
        try:
            yield
        finally:
            self.task.networks.update(self.networks)

    def _on_device(self, micro_batch: Sequence[MicroBatch]) -> list[Any]:
        channels_last = self.recipe.train.channels_last
        return [
            part.batch.to(self.processes.device, channels_last=channels_last)
            for part in micro_batch
        ]

    def _copied_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Return buffers beside copies, so that a skipped update leaves no trace in statistics."""
        if self.recipe.train.non_finite != "skip":
            return []
        return [(b, b.clone()) for network in self.networks.values() for b in network.buffers()]

    @torch.no_grad()
    def _write_back(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        for buffer, copy in buffers:
            buffer.copy_(copy)

    # Validation and checkpoints

    def _validate(self, journal: Journal, signals: SignalWatch) -> bool:
        """Measure the weights and their average; return whether no signal came in between."""
        metrics: dict[str, float] | None = {}
        if self.splits.validation is not None:
            metrics = self._measure(signals)
            if metrics is not None and self.averages is not None:
                with self.averages.applied():
                    averaged = self._measure(signals)
                if averaged is None:
                    return False
                metrics |= {f"ema/{key}": value for key, value in averaged.items()}
        if metrics is None:
            return False
        if metrics:
            journal.validation(self.state.step, metrics)
        self._show_progress(journal, metrics)
        self.state.note_validation(
            metrics,
            metric=self.task.best_metric,
            mode=self.task.best_mode,
            weights="raw" if self.averages is None else "ema",
        )
        return True

    def _show_progress(self, journal: Journal, metrics: Mapping[str, float]) -> None:
        """Let the task draw, with the averaged weights where there are any, and print remarks."""
        averaged = nullcontext() if self.averages is None else self.averages.applied()
        with averaged, self._task_calls(self._evaluated):
            for line in show_progress(
                self.task,
                self.folder.path,
                step=self.state.step,
                metrics=metrics,
                processes=self.processes,
            ):
                journal.say(line)

    def _measure(self, signals: SignalWatch) -> dict[str, float] | None:
        assert self.splits.validation is not None
        spec, data = self.recipe.train, self.recipe.data
        with self._task_calls(self._evaluated):
            return evaluate_unless(
                self.task,
                self.splits.validation,
                batch_size=data.batch_size // (self.processes.world_size * spec.accumulate),
                num_workers=data.num_workers,
                processes=self.processes,
                seed=spec.seed,
                precision=spec.precision,
                channels_last=spec.channels_last,
                stop=lambda: signals.caught,
            )

    def _continuation(self) -> dict[str, Any]:
        return continuation_facts(
            self.recipe, num_samples=self.plan.num_samples, processes=self.processes
        )

    def _save(self, journal: Journal) -> None:
        journal.make_durable()
        self.trained.save(
            self.state,
            self.folder,
            continuation=self._continuation(),
            processes=self.processes,
        )

    def _restore(self, *, resume: bool) -> None:
        """Take up the newest intact checkpoint, if there is one."""
        folder = self.folder.checkpoints
        if not resume and list_checkpoints(folder):
            raise UserError(
                f"{self.folder.path} holds a run already; continue it or choose another folder"
            )
        found = newest_intact(folder, set_aside=True) if self.processes.is_main else None
        step = self.processes.from_main(-1 if found is None else found.step)
        if step < 0:
            return
        checkpoint = found or Checkpoint.open(checkpoint_path(folder, step), verify=False)
        if step > self.timetable.total_steps:
            raise UserError(
                f"{checkpoint.path} is {step} steps into the run, which is to be "
                f"{self.timetable.total_steps} long; set train.steps or train.epochs higher"
            )
        check_continuation(
            checkpoint.state["continuation"], self._continuation(), source=checkpoint.path
        )
        self.state = self.trained.restore(checkpoint)


def _named_values(update: Update, loss: Tensor) -> dict[str, Tensor]:
    """Return what an update logs: the sum of its losses, each of several, and its numbers."""
    values: dict[str, Tensor | float] = {"loss": loss}
    if len(update.losses) > 1:
        values |= {key: value for key, value in update.losses.items() if key != "loss"}
    values |= update.numbers or {}
    return {
        key: torch.as_tensor(value, device=loss.device).detach() for key, value in values.items()
    }


def _check(recipe: Recipe, task: TrainableTask) -> None:
    """Refuse values that no run can be made of.

    Raises:
        UserError: the message names the field.
    """
    spec = recipe.train
    for name in recipe.optim_by_network:
        if name not in task.networks:
            raise unknown_name("network in optim_by_network:", name, task.networks)
    if spec.seed < 0:
        raise UserError(f"train.seed must be 0 or more, got {spec.seed}")
    if not 0.0 <= spec.ema_decay < 1.0:
        raise UserError(f"train.ema_decay must be within [0, 1), got {spec.ema_decay}")
    choices = {
        "precision": ("float32", "bfloat16"),
        "parallel": ("ddp", "fsdp"),
        "non_finite": ("stop", "skip"),
    }
    for name, allowed in choices.items():
        if getattr(spec, name) not in allowed:
            raise UserError(
                f"train.{name} must be {' or '.join(allowed)}, got {getattr(spec, name)!r}"
            )
