"""Measured runs as files: one JSON a run, from which every table of measurements is made."""

import fnmatch
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eanet import hub, registry
from eanet.engine.run_folder import write_text
from eanet.errors import UserError
from eanet.recipe import Recipe
from eanet.recipe_file import load_recipe
from eanet.recipes.paper import read_result

__all__ = ["format_results", "recipe_id", "record_run"]


def recipe_id(recipe: Recipe) -> str:
    """Return the id of the recipe that a run followed, whatever its seed, data folder and workers.

    Raises:
        UserError: no recipe is like it in every other field.
    """
    for name, known in registry.recipes().items():
        same = replace(
            known,
            train=replace(known.train, seed=recipe.train.seed),
            data=replace(known.data, root=recipe.data.root, num_workers=recipe.data.num_workers),
        )
        if _plain(same) == _plain(recipe):
            return name
    raise UserError(
        f"the run's recipe ({recipe.model.name} on {recipe.data.name}) is none of this package: "
        "a field was overridden; only runs of a recipe as it stands are recorded"
    )


def record_run(folder: str | Path, out: str | Path) -> Path:
    """Write what a finished run reached as one file of results.

    Args:
        folder: the run folder.
        out: the folder of results.

    Returns:
        The file: ``<recipe>-seed<seed>.json``, slashes of the recipe's id as dashes; of a task
        with several figures that of the first, beside ``...-<key>.json`` for the others.

    Raises:
        UserError: the folder is no finished run, or its recipe was changed by overrides.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (it has no recipe.yaml)")
    recipe = load_recipe(folder / "recipe.yaml")
    metrics = hub.read_json(folder / "metrics.json")
    environment = hub.read_json(folder / "environment.json")
    name = recipe_id(recipe)
    split = "test" if "test" in metrics else "validation"
    gpus = environment["gpus"]
    common = {
        "split": split,
        "weights": "averaged" if recipe.train.ema_decay else "raw",
        "seed": recipe.train.seed,
        "commit": environment["commit"] or "unknown",
        "hardware": ", ".join(gpus)
        if gpus
        else f"{environment['processor']}, {environment['threads']} thread(s)",
        "seconds": metrics["training"]["seconds"],
        "command": f"eanet train {name} --train.seed {recipe.train.seed}"
        + (" --data.root FOLDER" if recipe.data.root else ""),
        "metrics": {part: metrics[part] for part in ("validation", "test") if part in metrics},
        "baselines": metrics.get("baselines", {}),
        "libraries": environment["libraries"],
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for key, metric, scale in _recorded_figures(recipe, metrics[split]):
        value = metrics[split][f"ema/{key}" if recipe.train.ema_decay else key] * scale
        result = {"recipe": name, "metric": metric, "value": value, **common}
        suffix = f"-{key}" if paths else ""
        paths.append(out / f"{name.replace('/', '-')}-seed{recipe.train.seed}{suffix}.json")
        write_text(paths[-1], json.dumps(result, indent=2) + "\n")
    return paths[0]


def _recorded_figures(
    recipe: Recipe, metrics: Mapping[str, float]
) -> Sequence[tuple[str, str, float]]:
    """Return for each figure to record its key, its name with the unit, and the factor to that.

    A task whose figures depend on how they were measured says so by ``recorded_figures(recipe,
    metrics)``.
    """
    room = registry.task(recipe.task)
    if hasattr(room, "recorded_figures"):
        return room.recorded_figures(recipe, metrics)
    return [(room.best_metric, *room.published_metric)]


def format_results(folder: str | Path, recipes: str = "*") -> str:
    """Return what was measured as a Markdown table: mean and spread over the seeds.

    Args:
        folder: of the results.
        recipes: a pattern of ids as in a shell, such as ``classification_small/*``.

    Raises:
        UserError: the folder is missing, or a file in it is no result.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of results")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        if not fnmatch.fnmatchcase(result["recipe"], recipes):
            continue
        groups.setdefault((result["recipe"], result["metric"]), []).append(result)
    lines = [
        "| recipe | metric | mean | standard deviation | seeds | seconds a run | hardware |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for (recipe, metric), found in groups.items():
        values = [result["value"] for result in found]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        seconds = statistics.mean(result["seconds"] for result in found)
        hardware = ", ".join(sorted({result["hardware"] for result in found}))
        lines.append(
            f"| {recipe} | {metric} | {statistics.mean(values):.2f} | {spread} "
            f"| {len(values)} | {seconds:.0f} | {hardware} |"
        )
    return "\n".join(lines)


def _plain(recipe: Recipe) -> Any:
    """Return a recipe as JSON would give it back, lists and tuples alike."""
    return json.loads(json.dumps(asdict(recipe)))
