"""Models for ``torch.hub``: ``torch.hub.load(REPOSITORY, "eamlp_7", source="local")``.

Every registered model is an entry point that takes the arguments of
``eanet.create_model``; ``pretrained="FOLDER"`` loads a saved folder of that model instead.
"""

import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

dependencies = ["torch", "numpy", "safetensors", "jaxtyping"]

try:
    from eanet import registry as _registry
except ModuleNotFoundError as _error:
    if _error.name != "eanet":
        raise
    # not installed: torch.hub runs this file out of the repository
    _sys.path.insert(0, str(_Path(__file__).parent / "src"))
    from eanet import registry as _registry


def _entry(name: str, summary: str) -> _Callable[..., _Any]:
    """Make the entry point of a model."""

    def build(pretrained: str | bool = False, **arguments: _Any) -> _Any:
        if pretrained is False:
            return _registry.create_model(name, **arguments)
        from eanet.errors import UserError
        from eanet.hub import from_pretrained

        if not isinstance(pretrained, str) or arguments:
            raise UserError(
                f"{name}: no weights come with this package; pretrained takes a saved folder, "
                "and no argument beside it"
            )
        model: _Any = from_pretrained(pretrained)
        if model.config["name"] != name:
            raise UserError(f"{pretrained}: holds {model.config['name']!r}, not {name!r}")
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{summary}\n\nTakes the arguments of ``eanet.create_model({name!r})``."
    return build


globals().update(
    {_name: _entry(_name, _model.summary) for _name, _model in _registry.models().items()}
)
