"""What three networks and their training hold, as three copies and as adapters on one: counted.

    python -m benchmarks.lora_memory --out book/results/lora-memory.json

Bytes of weights, gradients, AdamW's two averages and the average of the generator, from the shapes
of what a `DistillationRun` holds: nothing is measured, no weights are needed, and activations come
on top, the same for both. Stable Diffusion's U-Net is built from its published configuration on
torch's "meta" device. Seconds on one core.
"""

import argparse
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from dmd_tutorial.adapters import FromDiffusers
from dmd_tutorial.files import write_json
from dmd_tutorial.runs.provenance import provenance
from dmd_tutorial.text_to_image.lora import ATTENTION, BLOCKS, lora_run
from dmd_tutorial.training import DistillationRun, DistillSettings

CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
NETWORKS = {
    "small": {
        "sample_size": 8, "block_out_channels": (48, 64), "layers_per_block": 1,
        "cross_attention_dim": 64, "attention_head_dim": 4, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", CROSS[0]), "up_block_types": (CROSS[1], "UpBlock2D"),
    },
    "Stable Diffusion v1.5": {
        "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
        "cross_attention_dim": 768, "attention_head_dim": 8, "norm_num_groups": 32,
        "down_block_types": (CROSS[0],) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + (CROSS[1],) * 3,
    },
}  # fmt: skip
RANKS = 4, 16, 64
LAYERS = {"attention": ATTENTION, "blocks": BLOCKS}
SETTINGS = DistillSettings(lambda_reg=0.0)


def teacher(name: str) -> FromDiffusers:
    """On "meta": shapes without numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**NETWORKS[name])
    return FromDiffusers(unet, DDPMScheduler())


def size(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes; what is held in several places counts once."""
    return sum(p.numel() * p.itemsize for p in {id(p): p for p in parameters}.values())


def held(run: DistillationRun) -> dict[str, int]:
    """What a run holds beside activations, in bytes."""
    trained = [*run.generator.parameters(), *run.critic.parameters()]
    parts = {
        "weights": size([*run.teacher.parameters(), *trained]), "gradients": size(trained),
        "optimiser": 2 * size(trained), "average": size(run.average.parameters()),
    }  # fmt: skip
    return parts | {"together": sum(parts.values())}


def rows(name: str) -> list[dict]:
    """Three copies, then adapters by layers and rank, on frozen weights of 32 and of 16 bits."""
    found = [{"method": "three copies", **held(DistillationRun(teacher(name), SETTINGS))}]
    for frozen in (torch.float32, torch.bfloat16):
        for layers, names in LAYERS.items():
            for rank in RANKS:
                run = lora_run(teacher(name).to(frozen), SETTINGS, rank, names)
                count = sum(p.numel() for p in run.critic.parameters())
                how = {"method": "LoRA", "frozen bits": 8 * frozen.itemsize, "layers": layers}
                found.append(how | {"rank": rank, "parameters of an adapter": count, **held(run)})
    for row in found:
        row["share of three copies"] = round(row["together"] / found[0]["together"], 4)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args(arguments).out
    networks = {
        name: {
            "parameters": sum(p.numel() for p in teacher(name).parameters()), "rows": rows(name)
        }
        for name in NETWORKS
    }  # fmt: skip
    made_by = provenance()
    made_by["versions"] |= {name: version(name) for name in ("diffusers", "peft")}
    what = "counted, not measured: bytes from shapes; activations come on top"
    write_json(out, {"what": what, "networks": networks, **made_by})
    for name, of in networks.items():
        print(name, of["parameters"])
        for row in of["rows"]:
            print("  ", *(f"{value / 2**20:.2f} MiB" if key in ("weights", "gradients", "optimiser",
                  "average", "together") else value for key, value in row.items()))  # fmt: skip


if __name__ == "__main__":
    main()
