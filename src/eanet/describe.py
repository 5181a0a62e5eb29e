"""What a model, a run or a data set is, in words and numbers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from eanet import hub, registry
from eanet.bench.cost import count_cost
from eanet.data.splits import open_splits
from eanet.errors import UserError, unknown_name
from eanet.nn.fusion import fuse
from eanet.recipe import DataSpec
from eanet.recipe_file import load_recipe

__all__ = ["DataReport", "check_data", "describe_model", "describe_run"]

#: failures listed by name before the rest is only counted
_MAX_FAILURES_SHOWN = 20


def describe_model(
    name_or_run: str, *, size: tuple[int, int] | None = None, fused: bool = False, depth: int = 2
) -> str:
    """Return parameters, multiply-adds, memory and the largest parts of a network.

    Args:
        name_or_run: a model's name, or a run folder.
        size: height and width of the input in pixels; ``None`` takes the model's own.
        fused: count the folded copy that :func:`eanet.fuse` returns.
        depth: levels of parts to list.

    Raises:
        UserError: the name is unknown, or the network takes no input of that size.
    """
    if Path(name_or_run).is_dir():
        built = hub.read_json(Path(name_or_run) / "model.json")
        name, arguments = built["name"], built["arguments"]
    else:
        name, arguments = name_or_run, {}
    model = registry.create_model(name, **arguments)
    shape = _input_shape(model, size)
    if fused:
        model = fuse(model)
    what = f"{name}{', fused' if fused else ''}, input {' x '.join(map(str, shape))}"
    return f"{what}\n\n{count_cost(model, shape).describe(depth=depth)}"


def _input_shape(model: nn.Module, size: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the shape of one sample: what the model states of itself, at the size asked for."""
    stated = getattr(model, "input_shape", None)
    if stated is None:
        raise UserError(f"{type(model).__name__} does not state an input shape")
    return (1, stated[0], *(size or stated[1:]))


def describe_run(folder: Path) -> str:
    """Return what a run folder holds: recipe, progress, results.

    Raises:
        UserError: the folder is no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: a folder without recipe.yaml is no run, and no model's name")
    recipe = load_recipe(folder / "recipe.yaml")
    lines = [f"run        {folder}", f"task       {recipe.task}", f"data       {recipe.data.name}"]
    result = folder / "metrics.json"
    if not result.is_file():
        lines.append("result     none yet; `eanet train --resume` continues it")
        return "\n".join(lines) + "\n"
    results = hub.read_json(result)
    fitted = results.pop("training", {})
    if fitted:
        lines.append(f"training   {fitted['step']:,} steps in {fitted['seconds']:.0f} s")
    for split, metrics in results.items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        lines.append(f"{split:<11}{shown}")
    return "\n".join(lines) + "\n"


@dataclass
class DataReport:
    """What a look at every sample of a data set found.

    Args:
        text: the report for people.
        failures: a line for each sample that could not be read.
    """

    text: str
    failures: list[str] = field(default_factory=list[str])


def check_data(
    name: str, root: Path | None = None, *, task: str | None = None, samples: int | None = None
) -> DataReport:
    """Open a data set and decode its samples.

    Args:
        name: a registered data set.
        root: its folder; ``None`` for data that needs no download.
        task: the task whose data set is meant; where several have one of that name, ``None``
            takes the first of them, and the report says so.
        samples: look at the first so many samples of each split only.

    Raises:
        UserError: the data set is unknown or cannot be opened at all.
    """
    tasks = [task] if task else _tasks_with(name)
    spec = DataSpec(name=name, root=None if root is None else str(root))
    splits = open_splits(spec, task=tasks[0], seed=0)
    title = f"{name}{'' if root is None else f' in {root}'}"
    if len(tasks) > 1:
        title += f", as {tasks[0]} reads it (--task takes {', '.join(tasks)})"
    lines, failures = [title], []
    for split_name, split in splits.named().items():
        count = len(split) if samples is None else min(samples, len(split))
        broken = 0
        for index in range(count):
            try:
                split[index]
            except (UserError, OSError) as error:
                broken += 1
                failures.append(f"{split_name} {index}: {error}")
        checked = "" if count == len(split) else f", {count} of them checked"
        lines.append(f"  {split_name:<12}{len(split):>8} samples{checked}, {broken} unreadable")
    lines += [f"  {key:<12}{_shorten(value)}" for key, value in splits.facts.items()]
    lines += [f"  {failure}" for failure in failures[:_MAX_FAILURES_SHOWN]]
    if len(failures) > _MAX_FAILURES_SHOWN:
        lines.append(f"  and {len(failures) - _MAX_FAILURES_SHOWN} more")
    return DataReport("\n".join(lines), failures)


def _tasks_with(name: str) -> list[str]:
    """Return the tasks that have a data set of a name."""
    # a room's further tasks share the data sets of its first, which bears its name
    rooms = [task for task in registry.tasks() if registry.room_of(task) == task]
    having = [room for room in rooms if name in registry.datasets(room)]
    if not having:
        known = {key for room in rooms for key in registry.datasets(room)}
        raise unknown_name("data set", name, known)
    return having


def _shorten(value: Any, limit: int = 90) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
