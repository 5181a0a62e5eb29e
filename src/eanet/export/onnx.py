"""Networks as ONNX files, from their ``torch.export`` programs."""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from eanet.errors import UserError
from eanet.export.torch_export import Exported
from eanet.registry import import_module

__all__ = ["DEFAULT_OPSET", "save_onnx"]

DEFAULT_OPSET = 20


def save_onnx(
    exported: Exported,
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    output_names: tuple[str, ...] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write an exported network as one ONNX file.

    Args:
        exported: the network.
        path: the file.
        opset: version of ONNX's operators.
        output_names: of its results; by default ``output``, or ``output_0``, ``output_1``, ...
        metadata: values kept in the file as JSON, such as class names, mean and deviation; any
            ONNX library reads them (``metadata_props``).

    Raises:
        UserError: the network has a part that ONNX cannot say, which is named.
        MissingExtraError: the extra ``export`` is not installed.
    """
    for library in ("onnx", "onnxscript"):
        import_module(library)
    count = len(exported.program.graph_signature.user_outputs)
    names = output_names or (
        ("output",) if count == 1 else tuple(f"output_{number}" for number in range(count))
    )
    if len(names) != count:
        raise ValueError(f"the network has {count} results, got the names {names}")
    with _quiet():
        try:
            program = torch.onnx.export(
                exported.program,
                dynamo=True,
                opset_version=opset,
                input_names=[exported.spec.name],
                output_names=list(names),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise UserError(f"ONNX cannot say this network: {lines[0]}") from error
    assert program is not None
    model = program.model
    model.producer_name = "eanet"
    for axis, name in exported.spec.open_axes.items():
        if axis in exported.bounds:
            _name_axis(model, axis, name)
    for key, value in (metadata or {}).items():
        model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    with _quiet():
        program.save(str(path), external_data=False)
    return Path(path)


def _name_axis(model: Any, axis: int, name: str) -> None:
    """Give an open size of the input, and of results that share it, its name for readers."""
    old = str(model.graph.inputs[0].shape[axis])
    for value in (*model.graph.inputs, *model.graph.outputs):
        for number in range(len(value.shape or ())):
            if str(value.shape[number]) == old:
                value.shape[number] = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter tells of its own steps."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
