"""Classifiers and Inception as judges of generated images: found, trained and handed over.

A task that compares images by features has the option ``judge``, one of:

- ``random``: features of fixed random convolutions, which the task has itself;
- the id of a recipe: a classifier is trained by it beside the run, once for all runs there;
- a run folder, or a folder written by :func:`eanet.hub.save_pretrained`: that classifier;
- ``inception``: the weights that the environment variable ``EANET_INCEPTION`` names;
- a file of those weights.

Rooms never import one another; this module loads the network and gives the task a function.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eanet import hub, published_file, registry
from eanet.errors import UserError
from eanet.recipe import Recipe
from eanet.recipe_file import dump_recipe, load_recipe

__all__ = [
    "ClassifierFeatures",
    "find_judge",
    "hand_over",
    "keep_judge",
    "train_judge",
    "without_training",
]

#: of a run: the classifier that judged it
_FOLDER_NAME = "judge"


class ClassifierFeatures(nn.Module):
    """A classifier of this library as a function from images within [-1, 1].

    Args:
        model: with ``forward_features`` and ``forward_head``.
        facts: what it was trained with: ``mean``, ``std``, ``in_channels`` and ``image_size``.

    Raises:
        UserError: the network gives no features, or a fact is missing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, facts: Mapping[str, Any]) -> None:
        super().__init__()
        missing = [name for name in ("mean", "std", "judge_image_size") if name not in facts]
        if missing or not hasattr(model, "forward_features"):
            what = f"its facts lack {', '.join(missing)}" if missing else "it gives no features"
            raise UserError(f"judge {type(model).__name__}: no classifier to judge by: {what}")
        self.model = model
        self.size = int(facts["judge_image_size"])
        for name in ("mean", "std"):
            values = torch.tensor(facts[name], dtype=torch.float32)
            self.register_buffer(name, values.reshape(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features and logits."""
        channels = self.mean.shape[1]
        x = (images + 1) / 2
        if x.shape[1] != channels:
            x = x.mean(dim=1, keepdim=True) if channels == 1 else x.expand(-1, channels, -1, -1)
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(
                x, size=(self.size, self.size), mode="bicubic", antialias=x.shape[2] > self.size
            )
        model: Any = self.model
        tokens = model.forward_features((x.clamp(0, 1) - self.mean) / self.std)
        return model.forward_head(tokens, pre_logits=True), model.forward_head(tokens)


@dataclass(frozen=True)
class _Source:
    """Where a judge is: a folder of a classifier, or a file of Inception's weights."""

    path: Path
    kind: str
    name: str


def _wanted(recipe: Recipe) -> str | None:
    """Return what a recipe's option names, ``None`` where the task looks after itself."""
    if not hasattr(registry.task(recipe.task), "use_judge"):
        return None
    judge = recipe.options.get("judge")
    return None if judge in (None, "random") else str(judge)


def train_judge(
    recipe: Recipe, folder: Path, *, train: Callable[..., Any], device: str
) -> _Source | None:
    """Return the judge of a run, trained first where the recipe names one by its own recipe.

    Args:
        recipe: of the run.
        folder: of the run; a classifier is trained in one beside it.
        train: :func:`eanet.run.train`.
        device: for the training.

    Raises:
        UserError: there is no such judge.
    """
    found = find_judge(recipe, folder)
    wanted = _wanted(recipe)
    if found is not None or wanted is None:
        return found
    if wanted not in registry.recipes():
        raise UserError(
            f"options.judge {wanted!r} is no recipe, no run folder and no file of weights; "
            "`eanet recipes` lists recipes of classifiers, 'inception' takes the weights that "
            f"{hub.INCEPTION_VARIABLE} names"
        )
    own = registry.recipe(wanted)
    if own.task != "classification":
        raise UserError(f"options.judge {wanted!r} is a recipe of {own.task}, not of a classifier")
    if own.data.name == recipe.data.name:
        own = replace(
            own,
            data=replace(own.data, root=recipe.data.root, num_workers=recipe.data.num_workers),
        )
    place = folder.parent / f"judge-{re.sub(r'[/:]', '-', wanted)}"
    stored = place / "recipe.yaml"
    # through the file's form, which knows no tuples and fills in fields that are new
    same = stored.is_file() and dump_recipe(load_recipe(stored)) == dump_recipe(own)
    finished = same and (place / "metrics.json").is_file()
    if not finished:
        train(own, place, resume=True, device=device)
    return _Source(place, "classifier", wanted)


def find_judge(recipe: Recipe, folder: Path) -> _Source | None:
    """Return the judge of a run where it is at hand, without training one.

    Raises:
        UserError: the recipe asks for Inception and its weights are not there.
    """
    wanted = _wanted(recipe)
    if wanted is None:
        return None
    kept = folder / _FOLDER_NAME
    if (kept / "config.json").is_file():
        facts = hub.read_json(kept / "config.json").get("facts", {})
        if facts.get("judge") == wanted:
            return _Source(kept, "classifier", wanted)
    if wanted == "inception":
        named = hub.inception_file()
        if named is None:
            raise UserError(
                "options.judge is 'inception', whose weights are not part of this package: set "
                f"{hub.INCEPTION_VARIABLE} to their file (pt_inception-2015-12-05-6726825d.pth), "
                "give it as --options.judge FILE, or judge by a classifier of this package: "
                "--options.judge RECIPE or RUN"
            )
        return _Source(named, "inception", "Inception-v3 of FID")
    path = Path(wanted)
    if path.is_file():
        return _Source(path, "inception", "Inception-v3 of FID")
    if any((path / name).is_file() for name in ("recipe.yaml", "config.json")):
        return _Source(path, "classifier", wanted)
    return None


def without_training(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe judged by random features where its own judge would have to be trained."""
    if _wanted(recipe) is None or find_judge(recipe, folder) is not None:
        return recipe
    return replace(recipe, options={**recipe.options, "judge": "random"})


def hand_over(task: Any, source: _Source | None, *, load: Callable[..., nn.Module]) -> None:
    """Load a judge and give it to a task.

    Args:
        task: with ``use_judge(network, kind, name, num_classes)`` where there is a source.
        source: what :func:`train_judge` or :func:`find_judge` returned; nothing for ``None``.
        load: :func:`eanet.run.load`.

    Raises:
        UserError: the judge cannot be read, or is of no use.
    """
    if source is None:
        return
    if source.kind == "inception":
        from eanet.tasks.generation.inception import inception_of

        _check_digest(source.path)
        tensors = published_file.read_checkpoint(source.path).tensors
        network: nn.Module = inception_of(tensors, source=str(source.path))
        task.use_judge(network, kind="inception", name=source.name, num_classes=1008)
        return
    model, facts = _classifier(source.path, load)
    features = ClassifierFeatures(model, facts).eval().requires_grad_(False)
    task.use_judge(
        features, kind="classifier", name=source.name, num_classes=int(facts["num_classes"])
    )


def keep_judge(source: _Source | None, folder: Path, *, load: Callable[..., nn.Module]) -> None:
    """Store the classifier that judges a run inside its folder, so that the run is complete."""
    if source is None or source.kind != "classifier" or source.path == folder / _FOLDER_NAME:
        return
    model, facts = _classifier(source.path, load)
    hub.save_pretrained(model, folder / _FOLDER_NAME, **facts, judge=source.name)


def _classifier(path: Path, load: Callable[..., nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a classifier and what it was trained with."""
    model = load(path)
    facts: dict[str, Any] = dict(getattr(model, "facts", {}))
    if (path / "recipe.yaml").is_file():
        facts = hub.read_json(path / "facts.json")
        facts["judge_image_size"] = load_recipe(path / "recipe.yaml").options.get("image_size", 224)
    facts.pop("judge", None)
    facts.setdefault("num_classes", len(facts.get("class_names", ())))
    return model, facts


def _check_digest(path: Path) -> None:
    """Compare a file with the start of the SHA-256 that its name may hold.

    Raises:
        UserError: the file is missing, or has another one.
    """
    if not path.is_file():
        raise UserError(f"Inception weights: there is no file {str(path)!r}")
    named = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if named is not None and not digest.startswith(named[1]):
        raise UserError(
            f"{path}: damaged or renamed: its SHA-256 starts with {digest[:8]}, not {named[1]}"
        )
