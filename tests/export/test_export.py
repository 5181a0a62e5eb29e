"""Exported networks: the sizes they take, what they compute, and what is refused."""

import json
from types import MappingProxyType

import pytest
import torch
from torch import nn

import eanet
from eanet.errors import UserError
from eanet.export.files import export_file
from eanet.export.inputs import InputSpec, input_spec
from eanet.export.parity import Difference, compare, run_onnx, run_program, sizes_to_try
from eanet.export.torch_export import export_program

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def classifier(name="eamlp_tiny", **arguments):
    model = eanet.create_model(name, num_classes=5, depth=1, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Points(nn.Module):
    """A network over points, whose number it leaves open."""

    input_shape = (16, 3)
    input_open_axes = MappingProxyType({0: "points"})

    def __init__(self):
        super().__init__()
        self.layer = eanet.ExternalAttention(8, 4, in_channels=3, residual="none")

    def forward(self, points):
        tokens = self.layer(points)
        return tokens.mean(dim=1), tokens


class Halved(nn.Module):
    """A network that takes images of an even size."""

    input_shape = (1, 32, 32)

    def forward(self, images):
        rows = images.view(images.shape[0], 1, images.shape[2] // 2, 2, images.shape[3])
        return rows.sum(dim=3)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("eamlp_tiny", {}), ("eamlp_tiny", {"pool": "cls", "norm2": "batch"}), ("t2t_vit_tiny", {})],
)
def test_files_compute_what_the_network_computes(name, arguments, suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    report = export_file(classifier(name, **arguments), tmp_path / f"net{suffix}")
    assert report.path.is_file()
    assert list(tmp_path.iterdir()) == [report.path]
    assert len(report.differences) == 3
    assert {found.shape[0] for found in report.differences} == {1, 2, 3}
    assert any(found.shape[2] != found.shape[3] for found in report.differences)
    for found in report.differences:
        assert found.scale > 0.1
        assert found.relative < 1e-5


def test_a_stem_with_wide_patches_and_a_performer_export(tmp_path):
    pytest.importorskip("onnxruntime")
    model = eanet.create_model("t2t_vit_7", num_classes=3, depth=1, channels=64, image_size=64)
    report = export_file(model, tmp_path / "net.onnx")
    assert report.exported.bounds[2] == (32, 8192, 1)
    assert max(found.relative for found in report.differences) < 1e-5


def test_onnx_file_says_what_it_is(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = classifier()
    model.facts = {"class_names": ["a", "b", "c", "d", "e"], "mean": [0.5, 0.5, 0.5]}
    path = export_file(model, tmp_path / "net.onnx").path
    graph = onnx.load(path)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata["model"] == "eamlp_tiny"
    assert json.loads(metadata["class_names"]) == ["a", "b", "c", "d", "e"]
    (given,) = graph.graph.input
    assert given.name == "images"
    axes = [axis.dim_param or axis.dim_value for axis in given.type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    (result,) = graph.graph.output
    assert result.name == "output"
    assert result.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_closed_sizes_are_closed(tmp_path):
    report = export_file(
        classifier(), tmp_path / "net.pt2", size=(40, 24), open_sizes=False, batch=1
    )
    assert report.exported.bounds == {}
    assert report.exported.describe() == "images: 1, 3, 40, 24"
    assert [found.shape for found in report.differences] == [(1, 3, 40, 24)]
    run = run_program(report.path)
    assert run(torch.zeros(1, 3, 40, 24))[0].shape == (1, 5)
    with pytest.raises((RuntimeError, AssertionError)):
        run(torch.zeros(1, 3, 32, 32))


def test_a_network_names_its_own_open_axis_and_may_give_several_results(tmp_path):
    pytest.importorskip("onnxruntime")
    spec = input_spec(Points(), size=(20,))
    assert spec == InputSpec("points", (20, 3), {0: "batch", 1: "points"})
    report = export_file(Points(), tmp_path / "net.onnx")
    assert {found.shape[1] for found in report.differences} == {16, 21, 8}
    pooled, tokens = run_onnx(report.path)(torch.zeros(2, 9, 3))
    assert pooled.shape == (2, 8)
    assert tokens.shape == (2, 9, 8)


def test_sizes_are_held_to_multiples_where_no_range_works():
    exported = export_program(Halved())
    (low, _, step), other = exported.bounds[2], exported.bounds[3]
    assert step == 8
    assert low == 16
    assert other == exported.bounds[2]
    assert "height 16..8192 in steps of 8" in exported.describe()
    for shape in sizes_to_try(exported):
        assert shape[2] % 8 == 0


def test_a_network_that_computes_something_else_is_noticed(tmp_path):
    model, other = classifier(), classifier()
    exported = export_program(other)
    differences = compare(model, lambda x: [exported.program.module()(x)], exported)
    assert max(found.relative for found in differences) > 1e-2
    with pytest.raises(UserError, match=r"not written: for an input of .* it differs"):
        export_file(model, tmp_path / "net.pt2", tolerance=1e-12)
    assert not list(tmp_path.iterdir())


def test_values_that_are_no_numbers_are_no_small_difference():
    exported = export_program(classifier())
    model = classifier()
    differences = compare(model, lambda x: [torch.full((len(x), 5), torch.nan)], exported)
    assert all(found.largest > 1e300 for found in differences)
    assert Difference((1,), 0.5, 0.1).relative == 0.5
    assert Difference((1,), 0.5, 10.0).relative == 0.05


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.Linear(3, 3), {}, "does not state an `input_shape`"),
        (Halved(), {"size": (32,)}, "2 open axes beside the batch, got 1 sizes"),
        (Halved(), {"min_size": 64}, "min_size 64 is above the size of the example, 32"),
    ],
)
def test_what_cannot_be_exported_is_said(model, options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export_file(model, tmp_path / "net.pt2", **options)
    with pytest.raises(UserError, match=r"must end in .onnx or .pt2"):
        export_file(classifier(), tmp_path / "net.pth")
    assert not list(tmp_path.iterdir())


def test_a_path_decided_by_values_is_refused_with_the_reason(tmp_path):
    class Decides(nn.Module):
        input_shape = (4,)

        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"Decides cannot be exported: \w+"):
        export_file(Decides(), tmp_path / "net.pt2")
