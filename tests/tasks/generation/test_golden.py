"""Blocks, networks, losses and metrics equal those of PyTorch-StudioGAN and the formulas."""

import numpy as np
import pytest
import torch

from eanet.tasks.generation.attention import GatedExternalAttention2d, GatedSelfAttention2d
from eanet.tasks.generation.conditional_norm import ConditionalBatchNorm2d
from eanet.tasks.generation.critics import (
    ConvCriticBlock,
    CriticBlock,
    CriticInputBlock,
    ResNetCritic,
)
from eanet.tasks.generation.generators import ConvGeneratorBlock, GeneratorBlock, ResNetGenerator
from eanet.tasks.generation.inception import FidInception, inception_of, prepare_images
from eanet.tasks.generation.losses import critic_loss, generator_loss, gradient_penalty
from eanet.tasks.generation.metrics import FeatureStatistics, frechet_distance, inception_score
from eanet.tasks.generation.studiogan_keys import from_studiogan, studiogan_keys

LOSS_NAMES = {
    "hinge": "hinge",
    "least_square": "least_squares",
    "vanilla_standard": "vanilla",
    "vanilla_studiogan": "vanilla_studiogan",
    "wasserstein": "wasserstein",
}


def _network_arguments(given):
    classes = given["num_classes"] if given.get("conditional_strategy") == "ProjGAN" else None
    return {
        "image_size": given["img_size"],
        "num_classes": classes,
        "spectral_norm": given["spectral_norm"],
        "attention": "self" if given["attention"] else "none",
    }


def _block_arguments(given):
    arguments = {"spectral_norm": given["spectral_norm"]}
    if "downsample" in given:
        arguments["downsample"] = given["downsample"]
    if given.get("conditional_bn"):
        arguments["num_classes"] = given["num_classes"]
    return arguments


BLOCKS = {
    "self_attention": GatedSelfAttention2d,
    "gen_block": GeneratorBlock,
    "dcgan_gen_block": ConvGeneratorBlock,
    "dcgan_disc_block": ConvCriticBlock,
    "disc_opt_block": CriticInputBlock,
    "disc_block_down": CriticBlock,
    "disc_block_same": CriticBlock,
    "disc_block_widen": CriticBlock,
}


def build(case):
    """Build our network of the original's constructor arguments."""
    given = case.arguments
    kind = case.kind.partition(".")[2]
    if kind in BLOCKS:
        sizes = [given[key] for key in ("in_channels", "out_channels") if key in given]
        return BLOCKS[kind](*sizes, **_block_arguments(given))
    if kind == "cond_batchnorm":
        return ConditionalBatchNorm2d(
            given["num_features"], given["num_classes"], spectral_norm=given["spectral_norm"]
        )
    arguments = _network_arguments(given)
    place = "attention_after_gen_block" if kind == "generator" else "attention_after_dis_block"
    if given["attention"]:
        arguments["attention_after"] = given[place]
    if kind == "generator":
        return ResNetGenerator(latent_size=given["z_dim"], width=given["g_conv_dim"], **arguments)
    return ResNetCritic(width=given["d_conv_dim"], **arguments)


def load(case, dtype):
    """Return our network with the case's weights and the original's names of them."""
    network = build(case)
    network.load_state_dict(from_studiogan(network, case.tensors("weights")), strict=True)
    return network.to(dtype), studiogan_keys(network)


def inputs_of(io, dtype):
    """Return the input to differentiate and the labels, if any."""
    (name,) = [key for key in ("in.x", "in.z") if key in io]
    labels = next((io[key] for key in ("in.y", "in.label") if key in io), None)
    return name, io[name].to(dtype, copy=True), labels


def run(network, x, labels):
    return network(x) if labels is None or _takes_one(network) else network(x, labels)


def _takes_one(network):
    return isinstance(network, GatedSelfAttention2d | CriticBlock | CriticInputBlock)


class Signs:
    """Remembers on which side of 0 the inputs of all rectifiers were."""

    def __init__(self, monkeypatch):
        self.seen = []
        relu = torch.nn.functional.relu

        def recorded(x, *args, **kwargs):
            self.seen.append((x > 0).detach())
            return relu(x, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "relu", recorded)

    def take(self):
        seen, self.seen = self.seen, []
        return seen


def assert_gradient(case, actual, expected, what):
    """Compare value by value in float64; in float32 the whole gradient, since sums cancel."""
    assert actual is not None, what
    actual = actual.reshape(expected.shape)
    if actual.dtype == torch.float64:
        case.assert_gradient(actual, expected, what)
        return
    error = (actual.double() - expected).norm()
    tolerance = case.gradient_tolerance(actual.dtype, expected)
    assert (
        error
        <= tolerance["rtol"] * expected.norm()
        + tolerance["atol"] * error.new_tensor(expected.numel()).sqrt()
    ), f"{case.name}, {what}: {error} beside {expected.norm()}"


def flipped(case, mode, signs):
    """Tell whether rounding moved a rectifier's input across 0, where the gradient jumps."""
    found = signs.take()
    network, _ = load(case, torch.float64)
    _, x, labels = inputs_of(case.tensors("io"), torch.float64)
    run(network.train(mode == "train"), x, labels)
    exact = signs.take()
    return any(not torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def assert_gradients(case, io, mode, network, keys, x, input_name):
    assert_gradient(case, x.grad, io[f"grad.{mode}.{input_name}"], f"{mode} gradient of input")
    compared = 0
    for key, parameter in network.named_parameters():
        expected = io.get(f"grad.{mode}.w.{keys[key]}")
        if expected is not None:
            assert_gradient(case, parameter.grad, expected, f"{mode} gradient of {key}")
            compared += 1
        norm = io.get(f"gradnorm.{mode}.w.{keys[key]}")
        if norm is not None:
            assert_gradient(case, parameter.grad.norm()[None], norm, f"{mode} norm of {key}")
            compared += 1
    assert mode == "eval" or compared == len(list(network.parameters()))


@pytest.mark.golden(
    "generation.self_attention",
    "generation.cond_batchnorm",
    "generation.gen_block",
    "generation.dcgan_gen_block",
    "generation.dcgan_disc_block",
    "generation.disc_opt_block",
    "generation.disc_block_down",
    "generation.disc_block_same",
    "generation.disc_block_widen",
    "generation.generator",
    "generation.discriminator",
)
def test_network_equals_original_in_both_modes(golden_case, dtype, monkeypatch):
    io, signs = golden_case.tensors("io"), Signs(monkeypatch)
    for mode in ("eval", "train"):
        network, keys = load(golden_case, dtype)
        network.train(mode == "train")
        name, x, labels = inputs_of(io, dtype)
        x.requires_grad_()
        out = run(network, x, labels)
        golden_case.assert_output(out, io[f"{mode}.out"], mode)
        (out * io["in.cotangent"].to(dtype)).sum().backward()
        if f"grad.{mode}.{name}" in io and not flipped(golden_case, mode, signs):
            assert_gradients(golden_case, io, mode, network, keys, x, name)
    # the network has run once in training mode
    for number in ("", "2", "3"):
        if number and f"train{number}.out" not in io:
            continue
        if number:
            out = run(network, x, labels)
            golden_case.assert_output(out, io[f"train{number}.out"], f"train {number}")
        buffers = {keys[key]: value for key, value in network.named_buffers()}
        states = {
            key.partition(".")[2]: value
            for key, value in io.items()
            if key.startswith(f"train{number}_state.")
        }
        assert set(buffers) == set(states)
        for key, expected in states.items():
            golden_case.assert_output(buffers[key].to(dtype), expected, f"buffer {key}")


@pytest.mark.golden("generation.disc_block_down", "generation.disc_block_same")
def test_shortcut_of_the_textbook_differs_from_the_original(golden_case):
    """A negative control of the trap: the reference rectifies the shortcut's input too."""
    if not golden_case.arguments["spectral_norm"]:
        pytest.skip("with batch norm both are the same")
    network, _ = load(golden_case, torch.float64)
    io = golden_case.tensors("io")
    network.shortcut_relu = False
    assert (network.eval()(io["in.x"]) - io["eval.out"]).abs().max() > 1e-2


@pytest.mark.golden("generation.ea_attention")
def test_external_attention_equals_formula(golden_case, dtype):
    io, weights = golden_case.tensors("io"), golden_case.tensors("weights")
    x = io["in.x"].to(dtype)
    layer = GatedExternalAttention2d(
        x.shape[1],
        golden_case.meta["memory_units"],
        inner_channels=golden_case.meta["inner_channels"],
        eps=golden_case.meta["eps"],
        spectral_norm=False,
    ).to(dtype)
    with torch.no_grad():
        layer.query.weight.copy_(weights["in_weight"][:, :, None, None])
        layer.projection.weight.copy_(weights["out_weight"][:, :, None, None])
        layer.memory_key.copy_(weights["memory_key"])
        layer.memory_value.copy_(weights["memory_value"])
        layer.gamma.fill_(golden_case.meta["gamma"])
    golden_case.assert_output(layer(x), io["out"])
    golden_case.assert_output(layer.attention_map(x).flatten(2), io["attention"], "attention")
    branch = (layer(x) - x) / golden_case.meta["gamma"]
    if dtype == torch.float64:
        golden_case.assert_output(branch, io["branch"], "branch")


@pytest.mark.golden("generation.losses")
def test_losses_equal_originals(golden_case, dtype):
    io = golden_case.tensors("io")
    names = {key.partition(".")[0] for key in io} - {"in"}
    for name in sorted(names):
        loss = LOSS_NAMES[name]
        for side in ("d", "g"):
            real = io["in.real"].to(dtype, copy=True).requires_grad_()
            fake = io["in.fake"].to(dtype, copy=True).requires_grad_()
            if side == "d":
                value = sum(critic_loss(loss, real, fake).values())
            else:
                value = generator_loss(loss, fake)
            golden_case.assert_output(value[None], io[f"{name}.{side}"], f"{name} {side}")
            value.backward()
            for key, scores in (("grad_real", real), ("grad_fake", fake)):
                if f"{name}.{side}.{key}" in io:
                    expected = io[f"{name}.{side}.{key}"]
                    golden_case.assert_gradient(scores.grad, expected, f"{name} {side} {key}")


@pytest.mark.golden("generation.gradient_penalty")
def test_gradient_penalty_equals_original(golden_case, dtype):
    io = golden_case.tensors("io")
    network, keys = load(golden_case, dtype)
    network.train()
    penalty = gradient_penalty(
        network,
        io["in.real"].to(dtype),
        io["in.fake"].to(dtype),
        alpha=io["in.alpha"].flatten().to(dtype),
    )
    golden_case.assert_output(penalty[None], io["gp"])
    penalty.backward()
    expected = {key: value for key, value in io.items() if key.startswith("grad.w.")}
    pairs = []
    for key, parameter in network.named_parameters():
        wanted = expected.get(f"grad.w.{keys[key]}")
        if wanted is None:  # the bias of the last layer does not move the gradient
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-6
            continue
        pairs.append((parameter.grad.flatten(), wanted.flatten()))
        if dtype == torch.float64:
            golden_case.assert_gradient(parameter.grad, wanted, key)
    # biases in front of a batch norm have gradients of exactly 0, in float32 of what rounding
    # leaves of their sums: there the gradient counts as a whole
    actual, wanted = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert len(pairs) == len(expected)
    assert_gradient(golden_case, actual, wanted, "all parameters")


@pytest.mark.golden("generation.metric_frechet")
def test_frechet_distance_equals_original(golden_case):
    io = golden_case.tensors("io")
    names = {key.partition(".")[0] for key in io} - {"in"}
    for name in names:
        real, fake = (io[f"in.{name}.{part}_features"] for part in ("real", "fake"))
        value = frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(fake))
        assert value == pytest.approx(float(io[f"{name}.fid_symmetric_eig"]), rel=1e-6)
        full_rank = min(len(real), len(fake)) > real.shape[1]
        assert value == pytest.approx(float(io[f"{name}.fid"]), rel=1e-6 if full_rank else 1e-2)
        parts = FeatureStatistics.of(real[:5]) + FeatureStatistics.of(real[5:])
        again = frechet_distance(parts, FeatureStatistics.of(fake))
        assert again == pytest.approx(value, rel=1e-7)


@pytest.mark.golden("generation.metric_inception_score")
def test_inception_score_equals_original(golden_case):
    io = golden_case.tensors("io")
    for splits in sorted({key.partition(".")[0] for key in io if key.startswith("splits")}):
        mean, spread = inception_score(
            io["in.logits"], num_splits=int(splits.removeprefix("splits"))
        )
        assert mean == pytest.approx(float(io[f"{splits}.mean"]), rel=1e-6)
        assert spread == pytest.approx(float(io[f"{splits}.std"]), rel=1e-6, nan_ok=True)


def formula_weights():
    """Return weights of the network by the rule of the reference case: an integer hash."""
    state = FidInception().state_dict()
    keys = sorted(key for key in state if not key.endswith("num_batches_tracked"))
    weights = {}
    for place, key in enumerate(keys):
        shape = state[key].shape
        index = np.arange(1, state[key].numel() + 1, dtype=np.uint64)
        with np.errstate(over="ignore"):
            s = index * np.uint64(0x9E3779B97F4A7C15)
            s = s + np.uint64(place + 1) * np.uint64(0xBF58476D1CE4E5B9)
            s = (s ^ (s >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            s = (s ^ (s >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            s = s ^ (s >> np.uint64(31))
        r = (s >> np.uint64(11)).astype(np.float64) * 2.0**-53
        if key.endswith("conv.weight"):
            values = (2 * r - 1) * np.sqrt(6 / np.prod(shape[1:]))
        elif key == "fc.weight":
            values = (2 * r - 1) * 3 * np.sqrt(3 / 2048)
        elif key.endswith("running_var"):
            values = 0.6 + 0.8 * r
        elif key.endswith("bn.weight"):
            values = 0.8 + 0.4 * r
        else:
            values = (2 * r - 1) * 0.1
        weights[key] = torch.from_numpy(values.astype(np.float32)).reshape(shape)
    return weights


@pytest.mark.golden("generation.inception_v3_formula")
def test_inception_equals_original(golden_case):
    io = golden_case.tensors("io")
    weights = formula_weights()
    assert len(weights) == golden_case.meta["n_keys"]
    network = inception_of(weights, source="formula")
    preparations = {"studiogan": "float", "torch_fidelity": "bytes"}
    for key, expected in io.items():
        protocol, _, rest = key.partition(".")
        if protocol == "in" or not rest.endswith("pool3"):
            continue
        name = rest.partition(".")[0]
        images = io[f"in.{name}_u8"].float() / 255 * 2 - 1
        with torch.no_grad():
            features, logits = network(prepare_images(images, preparations[protocol]))
        torch.testing.assert_close(
            features.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().mean().item()
        )
        expected_logits = io[f"{protocol}.{name}.logits"]
        scale = 1e-3 * expected_logits.abs().mean().item()
        torch.testing.assert_close(logits.double(), expected_logits, rtol=1e-3, atol=scale)
        unbiased = io.get(f"{protocol}.{name}.logits_unbiased")
        if unbiased is not None:
            without = logits - network.fc.bias
            torch.testing.assert_close(without.double(), unbiased, rtol=1e-3, atol=scale)
