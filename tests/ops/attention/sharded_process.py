"""One of several processes that each hold a part of the tokens; started by test_sharded.py.

Every process knows all operands, computes its share among the others and the whole by itself, and
writes the differences, and what was exchanged meanwhile, as JSON.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from eanet.ops.attention import multi_head_external_attention
from eanet.ops.attention import sharded as sharded_module
from eanet.ops.attention.sharded import external_attention_sharded

NAMES = ("x", "memory_key", "memory_value", "memory_key_bias", "memory_value_bias")


def operands(*, batch, tokens, heads, slots, channels, value_channels, seed=3):
    """Return all tensors in float64; the same on every process."""
    torch.manual_seed(seed)
    shapes = [
        (batch, tokens, heads * channels),
        (slots, channels),
        (slots, value_channels),
        (slots,),
        (value_channels,),
        (batch, tokens, heads * value_channels),
    ]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    mask = torch.rand(batch, tokens) > 0.3
    mask[-1] = False
    return dict(zip(NAMES, tensors[:5], strict=True)), tensors[5], mask


def attend(attention, tensors, cotangent, **options):
    """Return the result and the gradients of all tensors."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    biases = {name: leaves[name] for name in NAMES[3:]}
    out = attention(*(leaves[name] for name in NAMES[:3]), **options, **biases)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    return out.detach(), {
        name: torch.zeros_like(leaves[name]) if gradient is None else gradient
        for name, gradient in zip(leaves, gradients, strict=True)
    }


def run_case(case, rank, calls):
    """Return the largest differences between the shares and the whole, and the calls made."""
    tensors, cotangent, mask = operands(**case["sizes"])
    mask = mask if case["masked"] else None
    options = {"norm": case["norm"], "eps": case["eps"], "num_heads": case["sizes"]["heads"]}
    whole, whole_gradients = attend(
        multi_head_external_attention, tensors, cotangent, mask=mask, backend="reference", **options
    )
    start = sum(case["lengths"][:rank])
    mine = slice(start, start + case["lengths"][rank])
    calls.clear()
    share, gradients = attend(
        external_attention_sharded,
        tensors | {"x": tensors["x"][:, mine]},
        cotangent[:, mine],
        mask=None if mask is None else mask[:, mine],
        chunk_tokens=case["chunk_tokens"],
        memory_gradients=case["memory_gradients"],
        **options,
    )
    exchanged = list(calls)
    if case["memory_gradients"] == "local":
        for name in NAMES[1:]:
            dist.all_reduce(gradients[name])
    whole_gradients["x"] = whole_gradients["x"][:, mine]
    differences = {"result": difference(share, whole[:, mine])} | {
        name: difference(gradients[name], expected) for name, expected in whole_gradients.items()
    }
    return {"differences": differences, "exchanged": exchanged}


def difference(found, expected):
    """Return the largest absolute difference; tensors without elements must agree in shape."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return (found - expected).abs().max().item() if expected.numel() else 0.0


def main(rank, world_size, folder):
    """Join the others, run all cases and write what was found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), world_size), rank=rank,
        world_size=world_size,
    )  # fmt: skip
    calls = []
    all_reduce = dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, **options):
        calls.append([str(op).rpartition(".")[2], tensor.numel()])
        return all_reduce(tensor, op, **options)

    dist.all_reduce = counted
    found = []
    for case in json.loads((folder / "cases.json").read_text()):
        sums = sharded_module._GroupExchange.sum_
        if case["mutant"]:
            sharded_module._GroupExchange.sum_ = lambda self, tensor: None
        found.append(run_case(case, rank, calls))
        sharded_module._GroupExchange.sum_ = sums
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
