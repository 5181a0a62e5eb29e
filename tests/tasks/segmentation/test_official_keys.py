"""The authors' files of EANet: both ways, in any order, and what does not fit."""

import pytest
import torch

from eanet import convert, registry
from eanet.errors import UserError
from eanet.tasks.segmentation.official_keys import load_official, to_official


def small(**arguments):
    """Return a network of the authors' family, narrow."""
    given = {"backbone": "resnet50", "backbone_width": 4, "stem_channels": (4, 4, 8)}
    torch.manual_seed(3)
    return registry.create_model(
        "eanet_resnet50", num_classes=5, channels=16, refine_channels=8, **given, **arguments
    ).eval()


@pytest.fixture(scope="module")
def untied():
    """Tensors under the authors' names whose two memories differ."""
    model = small(block_options={"memory_init": "independent"})
    return model, to_official(model.state_dict())


def test_either_order_of_the_memories_gives_the_same(untied):
    model, tensors = untied
    x = torch.randn(1, 3, 33, 40)
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        other = small()
        load_official(other, {f"module.{name}": tensors[name] for name in order}, source="file")
        assert torch.equal(other(x), model(x))
        key, value = other.attention.memory_key, other.attention.memory_value
        assert torch.equal(key, tensors["linu.linear_0.weight"].squeeze(-1))
        assert torch.equal(value, tensors["linu.linear_1.weight"].squeeze(-1).T)
        assert key.is_contiguous() and value.is_contiguous()  # noqa: PT018
        assert key.data_ptr() != value.data_ptr()


def test_tensors_that_share_storage_are_taken_apart(untied):
    _, tensors = untied
    shared = dict(tensors)
    # as the authors' network builds them on a CPU
    shared["linu.linear_1.weight"] = shared["linu.linear_0.weight"].permute(1, 0, 2)
    model = small()
    load_official(model, shared, source="file")
    with torch.no_grad():
        model.attention.memory_key.zero_()
    assert model.attention.memory_value.abs().max() > 0
    tied = small(block_options={"tie_memory": True})
    load_official(tied, shared, source="file")
    with pytest.raises(UserError, match="two memories differ"):
        load_official(tied, tensors, source="file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("fc2.bias"), r"lacks 'classifier\.bias'"),
        (lambda t: t.update({"fc9.weight": torch.zeros(1)}), "unknown tensor 'fc9"),
        (lambda t: t.update({"fc2.bias": torch.zeros(4)}), "would have shape"),
    ],
)
def test_what_does_not_fit_is_named(untied, change, words):
    tensors = dict(untied[1])
    change(tensors)
    with pytest.raises(UserError, match=words):
        load_official(small(), tensors, source="file")


def test_files_both_ways(tmp_path):
    model = registry.create_model("eanet_resnet50", num_classes=3, num_slots=8, channels=32).eval()
    file = convert.export_published(model, tmp_path / "final.pth")
    found = convert.load_published(file, output_stride=16)
    assert found.config["arguments"] == {
        "backbone": "resnet50",
        "in_channels": 3,
        "num_classes": 3,
        "num_slots": 8,
        "channels": 32,
        "refine_channels": 256,
        "output_stride": 16,
    }
    assert found.facts["published"]["file"] == "final.pth"
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert convert.load_published(file).output_stride == 8
    with pytest.raises(UserError, match="num_heads has no meaning"):
        convert.load_published(file, num_heads=4)
    with pytest.raises(UserError, match="no name for 'auxiliary"):
        convert.export_published(
            registry.create_model("eanet_tiny", auxiliary=True), tmp_path / "x.pth"
        )
