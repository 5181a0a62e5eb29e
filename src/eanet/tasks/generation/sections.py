"""What the page about a run says of its generated images, beside curves and settings."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eanet.data.loading import derive_seed
from eanet.data.splits import Dataset, Splits
from eanet.engine.evaluation import evaluating
from eanet.report.attention import slot_grid
from eanet.report.figures import picture
from eanet.report.page import Paragraph, Picture, Section, Table
from eanet.tasks.generation import pictures
from eanet.tasks.generation.samples import to_bytes, to_unit_range

if TYPE_CHECKING:
    from eanet.tasks.generation.task import GenerationTask

__all__ = ["compare_real", "draw_spread", "report_sections"]

_BATCH = 100
#: training images that nearest neighbors are looked for among
_MAX_NEIGHBORS = 4000
#: seeds that the spread of a figure is measured over
_DRAWS = 3


def _images(task: "GenerationTask", split: Dataset, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Return some images of a split within [-1, 1], and their labels."""
    batch = task.collate([task.evaluation_transform(split[index]) for index in indices])
    assert batch.labels is not None
    return to_unit_range(batch.images), batch.labels


def _evenly(count: int, of: int) -> list[int]:
    return np.linspace(0, of - 1, min(count, of)).astype(int).tolist()


def compare_real(
    task: "GenerationTask", splits: Splits, test: Dataset, device: torch.device
) -> dict[str, float]:
    """Return the figures of training images in the place of generated ones.

    Args:
        task: with a judge.
        splits: training images come from.
        test: that they are compared with, as many as it has.
        device: of the judge.
    """
    comparison = task.new_metrics(device)
    fakes = np.random.default_rng(0).permutation(len(splits.train))[: len(test)].tolist()
    for start in range(0, max(len(test), len(fakes)), _BATCH):
        real = list(range(start, min(start + _BATCH, len(test))))
        fake = fakes[start : start + _BATCH]
        if not real or not fake:
            break
        images, labels = _images(task, test, real)
        others, their_labels = _images(task, splits.train, fake)
        comparison.update(images.to(device), labels, others.to(device), their_labels)
    figures = comparison.compute(gathers=False)
    return {name: figures[name] for name in task.last_metrics if name in figures}


def draw_spread(task: "GenerationTask", test: Dataset, device: torch.device) -> list[float]:
    """Return the task's chief figure on a split for several seeds of the latent vectors.

    One process of several may call it.
    """
    figures: list[float] = []
    for seed in range(_DRAWS):
        metrics = task.new_metrics(device)
        seeded = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with evaluating(task.networks), seeded:
            torch.manual_seed(derive_seed("draw", seed))
            for start in range(0, len(test), _BATCH):
                indices = range(start, min(start + _BATCH, len(test)))
                samples = [task.evaluation_transform(test[index]) for index in indices]
                task.validation_step(task.collate(samples).to(device), metrics)
        figures.append(metrics.compute(gathers=False)[task.best_metric])
    return figures


def report_sections(task: "GenerationTask", splits: Splits, device: torch.device) -> list[Section]:
    """Return samples, an interpolation, nearest training images and attention.

    Args:
        task: with its networks in evaluation mode.
        splits: of the run.
        device: of the networks.
    """
    model, statistics = task.model, task.norm_statistics
    rows = min(model.num_classes or 0, 10)
    by_class = f", a row for each of: {', '.join(task.class_names[:rows])}" if rows else ""
    samples = pictures.class_grid(model, norm_statistics=statistics)
    strip = pictures.interpolation(model, norm_statistics=statistics)
    sections = [
        Section(
            "Generated images",
            [
                _judge_words(task),
                Picture(pictures.encode(samples), f"Samples, not chosen{by_class}."),
                Picture(
                    pictures.encode(strip),
                    "From one latent vector to another along an arc, the class held fixed: smooth "
                    "ways speak against images learned by heart.",
                ),
            ],
        )
    ]
    nearest = _nearest_section(task, splits, device)
    return [*sections, *([nearest] if nearest else []), *_attention_sections(task)]


def _judge_words(task: "GenerationTask") -> Paragraph:
    judge = task.judge
    if judge is None:
        return Paragraph("No judge was at hand.")
    if judge.kind == "inception":
        words = "FID and Inception Score by Inception-v3."
    else:
        words = (
            f"Figures named {judge.prefix}... follow the formulas of FID and Inception Score on "
            f"the features of another network ({judge.name}); they compare runs that were judged "
            "by the same one with one another, and with nothing published."
        )
    return Paragraph(
        f"{words} Batch norms of the generator use {task.norm_statistics} statistics. The column "
        "of baselines holds training images in the place of generated ones."
    )


def _nearest_section(
    task: "GenerationTask", splits: Splits, device: torch.device, *, count: int = 8
) -> Section | None:
    """Show generated images above the training images nearest to them."""
    if task.judge is None:
        return None
    indices = _evenly(_MAX_NEIGHBORS, len(splits.train))
    features, pixels = [], []
    for start in range(0, len(indices), _BATCH):
        images, _ = _images(task, splits.train, indices[start : start + _BATCH])
        features.append(task.judge(images.to(device))[0].cpu())
        pixels.append(images)
    known, shown = torch.cat(features), torch.cat(pixels)
    drawn = task.model.generate(count, seed=1, norm_statistics=task.norm_statistics)
    found = torch.cdist(task.judge(drawn.to(device))[0].cpu(), known).argmin(dim=1)
    both = np.concatenate([to_bytes(drawn), to_bytes(shown[found])])
    words = (
        f"Generated images above, below each the nearest of {len(indices):,} training images by "
        "the judge's features: equal pairs would be images learned by heart."
    )
    return Section(
        "Nearest training images", [Picture(pictures.encode(pictures.mosaic(both, count)), words)]
    )


def _attention_sections(task: "GenerationTask", *, count: int = 4) -> list[Section]:
    """Show where memory slots look while the generator draws."""
    classes = task.model.num_classes
    labels = torch.arange(count) % (classes or 1)
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(count, task.model.latent_size, generator=source)
    images, maps = pictures.slot_maps(task.model.generator, latents, labels)
    if not maps:
        return []
    names = pictures.titles(labels.tolist(), task.class_names, conditional=classes is not None)
    section = Section(
        "Attention of the memories",
        [
            Paragraph(
                "Each map shows, for one row of the memories (a slot), its share at every "
                "position of the generator's feature map after both normalizations, over the "
                "image that came of it. Every map is stretched to the full range of colors."
            )
        ],
    )
    rows: list[list[str | int | float | None]] = []
    for place, found in maps.items():
        figure = slot_grid(list(images), found, titles=names)
        words = f"After block {place}: the slots that differ most over the image."
        section.parts.append(picture(figure, words))
        shares = found / np.maximum(found.sum(axis=1, keepdims=True), 1e-12)
        entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1).mean()
        rows.append([place, found.shape[1], float(np.exp(entropy)), float(found.max(1).mean())])
    header = ["after block", "slots", "slots in use per position", "largest share of one slot"]
    section.parts.append(Table(header, rows))
    return [section]
