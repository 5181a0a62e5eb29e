"""The memories of the attention layers: ties, starting values, counts."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eanet.nn.external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
)
from eanet.nn.fusion import fuse


def test_frozen_dead_bias_gets_no_gradient():
    layer = ExternalAttention(8, 4)
    layer.query.bias.requires_grad_(False)
    layer(torch.randn(1, 5, 8)).sum().backward()
    assert layer.query.bias.grad is None


MODULES = {
    "tokens": (lambda **k: ExternalAttention(8, 4, **k), (2, 5, 8)),
    "map": (lambda **k: ExternalAttention2d(8, 4, **k), (2, 8, 3, 3)),
    "heads": (lambda **k: MultiHeadExternalAttention(8, 4, num_heads=2, **k), (2, 5, 8)),
}


@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_a_tied_memory_is_one_parameter_for_good(make, shape, tmp_path):
    module = make(tie_memory=True).eval()
    x = torch.randn(*shape)
    expected = module(x)
    assert "memory_value" not in module.state_dict()
    assert (
        sum(p.numel() for p in make().parameters()) - sum(p.numel() for p in module.parameters())
        == module.memory_key.numel()
    )

    copied = copy.deepcopy(module)
    assert copied.values is copied.memory_key
    torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)
    doubled = copy.deepcopy(module).double()
    assert doubled.values is doubled.memory_key
    fresh = make(tie_memory=True).eval()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)
    save_file(module.state_dict(), tmp_path / "tied.safetensors")
    again = make(tie_memory=True).eval()
    again.load_state_dict(load_file(tmp_path / "tied.safetensors"))
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)

    # after a step by both roles' gradients there is still one memory
    module.train()(x).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert module.values is module.memory_key


class AliasedMemory(nn.Module):
    """The trap: two parameters that share storage, as in the original code."""

    def __init__(self, **_):
        super().__init__()
        self.memory_key = nn.Parameter(torch.randn(4, 8))
        self.memory_value = nn.Parameter(torch.empty(0))
        self.memory_value.data = self.memory_key.data.t()


def test_an_aliased_memory_is_noticed(tmp_path):
    alias = AliasedMemory()
    doubled = copy.deepcopy(alias).double()
    assert doubled.memory_key.data_ptr() != doubled.memory_value.data_ptr()  # tie lost
    with pytest.raises((RuntimeError, ValueError), match=r"view size|share memory"):
        save_file(alias.state_dict(), tmp_path / "alias.safetensors")


@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_untied_memories_share_nothing_but_their_start(make, shape):
    module = make(memory_init="shared")
    torch.testing.assert_close(module.memory_key, module.memory_value, rtol=0, atol=0)
    assert module.memory_key.data_ptr() != module.memory_value.data_ptr()
    assert all(p.is_contiguous() for p in module.parameters())
    module(torch.randn(*shape)).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert (module.memory_key - module.memory_value).abs().max() > 0
    independent = make(memory_init="independent")
    assert (independent.memory_key - independent.memory_value).abs().max() > 0


def test_standard_deviations_at_the_start():
    block = ExternalAttention2d(512, 64)
    wanted = math.sqrt(2 / 512)  # of both memories, as the original ends up with
    for tensor in (block.memory_key, block.query.weight, block.projection.weight):
        assert tensor.std().item() == pytest.approx(wanted, rel=0.03)
    assert block.query.bias.abs().max() <= 1 / math.sqrt(512)
    layer = MultiHeadExternalAttention(256, 64, num_heads=16)
    for tensor in (layer.memory_key, layer.memory_value, layer.query.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
    for bias in (layer.memory_key_bias, layer.memory_value_bias, layer.query.bias):
        assert (bias == 0).all()


@pytest.mark.parametrize(
    ("num_slots", "count"), [(8, 534_016), (32, 558_592), (64, 591_360), (256, 787_968)]
)
def test_parameter_counts_of_the_paper_block(num_slots, count):
    with torch.device("meta"):
        block = ExternalAttention2d(512, num_slots)
    assert sum(p.numel() for p in block.parameters()) == count
    assert block(torch.empty(1, 512, 16, 16, device="meta")).shape == (1, 512, 16, 16)


def test_folded_block_is_as_small_as_the_formula():
    folded = fuse(ExternalAttention2d(512, 64))
    assert sum(p.numel() for p in folded.parameters()) == 66_048
