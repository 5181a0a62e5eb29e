"""Measure contenders at growing numbers of tokens, each as far as time and memory allow.

What a contender will need is foretold from what it needed before: its last time and memory, times
the growth of N to the power that it follows in the end. At small N this foretells too much, which
does no harm; near a budget it is right. Nothing that would not fit is started.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from eanet.bench.contenders import Contender, Group
from eanet.bench.measure import device_name, measure_interleaved
from eanet.errors import UserError
from eanet.registry import import_module

__all__ = [
    "INFERENCE_ONLY",
    "Budget",
    "Mode",
    "Progress",
    "Record",
    "Workload",
    "conditions",
    "default_budget",
    "measure_size",
    "near_square",
    "open_device",
    "with_probes",
]

#: a forward pass without gradients, or forward and backward with gradients of inputs and weights
Mode = Literal["inference", "training"]

#: why a training step of a folded module is not measured
INFERENCE_ONLY = "inference only"

#: time that all rounds at one size should take together
_SIZE_SECONDS = 8.0
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 15
#: sizes that are there to foretell others: see :func:`with_probes`
_PROBE_TOKENS, _FIRST_TOKENS, _GROWTH = 256, 4096, 16


@dataclass(frozen=True)
class Budget:
    """What a single run of a contender may need.

    Args:
        seconds: of time.
        num_bytes: of memory beyond its inputs and weights.
    """

    seconds: float
    num_bytes: float


@dataclass(frozen=True)
class Record:
    """What was measured of one contender at one size, or why it was not.

    Args:
        name: of the contender.
        group: of the contender.
        ours: whether it is external attention of this package.
        mode: "inference" or "training".
        num_tokens: N.
        seconds: of every timed round; empty where it was left out.
        peak_bytes: most memory that a run held beyond its inputs and weights.
        left_out: why it was not measured; empty where it was.
    """

    name: str
    group: Group
    ours: bool
    mode: Mode
    num_tokens: int
    seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    left_out: str = ""

    @property
    def median_seconds(self) -> float:
        """The median of all rounds."""
        return median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        """Return the fields, and the median where there is one."""
        extra = {"median_seconds": self.median_seconds} if self.seconds else {}
        return {**asdict(self), "seconds": list(self.seconds), **extra}


@dataclass
class Workload:
    """Random inputs of one size, shared by all contenders.

    Args:
        num_tokens: N.
        channels: C.
        device: where the inputs lie.
        dtype: their type.
    """

    num_tokens: int
    channels: int
    device: torch.device
    dtype: torch.dtype
    _tensors: dict[tuple[str, tuple[int, ...]], Tensor] = field(
        default_factory=dict[tuple[str, tuple[int, ...]], Tensor]
    )

    def inputs(self, takes: str) -> tuple[Tensor, ...]:
        """Return inputs as a contender takes them; those of the same name are one tensor."""
        if takes == "map":
            height = near_square(self.num_tokens)
            shape = (1, self.channels, height, self.num_tokens // height)
            return (self._tensor("map", shape).requires_grad_(),)
        names = ("tokens", "key", "value") if takes == "triple" else ("tokens",)
        shape = (1, self.num_tokens, self.channels)
        return tuple(self._tensor(name, shape).requires_grad_() for name in names)

    def cotangent(self, result: Tensor) -> Tensor:
        """Return a gradient for a result."""
        return self._tensor("cotangent", tuple(result.shape))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if (name, shape) not in self._tensors:
            tensor = torch.randn(shape, device=self.device, dtype=self.dtype)
            self._tensors[name, shape] = tensor
        return self._tensors[name, shape]


def near_square(number: int) -> int:
    """Return the largest divisor that is at most the square root.

    >>> near_square(256), near_square(200), near_square(7)
    (16, 10, 1)
    """
    return next(k for k in range(int(number**0.5), 0, -1) if number % k == 0)


def with_probes(sizes: Sequence[int]) -> list[tuple[int, bool]]:
    """Return the sizes in growing order, and between them smaller ones that foretell them.

    No contender meets a size more than 16 times what it has met before, or more than 4,096 tokens
    as its first.

    Returns:
        (size, whether it is there only to foretell) for each.

    >>> with_probes([100_000, 256])
    [(256, False), (4096, True), (65536, True), (100000, False)]
    """
    steps: list[tuple[int, bool]] = []
    for size in sorted(set(sizes)):
        if not steps and size > _FIRST_TOKENS:
            steps.append((_PROBE_TOKENS, True))
        while steps and size > _GROWTH * steps[-1][0]:
            steps.append((_GROWTH * steps[-1][0], True))
        steps.append((size, False))
    return steps


class Progress:
    """Says on a stream what is being measured, so that nobody wonders.

    Args:
        stream: where to; the standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._overwrites = self._stream.isatty()
        self._last = 0.0

    def say(self, line: str) -> None:
        """Write a line that stays."""
        self._stream.write(("\r\x1b[K" if self._overwrites else "") + line + "\n")
        self._stream.flush()
        self._last = time.monotonic()

    def tick(self, line: str) -> None:
        """Write a line that the next one replaces; where nothing can be replaced, now and then."""
        if self._overwrites:
            self._stream.write(f"\r\x1b[K{line[:100]}")
            self._stream.flush()
        elif time.monotonic() - self._last > 10:
            self.say(line)


def measure_size(
    contenders: Sequence[Contender],
    workload: Workload,
    mode: Mode,
    *,
    before: Sequence[Record],
    budget: Budget,
    rounds: int | None = None,
    progress: Progress,
) -> list[Record]:
    """Measure, at one size, every contender that a budget allows; rounds are interleaved.

    Args:
        contenders: what to measure, with names that differ.
        workload: the inputs.
        mode: what to run.
        before: records of smaller sizes in the same mode, from which needs are foretold.
        budget: of a single run.
        rounds: timed rounds; ``None`` chooses between 3 and 15 by how long they will take.
        progress: told what happens.

    Returns:
        A record for every contender.
    """
    calls: dict[str, Callable[[], object]] = {}
    reasons: dict[str, str] = {}
    slow: dict[str, float] = {}
    tried: dict[str, float] = {}
    for contender in contenders:
        progress.tick(f"N = {workload.num_tokens:,}, {mode}: trying {contender.name}")
        reason = _reason_to_leave_out(contender, workload.num_tokens, mode, before, budget)
        if not reason:
            try:
                call = _call(contender, workload, mode)
                tried[contender.name] = seconds = _trial_seconds(call, workload.device, budget)
            except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
                reason = f"cannot run: {str(error).strip().partition(chr(10))[0][:120]}"
            else:
                if seconds > budget.seconds:  # the foretelling was too low; what is known is kept
                    slow[contender.name] = seconds
                else:
                    calls[contender.name] = call
        if reason:
            reasons[contender.name] = reason
    if rounds is None:
        expected = sum(tried[name] for name in calls)
        rounds = max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(_SIZE_SECONDS / max(expected, 1e-9))))
    measured = measure_interleaved(
        calls,
        rounds=rounds,
        device=workload.device,
        progress=lambda line: progress.tick(f"N = {workload.num_tokens:,}, {mode}: {line}"),
    )
    return [
        Record(
            contender.name,
            contender.group,
            contender.ours,
            mode,
            workload.num_tokens,
            seconds=tuple(measured[contender.name].seconds) if contender.name in calls else (),
            peak_bytes=measured[contender.name].peak_bytes if contender.name in calls else 0,
            left_out=f"one run took {slow[contender.name]:.3g} s"
            if contender.name in slow
            else reasons.get(contender.name, ""),
        )
        for contender in contenders
    ]


def _reason_to_leave_out(
    contender: Contender, num_tokens: int, mode: Mode, before: Sequence[Record], budget: Budget
) -> str:
    """Return why a contender is not measured, or ""."""
    if mode == "training" and not contender.trains:
        return INFERENCE_ONLY
    records = [record for record in before if record.name == contender.name and record.mode == mode]
    if not records:
        return ""
    last = max(records, key=lambda record: record.num_tokens)
    if last.left_out:
        return last.left_out
    growth = num_tokens / last.num_tokens
    # the fastest round: one that was held up would foretell far too much
    seconds = min(last.seconds) * growth**contender.time_order
    num_bytes = last.peak_bytes * growth**contender.memory_order
    if seconds > budget.seconds:
        return f"would take about {seconds:.2g} s a run"
    if num_bytes > budget.num_bytes:
        return f"would hold about {num_bytes / 2**30:.3g} GiB"
    return ""


def _call(contender: Contender, workload: Workload, mode: Mode) -> Callable[[], object]:
    """Return a function that runs a contender once."""
    torch.manual_seed(0)
    module = contender.build(workload.channels).to(workload.device, workload.dtype)
    module.train(mode == "training")
    inputs = workload.inputs(contender.takes)
    if mode == "inference":

        def infer() -> object:
            with torch.inference_mode():
                return module(*inputs)

        return infer
    leaves = [*inputs, *(weight for weight in module.parameters() if weight.requires_grad)]

    def step() -> object:
        result = module(*inputs)
        return torch.autograd.grad(result, leaves, workload.cotangent(result))

    return step


def _trial_seconds(call: Callable[[], object], device: torch.device, budget: Budget) -> float:
    """Return how long a run takes, tried once or twice.

    A first run also sets things up, so that a short one says little; and one somewhat over the
    budget, though it was foretold to be within, may have been held up by something else.
    """
    first = _seconds_of(call, device)
    if first < budget.seconds / 4 or budget.seconds < first < 8 * budget.seconds:
        return min(first, _seconds_of(call, device))
    return first


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a single run takes."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def open_device(name: str) -> torch.device:
    """Return a device by name, "auto" for a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name!r} cannot be used here: {reason}") from error
    return device


def default_budget(device: torch.device, seconds: float, gibibytes: float | None) -> Budget:
    """Return a budget; without a number, 60 % of the memory that is free now."""
    if gibibytes is not None:
        return Budget(seconds, gibibytes * 2**30)
    if device.type == "cuda":
        return Budget(seconds, 0.6 * torch.cuda.mem_get_info(device)[0])
    return Budget(seconds, 0.6 * import_module("psutil").virtual_memory().available)


def conditions(device: torch.device, dtype: torch.dtype) -> Mapping[str, str]:
    """Return what a measurement depends on beside the code."""
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": f"torch {torch.__version__}",
    }
