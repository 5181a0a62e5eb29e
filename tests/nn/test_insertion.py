"""Inserting external attention into a network leaves results and names as they were."""

import copy

import pytest
import torch
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
    kinds = {name: type(model.get_submodule(name).external_attention) for name in after}
    assert kinds == {
        "layer1": ExternalAttention2d,
        "layer2": ExternalAttention2d,
        "encoder": ExternalAttention,
    }
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
