"""Generated images beside real ones: what one validation adds up."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from eanet.tasks.generation.judges import Judge
from eanet.tasks.generation.metrics import FeatureStatistics, frechet_distance, inception_score

__all__ = ["COLLAPSED_BELOW", "Comparison", "Spread"]

#: a generator whose images vary this little beside real ones has collapsed
COLLAPSED_BELOW = 0.2


@dataclass
class Spread:
    """How much images of one class differ from one another, pixel by pixel.

    Args:
        num_classes: 1 where classes do not matter.
        pixels: values of an image.
    """

    num_classes: int
    pixels: int
    counts: Tensor = field(init=False)
    sums: Tensor = field(init=False)
    squares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.num_classes, dtype=torch.float64)
        self.sums = torch.zeros(self.num_classes, self.pixels, dtype=torch.float64)
        self.squares = torch.zeros(self.num_classes, dtype=torch.float64)

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add images of classes."""
        values = images.detach().flatten(1).double().cpu()
        labels = labels.cpu() if self.num_classes > 1 else torch.zeros(len(values)).long()
        self.counts.index_add_(0, labels, torch.ones(len(values), dtype=torch.float64))
        self.sums.index_add_(0, labels, values)
        self.squares.index_add_(0, labels, values.square().sum(dim=1))

    def __add__(self, other: "Spread") -> "Spread":
        """Return the spread of both sets together."""
        both = Spread(self.num_classes, self.pixels)
        both.counts = self.counts + other.counts
        both.sums = self.sums + other.sums
        both.squares = self.squares + other.squares
        return both

    def deviation(self) -> float:
        """Return the root of the mean variance within classes of at least two images."""
        some = self.counts > 1
        if not bool(some.any()):
            return float("nan")
        counts = self.counts[some]
        scatter = self.squares[some] - self.sums[some].square().sum(dim=1) / counts
        freedom = (counts - 1).sum() * self.pixels
        return float((scatter.sum().clamp(min=0) / freedom).sqrt())


class Comparison:
    """Metrics of one validation; satisfies :class:`eanet.engine.task.Metrics`.

    Args:
        judge: gives features and logits.
        num_classes: that images are drawn and spread by; ``None`` where they do not matter.
        num_score_splits: parts that the score is averaged over.
        checks_classes: whether the judge's classes are those asked for, so that it can be said
            how often they agree.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        num_classes: int | None,
        num_score_splits: int = 1,
        checks_classes: bool = False,
    ) -> None:
        self.judge = judge
        self.num_classes = num_classes
        self.num_score_splits = num_score_splits
        self.checks_classes = checks_classes
        self.real: FeatureStatistics | None = None
        self.fake: FeatureStatistics | None = None
        self.spreads: tuple[Spread, Spread] | None = None
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._numbers: dict[str, list[float]] = {}

    def update(
        self,
        real: Tensor,
        real_labels: Tensor,
        fake: Tensor,
        fake_labels: Tensor,
        *,
        real_features: Tensor | None = None,
    ) -> Tensor:
        """Add a batch of real and one of generated images; return the features of the real ones.

        Args:
            real: within [-1, 1].
            real_labels: their classes.
            fake: within [-1, 1].
            fake_labels: the classes asked for.
            real_features: where they are known already.
        """
        if real_features is None:
            real_features, _ = self.judge(real)
        features, logits = self.judge(fake)
        self.real = _added(self.real, FeatureStatistics.of(real_features))
        self.fake = _added(self.fake, FeatureStatistics.of(features))
        self._logits.append(logits.cpu())
        self._labels.append(fake_labels.cpu())
        if self.spreads is None:
            size, classes = real[0].numel(), self.num_classes or 1
            self.spreads = Spread(classes, size), Spread(classes, size)
        self.spreads[0].update(real, real_labels)
        self.spreads[1].update(fake, fake_labels)
        return real_features

    def add_number(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add to the mean of a number."""
        total = self._numbers.setdefault(name, [0.0, 0.0])
        total[0] += value * weight
        total[1] += weight

    def compute(self, *, gathers: bool = True) -> dict[str, float]:
        """Return the figures of everything seen.

        Args:
            gathers: over all processes, each of which must call this; otherwise of this one alone.
        """
        if gathers:
            self._gather()
        if self.real is None or self.fake is None or self.spreads is None:
            raise ValueError("nothing to compare: no batch was added")
        prefix = self.judge.prefix
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        score, score_spread = inception_score(
            logits, num_splits=min(self.num_score_splits, len(logits))
        )
        name = "inception_score" if self.judge.kind == "inception" else f"{prefix}score"
        numbers = {f"{prefix}fid": frechet_distance(self.real, self.fake), name: score}
        if self.num_score_splits > 1:
            numbers[f"{name}_spread"] = score_spread
        if self.checks_classes:
            numbers["agreement"] = float((logits.argmax(dim=1) == labels).double().mean())
        real, fake = (spread.deviation() for spread in self.spreads)
        numbers["diversity"] = fake / real if real > 0 else float("nan")
        numbers["num_images"] = float(self.fake.count)
        numbers |= {key: total / weight for key, (total, weight) in self._numbers.items()}
        return numbers

    def _gather(self) -> None:
        """Bring together what the processes have seen."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        own = (self.real, self.fake, self.spreads, self._logits, self._labels, self._numbers)
        parts: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        others = Comparison(self.judge, num_classes=self.num_classes)
        for real, fake, spreads, logits, labels, numbers in parts:  # pyright: ignore
            if real is None:
                continue
            others.real, others.fake = _added(others.real, real), _added(others.fake, fake)
            others.spreads = (
                spreads
                if others.spreads is None
                else (others.spreads[0] + spreads[0], others.spreads[1] + spreads[1])
            )
            others._logits += logits
            others._labels += labels
            for key, (total, weight) in numbers.items():
                others.add_number(key, total / weight, weight)
        self.real, self.fake, self.spreads = others.real, others.fake, others.spreads
        self._logits, self._labels, self._numbers = others._logits, others._labels, others._numbers


def _added(first: FeatureStatistics | None, second: FeatureStatistics) -> FeatureStatistics:
    """Return the statistics of both where there are two."""
    return second if first is None else first + second
