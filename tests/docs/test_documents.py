"""Code in the documentation runs, and the documents say what is there."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [path for path in DOCUMENTS if BLOCK.search(path.read_text(encoding="utf-8"))]


def test_there_is_code_to_run() -> None:
    assert ROOT / "docs/explanation/tour.md" in WITH_CODE
    assert ROOT / "README.md" in WITH_CODE


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_runs(path: Path, tmp_path: Path) -> None:
    program = "\n".join(BLOCK.findall(path.read_text(encoding="utf-8")))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:eanet", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:src|tests|docs|results)/[\w./-]+)`", text):
        assert (ROOT / target).exists(), target


def test_tables_of_results_are_what_the_command_prints() -> None:
    from eanet.results import format_results

    tables = re.compile(r"<!-- eanet results ([^ ]+) -->\n(.*?)<!-- end -->", re.DOTALL)
    found = [
        (path, pattern, table)
        for path in DOCUMENTS
        for pattern, table in tables.findall(path.read_text(encoding="utf-8"))
    ]
    assert found
    for path, pattern, table in found:
        assert table.strip() == format_results(ROOT / "results", pattern), path


def test_the_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


def test_commands_in_the_readme_exist() -> None:
    from eanet.cli import _summaries

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"^eanet ([a-z-]+)", text, re.MULTILINE):
        assert name in _summaries(), name


def test_generated_pages_name_everything() -> None:
    from eanet import cli, registry
    from eanet.recipes.paper import CAPTIONS

    pages = runpy.run_path(str(ROOT / "docs/generate.py"))["PAGES"]
    assert all(f"## eanet {name}" in pages["command-line"]() for name in cli._summaries())
    assert all(f"`{name}`" in pages["models"]() for name in registry.models())
    assert all(f"`{name}`" in pages["recipes"]() for name in registry.recipes())
    assert all(caption in pages["paper-tables"]() for caption in CAPTIONS.values())
    assert all(
        path.name in pages["measured"]() for path in (ROOT / "results/benchmarks").glob("*.json")
    )
