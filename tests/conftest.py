"""Options, seeds and shape checks for all tests."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import discover
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# before anything imports them: shapes in annotations are checked while the tests run
install_import_hook(["eanet.ops", "eanet.nn"], "beartype.beartype")

ROOT = Path(__file__).parent.parent
DTYPES = {"float64": torch.float64, "float32": torch.float32}

# The tests run in several processes. Threads that wait for one another while another process has
# their core make small operations ten times slower; the variable reaches the processes tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_addoption(parser):
    group = parser.getgroup("eanet")
    group.addoption("--device", default="cpu", help="device of the tests that take one")
    group.addoption(
        "--dtype", choices=sorted(DTYPES), help="run tests of several types with one only"
    )
    group.addoption(
        "--golden-dir",
        action="append",
        type=Path,
        help="folder with reference values; may be given several times "
        "(default: tests/golden, and ../shared/golden where it exists)",
    )
    group.addoption(
        "--data-dir",
        type=Path,
        help="folder with real data sets (default: ../shared/data where it exists)",
    )


def golden_folders(config) -> tuple[Path, ...]:
    """Return the folders that are searched for reference values; a named one must exist."""
    named = config.getoption("--golden-dir")
    if named:
        for folder in named:
            if not folder.is_dir():
                raise pytest.UsageError(f"--golden-dir {folder}: there is no such folder")
        return tuple(folder.resolve() for folder in named)
    complete = ROOT.parent / "shared" / "golden"
    return tuple(folder for folder in (complete, ROOT / "tests" / "golden") if folder.is_dir())


def pytest_generate_tests(metafunc):
    if "golden_case" in metafunc.fixturenames:
        kinds = {kind for mark in metafunc.definition.iter_markers("golden") for kind in mark.args}
        if not kinds:
            raise pytest.UsageError(f"{metafunc.function.__name__}: mark it golden(<kind>, ...)")
        cases = [case for case in discover(golden_folders(metafunc.config)) if case.kind in kinds]
        metafunc.parametrize(
            "golden_case",
            cases or [pytest.param(None, marks=pytest.mark.skip(f"no case of {sorted(kinds)}"))],
            ids=lambda case: "none" if case is None else case.name,
        )
    if "dtype" in metafunc.fixturenames and not _parametrized(metafunc, "dtype"):
        chosen = metafunc.config.getoption("--dtype")
        names = [chosen] if chosen else list(DTYPES)
        metafunc.parametrize("dtype", [DTYPES[name] for name in names], ids=names)


def _parametrized(metafunc, name):
    """Tell whether a test states its own values for an argument."""
    return any(
        name in [part.strip() for part in mark.args[0].split(",")]
        for mark in metafunc.definition.iter_markers("parametrize")
        if isinstance(mark.args[0], str)
    )


@pytest.fixture(autouse=True)
def seeds():
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device(request):
    """The device to test on."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def data_dir(request):
    """The folder of real data sets; the test is skipped where there is none."""
    named = request.config.getoption("--data-dir")
    if named is not None:
        if not named.is_dir():
            pytest.fail(f"--data-dir {named}: there is no such folder")
        return named
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data sets here; name their folder with --data-dir")
    return folder


@pytest.fixture
def golden_cases(request):
    """All reference cases that were found."""
    return discover(golden_folders(request.config))


@pytest.fixture
def without_shape_checks():
    """Switch the shape checks off: torch.compile and torch.export cannot trace through them."""
    before = jaxtyping_config.jaxtyping_disable
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", before)
