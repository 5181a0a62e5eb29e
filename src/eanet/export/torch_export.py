"""Networks as ``torch.export`` programs, with bounds of the open sizes that hold.

``torch.export`` demands for every open size the range in which the program is valid, and refuses
one in which the network would take another path: an image of a few pixels, whose grid of tokens is
1, is another program. The smallest bound that works is found here by trying.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from eanet.errors import UserError
from eanet.export.inputs import InputSpec, input_spec

__all__ = ["Exported", "export_program", "save_program"]

#: lowest sizes that are tried, then those of the network's own input
_LOWEST_SIZES = (8, 16, 32, 64, 128)
#: what sizes are held to be multiples of where no range of all sizes works
_MULTIPLES = (8, 16, 32)
_MAX_BATCH, _MAX_SIZE = 1024, 8192


@dataclass(frozen=True)
class Exported:
    """A program and the sizes it takes.

    Args:
        program: what ``torch.export.export`` returned.
        spec: its input.
        bounds: axis of the batch tensor to the smallest and largest size, and the number that it
            is a multiple of.
    """

    program: ExportedProgram
    spec: InputSpec
    bounds: Mapping[int, tuple[int, int, int]]

    def describe(self) -> str:
        """Return the input in words: ``images: batch 1..1024, 3, height 8..8192, ...``."""
        parts: list[str] = []
        for axis in range(len(self.spec.shape) + 1):
            if axis not in self.bounds:
                parts.append(str(1 if axis == 0 else self.spec.shape[axis - 1]))
                continue
            low, high, multiple = self.bounds[axis]
            step = f" in steps of {multiple}" if multiple > 1 else ""
            parts.append(f"{self.spec.open_axes[axis]} {low}..{high}{step}")
        return f"{self.spec.name}: {', '.join(parts)}"


def export_program(
    model: nn.Module,
    spec: InputSpec | None = None,
    *,
    open_sizes: bool = True,
    batch: int | None = None,
    min_size: int | None = None,
    max_size: int = _MAX_SIZE,
) -> Exported:
    """Export a network in evaluation mode.

    Args:
        model: the network; it is put into evaluation mode, on the CPU.
        spec: what it is fed; by default what it states of itself.
        open_sizes: leave the sizes open that ``spec`` names, beside the batch.
        batch: the only number of samples it takes; ``None`` leaves it open.
        min_size: smallest open size; by default the smallest of a few that the network allows.
        max_size: largest open size.

    Raises:
        UserError: the network cannot be exported; the message has the reason of ``torch.export``.
    """
    spec = spec or input_spec(model)
    model = model.eval().cpu()
    example = (spec.example(batch or 2),)
    sizes = {axis: spec.shape[axis - 1] for axis in spec.open_axes if axis and open_sizes}
    reason = ""
    for low, multiple in _candidates(sizes, min_size):
        first, last = -(-low // multiple) * multiple, max_size // multiple * multiple
        bounds = dict.fromkeys(sizes, (first, last, multiple))
        if batch is None:
            bounds[0] = (1, _MAX_BATCH, 1)
        dynamic = {axis: _dimension(spec.open_axes[axis], *bounds[axis]) for axis in bounds}
        try:
            program = torch.export.export(model, example, dynamic_shapes=(dynamic,))
        except Exception as error:  # torch.export raises of many kinds
            reason = _reason(error)
            if not _may_work_with_other_sizes(error, [spec.open_axes[axis] for axis in sizes]):
                break
            continue
        return Exported(program, spec, bounds)
    raise UserError(f"{type(model).__name__} cannot be exported: {reason}")


def _candidates(sizes: Mapping[int, int], min_size: int | None) -> list[tuple[int, int]]:
    """Return pairs of a lowest size and a multiple that the example fits, the loosest first."""
    if not sizes:
        return [(1, 1)]
    smallest = min(sizes.values())
    lowest = [low for low in (*_LOWEST_SIZES, smallest) if low <= smallest]
    if min_size is not None:
        if min_size > smallest:
            raise UserError(f"min_size {min_size} is above the size of the example, {smallest}")
        lowest = [min_size]
    multiples = [step for step in _MULTIPLES if all(size % step == 0 for size in sizes.values())]
    candidates = [(low, 1) for low in dict.fromkeys(lowest)]
    # two steps at least: a range that holds a single step is another program
    return candidates + [
        (max(2 * step, lowest[0]), step) for step in multiples if 2 * step <= smallest
    ]


def _dimension(name: str, low: int, high: int, multiple: int) -> Any:
    """Return an open size: any number of a range, or its multiples of a number."""
    if multiple == 1:
        return Dim(name, min=low, max=high)
    return multiple * Dim(f"{name}_steps", min=low // multiple, max=high // multiple)


def _may_work_with_other_sizes(error: Exception, names: list[str]) -> bool:
    """Tell whether the range of an open size, and nothing else, was refused."""
    violated = re.search(r"Constraints violated \(([^)]*)\)", str(error))
    if violated is None:
        return False
    return {part.strip() for part in violated[1].split(",")} <= set(names)


def _reason(error: Exception) -> str:
    """Return what a message says that torch fills pages with: its first lines, as one."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'no reason given'}"[:500]


def save_program(exported: Exported, path: str | Path) -> Path:
    """Write a program as ``.pt2``, which ``torch.export.load`` and AOTInductor read."""
    torch.export.save(exported.program, path)
    return Path(path)
