"""The shipped text-to-image model of captioned shapes: how it was trained, stage by stage.

    python -m benchmarks.shapes_pipeline --work DIR

Pictures, reader, autoencoder, teacher, measures. Each stage is kept in DIR and done once, the
teacher goes on where it was stopped. The pipeline is saved as `diffusers` does, in 16 bits but for
the text encoder, which `transformers` would leave in 16 bits when it is loaded.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from dmd_tutorial.adapters import FromDiffusers
from dmd_tutorial.data.captioned import (
    WORDS,
    Reader,
    Scene,
    captions_of_one,
    followed,
    scene_of,
    shapes,
)  # fmt: skip
from dmd_tutorial.denoisers import denoising_loss
from dmd_tutorial.files import write_json, write_tensors
from dmd_tutorial.noise import lognormal_sigma, noise_like
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.text_to_image.prompted import Prompted, load_pipeline
from dmd_tutorial.training import FitRun, TeacherSettings, fit

PICTURES, TOKENS, WIDTH = 60_000, 12, 64
TEACHER = TeacherSettings(
    steps=5_000, batch=128, learning_rate=1.2e-3, warm_up=300, ema=0.9995,
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


def train_reader(x: Tensor, scene: Scene, steps: int = 7_000) -> Reader:
    """A little noise on its pictures, so that it reads what is not perfect, too."""
    torch.manual_seed(0)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        clean = floats(x[index])
        seen = clean + 0.06 * torch.rand(64, 1, 1, 1) * torch.randn_like(clean)
        descend(optimizer, reader.loss(seen, Scene(*(part[index] for part in scene))))
        schedule.step()
    return reader


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def train_autoencoder(x: Tensor, reader: Reader, steps: int = 5_200) -> AutoencoderKL:
    """L1, a little L2, the reader's first features, and a KL term that leaves latents noisy.

    What the decoder has learnt to overlook, of a latent's noise, a teacher need not get right.
    """
    torch.manual_seed(0)
    model = autoencoder()
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
        loss = loss + likeness(reader, again, clean, (1, 3))
        descend(optimizer, loss)
        schedule.step()
    return model


def polish_decoder(model: AutoencoderKL, x: Tensor, reader: Reader, steps: int = 3_000) -> None:
    """Train the decoder on while the encoder, and so every latent, stays as it is."""
    torch.manual_seed(1)
    decoder = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(decoder, 2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        clean = floats(x[torch.randint(len(x), (32,))])
        with torch.no_grad():
            latent = model.encode(clean).latent_dist
            noise = torch.rand(len(clean), 1, 1, 1) * latent.std * torch.randn_like(latent.mean)
        again = model.decode(latent.mean + noise).sample
        loss = functional.l1_loss(again, clean) + likeness(reader, again, clean, (1, 3, 5))
        descend(optimizer, loss)
        schedule.step()


def likeness(reader: Reader, x: Tensor, y: Tensor, layers: tuple[int, ...]) -> Tensor:
    """How far apart the reader's first features are, each in units of its own size."""
    total = x.new_zeros(())
    for number, layer in enumerate(reader.features[: max(layers) + 1]):
        x, y = layer(x), layer(y)
        if number in layers:
            total = total + 0.1 * functional.mse_loss(x, y) / y.square().mean()
    return total


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


def of_pipeline(pipeline: StableDiffusionPipeline, prompts: list[str], scale: float) -> Tensor:
    """Pictures in 50 steps of the pipeline's own sampler, from seed 4."""
    rng, parts = torch.Generator().manual_seed(4), []
    for k in range(0, len(prompts), 96):
        asked = {"guidance_scale": scale, "generator": rng, "output_type": "pt"}
        parts.append(pipeline(prompts[k : k + 96], 50, **asked).images)
    return 2 * torch.cat(parts) - 1


@torch.no_grad()
def measured(folder: Path, reader: Reader, count: int = 960) -> dict:
    """What reader, decoder and teacher are worth on pictures that no training has seen."""
    pipeline = load_pipeline(folder)
    model = Prompted(pipeline, captions_of_one())
    fresh = {name: shapes(2_000, torch.Generator().manual_seed(3), two) for name, two in
             (("one object", 0.0), ("two objects", 1.0))}  # fmt: skip
    report: dict = {"reader": {}, "reconstructed": {}, "teacher": {}}
    for name, drawn in fresh.items():
        again = model.around.pictures(model.around.latents(drawn.x)).clamp(-1, 1)
        report["reader"][name] = followed(drawn.x, drawn.scene, reader)
        report["reconstructed"][name] = followed(again, drawn.scene, reader)
        report["reconstructed"][name]["mean |error|"] = (again - drawn.x).abs().mean().item()
    prompts = [model.prompts[k % model.classes] for k in range(count)]
    two = fresh["two objects"].captions[: count // 2]
    runs = ("one object", prompts, (1, 2, 3, 5, 8)), ("two objects", two, (3,))
    for name, asked, scales in runs:
        for scale in scales:
            x = of_pipeline(pipeline, asked, scale)
            found = followed(x, scene_of(asked), reader) | {"pictures": len(x)}
            report["teacher"][f"{name}, scale {scale}"] = found
            print(name, scale, found, flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("book/results/shapes-text.json"))
    parser.add_argument("--count", type=int, default=960, help="of pictures a scale")
    parser.add_argument("--note", default="", help="what the record is to say of this run")
    arguments = parser.parse_args()
    work = arguments.work
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
    reader.requires_grad_(False)
    vae.load_state_dict(once("vae.pt", lambda: train_autoencoder(x, reader).state_dict()))

    def polished() -> dict:
        polish_decoder(vae, x, reader)
        return vae.state_dict()

    vae.load_state_dict(once("polished.pt", polished))
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
    save_pipeline(work / "shapes-text", vae, run.average, scaling)
    halved = {name: weight.half() for name, weight in reader.state_dict().items()}
    write_tensors(work / "shapes-reader.safetensors", halved)
    report = measured(work / "shapes-text", reader, arguments.count)
    how = {"teacher": asdict(TEACHER), "pictures": PICTURES, "note": arguments.note}
    write_json(arguments.out, report | {"settings": how, **provenance()})


if __name__ == "__main__":
    main()
