"""Two tiny tasks: a classifier, and a pair of networks with several updates of one a step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from eanet.data.splits import Splits
from eanet.engine.distributed import Processes
from eanet.engine.run_folder import RunFolder
from eanet.engine.task import Update
from eanet.engine.trainer import Trainer
from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

CHANNELS, CLASSES = 6, 3


@dataclass
class Points:
    """Normal points; the class is given by the largest of the first coordinates."""

    num_samples: int
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.points = torch.randn(self.num_samples, CHANNELS, generator=generator).to(self.dtype)

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        return self.points[index], int(self.points[index, :CLASSES].argmax())


@dataclass
class Batch:
    points: torch.Tensor
    labels: torch.Tensor

    def to(self, device, *, channels_last=False):
        return replace(self, points=self.points.to(device), labels=self.labels.to(device))

    def __len__(self):
        return len(self.labels)


class Accuracy:
    def __init__(self, device):
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, right, total):
        self.counts += torch.tensor([float(right), float(total)], dtype=torch.float64)

    def compute(self):
        counts = self.counts.clone()
        if dist.is_initialized():
            dist.all_reduce(counts)
        return {"accuracy": float(counts[0] / counts[1]), "samples": float(counts[1])}


class PointTask:
    best_metric = "accuracy"
    best_mode = "max"
    batches_per_step = 1

    def train_transform(self, sample):
        """Add noise of all three generators."""
        points, label = sample
        noise = 0.1 * torch.randn(CHANNELS) + 0.1 * random.random() + 0.1 * np.random.rand()
        return points + noise.to(points.dtype), label

    def evaluation_transform(self, sample):
        return sample

    def collate(self, samples: Sequence[Any]) -> Batch:
        points, labels = zip(*samples, strict=True)
        return Batch(torch.stack(points), torch.tensor(labels))

    def new_metrics(self, device):
        return Accuracy(device)


class Block(nn.Module):
    def __init__(self, width, *, norm, dropout):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(F.gelu(self.norm(self.linear(x))))


class Classifier(nn.Module):
    """A perceptron whose blocks are sharded singly; the first layer's weight is tied on demand."""

    def __init__(self, *, norm="layer", dropout=0.1, width=8, tied=False, depth=2):
        super().__init__()
        self.stem = nn.Linear(CHANNELS, width)
        self.blocks = nn.ModuleList(Block(width, norm=norm, dropout=dropout) for _ in range(depth))
        if tied:
            self.blocks[-1].linear.weight = self.blocks[0].linear.weight
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ToyClassification(PointTask):
    def __init__(self, *, poison_step=None, poison_loss=float("nan"), **options):
        self.networks = {"model": Classifier(**options)}
        self.poison_step, self.poison_loss = poison_step, poison_loss

    def training_step(self, batches, step):
        (batch,) = batches
        logits = self.networks["model"](batch.points)
        loss = F.cross_entropy(logits, batch.labels)
        if step == self.poison_step:
            loss = loss * self.poison_loss
        right = (logits.argmax(1) == batch.labels).double().mean()
        yield Update("model", {"cross_entropy": loss}, {"accuracy": right})

    def validation_step(self, batch, metrics):
        assert not self.networks["model"].training
        right = self.networks["model"](batch.points).argmax(1) == batch.labels
        metrics.update(right.sum(), len(batch))


class ToyAdversary(PointTask):
    """A critic with two updates a step, each on a fresh batch, then its opponent."""

    batches_per_step = 2
    best_mode = "min"

    def __init__(self, *, dropout=0.1):
        self.networks = {
            "generator": nn.Sequential(
                nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, CHANNELS)
            ),
            "critic": nn.Sequential(
                nn.Linear(CHANNELS, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 1)
            ),
        }
        # a part that is not trained, and statistics that are
        self.networks["generator"][0].bias.requires_grad_(False)

    def latent(self, batch):
        """Draw per step, or take from the batch where the result must not depend on the rank."""
        return torch.randn(len(batch), 4, dtype=batch.points.dtype)

    def training_step(self, batches, step):
        for batch in batches:
            with torch.no_grad():
                drawn = self.networks["generator"](self.latent(batch))
            real = self.networks["critic"](batch.points)
            fake = self.networks["critic"](drawn)
            losses = {"real": F.relu(1 - real).mean(), "fake": F.relu(1 + fake).mean()}
            yield Update("critic", losses)
        drawn = self.networks["generator"](self.latent(batches[-1]))
        yield Update("generator", {"loss": -self.networks["critic"](drawn).mean()})

    def validation_step(self, batch, metrics):
        fake = self.networks["critic"](self.networks["generator"](self.latent(batch)))
        metrics.update(fake.sum(), len(batch))


class ToyAdversaryOfBatch(ToyAdversary):
    """Takes its random inputs from the batch, so that ranks see what one process sees."""

    def latent(self, batch):
        return batch.points[:, :4]


TASKS = {
    "classification": ToyClassification,
    "adversary": ToyAdversary,
    "adversary_of_batch": ToyAdversaryOfBatch,
}


def recipe(*, num_workers=0, batch_size=8, optim=None, schedule=None, by_network=None, **train):
    """A recipe of 12 steps with everything switched on."""
    if "epochs" not in train:
        train.setdefault("steps", 12)
        train.setdefault("evaluate_every", 5)
    train.setdefault("ema_decay", 0.9)
    train.setdefault("seed", 3)
    return Recipe(
        task="toy",
        model=ModelSpec(name="toy"),
        data=DataSpec(name="points", batch_size=batch_size, num_workers=num_workers),
        optim=OptimSpec(**{"lr": 0.01, "clip_norm": 1.0, **(optim or {})}),
        optim_by_network={k: OptimSpec(**v) for k, v in (by_network or {}).items()},
        schedule=ScheduleSpec(**{"name": "cosine", "warmup": 3, **(schedule or {})}),
        train=TrainSpec(**train),
    )


def toy_trainer(
    folder,
    task="classification",
    *,
    num_samples=40,
    num_validation=13,
    dtype="float32",
    options=None,
    processes=None,
    tensorboard=False,
    init_seed=1,
    **recipe_options,
):
    """Build a trainer; the weights depend on ``init_seed`` alone."""
    torch.manual_seed(init_seed)
    dtype = getattr(torch, dtype)
    built = TASKS[task](**(options or {}))
    for network in built.networks.values():
        network.to(dtype)
    validation = Points(num_validation, dtype, seed=1) if num_validation else None
    return Trainer(
        built,
        recipe(**recipe_options),
        RunFolder(folder),
        splits=Splits(Points(num_samples, dtype), validation),
        processes=processes or Processes(),
        quiet=True,
        tensorboard=tensorboard,
    )


def final_state(folder):
    """Return everything in the last checkpoint and the log but the time it took."""
    from eanet.engine.checkpoint import newest_intact
    from eanet.engine.progress import read_metrics_log

    checkpoint = newest_intact(Path(folder) / "checkpoints")
    tensors = {
        f"{path.stem}:{key}": value
        for path in sorted(checkpoint.path.glob("*.safetensors"))
        for key, value in checkpoint.tensors(path.stem).items()
    }
    state = {k: v for k, v in checkpoint.state.items() if k not in ("seconds", "continuation")}
    log = [
        {k: v for k, v in record.items() if k != "seconds"}
        for record in read_metrics_log(Path(folder) / "metrics.jsonl")
    ]
    return tensors, state, log


def assert_same_run(first, second):
    """Compare two runs bit by bit."""
    tensors, state, log = final_state(first)
    other_tensors, other_state, other_log = final_state(second)
    assert tensors.keys() == other_tensors.keys()
    differing = [key for key in tensors if not torch.equal(tensors[key], other_tensors[key])]
    assert not differing
    assert state == other_state
    assert log == other_log
