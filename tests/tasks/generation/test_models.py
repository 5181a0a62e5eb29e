"""Networks by name: exact sizes, spectral norm, attention, copies and files."""

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import parametrizations

from eanet import registry
from eanet.hub import from_pretrained, save_pretrained
from eanet.nn.capture import capture_attention
from eanet.nn.fusion import fuse
from eanet.tasks.generation.adversarial_pair import AdversarialPair
from eanet.tasks.generation.attention import GatedExternalAttention2d, GatedSelfAttention2d
from eanet.tasks.generation.losses import gradient_penalty
from eanet.tasks.generation.spectral_norm import Conv2d, Embedding, Linear, SpectralNorm
from eanet.tasks.generation.studiogan_keys import from_studiogan, studiogan_keys

NAMES = [name for name, entry in registry.models().items() if entry.task == "generation"]
TINY = [name for name in NAMES if name.endswith("_tiny")]

#: generator and critic; of SAGAN and its neighbors as in PyTorch-StudioGAN
EXACT = {
    "dcgan_32": (3_812_355, 2_931_009),
    "resgan_32": (4_276_739, 1_055_879),
    "projgan_32": (4_304_387, 1_057_159),
    "sagan_32": (4_386_308, 1_075_586),
    "eagan_32": (4_386_308, 1_075_586 + 24_576 - 20_480),
    "resgan_64": (12_220_675, 19_550_535),
    "projgan_64": (13_366_915, 19_755_335),
    "sagan_64": (13_387_396, 19_752_642),
    "eagan_64": (13_387_396 + 24_576 - 20_480, 19_752_642 + 8_192 - 5_120),
}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def tiny(name="eagan_tiny", **arguments):
    return registry.create_model(name, **({"num_classes": 4, "in_channels": 1} | arguments))


def latents_and_labels(model, number=3):
    return torch.randn(number, model.latent_size), torch.arange(number) % 4


def test_every_full_size_network_is_counted():
    assert set(NAMES) == set(EXACT) | set(TINY)


@pytest.mark.parametrize("name", EXACT)
def test_parameter_counts_are_exact(name):
    with torch.device("meta"):
        model = registry.create_model(name)
        size = model.image_size
        images = model(torch.randn(2, 128), torch.zeros(2, dtype=torch.long))
        scores = model.critic(images, torch.zeros(2, dtype=torch.long))
    assert (count(model.generator), count(model.critic)) == EXACT[name]
    assert images.shape == (2, 3, size, size)
    assert scores.shape == (2,)
    assert model.config == {"name": name, "arguments": {}}


@pytest.mark.parametrize(("channels", "slots"), [(256, 64), (128, 32), (64, 16)])
def test_external_attention_with_a_quarter_of_the_slots_is_as_large_as_self_attention(
    channels, slots
):
    external = GatedExternalAttention2d(channels, slots)
    assert count(external) == count(GatedSelfAttention2d(channels))


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_finite_gradient(name):
    model = tiny(name).train()
    for module in model.modules():
        if hasattr(module, "gamma"):
            nn.init.constant_(module.gamma, 0.5)
    latents, labels = latents_and_labels(model, 4)
    model.critic(model(latents, labels), labels).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


# spectral norm


def test_spectral_norm_converges_to_the_largest_singular_value():
    weight = torch.randn(6, 4, 3, dtype=torch.float64)
    norm = SpectralNorm(weight).double()
    for _ in range(300):
        norm.iterate(weight)
    expected = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
    torch.testing.assert_close(weight / norm(weight), torch.full_like(weight, float(expected)))


def test_order_of_the_iteration_is_not_that_of_pytorch():
    """A negative control: u and v in the other order give another sigma after one pass."""
    layer, theirs = Linear(5, 4, spectral_norm=True), nn.Linear(5, 4)
    nn.init.normal_(layer.weight)
    theirs.load_state_dict({"weight": layer.weight.data, "bias": layer.bias.data})
    theirs = parametrizations.spectral_norm(theirs, n_power_iterations=1, eps=1e-6)
    with torch.no_grad():
        theirs.parametrizations.weight[0]._u.copy_(layer.spectral_norm.u)
        theirs.parametrizations.weight[0]._v.copy_(layer.spectral_norm.v)
    x = torch.randn(2, 5)
    assert (layer.train()(x) - theirs.train()(x)).abs().max() > 1e-3


def test_only_a_forward_pass_in_training_mode_moves_the_vectors():
    layer = Conv2d(3, 4, 3, spectral_norm=True)
    nn.init.normal_(layer.weight)
    before = layer.spectral_norm.u.clone()
    _ = layer.weight, copy.deepcopy(layer), save(layer.state_dict())
    layer.eval()(torch.randn(1, 3, 5, 5))
    assert torch.equal(layer.spectral_norm.u, before)
    layer.train()(torch.randn(1, 3, 5, 5))
    assert not torch.equal(layer.spectral_norm.u, before)


def test_a_later_pass_does_not_disturb_the_gradient_of_an_earlier_one():
    layer = Embedding(4, 3, spectral_norm=True).double()
    nn.init.normal_(layer.weight)
    first = layer(torch.arange(4))
    expected = torch.autograd.grad(first.square().sum(), layer.weight, retain_graph=True)[0]
    layer(torch.arange(4))
    again = torch.autograd.grad(first.square().sum(), layer.weight)[0]
    assert torch.equal(expected, again)


@pytest.mark.parametrize("name", TINY)
def test_state_survives_copies_and_files(name, tmp_path):
    model, other = tiny(name).train(), tiny(name)
    latents, labels = latents_and_labels(model)
    model.critic(model(latents, labels), labels)  # moves statistics and vectors
    model.eval()
    expected = model(latents, labels)
    assert not torch.equal(other.eval()(latents, labels), expected)
    other.load_state_dict(load(save(model.state_dict())), strict=True)
    assert torch.equal(other(latents, labels), expected)
    assert torch.equal(copy.deepcopy(model)(latents, labels), expected)
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(from_pretrained(tmp_path / "saved")(latents, labels), expected)


@pytest.mark.parametrize("name", ["sagan_tiny", "resgan_tiny"])
def test_weights_of_studiogan_go_in_and_out(name):
    model = tiny(name)
    for network in (model.generator, model.critic):
        keys = studiogan_keys(network)
        theirs = {f"module.{keys[key]}": value for key, value in network.state_dict().items()}
        assert len(theirs) == len(network.state_dict())
        other = copy.deepcopy(network)
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        other.load_state_dict(from_studiogan(other, theirs))
        assert all(
            torch.equal(value, other.state_dict()[key])
            for key, value in network.state_dict().items()
        )
        theirs.popitem()
        with pytest.raises(ValueError, match="missing"):
            from_studiogan(other, theirs)
    with pytest.raises(ValueError, match="external"):
        studiogan_keys(tiny("eagan_tiny").generator)


# attention


@pytest.mark.parametrize("name", ["eagan_tiny", "sagan_tiny"])
def test_at_gamma_0_the_network_is_the_one_without_attention(name):
    model = tiny(name).eval()
    without = AdversarialPair(
        4, 1, image_size=16, latent_size=32, generator_width=8, critic_width=16,
        spectral_norm=True,
    ).eval()  # fmt: skip
    state = without.state_dict()
    without.load_state_dict({key: model.state_dict()[key] for key in state})
    latents, labels = latents_and_labels(model)
    images = model(latents, labels)
    assert torch.equal(images, without(latents, labels))
    assert torch.equal(model.critic(images, labels), without.critic(images, labels))


def test_external_attention_does_not_depend_on_other_samples_and_takes_odd_sizes():
    layer = GatedExternalAttention2d(8, 5).double().eval()
    nn.init.ones_(layer.gamma)
    x = torch.randn(4, 8, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="even"):
        GatedSelfAttention2d(8)(torch.randn(1, 8, 5, 4))


def test_branches_are_alive_at_the_start():
    """As measured for the design: M_v with spectral norm and no gain would be nearly dead."""
    x = torch.randn(2, 128, 16, 16)

    def rms(**arguments):
        layer = GatedExternalAttention2d(128, 64, **arguments).eval()
        nn.init.ones_(layer.gamma)
        for norm, weight in layer._normalized():
            for _ in range(50):
                norm.iterate(weight)
        with torch.no_grad():
            return float((layer(x) - x).square().mean().sqrt())

    assert 0.05 < rms() < 0.3
    assert rms(value_spectral_norm=True) > 0.05
    layer = GatedExternalAttention2d(128, 64, value_spectral_norm=True).eval()
    with torch.no_grad():
        for _ in range(50):
            layer.value_norm.iterate(layer.values)
        value = layer.value_norm(layer.values)
    assert float(value.square().mean().sqrt()) < 0.1  # without the gain


def test_attention_maps_are_captured_and_change_nothing():
    model = tiny("eagan_tiny").train()
    latents, labels = latents_and_labels(model)
    layer = model.generator.attentions["1"]
    before = layer.key_norm.u.clone()
    layer.attention_map(torch.randn(2, 32, 8, 8))
    assert torch.equal(layer.key_norm.u, before)
    for _ in range(20):  # until the running statistics are those of the features
        model(latents, labels)
    with capture_attention(model.generator.eval()) as maps:
        model(latents, labels)
    assert maps["attentions.1"].shape == (3, 16, 8, 8)
    torch.testing.assert_close(maps["attentions.1"].sum(1), torch.ones(3, 8, 8))


def test_folded_generator_draws_the_same():
    model = tiny("eagan_tiny").eval()
    nn.init.constant_(model.generator.attentions["1"].gamma, 0.7)
    latents, labels = latents_and_labels(model)
    folded = fuse(model)
    torch.testing.assert_close(folded(latents, labels), model(latents, labels))


def test_second_derivatives_pass_through_external_attention():
    model = tiny("eagan_tiny").double().train()
    nn.init.constant_(model.critic.attentions["1"].gamma, 0.5)
    model.critic.eval()  # the vectors of the norms must not move between evaluations
    real, fake = torch.randn(2, 2, 1, 16, 16, dtype=torch.float64)
    labels, alpha = torch.tensor([0, 1]), torch.tensor([0.3, 0.6], dtype=torch.float64)
    weight = model.critic.attentions["1"].memory_key

    def penalty():
        return gradient_penalty(model.critic, real, fake, labels, alpha=alpha)

    (gradient,) = torch.autograd.grad(penalty(), weight)
    step = torch.zeros_like(weight)
    step[1, 2] = 1e-6
    with torch.no_grad():
        weight.add_(step)
        up = penalty_value(penalty)
        weight.sub_(2 * step)
        down = penalty_value(penalty)
    assert float(gradient.detach()[1, 2]) == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-9)


def penalty_value(penalty):
    with torch.enable_grad():
        return float(penalty().detach())


def test_networks_go_through_the_compiler_as_one_graph(without_shape_checks):
    critic = tiny("eagan_tiny").critic.eval()
    images, labels = torch.randn(2, 1, 16, 16), torch.arange(2)
    compiled = torch.compile(critic, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, labels), critic(images, labels))


# drawing


def test_images_are_a_function_of_the_seed_and_leave_the_network_as_it_was():
    model = tiny("eagan_tiny").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for statistics in ("running", "batch", "standing"):
        first = model.generate(6, seed=1, norm_statistics=statistics)
        assert torch.equal(first, model.generate(6, seed=1, norm_statistics=statistics))
        assert not torch.equal(first, model.generate(6, seed=2, norm_statistics=statistics))
        assert first.shape == (6, 1, 16, 16)
        assert first.abs().max() <= 1
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.generator.training
    assert all(module.training for module in model.modules())


def test_statistics_of_the_batch_are_those_of_training_mode():
    model = tiny("resgan_tiny")
    expected = copy.deepcopy(model).train().generate
    drawn = model.generate(8, seed=3, norm_statistics="batch", batch_size=8)
    latents = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        reference = copy.deepcopy(model).train()(latents, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(drawn, reference)
    assert expected(0).shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"image_size": 48}, "image_size"),
        ({"architecture": "conv", "image_size": 32}, "unconditional"),
        ({"attention": "much"}, "attention"),
        ({"attention": "external", "generator_attention_after": 9}, "attention_after"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_refused_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        AdversarialPair(**arguments)
    with pytest.raises(ValueError, match="labels"):
        tiny("eagan_tiny").generate(2, [0, 7])
