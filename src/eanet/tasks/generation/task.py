"""Image generation as a task: adversarial updates, comparison with real images, pictures."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from eanet import registry
from eanet.data.files import decode_image
from eanet.data.splits import Splits
from eanet.engine.task import Update
from eanet.errors import UserError
from eanet.recipe import Recipe
from eanet.report.page import Section
from eanet.tasks.generation import pictures, sections
from eanet.tasks.generation.adversarial_pair import (
    AdversarialPair,
    NormStatistics,
    count_statistics,
    sampling_statistics,
)
from eanet.tasks.generation.comparison import COLLAPSED_BELOW, Comparison
from eanet.tasks.generation.diagnostics import watch_attention
from eanet.tasks.generation.inception import FidInception
from eanet.tasks.generation.judges import (
    PROTOCOLS,
    InceptionJudge,
    Judge,
    JudgeKind,
    RandomFeatures,
)
from eanet.tasks.generation.losses import (
    LOSSES,
    Loss,
    critic_loss,
    generator_loss,
    gradient_penalty,
)
from eanet.tasks.generation.samples import (
    Augmentation,
    Batch,
    Sample,
    collate,
    image_transform,
    to_unit_range,
)

__all__ = ["GenerationTask"]

#: values of real images' features that are kept from validation to validation: 256 MiB
_MAX_KEPT_VALUES = 2**26


class _Evaluation(Comparison):
    """A comparison beside what the batch norms of the generator are to use."""

    counted: list[Tensor] | None = None


@registry.register_task
class GenerationTask:
    """A generator and a critic that train each other.

    A step takes ``critic_updates`` fresh batches: on each the critic learns to tell real images
    from generated ones, then the generator learns to please it, once.

    Args:
        model: the two networks.
        facts: of the data set: ``class_names``, ``num_classes``, ``in_channels``.
        loss: see :func:`eanet.tasks.generation.losses.critic_loss`.
        critic_updates: updates of the critic for each of the generator.
        gradient_penalty: its weight in the critic's loss; 10 for WGAN-GP, 0 leaves it out.
        augment: of training images: "flip" mirrors every other one.
        judge: what features are compared: "random", the id of a classifier's recipe, a run folder,
            "inception", or a file of Inception's weights; see :mod:`eanet.judges`.
        protocol: how published FID and IS are obtained: "studiogan_10k" (Tables 8 and 9) or
            "50k"; with other judges it only says how many parts the score is averaged over.
        norm_statistics: that the generator uses when it is evaluated: "running", "batch" or
            "standing".

    Raises:
        ValueError: an option is outside its range.
    """

    smoke_model: ClassVar[str] = "eagan_tiny"
    smoke_data: ClassVar[str] = "digits"
    smoke_options: ClassVar[dict[str, Any]] = {"judge": "random"}
    published_metric: ClassVar[tuple[str, float]] = ("FID", 1.0)

    best_mode: Literal["max", "min"] = "min"

    def __init__(
        self,
        model: AdversarialPair,
        facts: Mapping[str, Any],
        *,
        loss: Loss = "hinge",
        critic_updates: int = 1,
        gradient_penalty: float = 0.0,
        augment: Augmentation = "none",
        judge: str = "random",
        protocol: Literal["studiogan_10k", "50k"] = "studiogan_10k",
        norm_statistics: NormStatistics = "running",
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if not isinstance(critic_updates, int) or critic_updates < 1:
            raise ValueError(f"critic_updates must be a positive integer, got {critic_updates!r}")
        if gradient_penalty < 0:
            raise ValueError(f"gradient_penalty must be at least 0, got {gradient_penalty}")
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        if norm_statistics not in ("running", "batch", "standing"):
            raise ValueError(
                f"norm_statistics must be running, batch or standing, got {norm_statistics!r}"
            )
        self.model = model
        self.networks: dict[str, nn.Module] = {"generator": model.generator, "critic": model.critic}
        self.facts = dict(facts)
        self.class_names: list[str] = list(facts["class_names"])
        self.loss: Loss = loss
        self.batches_per_step = critic_updates
        self.gradient_penalty = gradient_penalty
        self.norm_statistics: NormStatistics = norm_statistics
        self.protocol = PROTOCOLS[protocol]
        self._train_transform = image_transform(model.image_size, augment=augment)
        self._evaluation_transform = image_transform(model.image_size)
        self._real_features: dict[int, Tensor] = {}
        self.judge: Judge | None = None
        self.best_metric = "fid"
        if judge == "random":
            features = RandomFeatures(model.in_channels)
            self.use_judge(features, kind="random", name="random convolutions", num_classes=10)

    def use_judge(self, network: Any, *, kind: JudgeKind, name: str, num_classes: int) -> None:
        """Compare images by the features of a network from now on.

        Args:
            network: from images within [-1, 1] to features and logits.
            kind: "inception", "classifier" or "random"; figures of different kinds have
                different names.
            name: of the network, for people.
            num_classes: of its logits.
        """
        if isinstance(network, FidInception):
            network = InceptionJudge(network, self.protocol)
        self.judge = Judge(kind, name, network, num_classes)
        self.best_metric = f"{self.judge.prefix}fid"
        self._real_features.clear()

    @classmethod
    def recorded_figures(
        cls, recipe: Recipe, metrics: Mapping[str, float]
    ) -> list[tuple[str, str, float]]:
        """Return the figures of a run to record, under names that say how they were measured.

        Only Inception's on as many images as the protocol asks for are called FID and IS, the
        names of the paper's tables.

        Args:
            recipe: of the run.
            metrics: of the split that is reported.
        """
        judge = recipe.options.get("judge", "random")
        if "fid" in metrics:
            protocol = recipe.options.get("protocol", "studiogan_10k")
            count = int(metrics["num_images"])
            exact = count == PROTOCOLS[protocol].num_images and protocol == "studiogan_10k"
            words = "" if exact else f" ({protocol}, {count} images)"
            return [("fid", f"FID{words}", 1.0), ("inception_score", f"IS{words}", 1.0)]
        if "feature_fid" in metrics:
            return [("feature_fid", f"FID on features of {judge}", 1.0)]
        return [("random_fid", "FID on random features", 1.0)]

    @property
    def last_metrics(self) -> list[str]:
        """The figures of the last checkpoint to report beside those of the best."""
        score = "inception_score" if self.best_metric == "fid" else "feature_score"
        return [self.best_metric, score, "agreement", "diversity"]

    # data

    @classmethod
    def model_arguments(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number of classes and of image channels."""
        return {"num_classes": facts["num_classes"], "in_channels": facts["in_channels"]}

    def train_transform(self, sample: Sample) -> Sample:
        """Return the sample as a square of the network's size, augmented, as bytes."""
        return self._train_transform(sample)

    def evaluation_transform(self, sample: Sample) -> Sample:
        """Return the sample as a square of the network's size, as bytes."""
        return self._evaluation_transform(sample)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack transformed samples."""
        return collate(samples)

    def read_file(self, path: Path) -> Sample:
        """Read an image in the mode the networks were trained on.

        Raises:
            UserError: the file is no readable image.
        """
        mode = "L" if self.facts["in_channels"] == 1 else "RGB"
        return Sample(decode_image(path, mode=mode), None, str(path))

    # training

    def training_step(self, batches: Sequence[Batch], step: int) -> Iterator[Update]:
        """Yield the critic's updates, each on a fresh batch, then the generator's."""
        del step
        generator, critic = self.networks["generator"], self.networks["critic"]
        for batch in batches:
            images, labels = to_unit_range(batch.images), _labels(batch)
            latents, asked = self._draw(images)
            with torch.no_grad():
                fake = generator(latents, asked)
            # two passes: the power iteration goes on in each, as in the reference
            real_scores, fake_scores = critic(images, labels).float(), critic(fake, asked).float()
            losses = critic_loss(self.loss, real_scores, fake_scores)
            if self.gradient_penalty:
                penalty = gradient_penalty(critic, images, fake.to(images.dtype), labels)
                losses["gradient_penalty"] = self.gradient_penalty * penalty
            yield Update(
                "critic",
                losses,
                {"real_score": real_scores.mean(), "fake_score": fake_scores.mean()},
            )
        latents, asked = self._draw(to_unit_range(batches[-1].images))
        scores = critic(generator(latents, asked), asked).float()
        yield Update("generator", {"loss": generator_loss(self.loss, scores)})

    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draw latent vectors and classes, as many as there are images, on their device."""
        count, device = len(images), images.device
        latents = torch.randn(count, self.model.latent_size, device=device)
        return latents, torch.randint(self.model.num_classes or 1, (count,), device=device)

    # validation

    def new_metrics(self, device: torch.device) -> _Evaluation:
        """Return an empty comparison for one validation.

        Raises:
            UserError: there is no judge.
        """
        if self.judge is None:
            raise UserError(
                "the judge of this run is not at hand: `eanet evaluate RUN --options.judge` takes "
                "a classifier's run, a file of Inception's weights, or 'random'"
            )
        self.judge.to(device)
        checks = self.judge.kind == "classifier" and self.judge.num_classes == (
            self.model.num_classes or 0
        )
        metrics = _Evaluation(
            self.judge,
            num_classes=self.model.num_classes,
            num_score_splits=self.protocol.num_score_splits,
            checks_classes=checks,
        )
        if self.norm_statistics == "standing":
            metrics.counted = count_statistics(
                self.networks["generator"],
                latent_size=self.model.latent_size,
                num_classes=self.model.num_classes,
                device=device,
            )
        return metrics

    def validation_step(self, batch: Batch, metrics: _Evaluation) -> None:
        """Draw as many images as the batch has real ones, and add both to the comparison."""
        generator, critic = self.networks["generator"], self.networks["critic"]
        images, labels = to_unit_range(batch.images), _labels(batch)
        latents, asked = self._draw(images)
        sampling = sampling_statistics(generator, self.norm_statistics, counted=metrics.counted)
        with sampling, watch_attention(generator, "generator") as generator_numbers:
            fake = generator(latents, asked).float()
        with watch_attention(critic, "critic") as critic_numbers:
            real_score = float(critic(images, labels).float().mean())
        key = hash(tuple(batch.names))
        features = metrics.update(
            images, labels, fake, asked, real_features=self._real_features.get(key)
        )
        kept = sum(known.numel() for known in self._real_features.values())
        if key not in self._real_features and kept + features.numel() <= _MAX_KEPT_VALUES:
            self._real_features[key] = features
        weight = float(len(images))
        metrics.add_number("real_score", real_score, weight)
        metrics.add_number("fake_score", float(critic(fake, asked).float().mean()), weight)
        for name, value in (generator_numbers | critic_numbers).items():
            metrics.add_number(name, value, weight)

    def show_progress(self, folder: Path, step: int, metrics: Mapping[str, float]) -> Sequence[str]:
        """Write a grid and an interpolation from fixed noise; name a collapse.

        Args:
            folder: of the run; pictures go into ``samples`` below it.
            step: that were done.
            metrics: of the validation.
        """
        pictures.write_progress(self.model, folder / "samples", step, self.norm_statistics)
        diversity = metrics.get("diversity")
        if diversity is not None and not diversity >= COLLAPSED_BELOW:
            return [
                f"step {step}: the generator has collapsed: its images vary {diversity:.2f} times "
                "as much as real ones within a class; a lower learning rate, more critic updates "
                "or an earlier checkpoint may help"
            ]
        return []

    # prediction

    def predict_batch(self, batch: Batch) -> list[dict[str, Any]]:
        """Return for each image the critic's score, by class where there are classes."""
        images = to_unit_range(batch.images)
        classes = self.model.num_classes
        asked = range(classes or 1)
        scores = torch.stack(
            [
                self.networks["critic"](images, torch.full((len(images),), label).to(images.device))
                for label in asked
            ],
            dim=1,
        ).float()
        best = scores.max(dim=1)
        records: list[dict[str, Any]] = []
        for name, score, label in zip(
            batch.names, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            record: dict[str, Any] = {"file": name, "critic_score": score}
            if classes:
                record["label"] = self.class_names[label]
            records.append(record)
        return records

    def save_prediction(self, sample: Sample, record: Mapping[str, Any], stem: Path) -> list[Path]:
        """Write the image under its score as ``<stem>.png``."""
        file = stem.with_name(stem.name + ".png")
        file.write_bytes(pictures.scored(sample, record))
        return [file]

    # report

    @torch.no_grad()
    def baselines(self, splits: Splits) -> dict[str, float]:
        """Return the figures of real images in the place of generated ones.

        As many training images as the test split has images are compared with it: what a perfect
        generator would get by this judge and this number of images. ``..._spread`` is the standard
        deviation of the run's own figure over several seeds of the latent vectors.
        """
        test = splits.test if splits.test is not None else splits.validation
        if test is None or self.judge is None:
            return {}
        device = next(self.networks["generator"].parameters()).device
        figures = sections.compare_real(self, splits, test, device)
        if self.judge.kind != "inception" or device.type != "cpu":
            draws = sections.draw_spread(self, test, device)
            figures[f"{self.best_metric}_spread"] = statistics.stdev(draws)
        return figures

    @torch.no_grad()
    def report_sections(self, splits: Splits, device: torch.device) -> list[Section]:
        """Return samples, an interpolation, nearest training images, attention and the figures."""
        return sections.report_sections(self, splits, device)


def _labels(batch: Batch) -> Tensor:
    """Return the labels of a batch, which must be known."""
    if batch.labels is None:
        raise ValueError("the batch has samples without a label")
    return batch.labels
