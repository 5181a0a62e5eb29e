"""What holds for every compared module: counts, shapes, gradients, symmetries, refusals."""

import pytest
import torch
from torch import nn

from eanet.bench.cost import count_cost
from eanet.nn.compared import (
    COMPARED_MODULES,
    AdaptivePyramidContext,
    AggregatedCooccurrentFeatures,
    DoubleAttention,
    DualAttention,
    DynamicMultiScaleFilters,
    Hamburger,
    SelfAttention2d,
)

#: trainable scalars and multiply-adds at 1 x 512 x 128 x 128
EXACT = {
    "SA": (1_048_576, 292_057_776_128),
    "DA": (5_048_962, 245_886_877_696),
    "A2": (1_054_720, 25_769_803_776),
    "APC": (2_130_994, 18_031_837_184),
    "DM": (3_145_728, 35_086_401_536),
    "ACF": (788_480, 79_456_894_976),
    "Ham": (525_824, 17_542_676_480),
}

#: multiply-adds as a function of channels and positions, where the pooled map has N / 4
CLOSED_FORMS = {
    "SA": lambda c, n: 4 * c**2 * n + 2 * c * n**2,
    "DA": lambda c, n: (19 * c**2 + 2 * c * (c // 8) + 2 * c**2) * n + (c + c // 8) * n**2,
    "A2": lambda c, n: 6 * c**2 * n,
    "APC": lambda c, n: (4 * c**2 + 100 * c) * n + 50 * c**2,
    "DM": lambda c, n: (8 * c**2 + 84 * c) * n + 84 * c**2,
    "ACF": lambda c, n: 5 * c**2 * n // 2 + c * n**2 // 2,
    "Ham": lambda c, n: (2 * c**2 + 15 * c * 64 + 13 * 64**2) * n + 13 * c * 64**2,
}

#: modules that treat every position alike, so that moving positions moves results
POSITION_FREE = ("SA", "A2", "Ham")


def module(name: str, channels: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return COMPARED_MODULES[name](channels)


def test_the_order_is_that_of_the_table():
    assert list(COMPARED_MODULES) == list(EXACT)


@pytest.mark.parametrize("name", COMPARED_MODULES)
def test_counts_are_exact(name):
    with torch.device("meta"):
        compared = COMPARED_MODULES[name](512)
    cost = count_cost(compared, (1, 512, 128, 128))
    assert (cost.parameters, cost.trainable, cost.macs) == (EXACT[name][0], *EXACT[name])
    assert CLOSED_FORMS[name](512, 128**2) == EXACT[name][1]


@pytest.mark.parametrize(("channels", "height", "width"), [(512, 64, 32), (64, 20, 14)])
@pytest.mark.parametrize("name", COMPARED_MODULES)
def test_macs_follow_the_closed_form(name, channels, height, width):
    with torch.device("meta"):
        compared = COMPARED_MODULES[name](channels)
    cost = count_cost(compared, (1, channels, height, width))
    assert cost.macs == CLOSED_FORMS[name](channels, height * width)


OPTIONS = [
    (lambda: DoubleAttention(512, bias=False, norm="none"), 1_048_576),
    (lambda: DoubleAttention(512, norm="none"), 1_050_624),
    (lambda: DynamicMultiScaleFilters(512, norm="batch"), 3_160_064),
    (lambda: AggregatedCooccurrentFeatures(512, num_heads=8), 788_480),
    (lambda: AggregatedCooccurrentFeatures(512, num_heads=8, num_mixtures=2), 788_480 + 2 * 64),
    (lambda: SelfAttention2d(512, implementation="fused"), 1_048_576),
]


@pytest.mark.parametrize(("build", "parameters"), OPTIONS)
def test_options_have_their_counts(build, parameters):
    with torch.device("meta"):
        compared = build()
    assert sum(parameter.numel() for parameter in compared.parameters()) == parameters


def test_options_that_keep_the_macs():
    for build in (
        lambda: SelfAttention2d(512, implementation="fused"),
        lambda: AggregatedCooccurrentFeatures(512, num_heads=8),
    ):
        with torch.device("meta"):
            compared = build()
        name = "SA" if isinstance(compared, SelfAttention2d) else "ACF"
        assert count_cost(compared, (1, 512, 128, 128)).macs == EXACT[name][1]


def test_hamburger_of_seven_evaluation_steps():
    with torch.device("meta"):
        compared = Hamburger(512, num_evaluation_steps=7)
    assert count_cost(compared, (1, 512, 128, 128)).macs == pytest.approx(18.755e9, rel=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9), (2, 1)])
@pytest.mark.parametrize("name", COMPARED_MODULES)
def test_shape_in_training_and_evaluation(name, size):
    compared = module(name)
    for training in (True, False):
        compared.train(training)
        result = compared(torch.randn(2, 16, *size))
        assert result.shape == (2, compared.out_channels, *size)
    assert compared.out_channels == (64 if name in ("APC", "DM") else 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", COMPARED_MODULES)
def test_every_parameter_gets_a_finite_gradient(name, dtype):
    compared = module(name).to(dtype)
    x = torch.randn(1, 16, 9, 7, dtype=dtype, requires_grad=True)
    result = compared(x)
    assert result.dtype == dtype
    (result * torch.randn_like(result)).sum().backward()
    for tensor in (x, *compared.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", COMPARED_MODULES)
def test_autocast_stays_near_float32(name):
    compared = module(name).eval()
    x = torch.randn(2, 16, 6, 5)
    torch.manual_seed(1)
    exact = compared(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = compared(x)
    assert (result.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", COMPARED_MODULES)
def test_one_image_for_each_process_can_train(name):
    compared = module(name)
    compared(torch.randn(1, 16, 8, 8)).sum().backward()


@pytest.mark.parametrize("name", COMPARED_MODULES)
def test_samples_do_not_see_one_another_in_evaluation(name):
    compared = module(name).double().eval()
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)

    def run(sample: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # Hamburger draws its bases, those of the first sample first
        return compared(sample)

    torch.testing.assert_close(run(x)[:1], run(x[:1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", POSITION_FREE)
def test_moving_positions_moves_results(name):
    compared = module(name).double().eval()
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    order = torch.randperm(30)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(2)[..., order].unflatten(2, (6, 5))

    torch.manual_seed(3)
    expected = moved(compared(x))
    torch.manual_seed(3)
    torch.testing.assert_close(compared(moved(x)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(COMPARED_MODULES) - set(POSITION_FREE)))
def test_others_do_see_where_positions_are(name):
    compared = module(name).double().eval()
    x = torch.randn(1, 16, 6, 5, dtype=torch.float64)
    moved = x.roll(1, dims=3)
    assert (compared(moved) - compared(x).roll(1, dims=3)).abs().max() > 1e-6


@pytest.mark.parametrize("shape", [(2, 15, 4, 4), (2, 16, 4), (16, 4, 4)])
@pytest.mark.parametrize("name", COMPARED_MODULES)
@pytest.mark.usefixtures("without_shape_checks")
def test_other_shapes_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"takes \(batch, 16, height, width\), got"):
        module(name)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SelfAttention2d(0), "channels must be at least 1"),
        (lambda: SelfAttention2d(8, implementation="flash"), "implementation must be"),
        (lambda: DualAttention(8, query_channels=0), "query_channels must be at least 1"),
        (lambda: DoubleAttention(8, norm="layer"), "norm must be 'batch' or 'none'"),
        (lambda: AdaptivePyramidContext(8, scales=()), "num_scales must be at least 1"),
        (lambda: AdaptivePyramidContext(8, scales=(2, 0)), "scale must be at least 1"),
        (lambda: DynamicMultiScaleFilters(8, kernel_sizes=(4,)), "must be odd .*, got 4"),
        (lambda: DynamicMultiScaleFilters(8, norm="layer"), "norm must be"),
        (lambda: AggregatedCooccurrentFeatures(8, num_heads=3), "multiple of num_heads"),
        (lambda: AggregatedCooccurrentFeatures(8, attention_dropout=1.0), "attention_dropout"),
        (lambda: Hamburger(8, num_steps=0), "num_steps must be at least 1"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_impossible_arguments_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
