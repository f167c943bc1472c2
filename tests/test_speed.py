"""What makes an iteration quicker changes nothing but the rounding: compiled calls, layout, one kernel."""

import entry
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import TINY, command
from test_rollouts import prepared, where  # noqa: F401
from torch.utils._pytree import tree_map

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models import compiling
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.optimizers.adamw import make_adamw
from sdo_cli.optimizers.stepper import Stepper
from sdo_cli.recipe.load import load_recipe
from sdo_cli.skipping.skip_plan import load_plan
from sdo_cli.training.loop import train
from sdo_cli.training.lora import in_call_order, train_everything, trainable
from sdo_cli.training.prepare import prepare
from sdo_cli.training.sharding import check_shardable

COMPILE = torch.compile


class Compiled:
    """In torch.compile's place, with a backend that needs no C++ compiler; keeps how many samples each call had."""

    def __init__(self):
        self.calls = []

    def __call__(self, function, *, mode, dynamic):
        assert mode == "default" and dynamic is False
        run = COMPILE(function, backend="eager", dynamic=False)

        def compiled(*args, **options):
            self.calls.append(len(args[0] if args else options["hidden_states"]))
            return run(*args, **options)

        return compiled


@pytest.fixture
def compiled(monkeypatch):
    torch.compiler.reset()
    watch = Compiled()
    monkeypatch.setattr(compiling.torch, "compile", watch)
    return watch


def losses(*words):
    """Of a few steps, and the trained weights."""
    tiny = [word for word in TINY if "validation" not in word]
    bare = ["rollout={}", *tiny, "max_train_steps=2", "num_inference_steps=3"]
    job, _ = prepare(load_recipe("quickstart", [*bare, *words]))
    return [result.loss for result in train(job)], torch.cat([p.detach().flatten() for p in job.parameters])


def near(one, other, tolerance=1e-4):
    """Losses and weights of two short runs; Adam makes much of small differences."""
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    assert (one[1] - other[1]).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("words", "rows", "pieces"),
    [((), 2, 1), (("guidance_scale=3", "gradient.rollout_micro_batch=1"), 2, 2)],
)
def test_rollouts_are_compiled_with_the_adapter_on(compiled, words, rows, pieces):
    plain = losses(*words)
    near(losses(*words, "compile=default"), plain)
    # three calls a piece, two steps; live calls have a graph and stay as they are
    assert compiled.calls == [rows] * (3 * pieces * 2)


def test_units_of_a_skip_plan_are_compiled_one_by_one(compiled, where):  # noqa: F811
    def outcomes(*words):
        job = prepared(where, "rollout.skip_plan=inner.json", "max_train_steps=2", *words)
        return [result.loss for result in train(job)], torch.cat([p.detach().flatten() for p in job.parameters])

    plain = outcomes()
    near(outcomes("compile=default"), plain)
    plan = load_plan(where / "inner.json")
    assert len(compiled.calls) == 2 * int(plan.runs.sum())


def test_what_cannot_be_compiled_is_said_in_a_sentence(monkeypatch):
    from torch._inductor import config

    torch.compiler.reset()
    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(config, "fx_graph_cache", False)
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU())
    compiling.compile_modules([module], "default", 2)
    with torch.no_grad(), pytest.raises(EnvironmentFault, match="C\\+\\+ compiler") as found:
        module(torch.randn(2, 3))
    assert "compile: none" in found.value.remedy
    # other shapes and calls with a graph are nobody's business
    assert module(torch.randn(2, 3)).requires_grad
    with torch.no_grad():
        assert len(module(torch.randn(5, 3))) == 5


def test_a_mode_that_torch_does_not_have_is_refused(tmp_path):
    done = entry.run(command(tmp_path / "run", "compile=fast"))
    assert done.returncode == 2 and "compile" in done.stderr and "reduce-overhead" in done.stderr


@pytest.mark.parametrize("word", ["compile=default", "channels_last=true"])
def test_neither_compiled_nor_laid_out_in_shards(word):
    recipe = load_recipe("quickstart", ["train=full", word]).recipe
    with pytest.raises(EnvironmentFault, match="compiled"):
        check_shardable(recipe, "FSDP")


def test_channels_last_draws_and_trains_the_same():
    plain, other = losses(), losses("channels_last=true")
    near(other, plain)
    job, _ = prepare(
        load_recipe("quickstart", [word for word in TINY if "validation" not in word] + ["channels_last=true"])
    )
    kernels = [p for part in (job.family.denoiser, job.family.vae) for p in part.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_state_from_a_file_goes_on_in_any_layout_and_with_any_kernel(precision):
    """Files hold moments row by row, and those of an older sdo were stepped by other kernels."""
    recipe = load_recipe("quickstart", [f"mixed_precision={precision}"]).recipe
    start = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def stepper():
        return Stepper(recipe, [torch.nn.Parameter(start.clone().to(memory_format=torch.channels_last))])

    def step(one, number):
        (kernel,) = one.parameters
        kernel.grad = one.scale * torch.cos(number + 3 * kernel.detach())
        one.step(number)

    straight, other = stepper(), stepper()
    for number in (1, 2):
        step(straight, number)
    state = tree_map(lambda leaf: leaf.contiguous().clone() if torch.is_tensor(leaf) else leaf, straight.state())
    state["optimizer"]["param_groups"][0] |= {"fused": None, "foreach": None}
    other.load_state(state)
    for one in (straight, other):
        step(one, 3)
    assert torch.equal(straight.parameters[0], other.parameters[0])
    assert other.optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize(("kind", "moved"), [("sd15", True), ("sd3", False)])
def test_gradients_are_sent_in_the_order_of_calls(small, kind, moved):
    family = load_family(ModelSource(str(small(kind))))
    train_everything(family)
    parameters = trainable(family)
    ordered, names = in_call_order(family, parameters), {id(p): n for n, p in family.denoiser.named_parameters()}
    assert sorted(map(id, ordered)) == sorted(map(id, parameters))
    assert ([id(p) for p in ordered] != [id(p) for p in parameters]) is moved
    if moved:
        blocks = [names[id(p)].split(".")[0] for p in ordered]
        wanted = ["down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out"]
        assert [b for b in dict.fromkeys(blocks) if b in wanted] == wanted


def test_one_kernel_steps_as_adamw_does():
    recipe = load_recipe("quickstart", ["adam_weight_decay=0.1"]).recipe
    parameters = [[torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (7, 64)] for _ in range(2)]
    for fused, mine in zip((True, False), parameters, strict=True):
        optimizer = make_adamw(recipe, mine, fused=fused)
        assert optimizer.defaults["fused"] is (True if fused else None)
        for step in range(5):
            for p in mine:
                p.grad = torch.cos(p.detach() * (step + 1))
            optimizer.step()
    for one, other in zip(*parameters, strict=True):
        assert (one - other).abs().max() <= 1e-6


@pytest.mark.slow
def test_compiled_for_real_by_the_command(tmp_path):
    """Through the command line with torch's own compiler; the weights are those of a run without it, to rounding."""
    weights = {}
    for mode in ("none", "default"):
        done = entry.run(command(tmp_path / mode, f"compile={mode}", "validation.num_prompts=1"), timeout=900)
        assert done.returncode == 0, done.stderr
        weights[mode] = load_file(tmp_path / mode / "pytorch_lora_weights.safetensors")
    for name, value in weights["none"].items():
        assert (value - weights["default"][name]).abs().max() <= 1e-4
