"""Preconditioning, conversions and the denoising loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmd_tutorial import pretrained
from dmd_tutorial.adapters import Adapted, exploding
from dmd_tutorial.data import two_modes
from dmd_tutorial.denoisers import (
    EDMDenoiser,
    denoised_from_noise,
    denoised_from_score,
    denoised_from_v,
    denoising_loss,
    denoising_weight,
    edm_preconditioning,
    noise_from_denoised,
    score_from_denoised,
    v_from_denoised,
    zero_score,
)
from dmd_tutorial.edm.networks import DhariwalUNet, SongUNet
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.noise import add_noise


class Recorder(nn.Module):
    """A raw network that remembers its input and answers with what it is told."""

    classes = 0

    def __init__(self, answer: float = 0.0) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise, label=None):
        self.x, self.c_noise = x, c_noise
        return torch.full_like(x, self.answer)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
def test_network_sees_and_must_answer_with_unit_variance(sigma):
    """EDM's first two requirements, measured on Gaussian data."""
    rng = torch.Generator().manual_seed(0)
    x, noise = 0.5 * torch.randn(100_000, 1, generator=rng), torch.randn(100_000, 1, generator=rng)
    level = torch.full((100_000,), sigma)
    noisy, recorder = add_noise(x, level, noise), Recorder()
    EDMDenoiser(recorder)(noisy, level)
    assert recorder.x.var().item() == pytest.approx(1, rel=0.02)
    c_skip, c_out, _, _ = edm_preconditioning(level[:1].double())
    target = (x - c_skip.item() * noisy) / c_out.item()
    assert target.double().var().item() == pytest.approx(1, rel=0.02)


def test_c_skip_makes_the_network_s_errors_count_least():
    """EDM's third requirement: no other c_skip gives a smaller c_out."""
    sigma = torch.tensor([0.05, 0.5, 5.0], dtype=torch.float64)
    c_skip, c_out, _, _ = edm_preconditioning(sigma)

    def needed(skip):  # c_out that a unit-variance target demands for this c_skip
        return ((1 - skip) ** 2 * 0.25 + skip**2 * sigma**2).sqrt()

    assert torch.allclose(needed(c_skip), c_out)
    for other in (c_skip - 0.01, c_skip + 0.01):
        assert (needed(other) > c_out).all()


def test_network_gets_a_quarter_of_the_logarithm_of_sigma():
    recorder = Recorder()
    EDMDenoiser(recorder)(torch.zeros(2, 1), torch.tensor([1.0, math.e]))
    assert recorder.c_noise.tolist() == pytest.approx([0, 0.25])


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: pretrained.load("digits-teacher").network, (1, 8, 8)),
        (lambda: MLP(hidden=16), (2,)),
        (lambda: SongUNet(8, 1, 1, model_channels=16, embedding_type="fourier"), (1, 8, 8)),
        (lambda: DhariwalUNet(8, 1, 1, model_channels=16, channel_mult=[1, 2]), (1, 8, 8)),
    ],
    ids=["unet", "mlp", "song", "dhariwal"],
)
def test_an_autocast_around_a_denoiser_is_that_of_its_network_alone(network, shape):
    torch.manual_seed(0)
    denoiser, sigma = (
        EDMDenoiser(network()).eval(),
        torch.logspace(math.log10(0.002), math.log10(80), 32),
    )
    for parameter in denoiser.parameters():
        if not parameter.any():  # as it starts
            nn.init.normal_(parameter, std=0.1)
    x = sigma.reshape(-1, *[1] * len(shape)) * torch.randn(32, *shape)
    inputs, answers = [], []
    denoiser.network.register_forward_pre_hook(lambda _, args: inputs.append(args[:2]))
    denoiser.network.register_forward_hook(lambda *args: answers.append(args[2]))
    exact = denoiser(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        D = denoiser(x, sigma)
    denoiser.precision = torch.bfloat16
    assert torch.equal(D, denoiser(x, sigma))  # to the bit, as if it were the denoiser's own
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(D, denoiser(x, sigma))  # its own comes first
    assert (D.dtype, answers[1].dtype) == (torch.float32, torch.bfloat16)
    for before, here in zip(*inputs[:2], strict=True):
        assert torch.equal(before, here)  # c_in x and c_noise
    c_skip, c_out, _, _ = (c.reshape(-1, *[1] * len(shape)) for c in edm_preconditioning(sigma))
    assert torch.equal(D, c_skip * x + c_out * answers[1].float())
    assert 0 < (D - exact).norm() < 0.02 * exact.norm()  # a trained network's are 0.003


@pytest.mark.parametrize("wrap", [EDMDenoiser, lambda net: Adapted(net, exploding(), "noise")])
def test_under_one_autocast_a_network_is_always_that_of_its_present_weights(wrap):
    """Torch keeps weights that it has cast until the outermost autocast ends."""
    denoiser, x = wrap(MLP(hidden=16)), torch.randn(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            before = denoiser(x, torch.ones(4))
        denoiser(x, torch.ones(4)).sum().backward()
        assert all(parameter.grad is not None for parameter in denoiser.parameters())
        with torch.no_grad():
            denoiser.network.out.bias += 1
        assert not torch.equal(before, denoiser(x, torch.ones(4)))


def test_denoiser_combines_input_and_answer():
    x, sigma = torch.tensor([[2.0]]), torch.tensor([0.5])
    answer = EDMDenoiser(Recorder(answer=3.0))(x, sigma)
    assert answer.item() == pytest.approx(0.5 * 2 + 0.25 / math.sqrt(0.5) * 3)


@pytest.mark.parametrize("sigma_data", [0.5, 1.4])
def test_loss_of_an_untrained_network_is_one_at_every_level(sigma_data):
    """With the data's own spread: a fixed 0.5 gives 1.0 to 8.2 where it is 1.4."""
    x = sigma_data * torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for sigma in (0.01, 0.3, 10.0):
        level = torch.full((len(x),), sigma)
        loss = denoising_loss(EDMDenoiser(Recorder(), sigma_data), x, level, noise)
        assert loss.item() == pytest.approx(1, rel=0.03)


def test_weight_is_one_over_c_out_squared():
    sigma = torch.logspace(-3, 2, 20, dtype=torch.float64)
    _, c_out, _, _ = edm_preconditioning(sigma)
    assert torch.allclose(denoising_weight(sigma), c_out**-2)


def test_exact_denoiser_has_the_smallest_loss():
    mixture, rng = two_modes(), torch.Generator().manual_seed(0)
    x = mixture.sample(20_000, rng=rng)
    sigma, noise = torch.full((20_000,), 1.0), torch.randn(x.shape, generator=rng)
    best = denoising_loss(mixture, x, sigma, noise)
    for factor in (0.95, 1.05):
        worse = denoising_loss(lambda x, s, y, f=factor: f * mixture(x, s), x, sigma, noise)
        assert worse > best


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from([(1,), (2,), (1, 8, 8), (3, 4, 4)]),
    batch=st.integers(1, 4),
    sigma=st.floats(0.002, 80),
    seed=st.integers(0, 99),
)
def test_conversions_undo_each_other(shape, batch, sigma, seed):
    rng = torch.Generator().manual_seed(seed)
    x, denoised = torch.randn(2, batch, *shape, generator=rng, dtype=torch.float64)
    level = torch.full((batch,), sigma, dtype=torch.float64)
    pairs = [
        (score_from_denoised, denoised_from_score),
        (noise_from_denoised, denoised_from_noise),
        (v_from_denoised, denoised_from_v),
    ]
    for there, back in pairs:
        again = back(x, there(x, denoised, level), level)
        assert torch.allclose(again, denoised, rtol=1e-9, atol=1e-9)


def test_v_is_the_one_of_the_variance_preserving_form():
    clean, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.3, 1.0, 4.0, 80.0], dtype=torch.float64)
    angle = torch.atan(sigma)[:, None]  # alpha = cos, sigma_vp = sin
    v = angle.cos() * noise - angle.sin() * clean
    assert torch.allclose(v_from_denoised(clean + sigma[:, None] * noise, clean, sigma), v)


def test_zero_score_is_zero():
    x, sigma = torch.randn(3, 2), torch.rand(3) + 0.1
    assert (score_from_denoised(x, zero_score(x, sigma), sigma) == 0).all()


def test_generator_starts_exactly_at_sigma_max():
    recorder = Recorder()
    z = torch.randn(3, 2)
    OneStepGenerator(EDMDenoiser(recorder))(z)
    assert recorder.c_noise.tolist() == pytest.approx([math.log(80) / 4] * 3)
    assert torch.allclose(recorder.x, 80 * z / math.sqrt(80**2 + 0.25))


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    sigma=st.sampled_from([0.002, 0.5, 80.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    channels_last=st.booleans(),
    labelled=st.booleans(),
)
def test_unet_denoiser_keeps_shape_type_and_finiteness(
    batch, sigma, dtype, channels_last, labelled
):
    denoiser = EDMDenoiser(UNet(width=8, embedding=16)).to(dtype)
    x = torch.randn(batch, 1, 8, 8, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    label = torch.arange(batch) if labelled else None
    denoised = denoiser(x, torch.full((batch,), sigma, dtype=dtype), label)
    assert denoised.shape == x.shape
    assert denoised.dtype == dtype
    assert denoised.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_of_x_comes_back_and_the_arithmetic_is_that_of_the_weights(dtype):
    torch.manual_seed(0)
    denoiser = EDMDenoiser(MLP(hidden=16))
    nn.init.normal_(denoiser.network.out.weight)
    x, sigma = torch.randn(4, 2).to(dtype), torch.tensor([0.002, 0.5, 5.0, 80.0]).to(dtype)
    denoised = denoiser(x, sigma)
    assert denoised.dtype == dtype
    assert torch.equal(denoised, denoiser(x.float(), sigma.float()).to(dtype))


@pytest.mark.parametrize(
    ("x", "sigma", "label", "message"),
    [
        (torch.zeros(4, 1, 8, 8), torch.ones(3), None, r"sigma has shape \(3,\), x has batch 4"),
        (torch.zeros(4, 1, 8, 8), torch.ones(4, 1), None, r"shape \(4, 1\), x has batch 4"),
        (torch.zeros(4, 1, 8, 8), 1.0, None, r"must be a tensor of shape \(4,\), not 1.0"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), None, "sigma is 0 somewhere"),
        (torch.zeros(2, 1, 8, 8), -torch.ones(2), None, "smallest is -1"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([1, math.nan]), None, "sigma is not finite: 1 of 2"),
        (torch.full((2, 1, 8, 8), math.inf), torch.ones(2), None, "x is not finite: 128 of 128"),
        (torch.zeros(2, 1, 9, 9), torch.ones(2), None, r"\(2, 1, 9, 9\), the network wants"),
        (torch.zeros(2, 3, 8, 8), torch.ones(2), None, r"\(2, 3, 8, 8\), the network wants"),
        (torch.zeros(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 10]), "classes are 0 to 9"),
        (torch.zeros(2, 1, 8, 8), torch.ones(2), torch.tensor([0, -2]), "label goes from -2 to 0"),
        (torch.zeros(2, 1, 8, 8), torch.ones(2), torch.tensor([1]), r"\(1,\), x has batch 2"),
        (torch.zeros(2, 1, 8, 8), torch.ones(2), torch.ones(2), "whole numbers"),
    ],
)
def test_network_refuses_bad_input_by_name(x, sigma, label, message):
    denoiser = EDMDenoiser(UNet(width=8, embedding=16))
    with pytest.raises(ValueError, match=message):
        denoiser(x, sigma, label)


def test_unconditional_network_refuses_labels():
    with pytest.raises(ValueError, match="unconditional"):
        EDMDenoiser(MLP())(torch.zeros(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.int64))


def test_noise_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise has shape \(3, 2\), x has \(4, 2\)"):
        denoising_loss(two_modes(), torch.zeros(4, 2), torch.ones(4), torch.zeros(3, 2))
