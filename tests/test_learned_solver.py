"""Learned multistep solvers: the scheduler, gradients into its numbers, learning, the file, and the commands."""

import json
import os
import signal
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial

import entry
import forked
import pytest
import torch
from test_coefficients import error, outputs_of, rebuilt
from test_gradients import close, generator, in_one_graph, plan_for
from test_schedules import CHOSEN, V, chosen_path
from toy import EPS, ZERO_SNR, grads, objective, toy_path

from sdo_cli.cli.prune_options import SearchOptions
from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import skips_of, with_plan
from sdo_cli.errors import EnvironmentFault, SolverFault
from sdo_cli.gradients.run import run_plan
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.progress import Silent
from sdo_cli.prune.learned import best_of, fit, held_error, learn, new_student, spaced
from sdo_cli.prune.lessons import Lessons, SolverSettings
from sdo_cli.prune.methods import from_learned
from sdo_cli.prune.setting import Setting
from sdo_cli.prune.student import Student, asking, full_gradient, shortcut_gradient
from sdo_cli.sampling.loop import sample_latents
from sdo_cli.sampling.multistep import adams_bashforth, clock_of, out_of_order
from sdo_cli.sampling.route import Route
from sdo_cli.sampling.solvers import make_scheduler
from sdo_cli.skipping.multistep import Multistep
from sdo_cli.skipping.skip_plan import load_plan

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
KINDS = {
    "epsilon": ("ipndm", EPS),
    "v": ("ipndm", EPS | V),
    "zero-snr": ("ipndm", ZERO_SNR),
    "flow": ("flow-euler", FLOW),
}
PLAIN = Multistep(((1.0,),) * 7, (1.0,) * 7)
ODD = Multistep(
    ((1.1,), (1.4, -0.5), (1.7, -0.9, 0.3), (1.2, -0.4, 0.1), (0.9, 0.1, 0.0), (1.2, -0.3, 0.2), (1.0, 0.1, -0.05)),
    (1.0, 0.97, 1.02, 0.9, 1.1, 0.95, 1.3),
)


def path_of(kind, multistep, timesteps=CHOSEN, scale=3.0, start=0):
    """The toy's path by a learned solver."""
    name, config = KINDS[kind]
    _, path = toy_path("flow-euler" if kind == "flow" else "euler", 8, scale=scale, config=config)
    scheduler = make_scheduler(name, config, len(timesteps), timesteps, multistep)
    route = Route(scheduler, len(timesteps), start, timesteps=tuple(timesteps))
    return replace(path, route=route, x_0=path.x_0 * route.noise_level / path.route.noise_level)


# the scheduler


@pytest.mark.parametrize("kind", KINDS)
def test_one_slope_of_weight_one_is_eulers_step(kind):
    """Which is DDIM's, where that ends without noise."""
    mine = path_of(kind, PLAIN)
    config = KINDS[kind][1]
    euler = chosen_path("flow-euler" if kind == "flow" else "euler", CHOSEN, like=mine, config=config)
    # to how zero terminal SNR and float32 sigmas round
    assert error(sample_latents(mine), sample_latents(euler)) < (1e-4 if kind == "zero-snr" else 5e-6)
    if kind in ("epsilon", "v"):
        ddim = chosen_path("ddim", CHOSEN, like=mine, config=config | {"set_alpha_to_one": True})
        ddim = replace(ddim, x_0=mine.x_0 * ddim.route.noise_level / mine.route.noise_level)
        assert error(sample_latents(mine), sample_latents(ddim)) < 5e-6


def test_the_start_is_ipndm():
    for kind in ("epsilon", "v"):
        mine = path_of(kind, adams_bashforth(7, 4))
        theirs = chosen_path("ipndm", CHOSEN, like=mine, config=KINDS[kind][1])
        assert error(sample_latents(mine), sample_latents(theirs)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_a_plain_loop(kind):
    """Of METHOD's formulas, written out once more."""
    path = path_of(kind, ODD)
    levels = [level.sigma for level in path_of(kind, PLAIN).route.levels]
    ends, flow = [*levels, 0.0], kind == "flow"
    signal = make_scheduler(*KINDS[kind], 7, CHOSEN).alphas_cumprod.double() if not flow else None
    known = None if flow else ((1 - signal) / signal).sqrt().log().flip(0)
    x, clock, slopes = path.x_0, ends[0], []
    for i in range(7):
        at = ODD.scales[i] * clock
        if flow:
            shown, t = x, 1000 * at
        else:
            shown, log = x / (at**2 + 1) ** 0.5, torch.tensor(at).log()
            above = next((k for k in range(999) if known[k + 1] <= log <= known[k]), 0)
            t = 999 - above - float((known[above] - log) / (known[above] - known[above + 1]))
            t = min(t, 999.0)
        e = path.denoise(shown, torch.tensor(t).expand(4), path.rows)
        v = "prediction_type" in KINDS[kind][1]
        image = x / (at**2 + 1) - e * at / (at**2 + 1) ** 0.5 if v else x - at * e
        slopes.insert(0, (x - image) / clock)
        row = ODD.weights[i]
        x = x + (ends[i + 1] - clock) * sum(w * d for w, d in zip(row, slopes, strict=False))
        clock = clock + (ends[i + 1] - clock) * sum(row)
    assert error(sample_latents(path), x) < 2e-5


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_final_latent_is_affine_in_the_outputs(kind, start):
    path = path_of(kind, ODD, start=start)
    x_N, outputs = outputs_of(path)
    assert len(outputs) == path.coefficients.calls == 7 - start
    assert error(rebuilt(path, path.coefficients, outputs), x_N) < 1e-5


@pytest.mark.parametrize("variant", ["sdo", "sdo-3", "drtune", "full", "refl", "draft-1"])
@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_rules_work_on_it_and_both_engines_agree(kind, variant):
    path = path_of(kind, ODD)
    net = path.denoise.network
    plan = plan_for(variant, path)
    run_plan(path, plan, objective)
    mine = grads(net)
    in_one_graph(path, plan)
    assert mine.abs().max() > 1e-9 and close(mine, grads(net), 1e-9)


def test_two_calls_at_one_level_are_told_apart():
    """Scales may lead a call to where another one asks; the first is still the first."""
    twice = Multistep(((1.0,), (1.0,)), (1.2, 1.2))
    path = path_of("epsilon", twice, (999, 998))
    assert path.route.begin()[1].tolist() == [999.0, 999.0]
    x_N, outputs = outputs_of(path)
    assert error(rebuilt(path, path.coefficients, outputs), x_N) < 1e-5


def test_a_clock_that_leaves_the_levels_is_seen():
    grid = [10.0, 5.0, 1.0, 0.0]
    assert not out_of_order(grid, adams_bashforth(3))
    assert out_of_order(grid, Multistep(((3.0,), (1.0,), (1.0,)), (1.0,) * 3))
    clock, asked = clock_of(grid, ((1.0,), (1.5, -0.5), (1.0,)), (1.0, 0.5, 1.0))
    assert clock == [10.0, 5.0, 1.0] and asked == [10.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("rows", "scales"),
    [(((1.0, 0.5),), (1.0,)), (((1.0,),), (0.0,)), (((float("nan"),),), (1.0,)), (((1.0,),), (1.0, 1.0)), ((), ())],
)
def test_numbers_that_are_no_solver(rows, scales):
    with pytest.raises(ValueError):
        Multistep(rows, scales)


def test_a_solver_is_for_its_number_of_calls():
    with pytest.raises(SolverFault, match="learned for 7 calls, not 3"):
        make_scheduler("ipndm", EPS, 3, (900, 500, 100), PLAIN)


# gradients into its numbers

PROMPTS = ["the cat", "a dog on the cat", "the dog"]
STEPS = (981, 601, 241)


def setting_of(small, name="sd15", dtype=torch.float64, config=None):
    source = ModelSource(str(small(name)))
    family = load_family(source, dtype=dtype)
    family.to(torch.device("cpu"), dtype)
    for part in (family.denoiser, family.vae):
        part.requires_grad_(False)
    if config:
        family.scheduler_config = {**family.scheduler_config, **config}
    solver = "flow-euler" if name == "sd3" else "ddim"
    settings = DrawSettings(solver, num_inference_steps=10, guidance_scale=3.0)
    return Setting(family, source, PromptEmbeddings(family), settings, PROMPTS)


def lesson_of(kind):
    """The toy's student, away from the start, where some derivatives are equal."""
    name, config = KINDS[kind]
    path = path_of(kind, adams_bashforth(3, 2), STEPS)
    scheduler = make_scheduler(name, config, 3, STEPS, adams_bashforth(3, 2))
    weights = torch.tensor([[1.0, 0.0], [1.5, -0.5], [1.0, 0.0]], dtype=torch.float64)
    moves = 0.1 * torch.randn(3, 2, dtype=torch.float64, generator=generator(1))
    # below the first level, above which the network knows none
    scales = -0.05 * torch.rand(3, dtype=torch.float64, generator=generator(2)) - 0.01
    multiples = 1 + 0.3 * torch.randn(3, dtype=torch.float64, generator=generator(4))
    leaves = moves.requires_grad_(), scales.requires_grad_(), multiples.requires_grad_()
    student = Student(scheduler.grid, scheduler.levels, weights, *leaves, guidance=3.0)
    target = torch.randn(path.x_0.shape, dtype=torch.float64, generator=generator(3))
    return student, asking(path, student.levels), path, target


def shifted(student, value_of, step=1e-6):
    """Differences of ``value_of()`` in every number."""
    found = []
    for leaf in student.leaves:
        row = []
        for place in range(leaf.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf.view(-1)[place] += sign * step
                    sides.append(float(value_of()))
                    leaf.view(-1)[place] -= sign * step
            row.append((sides[0] - sides[1]) / (2 * step))
        found.append(torch.tensor(row, dtype=torch.float64).view_as(leaf))
    return found


SMALL = SolverSettings(window=2, samples=8, batch=2)


@pytest.mark.parametrize("kind", KINDS)
def test_full_gradients_are_those_of_finite_differences(kind):
    student, ask, path, target = lesson_of(kind)
    loss = full_gradient(student, path.x_0, target, ask)
    with torch.no_grad():
        wanted = shifted(student, lambda: (student.latents(path.x_0, ask) - target).square().mean())
        assert loss == pytest.approx(float((student.latents(path.x_0, ask) - target).square().mean()))
    for leaf, value in zip(student.leaves, wanted, strict=True):
        assert leaf.grad.abs().max() > 0
        assert (leaf.grad - value).abs().max() <= 1e-6 * value.abs().max()


@pytest.mark.parametrize("at", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_shortcut_gradients_are_those_of_the_linear_path(kind, at):
    """Outputs are data but for how that of call ``at`` changes with its level, which stands for all three."""
    student, ask, path, target = lesson_of(kind)
    outputs, inputs, asked, slopes = [], [], [], None

    def note(i, x, level):
        inputs.append(x)
        asked.append(level.detach().clone())
        outputs.append(ask(i, x, level))
        return outputs[-1]

    with torch.no_grad():
        student.latents(path.x_0, note)
        if at is not None:
            changed = ask(at, inputs[at], asked[at] * 1.02)
            slopes = [3 * (new - old) / (0.02 * asked[at]) for new, old in zip(changed, outputs[at], strict=True)]
    shortcut_gradient(student, path.x_0, target, ask, at=at)

    def linear():
        def given(i, x, level):
            if i != at:
                return outputs[i]
            return tuple(e + (level - asked[i]) * slope for e, slope in zip(outputs[i], slopes, strict=True))

        return (student.latents(path.x_0, given) - target).square().mean()

    with torch.no_grad():
        wanted = shifted(student, linear)
    for leaf, value in zip(student.leaves, wanted, strict=True):
        assert (leaf.grad - value).abs().max() <= 1e-6 * value.abs().max()


def test_a_part_of_the_samples_stands_for_all():
    """The mean over which part of them is the derivative looked at on all."""
    student, ask, path, target = lesson_of("epsilon")
    found = []
    for some in (None, torch.tensor([0, 2]), torch.tensor([1, 3])):
        student.log_scales.grad = student.moves.grad = None
        part = None if some is None else asking(path, student.levels, some)
        shortcut_gradient(student, path.x_0, target, ask, at=1, some=some, ask_some=part)
        found.append(student.log_scales.grad.clone())
    assert torch.allclose((found[1] + found[2]) / 2, found[0], rtol=1e-9)
    assert not torch.allclose(found[1], found[0], rtol=1e-2)


@pytest.mark.parametrize("kind", ["sd15", "v", "sd3"])
def test_what_is_learned_is_what_is_drawn(small, kind):
    setting = setting_of(small, "sd15" if kind == "v" else kind, torch.float32, V if kind == "v" else None)
    lessons = Lessons(setting, SMALL)
    lessons.prepare(Silent())
    student = new_student(setting, STEPS, SMALL)
    with torch.no_grad():
        student.moves += 0.1 * torch.randn(student.moves.shape, dtype=torch.float64, generator=generator(1))
        student.log_scales -= 0.1
        student.multiples += torch.tensor([-0.4, 0.1, 0.3])
    path, x, _ = lessons.lesson([0, 1], student.grid[0])
    from sdo_cli.prune.learned import Learned
    from sdo_cli.seeding import key_to_seed

    plan = from_learned(setting, Learned(STEPS, student.numbers, 1.0, 1.0), 0.7, SMALL)
    prompts = [setting.prompts_of(j, 1)[0] for j in (0, 1)]
    drawn = setting.path(prompts, [key_to_seed(0, "solver-noise", j) for j in (0, 1)], plan=plan)
    assert drawn.route.calls == 3 and lessons.held
    with torch.no_grad():
        assert error(student.latents(x.float(), asking(path, student.levels)), sample_latents(drawn)) < 1e-5


# learning


@pytest.mark.parametrize("gradients", ["shortcut", "full"])
def test_learning_comes_nearer_to_the_teacher_on_samples_held_back(small, gradients):
    setting = setting_of(small, dtype=torch.float32)
    wanted = replace(SMALL, gradients=gradients, start="euler", updates=50, samples=16, batch=4, learning_rate=0.05)
    lessons = Lessons(setting, wanted)
    lessons.prepare(Silent())
    # put away as the command does: later updates change what the optimizer holds
    states = [deepcopy(state) for state in learn(setting, STEPS, wanted, lessons)]
    best = best_of(states[-1])
    assert best.error < 0.97 * best.begun and [state["number"] for state in states] == list(range(51))
    assert new_student(setting, STEPS, replace(wanted, start="ipndm")).numbers == adams_bashforth(3, 2)
    student = new_student(setting, STEPS, wanted)
    assert all(row[0] == 1 and not any(row[1:]) for row in student.numbers.weights)
    assert held_error(lessons, student) == pytest.approx(best.begun)
    assert not set(lessons.held) & {j for update in range(50) for j in lessons.batch(update)}
    # from the middle on it is the same, bit for bit
    again = list(learn(setting, STEPS, wanted, lessons, state=states[20]))
    assert len(again) == 30 and best_of(again[-1]) == best
    assert all(map(torch.equal, again[-1]["leaves"], states[-1]["leaves"]))


@pytest.mark.parametrize("kind", ["sd15", "v", "sd3"])
def test_fitted_steps_land_nearest_to_the_teacher(small, kind):
    """Every row solves its least squares: what is left is at right angles to the slopes; calls ask at the grid."""
    setting = setting_of(small, "sd15" if kind == "v" else kind, torch.float32, V if kind == "v" else None)
    wanted = replace(SMALL, start="fitted", samples=12, batch=4, window=3)
    steps = spaced(setting, 3, "even")
    lessons = Lessons(setting, wanted)
    lessons.prepare(Silent())
    student = new_student(setting, steps, wanted)
    plain = held_error(lessons, student)
    fit(student, lessons, steps)
    numbers = list(range(len(lessons.held), 12))
    _, asked = clock_of(student.grid, student.numbers.weights, student.numbers.scales)
    assert asked == pytest.approx(student.grid[:-1])
    # once more, with the latents that the numbers give
    path, x, target = lessons.lesson(numbers, student.grid[0])
    there, seen = [*lessons.nodes(numbers, steps)[1:], target], []

    def note(one, i, x, level):
        parts = asking(path, one.levels)(i, x, level)
        seen.append((x, one.joined(i, parts)))
        return parts

    with torch.no_grad():
        end = student.latents(x, partial(note, student))
    landed, slopes = [*(x for x, _ in seen[1:]), end], []
    for (here, e), level, where, goal in zip(seen, student.grid, landed, there, strict=False):
        slopes.append((here - student.levels.image(here, e, level)).flatten())
        left = (where - goal).flatten()
        for slope in slopes[-3:]:
            # but for the ridge; of the plain start it is half and more
            assert abs(float(left @ slope)) <= 5e-2 * float(left.norm() * slope.norm())
    assert held_error(lessons, student) < plain
    # of the first step, which begins at the same latents, guidance of its own comes nearer still
    assert student.multiples.min() > 0 and (student.multiples - 1).abs().max() > 1e-3
    other = new_student(setting, steps, replace(wanted, guidance=False))
    fit(other, lessons, steps)
    assert torch.equal(other.multiples, torch.ones(3, dtype=torch.float64)) and not other.numbers.guidance
    second = []
    for one in (student, other):
        seen.clear()
        with torch.no_grad():
            one.latents(x, partial(note, one))
        second.append(float((seen[1][0] - there[0]).norm()))
    assert second[0] < second[1]
    # the start that is kept is the nearer one at the end, on samples held back
    begun = best_of(next(learn(setting, steps, wanted, lessons))).begun
    assert begun == pytest.approx(min(held_error(lessons, one) for one in (student, other)))


def test_guidance_by_call_is_the_solvers_formula():
    """At each call the scale's own multiple; finite samples of several calls in one batch, as live calls are."""
    numbers = replace(ODD, guidance=(0.4, 0.6, 1.0, 1.0, 1.2, 1.3, 0.9))
    path = path_of("epsilon", ODD)
    multiples = path.route.begin()[1], torch.tensor(numbers.guidance, dtype=torch.float64)
    guided = replace(path.denoise, multiples=multiples)
    x, t = torch.randn(path.x_0.shape, dtype=torch.float64, generator=generator(1)), multiples[0][[0, 1, 4, 6]]
    e_uncond, e_cond = path.denoise.pair(x, t, path.rows)
    scales = 3.0 * torch.tensor([0.4, 0.6, 1.2, 0.9], dtype=torch.float64).view(-1, *[1] * (x.dim() - 1))
    assert torch.allclose(guided(x, t, path.rows), e_uncond + scales * (e_cond - e_uncond), rtol=1e-12)
    # rules work on it as on any path
    path = replace(path, denoise=guided)
    plan = plan_for("sdo", path)
    run_plan(path, plan, objective)
    mine = grads(path.denoise.network)
    in_one_graph(path, plan)
    assert mine.abs().max() > 1e-9 and close(mine, grads(path.denoise.network), 1e-9)


def test_one_walk_of_the_teacher_serves_all_solvers(small):
    setting = setting_of(small, dtype=torch.float32)
    steps = spaced(setting, 3, "even")
    lessons, walks = Lessons(setting, SMALL), []
    whole = Lessons(setting, SMALL).nodes([2, 3], steps)
    walk = lessons._walk
    lessons._walk = lambda *what: walks.append(what) or walk(*what)
    lessons.ahead = set(steps)
    few = [lessons.nodes([2, 3], (steps[place],))[0] for place in (1, 0, 2)]
    assert len(walks) == 1 and all(torch.equal(few[k], whole[place]) for k, place in enumerate((1, 0, 2)))


def test_a_fitted_start_is_not_left_for_something_worse(small):
    setting = setting_of(small, dtype=torch.float32)
    wanted = replace(SMALL, start="fitted", samples=12, batch=4, updates=0)
    lessons = Lessons(setting, wanted)
    lessons.prepare(Silent())
    steps = spaced(setting, 3, "even")
    state = list(learn(setting, steps, wanted, lessons))
    assert len(state) == 1 and best_of(state[0]).begun == best_of(state[0]).error


def test_without_scales_every_call_asks_where_its_clock_says(small):
    setting = setting_of(small, dtype=torch.float32)
    wanted = replace(SMALL, scales=False, updates=3, start="euler")
    lessons = Lessons(setting, wanted)
    lessons.prepare(Silent())
    state = list(learn(setting, STEPS, wanted, lessons))[-1]
    moves, scales, multiples = state["leaves"]
    assert scales.abs().max() == 0 and moves[1, 1] != 0 and multiples[1] != 1


def test_learning_that_leaves_the_levels_ends_in_a_sentence(small):
    setting = setting_of(small, dtype=torch.float32)
    wanted = replace(SMALL, learning_rate=50.0, updates=20, start="euler")
    lessons = Lessons(setting, wanted)
    lessons.prepare(Silent())
    with pytest.raises(SolverFault, match="left the levels there are"):
        list(learn(setting, STEPS, wanted, lessons))


@pytest.mark.parametrize("grid", ["even", "polynomial"])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_grids_begin_with_the_teacher_and_fall(small, name, grid):
    setting = setting_of(small, name, torch.float32)
    own = setting.path(PROMPTS[:1], [0]).route.begin()[1]
    found = spaced(setting, 4, grid)
    assert found[0] == round(float(own[0])) and list(found) == sorted(set(found), reverse=True)
    assert found[-1] > 0
    assert set(found) <= {round(float(t)) for t in own}
    with pytest.raises(SolverFault, match="calls of a sampler with"):
        spaced(setting, 2000, grid)


# the file


def test_the_file_says_all_of_it_and_is_refused_where_it_does_not_fit(small, tmp_path):
    from sdo_cli.prune.learned import Learned

    setting = setting_of(small, dtype=torch.float32)
    plan = from_learned(setting, Learned(STEPS, adams_bashforth(3, 2), 2.0, 1.0), 0.7, SMALL)
    plan.save(tmp_path / "a.json")
    tree = json.loads((tmp_path / "a.json").read_text())
    # an sdo that knows no learned solvers refuses it
    assert tree["version"] == 2 and tree["prediction"] == "epsilon" and tree["multistep"]["weights"][1] == [1.5, -0.5]
    again = load_plan(tmp_path / "a.json")
    assert again == replace(plan, runs=again.runs) and again.fingerprint == plan.fingerprint
    other = replace(plan, made_for=replace(plan.made_for, multistep=adams_bashforth(3, 1)))
    assert other.fingerprint != plan.fingerprint
    for key, value, said in (
        ("multistep", {"weights": [[1.0]], "scales": [1.0]}, "as many rows"),
        ("multistep", {"weights": [[1.0]]}, "scales is missing"),
        ("multistep", {"weights": [[1.0]] * 3, "scales": [1] * 3, "guidance": [1, 1]}, "2 multiples of guidance for 3"),
        ("multistep", {"weights": [[1.0], [1.0], [float("inf")]], "scales": [1, 1, 1]}, "finite"),
        ("version", 3, "of version 3; this sdo reads 1 and 2"),
    ):
        (tmp_path / "b.json").write_text(json.dumps({**tree, key: value}))
        with pytest.raises(EnvironmentFault, match=said):
            load_plan(tmp_path / "b.json")
    steered = replace(
        plan, made_for=replace(plan.made_for, multistep=replace(plan.made_for.multistep, guidance=(0.5, 1, 1)))
    )
    steered.save(tmp_path / "c.json")
    assert load_plan(tmp_path / "c.json").made_for.multistep.guidance == (0.5, 1.0, 1.0)
    assert steered.fingerprint != plan.fingerprint
    bare = replace(setting.settings, guidance_scale=1.0)
    assert skips_of(plan, setting.family, with_plan(bare, plan))
    with pytest.raises(EnvironmentFault, match=r"(?s)how much guidance.* above 1 \(it was made at 3\.0\)"):
        skips_of(steered, setting.family, with_plan(bare, steered))
    v = setting_of(small, dtype=torch.float32, config=V)
    with pytest.raises(EnvironmentFault, match=r"predicts epsilon; .* predicts v_prediction"):
        skips_of(plan, v.family, with_plan(v.settings, plan))


# the commands


def sdo(*arguments, cwd):
    return entry.run(arguments, cwd=cwd, env=os.environ | {"HF_HUB_OFFLINE": "1"})


WORDS = ("prune", "-p", "mine.txt", "--method", "learned-solver", "--steps", "8", "--guidance", "2", "--calls", "3")
FEW = (
    "--calls",
    "2",
    "--samples",
    "8",
    "--updates",
    "30",
    "--search-batch",
    "2",
    "--num-prompts",
    "2",
    "--rounds",
    "1",
)


@pytest.fixture(scope="module")
def learned(small, tmp_path_factory):
    where = tmp_path_factory.mktemp("learned")
    (where / "mine.txt").write_text("".join(f"a {name} on the cat\n" for name in ("tiger", "bus", "dog", "rose")))
    model = ("-m", str(small("sd15")))
    done = sdo(*WORDS, *model, *FEW, "--reward", "colorfulness", "--batch-size", "2", "--out", "found", cwd=where)
    assert done.returncode == 0, done.stderr
    return where, model, done


def test_prune_learns_a_solver_per_budget_and_measures_it(learned):
    where, _, done = learned
    assert "3 calls: distance to the full sampler's latents" in done.stderr
    plans = {name: load_plan(where / "found" / name) for name in ("plan-0.62.json", "plan-0.75.json")}
    three = plans["plan-0.62.json"]
    assert three.made_for.multistep.calls == 3 and plans["plan-0.75.json"].made_for.multistep.calls == 2
    assert three.made_by["distance"]["learned"] <= three.made_by["distance"]["start"]
    assert three.cost["calls"] == 3 and three.quality["colorfulness"]["difference"]
    assert "ipndm-3" in done.stdout and "learned-solver 0.62" in done.stdout
    assert not (where / "found/kept").exists()


def test_sample_and_eval_draw_with_it(learned):
    where, model, _ = learned
    plan = "found/plan-0.62.json"
    done = sdo("sample", "a tiger", *model, "--skip-plan", plan, "--guidance", "2", "--out", "s", cwd=where)
    assert done.returncode == 0, done.stderr
    plain = load_plan(where / plan)
    replace(plain, made_for=replace(plain.made_for, multistep=None, prediction=None)).save(where / "plain.json")
    done = sdo("sample", "a tiger", *model, "--skip-plan", "plain.json", "--guidance", "2", "--out", "p", cwd=where)
    assert done.returncode == 0, done.stderr
    assert (where / "s/00000.png").read_bytes() != (where / "p/00000.png").read_bytes()
    words = [
        "eval",
        *model,
        "-p",
        "mine.txt",
        "--skip-plan",
        plan,
        "--steps",
        "8",
        "--guidance",
        "2",
        "--solver",
        "ddim",
    ]
    done = sdo(*words, "--rewards", "colorfulness", "--no-embedding", "--out", "e", cwd=where)
    assert done.returncode == 0, done.stderr
    assert list(json.loads((where / "e/summary.json").read_text())["variants"]) == ["base", "base+plan-0.62"]


RECIPE = """
rewards: [colorfulness]
prompts: {file: mine.txt}
max_train_steps: 2
train_batch_size: 2
solver: ddim
num_inference_steps: 8
guidance_scale: 2.0
lora: {rank: 2}
rollout: {skip_plan: found/plan-0.62.json, drift_steps: 2}
"""


def test_training_rolls_out_with_it_whatever_solver_samples(learned):
    where, model, _ = learned
    (where / "r.yaml").write_text(f"model: {model[1]}" + RECIPE)
    done = sdo("finetune", "r.yaml", "--out", "run", cwd=where)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (where / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["calls"]["no_grad"] >= 6 and lines[-1]["calls"] == {"no_grad": 6, "grad": 2}
    assert lines[0]["drift"]["distance"] > 0
    assert load_plan(where / "run/skip_plan.json").made_for.multistep.calls == 3


def test_killed_and_gone_on_with_it_ends_as_if_left_alone(learned):
    where, model, _ = learned
    words = [*WORDS, *model, *FEW, "--updates", "60", "--num-prompts", "0", "--out"]
    assert sdo(*words, "alone", cwd=where).returncode == 0
    process = forked.Forked([*words, "killed"], cwd=where, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    deadline = time.monotonic() + 300
    while not (where / "killed/kept/solver-3.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sdo(*words, "killed", "--resume", cwd=where)
    assert done.returncode == 0, done.stderr
    for name in ("plan-0.62.json", "plan-0.75.json"):
        assert (where / "killed" / name).read_text() == (where / "alone" / name).read_text()


@pytest.mark.parametrize(("words", "updates"), [({}, 0), ({"start": "euler"}, 100), ({"updates": 7}, 7)])
def test_after_a_fitted_start_nothing_is_learned_unless_it_is_asked_for(words, updates):
    assert SearchOptions(**words).solver_settings().updates == updates


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calls", "0"], "--calls: must be from 1 to 7, not 0"),
        (["--calls", "8"], "--calls: must be from 1 to 7, not 8"),
        (["--grid", "odd"], "--grid: 'odd' is not one of"),
        (["--window", "5"], "--window: must be 1 to 4"),
        (["--samples", "4"], "--samples: a quarter of them is held back"),
        (["--gradients", "one-step"], "one-step is for gates"),
        (["--updates", "-1"], "--updates: must be at least 1"),
        (["--start", "heun"], "--start: 'heun' is not one of fitted, euler, ipndm"),
        (["--solver", "ddpm"], "fresh noise"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(learned, words, said):
    where, model, _ = learned
    done = sdo(*WORDS, *model, *FEW, "--out", "bad", *words, cwd=where)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
