"""From a network to a file that was found to compute the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from eanet._version import __version__
from eanet.errors import UserError
from eanet.export.inputs import input_spec
from eanet.export.onnx import DEFAULT_OPSET, save_onnx
from eanet.export.parity import Difference, compare, run_onnx, run_program
from eanet.export.torch_export import Exported, export_program, save_program
from eanet.nn.fusion import fuse

__all__ = ["ExportReport", "export_file"]


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        path: the file.
        exported: the program it was made of, with the sizes it takes.
        differences: from the network as it was given, one for each input tried.
    """

    path: Path
    exported: Exported
    differences: Sequence[Difference]


def export_file(
    model: nn.Module,
    path: str | Path,
    *,
    size: Sequence[int] | None = None,
    open_sizes: bool = True,
    batch: int | None = None,
    min_size: int | None = None,
    fused: bool = True,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write a network as ``.onnx`` or ``.pt2``, run the file and compare.

    An ONNX file also holds, as metadata, the network's name and the facts of its data (class
    names, mean, standard deviation) where it has them.

    Args:
        model: the network; it is put into evaluation mode, on the CPU.
        path: the file, replaced in one step once it was found right.
        size: sizes of the example in the place of the network's own.
        open_sizes: whether the file takes inputs of other sizes.
        batch: the only number of samples it takes; ``None`` leaves it open.
        min_size: smallest open size; by default the smallest of a few that the network allows.
        fused: fold the attention as :func:`eanet.fuse` does.
        opset: version of ONNX's operators.
        tolerance: largest difference over the scale of the results, or over 1.

    Raises:
        UserError: the network cannot be exported, the file cannot be written, or it computes
            something else; nothing is left behind then.
        MissingExtraError: the extra ``export`` is not installed.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{path}: the file must end in .onnx or .pt2")
    model = model.eval().cpu()
    exported = export_program(
        fuse(model) if fused else model,
        input_spec(model, size=size),
        open_sizes=open_sizes,
        batch=batch,
        min_size=min_size,
    )
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".onnx":
            save_onnx(exported, partial, opset=opset or DEFAULT_OPSET, metadata=_metadata(model))
            run = run_onnx(partial)
        else:
            run = run_program(save_program(exported, partial))
        differences = compare(model, run, exported)
        worst = max(differences, key=lambda found: found.relative)
        if not worst.relative <= tolerance:
            raise UserError(
                f"{path}: not written: for an input of {worst.shape} it differs from the network "
                f"by {worst.largest:.3g} (results up to {worst.scale:.3g}); the tolerance is "
                f"{tolerance:g}"
            )
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return ExportReport(path, exported, differences)


def _metadata(model: nn.Module) -> dict[str, object]:
    """Return what is known of a network, for whoever runs the file."""
    config = getattr(model, "config", None)
    known: dict[str, object] = {"eanet_version": __version__}
    if isinstance(config, dict):
        known["model"] = config["name"]
    return {**known, **getattr(model, "facts", {})}
