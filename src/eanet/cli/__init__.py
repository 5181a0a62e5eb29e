"""The command line: ``eanet SUBCOMMAND``.

Each module of this package is a subcommand of its name. Its docstring is the help text: the first
line the summary, the part after ``Examples:`` the examples. It offers ``configure(parser)`` and
``execute(arguments) -> int | None``, and imports torch only inside ``execute``.
"""

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eanet._version import __version__
from eanet.errors import Interrupted, UserError, unknown_name

__all__ = ["main"]

#: what the shell sees beside these: 0 done, 1 a fault of the program, 75 stopped by a signal after
#: a checkpoint (see :class:`eanet.errors.Interrupted`)
EXIT_USER_ERROR = 2
EXIT_KEYBOARD_INTERRUPT = 130


def _summaries() -> dict[str, str]:
    """Return the subcommands and their first lines, read without importing them."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.stem.startswith("_"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem.replace("_", "-")] = docstring.partition("\n")[0]
    return found


def _overview() -> str:
    """Return the text of ``eanet --help``."""
    lines = [
        "usage: eanet SUBCOMMAND [options]",
        "",
        "External attention for visual tasks (arXiv 2105.02358).",
        "",
        "subcommands:",
        *(f"  {name:<15}{summary}" for name, summary in _summaries().items()),
        "",
        "options:",
        "  -h, --help     show this text; `eanet SUBCOMMAND --help` shows that of one",
        "  --version      show the version",
        "",
        "Start with:  eanet demo",
    ]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as for every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with the usage."""
        raise UserError(f"{message} (`{self.prog} --help` shows the options)")


def _parser(name: str, docstring: str) -> argparse.ArgumentParser:
    """Make the parser of a subcommand out of its module's docstring."""
    description, _, examples = docstring.partition("Examples:\n")
    return _Parser(
        prog=f"eanet {name}",
        description=description.strip(),
        epilog=f"examples:\n{examples.rstrip()}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code.

    Args:
        argv: the words after ``eanet``; ``None`` takes those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else EXIT_USER_ERROR
    if words[0] == "--version":
        print(f"eanet {__version__}")
        return 0
    try:
        return _run(words[0], words[1:])
    except UserError as error:
        if os.environ.get("EANET_DEBUG"):
            raise
        print(f"eanet: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Interrupted as stop:
        print(f"eanet: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("eanet: interrupted", file=sys.stderr)
        return EXIT_KEYBOARD_INTERRUPT
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(name: str, words: list[str]) -> int:
    """Import one subcommand, parse its options and execute it."""
    summaries = _summaries()
    if name not in summaries:
        raise unknown_name("subcommand", name, summaries, where="`eanet --help` lists all")
    module = importlib.import_module(f"eanet.cli.{name.replace('-', '_')}")
    parser = _parser(name, module.__doc__ or "")
    module.configure(parser)
    overrides: list[str] = []
    if getattr(module, "TAKES_OVERRIDES", False):
        words, overrides = split_overrides(words)
    arguments = parser.parse_args(words)
    arguments.overrides = overrides
    return module.execute(arguments) or 0


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the options of a recipe's fields, told by their dotted names, from all other words.

    >>> split_overrides(["digits", "--optim.lr", "0.1", "--resume"])
    (['digits', '--resume'], ['--optim.lr', '0.1'])
    """
    rest: list[str] = []
    overrides: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            rest.append(word)
            continue
        overrides.append(word)
        if "=" not in word and pending and not pending[0].startswith("--"):
            overrides.append(pending.pop(0))
    return rest, overrides
