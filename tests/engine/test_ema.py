"""Averages by hand."""

import pytest
import torch
from torch import nn

from eanet.engine.ema import AveragedWeights


def network(value):
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).double()
    module[0].weight.data.fill_(value)
    module[1].weight.requires_grad_(False)
    return module


@pytest.mark.parametrize(("ramp", "decays"), [(True, [0.1, 2 / 11, 0.2]), (False, [0.2, 0.2, 0.2])])
def test_averages_follow_the_recurrence(ramp, decays):
    module = network(1.0)
    averages = AveragedWeights({"model": module}, decay=0.2, ramp=ramp)
    expected = 1.0
    for step, decay in enumerate(decays):
        value = float(step**2 + 3)
        module[0].weight.data.fill_(value)
        averages.update(step)
        expected = decay * expected + (1 - decay) * value
        assert averages.decay_at(step) == pytest.approx(decay)
        assert float(averages.weights["model"]["0.weight"]) == pytest.approx(expected, abs=1e-12)


def test_the_averaged_network_has_the_buffers_of_the_live_one():
    module = network(1.0)
    averages = AveragedWeights({"model": module}, decay=0.5, ramp=False)
    module(torch.randn(8, 1).double())
    module[0].weight.data.fill_(3.0)
    averages.update(0)
    assert averages.weights["model"].keys() == {"0.weight", "1.bias"}
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with averages.applied():
        inside = {key: value.clone() for key, value in module.state_dict().items()}
    assert float(inside["0.weight"]) == 2.0
    for key in ("1.running_mean", "1.num_batches_tracked", "1.weight"):
        assert torch.equal(inside[key], before[key])
    assert inside["1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_weights_are_restored_after_an_error():
    module = network(1.0)
    averages = AveragedWeights({"model": module}, decay=0.5, ramp=False)
    module[0].weight.data.fill_(3.0)

    def fail():
        with averages.applied():
            assert float(module[0].weight.detach()) == 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert float(module[0].weight.detach()) == 3.0


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        AveragedWeights({"model": network(1.0)}, decay=decay, ramp=False)
