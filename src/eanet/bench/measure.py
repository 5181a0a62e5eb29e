"""Time and memory of functions, measured so that they can be compared with one another."""

import gc
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch

from eanet.engine.run_folder import environment, write_text

__all__ = [
    "Measurement",
    "device_name",
    "measure_interleaved",
    "peak_bytes",
    "write_figures",
    "write_line",
]


@dataclass
class Measurement:
    """What was measured of one function.

    Args:
        seconds: duration of every run, in the order of the rounds.
        peak_bytes: most memory that one run held on top of what was there before it.
    """

    seconds: list[float] = field(default_factory=list[float])
    peak_bytes: int = 0

    @property
    def median_seconds(self) -> float:
        """The median of all rounds."""
        return median(self.seconds)

    @property
    def best_seconds(self) -> float:
        """The shortest of all rounds, the one least disturbed by other work on the machine."""
        return min(self.seconds)


def _synchronize(device: torch.device) -> None:
    """Wait for work in flight, where the device has any."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Measurement]:
    """Run every function once per round, round after round, and take the times.

    A machine that is slowed down by something else slows all functions alike, so that their ratios
    hold. Memory is measured in one more run of each.

    Args:
        functions: what to run, by name.
        rounds: number of timed rounds; one more is run before them and not counted.
        device: where the functions run.
        progress: called with a line after every round.

    Returns:
        Times and peak memory of each function.
    """
    results = {name: Measurement() for name in functions}
    for round_index in range(rounds + 1):
        for name, function in functions.items():
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            if round_index > 0:
                results[name].seconds.append(time.perf_counter() - start)
        progress(f"round {round_index} of {rounds}" + (" (warm-up)" if round_index == 0 else ""))
    for name, function in functions.items():
        results[name].peak_bytes = peak_bytes(function, device)
        progress(f"memory of {name}")
    return results


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that a run held beyond what was there before it.

    On a GPU this is what the caching allocator counts. Elsewhere every allocation and release of
    PyTorch is recorded by its profiler and added up in order; memory that a library takes for
    itself is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # else the profiler's library writes several lines to the terminal for each use
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = list(profile.profiler.kineto_results.events())
    allocations = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def device_name(device: torch.device) -> str:
    """Return what the device is called, and for a CPU how many threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; elsewhere the kind of device must do
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    threads = torch.get_num_threads()
    return f"{name or device.type}, {threads} thread{'s' if threads > 1 else ''}"


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Write what was measured as JSON, with what it depends on beside the code's own report.

    Args:
        path: of the file; missing folders are made.
        figures: JSON values.

    Raises:
        UserError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**figures, "environment": environment()}, indent=2) + "\n")


def write_line(line: str, stream: TextIO) -> None:
    """Write a line at once, so that progress is seen while a measurement runs."""
    stream.write(line + "\n")
    stream.flush()
