"""Time per token of external attention as the number of tokens grows.

The work for one token does not depend on how many there are, so neither should its time. What could
make it grow are maps that leave the caches, and rows that lie a power of two apart, whose entries
meet in the same lines of a cache. Measured is inference of the folded layer, for tokens
(batch, tokens, channels) and for maps (batch, channels, height, width), with a fresh result and
into a buffer that is held.

Run ``python -m eanet.bench.growth --help``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eanet.bench.measure import Measurement, device_name, measure_interleaved, write_figures
from eanet.bench.sweep import Progress, near_square
from eanet.errors import UserError
from eanet.nn.external_attention import ExternalAttention, ExternalAttention2d

__all__ = ["SIZES", "benchmark_growth", "format_growth", "main"]

#: 4^7 tokens to 4^10, and a million, which is no power of two
SIZES = (16_384, 65_536, 262_144, 1_000_000, 1_048_576)
FORMS = ("tokens", "tokens, out=", "map", "map, out=")


def benchmark_growth(
    sizes: Sequence[int] = SIZES,
    *,
    channels: int = 512,
    num_slots: int = 64,
    rounds: int = 5,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every form at every size.

    Args:
        sizes: numbers of tokens.
        channels: C; the largest size needs two maps of it in memory.
        num_slots: S.
        rounds: timed rounds at each size; a small one is run more often in each.
        device: where to run.
        progress: called with a line now and then.

    Returns:
        JSON values; for each form and size the median nanoseconds for a token, and how many times
        those of the first size they are.
    """
    place = torch.device(device)
    torch.manual_seed(0)
    layer = ExternalAttention(channels, num_slots, residual="input").eval().fused().to(place)
    block = ExternalAttention2d(channels, num_slots).eval().fused().to(place)
    nanoseconds: dict[str, dict[int, float]] = {form: {} for form in FORMS}
    seconds: dict[str, dict[int, list[float]]] = {form: {} for form in FORMS}
    for size in sorted(sizes):
        x = torch.randn(channels * size, device=place)
        held = torch.zeros_like(x)
        height = near_square(size)
        as_map = (1, channels, height, size // height)
        for kind, module, shape in (
            ("tokens", layer, (1, size, channels)),
            ("map", block, as_map),
        ):
            progress(f"N = {size:,}, {kind}")
            calls = {kind: _call(module, x.view(shape), None)}
            calls[f"{kind}, out="] = _call(module, x.view(shape), held.view(shape))
            more = max(1, min(5, 262_144 // size))
            measured = measure_interleaved(calls, rounds=rounds * more, device=place)
            for form, result in measured.items():
                seconds[form][size] = result.seconds
                nanoseconds[form][size] = 1e9 * Measurement(result.seconds).median_seconds / size
    first = min(sizes)
    return {
        "benchmark": "time per token",
        "channels": channels,
        "num_slots": num_slots,
        "sizes": sorted(sizes),
        "device": device_name(place),
        "torch": torch.__version__,
        "nanoseconds_per_token": nanoseconds,
        "times_the_first_size": {
            form: {size: value / by_size[first] for size, value in by_size.items()}
            for form, by_size in nanoseconds.items()
        },
        "seconds": seconds,
    }


def _call(module: torch.nn.Module, x: Tensor, out: Tensor | None) -> Callable[[], object]:
    """Return a function that runs the module once."""

    def run() -> object:
        with torch.inference_mode():
            return module(x) if out is None else module(x, out=out)

    return run


def format_growth(report: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    sizes = report["sizes"]
    lines = [
        f"Nanoseconds for a token, {report['channels']} channels, {report['num_slots']} slots, "
        f"{report['device']}; in brackets: change from N = {sizes[0]:,}",
        "",
        "| form | " + " | ".join(f"N = {size:,}" for size in sizes) + " |",
        "|---" + "|--:" * len(sizes) + "|",
    ]
    for form, by_size in report["nanoseconds_per_token"].items():
        change = report["times_the_first_size"][form].values()  # keys of JSON are strings
        cells = [
            f"{value:,.0f} ({times - 1:+.0%})"
            for value, times in zip(by_size.values(), change, strict=True)
        ]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="eanet bench growth",
        description="Time per token of external attention from 16,384 to 1,048,576 tokens.",
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N")
    parser.add_argument(
        "--channels", type=int, default=512, help="512 needs 5 GiB for a million tokens"
    )
    parser.add_argument("--num-slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    options = parser.parse_args(argv)
    for name in ("channels", "num_slots", "rounds", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if min(options.sizes) < 1:
        raise UserError(f"--sizes must be at least 1, got {min(options.sizes)}")
    torch.set_num_threads(options.threads)
    report = benchmark_growth(
        options.sizes,
        channels=options.channels,
        num_slots=options.num_slots,
        rounds=options.rounds,
        device=options.device,
        progress=Progress().say,
    )
    sys.stdout.write(format_growth(report) + "\n")
    if options.json is not None:
        write_figures(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
