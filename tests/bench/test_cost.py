"""The cost counter against closed forms, with plain PyTorch modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eanet.bench.cost import count_cost
from eanet.errors import UserError


class PaperBlock(nn.Module):
    """External attention on a feature map as the paper's authors wrote it."""

    def __init__(self, channels: int, slots: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv1d(channels, slots, 1, bias=False)
        self.value = nn.Conv1d(slots, channels, 1, bias=False)
        self.output = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x):
        attention = self.key(self.query(x).flatten(2)).softmax(dim=-1)
        attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
        return F.relu(self.output(self.value(attention).view_as(x)) + x)


class SelfAttention(nn.Module):
    """Four square projections and two N x N products, written with functions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(4, channels, channels))

    def forward(self, x):
        tokens = x.flatten(2)
        query, key, value = self.weights[:3, None] @ tokens
        attention = torch.einsum("bcn,bcm->bnm", query, key).softmax(dim=-1)
        return self.weights[3] @ torch.bmm(value, attention.transpose(1, 2))


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.parametrize("size", [(128, 128), (33, 47), (1, 1)])
@pytest.mark.parametrize(("channels", "slots"), [(512, 64), (32, 8)])
def test_external_attention(channels, slots, size):
    tokens = size[0] * size[1]
    cost = count_cost(PaperBlock(channels, slots), (1, channels, *size))
    assert cost.parameters == 2 * channels**2 + 3 * channels + 2 * channels * slots
    assert cost.macs == (2 * channels**2 + 2 * channels * slots) * tokens
    if (channels, size) == (512, (128, 128)):
        assert (cost.parameters, cost.macs) == (591_360, 9_663_676_416)


@pytest.mark.parametrize("size", [128, 17])
def test_self_attention_of_functions_is_seen(size):
    tokens = size * size
    cost = count_cost(SelfAttention(512), (1, 512, size, size))
    assert cost.parameters == 1_048_576
    assert cost.macs == 4 * 512**2 * tokens + 2 * tokens**2 * 512
    if size == 128:
        assert cost.macs == pytest.approx(292.058e9, rel=1e-5)
        # the map of 128^4 values and its softmax are alive at once
        assert 2 * 4 * 128**4 < cost.peak_activation_bytes < 2.2 * 4 * 128**4


OPERATIONS = {
    "matmul": (torch.matmul, [(3, 4), (4, 5)], 3 * 4 * 5),
    "matmul, batched": (torch.matmul, [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),
    "matmul, matrix and vector": (torch.matmul, [(3, 4), (4,)], 3 * 4),
    "matmul, vectors": (torch.matmul, [(4,), (4,)], 4),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
    "addmm": (torch.addmm, [(3, 5), (3, 4), (4, 5)], 3 * 4 * 5),
    "addmv": (torch.addmv, [(3,), (3, 4), (4,)], 3 * 4),
    "baddbmm": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
    "addbmm": (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
    "addmm_": (lambda a, b, c: a.addmm_(b, c), [(3, 5), (3, 4), (4, 5)], 3 * 4 * 5),
    "addmv_": (lambda a, b, c: a.addmv_(b, c), [(3,), (3, 4), (4,)], 3 * 4),
    "baddbmm_": (
        lambda a, b, c: a.baddbmm_(b, c),
        [(2, 3, 5), (2, 3, 4), (2, 4, 5)],
        2 * 3 * 4 * 5,
    ),
    "addbmm_": (lambda a, b, c: a.addbmm_(b, c), [(3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
    "baddbmm, scaled": (
        lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2),
        [(2, 3, 5), (2, 3, 4), (2, 4, 5)],
        2 * 3 * 4 * 5,
    ),
    "bmm, out": (
        lambda a, b, c: torch.bmm(b, c, out=a),
        [(2, 3, 5), (2, 3, 4), (2, 4, 5)],
        2 * 3 * 4 * 5,
    ),
    "linear": (F.linear, [(2, 3, 4), (5, 4)], 2 * 3 * 4 * 5),
    "linear with bias": (F.linear, [(2, 3, 4), (5, 4), (5,)], 2 * 3 * 4 * 5),
    "linear of a vector": (F.linear, [(4,), (5, 4), (5,)], 4 * 5),
    "einsum": (
        lambda a, b: torch.einsum("bhnd,bhmd->bhnm", a, b),
        [(2, 3, 4, 5), (2, 3, 6, 5)],
        2 * 3 * 4 * 5 * 6,
    ),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        [(1, 2, 10, 8), (1, 2, 12, 8), (1, 2, 12, 8)],
        2 * (2 * 10 * 12 * 8),
    ),
    "conv1d": (F.conv1d, [(1, 4, 9), (6, 4, 3)], 6 * 4 * 3 * 7),
    "conv2d, strided": (
        lambda x, w: F.conv2d(x, w, stride=2, padding=1),
        [(1, 4, 9, 9), (6, 4, 3, 3)],
        6 * 4 * 9 * 25,
    ),
    "conv2d, groups": (
        lambda x, w: F.conv2d(x, w, groups=2),
        [(1, 4, 5, 5), (6, 2, 3, 3)],
        6 * 2 * 9 * 9,
    ),
    "conv2d, dilated": (
        lambda x, w: F.conv2d(x, w, dilation=2, padding=2),
        [(1, 4, 5, 5), (6, 4, 3, 3)],
        6 * 4 * 9 * 25,
    ),
    "conv3d": (F.conv3d, [(1, 2, 5, 5, 5), (3, 2, 1, 1, 1)], 3 * 2 * 125),
    "conv_transpose2d": (F.conv_transpose2d, [(1, 4, 5, 5), (4, 6, 3, 3)], 4 * 6 * 9 * 25),
    "no products": (lambda a, b: (a * b).softmax(-1).cumsum(0), [(3, 4), (3, 4)], 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    function, shapes, macs = OPERATIONS[name]
    assert count_cost(Calls(function), [torch.zeros(shape) for shape in shapes]).macs == macs


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_of_torch(batch_first):
    model = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    shape = (1, 10, 16) if batch_first else (10, 1, 16)
    assert count_cost(model, [torch.zeros(shape)] * 3).macs == 4 * 10 * 16**2 + 2 * 10**2 * 16


def test_resnet50_has_its_published_cost():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.resnet50()
    cost = count_cost(model, (1, 3, 224, 224))
    assert (cost.parameters, cost.trainable) == (25_557_032, 25_557_032)
    assert cost.macs == pytest.approx(4.09e9, rel=1e-3)
    by_name = {module.name: module for module in cost.modules}
    children = [module for module in cost.modules if module.depth == 1]
    assert sum(child.macs for child in children) == cost.macs == by_name[""].macs
    assert sum(child.parameters for child in children) == cost.parameters
    assert by_name["fc"].macs == 2048 * 1000
    assert by_name["layer1.0.conv2"].macs == 64 * 64 * 9 * 56 * 56
    assert (by_name["fc"].kind, by_name["layer1.0.conv2"].depth) == ("Linear", 3)


class Listed(nn.Module):
    """Layers in a list, which is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4))])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_list_costs_what_its_layers_cost():
    by_name = {module.name: module.macs for module in count_cost(Listed(), (1, 8)).modules}
    assert by_name == {
        "": 96,
        "layers": 96,
        "layers.0": 64,
        "layers.1": 32,
        "layers.1.0": 32,
    }


def test_frozen_and_shared_parameters():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    cost = count_cost(model, (1, 8))
    assert cost.parameters == 64 + 8 + 8 + 27
    assert cost.trainable == 64 + 8 + 8
    assert cost.macs == 64 + 64 + 24
    assert [module.macs for module in cost.modules] == [152, 64, 64, 24]


def test_peak_is_the_largest_sum_of_tensors_alive_at_once():
    # input 100, hidden 1000, output 10 floats; the input stays alive in the caller
    model = nn.Sequential(nn.Linear(100, 1000), nn.Linear(1000, 10))
    assert count_cost(model, (1, 100)).peak_activation_bytes == 4 * (100 + 1000 + 10)
    half = count_cost(model, (1, 100), dtype=torch.bfloat16)
    assert half.peak_activation_bytes == 2 * (100 + 1000 + 10)

    def chain(x):
        for _ in range(20):
            x = x + 1  # each result replaces the one before
        return x.view(10, 10).t()  # views take nothing

    assert count_cost(Calls(chain), (1, 100)).peak_activation_bytes == 4 * 300

    def keep(x):
        return [x + 1 for _ in range(20)]

    assert count_cost(Calls(keep), (1, 100)).peak_activation_bytes == 4 * 2100


def test_batch_scales_macs_and_memory():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    one, four = (count_cost(model, (batch, 3, 16, 16)) for batch in (1, 4))
    assert four.macs == 4 * one.macs
    assert four.peak_activation_bytes == 4 * one.peak_activation_bytes
    assert four.parameters == one.parameters


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    count_cost(model, (2, 3, 8, 8))
    assert all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_example_inputs_keep_their_types():
    embedding = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 2))
    tokens = torch.zeros(3, dtype=torch.int64)
    assert count_cost(embedding, tokens).macs == 3 * 6 * 2
    assert count_cost(nn.Linear(4, 2).double(), torch.zeros(5, 4).double()).macs == 40


def test_a_cost_without_memory_for_it():
    with torch.device("meta"):
        model = nn.Linear(1_000_000, 1_000_000)
    assert count_cost(model, (1, 1_000_000)).macs == 10**12


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"Linear does not take an input of shape \(1, 5\)"):
        count_cost(nn.Linear(4, 2), (1, 5))
    with pytest.raises(ValueError, match="at least 1"):
        count_cost(nn.Linear(4, 2), (0, 4))
    with pytest.raises(UserError, match="depends on values"):
        count_cost(Calls(lambda x: x if x.sum() > 0 else -x), (1, 4))


def test_description():
    text = count_cost(PaperBlock(512, 64), (1, 512, 128, 128)).describe(depth=1)
    lines = text.splitlines()
    assert lines[0] == "parameters        591,360"
    assert lines[1] == "multiply-adds     9,663,676,416 (19,327,352,832 FLOPs)"
    table = [line.split() for line in lines[4:]]
    assert table[0] == ["module", "class", "parameters", "MACs", "share"]
    assert table[1] == ["total", "PaperBlock", "591,360", "9.664", "G", "100.0%"]
    assert [row[0] for row in table[2:]] == ["query", "key", "value", "output"]
    assert len({line.rindex("%") for line in lines[5:]}) == 1  # numbers end in one column
    deeper = count_cost(PaperBlock(512, 64), (1, 512, 8, 8)).describe(depth=2)
    assert "    0" in deeper
    frozen = nn.Linear(4, 2).requires_grad_(False)
    assert "10 (10 of them frozen)" in count_cost(frozen, (1, 4)).describe()
