"""The folder of a run: where its files lie, who may write to it, and what wrote them."""

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from eanet._version import __version__
from eanet.errors import UserError

__all__ = ["LOCK_NAME", "RunFolder", "environment", "fsync_folder", "write_text"]

#: the file by which a process holds a folder
LOCK_NAME = ".lock"

_LIBRARIES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "safetensors")

#: lock files held by this process: record locks do not tell its own runs apart
_held: set[Path] = set()


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; it is made when something is first written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock_depth = 0

    @property
    def recipe(self) -> Path:
        """The resolved recipe, ``recipe.yaml``."""
        return self.path / "recipe.yaml"

    @property
    def metrics_log(self) -> Path:
        """One JSON object a line: losses while training, metrics after each validation."""
        return self.path / "metrics.jsonl"

    @property
    def metrics(self) -> Path:
        """The results of the run, ``metrics.json``."""
        return self.path / "metrics.json"

    @property
    def environment(self) -> Path:
        """Versions and hardware, ``environment.json``."""
        return self.path / "environment.json"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def make(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {self.path}: {error.strerror or error}") from error

    @contextmanager
    def lock(self) -> Generator[None]:
        """Keep other processes from writing to the folder; the system frees it when we die.

        May be entered again by the same object.

        Raises:
            UserError: another process holds the folder, or it cannot be written to.
        """
        self._lock_depth += 1
        try:
            if self._lock_depth > 1:
                yield
            else:
                with self._locked():
                    yield
        finally:
            self._lock_depth -= 1

    @contextmanager
    def _locked(self) -> Generator[None]:
        self.make()
        path = (self.path / LOCK_NAME).resolve()
        if path in _held:
            raise UserError(f"run folder {self.path} is in use by another run of this process")
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"run folder {self.path}: {error.strerror or error}") from error
        with file:
            try:
                # a record lock, which belongs to this process: loader workers that outlive it for
                # some seconds after a crash do not inherit it, as they would one of flock()
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"run folder {self.path} is in use by another process ({holder}); "
                    "wait for it or choose another folder"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            _held.add(path)
            try:
                yield
            finally:
                _held.discard(path)

    def write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write a JSON file so that readers see the old content or the new, never a part.

        Raises:
            UserError: the file cannot be written; the message says why.
        """
        self.make()
        write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, safe against a crash at any moment.

    Raises:
        UserError: the file cannot be written; the old one is left as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def environment() -> dict[str, Any]:
    """Return what a result depends on beside the recipe, as JSON values."""
    return {
        "eanet": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": _without_folders(sys.argv),
    }


def _without_folders(words: Sequence[str]) -> list[str]:
    """Return a command whose absolute paths are cut to their last part: no result depends on them.

    >>> _without_folders(["/usr/bin/eanet", "bench", "--json=/home/me/block.json"])
    ['eanet', 'bench', '--json=block.json']
    """
    return [re.sub(r"(^|=)/(?:.*/)?([^/]+)/?$", r"\1\2", word) for word in words]


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, ``-dirty`` where it was changed."""
    root = Path(__file__).parents[3]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(  # noqa: S603 (fixed arguments, full path)
            [git, "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
