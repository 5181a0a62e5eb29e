"""Samples to batches: which sample comes when, with which random numbers, on which process.

The order of samples is a function of (seed, epoch), the random numbers of a sample's transform one
of (seed, epoch, index). Nothing is drawn from a generator that lives on between samples, so a run
can start at any batch without reading what came before, and neither the number of loader workers
nor that of training processes changes what a batch holds.
"""

import random
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from eanet.data.splits import Dataset
from eanet.errors import UserError

__all__ = [
    "BatchPlan",
    "EvaluationBatches",
    "MicroBatch",
    "TrainingBatches",
    "derive_seed",
    "seed_generators",
]

#: how many samples an error message lists before it breaks off
_SAMPLES_NAMED = 8


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return a seed of 64 bits that is a fixed function of a purpose and non-negative integers.

    The purpose keeps draws apart that would otherwise share their numbers.

    >>> derive_seed("order", 0, 1) == derive_seed("order", 0, 1)
    True
    >>> derive_seed("order", 0, 1) == derive_seed("sample", 0, 1)
    False
    """
    entropy = (int.from_bytes(purpose.encode(), "little"), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, *, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, numpy and torch.

    Args:
        seed: any integer of 64 bits.
        device: an accelerator whose generator is seeded too.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if device is None or device.type == "cpu":
        # torch.manual_seed() takes some 50 times as long where there is no accelerator to seed
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def _untouched_generators() -> Generator[None]:
    """Restore the global generators afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _single_threaded() -> ThreadPoolExecutor:
    """Return a Python thread in which torch computes without further threads.

    That is how loader workers compute. A sum that is split over several threads may differ in its
    last bit, and then batches would depend on the number of workers. The number of threads is a
    property of the calling thread; changing it to and fro in the main one would make torch build
    up its thread pools anew for every batch.
    """

    def limit() -> None:
        # a thread takes over the process's number at the first question, and later ones not
        torch.get_num_threads()
        torch.set_num_threads(1)

    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eanet-loader")
    executor.submit(limit).result()
    torch.set_num_threads(threads)
    return executor


@dataclass
class BatchPlan:
    """Which samples each training batch holds.

    Batches are numbered through all epochs. An incomplete batch at the end of an epoch is dropped.

    Args:
        num_samples: size of the training split.
        batch_size: samples of a batch over all processes and micro-batches.
        seed: of the order.
        groups: a number for each sample, so that batches are made of samples of one number. What
            is left of the groups in an epoch fills mixed batches; every batch has its full size.

    Raises:
        UserError: the split does not fill one batch.
    """

    num_samples: int
    batch_size: int
    seed: int
    groups: Sequence[int] | None = field(default=None, repr=False)
    _orders: dict[int, np.ndarray] = field(
        default_factory=dict[int, np.ndarray], init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"data.batch_size must be at least 1, got {self.batch_size}")
        if self.num_samples < self.batch_size:
            raise UserError(
                f"the training split has {self.num_samples} samples, fewer than one batch; "
                f"set data.batch_size to {self.num_samples} or less (it is {self.batch_size})"
            )
        if self.groups is not None and len(self.groups) != self.num_samples:
            raise ValueError(f"{len(self.groups)} groups for {self.num_samples} samples")

    @property
    def batches_per_epoch(self) -> int:
        """Number of full batches in one pass over the samples."""
        return self.num_samples // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of all samples in an epoch, a function of (seed, epoch).

        Sorting raw generator words is used in place of numpy's ``permutation``: numpy promises
        the words to be the same in every version, but not what its methods make of them.
        """
        if epoch not in self._orders:
            words = np.random.PCG64(derive_seed("order", self.seed, epoch))
            order = np.argsort(words.random_raw(self.num_samples), kind="stable")
            if self.groups is not None:
                order = self._grouped(order, words)
            if len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            self._orders[epoch] = order
        return self._orders[epoch]

    def _grouped(self, order: np.ndarray, words: np.random.PCG64) -> np.ndarray:
        """Return an order regrouped so that batches hold one group each, batches shuffled."""
        groups = np.asarray(self.groups)[order]
        parts = [order[groups == group] for group in np.unique(groups)]
        size = self.batch_size
        whole = [part[: len(part) // size * size].reshape(-1, size) for part in parts]
        rest = np.concatenate([part[len(part) // size * size :] for part in parts])
        # in the order of the epoch, so that what is dropped at its end is left to chance
        rest = order[np.isin(order, rest)]
        filled = len(rest) // size * size
        batches = np.concatenate([*whole, rest[:filled].reshape(-1, size)])
        shuffled = batches[np.argsort(words.random_raw(len(batches)), kind="stable")]
        return np.concatenate([shuffled.ravel(), rest[filled:]])

    def samples(self, batch: int) -> list[tuple[int, int]]:
        """Return (epoch, index) of the samples of a batch, in order."""
        epoch, position = divmod(batch, self.batches_per_epoch)
        start = position * self.batch_size
        return [(epoch, int(i)) for i in self.order(epoch)[start : start + self.batch_size]]


class _Failure(NamedTuple):
    """A sample that raised, carried out of a worker in place of its batch."""

    message: str
    by_user: bool


class _BatchReader(TorchDataset[Any]):
    """Reads, transforms and stacks the samples of a batch, each with its own random numbers."""

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[Any], Any],
        collate: Callable[[Sequence[Any]], Any],
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.collate = collate
        self.seed = seed
        self._executor: ThreadPoolExecutor | None = None

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Return one transformed sample."""
        epoch, index = key
        seed_generators(derive_seed("sample", self.seed, epoch, index))
        return self.transform(self.dataset[index])

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        """Return the batch of the samples (epoch, index), or what went wrong with which."""
        if get_worker_info() is not None:
            return self._read(keys)
        if self._executor is None:
            self._executor = _single_threaded()
        with _untouched_generators():
            return self._executor.submit(self._read, keys).result()

    def close(self) -> None:
        """Stop the thread that reads in this process, if there is one."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _read(self, keys: list[tuple[int, int]]) -> Any:
        samples: list[Any] = []
        for epoch, index in keys:
            try:
                samples.append(self[epoch, index])
            except Exception as error:
                return _failure(f"sample {index} (epoch {epoch})", error)
        try:
            return self.collate(samples)
        except Exception as error:
            return _failure(f"a batch of {_named(keys)}", error)


def _failure(what: str, error: Exception) -> _Failure:
    if isinstance(error, UserError | OSError):
        return _Failure(f"{what}: {error}", by_user=True)
    trace = "".join(traceback.format_exception(error)).rstrip()
    return _Failure(f"{what}: {type(error).__name__}: {error}\n{trace}", by_user=False)


def _named(keys: Sequence[tuple[int, int]]) -> str:
    """Return the samples as words for a message."""
    shown = ", ".join(str(index) for _, index in keys[:_SAMPLES_NAMED])
    more = f" and {len(keys) - _SAMPLES_NAMED} more" if len(keys) > _SAMPLES_NAMED else ""
    return f"samples {shown}{more}"


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    """Leave signals to the training process, which finishes its step before it stops."""
    del worker
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Batches:
    """Iterates batches whose samples are listed by :meth:`_keys`."""

    def __init__(self, reader: _BatchReader, *, num_workers: int, pin_memory: bool) -> None:
        if num_workers < 0:
            raise UserError(f"data.num_workers must be 0 or more, got {num_workers}")
        self._reader = reader
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def _keys(self) -> Iterator[list[tuple[int, int]]]:
        raise NotImplementedError

    def _loaded(self) -> Generator[tuple[list[tuple[int, int]], Any]]:
        """Yield the keys and the batch made of them; closing the generator stops the workers."""
        loader = iter(
            DataLoader(
                self._reader,
                batch_sampler=self._keys(),
                collate_fn=_as_it_is,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                worker_init_fn=_start_worker,
                # the loader seeds its workers from this generator and not from the global one
                generator=torch.Generator(),
            )
        )
        try:
            for keys in self._keys():
                yield keys, self._next(loader, keys)
        finally:
            self._reader.close()
            # a loader iterator stops its workers when it is collected; do not wait for that
            with suppress(AttributeError):
                loader._shutdown_workers()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]

    def _next(self, loader: Iterator[Any], keys: list[tuple[int, int]]) -> Any:
        try:
            batch = next(loader)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a loader worker died while {_named(keys)} were due ({error}); when memory is "
                f"short, lower data.num_workers (it is {self._num_workers}) or data.batch_size"
            ) from error
        if isinstance(batch, _Failure):
            raise UserError(batch.message) if batch.by_user else RuntimeError(batch.message)
        return batch


class MicroBatch(NamedTuple):
    """A part of a training batch.

    Args:
        batch: what the task's collate made.
        samples: (epoch, index) of the samples.
    """

    batch: Any
    samples: list[tuple[int, int]]


class TrainingBatches(_Batches):
    """The endless stream of a process's micro-batches from a given batch on.

    Each batch of the plan is cut into ``world_size * accumulate`` equal parts in order; a process
    takes ``accumulate`` neighboring ones.

    Args:
        dataset: the training split.
        plan: which samples a batch holds.
        transform: makes a stored sample ready, with random choices.
        collate: stacks transformed samples.
        start: number of the first batch; earlier ones are never read.
        rank: number of this process.
        world_size: number of processes.
        accumulate: micro-batches per batch and process.
        num_workers: loader processes; 0 loads in this one.
        pin_memory: whether batches that offer ``pin_memory()`` are put into page-locked memory.

    Raises:
        UserError: a batch cannot be cut into equal parts, or, while iterating, a sample or file
            is unusable; the message names it.
        RuntimeError: a transform is at fault, or a worker died; the message names the samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: BatchPlan,
        *,
        transform: Callable[[Any], Any],
        collate: Callable[[Sequence[Any]], Any],
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        reader = _BatchReader(dataset, transform, collate, plan.seed)
        super().__init__(reader, num_workers=num_workers, pin_memory=pin_memory)
        parts = world_size * accumulate
        if accumulate < 1:
            raise UserError(f"train.accumulate must be at least 1, got {accumulate}")
        if plan.batch_size % parts:
            raise UserError(
                f"data.batch_size {plan.batch_size} cannot be divided evenly among {world_size} "
                f"process(es) with train.accumulate {accumulate}; use a multiple of {parts}"
            )
        self._plan = plan
        self._start = start
        self._size = plan.batch_size // parts
        self._parts = range(rank * accumulate, (rank + 1) * accumulate)

    def _keys(self) -> Iterator[list[tuple[int, int]]]:
        number = self._start
        while True:
            samples = self._plan.samples(number)
            for part in self._parts:
                yield samples[part * self._size : (part + 1) * self._size]
            number += 1

    def __iter__(self) -> Generator[MicroBatch]:
        """Yield micro-batches without end; close the iterator to stop its workers."""
        for keys, batch in self._loaded():
            yield MicroBatch(batch, keys)


class EvaluationBatches(_Batches):
    """A process's share of the batches of a split, in order, the incomplete last one included.

    Whole batches are dealt out in turn, so that the same samples share a batch whatever the
    number of processes, and no sample is seen twice.

    Args:
        dataset: the split.
        transform: makes a stored sample ready, without random choices.
        collate: stacks transformed samples.
        batch_size: samples of a batch.
        rank: number of this process.
        world_size: number of processes.
        num_workers: loader processes; 0 loads in this one.
        pin_memory: whether batches that offer ``pin_memory()`` are put into page-locked memory.

    Raises:
        UserError: the split is empty, or, while iterating, a sample or file is unusable.
        RuntimeError: a transform is at fault, or a worker died; the message names the samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        transform: Callable[[Any], Any],
        collate: Callable[[Sequence[Any]], Any],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise UserError("the split to evaluate has no samples")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        reader = _BatchReader(dataset, transform, collate, seed=0)
        # more workers than batches would only cost their start
        own_batches = len(range(rank * batch_size, len(dataset), world_size * batch_size))
        workers = min(num_workers, own_batches)
        super().__init__(reader, num_workers=workers, pin_memory=pin_memory)
        self._own_batches = own_batches
        self._size = batch_size
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        """Return the number of batches of this process."""
        return self._own_batches

    def _keys(self) -> Iterator[list[tuple[int, int]]]:
        num_samples = len(self._reader.dataset)
        stride = self._world_size * self._size
        for start in range(self._rank * self._size, num_samples, stride):
            yield [(0, index) for index in range(start, min(start + self._size, num_samples))]

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        for _, batch in self._loaded():
            yield batch
