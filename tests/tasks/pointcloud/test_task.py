"""The two tasks: training, evaluation, votes, prediction, pictures, options that are refused."""

import json

import numpy as np
import pytest
import torch

from eanet import registry
from eanet.cli import main
from eanet.data.splits import Subset, open_splits
from eanet.engine.evaluation import evaluate
from eanet.errors import UserError
from eanet.prediction import predict
from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, TrainSpec
from eanet.run import train
from eanet.tasks.pointcloud import transforms
from eanet.tasks.pointcloud.pictures import Inspection, attention_figure
from eanet.tasks.pointcloud.samples import Sample, collate
from eanet.tasks.pointcloud.task import PartSegmentationTask

DATA = DataSpec(name="solids", arguments={"per_category": [3, 1, 2], "num_points": 128})
CLASSES = Recipe(
    task="pointcloud",
    model=ModelSpec(name="eat_cls_tiny"),
    data=DataSpec(**{**vars(DATA), "batch_size": 10}),
    options={"num_points": 64, "augment": {"rotation": "vertical", "shift": 0.1}},
    optim=OptimSpec(lr=3e-3),
    train=TrainSpec(steps=4, evaluate_every=2, seed=0),
)
PARTS = Recipe(
    task="pointcloud_parts",
    model=ModelSpec(name="eat_parts_tiny"),
    data=DataSpec(**{**vars(DATA), "batch_size": 10}),
    options={"num_points": 64},
    optim=OptimSpec(lr=3e-3),
    train=TrainSpec(steps=4, evaluate_every=2, seed=0),
)


@pytest.fixture(scope="module")
def splits():
    return open_splits(DATA, task="pointcloud", seed=0)


def task_of(recipe, splits, *, dropout=0.5, **options):
    room = registry.task(recipe.task)
    arguments = room.model_arguments(splits.facts) | {"dropout": dropout}
    model = registry.create_model(recipe.model.name, **arguments)
    return room(model, splits.facts, **{**recipe.options, **options})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: train(recipe, folder / name, device="cpu")
        for name, recipe in {"classes": CLASSES, "parts": PARTS}.items()
    }


def test_a_run_reports_best_and_last_apart(runs):
    for name, metric in (("classes", "accuracy"), ("parts", "instance_miou")):
        metrics = runs[name].metrics
        assert {"validation", "test", "baselines"} <= metrics.keys()
        assert metric in metrics["test"]
        assert f"last/{metric}" in metrics["test"]
        assert 0 < min(metrics["baselines"].values()) <= max(metrics["baselines"].values()) <= 1
    assert runs["parts"].metrics["test"]["iou/mug"] >= 0


def test_the_page_shows_clouds(runs):
    for name, words in (
        ("classes", ["Classes", "Predictions", "Attention of the memories", "most often"]),
        ("parts", ["Categories", "True and predicted parts", "Attention of the memories"]),
    ):
        page = runs[name].page.read_text()
        for word in words:
            assert word in page
        assert page.count("data:image/png") >= 4


def test_what_is_high_is_drawn_above_all_and_a_key_says_so():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200, 3, generator=generator).numpy() * [2, 0.2, 0.2]  # wide
    attention = torch.rand(1, 200, 4, generator=generator).numpy()
    figure = attention_figure(points, Inspection(points, attention))
    *cells, key = figure.axes
    assert cells[0].get_title().startswith("layer 1, slot")
    assert [label.get_text() for label in key.get_xticklabels()] == ["little", "much"]
    for axes in cells:
        (dots,) = axes.collections
        colors = dots.get_facecolors()
        lightness = colors[:, :3].sum(1)
        assert lightness[-1] == lightness.min() < lightness[0] == lightness.max()
    tall = attention_figure(points[:, [1, 0, 2]], Inspection(points[:, [1, 0, 2]], attention))
    assert figure.get_figheight() < tall.get_figheight()


def test_predictions_on_files(runs, tmp_path):
    files = tmp_path / "files"
    (files / "mug").mkdir(parents=True)
    points = np.random.default_rng(0).normal(size=(300, 3))
    np.save(files / "mug" / "a.npy", points)
    np.save(files / "b.npy", points * 7 + 3)
    (files / "c.xyz").write_text("nonsense")
    result = predict(runs["classes"].folder, [files], out=tmp_path / "classes", device="cpu")
    assert len(result.records) == 2
    assert "c.xyz" in result.failures[0]
    assert result.records[0]["top"] == result.records[1]["top"]  # brought to the same size
    names = {path.name for path in result.files}
    assert {"a.png", "a-attention.png", "b.png", "b-attention.png"} <= names

    result = predict(runs["parts"].folder, [files], out=tmp_path / "parts", device="cpu")
    by_file = {record["file"].rpartition("/")[2]: record for record in result.records}
    assert by_file["a.npy"]["category"] == "mug"
    assert by_file["a.npy"]["category_is"] == "given"
    assert by_file["b.npy"]["category_is"] == "guessed"
    for record in by_file.values():
        assert sum(record["parts"].values()) == record["points"] == 300
        assert all(part.startswith(record["category"]) for part in record["parts"])
    stored = np.load(tmp_path / "parts" / "pictures" / "a-parts.npz")
    assert stored["points"].shape == (300, 3)
    assert stored["parts"].shape == (300,)
    counts = np.bincount(stored["parts"], minlength=len(stored["part_names"]))
    for name, count in by_file["a.npy"]["parts"].items():
        assert counts[list(stored["part_names"]).index(name)] == count


def test_the_command_line_answers_bad_clouds(runs, tmp_path, capsys):
    np.save(tmp_path / "few.npy", np.random.default_rng(0).normal(size=(9, 3)))
    code = main(["predict", str(runs["classes"].folder), str(tmp_path / "few.npy"),
                 "--out", str(tmp_path / "out"), "--device", "cpu"])  # fmt: skip
    assert code == 2
    assert "has 9 points, the network needs at least 32" in capsys.readouterr().err
    np.save(tmp_path / "more.npy", np.random.default_rng(0).normal(size=(90, 3)))
    result = predict(
        runs["classes"].folder, [tmp_path], out=tmp_path / "out", pictures=False, device="cpu"
    )
    assert [record["file"].rpartition("/")[2] for record in result.records] == ["more.npy"]
    assert "few.npy: has 9 points" in result.failures[0]


def test_votes_are_reported_beside_the_plain_result(runs, capsys):
    folder = str(runs["classes"].folder)
    assert main(["evaluate", folder, "--options.vote_scales", "[0.7, 1.0, 1.4]"]) == 0
    shown = capsys.readouterr().out
    assert "voted_accuracy" in shown
    assert "voted_loss" not in shown


@pytest.mark.parametrize("recipe", [CLASSES, PARTS], ids=["classes", "parts"])
def test_one_vote_at_scale_one_is_the_plain_result(recipe, splits):
    task = task_of(recipe, splits, vote_scales=[1.0])
    found = evaluate(task, splits.test, batch_size=8)
    for name, value in found.items():
        if name.startswith("voted_"):
            assert value == found[name.removeprefix("voted_")], name
    many = evaluate(task_of(recipe, splits, random_votes=2), splits.test, batch_size=8)
    assert any(name.startswith("voted_") for name in many)


def test_dense_clouds_are_segmented_in_portions(splits):
    task = task_of(PARTS, splits)
    task.model.eval()
    batch = task.collate([task.evaluation_transform(splits.test[0])])
    assert batch.points.shape[1] == 128
    with torch.no_grad():
        found = task._evaluated_logits(batch, batch.points)
        halves = [task._logits(batch, batch.points[:, first::2]) for first in range(2)]
    assert torch.equal(found[:, 0::2], halves[0])
    assert torch.equal(found[:, 1::2], halves[1])


@pytest.mark.parametrize(
    ("recipe", "metric", "least"),
    [(CLASSES, "accuracy", 0.9), (PARTS, "point_accuracy", 0.9)],
    ids=["classes", "parts"],
)
def test_a_few_clouds_are_learned(recipe, metric, least, splits):
    few = Subset(splits.train, list(range(10)))
    task = task_of(recipe, splits, dropout=0.0, augment=None, num_points=128)
    task.model.train()
    optimizer = torch.optim.AdamW(task.model.parameters(), 5e-3)
    batch = task.collate([task.train_transform(few[index]) for index in range(10)])
    for step in range(60):
        (update,) = task.training_step([batch], step)
        optimizer.zero_grad()
        torch.autograd.backward(sum(update.losses.values()))
        optimizer.step()
    assert evaluate(task, few, batch_size=10)[metric] >= least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 16}, "num_points must be at least 32"),
        ({"point_choice": "last"}, "point_choice"),
        ({"augment": {"sift": 1}}, "augment has no 'sift'"),
        ({"augment": {"rotation": "up"}}, "rotation must be"),
        ({"augment": {"scale": [2, 1]}}, "scale must be two factors"),
        ({"augment": {"point_dropout": 1.0}}, "point_dropout"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"vote_scales": [0.0]}, "vote_scales"),
    ],
)
def test_bad_options_are_answered(options, message, splits):
    with pytest.raises(ValueError, match=message):
        task_of(CLASSES, splits, **options)


def test_data_without_parts_is_answered(splits):
    facts = {key: value for key, value in splits.facts.items() if "part" not in key}
    with pytest.raises(UserError, match="no parts"):
        PartSegmentationTask.model_arguments(facts)


def test_clouds_that_are_too_small_are_answered(splits):
    task = task_of(CLASSES, splits)
    sample = Sample(torch.rand(40, 3), 0, None, "x[3]")
    with pytest.raises(UserError, match=r"x\[3\]: has 40 points, 64 are wanted"):
        task.train_transform(sample)
    assert len(task.evaluation_transform(sample)) == 40


# transforms and batches


def test_transforms_change_nothing_in_place():
    points = torch.rand(50, 6)
    before = points.clone()
    augment = transforms.Augmentation(
        rotation="any", point_dropout=0.8, scale=(0.5, 2), shift=0.2, jitter=0.01
    )
    changed = augment(points)
    assert changed.shape == points.shape
    assert not torch.equal(changed, points)
    assert torch.equal(points, before)


def test_rotations_keep_shapes():
    points = torch.randn(80, 6)
    points[:, 3:] = points[:, 3:] / points[:, 3:].norm(dim=1, keepdim=True)
    for rotation in ("vertical", "any"):
        turned = transforms.rotate(points, rotation)
        for start in (0, 3):
            torch.testing.assert_close(
                turned[:, start : start + 3].norm(dim=1), points[:, start : start + 3].norm(dim=1)
            )
        product = (points[:, :3] * points[:, 3:]).sum(1)
        torch.testing.assert_close(
            (turned[:, :3] * turned[:, 3:]).sum(1), product, atol=1e-4, rtol=0
        )
        volume = torch.linalg.det(points[:3, :3])
        torch.testing.assert_close(torch.linalg.det(turned[:3, :3]), volume, atol=1e-4, rtol=1e-4)
    assert torch.equal(transforms.rotate(points, "vertical")[:, 1], points[:, 1])
    assert transforms.rotate(points, "none") is points


def test_augmentation_is_a_function_of_the_seed():
    augment = transforms.Augmentation(rotation="any", scale=(0.5, 2), shift=0.2, jitter=0.01)
    points = torch.rand(30, 3)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(augment(points))
    assert torch.equal(*found)


def test_labels_follow_their_points():
    parts = torch.arange(40)
    sample = Sample(parts.float().unsqueeze(1).expand(-1, 3), 1, parts, "x")
    chosen = transforms.choose_points(sample, 20, "random")
    assert torch.equal(chosen.points[:, 0].long(), chosen.parts)
    assert len(set(chosen.parts.tolist())) == 20
    first = transforms.choose_points(sample, 20, "first")
    assert torch.equal(first.parts, parts[:20])


def test_batches_of_clouds_of_different_size():
    samples = [Sample(torch.ones(size, 3), 0, torch.ones(size).long(), "x") for size in (3, 5)]
    batch = collate(samples).to(torch.device("cpu"))
    assert batch.points.shape == (2, 5, 3)
    assert batch.mask.sum(1).tolist() == [3, 5]
    assert batch.parts[0].tolist() == [1, 1, 1, 0, 0]
    assert collate(samples[:1]).mask is None
    assert json.dumps(batch.names) == '["x", "x"]'
