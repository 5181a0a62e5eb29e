"""Learning rates and the places of validations, by hand and against the published schedules."""

import json
import math

import pytest
import torch

from eanet.engine.schedule import Timetable, learning_rate_factor
from eanet.errors import UserError
from eanet.recipe import ScheduleSpec, TrainSpec


def timetable(batches_per_epoch=4, batches_per_step=1, **spec):
    return Timetable.of(
        TrainSpec(**spec), batches_per_epoch=batches_per_epoch, batches_per_step=batches_per_step
    )


def factors(table, **spec):
    factor = learning_rate_factor(ScheduleSpec(**spec), table)
    return [factor(step) for step in range(table.total_steps)]


def test_cosine_by_step():
    found = factors(timetable(steps=4), name="cosine", min_lr=0.2)
    assert found == pytest.approx(
        [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))]
    )


def test_warmup_is_linear_and_does_not_shift_the_curve():
    plain = factors(timetable(steps=10), name="cosine")
    warmed = factors(timetable(steps=10), name="cosine", warmup=4, warmup_lr=0.2)
    assert warmed[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert warmed[4:] == plain[4:]


def test_cooldown_stays_at_the_lowest_rate_and_shortens_the_curve():
    found = factors(timetable(steps=6), name="cosine", min_lr=0.1, cooldown=2)
    assert found[:4] == factors(timetable(steps=4), name="cosine", min_lr=0.1)
    assert found[4:] == [0.1, 0.1]


def test_by_epoch_changes_between_epochs_only():
    found = factors(timetable(epochs=4), name="cosine", interval="epoch")
    by_epoch = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert found == pytest.approx([rate for rate in by_epoch for _ in range(4)])


def test_poly_with_floor():
    found = factors(timetable(steps=10), name="poly", power=0.9, min_lr=0.01)
    assert found == pytest.approx([0.99 * (1 - t / 10) ** 0.9 + 0.01 for t in range(10)])


def test_poly_ends_at_zero_after_its_length():
    assert factors(timetable(steps=11), name="poly", cooldown=1)[-1] == 0.0


def test_a_held_rate_catches_up_with_the_curve():
    every_step = factors(timetable(steps=8), name="poly")
    held = factors(timetable(steps=8), name="poly", hold=3)
    assert held == [every_step[step - step % 3] for step in range(8)]
    assert factors(timetable(steps=11), name="poly", hold=10, cooldown=1)[-1] == 0.0
    with pytest.raises(UserError, match=r"schedule\.hold"):
        ScheduleSpec(hold=0)


def test_steps_decay_at_milestones():
    found = factors(timetable(steps=5), name="step", milestones=(3, 1), gamma=0.1)
    assert found == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01])


def test_constant():
    assert factors(timetable(steps=3), name="constant", warmup=1, warmup_lr=0.5) == [0.5, 1.0, 1.0]


@pytest.mark.golden("classification.lr_schedule")
def test_rates_of_the_published_runs(golden_case):
    """The rate of each epoch as the scheduler of the original runs gives it."""
    (path,) = golden_case.files.values()
    tolerance = golden_case.output_tolerance(torch.float64)["rtol"]
    schedules = json.loads(path.read_text(encoding="utf-8"))["schedules"]
    assert schedules
    for schedule in schedules.values():
        args, rates = schedule["args"], schedule["lr"]
        assert len(rates) == args["epochs"] + args["cooldown_epochs"]
        table = timetable(epochs=len(rates), batches_per_epoch=3)
        found = factors(
            table,
            name="cosine",
            interval="epoch",
            warmup=args["warmup_epochs"],
            warmup_lr=args["warmup_lr"] / args["lr"],
            min_lr=args["min_lr"] / args["lr"],
            cooldown=args["cooldown_epochs"],
        )
        expected = [rate / args["lr"] for rate in rates for _ in range(3)]
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("spec", [{"warmup": 500}, {"cooldown": 500}, {"warmup": 5, "cooldown": 5}])
def test_a_run_shorter_than_its_schedule_has_rates(spec):
    """A recipe is tried out in two steps without touching its schedule."""
    assert all(0.0 <= rate <= 1.0 for rate in factors(timetable(steps=2), name="cosine", **spec))


@pytest.mark.parametrize(
    "spec",
    [
        {"warmup": -1},
        {"cooldown": -1},
        {"min_lr": 1.5},
        {"warmup_lr": -0.1},
        {"name": "line"},
        {"interval": "day"},
        {"warmup_interval": "day"},
    ],
)
def test_impossible_schedules_are_refused(spec):
    with pytest.raises(UserError, match=f"schedule.{next(iter(spec))}"):
        factors(timetable(steps=2), **spec)


def test_warm_up_in_steps_of_a_curve_in_epochs():
    found = factors(
        timetable(epochs=3, batches_per_epoch=4),
        name="step",
        interval="epoch",
        milestones=(1, 2),
        warmup=6,
        warmup_interval="step",
        warmup_lr=0.001,
    )
    expected = [1 - (1 - step / 6) * (1 - 0.001) for step in range(6)]
    assert found == pytest.approx([*expected, 0.1, 0.1, *[0.01] * 4])


def test_validations_of_a_run_in_epochs():
    table = timetable(epochs=3, evaluate_every=2)
    assert table.total_steps == 12
    assert [done for done in range(1, 13) if table.validates_after(done)] == [8, 12]


def test_validations_of_a_run_in_steps():
    table = timetable(steps=7, evaluate_every=3)
    assert [done for done in range(1, 8) if table.validates_after(done)] == [3, 6, 7]


def test_steps_that_take_several_batches_reach_across_epochs():
    table = timetable(epochs=3, batches_per_epoch=5, batches_per_step=2)
    assert table.total_steps == 8
    assert [table.epoch(step) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [done for done in range(1, 9) if table.validates_after(done)] == [3, 5, 8]


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"epochs": 1, "steps": 1},
        {"steps": 0},
        {"epochs": -1},
        {"steps": 1, "evaluate_every": 0},
    ],
)
def test_impossible_lengths_are_refused(spec):
    with pytest.raises(UserError, match="train"):
        timetable(**spec)
