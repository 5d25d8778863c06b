"""The table of text-to-image students: what it says of pictures, costs and seeds; resuming."""

import json
from collections import Counter
from typing import NamedTuple

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import shapes_pipeline, text_to_image  # noqa: E402
from benchmarks.prompt_measures import Drawn, Gauge, drawn, spread  # noqa: E402
from benchmarks.text_students import METHODS, QUICK, Workshop, costs  # noqa: E402
from dmd_tutorial.data import balanced_labels  # noqa: E402
from dmd_tutorial.data.captioned import Reader, captions_of_one, scene_of  # noqa: E402
from dmd_tutorial.text_to_image.prompted import Prompted, load_pipeline  # noqa: E402


class Files(NamedTuple):
    pipeline: str
    reader: str


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    """A pipeline with a tiny U-Net and a reader, at random weights."""
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
        cross_attention_dim=shapes_pipeline.WIDTH,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=shapes_pipeline.autoencoder(), text_encoder=shapes_pipeline.text_encoder(),
        tokenizer=shapes_pipeline.tokenizer(), unet=unet, scheduler=shapes_pipeline.scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    torch.save(Reader().state_dict(), folder / "reader.pt")
    return Files(str(folder / "pipeline"), str(folder / "reader.pt"))


@pytest.fixture
def shop(files, tmp_path) -> Workshop:
    model = Prompted(load_pipeline(files.pipeline), captions_of_one())
    return Workshop(model, tmp_path, QUICK, lambda: False)


def run(files, folder, over=lambda: False, methods=("DMD",)) -> dict:
    given = ["--pipeline", files.pipeline, "--reader", files.reader, "--quick", "--seeds", "0", "1"]
    given += ["--work", str(folder / "work"), "--out", str(folder / "out.json")]
    text_to_image.main([*given, "--methods", *methods], over)
    return json.loads((folder / "out.json").read_text())


def measured(report: dict) -> list[dict]:
    names = "row", "seed", "fingerprint", "evaluations", "per_picture", "measured"
    return [{name: row.get(name) for name in names} for row in report["rows"]]


def test_stopped_and_continued_gives_the_same_rows(files, tmp_path):
    whole = run(files, tmp_path / "whole")
    calls, stopped_within, parts = 0, [], {}

    def over() -> bool:
        nonlocal calls
        calls += 1
        return calls in (5, 19, 23)  # a teacher's row, within a training, at the end of another

    while not parts:
        try:
            parts = run(files, tmp_path / "parts", over)
        except SystemExit as stop:
            kept = (tmp_path / "parts").rglob("*.ckpt")
            stopped_within.append((stop.code, [path.stem for path in kept]))
    assert {code for code, _ in stopped_within} == {3}
    assert [kept for _, kept in stopped_within] == [[], ["regression"], ["DMD"]]
    assert measured(parts) == measured(whole)
    students = [row for row in whole["rows"] if row["seed"] is not None]
    assert [(row["row"], row["seed"]) for row in students] == [
        (name, seed) for seed in (0, 1) for name in ("regression", "DMD")
    ]
    assert len({row["fingerprint"] for row in students}) == 4
    numbers = whole["summary"]["DMD"]["to_drawn frechet"]
    assert numbers["of_trainings"] > 0
    assert numbers["of_measure"] > 0
    with pytest.raises(ValueError, match="was made by"):  # sizes that do not belong together
        text_to_image.main(
            ["--pipeline", files.pipeline, "--reader", files.reader, "--pictures", "96", "--quick",
             "--work", str(tmp_path / "whole/work"), "--out", str(tmp_path / "whole/out.json")]
        )  # fmt: skip


def test_seeds_share_no_noise(shop):
    noises = [shop.pairs(seed).z for seed in (0, 1)]
    noises += [shop.noise(number) for number in (*text_to_image.NOISES, text_to_image.REFERENCE)]
    noises += [shop.noise(n) for seed in (0, 1) for n in text_to_image.student_noises(seed)]
    rows = torch.cat(noises).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    data = torch.cat([shop.data(seed).x for seed in (0, 1)]).flatten(1)
    assert len(data.unique(dim=0)) == len(data)
    assert shop.pairs(0).y.equal(shop.pairs(0).y)


@pytest.mark.parametrize("name", [name for name in METHODS if "regression on" not in name])
def test_costs_are_those_of_a_real_training(shop, name):
    """Every call of a U-Net counts its latents, three times where a gradient is wanted."""
    if start := METHODS[name].start:
        shop.train(start, 0)
    if name != "DMD2":
        shop.pairs(0)
    shop.data(0)
    spent = Counter()

    def count(module, inputs, output):
        if isinstance(module, diffusers.UNet2DConditionModel):
            spent["all"] += len(inputs[0]) * (3 if output.sample.requires_grad else 1)

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    before = {n: p.clone() for n, p in shop.model.named_parameters()}
    try:
        took = shop.train(name, 0)
    finally:
        hook.remove()
    assert all(p.equal(before[n]) for n, p in shop.model.named_parameters())  # the teacher's
    # of adversarial passes half of the network counts with a backward pass: 1.5 instead of 3
    half = 1.5 * 4 * (1 + 3) * 2 if name == "DMD2" else 0
    assert spent["all"] - half == took["evaluations"] == costs(QUICK)[name]


def test_what_is_compared_costs_the_same():
    cost = costs(text_to_image.Sizes())
    assert cost["regression on, equal cost"] == pytest.approx(cost["DMD"], rel=1e-3)
    with_pairs = cost["pairs"] + cost["regression"] + cost["DMD"]
    for name in ("DMD2", "latent consistency"):
        assert cost[name] == pytest.approx(with_pairs, rel=0.03)


def test_the_gauge_tells_what_is_wrong_with_pictures():
    captions = captions_of_one()
    label, rng = balanced_labels(384, 32), torch.Generator().manual_seed(0)
    good, other, reference = (drawn(captions, label, rng) for _ in range(3))

    class Knows(Reader):  # an untrained one has features, but cannot read
        def read(self, x, batch=500):
            return type(said)(*(part[label] for part in said))

    said = scene_of(captions)
    gauge = Gauge(Knows(), captions, reference, other)
    found = gauge.measure(good)
    assert found["follows"] == dict.fromkeys(("kind", "colour", "size", "arrangement", "all"), 1)
    assert found["variety"] == pytest.approx(1, abs=0.05)
    assert found["saturation"] == pytest.approx(1, abs=0.02)
    turned = gauge.measure(good._replace(label=(label + 1) % 32))  # the next prompt's kind
    assert turned["follows"]["kind"] == turned["follows"]["all"] == 0
    assert turned["follows"]["size"] > 0.9
    burnt = gauge.measure(good._replace(x=1.1 * good.x))
    assert burnt["saturation"] == pytest.approx(1.09, abs=0.02)
    faded = gauge.measure(good._replace(x=0.5 * good.x))
    assert faded["saturation"] == pytest.approx(0.55, abs=0.02)  # its faintest edges count no more
    assert faded["to_drawn"]["frechet"] > 4 * found["to_drawn"]["frechet"]
    same = gauge.measure(Drawn(good.x[label], label))  # one picture for each prompt
    assert same["variety"] == pytest.approx(0, abs=1e-3)
    assert same["to_drawn"]["recall"] < 0.6 * found["to_drawn"]["recall"]


def test_spread_of_training_and_of_the_measure():
    found = spread([[{"x": 1.0}, {"x": 3.0}], [{"x": 5.0}, {"x": 7.0}]], "x")
    assert found == {"mean": 4, "of_trainings": pytest.approx(8**0.5), "of_measure": 2**0.5}


def test_the_teacher_makes_what_a_pipeline_of_diffusers_makes(files, tmp_path):
    """One that predicts noise: of predictions of v `diffusers` averages v, as no paper says."""
    pipeline = load_pipeline(files.pipeline)
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    shop = Workshop(Prompted(pipeline, captions_of_one()), tmp_path, QUICK, lambda: False)
    z, label, levels = shop.noise(0)[:3], torch.tensor([4, 0, 31]), shop.levels.float()
    theirs = pipeline(
        [shop.model.prompts[k] for k in label], num_inference_steps=QUICK.steps,
        guidance_scale=shop.teacher.scale, output_type="latent",
        latents=z * levels[0] / (1 + levels[0] ** 2).sqrt(),
    ).images  # fmt: skip
    ours = shop.walk(shop.teacher, z, label)
    torch.testing.assert_close(ours, theirs * (1 + levels[-1] ** 2).sqrt(), rtol=1e-4, atol=1e-4)
    other = shop.walk(shop.model, z, label)  # without guidance
    assert (other - ours).abs().max() > 1e-3
