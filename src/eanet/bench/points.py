"""Point clouds: sampling, and classifiers in the form of PCT's published code beside ours.

``upstream`` is a plain transcription of how that code computes: furthest points by a loop with
masked writes, neighbors by expanded squared distances, a grouped tensor of twice the channels for
every neighbor, convolutions and batch norms over it, attention by matrix products. It shares all
parameters with our network, so both give the same logits and gradients.

Run ``python -m eanet.bench.points --help``.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eanet import registry
from eanet.bench.measure import (
    Measurement,
    device_name,
    measure_interleaved,
    peak_bytes,
    write_figures,
    write_line,
)
from eanet.ops.points import farthest_point_sample

__all__ = [
    "UpstreamClassifier",
    "benchmark_memory",
    "benchmark_points",
    "format_table",
    "main",
    "masked_write_sample",
]

#: of sampling: clouds, points, samples
_SAMPLING = (32, 1024, 512)
#: that see a cloud of a million points
_LARGE = ("eat_cls", "eat_small_parts")


def masked_write_sample(points: Tensor, num_samples: int) -> Tensor:
    """Sample furthest points as usual in PyTorch code: fancy indexing, distances under a mask."""
    batch, num_points, _ = points.shape
    chosen = torch.zeros(batch, num_samples, dtype=torch.long, device=points.device)
    nearest = torch.full((batch, num_points), 1e10, dtype=points.dtype, device=points.device)
    furthest = torch.zeros(batch, dtype=torch.long, device=points.device)
    rows = torch.arange(batch, device=points.device)
    for number in range(num_samples):
        chosen[:, number] = furthest
        center = points[rows, furthest].view(batch, 1, -1)
        distance = ((points - center) ** 2).sum(-1)
        closer = distance < nearest
        nearest[closer] = distance[closer]
        furthest = nearest.max(-1)[1]
    return chosen


def _index(points: Tensor, indices: Tensor) -> Tensor:
    """Take points by fancy indexing over the batch."""
    rows = torch.arange(len(points), device=points.device).view(-1, *[1] * (indices.ndim - 1))
    return points[rows.expand_as(indices), indices]


def _neighbors(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """Find neighbors by |a|^2 - 2ab + |b|^2."""
    distances = -2 * torch.matmul(queries, points.transpose(1, 2))
    distances = distances + queries.square().sum(-1).unsqueeze(2)
    distances = distances + points.square().sum(-1).unsqueeze(1)
    return distances.topk(k, dim=-1, largest=False, sorted=False)[1]


def _convolve(x: Tensor, linear: nn.Linear) -> Tensor:
    """Apply a linear map as a convolution of (batch, channels, points)."""
    return F.conv1d(x, linear.weight.unsqueeze(-1), linear.bias)


def _normalize(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Apply a batch norm over (batch, channels, points), with the statistics of our layer."""
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=norm.training,
        momentum=norm.momentum or 0.0,
        eps=norm.eps,
    )


class UpstreamClassifier(nn.Module):
    """A classifier of this package, computed as PCT's published code does.

    Args:
        model: ``pct_cls``, ``eat_cls`` or a variant with neighbor embedding.
        sample: how furthest points are sampled.
    """

    def __init__(
        self, model: Any, sample: Callable[[Tensor, int], Tensor] = masked_write_sample
    ) -> None:
        super().__init__()
        self.model = model
        self.sample = sample

    def forward(self, points: Tensor) -> Tensor:
        """Return the logits of clouds (batch, points, 3)."""
        encoder: Any = self.model.encoder
        embedding = encoder.embedding
        x = points.transpose(1, 2)
        for layer in embedding.points:
            x = F.relu(_normalize(_convolve(x, layer.linear), layer.norm))
        features, coordinates = x.transpose(1, 2), points
        for number, stage in enumerate(embedding.stages):
            centers = self.sample(coordinates, embedding.num_centers[number])
            chosen = _index(coordinates, centers)
            k = embedding.num_neighbors[number]
            grouped = self._group(features, centers, _neighbors(chosen, coordinates, k))
            features, coordinates = self._aggregate(grouped, stage).transpose(1, 2), chosen
        x = embedded = features.transpose(1, 2)
        for layer in encoder.middle:
            x = F.relu(_normalize(_convolve(x, layer.linear), layer.norm))
        found = []
        for layer in encoder.layers:
            x = self._attend(x, layer)
            found.append(x)
        x = torch.cat([*found, embedded], dim=1)
        x = F.leaky_relu(_normalize(_convolve(x, encoder.fuse.linear), encoder.fuse.norm), 0.2)
        return self.model.classifier(self.model.head(x.max(2)[0]))

    @staticmethod
    def _group(features: Tensor, centers: Tensor, neighbors: Tensor) -> Tensor:
        """Return (f_j - f_i, f_i) for every neighbor."""
        own = _index(features, centers).unsqueeze(2)
        near = _index(features, neighbors)
        return torch.cat([near - own, own.expand(-1, -1, neighbors.shape[2], -1)], dim=-1)

    @staticmethod
    def _aggregate(grouped: Tensor, stage: Any) -> Tensor:
        """Convolve every neighborhood as a sequence of its own; take the maximum."""
        batch, num_centers, k, channels = grouped.shape
        x = grouped.permute(0, 1, 3, 2).reshape(-1, channels, k)
        x = F.relu(_normalize(_convolve(x, stage.linear1), stage.norm1))
        x = F.relu(_normalize(_convolve(x, stage.linear2), stage.norm2))
        x = F.adaptive_max_pool1d(x, 1).view(batch, num_centers, -1)
        return x.permute(0, 2, 1)

    @staticmethod
    def _attend(x: Tensor, layer: Any) -> Tensor:
        """Apply a layer of offset attention or of external attention in the offset form."""
        if hasattr(layer, "query_key"):
            query = _convolve(x, layer.query_key)
            energy = torch.bmm(query.permute(0, 2, 1), query)
            attention = torch.softmax(energy, dim=-1)
            attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
            found = torch.bmm(_convolve(x, layer.value), attention)
        else:
            external = layer.attention
            query = _convolve(x, external.query)
            attention = F.conv1d(query, external.memory_key.unsqueeze(-1))
            attention = torch.softmax(attention, dim=-1)
            attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
            found = F.conv1d(attention, external.memory_value.t().unsqueeze(-1))
        return x + F.relu(_normalize(_convolve(x - found, layer.projection), layer.norm))


def _inference(network: nn.Module, points: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return network(points)

    return run


def _training_step(network: nn.Module, points: Tensor, labels: Tensor) -> Callable[[], object]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def step() -> object:
        loss = F.cross_entropy(network(points), labels)
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return step


def benchmark_points(
    models: Sequence[str] = ("pct_cls", "eat_cls"),
    *,
    batch: int = 16,
    training_batch: int = 8,
    num_points: int = 1024,
    sampling: Sequence[int] = _SAMPLING,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure sampling, and evaluation and a training step of classifiers, in both forms.

    Args:
        models: names of classifiers with neighbor embedding.
        batch: clouds of an evaluation.
        training_batch: clouds of a training step.
        num_points: points of a cloud.
        sampling: clouds, points and samples of the sampling.
        rounds: timed rounds.
        progress: called with a line for each round.

    Returns:
        JSON values.
    """
    torch.manual_seed(0)
    device = torch.device("cpu")
    clouds = torch.rand(sampling[0], sampling[1], 3)
    functions: dict[str, Callable[[], Tensor]] = {
        "upstream": lambda: masked_write_sample(clouds, sampling[2]),
        "ours": lambda: farthest_point_sample(clouds, sampling[2]),
    }
    same = torch.equal(functions["upstream"](), functions["ours"]())
    progress("sampling")
    measured = measure_interleaved(functions, rounds=rounds, device=device, progress=progress)
    results: dict[str, Any] = {"sampling": _summary(measured, 0.0 if same else 1.0)}
    for name in models:
        model = registry.create_model(name, dropout=0.0)
        forms = {"upstream": UpstreamClassifier(model), "ours": model}
        for mode, count in (("evaluation", batch), ("training step", training_batch)):
            model.train(mode == "training step")
            points = _clouds(count, num_points)
            labels = torch.arange(count) % 40
            difference = _difference(forms, points)
            run = {
                form: _inference(network, points)
                if mode == "evaluation"
                else _training_step(network, points, labels)
                for form, network in forms.items()
            }
            progress(f"{name}, {mode}")
            found = measure_interleaved(run, rounds=rounds, device=device, progress=progress)
            results[f"{name}, {mode}"] = _summary(found, difference)
    return {
        "benchmark": "point clouds",
        "batch": batch,
        "training_batch": training_batch,
        "num_points": num_points,
        "sampling": list(sampling),
        "rounds": rounds,
        "device": device_name(device),
        "torch": torch.__version__,
        "memory": "peak of PyTorch's allocations during one run, beyond input and parameters",
        "results": results,
    }


def benchmark_memory(
    *,
    segmenter: str = "eat_parts",
    batch: int = 16,
    num_points: int = 2048,
    large: Sequence[str] = _LARGE,
    large_points: int = 1_000_000,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure the memory of a training step of part segmentation, and of very large clouds.

    Args:
        segmenter: whose training step.
        batch: clouds of the step.
        num_points: points of each.
        large: networks that see one large cloud.
        large_points: its points.
        progress: called with a line before each measurement.

    Returns:
        JSON values: peak bytes by name, beyond input and parameters.
    """
    torch.manual_seed(0)
    device = torch.device("cpu")
    model: Any = registry.create_model(segmenter).train()
    points, categories = torch.rand(batch, num_points, 3), torch.arange(batch) % 16
    parts = torch.arange(batch * num_points) % 50

    def step() -> object:
        loss = F.cross_entropy(model(points, categories).flatten(0, 1), parts)
        return torch.autograd.grad(loss, list(model.parameters()))

    name = f"{segmenter}, training step, {batch} clouds of {num_points} points"
    progress(name)
    peaks = {name: peak_bytes(step, device)}
    cloud = torch.rand(1, large_points, 3)
    for name in large:
        network: Any = registry.create_model(name).eval()
        given = (cloud, torch.zeros(1, dtype=torch.int64)) if "_parts" in name else (cloud,)

        @torch.no_grad()
        def look(network: Any = network, given: tuple[Tensor, ...] = given) -> None:
            if not bool(torch.isfinite(network(*given)).all()):
                raise RuntimeError("the result is not finite")

        title = f"{name}, evaluation, one cloud of {large_points} points"
        progress(title)
        peaks[title] = peak_bytes(look, device)
    return {
        "benchmark": "memory of point clouds",
        "device": device_name(device),
        "memory": "peak of PyTorch's allocations during one run, beyond input and parameters",
        "peak_bytes": peaks,
    }


def _clouds(count: int, num_points: int) -> Tensor:
    """Return boxes of different shapes, on a grid: both forms then find the same neighbors."""
    boxes = torch.rand(count, num_points, 3) * (0.1 + torch.rand(count, 1, 3))
    return (boxes * 1024).round() / 1024


@torch.no_grad()
def _difference(forms: Mapping[str, nn.Module], points: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    logits = [network(points) for network in forms.values()]
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def _summary(measured: Mapping[str, Measurement], difference: float) -> dict[str, Any]:
    """Return both forms of one measurement as JSON values."""
    upstream = measured["upstream"]
    return {
        "difference": difference,
        **{
            name: {
                "median_seconds": result.median_seconds,
                "seconds": result.seconds,
                "peak_bytes": result.peak_bytes,
                "times_faster_than_upstream": upstream.median_seconds / result.median_seconds,
            }
            for name, result in measured.items()
        },
    }


def format_table(report: Mapping[str, Any]) -> str:
    """Return the measurements as a table for a terminal."""
    clouds, points, samples = report["sampling"]
    lines = [
        f"point clouds, {report['device']}, median of {report['rounds']} rounds",
        f"sampling: {clouds} clouds, {points} to {samples} points; evaluation: {report['batch']} "
        f"clouds of {report['num_points']}, training step: {report['training_batch']}",
        "",
        f"{'':<24} {'upstream ms':>12} {'ours ms':>9} {'faster':>8} {'upstream MiB':>13} "
        f"{'ours MiB':>9} {'difference':>11}",
    ]
    for name, result in report["results"].items():
        upstream, ours = result["upstream"], result["ours"]
        lines.append(
            f"{name:<24} {1e3 * upstream['median_seconds']:>12.1f} "
            f"{1e3 * ours['median_seconds']:>9.1f} {ours['times_faster_than_upstream']:>7.2f}x "
            f"{upstream['peak_bytes'] / 2**20:>13.0f} {ours['peak_bytes'] / 2**20:>9.0f} "
            f"{result['difference']:>11.1e}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="eanet bench points",
        description="Furthest point sampling, and point cloud classifiers in evaluation and in a "
        "training step: the form of PCT's published code beside ours.",
    )
    parser.add_argument("--models", nargs="+", default=["pct_cls", "eat_cls"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=16, help="clouds of an evaluation")
    parser.add_argument("--training-batch", type=int, default=8, help="clouds of a training step")
    parser.add_argument("--points", type=int, default=1024, help="points of a cloud")
    parser.add_argument(
        "--sampling", type=int, nargs=3, default=_SAMPLING, metavar=("CLOUDS", "POINTS", "SAMPLES")
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure memory instead: part segmentation at 16 clouds of 2,048 points, and clouds "
        "of a million points",
    )
    parser.add_argument(
        "--large", nargs="+", default=_LARGE, metavar="NAME", help="networks of the latter"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.memory:
        report = benchmark_memory(
            large=options.large, progress=lambda line: write_line(line, sys.stderr)
        )
        for name, peak in report["peak_bytes"].items():
            write_line(f"{name}: {peak / 2**30:.2f} GiB", sys.stdout)
        if options.json is not None:
            write_figures(options.json, report)
        return 0
    report = benchmark_points(
        options.models,
        batch=options.batch,
        training_batch=options.training_batch,
        num_points=options.points,
        sampling=options.sampling,
        rounds=options.rounds,
        progress=lambda line: write_line(line, sys.stderr),
    )
    write_line(format_table(report), sys.stdout)
    if options.json is not None:
        write_figures(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
