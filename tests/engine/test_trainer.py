"""What one process's training does, compared with a loop written out by hand."""

import gc
import math
import os
import warnings
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F
from engine.toy_tasks import (
    TASKS,
    Classifier,
    Points,
    assert_same_run,
    final_state,
    recipe,
    toy_trainer,
)

from eanet.data.loading import BatchPlan, TrainingBatches
from eanet.data.splits import Splits
from eanet.engine.checkpoint import CheckpointWarning
from eanet.engine.evaluation import evaluate
from eanet.engine.progress import read_metrics_log
from eanet.engine.run_folder import RunFolder
from eanet.engine.trainer import NonFiniteLossError, Trainer
from eanet.errors import UserError

EXACT = {"dtype": "float64", "options": {"dropout": 0.0}}


def weights(trainer):
    return {
        f"{name}.{key}": value.clone()
        for name, network in trainer.networks.items()
        for key, value in network.state_dict().items()
    }


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def test_a_run_equals_the_loop_written_out(tmp_path):
    """Plain PyTorch: SGD with a clipped gradient, a cosine and an average, on the same batches."""
    trainer = toy_trainer(
        tmp_path, optim={"name": "sgd", "weight_decay": 0.0, "clip_norm": 0.05}, **EXACT
    )
    plan = BatchPlan(40, 8, seed=3)
    task = trainer.task
    stream = iter(
        TrainingBatches(
            Points(40, torch.float64), plan, transform=task.train_transform, collate=task.collate
        )
    )
    torch.manual_seed(1)
    network = Classifier(dropout=0.0).double()
    average = {key: value.detach().clone() for key, value in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for step in range(12):
        batch = next(stream).batch
        rate = step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * step / 12))
        optimizer.param_groups[0]["lr"] = 0.01 * rate
        optimizer.zero_grad()
        F.cross_entropy(network(batch.points), batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.05)
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for key, value in network.named_parameters():
            average[key] = decay * average[key] + (1 - decay) * value.detach()
    trainer.fit()
    assert (
        largest_difference(dict(network.state_dict()), trainer.networks["model"].state_dict())
        < 1e-14
    )
    assert largest_difference(average, trainer.averages.weights["model"]) < 1e-14


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("task", ["classification", "adversary_of_batch"])
@pytest.mark.parametrize(("kind", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_accumulation_equals_one_batch(tmp_path, task, accumulate, kind, tolerance):
    options = {"dtype": kind, "options": {"dropout": 0.0}, "optim": {"name": "sgd", "lr": 0.05}}
    whole = toy_trainer(tmp_path / "whole", task, **options)
    parts = toy_trainer(tmp_path / "parts", task, accumulate=accumulate, **options)
    before = weights(whole)
    whole.fit()
    parts.fit()
    assert largest_difference(before, weights(whole)) > 1e-3
    assert largest_difference(weights(whole), weights(parts)) <= tolerance
    for one, other in zip(
        final_state(tmp_path / "whole")[2], final_state(tmp_path / "parts")[2], strict=True
    ):
        assert one == pytest.approx(other, abs=tolerance * 100)


def test_later_updates_see_the_weights_of_earlier_ones(tmp_path):
    trainer = toy_trainer(tmp_path, "adversary", steps=1)
    seen = []
    original = trainer.task.training_step

    def noting(batches, step):
        critic = trainer.networks["critic"]
        for update in original(batches, step):
            seen.append((update.network, critic[0].weight.detach().clone()))
            yield update
            assert all(
                p.grad is None for net in trainer.networks.values() for p in net.parameters()
            )

    trainer.task.training_step = noting
    trainer._rate_factor = lambda step: 1.0
    trainer.fit()
    assert [name for name, _ in seen] == ["critic", "critic", "generator"]
    assert not torch.equal(seen[0][1], seen[1][1])
    # the generator's update leaves the critic alone
    assert not torch.equal(seen[1][1], seen[2][1])
    assert torch.equal(seen[2][1], trainer.networks["critic"][0].weight)


def test_each_network_has_its_optimizer(tmp_path):
    trainer = toy_trainer(
        tmp_path, "adversary", by_network={"critic": {"name": "sgd", "lr": 1e-30}}
    )
    before = weights(trainer)
    trainer.fit()
    after = weights(trainer)
    assert torch.equal(before["critic.0.weight"], after["critic.0.weight"])
    assert not torch.equal(before["generator.0.weight"], after["generator.0.weight"])
    assert torch.equal(before["generator.0.bias"], after["generator.0.bias"])  # frozen
    records = [r for r in read_metrics_log(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert records[0]["critic/lr"] < 1e-29
    assert records[0]["generator/lr"] > 0.0


def test_records_are_means_over_the_steps_between(tmp_path):
    trainer = toy_trainer(tmp_path, steps=12)
    losses = []
    original = trainer.task.training_step

    def noting(batches, step):
        for update in original(batches, step):
            losses.append(float(update.losses["cross_entropy"].detach()))
            yield update

    trainer.task.training_step = noting
    trainer.fit()
    records = [r for r in read_metrics_log(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert [record["step"] for record in records] == [10, 12]
    assert records[0]["loss"] == pytest.approx(sum(losses[:10]) / 10)
    assert records[1]["loss"] == pytest.approx(sum(losses[10:]) / 2)
    assert records[0]["lr"] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 9 / 12)))


# Non-finite losses


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, poison):
    trainer = toy_trainer(tmp_path, options={"poison_step": 6, "poison_loss": poison})
    with pytest.raises(NonFiniteLossError, match=r"step 6: .*'model'.*loss (nan|inf)") as caught:
        trainer.fit()
    assert "non_finite_rank0.json" in str(caught.value)
    assert all(bool(value.isfinite().all()) for value in weights(trainer).values())
    record = (tmp_path / "non_finite_rank0.json").read_text(encoding="utf-8")
    plan = BatchPlan(40, 8, seed=3)
    assert all(str(index) in record for _, index in plan.samples(6))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_skipped_step_leaves_no_trace_but_its_count(tmp_path, norm):
    trainer = toy_trainer(
        tmp_path, options={"poison_step": 6, "norm": norm}, non_finite="skip", ema_decay=0.0
    )
    states = []
    original = trainer._train_step

    def noting(step, batches):
        states.append(weights(trainer))
        original(step, batches)

    trainer._train_step = noting
    result = trainer.fit()
    assert result["skipped_updates"] == 1
    assert all(torch.equal(states[6][key], states[7][key]) for key in states[6])
    assert not torch.equal(states[7]["model.head.weight"], states[8]["model.head.weight"])
    assert all(math.isfinite(r["loss"]) for r in final_state(tmp_path)[2] if r["kind"] == "train")


def test_a_run_that_only_skips_is_given_up(tmp_path):
    trainer = toy_trainer(tmp_path, steps=150, non_finite="skip", num_validation=0)
    original = trainer.task.training_step

    def poisoned(batches, step):
        for update in original(batches, step):
            update.losses = {"loss": sum(update.losses.values()) * float("nan")}
            yield update

    trainer.task.training_step = poisoned
    with pytest.raises(NonFiniteLossError, match=r"step 99: .*100 updates in a row"):
        trainer.fit()


# Validation and the best checkpoint


def with_metrics(trainer, values):
    """Let validations report given values, raw and averaged in turn."""
    reported = iter(values)
    trainer.task.validation_step = lambda batch, metrics: None
    trainer.task.new_metrics = lambda device: SimpleNamespace(
        compute=lambda: {"accuracy": next(reported)}
    )


@pytest.mark.parametrize(
    ("mode", "values", "best_step"),
    [
        ("max", [0.1, 0.5, 0.9, 0.7, 0.2, 0.6], 10),
        ("min", [0.1, 0.5, 0.9, 0.3, 0.2, 0.6], 10),
        ("max", [0.1, 0.5, 0.9, 0.5, 0.2, float("nan")], 5),
    ],
)
def test_the_best_is_chosen_by_the_average(tmp_path, mode, values, best_step):
    """Validations after steps 5, 10 and 12."""
    trainer = toy_trainer(tmp_path)
    trainer.task.best_mode = mode
    with_metrics(trainer, values)
    best = trainer.fit()["best"]
    assert (best["step"], best["weights"], best["metric"]) == (best_step, "ema", "accuracy")
    assert best["value"] == best["metrics"]["ema/accuracy"]
    assert (tmp_path / "checkpoints" / f"step_{best_step:09d}").is_dir()


def test_the_best_is_chosen_by_the_weights_where_no_average_is_kept(tmp_path):
    trainer = toy_trainer(tmp_path, ema_decay=0.0)
    with_metrics(trainer, [0.9, 0.3, 0.4])
    best = trainer.fit()["best"]
    assert (best["step"], best["weights"], best["value"]) == (5, "raw", 0.9)
    assert (tmp_path / "checkpoints" / "step_000000005").is_dir()


def test_a_run_without_validation_keeps_its_last_checkpoint(tmp_path):
    result = toy_trainer(tmp_path, num_validation=0).fit()
    assert result["best"] is None
    assert result["metrics"] == {}
    assert (tmp_path / "checkpoints" / "step_000000012").is_dir()


def test_validation_leaves_modes_networks_and_random_numbers_alone(tmp_path):
    trainer = toy_trainer(tmp_path, options={"norm": "batch"})
    task = trainer.task
    network = task.networks["model"]
    network.blocks[0].eval()
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    found = evaluate(task, Points(13, seed=1), batch_size=4)
    assert found["samples"] == 13
    assert [module.training for module in network.modules()] == modes
    assert task.networks == {"model": network}
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_draws_the_same_numbers_each_time():
    torch.manual_seed(0)
    task = TASKS["adversary"]()
    first = evaluate(task, Points(13), batch_size=4)
    assert evaluate(task, Points(13), batch_size=4, num_workers=2) == first
    assert evaluate(task, Points(13), batch_size=4, seed=1) != first


def test_often_validated_is_the_same_training(tmp_path):
    toy_trainer(tmp_path / "often", evaluate_every=1, checkpoint_every_seconds=0.0).fit()
    toy_trainer(tmp_path / "seldom", evaluate_every=12).fit()
    often, _, _ = final_state(tmp_path / "often")
    seldom, _, _ = final_state(tmp_path / "seldom")
    assert all(torch.equal(often[key], seldom[key]) for key in often)


# Settings


def test_loader_workers_do_not_change_a_run(tmp_path):
    for workers in (0, 2):
        toy_trainer(tmp_path / str(workers), num_workers=workers).fit()
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_bfloat16_keeps_weights_in_float32(tmp_path):
    trainer = toy_trainer(tmp_path, precision="bfloat16")
    types = []
    network = trainer.networks["model"]
    network.head.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    trainer.fit()
    assert set(types) == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_compiled_networks_train_alike(tmp_path, monkeypatch):
    """Traced and called through the compiler's front end; code generation is PyTorch's part."""
    compiled = []

    def compile_eagerly(network):
        compiled.append(network)
        return original(network, backend="eager")

    original = torch.compile
    monkeypatch.setattr("torch.compile", compile_eagerly)
    toy_trainer(tmp_path / "compiled", compile=True).fit()
    toy_trainer(tmp_path / "plain").fit()
    assert len(compiled) == 2  # for training and for validation
    first, second = (final_state(tmp_path / name)[0] for name in ("compiled", "plain"))
    assert largest_difference(first, second) < 1e-6


def test_a_changed_recipe_is_refused_or_told(tmp_path):
    toy_trainer(tmp_path, steps=5).fit()
    with pytest.raises(UserError, match=r"data\.batch_size was 8, is 4.*train\.seed was 3, is 4"):
        toy_trainer(tmp_path, steps=12, batch_size=4, seed=4).fit()
    with pytest.raises(UserError, match=r"num_samples was 40, is 41"):
        toy_trainer(tmp_path, num_samples=41).fit()
    with pytest.raises(UserError, match=r"5 steps into the run, which is to be 4"):
        toy_trainer(tmp_path, steps=4).fit()
    with pytest.warns(CheckpointWarning, match=r"train\.steps was 5, is 12"):
        assert toy_trainer(tmp_path, steps=12).fit()["step"] == 12
    with pytest.raises(UserError, match="holds a run already"):
        toy_trainer(tmp_path).fit(resume=False)


def test_harmless_changes_are_not_told(tmp_path):
    toy_trainer(tmp_path, "classification").fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_trainer(tmp_path, num_workers=2, checkpoint_every_seconds=1.0).fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 41}, "fewer than one batch"),
        ({"accumulate": 3}, "multiple of 3"),
        ({"seed": -1}, "train.seed"),
        ({"ema_decay": 1.0}, "train.ema_decay"),
        ({"precision": "float16"}, "train.precision must be float32 or bfloat16"),
        ({"parallel": "magic"}, "train.parallel"),
        ({"non_finite": "ignore"}, "train.non_finite"),
        ({"by_network": {"modle": {}}}, "'modle'; did you mean 'model'"),
    ],
)
def test_impossible_recipes_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        toy_trainer(tmp_path, **options).fit()


def test_a_network_that_is_not_trained_needs_no_optimizer(tmp_path):
    task = TASKS["adversary"]()
    task.networks["features"] = torch.nn.Linear(2, 2).requires_grad_(False)
    trainer = Trainer(
        task,
        recipe(),
        RunFolder(tmp_path),
        splits=Splits(Points(40), Points(13)),
        quiet=True,
        tensorboard=False,
    )
    assert sorted(trainer.optimizers) == ["critic", "generator"]
    assert trainer.fit()["step"] == 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_that_does_not_reach_its_network_is_an_error(tmp_path, accumulate):
    trainer = toy_trainer(tmp_path, accumulate=accumulate)

    def aimless(batches, step):
        yield SimpleNamespace(
            network="model", losses={"loss": torch.zeros((), requires_grad=True)}, numbers=None
        )

    trainer.task.training_step = aimless
    with pytest.raises(RuntimeError, match="do not depend on it"):
        trainer.fit()


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy_trainer(tmp_path, tensorboard=True).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = [r for r in read_metrics_log(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(r["step"], pytest.approx(r["loss"])) for r in logged]


@pytest.mark.slow
def test_ten_thousand_steps_do_not_leak(tmp_path):
    trainer = toy_trainer(tmp_path, steps=10_000, evaluate_every=500)
    process = psutil.Process(os.getpid())
    sizes = []
    original = trainer._validate

    def noting(journal, signals):
        gc.collect()
        sizes.append(process.memory_info().rss)
        return original(journal, signals)

    trainer._validate = noting
    trainer.fit()
    assert len(sizes) == 20
    assert sizes[-1] <= 1.01 * sizes[3]


def test_a_task_draws_after_each_validation_without_changing_the_run(tmp_path, capsys):
    """Networks hold the averages meanwhile; what is drawn from the generators is of no account."""
    seen = []

    def show(folder, step, metrics):
        weight = drawing.networks["model"].stem.weight
        assert not drawing.networks["model"].training
        average = drawing.averages.weights["model"]["stem.weight"]
        assert torch.equal(weight, average)
        seen.append((folder, step, metrics["ema/accuracy"]))
        torch.randn(3)
        return ["drawn"]

    plain = toy_trainer(tmp_path / "plain")
    plain.fit()
    drawing = toy_trainer(tmp_path / "drawing")
    drawing._quiet = False
    drawing.task.show_progress = show
    drawing.fit()
    assert_same_run(tmp_path / "plain", tmp_path / "drawing")
    assert [(folder, step) for folder, step, _ in seen] == [
        (tmp_path / "drawing", step) for step in (5, 10, 12)
    ]
    output = capsys.readouterr()
    assert (output.out + output.err).count("drawn") == 3
