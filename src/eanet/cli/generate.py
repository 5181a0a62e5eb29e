"""Draw images with the generator of a trained run: a grid, single files, attention maps.

Examples:
  eanet generate runs/demo-generation --num 100 --out drawn
  eanet generate runs/demo-generation --num 16 --classes 3 8 --seed 7 --out threes-and-eights
  eanet generate runs/demo-generation --num 8 --slots --out drawn
  eanet generate runs/demo-generation --slots 0 5 --interpolate --checkpoint last --out drawn
"""

import argparse
from pathlib import Path

from eanet.cli import _options as options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="how many (default: 64)")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="names or numbers (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise")
    parser.add_argument("--checkpoint", default="best", choices=["best", "last"])
    parser.add_argument(
        "--weights", choices=["raw", "ema"], help="default: what best was chosen by"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--no-singles", action="store_true", help="write the grid alone")
    parser.add_argument(
        "--interpolate", action="store_true", help="draw ways from one latent vector to another"
    )
    parser.add_argument(
        "--slots",
        nargs="*",
        type=int,
        metavar="S",
        help="draw the attention of these memory slots over the first images; of those that "
        "differ most where no number is given",
    )
    options.add_device(parser)
    options.add_threads(parser)


def execute(arguments: argparse.Namespace) -> None:
    """Draw."""
    from eanet.generation import generate

    options.use_threads(arguments)
    drawn = generate(
        arguments.run,
        out=arguments.out,
        num=arguments.num,
        classes=arguments.classes,
        seed=arguments.seed,
        checkpoint=arguments.checkpoint,
        weights=arguments.weights,
        batch_size=arguments.batch_size,
        singles=not arguments.no_singles,
        interpolate=arguments.interpolate,
        slots=arguments.slots,
        device=arguments.device,
    )
    print(f"  {len(drawn.images)} images in {arguments.out}; all in one: {drawn.files[0]}")
