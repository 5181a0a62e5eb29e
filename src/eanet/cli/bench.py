"""Measure: the block in the paper's form, product form and fused form, side by side in one run.

Examples:
  eanet bench block
  eanet bench block --help
"""

import argparse

MEASUREMENTS = {"block": "eanet.bench.block"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("what", choices=sorted(MEASUREMENTS), help="what to measure")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="options of the measurement, such as --help"
    )


def execute(arguments: argparse.Namespace) -> int | None:
    """Hand over to the measurement."""
    from eanet.registry import import_module

    return import_module(MEASUREMENTS[arguments.what]).main(arguments.options)
