"""Recipes as YAML and as command-line options; imports no torch.

jsonargparse turns the typed dataclasses of :mod:`eanet.recipe` into options (``--optim.lr 0.01``)
and into YAML, and back, with every value checked against its type.
"""

import dataclasses
import difflib
import re
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eanet.errors import MissingExtraError, UserError
from eanet.recipe import Recipe

try:
    import jsonargparse
    import yaml
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "jsonargparse", "train") from error

__all__ = ["dump_recipe", "field_names", "load_recipe", "override"]


def field_names(cls: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings of a recipe, such as ``optim.lr``."""
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(types[field.name]):
            yield from field_names(types[field.name], f"{name}.")
        else:
            yield name


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML, every field written out."""
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        UserError: the file is missing, is no YAML, or a field is unknown or of the wrong type.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of fields, found {type(content).__name__}")
    try:
        return _build(content, [])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def override(recipe: Recipe, options: Sequence[str]) -> Recipe:
    """Return a recipe with single fields replaced.

    Args:
        recipe: the recipe to start from.
        options: ``--optim.lr 0.01`` or ``--optim.lr=0.01``, any number of them. ``--train.steps``
            given without ``--train.epochs`` replaces a length in epochs, and the reverse.

    Raises:
        UserError: an option is no field of a recipe, or a value has the wrong type or range.
    """
    if not options:
        return recipe
    content = _plain(dataclasses.asdict(recipe))
    given = {option.partition("=")[0] for option in options}
    for length, other in (("epochs", "steps"), ("steps", "epochs")):
        if f"--train.{length}" in given and f"--train.{other}" not in given:
            content["train"][other] = None
            # until the option is read, the length must be some number
            content["train"][length] = content["train"][length] or 1
    return _build(content, options)


def _build(content: dict[str, Any], options: Sequence[str]) -> Recipe:
    """Check a mapping and options against the types, and make the recipe."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None)
    try:
        values = parser.parse_object(content)
        values = parser.parse_args(list(options), namespace=values)
        return Recipe(**parser.instantiate(values).as_dict())
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise UserError(_explain(error)) from error


def _explain(error: Exception) -> str:
    """Say in one line what jsonargparse refused, with the nearest field for an unknown one."""
    cause: BaseException | None = error
    while cause is not None:  # a range refused by the recipe itself says it best
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    message = error.message if isinstance(error, ArgumentError) else str(error)
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: (\S+)|does not accept option '(\S+)'", message)
    if unknown:
        option = unknown[1] or unknown[2]
        name = option.lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(name, list(field_names()), n=3, cutoff=0.5)
        dashes = "--" if unknown[1] else ""
        hint = "; did you mean " + " or ".join(dashes + field for field in near) + "?"
        return f"unknown {'option' if unknown[1] else 'field'} {option!r}" + (hint if near else "")
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return message.replace('Parser key "', 'field "').replace("typing.", "")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    """Return tuples as lists, so that YAML and JSON read back what was written."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
