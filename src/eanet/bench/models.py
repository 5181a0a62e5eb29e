"""Whole networks side by side in one run: images per second and memory, each in its forms.

``paper``: step by step, as the equations and the authors' code have it;
``product``: the network as it is built and trained here;
``fused``: folded for inference;
``compiled``: the fused network, in training the product form, by ``torch.compile``.

Networks of timm stand beside them in their one form. Run ``python -m eanet.bench.models --help``.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from eanet.bench.cost import count_cost
from eanet.bench.measure import Measurement, measure_interleaved, write_figures
from eanet.bench.paper_networks import PaperNetwork, has_paper_form
from eanet.bench.sweep import Progress, conditions, open_device
from eanet.errors import UserError
from eanet.nn.fusion import fuse
from eanet.registry import create_model, import_module

__all__ = ["DEFAULT_MODELS", "Figures", "ModelBenchmark", "benchmark_models", "main"]

Form = Literal["paper", "product", "fused", "compiled"]
Mode = Literal["inference", "training"]
FORMS: tuple[Form, ...] = ("paper", "product", "fused", "compiled")
MODES: tuple[Mode, ...] = ("inference", "training")

#: prefix of the names of timm's networks
TIMM = "timm/"
#: the second and the third differ in their stems alone: external attention and Performer
DEFAULT_MODELS = (
    *("eamlp_7", "t2t_vit_7_ea", "t2t_vit_7"),
    *(TIMM + "deit_tiny_patch16_224", TIMM + "resnet18"),
)


@dataclass(frozen=True)
class Figures:
    """What was measured of one network in one form.

    Args:
        model: its name.
        form: see the top of this module; a network of timm is in "product" form.
        mode: a forward pass in evaluation mode, or a training step: forward and backward pass
            with gradients of all weights.
        num_parameters: scalars in all weights.
        gigamacs: 10^9 multiply-adds for one sample, forward.
        seconds: of every timed round, for one batch.
        median_seconds: the median of them.
        images_per_second: batch over the median.
        peak_bytes: most memory that a run held beyond input and weights.
        max_difference: of the result from that of the product form, in inference.
    """

    model: str
    form: Form
    mode: Mode
    num_parameters: int
    gigamacs: float
    seconds: list[float]
    median_seconds: float
    images_per_second: float
    peak_bytes: int
    max_difference: float | None


@dataclass
class ModelBenchmark:
    """All figures of a run, and what it was run with.

    Args:
        batch: samples in a batch.
        size: height and width of images in pixels.
        rounds: timed rounds.
        conditions: device, type and version.
        figures: in the order of networks and forms.
    """

    batch: int
    size: tuple[int, int]
    rounds: int
    conditions: Mapping[str, str]
    figures: list[Figures] = field(default_factory=list[Figures])

    def speedup(self, figures: Figures) -> float | None:
        """Return how many times the paper form's images per second, ``None`` without one."""
        for other in self.figures:
            if (other.model, other.form, other.mode) == (figures.model, "paper", figures.mode):
                return figures.images_per_second / other.images_per_second
        return None

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        rows = [
            asdict(figures) | {"times_paper_form": self.speedup(figures)}
            for figures in self.figures
        ]
        return {
            "benchmark": "models",
            "batch": self.batch,
            "size": list(self.size),
            "rounds": self.rounds,
            **self.conditions,
            "memory": "peak of PyTorch's allocations during one run, beyond input and weights",
            "figures": rows,
        }

    def as_markdown(self) -> str:
        """Return a table for each mode."""
        what = ", ".join(self.conditions.values())
        lines = [
            f"batch {self.batch}, {self.size[0]} x {self.size[1]} pixels, {what}, "
            f"median of {self.rounds} interleaved rounds"
        ]
        for mode in MODES:
            rows = [figures for figures in self.figures if figures.mode == mode]
            if not rows:
                continue
            lines += [
                "",
                f"| {mode} | form | parameters | GMACs | ms | images/s | x paper | peak MiB |",
                "|---|---|--:|--:|--:|--:|--:|--:|",
            ]
            for figures in rows:
                speedup = self.speedup(figures)
                lines.append(
                    f"| {figures.model} | {figures.form} | {figures.num_parameters:,} "
                    f"| {figures.gigamacs:.3f} | {1e3 * figures.median_seconds:.1f} "
                    f"| {figures.images_per_second:.1f} "
                    f"| {'' if speedup is None else f'{speedup:.2f}'} "
                    f"| {figures.peak_bytes / 2**20:.0f} |"
                )
        return "\n".join(lines) + "\n"


def build(name: str) -> nn.Module:
    """Build one of our networks, or one of timm by ``timm/NAME``, with random weights.

    Raises:
        UserError: there is no such network.
    """
    if not name.startswith(TIMM):
        return create_model(name)
    timm = import_module("timm")
    known = name.removeprefix(TIMM)
    if not timm.is_model(known):
        raise UserError(f"timm has no model {known!r}; `timm.list_models()` lists all")
    return timm.create_model(known, pretrained=False)


def _forms(network: nn.Module, forms: Iterable[Form], mode: Mode) -> dict[Form, nn.Module]:
    """Return the forms of a network that differ from one another."""
    folded = fuse(network)
    changes = any(
        type(ours) is not type(other)
        for ours, other in zip(network.modules(), folded.modules(), strict=False)
    )
    found: dict[Form, nn.Module] = {}
    for form in forms:
        if form == "paper" and has_paper_form(network):
            found[form] = PaperNetwork(network)
        elif form == "product":
            found[form] = network
        elif form == "fused" and changes and mode == "inference":
            found[form] = folded
        elif form == "compiled":
            found[form] = torch.compile(folded if mode == "inference" else network)  # pyright: ignore[reportArgumentType]
    return found


def _inference(network: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """Return a function that runs forward without gradients."""

    def run() -> object:
        with torch.inference_mode():
            return network(inputs)

    return run


def _training_step(network: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """Return a function that runs forward and backward with gradients of all weights."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]

    def run() -> object:
        results = [leaf for leaf in tree_leaves(network(inputs)) if isinstance(leaf, Tensor)]
        loss = torch.stack([result.float().square().mean() for result in results]).sum()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    return run


@torch.inference_mode()
def _differences(forms: Mapping[Form, nn.Module], inputs: Tensor) -> dict[Form, float | None]:
    """Return the largest difference of each form from the product form."""
    if "product" not in forms:
        return dict.fromkeys(forms)
    expected = forms["product"](inputs)
    if not isinstance(expected, Tensor):
        return dict.fromkeys(forms)
    return {
        form: (network(inputs) - expected).abs().max().item() for form, network in forms.items()
    }


def benchmark_models(
    models: Sequence[str] = DEFAULT_MODELS,
    *,
    forms: Sequence[Form] = ("paper", "product", "fused"),
    modes: Sequence[Mode] = MODES,
    batch: int = 8,
    size: tuple[int, int] = (224, 224),
    rounds: int = 9,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> ModelBenchmark:
    """Measure networks in all their forms, round after round in one run.

    Args:
        models: names of ours, or ``timm/NAME``.
        forms: which forms; those that a network does not have are left out.
        modes: "inference", "training" or both.
        batch: images in a batch.
        size: height and width in pixels.
        rounds: timed rounds; one more is run before them.
        device: where to run, the CPU by default.
        dtype: of weights and images.
        progress: is told what runs.

    Raises:
        UserError: a network is unknown or does not take images of this size.
    """
    device = device or torch.device("cpu")
    progress = progress or Progress()
    report = ModelBenchmark(batch, size, rounds, conditions(device, dtype))
    generator = torch.Generator().manual_seed(0)
    networks = {name: build(name).to(device, dtype) for name in dict.fromkeys(models)}
    inputs = {
        name: torch.randn(batch, _channels(network), *size, generator=generator).to(device, dtype)
        for name, network in networks.items()
    }
    for mode in modes:
        contenders: dict[tuple[str, Form], nn.Module] = {}
        differences: dict[tuple[str, Form], float | None] = {}
        macs: dict[tuple[str, Form], int] = {}
        for name, network in networks.items():
            progress.say(f"{mode}: {name}")
            shape = (1, *inputs[name].shape[1:])
            count_cost(network, shape)  # refuses images that the network does not take
            found = _forms(network.train(mode == "training"), forms, mode)
            contenders |= {(name, form): found[form] for form in found}
            for form, shown in found.items():
                plain = getattr(shown, "_orig_mod", shown)
                macs[name, form] = count_cost(plain, shape).macs
            if mode == "inference":
                found_differences = _differences(found, inputs[name])
                differences |= {(name, form): found_differences[form] for form in found}
        prepare = _inference if mode == "inference" else _training_step
        calls = {
            " ".join(key): prepare(network, inputs[key[0]]) for key, network in contenders.items()
        }
        measured = measure_interleaved(calls, rounds=rounds, device=device, progress=progress.tick)
        for key in contenders:
            report.figures.append(
                _figures(
                    key,
                    mode,
                    measured[" ".join(key)],
                    batch=batch,
                    num_parameters=sum(weight.numel() for weight in networks[key[0]].parameters()),
                    macs=macs[key],
                    max_difference=differences.get(key),
                )
            )
    return report


def _figures(
    key: tuple[str, Form],
    mode: Mode,
    measured: Measurement,
    *,
    batch: int,
    num_parameters: int,
    macs: int,
    max_difference: float | None,
) -> Figures:
    """Return the figures of one network in one form."""
    seconds = measured.median_seconds
    return Figures(
        model=key[0],
        form=key[1],
        mode=mode,
        num_parameters=num_parameters,
        gigamacs=macs / 1e9,
        seconds=measured.seconds,
        median_seconds=seconds,
        images_per_second=batch / seconds,
        peak_bytes=measured.peak_bytes,
        max_difference=max_difference,
    )


def _channels(network: nn.Module) -> int:
    """Return the channels of the images a network takes."""
    shape = getattr(network, "input_shape", (3,))
    return int(shape[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    options = _parser().parse_args(argv)
    for name in ("batch", "rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if len(options.size) > 2:
        raise UserError(f"--size takes one or two numbers, got {len(options.size)}")
    if min(options.size) < 1:
        raise UserError(f"--size must be at least 1, got {min(options.size)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report = benchmark_models(
        options.models or DEFAULT_MODELS,
        forms=options.forms,
        modes=options.modes,
        batch=options.batch,
        size=(options.size[0], options.size[-1]),
        rounds=options.rounds,
        device=open_device(options.device),
        dtype=getattr(torch, options.dtype),
    )
    sys.stdout.write(report.as_markdown())
    if options.json is not None:
        write_figures(options.json, report.as_json())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eanet bench models",
        description="Images per second and memory of whole networks: the paper's form, ours, "
        "folded, compiled, and networks of timm, all in one run.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"names from `eanet models`, or {TIMM}NAME (default: {' '.join(DEFAULT_MODELS)})",
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS[:3]))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=8, help="images in a batch (default: 8)")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[224], metavar="PIXELS", help="height and width"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
