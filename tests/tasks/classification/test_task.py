"""The classification task: step, metrics, predictions, baselines, report, and that it learns."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eanet import registry
from eanet.data.splits import Splits, Subset, open_splits
from eanet.engine.optim import parameter_groups
from eanet.engine.schedule import Timetable, learning_rate_factor
from eanet.errors import UserError
from eanet.recipe import DataSpec
from eanet.report.page import Picture, Table
from eanet.tasks.classification import pictures
from eanet.tasks.classification.builtin import Digits
from eanet.tasks.classification.datasets import labels_of
from eanet.tasks.classification.metrics import ClassificationMetrics
from eanet.tasks.classification.samples import Batch, Sample
from eanet.tasks.classification.task import ClassificationTask

FACTS = Digits().splits.facts


def build(name="eamlp_tiny", *, arguments=None, **options):
    model = registry.create_model(name, num_classes=10, in_channels=1, **(arguments or {}))
    return ClassificationTask(model, FACTS, **({"image_size": 32} | options))


def batch_of(task, dataset, indices, *, training=False):
    transform = task.train_transform if training else task.evaluation_transform
    return task.collate([transform(dataset[index]) for index in indices])


@pytest.fixture(scope="module")
def splits():
    return open_splits(DataSpec(name="digits"), task="classification", seed=0)


# data


def test_splits_are_disjoint_complete_and_a_function_of_the_seed(splits):
    train, validation = set(splits.train.indices), set(splits.validation.indices)
    assert not train & validation
    assert len(train) + len(validation) + len(splits.test) == 1797
    again = open_splits(DataSpec(name="digits"), task="classification", seed=0)
    other = open_splits(DataSpec(name="digits"), task="classification", seed=1)
    assert again.validation.indices == splits.validation.indices != other.validation.indices
    assert labels_of(other.test) == labels_of(splits.test)
    assert np.bincount(labels_of(splits.validation)).min() >= 13


def test_data_is_refused_by_name():
    with pytest.raises(UserError, match="digit"):
        open_splits(DataSpec(name="digit"), task="classification", seed=0)
    with pytest.raises(UserError, match="validation_fraction"):
        open_splits(DataSpec(name="digits", validation_fraction=1.5), task="classification", seed=0)
    with pytest.raises(UserError, match="shuffle"):
        open_splits(
            DataSpec(name="digits", arguments={"shuffle": 1}), task="classification", seed=0
        )


def test_model_arguments():
    assert ClassificationTask.model_arguments(FACTS) == {"num_classes": 10, "in_channels": 1}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_size": 0}, "image_size"),
        ({"augment": "much"}, "augment"),
        ({"crop_fraction": 0.0}, "crop_fraction"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"erasing": -1.0}, "erasing"),
        ({"mixup": -1.0}, "mixup"),
    ],
)
def test_refused_options(options, word):
    with pytest.raises(ValueError, match=word):
        build(**options)


# the step


class Linear(nn.Module):
    """The smallest network: logits linear in the pixels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32 * 32, 10)

    def forward(self, images):
        return self.layer(images.flatten(1))


def linear_task(**options):
    return ClassificationTask(Linear(), FACTS, image_size=32, **options)


def test_loss_is_cross_entropy_of_normalized_pixels(splits):
    task = linear_task()
    batch = batch_of(task, splits.train, range(6))
    (update,) = task.training_step([batch], 0)
    pixels = (batch.images.double() / 255 - FACTS["mean"][0]) / FACTS["std"][0]
    logits = task.model(pixels.float())
    expected = nn.functional.cross_entropy(logits, batch.labels)
    torch.testing.assert_close(update.losses["loss"], expected, rtol=1e-5, atol=1e-6)
    assert update.network == "model"
    right = (logits.argmax(1) == batch.labels).float().mean()
    assert float(update.numbers["accuracy"]) == pytest.approx(float(right))


def test_smoothed_and_mixed_targets_by_hand(splits):
    task = linear_task(label_smoothing=0.1, mixup=0.8, cutmix=1.0)
    batch = batch_of(task, splits.train, range(8))
    torch.manual_seed(3)
    (update,) = task.training_step([batch], 0)

    from eanet.tasks.classification.transforms import mix, normalize

    torch.manual_seed(3)
    one_hot = torch.eye(10)[batch.labels]
    images, targets = mix(batch.images, one_hot, mixup=0.8, cutmix=1.0)
    smooth = 0.9 * targets + 0.1 / 10
    logits = task.model(normalize(images, FACTS["mean"], FACTS["std"]))
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(update.losses["loss"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(targets, one_hot)


def test_step_uses_the_network_the_loop_put_in_place(splits):
    task = linear_task()
    batch = batch_of(task, splits.train, range(4))
    task.networks["model"] = nn.Sequential(Linear(), nn.Linear(10, 10))
    (update,) = task.training_step([batch], 0)
    update.losses["loss"].backward()
    assert task.model.layer.weight.grad is None
    assert task.networks["model"][1].weight.grad is not None


def test_unlabeled_batches_are_refused_in_training():
    task = linear_task()
    batch = Batch(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), None, ["a", "b"])
    with pytest.raises(ValueError, match="without a label"):
        list(task.training_step([batch], 0))


# metrics


def test_metrics_by_hand():
    metrics = ClassificationMetrics(3)
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 0, 0], [0, 0, 1]])
    labels = torch.tensor([0, 1, 1, 1])
    metrics.update(logits[:1], labels[:1])
    metrics.update(logits[1:], labels[1:])
    found = metrics.compute()
    assert found["accuracy"] == pytest.approx(2 / 4)
    assert found["mean_class_accuracy"] == pytest.approx((1 + 1 / 3) / 2)  # class 2 never occurs
    expected = nn.functional.cross_entropy(logits, labels)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert "top5_accuracy" not in found
    assert metrics.confusion_matrix().tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_top5_by_hand():
    metrics = ClassificationMetrics(8)
    logits = torch.arange(8.0).repeat(8, 1)  # the best five are 3..7
    metrics.update(logits, torch.arange(8))
    found = metrics.compute()
    assert found["top5_accuracy"] == pytest.approx(5 / 8)
    assert found["accuracy"] == pytest.approx(1 / 8)


# learning


def fit(task, dataset, indices, *, steps, lr=3e-3, training=False):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=lr, weight_decay=0.0)
    task.model.train()
    for step in range(steps):
        batch = batch_of(task, dataset, indices, training=training)
        (update,) = task.training_step([batch], step)
        optimizer.zero_grad()
        update.losses["loss"].backward()
        optimizer.step()
    task.model.eval()
    metrics = task.new_metrics(torch.device("cpu"))
    with torch.no_grad():
        task.validation_step(batch_of(task, dataset, indices), metrics)
    return metrics.compute()


@pytest.mark.parametrize("name", ["eamlp_tiny", "t2t_vit_tiny", "mlp_tiny"])
def test_overfits_a_few_digits(splits, name):
    task = build(name)
    indices = range(0, len(splits.train), len(splits.train) // 16)
    found = fit(task, splits.train, list(indices)[:16], steps=40)
    assert found["accuracy"] == 1.0
    assert found["loss"] < 0.3


# prediction


@pytest.fixture(scope="module")
def learned(splits):
    torch.manual_seed(0)
    task = build()
    fit(task, splits.train, list(range(24)), steps=40)
    return task


def test_prediction_of_a_file(learned, splits, tmp_path):
    sample = splits.train[0]
    file = tmp_path / "digit.png"
    sample.image.resize((48, 48)).convert("RGB").save(file)
    read = learned.read_file(file)
    assert read.image.mode == "L"
    assert read.label is None
    with torch.no_grad():
        (record,) = learned.predict_batch(learned.collate([learned.evaluation_transform(read)]))
    assert json.loads(json.dumps(record)) == record
    assert record["label"] == str(sample.label)
    assert record["file"] == str(file)
    shares = [entry["probability"] for entry in record["top"]]
    assert shares == sorted(shares, reverse=True)
    assert record["probability"] == shares[0] > 0.5
    (written,) = learned.save_prediction(read, record, tmp_path / "out.v2")
    assert written == tmp_path / "out.v2.png"
    with Image.open(written) as drawn:
        assert drawn.width > 600
        assert len(np.unique(np.asarray(drawn))) > 20


def test_names_that_look_like_formulas_are_drawn(tmp_path):
    record = {"top": [{"label": "$x_{", "probability": 0.9}, {"label": "b", "probability": 0.1}]}
    data = pictures.annotated(Sample(Image.new("RGB", (9, 2000)), None, "x"), record)
    assert Image.open(io.BytesIO(data)).format == "PNG"


def test_prediction_with_two_classes():
    facts = FACTS | {"class_names": ["a", "b"], "num_classes": 2}
    model = registry.create_model("eamlp_tiny", num_classes=2, in_channels=1)
    task = ClassificationTask(model.eval(), facts, image_size=32)
    batch = task.collate([Sample(torch.zeros(1, 32, 32, dtype=torch.uint8), None, "x")])
    with torch.no_grad():
        (record,) = task.predict_batch(batch)
    assert len(record["top"]) == 2
    assert sum(entry["probability"] for entry in record["top"]) == pytest.approx(1)


# baselines and report


def test_baselines_by_brute_force(splits):
    few = Splits(
        train=Subset(splits.train, range(0, 1200, 3)),
        test=Subset(splits.test, range(60)),
        facts=splits.facts,
    )
    found = build().baselines(few)
    train = np.stack([np.asarray(few.train[i].image, dtype=float).ravel() for i in range(400)])
    hits = 0
    for index in range(60):
        sample = few.test[index]
        distance = ((train - np.asarray(sample.image, dtype=float).ravel()) ** 2).sum(1)
        hits += labels_of(few.train)[int(distance.argmin())] == sample.label
    assert found["nearest_neighbor_accuracy"] == pytest.approx(hits / 60)
    labels = labels_of(few.train)
    commonest = max(set(labels), key=labels.count)
    expected = np.mean(np.array(labels_of(few.test)) == commonest)
    assert found["commonest_class_accuracy"] == pytest.approx(expected)


def test_baselines_without_one_size_or_without_test(splits):
    facts = splits.facts | {"image_size": None}
    found = build().baselines(Splits(splits.train, splits.validation, splits.test, facts))
    assert set(found) == {"commonest_class_accuracy"}
    assert build().baselines(Splits(splits.train)) == {}


def test_report_sections(learned, splits):
    few = Splits(splits.train, splits.validation, Subset(splits.test, range(40)), splits.facts)
    sections = learned.report_sections(few, torch.device("cpu"))
    titles = [section.title for section in sections]
    assert titles == ["Confusions", "Predictions", "Attention of the memories"]
    drawn = [part for section in sections for part in section.parts if isinstance(part, Picture)]
    assert len(drawn) >= 5
    for part in drawn:
        with Image.open(io.BytesIO(part.data)) as image:
            assert len(np.unique(np.asarray(image))) > 20
        assert part.caption
    classes = [part for part in sections[0].parts if isinstance(part, Table)][-1]
    assert [row[0] for row in classes.rows] == FACTS["class_names"]
    assert sum(row[1] for row in classes.rows) == 40
    correct = sum(row[1] * row[2] / 100 for row in classes.rows if row[2] is not None)
    with torch.no_grad():
        metrics = learned.new_metrics(torch.device("cpu"))
        learned.validation_step(batch_of(learned, few.test, range(40)), metrics)
    assert correct == pytest.approx(40 * metrics.compute()["accuracy"])


@pytest.mark.parametrize(
    ("name", "maps"), [("t2t_vit_tiny", ["stem 1"]), ("mlp_tiny", [])], ids=["stem", "none"]
)
def test_report_shows_the_memories_there_are(name, maps, splits):
    few = Splits(splits.train, test=Subset(splits.test, range(12)), facts=splits.facts)
    task = build(name)
    task.model.eval()
    assert list(pictures.slot_maps(task.model, torch.zeros(1, 1, 32, 32))) == maps
    titles = [section.title for section in task.report_sections(few, torch.device("cpu"))]
    assert titles[:2] == ["Confusions", "Predictions"]
    assert titles[2:] == (["Attention of the memories"] if maps else [])


def test_maps_follow_the_image(learned):
    """A map over the patches stands upright: what is moved in the image moves in the map."""
    image = torch.zeros(1, 1, 32, 32)
    image[..., 4:12, 20:28] = 3.0  # upper right
    found = pictures.slot_maps(learned.model, image)
    plain = pictures.slot_maps(learned.model, torch.zeros(1, 1, 32, 32))
    assert list(found) == ["stem 1", *(f"block {number}" for number in (1, 2, 3))]
    for name, shape in (("stem 1", (1, 16, 16, 16)), ("block 1", (4, 16, 8, 8))):
        assert found[name].shape == shape
        change = np.abs(found[name] - plain[name]).sum(axis=(0, 1))
        row, column = np.unravel_index(change.argmax(), change.shape)
        assert row < shape[2] / 2 <= column


def test_maps_leave_the_class_token_out_and_are_those_of_the_layer():
    model = registry.create_model("eamlp_tiny", num_classes=3, pool="cls", depth=1).eval()
    image = torch.randn(1, 3, 40, 24)
    found = pictures.slot_maps(model, image)["block 1"]
    assert found.shape == (4, 16, 10, 6)
    with torch.no_grad():
        tokens, _, _ = model._embed(image)
        attention = model.blocks[0].attention.attention_map(model.blocks[0].norm1(tokens))
    assert attention.shape[2] == 61
    head, slot, row, column = 3, 7, 4, 2
    expected = attention[0, head, 1 + row * 6 + column, slot]
    assert found[head, slot, row, column] == pytest.approx(float(expected))


def test_confusions_are_counted():
    results = pictures.Results(
        split=[],
        split_name="test",
        indices=[],
        labels=np.array([0, 1, 1, 2]),
        probabilities=np.eye(3)[[0, 2, 1, 2]],
        class_names=["a", "b", "c"],
    )
    assert results.confusion().tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


# recipes


def test_every_row_of_table_2_has_a_recipe_that_binds():
    recipes = {
        name: recipe
        for name, recipe in registry.recipes().items()
        if recipe.task == "classification"
    }
    rows = {name for name in recipes if name.startswith("classification_imagenet/")}
    assert len(rows) == 23
    for name, recipe in recipes.items():
        if name in rows:
            assert recipe.model.name == name.split("/")[1]
        with torch.device("meta"):
            model = registry.create_model(recipe.model.name, **recipe.model.arguments)
        if name in rows:  # small networks take any size
            assert model.input_shape[1] == recipe.options["image_size"]
        ClassificationTask(model, FACTS, **recipe.options)
        assert recipe.data.name in registry.datasets("classification")


def test_demo_is_a_recipe():
    assert registry.demos()["classification"] in registry.recipes()


@pytest.mark.golden("classification.lr_schedule")
def test_learning_rates_of_the_recipes_are_the_published_ones(golden_case):
    (file,) = golden_case.files.values()
    recipes = registry.recipes()
    checked = 0
    for published in json.loads(file.read_text())["schedules"].values():
        wanted = published["args"]
        for name, recipe in recipes.items():
            if not name.startswith("classification_imagenet/"):
                continue
            if (recipe.optim.lr, recipe.schedule.warmup) != (wanted["lr"], wanted["warmup_epochs"]):
                continue
            epochs = recipe.train.epochs
            assert epochs == len(published["lr"]) == wanted["epochs"] + wanted["cooldown_epochs"]
            table = Timetable.of(recipe.train, batches_per_epoch=3, batches_per_step=1)
            factor = learning_rate_factor(recipe.schedule, table)
            for epoch, expected in enumerate(published["lr"]):
                for step in (3 * epoch, 3 * epoch + 2):
                    rate = factor(step) * recipe.optim.lr
                    assert rate == pytest.approx(expected, rel=1e-9), epoch
            checked += 1
    assert checked >= 2


@pytest.mark.golden("classification.state_dict_keys")
def test_decayed_parameters_of_the_recipes_are_the_published_ones(golden_case):
    (file,) = golden_case.files.values()
    listed = json.loads(file.read_text())["models"]
    recipes = registry.recipes()
    for official, name in {
        "EAMLP T2t_vit_7": "eamlp_7",
        "T2T-ViT t2t_vit_14": "t2t_vit_14",
    }.items():
        recipe = recipes[f"classification_imagenet/{name}"]
        with torch.device("meta"):
            model = registry.create_model(name)
        found = {"decay": [0, 0], "no_decay": [0, 0]}
        for group in parameter_groups(model, recipe.optim):
            total = found["decay" if group["weight_decay"] else "no_decay"]
            total[0] += len(group["params"])
            total[1] += sum(parameter.numel() for parameter in group["params"])
        for kind, (tensors, elements) in found.items():
            expected = listed[official]["optimizer_groups"][kind]
            assert (tensors, elements) == (expected["tensors"], expected["elements"])
