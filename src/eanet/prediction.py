"""Predict on files with a trained run: tables, and annotated pictures."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from eanet.engine.distributed import join_processes
from eanet.engine.evaluation import autocast, evaluating
from eanet.engine.run_folder import write_text
from eanet.engine.state import load_networks
from eanet.engine.task import VisualTask
from eanet.errors import UserError
from eanet.run import open_run

__all__ = ["Prediction", "predict"]


@dataclass
class Prediction:
    """What was predicted on some files.

    Args:
        records: one for each file that could be read, in order.
        failures: for each other file one line that names it and says why.
        files: everything written.
    """

    records: list[dict[str, Any]]
    failures: list[str] = field(default_factory=list[str])
    files: list[Path] = field(default_factory=list[Path])


def predict(
    folder: str | Path,
    files: Sequence[str | Path],
    *,
    out: str | Path,
    checkpoint: Literal["best", "last"] = "best",
    batch_size: int = 16,
    pictures: bool = True,
    device: str = "auto",
    overrides: Sequence[str] = (),
) -> Prediction:
    """Predict on files; write ``predictions.csv``, ``predictions.json`` and annotated pictures.

    Args:
        folder: the run folder.
        files: files, or folders that are searched through for files.
        out: where to write; made if missing.
        checkpoint: the one with the best validation, or the newest.
        batch_size: samples that go through the network at a time.
        pictures: whether annotated pictures are written.
        device: ``auto``, ``cpu``, ``cuda``, ...
        overrides: options that replace fields of the run's recipe, such as ``--options.mirror``.

    Raises:
        UserError: the folder is no run, or not one file can be read.
    """
    opened = open_run(folder, overrides=overrides)
    task, out = opened.task, Path(out)
    (out / "pictures" if pictures else out).mkdir(parents=True, exist_ok=True)
    paths = list(_expand(files))
    load_networks(opened.folder, task.networks, which=checkpoint)
    result = Prediction([])
    with join_processes(device) as processes, evaluating(task.networks), torch.inference_mode():
        for network in task.networks.values():
            network.to(processes.device)
        samples = _with_progress(_readable(task, paths, result.failures), len(paths))
        while group := list(islice(samples, batch_size)):
            batch = task.collate([prepared for _, _, prepared in group]).to(processes.device)
            with autocast(processes.device, opened.recipe.train.precision):
                records = task.predict_batch(batch)
            for (path, sample, _), record in zip(group, records, strict=True):
                shown = {key: value for key, value in record.items() if not key.startswith("_")}
                result.records.append({"file": str(path), **shown})
                if pictures:
                    stem = _unused_stem(out / "pictures", path.stem, result.files)
                    result.files += task.save_prediction(sample, record, stem)
    if not result.records:
        raise UserError(f"no file could be read; the first: {result.failures[0]}")
    result.files += _write_tables(out, result.records)
    return result


def _expand(files: Iterable[str | Path]) -> Iterator[Path]:
    """Yield files, and the visible files below folders in order of their names."""
    for path in map(Path, files):
        if path.is_dir():
            found = sorted(
                inner
                for inner in path.rglob("*")
                if inner.is_file() and not inner.name.startswith(".")
            )
            if not found:
                raise UserError(f"{path}: the folder holds no files")
            yield from found
        elif path.exists():
            yield path
        else:
            raise UserError(f"{path}: there is no such file or folder")


def _readable(
    task: VisualTask, paths: Iterable[Path], failures: list[str]
) -> Iterator[tuple[Path, Any, Any]]:
    """Yield what can be read, as a sample and as the network takes it; note the others."""
    for path in paths:
        try:
            sample = task.read_file(path)
            prepared = task.evaluation_transform(sample)
        except (UserError, OSError) as error:
            failures.append(str(error))
        else:
            yield path, sample, prepared


def _with_progress(samples: Iterator[Any], total: int) -> Iterator[Any]:
    """Show how many of the files are done, where standard error is a terminal."""
    if not sys.stderr.isatty():
        return samples
    from rich.console import Console
    from rich.progress import track

    return iter(track(samples, "predict", total, console=Console(stderr=True)))


def _unused_stem(folder: Path, stem: str, written: Iterable[Path]) -> Path:
    """Return a path without suffix under which nothing was written yet."""
    taken = {path.with_suffix("") for path in written}
    candidate, number = folder / stem, 2
    while candidate in taken:
        candidate, number = folder / f"{stem}-{number}", number + 1
    return candidate


def _write_tables(out: Path, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the records as JSON and, nested values as JSON within cells, as CSV."""
    write_text(out / "predictions.json", json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {
                key: json.dumps(value, ensure_ascii=False)
                if isinstance(value, dict | list)
                else value
                for key, value in record.items()
            }
        )
    write_text(out / "predictions.csv", text.getvalue())
    return [out / "predictions.json", out / "predictions.csv"]
