"""External attention against what a user would pick instead, from few tokens to very many.

Functions are compared with functions and layers with layers (:mod:`eanet.bench.contenders`), in
inference and in a training step, at growing N, rounds interleaved. Beside them stands the limit of
the machine, measured in the same run (:mod:`eanet.bench.limits`), and the N from which external
attention is faster.

Run ``eanet bench ops --help``.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eanet.bench.contenders import Contender, Group, contenders
from eanet.bench.limits import (
    Limit,
    MachineRates,
    external_attention_work,
    limit_of,
    measure_machine_rates,
)
from eanet.bench.measure import write_figures
from eanet.bench.sweep import (
    INFERENCE_ONLY,
    Budget,
    Mode,
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
from eanet.registry import import_module

__all__ = ["Sweep", "crossover", "format_sweep", "main", "run_sweep"]

#: powers of 4 from 256 to 1,048,576
SIZES = tuple(4**power for power in range(4, 11))
MODES: tuple[Mode, ...] = ("inference", "training")


@dataclass(frozen=True)
class Sweep:
    """What a run measured.

    Args:
        channels: C.
        num_slots: S.
        records: of every contender, mode and size.
        limits: least times of the function, by mode and size.
        rates: of the machine.
        conditions: device, type and version.
    """

    channels: int
    num_slots: int
    records: tuple[Record, ...]
    limits: dict[tuple[Mode, int], Limit]
    rates: MachineRates
    conditions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "benchmark": "ops",
            "channels": self.channels,
            "num_slots": self.num_slots,
            "conditions": self.conditions,
            "rates": asdict(self.rates),
            "limits": [
                {
                    "mode": mode,
                    "num_tokens": num_tokens,
                    **asdict(limit),
                    "seconds": limit.seconds,
                    "seconds_at_cube": limit.seconds_at_cube,
                    "bound": limit.bound,
                }
                for (mode, num_tokens), limit in self.limits.items()
            ],
            "measured": [record.as_json() for record in self.records],
            "crossovers": [
                {"group": group, "mode": mode, "ours": ours, "other": other, "tokens": tokens}
                for group, mode in _tables(self.records)
                for ours, other, tokens in _crossovers(self.records, group, mode)
            ],
        }


def run_sweep(
    sizes: Sequence[int],
    *,
    channels: int,
    num_slots: int,
    device: torch.device,
    dtype: torch.dtype,
    budget: Budget,
    modes: Sequence[Mode] = MODES,
    rounds: int | None = None,
    chosen: Sequence[Contender] | None = None,
    rates: MachineRates | None = None,
    deadline: float = math.inf,
    keep: Callable[[Sweep], None] = lambda _: None,
    progress: Progress,
) -> Sweep:
    """Measure all contenders at all sizes, small ones first.

    Args:
        sizes: numbers of tokens N.
        channels: C, a multiple of 64.
        num_slots: S.
        device: where to compute.
        dtype: of inputs and weights.
        budget: of a single run.
        modes: inference, training, or both.
        rounds: timed rounds; ``None`` chooses between 3 and 15 by how long they will take.
        chosen: the contenders; ``None`` for all of them.
        rates: of the machine, where they were measured already.
        deadline: no size is begun after this time of ``time.monotonic``.
        keep: called after each size with what there is so far.
        progress: told what happens.
    """
    everyone = contenders(channels, num_slots, device) if chosen is None else chosen
    if rates is None:
        progress.say("measuring the machine: matrix products and copies")
        rates = measure_machine_rates(device=device, dtype=dtype)
    records: list[Record] = []
    limits: dict[tuple[Mode, int], Limit] = {}
    probed: list[Record] = []
    where = dict(conditions(device, dtype))
    sweep = Sweep(channels, num_slots, (), limits, rates, where)
    fitting = _fitting(sizes, everyone, channels, dtype, budget, progress)
    for num_tokens, is_probe in with_probes(fitting):
        if time.monotonic() > deadline:
            progress.say(f"out of time before N = {num_tokens:,}")
            break
        workload = Workload(num_tokens, channels, device, dtype)
        for mode in modes:
            progress.say(f"N = {num_tokens:,}, {mode}" + (" (to foretell)" if is_probe else ""))
            measured = measure_size(
                everyone, workload, mode,
                before=[*probed, *records], budget=budget, rounds=1 if is_probe else rounds,
                progress=progress,
            )  # fmt: skip
            if is_probe:
                probed += measured
                continue
            records += measured
            work = external_attention_work(
                num_tokens, channels, num_slots,
                training=mode == "training", bytes_per_value=dtype.itemsize,
            )  # fmt: skip
            limits[mode, num_tokens] = limit_of(work, rates, device=device, dtype=dtype)
        sweep = replace(sweep, records=tuple(records))
        keep(sweep)
    return sweep


def _fitting(
    sizes: Iterable[int],
    chosen: Iterable[Contender],
    channels: int,
    dtype: torch.dtype,
    budget: Budget,
    progress: Progress,
) -> list[int]:
    """Return the sizes whose inputs, shared by all contenders, a budget allows."""
    kinds = {contender.takes for contender in chosen}
    num_tensors = len(kinds) + (2 if "triple" in kinds else 0) + 1  # and a gradient of the result
    fitting: list[int] = []
    for num_tokens in sizes:
        held = num_tensors * num_tokens * channels * dtype.itemsize
        if held <= budget.num_bytes:
            fitting.append(num_tokens)
        else:
            progress.say(f"leaving out N = {num_tokens:,}: inputs of {held / 2**30:.3g} GiB")
    return fitting


def crossover(ours: Sequence[Record], other: Sequence[Record]) -> float | None:
    """Return the N from which ours is faster at every larger N that was measured of both.

    Between two sizes the ratio of times is taken to follow a power of N.

    Returns:
        The N; 0 where ours is faster at all sizes; infinity where the other is faster at the
        largest; ``None`` where no size was measured of both.
    """
    times = {record.num_tokens: record.median_seconds for record in other if record.seconds}
    advantages = sorted(
        (record.num_tokens, math.log(times[record.num_tokens] / record.median_seconds))
        for record in ours
        if record.seconds and record.num_tokens in times
    )
    if not advantages:
        return None
    if advantages[-1][1] <= 0:
        return math.inf
    slower = [index for index, (_, advantage) in enumerate(advantages) if advantage <= 0]
    if not slower:
        return 0.0
    (low, below), (high, above) = advantages[slower[-1]], advantages[slower[-1] + 1]
    share = -below / (above - below)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def _tables(records: Iterable[Record]) -> list[tuple[Group, Mode]]:
    """Return the groups and modes there are, in the order of measuring, groups first."""
    found: dict[tuple[Group, Mode], None] = dict.fromkeys(
        (record.group, record.mode) for record in records
    )
    return sorted(found, key=lambda key: (key[0] != "function", key[1] != "inference"))


def _select(records: Iterable[Record], group: str, mode: Mode) -> dict[str, list[Record]]:
    """Return the records of a table by contender, without those that have no such mode."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        if (record.group, record.mode) == (group, mode) and record.left_out != INFERENCE_ONLY:
            by_name.setdefault(record.name, []).append(record)
    return by_name


def _crossovers(records: Iterable[Record], group: str, mode: Mode) -> list[tuple[str, str, str]]:
    """Return (ours, other, from which N) for every pair of a table."""
    by_name = _select(records, group, mode)
    return [
        (ours, other, _say_crossover(crossover(by_name[ours], by_name[other])))
        for other in by_name
        for ours in by_name
        if by_name[ours][0].ours and not by_name[other][0].ours
    ]


def _say_crossover(tokens: float | None) -> str:
    if tokens is None:
        return "not measured"
    if tokens == 0:
        return "at every N"
    return "at no N" if math.isinf(tokens) else f"from N = {tokens:,.0f}"


def format_sweep(sweep: Sweep) -> str:
    """Return all tables as Markdown."""
    rates = sweep.rates
    parts = [
        "# External attention and what could take its place",
        f"{sweep.channels} channels, {sweep.num_slots} slots, batch 1; "
        f"{', '.join(sweep.conditions.values())}. Medians of interleaved rounds.",
        f"The machine, at its best in this run: {rates.cube_macs_per_second / 1e9:,.1f} G "
        f"multiply-adds a second in a product of 2048 x 2048 matrices, "
        f"{rates.copied_bytes_per_second / 2**30:,.1f} GiB a second copied (read and written).",
    ]
    for group, mode in _tables(sweep.records):
        by_name = _select(sweep.records, group, mode)
        what = "training step" if mode == "training" else mode
        parts += [
            f"## {group.capitalize()}s, {what}",
            f"Milliseconds\n\n{_format_times(sweep, by_name, group, mode)}",
            f"MiB beyond input and weights, at the peak\n\n{_format_memory(by_name)}",
            f"External attention is faster\n\n{_format_crossovers(sweep.records, group, mode)}",
        ]
        reasons = _reasons(by_name)
        if reasons:
            parts.append("Left out\n\n" + "\n".join(reasons))
    return "\n\n".join(parts) + "\n"


def _reasons(by_name: dict[str, list[Record]]) -> list[str]:
    """Return a line for each contender that stops, with where and why."""
    lines: list[str] = []
    for name, records in by_name.items():
        first = next((record for record in records if record.left_out), None)
        if first is not None:
            lines.append(f"- {name}: stops before N = {first.num_tokens:,}, {first.left_out}")
    return lines


def _format_times(sweep: Sweep, by_name: dict[str, list[Record]], group: str, mode: Mode) -> str:
    """Return the table of times; that of functions ends with the limit."""
    lines = _header(by_name, "contender")
    for name, records in by_name.items():
        cells = [f"{1e3 * r.median_seconds:,.3g}" if r.seconds else "-" for r in records]
        lines.append(_row(name, cells))
    if group != "function":
        return "\n".join(lines)
    limits = [limit for (of, _), limit in sweep.limits.items() if of == mode]
    lines.append(
        _row("limit, products at their shapes", [f"{1e3 * x.seconds:,.3g}" for x in limits])
    )
    lines.append(
        _row("limit, products as the cube", [f"{1e3 * x.seconds_at_cube:,.3g}" for x in limits])
    )
    lines.append(_row("the limit is set by", [limit.bound for limit in limits]))
    sizes = [record.num_tokens for record in next(iter(by_name.values()))]
    shares: list[str] = []
    for size, limit in zip(sizes, limits, strict=True):
        times = [
            record.median_seconds
            for records in by_name.values()
            for record in records
            if record.ours and record.num_tokens == size and record.seconds
        ]
        shares.append(f"{limit.seconds / min(times):.0%}" if times else "-")
    lines.append(_row("our fastest reaches of the first limit", shares))
    lines.append(_row("our fastest against the fastest self-attention", _advantages(by_name)))
    return "\n".join(lines)


def _advantages(by_name: dict[str, list[Record]]) -> list[str]:
    """Return how many times as fast as ``scaled_dot_product_attention`` ours is, at every size."""
    best: dict[tuple[int, bool], float] = {}
    for name, records in by_name.items():
        for record in records:
            if record.seconds and (record.ours or name.startswith("scaled_dot_product")):
                key = record.num_tokens, record.ours
                best[key] = min(best.get(key, math.inf), record.median_seconds)
    sizes = [record.num_tokens for record in next(iter(by_name.values()))]
    return [
        f"{best[size, False] / best[size, True]:,.3g}x"
        if {(size, False), (size, True)} <= best.keys()
        else "-"
        for size in sizes
    ]


def _format_memory(by_name: dict[str, list[Record]]) -> str:
    lines = _header(by_name, "contender")
    for name, records in by_name.items():
        lines.append(
            _row(name, [f"{r.peak_bytes / 2**20:,.3g}" if r.seconds else "-" for r in records])
        )
    return "\n".join(lines)


def _format_crossovers(records: Iterable[Record], group: str, mode: Mode) -> str:
    """Return a table with a row for each other contender and a column for each of ours."""
    found = _crossovers(records, group, mode)
    ours = list(dict.fromkeys(name for name, _, _ in found))
    lines = [_row("than", ours), _row("---", ["--:" for _ in ours], rule=True)]
    for other in dict.fromkeys(name for _, name, _ in found):
        lines.append(_row(other, [tokens for _, name, tokens in found if name == other]))
    return "\n".join(lines)


def _header(by_name: dict[str, list[Record]], first: str) -> list[str]:
    sizes = [record.num_tokens for record in next(iter(by_name.values()))]
    return [
        _row(first, [f"N = {size:,}" for size in sizes]),
        _row("---", ["--:" for _ in sizes], rule=True),
    ]


def _row(first: str, cells: Sequence[str], *, rule: bool = False) -> str:
    return f"|{'|'.join([first, *cells])}|" if rule else f"| {' | '.join([first, *cells])} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    start = time.monotonic()
    options = _parser().parse_args(argv)
    _check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device, dtype = open_device(options.device), getattr(torch, options.dtype)
    progress = Progress()
    rates = None
    if options.quick:
        rates = measure_machine_rates(
            device=device, dtype=dtype, cube_side=256, copy_bytes=1 << 22, budget_seconds=0.01
        )

    def keep(sweep: Sweep) -> None:
        if options.markdown is not None:
            options.markdown.write_text(format_sweep(sweep), encoding="utf-8")
        if options.json is not None:
            write_figures(options.json, sweep.as_json())

    sweep = run_sweep(
        options.sizes or (SIZES[:2] if options.quick else SIZES),
        channels=options.channels or (64 if options.quick else 256),
        num_slots=options.slots,
        device=device,
        dtype=dtype,
        budget=default_budget(device, options.max_seconds, options.max_gib),
        modes=options.modes,
        rounds=1 if options.quick else options.rounds,
        chosen=_chosen(options, device),
        rates=rates,
        deadline=start + 60 * options.minutes,
        keep=keep,
        progress=progress,
    )
    sys.stdout.write(format_sweep(sweep))
    if options.plots is not None:
        limits = {key: limit.seconds for key, limit in sweep.limits.items()}
        draw = import_module("eanet.bench.plots").draw_sweep
        for path in draw(sweep.records, options.plots, limits=limits):
            progress.say(f"wrote {path}")
    return 0


def _chosen(options: argparse.Namespace, device: torch.device) -> list[Contender] | None:
    """Return the contenders that ``--only`` names, ``None`` for all.

    Raises:
        UserError: no contender has such a name.
    """
    if options.only is None:
        return None
    channels = options.channels or (64 if options.quick else 256)
    everyone = contenders(channels, options.slots, device)
    chosen = [one for one in everyone if any(part in one.name for part in options.only)]
    if not chosen:
        names = ", ".join(one.name for one in everyone)
        raise UserError(f"--only {' '.join(options.only)} names no contender; there are: {names}")
    return chosen


def _check(options: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        UserError: a number is below its least value.
    """
    for name in ("channels", "slots", "threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if not options.minutes > 0:
        raise UserError(f"--minutes must be above 0, got {options.minutes}")
    if options.sizes and min(options.sizes) < 1:
        raise UserError(f"--sizes must be at least 1, got {min(options.sizes)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eanet bench ops",
        description="External attention against what a user would pick instead, N = 256 to "
        "1,048,576 tokens, beside the limit of this machine.",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of tokens (default: 4^4 ... 4^10)",
    )
    parser.add_argument("--channels", type=int, help="a multiple of 64 (default: 256)")
    parser.add_argument("--slots", type=int, default=64, help="memory slots (default: 64)")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="contenders whose names contain one of these"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 3 to 15, by duration)")
    parser.add_argument(
        "--max-seconds", type=float, default=10.0, help="stop what takes longer for a run"
    )
    parser.add_argument(
        "--max-gib", type=float, help="stop what holds more (default: 60 %% of free memory)"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no size after this time"
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, one round: a trial")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to a file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write log-log plots")
    return parser


if __name__ == "__main__":
    sys.exit(main())
