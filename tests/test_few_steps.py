"""Students of any number of steps, by DMD and DMD2: levels, noise, files, resume, command line."""

import copy
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd_tutorial import dmd, noise, pretrained
from dmd_tutorial.data import Images, digits
from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.dmd import Batch
from dmd_tutorial.generators import FewStepGenerator, OneStepGenerator, few_step_levels
from dmd_tutorial.networks import MLP, UNet
from dmd_tutorial.runs import pipeline
from dmd_tutorial.runs.checkpoints import load_checkpoint
from dmd_tutorial.runs.cli import main, parse
from dmd_tutorial.runs.compute import Compute, Updater
from dmd_tutorial.runs.presets import PRESETS
from dmd_tutorial.survey.score_distillation import Dmd2Settings, Judge, adversarial_step, dmd2
from dmd_tutorial.training import DistillationRun, DistillSettings

SHORT = {"steps": 4, "batch": 8, "warm_up": 0}


def small(seed: int = 0, classes: int = 10) -> EDMDenoiser:
    """An image denoiser whose answers depend on all of its weights."""
    torch.manual_seed(seed)
    denoiser = EDMDenoiser(UNet(width=8, embedding=16, classes=classes))
    nn.init.normal_(denoiser.network.last.weight, std=0.1)
    return denoiser.requires_grad_(False).eval()


# Levels


def test_levels_of_one_two_and_four_steps_are_those_of_the_recorded_results():
    assert few_step_levels(1, 80.0) == (80.0,)
    assert few_step_levels(2, 80.0) == (80.0, 0.5 * 1.6)
    assert few_step_levels(4, 80.0, 1.4) == (80.0, 1.4 * 4.0, 1.4 * 1.6, 1.4 * 0.6)


@pytest.mark.parametrize("steps", [3, 5, 7, 8, 32])
def test_levels_of_other_numbers_of_steps_lie_evenly_in_their_logarithms(steps):
    first, *levels = few_step_levels(steps, 80.0, 0.7)
    assert (first, levels[0], levels[-1]) == (80.0, 0.7 * 4.0, 0.7 * 0.6)
    assert len(levels) == steps - 1
    gaps = [math.log(high / low) for high, low in itertools.pairwise(levels)]
    assert min(gaps) > 0
    if steps % 2 == 0:  # half of the gaps on either side of 1.6 widths
        half = len(gaps) // 2
        assert gaps[:half] == pytest.approx([math.log(4.0 / 1.6) / half] * half)
        assert gaps[half:] == pytest.approx([math.log(1.6 / 0.6) / half] * half)


def test_numbers_of_steps_and_levels_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        few_step_levels(0, 80.0)
    with pytest.raises(ValueError, match=r"second step's level 2 is not below sigma_max, 1.5"):
        few_step_levels(4, 1.5)


# A sample is a function of its noise


def test_what_a_sample_draws_is_decided_by_its_own_noise_and_nobody_elses():
    z = torch.randn(4_000, 3, generator=torch.Generator().manual_seed(0))
    uniform, fresh = noise.noise_of(z, 2)
    some = torch.tensor([7, 3, 1999])
    for z_some in (z[some], z[some].double(), z.t().contiguous().t()[some]):
        u, own = noise.noise_of(z_some, 2)
        assert torch.equal(own, fresh[:, some].to(own))
        assert torch.equal(u, uniform[some])
    assert noise.noise_of(z[:0], 2)[1].shape == (2, 0, 3)
    columns = torch.cat([z, *fresh], dim=1)
    assert (columns.T.cov() - torch.eye(9)).abs().max() < 0.1  # normal, and independent
    assert torch.cat([columns, uniform[:, None]], 1).T.corrcoef()[-1, :-1].abs().max() < 0.06
    quantiles = torch.linspace(0.1, 0.9, 9)
    assert (uniform.quantile(quantiles) - quantiles).abs().max() < 0.03


def test_no_other_stream_draws_the_fresh_noise(monkeypatch):
    seeds, real = [], torch.Generator.manual_seed

    class Spy(torch.Generator):
        def manual_seed(self, number: int) -> torch.Generator:
            seeds.append(number)
            return real(self, number)

    monkeypatch.setattr(noise, "Generator", Spy)
    noise.noise_of(torch.randn(1_000, 2), 1)
    parts = [(seed // 2**30, seed % 2**30 // 2**14) for seed in seeds]
    assert len(set(seeds)) == 1_000
    # only pairs have parts, and a number of evaluation's begins them all
    assert {purpose for purpose, _ in parts} == {noise.get_args(noise.Purpose).index("evaluation")}
    assert min(part for _, part in parts) >= 1


@pytest.mark.parametrize("training", [False, True])
def test_a_sample_does_not_depend_on_its_batch(training):
    generator = FewStepGenerator(small(), few_step_levels(3, 80.0), last=0.5).train(training)
    z, label = torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    with torch.no_grad():
        whole = generator(z, label)
        parts = [generator(z[i : i + 5], label[i : i + 5]) for i in (0, 5, 10)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert not torch.allclose(generator(-z, label), whole, atol=0.1)


def test_every_student_says_how_many_evaluations_it_takes():
    denoiser, z = small(), torch.randn(2, 1, 8, 8)
    students = OneStepGenerator(denoiser), FewStepGenerator(denoiser, few_step_levels(5, 80.0))
    for student, wanted in zip(students, (1, 5), strict=True):
        calls: list[int] = []
        handle = denoiser.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        student.eval()(z)
        handle.remove()
        assert student.evaluations == wanted == len(calls)


def test_what_is_saved_is_loaded_and_makes_the_same_samples(tmp_path):
    levels = few_step_levels(4, 80.0)
    student = FewStepGenerator(small(), levels, last=0.9).eval()
    path = tmp_path / "student.safetensors"
    pretrained.save_denoiser(path, student)
    again = pretrained.load(path)
    assert isinstance(again, FewStepGenerator)
    assert (again.levels, again.last, again.evaluations) == (levels, 0.9, 4)
    z, label = pipeline.noise(again, 20, "pictures")
    student.to(memory_format=torch.channels_last)
    assert torch.equal(pipeline.draw(again, z, label), pipeline.draw(student, z, label))


# Settings


def test_a_run_gives_the_student_the_steps_of_its_settings():
    settings = DistillSettings(student_steps=2, lambda_reg=0.0, last_step=0.7)
    teacher = small()
    few = DistillationRun(teacher, settings).generator
    assert (few.levels, few.last) == (few_step_levels(2, 80.0), 0.7)
    one = DistillationRun(teacher, DistillSettings(), few).generator
    assert type(one) is OneStepGenerator
    assert all(map(torch.equal, one.parameters(), few.parameters()))
    own = FewStepGenerator(teacher, (40.0, 1.0), last=0.5)  # as many: its own levels stay
    kept = DistillationRun(teacher, settings, own).generator
    assert (kept.levels, kept.last) == ((40.0, 1.0), 0.5)


def test_pairs_anchor_one_step_alone():
    with pytest.raises(ValueError, match=r"lambda_reg must be 0 with student_steps 4, not 0\.25"):
        DistillSettings(student_steps=4)
    with pytest.raises(ValueError, match=r"lambda_reg must be 0 with dmd2, .* not 0\.5"):
        Dmd2Settings(lambda_reg=0.5)


def test_a_method_brings_its_own_settings_and_leaves_the_others():
    plain = replace(PRESETS["digits"].distill, steps=7, grid_max=3.0, critic_steps=1)
    settings = dmd2(plain)
    assert (settings.steps, settings.grid_max) == (7, 3.0)
    assert (settings.lambda_reg, settings.critic_steps) == (0.0, 5)
    command = parse(["distill", "--method", "dmd2", "--student-steps", "4"])
    assert command.settings == replace(dmd2(PRESETS["digits"].distill), student_steps=4)
    assert (command.data, command.warm_start_steps) == ("digits", 0)
    command = parse(["distill", "--method=dmd2", "--critic-steps", "2", "--warm-start-steps", "9"])
    assert (command.settings.critic_steps, command.warm_start_steps) == (2, 9)
    assert type(parse(["distill"]).settings) is DistillSettings


def test_images_that_do_not_fit_the_teacher_are_refused():
    settings, images = Dmd2Settings(**SHORT), digits()
    with pytest.raises(ValueError, match="dmd2 needs real images"):
        pipeline.make_student(small(), settings, None)
    with pytest.raises(ValueError, match="compile must be off with dmd2"):
        pipeline.make_student(small(), settings, None, compute=Compute(compile=True), images=images)
    with pytest.raises(ValueError, match="the images have 0 classes, the teacher has 10"):
        pipeline.make_student(small(), settings, None, images=images._replace(classes=0))
    cut = images._replace(x=images.x[:, :, :4])
    with pytest.raises(ValueError, match=r"images have shape \(1, 4, 8\), the teacher's have"):
        pipeline.make_student(small(), settings, None, images=cut)
    unconditional = small(classes=0)  # needs no classes, whatever the images have
    assert pipeline.make_student(unconditional, settings, None, images=images) is not None


# The iteration


@pytest.mark.parametrize("critic_steps", [1, 2])
def test_a_batch_in_parts_or_shares_takes_the_step_of_the_whole(critic_steps):
    """To rounding: levels and noise are drawn for the whole batch, before it is cut.

    Of two processes without a connection each goes its own way; the whole's is the middle.
    """
    torch.manual_seed(0)
    teacher, start = (EDMDenoiser(MLP(hidden=8)).double() for _ in range(2))
    judge = Judge(copy.deepcopy(teacher)).double()
    for p in [*start.parameters(), judge.weight]:
        nn.init.normal_(p, std=0.5)
    generator = FewStepGenerator(start, few_step_levels(3, 80.0)).train()
    z, y = torch.randn(2, 12, 2, dtype=torch.float64)
    objective = dmd.Objective(lambda_reg=0, critic_steps=critic_steps, clip=math.inf)
    after = []
    for parts, rank in ((1, None), (4, None), (2, 0), (2, 1)):
        networks = copy.deepcopy((generator, judge))
        optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in networks]
        updater = Updater(Compute(accumulation=parts), *optimizers)
        if rank is not None:
            updater.processes = SimpleNamespace(rank=rank, count=2, mean_=lambda tensors: None)
        rng = torch.Generator().manual_seed(0)
        record = adversarial_step(
            *networks, teacher, *optimizers, Batch(z, y_ref=y), objective, rng, updater,
            fooling=1.0, discrimination=1.0,
        )  # fmt: skip
        weights = torch.cat([p.detach().flatten() for net in networks for p in net.parameters()])
        losses = torch.tensor([record.loss_matching, record.loss_critic])
        after.append((weights, record.x, losses))
    whole, parts, *shares = after
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.cat([x for _, x, _ in shares]), whole[1])
    if critic_steps == 1:  # a second one sees samples of generators that have gone apart
        middle = (sum(share[i] for share in shares) / 2 for i in (0, 2))
        torch.testing.assert_close([*middle], [whole[0], whole[2]], rtol=1e-6, atol=1e-9)


def test_dmd2_in_low_precision_is_nearly_the_exact_one():
    """Head, parts and recomputed activations included: the difference is that of rounding."""
    settings = Dmd2Settings(**SHORT | {"steps": 2}, student_steps=2, critic_steps=1)
    low = Compute("bf16", "bf16", accumulation=2, activation_checkpointing=True)
    found = [
        pipeline.make_student(small(), settings, None, compute=how, images=digits()).network
        for how in (Compute(), low)
    ]
    exact, rounded = (torch.cat([p.flatten() for p in net.parameters()]) for net in found)
    assert 0 < (exact - rounded).norm() < 0.01 * exact.norm()


# Stopped, resumed, drawn, measured: by the command line


def state_of(folder) -> dict[str, Tensor]:
    """Every tensor of a run's last checkpoint, by the way to it."""
    state, _ = load_checkpoint(folder / "student.ckpt", {})
    found: dict[str, Tensor] = {}

    def walk(way: str, of: object) -> None:
        if isinstance(of, dict):
            for name, inner in of.items():
                walk(f"{way}.{name}", inner)
        elif isinstance(of, Tensor):
            found[way] = of

    walk("", state)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student of 4 steps by dmd2, trained without a stop and in pieces of one step."""
    folder = tmp_path_factory.mktemp("runs")
    pretrained.save_denoiser(folder / "teacher.safetensors", small(), preset="digits")
    command = ["distill", "--teacher", str(folder / "teacher.safetensors"), "--method", "dmd2",
               "--student-steps", "4", "--steps", "3", "--batch", "8", "--critic-steps", "2",
               "--pairs", str(folder / "none")]  # fmt: skip
    assert main([*command, "--out", str(folder / "whole")]) == 0
    for _ in range(3):
        assert not (folder / "pieces" / "student.safetensors").exists()
        assert main([*command, "--out", str(folder / "pieces"), "--minutes", "0"]) == 0
    return folder, command


def test_a_training_in_pieces_is_the_whole_one_bit_for_bit(trained):
    folder, _ = trained
    whole, pieces = state_of(folder / "whole"), state_of(folder / "pieces")
    assert set(whole) == set(pieces)
    assert all(torch.equal(whole[way], pieces[way]) for way in whole)
    assert whole[".critic.weight"].abs().max() > 0  # the head has learnt
    kept = [load_file(folder / name / "student.safetensors") for name in ("whole", "pieces")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    notes = json.loads((folder / "whole" / "student.json").read_text())
    assert (notes["method"], notes["images"], notes["pairs"]) == ("dmd2", 1797, 0)
    assert notes["settings"]["student_steps"] == 4


def test_other_images_or_another_method_do_not_continue_a_run(trained, capsys, monkeypatch):
    folder, command = trained
    out = ["--out", str(folder / "whole")]
    plain = [option for option in command if option not in ("--method", "dmd2")]
    assert main([*plain, "--lambda-reg", "0", "--warm-start-steps", "0", *out]) == 2
    assert "(fooling: 0.003 -> not said, " in capsys.readouterr().err
    fewer = digits()
    fewer = Images(fewer.x[:100], fewer.label[:100], 10)
    monkeypatch.setattr("dmd_tutorial.runs.cli.load_images", lambda *_: fewer)
    assert main([*command, *out]) == 2
    assert "(images: 1797 of (1, 8, 8), " in capsys.readouterr().err


def test_a_student_of_several_steps_is_drawn_and_measured_like_any_other(trained, capsys):
    folder, _ = trained
    student, drawn = str(folder / "whole" / "student.safetensors"), []
    for name, batch in (("a", "500"), ("b", "500"), ("c", "7")):
        command = ["sample", "--student", student, "--count", "30", "--batch", batch]
        assert main([*command, "--out", str(folder / name)]) == 0
        drawn.append(load_file(folder / f"{name}.safetensors")["x"])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.allclose(drawn[0], drawn[2], atol=1e-5)
    capsys.readouterr()
    assert main(["evaluate", "--student", student, "--count", "100"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == 4


def test_dmd_without_pairs_trains_several_steps_too(trained, tmp_path, capsys):
    folder, _ = trained
    few, one = tmp_path / "few", tmp_path / "one"
    command = ["distill", "--teacher", str(folder / "teacher.safetensors"), "--steps", "1",
               "--batch", "4", "--warm-start-steps", "0"]  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--student-steps", "3", "--out", str(few)])
    error = " ".join(capsys.readouterr().err.split())
    assert "lambda_reg must be 0 with student_steps 3, not 1.0" in error
    command += ["--lambda-reg", "0"]
    assert main([*command, "--student-steps", "3", "--out", str(few)]) == 0
    assert pretrained.load(few / "student.safetensors").evaluations == 3
    start = ["--start", str(few / "student.safetensors"), "--out", str(one)]
    assert main([*command, *start]) == 0
    assert pretrained.load(one / "student.safetensors").evaluations == 1
