"""The shipped text-to-image model of captioned shapes: how it was trained, stage by stage.

    python -m benchmarks.shapes_pipeline --work DIR

Pictures, reader, autoencoder, teacher; each stage is kept in DIR and done once, the teacher goes on
where it was stopped. At the end the pipeline is saved as `diffusers` does, in 16 bits but for the
text encoder, which `transformers` would otherwise leave in 16 bits when it is loaded.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from dmd_tutorial.adapters import FromDiffusers
from dmd_tutorial.denoisers import denoising_loss
from dmd_tutorial.noise import lognormal_sigma, noise_like
from dmd_tutorial.text_to_image.shapes import WORDS, Reader, Scene, shapes
from dmd_tutorial.training import FitRun, FitSettings, TeacherSettings, fit

PICTURES, TOKENS, WIDTH = 60_000, 12, 64
READER = FitSettings(steps=4_000, batch=64, learning_rate=2e-3, ema=0.995)
TEACHER = TeacherSettings(
    steps=7_000, batch=128, learning_rate=1.2e-3, warm_up=300, ema=0.9995,
    log_mean=-0.4, log_std=1.3,  # EDM's, for data of standard deviation 1
    no_label=0.12,
)  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word; a word that it does not know becomes <unk>."""
    words = ["<start>", "<end>", "<pad>", "<unk>", *WORDS]
    by_words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    by_words.normalizer = normalizers.Lowercase()
    by_words.pre_tokenizer = pre_tokenizers.Whitespace()
    by_words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=by_words, bos_token="<start>", eos_token="<end>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=TOKENS,
    )  # fmt: skip


def text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 4, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPTextModel(config)


def autoencoder() -> AutoencoderKL:
    """32 x 32 x 3 to 8 x 8 x 4; narrow, because a student's second evaluation is its decoder."""
    return AutoencoderKL(
        sample_size=32, latent_channels=4, block_out_channels=(8, 16, 32), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    """Cross-attention at 4 x 4 and in the middle. `attention_head_dim` is the number of heads."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(48, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH,
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


def scheduler() -> PNDMScheduler:
    """Stable Diffusion's levels, but for the prediction: v is well behaved at the highest one."""
    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1, set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip


class Captioned(nn.Module):
    """Text encoder and U-Net as one denoiser, whose labels are tokens: what a teacher trains."""

    sigma_data = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.denoiser = text_encoder(), FromDiffusers(unet(), scheduler())

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        return self.denoiser(x, sigma, self.text_encoder(tokens).last_hidden_state)


def pictures(count: int = PICTURES) -> tuple[Tensor, Scene, list[str]]:
    """What all stages are trained on, 8-bit levels, from seeds 1 and 2."""
    rngs = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    parts = [shapes(1000, rng) for rng in rngs for _ in range(count // 2000)]
    x = torch.cat([((part.x + 1) * 127.5).round().to(torch.uint8) for part in parts])
    scene = Scene(*(torch.cat(each) for each in zip(*(p.scene for p in parts), strict=True)))
    return x, scene, [caption for part in parts for caption in part.captions]


def floats(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1


def train_reader(x: Tensor, scene: Scene) -> Reader:
    """A little noise on its pictures, so that it reads what is not perfect, too."""
    torch.manual_seed(0)
    run = FitRun(Reader(), READER)

    def draw(rng: torch.Generator) -> tuple:
        index = torch.randint(len(x), (READER.batch,), generator=rng)
        strength = 0.06 * torch.rand(READER.batch, 1, 1, 1, generator=rng)
        clean = floats(x[index])
        return clean + strength * noise_like(clean, rng), *(part[index] for part in scene)

    for _ in fit(run, draw, lambda reader, pictures, *scene: reader.loss(pictures, Scene(*scene))):
        pass
    return run.average  # type: ignore[return-value]


def train_autoencoder(x: Tensor, reader: Reader, steps: int = 5_200) -> AutoencoderKL:
    """L1, a little L2, the reader's first features, and a KL term that leaves latents noisy.

    What the decoder has learnt to overlook, of a latent's noise, a teacher need not get right.
    """
    torch.manual_seed(0)
    model, reader = autoencoder(), reader.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        clean = floats(x[torch.randint(len(x), (32,))])
        latent = model.encode(clean).latent_dist
        again = model.decode(latent.sample()).sample
        loss = functional.l1_loss(again, clean) + 0.3 * functional.mse_loss(again, clean)
        loss = loss + 1e-5 * latent.kl().mean()
        ours, theirs = again, clean
        for number, layer in enumerate(reader.features[:4]):
            ours, theirs = layer(ours), layer(theirs)
            if number in (1, 3):
                loss = loss + 0.1 * functional.mse_loss(ours, theirs) / theirs.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def latents_of(model: AutoencoderKL, x: Tensor) -> tuple[Tensor, float]:
    """The means of the pictures' latents at unit standard deviation, and what scaled them."""
    means = torch.cat([model.encode(floats(some)).latent_dist.mode() for some in x.split(500)])
    scaling = 1 / means.std().item()
    return means * scaling, scaling


def teacher_loop(run: FitRun, latents: Tensor, tokens: Tensor, null: Tensor) -> Iterator:
    low, high = run.network.denoiser.sigma_range

    def draw(rng: torch.Generator) -> tuple:
        index = torch.randint(len(latents), (TEACHER.batch,), generator=rng)
        x, told = latents[index], tokens[index]
        sigma = lognormal_sigma(len(x), TEACHER.log_mean, TEACHER.log_std, rng)
        hidden = torch.rand(len(x), 1, generator=rng) < TEACHER.no_label
        return (
            x,
            sigma.clamp(low, high),
            noise_like(x, rng),
            torch.where(hidden, null, told),
        )

    return fit(run, draw, denoising_loss)


def save_pipeline(folder: Path, vae: AutoencoderKL, told: Captioned, scaling: float) -> None:
    vae.register_to_config(scaling_factor=scaling)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=told.text_encoder, tokenizer=tokenizer(),
        unet=told.denoiser.network.half(), scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=TEACHER.steps)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)

    def once(name: str, make):
        path = work / name
        if not path.exists():
            torch.save(make(), path)
        return torch.load(path)

    x, scene, captions = once("pictures.pt", pictures)
    scene, reader, vae = Scene(*scene), Reader(), autoencoder()
    reader.load_state_dict(once("reader.pt", lambda: train_reader(x, scene).state_dict()))
    vae.load_state_dict(once("vae.pt", lambda: train_autoencoder(x, reader).state_dict()))
    latents, scaling = once("latents.pt", lambda: latents_of(vae, x))
    told = {"padding": "max_length", "return_tensors": "pt"}
    tokens, null = tokenizer()(captions, **told).input_ids, tokenizer()([""], **told).input_ids
    torch.manual_seed(0)
    run = FitRun(Captioned(), TEACHER)
    checkpoint = work / "teacher.ckpt"
    if checkpoint.exists():
        run.load_state_dict(torch.load(checkpoint))
    started, loss = time.monotonic(), 0.0
    for metric in teacher_loop(run, latents, tokens, null):
        loss = loss + (metric.loss - loss) * max(0.005, 1 / metric.step)
        if metric.step % 200 == 0:
            print(f"{metric.step} {loss:.4f} {time.monotonic() - started:.0f} s", flush=True)
            torch.save(run.state_dict(), checkpoint)
    save_pipeline(work / "pipeline", vae, run.average, scaling)


if __name__ == "__main__":
    main()
