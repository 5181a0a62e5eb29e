"""The command line, called as a user would but within this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from eanet.cli import main


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def eanet(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Return a function that runs a command."""

    def run(*words: str | Path) -> Answer:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run


#: a run of seconds: two steps of a small network on the built-in digits
SHORT = (
    "classification_digits/eamlp_tiny",
    "--train.steps",
    "2",
    "--train.evaluate_every",
    "2",
    "--model.arguments.depth",
    "1",
    "--model.arguments.channels",
    "16",
    "--device",
    "cpu",
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("run") / "trained"
    assert main(["train", *SHORT, "--out", str(folder)]) == 0
    return folder
