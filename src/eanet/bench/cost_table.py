"""Table 12 of the paper: as published, as counted, and as measured on this machine.

Counted are trainable scalars, and multiply-adds of matrix products and convolutions, by
:func:`eanet.bench.cost.count_cost`. Measured are time and peak memory of inference and of a
training step (forward and backward, with gradients of the input and of all weights), rounds
interleaved. What would not fit the machine is left out, and the table says so.

Run ``eanet bench cost --help``.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eanet.bench.block import PaperBlock
from eanet.bench.contenders import Contender
from eanet.bench.cost import count_cost
from eanet.bench.measure import write_figures
from eanet.bench.sweep import (
    Budget,
    Progress,
    Record,
    Workload,
    conditions,
    default_budget,
    measure_size,
    open_device,
    with_probes,
)
from eanet.errors import UserError
from eanet.nn.compared import COMPARED_MODULES
from eanet.nn.external_attention import ExternalAttention2d
from eanet.recipes.paper import rows

__all__ = ["CountedModule", "count_modules", "format_counts", "format_times", "main", "subjects"]

#: the input of the paper's table: channels, and side of the map
PAPER_CHANNELS, PAPER_SIZE, PAPER_SLOTS = 512, 128, 64
#: labels of the published table, by ours
_PUBLISHED = {"EA, the paper's steps": "EA (Ours)"}
#: why a form of external attention counts what it counts
_OWN_NOTES = {
    "EA, weights multiplied first": "the same function: the two square projections are multiplied "
    "with the memories, so that they never meet the positions",
    "EA, folded for inference": "two matrices and one vector, which is added",
}


def subjects(num_slots: int = PAPER_SLOTS) -> list[Contender]:
    """Return the modules of the table in its order, external attention in three forms last."""

    def block(channels: int) -> ExternalAttention2d:
        return ExternalAttention2d(channels, num_slots)

    compared = [
        Contender(name, "layer", build, takes="map", time_order=order, memory_order=order)
        for name, build in COMPARED_MODULES.items()
        for order in [2 if name in ("SA", "DA", "ACF") else 1]
    ]
    return [
        *compared,
        Contender(
            "EA, the paper's steps",
            "layer",
            lambda channels: PaperBlock(block(channels)),
            takes="map",
        ),
        Contender("EA, weights multiplied first", "layer", block, takes="map", ours=True),
        Contender(
            "EA, folded for inference",
            "layer",
            lambda channels: block(channels).eval().fused(),
            takes="map",
            ours=True,
            trains=False,
        ),
    ]


@dataclass(frozen=True)
class CountedModule:
    """One row: what was published and what is counted.

    Args:
        name: of the module.
        parameters: scalars in its weights.
        macs: multiply-adds of a forward pass at the size that was asked for.
        published_parameters: in millions as printed, where the row and the size are the paper's.
        published_macs: in 10^9 as printed, likewise.
        notes: why figures differ.
    """

    name: str
    parameters: int
    macs: int
    published_parameters: float | None = None
    published_macs: float | None = None
    notes: tuple[str, ...] = ()


def count_modules(
    *,
    channels: int = PAPER_CHANNELS,
    height: int = PAPER_SIZE,
    width: int = PAPER_SIZE,
    num_slots: int = PAPER_SLOTS,
) -> list[CountedModule]:
    """Count every module of the table; nothing is computed, so any size can be asked for.

    Args:
        channels: C.
        height: of the map.
        width: of the map.
        num_slots: S of external attention.
    """
    of_paper = (channels, height, width) == (PAPER_CHANNELS, PAPER_SIZE, PAPER_SIZE)
    published: dict[str, dict[str, Any]] = {}
    for figure in rows(12):
        published.setdefault(figure.row, {})[figure.metric] = figure
    counted: list[CountedModule] = []
    for subject in subjects(num_slots):
        with torch.device("meta"):
            module = subject.build(channels)
        cost = count_cost(module, (1, channels, height, width))
        figures = published.get(_PUBLISHED.get(subject.name, subject.name), {}) if of_paper else {}
        parameters, macs = figures.get("parameters (M)"), figures.get("MACs (G)")
        notes = [
            line for figure in (parameters, macs) if figure for line in figure.note.split("\n")
        ]
        counted.append(
            CountedModule(
                subject.name,
                cost.parameters,
                cost.macs,
                None if parameters is None else parameters.value,
                None if macs is None else macs.value,
                tuple(dict.fromkeys(notes)),
            )
        )
    return counted


def format_counts(counted: Sequence[CountedModule]) -> str:
    """Return the counts as a Markdown table, with the reasons for differences below."""
    notes: dict[str, int] = {}
    lines = [
        "| module | parameters published (M) | counted | in 10^6 | in 2^20 "
        "| MACs published (G) | counted (10^9) | note |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for module in counted:
        marks = [notes.setdefault(note, len(notes) + 1) for note in module.notes]
        lines.append(
            f"| {module.name} | {_number(module.published_parameters, 2)} "
            f"| {module.parameters:,} | {module.parameters / 1e6:.3f} "
            f"| {module.parameters / 2**20:.4f} | {_number(module.published_macs, 1)} "
            f"| {module.macs / 1e9:.3f} | {' '.join(f'[{mark}]' for mark in marks)} |"
        )
    if notes:
        lines += ["", *(f"[{number}] {note}  " for note, number in notes.items())]
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def format_times(records: Sequence[Record]) -> str:
    """Return time and memory as a Markdown table."""
    by_name: dict[str, dict[str, Record]] = {}
    for record in records:
        by_name.setdefault(record.name, {})[record.mode] = record
    lines = [
        "| module | inference (ms) | peak (MiB) | training step (ms) | peak (MiB) |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, modes in by_name.items():
        cells: list[str] = []
        for record in (modes["inference"], modes["training"]):
            if record.left_out:
                cells += [record.left_out, ""]
            else:
                milliseconds = 1e3 * record.median_seconds
                cells += [f"{milliseconds:,.1f}", f"{record.peak_bytes / 2**20:,.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_modules(
    *,
    channels: int,
    size: int,
    num_slots: int,
    device: torch.device,
    dtype: torch.dtype,
    budget: Budget,
    rounds: int | None,
    progress: Progress,
) -> list[Record]:
    """Measure every module in both modes at one size of map.

    Smaller maps come first where the size is large: they tell what it will need.
    """
    modules = subjects(num_slots)
    final: list[Record] = []
    for mode in ("inference", "training"):
        before: list[Record] = []
        for num_tokens, is_probe in with_probes([size * size]):
            progress.say(f"{mode}: N = {num_tokens:,}" + (" (to foretell)" if is_probe else ""))
            before = measure_size(
                modules,
                Workload(num_tokens, channels, device, dtype),
                mode,
                before=before,
                budget=budget,
                rounds=1 if is_probe else rounds,
                progress=progress,
            )
        final += before
    return final


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    options = _parser().parse_args(argv)
    for name in ("channels", "size", "slots", "threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    counted = count_modules(
        channels=options.channels,
        height=options.size,
        width=options.size,
        num_slots=options.slots,
    )
    shape = f"1 x {options.channels} x {options.size} x {options.size}"
    _write(f"Table 12: input {shape}, {options.slots} memory slots\n\n{format_counts(counted)}\n")
    report: dict[str, Any] = {
        "benchmark": "Table 12",
        "shape": [1, options.channels, options.size, options.size],
        "num_slots": options.slots,
        "counts": [vars(module) for module in counted],
    }
    if not options.no_measure:
        device, dtype = open_device(options.device), getattr(torch, options.dtype)
        budget = default_budget(device, options.max_seconds, options.max_gib)
        records = measure_modules(
            channels=options.channels,
            size=options.size,
            num_slots=options.slots,
            device=device,
            dtype=dtype,
            budget=budget,
            rounds=options.rounds,
            progress=Progress(),
        )
        where = conditions(device, dtype)
        report |= {"conditions": where, "measured": [record.as_json() for record in records]}
        _write(
            f"\nMeasured: {', '.join(where.values())}; median of interleaved rounds; "
            f"peak beyond input and weights\n\n{format_times(records)}\n"
        )
    if options.json is not None:
        write_figures(options.json, report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eanet bench cost",
        description="Table 12 of the paper: published, counted, and measured on this machine.",
    )
    parser.add_argument("--channels", type=int, default=PAPER_CHANNELS)
    parser.add_argument(
        "--size", type=int, default=PAPER_SIZE, help="side of the map; 64 where memory is short"
    )
    parser.add_argument("--slots", type=int, default=PAPER_SLOTS, help="memory slots (default 64)")
    parser.add_argument("--no-measure", action="store_true", help="count only, at once")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 3 to 15, by duration)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, help="leave out what a run takes longer"
    )
    parser.add_argument(
        "--max-gib", type=float, help="leave out what holds more (default: 60 %% of free memory)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    return parser


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
