"""What goes wrong on the user's side, said in one line.

The command line prints these without a traceback and exits with code 2. Everything else that is
raised is a fault of the program and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

__all__ = ["Interrupted", "MissingExtraError", "UserError", "unknown_name"]


class UserError(ValueError):
    """A mistake the user can mend: the message names the file or field and the remedy."""


class MissingExtraError(UserError, ImportError):
    """A library of an optional extra is not installed.

    Args:
        library: the import name that was not found.
        extra: the extra of this package that brings it.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library!r} is not installed; it comes with: pip install 'eanet[{extra}]'"
        )


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The run was asked to stop, saved a checkpoint, and can be continued.

    A command exits with :attr:`exit_code`, EX_TEMPFAIL of sysexits.h: run it again.
    """

    exit_code = 75


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """Build the error for a name that does not exist, with the nearest ones that do.

    Args:
        kind: what was looked for, such as ``"model"``.
        name: what the user wrote.
        known: all names that exist.
        where: a command or place that lists them, for the last sentence.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    message = f"unknown {kind} {name!r}"
    if near:
        message += "; did you mean " + " or ".join(repr(candidate) for candidate in near) + "?"
    elif len(known) <= 12:
        message += "; known: " + ", ".join(known)
    if where:
        message += f" ({where})"
    return UserError(message)
