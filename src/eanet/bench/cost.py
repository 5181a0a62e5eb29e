"""What a network costs: parameters, multiply-adds, memory for activations, module by module.

A multiply-add (MAC) is one product added to a sum, so one MAC is two FLOPs. Counted are matrix
products and convolutions, whether they come from a layer or from a function inside ``forward``;
normalizations, biases, softmax, pooling and elementwise work are not. The network runs once on the
meta device: shapes flow through it, but nothing is computed and no memory is taken, so the cost of
any size can be asked on any machine.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from eanet.errors import UserError

__all__ = ["Cost", "ModuleCost", "count_cost"]

Inputs: TypeAlias = Sequence[int] | Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class ModuleCost:
    """The share of one module in the cost of a network.

    Args:
        name: its path in the network; empty for the network itself.
        kind: the name of its class.
        parameters: scalars in it and below; those shared with another module count in both.
        macs: multiply-adds in it and below.
    """

    name: str
    kind: str
    parameters: int
    macs: int

    @property
    def depth(self) -> int:
        """How many levels it lies below the network."""
        return self.name.count(".") + 1 if self.name else 0


@dataclass(frozen=True)
class Cost:
    """What one forward pass of a network costs.

    Args:
        parameters: scalars in all parameters, each counted once, frozen ones too.
        trainable: those that an optimizer would change.
        macs: multiply-adds of matrix products and convolutions.
        peak_activation_bytes: an estimate, see :func:`count_cost`.
        modules: the network, then its modules in order, those that did nothing too.
    """

    parameters: int
    trainable: int
    macs: int
    peak_activation_bytes: int
    modules: tuple[ModuleCost, ...]

    def describe(self, *, depth: int = 1) -> str:
        """Return the cost as text: the totals, then a line for each module down to a depth.

        Modules without parameters and without multiply-adds are left out.
        """
        shown = [
            module
            for module in self.modules
            if module.depth <= depth and (module.parameters or module.macs)
        ]
        rows = [("module", "class", "parameters", "MACs", "share")]
        rows += [
            (
                "  " * module.depth + (module.name.rpartition(".")[2] or "total"),
                module.kind,
                f"{module.parameters:,}",
                _scaled(module.macs, 1000, ("", " k", " M", " G", " T")),
                f"{module.macs / self.macs:.1%}" if self.macs else "",
            )
            for module in shown
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        frozen = self.parameters - self.trainable
        memory = _scaled(self.peak_activation_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))
        return "\n".join(
            [
                f"parameters        {self.parameters:,}"
                + (f" ({frozen:,} of them frozen)" if frozen else ""),
                f"multiply-adds     {self.macs:,} ({2 * self.macs:,} FLOPs)",
                f"peak activations  {memory} (estimate, inference)",
                "",
                *(_aligned(row, widths) for row in rows),
            ]
        )


def count_cost(model: nn.Module, inputs: Inputs, *, dtype: torch.dtype = torch.float32) -> Cost:
    """Count what one forward pass in evaluation mode costs.

    The peak of activations is the largest number of bytes in tensors that are alive at once,
    inputs included, parameters and buffers not, when every operation runs by itself and without
    gradients. What kernels use inside themselves is not seen, and a compiler may need less.

    Args:
        model: the network, on any device; it is not changed.
        inputs: the shape of its input, batch first (give batch 1 for the cost of one sample), or
            example inputs as a tensor or several, of which only shapes and types matter.
        dtype: of the input and of all floating-point parameters, for the bytes; used with a shape.

    Raises:
        UserError: the network does not take such an input, or what it does depends on the values
            of tensors.
    """
    tensors = _meta_inputs(inputs, dtype)
    shadow = _meta_copy(model, dtype if not _holds_tensors(inputs) else None).eval()
    counter = FlopCounterMode(display=False, custom_mapping=_FURTHER_FORMULAS)
    state = [*shadow.parameters(), *shadow.buffers()]
    memory = _LiveBytes(known=state, alive=tensors)
    try:
        with torch.no_grad(), counter, memory:
            shadow(*tensors)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        reason = str(error).strip().partition("\n")[0]
        problem = "does not take an input of shape"
        if "meta" in reason:  # PyTorch refuses to read values that do not exist
            problem = "cannot be counted, since its work depends on values, not only on shape"
        raise UserError(f"{type(model).__name__} {problem} {shapes}: {reason}") from error
    parameters = list(model.parameters())
    return Cost(
        parameters=_count(parameters),
        trainable=_count(parameter for parameter in parameters if parameter.requires_grad),
        macs=counter.get_total_flops() // 2,
        peak_activation_bytes=memory.peak,
        modules=tuple(_module_costs(model, counter.get_flop_counts())),
    )


def _holds_tensors(inputs: Inputs) -> bool:
    return isinstance(inputs, Tensor) or (len(inputs) > 0 and isinstance(inputs[0], Tensor))


def _meta_inputs(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Return the inputs as tensors without memory."""
    if isinstance(inputs, Tensor):
        return [inputs.detach().to("meta")]
    tensors = [value.detach().to("meta") for value in inputs if isinstance(value, Tensor)]
    sizes = [value for value in inputs if not isinstance(value, Tensor)]
    if tensors and sizes:
        raise ValueError("inputs must be a shape or tensors, got a mixture")
    if any(size < 1 for size in sizes):
        raise ValueError(f"the sizes of a shape must be at least 1, got {tuple(sizes)}")
    return tensors or [torch.empty(tuple(sizes), dtype=dtype, device="meta")]


def _meta_copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Copy a network without copying its weights.

    The copy's memo already knows what becomes of each parameter and buffer: a tensor of the same
    shape without memory. Shared ones stay shared.
    """

    def shadow(tensor: Tensor) -> Tensor:
        floating = dtype is not None and tensor.is_floating_point()
        return tensor.detach().to("meta", dtype if floating else None)

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(shadow(parameter), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = shadow(buffer)
    return copy.deepcopy(model, memo)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _module_costs(model: nn.Module, flops: Mapping[str, Mapping[Any, int]]) -> Iterable[ModuleCost]:
    """Yield the cost of each module; the counter names them by the class of the network.

    A container that is never called itself, such as a list, costs what its parts cost.
    """
    root = type(model).__name__

    def macs(name: str, module: nn.Module) -> int:
        counted = flops.get(f"{root}.{name}" if name else root)
        if counted is not None:
            return sum(counted.values()) // 2
        prefix = f"{name}." if name else ""
        return sum(macs(prefix + part, child) for part, child in module.named_children())

    for name, module in model.named_modules():
        yield ModuleCost(
            name, type(module).__name__, _count(module.parameters()), macs(name, module)
        )


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive after each operation.

    Args:
        known: tensors that do not count.
        alive: tensors that do, though they were there before.
    """

    def __init__(self, known: Iterable[Tensor], alive: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._watch(tensor, counts=False)
        for tensor in alive:
            self._watch(tensor)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._watch(value)
        return result

    def _watch(self, tensor: Tensor, *, counts: bool = True) -> None:
        """Count a tensor's memory until it is freed; views share theirs."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if counts else 0
        self._seen.add(key)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._bytes -= size


def _matrix_vector_flops(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * math.prod(matrix)


def _added_matrix_vector_flops(
    added: Sequence[int], matrix: Sequence[int], vector: Sequence[int], **_: Any
) -> int:
    return 2 * math.prod(matrix)


def _added_matrix_flops(
    added: Sequence[int], first: Sequence[int], second: Sequence[int], **_: Any
) -> int:
    return 2 * math.prod(first) * second[-1]


#: products that PyTorch's counter leaves out; its formulas see shapes in place of tensors
_FURTHER_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten.dot: _matrix_vector_flops,
    torch.ops.aten.addmv: _added_matrix_vector_flops,
    torch.ops.aten.addmv_: _added_matrix_vector_flops,
    torch.ops.aten.addmm_: _added_matrix_flops,
    torch.ops.aten.addbmm: _added_matrix_flops,
    torch.ops.aten.addbmm_: _added_matrix_flops,
    torch.ops.aten.baddbmm_: _added_matrix_flops,
}


def _scaled(value: int, base: int, units: Sequence[str]) -> str:
    """Write a number with three digits after the point in the largest unit that it reaches."""
    power = 0
    while value >= base ** (power + 1) and power < len(units) - 1:
        power += 1
    return f"{value / base**power:.3f}{units[power]}" if power else f"{value}{units[0]}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Join cells, names to the left and numbers to the right."""
    names = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*names, *numbers]).rstrip()
