"""LoRA: teacher, critic and generator in one set of frozen weights, against separate copies."""

import builtins
import copy
from pathlib import Path

import pytest
import torch

from dmd_tutorial import dmd, pretrained
from dmd_tutorial.adapters import FromDiffusers, Guided
from dmd_tutorial.denoisers import feature_layers, image_shape, sigma_range
from dmd_tutorial.generators import OneStepGenerator
from dmd_tutorial.notebook import results
from dmd_tutorial.text_to_image.lora import ATTENTION, LowRank, lora_run
from dmd_tutorial.training import DistillationRun, DistillSettings, distill

pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
lora_memory = pytest.importorskip("benchmarks.lora_memory")
lora_rank = pytest.importorskip("benchmarks.lora_rank")
held = lora_memory.held

RESULTS = Path(__file__).parents[1] / "book" / "results"

TOKENS, WIDTH = 3, 8
SETTINGS = DistillSettings(steps=4, batch=4, lambda_reg=0.0, warm_up=0, critic_steps=1)
LABEL = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
SIGMA = torch.tensor([0.1, 0.5, 3.0, 30.0])


def teacher(seed=0):
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(16, 24), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )  # fmt: skip
    return FromDiffusers(unet, diffusers.DDPMScheduler(), torch.zeros(TOKENS, WIDTH))


def near(answer, expected, share=1e-5):
    """Equal but for rounding, measured in the largest of the values."""
    return (answer - expected).abs().max() < share * expected.abs().max()


def moved(state, seed):
    """The same adapter away from its start."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in state.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    return state


def bits(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(network, before):
    now = network.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now)


def drawn(run, judged=False):
    """A batch with texts for labels."""
    batch = dmd.Batch(torch.randn(4, 4, 8, 8, generator=run.rng), LABEL)
    return dmd.judged(batch, run.objective().grid, run.rng) if judged else batch


def iterate(run, steps):
    for _ in range(steps):
        dmd.iteration(
            run.generator, run.critic, run.teacher, run.generator_optimizer,
            run.critic_optimizer, drawn(run), run.objective(), run.rng,
        )  # fmt: skip
        run.ema.update_parameters(run.generator)
        run.step += 1


def test_all_states_start_as_the_teacher_exactly_and_hold_its_weights_once():
    base = teacher()
    run = lora_run(Guided(base, 3.0, torch.zeros(TOKENS, WIDTH)), SETTINGS, rank=4)
    states = {n: getattr(run, n) for n in ("generator", "critic", "average")}
    weights = {id(p) for p in base.parameters()}
    for name, state in states.items():
        low_rank = getattr(state, "denoiser", state)
        assert torch.equal(low_rank(X, SIGMA, LABEL), base(X, SIGMA, LABEL)), name
        assert weights <= {id(p) for p in low_rank.network.parameters()}, name
        assert not weights & {id(p) for p in state.parameters()}, name
    adapters = [{p.data_ptr() for p in state.parameters()} for state in states.values()]
    assert not any(a & b for i, a in enumerate(adapters) for b in adapters[:i])
    low_rank = run.generator.denoiser  # and it says of itself what the teacher says
    assert sigma_range(low_rank) == sigma_range(base)
    assert image_shape(low_rank) == image_shape(base)
    ours = feature_layers(low_rank)[0][0]
    assert any(ours is module for module in low_rank.network.modules())


def test_states_in_any_order_are_separate_networks_with_merged_weights():
    base = teacher()
    plain = base(X, SIGMA, LABEL)
    critic = moved(LowRank(base, 4), 1)
    generator = moved(copy.deepcopy(critic), 2)
    merged = {state: state.merged() for state in (critic, generator)}
    for state in (generator, critic, generator):
        expected = merged[state](X, SIGMA, LABEL)
        assert near(state(X, SIGMA, LABEL), expected)
        assert (expected - plain).abs().max() > 0.1  # the adapter does something
        assert torch.equal(base(X, SIGMA, LABEL), plain)
        merged[state].network.requires_grad_(True)  # its weights are its own
    assert all(
        torch.equal(p, q) for p, q in zip(base.parameters(), teacher().parameters(), strict=True)
    )
    assert not any(p.requires_grad for p in base.parameters())


def test_a_merged_state_is_a_plain_unet_that_diffusers_saves_and_reads(tmp_path):
    state = moved(LowRank(teacher(), 2, ATTENTION), 1)
    unet = state.merged().network
    assert unet.state_dict().keys() == teacher().network.state_dict().keys()
    unet.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    read = FromDiffusers(again, diffusers.DDPMScheduler())(X, SIGMA, LABEL)
    assert near(read, state(X, SIGMA, LABEL))


# --- gradients ------------------------------------------------------------------------------------


def test_a_generators_gradient_survives_what_is_asked_of_the_others_before():
    """One loss of DMD, against networks that share nothing, and against peft's own switch."""
    run = lora_run(teacher(), SETTINGS, rank=4)
    moved(run.critic, 1)
    batch, objective = drawn(run, judged=True), run.objective()

    def gradient(generator, critic, real):
        generator.zero_grad()
        loss, record = dmd.generator_loss(generator, critic, real, batch, objective)
        loss.backward()
        return {n: p.grad for n, p in generator.named_parameters()}, record

    ours, record = gradient(run.generator, run.critic, run.teacher)
    merged = OneStepGenerator(run.generator.denoiser.merged().requires_grad_(True))
    whole, apart = gradient(merged, run.critic.merged(), teacher())
    assert near(record.x, apart.x)
    queries = [name for name in ours if "/to_q/lora_B" in name]
    assert len(queries) == 8  # four blocks, each attends to itself and to the text
    down = dict(run.generator.named_parameters())
    for name in queries:  # of W + B A, by B: the derivative by W, times A
        layer = name.replace("adapter.", "").replace("/", ".").split(".lora_B")[0]
        expected = whole[f"{layer}.weight"] @ down[name.replace("lora_B", "lora_A")].T
        assert near(ours[name], expected, 1e-3), name


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_peft_s_own_switch_loses_a_gradient_that_is_still_awaited():
    from peft import LoraConfig

    unet = teacher().network
    unet.requires_grad_(False)
    for name in ("critic", "generator"):  # the last one is on
        unet.add_adapter(LoraConfig(r=4, target_modules=list(ATTENTION)), name)
    x = unet(X, 500, LABEL).sample
    unet.set_adapter("critic")
    x.sum().backward()
    lost = [p.grad for n, p in unet.named_parameters() if ".generator." in n]
    assert len(lost) > 20
    assert all(gradient is None for gradient in lost)


def test_training_one_state_leaves_the_others_as_they_are_to_the_bit():
    run = lora_run(teacher(), SETTINGS, rank=2)
    parts = {n: getattr(run, n) for n in ("generator", "critic", "teacher", "average")}
    for trained, optimizer in (
        ("critic", run.critic_optimizer),
        ("generator", run.generator_optimizer),
    ):
        before = {name: bits(part) for name, part in parts.items()}
        answer = parts[trained](X, *([SIGMA] if trained == "critic" else []), LABEL)
        dmd.update(optimizer, answer.square().mean(), clip=10.0)
        assert [name for name in parts if not same(parts[name], before[name])] == [trained]


def test_a_distillation_moves_adapters_and_nothing_else():
    base = teacher()
    weights, run = bits(base), lora_run(base, SETTINGS, rank=2)
    before = {n: bits(getattr(run, n)) for n in ("generator", "critic", "average")}
    for metrics in distill(run, (4, 8, 8), classes=0):
        assert metrics.record.loss_critic > 0
    assert run.step == SETTINGS.steps
    assert same(base, weights)
    assert not any(same(getattr(run, name), state) for name, state in before.items())
    held = {id(p) for o in (run.generator_optimizer, run.critic_optimizer)
            for group in o.param_groups for p in group["params"]}  # fmt: skip
    assert not held & {id(p) for p in base.parameters()}
    assert all(tensor.numel() < 3_000 for tensor in run.state_dict()["critic"].values())


def test_the_average_is_that_of_the_adapters():
    run = lora_run(teacher(), SETTINGS, rank=2)
    expected = [p.detach().clone() for p in run.generator.parameters()]
    for step in range(1, 4):
        iterate(run, 1)
        keep = min(SETTINGS.ema, step / (9 + step))
        now = run.generator.parameters()
        expected = [keep * m + (1 - keep) * p.detach() for m, p in zip(expected, now, strict=True)]
    assert all(map(near, run.average.parameters(), expected))


# --- memory ---------------------------------------------------------------------------------------


def test_what_a_run_is_counted_to_hold_is_what_it_holds():
    whole, run = DistillationRun(teacher(), SETTINGS), lora_run(teacher(), SETTINGS, rank=2)
    for each in (whole, run):
        iterate(each, 1)
        counted, optimizers = held(each), (each.generator_optimizer, each.critic_optimizer)
        averages = [t for o in optimizers for state in o.state.values()
                    for name, t in state.items() if name != "step"]  # fmt: skip
        gradients = [p.grad for o in optimizers for g in o.param_groups for p in g["params"]]
        for name, tensors in {"optimiser": averages, "gradients": gradients}.items():
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            assert counted[name] == sum(s.nbytes() for s in storages.values()), name
    one = 4 * sum(p.numel() for p in teacher().parameters())
    assert held(whole)["weights"] == 3 * one
    assert held(run)["weights"] == one + 2 * held(run)["average"]


def test_the_recorded_memory_is_what_is_counted_now_and_what_is_known():
    recorded = results.recorded("lora-memory", RESULTS)["networks"]
    small, large = recorded["small"], recorded["Stable Diffusion v1.5"]
    run = lora_run(lora_memory.teacher("small"), SETTINGS, 4, ATTENTION)
    assert held(run).items() <= small["rows"][1].items()
    assert large["parameters"] == 859_520_964
    assert large["rows"][1]["parameters of an adapter"] == 797_184  # as often reported for rank 4
    shares = {name: {(row.get("layers"), row.get("rank")): row["share of three copies"]
                     for row in of["rows"] if row.get("frozen bits") == 32}
              for name, of in recorded.items()}  # fmt: skip
    assert all(share < 0.18 for share in shares["Stable Diffusion v1.5"].values())
    assert shares["small"]["blocks", 64] > 1  # on narrow matrices such a rank saves nothing


# --- rank -----------------------------------------------------------------------------------------


def test_the_bias_that_rank_costs_is_measured_against_an_exact_critic():
    """Nothing for the exact critic, all of the gradient for the teacher, less once it is taught."""
    means = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    world = lora_rank.World(teacher(), means)
    rng, level = torch.Generator().manual_seed(4), torch.full((500,), 0.4)
    x = world.sample(500, rng)
    answer = world.exact(x + 0.4 * torch.randn(x.shape, generator=rng), level)
    expected = 1 / (1 / lora_rank.STD**2 + 1 / 0.4**2)  # of a Gaussian: the pieces lie far apart
    assert (answer - x).square().mean().item() == pytest.approx(expected, rel=0.02)
    right, gradient, error = lora_rank.judge(world, world.exact, 64)
    assert right == error == 0.0 < gradient
    bias, same_gradient, error = lora_rank.judge(world, world.teacher, 64)
    assert bias == pytest.approx(gradient)
    assert same_gradient == gradient
    assert error > bias
    shares = lora_rank.curve(world, LowRank(world.teacher, 4), 2e-3, [0, 12], 64, seed=0)
    assert shares[0] == pytest.approx(1.0)
    assert shares[1] < 0.95


# --- on disk --------------------------------------------------------------------------------------


def test_a_run_that_was_saved_goes_on_to_the_same_bits(tmp_path):
    whole = lora_run(teacher(), SETTINGS, rank=2)
    iterate(whole, 2)
    first = lora_run(teacher(), SETTINGS, rank=2)
    iterate(first, 1)
    torch.save(first.state_dict(), tmp_path / "run")
    again = lora_run(teacher(), SETTINGS, rank=2)
    again.load_state_dict(torch.load(tmp_path / "run", weights_only=True))
    iterate(again, 1)
    for name in ("generator", "critic", "average"):
        assert same(getattr(again, name), bits(getattr(whole, name))), name

    path = tmp_path / "student.safetensors"
    pretrained.save_denoiser(path, again.average, rank=2)
    assert path.stat().st_size < 0.5 * sum(4 * p.numel() for p in teacher().parameters())
    student = pretrained.load(path, OneStepGenerator(LowRank(teacher(), 2)))
    assert same(student, bits(again.average))
    assert near(student(X, LABEL), again.average(X, LABEL))  # convolutions in another layout
    second = lora_run(again.teacher, SETTINGS, rank=2, start=again.average)  # the next stage
    assert same(second.generator, bits(again.average))
    assert torch.equal(second.critic(X, SIGMA, LABEL), again.teacher(X, SIGMA, LABEL))
    assert held(second) == held(again)
    with pytest.raises(ValueError, match="does not fit"):
        pretrained.load(path, OneStepGenerator(LowRank(teacher(), 3)))


def test_adapters_stay_float32_on_weights_of_16_bits_and_the_type_of_x_comes_back():
    base = teacher()
    exact = moved(LowRank(base, 2), 1)
    small = LowRank(teacher().to(torch.bfloat16), 2)
    small.load_state_dict(exact.state_dict())
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    answer = small(X, SIGMA, LABEL)
    answer.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in small.parameters())
    assert answer.dtype == torch.float32
    assert (answer - exact(X, SIGMA, LABEL)).abs().mean() < 0.05 * answer.abs().mean()
    double = exact.to(torch.float64)  # a cast takes the shared weights along
    assert next(base.parameters()).dtype == torch.float64
    assert double(X.double(), SIGMA.double(), LABEL.double()).dtype == torch.float64


def test_without_peft_or_a_model_of_diffusers_one_sentence_says_so(monkeypatch):
    with pytest.raises(ValueError, match="Identity has no model of diffusers inside"):
        LowRank(torch.nn.Identity(), 2)
    real = builtins.__import__

    def without(name, *given, **options):
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return real(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match=r"LoRA needs peft: pip install 'dmd-tutorial\[text\]'"):
        LowRank(teacher(), 2)
