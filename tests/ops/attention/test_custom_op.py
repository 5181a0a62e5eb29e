"""The backend "triton" where its kernels cannot run: shapes, registration and refusals."""

import subprocess
import sys

import pytest
import torch

from eanet.ops.attention import (
    BACKENDS,
    GPU_BACKENDS,
    custom_op,
    external_attention,
    multi_head_external_attention,
)


def test_the_backend_is_listed_among_those_that_need_a_gpu():
    assert "triton" in GPU_BACKENDS
    assert not BACKENDS.keys() & GPU_BACKENDS.keys()


def test_importing_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from eanet.ops.attention import external_attention
x, memory = torch.zeros(1, 3, 4), torch.ones(2, 4)
external_attention(x, memory)
try:
    external_attention(x, memory, backend="triton")
except ValueError as error:
    assert "needs the package triton" in str(error), error
else:
    raise SystemExit("not refused")
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr


def test_importing_does_not_load_triton():
    program = "import sys, eanet.ops.attention; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_cpu_is_refused(monkeypatch):
    kernels = pytest.importorskip("eanet.ops.attention.kernels")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu; use backend='eager'"):
        external_attention(torch.zeros(1, 3, 4), torch.ones(2, 4), backend="triton")


def test_an_unknown_backend_names_all():
    with pytest.raises(ValueError, match=r"\['eager', 'reference', 'triton'\], got 'cuda'"):
        external_attention(torch.zeros(1, 3, 4), torch.ones(2, 4), backend="cuda")


@pytest.mark.parametrize("norm", ["double", "softmax"])
def test_shapes_on_the_meta_device(norm):
    x = torch.empty(2, 9, 12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    key = torch.empty(5, 4, device="meta", requires_grad=True)
    value = torch.empty(5, 6, device="meta", requires_grad=True)
    out, attention = multi_head_external_attention(
        x, key, value, num_heads=3, norm=norm, return_attention=True, backend="triton"
    )
    assert out.shape == (2, 9, 18)
    assert attention.shape == (2, 3, 9, 5)
    assert out.dtype == attention.dtype == torch.bfloat16
    out.sum().backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
    assert (key.grad.shape, key.grad.dtype) == (key.shape, torch.float32)
    assert value.grad.shape == value.shape


def test_the_map_is_not_allocated_unless_wanted():
    x, key = torch.empty(2, 9, 4, device="meta"), torch.empty(5, 4, device="meta")
    for wanted, size in ((False, 0), (True, 2 * 9 * 5)):
        options = (1, "double", 1e-9, 0.0, False, wanted, False)
        _, attention, _, _ = torch.ops.eanet.external_attention.default(
            x, key, key, None, None, None, None, *options
        )
        assert attention.numel() == size
    assert custom_op.result_only(x, key).shape == x.shape
