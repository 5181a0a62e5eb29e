"""What this machine could do at best: how fast it multiplies matrices and how fast it copies.

No implementation of an operation can be faster than the larger of two times: its multiply-adds at
the rate of a matrix product, and the bytes it has to move at the rate of a copy. Both rates are
measured here, in the run that uses them, because a clock, a neighbor on the machine or a thread
setting changes them. Rates are those of the fastest repetition: a limit is what can be reached,
not what is usual.
"""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eanet.ops.attention.thin_products import multiply

__all__ = [
    "Limit",
    "MachineRates",
    "Work",
    "external_attention_work",
    "fastest_seconds",
    "limit_of",
    "measure_copy_rate",
    "measure_machine_rates",
    "measure_matrix_rate",
    "replayed_seconds",
]

#: side of the matrices whose product shows what the machine can do
CUBE_SIDE = 2048
#: entries of a result that is written at a time where it has to be allocated
TILE_ENTRIES = 1 << 21
#: bytes that a copy reads, several times any cache
COPY_BYTES = 1 << 28
#: calls of microseconds go on at least this long: all of fifty can fall into one moment in which
#: another process has the core
LEAST_SECONDS = 0.1
#: multiply-adds of a product that one thread may do faster than several
SMALL_MACS = 1 << 24


@dataclass(frozen=True)
class Work:
    """What an operation has to do, whoever does it.

    Args:
        products: the matrix products as (rows, inner, columns).
        num_bytes: bytes read and written where everything between is kept in cache.
    """

    products: tuple[tuple[int, int, int], ...]
    num_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-adds of all products."""
        return sum(rows * inner * columns for rows, inner, columns in self.products)


@dataclass(frozen=True)
class MachineRates:
    """What was measured.

    Args:
        cube_macs_per_second: multiply-adds of a product of two 2048 x 2048 matrices.
        copied_bytes_per_second: bytes read plus bytes written by a large copy.
        torch_mm_macs_per_second: the cube by ``torch.mm`` alone, where the better of two libraries
            was taken.
    """

    cube_macs_per_second: float
    copied_bytes_per_second: float
    torch_mm_macs_per_second: float | None = None


@dataclass(frozen=True)
class Limit:
    """The least time an operation can take, by three measures in seconds.

    Args:
        at_shape: its multiply-adds, each product at the rate of a product of that shape.
        at_cube: its multiply-adds at the rate of the cube.
        by_bytes: its bytes at the rate of a copy.
    """

    at_shape: float
    at_cube: float
    by_bytes: float

    @property
    def seconds(self) -> float:
        """The larger of the bytes' time and the products' time at their own shapes."""
        return max(self.at_shape, self.by_bytes)

    @property
    def seconds_at_cube(self) -> float:
        """The larger of the bytes' time and the products' time at the cube's rate."""
        return max(self.at_cube, self.by_bytes)

    @property
    def bound(self) -> str:
        """Which of the two is larger: "products" or "bytes"."""
        return "products" if self.at_shape >= self.by_bytes else "bytes"


def external_attention_work(
    num_tokens: int,
    channels: int,
    num_slots: int,
    *,
    training: bool = False,
    batch: int = 1,
    bytes_per_value: int = 4,
) -> Work:
    """Return the work of external attention between two memories (Eq. 9-11, arXiv 2105.02358).

    Inference reads x and writes y. A training step multiplies twice more in both directions, reads
    x once more, reads the gradient of y and writes that of x. The (tokens, slots) attention and
    the memories are counted as free, so the limit cannot be reached where they leave the cache.

    Args:
        num_tokens: N of one sample.
        channels: C.
        num_slots: S.
        training: forward and backward pass in place of the forward pass alone.
        batch: number of samples.
        bytes_per_value: 4 for float32.
    """
    tokens = batch * num_tokens
    products = [(num_slots, channels, tokens), (channels, num_slots, tokens)]
    if training:
        to_values = [(num_slots, channels, tokens), (channels, tokens, num_slots)]
        to_keys = [(channels, num_slots, tokens), (num_slots, tokens, channels)]
        products += to_values + to_keys
    maps = 5 if training else 2
    return Work(tuple(products), maps * tokens * channels * bytes_per_value)


def fastest_seconds(
    call: Callable[[], object],
    device: torch.device,
    *,
    budget_seconds: float = 0.3,
    most_repeats: int = 50,
    batch: int | None = None,
) -> float:
    """Return the time of the fastest of several calls.

    On a GPU the calls are timed in batches, so that waiting for the device does not count.

    Args:
        call: what to time.
        device: where it computes.
        budget_seconds: stop after this time, but not before three repetitions.
        most_repeats: stop after as many, but not within the first tenth of a second.
        batch: calls that are timed together; one on a CPU, else ten.
    """
    calls = batch or (1 if device.type == "cpu" else 10)
    for _ in range(2):
        call()
    _wait_for(device)
    least_seconds = min(LEAST_SECONDS, budget_seconds)
    fastest, spent, repeats = math.inf, 0.0, 0
    while repeats < 3 or spent < (budget_seconds if repeats < most_repeats else least_seconds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait_for(device)
        seconds = time.perf_counter() - start
        fastest = min(fastest, seconds)
        spent += seconds
        repeats += 1
    return fastest / calls


def replayed_seconds(
    call: Callable[[], object],
    device: torch.device,
    *,
    budget_seconds: float = 0.15,
    most_repeats: int = 50,
) -> float:
    """Return the time that a GPU needs for a call, the fastest of several.

    The call is recorded in a CUDA graph and replayed: what Python and PyTorch spend on launching
    its kernels does not count. Its kernels are compiled and its libraries loaded before.

    Args:
        call: what to time; it must not wait for the GPU.
        device: a GPU.
        budget_seconds: stop after this time, but not before three repetitions.
        most_repeats: stop after as many, but not within the first tenth of a second.
    """
    calls = 10
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return (
            fastest_seconds(
                graph.replay,
                device,
                budget_seconds=budget_seconds,
                most_repeats=most_repeats,
                batch=1,
            )
            / calls
        )


def _wait_for(device: torch.device) -> None:
    """Wait until a device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_matrix_rate(
    rows: int,
    inner: int,
    columns: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    budget_seconds: float = 0.3,
) -> float:
    """Return multiply-adds per second of (rows, inner) @ (inner, columns), without fresh memory.

    The better of ``torch.mm`` into a held buffer and, on a CPU, of what this package multiplies
    with, tile by tile.
    """
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    result = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = fastest_seconds(
        lambda: torch.mm(left, right, out=result), device, budget_seconds=budget_seconds
    )
    if device.type == "cpu":
        del result
        lying = right.t().contiguous()
        in_tiles = fastest_seconds(
            lambda: _multiply_in_tiles(left, lying), device, budget_seconds=budget_seconds
        )
        seconds = min(seconds, in_tiles)
    return rows * inner * columns / seconds


def _multiply_in_tiles(left: Tensor, right: Tensor) -> None:
    """Form ``left @ right^T`` and forget it, tile by tile: their memory is handed out again."""
    for part in right.split(max(1, TILE_ENTRIES // left.shape[0])):
        multiply(left, part.t())


def measure_copy_rate(
    *,
    device: torch.device,
    num_bytes: int = COPY_BYTES,
    budget_seconds: float = 0.3,
) -> float:
    """Return bytes per second, read and written, of a copy into a held buffer."""
    source = torch.ones(max(num_bytes // 4, 1), device=device)
    target = torch.empty_like(source).fill_(0.0)  # its pages exist before the clock starts
    seconds = fastest_seconds(lambda: target.copy_(source), device, budget_seconds=budget_seconds)
    return 2 * source.numel() * 4 / seconds


def measure_machine_rates(
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    cube_side: int = CUBE_SIDE,
    copy_bytes: int = COPY_BYTES,
    budget_seconds: float = 0.3,
) -> MachineRates:
    """Measure both rates of a device.

    Args:
        device: what to measure.
        dtype: of the matrices.
        cube_side: side of the matrices.
        copy_bytes: bytes that the copy reads.
        budget_seconds: time for each of the two, beyond three repetitions.
    """
    left, right, result = (
        torch.randn(cube_side, cube_side, device=device, dtype=dtype) for _ in range(3)
    )
    by_mm = fastest_seconds(
        lambda: torch.mm(left, right, out=result), device, budget_seconds=budget_seconds
    )
    return MachineRates(
        torch_mm_macs_per_second=cube_side**3 / by_mm,
        cube_macs_per_second=measure_matrix_rate(
            cube_side,
            cube_side,
            cube_side,
            device=device,
            dtype=dtype,
            budget_seconds=budget_seconds,
        ),
        copied_bytes_per_second=measure_copy_rate(
            device=device, num_bytes=copy_bytes, budget_seconds=budget_seconds
        ),
    )


def limit_of(
    work: Work,
    rates: MachineRates,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    budget_seconds: float = 0.3,
) -> Limit:
    """Measure the limit of an operation, with the rate of each of its products at its shape.

    Args:
        work: what the operation has to do.
        rates: of the machine, from the same run.
        device: where to multiply.
        dtype: of the matrices.
        budget_seconds: time for each shape, beyond three repetitions.
    """

    def rate(shape: tuple[int, int, int]) -> float:
        return measure_matrix_rate(
            *shape, device=device, dtype=dtype, budget_seconds=budget_seconds
        )

    seconds_of: dict[tuple[int, int, int], float] = {}
    for shape in dict.fromkeys(work.products):
        best = rate(shape)
        if device.type == "cpu" and _macs(shape) < SMALL_MACS:
            # where threads wait for one another longer than they compute, one alone is faster
            with _one_thread():
                best = max(best, rate(shape))
        seconds_of[shape] = _macs(shape) / best
    return Limit(
        at_shape=sum(seconds_of[shape] for shape in work.products),
        at_cube=work.macs / rates.cube_macs_per_second,
        by_bytes=work.num_bytes / rates.copied_bytes_per_second,
    )


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    """Let PyTorch compute with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _macs(shape: Sequence[int]) -> int:
    rows, inner, columns = shape
    return rows * inner * columns
