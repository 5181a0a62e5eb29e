"""Which parameter gets which settings."""

import pytest
import torch
from torch import nn

from eanet.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from eanet.errors import UserError
from eanet.recipe import OptimSpec, ParameterGroup


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.memory_key = nn.Parameter(torch.randn(4, 3))
        self.memory_key_bias = nn.Parameter(torch.zeros(4))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.relative_bias = nn.Parameter(torch.zeros(3, 3))
        self.position = nn.Parameter(torch.zeros(5, 3), requires_grad=False)
        self.head = nn.Linear(3, 2)
        self.twin = nn.Linear(3, 2)
        self.twin.weight = self.head.weight


def settings(network, spec):
    """Return (weight decay, learning rate) by parameter name."""
    found = {}
    for group in parameter_groups(network, spec):
        assert len(group["params"]) == len(group["param_names"])
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert name not in found
            assert parameter is dict(network.named_parameters())[name]
            found[name] = (group["weight_decay"], group["lr"])
    return found


def test_matrices_are_decayed_and_offsets_are_not():
    found = settings(Network(), OptimSpec(lr=0.1, weight_decay=0.3))
    decayed = {name for name, (decay, _) in found.items() if decay == 0.3}
    assert decayed == {"backbone.0.weight", "memory_key", "head.weight"}
    assert {decay for decay, _ in found.values()} == {0.0, 0.3}


def test_every_trainable_parameter_is_in_one_group():
    network = Network()
    groups = (ParameterGroup(match="backbone"), ParameterGroup(match="weight"))
    for spec in (OptimSpec(), OptimSpec(groups=groups), OptimSpec(decay_vectors=True)):
        trainable = {name for name, p in network.named_parameters() if p.requires_grad}
        assert settings(network, spec).keys() == trainable
    assert "position" not in trainable
    assert "twin.weight" not in trainable  # goes by its first name


def test_vectors_are_decayed_on_demand():
    found = settings(Network(), OptimSpec(weight_decay=0.3, decay_vectors=True))
    assert {decay for decay, _ in found.values()} == {0.3}


def test_the_first_matching_group_takes_a_parameter():
    spec = OptimSpec(
        lr=0.1,
        weight_decay=0.3,
        groups=(
            ParameterGroup(match=r"^backbone\.", lr_scale=0.5),
            ParameterGroup(match="weight", lr_scale=2.0, weight_decay=0.0),
        ),
    )
    found = settings(Network(), spec)
    assert found["backbone.0.weight"] == (0.3, 0.05)
    assert found["backbone.0.bias"] == (0.0, 0.05)
    assert found["head.weight"] == (0.0, 0.2)
    assert found["memory_key"] == (0.3, 0.1)


@pytest.mark.parametrize("pattern", ["bakcbone", "(", "position"])
def test_a_group_that_takes_nothing_is_refused(pattern):
    with pytest.raises(UserError, match=r"optim\.groups\[0\]\.match"):
        parameter_groups(Network(), OptimSpec(groups=(ParameterGroup(match=pattern),)))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_one_step_by_hand(name):
    layer = nn.Linear(1, 1, bias=False).double()
    layer.weight.data.fill_(2.0)
    spec = OptimSpec(name=name, lr=0.5, weight_decay=0.1, momentum=0.9, eps=1e-8)
    optimizer = build_optimizer(layer, spec)
    set_learning_rate(optimizer, spec, 0.2)  # to 0.1
    layer.weight.grad = torch.full_like(layer.weight, 3.0)
    optimizer.step()
    decayed = 3.0 + 0.1 * 2.0
    expected = {
        "adamw": 2.0 * (1 - 0.1 * 0.1) - 0.1 * 3.0 / (3.0 + 1e-8),
        "adam": 2.0 - 0.1 * decayed / (decayed + 1e-8),
        "sgd": 2.0 - 0.1 * decayed,
    }
    assert float(layer.weight.detach()) == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.parametrize("spec", [{"lr": -1.0}, {"betas": (1.5, 0.9)}, {"name": "lion"}])
def test_impossible_values_are_refused(spec):
    with pytest.raises(UserError, match="optim"):
        build_optimizer(nn.Linear(1, 1), OptimSpec(**spec))
