"""The sweep: contenders compute what they should, budgets stop them, crossovers are found."""

import io
import itertools
import json
import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eanet.bench import sweep as sweep_module
from eanet.bench.contenders import Contender, contenders
from eanet.bench.limits import Limit, MachineRates
from eanet.bench.ops import SIZES, Sweep, crossover, format_sweep, main, run_sweep
from eanet.bench.sweep import (
    Budget,
    Progress,
    Record,
    Workload,
    measure_size,
    near_square,
    with_probes,
)
from eanet.cli import main as command_line
from eanet.errors import UserError
from eanet.ops.attention import BACKENDS, external_attention

CPU = torch.device("cpu")
ALL = {contender.name: contender for contender in contenders(64, 8, CPU)}
RATES = MachineRates(1e9, 1e9)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny operations wait for a second thread longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(name: str, *inputs: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return ALL[name].build(inputs[0].shape[2]).double().eval()(*inputs)


def triple(tokens: int = 10, channels: int = 128) -> list[torch.Tensor]:
    return [torch.randn(1, tokens, channels, dtype=torch.float64) for _ in range(3)]


def test_everything_a_user_would_pick_is_there():
    for name in BACKENDS:
        assert ALL[f"external attention, {name}"].ours
    assert {"nn.MultiheadAttention", "Performer", "Performer layer", "SA", "Ham"} <= set(ALL)
    assert {c.name for c in ALL.values() if c.group == "function" and "dot" in c.name} == {
        "scaled_dot_product_attention, math",
        "scaled_dot_product_attention, flash",
    }


@pytest.mark.parametrize("name", ALL)
def test_contenders_keep_positions_and_can_train(name):
    workload = Workload(12, 64, CPU, torch.float32)
    inputs = workload.inputs(ALL[name].takes)
    module = ALL[name].build(64)
    module.train(ALL[name].trains)
    result = module(*inputs)
    if ALL[name].takes == "map":
        assert (result.shape[0], *result.shape[2:]) == (1, 3, 4)
    else:
        assert result.shape == (1, 12, 64)
    if ALL[name].trains:
        leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(result, leaves, workload.cotangent(result))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_backends_and_the_papers_form_are_one_function():
    x = torch.randn(1, 30, 64, dtype=torch.float64)
    torch.manual_seed(0)
    paper = ALL["external attention, paper's form"].build(64).double()
    expected = external_attention(x, paper.key.weight, paper.value.weight.T)
    torch.testing.assert_close(paper(x), expected)
    results = [run(f"external attention, {name}", x) for name in ("reference", "eager")]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_self_attention_is_that_of_heads_of_64(kernel):
    query, key, value = triple()
    expected = torch.cat(
        [
            (q @ k.mT / 8).softmax(-1) @ v
            for q, k, v in zip(*(t.split(64, dim=2) for t in (query, key, value)), strict=True)
        ],
        dim=2,
    )
    result = run(f"scaled_dot_product_attention, {kernel}", query, key, value)
    torch.testing.assert_close(result, expected)


def test_performer_is_the_formula_written_with_a_map():
    query, key, value = triple(tokens=7, channels=64)
    torch.manual_seed(0)
    module = ALL["Performer"].build(64).double()
    rows = module.features
    # drawn in float32
    expected = 32 * torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=32 * 32 * 2e-7)

    def positive(u):
        u = u / 64**0.25
        return (u @ rows.T - u.square().sum(-1, keepdim=True) / 2).exp() / 32**0.5

    weights = positive(query) @ positive(key).mT
    expected = weights / (weights.sum(-1, keepdim=True) + 1e-8) @ value
    torch.testing.assert_close(module(query, key, value), expected)


def test_performer_approaches_self_attention():
    torch.manual_seed(0)
    query, key, value = (tensor / 4 for tensor in triple(tokens=40, channels=64))
    exact = F.scaled_dot_product_attention(query, key, value)
    results = []
    for seed in range(100):
        torch.manual_seed(seed)
        results.append(ALL["Performer"].build(64).double()(query, key, value))
    error = (torch.stack(results).mean(0) - exact).norm() / exact.norm()
    assert error < 0.1 < (results[0] - exact).norm() / exact.norm()


@pytest.mark.parametrize(("channels", "slots"), [(96, 8), (0, 8), (64, 0)])
def test_impossible_widths_are_refused(channels, slots):
    with pytest.raises(UserError, match="must be"):
        contenders(channels, slots, CPU)


@pytest.mark.parametrize(
    ("number", "side"), [(1, 1), (12, 3), (16, 4), (97, 1), (1 << 20, 1 << 10)]
)
def test_near_square(number, side):
    assert near_square(number) == side


def test_a_workload_shares_its_tensors():
    workload = Workload(12, 64, CPU, torch.bfloat16)
    (tokens,) = workload.inputs("tokens")
    query, key, value = workload.inputs("triple")
    assert query is tokens
    assert len({id(tensor) for tensor in (query, key, value)}) == 3
    assert tokens.dtype == torch.bfloat16
    assert workload.inputs("map")[0].shape == (1, 64, 3, 4)


class Waits(nn.Module):
    """Holds memory and takes time as a clock of its own says."""

    def __init__(self, clock: "Clock", seconds_for: int) -> None:
        super().__init__()
        self.clock, self.power = clock, seconds_for

    def forward(self, x):
        self.clock.now += x.shape[1] ** self.power / 1000
        return x.clone()


class Clock:
    """A clock that only modules move."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("eanet.bench.measure.time.perf_counter", made.perf_counter)
    monkeypatch.setattr(sweep_module, "time", made, raising=True)
    made.monotonic = made.perf_counter
    return made


def clocked(clock: Clock, name: str, power: int, **fields) -> Contender:
    return Contender(name, "layer", lambda _: Waits(clock, power), time_order=power, **fields)


def measured(
    chosen: list[Contender], sizes: list[int], *, budget: Budget, mode="inference"
) -> list[Record]:
    records: list[Record] = []
    for size in sizes:
        records += measure_size(
            chosen,
            Workload(size, 4, CPU, torch.float32),
            mode,
            before=records,
            budget=budget,
            rounds=3,
            progress=Progress(io.StringIO()),
        )
    return records


def test_times_are_those_of_the_clock(clock):
    chosen = [clocked(clock, "linear", 1, ours=True), clocked(clock, "square", 2)]
    records = measured(chosen, [4, 16], budget=Budget(1e9, 1e9))
    seconds = {(record.name, record.num_tokens): record.median_seconds for record in records}
    assert seconds == pytest.approx(
        {("linear", 4): 0.004, ("linear", 16): 0.016, ("square", 4): 0.016, ("square", 16): 0.256}
    )
    assert all(record.peak_bytes == 16 * record.num_tokens for record in records)


def test_time_is_foretold_and_nothing_dear_is_started(clock):
    chosen = [clocked(clock, "square", 2)]
    records = measured(chosen, [4, 16, 64, 256], budget=Budget(1.0, 1e9))
    assert [bool(record.seconds) for record in records] == [True, True, False, False]
    assert records[2].left_out == records[3].left_out == "would take about 4.1 s a run"
    assert clock.now < 4.0  # a single run at 64 tokens would have moved it by more


def test_memory_is_foretold(clock):
    chosen = [clocked(clock, "held", 1, memory_order=1)]
    records = measured(chosen, [4, 16, 64], budget=Budget(1e9, 16 * 63))
    assert [bool(record.seconds) for record in records] == [True, True, False]
    assert "would hold about" in records[2].left_out


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([256, 16], [16, 256]),
        ([4096], [4096]),
        ([5000], [(256), (4096), 5000]),
        ([1 << 20, 1024], [1024, (1 << 14), (1 << 18), 1 << 20]),
        (SIZES, list(SIZES)),
    ],
)
def test_no_size_comes_as_a_surprise(sizes, expected):
    steps = with_probes(sizes)
    assert [size for size, _ in steps] == expected
    assert [size for size, is_probe in steps if not is_probe] == sorted(sizes)


def test_probes_are_not_reported(clock, monkeypatch):
    monkeypatch.setattr("eanet.bench.ops.limit_of", lambda *_, **__: Limit(1.0, 1.0, 1.0))
    sweep = run_sweep(
        [8192],
        channels=4,
        num_slots=2,
        device=CPU,
        dtype=torch.float32,
        # 16,777 s for 4,096 tokens and 67,109 s for 8,192
        budget=Budget(20_000.0, 1e9),
        modes=["inference"],
        chosen=[clocked(clock, "square", 2), clocked(clock, "linear", 1, ours=True)],
        rates=RATES,
        rounds=1,
        progress=Progress(io.StringIO()),
    )
    assert [record.num_tokens for record in sweep.records] == [8192, 8192]
    assert sweep.records[0].left_out == "would take about 6.7e+04 s a run"
    assert sweep.records[1].median_seconds == pytest.approx(8.192)


def test_a_wrong_foretelling_costs_a_single_run(clock):
    surprising = Contender("cubic", "layer", lambda _: Waits(clock, 3))
    records = measured([surprising], [4, 64], budget=Budget(10.0, 1e9))
    assert records[1].left_out == "one run took 262 s"
    assert clock.now < 263


def test_a_run_that_was_held_up_is_tried_again(clock):
    class HeldUpOnce(Waits):
        def forward(self, x):
            if x.shape[1] == 16 and not hasattr(self, "held_up"):
                self.held_up = True
                self.clock.now += 5
            return super().forward(x)

    chosen = [Contender("linear", "layer", lambda _: HeldUpOnce(clock, 1))]
    records = measured(chosen, [4, 16], budget=Budget(1.0, 1e9))
    assert records[1].median_seconds == pytest.approx(0.016)


def test_what_cannot_run_is_named(clock):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no such kernel\nmore")

    chosen = [Contender("broken", "layer", lambda _: Broken()), clocked(clock, "linear", 1)]
    broken, linear = measured(chosen, [4], budget=Budget(1e9, 1e9))
    assert broken.left_out == "cannot run: no such kernel"
    assert linear.seconds


def test_what_only_infers_is_not_trained(clock):
    chosen = [clocked(clock, "folded", 1, trains=False)]
    (record,) = measured(chosen, [4], budget=Budget(1e9, 1e9), mode="training")
    assert record.left_out == "inference only"


def times(name: str, ours: bool, **seconds: float) -> list[Record]:
    return [
        Record(name, "layer", ours, "inference", int(size[1:]), seconds=(value,))
        for size, value in seconds.items()
    ]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"n1": 2.0, "n4": 8.0, "n16": 32.0}, 0.0),
        ({"n1": 0.5, "n4": 2.0, "n16": 8.0}, math.inf),
        ({"n1": 0.25, "n4": 4.0 * 4, "n16": 16.0 * 64}, 2.0),
        ({"n4": 2.0, "n16": 32.0}, 8.0),
        # slower in between: from the last change on
        ({"n1": 2.0, "n4": 2.0, "n16": 32.0}, 8.0),
        ({"n64": 1.0}, None),
    ],
)
def test_crossover(other, expected):
    ours = times("ours", True, n1=1.0, n4=4.0, n16=16.0)
    found = crossover(ours, times("other", False, **other))
    assert found == (expected if expected is None else pytest.approx(expected))


def test_tables_show_times_memory_limit_crossover_and_reasons():
    def record(name: str, num_tokens: int, milliseconds: float, mebibytes: int) -> Record:
        return Record(
            name,
            "function",
            name == "mine",
            "inference",
            num_tokens,
            seconds=(milliseconds / 1000,),
            peak_bytes=mebibytes << 20,
        )

    why = "would take about 9 s a run"
    records = [
        record("mine", 256, 2, 1),
        record("theirs", 256, 1, 2),
        record("mine", 1024, 8, 4),
        record("theirs", 1024, 16, 8),
        record("mine", 4096, 32, 16),
        Record("theirs", "function", False, "inference", 4096, left_out=why),
    ]
    limits = {
        ("inference", 256): Limit(0.001, 0.0005, 0.0001),
        ("inference", 1024): Limit(0.001, 0.0005, 0.004),
        ("inference", 4096): Limit(0.016, 0.008, 0.0001),
    }
    text = format_sweep(Sweep(64, 8, tuple(records), limits, RATES, {"device": "a machine"}))
    assert "| mine | 2 | 8 | 32 |" in text
    assert "| theirs | 1 | 16 | - |" in text
    assert "| theirs | 2 | 8 | - |" in text
    assert "| limit, products at their shapes | 1 | 4 | 16 |" in text
    assert "| limit, products as the cube | 0.5 | 4 | 8 |" in text
    assert "| the limit is set by | products | bytes | products |" in text
    assert "| our fastest reaches of the first limit | 50% | 50% | 50% |" in text
    assert "| theirs | from N = 512 |" in text
    assert "- theirs: stops before N = 4,096, would take about 9 s a run" in text
    assert "a machine" in text


def test_a_sweep_runs_both_modes_and_leaves_out_inputs_that_do_not_fit():
    chosen = [ALL["ExternalAttention"], ALL["nn.MultiheadAttention"]]
    progress = io.StringIO()
    sweep = run_sweep(
        [256, 16, 1 << 40],
        channels=64,
        num_slots=8,
        device=CPU,
        dtype=torch.float32,
        budget=Budget(60.0, 2**30),
        rounds=1,
        chosen=chosen,
        rates=RATES,
        progress=Progress(progress),
    )
    keys = [(r.name, r.mode, r.num_tokens) for r in sweep.records]
    expected = itertools.product(
        [16, 256], ["inference", "training"], ["ExternalAttention", "nn.MultiheadAttention"]
    )
    assert keys == [(name, mode, size) for size, mode, name in expected]
    assert all(record.seconds for record in sweep.records)
    assert set(sweep.limits) == {(m, n) for m in ("inference", "training") for n in (16, 256)}
    assert "leaving out N = 1,099,511,627,776: inputs of 5.24e+05 GiB" in progress.getvalue()
    report = json.loads(json.dumps(sweep.as_json()))
    assert report["crossovers"][0]["other"] == "nn.MultiheadAttention"


def test_no_size_is_begun_after_the_deadline(monkeypatch):
    """What was measured before is kept."""
    now = time.monotonic()
    kept, progress = [], io.StringIO()

    def keep(sweep):
        kept.append(sweep)
        monkeypatch.setattr(time, "monotonic", lambda: now + 7.0)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    sweep = run_sweep(
        [16, 64], channels=64, num_slots=8, device=CPU, dtype=torch.float32,
        budget=Budget(60.0, 2**30), rounds=1, chosen=[ALL["ExternalAttention"]], rates=RATES,
        deadline=now + 5.0, keep=keep, progress=Progress(progress),
    )  # fmt: skip
    assert kept == [sweep]
    assert {record.num_tokens for record in sweep.records} == {16}
    assert "out of time before N = 64" in progress.getvalue()


def test_the_command_writes_everything(tmp_path, capsys):
    words = ["bench", "ops", "--quick", "--sizes", "64", "--slots", "4", "--device", "cpu"]
    files = ["--json", f"{tmp_path}/ops.json", "--markdown", f"{tmp_path}/ops.md"]
    assert command_line([*words, *files, "--plots", f"{tmp_path}/plots"]) == 0
    out, err = capsys.readouterr()
    assert (tmp_path / "ops.md").read_text() == out
    assert "N = 64, training" in err
    report = json.loads((tmp_path / "ops.json").read_text())
    assert {r["num_tokens"] for r in report["measured"] if r["seconds"]} == {64}
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == [
        "function-inference.png",
        "function-training.png",
        "layer-inference.png",
        "layer-training.png",
    ]
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--channels", "100"], "--channels must be a multiple of 64, got 100"),
        (["--sizes", "0"], "--sizes must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
    ],
)
def test_mistakes_are_told(words, message):
    with pytest.raises(UserError, match=message):
        main([*words, "--quick"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_overwrites_on_a_terminal_and_is_rare_in_a_file(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream)
        progress.say("start")
        progress.tick("one")
        progress.tick("two")
    assert terminal.getvalue().count("\r\x1b[K") == 3
    assert file.getvalue() == "start\n"
    monkeypatch.setattr(progress, "_last", -1e9)
    progress.tick("three")
    assert file.getvalue() == "start\nthree\n"


def test_only_some_contenders(tmp_path, capsys):
    path = tmp_path / "ops.json"
    arguments = ["--quick", "--sizes", "64", "--modes", "inference", "--json", str(path)]
    assert main([*arguments, "--only", "backend of nobody", "scaled_dot"]) == 0
    names = {record["name"] for record in json.loads(path.read_text())["measured"]}
    assert names == {f"scaled_dot_product_attention, {kernel}" for kernel in ("math", "flash")}
    with pytest.raises(UserError, match="names no contender"):
        main([*arguments, "--only", "nobody"])
