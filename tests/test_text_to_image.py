"""A text-to-image pipeline in the book's terms, against the pipeline itself."""

import copy
import sys
import warnings

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DDIMScheduler, StableDiffusionPipeline

from benchmarks import shapes_pipeline
from dmd_tutorial.adapters import Guided
from dmd_tutorial.anchor import fingerprint
from dmd_tutorial.checks import NO_CLASS
from dmd_tutorial.denoisers import image_shape, says
from dmd_tutorial.samplers import ddim, sample
from dmd_tutorial.text_to_image import prompted
from dmd_tutorial.text_to_image.prompted import Prompted, load_pipeline

PROMPTS = ["a small red star", "a large blue circle above a small green square"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of random weights, saved and read again as Stable Diffusion is."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    told = shapes_pipeline.Captioned()
    shapes_pipeline.save_pipeline(folder, shapes_pipeline.autoencoder(), told, 0.7)
    loaded = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert {p.dtype for p in (*loaded.unet.parameters(), *loaded.text_encoder.parameters())} == {
        torch.float32
    }
    return loaded


@pytest.fixture
def model(pipeline):
    return Prompted(pipeline, PROMPTS).requires_grad_(False)


def noise(count=4):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_labels_are_prompts_as_the_pipeline_encodes_them(pipeline, model):
    theirs, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    x, sigma = noise(), torch.tensor([0.1, 1.0, 5.0, 14.0])
    by_number = model(x, sigma, torch.tensor([0, 1, NO_CLASS, 0]))
    by_text = model.denoiser(x, sigma, torch.cat([theirs, null[:1], theirs[:1]]))
    torch.testing.assert_close(by_number, by_text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_number[2:3], model(x, sigma)[2:3], rtol=1e-5, atol=1e-5)
    assert image_shape(model) == ((4, 8, 8), 2)
    assert says(Guided(model, 3.0), "sigma_data") == 1.0


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_denoised_is_what_the_pipelines_own_scheduler_makes_of_the_unets_answer(pipeline, kind):
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
    scheduler.set_timesteps(50)
    components = {**pipeline.components, "scheduler": scheduler}
    model = Prompted(StableDiffusionPipeline(**components, requires_safety_checker=False), PROMPTS)
    null, under = (model.embeddings[[row, row, row, row]] for row in (-1, 0))
    for t in (981, 501, 1):
        x_t = noise()
        alpha = scheduler.alphas_cumprod[t].sqrt()
        sigma = ((1 - alpha**2).sqrt() / alpha).expand(4)
        with torch.no_grad():
            answers = [pipeline.unet(x_t, t, text).sample for text in (null, under)]
            ours = Guided(model, 3.0)(x_t / alpha, sigma, torch.zeros(4, dtype=torch.int64))
        guided = answers[0] + 3.0 * (answers[1] - answers[0])
        theirs = scheduler.step(guided, t, x_t).pred_original_sample
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp_min(1)


def test_guided_samples_are_the_pipelines(pipeline, model):
    """DDIM in 50 steps at scale 3, by the pipeline's own loop, and decoded."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    theirs = StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    z = noise(2)
    asked = {"num_inference_steps": 50, "guidance_scale": 3.0, "latents": z.clone()}
    wanted = theirs(PROMPTS, **asked, output_type="latent").images
    squared = scheduler.alphas_cumprod[scheduler.timesteps].double()
    levels = [((1 - a) / a).sqrt() for a in (*squared, scheduler.final_alpha_cumprod.double())]
    start = squared[0].sqrt().float() * levels[0].float()  # their noise counts as x_t whole
    levels = torch.stack(levels)
    x = (
        sample(Guided(model, 3.0), z / start, torch.tensor([0, 1]), sampler=ddim, levels=levels)
        * scheduler.final_alpha_cumprod.sqrt()
    )
    assert (x - wanted).abs().max() < 2e-4 * wanted.abs().max()
    pictures = theirs(PROMPTS, **asked, output_type="pt").images
    ours = (model.around.pictures(x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, pictures, rtol=0, atol=2e-3)


def test_a_copy_has_a_unet_of_its_own_and_shares_what_stands_around_it(model):
    other = copy.deepcopy(model)
    assert other.around is model.around
    assert other.denoiser.network is not model.denoiser.network
    with torch.no_grad():
        next(other.denoiser.network.parameters()).add_(1)
    assert fingerprint(other) != fingerprint(model)
    assert other.pipeline().unet is other.denoiser.network
    assert {name.split(".")[0] for name in other.state_dict()} == {"denoiser"}
    assert set(model.tell(["a"]).state_dict()) == set(other.state_dict())


def test_a_word_that_it_does_not_know_is_named(model):
    with pytest.raises(ValueError, match="no word 'purple'; it knows a, small, large, red"):
        model.tell(["a small purple star"])
    with pytest.warns(UserWarning, match="1 prompts have more than 12 tokens: cut"):
        model.tell(["a a a a a a a a a a a a a", "a small red star"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.tell(PROMPTS).classes == 2


def test_what_is_missing_is_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="is no pipeline on this machine, and could not be"):
        load_pipeline(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match=r"pip install 'dmd-tutorial\[text\]'"):
        load_pipeline()


def test_pictures_and_latents_are_scaled_as_the_pipeline_does(pipeline, model):
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = model.around.latents(x)
    assert latents.shape == (3, 4, 8, 8)
    theirs = pipeline.vae.encode(x).latent_dist.mean * 0.7
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-4)
    processed = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(model.around.pictures(latents), processed)
    assert prompted.SHAPES_TEXT.name == "shapes-text"
