"""Adapters, against exact mixtures and against the schedulers and models of diffusers."""

import copy

import pytest
import torch
from torch import nn

from dmd_tutorial import adapters, noise
from dmd_tutorial.adapters import Adapted, FromDiffusers, FromFunction, Guided
from dmd_tutorial.anchor import fingerprint, load_pairs, make_pairs
from dmd_tutorial.checks import NO_CLASS, expand
from dmd_tutorial.data import ring, two_modes
from dmd_tutorial.denoisers import image_shape, says, sigma_range
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.samplers import euler, heun, sample
from dmd_tutorial.survey.score_distillation import Judge
from dmd_tutorial.training import DistillationRun, DistillSettings, distill

TRUTH = ring()
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)  # DDPM's
RNG = torch.Generator().manual_seed(0)


class Trained(nn.Module):
    """A perfect network: it answers what a mixture's posterior mean is in a model's own terms."""

    def __init__(self, alpha_of, s_of, prediction, truth=TRUTH):
        super().__init__()
        self.alpha_of, self.s_of, self.prediction, self.truth = alpha_of, s_of, prediction, truth

    def forward(self, x_t, time, label=None):
        alpha, s = self.alpha_of(time), self.s_of(time)
        x0 = self.truth(x_t / expand(alpha, x_t), s / alpha, label)
        alpha, s = expand(alpha, x_t), expand(s, x_t)
        eps = (x_t - alpha * x0) / s
        return {"noise": eps, "x0": x0, "v": alpha * eps - s * x0, "velocity": eps - x0}[
            self.prediction
        ]


def of_step(values):
    """A function of (interpolated) time steps: only whole ones are asked for here."""
    return lambda time: values[time.round().long()]


FORMS = {
    "discrete": (
        adapters.discrete(ALPHAS), of_step(ALPHAS.sqrt()), of_step((1 - ALPHAS).sqrt()),
        ((1 - ALPHAS) / ALPHAS).sqrt()[[0, 1, 400, 998, 999]],
    ),
    "cosine": (
        adapters.continuous(noise.cosine_schedule, last=0.98),
        lambda t: noise.cosine_schedule(t).alpha, lambda t: noise.cosine_schedule(t).sigma,
        torch.tensor([0.01, 0.5, 2.0, 30.0], dtype=torch.float64),
    ),
    "linear": (
        adapters.continuous(noise.linear_schedule),
        lambda t: noise.linear_schedule(t).alpha, lambda t: noise.linear_schedule(t).sigma,
        torch.tensor([0.02, 0.5, 2.0, 150.0], dtype=torch.float64),
    ),
    "flow": (
        adapters.flow(1000.0), lambda t: 1 - t / 1000, lambda t: t / 1000,
        torch.tensor([0.002, 0.5, 2.0, 80.0], dtype=torch.float64),
    ),
    "exploding": (
        adapters.exploding((0.01, 50.0)), torch.ones_like, lambda t: t,
        torch.tensor([0.01, 0.5, 2.0, 50.0], dtype=torch.float64),
    ),
}  # fmt: skip
PREDICTIONS = [
    (form, prediction)
    for form in FORMS
    for prediction in ("noise", "x0", "v", "velocity")
    if prediction != "v" or form in ("discrete", "cosine", "linear")  # v is variance-preserving
]


@pytest.mark.parametrize(("form", "prediction"), PREDICTIONS)
def test_an_adapted_perfect_network_is_the_posterior_mean(form, prediction):
    terms, alpha, s, levels = FORMS[form]
    model = Adapted(Trained(alpha, s, prediction), terms, prediction)
    for sigma in levels:
        sigmas = sigma.repeat(50)
        spread = torch.randn(50, 2, generator=RNG, dtype=torch.float64)
        x = noise.add_noise(TRUTH.sample(50, rng=RNG), sigmas, spread)
        error = (model(x, sigmas) - TRUTH(x, sigmas)).abs().max()
        assert error < 1e-9 * (1 + sigma) ** 2, (sigma, error)
    label = torch.arange(50) % 8
    assert torch.allclose(model(x, sigmas, label), TRUTH(x, sigmas, label), atol=1e-6)


def test_levels_outside_of_what_a_model_knows_are_refused():
    terms, alpha, s, _ = FORMS["discrete"]
    model = Adapted(Trained(alpha, s, "noise"), terms, "noise")
    low, high = model.sigma_range
    assert high == pytest.approx(157.4, abs=0.1)  # of DDPM's schedule
    assert low == pytest.approx(0.01, abs=1e-4)
    x = torch.zeros(2, 2)
    model(x, torch.tensor([low, high]))  # rounded to float32
    for wrong in (high * 1.001, low * 0.999):
        with pytest.raises(ValueError, match=r"the model knows 0.0100005 to 157.407"):
            model(x, torch.tensor([1.0, wrong]))


def test_steps_without_signal_have_no_level():
    ends_in_noise = torch.cat([ALPHAS, torch.zeros(1)])  # a schedule of zero terminal SNR
    assert adapters.discrete(ends_in_noise).sigma_range == adapters.discrete(ALPHAS).sigma_range
    with pytest.raises(ValueError, match="must be below 1 and fall"):
        adapters.discrete(ALPHAS.flip(0))
    with pytest.raises(ValueError, match="prediction is one of"):
        Adapted(nn.Identity(), adapters.flow(), "epsilon")


# --- the range ------------------------------------------------------------------------------------


class Ranged(nn.Module):
    """A denoiser of 1 x 2 x 2 images that notes the levels that it is asked for."""

    size, channels, classes = 2, 1, 0

    def __init__(self, high=10.0):
        super().__init__()
        self.sigma_range = (0.05, high)
        self.scale = nn.Parameter(torch.ones(1, 1, 2, 2))
        self.asked = []

    def forward(self, x, sigma, label=None):
        self.asked.append((sigma.min().item(), sigma.max().item()))
        return self.scale * x / (1 + expand(sigma, x) ** 2)


def test_generator_pairs_sampler_and_grid_follow_the_teachers_range(tmp_path):
    teacher = Ranged()
    assert OneStepGenerator(teacher).sigma_max == 10.0
    assert OneStepGenerator(Ranged(high=3.0)).sigma_max == 3.0
    sample(teacher, torch.randn(4, 1, 2, 2), steps=5)
    list(make_pairs(teacher, tmp_path, 1000, (1, 2, 2), steps=3))
    run = DistillationRun(teacher, DistillSettings(steps=20, batch=64, batch_pairs=8))
    pairs = load_pairs(tmp_path, teacher)
    assert run.objective().grid[[0, -1]].tolist() == [0.05, 10.0]
    list(distill(run, (1, 2, 2), 0, pairs))
    asked = torch.tensor(teacher.asked + run.critic.asked + run.generator.denoiser.asked)
    assert asked.min() == pytest.approx(0.05)
    assert asked.max() == 10.0
    low_top = DistillSettings(grid_max=2.0)
    assert DistillationRun(teacher, low_top).objective().grid[-1] == 2.0


def test_pairs_from_another_level_are_refused(tmp_path):
    teacher, other = Ranged(), Ranged(high=3.0)
    assert fingerprint(teacher) == fingerprint(other)  # the level is no weight
    list(make_pairs(teacher, tmp_path, 1000, (1, 2, 2), steps=3))
    match = r"was made with sigma_range \[0.05, 10.0\], not \[0.05, 3.0\]"
    with pytest.raises(ValueError, match=match):
        load_pairs(tmp_path, other)
    with pytest.raises(ValueError, match=match):
        list(make_pairs(other, tmp_path, 1000, (1, 2, 2), steps=3))


# --- functions without weights --------------------------------------------------------------------


class Plane(nn.Linear):
    """A network of points that looks at nothing else."""

    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x_t, time, label=None):
        return super().forward(x_t)


def test_a_function_without_weights_is_a_teacher(tmp_path):
    """Its pairs are its ODE's, it is known by what it is made of, and it can be distilled."""
    teacher = FromFunction(two_modes(), sigma_range=(0.002, 20.0))
    assert says(teacher, "classes") == 2
    list(make_pairs(teacher, tmp_path, 1000, (2,), classes=2, steps=6))
    pairs = load_pairs(tmp_path, teacher)
    levels = noise.sampling_levels(6, sigma_max=20.0)
    again = sample(two_modes(), pairs.z, pairs.label, levels=levels, sampler=heun)
    assert torch.equal(pairs.y, again)
    with pytest.raises(ValueError, match="was made with teacher"):
        load_pairs(tmp_path, FromFunction(two_modes(distance=5.0), sigma_range=(0.002, 20.0)))
    with pytest.raises(ValueError, match="give a start and a critic"):
        DistillationRun(teacher, DistillSettings())
    critic = Adapted(Plane(), adapters.exploding(teacher.sigma_range), "x0")
    start = OneStepGenerator(critic)
    settings = DistillSettings(steps=2, batch=8, batch_pairs=8)
    run = DistillationRun(teacher, settings, start=start, critic=critic)
    before = copy.deepcopy(run.generator.state_dict())
    list(distill(run, (2,), 2, pairs))
    assert any(not torch.equal(before[n], w) for n, w in run.generator.state_dict().items())


def test_functions_are_known_by_name_and_tensors():
    def one(x, sigma, label=None):
        return x

    def other(x, sigma, label=None):
        return 0 * x

    names = {fingerprint(FromFunction(f)) for f in (one, other)}
    names |= {fingerprint(FromFunction(one, seed=torch.tensor(number))) for number in (1, 2)}
    assert len(names) == 4


# --- guidance -------------------------------------------------------------------------------------


def test_guidance_leads_from_the_answer_without_a_label_through_that_with_one():
    guided, x = Guided(TRUTH, 3.0), torch.randn(6, 2, generator=RNG, dtype=torch.float64)
    sigma, label = torch.full((6,), 1.5, dtype=torch.float64), torch.arange(6)
    without, under = TRUTH(x, sigma), TRUTH(x, sigma, label)
    torch.testing.assert_close(guided(x, sigma, label), without + 3 * (under - without))
    torch.testing.assert_close(Guided(TRUTH, 1.0)(x, sigma, label), under)
    assert says(guided, "classes") == 8
    assert sigma_range(Guided(Ranged(), 2.0)) == (0.05, 10.0)


def test_a_student_of_a_guided_teacher_is_asked_once_and_its_critic_is_not_guided():
    run = DistillationRun(Guided(Ranged(), 3.0), DistillSettings())
    assert isinstance(run.generator.denoiser, Ranged)
    assert isinstance(run.critic, Ranged)
    assert isinstance(run.teacher, Guided)


# --- diffusers ------------------------------------------------------------------------------------

diffusers = pytest.importorskip("diffusers")  # whose schedulers numpy warns of
SHAPE = (1, 8, 8)


def unet(**changes):
    torch.manual_seed(0)
    options = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32),
        "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DModel(**options | changes).eval().requires_grad_(False)


def text_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=8, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy's, in the scheduler
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_euler_steps_of_diffusers_are_ours_on_the_same_model(prediction):
    """Its Euler sampler in levels between the steps, so time is interpolated as there."""
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type=prediction, use_karras_sigmas=True, timestep_spacing="linspace"
    )
    model, z = unet(), torch.randn(3, *SHAPE, generator=RNG)
    teacher = FromDiffusers(model, scheduler)
    scheduler.set_timesteps(8)
    levels = scheduler.sigmas.double()
    x = levels[0].float() * z
    for t in scheduler.timesteps:
        answer = model(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(answer, t, x).prev_sample
    ours = sample(teacher, z, levels=levels, sampler=euler)
    assert (ours - x).abs().max() < 2e-4 * x.abs().max()


def test_a_flow_of_diffusers_is_ours():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model, z = unet(), torch.randn(3, *SHAPE, generator=RNG)
    scheduler.set_timesteps(sigmas=torch.linspace(0.98, 0.1, 6).tolist())
    times = scheduler.sigmas.double()  # fractions of noise, 0 at the end
    x = times[0].float() * z  # (1 - t) x + t z, of a clean x that nobody knows: 0
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    teacher = FromDiffusers(model, scheduler)
    ours = sample(teacher, z, levels=times / (1 - times), sampler=euler)
    assert (ours - x).abs().max() < 2e-5 * x.abs().max()


def test_classes_texts_and_learned_variances():
    ddpm = diffusers.DDPMScheduler()
    x, sigma = torch.randn(4, *SHAPE, generator=RNG), torch.full((4,), 2.0)
    classes = FromDiffusers(unet(num_class_embeds=4), ddpm, null=3)
    assert image_shape(classes) == (SHAPE, 3)
    label = torch.tensor([0, 1, 2, NO_CLASS])
    told = classes(x, sigma, label)
    torch.testing.assert_close(told[3:], classes(x[3:], sigma[3:]))  # NO_CLASS is no label
    assert not torch.allclose(told[:3], classes(x[:3], sigma[:3]), atol=1e-4)
    with pytest.raises(ValueError, match="null is 1, it must be the last of 4 classes"):
        FromDiffusers(unet(num_class_embeds=4), ddpm, null=1)

    null, words = torch.zeros(5, 12), torch.randn(4, 5, 12, generator=RNG)
    text = FromDiffusers(text_unet(), ddpm, null=null)
    torch.testing.assert_close(text(x, sigma), text(x, sigma, null.expand(4, 5, 12)))
    guided = Guided(text, 2.0, null)(x, sigma, words)
    expected = text(x, sigma) + 2 * (text(x, sigma, words) - text(x, sigma))
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)

    learnt = FromDiffusers(unet(out_channels=2), ddpm)
    alpha, time = learnt.terms.alpha(sigma), learnt.terms.time(sigma)
    noise_alone = learnt.network(expand(alpha, x) * x, time).sample[:, :1]
    torch.testing.assert_close(learnt(x, sigma), x - 2 * noise_alone)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("EDMEulerScheduler", {}),
        ("DPMSolverMultistepScheduler",
         {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("EulerDiscreteScheduler",
         {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ],
)  # fmt: skip
def test_schedulers_of_other_terms_are_refused(kind, options):
    with pytest.raises(ValueError, match=f"{kind} has no steps of DDPM and no straight paths"):
        FromDiffusers(unet(), getattr(diffusers, kind)(**options))


def test_what_stands_for_no_label_must_be_there():
    ddpm, x = diffusers.DDPMScheduler(), torch.randn(2, *SHAPE, generator=RNG)
    text = FromDiffusers(text_unet(), ddpm)
    with pytest.raises(ValueError, match="null must be its embedding"):
        Guided(text, 2.0)(x, torch.ones(2), torch.zeros(2, 5, 12))
    classes = FromDiffusers(unet(num_class_embeds=4), ddpm)
    with pytest.raises(ValueError, match="no class that stands for none: give null"):
        Guided(classes, 2.0)(x, torch.ones(2), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="Transformer2DModel is no U-Net"):
        FromDiffusers(type("Transformer2DModel", (), {"config": {}})(), ddpm)


def test_a_copy_of_a_diffusers_model_has_features_of_its_own():
    teacher = FromDiffusers(unet(), diffusers.DDPMScheduler())
    judge = copy.deepcopy(Judge(copy.deepcopy(teacher)))
    with torch.no_grad():
        judge.weight.fill_(1.0)
        judge(torch.randn(2, *SHAPE, generator=RNG), torch.ones(2))
        assert judge.logit().shape == (2,)
        judge.critic.network.mid_block.resnets[0].conv1.weight.mul_(2)
        first = judge.logit().clone()
        judge(torch.randn(2, *SHAPE, generator=RNG), torch.ones(2))
    assert not torch.equal(first, judge.logit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_is_asked_in_the_type_of_its_weights(dtype):
    teacher = FromDiffusers(unet(), diffusers.DDPMScheduler())
    x, sigma = torch.randn(2, *SHAPE, generator=RNG), torch.ones(2)
    plain = teacher(x, sigma)
    other = copy.deepcopy(teacher).to(dtype)(x, sigma)
    assert other.dtype == x.dtype
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (other - plain).abs().max() < bound * plain.abs().max()
    teacher.precision = torch.bfloat16
    inside = teacher(x, sigma)
    assert 0 < (inside - plain).abs().max() < 0.05 * plain.abs().max()
