"""The segmentation task: step, metrics, predictions, baselines, report, and that it learns."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eanet import registry, run
from eanet.data.files import decode_indices
from eanet.data.splits import Splits, Subset
from eanet.errors import UserError
from eanet.prediction import predict
from eanet.recipe import DataSpec, ModelSpec, Recipe, TrainSpec
from eanet.report.page import Picture, Table
from eanet.starting_weights import start_from
from eanet.tasks.segmentation import pictures
from eanet.tasks.segmentation.builtin import DrawnScenes
from eanet.tasks.segmentation.samples import IGNORE, Sample
from eanet.tasks.segmentation.submission import pack_voc
from eanet.tasks.segmentation.task import SegmentationTask

SPLITS = DrawnScenes(num_train=40, num_validation=6, num_test=8).splits
FACTS = SPLITS.facts
OPTIONS = {"crop_size": [64, 64], "reduction": "valid_pixels"}


def build(name="eanet_tiny", *, arguments=None, **options):
    model = registry.create_model(name, num_classes=7, in_channels=3, **(arguments or {}))
    return SegmentationTask(model, FACTS, **{**OPTIONS, **options})


def batch_of(task, dataset, indices, *, training=False):
    transform = task.train_transform if training else task.evaluation_transform
    return task.collate([transform(dataset[index]) for index in indices])


# the step


class PerPixel(nn.Module):
    """The smallest network: logits linear in the color of a pixel."""

    def __init__(self, classes=7):
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 1)

    def forward(self, images):
        return self.layer(images)


def test_loss_is_cross_entropy_of_labeled_pixels():
    task = SegmentationTask(PerPixel(), FACTS, **OPTIONS, flip=0.0)
    batch = batch_of(task, SPLITS.train, range(3), training=True)
    (update,) = task.training_step([batch], 0)
    logits = task.model(batch.images)
    expected = nn.functional.cross_entropy(logits, batch.labels.long(), ignore_index=IGNORE)
    torch.testing.assert_close(update.losses["loss"], expected)
    valid = batch.labels != IGNORE
    right = (logits.argmax(1) == batch.labels)[valid].float().mean()
    assert float(update.numbers["pixel_accuracy"]) == pytest.approx(float(right))


def test_auxiliary_head_adds_its_weighted_loss():
    task = build(arguments={"auxiliary": True, "auxiliary_channels": 8}, auxiliary_weight=0.25)
    batch = batch_of(task, SPLITS.train, range(2), training=True)
    (update,) = task.training_step([batch], 0)
    assert set(update.losses) == {"loss", "auxiliary_loss"}
    task.auxiliary_weight = 0.5
    (double,) = task.training_step([batch], 0)
    ratio = double.losses["auxiliary_loss"] / update.losses["auxiliary_loss"]
    assert float(ratio.detach()) == pytest.approx(2, rel=1e-3)


def test_step_uses_the_network_the_loop_put_in_place():
    task = SegmentationTask(PerPixel(), FACTS, **OPTIONS)
    task.networks["model"] = other = PerPixel()
    (update,) = task.training_step([batch_of(task, SPLITS.train, [0], training=True)], 0)
    update.losses["loss"].backward()
    assert task.model.layer.weight.grad is None
    assert other.layer.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"crop_size": [0, 4]}, "crop_size"),
        ({"crop_size": [4]}, "crop_size"),
        ({"ratios": [2.0, 0.5]}, "ratios"),
        ({"flip": 2.0}, "flip"),
        ({"reduction": "sum"}, "reduction"),
        ({"class_weights": [1.0]}, "class_weights"),
        ({"convention": "pil"}, "convention"),
        ({"window": [8, 8]}, "window_stride"),
    ],
)
def test_refused_options(options, word):
    with pytest.raises(ValueError, match=word):
        build(**options)


def test_images_are_judged_at_their_own_size():
    task = build(scale=[32, 32], convention="smooth")
    task.model.eval()
    sizes = [(40, 64), (64, 48)]
    samples = [
        Sample(Image.new("RGB", size[::-1]), np.zeros(size, dtype=np.uint8), "x") for size in sizes
    ]
    batch = task.collate([task.evaluation_transform(sample) for sample in samples])
    metrics = task.new_metrics(torch.device("cpu"))
    with torch.no_grad():
        found = list(task.class_scores(batch))
        task.validation_step(batch, metrics)
    assert [tuple(scores.shape[1:]) for scores in found] == sizes
    assert int(metrics.confusion_matrix().sum()) == sum(a * b for a, b in sizes)


@torch.no_grad()
def test_large_images_go_through_few_at_a_time(monkeypatch):
    task = build()
    task.model.eval()
    batch = batch_of(task, SPLITS.test, range(5))
    whole = list(task.class_scores(batch))
    seen = []
    task.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr("eanet.tasks.segmentation.task._MAX_SCORE_VALUES", 2 * 7 * 64 * 64)
    parts = list(task.class_scores(batch))
    assert seen == [2, 2, 1]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merge", ["logits", "probabilities"])
@torch.no_grad()
def test_reported_loss_is_that_of_the_merged_passes(merge):
    task = build(merge=merge)
    task.model.eval()
    batch = batch_of(task, SPLITS.test, [0])
    metrics = task.new_metrics(torch.device("cpu"))
    task.validation_step(batch, metrics)
    logits = task.model(task._normalized(batch.images))
    expected = nn.functional.cross_entropy(logits, batch.labels.long(), ignore_index=IGNORE)
    assert metrics.compute()["loss"] == pytest.approx(float(expected), rel=1e-4)


# learning


@pytest.fixture(scope="module")
def learned():
    """A task that was trained on a few scenes."""
    torch.manual_seed(0)
    task = build(flip=0.0)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=4e-3, weight_decay=0.0)
    task.model.train()
    batch = batch_of(task, SPLITS.train, range(4), training=True)
    for step in range(70):
        (update,) = task.training_step([batch], step)
        optimizer.zero_grad()
        update.losses["loss"].backward()
        optimizer.step()
    task.model.eval()
    return task


@torch.no_grad()
def test_overfits_a_few_scenes(learned):
    # in training mode: four scenes say little of the running statistics
    learned.model.train()
    batch = batch_of(learned, SPLITS.train, range(4))
    metrics = learned.new_metrics(torch.device("cpu"))
    learned.validation_step(batch, metrics)
    learned.model.eval()
    assert metrics.compute()["mean_iou"] > 0.95


# prediction


def test_prediction_of_a_file(learned, tmp_path):
    file = tmp_path / "odd.png"
    Image.fromarray(np.asarray(SPLITS.train[0].image)[:50, :37]).save(file)
    read = learned.read_file(file)
    with torch.no_grad():
        (record,) = learned.predict_batch(learned.collate([learned.evaluation_transform(read)]))
    mask = record.pop("_mask")
    assert json.loads(json.dumps(record)) == record
    assert (record["height"], record["width"]) == mask.shape == (50, 37)
    shares = [entry["share"] for entry in record["classes"]]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    files = learned.save_prediction(read, {**record, "_mask": mask}, tmp_path / "out.v2")
    assert [f.name for f in files] == ["out.v2.png", "out.v2.color.png", "out.v2.index.png"]
    np.testing.assert_array_equal(decode_indices(files[2]), mask)
    with Image.open(files[2]) as index:
        colored = np.asarray(index.convert("RGB"))
    with Image.open(files[1]) as shown:
        np.testing.assert_array_equal(colored, np.asarray(shown))
    assert tuple(colored[0, 0]) == tuple(FACTS["palette"][mask[0, 0]])
    with Image.open(files[0]) as drawn:
        assert drawn.width > 900


def test_names_that_look_like_formulas_are_drawn(tmp_path):
    files = pictures.write_prediction(
        np.zeros((9, 300, 3), dtype=np.uint8),
        np.ones((9, 300), dtype=np.uint8),
        class_names=["$x_{", "a$b$c"],
        palette=[[0, 0, 0], [9, 9, 9]],
        stem=tmp_path / "x",
    )
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


# baselines and report


def test_baselines_by_hand():
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[:, 32:] = 1
    labels[0] = IGNORE

    class Halves:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Sample(Image.new("RGB", (64, 64)), labels, "halves")

    found = build().baselines(Splits(Halves(), None, Halves(), FACTS))
    assert found["commonest_class_of_the_place_mean_iou"] == 1.0
    assert found["commonest_class_mean_iou"] == pytest.approx(0.25)


def test_report_sections(learned):
    few = Splits(SPLITS.train, SPLITS.validation, Subset(SPLITS.test, range(5)), FACTS)
    sections = learned.report_sections(few, torch.device("cpu"))
    titles = [section.title for section in sections]
    assert titles == ["Classes", "Predictions", "Attention of the memories"]
    drawn = [part for section in sections for part in section.parts if isinstance(part, Picture)]
    assert len(drawn) == 3
    for part in drawn:
        with Image.open(io.BytesIO(part.data)) as image:
            assert len(np.unique(np.asarray(image))) > 20
    (table,) = [part for part in sections[0].parts if isinstance(part, Table)]
    assert [row[0] for row in table.rows] == FACTS["class_names"]


def test_attention_maps_are_those_of_the_block(learned):
    sample = SPLITS.test[0]
    share, saliency = pictures.attention_maps(learned, sample, torch.device("cpu"))
    assert share.shape == saliency.shape == (32, 16, 16)
    np.testing.assert_allclose(saliency.sum(axis=(1, 2)), 1, rtol=1e-4)
    assert (share.sum(axis=0) <= 1 + 1e-5).all()


# runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    recipe = Recipe(
        task="segmentation",
        model=ModelSpec(name="eanet_tiny", arguments={"backbone_width": 4, "channels": 8}),
        data=DataSpec(
            name="drawn_scenes",
            batch_size=4,
            arguments={"num_train": 8, "num_validation": 2, "num_test": 3},
        ),
        options=OPTIONS,
        train=TrainSpec(steps=2, evaluate_every=2),
    )
    run.train(recipe, folder, device="cpu")
    return folder


def test_a_run_predicts_with_other_protocols(trained, tmp_path):
    for number in range(2):
        SPLITS.test[number].image.crop((0, 0, 40 + 9 * number, 50)).save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    plain = predict(trained, files, out=tmp_path / "plain", device="cpu")
    several = predict(
        trained,
        files,
        out=tmp_path / "several",
        device="cpu",
        overrides=["--options.mirror", "true", "--options.scales", "[0.75, 1.25]"],
    )
    assert len(plain.records) == len(several.records) == 2
    assert "_mask" not in plain.records[0]
    assert "_mask" not in (tmp_path / "plain" / "predictions.csv").read_text()
    masks = [
        decode_indices(tmp_path / kind / "pictures" / "1.index.png")
        for kind in ("plain", "several")
    ]
    assert masks[0].shape == masks[1].shape == (50, 49)
    assert (masks[0] != masks[1]).any()
    archive = pack_voc(tmp_path / "plain" / "pictures", ["0", "1\n"], tmp_path / "all.zip")
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/{n}.png" for n in "01"]
        stored = Image.open(io.BytesIO(packed.read(names[1])))
        np.testing.assert_array_equal(np.asarray(stored), masks[0])
    with pytest.raises(UserError, match="'2' has no prediction"):
        pack_voc(tmp_path / "plain" / "pictures", ["0", "2"], tmp_path / "all.zip")
    assert archive.exists()
    wrong = Image.fromarray(np.full((4, 4), 21, dtype=np.uint8), mode="P")
    wrong.putpalette([0, 0, 0] * 256)
    wrong.save(tmp_path / "3.index.png")
    with pytest.raises(UserError, match="holds class 21"):
        pack_voc(tmp_path, ["3"], tmp_path / "bad.zip")
    assert not (tmp_path / "bad.zip").exists()


def test_a_backbone_starts_from_a_file(trained, tmp_path):
    from safetensors.torch import save_file

    source = registry.create_model("eanet_tiny", backbone_width=4, channels=8).backbone
    file = tmp_path / "backbone.safetensors"
    save_file(source.state_dict(), file)
    task = run.open_run(trained).task
    start_from(task.model, f"backbone:{file}", load=run.load)
    for name, tensor in task.model.backbone.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])
    with pytest.raises(UserError, match="no model 'resnet50x'"):
        start_from(task.model, "backbone:timm/resnet50x", load=run.load)
    task.model = PerPixel()
    with pytest.raises(UserError, match="has no backbone"):
        start_from(task.model, f"backbone:{file}", load=run.load)


def test_evaluation_takes_options(trained):
    plain = run.evaluate(trained, device="cpu")
    mirrored = run.evaluate(trained, device="cpu", overrides=["--options.mirror", "true"])
    assert plain["mean_iou"] > 0
    assert plain["loss"] != mirrored["loss"]
    assert (trained / "report.html").stat().st_size > 20_000
