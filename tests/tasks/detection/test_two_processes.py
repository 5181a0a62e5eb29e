"""A detector trains in two processes: every parameter gets a gradient on each, whatever it sees."""

import pytest
import torch
import torch.multiprocessing
from tasks.detection.networks import detector
from tasks.detection.one_of_two import train


@pytest.mark.ranks
@pytest.mark.slow
def test_two_processes_stay_together(tmp_path):
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    start = detector("cascade_mask_rcnn", norm="group").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["backbone.body.conv1.weight"], start["backbone.body.conv1.weight"])
