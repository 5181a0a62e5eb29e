"""Whether a written file computes what the network computes, at several sizes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from eanet.errors import UserError
from eanet.export.torch_export import Exported
from eanet.registry import import_module

__all__ = ["Difference", "compare", "run_onnx", "run_program", "sizes_to_try"]

Runner = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Difference:
    """How far a file is from the network on one input.

    Args:
        shape: of the input.
        largest: largest absolute difference over all results.
        scale: largest absolute value of the network's results.
    """

    shape: tuple[int, ...]
    largest: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference over the scale of the results, or over 1 where that is smaller."""
        return self.largest / max(self.scale, 1.0)


def run_onnx(path: str | Path) -> Runner:
    """Return a function that runs an ONNX file with onnxruntime on the CPU.

    Raises:
        UserError: onnxruntime cannot read the file.
        MissingExtraError: the extra ``export`` is not installed.
    """
    runtime: Any = import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: onnxruntime cannot run it: {reason}") from error
    (given,) = session.get_inputs()

    def run(inputs: Tensor) -> Sequence[Tensor]:
        found = session.run(None, {given.name: inputs.numpy()})
        return [torch.from_numpy(array) for array in found]

    return run


def run_program(path: str | Path) -> Runner:
    """Return a function that runs a ``.pt2`` file."""
    module = torch.export.load(path).module()

    def run(inputs: Tensor) -> Sequence[Tensor]:
        return tree_leaves(module(inputs))

    return run


def sizes_to_try(exported: Exported) -> list[tuple[int, ...]]:
    """Return shapes of inputs: the network's own, and with open sizes smaller, larger, oblong."""
    own = exported.spec.shape
    shapes: list[tuple[int, ...]] = [(1 if 0 in exported.bounds else _fixed_batch(exported), *own)]
    free = sorted(axis for axis in exported.bounds if axis)
    for number, batch in enumerate((3, 2) if 0 in exported.bounds else (1, 1)):
        shape = [batch, *own]
        for place, axis in enumerate(free):
            low, high, step = exported.bounds[axis]
            # once smaller by a half, once larger by a quarter and odd; no axis like another
            wanted = (
                own[axis - 1] // 2 + place if number else own[axis - 1] * 5 // 4 + 1 + 4 * place
            )
            shape[axis] = min(max(wanted // step * step, low), high)
        shapes.append(tuple(shape))
    return list(dict.fromkeys(shapes))


def _fixed_batch(exported: Exported) -> int:
    """Return the samples of the example that a program with a fixed batch was made with."""
    (node,) = [
        node
        for node in exported.program.graph.nodes
        if node.op == "placeholder" and node.name in exported.program.graph_signature.user_inputs
    ]
    return int(node.meta["val"].shape[0])


@torch.no_grad()
def compare(
    model: nn.Module, run: Runner, exported: Exported, shapes: Iterable[Sequence[int]] | None = None
) -> list[Difference]:
    """Run network and file on the same random inputs.

    Args:
        model: the network, in evaluation mode.
        run: see :func:`run_onnx` and :func:`run_program`.
        exported: says which sizes are open.
        shapes: of the inputs; by default those of :func:`sizes_to_try`.
    """
    found: list[Difference] = []
    for number, shape in enumerate(shapes or sizes_to_try(exported)):
        inputs = exported.spec.example(shape[0], dict(enumerate(shape)), seed=number)
        expected = [leaf for leaf in tree_leaves(model(inputs)) if isinstance(leaf, Tensor)]
        actual = run(inputs)
        if len(actual) != len(expected):
            raise UserError(f"the file gives {len(actual)} results, the network {len(expected)}")
        difference = scale = 0.0
        for mine, theirs in zip(expected, actual, strict=True):
            if mine.shape != theirs.shape:
                raise UserError(
                    f"input {tuple(shape)}: the file gives {tuple(theirs.shape)}, "
                    f"the network {tuple(mine.shape)}"
                )
            gap = (mine.double() - theirs.double()).abs()
            # infinite gaps and nan must not pass as small
            difference = max(difference, float(gap.nan_to_num(nan=float("inf")).max()))
            scale = max(scale, float(mine.abs().max()))
        found.append(Difference(tuple(shape), difference, scale))
    return found
