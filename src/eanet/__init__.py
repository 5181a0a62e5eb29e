"""External attention for visual tasks (arXiv 2105.02358).

The names below are loaded when they are first used: ``import eanet`` imports no torch.
"""

from typing import TYPE_CHECKING, Any

from eanet._version import __version__

if TYPE_CHECKING:
    from eanet.nn.capture import capture_attention
    from eanet.nn.external_attention import (
        ExternalAttention,
        ExternalAttention2d,
        MultiHeadExternalAttention,
    )
    from eanet.nn.fusion import fuse
    from eanet.nn.insertion import insert_external_attention
    from eanet.nn.self_attention import SelfAttention
    from eanet.nn.streaming import stream
    from eanet.ops.attention import (
        double_normalize,
        external_attention,
        multi_head_external_attention,
    )
    from eanet.ops.attention.streaming import external_attention_streaming
    from eanet.prediction import predict
    from eanet.registry import create_model, list_models
    from eanet.run import evaluate, load, train

_MODULE_OF = {
    "ExternalAttention": "eanet.nn.external_attention",
    "ExternalAttention2d": "eanet.nn.external_attention",
    "MultiHeadExternalAttention": "eanet.nn.external_attention",
    "SelfAttention": "eanet.nn.self_attention",
    "capture_attention": "eanet.nn.capture",
    "create_model": "eanet.registry",
    "double_normalize": "eanet.ops.attention",
    "evaluate": "eanet.run",
    "external_attention": "eanet.ops.attention",
    "fuse": "eanet.nn.fusion",
    "insert_external_attention": "eanet.nn.insertion",
    "list_models": "eanet.registry",
    "load": "eanet.run",
    "multi_head_external_attention": "eanet.ops.attention",
    "external_attention_streaming": "eanet.ops.attention.streaming",
    "stream": "eanet.nn.streaming",
    "predict": "eanet.prediction",
    "train": "eanet.run",
}

__all__ = [
    "ExternalAttention",
    "ExternalAttention2d",
    "MultiHeadExternalAttention",
    "SelfAttention",
    "__version__",
    "capture_attention",
    "create_model",
    "double_normalize",
    "evaluate",
    "external_attention",
    "external_attention_streaming",
    "fuse",
    "insert_external_attention",
    "list_models",
    "load",
    "multi_head_external_attention",
    "predict",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name on its first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'eanet' has no attribute {name!r}")
    from eanet.registry import import_module

    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
