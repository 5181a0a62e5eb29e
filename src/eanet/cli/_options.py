"""Options and output that several subcommands share."""

import argparse
import os
from typing import TYPE_CHECKING

from eanet.errors import UserError

if TYPE_CHECKING:
    from eanet.run import RunResult

__all__ = ["add_device", "add_threads", "print_result", "read_size", "use_threads"]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU when there is one), cpu, cuda, cuda:1, mps"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``."""
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)"
    )


def use_threads(arguments: argparse.Namespace) -> None:
    """Apply ``--threads``."""
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(max(arguments.threads, 1))


def read_size(text: str | None, option: str = "--size") -> tuple[int, int] | None:
    """Return height and width that a user wrote as 384 or 384x256.

    Raises:
        UserError: it is neither; the message names the option.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"{option}: expected H or HxW in pixels, such as 224 or 480x640, got {text!r}"
        )
    return int(parts[0]), int(parts[-1])


def print_result(result: "RunResult") -> None:
    """Print what a run reached and where its page is; one process of several prints."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    names = dict.fromkeys(name for found in result.metrics.values() for name in found)
    rows = [["", *result.metrics]]
    for name in names:
        values = [found.get(name) for found in result.metrics.values()]
        rows.append([name, *("-" if value is None else f"{value:.4f}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  " + "   ".join([first.ljust(widths[0]), *cells]))
    print(f"\n  run folder  {result.folder}")
    if result.page is not None:
        print(f"  page        {result.page.resolve().as_uri()}")
