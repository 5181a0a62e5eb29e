"""The limit of the machine: arithmetic, and rates that follow the clock."""

import itertools
import time

import pytest
import torch

from eanet.bench import limits
from eanet.bench.limits import (
    Limit,
    MachineRates,
    Work,
    external_attention_work,
    fastest_seconds,
    limit_of,
    measure_copy_rate,
    measure_machine_rates,
    measure_matrix_rate,
)

CPU = torch.device("cpu")


def test_work_of_the_papers_block():
    work = external_attention_work(128 * 128, 512, 64)
    assert work.macs == 2 * 512 * 64 * 128**2 == 1_073_741_824
    assert work.num_bytes == 2 * 4 * 512 * 128**2


def test_a_training_step_does_three_times_the_products():
    inference = external_attention_work(100, 32, 8, batch=2, bytes_per_value=2)
    training = external_attention_work(100, 32, 8, batch=2, bytes_per_value=2, training=True)
    assert training.macs == 3 * inference.macs
    assert (inference.num_bytes, training.num_bytes) == (2 * 200 * 32 * 2, 5 * 200 * 32 * 2)


def test_products_of_the_training_step_fit_the_tensors():
    tokens, channels, slots = 100, 32, 8
    x = torch.randn(channels, tokens, requires_grad=True)
    key = torch.randn(slots, channels, requires_grad=True)
    value = torch.randn(channels, slots, requires_grad=True)
    shapes: list[tuple[int, int, int]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                shapes.append((args[0].shape[0], args[0].shape[1], args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    with Recorder():
        y = value @ (key @ x).softmax(dim=-1)
        torch.autograd.grad(y, [x, key, value], torch.ones_like(y))

    def unordered(products):
        return sorted(tuple(sorted(product)) for product in products)

    work = external_attention_work(tokens, channels, slots, training=True)
    assert unordered(shapes) == unordered(work.products)


@pytest.mark.parametrize(
    ("limit", "seconds", "seconds_at_cube", "bound"),
    [
        (Limit(at_shape=3.0, at_cube=1.0, by_bytes=2.0), 3.0, 2.0, "products"),
        (Limit(at_shape=1.0, at_cube=0.5, by_bytes=2.0), 2.0, 2.0, "bytes"),
        (Limit(at_shape=4.0, at_cube=3.0, by_bytes=2.0), 4.0, 3.0, "products"),
    ],
)
def test_the_larger_time_is_the_limit(limit, seconds, seconds_at_cube, bound):
    assert (limit.seconds, limit.seconds_at_cube, limit.bound) == (seconds, seconds_at_cube, bound)


def test_limit_divides_work_by_rates(monkeypatch):
    rate_of = {(2, 3, 5): 10.0, (5, 7, 11): 100.0}

    def rate(rows, inner, columns, **_):
        return rate_of[rows, inner, columns]

    monkeypatch.setattr(limits, "measure_matrix_rate", rate)
    work = Work(products=((2, 3, 5), (5, 7, 11), (2, 3, 5)), num_bytes=80)
    limit = limit_of(work, MachineRates(50.0, 20.0), device=CPU)
    assert limit.at_shape == pytest.approx(30 / 10 + 385 / 100 + 30 / 10)
    assert limit.at_cube == pytest.approx((30 + 385 + 30) / 50)
    assert limit.by_bytes == 4.0


def test_the_fastest_call_counts(monkeypatch):
    # pairs of clock readings around calls of 5, 2 and 7 seconds
    readings = itertools.accumulate([0, 5, 1, 2, 1, 7, 1])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(readings))
    calls = []
    seconds = fastest_seconds(lambda: calls.append(0), CPU, budget_seconds=0.0)
    assert seconds == 2
    assert len(calls) == 5  # two to warm up, three on the clock


def test_short_calls_go_on_for_a_while(monkeypatch):
    # each call takes a millisecond; fifty of them would end within one moment without the core
    readings = itertools.count(step=0.001)
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(readings))
    calls = []
    fastest_seconds(lambda: calls.append(0), CPU, budget_seconds=0.3)
    assert 100 <= len(calls) - 2 <= 102


def test_the_clock_is_a_real_one():
    seconds = fastest_seconds(lambda: time.sleep(0.02), CPU, budget_seconds=0.0)
    assert 0.02 <= seconds < 2


def test_a_matrix_rate_divides_the_products_by_the_time(monkeypatch):
    shapes, seconds = [], iter([0.5, 0.25])

    def next_seconds(call, *_, **__):
        call()
        return next(seconds)

    def multiply(left, right):
        shapes.append((*left.shape, right.shape[1]))
        return left @ right

    monkeypatch.setattr(limits, "fastest_seconds", next_seconds)
    monkeypatch.setattr(limits, "multiply", multiply)
    monkeypatch.setattr(limits, "TILE_ENTRIES", 16)
    assert measure_matrix_rate(4, 5, 6, device=CPU) == 4 * 5 * 6 / 0.25  # the faster library
    assert shapes == [(4, 5, 4), (4, 5, 2)]


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(limits, "fastest_seconds", lambda call, *_, **__: 0.5)
    assert measure_copy_rate(device=CPU, num_bytes=4000) == 2 * 4000 / 0.5
    monkeypatch.setattr(limits, "fastest_seconds", lambda call, *_, **__: 0.25)
    rates = measure_machine_rates(device=CPU, cube_side=8, copy_bytes=400)
    assert rates == MachineRates(8**3 / 0.25, 2 * 400 / 0.25, 8**3 / 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_rates_are_positive(dtype):
    rate = measure_matrix_rate(64, 64, 64, device=CPU, dtype=dtype, budget_seconds=0.01)
    assert 1e5 < rate < 1e15
