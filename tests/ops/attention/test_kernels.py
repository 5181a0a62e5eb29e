"""The Triton kernels without a GPU: interpreted, in a process of its own, and compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
TESTS = Path(__file__).with_name("interpreted_kernels.py")
#: what an H100 or H200 lets a program have
SHARED_BYTES = 232_448

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu compiles and runs the kernels on this GPU"
)


def test_interpreted_kernels(request):
    folders = request.config.getoption("--golden-dir") or []
    arguments = [f"--golden-dir={folder.resolve()}" for folder in folders]
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(TESTS), *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    passed = re.search(r"(\d+) passed", outcome.stdout)
    assert passed, outcome.stdout
    # everything below but golden cases, whose number depends on the folder
    assert int(passed[1]) > 70, outcome.stdout


class Hopper:
    """Stands in for the driver of a GPU, so that kernels are compiled and never launched."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Collect what is compiled for a Hopper GPU, by kernel."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton cannot compile for NVIDIA GPUs")
    jit_function = triton.runtime.JITFunction
    run = jit_function.run
    found = {}

    def compile_only(self, *args, grid, warmup, **options):
        found[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(jit_function, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton.runtime.driver.set_active(Hopper())
    yield found
    triton.runtime.driver._active = None


@without_gpu
@pytest.mark.parametrize(
    ("token_dtype", "norm", "channels", "slots", "plain"),
    [
        (torch.bfloat16, "double", 512, 64, False),
        (torch.float32, "softmax", 16, 16, False),
        (torch.float16, "double", 7, 1, True),
    ],
)
def test_kernels_compile_for_a_gpu(compiled, token_dtype, norm, channels, slots, plain):
    from eanet.ops.attention import launch
    from eanet.ops.attention.tiling import Problem

    x = torch.zeros(2, channels, 300, dtype=token_dtype).transpose(1, 2)
    key = torch.zeros(slots, channels, dtype=token_dtype)
    biases = (None, None) if plain else (torch.zeros(slots), torch.zeros(channels))
    mask = None if plain else torch.ones(2, 300, dtype=torch.bool)
    seed = None if plain else torch.zeros(1, dtype=torch.int64)
    attention = None if plain else torch.zeros(2, 1, 300, slots, dtype=token_dtype)
    problem = Problem(1, norm, 1e-9, 0.0 if plain else 0.1, residual=True)

    statistics = launch.forward(
        x, key, key, *biases, mask, seed, problem, out=torch.zeros_like(x), attention=attention
    )
    launch.backward(
        x, attention, x, key, key, biases[0], mask, seed, statistics, problem,
        grad_x=torch.zeros_like(x), grad_memories=torch.zeros(2 * key.numel() + channels),
        grad_key_bias=None if plain else torch.zeros(slots),
    )  # fmt: skip

    expected = {"mix", "attention_gradient", "key_gradient", "value_gradient", "add_parts"}
    if norm == "double":
        expected.add("token_statistics")
    assert compiled.keys() == expected
    for name, kernel in compiled.items():
        assert ".target sm_90" in kernel.asm["ptx"], name
        assert kernel.metadata.shared <= SHARED_BYTES, name
    if channels == 512:
        assert "wgmma.mma_async" in compiled["mix"].asm["ptx"], "tensor cores are not used"
    if token_dtype == torch.float32:
        assert "tf32" not in compiled["mix"].asm["ptx"], "float32 lost digits"


@without_gpu
@pytest.mark.parametrize("layout", ["tokens last", "channels last"])
@pytest.mark.parametrize(("tokens", "channels", "slots"), [(16_384, 512, 64), (320, 40, 10)])
def test_kernels_that_hold_a_memory_compile_for_a_gpu(
    compiled, monkeypatch, tokens, channels, slots, layout
):
    from eanet.ops.attention import launch, tiling
    from eanet.ops.attention.tiling import Problem

    monkeypatch.setattr(tiling, "device_limits", lambda device: (132, SHARED_BYTES))
    x = torch.zeros(2, tokens, channels, dtype=torch.bfloat16)
    if layout == "tokens last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    memory = torch.zeros(slots, channels, dtype=torch.bfloat16)
    kept = x.new_zeros(2, 1, tokens, slots), torch.zeros(2, 1, tokens)
    problem = Problem(1, "double", 1e-9, 0.0, residual=False)

    launch.forward(
        x, memory, memory, None, None, None, None, problem,
        out=torch.zeros_like(x), attention=kept[0], denominator=kept[1],
    )  # fmt: skip
    launch.backward(
        x, None, x, memory, memory, None, None, None, None, problem, kept=kept,
        grad_x=torch.zeros_like(x), grad_memories=x.new_zeros(2 * memory.numel() + channels),
    )  # fmt: skip

    first = "token_statistics" if layout == "tokens last" else "slot_exponentials"
    # each program of the other has a tile
    second = "mix_exponentials" if tokens == 16_384 else "mix"
    assert compiled.keys() == {first, second, "value_side", "key_side", "add_parts"}
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= SHARED_BYTES, name
    if second == "mix_exponentials":
        assert compiled[second].metadata.launch_pdl
        # begins early, and waits before it reads what the first has written
        assert "griddepcontrol.launch_dependents" in compiled[first].asm["ptx"]
        waits, _, rest = compiled[second].asm["ptx"].partition("griddepcontrol.wait")
        assert "cp.async" in rest
        assert "cp.async" not in waits
    for name in (second, "value_side", "key_side"):
        assert "wgmma.mma_async" in compiled[name].asm["ptx"], "tensor cores are not used"
