"""Train and evaluate: where data, network, task and loop meet.

A run folder holds everything a run is and has become::

    recipe.yaml        the resolved recipe; `eanet train --config` repeats the run
    model.json         the network's name and constructor arguments
    facts.json         what the data said of itself: class names, channels, mean, ...
    environment.json   versions, hardware, commit
    metrics.jsonl      one line for each logged step and validation
    metrics.json       the result: metrics of each split, seconds
    checkpoints/       see eanet.engine.checkpoint
    report.html        the page about the run
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from eanet import hub, judges, registry
from eanet._version import __version__
from eanet.data.loading import derive_seed, seed_generators
from eanet.data.splits import Splits, open_splits
from eanet.engine.distributed import Processes, join_processes
from eanet.engine.evaluation import evaluate as evaluate_task
from eanet.engine.evaluation import evaluating
from eanet.engine.progress import say
from eanet.engine.run_folder import LOCK_NAME, RunFolder, write_text
from eanet.engine.state import load_networks
from eanet.engine.task import VisualTask
from eanet.engine.trainer import Trainer
from eanet.errors import UserError, unknown_name
from eanet.recipe import Recipe
from eanet.recipe_file import dump_recipe, load_recipe, override
from eanet.report.curves import read_records, training_curves
from eanet.report.figures import picture
from eanet.report.page import Section, Table, write_page
from eanet.starting_weights import start_from

__all__ = [
    "OpenRun",
    "RunResult",
    "default_folder",
    "dry_run",
    "evaluate",
    "free_folder",
    "load",
    "load_splits",
    "open_run",
    "train",
]

RECIPE_NAME = "recipe.yaml"
MODEL_NAME = "model.json"
FACTS_NAME = "facts.json"
PAGE_NAME = "report.html"


@dataclass
class RunResult:
    """What a training run reached.

    Args:
        folder: the run folder.
        metrics: for each split the metrics of the best checkpoint, averaged weights under
            ``ema/...``, those of the newest checkpoint that a task asks for under ``last/...``;
            ``baselines`` holds simple methods on the test split.
        page: the page about the run; ``None`` on processes that write none.
    """

    folder: Path
    metrics: dict[str, dict[str, float]]
    page: Path | None = None


@dataclass
class OpenRun:
    """A run folder that was read back: everything needed to go on with it or to use it."""

    folder: RunFolder
    recipe: Recipe
    task: VisualTask

    @property
    def model(self) -> nn.Module:
        """The network, as :func:`eanet.create_model` built it."""
        return self.task.model

    def load_splits(self) -> Splits:
        """Open the run's data."""
        return load_splits(self.recipe)


def default_folder(name: str) -> Path:
    """Return the run folder of a recipe that is not given another one."""
    return Path("runs") / name.replace("/", "-").replace(":", "-")


def free_folder(folder: Path) -> Path:
    """Return a folder that does not exist yet: the one asked for, or that with a number."""
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def load_splits(recipe: Recipe) -> Splits:
    """Open the data of a recipe.

    Raises:
        UserError: the data set is unknown, or its folder is missing or damaged.
    """
    return open_splits(recipe.data, task=recipe.task, seed=recipe.train.seed)


def build_task(
    recipe: Recipe, facts: Mapping[str, Any], arguments: Mapping[str, Any]
) -> VisualTask:
    """Build the network and the task around it.

    Args:
        recipe: says which.
        facts: what the data said of itself.
        arguments: constructor arguments of the network.

    Raises:
        UserError: an option or argument is unknown or refused.
    """
    room = registry.task(recipe.task)
    model = registry.create_model(recipe.model.name, **arguments)
    registry.check_arguments(f"task {recipe.task!r} (options)", room, recipe.options)
    try:
        return room(model, facts, **recipe.options)
    except (ValueError, TypeError) as error:
        raise UserError(f"options of task {recipe.task!r}: {error}") from error


def _model_arguments(recipe: Recipe, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the data decides, overridden by what the recipe says."""
    return {**registry.task(recipe.task).model_arguments(facts), **recipe.model.arguments}


def open_run(
    folder: str | Path, *, overrides: Sequence[str] = (), needs_judge: bool = False
) -> OpenRun:
    """Read a run folder back and build its task, without loading weights.

    Args:
        folder: the run folder.
        overrides: options that replace fields of the stored recipe, such as ``--data.root``.
        needs_judge: whether the network is loaded that a task compares images by, where the task
            has one; see :mod:`eanet.judges`.

    Raises:
        UserError: the folder is no run, or one of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (it has no recipe.yaml)")
    recipe = override(load_recipe(folder / "recipe.yaml"), overrides)
    facts = hub.read_json(folder / "facts.json")
    arguments = hub.read_json(folder / "model.json").get("arguments", {})
    task = build_task(recipe, facts, arguments)
    if needs_judge:
        judges.hand_over(task, judges.find_judge(recipe, folder), load=load)
    return OpenRun(RunFolder(folder), recipe, task)


def load(
    run_or_folder: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    weights: Literal["raw", "ema"] | None = None,
) -> nn.Module:
    """Return a trained network in evaluation mode.

    Args:
        run_or_folder: a run folder, or a folder written by :func:`eanet.hub.save_pretrained`.
        checkpoint: of a run folder, the one with the best validation or the newest.
        weights: of a run folder, as trained or averaged; ``None`` takes what "best" was chosen by.

    Returns:
        The network; its attribute ``facts`` holds what the data said of itself, such as
        ``class_names``.

    Raises:
        UserError: the folder is neither, or is damaged.
    """
    folder = Path(run_or_folder)
    if not (folder / RECIPE_NAME).is_file():
        return hub.from_pretrained(folder)
    opened = open_run(folder)
    load_networks(opened.folder, opened.task.networks, which=checkpoint, weights=weights)
    facts: Any = opened.task.facts
    opened.model.facts = facts
    return opened.model.eval()


def train(
    recipe: Recipe | str,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
) -> RunResult:
    """Train a recipe, evaluate its best checkpoint, and write a page about the run.

    Args:
        recipe: a recipe or its id.
        folder: the run folder; by default under ``runs/``.
        resume: whether to continue the run in that folder where there is one.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        UserError: recipe, data or folder cannot be used; what was trained before is kept.
        Interrupted: a signal asked to stop; a checkpoint was written.
    """
    if isinstance(recipe, str):
        folder = folder or default_folder(recipe)
        recipe = registry.recipe(recipe)
    run_folder = RunFolder(folder or default_folder(f"{recipe.task}-{recipe.model.name}"))
    judge = judges.train_judge(recipe, run_folder.path, train=train, device=device)
    with join_processes(device) as processes, ExitStack() as stack:
        if processes.is_main:
            _refuse_a_used_folder(run_folder.path, resume=resume)
            stack.enter_context(run_folder.lock())
        splits = load_splits(recipe)
        arguments = _model_arguments(recipe, splits.facts)
        seed_generators(derive_seed("weights", recipe.train.seed))
        task = build_task(recipe, splits.facts, arguments)
        judges.hand_over(task, judge, load=load)
        opened = OpenRun(run_folder, recipe, task)
        # a recipe that does not fit the checkpoints is refused by fit() and must leave no trace
        starts = not run_folder.checkpoints.exists()
        if recipe.model.init is not None and starts:
            said = start_from(task.model, recipe.model.init, load=load)
            if processes.is_main:
                say(said)
        if processes.is_main and starts:
            _write_description(opened, arguments)
            judges.keep_judge(judge, run_folder.path, load=load)
        fitted = Trainer(task, recipe, run_folder, splits=splits, processes=processes).fit()
        if processes.is_main and not starts:
            _write_description(opened, arguments)
        last = _evaluate_last(opened, splits, processes)
        metrics = _evaluate_splits(opened, splits, processes, names=("validation", "test"))
        for name, found in last.items():
            metrics[name] |= found
        if not processes.is_main:
            return RunResult(run_folder.path, metrics)
        if splits.test is not None:
            metrics["baselines"] = task.baselines(splits)
        run_folder.write_json(run_folder.metrics, {**metrics, "training": fitted})
        page = _write_report(opened, splits, metrics, fitted, processes.device)
        return RunResult(run_folder.path, metrics, page)


def _write_description(opened: OpenRun, arguments: Mapping[str, Any]) -> None:
    """Write what :func:`open_run` reads back."""
    folder = opened.folder
    model = {"name": opened.recipe.model.name, "arguments": arguments}
    write_text(folder.recipe, dump_recipe(opened.recipe))
    folder.write_json(folder.path / MODEL_NAME, model)
    folder.write_json(folder.path / FACTS_NAME, opened.task.facts)


def _refuse_a_used_folder(folder: Path, *, resume: bool) -> None:
    """Protect an earlier run from being overwritten."""
    # a lock alone is what a run leaves that was refused before it started
    if not resume and folder.exists() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        raise UserError(
            f"{folder} is not empty; continue its run with --resume, or choose another with --out"
        )


def _evaluate_splits(
    opened: OpenRun,
    splits: Splits,
    processes: Processes,
    *,
    names: Sequence[str] = ("test",),
    checkpoint: Literal["best", "last"] = "best",
    inspect: Callable[[Any], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Return the metrics of splits with raw and, where kept, averaged weights (``ema/...``)."""
    recipe = opened.recipe
    results: dict[str, dict[str, float]] = {}
    kinds: list[Literal["raw", "ema"]] = ["raw", "ema"] if recipe.train.ema_decay else ["raw"]
    for weights in kinds:
        load_networks(opened.folder, opened.task.networks, which=checkpoint, weights=weights)
        for name, split in splits.named().items():
            if name not in names:
                continue
            found = evaluate_task(
                opened.task,
                split,
                batch_size=max(recipe.data.batch_size // processes.world_size, 1),
                num_workers=recipe.data.num_workers,
                processes=processes,
                seed=recipe.train.seed,
                precision=recipe.train.precision,
                channels_last=recipe.train.channels_last,
                inspect=inspect,
            )
            prefix = "ema/" if weights == "ema" else ""
            results.setdefault(name, {}).update({prefix + key: x for key, x in found.items()})
    return results


def _evaluate_last(
    opened: OpenRun, splits: Splits, processes: Processes
) -> dict[str, dict[str, float]]:
    """Return under ``last/...`` the metrics of the last step that a task wants beside the best's.

    A task names them in its attribute ``last_metrics``; few have one. They are for results that
    are usually the best of many looks, where the last is what a run can be relied on for.
    """
    wanted: Sequence[str] = getattr(opened.task, "last_metrics", ())
    if not wanted:
        return {}
    names = ("validation", "test")
    found = _evaluate_splits(opened, splits, processes, names=names, checkpoint="last")
    return {
        name: {
            f"last/{key}": value
            for key, value in metrics.items()
            if key.removeprefix("ema/") in wanted
        }
        for name, metrics in found.items()
    }


def evaluate(
    folder: str | Path,
    *,
    split: str = "test",
    checkpoint: Literal["best", "last"] = "best",
    device: str = "auto",
    overrides: Sequence[str] = (),
    predictions: Path | None = None,
) -> dict[str, float]:
    """Return the metrics of a run on one of its splits.

    Args:
        folder: the run folder.
        split: ``train``, ``validation`` or ``test``.
        checkpoint: the one with the best validation, or the newest.
        device: ``auto``, ``cpu``, ``cuda``, ...
        overrides: options that replace fields of the recipe, such as ``--data.root``.
        predictions: a file for what was predicted, as JSON, for tasks whose metrics keep it
            (detections in COCO's form); of the averaged weights where there are any.

    Returns:
        Metrics of the raw weights and, under ``ema/...``, of the averaged ones.

    Raises:
        UserError: the folder is no run, its data has no such split, or its task keeps no
            predictions.
    """
    opened = open_run(folder, overrides=overrides, needs_judge=True)
    splits = opened.load_splits()
    if split not in splits.named():
        raise unknown_name(f"split of data set {opened.recipe.data.name!r}:", split, splits.named())
    with join_processes(device) as processes:

        def keep(metrics: Any) -> None:
            if not hasattr(metrics, "results"):
                raise UserError(f"task {opened.recipe.task!r} keeps no predictions to write")
            results = metrics.results()  # collects those of all processes
            if processes.is_main and predictions is not None:
                write_text(predictions, json.dumps(results) + "\n")

        found = _evaluate_splits(
            opened,
            splits,
            processes,
            names=(split,),
            checkpoint=checkpoint,
            inspect=None if predictions is None else keep,
        )
    return found[split]


def dry_run(recipe: Recipe, *, device: str = "auto") -> str:
    """Build data and network, carry one batch through a step, and say what a run would do.

    Raises:
        UserError: what :func:`train` would refuse at its start.
    """
    with join_processes(device) as processes:
        splits = load_splits(recipe)
        recipe = judges.without_training(recipe, Path())
        task = build_task(recipe, splits.facts, _model_arguments(recipe, splits.facts))
        judges.hand_over(task, judges.find_judge(recipe, Path()), load=load)
        with TemporaryDirectory() as folder:
            short = replace(recipe.train, epochs=None, steps=1, compile=False)
            trainer = Trainer(
                task,
                replace(recipe, train=short),
                RunFolder(folder),
                splits=splits,
                processes=processes,
                quiet=True,
                tensorboard=False,
            )
            fitted = trainer.fit()
    per_epoch = trainer.plan.batches_per_epoch // task.batches_per_step
    steps = recipe.train.steps or (recipe.train.epochs or 0) * per_epoch
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    lines = {
        "model": f"{recipe.model.name}, {parameters:,} parameters",
        "data": f"{recipe.data.name}: "
        + ", ".join(f"{len(split):,} {name}" for name, split in splits.named().items()),
        "steps": f"{steps:,} of {recipe.data.batch_size} samples ({per_epoch:,} per epoch)",
        "device": str(processes.device),
        "one step": f"{fitted['seconds']:.2f} s with its validation",
    }
    return "\n".join(f"  {name:<10}{value}" for name, value in lines.items())


def _write_report(
    opened: OpenRun,
    splits: Splits,
    metrics: Mapping[str, Mapping[str, float]],
    fitted: Mapping[str, Any],
    device: torch.device,
) -> Path:
    """Write the page about a run: results, curves, and what its task has to show."""
    recipe, folder = opened.recipe, opened.folder
    load_networks(folder, opened.task.networks, which="best")
    for network in opened.task.networks.values():
        network.to(device)
    best = fitted["best"]
    curves = training_curves(
        read_records(folder.metrics_log), best_step=best["step"] if best else None
    )
    names = list(dict.fromkeys(name for found in metrics.values() for name in found))
    results = [[name, *(found.get(name) for found in metrics.values())] for name in names]
    sections = [
        Section("Results", [Table(["metric", *metrics], results)]),
        Section("Training", [picture(curves, "Losses, metrics and learning rate over the steps.")]),
    ]
    with evaluating(opened.task.networks):
        sections += opened.task.report_sections(splits, device)
    settings = [[name, str(value)] for name, value in _settings(asdict(recipe))]
    sections.append(Section("Recipe", [Table(["field", "value"], settings)]))
    facts = {
        "model": recipe.model.name,
        "parameters": f"{sum(p.numel() for p in opened.model.parameters()):,}",
        "data": recipe.data.name,
        "steps": f"{fitted['step']:,}",
        "time": f"{fitted['seconds']:.0f} s on {device.type}",
        "seed": str(recipe.train.seed),
    }
    return write_page(
        folder.path / PAGE_NAME,
        f"{recipe.model.name} on {recipe.data.name}",
        sections,
        facts=facts,
        footer=f"eanet {__version__}",
    )


def _settings(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a recipe by dotted name."""
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _settings(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
