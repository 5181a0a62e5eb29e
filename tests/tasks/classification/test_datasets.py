"""Data sets of labeled images: what they read, and what they refuse by name."""

import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from eanet import registry
from eanet.data.splits import Subset
from eanet.errors import UserError
from eanet.tasks.classification.builtin import Digits
from eanet.tasks.classification.datasets import (
    Cifar10,
    FashionMnist,
    ImageFolder,
    labels_of,
    pixel_statistics,
)


def write_images(folder, classes, count, *, start=0):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(start, start + count):
            color = (40 * label, index, 200)
            Image.new("RGB", (6, 5), color).save(folder / name / f"{index:02d}.png")


def write_idx(folder, prefix, images, labels):
    head = struct.pack(">HBB3I", 0, 8, 3, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    head = struct.pack(">HBBI", 0, 8, 1, len(labels))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())


# digits


def test_digits_are_complete_and_divided_once_for_all():
    splits = Digits().splits
    assert len(splits.train) + len(splits.test) == 1797
    assert abs(len(splits.test) / 1797 - 0.2) < 0.005
    for split in (splits.train, splits.test):
        counts = np.bincount(labels_of(split), minlength=10)
        assert counts.min() >= 0.08 * len(split)
    assert labels_of(splits.test) == labels_of(Digits().splits.test)
    # every image once: the 16 levels survive the scaling to bytes
    stored = np.concatenate([splits.train.images, splits.test.images])
    from sklearn.datasets import load_digits

    original = load_digits().images
    assert np.abs(np.sort(stored.sum((1, 2))) - np.sort(original.sum((1, 2)) * 255 / 16)).max() < 32
    sample = splits.train[3]
    assert sample.image.size == (8, 8)
    assert sample.image.mode == "L"
    assert sample.label == labels_of(splits.train)[3]
    assert splits.facts["num_classes"] == 10
    assert splits.facts["in_channels"] == 1


def test_digits_statistics_are_those_of_the_training_images():
    splits = Digits().splits
    values = splits.train.images / 255.0
    assert splits.facts["mean"] == pytest.approx([values.mean()], abs=1e-6)
    assert splits.facts["std"] == pytest.approx([values.std()], abs=1e-6)


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(UserError, match="takes no folder"):
        Digits(str(tmp_path))


def test_registry_finds_every_data_set():
    assert {"digits", "image_folder", "fashion_mnist", "mnist", "cifar10"} <= set(
        registry.datasets("classification")
    )
    assert registry.dataset("classification", "digits") is Digits


# folders


def test_folder_with_splits(tmp_path):
    write_images(tmp_path / "train", ["cat", "dog"], 3)
    write_images(tmp_path / "valid", ["cat", "dog"], 2, start=10)
    write_images(tmp_path / "test", ["cat", "dog"], 1, start=20)
    splits = ImageFolder(str(tmp_path)).splits
    assert [len(split) for split in splits.named().values()] == [6, 4, 2]
    assert splits.facts["class_names"] == ["cat", "dog"]
    sample = splits.validation[3]
    assert sample.label == 1
    assert sample.name.endswith("valid/dog/11.png")
    assert sample.image.getpixel((0, 0)) == (40, 11, 200)


def test_one_folder_is_divided_class_by_class_and_always_alike(tmp_path):
    write_images(tmp_path, ["a", "b", "c"], 10)
    first, second = (ImageFolder(str(tmp_path)).splits for _ in range(2))
    assert np.bincount(labels_of(first.train)).tolist() == [8, 8, 8]
    assert np.bincount(labels_of(first.test)).tolist() == [2, 2, 2]
    assert first.test.paths == second.test.paths
    assert not set(first.test.paths) & set(first.train.paths)
    assert first.validation is None


def test_folder_ignores_hidden_and_foreign_files_and_looks_deep(tmp_path):
    write_images(tmp_path, ["a", "b"], 2)
    (tmp_path / "a" / "deep").mkdir()
    Image.new("L", (3, 3)).save(tmp_path / "a" / "deep" / "x.PNG")
    (tmp_path / "a" / "._00.png").write_bytes(b"junk")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"junk")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / "round").symlink_to(tmp_path)  # never followed
    splits = ImageFolder(str(tmp_path)).splits
    assert len(splits.train) + len(splits.test) == 5


def test_grey_folder(tmp_path):
    write_images(tmp_path, ["a", "b"], 2)
    splits = ImageFolder(str(tmp_path), in_channels=1).splits
    assert splits.train[0].image.mode == "L"
    assert splits.facts["in_channels"] == len(splits.facts["mean"]) == 1


def refuses(words, build, *arguments, **options):
    with pytest.raises(UserError) as caught:
        build(*arguments, **options)
    for word in words:
        assert word in str(caught.value)


def test_folder_refusals(tmp_path):
    refuses(["data.root"], ImageFolder, None)
    refuses(["none", "does not exist"], ImageFolder, str(tmp_path / "none"))
    refuses(["at least two"], ImageFolder, str(tmp_path))
    whole = tmp_path / "whole"
    write_images(whole, ["a", "b"], 4)
    refuses(["in_channels", "4"], ImageFolder, str(whole), in_channels=4)
    refuses(["test_fraction", "1.5"], ImageFolder, str(whole), test_fraction=1.5)
    refuses(["mean and std"], ImageFolder, str(whole), mean=[0.5])
    (whole / "empty").mkdir()
    refuses(["empty", "no images"], ImageFolder, str(whole))
    parts = tmp_path / "parts"
    write_images(parts / "test", ["a", "b"], 1)
    refuses(["no folder 'train'"], ImageFolder, str(parts))
    write_images(parts / "train", ["a", "b", "c"], 1)
    refuses(["test", "c"], ImageFolder, str(parts))


def test_broken_image_names_its_file_when_it_is_read(tmp_path):
    write_images(tmp_path / "train", ["a", "b"], 1)
    (tmp_path / "train" / "a" / "bad.jpg").write_text("<html>")
    splits = ImageFolder(str(tmp_path)).splits
    refuses(["bad.jpg", "HTML"], splits.train.__getitem__, 1)


# IDX


@pytest.fixture
def idx_folder(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    write_idx(folder, "train", images[:20], np.arange(20) % 10)
    write_idx(folder, "t10k", images[20:], np.arange(10))
    return tmp_path, folder, images


def test_fashion_mnist_layouts(idx_folder):
    root, folder, images = idx_folder
    for place in (root, root / "FashionMNIST", folder):
        splits = FashionMnist(str(place)).splits
        np.testing.assert_array_equal(np.asarray(splits.test[4].image), images[24])
        assert splits.test[4].label == 4
    assert splits.facts["mean"] == pytest.approx([(images[:20] / 255).mean()], abs=1e-6)


def test_fashion_mnist_refusals(idx_folder):
    root, folder, images = idx_folder
    write_idx(folder, "t10k", images[20:], np.arange(9))
    refuses(["9 labels for 10 images", "t10k-labels"], FashionMnist, str(root))
    write_idx(folder, "t10k", images[20:], np.arange(10) + 1)
    refuses(["label 10 of sample 9", "t10k-labels"], FashionMnist, str(root))
    (folder / "t10k-labels-idx1-ubyte").unlink()
    refuses(["t10k-labels"], FashionMnist, str(root))


# CIFAR-10


def test_cifar10_binary_version(tmp_path):
    generator = np.random.default_rng(1)
    records = generator.integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    for part in range(5):
        (tmp_path / f"data_batch_{part + 1}.bin").write_bytes(records[part].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[5].tobytes())
    splits = Cifar10(str(tmp_path)).splits
    assert (len(splits.train), len(splits.test)) == (20, 4)
    sample = splits.train[6]
    expected = records[1, 2, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(sample.image), expected)
    assert sample.label == records[1, 2, 0]

    (tmp_path / "data_batch_3.bin").write_bytes(records[2].tobytes()[:-1])
    refuses(["data_batch_3.bin", "3073"], Cifar10, str(tmp_path))
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x0b" + records[2].tobytes()[1:])
    refuses(["data_batch_3.bin", "label 11"], Cifar10, str(tmp_path))
    (tmp_path / "data_batch_3.bin").unlink()
    refuses(["data_batch_3.bin", "No such file"], Cifar10, str(tmp_path))


def test_cifar10_pickles_are_never_opened(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refuses(["pickled", "binary version"], Cifar10, str(tmp_path))
    refuses(["neither"], Cifar10, str(tmp_path.parent))


# real files


@pytest.mark.realdata
def test_real_fashion_mnist(data_dir):
    splits = FashionMnist(str(data_dir / "fashion_mnist")).splits
    assert min(np.bincount(labels_of(splits.train), minlength=10)) > 0
    assert splits.facts["image_size"] == [28, 28]
    assert splits.facts["mean"] == pytest.approx([0.286], abs=0.01)
    assert splits.facts["std"] == pytest.approx([0.353], abs=0.01)


@pytest.mark.realdata
def test_real_cifar10(data_dir, tmp_path):
    with zipfile.ZipFile(next((data_dir / "cifar10").glob("*.zip"))) as archive:
        names = [name for name in archive.namelist() if name.endswith("5.png")]
        archive.extractall(tmp_path, names)
    root = next(path.parent for path in tmp_path.rglob("train"))
    splits = Cifar10(str(root)).splits
    assert splits.facts["class_names"] == list(Cifar10.class_names)
    images = np.stack([np.asarray(splits.train[index].image) for index in range(500)])
    assert images.shape[1:] == (32, 32, 3)
    for got, known in zip(pixel_statistics(images), (Cifar10.mean, Cifar10.std), strict=True):
        assert got == pytest.approx(known, abs=0.06)


def test_labels_of_a_subset():
    train = Digits().splits.train
    assert labels_of(Subset(train, [5, 2])) == [train.labels[5], train.labels[2]]
