"""Say what a model or a run is and costs: parameters, multiply-adds, memory, its largest parts.

Examples:
  eanet info eamlp_7
  eanet info eamlp_7 --size 384 --fused
  eanet info runs/try
"""

import argparse
from pathlib import Path

from eanet.cli import _options as options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("what", metavar="RUN|MODEL", help="a run folder or the name of a model")
    parser.add_argument(
        "--size", metavar="H[xW]", help="size of the input in pixels (default: the model's own)"
    )
    parser.add_argument("--fused", action="store_true", help="after folding for inference")
    parser.add_argument("--depth", type=int, default=2, help="levels of parts to list (default: 2)")


def execute(arguments: argparse.Namespace) -> None:
    """Print what there is to say."""
    size = options.read_size(arguments.size)
    from eanet.describe import describe_model, describe_run

    if Path(arguments.what).is_dir():
        print(describe_run(Path(arguments.what)))
    print(describe_model(arguments.what, size=size, fused=arguments.fused, depth=arguments.depth))
