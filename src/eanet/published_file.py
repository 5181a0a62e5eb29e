"""Read the tensors of published checkpoint files without running anything in them.

The authors publish pickled files. They are read with PyTorch's restricted reader, which runs no
code of the file, and with three names allowed beside those of tensors that such files contain: a
namespace of options, and two for single numbers. Anything else is refused by name; there is no
other reader to fall back to.
"""

import argparse
import math
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eanet.errors import UserError

__all__ = ["Checkpoint", "Weights", "read_checkpoint"]

Weights = Literal["ema", "raw"]


class _NumberType:
    """Stands for ``numpy.dtype`` while a file is read: remembers a name, builds nothing."""

    def __init__(self, code: str, *rest: object) -> None:
        del rest
        self.code = str(code).lstrip("<>=|")
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _number(kind: _NumberType, data: bytes) -> float | int | bool:
    """Stand for numpy's function that rebuilds a single number, for numbers only."""
    plain = isinstance(kind, _NumberType) and re.fullmatch(r"[fiu][1248]|b1", kind.code)
    if not plain or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy value that is not a plain number")
    return np.frombuffer(data, dtype=kind.order + kind.code, count=1)[0].item()


#: every name a file may use beside those of tensors, and what stands for it
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]

#: what the reader allows is a setting of the whole process
_reading = threading.Lock()

# The readers answer damaged files with any of these.
_DAMAGE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a published file.

    Args:
        tensors: by name, a leading ``module.`` removed.
        weights: ``"ema"`` averaged, ``"raw"`` as trained, ``None`` where the file does not say.
        facts: what else it says of itself: ``arch``, ``epoch``, ``metric``.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    weights: Weights | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


def read_checkpoint(path: str | Path, *, weights: Weights | None = None) -> Checkpoint:
    """Read the tensors of a checkpoint without running anything in it.

    Args:
        path: a file of PyTorch (a checkpoint of timm's training script, or a bare dictionary of
            tensors) or of safetensors.
        weights: averaged or as trained; ``None`` takes the averaged where there are any.

    Raises:
        UserError: the file is missing, damaged, holds other things, wants something run, or does
            not have the weights asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = _unpickle(path)
    except UserError:
        raise
    except _DAMAGE as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a checkpoint: {first[:200]}") from error
    return _select(content, path, weights)


def _unpickle(path: Path) -> Any:
    """Read a file of PyTorch with the restricted reader."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                # PyTorch stores without compression; a small file could unpack to any size
                raise UserError(f"{path}: a compressed archive is not a file PyTorch has written")
    with _nothing_else_allowed():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if named is None:
                raise
            raise UserError(
                f"{path}: refused, nothing of it was run: it asks for {named[1]!r}, "
                "which a file of weights has no need of"
            ) from error


@contextmanager
def _nothing_else_allowed() -> Iterator[None]:
    """Let the restricted reader know our names alone, whatever this process has allowed it."""
    with _reading:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(_ALLOWED)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _select(content: Any, path: Path, weights: Weights | None) -> Checkpoint:
    """Find the tensors in what was read."""
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds {type(content).__name__}, expected tensors by name")
    facts: dict[str, Any] = {}
    if all(isinstance(value, Tensor) for value in content.values()):
        found, tensors = None, content
    else:
        kept: dict[Weights, Any] = {
            "ema": content.get("state_dict_ema"),
            "raw": content.get("state_dict", content.get("model")),
        }
        there: list[Weights] = [name for name, value in kept.items() if isinstance(value, Mapping)]
        if not there:
            keys = ", ".join(map(repr, list(content)[:5]))
            raise UserError(f"{path}: has no 'state_dict' (it holds {keys})")
        found = weights if weights in there else there[0]
        tensors = kept[found]
        facts = {
            name: content[name]
            for name in ("arch", "epoch", "metric")
            if isinstance(content.get(name), str | int | float)
        }
        # JSON knows no infinity and no nan
        facts = {
            name: value
            for name, value in facts.items()
            if isinstance(value, str) or math.isfinite(value)
        }
    if weights is not None and found != weights:
        only = f"{found!r} weights only" if found else "bare tensors that do not say what they are"
        raise UserError(f"{path}: {weights!r} weights were asked for, the file has {only}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r} is {type(tensor).__name__}, expected a tensor")
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > path.stat().st_size:
            # a view that repeats one stored value can claim any size
            raise UserError(
                f"{path}: {name!r} of shape {tuple(tensor.shape)} is not stored in the file"
            )
    named = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Checkpoint(named, found, facts)
