"""Timesteps chosen for a solver, through the stock schedulers, and the searches that choose them."""

import itertools
import sys
from dataclasses import asdict, replace
from functools import partial

import diffusers
import pytest
import torch
from test_coefficients import error, outputs_of, rebuilt
from toy import CONFIGS, EPS, toy_path

from sdo_cli.drawing.draw import DrawSettings, draw_noise, encode_pair, make_path, make_route
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.errors import SolverFault
from sdo_cli.evaluation.evaluation import job_from, job_tree
from sdo_cli.evaluation.job import EvalPrompt, Job, Prompts, Settings, Variant, digest
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.prune.schedules import Nodes, cheapest_walks, optimal_stepsize, pair_costs, pairwise, teacher
from sdo_cli.sampling.coefficients import coefficients_of
from sdo_cli.sampling.loop import sample_latents
from sdo_cli.sampling.route import Route
from sdo_cli.sampling.solvers import make_scheduler

CHOSEN = (981, 861, 700, 459, 301, 120, 41)
TAKING = ("ddim", "ddim-v", "euler", "ipndm", "dpm++2m", "tcd", "flow-euler")
ONE_STEP = ("ddim", "ddim-v", "euler", "flow-euler")
V = {"prediction_type": "v_prediction"}


def chosen_path(solver, timesteps, like=None, start=0, config=None):
    """The toy's path, or that of ``like``, over these timesteps."""
    name, own = CONFIGS[solver]
    scheduler = make_scheduler(name, config or own, len(timesteps), timesteps)
    route = Route(scheduler, len(timesteps), start, timesteps=tuple(timesteps))
    if like is not None:
        return replace(like, route=route)
    _, path = toy_path(solver, 8, scale=3.0)
    return replace(path, route=route, x_0=path.x_0 * route.noise_level / path.route.noise_level)


# timesteps of one's own


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("solver", TAKING)
def test_the_network_is_asked_at_these_timesteps_and_the_latent_rebuilt_from_what_it_says(solver, start):
    path, asked = chosen_path(solver, CHOSEN, start=start), []
    network = path.denoise
    watched = replace(path, denoise=lambda x, t, rows: asked.append(t.tolist()) or network(x, t, rows))
    x_N, outputs = outputs_of(watched)
    assert asked == [[t] * 4 for t in CHOSEN[start:]]
    assert path.coefficients.calls == path.route.calls == len(CHOSEN) - start
    assert error(rebuilt(path, path.coefficients, outputs), x_N) < 2e-6


@pytest.mark.parametrize("solver", TAKING)
@pytest.mark.parametrize("endpoint", [0, 4])
def test_levels_are_those_of_the_timesteps(solver, endpoint):
    """``add_noise`` of the stock scheduler makes α x0 + σ ε, and the x0-prediction is affine there too."""
    path = chosen_path(solver, CHOSEN)
    scheduler, timesteps = path.route.begin()
    image, noise = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64)
    add = getattr(scheduler, "add_noise", None) or (lambda x, z, t: scheduler.scale_noise(x, t, z))
    for level, t in zip(path.route.levels, timesteps, strict=True):
        assert error(add(image, noise, t[None]), level.alpha * image + level.sigma * noise) < 1e-5
    predicted, outputs = outputs_of(path, torch.full((4,), endpoint))
    assert error(rebuilt(path, coefficients_of(path.route, endpoint=endpoint), outputs), predicted) < 2e-6


def test_the_cache_of_coefficients_tells_timesteps_apart():
    scheduler = make_scheduler("ddim", EPS, 2, (900, 400))
    found = [coefficients_of(Route(scheduler, 2, timesteps=t)).w for t in ((900, 400), (900, 300))]
    assert found[0] != found[1]


@pytest.mark.parametrize("solver", TAKING)
def test_steps_and_calls_are_the_same_with_timesteps(solver):
    route = chosen_path(solver, CHOSEN).route
    assert [route.call_of(step) for step in range(7)] == list(range(7))
    late = route.from_step(4)
    assert late.timesteps == CHOSEN and [late.call_of(step) for step in (4, 6)] == [0, 2]
    assert late.levels == route.levels[4:] and late.begin()[1].tolist() == list(CHOSEN[4:])


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("kind", [{}, V], ids=["epsilon", "v"])
@pytest.mark.parametrize("offset", [0, 1])
def test_ddim_at_its_own_timesteps_is_ddim(to_one, kind, offset):
    """Step by step and in its coefficients; within float32, in which the multistep scheduler computes."""
    config = EPS | kind | {"set_alpha_to_one": to_one, "steps_offset": offset}
    scheduler = make_scheduler("ddim", config, 20)
    _, path = toy_path("ddim", 20, scale=3.0)
    path = replace(path, route=Route(scheduler, 20))
    chosen = chosen_path("ddim", tuple(scheduler.timesteps.tolist()), like=path, config=config)
    assert type(chosen.route.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert error(sample_latents(chosen), sample_latents(path)) < 2e-6
    a, b = chosen.coefficients, path.coefficients
    assert pytest.approx(b.A, rel=1e-5) == a.A and a.w == pytest.approx(b.w, abs=2e-6 * max(map(abs, b.w)))
    assert chosen.route.end == pytest.approx(path.route.end, abs=1e-7)
    for mine, its in zip(chosen.route.levels, path.route.levels, strict=True):
        assert list(asdict(mine).values()) == pytest.approx(list(asdict(its).values()), rel=1e-6)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("kind", [{}, V], ids=["epsilon", "v"])
def test_ddim_at_chosen_timesteps_follows_its_formula(to_one, kind):
    """DDIM (Song et al. 2021, eq. 12) in float64, from one chosen timestep to the next."""
    config = EPS | kind | {"set_alpha_to_one": to_one}
    path = chosen_path("ddim", CHOSEN, config=config)
    abar = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double()
    last = torch.ones(1).double() if to_one else abar[:1]
    signal = torch.cat([abar[list(CHOSEN)], last])
    x = path.x_0
    for i, t in enumerate(CHOSEN):
        e, (a, b) = path.denoise(x, torch.full((4,), t), path.rows), signal[i : i + 2]
        noise = a.sqrt() * e + (1 - a).sqrt() * x if kind else e
        x = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
    assert error(sample_latents(path), x.detach()) < 2e-6


@pytest.mark.parametrize("solver", ["euler", "ipndm", "dpm++2m", "flow-euler"])
def test_others_at_their_own_timesteps_are_themselves(solver):
    spacing = {"timestep_spacing": "leading"} if solver in ("euler", "ipndm") else {}
    name, config = CONFIGS[solver]
    own = make_scheduler(name, config | spacing | ({"shift": 1.0} if solver == "flow-euler" else {}), 10)
    _, path = toy_path(solver, 10, scale=3.0)
    path = replace(path, route=Route(own, 10))
    timesteps = tuple(int(t) for t in own.timesteps)
    assert torch.equal(torch.tensor(timesteps), own.timesteps.to(torch.int64))
    chosen = chosen_path(solver, timesteps, like=path, config=config | spacing)
    if solver == "flow-euler":  # not whole: 1000, 889.1, …
        assert error(sample_latents(chosen), sample_latents(path)) < 2e-3
    else:
        assert error(sample_latents(chosen), sample_latents(path)) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_shift_of_a_flow_places_steps_and_does_not_move_those_chosen(shift):
    """Timestep t is the noise level t / 1000, and plain diffusers gets there by undoing its shift."""
    config = CONFIGS["flow-euler"][1] | {"shift": shift, "shift_terminal": 0.1}
    path = chosen_path("flow-euler", (1000, 750, 20), config=config)
    assert [level.sigma for level in path.route.levels] == pytest.approx([1.0, 0.75, 0.02])
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = [s / (shift - (shift - 1) * s) for s in (1.0, 0.75, 0.02)]
    stock.set_timesteps(sigmas=sigmas)
    assert stock.timesteps.tolist() == pytest.approx([1000, 750, 20], rel=1e-5)
    x = path.x_0
    with torch.no_grad():
        for t in stock.timesteps:
            x = stock.step(path.denoise(x, t.expand(4), path.rows), t, x).prev_sample.double()
    assert error(sample_latents(path), x) < 1e-5


def test_plain_diffusers_steps_to_the_same_latents():
    """`sdo`'s "ddim" with timesteps, written by hand with the stock scheduler."""
    path = chosen_path("ddim", CHOSEN)
    kept = {key: value for key, value in EPS.items() if key != "steps_offset"}
    stock = diffusers.DPMSolverMultistepScheduler(**kept, solver_order=1)
    stock.set_timesteps(timesteps=list(CHOSEN))
    x = path.x_0
    with torch.no_grad():
        for t in stock.timesteps:
            x = stock.step(path.denoise(x, t.expand(4), path.rows), t, x).prev_sample
    assert torch.equal(sample_latents(path), x)


@pytest.mark.parametrize(
    ("solver", "eta", "kind"),
    [("lcm", 0.0, "LCMScheduler"), ("tcd", 0.0, "TCDScheduler"), ("tcd", 0.7, "TCDScheduler")],
)
def test_few_step_solvers_step_as_plain_diffusers_at_chosen_timesteps(solver, eta, kind):
    """Hyper-SD's authors name timesteps, 800 for one step. The noise is the route's own in both."""
    for timesteps in ((800,), CHOSEN):
        steps = len(timesteps)
        _, path = toy_path(solver, steps, eta=eta)
        route = Route(make_scheduler(solver, EPS, steps, timesteps), steps, eta=eta, timesteps=timesteps)
        path, stock = replace(path, route=route), getattr(diffusers, kind).from_config({**EPS, "clip_sample": False})
        stock.set_timesteps(timesteps=list(timesteps))
        x, drawn = path.x_0, list(path.injected if path.injected is not None else ())
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[type(stock).__module__], "randn_tensor", partial(next_of, drawn))
            for t in stock.timesteps:
                extra = {"eta": eta} if solver == "tcd" else {}
                x = stock.step(path.denoise(x, t.expand(4), path.rows), t, x, **extra).prev_sample.double()
        assert route.begin()[1].tolist() == list(timesteps)
        assert error(sample_latents(path), x) < 1e-12
        x_N, outputs = outputs_of(path)
        assert error(rebuilt(path, path.coefficients, outputs), x_N) < 1e-9


def next_of(drawn, *shape, **options):
    return drawn.pop(0)


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
def test_chosen_timesteps_replace_the_models_own_spacing(key):
    config = EPS | {"_class_name": "DPMSolverMultistepScheduler", key: True}
    route = chosen_path("dpm++2m", CHOSEN, config=config).route
    assert route.levels == chosen_path("dpm++2m", CHOSEN).route.levels


@pytest.mark.parametrize("solver", ["pndm", "unipc", "deis", "dpm++2m-karras"])
def test_solvers_that_take_no_timesteps_say_which_do(solver):
    with pytest.raises(SolverFault, match="takes no timesteps") as fault:
        make_scheduler(solver, EPS, 7, CHOSEN)
    assert fault.value.remedy == "choose one of: ddim, euler, ipndm, dpm++2m, ddpm, lcm, tcd, flow-euler"


@pytest.mark.parametrize(
    ("timesteps", "steps", "said"),
    [
        ((900, 900, 100), 3, "timestep 900 comes after 900"),
        ((100, 900), 2, "timestep 900 comes after 100"),
        ((1000, 10), 2, "timestep 1000 is no whole number from 999 to 0"),
        ((900, -1), 2, "timestep -1 is no whole number"),
        ((900.5, 1), 2, "timestep 900.5 is no whole number"),
        ((900, 1), 3, "2 timesteps for 3 steps"),
        ((), 0, "0 timesteps for 0 steps"),
    ],
)
def test_timesteps_that_are_no_way_to_an_image_are_refused_in_one_sentence(timesteps, steps, said):
    with pytest.raises(SolverFault, match=said) as fault:
        make_scheduler("ddim", EPS, steps, timesteps)
    assert "\n" not in fault.value.message and "falling" in fault.value.remedy
    with pytest.raises(SolverFault, match=said):
        Route(make_scheduler("ddim", EPS, 2, (900, 1)), steps, timesteps=timesteps)


def test_a_flow_begins_at_1000_and_never_at_0():
    make_scheduler("flow-euler", CONFIGS["flow-euler"][1], 2, (1000, 1))
    with pytest.raises(SolverFault, match="timestep 0 is no whole number from 1000 to 1"):
        make_scheduler("flow-euler", CONFIGS["flow-euler"][1], 2, (1000, 0))


def test_noise_and_schedulers_made_without_timesteps_are_refused():
    with pytest.raises(SolverFault, match=r"eta 0\.5 with timesteps: DPMSolverMultistepScheduler adds no noise"):
        Route(make_scheduler("ddim", EPS, 2, (900, 1)), 2, eta=0.5, timesteps=(900, 1))
    with pytest.raises(SolverFault, match="DDIMScheduler takes no timesteps"):
        Route(make_scheduler("ddim", EPS, 2), 2, timesteps=(900, 1)).begin()


# evaluations

PROMPTS = Prompts("set", "here", [EvalPrompt("a cow"), EvalPrompt("a tiger")])
# of an evaluation with these settings before timesteps could be chosen
BEFORE = "3d6be832d08de5c3fb72b89b23c089e8a6559712264f4de49dbcd47503e414c8"


def job(**drawn):
    settings = Settings(ModelSource("embedded"), DrawSettings(**drawn), "no", 2, 7, PROMPTS.fingerprint)
    return Job(PROMPTS, settings, [Variant("base")], {}, select_by="")


def test_older_evaluations_keep_their_hash_and_their_text():
    tree = job_tree(job())
    assert tree["hash"] == BEFORE and "timesteps" not in tree["settings"]["draw"]
    assert job_from(tree).settings.draw == DrawSettings()


def test_chosen_timesteps_are_part_of_an_evaluation():
    asked = job(num_inference_steps=2, timesteps=(900, 1))
    tree = job_tree(asked)
    assert tree["hash"] != job_tree(job(num_inference_steps=2))["hash"]
    tree["settings"]["draw"]["timesteps"] = list(tree["settings"]["draw"]["timesteps"])  # as JSON has it
    assert job_from(tree) == asked and digest(job_tree(job_from(tree))) == digest(job_tree(asked))
    other = job(num_inference_steps=2).settings
    assert asked.settings.differences(other) == {"timesteps": ((900, 1), None)}


def test_drawing_takes_timesteps():
    family = load_family(ModelSource("embedded"))
    settings = DrawSettings(num_inference_steps=2, timesteps=(900, 1))
    assert make_route(family, settings).begin()[1].tolist() == [900, 1]
    with pytest.raises(SolverFault, match="2 timesteps for 50 steps"):
        make_route(family, DrawSettings(timesteps=(900, 1)))


# searches


def all_walks(last, count):
    return [(0, *middle) for middle in itertools.combinations(range(1, last), count - 1)]


@pytest.mark.parametrize("seed", range(5))
def test_additive_costs_find_the_cheapest_of_all_walks(seed):
    table = torch.rand(7, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()

    def jump(i, spent):
        return [(j, spent + table[i][j], spent + table[i][j]) for j in range(i + 1, 8)]

    found = cheapest_walks(8, 7, 0.0, jump)
    assert list(found) == list(range(1, 8))
    for count, (cost, walk) in found.items():
        cost_of = {w: sum(table[i][j] for i, j in itertools.pairwise((*w, 7))) for w in all_walks(7, count)}
        assert walk == min(cost_of, key=cost_of.get) and cost == pytest.approx(cost_of[walk])


@pytest.mark.parametrize("seed", range(5))
def test_states_are_those_of_the_walk_that_was_kept(seed):
    """Where the state decides the cost, each node keeps the best state it was offered; by hand over all walks."""
    generator = torch.Generator().manual_seed(seed)
    a, b, target = (torch.rand(size, generator=generator).tolist() for size in ((6, 7), (6, 7), (7,)))

    def jump(i, z):
        return [(j, abs(a[i][j] * z + b[i][j] - target[j]), a[i][j] * z + b[i][j]) for j in range(i + 1, 7)]

    kept = {(0, 0): (1.0, ())}
    for count in range(1, 7):
        for j in range(count, 7):
            offers = []
            for i in range(count - 1, j):
                if (count - 1, i) in kept:
                    z, walk = kept[count - 1, i]
                    offers.append((abs(a[i][j] * z + b[i][j] - target[j]), (*walk, i), a[i][j] * z + b[i][j]))
            _, walk, z = min(offers)
            kept[count, j] = (z, walk)
    found = cheapest_walks(7, 6, 1.0, jump)
    for count, (cost, walk) in found.items():
        z, expected = kept[count, 6]
        assert walk == expected and cost == pytest.approx(abs(z - target[6]))


@pytest.mark.parametrize("solver", ONE_STEP)
def test_a_jump_is_a_step_of_the_stock_scheduler(solver):
    """From every node to every later one, with the scheduler set to just these two timesteps."""
    own = chosen_path(solver, CHOSEN)
    nodes = Nodes(own.route)
    latents, outputs = teacher(own, nodes, 16)
    assert torch.equal(latents[-1], sample_latents(own)) and error(latents[0], own.x_0) < 1e-6
    assert max(map(error, teacher(own, nodes, 3)[0], latents)) < 1e-4
    for i, j in itertools.combinations(range(len(CHOSEN) + 1), 2):
        a, b = nodes.jump(i, j)
        scheduler, timesteps = chosen_path(solver, CHOSEN[i : i + 1] + CHOSEN[j : j + 1]).route.begin()
        stepped = scheduler.step(outputs[i], timesteps[0], latents[i]).prev_sample
        assert error(a * latents[i] + b * outputs[i], stepped) < 1e-5, (i, j)


@pytest.mark.parametrize("solver", ONE_STEP)
def test_the_rest_of_the_path_is_the_coefficients_of_what_is_left(solver):
    route = chosen_path(solver, CHOSEN).route
    rest = [coefficients_of(route.from_step(j)).A for j in range(len(CHOSEN))]
    assert Nodes(route).linear_path == pytest.approx([*rest, 1.0], rel=1e-5)


@pytest.mark.parametrize("solver", ONE_STEP)
def test_the_error_found_is_that_of_the_schedule_run(solver):
    """The student of the search is the solver that then runs, over whole timesteps."""
    path = chosen_path(solver, tuple(range(950, 0, -100)))
    x_N = sample_latents(path)
    found = optimal_stepsize(path, 10, batch_size=3)
    assert list(found) == list(range(1, 11))
    for count, schedule in found.items():
        assert len(schedule.timesteps) == count and schedule.timesteps[0] == 950
        ran = sample_latents(chosen_path(solver, schedule.timesteps, like=path))
        assert (ran - x_N).square().mean().sqrt().item() == pytest.approx(schedule.error, rel=1e-3, abs=1e-5)
    assert found[10].timesteps == path.route.timesteps and found[10].error < 1e-5


def test_with_the_solvers_own_timesteps_all_steps_are_all_of_them():
    for solver in ("ddim", "ddim-v", "flow-euler", "euler"):
        _, path = toy_path(solver, 8, scale=3.0)
        own = tuple(round(t) for t in path.route.begin()[1].tolist())
        assert optimal_stepsize(path, 8)[8].timesteps == pairwise(path)[8].timesteps == own


def test_the_best_two_steps_are_the_best_of_all_two_steps():
    """With two, the one choice is judged at x_N itself."""
    path = chosen_path("ddim", tuple(range(950, 0, -100)))
    x_N = sample_latents(path)
    errors = {
        t: (sample_latents(chosen_path("ddim", (950, t), like=path)) - x_N).square().mean().item()
        for t in path.route.timesteps[1:]
    }
    assert optimal_stepsize(path, 2)[2].timesteps == (950, min(errors, key=errors.get))


def test_network_calls_are_as_many_as_promised():
    path, rows_seen = chosen_path("ddim", tuple(range(950, 0, -100))), []
    network = path.denoise
    counted = replace(path, denoise=lambda x, t, rows: rows_seen.append(len(rows)) or network(x, t, rows))
    pairwise(counted)
    assert sum(rows_seen) == 4 * 10
    rows_seen.clear()
    optimal_stepsize(counted, 3, batch_size=3)
    assert sum(rows_seen) == 4 * (10 + 9 + 8), "none at node 0, which is the teacher's"
    assert max(rows_seen) == 3


@pytest.mark.parametrize("solver", ONE_STEP)
def test_pair_costs_are_errors_carried_to_the_end(solver):
    """Of the last jump: the error at x_N itself. Of others: what the linear path makes of it, by a walk."""
    path = chosen_path(solver, CHOSEN)
    nodes = Nodes(path.route)
    latents, outputs = teacher(path, nodes, 16)
    costs = pair_costs(nodes, latents, outputs)
    for i, j in itertools.combinations(range(len(CHOSEN) + 1), 2):
        a, b = nodes.jump(i, j)
        carried = []
        for x in (a * latents[i] + b * outputs[i], latents[j]):
            for m in range(j, len(CHOSEN)):
                x = sum(c * v for c, v in zip(nodes.jump(m, m + 1), (x, outputs[m]), strict=True))
            carried.append(x)
        assert costs[i][j] == pytest.approx((carried[0] - carried[1]).square().mean().item(), rel=1e-4, abs=1e-10)
    assert max(costs[i][i + 1] for i in range(len(CHOSEN))) < 1e-9
    plain = pair_costs(nodes, latents, outputs, carried=False)
    assert costs[0][3] == pytest.approx(plain[0][3] * nodes.linear_path[3] ** 2)


@pytest.mark.parametrize("carried", [True, False])
def test_pairwise_takes_the_cheapest_of_all_schedules(carried):
    path = chosen_path("ddim", CHOSEN)
    nodes = Nodes(path.route)
    costs = pair_costs(nodes, *teacher(path, nodes, 16), carried=carried)
    for count, schedule in pairwise(path, carried=carried).items():
        cost_of = {w: sum(costs[i][j] for i, j in itertools.pairwise((*w, 7))) for w in all_walks(7, count)}
        best = min(cost_of, key=cost_of.get)
        assert schedule.timesteps == tuple(CHOSEN[i] for i in best)
        assert schedule.error == pytest.approx(cost_of[best] ** 0.5, abs=1e-6)


@pytest.mark.parametrize("solver", ["pndm", "unipc", "deis", "dpm++2m", "dpm++2m-karras"])
def test_searches_refuse_solvers_with_history(solver):
    _, path = toy_path(solver, 10)
    with pytest.raises(SolverFault, match="no step can be left out"):
        pairwise(path)


def test_searches_refuse_noise_uneven_ddim_and_too_many_steps():
    _, path = toy_path("ddim", 10, eta=0.5)
    with pytest.raises(SolverFault, match="no step can be left out"):
        pairwise(path)
    # diffusers' DDIM steps by 1000 // 15 = 66 wherever its timesteps are
    uneven = make_scheduler("ddim", EPS | {"timestep_spacing": "trailing"}, 15)
    with pytest.raises(SolverFault, match="no step can be left out"):
        pairwise(replace(path, route=Route(uneven, 15), injected=None))
    _, path = toy_path("ddim", 10)
    for budget in (0, 11):
        with pytest.raises(SolverFault, match=f"{budget} steps out of a teacher's 10"):
            optimal_stepsize(path, budget)


def embedded_path(family, settings, prompts, seed):
    noise = draw_noise(family, settings, [torch.Generator().manual_seed(seed + j) for j in range(len(prompts))])
    return make_path(family, settings, noise, *encode_pair(PromptEmbeddings(family), settings, prompts))


def test_on_the_embedded_model_it_is_nearer_than_even_steps():
    """From noise that was not searched with."""
    family = load_family(ModelSource("embedded"))
    settings = DrawSettings(num_inference_steps=12, guidance_scale=5.0)
    prompts = ["a cow on a red background", "a tiger on a teal background", "a cow on a green background"]
    schedule = optimal_stepsize(embedded_path(family, settings, prompts, 0), 4)[4]
    held_out = embedded_path(family, settings, prompts, 100)
    x_N = sample_latents(held_out)

    def distance(**steps):
        few = replace(settings, num_inference_steps=4, **steps)
        ran = sample_latents(replace(held_out, route=make_route(family, few)))
        return (ran - x_N).square().mean().sqrt().item()

    assert distance(timesteps=schedule.timesteps) < 0.95 * distance()
