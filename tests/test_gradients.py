"""Gradient rules and engines against autograd, finite differences and each other (float64)."""

import dataclasses
from itertools import cycle

import pytest
import torch
from toy import CONFIGS, TOLERANCE, ZERO_SNR, grads, objective, toy_path

from sdo_cli.gradients.alignprop import alignprop
from sdo_cli.gradients.bridge import bridge
from sdo_cli.gradients.draft import draft_k, draft_lv
from sdo_cli.gradients.drtune import drtune
from sdo_cli.gradients.flowbp import flowbp_sparse
from sdo_cli.gradients.full import full
from sdo_cli.gradients.lagrange import lagrange
from sdo_cli.gradients.leapalign import leapalign
from sdo_cli.gradients.linear import linear_path
from sdo_cli.gradients.one_graph import one_graph
from sdo_cli.gradients.outcome import Scored, Terms
from sdo_cli.gradients.plan import Mode, Plan, empty
from sdo_cli.gradients.refl import refl
from sdo_cli.gradients.rules import RULES, find_rule
from sdo_cli.gradients.run import run_plan, with_repeats
from sdo_cli.gradients.sdo import sdo, sdo_0
from sdo_cli.gradients.three_stage import MicroBatches, three_stage
from sdo_cli.sampling.loop import denoise_path, sample_latents
from sdo_cli.sampling.route import walk

# (rule, options) by a short name: every rule, and every option that changes the plan's kind
VARIANTS = {
    "full": ("full", {}),
    "draft-1": ("draft-k", {"k": 1}),
    "draft-3": ("draft-k", {"k": 3}),
    "draft-lv": ("draft-lv", {"repeats": 2}),
    "alignprop": ("alignprop", {}),
    "alignprop-uniform": ("alignprop", {"truncation": "uniform"}),
    "alignprop-fixed": ("alignprop", {"truncation": "fixed", "step": 5}),
    "refl": ("refl", {}),
    "drtune": ("drtune", {}),
    "drtune-to-the-end": ("drtune", {"k": 3, "early_stop": 0}),
    "flowbp-sparse": ("flowbp-sparse", {}),
    "bridge": ("bridge", {"k": 4}),
    "lagrange": ("lagrange", {}),
    "lagrange-1": ("lagrange", {"order": 1, "alpha": 0.0}),
    "leapalign": ("leapalign", {}),
    "sdo": ("sdo", {}),
    "sdo-3": ("sdo", {"steps_per_sample": 3}),
    "sdo-uniform": ("sdo", {"step_choice": "uniform", "steps_per_sample": 2}),
    "sdo-per-batch": ("sdo", {"step_choice": "per-batch"}),
    "sdo-weight": ("sdo", {"step_choice": "weight-proportional", "steps_per_sample": 2}),
    "sdo-late": ("sdo", {"step_choice": "late-biased"}),
    "sdo-unit": ("sdo", {"weights": "unit"}),
    "sdo-root": ("sdo", {"weights": "root"}),
    "sdo-plain": ("sdo", {"weights": "plain", "step_choice": "late-biased"}),
    "sdo-epsilon": ("sdo", {"as_epsilon": True, "steps_per_sample": 2}),
    "sdo-first": ("sdo", {"step_choice": "first"}),
    "sdo-0": ("sdo-0", {}),
}
ENDS_EARLY = {"refl", "drtune"}
# read a solver's noise levels: what native outputs mean at a call
READS_LEVELS = {*ENDS_EARLY, "draft-lv", "sdo-epsilon", "leapalign"}


def combinations(keep, everywhere=READS_LEVELS):
    """(solver, variant) pairs: a third of the solvers in turn, and all of them for the variants ``everywhere``.

    ε along the path of a flow network is refused, its first step being pure noise.
    """
    refused = ("flow-euler", "sdo-epsilon")
    pairs = [
        (solver, variant)
        for number, variant in enumerate(VARIANTS)
        if keep(variant)
        for place, solver in enumerate(CONFIGS)
        if place % 3 == number % 3 or variant in everywhere
    ]
    return [pair for pair in pairs if pair != refused]


def test_every_solver_and_variant_is_combined():
    pairs = combinations(lambda variant: True)
    assert {solver for solver, _ in pairs} == set(CONFIGS) and {variant for _, variant in pairs} == set(VARIANTS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def plan_for(variant, path, seed=0, batch=4):
    rule, options = VARIANTS[variant]
    return find_rule(rule)(path.route.calls, batch, path.coefficients, generator(seed), **options)


def in_one_graph(path, plan, terms=None, checkpointing=True, target=objective):
    def engine(*arguments):
        *rest, terms = arguments
        return one_graph(*rest, terms=terms, checkpointing=checkpointing)

    return with_repeats(engine, path, plan, target, terms or Terms())


def with_latents(path):
    """The same path with a starting latent that wants a gradient."""
    return dataclasses.replace(path, x_0=path.x_0.detach().clone().requires_grad_())


def test_every_rule_has_a_variant_here():
    assert {rule for rule, _ in VARIANTS.values()} == set(RULES)


# --- three stages = one graph


@pytest.mark.parametrize(
    ("solver", "scale", "k"),
    [(solver, scale, k) for solver in CONFIGS for scale, k in [(1.0, 1), (5.0, 3)]]
    + [("ddim", 5.0, 1), ("ddim", 1.0, "all"), ("euler", 5.0, "all"), ("pndm", 5.0, "all"), ("unipc", 1.0, "all")],
)
def test_three_stages_equal_one_graph(solver, scale, k):
    net, path = toy_path(solver, scale=scale)
    calls = path.coefficients.calls
    plan = sdo(calls, 4, path.coefficients, generator(), steps_per_sample=calls if k == "all" else k)
    assert k == "all" or len({tuple(column) for column in plan.mode.T.tolist()}) > 1  # steps differ per sample
    three = three_stage(path, plan, objective)
    by_stages = grads(net)
    one = one_graph(path, plan, objective)
    by_graph = grads(net)
    assert by_graph.abs().max() > 1e-6
    assert close(by_stages, by_graph, TOLERANCE[solver])
    assert torch.equal(three.x_N, one.x_N)
    assert close(three.g, one.g, TOLERANCE[solver])


@pytest.mark.parametrize(
    ("solver", "variant"),
    # solvers scale the first call's input each in its own way
    combinations(lambda name: not name.startswith(("full", "draft-3", "align")), {*READS_LEVELS, "sdo-first"}),
)
def test_three_stages_equal_one_graph_for_every_rule_it_serves(solver, variant):
    """Also the gradient of the starting latent, from the beginning and from the middle, and of noise-injected paths."""
    paths = ((0.0, 0), (0.0, 3)) + (((0.7, 0),) if solver.startswith(("ddim", "tcd")) else ())
    for seed, (eta, start) in enumerate(paths):
        net, path = toy_path(solver, scale=3.0, eta=eta, start=start)
        path = with_latents(path)
        plan = plan_for(variant, path, seed)
        results = []
        for carry_out in (run_plan, lambda p, q, _: in_one_graph(p, q)):
            path.x_0.grad = None
            outcome = carry_out(path, plan, objective)
            weights = [p.grad is not None for p in net.parameters()]
            results.append((grads(net) if all(weights) else None, path.x_0.grad, outcome))
        (by_stages, x0_stages, three), (by_graph, x0_graph, one) = results
        tolerance = TOLERANCE[solver]
        assert (by_stages is None) == (variant == "sdo-0")
        assert by_stages is None or close(by_stages, by_graph, tolerance)
        assert close(x0_stages, x0_graph, tolerance)
        assert torch.equal(three.x_N, one.x_N)
        assert torch.equal(three.losses, one.losses) and close(three.g, one.g, tolerance)


@pytest.mark.parametrize(
    ("variant", "negative"),
    [("sdo", True), ("sdo-3", False), ("draft-lv", True), ("refl", False), ("drtune", True), ("drtune", False),
     ("sdo-epsilon", True), ("sdo-epsilon", False)],
)  # fmt: skip
def test_regulariser_is_the_same_in_both_engines(variant, negative):
    net, path = toy_path("ddim-v", scale=3.0)
    denoise = dataclasses.replace(path.denoise, negative_gradient=negative)
    path, terms = dataclasses.replace(path, denoise=denoise), Terms(kl_weight=0.7)
    plan = plan_for(variant, path)
    three = run_plan(path, plan, objective, terms=terms)
    by_stages = grads(net)
    one = in_one_graph(path, plan, terms)
    by_graph = grads(net)
    assert close(by_stages, by_graph, 1e-9)
    assert torch.allclose(three.penalties, one.penalties.to(three.penalties), rtol=1e-6)
    run_plan(path, plan, objective)
    assert not close(grads(net), by_graph, 1e-2)


def test_regulariser_against_finite_differences():
    """mean over the live calls of mean (ε_θ - ε_base)², inputs held, beside SDO's surrogate."""
    net, path = toy_path("ddim", scale=2.0)
    plan = plan_for("sdo-3", path)
    kept = record(path)

    @torch.no_grad()
    def penalty():
        total = 0.0
        for i, (x, t, _) in enumerate(kept):
            gap = (path.denoise(x, t, path.rows) - path.base(x, t, path.rows)).square().flatten(1).mean(1)
            total = total + (gap * plan.live[i] / 3).sum()
        return total / 4

    run_plan(path, plan, objective)
    plain = grads(net)
    outcome = run_plan(path, plan, objective, terms=Terms(kl_weight=0.7))
    assert outcome.penalties.mean().item() == pytest.approx(penalty().item(), rel=1e-6)
    check_direction(net, lambda: 0.7 * penalty(), grads(net) - plain)


# --- finite differences


def record(path):
    """(input, timestep, output) of every call of the plain trajectory."""
    kept = []

    def call(i, x, t):
        e = path.denoise(x, t, path.rows)
        kept.append((x.clone(), t, e.clone()))
        return e

    with torch.no_grad():
        denoise_path(path, call)
    return kept


def check_direction(net, function, analytic, *, rel=1e-6, step=1e-4):
    """Central differences of ``function`` along three random directions, to ``rel`` of the gradient's own size."""
    for seed in range(3):
        direction = torch.randn(analytic.shape, generator=generator(seed), dtype=torch.float64)
        direction /= direction.norm()
        theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(theta + sign * step * direction, net.parameters())
            ends.append(function())
        torch.nn.utils.vector_to_parameters(theta, net.parameters())
        numeric = (ends[0] - ends[1]) / (2 * step)
        # a random direction of n weights meets 1/√n of the gradient
        size = analytic.norm().item() / len(analytic) ** 0.5
        assert numeric.item() == pytest.approx((analytic @ direction).item(), abs=rel * size)


@torch.enable_grad()
def linear_maps(route, endpoint):
    """Of first latent, outputs and injected noise to every call's input and to the end, by autograd.

    One endpoint for all.
    """
    maps = []
    x_0 = torch.ones(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    outputs, noise = ([torch.ones_like(x_0).requires_grad_() for _ in range(route.calls)] for _ in range(2))
    given = [x_0, *outputs, *(noise if route.takes_noise else [])]

    def read(i, x, t):
        maps.append(torch.autograd.grad(x.sum(), given, allow_unused=True, retain_graph=True))
        return outputs[i]

    end = walk(route, x_0, read, injected=noise, endpoint=None if endpoint is None else endpoint[:1])
    maps.append(torch.autograd.grad(end.sum(), given, allow_unused=True))
    return [[None if a is None else a.item() for a in linear] for linear in maps]


@torch.no_grad()
def walk_exactly(path, call, maps):
    """Like ``denoise_path``, but every latent is put together in float64, by the linear maps.

    Some schedulers round to float32, which blurs finite differences: here they only give their maps.
    """
    timesteps, moved = path.route.begin()[1], []
    for i, linear in enumerate(maps):
        ahead = [None] * (path.route.calls - len(moved))
        values = [path.x_0, *moved, *ahead, *(path.injected if path.injected is not None else [])]
        x = sum(a * value for a, value in zip(linear, values, strict=True) if a is not None and value is not None)
        if i + 1 == len(maps):
            return x
        moved.append(call(i, x, timesteps[i].expand(len(x))))


def surrogate_of(path, plan):
    """J of the trajectory with the plan's stop-gradients, written out: what is detached keeps its value.

    FROZEN and WEIGHTS calls hold their input, THROUGH calls see the moving one; a call's change counts ``weight``
    times.
    """
    kept, rows = record(path), path.rows
    route = path.route
    maps = linear_maps(route, plan.endpoint)

    def trajectory():
        def call(i, x, t):
            held, _, e = kept[i]
            follow = (plan.mode[i] == Mode.THROUGH).view(-1, 1, 1, 1)
            part = 1.0 if plan.nested is None else plan.nested[i].view(-1, 1, 1, 1)
            seen = torch.where(follow, held + part * (x - held), held)
            moved = path.denoise(seen, t, rows)
            weight = (plan.weight[i] * plan.live[i]).view(-1, 1, 1, 1)
            if not plan.as_epsilon:
                return e + weight * (moved - e)
            level = route.levels[i]
            eps = level.eps_of_x * held / level.scale + level.eps_of_e * e
            new = level.eps_of_x * seen / level.scale + level.eps_of_e * moved
            # the ε that is held, turned back into a native output at the moving x
            return (eps + weight * (new - eps) - level.eps_of_x * x / level.scale) / level.eps_of_e

        return walk_exactly(path, call, maps)

    if plan.repeats is None:
        return torch.no_grad()(lambda: objective(trajectory(), rows).losses.mean())
    from sdo_cli.gradients.repeats import repeated

    with torch.no_grad():
        again = list(repeated(path, plan, trajectory()))
    parts = [surrogate_of(p, q) for p, q in again]
    return torch.no_grad()(
        lambda: (objective(trajectory(), rows).losses.mean() + sum(part() for part in parts)) / (1 + len(parts))
    )


@pytest.mark.parametrize(("solver", "variant"), combinations(lambda name: name != "sdo-0"))
def test_every_rule_against_finite_differences_of_its_own_surrogate(solver, variant):
    net, path = toy_path(solver, scale=2.0)
    plan = plan_for(variant, path, seed=1)
    surrogate = surrogate_of(path, plan)
    outcome = run_plan(path, plan, objective)
    assert outcome.losses.mean().item() == pytest.approx(surrogate().item(), rel=1e-6)
    check_direction(net, surrogate, grads(net), rel=1e-5)


@pytest.mark.parametrize("solver", CONFIGS)
def test_sdo_against_finite_differences_of_its_surrogate(solver):
    """d/dθ of J(sg(x_N) + Σ (w_i/p_i)(ε_θ(sg x_i) - sg e_i)), METHOD's surrogate, along random directions."""
    net, path = toy_path(solver, scale=2.0)
    calls, rows = path.coefficients.calls, path.rows
    plan = sdo(calls, 4, path.coefficients, generator(1), steps_per_sample=2)
    kept, x_N = record(path), sample_latents(path)

    @torch.no_grad()
    def surrogate():
        moved = x_N.clone()
        for i, (x, t, e) in enumerate(kept):
            factor = path.coefficients.w[i] * plan.weight[i] * plan.live[i]
            moved += factor.view(-1, 1, 1, 1) * (path.denoise(x, t, rows) - e)
        return objective(moved, rows).losses.mean()

    run_plan(path, plan, objective)
    check_direction(net, surrogate, grads(net))


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "unipc", "lcm", "tcd"])
def test_gradients_hold_where_nothing_is_left_of_the_image(solver):
    """Zero terminal SNR: three stages against one graph, and both against differences of the sampler."""
    net, path = toy_path(solver, steps=4, scale=3.0, config=ZERO_SNR)
    plan = sdo(4, 4, path.coefficients, generator(), steps_per_sample=2)
    three_stage(path, plan, objective)
    by_stages = grads(net)
    one_graph(path, plan, objective)
    assert close(by_stages, grads(net), 1e-9) and by_stages.abs().max() > 1e-6
    one_graph(path, full(4, 4, path.coefficients, generator()), objective)
    check_direction(net, lambda: objective(sample_latents(path), path.rows).losses.mean(), grads(net))


@pytest.mark.parametrize(
    ("solver", "eta"),
    [(solver, 0) for solver in ("ddim", "ddim-v", "pndm", "unipc", "deis", "ddpm", "lcm")]
    + [("ddim", 0.6), ("ddim-v", 0.6), ("tcd", 0.6)],
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_full_against_differences_of_the_sampler(solver, eta, checkpointing):
    net, path = toy_path(solver, steps=4, batch=2, scale=2.0, eta=eta)
    plan = full(path.coefficients.calls, 2, path.coefficients, generator())
    one_graph(path, plan, objective, checkpointing=checkpointing)
    check_direction(net, lambda: objective(sample_latents(path), path.rows).losses.mean(), grads(net))


@pytest.mark.parametrize(
    ("solver", "every"),
    [("ddim", 9), ("pndm", 9), *(pytest.param(solver, 1, marks=pytest.mark.slow) for solver in ("ddim", "pndm"))],
)
def test_full_passes_torch_gradcheck(solver, every):
    """Every ninth weight (all: slow) and the starting latent by torch's own checker: forward and backward are the
    engine's."""
    net, path = toy_path(solver, steps=2, batch=2)
    plan = full(path.coefficients.calls, 2, path.coefficients, generator())

    class Engine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, some, x_0):
            with torch.enable_grad():
                theta = whole.clone()
                theta[::every] = some
                torch.nn.utils.vector_to_parameters(theta, net.parameters())
                here = with_latents(dataclasses.replace(path, x_0=x_0))
                outcome = one_graph(here, plan, objective)
            ctx.gradients = grads(net)[::every], here.x_0.grad
            return outcome.losses.mean()

        @staticmethod
        def backward(ctx, upstream):
            return ctx.gradients[0] * upstream, ctx.gradients[1] * upstream

    whole = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    some = whole[::every].clone().requires_grad_()
    assert torch.autograd.gradcheck(Engine.apply, (some, path.x_0.clone().requires_grad_()))


# --- identities between the rules


def chain_sum(path, net, **options):
    """Σ_i over all calls with detached inputs, by K = N."""
    calls = path.coefficients.calls
    run_plan(path, sdo(calls, 4, path.coefficients, generator(), steps_per_sample=calls, **options), objective)
    return grads(net)


@pytest.mark.parametrize(("solver", "choice"), zip(CONFIGS, cycle(["uniform", "late-biased", "weight-proportional"])))
def test_expectation_of_one_step_sdo_is_the_sum_over_steps(solver, choice):
    """Exactly: Σ_i p_i · (gradient with i live and weight 1/p_i)."""
    net, path = toy_path(solver)
    calls, c = path.coefficients.calls, path.coefficients
    odds = {
        "uniform": torch.ones(calls, dtype=torch.float64),
        "late-biased": torch.arange(1.0, calls + 1, dtype=torch.float64),
        "weight-proportional": torch.tensor(c.w, dtype=torch.float64).abs(),
    }[choice]
    p = odds / odds.sum()
    found = {}
    for seed in range(400):
        plan = sdo(calls, 4, c, generator(seed), step_choice=choice)
        for i in plan.live.nonzero()[:, 0].tolist():
            found[i] = plan.weight[i].max().item()
        if len(found) == int((p > 0).sum()):
            break
    total = 0
    for i, weight in found.items():
        assert weight == pytest.approx(1 / p[i].item(), rel=1e-9)
        mode, weights = empty(calls, 4)
        mode[i], weights[i] = Mode.WEIGHTS, weight
        run_plan(path, Plan(mode, weights), objective)
        total = total + p[i] * grads(net)
    assert len(found) == int((p > 0).sum())
    assert close(total, chain_sum(path, net), TOLERANCE[solver])


@pytest.mark.parametrize("solver", CONFIGS)
def test_last_step_sdo_is_draft_1(solver):
    """DRaFT-1 keeps the last call THROUGH; nothing live stands before it, so the input carries no graph."""
    net, path = toy_path(solver)
    calls = path.coefficients.calls
    run_plan(path, sdo(calls, 4, path.coefficients, generator(), step_choice="last"), objective)
    shortcut = grads(net)
    one_graph(path, draft_k(calls, 4, path.coefficients, generator(), k=1), objective)
    assert close(shortcut, grads(net), TOLERANCE[solver])


@pytest.mark.parametrize("solver", CONFIGS)
def test_draft_n_is_full_and_alignprop_from_the_first_step_too(solver):
    net, path = toy_path(solver)
    calls, c = path.coefficients.calls, path.coefficients
    run_plan(path, full(calls, 4, c, generator()), objective)
    whole = grads(net)
    for plan in (
        draft_k(calls, 4, c, generator(), k=calls),
        alignprop(calls, 4, c, generator(), truncation="fixed", step=0),
    ):
        run_plan(path, plan, objective)
        assert torch.equal(grads(net), whole)


@pytest.mark.parametrize("solver", CONFIGS)
def test_drtune_of_all_steps_to_the_end_is_the_sum(solver):
    net, path = toy_path(solver)
    calls = path.coefficients.calls
    run_plan(path, drtune(calls, 4, path.coefficients, generator(), k=calls, early_stop=0), objective)
    assert close(grads(net), chain_sum(path, net), TOLERANCE[solver])


def test_flowbp_of_all_steps_is_the_sum():
    net, path = toy_path("ddim")
    run_plan(path, flowbp_sparse(8, 4, path.coefficients, generator(), k=8), objective)
    assert close(grads(net), chain_sum(path, net), 1e-12)


def test_epsilon_is_another_gradient_for_v_and_the_same_for_epsilon_networks():
    for solver, same in (("ddim", True), ("ddim-v", False)):
        net, path = toy_path(solver)
        assert close(chain_sum(path, net, as_epsilon=True), chain_sum(path, net), 1e-9) == same


def test_draft_lv_without_noise_is_the_last_step_again():
    """At the last, nearly noiseless level, repeats differ from x_N little: the average stays near DRaFT-1."""
    net, path = toy_path("ddim", steps=20)
    last = draft_k(20, 4, path.coefficients, generator(), k=1)
    run_plan(path, last, objective)
    alone = grads(net)
    outcome = run_plan(path, draft_lv(20, 4, path.coefficients, generator(), repeats=3), objective)
    averaged = grads(net)
    assert not close(averaged, alone, 1e-4)
    assert torch.nn.functional.cosine_similarity(averaged, alone, 0) > 0.9
    assert outcome.calls == {"no_grad": 4 * (20 + 3), "grad": 4 * 4}


def test_sdo_of_a_latent_is_the_linear_path_and_the_first_step():
    """METHOD: A g + w_0 (∂ε/∂x_0)ᵀ g; SDO-0 has the first term alone."""
    net, path = toy_path("euler", scale=2.0)
    path = with_latents(path)
    c = path.coefficients
    outcome = run_plan(path, sdo_0(8, 4, c, generator()), objective)
    assert close(path.x_0.grad, c.A * outcome.g, 1e-6)
    assert all(p.grad is None for p in net.parameters())
    assert outcome.calls == {"no_grad": 32, "grad": 0}
    linear, path.x_0.grad = path.x_0.grad, None
    run_plan(path, sdo(8, 4, c, generator(), step_choice="first"), objective)
    net.zero_grad()
    x, t = path.x_0.detach().requires_grad_(), path.route.begin()[1][0].expand(4)
    e = path.denoise(x * path.route.levels[0].scale, t, path.rows)
    (by_network,) = torch.autograd.grad((c.w[0] * outcome.g * e).sum(), x)
    assert by_network.abs().max() > 1e-3 * linear.abs().max()
    assert close(path.x_0.grad, linear + by_network, 2e-6)


def test_sdo_differs_from_full():
    """Not an identity: the shortcut leaves the chain through the inputs out."""
    net, path = toy_path("ddim")
    by_sum = chain_sum(path, net)
    run_plan(path, full(8, 4, path.coefficients, generator()), objective)
    assert not close(by_sum, grads(net), 1e-3)


@pytest.mark.parametrize("solver", CONFIGS)
def test_images_are_bit_identical_between_rules(solver):
    net, path = toy_path(solver, scale=3.0)
    plain, seen = sample_latents(path), 0
    for variant in VARIANTS:
        if variant not in ENDS_EARLY and (solver, variant) != ("flow-euler", "sdo-epsilon"):
            assert torch.equal(run_plan(path, plan_for(variant, path), objective).x_N, plain), variant
            net.zero_grad()
            seen += 1
    assert seen >= len(VARIANTS) - 3


# --- the published rules' own words


@pytest.mark.parametrize("solver", ["ddim", "ddim-v", "flow-euler"])
def test_leapalign_is_two_pinned_leaps(solver):
    """``x_N`` put together from x_k by two long first-order steps with their values pinned, α through the second."""
    net, path = toy_path(solver, scale=2.0)
    plan = leapalign(8, 4, path.coefficients, generator(3), alpha=0.3)
    k, j = plan.live[:, 0].nonzero()[:, 0].tolist()
    run_plan(path, plan, objective)
    mine, kept, levels = grads(net), record(path), path.route.levels
    with torch.no_grad():
        x_N = sample_latents(path)

    def leap(i, x, e, alpha, sigma):
        here = levels[i]
        image, noise = here.x0_of_x * x + here.x0_of_e * e, here.eps_of_x * x + here.eps_of_e * e
        return alpha * image + sigma * noise

    def pinned(found, true):
        return found - found.detach() + true

    x_k, x_j = (kept[i][0] / levels[i].scale for i in (k, j))
    first = leap(k, x_k, path.denoise(kept[k][0], kept[k][1], path.rows), levels[j].alpha, levels[j].sigma)
    z_j = pinned(first, x_j)
    held = x_j + 0.3 * (z_j - x_j)
    e = path.denoise(levels[j].scale * held, kept[j][1], path.rows)
    level = levels[j]
    # noise is what the leap holds: of it, α through the network
    noise = level.eps_of_x * held + level.eps_of_e * e if solver != "flow-euler" else e
    if solver == "flow-euler":
        last = z_j + (path.route.end[1] - level.sigma) * noise
    else:
        alpha, sigma = path.route.end
        last = alpha / level.alpha * (z_j - level.sigma * noise) + sigma * noise
    objective(pinned(last, x_N), path.rows).losses.mean().backward()
    # levels and schedulers round alike only to float32
    assert close(mine, grads(net), 1e-5)


def test_a_bridge_goes_on_through_one_input_and_without_alpha_through_none():
    net, path = toy_path("ddim", scale=2.0)
    found = {}
    for alpha in (0.0, 0.5, 1.0):
        plan = bridge(8, 4, path.coefficients, generator(5), k=4, alpha=alpha)
        assert int((plan.mode == Mode.THROUGH).any(1).sum()) == 1 and int(plan.live.any(1).sum()) == 4
        run_plan(path, plan, objective)
        found[alpha] = grads(net)
    run_plan(path, flowbp_sparse(8, 4, path.coefficients, generator(5), k=4, late_bias=4.0), objective)
    assert close(found[0.0], grads(net), 1e-9)
    # what goes through the bridge is linear in α
    assert close((found[0.0] + found[1.0]) / 2, found[0.5], 1e-9) and not close(found[1.0], found[0.0], 1e-3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lagrange_is_exact_for_outputs_that_are_polynomials_of_its_order(order):
    """Σ w_i e_i from the supports alone, cached ones with their own quadrature weights."""
    _, path = toy_path("ddim", steps=20)
    w = torch.tensor(path.coefficients.w, dtype=torch.float64)
    for seed in range(5):
        plan = lagrange(20, 4, path.coefficients, generator(seed), order=order)
        live = plan.live[:, 0].nonzero()[:, 0].tolist()
        assert len(live) == 2 and live[1] - live[0] >= 4
        supports = [*live, *[0, 19][: order - 1]]
        # an output that is zero at the cached supports, so the live ones have to carry all of it
        number = torch.arange(20, dtype=torch.float64)
        e = torch.ones(20, dtype=torch.float64)
        for cached in supports[2:]:
            e = e * (number - cached) / 20
        carried = sum(float(w[i] * plan.weight[i, 0] * e[i]) for i in live)
        assert carried == pytest.approx(float((w * e).sum()), rel=1e-9)


# --- what the plans are


def test_micro_batches_do_not_change_the_gradient():
    net, path = toy_path("euler", scale=2.0)
    for variant in ("sdo-3", "refl", "draft-lv"):
        plan = plan_for(variant, path)
        run_plan(path, plan, objective)
        whole = grads(net)
        run_plan(path, plan, objective, micro=MicroBatches(rollout=3, score=1, shortcut=2))
        assert close(grads(net), whole, 2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_cut_in_two_is_the_whole_plan(variant):
    """The global batch may be split over passes or processes: same draws, same gradient."""
    net, path = toy_path("ddim", scale=2.0)
    plan = plan_for(variant, path)
    run_plan(path, plan, objective)
    whole = None if variant == "sdo-0" else grads(net)
    for start, stop in ((0, 1), (1, 4)):
        rows = torch.arange(start, stop)
        part = dataclasses.replace(path, x_0=path.x_0[rows], denoise=lambda x, t, r, o=start: path.denoise(x, t, r + o))
        outcome = run_plan(
            part, plan.rows(slice(start, stop)), lambda x, r, o=start: objective(x, r + o), terms=Terms(divisor=4)
        )
        assert len(outcome.losses) == stop - start
    assert whole is None or close(grads(net), whole, 1e-9)


def test_passes_of_one_step_may_need_different_engines():
    """A chain in some samples only, and repeats after a chain: their times are added by name."""
    _, path = toy_path("ddim")
    mode, weight = empty(8, 4)
    mode[-1], weight[-1] = Mode.THROUGH, 1.0
    mode[-2, :2] = Mode.WEIGHTS
    plan = Plan(mode, weight, repeats=torch.arange(4)[None])
    outcome = run_plan(path, plan, objective)
    assert set(outcome.seconds) == {"forward", "backward", "rollout", "score", "shortcut"}


def test_early_ends_cost_fewer_calls():
    _, path = toy_path("ddim", steps=20)
    for seed in range(20):
        plan = refl(20, 4, path.coefficients, generator(seed))
        m = int(plan.ends[0])
        assert 15 <= m <= 19 and plan.ends.unique().tolist() == [m]
        assert run_plan(path, plan, objective).calls == {"no_grad": 4 * (m + 1), "grad": 4}


def test_nothing_is_live_after_the_end():
    mode, weight = empty(8, 2)
    mode[5], weight[5] = Mode.WEIGHTS, 1.0
    with pytest.raises(ValueError, match="endpoint"):
        Plan(mode, weight, endpoint=torch.tensor([5, 4]))


def test_negative_branch_without_gradient():
    net, path = toy_path("ddim", scale=4.0)
    plan = sdo(8, 4, path.coefficients, generator())
    run_plan(path, plan, objective)
    with_negative = grads(net)
    denoise = dataclasses.replace(path.denoise, negative_gradient=False)
    outcome = run_plan(dataclasses.replace(path, denoise=denoise), plan, objective)
    assert not close(grads(net), with_negative, 1e-3)
    assert torch.equal(outcome.x_N, sample_latents(path))


def test_three_stage_refuses_chained_plans():
    _, path = toy_path("ddim")
    with pytest.raises(ValueError, match="one-graph"):
        three_stage(path, full(8, 4, path.coefficients, generator()), objective)


CHOICES = ("stratified", "uniform", "per-batch", "weight-proportional", "late-biased")


@pytest.mark.parametrize(
    ("choice", "k"), [*((choice, 1) for choice in CHOICES), *zip(CHOICES, (3, 8, 3, 3, 8), strict=True)]
)
def test_calls_come_up_as_often_as_their_probability_says(choice, k):
    _, path = toy_path("ddim")
    c = path.coefficients
    counts, inverse = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for seed in range(600):
        plan = sdo(8, 4, c, generator(seed), step_choice=choice, steps_per_sample=k)
        assert plan.live.sum(0).tolist() == [k] * 4
        counts += plan.live.sum(1)
        inverse = torch.maximum(inverse, plan.weight.max(1).values)
    frequency = counts / 2400
    expected = torch.where(inverse > 0, 1 / inverse, 0.0)
    assert expected.sum().item() == pytest.approx(k, abs=0.05)
    assert frequency.tolist() == pytest.approx(expected.tolist(), abs=0.05 if choice == "per-batch" else 0.03)
    if choice in ("stratified", "uniform", "per-batch"):
        assert expected.tolist() == pytest.approx([k / 8] * 8)
    elif k == 1:
        odds = torch.tensor(c.w).abs() if choice == "weight-proportional" else torch.arange(1.0, 9)
        assert expected.tolist() == pytest.approx((odds / odds.sum()).tolist(), rel=1e-5)


def test_stratified_spreads_over_the_batch_and_per_batch_does_not():
    for seed in range(20):
        assert sdo(8, 8, None, generator(seed)).live.sum(1).tolist() == [1] * 8
        assert sorted(sdo(8, 8, None, generator(seed), step_choice="per-batch").live.sum(1).tolist())[-1] == 8


def test_root_weights_are_between_true_and_unit_ones():
    """Every call counts with the root of its solver weight, in the sizes of both others."""
    _, path = toy_path("ddim", scale=2.0)
    plans = [sdo(8, 4, path.coefficients, generator(), weights=word, steps_per_sample=8) for word in ("unit", "root")]
    unit, root = (plan.weight[:, 0] for plan in plans)
    w = torch.tensor(path.coefficients.w, dtype=torch.float64)
    assert torch.allclose(root.square(), unit)
    assert torch.allclose((root * w).abs(), (w.abs() * w.abs().mean()).sqrt())
    assert torch.equal((root * w).sign(), w.sign())


def test_unit_weights_make_every_step_count_alike():
    _, path = toy_path("ddim")
    plan = sdo(8, 4, path.coefficients, generator(), weights="unit", steps_per_sample=8)
    sizes = linear_path(path.route, plan).factor.abs()
    assert sizes.min().item() == pytest.approx(sizes.max().item(), rel=1e-9)
    true = sdo(8, 4, path.coefficients, generator(), weights="plain", step_choice="late-biased")
    assert true.weight[true.live].unique().tolist() == [1.0]


def test_the_published_draws():
    """AlignProp int(N(42, 5)) of 50, ReFL the last quarter, DRTune's even spacing, FlowBP's late bias."""
    b = [int((alignprop(50, 1, None, generator(s)).mode[:, 0] > 0).nonzero()[0]) for s in range(500)]
    assert sum(b) / 500 == pytest.approx(41.5, abs=1.0) and 3.5 < torch.tensor(b).double().std() < 6.5
    m = {int(refl(40, 1, None, generator(s)).ends[0]) for s in range(300)}
    assert m == set(range(30, 40))
    for seed in range(50):
        plan = drtune(50, 2, None, generator(seed), k=5, early_stop=0.4)
        where, stop = plan.live[:, 0].nonzero().flatten(), int(plan.ends[0])
        assert 30 <= stop <= 49 and len(where) == 5 and where.max() <= stop
        assert len(set(where.diff().tolist())) == 1
    _, path = toy_path("ddim", steps=20)
    late = sum(flowbp_sparse(20, 1, path.coefficients, generator(s)).live[:, 0] for s in range(300)).double()
    assert late[10:].sum() > 2 * late[:10].sum()


def test_an_objective_sees_each_sample_once():
    """The objective gets the rows it is asked for, whatever the micro-batches."""
    _, path = toy_path("ddim")
    seen = []

    def remember(x, rows):
        seen.extend(rows.tolist())
        return Scored(x.flatten(1).sum(1))

    run_plan(path, sdo(8, 4, path.coefficients, generator()), remember, micro=MicroBatches(score=3))
    assert sorted(seen) == [0, 1, 2, 3]
