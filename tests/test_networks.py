"""The raw networks."""

import pytest
import torch

from dmd_tutorial.checks import NO_CLASS
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.edm.networks import DhariwalUNet, SongUNet
from dmd_tutorial.networks import MLP, UNet


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a value, also those that start at zero."""
    rng = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    return network


@pytest.mark.parametrize("network", [UNet(width=8, embedding=16), MLP(classes=3)])
def test_an_untrained_denoiser_starts_as_c_skip_x(network):
    shape = (1, 8, 8) if isinstance(network, UNet) else (2,)
    x, sigma = torch.randn(4, *shape), torch.full((4,), 0.5)
    assert torch.allclose(EDMDenoiser(network)(x, sigma), x / 2)


def test_every_parameter_of_the_unet_matters():
    network = awake(UNet(width=8, embedding=16))
    label = torch.arange(10)
    network(torch.randn(10, 1, 8, 8), torch.linspace(-1, 1, 10), label).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_label_and_noise_level_change_the_answer():
    network = awake(UNet(width=8, embedding=16))
    x, level, label = torch.randn(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    answers = [network(x, level), network(x, level, label), network(x, level + 0.1, label),
               network(x, level, label + 1)]  # fmt: skip
    for one in range(4):
        for other in range(one):
            assert (answers[one] - answers[other]).abs().max() > 1e-4


@pytest.mark.parametrize("size", [8, 16, 32])
def test_unet_serves_other_sizes_and_colours(size):
    network = UNet(size=size, channels=3, classes=0, width=8, multipliers=(1, 2, 2), embedding=16)
    x = torch.randn(2, 3, size, size)
    assert network(x, torch.zeros(2)).shape == x.shape


def test_unet_refuses_a_size_that_cannot_be_halved():
    with pytest.raises(ValueError, match="size 6 cannot be halved 2 times"):
        UNet(size=6, multipliers=(1, 2, 2))


def test_samples_in_a_batch_do_not_see_each_other():
    network = awake(UNet(width=8, embedding=16))
    x, level, label = torch.randn(4, 1, 8, 8), torch.zeros(4), torch.arange(4)
    alone = torch.cat([network(x[k : k + 1], level[:1], label[k : k + 1]) for k in range(4)])
    assert torch.allclose(network(x, level, label), alone, rtol=1e-4, atol=1e-4)


def test_copies_are_independent_networks():
    network = awake(MLP(copies=3))
    x = torch.randn(6, 2, requires_grad=True)
    out = network(x, torch.zeros(6))
    out.reshape(3, 2, 2)[1].sum().backward()
    gradient = network.hidden[0].weight.grad
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2]].abs().max() == 0


def test_mlp_refuses_points_it_cannot_take():
    with pytest.raises(ValueError, match=r"\(3, 3\), the network wants \(batch, 2\)"):
        MLP()(torch.zeros(3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="batch 5, not a multiple of 2"):
        MLP(copies=2)(torch.zeros(5, 2), torch.zeros(5))


def test_class_input_of_the_mlp_is_used():
    network = awake(MLP(classes=2))
    x, level = torch.zeros(2, 2), torch.zeros(2)
    out = network(x, level, torch.tensor([0, 1]))
    assert (out[0] - out[1]).abs().max() > 1e-4


TOLD = {
    "MLP": lambda: MLP(2, hidden=16, classes=3),
    "UNet": lambda: UNet(width=8, classes=3, embedding=16),
    "SongUNet": lambda: SongUNet(8, 1, 1, 3, model_channels=16, channel_mult=[1], num_blocks=1),
    "DhariwalUNet": lambda: DhariwalUNet(
        8, 1, 1, 3, model_channels=16, channel_mult=[1], num_blocks=1
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_hidden_class_is_no_class(name):
    """`NO_CLASS` beside other labels gives that sample the answer of no label at all."""
    torch.manual_seed(0)
    network = TOLD[name]().eval()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(3, 2) if name == "MLP" else torch.randn(3, 1, 8, 8)
    c_noise, label = torch.zeros(3), torch.tensor([1, NO_CLASS, 2])
    mixed, told, untold = (network(x, c_noise, some) for some in (label, label.abs(), None))
    assert torch.allclose(mixed[1], untold[1], rtol=1e-5)
    assert torch.allclose(mixed[::2], told[::2], rtol=1e-5)
    assert not torch.allclose(told[1], untold[1], rtol=1e-3)


@pytest.mark.parametrize("name", ["MLP", "UNet"])
def test_a_network_of_classes_refuses_other_conditions(name):
    network = TOLD[name]()
    x = torch.randn(2, 2) if name == "MLP" else torch.randn(2, 1, 8, 8)
    for words in (torch.randn(2, 4, 8), torch.randn(2)):
        with pytest.raises(ValueError, match=r"label (has shape \(2, 4, 8\)|must hold whole)"):
            network(x, torch.zeros(2), words)
