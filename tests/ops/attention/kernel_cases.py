"""What the Triton kernels are held to, on whatever device they run.

``interpreted_kernels.py`` runs these cases on a CPU, ``tests/gpu`` on a GPU.
"""

import math
from dataclasses import dataclass, replace

import torch

from eanet.ops.attention import custom_op, eager, reference, resident

NAMES = ("x", "memory_key", "memory_value", "memory_key_bias", "memory_value_bias")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one comparison; the defaults are odd on purpose."""

    norm: str = "double"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    tokens: int = 37
    channels: int = 12
    value_channels: int = 20
    slots: int = 10
    heads: int = 1
    eps: float = 1e-9
    mask: str = "none"  # or "padded", "sample empty", "all empty"
    layout: str = "channels last"  # or "tokens last", "sliced"
    scale: float = 1.0
    biases: bool = True
    tied: bool = False
    residual: bool = False

    def __str__(self):
        changed = [
            f"{name}={str(value).removeprefix('torch.')}"
            for name, value in vars(self).items()
            if value != getattr(Case, name)
        ]
        return ",".join(changed).replace(" ", "_") or "defaults"


def both_norms(**options):
    return [Case(norm="double", **options), Case(norm="softmax", **options)]


HALF = (torch.float16, torch.bfloat16)
CASES = [
    *both_norms(),
    *both_norms(mask="padded", heads=4),
    *(Case(dtype=dtype, mask="padded", heads=4) for dtype in HALF),
    *(Case(dtype=dtype, norm="softmax", mask="sample empty", layout="sliced") for dtype in HALF),
    *both_norms(slots=1),
    *(Case(slots=slots) for slots in (8, 64)),
    *both_norms(slots=100, layout="tokens last"),
    *both_norms(slots=256, tokens=21, channels=40, mask="sample empty"),
    Case(dtype=torch.bfloat16, slots=256, heads=4, tokens=5, batch=1),
    *both_norms(tokens=1, mask="padded"),
    Case(tokens=1, slots=1, channels=1, value_channels=1, batch=1),
    Case(tokens=130, channels=70, value_channels=3, batch=1),
    Case(tokens=130, channels=3, value_channels=70, batch=1, norm="softmax"),
    # sums over many tokens
    Case(tokens=5000, channels=3, value_channels=4, slots=6, batch=1),
    Case(layout="tokens last", mask="padded"),
    Case(layout="sliced", heads=4, batch=1),
    *both_norms(mask="all empty"),
    # where attention is peaked few elements decide the largest error: more samples steady it
    *both_norms(scale=25.0, batch=4, mask="padded"),
    Case(scale=25.0, batch=4, dtype=torch.bfloat16),
    # logits beyond 65504, the end of float16
    Case(scale=12_000.0, batch=4, dtype=torch.float16),
    Case(eps=0.0, scale=25.0, batch=4, mask="sample empty"),
    Case(eps=1e-40, scale=25.0, batch=4),
    Case(eps=0.01),
    *both_norms(tied=True, value_channels=12, heads=4, batch=1),
    Case(biases=False),
    # few slots beside the channels: the map is kept for the backward pass
    *both_norms(slots=3),
    *both_norms(slots=3, mask="sample empty", heads=4, dtype=torch.bfloat16),
    Case(slots=5, channels=40, tokens=300, scale=25.0, dtype=torch.float16, layout="tokens last"),
    *both_norms(residual=True, value_channels=12, heads=4, batch=1, mask="padded"),
    Case(residual=True, value_channels=12, layout="tokens last", dtype=torch.bfloat16),
    # gradients that nearly cancel
    Case(dtype=torch.bfloat16, slots=1, channels=40, value_channels=40),
    Case(dtype=torch.bfloat16, tokens=1, channels=40, value_channels=40),
    # exponentials kept between the passes
    *(
        Case(
            dtype=torch.bfloat16, tokens=700, channels=40, value_channels=70, heads=4, layout=layout
        )
        for layout in ("channels last", "tokens last")
    ),
]

#: what the kernels that hold a memory on chip take: bfloat16, the double normalization, few slots
RESIDENT = {
    "dtype": torch.bfloat16, "tokens": 1104, "channels": 40, "value_channels": 40,
}  # fmt: skip
RESIDENT_CASES = [
    Case(**RESIDENT),
    Case(**RESIDENT, biases=False, batch=1),
    Case(**RESIDENT, mask="padded", layout="tokens last"),
    Case(**RESIDENT, mask="sample empty", heads=2, layout="sliced"),
    Case(**RESIDENT, mask="all empty"),
    Case(**RESIDENT, mask="padded", residual=True),
    Case(**RESIDENT, residual=True, layout="tokens last", batch=3, biases=False),
    Case(**RESIDENT, scale=25.0, batch=4),
    Case(**RESIDENT, eps=0.01),
    Case(**RESIDENT | {"channels": 64, "value_channels": 64}, slots=16, tied=True),
    # two and four slices of channels
    Case(**RESIDENT | {"channels": 130, "value_channels": 130}, slots=32, mask="padded"),
    Case(
        **RESIDENT | {"channels": 260, "value_channels": 260},
        batch=1,
        layout="tokens last",
        residual=True,
        mask="padded",
    ),
    # the backward pass reads the statistics, as no map is kept
    Case(**RESIDENT | {"slots": 17}, mask="sample empty"),
    Case(**RESIDENT | {"slots": 17}, layout="tokens last"),
    Case(**RESIDENT | {"slots": 1}),
    # one part of one tile
    Case(**RESIDENT | {"tokens": 20}),
]


def operands(case, device):
    """Return x and the memories with their biases in the type of the case, and the mask.

    Logits have a standard deviation of twice the scale of the case.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    width = case.heads * case.channels
    x = case.scale * draw(case.batch, case.tokens, width)
    if case.layout == "tokens last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif case.layout == "sliced":
        wide = draw(case.batch, 2 * case.tokens, width + 3)
        wide[:, ::2, 1:-2] = x
        x = wide.to(device, case.dtype)[:, ::2, 1:-2]
    memory_value = draw(case.slots, case.value_channels)
    tensors = {
        "x": x,
        "memory_key": 2 * case.channels**-0.5 * draw(case.slots, case.channels),
        "memory_value": None if case.tied else memory_value,
        "memory_key_bias": draw(case.slots) if case.biases else None,
        "memory_value_bias": draw(case.value_channels) if case.biases else None,
    }
    tensors = {
        name: None if tensor is None else tensor.to(device, case.dtype)
        for name, tensor in tensors.items()
    }
    mask = None
    if case.mask != "none":
        mask = torch.rand(case.batch, case.tokens, generator=generator) > 0.3
        mask[-1 if case.mask == "sample empty" else slice(None)] &= case.mask == "padded"
        mask = mask.to(device)
    return tensors, mask


def by_equations(module):
    """Return a backend's function with the residual of the fused kernels."""

    def function(x, memory_key, memory_value, *, residual, **options):
        out, attention = module.multi_head_external_attention(
            x, memory_key, memory_value, **options
        )
        return (out + x if residual else out), attention

    return function


def run(function, case, tensors, mask):
    """Return result, map and the gradient of every operand for fixed output gradients."""
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
    }
    out, attention = function(
        *(leaves[name] for name in NAMES[:3]),
        **{name: leaves[name] for name in NAMES[3:]},
        num_heads=case.heads, norm=case.norm, eps=case.eps, mask=mask, residual=case.residual,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    gradients = [
        torch.randn(tensor.shape, generator=generator).to(case.dtype).to(tensor)
        for tensor in (out, attention)
    ]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad([out, attention], list(wanted.values()), gradients)
    return {
        "result": out,
        "map": attention,
        **{f"gradient of {name}": value for name, value in zip(wanted, found, strict=True)},
    }


def allowed_error(plain_error, scale, dtype):
    """Twice the error of plain PyTorch in the same type, and 4 units in the last place."""
    return 2 * plain_error + 4 * torch.finfo(dtype).eps * 2.0 ** (math.frexp(scale)[1] - 1)


def with_map(*tensors, **options):
    """Run the kernels, the map included."""
    return custom_op.fused_external_attention(*tensors, return_attention=True, **options)


def check(case, device, function=with_map):
    """Compare the kernels with the equations in float64: result, map and all gradients."""
    tensors, mask = operands(case, device)
    exact = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    expected = run(by_equations(reference), case, exact, mask)
    plain = run(by_equations(eager), case, tensors, mask)
    actual = run(function, case, tensors, mask)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        found = actual[name]
        assert found.dtype == case.dtype, name
        assert found.shape == value.shape, name
        assert torch.isfinite(found).all(), f"{name} is not finite"
        error, plain_error, scale = (
            tensor.abs().max().item()
            for tensor in (found.double() - value, plain[name].double() - value, value)
        )
        allowed = allowed_error(plain_error, scale, case.dtype)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e} ({case})"


def check_resident(case, device, monkeypatch, most_parts=resident.MOST_PARTS):
    """Compare as :func:`check` does, and see that the kernels that hold a memory were used."""
    used = []

    def spied(name, launch):
        def spy(*args, **options):
            used.append(name)
            return launch(*args, **options)

        return spy

    with monkeypatch.context() as patch:
        for name in ("keep_exponentials", "mix", "backward"):
            patch.setattr(resident, name, spied(name, getattr(resident, name)))
        # where it pays or not
        patch.setattr(resident, "takes_mix", lambda *_: True)
        patch.setattr(resident, "MOST_PARTS", most_parts)
        check(case, device)
    first = ["keep_exponentials"] if case.layout != "tokens last" else []
    # tokens of one tile need no first pass
    forward = [*first, "mix"] if case.tokens > 64 else []
    keeps_map = 1 < case.slots <= case.channels / 4
    assert used == [*forward, *(["backward"] if keeps_map else [])]


def check_dropout(case, device, probability):
    """Compare with equations that drop the same entries, in the forward and the backward pass."""
    tensors, mask = operands(case, device)
    seed = torch.tensor([2**40 + 7], device=device)
    options = {"attention_dropout": probability, "seed": seed, "return_attention": True}
    # with the identity as values, the result shows which entries are kept
    identity = torch.eye(case.slots, dtype=case.dtype, device=device)
    mixed, attention = custom_op.fused_external_attention(
        tensors["x"], tensors["memory_key"], identity, num_heads=case.heads, norm=case.norm,
        eps=case.eps, mask=mask, **options,
    )  # fmt: skip
    mixed = mixed.unflatten(2, (case.heads, case.slots)).transpose(1, 2)
    dropped = mixed == 0
    if mask is not None:
        dropped = dropped[mask[:, None, :, None].expand_as(dropped)]
    assert abs(dropped.double().mean().item() - probability) < 0.05
    factors = (mixed != 0).double() / (1 - probability)
    # the smallest numbers of a type are multiples of a fixed one, whatever is rounded to them
    eps = torch.finfo(case.dtype).eps
    torch.testing.assert_close(
        mixed.double(), attention.double() * factors,
        rtol=2 * eps, atol=2 * eps * torch.finfo(case.dtype).smallest_normal,
    )  # fmt: skip

    def with_equations(x, memory_key, memory_value, *, memory_value_bias, residual, **options):
        assert not residual
        _, attention = reference.multi_head_external_attention(
            x, memory_key, memory_value, memory_value_bias=memory_value_bias, **options
        )
        out = (attention * factors) @ memory_value + memory_value_bias
        out = out.transpose(1, 2).flatten(2)
        return (out if mask is None else out * mask.unsqueeze(-1)), attention

    def with_kernels(*tensors, **others):
        return custom_op.fused_external_attention(*tensors, **others, **options)

    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected = run(with_equations, case, exact, mask)
    actual = run(with_kernels, case, tensors, mask)
    for name, value in expected.items():
        allowed = 32 * torch.finfo(case.dtype).eps * max(value.abs().max().item(), 1e-3)
        error = (actual[name].double() - value).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check_masked_tokens_beside_small_logits(device):
    """Compare where valid logits lie so far below 0 that the 0 of masked tokens overflows."""
    generator = torch.Generator().manual_seed(0)
    # many samples: of few, the largest error is a matter of luck where a token has nearly all of P
    x = 10 + 10 * torch.rand(32, 20, 8, generator=generator)
    memory_key = 0.1 * torch.rand(5, 8, generator=generator) - 2
    memory_value = torch.randn(5, 8, generator=generator)
    mask = (torch.rand(32, 20, generator=generator) > 0.4).to(device)
    operands = [tensor.to(device) for tensor in (x, memory_key, memory_value)]
    assert (operands[0] @ operands[1].T).max() < -100

    def gradients(function, dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in operands]
        out, _ = function(*leaves, num_heads=1, mask=mask)
        return torch.autograd.grad(out.square().sum(), leaves)

    exact = gradients(reference.multi_head_external_attention, torch.float64)
    plain = gradients(eager.multi_head_external_attention, torch.float32)
    actual = gradients(with_map, torch.float32)
    for found, near, expected in zip(actual, plain, exact, strict=True):
        error, plain_error, scale = (
            tensor.abs().max().item()
            for tensor in (found.double() - expected, near.double() - expected, expected)
        )
        assert torch.isfinite(found).all()
        allowed = allowed_error(plain_error, scale, torch.float32)
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


#: mistakes that the comparison has to notice, as changes of the call
MUTANTS = {
    "no mask": (Case(mask="padded", heads=4), {"mask": None}),
    "the other norm": (Case(), {"norm": "softmax"}),
    "no key bias": (Case(norm="softmax"), {"memory_key_bias": None}),
    "no value bias": (Case(), {"memory_value_bias": None}),
    "another eps": (Case(eps=0.01), {"eps": 1e-9}),
    "no residual": (
        Case(residual=True, value_channels=12, heads=4, batch=1, mask="padded"),
        {"residual": False},
    ),
    "values in another order": (Case(biases=False), {"memory_value": "reversed"}),
}


def mutant(changes):
    """Return the kernels' function with some arguments replaced."""

    def function(x, memory_key, memory_value, **options):
        changed = dict(changes)
        if changed.pop("memory_value", None) == "reversed":
            memory_value = memory_value.flip(0)
        # what is left out keeps a gradient, of zero
        left_out = [options[name] for name in changed if name.endswith("bias")]
        nothing = sum(0 * tensor.sum() for tensor in left_out)
        out, attention = with_map(x, memory_key, memory_value, **(options | changed))
        return out + nothing, attention

    return function


def same_on_another_tiling(case):
    """Return a case large enough for several tiles of 16 in every direction."""
    return replace(case, tokens=100, channels=40, value_channels=24, slots=20)
