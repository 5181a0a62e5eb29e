"""Batches are a function of (seed, epoch, index) and of nothing else."""

import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from eanet.data.loading import (
    BatchPlan,
    EvaluationBatches,
    TrainingBatches,
    derive_seed,
)
from eanet.data.splits import Subset, batch_groups
from eanet.errors import UserError


@dataclass
class Numbers:
    """The numbers 0 to n - 1, and a record of what was read in this process."""

    num_samples: int
    broken: int | None = None
    error: type[Exception] = ValueError

    def __post_init__(self):
        self.read = []

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        self.read.append(index)
        if index == self.broken:
            raise self.error(f"picture_{index}.png is truncated")
        return index


def noisy(index):
    """Return the index beside draws of the three generators and a sum that threads could change."""
    many = torch.rand(200_000)
    draws = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])
    return torch.tensor(float(index), dtype=torch.float64), draws, many.sum()


def exactly(index):
    return torch.tensor(index)


def stack(samples):
    if isinstance(samples[0], tuple):
        return tuple(torch.stack(part) for part in zip(*samples, strict=True))
    return torch.stack(list(samples))


def batches(dataset, count, *, batch_size=4, seed=5, transform=noisy, **options):
    plan = BatchPlan(len(dataset), batch_size, seed)
    stream = iter(TrainingBatches(dataset, plan, transform=transform, collate=stack, **options))
    taken = [next(stream) for _ in range(count)]
    stream.close()
    return taken


def equal(first, second):
    return len(first) == len(second) and all(
        a.samples == b.samples
        and all(torch.equal(x, y) for x, y in zip(a.batch, b.batch, strict=True))
        for a, b in zip(first, second, strict=True)
    )


# torch warns where there are fewer cores than workers; the batches must be right all the same
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_do_not_change_batches(num_workers):
    torch.set_num_threads(2)
    reference = batches(Numbers(10), 7)
    assert equal(batches(Numbers(10), 7, num_workers=num_workers), reference)


def test_another_seed_changes_order_and_draws():
    first, second = batches(Numbers(10), 2), batches(Numbers(10), 2, seed=6)
    assert [part.samples for part in first] != [part.samples for part in second]
    assert not torch.equal(first[0].batch[1], second[0].batch[1])


def test_a_sample_draws_anew_in_each_epoch():
    taken = batches(Numbers(4), 2)
    draws = [dict(zip(part.batch[0].tolist(), part.batch[1], strict=True)) for part in taken]
    assert set(draws[0]) == set(draws[1]) == {0.0, 1.0, 2.0, 3.0}
    assert all(not torch.equal(draws[0][index], draws[1][index]) for index in draws[0])


def test_starting_late_equals_skipping_and_reads_nothing_before():
    reference = batches(Numbers(10), 7)
    late = Numbers(10)
    assert equal(batches(late, 3, start=4), reference[4:])
    assert len(late.read) == 3 * 4


def test_an_epoch_holds_each_sample_once_and_drops_the_rest():
    plan = BatchPlan(10, 4, seed=0)
    assert plan.batches_per_epoch == 2
    for epoch in range(3):
        seen = plan.samples(2 * epoch) + plan.samples(2 * epoch + 1)
        assert {key[0] for key in seen} == {epoch}
        assert len({key[1] for key in seen}) == 8
        assert sorted(plan.order(epoch).tolist()) == list(range(10))
    assert plan.order(0).tolist() != plan.order(1).tolist()
    # batches may be asked for in any order
    assert plan.samples(0) == BatchPlan(10, 4, seed=0).samples(0)


def test_the_order_is_the_same_on_every_machine():
    """The order must never change: a resumed run would see other samples."""
    assert BatchPlan(8, 4, seed=3).order(2).tolist() == [2, 1, 6, 4, 5, 7, 3, 0]
    assert derive_seed("order", 1, 2, 3) == 10904509483864868200


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_and_micro_batches_share_one_batch(world_size, accumulate):
    whole = batches(Numbers(10), 3)
    parts = [
        batches(
            Numbers(10), 3 * accumulate, rank=rank, world_size=world_size, accumulate=accumulate
        )
        for rank in range(world_size)
    ]
    for number, batch in enumerate(whole):
        pieces = [
            part
            for rank in range(world_size)
            for part in parts[rank][number * accumulate : (number + 1) * accumulate]
        ]
        assert [key for piece in pieces for key in piece.samples] == batch.samples
        for place in range(3):
            joined = torch.cat([piece.batch[place] for piece in pieces])
            assert torch.equal(joined, batch.batch[place])


def test_loading_leaves_the_process_as_it_was():
    torch.set_num_threads(2)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    batches(Numbers(10), 3)
    batches(Numbers(10), 3, num_workers=2)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.get_num_threads() == 2


def test_no_thread_is_left_behind():
    before = threading.active_count()
    batches(Numbers(10), 3)
    assert threading.active_count() == before


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 7, 8])
def test_evaluation_sees_each_sample_once(world_size, num_samples):
    shares = [
        [
            batch.tolist()
            for batch in EvaluationBatches(
                Numbers(num_samples),
                transform=exactly,
                collate=stack,
                batch_size=3,
                rank=rank,
                world_size=world_size,
            )
        ]
        for rank in range(world_size)
    ]
    one_process = [list(range(i, min(i + 3, num_samples))) for i in range(0, num_samples, 3)]
    assert sorted(batch for share in shares for batch in share) == one_process


def test_evaluation_with_workers_keeps_the_order():
    loaded = EvaluationBatches(
        Numbers(10), transform=exactly, collate=stack, batch_size=3, num_workers=2
    )
    assert [batch.tolist() for batch in loaded] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert len(loaded) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "expected"), [(UserError, UserError), (OSError, UserError), (KeyError, RuntimeError)]
)
def test_an_unusable_sample_is_named(num_workers, error, expected):
    with pytest.raises(expected, match=r"sample 3 \(epoch 0\): .*picture_3.png") as caught:
        batches(Numbers(8, broken=3, error=error), 2, num_workers=num_workers)
    # what a user can mend is one line; a fault of the program keeps its trace
    assert ("Traceback" in str(caught.value)) == (expected is RuntimeError)


def test_a_batch_that_cannot_be_stacked_is_named():
    def transform(index):
        return torch.zeros(1 + index % 2)

    with pytest.raises(RuntimeError, match=r"a batch of samples \d+, \d+, \d+, \d+: "):
        batches(Numbers(8), 1, transform=transform)


def _die_at(index, *, doomed):
    if index == doomed:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return torch.tensor(index)


@pytest.mark.faults
def test_a_killed_worker_is_reported_with_its_samples():
    with pytest.raises(RuntimeError, match="worker"):
        batches(Numbers(8), 2, transform=partial(_die_at, doomed=3), num_workers=1)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "options", "message"),
    [
        (3, 4, {}, "3 samples, fewer than one batch"),
        (8, 0, {}, "data.batch_size must be at least 1"),
        (8, 4, {"num_workers": -1}, "data.num_workers"),
        (8, 4, {"accumulate": 3}, "multiple of 3"),
        (8, 4, {"accumulate": 0}, "train.accumulate"),
        (8, 4, {"world_size": 8}, "multiple of 8"),
    ],
)
def test_impossible_settings_are_refused(num_samples, batch_size, options, message):
    with pytest.raises(UserError, match=message):
        batches(Numbers(num_samples), 1, batch_size=batch_size, **options)


def test_an_empty_split_cannot_be_evaluated():
    with pytest.raises(UserError, match="no samples"):
        EvaluationBatches(Numbers(0), transform=exactly, collate=stack, batch_size=2)


def test_groups_share_their_batches():
    groups = [index % 3 == 0 for index in range(50)]  # 17 and 33
    plan = BatchPlan(50, 4, 1, groups)
    for epoch in (0, 1):
        batches = [plan.samples(12 * epoch + place) for place in range(plan.batches_per_epoch)]
        seen = [index for batch in batches for at, index in batch if at == epoch]
        assert len(seen) == len(set(seen)) == 48
        mixed = [len({groups[index] for _, index in batch}) > 1 for batch in batches]
        assert sum(mixed) <= 1
        kinds = [groups[batch[0][1]] for batch in batches]
        assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))  # batches are shuffled
    orders = [plan.order(epoch).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert BatchPlan(50, 4, 1, groups).order(1).tolist() == orders[1]
    assert sorted(orders[0]) == list(range(50))
    with pytest.raises(ValueError, match="3 groups for 50 samples"):
        BatchPlan(50, 4, 1, [0, 0, 1])


def test_groups_pass_through_subsets():
    numbers = Numbers(6)
    assert batch_groups(Subset(numbers, [1, 2])) is None
    numbers.batch_groups = [0, 0, 1, 1, 2, 2]
    assert batch_groups(Subset(Subset(numbers, [0, 2, 4]), [2, 1])) == [2, 1]
