"""Presets: everything a run needs, as tables that can be read.

A value that leaves the paper (Yin et al. 2024, appendix; Karras et al. 2022, appendix F) has the
reason beside it. What holds for all of them: the paper names no average of the generator's
weights, here its average is what is kept and measured, because raw weights swing from step to
step (chapter 6).
"""

from dataclasses import dataclass, field, replace

import torch

from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.edm.networks import published_denoiser
from dmd_tutorial.networks import UNet
from dmd_tutorial.runs.compute import Compute
from dmd_tutorial.training import DistillSettings, TeacherSettings


@dataclass(frozen=True)
class Preset:
    """A data set with a teacher, pairs and a distillation that suit it."""

    data: str  # name of the data set, see `images.load_images`
    shape: tuple[int, int, int]  # of one image, (channels, height, width)
    classes: int  # 0 for none
    features: str = "digits"  # in which samples are compared with the data; shapes, or inception
    published: str = ""  # name of the published teacher; empty where it is trained here
    network: str = "UNet"  # of a teacher that is trained here: this book's, or one of `edm`
    network_options: dict = field(default_factory=dict)  # beyond shape and classes
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    pairs: int = 10_000  # pairs (z, y) of the anchor
    pair_steps: int = 18  # steps behind each pair; N of Heun cost 2N - 1 evaluations
    pair_sampler: str = "heun"  # one of `samplers`
    guidance: float = 1.0  # scale of a text teacher's guidance, which multiplies
    lora: int = 0  # rank of the adapters that student and critic are; 0: networks of their own
    pair_batch: int = 1_000  # pairs made at a time: a matter of memory
    warm_start: DistillSettings | None = None  # regression on the pairs, before the distillation
    distill: DistillSettings = field(default_factory=DistillSettings)
    compute: Compute = field(default_factory=Compute)
    cost: str = ""  # of the whole road, and whether that was measured or counted

    def new_teacher(self) -> EDMDenoiser:
        """An untrained teacher; its weights depend on the teacher's seed alone."""
        shape, options = (self.shape[1], self.shape[0], self.classes), self.network_options
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.teacher.seed)
            if self.network == "UNet":
                denoiser = EDMDenoiser(UNet(*shape, **options))
            else:
                denoiser = published_denoiser(*shape, self.network, **options)
            return denoiser.to(memory_format=torch.channels_last)

    def __str__(self) -> str:
        of, warm, to = self.teacher, self.warm_start, self.distill
        trained = f"{self.network}, {of.steps:,} steps of {of.batch}, rate {of.learning_rate:g}"
        rates = f"{to.learning_rate:g} and {to.critic_learning_rate:g}"
        rows = {
            "data": f"{self.data or 'your own images'}, {self.shape}, {self.classes} classes",
            "teacher": self.published or trained,
            "pairs": f"{self.pairs:,}, {self.pair_steps} {self.pair_sampler.title()} steps each",
            "warm start": warm
            and f"{warm.steps:,} steps of {warm.batch_pairs} pairs, rate {warm.learning_rate:g}",
            "distil": f"{to.steps:,} steps of {to.batch}, {to.batch_pairs} pairs, rates {rates}",
            "cost": self.cost,
        }
        return "\n".join(f"  {name:<12}{row}" for name, row in rows.items() if row)


# Regression on the pairs alone: the loss is their distance as it is.
REGRESSION = DistillSettings(matching=False, lambda_reg=1.0)

# --- digits: minutes to an hour on a CPU ---------------------------------------------------------

# Where digits leave the paper's balance: scores are compared up to sigma 5 only, above which 8 x 8
# digits are all noise; and the anchor counts fully: the paper's 0.25 goes with LPIPS, which needs
# larger images, this distance is that of pixels.
ON_DIGITS = DistillSettings(lambda_reg=1.0, grid_max=5.0)

# The networks are small and the images few, so rates are higher and runs shorter; the student
# first regresses on the pairs, which brings it near the teacher in minutes; the critic is faster
# than the generator, by its rate and by its number of steps. These are the settings of the
# shipped networks.
DIGITS = Preset(
    data="digits", shape=(1, 8, 8), classes=10, pairs=50_000,
    warm_start=replace(
        ON_DIGITS, matching=False, steps=16_000, batch_pairs=128, learning_rate=1e-3, warm_up=200,
        decay=0.95, ema=0.999,
    ),
    distill=replace(
        ON_DIGITS, steps=2_500, learning_rate=2e-5, critic_learning_rate=3e-4, warm_up=200,
        decay=0.6, ema=0.999,
    ),
    cost="40 minutes on one core, half of it regression: measured",
)  # fmt: skip

# The same road for `dmd demo`: every stage is cut short.
DEMO = replace(
    DIGITS, cost="6 minutes on one core: measured",
    teacher=TeacherSettings(steps=1_500), pairs=3_000,
    warm_start=replace(
        ON_DIGITS, matching=False, steps=1_000, learning_rate=1e-3, decay=0.9, ema=0.995
    ),
    distill=replace(ON_DIGITS, steps=300),
)  # fmt: skip

# --- the paper's settings ------------------------------------------------------------------------

PAPER = DistillSettings(
    steps=300_000, batch=392, batch_pairs=392,  # on 7 GPUs of 56 each
    learning_rate=5e-5, critic_learning_rate=5e-5, warm_up=500, weight_decay=0.01, clip=10.0,
    decay=0.0,  # the rate stays level to the end
    ema=0.9999,  # an average over about 10,000 iterations
    weighting="eq8", grid_max=80.0, lambda_reg=0.25, distance="lpips", critic_steps=1,
)  # fmt: skip

CIFAR10_COND = Preset(
    cost="90 to 180 hours on one large GPU, 183 TFLOP an iteration: counted, not measured",
    data="cifar10", shape=(3, 32, 32), classes=10, features="inception",
    published="edm-cifar10-32x32-cond-vp", pairs=100_000, distill=PAPER,
)  # fmt: skip

CIFAR10_UNCOND = replace(
    CIFAR10_COND, classes=0, published="edm-cifar10-32x32-uncond-vp", pairs=500_000,
    distill=replace(PAPER, lambda_reg=0.5),
)  # fmt: skip

IMAGENET64 = Preset(
    cost="400 to 800 hours on one large GPU, 809 TFLOP an iteration: counted, not measured",
    data="imagenet64", shape=(3, 64, 64), classes=1000, features="inception",
    published="edm-imagenet-64x64-cond-adm", pairs=25_000, pair_steps=256, pair_batch=200,
    distill=replace(
        PAPER, steps=350_000, batch=336, batch_pairs=336, learning_rate=2e-6,
        critic_learning_rate=2e-6,
    ),
    # The paper says "mixed precision". bfloat16, because float16 diverged for others (DMD2).
    compute=Compute(mixed_precision="bf16", frozen="bf16"),
)  # fmt: skip

# --- one GPU -------------------------------------------------------------------------------------

# One T4 (16 GiB, no bfloat16), an evening. Regression included, a fiftieth of the paper's steps,
# and a sixth of its batch: a taste, not its numbers.
CIFAR10_T4 = replace(
    CIFAR10_COND,
    cost="about 6 hours on a T4: counted, not measured",
    pairs=10_000,  # 350,000 evaluations of the teacher, about an hour
    pair_batch=250,
    warm_start=replace(  # brings the student near the teacher before two networks train
        REGRESSION, distance="lpips", steps=2_000, learning_rate=1e-4, warm_up=200, ema=0.999
    ),
    distill=replace(
        PAPER, steps=4_000, batch=64, batch_pairs=64, warm_up=200, ema=0.999,
        learning_rate=2e-5,  # a small batch is a noisy gradient; the critic's stays the paper's
        decay=0.5,  # a short run ends where it is, so its rate goes to 0
    ),
    compute=Compute(mixed_precision="fp16", frozen="fp16", accumulation=4),
)  # fmt: skip

# A DDPM++ of about 7 M parameters, trained here: needs no published weights and no download but
# the data. The anchor is L2, for LPIPS would need a download; the paper measured 2.78 with it
# instead of 2.66 (FID, CIFAR-10), and names no other lambda_reg for that. Sizes are what an hour of
# one large GPU pays for, with all that `benchmarks/full_size.py` compares.
CIFAR10_SMALL = replace(
    CIFAR10_COND, published="", network="SongUNet",
    cost="about 10 minutes on an H100, 19 on an A100: counted, not measured",
    network_options={
        "model_channels": 64,  # DDPM++ has 128
        "channel_mult": [1, 2, 2],  # DDPM++: 2, 2, 2
        "num_blocks": 2,  # DDPM++: 4
        "attn_resolutions": [16],
        "dropout": 0.1,
    },
    teacher=TeacherSettings(
        steps=15_000,  # EDM shows 200 million images, these are 3.8 million
        batch=256, learning_rate=1e-3, warm_up=1_000, ema=0.999,
        flip=True,  # EDM augments more; mirroring is what needs no extra input
    ),
    pairs=50_000,
    warm_start=replace(  # minutes of regression spare hours of distillation
        REGRESSION, steps=8_000, batch=128, batch_pairs=128, learning_rate=5e-4, warm_up=400,
        decay=0.8, ema=0.999,
    ),
    distill=replace(
        PAPER, distance="l2", steps=3_000, batch=128, batch_pairs=128, warm_up=200, ema=0.999,
        critic_learning_rate=2e-4,  # from digits: a faster critic follows the generator
        decay=0.5,
    ),
    compute=Compute(mixed_precision="bf16", frozen="bf16", compile=True, on_device=True),
)  # fmt: skip

# The same on a T4, which has no bfloat16; a batch needs a third of its memory.
CIFAR10_SMALL_T4 = replace(
    CIFAR10_SMALL, cost="about 3 hours on a T4: counted, not measured",
    compute=Compute(mixed_precision="fp16", frozen="fp16", on_device=True),
)  # fmt: skip

# Your own images: a few hundred are enough to see the whole road, too few for variety. Measured on
# 500 pictures of 16 pixels (`benchmarks/own_images.py`): there a quarter of an hour on one core;
# at 32 three quarters, counted from the time of a step.
OWN_IMAGES = Preset(
    cost="on one core a quarter of an hour at 16 pixels: measured; 43 minutes at 32: counted",
    data="", shape=(3, 32, 32), classes=0, features="inception",
    network_options={"multipliers": [1, 2, 4]},  # three times as fast as a DDPM++ of its size
    # Each of 500 pictures is seen about 200 times: then the loss on others is lowest, after twice
    # as many steps it is a tenth higher.
    teacher=TeacherSettings(steps=1_500, batch=64, learning_rate=1e-3, flip=True),
    pairs=2_000, pair_batch=250,
    warm_start=replace(REGRESSION, steps=600, learning_rate=5e-4, decay=0.9),
    distill=DistillSettings(
        steps=100, batch=32, batch_pairs=32,  # regression did nearly all; 300 steps are no better
        learning_rate=2e-5,  # at 1e-4 the student leaves the teacher, and the images
        critic_learning_rate=4e-4, warm_up=20,
        grid_max=80.0,  # up to 5, as on digits, is worse than the regression alone
        lambda_reg=0.25, critic_steps=2,  # five at equal cost are worse
    ),
)  # fmt: skip

# --- text to image -------------------------------------------------------------------------------

# Captioned shapes: all of it in latents, the anchor, too.
SHAPES_TEXT = Preset(
    cost="about an hour on one core: counted, not measured",
    data="shapes", shape=(3, 32, 32), classes=32, features="shapes", published="shapes-text",
    pairs=6_000, pair_steps=50, pair_sampler="pndm", pair_batch=500, guidance=3.0,
    warm_start=replace(
        REGRESSION, steps=3_000, learning_rate=5e-4, warm_up=200, decay=0.9, ema=0.999
    ),
    distill=DistillSettings(steps=1_000, learning_rate=2e-5, critic_learning_rate=2e-4),
)  # fmt: skip

# The paper's Stable Diffusion on one GPU instead of 72: adapters instead of networks, and DMD2's
# rule, five critic steps without pairs. With --lambda-reg 0.25 and pairs it is the paper's.
# Counted: its U-Net has 859.5 M parameters, a forward pass of a latent takes 0.80 TFLOP (multiply
# and add are two), a backward pass through frozen weights as much. Memory 37 GiB: weights 3.2,
# the teacher in bf16 1.6, adapters with all they need 2.3, activations of 8 latents at a time 29.8
# (--accumulation 16: 14.9).
SD15_LORA = Preset(
    cost="3 to 6 hours on one large GPU, 976 TFLOP an iteration: counted, not measured",
    data="", shape=(3, 512, 512), classes=0, features="inception",
    published="stable-diffusion-v1-5", guidance=3.0, lora=64,
    pairs=10_000, pair_steps=50, pair_sampler="pndm", pair_batch=16,
    distill=replace(
        PAPER, steps=2_000, batch=64, batch_pairs=64, learning_rate=1e-5,
        critic_learning_rate=1e-5, lambda_reg=0.0, distance="l2", critic_steps=5, ema=0.999,
    ),
    compute=Compute(mixed_precision="bf16", frozen="bf16", accumulation=8),
)  # fmt: skip

PRESETS = {
    "digits": DIGITS, "demo": DEMO,
    "cifar10-cond": CIFAR10_COND, "cifar10-uncond": CIFAR10_UNCOND, "imagenet64": IMAGENET64,
    "cifar10-t4": CIFAR10_T4, "cifar10-small": CIFAR10_SMALL,
    "cifar10-small-t4": CIFAR10_SMALL_T4, "own-images": OWN_IMAGES,
    "shapes-text": SHAPES_TEXT, "sd15-lora": SD15_LORA,
}  # fmt: skip
