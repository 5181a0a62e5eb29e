"""Turn a published checkpoint into a folder that all other commands take, or write one.

EAMLP and EANet checkpoints of the authors, those of T2T-ViT and those of PCT (PCT_Pytorch, point
clouds) are understood; which network a file holds is read from its tensors. Nothing in a file is
run.

Examples:
  eanet convert model_best.pth.tar --out models/eamlp_7_384
  eanet convert 81.5_T2T_ViT_14.pth.tar --out models/t2t_vit_14 --weights ema
  eanet convert final.pth --out models/eanet --output-stride 16
  eanet convert best_model.t7 --out models/pct
  eanet convert runs/mine --export mine.pth
"""

import argparse
from pathlib import Path

from eanet.cli import _options as options
from eanet.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument(
        "source", metavar="FILE|FOLDER", help="a published file; with --export a run or a folder"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="FOLDER", help="write config, weights and a model card")
    where.add_argument(
        "--export", metavar="FILE", help="write a .pth or .safetensors under the authors' names"
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="averaged or as trained (default: averaged where there are any)",
    )
    parser.add_argument(
        "--num-heads", type=int, metavar="H", help="of self-attention (default: 64 channels each)"
    )
    parser.add_argument(
        "--image-size", metavar="H[xW]", help="to keep a position table for (default: the file's)"
    )
    parser.add_argument(
        "--positions",
        choices=("regenerate", "resize"),
        help="table of another image size (default: regenerate a sinusoid, resize other tables)",
    )
    parser.add_argument(
        "--output-stride",
        type=int,
        choices=(8, 16, 32),
        help="of a segmentation network, which no tensor tells (default: 8)",
    )
    parser.add_argument(
        "--naming",
        choices=("performer_file", "transformer_file"),
        help="with --export: which of the authors' two stems names the memories",
    )


def execute(arguments: argparse.Namespace) -> None:
    """Convert."""
    image_size = options.read_size(arguments.image_size, "--image-size")
    _refuse_unused(arguments)
    from eanet import convert, hub

    if arguments.export:
        from eanet.run import load

        model = load(arguments.source, weights=arguments.weights)
        path = convert.export_published(model, arguments.export, naming=arguments.naming)
        print(f"  file        {path}")
        return
    folder = Path(arguments.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} is not empty; name another folder")
    model = convert.load_published(
        arguments.source,
        weights=arguments.weights,
        num_heads=arguments.num_heads,
        image_size=image_size,
        positions=arguments.positions,
        output_stride=arguments.output_stride,
    )
    hub.save_pretrained(model, folder)
    published = model.facts["published"]
    print(f"  model       {model.config['name']}")
    print(f"  parameters  {sum(parameter.numel() for parameter in model.parameters()):,}")
    print(f"  weights     {published['weights'] or 'not stated by the file'}")
    print(f"  folder      {folder}")


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Refuse options that the chosen direction would ignore."""
    for_import = ("num_heads", "image_size", "positions", "output_stride")
    unused = for_import if arguments.export else ("naming",)
    for name in unused:
        if getattr(arguments, name) is not None:
            direction = "--export" if arguments.export else "--out"
            raise UserError(f"--{name.replace('_', '-')} has no effect with {direction}")
