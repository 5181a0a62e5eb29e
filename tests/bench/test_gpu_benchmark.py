"""The benchmark for GPUs, its parts run small on whatever device there is."""

import time

import pytest
import torch

from eanet.bench.gpu import bandwidth, compare_with_compiled, format_bandwidth, format_sweep, main
from eanet.bench.limits import MachineRates
from eanet.errors import UserError

CPU = torch.device("cpu")


def test_bandwidth_counts_the_bytes_that_nobody_can_avoid():
    rates = MachineRates(cube_macs_per_second=1e9, copied_bytes_per_second=1e9)
    figures = bandwidth(
        (2, 8, 3, 4), num_slots=4, device=CPU, rates=rates, backend="eager",
        dtypes=[torch.float32],
    )  # fmt: skip
    assert [(entry["layout"], entry["pass"]) for entry in figures] == [
        (layout, name)
        for layout in ("channels last", "tokens last")
        for name in ("forward", "forward for backward", "backward")
    ]
    map_bytes = 2 * 8 * 12 * 4
    for entry in figures:
        maps = 3 if entry["pass"] == "backward" else 2
        assert entry["least_bytes"] == maps * map_bytes
        assert entry["share_of_copy_rate"] == pytest.approx(
            maps * map_bytes / entry["seconds"] / 1e9
        )
    assert "| float32 | tokens last | backward |" in format_bandwidth(figures)


def test_the_sweep_measures_what_the_device_can_run(monkeypatch, without_shape_checks):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # needs a C++ compiler
    figures = compare_with_compiled([(1, 16, 8)], num_slots=4, device=CPU, dtype=torch.float32)
    assert {(entry["name"], entry["mode"]) for entry in figures} == {
        (name, mode) for name in ("eager", "compiled eager") for mode in ("inference", "training")
    }
    assert "| 1 x 16 x 8 | training |" in format_sweep(figures)


def test_nothing_is_begun_after_the_deadline(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert compare_with_compiled(device=CPU, deadline=time.monotonic() - 1) == []


def test_a_cpu_is_refused():
    with pytest.raises(UserError, match="eanet bench ops"):
        main(["--device", "cpu"])
