"""Measure external attention beside what could take its place, each table in one run.

block: the block in the paper's form, product form and fused form;
cost: Table 12 of the paper, published, counted and measured;
generation: training steps of EAGAN beside those of SAGAN;
gpu: kernels, torch.compile and contenders on a GPU, unattended in under nine minutes;
growth: time per token from 16,384 tokens to a million;
models: whole networks in the paper's form, ours, folded, beside those of timm;
ops: functions and layers at growing numbers of tokens, beside the limit of the machine;
points: sampling and point cloud classifiers, in the form of PCT's published code and ours;
segmentation: a segmentation network part by part, and the loader beside it;
streaming: ten million tokens and more in constant memory;
tilings: the Triton kernels under many tilings, on a GPU.

Examples:
  eanet bench block --large-pages
  eanet bench cost --no-measure
  eanet bench models eamlp_7 timm/resnet18
  eanet bench ops --quick
  eanet bench ops --json ops.json --markdown ops.md --plots plots
  eanet bench block --help
"""

import argparse

MEASUREMENTS = {
    "block": "eanet.bench.block",
    "cost": "eanet.bench.cost_table",
    "generation": "eanet.bench.generation",
    "gpu": "eanet.bench.gpu",
    "growth": "eanet.bench.growth",
    "models": "eanet.bench.models",
    "ops": "eanet.bench.ops",
    "points": "eanet.bench.points",
    "segmentation": "eanet.bench.segmentation",
    "streaming": "eanet.bench.streaming",
    "tilings": "eanet.bench.tilings",
}


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
