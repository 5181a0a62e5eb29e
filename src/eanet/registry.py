"""Names to objects, found by reading the source.

A decorator marks what can be named: ``@register_model`` on a function that builds a network,
``@register_dataset("name")`` on a class, ``@register_task`` on a task's class. :func:`models` and
its kin find them by parsing the files of :mod:`eanet.tasks` with :mod:`ast`, so that listing names
imports nothing and asking for one imports its module only. No list is kept by hand.
"""

import ast
import fnmatch
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from eanet.errors import MissingExtraError, UserError, unknown_name
from eanet.recipe import Recipe

__all__ = [
    "Entry",
    "check_arguments",
    "create_model",
    "dataset",
    "datasets",
    "demos",
    "list_models",
    "models",
    "recipe",
    "recipes",
    "register_dataset",
    "register_model",
    "register_task",
    "room_of",
    "task",
    "tasks",
]

_PACKAGE = Path(__file__).parent
_Object = TypeVar("_Object", bound=Callable[..., Any])
_Kind = Literal["model", "dataset", "task"]

#: libraries that only an extra installs, for a clear answer when one is missing
_EXTRA_OF = {
    **dict.fromkeys(
        ["torchvision", "timm", "torchmetrics", "sklearn", "PIL", "matplotlib"], "train"
    ),
    **dict.fromkeys(["faster_coco_eval", "scipy"], "train"),
    **dict.fromkeys(["jsonargparse", "yaml", "rich", "tensorboard", "psutil"], "train"),
    **dict.fromkeys(["h5py", "trimesh", "scipy"], "train"),
    **dict.fromkeys(["onnx", "onnxscript", "onnxruntime"], "export"),
    "gradio": "app",
}


def register_model(build: _Object) -> _Object:
    """Mark a function as a model of the name it bears."""
    return build


def register_dataset(name: str) -> Callable[[_Object], _Object]:
    """Mark a class as a data set of its task, under a name."""
    del name  # read from the source
    return lambda cls: cls


def register_task(cls_or_name: Any) -> Any:
    """Mark the class of a task; its name is that of its folder, unless another is given.

    A room with several tasks names the others ``<folder>_<what they do>``; data sets and models
    belong to the room, whichever of its tasks asks.
    """
    return (lambda cls: cls) if isinstance(cls_or_name, str) else cls_or_name


@dataclass(frozen=True)
class Entry:
    """Something that can be asked for by name.

    Args:
        name: what users write.
        module: where it is defined.
        attribute: its name in that module.
        task: the folder of ``eanet/tasks`` it belongs to.
        summary: the first line of its docstring.
    """

    name: str
    module: str
    attribute: str
    task: str
    summary: str

    def load(self) -> Any:
        """Import the module and return the object."""
        return getattr(import_module(self.module), self.attribute)


def import_module(name: str) -> Any:
    """Import a module; a library of an extra that is missing is answered by how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in _EXTRA_OF:
            raise MissingExtraError(library, _EXTRA_OF[library]) from error
        raise


def _marked(path: Path) -> Iterator[tuple[_Kind, str, str, str]]:
    """Yield (kind, name, attribute, summary) for the decorated definitions of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        summary = (ast.get_docstring(node) or "").partition("\n")[0]
        for decorator in node.decorator_list:
            called = decorator if isinstance(decorator, ast.Call) else None
            match ast.unparse(called.func if called else decorator).rpartition(".")[2]:
                case "register_model":
                    yield "model", node.name, node.name, summary
                case "register_task":
                    name = ast.literal_eval(called.args[0]) if called else path.parent.name
                    yield "task", name, node.name, summary
                case "register_dataset" if called:
                    yield "dataset", ast.literal_eval(called.args[0]), node.name, summary
                case _:
                    pass


@functools.cache
def _scan() -> dict[tuple[_Kind, str, str], Entry]:
    """Read every room; keys are (kind, task, name), the task left out where names are global."""
    found: dict[tuple[_Kind, str, str], Entry] = {}
    for path in sorted((_PACKAGE / "tasks").glob("*/*.py")):
        room = path.parent.name
        module = f"eanet.tasks.{room}.{path.stem}"
        for kind, name, attribute, summary in _marked(path):
            key = (kind, room if kind == "dataset" else "", name)
            if key in found:
                raise RuntimeError(
                    f"{kind} {name!r} is defined in {found[key].module} and {module}"
                )
            found[key] = Entry(name, module, attribute, room, summary)
    return found


def _entries(kind: _Kind, room: str = "") -> dict[str, Entry]:
    return {key[2]: entry for key, entry in _scan().items() if key[:2] == (kind, room)}


def models() -> dict[str, Entry]:
    """Return all models by name; imports nothing."""
    return _entries("model")


def tasks() -> dict[str, Entry]:
    """Return all tasks by name; imports nothing."""
    return _entries("task")


def room_of(task: str) -> str:
    """Return the folder of ``eanet/tasks`` that a task lives in; imports nothing."""
    known = tasks()
    return known[task].task if task in known else task


def datasets(task: str) -> dict[str, Entry]:
    """Return the data sets of a task, or of its room, by name; imports nothing."""
    return _entries("dataset", room_of(task))


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the models that match a shell pattern.

    >>> list_models("eamlp_tin*")
    ['eamlp_tiny']
    """
    return sorted(fnmatch.filter(models(), pattern))


def task(name: str) -> Any:
    """Import and return the class of a task.

    Raises:
        UserError: there is none of that name.
    """
    known = tasks()
    if name not in known:
        raise unknown_name("task", name, known)
    return known[name].load()


def dataset(task: str, name: str) -> Any:
    """Import and return a data set's class.

    Raises:
        UserError: the task has none of that name.
    """
    known = datasets(task)
    if name not in known:
        raise unknown_name(f"{task} data set", name, known)
    return known[name].load()


def create_model(name: str, **arguments: Any) -> Any:
    """Build a model by name.

    Args:
        name: one of :func:`list_models`.
        arguments: of the model's constructor, JSON values; ``num_classes`` and ``in_channels``
            are understood by every model that has them.

    Returns:
        The module; its attribute ``config`` holds the name and the arguments.

    Raises:
        UserError: the name or an argument is unknown, or a value is refused by the model.
    """
    known = models()
    if name not in known:
        raise unknown_name("model", name, known, where="`eanet models` lists all")
    build = known[name].load()
    check_arguments(f"model {name!r}", build, arguments)
    try:
        model = build(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"model {name!r}: {error}") from error
    model.config = {"name": name, "arguments": dict(arguments)}
    return model


def check_arguments(what: str, build: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuse argument names that a constructor does not take."""
    parameters = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for argument in arguments:
        if argument not in parameters:
            raise unknown_name(f"argument of {what}:", argument, parameters)


def _recipe_modules() -> Iterator[tuple[str, Any]]:
    """Yield the modules of recipes with their names."""
    for path in sorted((_PACKAGE / "recipes").glob("*.py")):
        yield path.stem, importlib.import_module(f"eanet.recipes.{path.stem}")


def recipes() -> dict[str, Recipe]:
    """Return all recipes of this package by id, ``<module>/<key>``; imports no torch."""
    return {
        f"{name}/{key}": value
        for name, module in _recipe_modules()
        for key, value in getattr(module, "RECIPES", {}).items()
    }


def demos() -> dict[str, str]:
    """Return for each task the id of the recipe that ``eanet demo`` runs (``DEMO`` of a module).

    ``DEMO`` is a key of the module's recipes, or several keys, one for each task of a room.
    """
    return {
        module.RECIPES[key].task: f"{name}/{key}"
        for name, module in _recipe_modules()
        if hasattr(module, "DEMO")
        for key in ([module.DEMO] if isinstance(module.DEMO, str) else module.DEMO)
    }


def recipe(name: str) -> Recipe:
    """Return a recipe by id, or from outside the package as ``my_package.my_recipes:NAME``.

    Raises:
        UserError: there is no such recipe.
    """
    module_name, colon, attribute = name.partition(":")
    if colon:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(f"recipe {name!r}: cannot import {module_name!r}: {error}") from error
        found = getattr(module, "RECIPES", {}).get(attribute, getattr(module, attribute, None))
        if not isinstance(found, Recipe):
            raise UserError(f"recipe {name!r}: {module_name} has no Recipe named {attribute!r}")
        return found
    known = recipes()
    if name not in known:
        raise unknown_name("recipe", name, known, where="`eanet recipes` lists all")
    return known[name]
