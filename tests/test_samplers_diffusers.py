"""Samplers against the schedulers of diffusers, step by step, on a dummy model in float64."""

import pytest
import torch

from dmd_tutorial import samplers
from dmd_tutorial.noise import noise_like

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy's, in schedulers

TOLERANCE = 1e-5  # relative to the largest value; schedulers compute their levels in float32
Z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(x, sigma, label=None):
    """A smooth denoiser that is nobody's posterior mean."""
    level = sigma.reshape(-1, 1, 1, 1)
    return 0.8 * torch.tanh(x / (0.7 + level)) + 0.3 * torch.sin(x / (1 + level)) / (1 + level**2)


def denoise(x, sigma):
    return model(x, torch.full((len(x),), float(sigma), dtype=torch.float64))


def exact(scheduler):
    """The same scheduler with its tables in float64."""
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod", "one"):
        if isinstance(value := getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, value.double())
    return scheduler


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * max(1.0, other.abs().max().item())


def exploding(scheduler, answer):
    """Run a scheduler whose state is in the book's form; answer(x, sigma) is what it wants."""
    scheduler = exact(scheduler)
    x, states = scheduler.sigmas[0] * Z, []
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)  # sets the step's index; its scaling is the network's
        sigma = scheduler.sigmas[scheduler.step_index]
        x = scheduler.step(answer(x, sigma), t, x).prev_sample
        states.append(x)
    return states


def preserving(scheduler):
    """Run a variance-preserving scheduler that predicts the clean sample; states over alpha."""
    scheduler = exact(scheduler)
    sigmas = scheduler.sigmas
    alphas = (1 + sigmas**2).rsqrt()
    x, states = alphas[0] * sigmas[0] * Z, []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoise(x / alphas[i], sigmas[i]), t, x).prev_sample
        states.append(x / alphas[i + 1])
    return states


def ours(sampler, levels, **options):
    return [step.x for step in sampler(model, Z, levels.double(), **options)]


def noise_estimate(x, sigma):
    return (x - denoise(x, sigma)) / sigma


def raw_network(x, sigma, sigma_data=0.5):
    """The network inside EDM's preconditioning."""
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    return (denoise(x, sigma) - c_skip * x) / c_out


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_euler(steps):
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    theirs = exploding(scheduler, noise_estimate)
    assert_close(ours(samplers.euler, scheduler.sigmas), theirs)


def test_euler_under_edm():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(9)
    theirs = exploding(scheduler, raw_network)
    assert_close(ours(samplers.euler, scheduler.sigmas), theirs)


@pytest.mark.parametrize("steps", [2, 7])
def test_heun(steps):
    scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])
    theirs = exploding(scheduler, noise_estimate)
    assert len(theirs) == 2 * steps - 1
    assert_close(ours(samplers.heun, levels), [*theirs[1::2], theirs[-1]])


# share=0.5: diffusers, like the authors' code, counts half of the quadratic term of order 3.
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_under_edm(order):
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=80.0, solver_order=order
    )
    scheduler.set_timesteps(12)
    theirs = exploding(scheduler, raw_network)
    assert_close(ours(samplers.dpm_solver, scheduler.sigmas, order=order, share=0.5), theirs)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpm_solver_in_its_variance_preserving_form(order, final):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        prediction_type="sample",
        final_sigmas_type=final,
        lower_order_final=final == "zero",
    )
    scheduler.set_timesteps(10)
    theirs = preserving(scheduler)
    assert_close(ours(samplers.dpm_solver, scheduler.sigmas, order=order, share=0.5), theirs)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    scheduler = diffusers.DEISMultistepScheduler(
        solver_order=order, prediction_type="sample", lower_order_final=False
    )
    scheduler.set_timesteps(10)
    theirs = preserving(scheduler)
    assert_close(ours(samplers.deis, scheduler.sigmas, order=order), theirs)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_unipc(order, final):
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order,
        prediction_type="sample",
        final_sigmas_type=final,
        lower_order_final=final == "zero",
    )
    scheduler.set_timesteps(10)
    theirs = preserving(scheduler)
    assert_close(ours(samplers.unipc, scheduler.sigmas, order=order), theirs)


def discrete(scheduler, stride):
    """Levels and alphas of a scheduler of DDPM's kind, at its steps and at the end."""
    products = [scheduler.alphas_cumprod[t] for t in scheduler.timesteps]
    last = scheduler.timesteps[-1] - stride
    products.append(scheduler.alphas_cumprod[last] if last >= 0 else torch.ones(()))
    return levels_and_alphas(torch.stack(products).double())


def levels_and_alphas(alpha_bar):
    return ((1 - alpha_bar) / alpha_bar).sqrt(), alpha_bar.sqrt()


def run_discrete(scheduler, levels, alphas, **options):
    x, states = alphas[0] * levels[0] * Z, []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoise(x / alphas[i], levels[i]), int(t), x, **options).prev_sample
        states.append(x / alphas[i + 1])
    return states


@pytest.fixture
def same_noise(monkeypatch):
    """Let diffusers draw as `noise_like` does: in float32, whatever the type of the state."""

    def draw(shape, generator=None, device=None, dtype=None, layout=None):
        return noise_like(torch.empty(*shape, dtype=dtype), generator)

    for name in ("ddim", "ddpm"):
        module = getattr(diffusers.schedulers, f"scheduling_{name}")
        monkeypatch.setattr(module, "randn_tensor", draw)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("eta", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("steps", [4, 20])
def test_ddim(eta, steps):
    scheduler = exact(diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False))
    scheduler.set_timesteps(steps)
    levels, alphas = discrete(scheduler, 1000 // steps)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    theirs = run_discrete(scheduler, levels, alphas, eta=eta, generator=seeds[0])
    assert_close(ours(samplers.ddim, levels, eta=eta, rng=seeds[1]), theirs)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("steps", [10, 1000])
def test_ddpm(steps):
    scheduler = exact(
        diffusers.DDPMScheduler(
            prediction_type="sample", clip_sample=False, variance_type="fixed_small"
        )
    )
    scheduler.set_timesteps(steps)
    levels, alphas = discrete(scheduler, 1000 // steps)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    theirs = run_discrete(scheduler, levels, alphas, generator=seeds[0])
    assert_close(ours(samplers.ancestral, levels, rng=seeds[1]), theirs)


def test_ddpm_levels():
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(1000)
    levels, _ = discrete(scheduler, 1)
    assert torch.allclose(samplers.ddpm_levels(), levels, rtol=1e-4)  # theirs are in float32
    assert torch.equal(samplers.ddpm_levels(50), samplers.ddpm_levels()[::20])


# Stable Diffusion's own, which never reaches level 0: it ends at the schedule's first.
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_pndm_as_stable_diffusion_runs_it(steps):
    scheduler = exact(diffusers.PNDMScheduler(**STABLE_DIFFUSION))
    scheduler.set_timesteps(steps)
    walked = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:], torch.zeros(1).long()])
    levels, alphas = levels_and_alphas(scheduler.alphas_cumprod[walked])
    asked = [0, 1, *range(1, steps)]  # the second level twice: ahead of it, and arrived
    reached = [1, *range(1, steps + 1)]
    x, theirs = alphas[0] * levels[0] * Z, []
    for t, at, to in zip(scheduler.timesteps, asked, reached, strict=True):
        x = scheduler.step(noise_estimate(x / alphas[at], levels[at]), int(t), x).prev_sample
        theirs.append(x / alphas[to])
    assert_close(ours(samplers.pndm, levels), theirs[1:])
    assert list(samplers.pndm(model, Z, levels))[-1].evaluations == len(theirs) == steps + 1
