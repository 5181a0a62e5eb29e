"""Find reference values: every case below the golden folders, whatever its name.

Two layouts are read. A folder with a ``meta.json`` that states a ``kind`` is one case, and all its
``.safetensors`` files belong to it. A ``meta.json`` that lists many cases (under ``cases`` or
``files``) describes single files beside it. Kinds are written ``task.kind``.

A test asks for cases by kind and gets each of them in turn::

    @pytest.mark.golden("segmentation.ea_block")
    def test_block_equals_reference(golden_case): ...
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TASKS = ("classification", "segmentation", "detection", "generation", "pointcloud")


@dataclass(frozen=True)
class GoldenCase:
    """Reference values of one case.

    Args:
        kind: what it tests, such as ``segmentation.ea_block``.
        name: for messages only; no test may depend on it.
        meta: what ``meta.json`` says about this case.
        files: its files by stem: ``io``, ``weights``, or the one file of a case in a list.
        shared: the whole ``meta.json``, for values that hold for all its cases.
    """

    kind: str
    name: str
    meta: dict[str, Any] = field(repr=False)
    files: dict[str, Path] = field(repr=False)
    shared: dict[str, Any] = field(repr=False)

    def tensors(self, stem: str | None = None) -> dict[str, Tensor]:
        """Load one file, or the tensors of all files together; copies, safe to change."""
        if stem is not None:
            return load_file(self.files[stem])
        loaded: dict[str, Tensor] = {}
        for path in self.files.values():
            if path.suffix == ".safetensors":
                loaded |= load_file(path)
        return loaded

    def starting_with(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the tensors whose name starts with a prefix, under the rest of their name."""
        return {
            name.removeprefix(prefix): tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors().items()
            if name.startswith(prefix)
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of the original, as the case states them."""
        for key in ("constructor", "kwargs", "args"):
            if isinstance(self.meta.get(key), dict):
                return self.meta[key]
        return {}

    def output_tolerance(self, dtype: torch.dtype) -> dict[str, float]:
        """Return rtol and atol for results computed in a type, as the case states them."""
        name = str(dtype).removeprefix("torch.")
        if "tolerances" in self.meta:
            return dict(self.meta["tolerances"][name])
        stated = self.shared["tolerance"]
        return dict(
            stated["float64 run vs output64"]
            if dtype == torch.float64
            else stated["float32 outputs vs output64"]
        )

    def gradient_tolerance(self, dtype: torch.dtype, expected: Tensor) -> dict[str, float]:
        """Return rtol and atol for a gradient, which may depend on its size."""
        name = str(dtype).removeprefix("torch.")
        if "tolerances" in self.meta:
            return dict(self.meta["tolerances"][name])
        stated = self.shared["tolerance"]
        entry = stated[f"{name} gradients vs grad64"]
        factor = float(entry["atol"].split("*")[0])  # "1e-4 * max|grad64 of that tensor|"
        floor = stated["absolute_floor"][name]
        return {
            "rtol": entry["rtol"],
            "atol": max(factor * expected.abs().max().item(), floor),
        }

    def assert_output(self, actual: Tensor, expected: Tensor, what: str = "output") -> None:
        """Compare a result with a reference value within the stated tolerance."""
        tolerance = self.output_tolerance(actual.dtype)
        self._assert_close(actual, expected, tolerance, what)

    def assert_gradient(self, actual: Tensor | None, expected: Tensor, what: str) -> None:
        """Compare a gradient with a reference value within the stated tolerance."""
        assert actual is not None, f"{self.name}: {what} got no gradient"
        self._assert_close(actual, expected, self.gradient_tolerance(actual.dtype, expected), what)

    def _assert_close(
        self, actual: Tensor, expected: Tensor, tolerance: dict[str, float], what: str
    ) -> None:
        torch.testing.assert_close(
            actual.detach().cpu().double(),
            expected.double(),
            msg=lambda text: f"{self.kind} {self.name}, {what}: {text}",
            **tolerance,
        )


@functools.cache
def discover(folders: tuple[Path, ...]) -> tuple[GoldenCase, ...]:
    """Return every case below the folders; a case in two folders is returned once."""
    found: dict[tuple[str, str], GoldenCase] = {}
    for folder in folders:
        for path in sorted(folder.rglob("meta.json")):
            for case in _cases_of(path):
                found.setdefault((case.kind, case.name), case)
    return tuple(found.values())


def _cases_of(path: Path) -> list[GoldenCase]:
    """Return the cases that one ``meta.json`` describes."""
    meta = json.loads(path.read_text())
    folder = path.parent
    if "kind" in meta:
        files = {
            file.stem: file
            for file in sorted(folder.iterdir())
            if file.suffix in (".safetensors", ".json") and file.name != "meta.json"
        }
        return [GoldenCase(meta["kind"], meta.get("case", folder.name), meta, files, meta)]
    task = next((part for part in reversed(folder.parts) if part in TASKS), folder.name)
    entries: list[tuple[str, dict[str, Any], str]] = [
        (name, entry, entry["file"]) for name, entry in meta.get("cases", {}).items()
    ]
    entries += [(Path(file).stem, entry, file) for file, entry in meta.get("files", {}).items()]
    if "full_size" in meta:
        entry = {"kind": "full_size_logits", **meta["full_size"]}
        entries.append(("full_size_logits", entry, entry["file"]))
    entries += [
        (Path(file).stem, {"kind": Path(file).stem, "note": note}, file)
        for file, note in meta.get("other_files", {}).items()
    ]
    return [
        GoldenCase(
            _full_kind(task, entry["kind"]), name, entry, {Path(file).stem: folder / file}, meta
        )
        for name, entry, file in entries
        # a selection may leave files of a list out; the complete folders have them
        if (folder / file).exists()
    ]


def _full_kind(task: str, kind: str) -> str:
    """Return ``task.kind`` for a kind that may already name its task."""
    return kind if "." in kind else f"{task}.{kind}"
