"""Time and memory of the external attention block in three forms, side by side in one run.

``paper``: the equations and Algorithm 1 in their order, as the authors' code runs them.
``product``: our layer, which forms the products of the weights first.
``fused``: our layer folded for inference.

Run ``python -m eanet.bench.block --help``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eanet.bench.measure import Measurement, device_name, measure_interleaved, write_figures
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


def _inference(network: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a function that runs forward without gradients."""

    def run() -> object:
        with torch.inference_mode():
            return network(x)

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
        JSON values: settings, machine, and for each mode and form the median seconds, all seconds,
        peak bytes, speed relative to ``paper``, and the largest difference of its result from
        ``paper`` in float64.

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
    for mode in ("inference", "training"):
        block.train(mode == "training")
        forms: dict[str, nn.Module] = {"paper": PaperBlock(block), "product": block}
        if mode == "inference":
            forms["fused"] = fuse(block)
            functions = {name: _inference(network, x) for name, network in forms.items()}
        else:
            leaf = x.detach().requires_grad_()
            functions = {
                name: _training_step(network, leaf, cotangent) for name, network in forms.items()
            }
        progress(mode)
        measured = measure_interleaved(functions, rounds=rounds, device=place, progress=progress)
        results[mode] = _summary(measured, _differences(block, forms, x))
    return {
        "benchmark": "external attention block",
        "shape": list(shape),
        "num_slots": num_slots,
        "rounds": rounds,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(place),
        "torch": torch.__version__,
        "memory": "peak of PyTorch's allocations during one run, beyond input and parameters",
        "results": results,
    }


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


def _summary(measured: dict[str, Measurement], difference: dict[str, float]) -> dict[str, Any]:
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
            "max_abs_difference": difference[name],
        }
        for name, result in measured.items()
    }


def format_table(report: dict[str, Any]) -> str:
    """Return the measurements as a table for a terminal."""
    shape = " x ".join(str(size) for size in report["shape"])
    lines = [
        f"external attention block, {shape}, {report['num_slots']} slots, {report['dtype']}, "
        f"{report['device']}, median of {report['rounds']} rounds",
        "",
        f"{'mode':<10} {'form':<8} {'ms':>9} {'faster':>7} {'best ms':>9} {'faster':>7} "
        f"{'peak MiB':>9} {'max difference':>15}",
    ]
    for mode, forms in report["results"].items():
        for name, result in forms.items():
            lines.append(
                f"{mode:<10} {name:<8} {1e3 * result['median_seconds']:>9.1f} "
                f"{result['times_faster_than_paper']:>6.2f}x "
                f"{1e3 * result['best_seconds']:>9.1f} "
                f"{result['times_faster_in_best_round']:>6.2f}x "
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    report = benchmark_block(
        options.shape,
        num_slots=options.num_slots,
        rounds=options.rounds,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        progress=lambda line: _say(line, sys.stderr),
    )
    _say(format_table(report), sys.stdout)
    if options.json is not None:
        write_figures(options.json, report)
    return 0


def _say(line: str, stream: Any) -> None:
    """Write a line to a stream at once."""
    stream.write(line + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
