"""The point cloud benchmark: what it compares is the same function, and its figures are sound."""

import json

import pytest
import torch

from eanet import create_model
from eanet.bench.points import (
    UpstreamClassifier,
    benchmark_memory,
    main,
    masked_write_sample,
)
from eanet.ops.points import farthest_point_sample


@pytest.mark.parametrize("name", ["pct_cls_tiny", "eat_cls_tiny"])
@pytest.mark.parametrize("training", [False, True])
def test_both_forms_compute_the_same(name, training):
    model = create_model(name, num_classes=4, dropout=0.0).double().train(training)
    points = (torch.rand(3, 64, 3, dtype=torch.float64) * 1024).round() / 1024
    labels = torch.tensor([0, 1, 3])
    found = []
    for network in (UpstreamClassifier(model), model):
        logits = network(points)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        found.append([logits, *torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)])
    for upstream, ours in zip(*found, strict=True):
        if upstream is not None:
            torch.testing.assert_close(ours, upstream, rtol=1e-9, atol=1e-11)


def test_both_samplings_are_the_same():
    clouds = torch.rand(3, 90, 3)
    assert torch.equal(masked_write_sample(clouds, 40), farthest_point_sample(clouds, 40))


def test_report_holds_every_measurement(tmp_path, capsys):
    path = tmp_path / "points.json"
    arguments = ["--models", "eat_cls_tiny", "--batch", "2", "--training-batch", "2"]
    arguments += ["--points", "64", "--sampling", "2", "60", "20", "--rounds", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    names = ["sampling", "eat_cls_tiny, evaluation", "eat_cls_tiny, training step"]
    assert list(report["results"]) == names
    for result in report["results"].values():
        assert result["difference"] < 1e-5
        assert len(result["ours"]["seconds"]) == 2
        assert result["upstream"]["times_faster_than_upstream"] == 1
    assert "training step" in capsys.readouterr().out


def test_memory_is_measured():
    report = benchmark_memory(
        segmenter="eat_parts_tiny",
        batch=2,
        num_points=64,
        large=["eat_cls_tiny", "eat_parts_tiny"],
        large_points=500,
    )
    assert len(report["peak_bytes"]) == 3
    assert min(report["peak_bytes"].values()) > 1000
