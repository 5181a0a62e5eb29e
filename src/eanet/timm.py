"""Importing this module registers every classifier with timm.

    import timm
    import eanet.timm

    model = timm.create_model("eamlp_7", num_classes=10)

timm's names for arguments are understood beside ours: ``img_size``, ``in_chans``, ``drop_rate``
(our ``dropout``), ``drop_path_rate`` and ``global_pool`` (``"token"``, ``"avg"`` or ``""``).
``features_only=True`` returns maps of patch tokens. No weights come with the package:
``pretrained=True`` needs a file, ``pretrained_cfg_overlay={"file": ...}``, ours or a published
one. A name that timm has already is left to timm; ours is then registered as ``eanet_<name>``.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from eanet import registry
from eanet.convert import from_published_tensors
from eanet.errors import UserError
from eanet.tasks.classification.t2t_vit import T2TViT

__all__ = ["default_cfgs", "registered_names"]

#: timm's names for arguments, and ours
_ARGUMENTS = {
    "img_size": "image_size",
    "in_chans": "in_channels",
    "drop_rate": "dropout",
    "drop_path_rate": "drop_path",
    "global_pool": "pool",
}
_POOLS = {"token": "cls", "": "none"}
#: the least that a preset can be built with, to ask it for its image size
_SMALLEST = {
    "channels": 1,
    "depth": 1,
    "num_heads": 1,
    "num_slots": 1,
    "expansion": 1,
    "mlp_ratio": 1.0,
    "stem_channels": 2,
    "stem_num_slots": 1,
}

#: what timm knows of each model, by the name it is registered under
default_cfgs: dict[str, Any] = {}
#: our name for each name in timm
_registered: dict[str, str] = {}


def registered_names() -> dict[str, str]:
    """Return for each name registered with timm the name in this package."""
    return dict(_registered)


def _translate(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's arguments as ours."""
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        ours = _ARGUMENTS.get(key, key)
        if ours in arguments:
            raise UserError(f"model {name!r}: {key!r} is given twice, also as {ours!r}")
        arguments[ours] = _POOLS.get(value, value) if ours == "pool" else value
    size = arguments.get("image_size")
    if isinstance(size, tuple):  # a JSON value, as `config` promises
        arguments["image_size"] = list(size)
    return arguments


def _load_filter(tensors: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Rename the tensors of a published file; ours pass as they are."""
    if "cls_token" not in tensors:
        return tensors
    assert isinstance(model, T2TViT)
    return from_published_tensors(
        model, tensors, source="the file of pretrained weights", any_head=True
    )


def _entry(name: str, registered: str, summary: str) -> Callable[..., nn.Module]:
    """Make the function timm calls to build a model."""

    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        def construct(**given: Any) -> nn.Module:
            return registry.create_model(name, **_translate(name, given))

        wanted = {
            "out_indices": arguments.pop("out_indices", 3),
            # features come from `forward_intermediates`
            "feature_cls": arguments.pop("feature_cls", "getter"),
        }
        return build_model_with_cfg(
            construct,
            registered,
            pretrained,
            pretrained_filter_fn=_load_filter,
            feature_cfg=wanted,
            **arguments,
        )

    build.__name__ = build.__qualname__ = registered
    build.__module__ = __name__
    build.__doc__ = summary
    return build


def _image_size(entry: registry.Entry) -> tuple[int, int]:
    """Return height and width a model is meant for."""
    with torch.random.fork_rng(devices=[]):
        smallest: T2TViT = entry.load()(num_classes=0, in_channels=1, **_SMALLEST)
    return smallest.input_shape[1], smallest.input_shape[2]


def _is_ours(name: str) -> bool:
    """Tell whether the model of that name in timm was registered here."""
    return inspect.unwrap(timm.models.model_entrypoint(name)).__module__ == __name__


def _register_all() -> None:
    """Register every classifier that is not registered yet."""
    for name, entry in registry.models().items():
        if entry.task != "classification":
            continue
        registered = name
        if timm.is_model(name) and not _is_ours(name):
            registered = f"eanet_{name}"
            warnings.warn(
                f"timm has a model {name!r} of its own; ours is registered as {registered!r}",
                stacklevel=2,
            )
        _registered[registered] = name
        default_cfgs.update(
            generate_default_cfgs(
                {
                    registered: PretrainedCfg(
                        input_size=(3, *_image_size(entry)),
                        crop_pct=0.9,
                        interpolation="bicubic",
                        classifier="head",
                        paper_ids="arXiv:2105.02358",
                    )
                }
            )
        )
        if not timm.is_model(registered):
            register_model(_entry(name, registered, entry.summary))
        globals()[registered] = timm.models.model_entrypoint(registered)


_register_all()
