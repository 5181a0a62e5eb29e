"""Predict on files or folders with a trained run; write a table and annotated pictures.

Examples:
  eanet predict runs/try photo.png --out predictions
  eanet predict runs/try folder/of/images --out predictions --no-pictures

Fields of the run's recipe are options here too, such as how a task evaluates (--options.NAME).
"""

import argparse
from pathlib import Path

from eanet.cli import _options as options

#: what argparse does not know is an override of a recipe's field
TAKES_OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE|FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--checkpoint", default="best", choices=["best", "last"])
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--no-pictures", action="store_true", help="write the tables alone")
    options.add_device(parser)
    options.add_threads(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Predict; 0 when every file could be read, 2 otherwise."""
    from eanet.prediction import predict

    options.use_threads(arguments)
    prediction = predict(
        arguments.run,
        arguments.files,
        out=arguments.out,
        checkpoint=arguments.checkpoint,
        batch_size=arguments.batch_size,
        pictures=not arguments.no_pictures,
        device=arguments.device,
        overrides=arguments.overrides,
    )
    for failure in prediction.failures:
        print(f"  left out: {failure}")
    print(f"  {len(prediction.records)} predictions in {arguments.out}")
    return 2 if prediction.failures else 0
