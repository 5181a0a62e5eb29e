"""The block benchmark: what it compares is the same function, and its figures are sound."""

import json

import pytest
import torch

from eanet.bench.block import PaperBlock, benchmark_block, main
from eanet.bench.measure import measure_interleaved, peak_bytes
from eanet.nn.external_attention import ExternalAttention2d

CPU = torch.device("cpu")


@pytest.mark.parametrize("training", [False, True])
def test_all_forms_compute_the_same(training):
    block = ExternalAttention2d(12, 5).double().train(training)
    torch.nn.init.normal_(block.norm.bias)
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    expected = PaperBlock(block)(x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_report_holds_every_form(tmp_path, capsys):
    path = tmp_path / "block.json"
    arguments = ["--shape", "1", "32", "12", "12", "--num-slots", "8", "--rounds", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["shape"] == [1, 32, 12, 12]
    forms = ["paper", "product"]
    assert list(report["results"]["training"]) == [
        form + layout for layout in ("", ", channels last") for form in forms
    ]
    assert list(report["results"]["inference"]) == [
        form + layout
        for layout in ("", ", channels last")
        for form in [*forms, "fused", "fused, out="]
    ]
    # rates measured on so small a shape are too noisy to be compared
    assert all(limit["seconds"] > 0 for limit in report["limits"].values())
    for forms in report["results"].values():
        for result in forms.values():
            assert len(result["seconds"]) == 2
            assert result["best_seconds"] <= result["median_seconds"]
            assert result["peak_bytes"] > 0
            assert result["max_abs_difference"] < 1e-5
            assert 0 < result["share_of_limit"] < 2
        assert forms["product"]["peak_bytes"] < forms["paper"]["peak_bytes"]
    table = capsys.readouterr().out
    assert "paper" in table
    assert "fused" in table


def test_peak_counts_what_is_held_at_once():
    size = 1_000_000

    def one_after_another():
        for _ in range(3):
            torch.zeros(size)

    def together():
        return [torch.zeros(size) for _ in range(3)]

    assert peak_bytes(one_after_another, CPU) == pytest.approx(4 * size, rel=0.01)
    assert peak_bytes(together, CPU) == pytest.approx(12 * size, rel=0.01)


def test_functions_take_turns():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    measured = measure_interleaved(functions, rounds=2, device=CPU)
    assert order == list("ab") * 3 + ["a", "b"]  # warm-up, two rounds, memory
    assert [len(result.seconds) for result in measured.values()] == [2, 2]


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 8, 0, 4)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="four positive sizes"):
        benchmark_block(shape)
