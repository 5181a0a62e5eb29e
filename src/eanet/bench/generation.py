"""Training steps of EAGAN beside those of SAGAN, and their attention layers alone, in one run.

Both networks have the widths of Tables 8 and 9 and differ in the attention layers only. A step is
one update of the critic, on real and generated images, and one of the generator, optimizers
included. Run ``python -m eanet.bench.generation --help``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eanet import registry
from eanet.bench.measure import (
    Measurement,
    device_name,
    measure_interleaved,
    write_figures,
    write_line,
)

__all__ = ["benchmark_generation", "format_table", "main"]

#: pixels: names of the two networks
_NETWORKS = {
    32: {"sagan": "sagan_32", "eagan": "eagan_32"},
    64: {"sagan": "sagan_64", "eagan": "eagan_64"},
}


def _training_step(model: Any, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """Return a function that updates the critic and then the generator with the hinge loss."""
    generator, critic = model.generator, model.critic
    latents = torch.randn(len(images), model.latent_size, device=images.device)
    optimizers = {
        network: torch.optim.Adam(network.parameters(), 1e-5, (0.0, 0.999), eps=1e-6, fused=True)
        for network in (critic, generator)
    }

    def update(network: nn.Module, loss: Tensor) -> None:
        parameters = list(network.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        optimizers[network].step()
        network.zero_grad(set_to_none=True)

    def step() -> object:
        with torch.no_grad():
            fake = generator(latents, labels)
        real = torch.relu(1 - critic(images, labels)).mean()
        update(critic, real + torch.relu(1 + critic(fake, labels)).mean())
        update(generator, -critic(generator(latents, labels), labels).mean())
        return None

    return step


def _layer_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a function that runs a layer forward and backward."""
    leaf = x.clone().requires_grad_()
    tensors = [leaf, *layer.parameters()]
    cotangent = torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(leaf), tensors, cotangent)


def _layers(models: dict[str, Any], size: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Return for each place the two layers as functions."""
    edge = size // 2
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for place in ("generator", "critic"):
        found[place] = {}
        for name, model in models.items():
            (layer,) = getattr(model, place).attentions.values()
            nn.init.constant_(layer.gamma, 0.5)
            x = torch.randn(batch, layer.channels, edge, edge, device=device)
            found[place][name] = _layer_step(layer.train(), x)
    return found


def benchmark_generation(
    sizes: Sequence[int] = (32, 64),
    *,
    batch_sizes: Sequence[int] = (16, 8),
    rounds: int = 5,
    device: str = "cpu",
    arguments: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure training steps and attention layers.

    Args:
        sizes: edges of the images: 32 and 64.
        batch_sizes: images of a step, one for each size.
        rounds: timed rounds; the median is reported.
        device: where to run.
        arguments: of the networks, such as smaller widths.
        progress: called with a line now and then.

    Returns:
        JSON values: settings, machine, and for each size and part the two measurements.

    Raises:
        ValueError: an unknown size, or lengths differ.
    """
    if not set(sizes) <= set(_NETWORKS) or len(sizes) != len(batch_sizes) or rounds < 1:
        raise ValueError(f"sizes must be of {sorted(_NETWORKS)} with a batch size each, rounds "
                         f"at least 1; got {sizes}, {batch_sizes}, {rounds}")  # fmt: skip
    place = torch.device(device)
    results: dict[str, Any] = {}
    for size, batch in zip(sizes, batch_sizes, strict=True):
        torch.manual_seed(0)
        images = torch.rand(batch, 3, size, size, device=place) * 2 - 1
        labels = torch.randint(10, (batch,), device=place)
        models = {
            name: registry.create_model(network, num_classes=10, **(arguments or {}))
            .to(place)
            .train()
            for name, network in _NETWORKS[size].items()
        }
        parts: dict[str, dict[str, Callable[[], object]]] = {
            "training step": {
                name: _training_step(model, images, labels) for name, model in models.items()
            }
        }
        for where, layers in _layers(models, size, batch, place).items():
            parts[f"attention layer of the {where}"] = layers
        for part, functions in parts.items():
            progress(f"{size} pixels, {part}")
            measured = measure_interleaved(functions, rounds=rounds, device=place)
            results.setdefault(str(size), {})[part] = _summary(measured)
    return {
        "benchmark": "EAGAN beside SAGAN",
        "batch_sizes": dict(zip(map(str, sizes), batch_sizes, strict=True)),
        "rounds": rounds,
        "arguments": arguments or {},
        "dtype": "float32",
        "device": device_name(place),
        "torch": torch.__version__,
        "memory": "peak of PyTorch's allocations during one run, beyond what was there before",
        "results": results,
    }


def _summary(measured: dict[str, Measurement]) -> dict[str, Any]:
    """Return the measurements of one part as JSON values."""
    base = measured["sagan"]
    return {
        name: {
            "median_seconds": result.median_seconds,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "times_faster_than_sagan": base.median_seconds / result.median_seconds,
            "times_faster_in_best_round": base.best_seconds / result.best_seconds,
            "memory_of_sagan": result.peak_bytes / max(base.peak_bytes, 1),
        }
        for name, result in measured.items()
    }


def format_table(report: dict[str, Any]) -> str:
    """Return the measurements as a table for a terminal."""
    lines = [
        f"EAGAN beside SAGAN, {report['dtype']}, {report['device']}, median of "
        f"{report['rounds']} rounds",
        "",
        f"{'pixels':<7} {'batch':>5}  {'part':<32} {'network':<8} {'ms':>9} {'faster':>7} "
        f"{'in best':>8} {'peak MiB':>9} {'memory':>7}",
    ]
    for size, parts in report["results"].items():
        for part, networks in parts.items():
            for name, result in networks.items():
                lines.append(
                    f"{size:<7} {report['batch_sizes'][size]:>5}  {part:<32} {name:<8} "
                    f"{1e3 * result['median_seconds']:>9.1f} "
                    f"{result['times_faster_than_sagan']:>6.2f}x "
                    f"{result['times_faster_in_best_round']:>7.2f}x "
                    f"{result['peak_bytes'] / 2**20:>9.1f} {result['memory_of_sagan']:>6.2f}x"
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="eanet bench generation",
        description="Time and memory of a training step of EAGAN beside one of SAGAN, at 32 and "
        "64 pixels, and of their attention layers alone.",
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], choices=sorted(_NETWORKS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=None, metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    usual = {32: 16, 64: 8}
    report = benchmark_generation(
        options.sizes,
        batch_sizes=options.batch_sizes or [usual[size] for size in options.sizes],
        rounds=options.rounds,
        device=options.device,
        progress=lambda line: write_line(line, sys.stderr),
    )
    write_line(format_table(report), sys.stdout)
    if options.json is not None:
        write_figures(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
