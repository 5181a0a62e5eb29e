"""The streaming benchmark, and through it what streaming promises: constant memory, exactness."""

import json
import subprocess
import sys

import pytest
import torch

from eanet.bench import streaming
from eanet.errors import UserError
from eanet.ops.attention import external_attention

MEBIBYTE = 2**20


def measured(tmp_path, *arguments):
    """Run the benchmark in a process of its own, so that memory is its alone; return its report."""
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "eanet.bench.streaming", "--json", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.fixture
def setting():
    return streaming._Setting(num_tokens=1000, channels=6, num_slots=5, chunk_tokens=300)


def test_every_pass_draws_the_same_tokens(setting):
    first, second = (torch.cat(list(setting.chunks()), dim=1) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (1, 1000, 6)
    assert not torch.equal(first[:, :300], first[:, 300:600])


def test_the_error_is_that_of_the_equations(setting, monkeypatch):
    key, value = setting.memories()
    x = torch.cat(list(setting.chunks()), dim=1)
    exact = external_attention(x.double(), key.double(), value.double(), backend="reference")
    found = streaming._errors(setting, streaming.Progress())
    assert found["max_abs_result"] == pytest.approx(exact.abs().max().item(), rel=1e-12)
    assert 0 < found["max_abs_error"] < 1e-6
    shifted = exact[0].float() + 0.125
    pieces = [shifted[start : start + 300].unsqueeze(0) for start in range(0, 1000, 300)]
    monkeypatch.setattr(streaming, "external_attention_chunks", lambda *_, **__: iter(pieces))
    found = streaming._errors(setting, streaming.Progress())
    assert found["max_abs_error"] == pytest.approx(0.125, abs=1e-6)


def test_a_million_tokens_in_constant_memory(tmp_path):
    report = measured(tmp_path, "--num-tokens", "1000000", "--no-check", "--threads", "1")
    if report["peak_bytes"] is None:
        pytest.skip("this system does not tell resident memory")
    # the tokens alone are 244 MiB, the attention as much again
    assert 0 < report["peak_bytes"] < 160 * MEBIBYTE


def test_files_are_streamed_in_constant_memory(tmp_path):
    report = measured(
        tmp_path,
        "--num-tokens",
        "1000000",
        "--no-check",
        "--threads",
        "1",
        "--folder",
        str(tmp_path),
    )
    if report["peak_bytes"] is None:
        pytest.skip("this system does not tell resident memory")
    # tokens and result are 244 MiB each; of the two maps 64 MiB and a chunk each may be resident
    assert report["peak_bytes"] < 320 * MEBIBYTE
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_ten_million_tokens(tmp_path):
    report = measured(tmp_path)
    assert report["num_tokens"] == 10_000_000
    assert report["max_abs_error"] < 1e-6
    assert report["peak_bytes"] is None or report["peak_bytes"] < 512 * MEBIBYTE


def test_report_compares_with_all_tokens_at_once(tmp_path, capsys):
    report = streaming.compare_with_direct(
        20_000, channels=8, num_slots=64, chunk_tokens=1000, rounds=1
    )
    for mode in ("inference", "training"):
        assert report[mode]["streamed_seconds"] > 0
        assert report[mode]["streamed_bytes"] < report[mode]["direct_bytes"] / 2
    options = ["--num-tokens", "2000", "--channels", "8", "--chunk-tokens", "700"]
    assert streaming.main([*options, "--json", str(tmp_path / "report.json")]) == 0
    assert "against float64" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["source"] == "generator"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-tokens", "0"], "--num-tokens must be at least 1, got 0"),
        (["--chunk-tokens", "-4"], "--chunk-tokens must be at least 1, got -4"),
        (["--folder", "/nowhere"], "--folder /nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        streaming.main(arguments)
