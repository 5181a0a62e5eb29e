"""Detectors train in two processes: every parameter gets a gradient on each, whatever it sees."""

import pytest
import torch
import torch.multiprocessing
from tasks.detection.networks import KINDS, detector
from tasks.detection.one_of_two import train

#: scale of the block after layer4: 0 at first, and the first of it to get a gradient
SCALE = "backbone.body.layer4.external_attention.norm.weight"


@pytest.mark.ranks
@pytest.mark.slow
def test_two_processes_stay_together(tmp_path):
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    for kind in KINDS:
        first, second = (
            torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)
        )
        start = detector(kind, norm="group").state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first), kind
        for name in ("backbone.body.conv1.weight", SCALE):
            assert not torch.equal(first[name], start[name]), f"{kind}: {name}"
