"""What a run tells while it trains: a bar or lines on the terminal, ``metrics.jsonl``, TensorBoard.

Only the main process of a run has a journal that writes.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from eanet.engine.run_folder import RunFolder, write_text

__all__ = ["Journal", "MetricsLog", "read_metrics_log", "say"]

#: time between lines where there is no terminal to draw a bar on
_LINE_EVERY_SECONDS = 10.0


def read_metrics_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a ``metrics.jsonl``; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and, where wanted and installed, to TensorBoard.

    Args:
        folder: of the run.
        done: steps that are complete; records of later ones, left by a process that died after
            its last checkpoint, are dropped.
        tensorboard: whether event files are written too.
    """

    def __init__(self, folder: RunFolder, *, done: int, tensorboard: bool) -> None:
        folder.make()
        kept = [r for r in read_metrics_log(folder.metrics_log) if r["step"] <= done]
        write_text(folder.metrics_log, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = folder.metrics_log.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            with suppress(ImportError):
                from torch.utils.tensorboard.writer import SummaryWriter

                self._events = SummaryWriter(str(folder.tensorboard), purge_step=done + 1)

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Append a record; numbers that are not finite become null."""
        finite = {key: _finite(value) for key, value in numbers.items()}
        # a whole line at a time, and handed to the system at once: a killed process loses none
        self._file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in numbers.items():
                self._events.add_scalar(f"{kind}/{key}", value, step)

    def make_durable(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def say(message: str) -> None:
    """Show a line before a run has its journal."""
    print(message, file=sys.stderr, flush=True)


class Journal:
    """Records a run and shows how far it is.

    Args:
        folder: of the run; ``None`` writes nothing and shows nothing.
        done: steps that are complete.
        total: steps of the run.
        batch_size: samples of a step.
        tensorboard: whether TensorBoard's event files are written.
        quiet: whether nothing is shown.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        *,
        done: int,
        total: int,
        batch_size: int,
        tensorboard: bool,
        quiet: bool,
    ) -> None:
        self._log = (
            None if folder is None else MetricsLog(folder, done=done, tensorboard=tensorboard)
        )
        self._shows = folder is not None and not quiet
        self._total = total
        self._batch_size = batch_size
        self._first, self._start = done, time.monotonic()
        self._last_line = self._start
        self._numbers = ""
        self._bar = _bar(done, total) if self._shows and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        """Start the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the bar and close the files."""
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.close()

    def say(self, message: str) -> None:
        """Show a line."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        elif self._shows:
            print(message, file=sys.stderr, flush=True)

    def step(self, done: int) -> None:
        """Show that a step is complete."""
        if not self._shows:
            return
        now = time.monotonic()
        steps_per_second = (done - self._first) / max(now - self._start, 1e-9)
        rate = f"{steps_per_second * self._batch_size:.4g} samples/s"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=done, rate=rate, numbers=self._numbers
            )
        elif now - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = now
            left = (self._total - done) / steps_per_second
            self.say(f"step {done}/{self._total}  {rate}  {self._numbers}  {_duration(left)} left")

    def train(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record means over the last steps."""
        if self._log is not None:
            self._log.write("train", step, numbers)
        self._numbers = _short({k: v for k, v in numbers.items() if k.endswith(("loss", "lr"))})

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record and show the metrics of a validation."""
        if self._log is not None:
            self._log.write("validation", step, metrics)
        self.say(f"step {step}/{self._total}  validation  {_short(metrics)}")

    def make_durable(self) -> None:
        """Wait until every record is on the disk."""
        if self._log is not None:
            self._log.make_durable()


def _short(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _bar(done: int, total: int) -> Any:
    """Return a progress bar on the terminal, or ``None`` where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("train", total=total, completed=done, rate="", numbers="")
    return bar
