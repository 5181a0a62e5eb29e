"""A run that was killed and continued has the same bits as one that was not."""

import random
import signal

import pytest
from engine.toy_tasks import assert_same_run, final_state, toy_trainer

from eanet.engine.checkpoint import newest_intact
from eanet.engine.interruption import Interrupted

#: a run that writes a checkpoint after each step
BUSY = {"steps": 16, "evaluate_every": 5, "checkpoint_every_seconds": 0.0}


def random_kills(count, seed):
    """Half of them at any moment, half while a checkpoint is being written."""
    draw = random.Random(seed)
    kills = [{"after": draw.uniform(0.02, 0.5)} for _ in range(count // 2)]
    kills += [
        {"once": "writing", "after": draw.uniform(0.0, 0.02)} for _ in range(count - count // 2)
    ]
    draw.shuffle(kills)
    return kills


@pytest.mark.faults
@pytest.mark.parametrize(
    ("task", "options", "num_workers"),
    [
        ("classification", {"norm": "batch", "tied": True}, 2),
        ("adversary", {}, 0),
        pytest.param("classification", {}, 0, marks=pytest.mark.slow),
        pytest.param("adversary", {}, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_with_the_same_bits(tmp_path, arena, task, options, num_workers):
    common = {"task": task, "options": options, "num_workers": num_workers, **BUSY}
    killed, whole = arena(
        {
            "trainer": {"folder": tmp_path / "killed", **common},
            "kills": random_kills(6, seed=num_workers),
        },
        {"trainer": {"folder": tmp_path / "whole", **common}},
    )
    assert sum(code == [-signal.SIGKILL] for code in killed["codes"]) >= 3, killed
    assert killed["codes"][-1] == whole["codes"][-1] == [0], killed["stderr"]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "adversary"])
def test_fifty_kills_while_saving_never_lose_the_run(tmp_path, arena, task):
    common = {"task": task, **BUSY, "steps": 150}
    draw = random.Random(0)
    kills = [{"once": "writing", "after": draw.uniform(0.0, 0.012)} for _ in range(50)]
    killed, whole = arena(
        {"trainer": {"folder": tmp_path / "killed", **common}, "kills": kills},
        {"trainer": {"folder": tmp_path / "whole", **common}},
    )
    assert all(code[0] in (0, -signal.SIGKILL) for code in killed["codes"]), killed["stderr"]
    assert sum(code == [-signal.SIGKILL] for code in killed["codes"]) >= 25
    assert "intact" not in killed["stderr"]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert whole["codes"] == [[0]]


@pytest.mark.faults
@pytest.mark.ranks
@pytest.mark.parametrize(
    "task", [pytest.param("classification", marks=pytest.mark.slow), "adversary"]
)
def test_two_killed_processes_end_with_the_same_bits(tmp_path, arena, task):
    common = {"task": task, **BUSY, "steps": 9}
    killed, whole = arena(
        {
            "trainer": {"folder": tmp_path / "killed", **common},
            "kills": [{"once": "writing", "after": 0.002}, {"after": 0.6}],
            "world_size": 2,
        },
        {"trainer": {"folder": tmp_path / "whole", **common}, "world_size": 2},
    )
    assert killed["codes"][0] == [-signal.SIGKILL] * 2
    assert killed["codes"][-1] == whole["codes"][-1] == [0, 0], killed["stderr"]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.ranks
def test_a_process_left_alone_ends_soon(tmp_path, arena):
    (report,) = arena(
        {
            "trainer": {"folder": tmp_path / "run", "steps": 100_000, "evaluate_every": 100_000},
            "kills": [{"once": "training", "after": 0.0, "all": False}],
            "world_size": 2,
            "unfinished": True,
        }
    )
    left_alone, killed = report["codes"][0]
    assert killed == -signal.SIGKILL
    assert left_alone == 1
    assert report["seconds"][0] < 30


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "num_workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0), (signal.SIGUSR1, 0)]
)
def test_a_signal_saves_and_exits_with_its_code(tmp_path, arena, number, num_workers):
    common = {"steps": 150, "evaluate_every": 149, "num_workers": num_workers}
    stopped, whole = arena(
        {
            "trainer": {"folder": tmp_path / "stopped", **common},
            "kills": [{"once": "training", "after": 0.0, "signal": number}],
        },
        {"trainer": {"folder": tmp_path / "whole", **common}},
    )
    assert stopped["codes"] == [[Interrupted.exit_code], [0]], stopped["stderr"]
    assert stopped["seconds"][0] < 10
    assert whole["codes"] == [[0]]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.ranks
def test_a_signal_to_one_process_stops_all(tmp_path, arena):
    common = {"steps": 80, "evaluate_every": 79}
    stopped, whole = arena(
        {
            "trainer": {"folder": tmp_path / "stopped", **common},
            "kills": [{"once": "training", "after": 0.0, "signal": signal.SIGUSR1, "all": False}],
            "world_size": 2,
        },
        {"trainer": {"folder": tmp_path / "whole", **common}, "world_size": 2},
    )
    assert stopped["codes"] == [[Interrupted.exit_code] * 2, [0, 0]], stopped["stderr"]
    assert whole["codes"] == [[0, 0]]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


class _Striking:
    """A task that sends itself a signal in a step or in a validation."""

    def __init__(self, trainer, *, at_step=None, in_validation=False):
        self.trainer, self.at_step, self.in_validation = trainer, at_step, in_validation
        self.original = trainer.task.training_step, trainer.task.validation_step
        trainer.task.training_step = self.training_step
        trainer.task.validation_step = self.validation_step

    def training_step(self, batches, step):
        if step == self.at_step:
            signal.raise_signal(signal.SIGTERM)
        yield from self.original[0](batches, step)

    def validation_step(self, batch, metrics):
        if self.in_validation and self.trainer.state.step == 10:
            signal.raise_signal(signal.SIGTERM)
            self.in_validation = False
        self.original[1](batch, metrics)


@pytest.mark.parametrize("strike", [{"at_step": 4}, {"at_step": 9}, {"in_validation": True}])
def test_a_validation_cut_short_by_a_signal_is_made_up_for(tmp_path, strike):
    """Steps 4 and 9 are the last before a validation."""
    trainer = toy_trainer(tmp_path / "stopped")
    _Striking(trainer, **strike)
    with pytest.raises(Interrupted, match="goes on from here"):
        trainer.fit()
    stopped_at = newest_intact(tmp_path / "stopped" / "checkpoints").step
    assert stopped_at == strike.get("at_step", 9) + 1
    assert trainer.state.validated < stopped_at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    toy_trainer(tmp_path / "stopped").fit()
    toy_trainer(tmp_path / "whole").fit()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_finished_run_is_left_alone(tmp_path, capfd):
    result = toy_trainer(tmp_path).fit()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    again = toy_trainer(tmp_path)
    again._quiet = False
    assert again.fit() == result
    assert "finished" in capfd.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    assert after == before


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        toy_trainer(tmp_path / name, seed=seed).fit()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    tensors, _, _ = final_state(tmp_path / "a")
    others, _, _ = final_state(tmp_path / "c")
    key = "network.model:head.weight"
    assert not tensors[key].equal(others[key])
