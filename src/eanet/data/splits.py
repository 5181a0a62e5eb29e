"""The splits of a data set, and how a validation split is carved out of the training samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from eanet import registry
from eanet.errors import UserError
from eanet.recipe import DataSpec

__all__ = [
    "Dataset",
    "Splits",
    "Subset",
    "batch_groups",
    "carve_validation",
    "open_splits",
]


class Dataset(Protocol):
    """A finite list of samples; reading one is free of random choices."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Return a sample as it is stored, before any transform."""
        ...


@dataclass
class Splits:
    """What a data set offers.

    Args:
        train: samples to learn from.
        validation: samples that choose the best checkpoint.
        test: samples that are only ever reported on; ``None`` where a data set has none.
        facts: what the data says of itself, as JSON values (``class_names``, ``in_channels``, ...).
    """

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def named(self) -> Mapping[str, Dataset]:
        """Return the splits that exist, by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


@dataclass
class Subset:
    """Some samples of a data set, by index."""

    dataset: Dataset
    indices: Sequence[int]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        """Return the sample at a position of this subset."""
        return self.dataset[self.indices[index]]


def batch_groups(dataset: Dataset) -> Sequence[int] | None:
    """Return which samples should share their batches, where a data set says so.

    A data set that has an attribute ``batch_groups``, one number for each sample, is read in
    batches of samples of one number as far as that goes: wide images by themselves, high ones by
    themselves, so that little is padded.
    """
    if isinstance(dataset, Subset):
        groups = batch_groups(dataset.dataset)
        return None if groups is None else [groups[index] for index in dataset.indices]
    return getattr(dataset, "batch_groups", None)


def carve_validation(
    labels: Sequence[int] | None, num_samples: int, fraction: float, *, seed: int
) -> tuple[list[int], list[int]]:
    """Divide sample indices into training and validation, class by class where labels are given.

    The choice is a function of the arguments alone, so that runs with other training seeds are
    compared on the same samples when they pass the same ``seed``.

    Args:
        labels: class of each sample for a stratified choice, or ``None``.
        num_samples: number of samples.
        fraction: share that becomes validation, within (0, 1); at least one sample of each class
            with two or more stays in either part.
        seed: of the choice.

    Returns:
        Sorted indices for training and for validation.

    Raises:
        ValueError: the fraction is outside (0, 1), or a split would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be within (0, 1), got {fraction}")
    if labels is not None and len(labels) != num_samples:
        raise ValueError(f"{len(labels)} labels for {num_samples} samples")
    generator = np.random.default_rng(seed)
    groups = np.zeros(num_samples, dtype=np.int64) if labels is None else np.asarray(labels)
    chosen: list[int] = []
    for group in np.unique(groups):
        members = generator.permutation(np.flatnonzero(groups == group))
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen.extend(members[:count].tolist())
    validation = sorted(chosen)
    kept = set(validation)
    train = [index for index in range(num_samples) if index not in kept]
    if not train or not validation:
        raise ValueError(f"{num_samples} samples are too few to set {fraction:.0%} of them apart")
    return train, validation


def open_splits(data: DataSpec, *, task: str, seed: int) -> Splits:
    """Open a data set; where it has no validation split, carve one out of the training samples.

    A data set whose training samples have an attribute ``labels``, one class for each, is divided
    class by class.

    Args:
        data: which, and the share of the training samples that becomes validation.
        task: whose data set is meant.
        seed: of the choice.

    Raises:
        UserError: the data set is unknown, cannot be opened or is too small to be divided.
    """
    source = registry.dataset(task, data.name)
    registry.check_arguments(f"data set {data.name!r}", source, data.arguments)
    splits: Splits = source(data.root, **data.arguments).splits
    if splits.validation is not None:
        return splits
    labels = _labels(splits.train)
    try:
        train, validation = carve_validation(
            labels, len(splits.train), data.validation_fraction, seed=seed
        )
    except ValueError as error:
        raise UserError(f"data set {data.name!r}: validation_fraction: {error}") from error
    return replace(
        splits, train=Subset(splits.train, train), validation=Subset(splits.train, validation)
    )


def _labels(dataset: Dataset) -> Sequence[int] | None:
    """Return the class of each sample where a data set knows them without decoding."""
    if isinstance(dataset, Subset):
        labels = _labels(dataset.dataset)
        return None if labels is None else [labels[index] for index in dataset.indices]
    return getattr(dataset, "labels", None)
