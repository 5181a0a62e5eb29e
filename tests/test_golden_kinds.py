"""Every kind of reference value has a test."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOMS = TESTS.parent / "src" / "eanet" / "tasks"


def handled_kinds():
    """Return the kinds named in ``pytest.mark.golden(...)`` anywhere below the tests."""
    kinds = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "golden"
            ):
                kinds |= {
                    argument.value for argument in node.args if isinstance(argument, ast.Constant)
                }
    return kinds


def test_every_kind_has_a_test(golden_cases):
    assert golden_cases, "no reference values were found"
    missing = {case.kind for case in golden_cases} - handled_kinds()
    built = {folder.name for folder in ROOMS.iterdir() if (folder / "__init__.py").exists()}
    without_test = sorted(kind for kind in missing if kind.partition(".")[0] in built)
    assert not without_test, f"no test is marked golden(...) with {without_test}"
    if missing:
        rooms = sorted({kind.partition(".")[0] for kind in missing})
        pytest.skip(f"tasks that are not built yet: {', '.join(rooms)} ({len(missing)} kinds)")
