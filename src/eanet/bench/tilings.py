"""Time of each Triton kernel under many tilings, to choose those of ``ops/attention/launch.py`` by.

    eanet bench tilings --shape 8 512 128 128 --layout "tokens last"

All kernels are compiled first, in as many processes as the machine has cores. Times are those that
the GPU itself records for each kernel: launching them does not count.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eanet.bench.measure import device_name, write_figures
from eanet.bench.sweep import Progress
from eanet.errors import UserError

if TYPE_CHECKING:
    from eanet.ops.attention.heuristics import Tilings

__all__ = ["candidates", "main", "tiling_of", "time_kernels"]

#: where each kernel has its tiling; dots lead into a part of Tilings
PLACES = {
    "token_statistics": "statistics",
    "mix": "mix",
    "attention_gradient": "attention_gradient",
    "key_gradient": "key_gradient",
    "value_gradient": "value_gradient",
    "slot_exponentials": "resident.exponentials",
    "mix_exponentials": "resident.mix",
    "value_side": "resident.value_side",
    "key_side": "resident.key_side",
}
#: where the number of its programs stands, of those that have one of their own
PROGRAMS = {
    "token_statistics": "statistics_programs",
    "slot_exponentials": "exponentials_programs",
    "mix_exponentials": "mix_programs",
    "value_side": "value_programs",
    "key_side": "key_programs",
}
REPEATS = 10


def candidates(chosen: "Tilings", itemsize: int) -> Iterator["Tilings"]:
    """Yield tilings of many sizes; the one chosen at present comes first.

    Args:
        chosen: of :func:`eanet.ops.attention.heuristics.choose_tilings`.
        itemsize: bytes of a channel.
    """
    if chosen.resident is not None:
        # started early, a kernel would be recorded with the time that it waits
        chosen = replace(chosen, resident=replace(chosen.resident, early=False))
    yield chosen
    yield from _general_candidates(replace(chosen, resident=None), itemsize)
    if chosen.resident is not None:
        yield from _resident_candidates(chosen)
        yield from (one for one in _mix_candidates(chosen) if one != chosen)


def _general_candidates(chosen: "Tilings", itemsize: int) -> Iterator["Tilings"]:
    """Yield tilings of the kernels that take channels tile by tile."""
    from eanet.ops.attention.tiling import Tiling

    sizes = itertools.product((32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (2, 3, 4))
    for block_tokens, block_channels, num_warps, num_stages in sizes:
        tile_bytes = (block_tokens + 64) * block_channels * itemsize
        if not 4096 <= block_tokens * block_channels <= 16384 or num_stages * tile_bytes > 160_000:
            continue
        for factor, max_registers in ((1, None), (2, None), (2, 168), (2, 128)):
            if max_registers is not None and (num_warps == 8 or num_stages == 2):
                continue
            tiling = Tiling(block_tokens, block_channels, num_warps, num_stages, max_registers)
            yield replace(
                chosen,
                statistics=tiling,
                mix=tiling,
                attention_gradient=tiling,
                key_gradient=tiling,
                value_gradient=tiling,
                num_programs=chosen.num_programs // factor,
            )


def _resident_candidates(chosen: "Tilings") -> Iterator["Tilings"]:
    """Yield tilings of the kernels that hold a memory on chip."""
    resident = chosen.resident
    assert resident is not None
    width = resident.value_side.block_channels
    sizes = itertools.product((32, 64), (4, 8), (2, 3, 4))
    for block_tokens, num_warps, num_stages in sizes:
        whole = replace(
            resident.value_side,
            block_tokens=block_tokens,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        for block_channels in (64, 128, 256):
            yield replace(
                chosen,
                resident=replace(
                    resident,
                    exponentials=whole,
                    exponentials_programs=resident.value_programs,
                    value_side=whole,
                    key_side=replace(whole, block_channels=min(width, block_channels)),
                ),
            )


def _mix_candidates(chosen: "Tilings") -> Iterator["Tilings"]:
    """Yield tilings of the second pass forward that holds a memory."""
    resident = chosen.resident
    assert resident is not None
    multiprocessors = chosen.num_programs // 2
    # programs of a multiprocessor, and registers of a thread
    programs = ((1, None), (2, None), (2, 128))
    sizes = itertools.product((64, 128), (4, 8), (2, 3, 4), programs)
    for block_tokens, num_warps, num_stages, (number, max_registers) in sizes:
        tiling = replace(
            resident.mix,
            block_tokens=block_tokens,
            num_warps=num_warps,
            num_stages=num_stages,
            max_registers=max_registers,
        )
        yield replace(
            chosen,
            resident=replace(resident, mix=tiling, mix_programs=number * multiprocessors),
        )


def tiling_of(tilings: "Tilings", kernel: str) -> dict[str, Any]:
    """Return the tiling and programs of a kernel as JSON values.

    Nothing is returned for what is not one of the kernels.
    """
    if kernel not in PLACES:
        return {}
    part, _, name = PLACES[kernel].rpartition(".")
    holder: Any = getattr(tilings, part) if part else tilings
    programs = getattr(holder, PROGRAMS.get(kernel, ""), tilings.num_programs)
    return vars(getattr(holder, name)) | {"num_programs": programs}


def _operands(
    shape: Sequence[int], num_slots: int, layout: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, memory and the gradient of the result on the GPU."""
    batch, channels, height, width = shape
    x = torch.randn(batch, channels, height * width, device="cuda").to(dtype).transpose(1, 2)
    if layout == "channels last":
        x = x.contiguous()
    memory = torch.randn(num_slots, channels, device="cuda", dtype=dtype) * channels**-0.5
    return x, memory, torch.randn_like(x)


def _run(x: Tensor, memory: Tensor, grad_out: Tensor, tilings: "Tilings") -> None:
    """Run forward and backward pass as training does."""
    from eanet.ops.attention import launch
    from eanet.ops.attention.tiling import Problem

    problem = Problem(1, "double", 1e-9, 0.0, residual=False)
    batch, num_tokens, _ = x.shape
    attention = x.new_empty((batch, 1, num_tokens, memory.shape[0]))
    denominator = x.new_empty((batch, 1, num_tokens), dtype=torch.float32)
    out = torch.empty_like(x)
    statistics = launch.forward(
        x, memory, memory, None, None, None, None, problem,
        out=out, attention=attention, denominator=denominator, tilings=tilings,
    )  # fmt: skip
    launch.backward(
        grad_out, None, x, memory, memory, None, None, None, statistics, problem,
        kept=(attention, denominator), with_value_bias=False, grad_x=out,
        grad_memories=x.new_empty(2 * memory.numel() + memory.shape[1]), tilings=tilings,
    )  # fmt: skip


def _compile(job: tuple[Sequence[int], int, str, torch.dtype, "Tilings"]) -> str | None:
    """Compile by running once; return what was wrong with a tiling."""
    shape, num_slots, layout, dtype, tilings = job
    try:
        _run(*_operands(shape, num_slots, layout, dtype), tilings)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def time_kernels(operands: Sequence[Tensor], tilings: "Tilings") -> dict[str, float]:
    """Return seconds of each kernel, the mean of ten runs, as the GPU records them."""
    x, memory, grad_out = operands
    _run(x, memory, grad_out, tilings)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(REPEATS):
            _run(x, memory, grad_out, tilings)
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key if event.key in PLACES else "other"
        found[name] = found.get(name, 0.0) + event.self_device_time_total * 1e-6 / REPEATS
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="eanet bench tilings",
        description="Time of each Triton kernel under many tilings, on a GPU.",
    )
    parser.add_argument(
        "--shape", type=int, nargs=4, default=(8, 512, 128, 128), metavar=("B", "C", "H", "W")
    )
    parser.add_argument("--slots", type=int, default=64, help="S (default: 64)")
    parser.add_argument(
        "--layout", choices=["channels last", "tokens last"], default="channels last"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--best", type=int, default=6, help="rows to print for each kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("the tilings of the kernels are measured on a GPU, and there is none here")
    device = torch.device("cuda")
    from eanet.ops.attention.heuristics import choose_tilings

    dtype = getattr(torch, options.dtype)
    shape = tuple(options.shape)
    operands = _operands(shape, options.slots, options.layout, dtype)
    chosen = choose_tilings(operands[0], options.slots, shape[1])
    grid = list(candidates(chosen, dtype.itemsize))
    jobs = [(shape, options.slots, options.layout, dtype, tilings) for tilings in grid]
    progress = Progress().say
    progress(f"compiling for {len(grid)} tilings")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context) as pool:
        problems = list(pool.map(_compile, jobs, chunksize=2))
    figures: list[dict[str, Any]] = []
    for index, (tilings, problem) in enumerate(zip(grid, problems, strict=True)):
        if problem is not None:
            progress(f"left out {tilings.mix}: {problem}")
            continue
        for kernel, seconds in time_kernels(operands, tilings).items():
            figures.append({
                "kernel": kernel, "seconds": seconds, "chosen": index == 0,
                **tiling_of(tilings, kernel),
            })  # fmt: skip
    for kernel in (*PLACES, "other"):
        rows = sorted(
            (entry for entry in figures if entry["kernel"] == kernel),
            key=lambda entry: entry["seconds"],
        )
        for row in [*rows[: options.best], *(row for row in rows if row["chosen"])]:
            words = " ".join(f"{key}={value}" for key, value in row.items() if key != "seconds")
            sys.stdout.write(f"{1e6 * row['seconds']:9.1f} us  {words}\n")
    if options.json is not None:
        write_figures(
            options.json,
            {
                "benchmark": "tilings", "device": device_name(device), "shape": list(shape),
                "slots": options.slots, "layout": options.layout, "dtype": options.dtype,
                "torch": torch.__version__, "kernels": figures,
            },
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
