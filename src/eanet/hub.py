"""Networks as folders: ``config.json`` beside ``model.safetensors``; no pickle anywhere.

The configuration is the constructor's name and arguments, so a folder says by itself how to build
the network that its weights fit.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eanet._version import __version__
from eanet.errors import UserError
from eanet.registry import create_model

__all__ = ["from_pretrained", "load_weights", "read_json", "save_pretrained"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_pretrained(model: nn.Module, folder: str | Path, **facts: Any) -> Path:
    """Write a network that :func:`eanet.create_model` built.

    Args:
        model: the network; its attribute ``config`` says how it was built.
        folder: where to write; made if missing. Each file is replaced in one step.
        facts: further JSON values to keep beside it, such as ``class_names``.

    Raises:
        ValueError: the network was not built by name.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, dict):
        raise ValueError("the network has no `config`; build it with eanet.create_model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    content = {**config, "facts": facts, "eanet_version": __version__}
    partial = folder / f".{WEIGHTS_NAME}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS_NAME)
    partial = folder / f".{CONFIG_NAME}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG_NAME)
    return folder


def from_pretrained(folder: str | Path) -> nn.Module:
    """Build the network of a folder and load its weights, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    try:
        model = create_model(config["name"], **config["arguments"])
    except KeyError as error:
        raise UserError(f"{folder / CONFIG_NAME}: the field {error} is missing") from error
    load_weights(model, folder / WEIGHTS_NAME)
    model.facts = config.get("facts", {})
    return model.eval()


def load_weights(model: nn.Module, path: str | Path, *, allow_new_head: bool = False) -> list[str]:
    """Load a safetensors file into a network.

    Args:
        model: the network to fill.
        path: the file.
        allow_new_head: whether tensors whose shape differs keep their fresh values, as when a
            classifier is fine-tuned on other classes.

    Returns:
        The names of tensors that kept their fresh values.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not those of the network.
    """
    path = Path(path)
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error
    return copy_weights(model, tensors, source=str(path), allow_new_head=allow_new_head)


def copy_weights(
    model: nn.Module, tensors: dict[str, Tensor], *, source: str, allow_new_head: bool = False
) -> list[str]:
    """Copy tensors into a network by name, strictly; see :func:`load_weights`."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        name = (missing or unexpected)[0]
        what = "lacks" if missing else "has the unknown tensor"
        raise UserError(
            f"{source}: not the weights of this network: it {what} {name!r} "
            f"({len(missing)} missing, {len(unexpected)} unknown)"
        )
    fresh = [name for name, tensor in own.items() if tensors[name].shape != tensor.shape]
    if fresh and not allow_new_head:
        name = fresh[0]
        raise UserError(
            f"{source}: {name!r} has shape {tuple(tensors[name].shape)}, "
            f"the network expects {tuple(own[name].shape)}"
        )
    model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in fresh}, strict=not fresh
    )
    return fresh


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, damaged, or holds no object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
