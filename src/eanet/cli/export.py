"""Write a network as an ONNX file or a torch.export program, and check it against the network.

The suffix of --out says which: .onnx (run with onnxruntime and others) or .pt2 (loaded by
torch.export.load). Number of samples and size stay open where the network allows it; attention is
folded as for inference. The file is run at several sizes and refused where it differs.

Examples:
  eanet export runs/try --out try.onnx
  eanet export runs/try --weights raw --fixed --size 64 --out try_64.onnx
  eanet export models/eamlp_7_384 --out eamlp_7_384.pt2
  eanet export eamlp_7 --out untrained.onnx --size 224x320
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from eanet.cli import _options as options
from eanet.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument(
        "what",
        metavar="RUN|FOLDER|MODEL",
        help="a run, a folder of `eanet convert` or save_pretrained, or a model's name (untrained)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".onnx or .pt2")
    parser.add_argument(
        "--size", metavar="H[xW]", help="of the example in pixels (default: its own)"
    )
    parser.add_argument(
        "--fixed", action="store_true", help="close the size: the file takes that of --size alone"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="close the number of samples too")
    parser.add_argument(
        "--min-size",
        type=int,
        metavar="PIXELS",
        help="smallest open size (default: found by trying)",
    )
    parser.add_argument("--checkpoint", default="best", choices=["best", "last"], help="of a run")
    parser.add_argument(
        "--weights", choices=["raw", "ema"], help="of a run (default: what `best` was chosen by)"
    )
    parser.add_argument("--unfused", action="store_true", help="do not fold the attention")
    parser.add_argument("--opset", type=int, help="of ONNX (default: 20)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference over the scale of the results, or over 1 (default: 1e-4)",
    )
    options.add_threads(parser)


def execute(arguments: argparse.Namespace) -> None:
    """Export, compare, tell."""
    if arguments.out.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--out: the file must end in .onnx or .pt2, got {str(arguments.out)!r}")
    if arguments.opset is not None and arguments.out.suffix != ".onnx":
        raise UserError("--opset has no effect on a .pt2 file")
    for name in ("batch", "min_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not arguments.tolerance > 0:
        raise UserError(f"--tolerance must be above 0, got {arguments.tolerance}")
    if arguments.fixed and arguments.min_size is not None:
        raise UserError("--min-size has no effect with --fixed")
    size = options.read_size(arguments.size)
    options.use_threads(arguments)

    model = _open(arguments)
    from eanet.export.files import export_file

    report = export_file(
        model,
        arguments.out,
        size=size,
        open_sizes=not arguments.fixed,
        batch=arguments.batch,
        min_size=arguments.min_size,
        fused=not arguments.unfused,
        opset=arguments.opset,
        tolerance=arguments.tolerance,
    )
    print(f"  file        {report.path} ({report.path.stat().st_size / 2**20:.1f} MiB)")
    print(f"  input       {report.exported.describe()}")
    for found in report.differences:
        shape = " x ".join(map(str, found.shape))
        print(f"  compared    {shape}: differs by {found.largest:.1e} of {found.scale:.3g}")


def _open(arguments: argparse.Namespace) -> "nn.Module":
    """Return the network a user named."""
    from eanet import registry, run

    if Path(arguments.what).is_dir():
        return run.load(arguments.what, checkpoint=arguments.checkpoint, weights=arguments.weights)
    if arguments.weights is not None:
        raise UserError(f"--weights: {arguments.what!r} is no run folder")
    return registry.create_model(arguments.what)
