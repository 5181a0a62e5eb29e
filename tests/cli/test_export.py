"""``eanet export``: runs and models become files."""

import subprocess
import sys

import pytest


def run(*words):
    """Run the command in a process of its own: the shape checks of tests cannot be exported."""
    return subprocess.run(
        [sys.executable, "-m", "eanet", "export", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_run_becomes_a_file_with_its_facts(trained, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    done = run(trained, "--out", tmp_path / "run.onnx", "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "input       images: batch 1..1024, 1, height 8..8192, width 8..8192" in done.stdout
    assert done.stdout.count("compared") == 3
    metadata = {entry.key for entry in onnx.load(tmp_path / "run.onnx").metadata_props}
    assert {"class_names", "mean", "std", "model"} <= metadata


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eamlp_tiny", "--out", "x.pth"), "--out: the file must end in .onnx or .pt2"),
        (
            ("eamlp_tyni", "--out", "x.onnx"),
            "unknown model 'eamlp_tyni'; did you mean 'eamlp_tiny'",
        ),
        (("eamlp_tiny", "--out", "x.onnx", "--weights", "ema"), "'eamlp_tiny' is no run folder"),
        (("eamlp_tiny", "--out", "x.onnx", "--size", "0x8"), "--size: expected H or HxW"),
        (("eamlp_tiny", "--out", "x.pt2", "--opset", "20"), "--opset has no effect"),
        (("eamlp_tiny", "--out", "x.pt2", "--batch", "0"), "--batch must be at least 1"),
        (
            ("eamlp_tiny", "--out", "x.pt2", "--fixed", "--min-size", "8"),
            "--min-size has no effect",
        ),
    ],
)
def test_mistakes(eanet, words, message):
    code, out, error = eanet("export", *words)
    assert code == 2
    assert not out
    assert message in error
