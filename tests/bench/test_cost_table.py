"""Table 12: published beside counted, and what is measured."""

import io
import json
import math
from pathlib import Path

import pytest
import torch

from eanet.bench import cost_table
from eanet.bench.cost import count_cost
from eanet.bench.cost_table import count_modules, format_counts, format_times, main
from eanet.bench.sweep import Budget, Progress, Record, default_budget
from eanet.cli import main as command_line
from eanet.errors import UserError
from eanet.nn.multi_head_external_attention import MultiHeadExternalAttention
from eanet.nn.self_attention import SelfAttention
from eanet.recipes.paper import rows

PAPER, FIRST, FOLDED = (
    "EA, the paper's steps",
    "EA, weights multiplied first",
    "EA, folded for inference",
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny operations wait for a second thread longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def counted():
    return {module.name: module for module in count_modules()}


def test_every_published_row_is_there_with_its_figures(counted):
    published = {
        (figure.row.replace("EA (Ours)", PAPER), figure.metric): figure.value for figure in rows(12)
    }
    shown = {}
    for module in counted.values():
        if module.published_macs is not None:
            shown[module.name, "MACs (G)"] = module.published_macs
        if module.published_parameters is not None:
            shown[module.name, "parameters (M)"] = module.published_parameters
    assert shown == published


def printed(value: float, digits: int) -> set[float]:
    """What a number may be printed as: rounded, or cut."""
    scale = 10**digits
    return {round(value, digits), math.floor(value * scale) / scale}


def test_counts_agree_with_the_published_ones_but_for_those_that_are_explained(counted):
    differing = set()
    for name, module in counted.items():
        if module.published_macs is None:
            continue
        parameters = printed(module.parameters / 2**20, 2)
        if module.published_parameters not in parameters:
            differing.add((name, "parameters"))
        # with the batch norm counted at two operations for each value, Hamburger is 17.559
        if module.published_macs not in printed(module.macs / 1e9, 1) and name != "Ham":
            differing.add((name, "MACs"))
    assert differing == {("DA", "MACs"), ("APC", "MACs"), (PAPER, "parameters"), (PAPER, "MACs")}
    for name in ("DA", "APC", PAPER, "A2", "Ham"):
        assert counted[name].notes


def test_external_attention_in_three_forms(counted):
    tokens = 128 * 128
    assert (counted[PAPER].parameters, counted[PAPER].macs) == (591_360, 9_663_676_416)
    assert counted[FIRST].parameters == 591_360
    assert counted[FOLDED].parameters == 2 * 64 * 512 + 512 == 66_048
    # biases are left out of all counts
    assert counted[FOLDED].macs == 2 * 64 * 512 * tokens
    assert counted[FIRST].macs == counted[FOLDED].macs + 2 * 64 * 512**2
    assert counted["SA"].macs / counted[PAPER].macs == pytest.approx(30.2, abs=0.05)


def test_other_sizes_show_nothing_published():
    modules = count_modules(channels=64, height=16, width=16, num_slots=8)
    assert all(m.published_macs is None and m.published_parameters is None for m in modules)
    paper = next(module for module in modules if module.name == PAPER)
    assert paper.parameters == 2 * 64**2 + 3 * 64 + 2 * 64 * 8
    assert paper.macs == (2 * 64**2 + 2 * 64 * 8) * 256


def test_markdown_has_every_row_in_both_units(counted):
    text = format_counts(list(counted.values()))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    row = next(line for line in lines if line.startswith("| DA "))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:8] == ["4.82", "5,048,962", "5.049", "4.8151", "79.5", "245.887"]
    assert "245.9 G" in text


def test_counting_alone_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(cost_table, "measure_size", None)
    assert command_line(["bench", "cost", "--no-measure"]) == 0
    out, err = capsys.readouterr()
    assert "292.058" in out
    assert "Measured" not in out
    assert err == ""


def test_measured_table_and_file(tmp_path, capsys):
    file = tmp_path / "cost.json"
    words = ["--channels", "16", "--size", "8", "--slots", "4", "--rounds", "2"]
    assert main([*words, "--device", "cpu", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(file.read_text())
    measured = {(record["name"], record["mode"]): record for record in report["measured"]}
    names = [module["name"] for module in report["counts"]]
    assert set(measured) == {(name, mode) for name in names for mode in ("inference", "training")}
    for (name, mode), record in measured.items():
        assert record["num_tokens"] == 64
        if (name, mode) == (FOLDED, "training"):
            assert record["left_out"] == "inference only"
            continue
        assert len(record["seconds"]) == 2
        assert record["median_seconds"] == sum(record["seconds"]) / 2 > 0
        # at least the result is held
        assert record["peak_bytes"] >= 4 * 16 * 64
    assert f"| {FOLDED} |" in out
    assert "inference: N = 64" in err


def test_what_does_not_fit_is_left_out_and_said_so(monkeypatch):
    some = [subject for subject in cost_table.subjects(4) if subject.name in ("SA", "DA", FIRST)]
    monkeypatch.setattr(cost_table, "subjects", lambda _: some)
    records = cost_table.measure_modules(
        channels=16,
        size=68,  # more than 4,096 positions, so that smaller maps come first
        num_slots=4,
        device=torch.device("cpu"),
        dtype=torch.float32,
        # a map of N x N numbers takes 82 MiB, a feature map 0.3 MiB; of 256 x 256 256 KiB
        budget=Budget(seconds=1e9, num_bytes=16 * 2**20),
        rounds=1,
        progress=Progress(io.StringIO()),
    )
    out = {record.name for record in records if record.left_out.startswith("would hold about")}
    assert out == {"SA", "DA"}
    table = format_times(records)
    assert "| SA | would hold about" in table


def test_times_are_shown_in_milliseconds():
    records = [
        Record("x", "layer", True, mode, 4, seconds=(0.5, 0.25, 4.0), peak_bytes=3 << 20)
        for mode in ("inference", "training")
    ]
    assert "| x | 500.0 | 3 | 500.0 | 3 |" in format_times(records)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "0"], "--size must be at least 1, got 0"),
        (["--device", "nonsense", "--size", "4", "--channels", "8"], "--device 'nonsense'"),
    ],
)
def test_mistakes_are_told(words, message):
    with pytest.raises(UserError, match=message):
        main(words)


def test_a_budget_in_gibibytes():
    cpu = torch.device("cpu")
    assert default_budget(cpu, 3.0, 2.0) == Budget(3.0, 2 * 2**30)
    assert default_budget(cpu, 3.0, None).num_bytes > 2**20


PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "cost.md"


def test_the_page_shows_what_the_command_prints(counted):
    shown = PAGE.read_text(encoding="utf-8").split("<!-- eanet bench cost --no-measure -->\n")[1]
    assert shown.split("\n<!-- end -->")[0] == format_counts(list(counted.values()))


def cells_of(first: str) -> list[str]:
    """The cells of the line of the page that starts so."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("channels", [256, 384, 448])
def test_where_self_attention_is_cheaper(channels, monkeypatch):
    # the page compares the paper's steps, which the layer leaves where others multiply less
    monkeypatch.setattr(MultiHeadExternalAttention, "_thin_is_cheaper", lambda self, tokens: False)
    heads = 4 * channels // 64
    layer = MultiHeadExternalAttention(channels, 64, num_heads=heads, memory_bias=False)
    narrow = MultiHeadExternalAttention(
        channels, 64, num_heads=channels // 64, expansion=1, memory_bias=False
    )
    rival = SelfAttention(channels, num_heads=channels // 64)

    def difference(module, tokens):
        shape = (1, tokens, channels)
        return count_cost(module, shape).macs - count_cost(rival, shape).macs

    widened, folded, _ = (cell.replace(",", "") for cell in cells_of(str(channels)))
    tokens = int(widened)
    assert difference(layer, tokens - 1) > 0
    assert difference(layer, tokens) == 0
    assert difference(narrow, 1) < 0
    assert difference(layer.eval().fused(), int(folded) - 1) > 0
    assert difference(layer.eval().fused(), int(folded)) == 0


def test_counts_at_197_tokens():
    shape = (1, 197, 256)
    layer = MultiHeadExternalAttention(256, 64, num_heads=16, memory_bias=False).eval()
    for first, macs in (
        ("self-attention", count_cost(SelfAttention(256, num_heads=4), shape).macs),
        ("multi-head external attention", count_cost(layer, shape).macs),
        ("the same, folded for inference", count_cost(layer.fused(), shape).macs),
    ):
        assert cells_of(first)[1] == f"{macs / 1e6:.1f} M"
