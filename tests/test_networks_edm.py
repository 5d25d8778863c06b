"""The published EDM networks: names, sizes, outputs, precision and memory.

`data/edm-parity.npz` holds what other implementations answer with the parameters that `fill`
draws: `vp`, `ve` and `adm` are the published classes, `odd_*` are combinations that no checkpoint
uses, answered by NVIDIA Modulus 0.8 (Apache-2.0).
"""

import copy
import json
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dmd_tutorial import denoisers
from dmd_tutorial.denoisers import Denoiser, EDMDenoiser, edm_preconditioning
from dmd_tutorial.edm import blocks
from dmd_tutorial.edm.blocks import UNetBlock
from dmd_tutorial.edm.checkpoint import renamed
from dmd_tutorial.edm.networks import DhariwalUNet, SongUNet, published_denoiser
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.runs.compute import Compute, prepare

REFERENCE = np.load(Path(__file__).parent / "data" / "edm-parity.npz")
SHARED = Path(__file__).parents[2] / "shared" / "parity"
FAMILIES = ("vp", "ve", "adm")
CASES = (*FAMILIES, "odd_skips", "odd_residual", "odd_adm")

CIFAR = {"img_resolution": 32, "img_channels": 3, "augment_dim": 9, "model_type": "SongUNet",
         "channel_mult": [2, 2, 2], "dropout": 0.13}  # fmt: skip
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1]}  # fmt: skip
FACES = CIFAR | {"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}
IMAGENET = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000}
TINY = {
    "DDPM++": {"model_type": "SongUNet", "model_channels": 16},
    "NCSN++": {"model_type": "SongUNet", "model_channels": 16, **NCSN},
    "ADM": {"model_type": "DhariwalUNet", "model_channels": 64},
}


def fill(network):
    """Draw every parameter from its name."""
    drawn = {n: b for n, b in network.named_buffers() if n.endswith("freqs")}
    for name, tensor in [*network.named_parameters(), *drawn.items()]:
        published = name.replace("network.", "model.", 1)
        rng = torch.Generator().manual_seed(zlib.crc32(published.encode()))
        layer, kind = name.split(".")[-2:]
        gain = kind == "weight" and tensor.ndim == 1 and "norm" in layer
        scale = 16 if name in drawn else 0.05
        tensor.data = scale * torch.randn(tensor.shape, generator=rng) + gain
    return network.eval()


def tiny(family, **kwargs):
    """A small network of a family, 8x8, grey, three classes."""
    shape = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}
    size = {"img_resolution": 8, "img_channels": 1, "label_dim": 3}
    return fill(published_denoiser(**(size | TINY[family] | shape | kwargs)))


def noisy(batch, size=8, channels=1, low=0.002, high=80.0):
    """Images at noise levels from low to high, evenly spaced in the logarithm."""
    sigma = torch.logspace(math.log10(low), math.log10(high), batch)
    noise = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    return noise * (sigma**2 + 0.25).sqrt()[:, None, None, None], sigma


def case(name):
    """Return a filled network, x, sigma and labels, augmentation labels, and the answers."""
    network = fill(published_denoiser(**json.loads(str(REFERENCE[f"{name}_kwargs"]))))
    odd = name.startswith("odd")
    inputs = [
        REFERENCE[f"{name}_x" if odd else "x"],
        np.float32([0.002, 0.5, 80]) if odd else REFERENCE["sigma"],
        REFERENCE.get(f"{name}_labels"),
        REFERENCE.get(f"{name}_augment"),
    ]
    inputs = [None if array is None else torch.tensor(array) for array in inputs]
    return network, inputs, {key: torch.tensor(REFERENCE[f"{name}_{key}"]) for key in "DF"}


@torch.no_grad()
def answers(network, inputs):
    """Return D and F; what augmentation did is told to the raw network alone."""
    *inputs, augment = inputs
    raw, forward = [], network.network.forward
    network.network.forward = lambda x, c_noise, label: forward(x, c_noise, label, augment)
    hook = network.network.register_forward_hook(lambda *args: raw.append(args[-1]))
    denoised = network(*inputs)
    hook.remove()
    network.network.forward = forward
    return {"D": denoised, "F": raw[0]}


def distance(answer, wanted):
    """Largest difference, relative to the largest value."""
    return ((answer - wanted).abs().max() / wanted.abs().max()).item()


# --- the published classes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_published_ones(name):
    network, inputs, wanted = case(name)
    given = answers(network, inputs)
    assert distance(given["F"], wanted["F"]) < 5e-6
    assert distance(given["D"], wanted["D"]) < 5e-6


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_the_published_ones(name):
    network, _, _ = case(name)
    wanted = renamed(json.loads(str(REFERENCE[f"{name}_names"])))
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert list(shapes.items()) == list(wanted.items())


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the reference files are not at {SHARED}")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_committed_reference_is_the_shared_one(name):
    shared = np.load(SHARED / f"tiny-{name}.npz")
    for key in ("D", "F", "names", "kwargs"):
        assert np.array_equal(shared[key], REFERENCE[f"{name}_{key}"]), key
    assert np.array_equal(shared["x"], REFERENCE["x"])
    assert np.array_equal(shared["sigma"], REFERENCE["sigma"])


@pytest.mark.parametrize(
    ("kwargs", "wanted"),
    [
        (CIFAR, 55_733_891),
        (CIFAR | {"label_dim": 10}, 55_735_299),
        (CIFAR | NCSN, 56_397_827),
        (CIFAR | NCSN | {"label_dim": 10}, 56_400_643),
        (FACES, 61_805_571),
        (IMAGENET, 295_899_267),
    ],
    ids=["ddpm++", "ddpm++ cond", "ncsn++", "ncsn++ cond", "faces", "adm"],
)
def test_number_of_parameters(kwargs, wanted):
    with torch.device("meta"):
        network = published_denoiser(**kwargs)
    assert sum(parameter.numel() for parameter in network.parameters()) == wanted


@pytest.mark.parametrize(("kwargs", "wanted"), [(CIFAR, 42.4e9), (IMAGENET, 219e9)])
def test_cost_of_an_image(kwargs, wanted):
    with torch.device("meta"):
        model = published_denoiser(**kwargs).eval().network
        x = torch.empty(1, 3, kwargs["img_resolution"], kwargs["img_resolution"])
        with FlopCounterMode(display=False) as counter:
            model(x, torch.empty(1))
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.01)


# --- every trap, sprung --------------------------------------------------------------------------


def scaled(name, factor):
    """Return a mutation that multiplies a parameter."""

    def mutate(network):
        network.get_parameter(name).data *= factor

    return mutate


def each(kind, **values):
    """Return a mutation that sets attributes of all modules of a class."""

    def mutate(network):
        for module in network.modules():
            if isinstance(module, kind):
                for key, value in values.items():
                    setattr(module, key, value)

    return mutate


def at(path, **values):
    """Return a mutation that sets attributes of one module."""

    def mutate(network):
        for key, value in values.items():
            assert getattr(network.get_submodule(path), key) != value
            setattr(network.get_submodule(path), key, value)

    return mutate


def reordered(path, order):
    """Return a mutation that permutes the outputs of a layer."""

    def mutate(network):
        layer = network.get_submodule(path)
        rows = order(torch.arange(len(layer.weight)))
        layer.weight.data = layer.weight.data[rows]
        layer.bias.data = layer.bias.data[rows]

    return mutate


def swap_waves(network):
    waves = network.network.map_noise.forward
    network.network.map_noise.forward = lambda number: waves(number).roll(
        waves(number).shape[1] // 2, dims=1
    )


def halve_groups(network):
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups //= 2


def label_between_the_layers(network):
    model, waves = network.network, network.network.map_noise

    def embed(noise, label, _):
        first = functional.silu(model.map_layer0(waves(noise))) + model.map_label(label)
        return functional.silu(model.map_layer1(first))

    model._embed = embed


def label_after_the_silu(network):
    model = network.network
    embed = model._embed
    model._embed = lambda noise, label, augment: (
        embed(noise, torch.zeros_like(label), augment) + model.map_label(label)
    )


def flip_filter(network):
    network.get_submodule("network.enc.8x8_down.conv0").resample_filter.copy_(
        blocks._filter((1, 0, 0, 1))
    )


def resample_first(network):
    layer = network.get_submodule("network.enc.8x8_aux_residual")
    layer.forward = lambda image: functional.conv2d(
        blocks._resample(image, layer.resample_filter, "down"), layer.weight, layer.bias, padding=1
    )


def thirds(channels):
    """Queries, then keys, then values, as most code has them."""
    return channels.reshape(3, -1).T.reshape(-1)


MUTATIONS = {
    "vp: cosines first": ("vp", swap_waves),
    "ve: cosines first": ("ve", swap_waves),
    "adm: sines first": ("adm", swap_waves),
    "vp: lowest frequency left out": ("vp", at("network.map_noise", endpoint=False)),
    "adm: lowest frequency put in": ("adm", at("network.map_noise", endpoint=True)),
    "ve: label not scaled": ("ve", scaled("network.map_label.weight", 10**-0.5)),
    "adm: label scaled": ("adm", scaled("network.map_label.weight", 10**0.5)),
    "adm: label before the second layer": ("adm", label_between_the_layers),
    "adm: label after the SiLU": ("adm", label_after_the_silu),
    "vp: sums not scaled": ("vp", each(UNetBlock, skip_scale=1.0)),
    "adm: sums scaled": ("adm", each(UNetBlock, skip_scale=0.5**0.5)),
    "vp: epsilon of ADM": ("vp", each(torch.nn.GroupNorm, eps=1e-5)),
    "adm: epsilon of DDPM++": ("adm", each(torch.nn.GroupNorm, eps=1e-6)),
    "vp: fewer groups": ("vp", halve_groups),
    "adm: fewer groups": ("adm", halve_groups),
    "vp: two heads": ("vp", at("network.dec.8x8_in0", num_heads=2)),
    "adm: one head": ("adm", at("network.dec.8x8_in0", num_heads=1)),
    "vp: no attention in the middle": ("vp", at("network.dec.8x8_in0", num_heads=0)),
    "vp: no attention in the last block": ("vp", at("network.dec.8x8_block1", num_heads=0)),
    "adm: no attention in the encoder": ("adm", at("network.enc.8x8_block0", num_heads=0)),
    "vp: query, key, value in blocks": ("vp", reordered("network.dec.8x8_in0.qkv", thirds)),
    "adm: shift before scale": (
        "adm", reordered("network.enc.16x16_block0.affine", lambda rows: rows.roll(64)),
    ),
    "ve: another filter": ("ve", flip_filter),
    "ve: pyramid halved before its convolution": ("ve", resample_first),
    "vp: another sigma_data": ("vp", at("", sigma_data=0.45)),
    "vp: dropout left on": ("vp", each(UNetBlock, dropout=0.1, training=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_trap_breaks_parity(name):
    family, mutate = MUTATIONS[name]
    network, inputs, wanted = case(family)
    mutate(network)
    assert distance(answers(network, inputs)["F"], wanted["F"]) > 5e-5


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_c_noise_is_a_quarter_of_the_logarithm(factor, monkeypatch):
    network, inputs, wanted = case("vp")

    def wrong(sigma, sigma_data):
        return edm_preconditioning(sigma, sigma_data)._replace(c_noise=factor * sigma.log() / 4)

    monkeypatch.setattr(denoisers, "edm_preconditioning", wrong)
    assert distance(answers(network, inputs)["F"], wanted["F"]) > 1e-3


# --- the interface -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_it_is_a_denoiser_like_any_other(family):
    denoiser: Denoiser = tiny(family)
    x, sigma = noisy(4)
    assert denoiser(x, sigma).shape == x.shape
    generator = OneStepGenerator(denoiser)
    assert generator(x, torch.tensor([0, 1, 2, 0])).isfinite().all()


@pytest.mark.parametrize("family", TINY)
def test_class_indices_are_one_hot_rows(family):
    network, (x, sigma) = tiny(family), noisy(4)
    label = torch.tensor([2, 0, 1, 2])
    rows = functional.one_hot(label, 3)
    assert torch.equal(network(x, sigma, label), network(x, sigma, rows))
    assert torch.equal(network(x, sigma, rows), network(x, sigma, rows.float()))
    assert torch.equal(network(x, sigma), network(x, sigma, torch.zeros(4, 3)))
    level = sigma.log() / 4
    assert torch.equal(network.network(x, level), network.network(x, level, torch.zeros(4, 3)))
    assert (network(x, sigma) - network(x, sigma, label)).abs().max() > 1e-4


@pytest.mark.parametrize("family", TINY)
def test_no_augmentation_is_augmentation_by_nothing(family):
    network, (x, sigma) = tiny(family, augment_dim=9), noisy(4)
    raw = partial(network.network, x, sigma.log() / 4, None)
    assert torch.equal(raw(), raw(torch.zeros(4, 9)))
    assert distance(raw(torch.ones(4, 9)), raw()) > 1e-5


def test_the_state_of_a_sampler_is_float64():
    network, (x, sigma) = tiny("ADM"), noisy(4)
    denoised = network(x.double(), sigma.double())
    assert denoised.dtype == torch.float64
    assert torch.equal(denoised, network(x, sigma).double())


@pytest.mark.parametrize("family", TINY)
def test_channels_last_changes_no_answer(family):
    network, (x, sigma) = tiny(family), noisy(4)
    wanted = network(x, sigma)
    network.to(memory_format=torch.channels_last)
    assert distance(network(x.to(memory_format=torch.channels_last), sigma), wanted) < 1e-5


@pytest.mark.parametrize("family", TINY)
def test_the_arguments_are_kept(family):
    network = tiny(family, sigma_min=0.01, sigma_max=50.0, sigma_data=0.3)
    config = json.loads(json.dumps(network.network.config))
    again = fill(EDMDenoiser(type(network.network)(**config), 0.3))
    assert (network.sigma_data, again.classes, again.network.size) == (0.3, 3, 8)
    x, sigma = noisy(4)
    assert torch.equal(again(x, sigma), network(x, sigma))


@pytest.mark.parametrize("family", TINY)
def test_every_parameter_matters(family):
    network, (x, sigma) = tiny(family, augment_dim=2), noisy(3, low=0.1, high=10)
    network.network(x, sigma.log() / 4, torch.arange(3), torch.ones(3, 2)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_adm_with_fewer_than_64_channels_has_no_attention():
    names = tiny("ADM", model_channels=16).state_dict()
    assert not any("qkv" in name for name in names)
    assert [b.num_heads for b in tiny("ADM").modules() if isinstance(b, UNetBlock)][-1] == 0
    assert tiny("ADM", model_channels=96).get_submodule("network.dec.4x4_in0").num_heads == 3


@pytest.mark.parametrize("family", TINY)
def test_a_new_network_answers_almost_nothing(family):
    shape = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    torch.manual_seed(0)
    network = published_denoiser(8, 1, **TINY[family], **shape).eval()
    x, sigma = noisy(4)
    c_skip = edm_preconditioning(sigma).c_skip[:, None, None, None]
    assert (network(x, sigma) - c_skip * x).abs().max() < 1e-3


# --- in training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_dropout_is_for_training_only(family):
    network, (x, sigma) = tiny(family, dropout=0.5), noisy(2)
    assert torch.equal(network(x, sigma), network(x, sigma))
    network.train()
    assert distance(network(x, sigma), network(x, sigma)) > 1e-4


def saved_and_gradients(network, recompute):
    """Return the bytes kept for the backward pass and the gradients."""
    network = copy.deepcopy(network)
    for block in network.modules():
        if isinstance(block, UNetBlock):
            block.recompute = recompute
    x, sigma = noisy(2, size=16)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(x, sigma, torch.tensor([0, 1])).square().mean()
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    loss.backward()
    gradients = torch.cat([p.grad.reshape(-1) for p in network.parameters()])
    return sum(size for key, size in kept.items() if key not in weights), gradients


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("family", TINY)
def test_recomputing_keeps_the_gradients_and_saves_memory(family, precision):
    network = tiny(family, img_resolution=16, dropout=0.2, num_blocks=2).train()
    network.precision = precision
    kept, gradients = saved_and_gradients(network, recompute=False)
    kept_less, same = saved_and_gradients(network, recompute=True)
    assert distance(same, gradients) < 1e-5
    assert kept_less < 0.4 * kept


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    ("precision", "band"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)], ids=["bf16", "fp16"]
)
def test_low_precision_stays_near_at_every_noise_level(family, precision, band):
    """F's error, root mean square, in units of F: 2 to 3 % in bf16 and 0.3 % in fp16."""
    network, (x, sigma) = tiny(family, num_blocks=2), noisy(24)
    c_skip = edm_preconditioning(sigma).c_skip
    label = torch.arange(24) % 3
    with torch.no_grad():
        exact = network(x, sigma, label)
        network.precision = precision
        rounded = network(x, sigma, label)
    size = (exact - c_skip[:, None, None, None] * x).square().mean((1, 2, 3)).sqrt()
    error = (rounded - exact).square().mean((1, 2, 3)).sqrt() / size
    assert rounded.dtype == torch.float32
    assert rounded.isfinite().all()
    assert error.max() < band
    assert error.min() > band / 100  # low precision was really used


@pytest.mark.parametrize("family", TINY)
def test_a_frozen_network_can_be_stored_in_low_precision(family):
    network, (x, sigma) = tiny(family), noisy(8)
    label = torch.arange(8) % 3
    exact = network(x, sigma, label)
    prepare(network, Compute(frozen="bf16"), frozen=True)
    assert {p.dtype for p in network.parameters() if p.ndim > 1} == {torch.bfloat16}
    with torch.no_grad():
        stored = network(x, sigma, label)
    assert stored.dtype == torch.float32
    assert 0 < distance(stored, exact) < 0.02


def test_gradients_in_low_precision_are_finite_and_near():
    exact = None
    for precision in (None, torch.bfloat16):
        network, (x, sigma) = tiny("DDPM++").train(), noisy(8)
        network.precision = precision
        weight = edm_preconditioning(sigma).c_out[:, None, None, None] ** -2
        (weight * network(x, sigma, torch.arange(8) % 3).square()).mean().backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in network.parameters()])
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        exact = gradient if exact is None else exact
    assert 0 < (gradient - exact).norm() / exact.norm() < 0.1


ONES = torch.ones(2)

# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 1, 16, 16), ONES), r"\(2, 1, 16, 16\).*\(batch, 1, 8, 8\)"),
        ((torch.zeros(2, 3, 8, 8), ONES), r"\(2, 3, 8, 8\).*\(batch, 1, 8, 8\)"),
        ((torch.full((2, 1, 8, 8), torch.nan), ONES), "x is not finite: 128 of 128"),
        ((torch.zeros(2, 1, 8, 8), torch.ones(3)), r"\(3,\).*2"),
        ((torch.zeros(2, 1, 8, 8), 0 * ONES), "sigma is 0"),
        ((torch.zeros(2, 1, 8, 8), -ONES), "negative.*-1"),
        ((torch.zeros(2, 1, 8, 8), ONES, torch.tensor([0, 3])), "0 to 3, classes are 0 to 2"),
        ((torch.zeros(2, 1, 8, 8), ONES, torch.tensor([0, 1, 2])), r"\(3,\).*2"),
        ((torch.zeros(2, 1, 8, 8), ONES, torch.zeros(2, 4)), r"\(2, 4\).*\(2, 3\)"),
        ((torch.zeros(2, 1, 8, 8), ONES, torch.zeros(2, 3, 4)), r"\(2, 3, 4\).*\(2, 3\)"),
    ],
)
def test_wrong_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("DDPM++")(*arguments)


def test_an_unconditional_network_takes_no_label():
    x, sigma = noisy(2)
    network = published_denoiser(
        8, 1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1
    )
    with pytest.raises(ValueError, match="0 classes"):
        network(x, sigma, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"\(2, 10\)"):
        network(x, sigma, torch.zeros(2, 10))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model_type": "UNet"}, "SongUNet, DhariwalUNet, not 'UNet'"),
        ({"img_resolution": 6}, "img_resolution 6 cannot be halved 2 times"),
        ({"channel_mult": []}, "0 entries"),
        ({"embedding_type": "learned"}, "positional, fourier, not 'learned'"),
        ({"encoder_type": "deep"}, "standard, skip, residual, not 'deep'"),
        ({"decoder_type": "residual"}, "standard, skip, not 'residual'"),
        ({"resample_filter": [1, 2, 1]}, "3 taps"),
        ({"model_channels": 144}, "144 channels do not fall into 32"),
        ({"model_channels": 2}, "2 channels do not fall into 0"),
        ({"model_type": "DhariwalUNet", "encoder_type": "skip"}, "encoder_type"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    sound = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet",
             "model_channels": 8, "channel_mult": [1, 1, 1], "num_blocks": 0}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        published_denoiser(**(sound | kwargs))


def test_defaults_are_the_published_ones():
    with torch.device("meta"):
        song, adm = SongUNet(32, 3, 3), DhariwalUNet(64, 3, 3)
    assert (song.map_layer0.in_features, song.map_layer0.out_features) == (128, 512)
    assert [name for name in song.enc if name.endswith("conv") or "block0" in name] == [
        "32x32_conv", "32x32_block0", "16x16_block0", "8x8_block0", "4x4_block0",
    ]  # fmt: skip
    attention = {name.split("_")[0] for name, block in song.enc.items()
                 if getattr(block, "num_heads", 0)}  # fmt: skip
    assert attention == {"16x16"}
    assert [song.enc[f"{size}x{size}_block3"].conv1.out_channels for size in (32, 16, 8, 4)] == [
        128, 256, 256, 256,
    ]  # fmt: skip
    assert adm.enc["8x8_block2"].conv1.out_channels == 768
    assert (song.enc["32x32_block0"].dropout, adm.enc["64x64_block0"].dropout) == (0.1, 0.1)
