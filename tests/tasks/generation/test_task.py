"""The task: updates, comparison, diagnostics, pictures, resume, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eanet import registry, run
from eanet.data.splits import Splits, Subset
from eanet.engine.checkpoint import CheckpointWarning, newest_intact
from eanet.engine.distributed import Processes
from eanet.engine.progress import read_metrics_log
from eanet.engine.run_folder import RunFolder
from eanet.engine.trainer import NonFiniteLossError, Trainer
from eanet.errors import UserError
from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec
from eanet.results import record_run
from eanet.tasks.generation.comparison import Spread
from eanet.tasks.generation.datasets import TinyImageNet
from eanet.tasks.generation.judges import PROTOCOLS, InceptionJudge
from eanet.tasks.generation.losses import critic_loss, generator_loss
from eanet.tasks.generation.samples import to_bytes, to_unit_range
from eanet.tasks.generation.task import GenerationTask

GENERATION = {
    name: recipe for name, recipe in registry.recipes().items() if recipe.task == "generation"
}


def batch_of(task, split, indices):
    return task.collate([task.train_transform(split[index]) for index in indices])


def short_recipe(model="eagan_tiny", *, steps=4, options=None, **train):
    return Recipe(
        task="generation",
        model=ModelSpec(name=model),
        data=DataSpec(name="digits", batch_size=8),
        options={"critic_updates": 2, **(options or {})},
        optim=OptimSpec(name="adam", lr=1e-5, weight_decay=0.0, betas=(0.0, 0.9), eps=1e-6),
        schedule=ScheduleSpec(name="constant"),
        train=TrainSpec(**{"steps": steps, "evaluate_every": 2, "ema_decay": 0.9} | train),
    )


def trainer_of(folder, recipe, splits, *, quiet=True):
    torch.manual_seed(0)
    model = registry.create_model(recipe.model.name, num_classes=10, in_channels=1)
    task = GenerationTask(model, splits.facts, **recipe.options)
    small = Splits(
        Subset(splits.train, range(64)), Subset(splits.train, range(64, 80)), facts=splits.facts
    )
    return Trainer(
        task, recipe, RunFolder(folder), splits=small, processes=Processes(), quiet=quiet,
        tensorboard=False,
    )  # fmt: skip


# the step


@pytest.mark.parametrize("loss", ["hinge", "wasserstein"])
def test_a_step_is_the_updates_of_the_critic_then_that_of_the_generator(build, digits, loss):
    task = build(loss=loss, critic_updates=2, gradient_penalty=10.0 if loss != "hinge" else 0.0)
    assert task.batches_per_step == 2
    batches = [batch_of(task, digits.train, range(start, start + 4)) for start in (0, 4)]
    seen = []
    for name in ("generator", "critic"):
        network = task.networks[name]
        network.register_forward_hook(
            lambda module, given, out, name=name: seen.append((name, given, out))
        )
    updates = []
    for update in task.training_step(batches, 0):
        updates.append(update)
        calls, seen[:] = list(seen), []
        assert all(parameter.requires_grad for parameter in task.model.parameters())
        if update.network == "generator":
            (_, _, images), (_, given, scores) = calls
            assert given[0] is images
            expected = generator_loss(loss, scores)
            torch.testing.assert_close(update.losses["loss"], expected)
            continue
        (_, _, fake), (_, real, real_scores), (_, shown, fake_scores), *rest = calls
        assert shown[0] is fake
        assert not fake.requires_grad
        assert torch.equal(real[0], to_unit_range(batches[len(updates) - 1].images))
        expected = critic_loss(loss, real_scores, fake_scores)
        torch.testing.assert_close(update.losses["real"], expected["real"])
        torch.testing.assert_close(update.losses["fake"], expected["fake"])
        assert ("gradient_penalty" in update.losses) == (loss != "hinge") == bool(rest)
    assert [update.network for update in updates] == ["critic", "critic", "generator"]


def test_images_go_to_bytes_and_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    scaled = to_unit_range(levels)
    assert (float(scaled.min()), float(scaled.max())) == (-1, 1)
    assert np.array_equal(to_bytes(scaled)[0, :, :, 0], levels[0, 0].numpy())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"loss": "much"}, "loss"),
        ({"critic_updates": 0}, "critic_updates"),
        ({"gradient_penalty": -1.0}, "gradient_penalty"),
        ({"augment": "crop"}, "augment"),
        ({"protocol": "10k"}, "protocol"),
        ({"norm_statistics": "mean"}, "norm_statistics"),
    ],
)
def test_refused_options(build, options, word):
    with pytest.raises(ValueError, match=word):
        build(**options)


# comparison


def test_real_images_in_the_place_of_generated_ones_are_near_and_noise_is_far(build, digits):
    task = build()
    metrics = {}
    for name in ("real", "noise"):
        comparison = task.new_metrics(torch.device("cpu"))
        for start in (0, 50, 100):
            real = batch_of(task, digits.train, range(start, start + 50))
            other = batch_of(task, digits.train, range(start + 200, start + 250))
            images = to_unit_range(other.images)
            if name == "noise":
                images = torch.rand_like(images) * 2 - 1
            comparison.update(to_unit_range(real.images), real.labels, images, other.labels)
        metrics[name] = comparison.compute()
    assert metrics["real"]["random_fid"] < 0.25 * metrics["noise"]["random_fid"]
    assert metrics["real"]["diversity"] == pytest.approx(1.0, abs=0.1)
    assert metrics["real"]["num_images"] == 150


def test_spread_is_the_deviation_within_classes():
    images, labels = torch.randn(40, 1, 3, 3), torch.arange(40) % 4
    spread, parts = Spread(4, 9), [Spread(4, 9), Spread(4, 9)]
    spread.update(images, labels)
    for part, half in zip(parts, (slice(0, 15), slice(15, 40)), strict=True):
        part.update(images[half], labels[half])
    values = images.flatten(1).numpy()
    variances = [values[labels.numpy() == label].var(axis=0, ddof=1) for label in range(4)]
    expected = float(np.mean(variances)) ** 0.5
    assert spread.deviation() == pytest.approx(expected, rel=1e-5)
    assert (parts[0] + parts[1]).deviation() == pytest.approx(expected, rel=1e-5)


def test_validation_measures_attention_and_agreement(build, digits):
    class Oracle(nn.Module):
        """Sees the class that was asked for last, wrongly for every other image."""

        def forward(self, images):
            labels = Oracle.asked.clone()
            labels[::2] = (labels[::2] + 1) % 10
            return images.flatten(1)[:, :6], nn.functional.one_hot(labels, 10).float()

    task = build()
    task.use_judge(Oracle(), kind="classifier", name="oracle", num_classes=10)
    assert task.best_metric == "feature_fid"
    task.networks["generator"].register_forward_pre_hook(
        lambda module, given: setattr(Oracle, "asked", given[1])
    )
    nn.init.constant_(task.model.generator.attentions["1"].gamma, 0.5)
    for network in task.networks.values():
        network.eval()
    metrics = task.new_metrics(torch.device("cpu"))
    with torch.no_grad():
        task.validation_step(batch_of(task, digits.train, range(10)), metrics)
    numbers = metrics.compute()
    assert numbers["agreement"] == 0.5
    assert numbers["generator/attention1_gamma"] == 0.5
    assert numbers["critic/attention1_gamma"] == 0.0
    assert numbers["critic/attention1_share"] == 0.0
    assert numbers["critic/attention1_branch"] > 0
    assert 0 < numbers["generator/attention1_evenness"] <= 1
    # features of real images are kept: the second validation asks for those of fakes alone
    calls = []
    task.judge.network = lambda images: calls.append(len(images)) or Oracle()(images)
    with torch.no_grad():
        task.validation_step(
            batch_of(task, digits.train, range(10)), task.new_metrics(torch.device("cpu"))
        )
    assert calls == [10]


def test_protocols_of_inception_are_kept_apart(build):
    fc = nn.Linear(4, 6)
    network = SimpleNamespace(fc=fc, __call__=None)

    def forward(images):
        assert images.shape[1:] == (3, 299, 299)
        features = images.mean(dim=(2, 3))[:, [0, 1, 2, 0]]
        return features, fc(features)

    images = torch.rand(2, 1, 16, 16) * 2 - 1
    results = {}
    for name, protocol in PROTOCOLS.items():
        judge = InceptionJudge.__new__(InceptionJudge)
        nn.Module.__init__(judge)
        judge.protocol = protocol
        judge.__dict__["network"] = type("N", (), {"fc": fc, "__call__": staticmethod(forward)})()
        features, logits = judge(images)
        results[name] = features
        bias = fc.bias if name == "studiogan_10k" else torch.zeros(6)
        torch.testing.assert_close(logits, nn.functional.linear(features, fc.weight, bias))
    assert network.fc is fc
    assert not torch.allclose(results["studiogan_10k"], results["50k"], atol=1e-6)
    recipe = GENERATION["generation_cifar10/eagan"]
    figures = GenerationTask.recorded_figures(recipe, {"fid": 1.0, "num_images": 10_000.0})
    assert [name for _, name, _ in figures] == ["FID", "IS"]
    figures = GenerationTask.recorded_figures(recipe, {"fid": 1.0, "num_images": 2000.0})
    assert figures[0][1] == "FID (studiogan_10k, 2000 images)"
    figures = GenerationTask.recorded_figures(recipe, {"feature_fid": 1.0})
    assert figures[0][1].startswith("FID on features of")


# runs


@pytest.mark.parametrize("name", sorted(GENERATION))
def test_every_recipe_binds_and_its_task_takes_its_options(name, digits):
    recipe = GENERATION[name]
    room = registry.task("generation")
    with torch.device("meta"):
        model = registry.create_model(recipe.model.name, **recipe.model.arguments)
        task = room(model, digits.facts, **recipe.options)
    assert set(recipe.optim_by_network) <= set(task.networks)
    registry.dataset("generation", recipe.data.name)
    judge = recipe.options["judge"]
    assert judge == "inception" or registry.recipe(judge).task == "classification"


@pytest.mark.parametrize(
    "name",
    ["generation_cifar10/wgan_gp", "generation_cifar10/dcgan", "generation_tiny_imagenet/eagan"],
)
def test_smoke_of_recipes(name, tmp_path):
    recipe = GENERATION[name].smoke(
        model=ModelSpec(name="resgan_tiny" if "gan_gp" in name else "eagan_tiny"),
        data=DataSpec(name="digits", batch_size=8),
        options=GenerationTask.smoke_options,
    )
    result = run.train(recipe, tmp_path / "run", device="cpu")
    assert np.isfinite(result.metrics["test"]["random_fid"])
    assert result.metrics["test"]["last/random_fid"] == result.metrics["test"]["random_fid"]
    assert 0 < result.metrics["baselines"]["random_fid"] < result.metrics["test"]["random_fid"]
    page = result.page.read_text(encoding="utf-8")
    assert "Nearest training images" in page
    assert ("Attention of the memories" in page) == ("eagan" in recipe.model.name)


def everything(folder):
    checkpoint = newest_intact(folder / "checkpoints")
    tensors = {
        f"{path.stem}:{key}": value
        for path in sorted(checkpoint.path.glob("*.safetensors"))
        for key, value in checkpoint.tensors(path.stem).items()
    }
    records = [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in read_metrics_log(folder / "metrics.jsonl")
    ]
    return tensors, records


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, digits):
    """Both networks, both optimizers, averages, statistics and the vectors of spectral norms."""
    trainer_of(tmp_path / "whole", short_recipe(), digits).fit()
    first = trainer_of(tmp_path / "parts", short_recipe(steps=2), digits)
    first.fit()
    with pytest.warns(CheckpointWarning, match=r"train\.steps"):
        trainer_of(tmp_path / "parts", short_recipe(), digits).fit()
    (tensors, records), (others, other_records) = (
        everything(tmp_path / name) for name in ("whole", "parts")
    )
    assert any("spectral_norm.u" in key for key in tensors)
    assert any(key.startswith("optimizer.critic") for key in tensors)
    assert tensors.keys() == others.keys()
    assert not [key for key in tensors if not torch.equal(tensors[key], others[key])]
    assert [record for record in records if record["kind"] == "validation"] == [
        record for record in other_records if record["kind"] == "validation"
    ]
    drawn = sorted(path.name for path in (tmp_path / "whole" / "samples").iterdir())
    assert drawn[-1] == "samples-00000004.png"
    assert len(drawn) == 4


def test_micro_batches_add_up(tmp_path, digits):
    """Norm-free critics see the same gradients whole and in parts; the run goes through."""
    recipe = short_recipe(steps=2, accumulate=2)
    trainer = trainer_of(tmp_path / "run", recipe, digits)
    fitted = trainer.fit()
    assert fitted["step"] == 2
    assert np.isfinite(fitted["metrics"]["random_fid"])


def test_collapse_is_named(tmp_path, digits, capsys):
    trainer = trainer_of(tmp_path / "run", short_recipe(steps=2), digits, quiet=False)
    # every image is the same, whatever the noise
    for name in ("weight", "bias"):
        nn.init.zeros_(getattr(trainer.task.model.generator.norm, name))
        trainer.averages.weights["generator"][f"norm.{name}"].zero_()
    trainer.fit()
    assert "the generator has collapsed" in "".join(capsys.readouterr())


def test_loss_that_is_not_finite_is_named(tmp_path, digits):
    trainer = trainer_of(tmp_path / "run", short_recipe(), digits)
    nn.init.constant_(trainer.task.model.critic.linear.bias, float("nan"))
    with pytest.raises(NonFiniteLossError, match="critic"):
        trainer.fit()


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_train_with_a_penalty_and_micro_batches(tmp_path):
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "eanet", "train", "generation_digits/eagan", "--device", "cpu",
        "--out", str(tmp_path / "run"), "--options.judge", "random",
        "--options.loss", "wasserstein", "--options.gradient_penalty", "10",
        "--options.critic_updates", "2", "--train.steps", "2", "--train.evaluate_every", "2",
        "--train.accumulate", "2", "--data.batch_size", "16",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["num_images"] == 359
    assert metrics["baselines"]["random_fid"] < metrics["test"]["random_fid"]


# judges


def tiny_judge():
    """The recipe of the digits' classifier, cut to two steps."""
    judge = registry.recipe("generation_digits/judge")
    return replace(
        judge,
        model=ModelSpec(name="eamlp_tiny", arguments={"depth": 1, "channels": 16}),
        train=replace(judge.train, epochs=None, steps=2, evaluate_every=2),
    )


def test_a_classifier_is_trained_first_kept_and_shared(tmp_path, monkeypatch, capsys):
    from eanet.recipes import generation_digits

    monkeypatch.setitem(generation_digits.RECIPES, "judge", tiny_judge())
    recipe = short_recipe(steps=2, options={"judge": "generation_digits/judge"}, ema_decay=0.0)
    result = run.train(recipe, tmp_path / "first", device="cpu")
    metrics = result.metrics["test"]
    assert {"feature_fid", "feature_score", "agreement"} <= set(metrics)
    assert "fid" not in metrics
    assert (tmp_path / "judge-generation_digits-judge" / "metrics.json").is_file()
    again = run.evaluate(tmp_path / "first", device="cpu")
    assert again["feature_fid"] == pytest.approx(metrics["feature_fid"], rel=1e-6)
    before = (tmp_path / "judge-generation_digits-judge" / "metrics.json").stat().st_mtime_ns
    run.train(recipe, tmp_path / "second", device="cpu")
    after = (tmp_path / "judge-generation_digits-judge" / "metrics.json").stat().st_mtime_ns
    assert before == after
    # another judge can be asked for, also one that is a run
    other = run.evaluate(
        tmp_path / "first",
        device="cpu",
        overrides=["--options.judge", str(tmp_path / "judge-generation_digits-judge")],
    )
    assert other["feature_fid"] == pytest.approx(metrics["feature_fid"], rel=1e-6)
    other = run.evaluate(tmp_path / "first", device="cpu", overrides=["--options.judge", "random"])
    assert "random_fid" in other
    monkeypatch.setitem(generation_digits.RECIPES, "try", recipe)
    stored = json.loads(record_run(tmp_path / "first", tmp_path / "results").read_text())
    assert stored["metric"] == "FID on features of generation_digits/judge"
    assert stored["value"] == metrics["feature_fid"]
    assert stored["metrics"]["test"]["last/feature_fid"] == metrics["last/feature_fid"]


@pytest.mark.parametrize(
    ("judge", "word"),
    [("inception", "EANET_INCEPTION"), ("nothing", "judge"), ("generation_digits/eagan", "recipe")],
)
def test_missing_judges_are_answered(judge, word, tmp_path, monkeypatch):
    monkeypatch.delenv("EANET_INCEPTION", raising=False)
    recipe = short_recipe(steps=2, options={"judge": judge})
    with pytest.raises(UserError, match=word):
        run.train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_damaged_weights_of_inception_are_named(tmp_path, monkeypatch):
    file = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    file.write_bytes(b"not these")
    monkeypatch.setenv("EANET_INCEPTION", str(file))
    recipe = short_recipe(steps=2, options={"judge": "inception"})
    with pytest.raises(UserError, match="SHA-256"):
        run.train(recipe, tmp_path / "run", device="cpu")
    other = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(2, 3)}, other)
    with pytest.raises(UserError, match="Inception"):
        run.train(
            replace(recipe, options={**recipe.options, "judge": str(other)}),
            tmp_path / "run",
            device="cpu",
        )


# data


def test_tiny_imagenet_is_read_as_published(tmp_path):
    for label, name in enumerate(("n01", "n02")):
        for number in range(2):
            path = tmp_path / "train" / name / "images" / f"{name}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (80 * label, 0, 0)).save(path)
    (tmp_path / "val" / "images").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / "val" / "images" / f"val_{number}.JPEG")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    (tmp_path / "words.txt").write_text("n02\tcat, house cat\nn03\tdog\n")
    splits = TinyImageNet(str(tmp_path)).splits
    assert splits.facts["class_names"] == ["n01", "cat"]
    assert [splits.train[index].label for index in range(4)] == [0, 0, 1, 1]
    assert [splits.test[index].label for index in range(2)] == [1, 0]
    annotations.write_text("val_0.JPEG\tn09\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    with pytest.raises(UserError, match=r"'n09' of 'val_0\.JPEG'"):
        TinyImageNet(str(tmp_path))
    annotations.write_text("val_7.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    with pytest.raises(UserError, match=r"no label of .*val_0"):
        TinyImageNet(str(tmp_path))
    annotations.unlink()
    with pytest.raises(UserError, match="annotations"):
        TinyImageNet(str(tmp_path))
