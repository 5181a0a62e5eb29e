"""The attention layers against values of the authors' code: results and all gradients."""

import pytest
from torch import nn

from eanet.nn.external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
)
from eanet.nn.fusion import fuse
from eanet.nn.self_attention import SelfAttention
from eanet.nn.transformer import Mlp

pytestmark = pytest.mark.golden

#: original name -> ours; a transposed matrix is marked with .T
BLOCK_NAMES = {
    "conv1.weight": "query.weight",
    "conv1.bias": "query.bias",
    "linear_0.weight": "memory_key",
    "linear_1.weight": "memory_value.T",
    "conv2.0.weight": "projection.weight",
    "conv2.1.weight": "norm.weight",
    "conv2.1.bias": "norm.bias",
    "conv2.1.running_mean": "norm.running_mean",
    "conv2.1.running_var": "norm.running_var",
}
MULTI_HEAD_NAMES = {
    "trans_dims.weight": "query.weight",
    "trans_dims.bias": "query.bias",
    "linear_0.weight": "memory_key",
    "linear_0.bias": "memory_key_bias",
    "linear_1.weight": "memory_value.T",
    "linear_1.bias": "memory_value_bias",
    "proj.weight": "projection.weight",
    "proj.bias": "projection.bias",
}
TOKEN_NAMES = {
    "q_linear.weight": "query.weight",
    "q_linear.bias": "query.bias",
    "linear_0.weight": "memory_key",
    "linear_1.weight": "memory_value.T",
    "linear_1.bias": "memory_value_bias",
    "proj.weight": "projection.weight",
    "proj.bias": "projection.bias",
}
TOKEN_BLOCK_NAMES = {f"attn.{theirs}": f"attention.{ours}" for theirs, ours in TOKEN_NAMES.items()}
TOKEN_BLOCK_NAMES |= {f"norm{i}.{p}": f"norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}
TOKEN_BLOCK_NAMES |= {f"mlp.fc1.{p}": f"mlp.expand.{p}" for p in ("weight", "bias")}
TOKEN_BLOCK_NAMES |= {f"mlp.fc2.{p}": f"mlp.contract.{p}" for p in ("weight", "bias")}
SELF_ATTENTION_NAMES = {
    "qkv.weight": "qkv.weight",
    "proj.weight": "projection.weight",
    "proj.bias": "projection.bias",
}


def to_ours(tensor, ours, like):
    """Bring a tensor of the original into our shape."""
    tensor = tensor.squeeze(-1) if tensor.ndim > like.ndim else tensor
    return tensor.transpose(0, 1).contiguous() if ours.endswith(".T") else tensor


def load(module, weights, names):
    """Load all weights of the original; nothing may be left over on either side."""
    state = module.state_dict()
    new = {}
    for theirs, tensor in weights.items():
        name = names[theirs].removesuffix(".T")
        new[name] = to_ours(tensor, names[theirs], state[name])
    new |= {name: state[name] for name in state if name.endswith("num_batches_tracked")}
    module.load_state_dict(new, strict=True)


def compare_gradients(case, module, expected, names):
    """Compare every gradient; each parameter must be among the reference values."""
    parameters = dict(module.named_parameters())
    compared = set()
    for theirs, tensor in expected.items():
        name = names[theirs].removesuffix(".T")
        parameter = parameters[name]
        if case.kind.startswith("segmentation") and theirs in ("conv1.bias", "linear_0.bias"):
            # the reference holds rounding noise there; the true gradient is zero
            assert parameter.grad.abs().max() == 0
            assert tensor.abs().max() < 1e-6
        else:
            case.assert_gradient(parameter.grad, to_ours(tensor, names[theirs], parameter), theirs)
        compared.add(name)
    assert compared == set(parameters)


def run(module, x, cotangent):
    """Return the result after a backward pass from a weighted sum."""
    x.requires_grad_()
    out = module(x)
    (out * cotangent).sum().backward()
    return out


@pytest.mark.golden("segmentation.ea_block")
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_block_equals_the_original(golden_case, dtype, mode, device):
    weights = golden_case.tensors("weights")
    io = golden_case.tensors("io")
    channels = weights["conv1.weight"].shape[0]
    block = ExternalAttention2d(channels, golden_case.meta["k"])
    load(block, weights, BLOCK_NAMES)
    block.to(device, dtype).train(mode == "train")
    x = io["in.x"].to(device, dtype, copy=True)

    out = run(block, x, io["in.cotangent"].to(device, dtype))

    golden_case.assert_output(out, io[f"{mode}.out"])
    golden_case.assert_gradient(x.grad, io[f"grad_{mode}.x"], "x")
    prefix = f"grad_{mode}."
    gradients = {n.removeprefix(prefix): t for n, t in io.items() if n.startswith(prefix)}
    compare_gradients(
        golden_case, block, {n: t for n, t in gradients.items() if n != "x"}, BLOCK_NAMES
    )
    if mode == "train":
        golden_case.assert_output(
            block.norm.running_mean, io["train_state.conv2.1.running_mean"], "running mean"
        )
        golden_case.assert_output(
            block.norm.running_var, io["train_state.conv2.1.running_var"], "running variance"
        )
        assert block.norm.num_batches_tracked == 1
    else:
        golden_case.assert_output(block.attention_map(x).flatten(2), io["eval.attn"], "attention")
        golden_case.assert_output(fuse(block)(x), io["eval.out"], "fused")


@pytest.mark.golden("segmentation.mh_attention")
def test_multi_head_equals_the_original(golden_case, dtype, device):
    weights = golden_case.tensors("weights")
    io = golden_case.tensors("io")
    sizes = golden_case.meta["derived"]
    layer = MultiHeadExternalAttention(
        golden_case.arguments["dim"],
        sizes["k"],
        num_heads=sizes["heads_total"],
        expansion=sizes["coef"],
    )
    load(layer, weights, MULTI_HEAD_NAMES)
    layer.to(device, dtype)
    x = io["in.x"].to(device, dtype, copy=True)

    out = run(layer, x, io["in.cotangent"].to(device, dtype))

    golden_case.assert_output(out, io["eval.out"])
    golden_case.assert_output(layer.attention_map(x), io["eval.attn"], "attention")
    golden_case.assert_output(fuse(layer)(x), io["eval.out"], "fused")
    golden_case.assert_gradient(x.grad, io["grad_eval.x"], "x")
    gradients = golden_case.starting_with("grad_eval.")
    del gradients["x"]
    compare_gradients(golden_case, layer, gradients, MULTI_HEAD_NAMES)


class TokenBlock(nn.Module):
    """The T2T stage with external attention: residual inside the attention, then a perceptron."""

    def __init__(self, in_channels, channels, num_slots):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_channels)
        self.attention = token_attention(in_channels, channels, num_slots)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, channels)

    def forward(self, x):
        x = self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def token_attention(in_channels, channels, num_slots):
    return ExternalAttention(
        channels,
        num_slots,
        in_channels=in_channels,
        value_bias=True,
        residual="query",
        attention_dropout=0.1,
        projection_dropout=0.1,
    )


def check_single_module(case, module, names, dtype, device):
    """Compare result, input gradient and parameter gradients of a classification case."""
    load(module, case.starting_with("param."), names)
    module.to(device, dtype).eval()
    x = case.tensors()["input.x"].to(device, dtype, copy=True)
    out = run(module, x, case.tensors()["input.loss_weight"].to(device, dtype))
    expected = case.tensors()["output64.y"]
    case.assert_output(out, expected)
    case.assert_output(fuse(module)(x), expected, "fused")
    gradients = case.starting_with("grad64.")
    case.assert_gradient(x.grad, gradients.pop("x"), "x")
    compare_gradients(case, module, gradients, names)


@pytest.mark.golden("classification.mea")
def test_mea_equals_the_original(golden_case, dtype, device):
    params = golden_case.starting_with("param.")
    channels = golden_case.arguments["dim"]
    num_slots, width = params["linear_0.weight"].shape
    expanded = params["trans_dims.weight"].shape[0]
    layer = MultiHeadExternalAttention(
        channels, num_slots, num_heads=expanded // width, expansion=expanded // channels
    )
    check_single_module(golden_case, layer, MULTI_HEAD_NAMES, dtype, device)


@pytest.mark.golden("classification.ea_token")
def test_token_attention_equals_the_original(golden_case, dtype, device):
    arguments = golden_case.arguments
    num_slots = golden_case.starting_with("param.")["linear_0.weight"].shape[0]
    layer = token_attention(arguments["dim"], arguments["in_dim"], num_slots)
    check_single_module(golden_case, layer, TOKEN_NAMES, dtype, device)


@pytest.mark.golden("classification.ea_token_block")
def test_token_block_equals_the_original(golden_case, dtype, device):
    arguments = golden_case.arguments
    num_slots = golden_case.starting_with("param.")["attn.linear_0.weight"].shape[0]
    block = TokenBlock(arguments["dim"], arguments["in_dim"], num_slots)
    check_single_module(golden_case, block, TOKEN_BLOCK_NAMES, dtype, device)


@pytest.mark.golden("classification.mhsa")
def test_self_attention_equals_the_original(golden_case, dtype, device):
    arguments = golden_case.arguments
    layer = SelfAttention(arguments["dim"], num_heads=arguments["num_heads"])
    check_single_module(golden_case, layer, SELF_ATTENTION_NAMES, dtype, device)
