"""Whether a run may go on from a checkpoint with the recipe it is given."""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from eanet.engine.checkpoint import CheckpointWarning
from eanet.engine.distributed import Processes
from eanet.errors import UserError
from eanet.recipe import Recipe

__all__ = ["check_continuation", "continuation_facts"]

#: another value makes the saved state meaningless
_DECISIVE = (
    "recipe.task",
    "recipe.model.name",
    "recipe.model.arguments",
    "recipe.data.name",
    "recipe.data.arguments",
    "recipe.data.batch_size",
    "recipe.data.validation_fraction",
    "recipe.optim.name",
    "recipe.train.seed",
    "num_samples",
)
#: another value changes nothing that is computed
_HARMLESS = (
    "recipe.model.init",
    "recipe.data.root",
    "recipe.data.num_workers",
    "recipe.train.checkpoint_every_seconds",
)


def continuation_facts(recipe: Recipe, *, num_samples: int, processes: Processes) -> dict[str, Any]:
    """Return what a checkpoint records for :func:`check_continuation`, as JSON values."""
    facts = {
        "recipe": dataclasses.asdict(recipe),
        "num_samples": num_samples,
        "world_size": processes.world_size,
        "device": processes.device.type,
        "torch": torch.__version__,
    }
    return json.loads(json.dumps(facts))


def check_continuation(saved: Mapping[str, Any], now: Mapping[str, Any], *, source: Path) -> None:
    """Compare what a checkpoint was made with to what goes on from it.

    A warning lists differences after which the run is no longer the one that would have been
    without the interruption.

    Raises:
        UserError: a difference that makes the saved state meaningless; the message lists it.
    """
    before, after = dict(_flat(saved)), dict(_flat(now))
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(_HARMLESS)
    ]
    listed = {
        key: f"{key.removeprefix('recipe.')} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in changed
    }
    decisive = [listed[key] for key in changed if key.startswith(_DECISIVE)]
    if decisive:
        raise UserError(
            f"{source} cannot be continued: {'; '.join(decisive)}; "
            "set this back or start anew in another folder"
        )
    if changed:
        warnings.warn(
            f"the run goes on from {source} with other settings: {'; '.join(listed.values())}",
            CheckpointWarning,
            stacklevel=3,
        )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings by dotted path."""
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[str, Any]", value).items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
