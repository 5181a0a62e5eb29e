"""Inserting external attention into a network leaves results and names as they were."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from eanet.nn.external_attention import ExternalAttention, ExternalAttention2d
from eanet.nn.insertion import insert_external_attention


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.layer2 = nn.Conv2d(8, 16, 3)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        tokens = self.layer2(self.layer1(x)).flatten(2).transpose(1, 2)
        return self.head(self.encoder(tokens).mean(1))


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 8)


def test_results_and_names_stay(x):
    model = Backbone()
    weights = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).eval()(x)
    after = ["layer1", "layer2", "encoder"]
    assert insert_external_attention(model, after=after, example_input=x, num_slots=5) is model
    assert model.training
    kinds = [ExternalAttention2d, ExternalAttention2d, ExternalAttention]
    for name, kind in zip(after, kinds, strict=True):
        assert isinstance(model.get_submodule(name).external_attention, kind)
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-6)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(".external_attention." in name for name in missing)
    assert weights.keys() <= model.state_dict().keys()


def test_inserted_blocks_learn_and_survive_a_copy(x):
    model = insert_external_attention(
        Backbone(), after=["layer2", "encoder"], example_input=x, num_slots=5
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model(x).detach()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name in ("layer2", "encoder"):
        memory = model.get_submodule(name).external_attention.memory_key
        assert memory.grad.abs().max() > 0
    assert (model(x) - before).abs().max() > 1e-3
    copied = copy.deepcopy(model.eval())
    torch.testing.assert_close(copied(x), model(x))
    with torch.no_grad():
        copied.layer2.external_attention.norm.weight.fill_(3.0)
    assert (copied(x) - model(x)).abs().max() > 1e-3  # the copy runs its own block


def test_known_width_needs_no_example(x):
    model = insert_external_attention(Backbone().double(), after="layer2", channels=16)
    assert model.layer2.external_attention.memory_key.dtype == torch.float64
    model(x.double())


def test_wrong_use_is_named(x):
    with pytest.raises(ValueError, match=r"no module 'layer9'.*layer1, layer2"):
        insert_external_attention(Backbone(), after="layer9", channels=8)
    with pytest.raises(ValueError, match="channels or example_input"):
        insert_external_attention(Backbone(), after="layer1")
    with pytest.raises(ValueError, match="neither a map nor tokens"):
        insert_external_attention(Backbone(), after="head", example_input=x)
    model = insert_external_attention(Backbone(), after="layer1", channels=8)
    with pytest.raises(ValueError, match="already"):
        insert_external_attention(model, after="layer1", channels=8)


def test_a_branch_that_could_not_start_at_zero_is_refused(x):
    with pytest.raises(ValueError, match="last weights"):
        insert_external_attention(
            Backbone(), after="layer2", channels=16, branch_norm="none", projection=False
        )


def test_last_parts_of_a_name_are_enough():
    model = nn.ModuleDict({"body": Backbone(), "head": nn.ModuleDict({"layer2": nn.ReLU()})})
    insert_external_attention(model, after="layer1", channels=8)
    assert "body.layer1.external_attention.memory_key" in model.state_dict()
    with pytest.raises(ValueError, match=r"any of body\.layer2, head\.layer2"):
        insert_external_attention(model, after="layer2", channels=16)


def detector(name):
    build = getattr(torchvision.models.detection, name)
    return build(weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96)


def pictures():
    return [torch.rand(3, 64, 96), torch.rand(3, 40, 40), torch.rand(3, 90, 30)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"]
)
def test_torchvision_detectors_compute_to_the_bit_what_they_did(name):
    model = detector(name).eval()
    images = pictures()
    with torch.no_grad():
        before = model(images)
        copied = copy.deepcopy(model)
        insert_external_attention(
            copied, after="layer4", channels=2048, inner_channels=64, activation="relu"
        )
        after = copied(images)
        again = copy.deepcopy(copied)(images)
    new = copied.state_dict().keys() - model.state_dict().keys()
    assert all(".layer4.external_attention." in key for key in new)
    for results in (after, again):
        for found, expected in zip(results, before, strict=True):
            assert all(torch.equal(found[key], expected[key]) for key in expected)


@torch.no_grad()
def test_torchvision_detectors_tell_blocks_of_padding():
    model = detector("retinanet_resnet50_fpn").eval()
    insert_external_attention(
        model, after="layer4", channels=2048, inner_channels=8, activation="relu"
    )
    block = model.backbone.body.layer4.external_attention
    seen = []
    block.register_forward_hook(lambda module, args, _: seen.append(module.image_sizes.mask(*args)))
    model(pictures()[:2])
    (mask,) = seen
    assert mask[0].all()
    assert mask[1].any()
    assert not mask[1].all()
    assert block.image_sizes.sizes is None
    model.roi_heads = None
    with pytest.raises(AssertionError):  # not an image
        model([torch.zeros(4)])
    assert block.image_sizes.sizes is None


@torch.no_grad()
def test_networks_of_timm_and_torchvision_take_blocks():
    image = torch.randn(1, 3, 64, 64)
    for model, after in (
        (torchvision.models.resnet18(), "layer3"),
        (timm.create_model("resnet18"), "layer4"),
        (timm.create_model("vit_tiny_patch16_224", img_size=64), "blocks.5"),
    ):
        expected = model.eval()(image)
        insert_external_attention(model, after=after, example_input=image)
        assert torch.equal(model(image), expected), after
