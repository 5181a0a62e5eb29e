"""A segmentation network part by part, and the loader beside it.

Which share of a forward pass the head costs apart from its two 3x3 convolutions, with the block in
the paper's form, as it is built here, and folded; and how many images the loader makes ready for
evaluation in the time that the network takes for one. Run ``python -m eanet.bench.segmentation
--help``.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from eanet import registry
from eanet.bench.block import PaperBlock
from eanet.bench.measure import measure_interleaved, write_figures
from eanet.bench.sweep import Progress, conditions, open_device
from eanet.data.loading import EvaluationBatches
from eanet.errors import UserError
from eanet.nn.fusion import fuse

__all__ = ["benchmark_segmentation", "main"]

#: parts of the head beside its 3x3 convolutions, with the block as it is built
_LIGHT_PARTS = ("block", "classifier", "resize")


@torch.inference_mode()
def benchmark_segmentation(
    model: str,
    *,
    output_stride: int,
    size: tuple[int, int],
    batch: int,
    rounds: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time the parts of a network on their own inputs, interleaved, and the loader.

    Args:
        model: a registered segmentation network with external attention.
        output_stride: of its backbone.
        size: height and width of the images.
        batch: images in a batch.
        rounds: timed rounds.
        device: where the network runs; the loader is on the CPU, in one process.
        progress: is told which part is measured.

    Returns:
        JSON values: median seconds of each part, shares of the sum of all parts, and the loader's
        and the network's images per second.

    Raises:
        UserError: the model is none of that kind.
    """
    network: Any = registry.create_model(model, output_stride=output_stride).to(device).eval()
    block: Any = getattr(network, "attention", None)
    if not hasattr(block, "saliency_map"):
        raise UserError(f"{model!r} is no segmentation network with external attention")
    images = torch.randn(batch, network.in_channels, *size, device=device)
    features = network.backbone(images)[-1]
    reduced = network.reduce(features)
    attended = block(reduced)
    refined = network.refine(attended)
    logits = network.classifier(refined)
    folded, paper = fuse(block), PaperBlock(block).to(device).eval()
    parts: dict[str, Callable[[], object]] = {
        "backbone": lambda: network.backbone(images),
        "reduce (3x3)": lambda: network.reduce(features),
        "block": lambda: block(reduced),
        "refine (3x3)": lambda: network.refine(attended),
        "classifier": lambda: network.classifier(refined),
        "resize": lambda: F.interpolate(
            logits, size, mode="bilinear", align_corners=network.align_corners
        ),
        "block, paper's form": lambda: paper(reduced),
        "block, folded": lambda: folded(reduced),
        "whole": lambda: network(images),
    }
    measured = measure_interleaved(parts, rounds=rounds, device=device, progress=progress)
    seconds = {name: found.median_seconds for name, found in measured.items()}
    progress("loader")
    loaded = _loader_images_per_second(network, size)
    network_speed = batch / seconds["whole"]
    light = sum(seconds[name] for name in _LIGHT_PARTS)
    shares = {
        "block": light / seconds["whole"],
        "block, paper's form": (light - seconds["block"] + seconds["block, paper's form"])
        / (seconds["whole"] - seconds["block"] + seconds["block, paper's form"]),
        "block, folded": (light - seconds["block"] + seconds["block, folded"])
        / (seconds["whole"] - seconds["block"] + seconds["block, folded"]),
    }
    return {
        "benchmark": "segmentation",
        "model": model,
        "output_stride": output_stride,
        "size": list(size),
        "batch": batch,
        "rounds": rounds,
        **conditions(device, torch.float32),
        "seconds": seconds,
        "share_of_head_without_3x3": shares,
        "share_of_attention_and_classifier": (seconds["block"] + seconds["classifier"])
        / seconds["whole"],
        "loader_images_per_second": loaded,
        "network_images_per_second": network_speed,
        "times_loader_is_ahead": loaded / network_speed,
    }


def _loader_images_per_second(network: Any, size: tuple[int, int], num_images: int = 48) -> float:
    """Return how fast one process reads, decodes and stacks JPEG images with PNG masks."""
    room = registry.task("segmentation")
    with TemporaryDirectory() as folder:
        root = Path(folder)
        height, width = size
        noise = np.random.default_rng(0).integers(0, 256, (-(-height // 16), -(-width // 16), 3))
        small = Image.fromarray(noise.astype(np.uint8))
        data = io.BytesIO()
        # smooth, so that the file has the size of a photograph's
        small.resize((width, height), Image.Resampling.BICUBIC).save(data, "JPEG", quality=92)
        mask = np.kron(noise[..., 0] % 20, np.ones((16, 16)))[:height, :width].astype(np.uint8)
        for part in ("images", "masks"):
            (root / part).mkdir()
        for number in range(num_images):
            (root / "images" / f"{number}.jpg").write_bytes(data.getvalue())
            Image.fromarray(mask).save(root / "masks" / f"{number}.png")
        names = [f"class {number}" for number in range(21)]
        source = registry.dataset("segmentation", "mask_folder")
        splits = source(folder, class_names=names).splits
        task = room(network, splits.facts)
        batches = EvaluationBatches(
            splits.train,
            transform=task.evaluation_transform,
            collate=task.collate,
            batch_size=4,
        )
        start = time.perf_counter()
        seen = sum(len(batch) for batch in batches)
        return seen / (time.perf_counter() - start)


def format_report(report: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    whole = report["seconds"]["whole"]
    lines = [
        f"{report['model']}, output stride {report['output_stride']}, "
        f"{report['batch']} x 3 x {report['size'][0]} x {report['size'][1]}, {report['device']}",
        "",
        "| part | milliseconds | share of the whole (%) |",
        "|---|--:|--:|",
    ]
    lines += [
        f"| {name} | {1e3 * seconds:.1f} | {100 * seconds / whole:.1f} |"
        for name, seconds in report["seconds"].items()
    ]
    lines.append("")
    lines += [
        f"head without its 3x3 convolutions, {name}: {100 * share:.1f} %"
        for name, share in report["share_of_head_without_3x3"].items()
    ]
    lines += [
        f"block and classifier alone: {100 * report['share_of_attention_and_classifier']:.1f} %",
        f"loader (one process): {report['loader_images_per_second']:.0f} images/s, network: "
        f"{report['network_images_per_second']:.2f}, so {report['times_loader_is_ahead']:.0f} "
        "times ahead",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    options = _parser().parse_args(argv)
    for name in ("batch", "rounds", "threads", "size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report = benchmark_segmentation(
        options.model,
        output_stride=options.output_stride,
        size=(options.size, options.size),
        batch=options.batch,
        rounds=options.rounds,
        device=open_device(options.device),
        progress=Progress().tick,
    )
    sys.stdout.write(format_report(report))
    if options.json is not None:
        write_figures(options.json, report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eanet bench segmentation",
        description="The parts of a segmentation network, and the loader beside it, in one run.",
    )
    parser.add_argument("--model", default="eanet_resnet50", help="(default: eanet_resnet50)")
    parser.add_argument("--output-stride", type=int, choices=(4, 8, 16, 32), default=16)
    parser.add_argument("--batch", type=int, default=1, help="images in a batch (default: 1)")
    parser.add_argument("--size", type=int, default=513, help="height and width (default: 513)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
