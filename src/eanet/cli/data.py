"""Look into data: open a data set, count and decode its samples, name what is wrong with it.

Examples:
  eanet data check digits
  eanet data check image_folder path/to/images
  eanet data check fashion_mnist path/to/fashion_mnist --task classification
"""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("action", choices=["check"])
    parser.add_argument("name", help="name of a data set")
    parser.add_argument("root", type=Path, nargs="?", help="its folder, where it has one")
    parser.add_argument(
        "--task", help="where several tasks have a data set of that name (default: the first)"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="decode only the first N samples of each split"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Check the data set; 0 when every sample could be read, 2 otherwise."""
    from eanet.describe import check_data

    report = check_data(
        arguments.name, arguments.root, task=arguments.task, samples=arguments.samples
    )
    print(report.text)
    return 2 if report.failures else 0
