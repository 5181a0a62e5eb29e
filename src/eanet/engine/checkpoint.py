"""Checkpoints on disk: folders that are complete or not there.

A checkpoint is a folder ``step_<steps done>``. It is written beside its final name, every file is
flushed to the disk, and only then is the folder renamed. Tensors are in safetensors files, all
else in ``state.json``; ``manifest.json`` lists each file with its size and SHA-256, and bears its
own, so that a damaged byte anywhere is noticed. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor

from eanet.engine.run_folder import fsync_folder
from eanet.errors import UserError

__all__ = [
    "Checkpoint",
    "CheckpointWarning",
    "DamagedCheckpointError",
    "checkpoint_path",
    "list_checkpoints",
    "newest_intact",
    "prune_checkpoints",
    "save_checkpoint",
]

_FORMAT = 1
_NAME = re.compile(r"step_(\d{9,})")
_MANIFEST = "manifest.json"
_STATE = "state.json"


class CheckpointWarning(UserWarning):
    """Something about a checkpoint that the user should know of though the run goes on."""


class DamagedCheckpointError(UserError):
    """A file of a checkpoint is missing or not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found intact.

    Args:
        path: its folder.
        state: the content of ``state.json``.
    """

    path: Path
    state: dict[str, Any]

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> "Checkpoint":
        """Open a checkpoint, by default after checking every byte of it.

        Raises:
            DamagedCheckpointError: a file is missing or damaged; the message names it.
        """
        if verify:
            _verify(path)
        return cls(path, json.loads((path / _STATE).read_text(encoding="utf-8")))

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.state["step"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one of the tensor files that were given to :func:`save_checkpoint`."""
        return load_file(self.path / f"{name}.safetensors")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint after a number of steps lies."""
    return folder / f"step_{step:09d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, without looking into them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint; until it is complete, nothing of the earlier ones is touched.

    Args:
        folder: of all checkpoints of the run.
        tensors: file name without suffix to tensors by key; no two may share memory.
        state: JSON values; ``state["step"]`` is the number of steps done.

    Returns:
        The folder written.

    Raises:
        UserError: the disk is full or may not be written to; the message names the folder.
    """
    final = checkpoint_path(folder, state["step"])
    beside = folder / f".writing_{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir()
        for name, content in tensors.items():
            save_file(
                {key: tensor.detach().contiguous() for key, tensor in content.items()},
                beside / f"{name}.safetensors",
            )
        _write(beside / _STATE, json.dumps(state, indent=1).encode())
        _write(beside / _MANIFEST, _manifest(beside))
        for path in beside.iterdir():
            _fsync(path)
        fsync_folder(beside)
        if final.exists():
            _discard(final)
        beside.rename(final)
        fsync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        num_bytes = sum(t.nbytes for content in tensors.values() for t in content.values())
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        left = [path.name for path in list_checkpoints(folder)] or ["none"]
        raise UserError(
            f"cannot write checkpoint {final} ({num_bytes / 1e6:.1f} MB): {reason}; make room or "
            f"mend the permissions, then run again; intact checkpoints: {', '.join(left)}"
        ) from error
    return final


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(folder: Path) -> bytes:
    """Return the manifest of the files in a folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    return _sealed({"format": _FORMAT, "files": files})


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return a manifest with its own checksum, in the one spelling that is accepted."""
    body = json.dumps(content, sort_keys=True, indent=1)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "seal": seal}, sort_keys=True, indent=1).encode()


def _verify(path: Path) -> None:
    """Check the manifest, then every file it lists.

    Raises:
        DamagedCheckpointError: something is missing or differs.
    """
    manifest = path / _MANIFEST
    try:
        raw = manifest.read_bytes()
        content = json.loads(raw)
        content.pop("seal")
        intact = _sealed(content) == raw
    except OSError as error:
        raise DamagedCheckpointError(f"{manifest}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpointError(f"{manifest} is damaged: {error}") from error
    if not intact:
        raise DamagedCheckpointError(f"{manifest} is damaged: its checksum does not match")
    if content["format"] != _FORMAT:
        raise DamagedCheckpointError(
            f"{manifest}: format {content['format']} is unknown to this version of eanet"
        )
    for name, expected in content["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise DamagedCheckpointError(
                    f"{file} is damaged: {size} bytes, {expected['bytes']} were written"
                )
            if _sha256(file) != expected["sha256"]:
                raise DamagedCheckpointError(f"{file} is damaged: its SHA-256 does not match")
        except OSError as error:
            raise DamagedCheckpointError(f"{file}: {error.strerror or error}") from error


def newest_intact(folder: Path, *, set_aside: bool = False) -> Checkpoint | None:
    """Open the newest checkpoint that is intact, with a warning for each damaged one before it.

    Args:
        folder: of all checkpoints of a run.
        set_aside: whether damaged ones are renamed to ``damaged_...`` so that they are not met
            again; only for the process that owns the run folder.

    Returns:
        The checkpoint, or ``None`` where there never was one.

    Raises:
        UserError: there are checkpoints but none is intact.
    """
    damages: list[str] = []
    for path in list_checkpoints(folder):
        try:
            checkpoint = Checkpoint.open(path)
        except DamagedCheckpointError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            warnings.warn(
                f"{damage}; going on from {path.name} instead", CheckpointWarning, stacklevel=2
            )
        if set_aside:
            _set_aside(
                newer for newer in list_checkpoints(folder) if _step_of(newer) > _step_of(path)
            )
        return checkpoint
    if damages:
        raise UserError(
            f"no checkpoint in {folder} is intact: {'; '.join(damages)}; "
            "restore one from a copy, or start anew in another folder"
        )
    return None


def _set_aside(paths: Iterable[Path]) -> None:
    for path in paths:
        target = path.with_name(f"damaged_{path.name}")
        if target.exists():
            shutil.rmtree(target)
        path.rename(target)


def _discard(path: Path) -> None:
    """Delete a checkpoint so that a crash midway leaves nothing that looks like one."""
    hidden = path.with_name(f".deleting_{path.name}")
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def prune_checkpoints(folder: Path, *, best_step: int | None) -> None:
    """Delete all but the best checkpoint and the newest two, and what a crash left half done.

    Two, so that one remains should the newest turn out to be damaged.
    """
    for path in list_checkpoints(folder)[2:]:
        if _step_of(path) != best_step:
            _discard(path)
    for pattern in (".writing_*", ".deleting_*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
