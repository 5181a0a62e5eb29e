"""Simple methods on the same clouds, to print beside the networks."""

from collections.abc import Sequence

import numpy as np
import torch

from eanet.data.splits import Dataset, Splits
from eanet.tasks.pointcloud.clouds import labels_of
from eanet.tasks.pointcloud.metrics import PartMetrics

__all__ = ["classification_baselines", "distance_histograms", "part_baselines"]

#: clouds that are learned from; more would take minutes
_MAX_CLOUDS = 4000
#: training clouds of a category that a test cloud is compared with
_CANDIDATES = 64
_POINTS = 256
_BINS = 32


def _even_choice(count: int) -> list[int]:
    """Return up to so many indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_CLOUDS)).astype(int)).tolist()


def distance_histograms(dataset: Dataset, indices: Sequence[int]) -> np.ndarray:
    """Return for each cloud how far its points are from one another, and from their mean."""
    rows = []
    for index in indices:
        points = dataset[index].points[:_POINTS, :3].double()
        points = points - points.mean(0)
        distances = torch.pdist(points).numpy()
        radii = points.norm(dim=1).numpy()
        rows.append(
            np.concatenate(
                [
                    np.histogram(distances, _BINS, (0, 2), density=True)[0],
                    np.histogram(radii, _BINS, (0, 1), density=True)[0],
                    np.sqrt(np.linalg.eigvalsh(np.cov(points.numpy().T))),
                ]
            )
        )
    return np.stack(rows)


def classification_baselines(splits: Splits) -> dict[str, float]:
    """Return accuracies on the test split: commonest class, random forest on distances."""
    test = splits.test if splits.test is not None else splits.validation
    if test is None:
        return {}
    train_labels, labels = np.array(labels_of(splits.train)), np.array(labels_of(test))
    commonest = np.bincount(train_labels).argmax()
    from sklearn.ensemble import RandomForestClassifier  # slow to import

    chosen = _even_choice(len(train_labels))
    forest = RandomForestClassifier(300, random_state=0)
    forest.fit(distance_histograms(splits.train, chosen), train_labels[chosen])
    asked = _even_choice(len(labels))
    predicted = forest.predict(distance_histograms(test, asked))
    return {
        "commonest_class_accuracy": float((labels == commonest).mean()),
        "random_forest_accuracy": float((predicted == labels[asked]).mean()),
    }


def part_baselines(
    splits: Splits, part_ranges: Sequence[Sequence[int]], num_parts: int
) -> dict[str, float]:
    """Return instance mIoU on the test split: commonest part, and parts of the most similar cloud.

    The second takes the training cloud of the same category that is nearest by the mean distance
    of its points, and gives every point the part of the nearest point there.
    """
    test = splits.test if splits.test is not None else splits.validation
    if test is None:
        return {}
    commonest, nearest = PartMetrics(part_ranges), PartMetrics(part_ranges)
    train_labels = np.array(labels_of(splits.train))
    train = {
        category: [
            splits.train[int(index)]
            for index in np.flatnonzero(train_labels == category)[:_CANDIDATES]
        ]
        for category in range(len(part_ranges))
    }
    for index in _even_choice(len(test)):
        sample = test[index]
        candidates = train[int(sample.label)]
        if not candidates:
            continue
        category = torch.tensor([sample.label])
        targets = sample.parts[None]
        joined = torch.cat([one.parts for one in candidates])
        counts = torch.bincount(joined, minlength=num_parts)
        guess = int(counts.argmax())
        scores = torch.zeros(1, len(sample), num_parts)
        scores[..., guess] = 1
        commonest.update(scores, targets, category)
        probe = sample.points[:_POINTS, :3]
        distances = [
            float(torch.cdist(probe, one.points[:, :3]).amin(1).mean()) for one in candidates
        ]
        closest = candidates[int(np.argmin(distances))]
        rows = torch.cdist(sample.points[:, :3], closest.points[:, :3]).argmin(1)
        scores = torch.nn.functional.one_hot(closest.parts[rows], num_parts).float()[None]
        nearest.update(scores, targets, category)
    return {
        "commonest_part_instance_miou": commonest.compute()["instance_miou"],
        "nearest_cloud_instance_miou": nearest.compute()["instance_miou"],
    }
