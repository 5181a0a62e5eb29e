"""Dead biases under data-parallel training: without a gradient every rank would wait for them."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eanet.nn.external_attention import ExternalAttention, MultiHeadExternalAttention


def train_two_steps(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    network = nn.Sequential(
        ExternalAttention(8, 4, residual="input"), MultiHeadExternalAttention(8, 4, num_heads=2)
    ).double()
    wrapped = DistributedDataParallel(network)
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    for step in range(2):  # an unused parameter is noticed at the start of the second
        wrapped(x[step, 2 * rank : 2 * rank + 2]).square().mean().backward()
    results[rank] = {name: p.grad.tolist() for name, p in network.named_parameters()}
    dist.destroy_process_group()


@pytest.mark.ranks
def test_dead_biases_do_not_stop_data_parallel_training(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(train_two_steps, args=(str(tmp_path / "store"), results), nprocs=2)
        ranks = dict(results)
    assert ranks[0] == ranks[1]
    assert ranks[0]["0.query.bias"] == [0.0] * 8
    assert ranks[0]["1.memory_key_bias"] == [0.0] * 4
    assert any(value != 0 for row in ranks[0]["0.memory_key"] for value in row)
