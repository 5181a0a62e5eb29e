"""Folding a network for inference, and looking at its attention maps."""

import copy

import pytest
import torch
from torch import nn

from eanet.nn.capture import capture_attention
from eanet.nn.external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
)
from eanet.nn.fusion import fuse
from eanet.nn.self_attention import SelfAttention
from eanet.nn.transformer import TransformerBlock


class Network(nn.Module):
    """Feature maps, then tokens, with every kind of attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ExternalAttention2d(8, 4))
        self.blocks = nn.ModuleList(
            TransformerBlock(8, attention, hidden_channels=16)
            for attention in (
                MultiHeadExternalAttention(8, 4, num_heads=2),
                SelfAttention(8, num_heads=2),
                ExternalAttention(8, 5),
            )
        )

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


@pytest.fixture
def network():
    network = Network().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


@pytest.fixture
def x():
    return torch.randn(2, 3, 5, 4, dtype=torch.float64)


def test_fused_copy_computes_the_same_and_leaves_the_model_alone(network, x):
    network(x)  # moves the running statistics away from their start
    before = copy.deepcopy(network.state_dict())
    fused = fuse(network)
    assert network.training
    assert not fused.training
    names = {type(module).__name__ for module in fused.modules()}
    assert {"FusedExternalAttention", "FusedExternalAttention2d"} <= names
    assert "FusedMultiHeadExternalAttention" in names
    assert not names & {"ExternalAttention", "ExternalAttention2d", "MultiHeadExternalAttention"}
    torch.testing.assert_close(fused(x), network.eval()(x), rtol=0, atol=1e-11)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_fused_network_can_be_captured_as_well(network, x):
    fused = fuse(network)
    with capture_attention(network.eval()) as maps, capture_attention(fused) as fused_maps:
        network(x)
        fused(x)
    assert maps.keys() == fused_maps.keys()
    for name, attention in maps.items():
        torch.testing.assert_close(fused_maps[name], attention, rtol=0, atol=1e-12)


def test_maps_are_named_and_shaped(network, x):
    plain = network.eval()(x)
    with capture_attention(network) as maps:
        captured = network(x)
    torch.testing.assert_close(captured, plain, rtol=0, atol=0)
    assert {name: tuple(attention.shape) for name, attention in maps.items()} == {
        "stem.1": (2, 4, 5, 4),
        "blocks.0.attention": (2, 2, 20, 4),
        "blocks.1.attention": (2, 2, 20, 20),
        "blocks.2.attention": (2, 20, 5),
    }
    for name, attention in maps.items():
        slots = 1 if name == "stem.1" else -1
        torch.testing.assert_close(
            attention.sum(slots), torch.ones_like(attention.sum(slots)), rtol=0, atol=1e-6
        )
        assert not attention.requires_grad


def test_nothing_is_watched_outside_the_context(network, x):
    with capture_attention(network) as maps:
        network(x)
    maps.clear()
    network(x)
    assert not maps
    with pytest.raises(RuntimeError, match="inside"), capture_attention(network):
        raise RuntimeError("inside")
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_mask_reaches_the_map():
    layer = ExternalAttention(8, 4)
    mask = torch.tensor([[True, True, False]])
    x = torch.randn(1, 3, 8)
    for arguments in (((x, mask), {}), ((x,), {"mask": mask})):
        with capture_attention(layer) as maps:
            layer(*arguments[0], **arguments[1])
        assert (maps[""][0, 2] == 0).all()
        assert (maps[""][0, :2] > 0).all()


def test_saliency_divided_by_its_sum_over_slots_is_the_attention():
    block = ExternalAttention2d(12, 5).double()
    x = 3 * torch.randn(2, 12, 4, 6, dtype=torch.float64)
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[1, 2:] = False
    for given in (None, mask):
        saliency = block.saliency_map(x, given)
        torch.testing.assert_close(saliency.sum(dim=(2, 3)), torch.ones(2, 5).double())
        shares = saliency / (block.eps + saliency.sum(dim=1, keepdim=True))
        torch.testing.assert_close(shares, block.attention_map(x, given), rtol=1e-9, atol=1e-12)
