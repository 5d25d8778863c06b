"""A text-to-image model through every command: pairs, student, pictures of a prompt, measures."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DDIMScheduler, StableDiffusionPipeline

from benchmarks import shapes_pipeline
from dmd_tutorial import anchor, features, pretrained, samplers
from dmd_tutorial.adapters import Guided
from dmd_tutorial.checks import NO_CLASS
from dmd_tutorial.data import captioned as shapes
from dmd_tutorial.denoisers import image_shape
from dmd_tutorial.runs import images, memory
from dmd_tutorial.runs.cli import main, parse
from dmd_tutorial.runs.compute import Compute
from dmd_tutorial.runs.presets import PRESETS
from dmd_tutorial.text_to_image import prompted
from dmd_tutorial.text_to_image.lora import LowRank
from dmd_tutorial.training import DistillSettings

RED, BLUE = "a small red star", "a large blue circle"


@pytest.fixture(scope="module", autouse=True)
def shipped(tmp_path_factory):
    """A pipeline and a reader of random weights in place of the shipped ones."""
    folder = tmp_path_factory.mktemp("shipped")
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=shapes_pipeline.autoencoder().half(), text_encoder=shapes_pipeline.text_encoder(),
        tokenizer=shapes_pipeline.tokenizer(), unet=shapes_pipeline.unet().half(),
        scheduler=shapes_pipeline.scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    reader = folder / "reader.safetensors"
    pretrained.write_tensors(reader, shapes.Reader().state_dict())
    features._extractor.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompted, "SHAPES_TEXT", folder / "pipeline")
        patch.setattr(prompted.load_pipeline, "__defaults__", (folder / "pipeline",))
        patch.setattr(shapes, "READER_FILE", reader)
        patch.setattr(images, "SHAPES", 200)
        yield
    features._extractor.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs and a student, made by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{RED}\n\n  {BLUE}\n")
    shared = [
        "--teacher",
        "shapes-text",
        "--prompts",
        str(prompts),
        "--pairs",
        str(folder / "pairs"),
    ]
    pairs = ["--count", "1000", "--steps", "2", "--sampler", "ddim"]
    steps = ["--warm-start-steps", "3", "--steps", "3", "--batch", "4", "--batch-pairs", "4"]
    out = ["--out", str(folder), "--picture-steps", "2"]
    assert main(["make-pairs", *shared, *pairs]) == 0
    assert main(["distill", *shared, *steps, *out]) == 0
    return folder


def test_the_commands_take_the_preset_of_the_model_that_is_named():
    made, distilled = (
        parse(["make-pairs", "--teacher", "shapes-text"]),
        parse(["distill", "--preset", "shapes-text"]),
    )
    assert (made.preset, made.count, made.steps, made.sampler) == ("shapes-text", 6000, 50, "pndm")
    assert distilled.teacher == "shapes-text"
    assert parse(["make-pairs"]).sampler == "heun"


def test_pairs_are_what_the_pipeline_itself_makes_under_guidance(folder):
    (file,) = (folder / "pairs").glob("*.safetensors")
    pairs = load_file(file)
    pipeline = prompted.load_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    some = slice(0, 4)
    model = prompted.Prompted(prompted.load_pipeline())
    level, end = model.ladder(2)[[0, -1]].float()
    x = pipeline(
        [RED, BLUE, RED, BLUE], latents=pairs["z"][some] * level / (1 + level**2).sqrt(),
        guidance_scale=3.0, num_inference_steps=2, output_type="latent",
    ).images  # fmt: skip
    theirs = x * (1 + end**2).sqrt()
    torch.testing.assert_close(pairs["y"][some], theirs, atol=2e-4, rtol=2e-4)
    assert pairs["label"][:4].tolist() == [0, 1, 0, 1]
    (made_by,) = anchor.header_of(file, "pairs", "made_by")
    told = {name: made_by[name] for name in ("guidance", "sampler", "steps", "evaluations")}
    assert told == {"guidance": 3.0, "sampler": "ddim", "steps": 2, "evaluations": 4}


def test_pairs_of_one_scale_or_of_other_prompts_are_no_other_s(folder):
    model = prompted.shapes_text().tell([RED, BLUE])
    assert len(anchor.load_pairs(folder / "pairs", Guided(model, 3.0)).z) == 1000
    with pytest.raises(ValueError, match=r"made with guidance 3\.0, not 5\.0"):
        anchor.load_pairs(folder / "pairs", Guided(model, 5.0))
    with pytest.raises(ValueError, match=r"made with guidance 3\.0, not 1\.0"):
        anchor.load_pairs(folder / "pairs", model)
    with pytest.raises(ValueError, match="made with prompts"):
        anchor.load_pairs(folder / "pairs", Guided(model.tell([BLUE, RED]), 3.0))


def test_a_run_of_another_scale_does_not_go_on(folder, capsys):
    command = ["distill", "--teacher", "shapes-text", "--prompts", str(folder / "prompts.txt"),
               "--warm-start-steps", "0", "--lambda-reg", "0", "--steps", "3", "--batch", "4",
               "--out", str(folder / "free")]  # fmt: skip
    assert main([*command, "--guidance", "2", "--minutes", "0.0001"]) == 0
    assert main(command) == 2
    assert "guidance: 2.0 -> 3.0" in capsys.readouterr().err


def test_a_student_is_the_unet_alone_and_comes_back_with_its_prompts(folder):
    path = folder / "student.safetensors"
    unet = prompted.load_pipeline().unet
    names = {f"denoiser.network.{name}" for name in unet.state_dict()}
    assert set(load_file(path)) == names
    student = pretrained.load(path)
    assert isinstance(student, pretrained.OneStepGenerator)
    assert student.denoiser.prompts == (RED, BLUE)
    assert student.sigma_max == pytest.approx(14.61, abs=0.01)
    assert image_shape(student) == ((4, 8, 8), 2)
    teacher = prompted.shapes_text().tell([RED, BLUE])
    z, label = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    untrained = pretrained.OneStepGenerator(teacher)(z, label)
    assert 1e-4 < (student(z, label) - untrained).abs().mean() < 0.5
    assert (student(z, label) - student(z, label.flip(0))).abs().max() > 1e-4
    with Image.open(folder / "student.png") as grid:
        assert grid.size == (10 * 66 + 2, 10 * 66 + 2)  # pictures, not latents
        assert grid.mode == "RGB"


def test_samples_of_a_prompt(folder, capsys):
    student, out = str(folder / "student.safetensors"), folder / "x"
    file, found = out.with_suffix(".safetensors"), {}
    command = ["sample", "--model", student, "--out", str(out), "--seeds", "3,5"]
    for prompt in (RED, BLUE, "a star left of a circle"):
        assert main([*command, "--prompt", prompt]) == 0
        found[prompt] = load_file(file)
        assert found[prompt]["x"].shape == (2, 3, 32, 32)
        assert found[prompt]["label"].tolist() == [0, 0]
    assert main([*command, "--label", BLUE]) == 0  # a prompt that the student knows
    assert torch.equal(load_file(file)["x"], found[BLUE]["x"])
    assert not torch.allclose(found[RED]["x"], found[BLUE]["x"], atol=1e-4)
    z = torch.stack(
        [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 5)]
    )
    generator = pretrained.load(student)
    with torch.no_grad():
        around, told = generator.denoiser.around, generator.denoiser.around.embed([RED])
        latents = generator(z, told.expand(2, -1, -1))
    vae = around.pipeline.vae
    theirs = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(found[RED]["x"], theirs, atol=1e-4, rtol=1e-4)
    assert (
        main(["sample", "--model", student, "--out", str(out), "--count", "4", "--prompt", RED])
        == 0
    )
    assert len(load_file(file)["x"]) == 4


def test_a_teacher_draws_guided(folder):
    out, found = folder / "x", {}
    command = ["sample", "--model", "shapes-text", "--seeds", "1", "--steps", "3", "--prompt", RED]
    for scale in ("1", "3", None):
        given = ["--guidance", scale] if scale else []
        assert main([*command, "--out", str(out), *given]) == 0
        found[scale] = load_file(out.with_suffix(".safetensors"))["x"]
    assert torch.equal(found["3"], found[None])  # the preset's
    assert (found["3"] - found["1"]).abs().max() > 1e-3
    teacher = prompted.shapes_text().tell([RED])
    z = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))[None]
    zero = torch.zeros(1, dtype=torch.int64)
    for scale in (1, 3):
        guided = Guided(teacher.eval(), scale, NO_CLASS)
        x = teacher.around.pictures(samplers.sample(guided, z, zero, steps=3))
        torch.testing.assert_close(found[str(scale)], x, atol=1e-4, rtol=1e-4)


def test_evaluate_says_what_was_followed(folder, capsys, monkeypatch):
    """With a reader that sees what is there, and pictures that were drawn, not made."""
    wanted = shapes.scene_of(shapes.captions_of_one())
    seen = [each.repeat(2, *[1] * (each.ndim - 1)) for each in wanted]
    seen[2] = seen[2].roll(1, 0)  # the colour of the picture before
    monkeypatch.setattr(shapes.Reader, "read", lambda reader, x: shapes.Scene(*seen))
    command = ["evaluate", "--data", "shapes", "--features", "shapes", "--model", "shapes-text"]
    assert main([*command, "--count", "64", "--steps", "2", "--guidance", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shape"] == [3, 32, 32]
    assert report["evaluations"] == 6  # two a call
    assert report["result"]["frechet"] > 0
    # colours were read off the picture before: kinds of a size and colour stand together
    right = {"kind": 1.0, "colour": 0.75, "size": 1.0, "arrangement": 1.0, "all": 0.75}
    assert report["followed"] == right
    (folder / "odd.txt").write_text("a star\n")
    assert main([*command, "--count", "64", "--prompts", str(folder / "odd.txt")]) == 2
    assert "'a star' is no caption" in capsys.readouterr().err


def test_the_shapes_are_a_data_set():
    read = images.load_images("shapes", 32)
    assert read.x.shape == (200, 3, 32, 32)
    assert read.x.dtype == torch.uint8
    assert read.classes == 32
    scene = shapes.scene_of([read.class_names[k] for k in read.label])
    assert torch.equal(
        read.label, 16 * scene.size[:, 0] + 4 * scene.colour[:, 0] + scene.kind[:, 0]
    )
    found = features.extract_features(read.x, "shapes")
    by_hand = shapes.load_reader().features(read.x.float() / 127.5 - 1)
    torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-4)
    red = scene.colour[:, 0] == 0  # what the labels say is on the pictures
    strength = (read.x[:, 0].float() - read.x[:, 2].float()).amax((1, 2))
    assert strength[red].min() > strength[scene.colour[:, 0] == 2].max()
    assert torch.equal(read.x, images.load_images("shapes", 32).x)


REFUSED = {
    "a word": (["--prompts", "unknown.txt"], "the model has no word 'purple'"),
    "no prompts": (["--prompts", "empty.txt"], "empty.txt holds no prompts"),
    "no file": (["--prompts", "nowhere.txt"], "nowhere.txt"),
    "digits": (["--prompts", "one.txt", "--model", "digits-teacher"], "is no text model"),
    "guided digits": (["--guidance", "3", "--model", "digits-teacher"], "is no text model"),
    "a guided student": (["--guidance", "3", "--model", "student.safetensors"], "guidance within"),
    "a label": (["--label", "2", "--model", "student.safetensors"], "label goes from 2 to 2"),
    "dmd2": (None, "works in latents: --method dmd"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for name, text in (("unknown", "a purple star"), ("empty", " \n\n"), ("one", RED)):
        (folder / f"{name}.txt").write_text(text)
    given, sentence = REFUSED[case]
    command = ["sample", "--model", "shapes-text", "--steps", "1", "--count", "1", *(given or ())]
    if given is None:
        command = ["distill", "--teacher", "shapes-text", "--method", "dmd2", "--data", "shapes"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"dmd {command[0]}: ")
    assert sentence in error


def test_without_weights_a_sentence_says_what_to_do(capsys, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", unreachable)
    assert main(["sample", "--model", "stable-diffusion-v1-5", "--prompt", "a cat"]) == 2
    assert "is no pipeline on this machine" in capsys.readouterr().err


def test_a_model_without_prompts_asks_for_them(capsys, monkeypatch):
    monkeypatch.setattr(prompted, "STABLE_DIFFUSION", prompted.SHAPES_TEXT)
    assert main(["make-pairs", "--teacher", "stable-diffusion-v1-5"]) == 2
    assert "stable-diffusion-v1-5 knows no prompts yet" in capsys.readouterr().err


def test_adapters_on_the_teacher_make_a_student_of_its_own(folder, capsys):
    pytest.importorskip("peft")
    command = ["distill", "--teacher", "shapes-text", "--prompts", str(folder / "prompts.txt"),
               "--lora", "2", "--lambda-reg", "0", "--steps", "2", "--batch", "4",
               "--out", str(folder / "lora")]  # fmt: skip
    start = ["--start", str(folder / "student.safetensors")]
    assert main([*command, *start]) == 2
    assert "adapters start from the teacher itself" in capsys.readouterr().err
    command += ["--pairs", str(folder / "pairs"), "--warm-start-steps", "2", "--batch-pairs", "4"]
    command += ["--mixed-precision", "bf16", "--frozen", "bf16"]
    assert main(command) == 0
    file = folder / "lora" / "student.safetensors"
    assert load_file(file).keys() == load_file(folder / "student.safetensors").keys()
    student, teacher = pretrained.load(file), prompted.shapes_text()
    moved = {
        name: (after - before).abs().max().item()
        for (name, after), before in zip(
            student.denoiser.state_dict().items(), teacher.state_dict().values(), strict=True
        )
    }
    assert 0 < max(moved.values()) < 1e-2
    student, warm = (
        load_file(folder / "lora" / f"{name}.safetensors") for name in ("student", "warm-start")
    )
    assert any(not torch.equal(student[name], warm[name]) for name in warm)
    assert moved["denoiser.network.conv_norm_out.weight"] == 0  # no adapter stands there


def test_the_memory_of_adapters_is_counted(folder):
    pytest.importorskip("peft")
    teacher = prompted.shapes_text()
    settings = [DistillSettings(batch=2, lambda_reg=0.0)]
    whole, low = (memory.largest(teacher, settings, Compute(), lora=rank) for rank in (0, 2))
    weights = sum(p.numel() for p in teacher.parameters())
    assert whole["teacher: weights"] == low["teacher: weights"] == 4 * weights
    assert whole["critic: optimiser"] == 8 * weights
    assert low["critic: optimiser"] == 8 * sum(p.numel() for p in LowRank(teacher, 2).parameters())
    assert low["critic: optimiser"] < 0.2 * whole["critic: optimiser"]


def test_the_counted_cost_of_stable_diffusion():
    """0.803 TFLOP a forward pass; backward through frozen weights as much; guidance asks twice."""
    preset = PRESETS["sd15-lora"]
    settings, batch = preset.distill, preset.distill.batch
    generator = 2 + 2 + 1  # G forward and backward, the teacher guided, the critic
    critic = 2 * settings.critic_steps + settings.critic_steps - 1  # fresh samples from the second
    fast, slow, tflop = map(int, re.findall(r"\d+", preset.cost))
    assert settings.lambda_reg == 0
    assert tflop == int((generator + critic) * batch * 0.803)
    hours = [settings.steps * tflop / rate / 3600 for rate in (200, 100)]
    assert [fast, slow] == pytest.approx(hours, rel=0.15)
