"""The compared modules against their equations written out with loops and einsum, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eanet.nn.compared import (
    AdaptivePyramidContext,
    AggregatedCooccurrentFeatures,
    DoubleAttention,
    DualAttention,
    DynamicMultiScaleFilters,
    Hamburger,
    SelfAttention2d,
)
from eanet.nn.compared.hamburger import factorize

CHANNELS, HEIGHT, WIDTH = 6, 5, 3
TOKENS = HEIGHT * WIDTH


@pytest.fixture(autouse=True)
def _double_precision():
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(previous)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, HEIGHT, WIDTH)


def with_statistics(module: nn.Module) -> nn.Module:
    """Give batch norms statistics and factors of their own, and evaluate."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return module.eval()


def pointwise(convolution: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product on (channels, tokens)."""
    result = convolution.weight.flatten(1) @ x
    return result if convolution.bias is None else result + convolution.bias[:, None]


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm in evaluation on (channels, tokens)."""
    centered = (x - norm.running_mean[:, None]) / (norm.running_var[:, None] + norm.eps).sqrt()
    return centered * norm.weight[:, None] + norm.bias[:, None]


def softmax(values: Tensor) -> Tensor:
    """Softmax of a vector, written out."""
    exponentials = (values - values.max()).exp()
    return exponentials / exponentials.sum()


def assert_equal(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected.reshape(result.shape), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["explicit", "fused"])
@pytest.mark.parametrize("scale", [1.0, CHANNELS**-0.5])
def test_self_attention(scale, implementation):
    module = SelfAttention2d(CHANNELS, scale=scale, implementation=implementation)
    x = image(1)
    tokens = x[0].flatten(1)
    query, key, value = (
        pointwise(layer, tokens) for layer in (module.query, module.key, module.value)
    )
    attended = torch.zeros(CHANNELS, TOKENS)
    for i in range(TOKENS):
        weights = softmax(torch.stack([scale * query[:, i] @ key[:, j] for j in range(TOKENS)]))
        attended[:, i] = sum(weights[j] * value[:, j] for j in range(TOKENS))
    assert_equal(module(x), pointwise(module.projection, attended))


def test_dual_attention():
    module = with_statistics(DualAttention(CHANNELS, query_channels=2))
    nn.init.constant_(module.position_gamma, 0.7)
    nn.init.constant_(module.channel_gamma, -0.3)
    x = image(1)
    tokens = x[0].flatten(1)
    query, key, value = (
        pointwise(layer, tokens) for layer in (module.query, module.key, module.value)
    )
    position = torch.stack([value @ softmax(query[:, i] @ key) for i in range(TOKENS)], dim=1)
    energy = torch.einsum("in,jn->ij", tokens, tokens)
    channel = torch.stack([softmax(row.max() - row) @ tokens for row in energy])
    expected = 0
    for gamma, attended, output in (
        (0.7, position, module.position_output),
        (-0.3, channel, module.channel_output),
    ):
        mixed = (gamma * attended + tokens).view_as(x)
        convolved = F.conv2d(mixed, output[0].weight, padding=1)[0].flatten(1)
        expected = expected + normalized(output[1], convolved).clamp(min=0)
    assert_equal(module(x), expected)


def test_dual_attention_starts_without_attention():
    module = with_statistics(DualAttention(CHANNELS))
    x = image()
    expected = module.position_output(x) + module.channel_output(x)
    assert_equal(module(x), expected)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_double_attention(norm):
    module = with_statistics(
        DoubleAttention(CHANNELS, feature_channels=4, num_descriptors=5, norm=norm)
    )
    x = image(1)
    tokens = x[0].flatten(1)

    def apply(layers: nn.Sequential, values: Tensor) -> Tensor:
        result = pointwise(layers[0], values)
        return normalized(layers[1], result) if norm == "batch" else result

    features = apply(module.features, tokens)
    gathering = torch.stack([softmax(row) for row in apply(module.gathering, tokens)])
    received = apply(module.distribution, tokens)
    received = torch.stack([softmax(received[:, i]) for i in range(TOKENS)], dim=1)
    mixed = torch.einsum("mi,ni,nj->mj", features, gathering, received)
    assert_equal(module(x), apply(module.projection, mixed) + tokens)


def grid_means(x: Tensor, side: int) -> Tensor:
    """Averages over the cells of a grid whose cells overlap where the sides do not divide."""
    cells = torch.zeros(x.shape[0], side, side)
    for i in range(side):
        rows = slice(i * HEIGHT // side, math.ceil((i + 1) * HEIGHT / side))
        for j in range(side):
            columns = slice(j * WIDTH // side, math.ceil((j + 1) * WIDTH / side))
            cells[:, i, j] = x[:, rows, columns].mean(dim=(1, 2))
    return cells


def test_adaptive_pyramid_context():
    module = with_statistics(AdaptivePyramidContext(CHANNELS, scales=(1, 2, 4)))
    x = image(1)
    tokens = x[0].flatten(1)
    expected = []
    for context in module.contexts:
        reduced = normalized(context.reduction_norm, pointwise(context.reduction, tokens))
        reduced = reduced.clamp(min=0)
        cells = pointwise(context.pooled, grid_means(x[0], context.scale).flatten(1))
        cells = normalized(context.pooled_norm, cells).clamp(min=0)
        logits = pointwise(context.affinity, reduced + reduced.mean(dim=1, keepdim=True))
        expected.append(cells @ (1 / (1 + (-logits).exp())) + reduced)
    assert_equal(module(x), torch.cat(expected))


def test_a_single_pooled_value_is_normalized_with_running_statistics():
    module = with_statistics(AdaptivePyramidContext(CHANNELS, scales=(1,))).train()
    norm = module.contexts[0].pooled_norm
    before = norm.running_mean.clone()
    module(image(1))
    assert torch.equal(norm.running_mean, before)
    module(image(2))
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_dynamic_filters(norm):
    module = with_statistics(DynamicMultiScaleFilters(CHANNELS, kernel_sizes=(1, 3), norm=norm))
    x = image(2)
    expected = [
        torch.stack([dynamically_filtered(part, sample, norm) for sample in x])
        for part in module.filters
    ]
    assert_equal(module(x), torch.cat(expected, dim=1))


def dynamically_filtered(part: nn.Module, sample: Tensor, norm: str) -> Tensor:
    size, tokens = part.kernel_size, sample.flatten(1)

    def apply(layers: nn.Module, values: Tensor) -> Tensor:
        if norm == "none":
            return pointwise(layers, values)
        return normalized(layers[1], pointwise(layers[0], values)).clamp(min=0)

    filters = pointwise(part.filter, grid_means(sample, size).flatten(1)).view(-1, size, size)
    reduced = apply(part.reduction, tokens).view_as(sample)
    padded = F.pad(reduced, (size // 2,) * 4)
    filtered = torch.zeros_like(sample)
    for i in range(HEIGHT):
        for j in range(WIDTH):
            window = padded[:, i : i + size, j : j + size]
            filtered[:, i, j] = (window * filters).sum(dim=(1, 2))
    filtered = filtered.flatten(1)
    if norm == "batch":
        filtered = normalized(part.filtered[0], filtered)
    return apply(part.fusion, filtered.clamp(min=0))


def pooled_to_half(x: Tensor) -> Tensor:
    """Averages over windows of 3 x 3 at stride 2, those of the border over what there is."""
    rows, columns = math.ceil(HEIGHT / 2), math.ceil(WIDTH / 2)
    pooled = torch.zeros(x.shape[0], rows, columns)
    for i in range(rows):
        for j in range(columns):
            window = x[:, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
            pooled[:, i, j] = window.mean(dim=(1, 2))
    return pooled.flatten(1)


@pytest.mark.parametrize(("heads", "mixtures"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_aggregated_cooccurrent_features(heads, mixtures):
    module = with_statistics(
        AggregatedCooccurrentFeatures(CHANNELS, num_heads=heads, num_mixtures=mixtures)
    )
    x = image(1)
    tokens, pooled = x[0].flatten(1), pooled_to_half(x[0])
    query = pointwise(module.query_and_key, tokens)
    key, value = pointwise(module.query_and_key, pooled), pointwise(module.value, pooled)
    width = CHANNELS // heads
    part = width // mixtures
    attended = torch.zeros(CHANNELS, TOKENS)
    for head in range(heads):
        inside = slice(head * width, (head + 1) * width)
        q, k = query[inside], key[inside]
        shares = torch.ones(1)
        if mixtures > 1:
            shares = softmax(module.mixture_weight @ q.mean(dim=1))
        for i in range(TOKENS):
            weights = sum(
                shares[m]
                * softmax(
                    q[m * part : (m + 1) * part, i] @ k[m * part : (m + 1) * part] / width**0.5
                )
                for m in range(mixtures)
            )
            attended[inside, i] = value[inside] @ weights
    expected = normalized(module.norm, pointwise(module.projection, attended)) + tokens
    assert_equal(module(x), expected)


def test_cooccurrent_attention_is_dropped_in_training_alone():
    module = AggregatedCooccurrentFeatures(CHANNELS, attention_dropout=0.5)
    x = image()
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def factorized_by_hand(features: Tensor, bases: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The updates of one image, entry by entry."""
    (channels, tokens), rank = features.shape, bases.shape[1]
    D = torch.stack([bases[:, r] / bases[:, r].square().sum().sqrt() for r in range(rank)], dim=1)
    C = torch.stack([softmax(features[:, n] @ D) for n in range(tokens)])

    def updated(C: Tensor, D: Tensor, H: Tensor) -> Tensor:
        result = torch.zeros_like(C)
        for n in range(C.shape[0]):
            for r in range(rank):
                above = sum(H[c, n] * D[c, r] for c in range(H.shape[0]))
                below = sum(C[n, q] * (D[:, q] @ D[:, r]) for q in range(rank)) + 1e-6
                result[n, r] = C[n, r] * above / below
        return result

    for _ in range(steps):
        C = updated(C, D, features)
        D = updated(D, C, features.T)
    assert D.shape == (channels, rank)
    return D, updated(C, D, features)


@pytest.mark.parametrize("steps", [1, 2])
def test_factorization_by_hand(steps):
    features, bases = torch.rand(2, 5, 7), torch.rand(2, 5, 3)
    D, C = factorize(features, bases, steps)
    for sample in range(2):
        expected_D, expected_C = factorized_by_hand(features[sample], bases[sample], steps)
        assert_equal(D[sample], expected_D)
        assert_equal(C[sample], expected_C)


def test_factorization_approaches_a_map_of_low_rank():
    features = torch.rand(1, 8, 2) @ torch.rand(1, 2, 40)

    def error(steps: int) -> float:
        D, C = factorize(features, torch.rand(1, 8, 2), steps)
        return float((D @ C.transpose(1, 2) - features).norm() / features.norm())

    assert error(400) < 2e-3 < error(1)


def test_factorization_carries_the_gradient_of_its_last_update():
    features, bases = torch.rand(1, 5, 7), torch.rand(1, 5, 3)
    with_gradient = features.clone().requires_grad_()
    factorize(with_gradient, bases, 2)[1].sum().backward()
    # the same update with factors that are held still
    D, C = factorize(features, bases, 2)
    with torch.no_grad():
        before = before_last(features, bases)
    factor = before / (before @ (D.mT @ D) + 1e-6)
    torch.testing.assert_close(C, factor * (features.mT @ D))
    torch.testing.assert_close(with_gradient.grad, (D @ factor.mT))


def before_last(features: Tensor, bases: Tensor) -> Tensor:
    """The coefficients after two steps, before the last update."""
    D = F.normalize(bases, dim=1)
    C = (features.mT @ D).softmax(dim=-1)
    for _ in range(2):
        C = C * (features.mT @ D) / (C @ (D.mT @ D) + 1e-6)
        D = D * (features @ C) / (D @ (C.mT @ C) + 1e-6)
    return C


@pytest.mark.parametrize("training", [True, False])
def test_hamburger(training):
    module = with_statistics(
        Hamburger(CHANNELS, inner_channels=4, num_components=3, num_evaluation_steps=7)
    )
    module.norm.eval()
    module.training = training
    x = image(1)
    tokens = x[0].flatten(1)
    hidden = pointwise(module.lower, tokens).clamp(min=0)
    torch.manual_seed(5)
    bases = torch.rand(1, 4, 3)
    D, C = factorized_by_hand(hidden, bases[0], 6 if training else 7)
    torch.manual_seed(5)
    result = module(x)
    upper = normalized(module.norm, pointwise(module.upper, D @ C.T))
    assert_equal(result, (tokens + upper).clamp(min=0))


def test_hamburger_draws_its_bases_anew():
    module = with_statistics(Hamburger(CHANNELS, num_components=3))
    x = image()
    assert not torch.equal(module(x), module(x))
