"""Several processes compute what one computes, copied or sharded, and go on from one another."""

import pytest
import torch
from engine.toy_tasks import final_state, toy_trainer

from eanet.engine.checkpoint import CheckpointWarning
from eanet.engine.distributed import join_processes
from eanet.errors import UserError

pytestmark = pytest.mark.ranks

#: an odd number of validation samples, so that processes have different numbers of batches
COMMON = {"options": {"dropout": 0.0}, "optim": {"lr": 0.05}, "num_validation": 13}


def differences(first, second):
    """Return the largest difference of the tensors and of the logged numbers of two runs."""
    tensors, state, log = final_state(first)
    other_tensors, other_state, other_log = final_state(second)
    assert tensors.keys() == other_tensors.keys()
    assert state["step"] == other_state["step"]
    largest = max(float((tensors[k] - other_tensors[k]).abs().max()) for k in tensors)
    numbers = [
        abs(record[key] - other[key])
        for record, other in zip(log, other_log, strict=True)
        for key in record
        if key not in ("kind", "seconds")
    ]
    return largest, max(numbers)


@pytest.mark.parametrize(
    ("task", "parallel", "accumulate", "kind", "tolerance"),
    [
        ("classification", "ddp", 1, "float64", 1e-12),
        ("classification", "ddp", 1, "float32", 1e-6),
        ("adversary_of_batch", "ddp", 2, "float64", 1e-12),
        ("adversary_of_batch", "fsdp", 1, "float64", 1e-12),
        ("classification", "fsdp", 2, "float32", 1e-6),
        pytest.param("classification", "fsdp", 2, "float64", 1e-12, marks=pytest.mark.slow),
        pytest.param("adversary_of_batch", "ddp", 2, "float32", 1e-6, marks=pytest.mark.slow),
        pytest.param("adversary_of_batch", "fsdp", 1, "float32", 1e-6, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(tmp_path, arena, task, parallel, accumulate, kind, tolerance):
    # SGD: the first steps of Adam divide tiny gradients by themselves and magnify the rounding
    common = {**COMMON, "task": task, "dtype": kind}
    common["optim"] = {"name": "sgd", "lr": 0.02, "clip_norm": 1.0}
    one, two = (
        {"trainer": {"folder": tmp_path / "one", **common}},
        {
            "trainer": {
                "folder": tmp_path / "two",
                "parallel": parallel,
                "accumulate": accumulate,
                **common,
            },
            "world_size": 2,
        },
    )
    reports = arena(one, two)
    assert [report["codes"] for report in reports] == [[[0]], [[0, 0]]], reports[-1]["stderr"]
    weights, numbers = differences(tmp_path / "one", tmp_path / "two")
    assert weights <= tolerance
    assert numbers <= tolerance
    trained = final_state(tmp_path / "one")[0]
    moved = [key for key in trained if key.startswith("optimizer") and trained[key].abs().max() > 0]
    assert moved


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_tied_weights_and_adam_on_two_processes(tmp_path, arena, parallel):
    common = {**COMMON, "dtype": "float64", "options": {"dropout": 0.0, "tied": True}}
    reports = arena(
        {"trainer": {"folder": tmp_path / "one", **common}},
        {"trainer": {"folder": tmp_path / "two", "parallel": parallel, **common}, "world_size": 2},
    )
    assert [report["codes"] for report in reports] == [[[0]], [[0, 0]]], reports[-1]["stderr"]
    weights, numbers = differences(tmp_path / "one", tmp_path / "two")
    assert max(weights, numbers) <= 1e-10


@pytest.mark.faults
def test_a_killed_sharded_run_ends_with_the_same_bits(tmp_path, arena):
    common = {"parallel": "fsdp", "steps": 9, "evaluate_every": 4, "checkpoint_every_seconds": 0.0}
    killed, whole = arena(
        {
            "trainer": {"folder": tmp_path / "killed", **common},
            "kills": [{"once": "writing", "after": 0.002}],
            "world_size": 2,
        },
        {"trainer": {"folder": tmp_path / "whole", **common}, "world_size": 2},
    )
    assert killed["codes"] == [[-9, -9], [0, 0]], killed["stderr"]
    assert whole["codes"] == [[0, 0]]
    assert differences(tmp_path / "killed", tmp_path / "whole") == (0.0, 0.0)


def test_a_sharded_run_is_continued_by_one_process(tmp_path, arena):
    common = {**COMMON, "dtype": "float64", "evaluate_every": 6}
    (report,) = arena(
        {
            "trainer": {"folder": tmp_path / "moved", "parallel": "fsdp", "steps": 6, **common},
            "world_size": 2,
        }
    )
    assert report["codes"] == [[0, 0]], report["stderr"]
    with pytest.warns(CheckpointWarning, match=r"world_size was 2, is 1"):
        toy_trainer(tmp_path / "moved", steps=12, **common).fit()
    toy_trainer(tmp_path / "one", steps=6, **common).fit()
    with pytest.warns(CheckpointWarning, match=r"train\.steps was 6, is 12"):
        toy_trainer(tmp_path / "one", steps=12, **common).fit()
    weights, _ = differences(tmp_path / "moved", tmp_path / "one")
    assert weights <= 1e-10


def test_a_loss_that_is_not_finite_stops_every_process(tmp_path, arena):
    options = {"poison_step": 3}
    stopped, skipped = arena(
        {"trainer": {"folder": tmp_path / "stopped", "options": options}, "world_size": 2},
        {
            "trainer": {"folder": tmp_path / "skipped", "options": options, "non_finite": "skip"},
            "world_size": 2,
        },
    )
    assert stopped["codes"] == [[1, 1]]
    assert stopped["stderr"].count("NonFiniteLossError: step 3") == 2
    assert skipped["codes"] == [[0, 0]], skipped["stderr"]
    assert final_state(tmp_path / "skipped")[1]["skipped_updates"] == 1


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_devices_that_do_not_exist_are_refused(device):
    with pytest.raises(UserError, match="device"), join_processes(device):
        pass


def test_one_process_needs_no_group():
    with join_processes("cpu") as processes:
        assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
        assert processes.device == torch.device("cpu")
        assert processes.sum([1.0, 2.0]) == [1.0, 2.0]
        assert processes.any(True)
        assert not processes.any(False)
        assert processes.from_main(7) == 7
