"""Time and memory of the external attention block in three forms, side by side in one run.

``paper``: the equations and Algorithm 1 in their order, as the authors' code runs them.
``product``: our layer, which forms the products of the weights first.
``fused``: our layer folded for inference.

Each of ours runs on maps that lie channels first and channels last, and the folded one also into a
buffer that the caller holds: where memory comes in pages of 4 KiB, a fresh result of 32 MiB takes
about as long as all products. How far that goes shows a second run in a process with large pages.

Beside the times stands the share of the limit, see :mod:`eanet.bench.limits`.

Run ``python -m eanet.bench.block --help``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eanet.bench.limits import (
    Limit,
    external_attention_work,
    limit_of,
    measure_machine_rates,
)
from eanet.bench.measure import (
    Measurement,
    device_name,
    measure_interleaved,
    write_figures,
    write_line,
)
from eanet.nn.external_attention import ExternalAttention2d
from eanet.nn.fusion import fuse

__all__ = ["PaperBlock", "benchmark_block", "format_table", "main"]


class PaperBlock(nn.Module):
    """The block step by step: convolution, attention, convolution, batch norm, residual, ReLU.

    Eq. 7-11 and Algorithm 1, arXiv 2105.02358, with the layers that the authors' code puts around
    them. It shares the parameters of one of our layers.

    Args:
        block: the layer whose parameters are used.
    """

    def __init__(self, block: ExternalAttention2d) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's result for (batch, channels, height, width)."""
        block = self.block
        assert block.query is not None
        assert block.projection is not None
        assert block.norm is not None
        query = block.query(x).flatten(2)
        logits = F.conv1d(query, block.memory_key.unsqueeze(-1))
        attention = torch.softmax(logits, dim=-1)
        attention = attention / (block.eps + attention.sum(dim=1, keepdim=True))
        result = F.conv1d(attention, block.values.transpose(0, 1).unsqueeze(-1))
        return F.relu(x + block.norm(block.projection(result.view_as(x))))


def _training_step(network: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], object]:
    """Return a function that runs forward and backward with gradients of input and parameters."""
    tensors = [x, *network.parameters()]

    def step() -> object:
        return torch.autograd.grad(network(x), tensors, cotangent)

    return step


def _inference(network: nn.Module, x: Tensor, out: Tensor | None = None) -> Callable[[], object]:
    """Return a function that runs forward without gradients, into ``out`` where there is one."""
    arguments = {} if out is None else {"out": out}

    def run() -> object:
        with torch.inference_mode():
            return network(x, **arguments)

    return run


def benchmark_block(
    shape: Sequence[int] = (1, 512, 128, 128),
    *,
    num_slots: int = 64,
    rounds: int = 9,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure the block in inference and in a training step.

    Args:
        shape: (batch, channels, height, width) of the input.
        num_slots: number of memory slots.
        rounds: timed rounds; the median is reported.
        device: where to run.
        dtype: type of input and parameters.
        progress: called with a line now and then.

    Returns:
        JSON values: settings, machine, the limit of each mode, and for each mode and form the
        median seconds, all seconds, peak bytes, speed relative to ``paper``, share of the limit,
        and the largest difference of its result from ``paper`` in float64.

    Raises:
        ValueError: the shape has no four positive sizes, or rounds is below 1.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape must be four positive sizes (B, C, H, W), got {tuple(shape)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    generator = torch.Generator().manual_seed(0)
    place = torch.device(device)
    x = torch.randn(*shape, generator=generator).to(place, dtype)
    cotangent = torch.randn(*shape, generator=generator).to(place, dtype)
    block = ExternalAttention2d(shape[1], num_slots).to(place, dtype)
    results: dict[str, Any] = {}
    limits: dict[str, Limit] = {}
    progress("the limit")
    rates = measure_machine_rates(device=place, dtype=dtype)
    for mode in ("inference", "training"):
        block.train(mode == "training")
        forms: dict[str, nn.Module] = {"paper": PaperBlock(block), "product": block}
        if mode == "inference":
            forms["fused"] = fuse(block)
        functions = _functions(mode, forms, x, cotangent)
        work = external_attention_work(
            shape[2] * shape[3], shape[1], num_slots, training=mode == "training",
            batch=shape[0], bytes_per_value=dtype.itemsize,
        )  # fmt: skip
        limits[mode] = limit_of(work, rates, device=place, dtype=dtype)
        progress(mode)
        measured = measure_interleaved(functions, rounds=rounds, device=place, progress=progress)
        results[mode] = _summary(measured, _differences(block, forms, x), limits[mode])
    return {
        "benchmark": "external attention block",
        "shape": list(shape),
        "num_slots": num_slots,
        "rounds": rounds,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(place),
        "torch": torch.__version__,
        "memory": "peak of PyTorch's allocations during one run, beyond input and parameters",
        "rates": asdict(rates),
        "limits": {
            mode: asdict(limit) | {"seconds": limit.seconds, "bound": limit.bound}
            for mode, limit in limits.items()
        },
        "results": results,
    }


def _functions(
    mode: str, forms: dict[str, nn.Module], x: Tensor, cotangent: Tensor
) -> dict[str, Callable[[], object]]:
    """Return what is timed in a mode: each form in both layouts, and into a held buffer."""
    functions: dict[str, Callable[[], object]] = {}
    layouts = {"": torch.contiguous_format, ", channels last": torch.channels_last}
    for layout, memory_format in layouts.items():
        laid = x.contiguous(memory_format=memory_format)
        if mode == "training":
            leaf, gradient = laid.detach().requires_grad_(), cotangent.contiguous(
                memory_format=memory_format
            )  # fmt: skip
            for name, network in forms.items():
                functions[name + layout] = _training_step(network, leaf, gradient)
            continue
        for name, network in forms.items():
            functions[name + layout] = _inference(network, laid)
        held = torch.zeros_like(laid)
        functions["fused, out=" + layout] = _inference(forms["fused"], laid, held)
    return functions


@torch.no_grad()
def _differences(
    block: ExternalAttention2d, forms: dict[str, nn.Module], x: Tensor
) -> dict[str, float]:
    """Return the largest difference of each form from the paper's form run in float64."""
    statistics = {name: buffer.clone() for name, buffer in block.named_buffers()}
    exact = PaperBlock(block)
    actual = {name: network(x) for name, network in forms.items()}
    dtype = x.dtype
    expected = exact.double()(x.double())
    block.to(dtype)
    for name, buffer in block.named_buffers():
        buffer.copy_(statistics[name])
    return {name: (out - expected).abs().max().item() for name, out in actual.items()}


def _summary(
    measured: dict[str, Measurement], difference: dict[str, float], limit: Limit
) -> dict[str, Any]:
    """Return the measurements of one mode as JSON values."""
    paper = measured["paper"]
    return {
        name: {
            "median_seconds": result.median_seconds,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "times_faster_than_paper": paper.median_seconds / result.median_seconds,
            "best_seconds": result.best_seconds,
            "times_faster_in_best_round": paper.best_seconds / result.best_seconds,
            "share_of_limit": limit.seconds / result.median_seconds,
            "share_of_limit_at_cube": limit.seconds_at_cube / result.median_seconds,
            "max_abs_difference": difference[name.partition(",")[0]],
        }
        for name, result in measured.items()
    }


def format_table(report: dict[str, Any]) -> str:
    """Return the measurements as a table for a terminal."""
    shape = " x ".join(str(size) for size in report["shape"])
    lines = [
        f"external attention block, {shape}, {report['num_slots']} slots, {report['dtype']}, "
        f"{report['device']}, median of {report['rounds']} rounds",
        f"a 2048 cube: {report['rates']['cube_macs_per_second'] / 1e9:.0f} G multiply-adds a "
        f"second, by torch.mm {report['rates']['torch_mm_macs_per_second'] / 1e9:.0f}; copies "
        f"{report['rates']['copied_bytes_per_second'] / 2**30:.1f} GiB a second read and written",
        *(
            f"limit, {mode}: {1e3 * limit['seconds']:.1f} ms by {limit['bound']} (products at "
            f"their shapes {1e3 * limit['at_shape']:.1f}, as a 2048 cube "
            f"{1e3 * limit['at_cube']:.1f}, bytes {1e3 * limit['by_bytes']:.1f})"
            for mode, limit in report["limits"].items()
        ),
        "",
        f"{'mode':<10} {'form':<27} {'ms':>8} {'faster':>7} {'best ms':>8} {'faster':>7} "
        f"{'of limit':>8} {'at cube':>8} {'peak MiB':>9} {'max difference':>15}",
    ]
    for mode, forms in report["results"].items():
        for name, result in forms.items():
            lines.append(
                f"{mode:<10} {name:<27} {1e3 * result['median_seconds']:>8.1f} "
                f"{result['times_faster_than_paper']:>6.2f}x "
                f"{1e3 * result['best_seconds']:>8.1f} "
                f"{result['times_faster_in_best_round']:>6.2f}x "
                f"{result['share_of_limit']:>8.0%} {result['share_of_limit_at_cube']:>8.0%} "
                f"{result['peak_bytes'] / 2**20:>9.1f} {result['max_abs_difference']:>15.1e}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="eanet bench block",
        description="Time and memory of the external attention block: the paper's form, the "
        "product form and the fused form, in inference and in a training step.",
    )
    parser.add_argument(
        "--shape", type=int, nargs=4, default=(1, 512, 128, 128), metavar=("B", "C", "H", "W")
    )
    parser.add_argument("--num-slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch on a CPU")
    parser.add_argument(
        "--large-pages",
        action="store_true",
        help="measure once more in a process that gets its memory in large pages (Linux)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    report = benchmark_block(
        options.shape,
        num_slots=options.num_slots,
        rounds=options.rounds,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        progress=lambda line: write_line(line, sys.stderr),
    )
    write_line(format_table(report), sys.stdout)
    if options.large_pages:
        report["with_large_pages"] = _again_with_large_pages(sys.argv[1:] if argv is None else argv)
    if options.json is not None:
        write_figures(options.json, report)
    return 0


def _again_with_large_pages(arguments: Sequence[str]) -> dict[str, Any]:
    """Repeat the measurement where PyTorch asks the system for large pages, and return its report.

    PyTorch reads the variable once, when it first allocates: hence another process.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [
            sys.executable, "-m", "eanet.bench.block",
            *(argument for argument in arguments if argument != "--large-pages"),
            "--json", str(path),
        ]  # fmt: skip
        write_line("\nonce more, with large pages:", sys.stdout)
        subprocess.run(  # noqa: S603 - this program itself
            command, env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}, check=True
        )
        return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
