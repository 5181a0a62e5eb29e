"""Published checkpoints of EAMLP, T2T-ViT and EANet become networks of this package, and back.

The configuration is read from the names and shapes of the tensors: which attention is in stem and
backbone, width, depth, heads, slots, classes, channels and size of the image.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eanet import convert_points, registry
from eanet.errors import UserError
from eanet.published_file import Checkpoint, Weights, read_checkpoint
from eanet.tasks.classification.official_keys import (
    Naming,
    from_official,
    official_keys,
    to_official,
)
from eanet.tasks.classification.positions import resize_table, sinusoid_table
from eanet.tasks.classification.t2t_vit import T2TViT
from eanet.tasks.classification.tokens_to_token import SoftSplit
from eanet.tasks.segmentation import official_keys as segmentation
from eanet.tasks.segmentation.eanet import Segmenter

__all__ = [
    "export_published",
    "from_published_tensors",
    "load_published",
    "published_arguments",
    "published_tensors",
]

#: the published networks see images through three soft splits of these sizes
_KERNELS, _STRIDES = (7, 3, 3), (4, 2, 2)
#: what published networks were evaluated with
_EVALUATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
#: 224 pixels out of 248 (T2T-ViT's settings)
_CROP_FRACTION = 0.9
#: endings that are written as PyTorch's own files; `.safetensors` is the other choice
_PICKLED_SUFFIXES = (".pth", ".pt", ".pth.tar", ".pkl")

# configuration from names and shapes


class _Shapes:
    """Shapes of a file's tensors; complaints name the file and the tensor."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.tensors, self.source = tensors, source

    def __call__(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor that must be there."""
        if name not in self.tensors:
            first = next(iter(self.tensors), "none")
            raise UserError(
                f"{self.source}: not an EAMLP or T2T-ViT: it has no {name!r} "
                f"(its first tensor is {first!r})"
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise UserError(f"{self.source}: {name!r} has the unexpected shape {shape}")
        return shape

    def first_of(self, kinds: Mapping[str, str], what: str) -> str:
        """Return which kind is present, told by one tensor each."""
        for name, kind in kinds.items():
            if name in self.tensors:
                return kind
        names = " or ".join(map(repr, kinds))
        raise UserError(f"{self.source}: not an EAMLP or T2T-ViT: no {what}, neither {names}")


_FIRST_BLOCK = "tokens_to_token.attention1."
_STEMS = {
    f"{_FIRST_BLOCK}attn.linear_2.weight": "ea in the transformer file",
    f"{_FIRST_BLOCK}attn.linear_0.weight": "ea",
    f"{_FIRST_BLOCK}kqv.weight": "performer",
    f"{_FIRST_BLOCK}attn.qkv.weight": "transformer",
}
_MIXERS = {"blocks.0.attn.trans_dims.weight": "external", "blocks.0.attn.qkv.weight": "self"}


def published_arguments(
    tensors: Mapping[str, Tensor], *, source: str, num_heads: int | None = None
) -> tuple[dict[str, Any], Naming]:
    """Return the constructor arguments that published tensors imply, and their way of naming.

    Args:
        tensors: by the authors' names; only names and shapes are looked at.
        source: what error messages call them.
        num_heads: heads of self-attention, which no shape tells; ``None`` for heads of 64
            channels.

    Raises:
        UserError: the tensors are of another network.
    """
    shapes = _Shapes(tensors, source)
    _, _, channels = shapes("cls_token", 3)
    stem = shapes.first_of(_STEMS, "stem")
    naming: Naming = "performer_file"
    arguments: dict[str, Any] = {"stem": stem}
    if stem.startswith("ea"):
        naming = "transformer_file" if stem != "ea" else "performer_file"
        key = "linear_1" if naming == "transformer_file" else "linear_0"
        # the authors' second file drops nothing in its stem
        arguments |= {
            "stem": "ea",
            "stem_num_slots": shapes(f"{_FIRST_BLOCK}attn.{key}.weight", 2)[0],
            "stem_dropout": 0.1 if naming == "performer_file" else 0.0,
        }
    patch = shapes(f"{_FIRST_BLOCK}norm1.weight", 1)[0]
    if patch % _KERNELS[0] ** 2:
        raise UserError(f"{shapes.source}: patches of {patch} values are not 7 x 7 pixels")
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in shapes.tensors]
    arguments |= {
        "in_channels": patch // _KERNELS[0] ** 2,
        "num_classes": shapes("head.weight", 2)[0] if "head.weight" in shapes.tensors else 0,
        "channels": channels,
        "depth": len({number[1] for number in numbers if number}),
        "mlp_ratio": shapes("blocks.0.mlp.fc1.weight", 2)[0] / channels,
        "stem_channels": shapes(f"{_FIRST_BLOCK}norm2.weight", 1)[0],
        "mixer": shapes.first_of(_MIXERS, "attention in the first block"),
    }
    return arguments | _detect_heads(shapes, arguments, num_heads), naming


def _detect_heads(
    shapes: _Shapes, arguments: Mapping[str, Any], num_heads: int | None
) -> dict[str, int]:
    """Return heads, slots and expansion of the backbone's attention."""
    channels = arguments["channels"]
    if arguments["mixer"] == "self":
        # the only number that no shape tells; all published networks have heads of 64 channels
        if num_heads is None and channels % 64:
            raise UserError(
                f"{shapes.source}: the heads of self-attention on {channels} channels are not "
                "known from the file; give num_heads (--num-heads)"
            )
        return {"num_heads": num_heads or channels // 64}
    width = shapes("blocks.0.attn.trans_dims.weight", 2)[0]
    num_slots, head_width = shapes("blocks.0.attn.linear_0.weight", 2)
    if width % channels or width % head_width:
        raise UserError(
            f"{shapes.source}: 'blocks.0.attn.trans_dims.weight' gives {width} channels, "
            f"no multiple of the width {channels} and of {head_width} per head"
        )
    found = width // head_width
    if num_heads not in (None, found):
        raise UserError(f"{shapes.source}: has {found} heads, num_heads={num_heads} was given")
    return {"num_heads": found, "num_slots": num_slots, "expansion": width // channels}


#: names of registered models by stem and mixer, for the three published sizes
_NAMES = {
    ("ea", "external"): ("eamlp_{}", "eamlp_{}_*"),
    ("ea", "self"): ("t2t_vit_{}_ea",),
    ("performer", "self"): ("t2t_vit_{}", "t2t_vit_{}_h1"),
    ("performer", "external"): ("t2t_vit_{}_mea", "t2t_vit_{}_mea_*"),
    ("transformer", "self"): ("t2t_vit_t_{}",),
}


def _candidates(arguments: Mapping[str, Any]) -> list[str]:
    """Return names of registered models that may be the one of a file, the likeliest first."""
    patterns = _NAMES.get((arguments["stem"], arguments["mixer"]), ())
    return [
        name
        for pattern in patterns
        for name in registry.list_models(pattern.format(arguments["depth"]))
        if not name.endswith("_tiny")
    ]


def _build(arguments: dict[str, Any], size: dict[str, Any]) -> T2TViT:
    """Build the network under the registered name that fits it with the fewest arguments."""
    outer = {name: arguments[name] for name in ("num_classes", "in_channels")} | size
    outer |= {"stem_dropout": 0.0} if arguments.get("stem_dropout") == 0.0 else {}
    wanted = registry.create_model("eamlp_7", **arguments, **size)
    for name in _candidates(arguments):
        model = registry.create_model(name, **outer)
        if _sizes(model) == _sizes(wanted):
            return model
    return wanted


def _sizes(model: T2TViT) -> tuple[Any, ...]:
    """Return what tells two networks apart: all shapes, and heads that are in no shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, [getattr(block.attention, "num_heads", None) for block in model.blocks]


# from and to published files


def load_published(
    path: str | Path,
    *,
    weights: Weights | None = None,
    num_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    positions: Literal["regenerate", "resize"] | None = None,
    output_stride: int | None = None,
) -> Any:
    """Build the network of a published EAMLP, T2T-ViT, EANet or PCT checkpoint, for evaluation.

    Args:
        path: the file, see :func:`eanet.published_file.read_checkpoint`.
        weights: averaged (all published accuracies are of these) or as trained; ``None`` takes
            the averaged where there are any.
        num_heads: heads of self-attention; ``None`` takes heads of 64 channels, as published.
        image_size: height and width (or one number for both) to keep a position table for;
            ``None`` for that of the file, which must then be of a square image.
        positions: rows of another image size than the file's: ``"regenerate"`` the sinusoid,
            ``"resize"`` the file's table. ``None`` regenerates where the file has the sinusoid,
            within 1e-6, and resizes where it has a table of its own.
        output_stride: of a segmentation network, which no tensor tells; ``None`` for 8, the
            authors' own setting. The three above are for classifiers alone.

    Returns:
        The network; its attribute ``facts`` says where it comes from and how published networks
        were evaluated.

    Raises:
        UserError: the file cannot be read, is of another network, or lacks or adds a tensor.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, weights=weights)
    given = {"num_heads": num_heads, "image_size": image_size, "positions": positions}
    if segmentation.is_official(checkpoint.tensors):
        _refuse_given(path, "a segmentation network", given)
        segmenter = segmentation.build_official(
            checkpoint.tensors, source=str(path), output_stride=output_stride or 8
        )
        return _described(segmenter, path, checkpoint)
    stride = {"output_stride": output_stride}
    if convert_points.is_published(checkpoint.tensors):
        _refuse_given(path, "a network for point clouds", given | stride)
        return convert_points.load_published(checkpoint, path)
    _refuse_given(path, "a classifier", stride)
    shapes = _Shapes(checkpoint.tensors, str(path))
    arguments, naming = published_arguments(
        checkpoint.tensors, source=str(path), num_heads=num_heads
    )
    table = _positions(shapes, image_size)
    is_sinusoid = bool(
        (table.rows - sinusoid_table(*table.rows.shape[1:])).abs().max().item() <= 1e-6
    )
    others = positions or ("regenerate" if is_sinusoid else "resize")
    size: dict[str, Any] = {"image_size": table.image_size}
    if others == "resize":
        size["other_grids"] = "resize"
    try:
        model = _build(arguments, size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    state = from_published_tensors(model, checkpoint.tensors, source=str(path))
    if any(tensor.dtype == torch.float64 for tensor in state.values()):
        model.double()  # float32 would round
    model.load_state_dict(state)
    return _described(model, path, checkpoint, naming=naming, crop_fraction=_CROP_FRACTION)


def _refuse_given(path: Path, what: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that mean nothing for the network of a file."""
    for name, value in arguments.items():
        if value is not None:
            raise UserError(f"{path}: holds {what}, for which {name} has no meaning")


def _described(
    model: Any,
    path: Path,
    checkpoint: Checkpoint,
    *,
    crop_fraction: float | None = None,
    **facts: Any,
) -> Any:
    """Return a network in evaluation mode that says where it comes from and what it was fed."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    evaluation: dict[str, Any] = {}
    if model.in_channels == 3:
        evaluation = dict(_EVALUATION)
        if crop_fraction is not None:
            evaluation |= {"crop_fraction": crop_fraction, "interpolation": "bicubic"}
    model.facts = {
        "num_classes": model.num_classes,
        "in_channels": model.in_channels,
        **evaluation,
        "published": {
            "file": path.name,
            "sha256": digest,
            "weights": checkpoint.weights,
            **facts,
            **checkpoint.facts,
        },
    }
    return model.eval()


@dataclass(frozen=True)
class _Table:
    """The position table of a file: rows (1, tokens, channels), its grid, the size asked for."""

    rows: Tensor
    grid: tuple[int, int]
    image_size: int | list[int]


def _positions(shapes: _Shapes, image_size: int | tuple[int, ...] | None) -> _Table:
    """Return the position table of a file, and the image size to serve."""
    _, num_tokens, _ = shapes("pos_embed", 3)
    stride = math.prod(_STRIDES)
    num_patches = num_tokens - 1
    side = math.isqrt(num_patches)
    size = stride * side if image_size is None else image_size
    asked = _grid(size)
    if math.prod(asked) == num_patches:
        grid = asked
    elif image_size is not None and side and side * side == num_patches:
        grid = (side, side)  # published networks are of square images
    else:
        raise UserError(
            f"{shapes.source}: 'pos_embed' has {num_patches} rows for patches, which is no square "
            f"grid; give the image_size it is of (--image-size)"
        )
    rows = shapes.tensors["pos_embed"]
    return _Table(rows, grid, size if isinstance(size, int) else list(size))


def _grid(size: int | tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of patches of an image."""
    height, width = (size, size) if isinstance(size, int) else size
    for kernel, stride in zip(_KERNELS, _STRIDES, strict=True):
        height, width = SoftSplit(kernel, stride).grid(height, width)
    return height, width


def _rows_for(model: T2TViT, table: _Table, others: str) -> Tensor:
    """Return a file's position table for the grid of a network."""
    grid = model.positions.grid
    if grid == table.grid:
        return table.rows
    if others == "resize":
        return resize_table(table.rows, table.grid, grid)
    return sinusoid_table(1 + math.prod(grid), table.rows.shape[2])[None]


def from_published_tensors(
    model: T2TViT, tensors: Mapping[str, Tensor], *, source: str, any_head: bool = False
) -> dict[str, Tensor]:
    """Return the state dict of a network from tensors under the authors' names.

    Args:
        model: the network to fill.
        tensors: by the authors' names. Their position table is fitted to the network's grid as
            its ``other_grids`` says.
        source: what error messages call the tensors.
        any_head: take a classifier of any size as it is, also where the network has none.

    Raises:
        UserError: a tensor too few, too many or of another shape, by name.
    """
    shapes = _Shapes(tensors, source)
    stem = shapes.first_of(_STEMS, "stem")
    naming: Naming = "transformer_file" if stem.endswith("transformer file") else "performer_file"
    keys = official_keys(model, naming=naming)
    heads = {f"head.{part}": tensors.get(f"head.{part}") for part in ("weight", "bias")}
    kept = {name: tensor for name, tensor in heads.items() if any_head and tensor is not None}
    keys = {ours: key for ours, key in keys.items() if key.name not in kept}
    table = _positions(shapes, model.input_shape[1:])
    given = {name: tensor for name, tensor in tensors.items() if name not in kept}
    given["pos_embed"] = _rows_for(model, table, model.positions.other_grids)
    named = {key.name for key in keys.values()}
    missing, unknown = sorted(named - given.keys()), sorted(given.keys() - named)
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown {unknown[0]!r}"
        raise UserError(
            f"{source}: {what} ({len(missing)} tensors missing, {len(unknown)} unknown) "
            f"for {model.config['name']}"
        )
    state = model.state_dict()
    for ours, key in keys.items():
        expected = tuple(state[ours].shape)
        expected = expected[::-1] if key.transposed else expected
        found = given[key.name]
        if tuple(found.shape) != expected or not found.is_floating_point():
            raise UserError(
                f"{source}: {key.name!r} is {found.dtype} of shape {tuple(found.shape)}, "
                f"expected floating point of shape {expected}"
            )
    return from_official(given, keys) | kept


def export_published(model: nn.Module, path: str | Path, *, naming: Naming | None = None) -> Path:
    """Write a network under the names of the authors' code.

    Args:
        model: EAMLP or T2T-ViT with a class token and layer norm, or EANet.
        path: the file: ``.pth``, ``.pth.tar``, ``.pt`` (a dictionary with ``state_dict`` and
            ``arch``) or ``.safetensors`` (the tensors alone).
        naming: which of the authors' two files names the memories of the stem; ``None`` for the
            one the network came from, else ``"performer_file"``.

    Raises:
        UserError: the authors' code has no such network, or the file's ending is another.
    """
    path = Path(path)
    is_safetensors = path.name.endswith(".safetensors")
    if not is_safetensors and not path.name.endswith(_PICKLED_SUFFIXES):
        allowed = ", ".join((".safetensors", *_PICKLED_SUFFIXES))
        raise UserError(f"{path}: the name must end in one of {allowed}")
    published = getattr(model, "facts", {}).get("published", {})
    tensors = published_tensors(model, naming or published.get("naming", "performer_file"))
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if is_safetensors:
        save_file(tensors, partial, metadata={"format": "pt"})
    else:
        config = getattr(model, "config", {})
        arch = published.get("arch", config.get("name", "T2T_ViT"))
        torch.save({"arch": arch, "state_dict": tensors}, partial)
    os.replace(partial, path)
    return path


def published_tensors(model: nn.Module, naming: Naming) -> dict[str, Tensor]:
    """Return the tensors of a network under the authors' names, see :func:`export_published`."""
    if isinstance(model, Segmenter):
        return segmentation.to_official(model.state_dict())
    if not isinstance(model, T2TViT):
        raise UserError(
            "only EAMLP, T2T-ViT and EANet were published as such files, "
            f"not {type(model).__name__}"
        )
    splits = [(split.kernel, split.stride) for split in model.stem.splits]  # pyright: ignore
    if splits != list(zip(_KERNELS, _STRIDES, strict=True)):
        raise UserError(
            "the authors' code has soft splits of kernels 7, 3, 3 and strides 4, 2, 2 only, "
            f"this network has (kernel, stride) {splits}"
        )
    try:
        keys = official_keys(model, naming=naming)
    except ValueError as error:
        raise UserError(f"cannot be exported: {error}") from error
    state = model.state_dict()
    unnamed = sorted(state.keys() - keys.keys())
    if unnamed:
        raise UserError(
            f"cannot be exported: the authors' code has no name for {unnamed[0]!r} "
            f"(and {len(unnamed) - 1} more)"
        )
    return {name: tensor.contiguous() for name, tensor in to_official(state, keys).items()}
