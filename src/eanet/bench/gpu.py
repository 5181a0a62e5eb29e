"""Everything about speed on a GPU in one unattended run of a few minutes.

1. *Bandwidth*: forward and backward pass of the Triton kernels at 8 x 512 x 128 x 128, in every
   layout and type, as a share of the rate at which this GPU copies. Counted are the bytes nobody
   can avoid: forward x and the result; backward x, the gradient of the result and that of x.
   "Forward for backward" is the forward pass of training, which also keeps the attention;
   "backward" is a training step less that.
2. *Sweep*: the kernels beside the eager path and ``torch.compile`` of the eager path, from few
   tokens to a million, in inference and in a training step; as called from Python, and replayed
   from a CUDA graph, which is the time of the GPU alone.
3. *Contenders*: ``eanet bench ops`` on the GPU, if a minute is left.

Figures are written after each part, so that a run that is cut off leaves what it had.

Run ``python -m eanet.bench.gpu --help``.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eanet.bench import ops
from eanet.bench.limits import (
    MachineRates,
    fastest_seconds,
    measure_machine_rates,
    replayed_seconds,
)
from eanet.bench.measure import device_name, write_figures
from eanet.bench.sweep import Progress, open_device
from eanet.errors import UserError
from eanet.ops.attention import external_attention
from eanet.ops.attention.custom_op import suits

__all__ = [
    "bandwidth",
    "compare_with_compiled",
    "format_bandwidth",
    "format_report",
    "format_sweep",
    "main",
]

#: (batch, channels, height, width) that the targets are stated for
BLOCK = (8, 512, 128, 128)
#: (batch, tokens, channels): few tokens, a segmentation network's, a classifier's, and long ones
SWEEP = (
    (1, 256, 256),
    (8, 16_384, 512),
    (64, 197, 384),
    (1, 1_048_576, 256),
    (1, 4096, 256),
    (1, 16_384, 512),
    (8, 4096, 512),
    (1, 65_536, 256),
    (1, 1024, 256),
    (1, 262_144, 256),
)
#: what is left to the third part, or more
CONTENDERS_SECONDS = 60
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _tokens(shape: Sequence[int], layout: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return random (batch, tokens, channels) whose channels or tokens lie side by side."""
    batch, tokens, channels = shape
    if layout == "channels last":
        return torch.randn(batch, tokens, channels, device=device, dtype=dtype)
    return torch.randn(batch, channels, tokens, device=device, dtype=dtype).transpose(1, 2)


def _memories(
    channels: int, num_slots: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return a memory of keys and one of values."""
    return [
        torch.randn(num_slots, channels, device=device, dtype=dtype) * channels**-0.5
        for _ in range(2)
    ]


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return seconds of a call on its device, on a GPU without the time to launch its kernels."""
    return (replayed_seconds if device.type == "cuda" else fastest_seconds)(call, device)


def bandwidth(
    shape: Sequence[int] = BLOCK,
    *,
    num_slots: int = 64,
    device: torch.device,
    rates: MachineRates,
    backend: str = "triton",
    dtypes: Sequence[torch.dtype] = DTYPES,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure forward and backward pass, and what share of the copy rate they reach.

    Time is that of replays on a GPU: launching the kernels does not count.

    Args:
        shape: (batch, channels, height, width).
        num_slots: S.
        device: where to run.
        rates: of the device, from the same run.
        backend: of :func:`eanet.ops.attention.external_attention`.
        dtypes: of tokens and memories.
        progress: called with a line now and then.
    """
    batch, channels, height, width = shape
    found: list[dict[str, Any]] = []
    for dtype in dtypes:
        for layout in ("channels last", "tokens last"):
            progress(f"bandwidth, {str(dtype).removeprefix('torch.')}, {layout}")
            x = _tokens((batch, height * width, channels), layout, device, dtype)
            tensors = [x, *_memories(channels, num_slots, device, dtype)]

            def forward(tensors: Sequence[Tensor] = tensors) -> Tensor:
                result = external_attention(*tensors, backend=backend)
                assert isinstance(result, Tensor)
                return result

            with torch.no_grad():
                seconds = {"forward": time_call(forward, device)}
            for tensor in tensors:
                tensor.requires_grad_()
            seconds["forward for backward"] = time_call(forward, device)
            cotangent = torch.randn_like(x)
            # a capture holds both passes or none: the backward pass runs where the forward pass did
            step = time_call(
                lambda forward=forward, tensors=tensors, cotangent=cotangent: torch.autograd.grad(
                    forward(), tensors, cotangent
                ),
                device,
            )
            seconds["backward"] = step - seconds["forward for backward"]
            num_bytes = x.numel() * dtype.itemsize
            least = dict.fromkeys(seconds, 2 * num_bytes) | {"backward": 3 * num_bytes}
            found += [
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "layout": layout,
                    "pass": name,
                    "seconds": seconds[name],
                    "least_bytes": least[name],
                    "share_of_copy_rate": least[name]
                    / seconds[name]
                    / rates.copied_bytes_per_second,
                }
                for name in least
            ]
    return found


def compare_with_compiled(
    shapes: Sequence[tuple[int, int, int]] = SWEEP,
    *,
    num_slots: int = 64,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    deadline: float = float("inf"),
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure each backend, and the eager one compiled, at each shape until a deadline.

    Args:
        shapes: (batch, tokens, channels).
        num_slots: S.
        device: where to run.
        dtype: of tokens and memories.
        deadline: no shape is begun after this time of ``time.monotonic``.
        progress: called with a line now and then.
    """

    def attend(x: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
        result = external_attention(x, key, value, backend=backend)
        assert isinstance(result, Tensor)
        return result

    compiled = torch.compile(attend, dynamic=False)
    found: list[dict[str, Any]] = []
    for shape in shapes:
        if time.monotonic() > deadline:
            progress(f"out of time before {shape}")
            break
        progress(f"batch {shape[0]}, {shape[1]:,} tokens, {shape[2]} channels")
        torch.compiler.reset()
        x = _tokens(shape, "channels last", device, dtype)
        tensors = [x, *_memories(shape[2], num_slots, device, dtype)]
        calls = {"eager": (attend, "eager"), "compiled eager": (compiled, "eager")}
        if suits(x, num_slots):
            calls["triton"] = (attend, "triton")
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        cotangent = torch.randn_like(x)
        for name, (function, backend) in calls.items():

            def infer(function: Any = function, backend: str = backend) -> object:
                with torch.no_grad():
                    return function(*tensors, backend)  # noqa: B023 - run before the next shape

            def step(function: Any = function, backend: str = backend) -> object:
                result = function(*leaves, backend)  # noqa: B023
                return torch.autograd.grad(result, leaves, cotangent)  # noqa: B023

            for mode, call in (("inference", infer), ("training", step)):
                entry = {"shape": list(shape), "mode": mode, "name": name}
                entry["seconds"] = time_call(call, device)
                entry["seconds_called"] = fastest_seconds(call, device, budget_seconds=0.1)
                found.append(entry)
    return found


def format_bandwidth(figures: Sequence[dict[str, Any]]) -> str:
    """Return the first part as a Markdown table."""
    lines = [
        "| type | layout | pass | ms | GB/s at least | of the copy rate |",
        "|---|---|---|--:|--:|--:|",
    ]
    for entry in figures:
        rate = entry["least_bytes"] / entry["seconds"] / 1e9
        lines.append(
            f"| {entry['dtype']} | {entry['layout']} | {entry['pass']} "
            f"| {1e3 * entry['seconds']:.3f} | {rate:,.0f} | {entry['share_of_copy_rate']:.0%} |"
        )
    return "\n".join(lines)


def format_sweep(figures: Sequence[dict[str, Any]]) -> str:
    """Return the second part as a Markdown table."""
    lines = [
        "| batch x tokens x channels | mode | eager (ms) | compiled (ms) | triton (ms) "
        "| triton against compiled | the same, as called |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    by_row: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in figures:
        row = (" x ".join(f"{size:,}" for size in entry["shape"]), entry["mode"])
        by_row.setdefault(row, {})[entry["name"]] = entry
    for (shape, mode), entries in by_row.items():
        cells = [
            f"{1e3 * entries[name]['seconds']:.3f}" if name in entries else "-"
            for name in ("eager", "compiled eager", "triton")
        ]
        for key in ("seconds", "seconds_called"):
            ratio = "-"
            if "triton" in entries:
                ratio = f"{entries['compiled eager'][key] / entries['triton'][key]:.2f}x"
            cells.append(ratio)
        lines.append(f"| {shape} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="eanet bench gpu",
        description="Speed on a GPU, unattended: bandwidth of the kernels, the kernels beside "
        "torch.compile, and the contenders of 'eanet bench ops'.",
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="begin nothing after this time (default: 7)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmarks"), metavar="FOLDER",
        help="where gpu.json, gpu.md, gpu-ops.json and plots go (default: results/benchmarks)",
    )  # fmt: skip
    parser.add_argument(
        "--without-contenders", action="store_true", help="leave out 'eanet bench ops'"
    )
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        raise UserError(f"--minutes must be above 0, got {options.minutes}")
    device = open_device(options.device)
    if device.type != "cuda":
        raise UserError(
            f"--device must be a GPU, got {options.device!r}; on a CPU: eanet bench ops"
        )
    deadline = time.monotonic() + 60 * options.minutes
    progress = Progress().say
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = measure_machine_rates(device=device, dtype=torch.bfloat16)
    report: dict[str, Any] = {
        "benchmark": "gpu",
        "device": device_name(device),
        "torch": torch.__version__,
        "copied_bytes_per_second": rates.copied_bytes_per_second,
        "block": list(BLOCK),
    }
    report["bandwidth"] = bandwidth(device=device, rates=rates, progress=progress)
    _keep(options.out, report)
    report["sweep"] = compare_with_compiled(
        device=device, deadline=deadline - CONTENDERS_SECONDS, progress=progress
    )
    _keep(options.out, report)
    sys.stdout.write(format_report(report))
    minutes_left = (deadline - time.monotonic()) / 60
    if not options.without_contenders and minutes_left >= 1:
        ops.main([
            "--device", options.device, "--dtype", "bfloat16", "--max-seconds", "0.5",
            "--rounds", "3", "--minutes", f"{minutes_left:.3f}",
            "--json", str(options.out / "gpu-ops.json"),
            "--markdown", str(options.out / "gpu-ops.md"), "--plots", str(options.out / "gpu-ops"),
        ])  # fmt: skip
    return 0


def format_report(report: dict[str, Any]) -> str:
    """Return what was measured as Markdown."""
    rate = report["copied_bytes_per_second"] / 1e9
    text = (
        f"{report['device']}: copies {rate:,.0f} GB/s\n\n{format_bandwidth(report['bandwidth'])}\n"
    )
    return f"{text}\n{format_sweep(report['sweep'])}\n" if "sweep" in report else text


def _keep(folder: Path, report: dict[str, Any]) -> None:
    """Write what there is so far."""
    write_figures(folder / "gpu.json", report)
    (folder / "gpu.md").write_text(format_report(report), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
