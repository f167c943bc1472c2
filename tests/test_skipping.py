"""Skip plans on stock diffusers modules: what is computed, what comes out, and which gradients."""

import copy
import json
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from small_models import KINDS

from sdo_cli.drawing.draw import DrawSettings, draw_images, draw_noise, encode_pair, make_path, make_route
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import made_for, other_weights, skips_of, wiring_of
from sdo_cli.errors import EnvironmentFault
from sdo_cli.gradients.outcome import Scored
from sdo_cli.gradients.plan import Mode, Plan
from sdo_cli.gradients.skipped import plan_among_computed
from sdo_cli.gradients.three_stage import MicroBatches, three_stage
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.sampling.loop import denoise_path, sample_latents
from sdo_cli.skipping.liveness import Wiring, live
from sdo_cli.skipping.skip_plan import GRAINS, SkipPlan, load_plan, plan_from_gates
from sdo_cli.skipping.supernet import wrapped

SETTINGS = DrawSettings(num_inference_steps=5, guidance_scale=3.0)
PROMPTS = ["the cat", "a dog on the cat"]


def loaded(model, dtype=torch.float32):
    family = load_family(ModelSource(str(model)), dtype=dtype)
    family.to(torch.device("cpu"), dtype)
    return family


class Bench:
    """A family, one batch's path, and plans on it."""

    def __init__(self, model, grain, settings=SETTINGS, dtype=torch.float32, family=None):
        self.family = family or loaded(model, dtype)
        self.grain, self.settings, embed = grain, settings, PromptEmbeddings(self.family)
        self.modules = self.family.skippable(grain)
        self.pair = encode_pair(embed, settings, PROMPTS)
        self.wiring = wiring_of(self.family, grain, self.pair[0])
        self.calls = make_route(self.family, settings).calls
        self.noise = draw_noise(self.family, settings, [torch.Generator().manual_seed(j) for j in range(2)])

    def path(self, plan=None, exact=False):
        skips = None if plan is None else skips_of(plan, self.family, self.settings, exact=exact)
        return make_path(self.family, self.settings, self.noise, *self.pair, skips=skips)

    def plan(self, gates):
        return plan_from_gates(gates, made_for(self.family, self.settings), self.grain, self.wiring)

    def random_gates(self, seed, share=0.5):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.calls, len(self.wiring.units), generator=generator) < share

    def slow(self, gates):
        """Everything computed at every call; torch's own hooks put stored outputs in the place of closed gates'."""
        stored, now = {}, [0]
        numbers = {name: number for number, name in enumerate(self.wiring.units)}

        def hook_of(name):
            def hook(module, inputs, output):
                if now[0] > 0 and not gates[now[0], numbers[name]]:
                    return stored[name]
                stored[name] = output
                return output

            return hook

        handles = [module.register_forward_hook(hook_of(name)) for name, module in self.modules.items()]
        path = self.path()

        def call(i, x, t):
            now[0] = i
            return path.denoise(x, t, path.rows)

        try:
            with torch.no_grad():
                return denoise_path(path, call)
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="module")
def benches(small):
    """Of every kind one family, which nobody changes."""
    families, made = {}, {}

    def bench(kind, grain):
        model = "embedded" if kind == "embedded" else small(kind)
        if kind not in families:
            families[kind] = loaded(model)
        if (kind, grain) not in made:
            made[kind, grain] = Bench(model, grain, family=families[kind])
        return made[kind, grain]

    return bench


# wiring


def test_wiring_of_a_unet_is_what_its_skip_connections_say(benches):
    wiring = benches("sd15", "blocks").wiring
    names = dict(enumerate(wiring.units))
    reads = {names[b]: {names[other] for other in read} for b, read in enumerate(wiring.reads)}
    depth = sum(name.startswith("down") for name in wiring.units)
    assert reads["down_blocks.0"] == set()
    assert reads["mid_block"] == {f"down_blocks.{depth - 1}"}
    # it takes one residual more than the last block made: that of the block before
    assert reads["up_blocks.0"] == {"mid_block", f"down_blocks.{depth - 1}", f"down_blocks.{depth - 2}"}
    assert {names[b] for b in wiring.output} == {f"up_blocks.{depth - 1}"}
    assert not wiring.inputs_reach_output


def test_a_transformer_is_a_chain_whose_output_also_reads_the_time(benches):
    wiring = benches("sd3", "blocks").wiring
    assert wiring.reads == (frozenset(), *(frozenset({b - 1}) for b in range(1, len(wiring.units))))
    assert wiring.output == frozenset({len(wiring.units) - 1})
    assert wiring.inputs_reach_output


def test_a_unit_that_runs_twice_is_refused():
    from sdo_cli.skipping.observe import observe

    layer = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="cannot be skipped: layer"):
        observe({"layer": layer}, (x,), lambda: layer(layer(x)))


# liveness


CHAIN = Wiring(("a", "b"), (frozenset(), frozenset({0})), frozenset({1}), False)


def test_liveness_by_hand():
    # b is read at every call; at call 1 it is reused, so nothing of call 1 runs; at call 2 it runs on a's stored output
    gates = torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.bool)
    # a's most recent gate is at call 1, which call 2 reads: it runs there though nobody reads it at call 1
    assert live(gates, CHAIN).tolist() == [[True, True], [True, False], [False, True]]
    gates[2, 1] = False
    # now nobody reads it
    assert live(gates, CHAIN).tolist() == [[True, True], [False, False], [False, False]]


def test_the_first_call_is_whole_whatever_the_gates_say():
    assert live(torch.zeros(3, 2), CHAIN).tolist() == [[True, True], [False, False], [False, False]]


def test_only_what_is_read_later_is_stored(benches):
    bench = benches("sd15", "blocks")
    for seed in range(5):
        plan = bench.plan(bench.random_gates(seed, 0.4))
        path, walks = bench.path(plan), []
        run = path.begin()

        def call(i, x, t, run=run, path=path, walks=walks):
            e = run(i, lambda: path.split(x, t, path.rows))[0]
            full = {
                unit
                for unit, value in run.stored.items()
                if any(part.untyped_storage().nbytes() > 1000 for part in torch.utils._pytree.tree_leaves(value))
            }
            walks.append(full)
            return e

        with torch.no_grad():
            denoise_path(path, call)
        for i in range(plan.calls):
            later = {plan.wiring.units[b] for read in plan.reads[i + 1 :] for b in read}
            here = {plan.wiring.units[b] for b in plan.reads[i]}
            assert plan.keeps[i] <= walks[i] <= later | here
        assert any(walks) and not plan.keeps[-1]
    whole = bench.plan(torch.tensor([[i % 2 == 0] * len(bench.wiring.units) for i in range(bench.calls)]))
    assert whole.is_whole and not any(whole.keeps)


# forward


@pytest.mark.parametrize(
    ("kind", "grain"),
    [(kind, GRAINS[number % 2]) for number, kind in enumerate([*KINDS, "embedded"])]
    + [("sdxl", "blocks"), ("sd3", "parts")],
)
def test_all_gates_open_is_the_plain_model_bit_for_bit(benches, kind, grain):
    bench = benches(kind, grain)
    plan = bench.plan(torch.ones(bench.calls, len(bench.wiring.units)))
    assert torch.equal(sample_latents(bench.path(plan)), sample_latents(bench.path()))
    assert not any("forward" in vars(module) for module in bench.modules.values())


@pytest.mark.parametrize(("kind", "dtype"), [("sd15", torch.bfloat16), ("sd3", torch.float16)])
def test_all_gates_open_in_half_precision(small, kind, dtype):
    bench = Bench(small(kind), "parts", replace(SETTINGS, num_inference_steps=3), dtype=dtype)
    plan = bench.plan(torch.ones(bench.calls, len(bench.wiring.units)))
    assert torch.equal(sample_latents(bench.path(plan)), sample_latents(bench.path()))
    gates = bench.random_gates(1)
    assert torch.equal(sample_latents(bench.path(bench.plan(gates))), bench.slow(gates))


@pytest.mark.parametrize(
    ("kind", "grain", "seeds"),
    [
        ("sd15", "blocks", 8),
        ("sd15", "parts", 8),
        ("sdxl", "parts", 4),
        ("sd3", "blocks", 4),
        ("sd35", "parts", 4),
        ("embedded", "blocks", 2),
        ("embedded", "parts", 2),
    ],
)
def test_random_gates_equal_a_reference_that_computes_everything(benches, kind, grain, seeds):
    bench = benches(kind, grain)
    shares = random.Random(0)
    for seed in range(seeds):
        gates = bench.random_gates(seed, shares.uniform(0.1, 0.9))
        plan = bench.plan(gates)
        assert torch.equal(sample_latents(bench.path(plan)), bench.slow(gates)), seed
        # what is stored in the plan says the same as the gates it came from
        again = bench.plan(plan.runs)
        assert torch.equal(again.runs, plan.runs)


@pytest.mark.parametrize("settings", [replace(SETTINGS, guidance_scale=1.0), replace(SETTINGS, solver="pndm")])
def test_without_guidance_and_with_two_calls_in_a_step(small, settings):
    bench = Bench(small("sd15"), "blocks", settings)
    gates = bench.random_gates(5)
    assert torch.equal(sample_latents(bench.path(bench.plan(gates))), bench.slow(gates))


def test_with_a_lora(small, tmp_path):
    from peft import LoraConfig

    bench = Bench(small("sd15"), "parts")
    before = sample_latents(bench.path())
    bench.family.denoiser.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "conv1", "proj_in"], init_lora_weights=False)
    )
    gates = bench.random_gates(2)
    plain = sample_latents(bench.path())
    assert not torch.equal(plain, before)
    assert torch.equal(sample_latents(bench.path(bench.plan(torch.ones_like(gates)))), plain)
    assert torch.equal(sample_latents(bench.path(bench.plan(gates))), bench.slow(gates))


def test_units_may_be_compiled(small):
    bench = Bench(small("sd15"), "blocks", replace(SETTINGS, num_inference_steps=4))
    gates = bench.random_gates(3)
    wanted = sample_latents(bench.path(bench.plan(gates)))
    # with and without stored outputs to read; tracing attention takes seconds
    for name in ("down_blocks.1", "up_blocks.0"):
        bench.modules[name].compile(backend="eager")
    assert (sample_latents(bench.path(bench.plan(gates))) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_what_runs_is_what_the_plan_says(benches):
    """Counted calls of every unit, and of the network, against the plan; counted FLOPs against the cost model."""
    from sdo_cli.estimate.flops import count_flops
    from sdo_cli.estimate.units import unit_flops

    bench = benches("embedded", "parts")
    costs = unit_flops(ModelSource("embedded"), "parts")
    for seed in range(3):
        plan = bench.plan(bench.random_gates(seed, 0.3))
        with counted(bench.modules) as computed:
            flops = count_flops(lambda plan=plan: sample_latents(bench.path(plan)))
        assert computed == dict(zip(plan.wiring.units, plan.runs.sum(0).tolist(), strict=True))
        # two prompts, two branches
        assert flops == pytest.approx(4 * costs.of_plan(plan).all, rel=1e-6)


@contextmanager
def counted(modules):
    """How often each module's own forward is run."""
    counts = dict.fromkeys(modules, 0)

    def counting(name, forward):
        def count(*args, **kwargs):
            counts[name] += 1
            return forward(*args, **kwargs)

        return count

    for name, module in modules.items():
        module.forward = counting(name, module.forward)
    try:
        yield counts
    finally:
        for module in modules.values():
            del module.forward


def test_a_call_that_computes_nothing_is_no_call(benches):
    bench = benches("sd15", "blocks")
    plan = bench.plan(torch.zeros(bench.calls, len(bench.wiring.units)))
    asked = []
    path = bench.path(plan)
    run = path.begin()
    with torch.no_grad():
        denoise_path(path, lambda i, x, t: run(i, lambda: asked.append(i) or path.split(x, t, path.rows))[0])
    assert asked == [0] and plan.sources == (0,) * bench.calls
    # a transformer's output reads the time: it is called every time, for its last layers
    assert not any(benches("sd3", "blocks").plan(torch.zeros(5, len(benches("sd3", "blocks").wiring.units))).repeats)


def test_switches_are_gone_after_a_failure(benches):
    bench = benches("sd15", "blocks")

    def decide(name, compute, given):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), wrapped(bench.modules, decide):
        sample_latents(bench.path())
    assert not any("forward" in vars(module) for module in bench.modules.values())


# the published figure


def test_macs_of_sd15_are_the_published_ones():
    from sdo_cli.estimate.units import unit_flops

    costs = unit_flops(ModelSource("stable-diffusion-v1-5/stable-diffusion-v1-5"), "blocks")
    assert costs.call.published_macs == pytest.approx(338.8e9, rel=0.02)
    # attention's products are what papers leave out
    assert costs.call.all > 2.3 * costs.call.published_macs


# files


@pytest.fixture
def plan(benches):
    bench = benches("sd15", "blocks")
    return bench.plan(bench.random_gates(4)).with_measures(cost={"kept": 0.4}, quality={"ssim": 0.9})


def test_a_file_is_json_and_comes_back_the_same(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == "sdo-skip-plan"
    again = load_plan(tmp_path / "plan.json")
    assert torch.equal(again.runs, plan.runs) and replace(again, runs=plan.runs) == plan
    assert again.fingerprint == plan.fingerprint
    # how it was measured does not change what is drawn
    assert again.with_measures(cost={"kept": 0.5}).fingerprint == plan.fingerprint


DAMAGES = {
    "missing": lambda t: t.pop("runs"),
    "two": lambda t: t["runs"].__setitem__(1, t["runs"][1].replace("0", "2").replace("1", "2")),
    "short": lambda t: t["runs"].__setitem__(2, t["runs"][2][1:]),
    "first": lambda t: t["runs"].__setitem__(0, "0" * len(t["runs"][0])),
    "empty": lambda t: t.update(runs=[]),
    "grain": lambda t: t.update(grain="atoms"),
    "wiring": lambda t: t["wiring"].update(output=[99]),
    "forward": lambda t: t["wiring"]["reads"].__setitem__(0, [1]),
    "fewer": lambda t: t["wiring"]["reads"].pop(),
    "steps": lambda t: t.update(num_inference_steps="5"),
    "timesteps": lambda t: t.update(timesteps=[900, 500]),
    "text": lambda t: t.update(runs="0101"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name(plan, tmp_path, damage):
    tree = plan.tree()
    DAMAGES[damage](tree)
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    with pytest.raises(EnvironmentFault, match=r"plan\.json is a damaged skip plan"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', "\x80\x03"])
def test_what_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EnvironmentFault, match="is not a skip plan"):
        load_plan(tmp_path / "plan.json")


def test_another_version_is_refused(plan, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(plan.tree() | {"version": 3}))
    with pytest.raises(EnvironmentFault, match="version 3; this sdo reads 1 and 2"):
        load_plan(tmp_path / "plan.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(EnvironmentFault, match="there is no skip plan"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_written_by_hand_does_what_it_says(benches):
    """Also one that computes what nobody reads, which no search writes."""
    bench = benches("sd15", "blocks")
    for seed in range(5):
        runs = bench.random_gates(seed)
        runs[0] = True
        plan = SkipPlan(made_for(bench.family, bench.settings), "blocks", bench.wiring, runs)
        assert seed or not torch.equal(live(runs, bench.wiring), runs)
        assert torch.equal(sample_latents(bench.path(plan)), bench.slow(runs))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "0" * 16}, "built otherwise"),
        ({"solver": "euler"}, "for the solver euler, not pndm"),
        ({"num_inference_steps": 9}, "for 9 steps, not 5"),
    ],
)
def test_a_plan_for_something_else_is_refused(benches, plan, change, said):
    bench = benches("sd15", "blocks")
    other = replace(plan, made_for=replace(plan.made_for, **change))
    with pytest.raises(EnvironmentFault, match=said):
        skips_of(other, bench.family, bench.settings)


def test_other_weights_of_the_same_architecture_are_told(benches, plan):
    bench = benches("sd15", "blocks")
    assert other_weights(plan, bench.family) is None
    other = replace(plan, made_for=replace(plan.made_for, model="mine"))
    assert "made for mine" in other_weights(other, bench.family)
    skips_of(other, bench.family, bench.settings)


# gradients


@pytest.fixture(scope="module")
def exact_bench(small):
    """A small UNet in float64 whose cross-attention is trained."""
    bench = Bench(small("sd15"), "blocks", replace(SETTINGS, num_inference_steps=6))
    bench.family.denoiser.double()
    bench.family._dtype = torch.float64
    bench.noise = replace(bench.noise, initial=bench.noise.initial.double())
    bench.pair = tuple({key: value.double() for key, value in part.items()} for part in bench.pair)
    bench.parameters = [p for name, p in bench.family.denoiser.named_parameters() if "to_q" in name or "conv1" in name]
    for parameter in bench.parameters:
        parameter.requires_grad_()
    return bench


def loss_of(x_N, rows):
    losses = torch.log1p((x_N.flatten(1) - rows[:, None] / 5).square().mean(1))
    return Scored(losses, {"loss": losses.detach()})


def gradients(bench):
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in bench.parameters]
    for parameter in bench.parameters:
        parameter.grad = None
    return found


def one_graph_of_the_pruned_sampler(bench, plan, live_rows):
    """Written out apart from the engines: torch's hooks, one graph; inputs and stored outputs of units are data.

    Args:
        live_rows: ``[calls, B]``, what the gradient through a call's output is multiplied with.
    """
    path, stored, now, e = bench.path(), {}, [0], None
    numbers = {name: number for number, name in enumerate(bench.wiring.units)}

    def hook_of(name):
        def hook(module, inputs, output):
            if not plan.runs[now[0], numbers[name]]:
                return stored[name]
            stored[name] = torch.utils._pytree.tree_map(lambda part: part.detach(), output)
            return output

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in bench.modules.items()]

    def call(i, x, t):
        nonlocal e
        now[0] = i
        if plan.sources[i] != i:
            if not plan.repeats[i]:
                path.denoise(x.detach(), t, path.rows)
        else:
            fresh = path.denoise(x.detach(), t, path.rows)
            factor = live_rows[i].view(-1, 1, 1, 1)
            e = fresh.detach() + factor * (fresh - fresh.detach())
        return e

    x_N = denoise_path(path, call)
    for handle in handles:
        handle.remove()
    (loss_of(x_N, path.rows).losses.sum() / 2).backward()
    return x_N.detach(), gradients(bench)


@pytest.mark.parametrize(("seed", "micro"), [(1, None), (2, 1), (3, 1)])
def test_the_exact_estimator_is_one_graph_of_the_pruned_sampler(exact_bench, seed, micro):
    bench = exact_bench
    plan = bench.plan(bench.random_gates(seed, 0.35))
    assert any(plan.repeats) and not plan.is_whole
    mode, weight = torch.zeros(bench.calls, 2, dtype=torch.long), torch.zeros(bench.calls, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for row in range(2):
        for i in range(bench.calls):
            if plan.sources[i] == i and torch.rand((), generator=generator) < 0.7:
                mode[i, row], weight[i, row] = Mode.WEIGHTS, 1 + i
    pruned = bench.path(plan, exact=True)
    outcome = three_stage(pruned, Plan(mode, weight), loss_of, micro=MicroBatches(micro, micro, micro))
    found = gradients(bench)
    x_N, wanted = one_graph_of_the_pruned_sampler(bench, plan, weight * (mode > 0))
    assert torch.allclose(outcome.x_N, x_N, atol=1e-12)
    size = max(part.abs().max() for part in wanted)
    assert size > 0
    assert all((a - b).abs().max() <= 1e-9 * size for a, b in zip(found, wanted, strict=True))


def test_an_output_that_is_handed_on_belongs_to_the_call_that_made_it(exact_bench):
    """A call may compute units for later readers alone; its output is the one before, and so is its gradient."""
    bench = exact_bench
    runs = torch.ones(bench.calls, len(bench.wiring.units), dtype=torch.bool)
    runs[2, 1:] = False
    runs[3, :2] = False
    plan = SkipPlan(made_for(bench.family, bench.settings), "blocks", bench.wiring, runs)
    assert not plan.repeats[2] and plan.sources[2] == 1 and plan.sources[3] == 3
    c = coefficients_of(bench.path().route)
    merged = c.merged(plan.sources)
    assert merged.w[1] == pytest.approx(c.w[1] + c.w[2]) and merged.w[2] == 0
    # one graph in which the output unit's stored output keeps its graph
    path, stored, now = bench.path(), {}, [0]
    numbers, last = {name: number for number, name in enumerate(bench.wiring.units)}, bench.wiring.units[-1]

    def hook_of(name):
        def hook(module, inputs, output):
            if not runs[now[0], numbers[name]]:
                return stored[name]
            tree = torch.utils._pytree.tree_map
            stored[name] = output if name == last else tree(lambda part: part.detach(), output)
            return output

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in bench.modules.items()]

    def call(i, x, t):
        now[0] = i
        return path.denoise(x.detach(), t, path.rows)

    x_N = denoise_path(path, call)
    for handle in handles:
        handle.remove()
    (loss_of(x_N, path.rows).losses.sum() / 2).backward()
    wanted = gradients(bench)
    mode = torch.zeros(bench.calls, 2, dtype=torch.long)
    mode[[i for i in range(bench.calls) if plan.sources[i] == i]] = Mode.WEIGHTS
    three_stage(bench.path(plan, exact=True), Plan(mode, (mode > 0).double()), loss_of)
    found = gradients(bench)
    size = max(part.abs().max() for part in wanted)
    assert all((a - b).abs().max() <= 1e-9 * size for a, b in zip(found, wanted, strict=True))


def test_a_transformer_that_makes_outputs_of_stored_ones_has_no_exact_gradients(benches):
    bench = benches("sd3", "blocks")
    gates = torch.ones(bench.calls, len(bench.wiring.units))
    gates[2] = 0
    plan = bench.plan(gates)
    mode = torch.zeros(bench.calls, 2, dtype=torch.long)
    mode[1] = Mode.WEIGHTS
    with pytest.raises(ValueError, match="exact gradients would miss them"):
        three_stage(bench.path(plan, exact=True), Plan(mode, (mode > 0).double()), loss_of)
    assert plan.loses_gradients and not bench.plan(torch.ones_like(gates)).loses_gradients


def test_noise_and_a_plan_are_refused(benches, plan):
    bench = benches("sd15", "blocks")
    with pytest.raises(EnvironmentFault, match="for a solver without noise"):
        skips_of(plan, bench.family, replace(bench.settings, eta=0.5))


def test_with_recomputed_blocks_the_same_units_are_skipped(exact_bench):
    bench = exact_bench
    plan = bench.plan(bench.random_gates(1, 0.35))
    mode = torch.zeros(bench.calls, 2, dtype=torch.long)
    mode[[i for i in range(bench.calls) if plan.sources[i] == i]] = Mode.WEIGHTS
    three_stage(bench.path(plan, exact=True), Plan(mode, (mode > 0).double()), loss_of)
    wanted = gradients(bench)
    bench.family.denoiser.enable_gradient_checkpointing()
    bench.family.denoiser.train()
    try:
        three_stage(bench.path(plan, exact=True), Plan(mode, (mode > 0).double()), loss_of)
    finally:
        bench.family.denoiser.disable_gradient_checkpointing()
        bench.family.denoiser.eval()
    found = gradients(bench)
    assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for a, b in zip(found, wanted, strict=True))


def test_the_whole_estimator_reruns_the_plain_network_on_the_pruned_path(exact_bench):
    bench = exact_bench
    plan = bench.plan(bench.random_gates(2, 0.35))
    inputs = {}
    with torch.no_grad():
        pruned = bench.path(plan)
        run = pruned.begin()

        def call(i, x, t):
            inputs[i] = (x.clone(), t)
            return run(i, lambda: pruned.split(x, t, pruned.rows))[0]

        x_N = denoise_path(pruned, call)
    leaf = x_N.clone().requires_grad_()
    (loss_of(leaf, pruned.rows).losses.sum() / 2).backward()
    w = coefficients_of(pruned.route).w
    for i, (x, t) in inputs.items():
        (w[i] * (leaf.grad * bench.path().denoise(x, t, pruned.rows)).sum()).backward()
    wanted = gradients(bench)
    mode = torch.full((bench.calls, 2), int(Mode.WEIGHTS))
    three_stage(bench.path(plan), Plan(mode, torch.ones(bench.calls, 2)), loss_of)
    found = gradients(bench)
    size = max(part.abs().max() for part in wanted)
    assert all((a - b).abs().max() <= 1e-9 * size for a, b in zip(found, wanted, strict=True))


def test_draws_among_computed_calls_sum_to_all_of_them(exact_bench):
    """K = all computed calls is the full sum, whatever the order; one call each is that in expectation."""
    from sdo_cli.gradients.sdo import sdo

    bench = exact_bench
    plan = bench.plan(bench.random_gates(3, 0.35))
    c = coefficients_of(bench.path().route)
    computed = [i for i in range(bench.calls) if plan.sources[i] == i]

    def drawn(k, seed):
        generator = torch.Generator().manual_seed(seed)
        return plan_among_computed(
            lambda calls, merged: sdo(calls, 2, merged, generator, steps_per_sample=k), c, plan.sources
        )

    every = drawn(len(computed), 0)
    assert every.live.nonzero()[:, 0].unique().tolist() == computed
    assert torch.equal(every.weight[computed], torch.ones(len(computed), 2, dtype=torch.float64))
    ones = torch.stack([drawn(1, seed).weight for seed in range(400)])
    assert not bool((ones > 0)[:, [i for i in range(bench.calls) if plan.sources[i] != i]].any())
    assert ones.mean((0, 2))[computed].sub(1).abs().max() < 0.35


def test_merged_weights_are_what_repeating_gives(exact_bench):
    bench = exact_bench
    plan = bench.plan(bench.random_gates(3, 0.35))
    c = coefficients_of(bench.path().route)
    merged = c.merged(plan.sources)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(bench.calls, 2, 4, 1, 1, generator=generator, dtype=torch.float64)
    path = bench.path()
    x_0 = path.x_0[:, :, :1, :1]
    from sdo_cli.sampling.route import walk

    x_N = walk(path.route, x_0, lambda i, x, t: outputs[plan.sources[i]])
    rebuilt = merged.A * x_0 + sum(w * outputs[i] for i, w in enumerate(merged.w))
    assert torch.allclose(x_N, rebuilt, atol=1e-9)
    assert [i for i, w in enumerate(merged.w) if w] == [i for i in range(bench.calls) if plan.sources[i] == i]


def test_what_cannot_be_is_refused(exact_bench):
    bench = exact_bench
    plan = bench.plan(bench.random_gates(3, 0.35))
    repeated = plan.repeats.index(True)
    mode = torch.zeros(bench.calls, 2, dtype=torch.long)
    mode[repeated] = Mode.WEIGHTS
    live_repeat = Plan(mode, (mode > 0).double())
    with pytest.raises(ValueError, match="draw among the computed"):
        three_stage(bench.path(plan, exact=True), live_repeat, loss_of)
    # the whole network may be run again there
    three_stage(bench.path(plan), live_repeat, loss_of)
    gradients(bench)
    path = bench.path(plan)
    path.x_0.requires_grad_()
    with pytest.raises(ValueError, match="weights, not latents"):
        three_stage(path, live_repeat, loss_of)
    with pytest.raises(ValueError, match="the skip plan has"):
        three_stage(bench.path(plan), Plan(mode[1:], (mode[1:] > 0).double()), loss_of)


def test_images_come_with_a_plan(benches):
    bench = benches("embedded", "blocks")
    embed = PromptEmbeddings(bench.family)
    gates = bench.random_gates(7)

    def drawn(skips):
        generator = lambda j: torch.Generator().manual_seed(j)  # noqa: E731
        return torch.cat(list(draw_images(bench.family, PROMPTS, generator, SETTINGS, embed=embed, skips=skips)))

    plain, pruned = drawn(None), drawn(skips_of(bench.plan(gates), bench.family, SETTINGS))
    assert pruned.shape == plain.shape and not torch.equal(pruned, plain)


def test_a_plan_does_not_change_when_it_is_used(benches):
    bench = benches("sd15", "blocks")
    plan = bench.plan(bench.random_gates(4))
    before = copy.deepcopy(plan.runs)
    first = sample_latents(bench.path(plan))
    assert torch.equal(sample_latents(bench.path(plan)), first) and torch.equal(plan.runs, before)


def test_the_first_call_of_a_plan_must_be_whole(plan):
    with pytest.raises(ValueError, match="first call must compute everything"):
        SkipPlan(plan.made_for, plan.grain, plan.wiring, torch.zeros_like(plan.runs))
