"""Tables of measurements in the documentation are what the files of results say."""

import json
import re
from pathlib import Path

import pytest

from eanet.bench.block import format_table
from eanet.bench.gpu import format_report
from eanet.bench.growth import format_growth

ROOT = Path(__file__).parents[2]
FORMATS = {
    "external attention block": format_table,
    "time per token": format_growth,
    "gpu": format_report,
}
#: benchmarks whose tables are Markdown, not text
MARKDOWN = ("time per token", "gpu")
MEASURED = re.compile(
    r"<!-- (?P<file>results/\S+\.json)(?: (?P<part>\w+))? -->\n(?P<table>.*?)<!-- end -->",
    re.DOTALL,
)
FOUND = [
    (path, match) for path in sorted(ROOT.glob("docs/**/*.md"))
    for match in MEASURED.finditer(path.read_text(encoding="utf-8"))
]  # fmt: skip


def table_of(match):
    """Return what the documentation has to say."""
    report = json.loads((ROOT / match["file"]).read_text(encoding="utf-8"))
    report = report[match["part"]] if match["part"] else report
    table = FORMATS[report["benchmark"]](report)
    table = table.rstrip("\n")
    return f"{table}\n" if report["benchmark"] in MARKDOWN else f"```text\n{table}\n```\n"


def test_there_are_tables():
    assert len(FOUND) >= 4


@pytest.mark.parametrize(("path", "match"), FOUND, ids=lambda value: getattr(value, "name", ""))
def test_the_table_is_that_of_the_file(path, match):
    assert match["table"] == table_of(match), f"{path.name} is older than {match['file']}"
