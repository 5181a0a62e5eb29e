"""Evaluate detections in COCO's form of results: the twelve numbers of boxes or of masks.

The numbers are those of pycocotools. With --segm, entries that carry a bbox beside their mask are
ranked as small, medium or large by their box, as there; --mask-area ranks them by their mask.

Examples:
  eanet evaluate-coco instances_val2017.json results.json
  eanet evaluate-coco instances_val2017.json results.json --segm --per-class
  eanet evaluate-coco instances_val2017.json results.json --class-agnostic --json
"""

import argparse
import json
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("truth", type=Path, metavar="GT.json", help="annotations")
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="a list of detections")
    parser.add_argument("--segm", action="store_true", help="compare masks, not boxes")
    parser.add_argument(
        "--class-agnostic", action="store_true", help="any class may match any object"
    )
    parser.add_argument("--per-class", action="store_true", help="AP of each category too")
    parser.add_argument(
        "--mask-area", action="store_true", help="with --segm: rank detections by their mask's area"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(arguments: argparse.Namespace) -> None:
    """Evaluate."""
    from eanet.registry import import_module

    scores, names = import_module("eanet.tasks.detection.coco_scores").evaluate_files(
        arguments.truth,
        arguments.results,
        kind="segm" if arguments.segm else "bbox",
        class_agnostic=arguments.class_agnostic,
        mask_area=arguments.mask_area,
    )
    if arguments.json:
        found = dict(scores.numbers)
        if arguments.per_class:
            found["per_class"] = {str(number): x for number, x in scores.per_class.items()}
        print(json.dumps(found, indent=2))
        return
    for name, value in scores.numbers.items():
        print(f"  {name:<8}{value:8.4f}")
    if arguments.per_class:
        print(f"\n  {'class':<24}{'AP':>8}{'AP50':>8}{'AP75':>8}")
        for number, found in scores.per_class.items():
            values = "".join(f"{value:8.4f}" for value in found.values())
            print(f"  {names[number]:<24}{values}")
