"""Published checkpoints of PCT become networks of this package.

Which network a file holds is read from the names and shapes of its tensors, see
:mod:`eanet.tasks.pointcloud.published_keys`.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eanet import registry
from eanet.errors import UserError
from eanet.published_file import Checkpoint
from eanet.tasks.pointcloud.pct import PartSegmenter, PointClassifier
from eanet.tasks.pointcloud.published_keys import from_published

__all__ = ["is_published", "load_published"]


def is_published(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors are of PCT by their names."""
    names = {name.removeprefix("module.") for name in tensors}
    return "conv_fuse.0.weight" in names or "seg.convs1.weight" in names


def _arguments(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Any]]:
    """Return the model's name and arguments that a file's names and shapes imply."""

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise UserError(f"{source}: not a network of PCT: it has no {name!r}")
        return tensors[name].shape

    if "seg.convs1.weight" in tensors:
        categories = shape("seg.label_conv.0.weight")[1]
        channels = shape("encoder.embedding.conv1.weight")[1]
        parts = shape("seg.convs3.weight")[0]
        name, first = "spct_parts", "encoder.sa1."
        arguments = {"num_parts": parts, "num_categories": categories, "in_channels": channels}
    else:
        first = "pt_last.sa1."
        arguments = {
            "num_classes": shape("linear3.weight")[0],
            "in_channels": shape("conv1.weight")[1],
        }
        name = "pct_position_cls" if "pt_last.pos_xyz.weight" in tensors else "pct_cls"
        middle = sum(f"pt_last.conv{number}.weight" in tensors for number in (1, 2))
        if middle != (1 if name == "pct_position_cls" else 2):
            arguments["middle_layers"] = middle
    if f"{first}mk.weight" in tensors:
        name = "eat_simple_parts" if name == "spct_parts" else "eat_cls"
        arguments["num_slots"] = shape(f"{first}mk.weight")[0]
        if f"{first}query.weight" not in tensors:
            arguments["query"] = False
    return name, arguments


def load_published(checkpoint: Checkpoint, path: Path) -> PointClassifier | PartSegmenter:
    """Build the network of a PCT checkpoint, in evaluation mode.

    Args:
        checkpoint: as :func:`eanet.published_file.read_checkpoint` gave it.
        path: the file, for errors and facts.

    Returns:
        The network; its attribute ``facts`` says where it comes from.

    Raises:
        UserError: the tensors are of another network, or one is missing or unknown.
    """
    tensors = {name.removeprefix("module."): x for name, x in checkpoint.tensors.items()}
    name, arguments = _arguments(tensors, str(path))
    model = registry.create_model(name, **arguments)
    model.load_state_dict(from_published(model, tensors, source=str(path)))
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    model.facts = {
        "num_classes": arguments.get("num_classes", arguments.get("num_categories")),
        "in_channels": arguments["in_channels"],
        "published": {
            "file": path.name,
            "sha256": digest,
            "weights": checkpoint.weights,
            **checkpoint.facts,
        },
    }
    return model.eval()
