"""The search for tilings of the Triton kernels; timing itself needs a GPU."""

from dataclasses import replace

import pytest
import torch

from eanet.bench import tilings
from eanet.errors import UserError
from eanet.ops.attention.heuristics import choose_tilings

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")


def test_candidates_begin_with_what_is_chosen_and_fit_a_program(monkeypatch):
    monkeypatch.setattr("eanet.ops.attention.tiling.device_limits", lambda device: (132, 232_448))
    x = torch.empty(1, 4096, 512, dtype=torch.bfloat16)
    chosen = choose_tilings(x, 64, 512)
    found = list(tilings.candidates(chosen, x.itemsize))
    assert chosen.resident is not None
    # as one kernel after the other, so that none is recorded with the time that it waits
    assert found[0] == replace(chosen, resident=replace(chosen.resident, early=False))
    assert len(set(found)) == len(found) > 50
    general = [candidate for candidate in found[1:] if candidate.resident is None]
    holding = [candidate for candidate in found[1:] if candidate.resident is not None]
    assert min(len(general), len(holding)) > 20
    for candidate in general:
        tile = candidate.mix
        # tiles of tokens and of a memory on their way, within the shared memory of a program
        num_bytes = (tile.block_tokens + 64) * tile.block_channels * x.itemsize * tile.num_stages
        assert num_bytes <= 232_448
        assert candidate.key_gradient == candidate.statistics == tile
    for candidate in holding:
        assert candidate.mix == chosen.mix
        assert not candidate.resident.early
    assert len({candidate.resident.value_side for candidate in holding}) > 10
    assert len({candidate.resident.mix for candidate in holding}) > 10
    assert {candidate.resident.mix_programs for candidate in holding} == {132, 264}


def test_a_kernel_is_listed_with_its_tiling_and_programs(monkeypatch):
    monkeypatch.setattr("eanet.ops.attention.tiling.device_limits", lambda device: (132, 232_448))
    chosen = choose_tilings(torch.empty(1, 4096, 512, dtype=torch.bfloat16), 64, 512)
    for kernel, programs in (("mix", 264), ("mix_exponentials", 264), ("slot_exponentials", 132)):
        row = tilings.tiling_of(chosen, kernel)
        assert row.keys() >= {"block_tokens", "num_warps"}
        assert row["num_programs"] == programs, kernel
    assert tilings.tiling_of(chosen, "other") == {}


@without_gpu
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="there is none here"):
        tilings.main([])
