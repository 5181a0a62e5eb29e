"""Tokens spread over processes give what one process gives, exchanging a few numbers per slot."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eanet.ops.attention.sharded import external_attention_sharded

SIZES = {"batch": 2, "tokens": 23, "heads": 1, "slots": 5, "channels": 4, "value_channels": 3}
LENGTHS = {
    2: {"even": [12, 11], "uneven": [20, 3], "empty": [23, 0], "first_empty": [0, 23]},
    4: {"even": [6, 6, 6, 5], "uneven": [1, 13, 2, 7], "empty": [11, 0, 12, 0]},
}


def make_cases(world_size):
    """Return all cases for a number of processes by name."""
    cases = {}
    for name, heads, (norm, eps), masked in itertools.product(
        LENGTHS[world_size],
        (1, 3),
        [("double", 1e-9), ("double", 0.0), ("softmax", 1e-9)],
        (False, True),
    ):
        cases[f"{name}-{heads}-{norm}-{eps}-{masked}"] = {
            "sizes": SIZES | {"heads": heads},
            "lengths": LENGTHS[world_size][name],
            "norm": norm,
            "eps": eps,
            "masked": masked,
            "chunk_tokens": 4,
            "memory_gradients": "sum",
            "mutant": False,
        }
    plain = cases["uneven-3-double-1e-09-True"]
    cases["local"] = plain | {"memory_gradients": "local"}
    cases["mutant"] = plain | {"mutant": True}
    return cases


@pytest.fixture(scope="module", params=sorted(LENGTHS), ids=lambda size: f"{size}_processes")
def found(request, tmp_path_factory):
    """Start the processes once for all cases; return their number, cases and findings."""
    world_size = request.param
    folder = tmp_path_factory.mktemp(f"processes_{world_size}")
    cases = make_cases(world_size)
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    script = Path(__file__).with_name("sharded_process.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world_size), str(folder)],
            stderr=subprocess.PIPE,
            env=environment,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    by_rank = [
        json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(world_size)
    ]
    return world_size, cases, [dict(zip(cases, findings, strict=True)) for findings in by_rank]


@pytest.mark.ranks
def test_shares_equal_the_whole_in_values_and_all_gradients(found):
    _, cases, by_rank = found
    for name in cases.keys() - {"mutant"}:
        for rank, findings in enumerate(by_rank):
            for tensor, error in findings[name]["differences"].items():
                assert error <= 1e-12, (name, rank, tensor, error)


@pytest.mark.ranks
def test_the_comparison_notices_sums_that_are_not_exchanged(found):
    _, _, by_rank = found
    for findings in by_rank:
        differences = findings["mutant"]["differences"]
        assert all(differences[name] > 1e-3 for name in ("result", "memory_key", "memory_value"))


@pytest.mark.ranks
def test_what_is_exchanged(found):
    _, cases, by_rank = found
    for name in cases.keys() - {"mutant"}:
        case, sizes = cases[name], cases[name]["sizes"]
        per_slot = sizes["batch"] * sizes["heads"] * sizes["slots"]
        double = case["norm"] == "double"
        expected = [["MAX", per_slot], ["SUM", per_slot]] if double else []  # forward
        expected += [["SUM", per_slot]] if double else []  # backward
        if case["memory_gradients"] == "sum":
            expected += [
                ["SUM", sizes["slots"] * sizes["channels"]],
                ["SUM", sizes["slots"] * sizes["value_channels"]],
                ["SUM", sizes["slots"]],
                ["SUM", sizes["value_channels"]],
            ]
        for findings in by_rank:
            assert findings[name]["exchanged"] == expected, name


def test_processes_that_were_not_set_up_are_refused():
    with pytest.raises(ValueError, match=r"init_process_group first"):
        external_attention_sharded(torch.zeros(1, 2, 3), torch.zeros(4, 3))


def test_mistakes_are_refused(tmp_path, without_shape_checks):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        x, key = torch.zeros(1, 2, 3), torch.zeros(4, 3)
        for options, message in [
            ({"memory_gradients": "mean"}, "must be 'sum' or 'local', got 'mean'"),
            ({"num_heads": 2}, "for 2 heads of 3 channels"),
            ({"norm": "none"}, "norm must be"),
            ({"mask": torch.ones(1, 3, dtype=torch.bool)}, "mask must have shape"),
            ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                external_attention_sharded(x, key, **options)
        assert external_attention_sharded(x, key).shape == (1, 2, 3)
    finally:
        torch.distributed.destroy_process_group()
