"""Evaluate a run on one of its splits, with raw and averaged weights.

Examples:
  eanet evaluate runs/classification_digits-eamlp_tiny
  eanet evaluate runs/try --split validation --checkpoint last
  eanet evaluate runs/try --data.root other/images --json
  eanet evaluate runs/detector --split validation --predictions results.json
"""

import argparse
import json
from pathlib import Path

from eanet.cli import _options as options

TAKES_OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--checkpoint", default="best", choices=["best", "last"])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="write detections as COCO results",
    )
    options.add_device(parser)
    options.add_threads(parser)


def execute(arguments: argparse.Namespace) -> None:
    """Evaluate."""
    from eanet import run

    options.use_threads(arguments)
    metrics = run.evaluate(
        arguments.run,
        split=arguments.split,
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        overrides=arguments.overrides,
        predictions=arguments.predictions,
    )
    if arguments.json:
        print(json.dumps(metrics, indent=2))
        return
    for name, value in metrics.items():
        print(f"  {name:<28}{value:.4f}")
