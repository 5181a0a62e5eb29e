"""Draw images with a trained run: a grid, single files, and attention maps over them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from eanet.engine.distributed import join_processes
from eanet.engine.run_folder import write_text
from eanet.engine.state import load_networks
from eanet.errors import UserError, unknown_name
from eanet.report.attention import salient_slots, slot_grid
from eanet.report.figures import picture
from eanet.run import open_run

__all__ = ["Generated", "generate"]

#: images that attention maps are drawn over
_MAX_MAPPED = 8


@dataclass
class Generated:
    """What was drawn.

    Args:
        images: bytes, (images, height, width, channels).
        labels: class of each.
        files: everything written.
    """

    images: np.ndarray
    labels: list[int]
    files: list[Path] = field(default_factory=list[Path])


def generate(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    num: int = 64,
    classes: Sequence[str] = (),
    seed: int = 0,
    checkpoint: Literal["best", "last"] = "best",
    weights: Literal["raw", "ema"] | None = None,
    batch_size: int = 64,
    singles: bool = True,
    interpolate: bool = False,
    slots: Sequence[int] | None = None,
    device: str = "auto",
) -> Generated:
    """Draw images with the generator of a run; the same ones for the same arguments.

    Args:
        folder: the run folder.
        out: where to write ``grid.png``, ``images/*.png``, ``images.json`` and, where asked for,
            ``interpolation.png`` and ``attention-*.png``; ``None`` writes nothing.
        num: how many images; they go through the classes in turn.
        classes: names or numbers of those to draw; all where none is given.
        seed: of the latent vectors.
        checkpoint: the one with the best validation, or the newest.
        weights: as trained or averaged; ``None`` takes what "best" was chosen by.
        batch_size: images that go through the generator at a time.
        singles: whether each image is written as a file of its own.
        interpolate: whether a picture of ways between latent vectors is written.
        slots: memory slots whose maps are drawn over the first images; an empty list lets the
            most telling ones be chosen, ``None`` draws none.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        UserError: the folder is no run of a generator, or a class or slot does not exist.
    """
    if num < 1:
        raise UserError(f"--num must be at least 1, got {num}")
    opened = open_run(folder)
    task: Any = opened.task
    if not hasattr(task.model, "generate"):
        raise UserError(f"{folder}: a run of {opened.recipe.task}; only generation draws images")
    labels = _labels(classes, task, num)
    load_networks(opened.folder, task.networks, which=checkpoint, weights=weights)
    with join_processes(device) as processes:
        model: Any = task.model.to(processes.device).eval()
        images = model.generate(
            num,
            labels,
            seed=seed,
            batch_size=batch_size,
            norm_statistics=task.norm_statistics,
        )
        result = Generated(_bytes(images), labels)
        if out is None:
            return result
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        columns = _columns(num, labels, model.num_classes)
        _write_images(result, out, columns=columns, singles=singles, task=task, seed=seed)
        if interpolate:
            from eanet.tasks.generation import pictures

            strip = pictures.interpolation(model, seed=seed, norm_statistics=task.norm_statistics)
            result.files.append(out / "interpolation.png")
            strip.save(result.files[-1])
        if slots is not None:
            result.files += _write_attention(task, model, labels, seed, slots, out)
    return result


def _labels(classes: Sequence[str], task: Any, num: int) -> list[int]:
    """Return the class of each image."""
    names: list[str] = task.class_names
    if classes and task.model.num_classes is None:
        raise UserError("--classes: this run is unconditional, its images have no class")
    chosen: list[int] = []
    for name in classes:
        if name in names:
            chosen.append(names.index(name))
        elif name.isdigit() and int(name) < len(names):
            chosen.append(int(name))
        else:
            raise unknown_name("class", name, names)
    chosen = chosen or list(range(task.model.num_classes or 1))
    # class after class, so that a grid has a row for each
    return sorted((chosen * (-(-num // len(chosen))))[:num], key=chosen.index)


def _columns(num: int, labels: Sequence[int], num_classes: int | None) -> int:
    """Return how many images stand in a row: one row for a class where that comes out even."""
    counts = {labels.count(label) for label in set(labels)}
    if num_classes and len(counts) == 1 and 4 <= next(iter(counts)) <= 20:
        return next(iter(counts))
    return max(1, round(num**0.5))


def _bytes(images: torch.Tensor) -> np.ndarray:
    from eanet.tasks.generation.samples import to_bytes

    return to_bytes(images)


def _write_images(
    result: Generated, out: Path, *, columns: int, singles: bool, task: Any, seed: int
) -> None:
    """Write the grid, single images and what they are."""
    from eanet.tasks.generation import pictures

    result.files.append(out / "grid.png")
    pictures.mosaic(result.images, columns).save(result.files[-1])
    records: list[dict[str, Any]] = []
    digits = len(str(len(result.images) - 1))
    for number, (image, label) in enumerate(zip(result.images, result.labels, strict=True)):
        record: dict[str, Any] = {"number": number, "seed": seed}
        if task.model.num_classes is not None:
            record["label"] = task.class_names[label]
        if singles:
            file = out / "images" / f"{number:0{digits}d}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file)
            result.files.append(file)
            record["file"] = f"images/{file.name}"
        records.append(record)
    result.files.append(out / "images.json")
    write_text(result.files[-1], json.dumps(records, indent=2, ensure_ascii=False) + "\n")


def _write_attention(
    task: Any, model: Any, labels: Sequence[int], seed: int, slots: Sequence[int], out: Path
) -> list[Path]:
    """Write maps of memory slots over the first images, a file for each attention layer."""
    from eanet.tasks.generation import pictures
    from eanet.tasks.generation.adversarial_pair import sampling_statistics

    count = min(len(labels), _MAX_MAPPED)
    # the latent vectors of the images that were drawn
    source = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(labels), model.latent_size, generator=source)[:count]
    with sampling_statistics(model.generator, "running"):
        images, found = pictures.slot_maps(model.generator, latents, torch.tensor(labels[:count]))
    if not found:
        raise UserError("--slots: the generator of this run has no external attention")
    titles = pictures.titles(
        labels[:count], task.class_names, conditional=model.num_classes is not None
    )
    files: list[Path] = []
    for place, maps in found.items():
        wrong = [slot for slot in slots if not 0 <= slot < maps.shape[1]]
        if wrong:
            raise UserError(f"--slots: {wrong[0]} is outside 0..{maps.shape[1] - 1}")
        shown = list(slots) or salient_slots(maps, 6)
        figure = slot_grid(list(images), maps, titles=titles, slots=shown)
        files.append(out / f"attention-after-block-{place}.png")
        files[-1].write_bytes(picture(figure, "").data)
    return files
