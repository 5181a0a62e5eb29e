"""The benchmark of generators measures both networks, and really trains them."""

import json

import pytest
import torch

from eanet import registry
from eanet.bench import generation

NARROW = {"generator_width": 4, "critic_width": 8, "num_slots": 4}


def test_reports_both_networks_at_both_sizes():
    sagan = {key: value for key, value in NARROW.items() if key != "num_slots"}
    report = generation.benchmark_generation((32,), batch_sizes=(2,), rounds=1, arguments=sagan)
    parts = report["results"]["32"]
    assert set(parts) == {
        "training step",
        "attention layer of the generator",
        "attention layer of the critic",
    }
    for networks in parts.values():
        assert networks["sagan"]["times_faster_than_sagan"] == 1.0
        assert networks["eagan"]["peak_bytes"] > 0
    json.dumps(report)
    assert "eagan" in generation.format_table(report)
    with pytest.raises(ValueError, match="sizes"):
        generation.benchmark_generation((48,), batch_sizes=(2,))


def test_a_step_moves_every_weight():
    model = registry.create_model("eagan_32", num_classes=10, **NARROW).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    step = generation._training_step(model, torch.rand(2, 3, 32, 32), torch.tensor([1, 2]))
    step()
    step()
    # memories move once gamma has left 0
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    # while no score has passed its margin, the hinge pulls the critic's last bias both ways alike
    assert not still - {"critic.linear.bias"}
