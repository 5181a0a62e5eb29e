"""Weights that a training starts from: of a run, a saved folder, a file, or somebody else's.

``Recipe.model.init`` is one of:

- a run folder, a folder written by :func:`eanet.hub.save_pretrained`, or a safetensors file;
- ``backbone:FILE`` or ``backbone:timm/NAME``: a classifier's weights, for the backbone alone;
- ``published:FILE``: weights under the names of other code that the network itself understands.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from eanet import hub
from eanet.errors import UserError
from eanet.published_file import read_checkpoint

__all__ = ["start_from"]


def start_from(model: nn.Module, source: str, *, load: Callable[[Path], nn.Module]) -> str:
    """Load the weights a recipe starts from; a head of another size keeps its fresh values.

    Args:
        model: the network to fill.
        source: ``Recipe.model.init``, see above.
        load: opens a run folder or a saved one as a network.

    Returns:
        What was loaded and what was not, in words.

    Raises:
        UserError: the source is neither a run, a saved folder nor a safetensors file, or its
            weights are of another network.
    """
    if source.startswith("backbone:"):
        _start_backbone_from(model, source.removeprefix("backbone:"))
        return f"start from {source}"
    if source.startswith("published:"):
        _start_from_published(model, source.removeprefix("published:"))
        return f"start from {source}"
    path = Path(source)
    if path.suffix in (".pt", ".pth", ".tar", ".bin", ".ckpt"):
        raise UserError(
            f"model.init: {source!r} is no safetensors file; a published checkpoint of a "
            "classifier becomes a folder by `eanet convert`, others are named published:FILE"
        )
    if path.is_dir():
        tensors = load(path).state_dict()
        fresh = hub.copy_weights(model, tensors, source=source, allow_new_head=True)
    else:
        fresh = hub.load_weights(model, path, allow_new_head=True)
    return f"start from {source}" + (f", fresh: {', '.join(fresh)}" if fresh else "")


def _start_from_published(model: nn.Module, file: str) -> None:
    """Fill a network with weights that others published under names of their own.

    Raises:
        UserError: the network has no such counterpart, or the file is of another one.
    """
    fill = getattr(model, "load_published_weights", None)
    if fill is None:
        raise UserError(
            f"model.init: {type(model).__name__} takes no published weights; `eanet convert` "
            "reads those of classifiers"
        )
    fill(read_checkpoint(file).tensors, source=file)


def _start_backbone_from(model: nn.Module, source: str) -> None:
    """Fill ``model.backbone`` with weights of a classifier.

    Raises:
        UserError: the network has no such backbone, or the weights are of another one.
    """
    backbone = getattr(model, "backbone", None)
    fill = getattr(backbone, "load_imagenet_weights", None)
    if fill is None:
        raise UserError(
            f"model.init: {type(model).__name__} has no backbone that takes weights by itself"
        )
    name = source.removeprefix("timm/")
    if name == source:
        fill(read_checkpoint(source).tensors, source=source)
        return
    import timm  # seconds to import

    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"model.init: timm has no model {name!r}")
    try:
        classifier = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever its download raises
        raise UserError(
            f"model.init: the weights of timm's {name} cannot be had: {error}"
        ) from error
    fill(classifier.state_dict(), source=f"timm's {name}")
