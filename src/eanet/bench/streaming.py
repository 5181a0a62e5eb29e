"""External attention over ten million tokens and more: time, memory, and error.

The tokens are drawn chunk by chunk from a generator, or lie in a file that is mapped into memory;
nothing of their number is ever held. The result is compared with the equations in float64, whose
logsumexp is taken over all tokens at once, a few slots at a time.

Run ``eanet bench streaming --help``.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eanet.bench.measure import device_name, measure_interleaved, write_figures
from eanet.bench.sweep import Progress
from eanet.errors import UserError
from eanet.ops.attention import eager
from eanet.ops.attention.chunked import chunked_external_attention
from eanet.ops.attention.chunks import ChunkOptions
from eanet.ops.attention.streaming import (
    DEFAULT_CHUNK_TOKENS,
    Source,
    external_attention_chunks,
    external_attention_streaming,
)

__all__ = ["benchmark_streaming", "compare_with_direct", "main"]

#: slots whose float64 logits of all tokens are held at a time by the exact result
_SLOTS_AT_A_TIME = 16


@dataclass(frozen=True)
class _Setting:
    """What is computed: sizes, and the memories with the spread a layer starts from."""

    num_tokens: int
    channels: int
    num_slots: int
    chunk_tokens: int
    eps: float = 1e-9

    def __post_init__(self) -> None:
        for name in ("num_tokens", "channels", "num_slots", "chunk_tokens"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} must be at least 1, got {getattr(self, name)}")

    def memories(self) -> tuple[Tensor, Tensor]:
        """Return keys and values in float32."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.num_slots, self.channels)
        key, value = torch.randn(shape, generator=generator) * (2 / self.channels) ** 0.5
        return key, value

    def chunks(self) -> Iterator[Tensor]:
        """Yield the tokens; a chunk is a function of its place: every pass brings the same."""
        for index, start in enumerate(range(0, self.num_tokens, self.chunk_tokens)):
            generator = torch.Generator().manual_seed(index)
            length = min(self.chunk_tokens, self.num_tokens - start)
            yield torch.randn((1, length, self.channels), generator=generator)


class _Pages:
    """Resident memory of this process, from Linux's ``/proc``; elsewhere nothing is known."""

    def __init__(self) -> None:
        self._status, self._reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        self.known = self._status.exists() and self._reset.exists()
        self._start = 0
        if self.known:
            try:
                self._reset.write_text("5")  # forget the peak so far
            except OSError:  # a container may forbid it
                self.known = False
            else:
                self._start = self._read("VmRSS")

    def _read(self, field: str) -> int:
        for line in self._status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"{self._status} has no {field}")

    def peak_above_start(self) -> int | None:
        """Return the most bytes that were resident above those at the start."""
        return max(self._read("VmHWM") - self._start, 0) if self.known else None


def _counted(
    chunks: Iterable[Tensor], setting: _Setting, what: str, progress: Progress
) -> Iterator[Tensor]:
    """Pass chunks on and say how far they are."""
    done = 0
    for chunk in chunks:
        yield chunk
        done += chunk.shape[1]
        share = done / setting.num_tokens
        bar = "#" * int(30 * share)
        progress.tick(f"{what:<16} [{bar:<30}] {share:4.0%} of {setting.num_tokens:,} tokens")


def _write_tokens(setting: _Setting, path: Path, progress: Progress) -> npt.NDArray[Any]:
    """Write the tokens to a file and return it mapped for reading."""
    with path.open("wb") as file:
        for chunk in _counted(setting.chunks(), setting, "writing", progress):
            file.write(chunk.numpy().tobytes())
    shape = (1, setting.num_tokens, setting.channels)
    return np.memmap(path, np.float32, "r", shape=shape)


def _slot_logsumexp(setting: _Setting, key: Tensor, progress: Progress) -> Tensor:
    """Return the logsumexp over all tokens of each slot in float64, by its definition."""
    found: list[Tensor] = []
    logits = torch.empty(min(_SLOTS_AT_A_TIME, len(key)), setting.num_tokens, dtype=torch.float64)
    for slots in key.double().split(_SLOTS_AT_A_TIME):
        start = 0
        what = f"exact, slot {sum(map(len, found))}"
        for chunk in _counted(setting.chunks(), setting, what, progress):
            part = logits[: len(slots), start : start + chunk.shape[1]]
            torch.mm(slots, chunk[0].double().T, out=part)
            start += chunk.shape[1]
        found.append(torch.logsumexp(logits[: len(slots)], dim=1))
    return torch.cat(found)


def _errors(setting: _Setting, progress: Progress) -> dict[str, float]:
    """Return how far the streamed float32 result is from the exact one, over all tokens."""
    key, value = setting.memories()
    over_tokens = _slot_logsumexp(setting, key, progress)
    worst = largest = 0.0
    results = external_attention_chunks(setting.chunks, key, value, eps=setting.eps)
    for chunk, result in zip(
        _counted(setting.chunks(), setting, "comparing", progress), results, strict=True
    ):
        weights = torch.exp(chunk[0].double() @ key.double().T - over_tokens)  # Eq. 10
        attention = weights / (setting.eps + weights.sum(1, keepdim=True))  # Eq. 11
        exact = attention @ value.double()
        worst = max(worst, (result[0].double() - exact).abs().max().item())
        largest = max(largest, exact.abs().max().item())
    return {"max_abs_error": worst, "max_abs_result": largest}


def benchmark_streaming(
    num_tokens: int = 10_000_000,
    *,
    channels: int = 64,
    num_slots: int = 64,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    folder: Path | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Stream tokens and measure.

    Args:
        num_tokens: N.
        channels: C, of tokens and results.
        num_slots: S.
        chunk_tokens: tokens in memory at a time.
        folder: put tokens and result in memory-mapped files here for the time of the run; ``None``
            draws the tokens twice and drops the result.
        check: compare with the exact result, which takes longer than the rest.
        progress: told how far it is.

    Returns:
        JSON values: sizes, seconds of both passes together, those of drawing or reading the tokens
        alone, peak memory above the start in bytes (``None`` where the system does not say), and
        the errors.
    """
    setting = _Setting(num_tokens, channels, num_slots, chunk_tokens)
    progress = Progress() if progress is None else progress
    start = time.perf_counter()
    for _ in _counted(setting.chunks(), setting, "drawing alone", progress):
        pass
    drawing_seconds = time.perf_counter() - start
    if folder is None:
        streamed = _run_from_generator(setting, progress)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            streamed = _run_from_files(setting, Path(temporary), progress)
            drawing_seconds = 0.0
    return {
        "num_tokens": num_tokens,
        "channels": channels,
        "num_slots": num_slots,
        "chunk_tokens": chunk_tokens,
        "source": "generator" if folder is None else "files",
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        # both passes draw
        "drawing_seconds": 2 * drawing_seconds,
        **streamed,
        **(_errors(setting, progress) if check else {}),
    }


def _run_from_generator(setting: _Setting, progress: Progress) -> dict[str, Any]:
    """Return time and memory of both passes over tokens that are drawn."""
    key, value = setting.memories()
    passes = iter(("gathering", "mixing"))
    pages, start = _Pages(), time.perf_counter()
    results = external_attention_chunks(
        lambda: _counted(setting.chunks(), setting, next(passes), progress),
        key,
        value,
        eps=setting.eps,
    )
    num_results = sum(result.shape[1] for result in results)
    seconds = time.perf_counter() - start
    assert num_results == setting.num_tokens
    return {"seconds": seconds, "peak_bytes": pages.peak_above_start()}


def _run_from_files(setting: _Setting, folder: Path, progress: Progress) -> dict[str, Any]:
    """Return time and memory of both passes over a mapped file, written to another one."""
    key, value = setting.memories()
    source: Source = _write_tokens(setting, folder / "tokens", progress)
    shape = (1, setting.num_tokens, setting.channels)
    out = np.memmap(folder / "result", np.float32, "w+", shape=shape)
    progress.tick("streaming from file to file")
    pages, start = _Pages(), time.perf_counter()
    external_attention_streaming(
        source, key, value, eps=setting.eps, chunk_tokens=setting.chunk_tokens, out=out
    )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": pages.peak_above_start()}


def compare_with_direct(
    num_tokens: int = 262_144,
    *,
    channels: int = 64,
    num_slots: int = 64,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    rounds: int = 7,
) -> dict[str, dict[str, float]]:
    """Measure streaming of a tensor in memory against all tokens at once.

    Args:
        num_tokens: N.
        channels: C.
        num_slots: S.
        chunk_tokens: tokens whose attention is in memory at a time.
        rounds: timed rounds, interleaved.

    Returns:
        For ``inference`` and ``training``: median seconds and peak bytes of both ways.
    """
    setting = _Setting(num_tokens, channels, num_slots, chunk_tokens)
    key, value = (memory.requires_grad_() for memory in setting.memories())
    x = torch.cat(list(setting.chunks()), dim=1).requires_grad_()
    cotangent = torch.randn_like(x)

    def direct() -> Tensor:
        return eager.external_attention(x, key, value)[0]

    def streamed() -> Tensor:
        options = ChunkOptions(chunk_tokens=chunk_tokens)
        return chunked_external_attention(x, key, value, options=options)

    def inference(attend: Any) -> object:
        with torch.inference_mode():
            return attend()

    def training(attend: Any) -> object:
        return torch.autograd.grad(attend(), (x, key, value), cotangent)

    report: dict[str, dict[str, float]] = {}
    for mode in (inference, training):
        functions = {
            "direct": lambda mode=mode: mode(direct),
            "streamed": lambda mode=mode: mode(streamed),
        }
        measured = measure_interleaved(functions, rounds=rounds, device=torch.device("cpu"))
        report[mode.__name__] = {
            f"{name}_{unit}": getattr(result, attribute)
            for name, result in measured.items()
            for unit, attribute in (("seconds", "median_seconds"), ("bytes", "peak_bytes"))
        }
    return report


def _format(report: Mapping[str, Any]) -> str:
    """Return a report as lines for a terminal."""
    peak, mebibyte = report["peak_bytes"], 2**20
    per_second = report["num_tokens"] / report["seconds"] / 1e6
    lines = [
        f"{report['num_tokens']:,} tokens, {report['channels']} channels, {report['num_slots']} "
        f"slots, chunks of {report['chunk_tokens']:,}, float32, {report['device']}",
        f"  time    {report['seconds']:.1f} s for both passes, {per_second:.2f} million tokens/s"
        + (
            f" (of it {report['drawing_seconds']:.1f} s to draw the tokens)"
            if report["drawing_seconds"]
            else ""
        ),
        "  memory  "
        + ("unknown on this system" if peak is None else f"{peak / mebibyte:.1f} MiB above start"),
    ]
    if "max_abs_error" in report:
        lines.append(
            f"  error   {report['max_abs_error']:.1e} at most, of results up to "
            f"{report['max_abs_result']:.2f}, against float64"
        )
    for mode, result in report.get("compared", {}).items():
        ratio = result["streamed_seconds"] / result["direct_seconds"]
        lines.append(
            f"  {mode}: {ratio:.2f} times the time of all tokens at once, "
            f"{result['streamed_bytes'] / mebibyte:.0f} instead of "
            f"{result['direct_bytes'] / mebibyte:.0f} MiB"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="eanet bench streaming",
        description="External attention over any number of tokens in constant memory: time, "
        "resident memory above the start, and the error against float64.",
    )
    parser.add_argument(
        "--num-tokens", type=int, default=10_000_000, metavar="N", help="try 100000000 as well"
    )
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--num-slots", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=DEFAULT_CHUNK_TOKENS)
    parser.add_argument(
        "--folder",
        type=Path,
        help="keep tokens and result in memory-mapped files here during the run (default: draw "
        "the tokens, drop the result)",
    )
    parser.add_argument("--no-check", action="store_true", help="leave the exact result out")
    parser.add_argument(
        "--compare", action="store_true", help="also time a tensor streamed and at once"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"--folder {options.folder}: there is no such folder")
    progress = Progress()
    report = benchmark_streaming(
        options.num_tokens,
        channels=options.channels,
        num_slots=options.num_slots,
        chunk_tokens=options.chunk_tokens,
        folder=options.folder,
        check=not options.no_check,
        progress=progress,
    )
    if options.compare:
        progress.tick("comparing with all tokens at once")
        report["compared"] = compare_with_direct(
            channels=options.channels,
            num_slots=options.num_slots,
            chunk_tokens=options.chunk_tokens,
        )
    progress.tick("")
    sys.stdout.write(_format(report) + "\n")
    if options.json is not None:
        write_figures(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
