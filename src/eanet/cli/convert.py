"""Turn a published checkpoint into a folder that all other commands take, or write one.

EAMLP checkpoints of the authors, those of T2T-ViT and those of PCT (PCT_Pytorch, point clouds) are
understood; which network a file holds is read from its tensors. Nothing in a file is run.

Examples:
  eanet convert model_best.pth.tar --out models/eamlp_7_384
  eanet convert 81.5_T2T_ViT_14.pth.tar --out models/t2t_vit_14 --weights ema
  eanet convert best_model.t7 --out models/pct
  eanet convert runs/mine --export mine.pth
"""

import argparse
from pathlib import Path

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
        "--naming",
        choices=("performer_file", "transformer_file"),
        help="with --export: which of the authors' two stems names the memories",
    )


def _image_size(text: str | None) -> int | tuple[int, int] | None:
    """Return the size a user wrote as 384 or 384x256."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--image-size: expected H or HxW in pixels, got {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def execute(arguments: argparse.Namespace) -> None:
    """Convert."""
    image_size = _image_size(arguments.image_size)
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
    )
    hub.save_pretrained(model, folder)
    published = model.facts["published"]
    print(f"  model       {model.config['name']}")
    print(f"  parameters  {sum(parameter.numel() for parameter in model.parameters()):,}")
    print(f"  weights     {published['weights'] or 'not stated by the file'}")
    print(f"  folder      {folder}")


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Refuse options that the chosen direction would ignore."""
    for_import = ("num_heads", "image_size", "positions")
    unused = for_import if arguments.export else ("naming",)
    for name in unused:
        if getattr(arguments, name) is not None:
            direction = "--export" if arguments.export else "--out"
            raise UserError(f"--{name.replace('_', '-')} has no effect with {direction}")
