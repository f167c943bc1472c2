"""Gradient rules and engines against autograd, finite differences and each other (float64)."""

import pytest
import torch
from toy import CONFIGS, TOLERANCE, grads, objective, toy_path

from sdo_cli.gradients.full import full
from sdo_cli.gradients.one_graph import one_graph
from sdo_cli.gradients.plan import Mode, Plan, empty
from sdo_cli.gradients.run import run_plan
from sdo_cli.gradients.sdo import sdo
from sdo_cli.gradients.three_stage import MicroBatches, three_stage
from sdo_cli.sampling.loop import denoise_path, sample_latents


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("solver", CONFIGS)
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("k", [1, 3, "all"])
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


@pytest.mark.parametrize("solver", CONFIGS)
def test_sdo_against_finite_differences_of_its_surrogate(solver):
    """d/dθ of J(sg(x_N) + Σ (w_i/p_i)(ε_θ(sg x_i) - sg e_i)), METHOD's surrogate, along random directions."""
    net, path = toy_path(solver, scale=2.0)
    calls, rows = path.coefficients.calls, path.rows
    plan = sdo(calls, 4, path.coefficients, generator(1), steps_per_sample=2)
    inputs = []

    def record(i, x, t):
        e = path.denoise(x, t, rows)
        inputs.append((x.clone(), t, e.clone()))
        return e

    with torch.no_grad():
        x_N = denoise_path(path, record)

    @torch.no_grad()
    def surrogate():
        moved = x_N.clone()
        for i, (x, t, e) in enumerate(inputs):
            factor = path.coefficients.w[i] * plan.weight[i] * plan.live[i]
            moved += factor.view(-1, 1, 1, 1) * (path.denoise(x, t, rows) - e)
        return objective(moved, rows).losses.mean()

    run_plan(path, plan, objective)
    analytic = grads(net)
    # float32 schedulers: x_N is exact to 1e-7 only, differences of the surrogate do not see it
    for seed in range(3):
        direction = torch.randn(analytic.shape, generator=generator(seed), dtype=torch.float64)
        step, theta = 1e-5, torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(theta + sign * step * direction, net.parameters())
            ends.append(surrogate())
        torch.nn.utils.vector_to_parameters(theta, net.parameters())
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert numeric.item() == pytest.approx((analytic @ direction).item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("solver", ["ddim", "ddim-v", "pndm", "unipc", "deis"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_full_passes_gradcheck(solver, checkpointing):
    net, path = toy_path(solver, steps=4, batch=2, scale=2.0)
    plan = full(path.coefficients.calls, 2, path.coefficients, generator())
    one_graph(path, plan, objective, checkpointing=checkpointing)
    analytic = grads(net)
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    for seed in range(3):
        direction = torch.randn(theta.shape, generator=generator(seed), dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(theta + sign * 1e-6 * direction, net.parameters())
            ends.append(objective(sample_latents(path), path.rows).losses.mean())
        torch.nn.utils.vector_to_parameters(theta, net.parameters())
        assert ((ends[0] - ends[1]) / 2e-6).item() == pytest.approx((analytic @ direction).item(), rel=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "pndm"])
def test_full_passes_torch_gradcheck(solver):
    """Every weight by torch's own checker: forward and backward are the engine's."""
    net, path = toy_path(solver, steps=2, batch=2)
    plan = full(path.coefficients.calls, 2, path.coefficients, generator())

    class Engine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, theta):
            with torch.enable_grad():
                torch.nn.utils.vector_to_parameters(theta, net.parameters())
                outcome = one_graph(path, plan, objective)
            ctx.gradient = grads(net)
            return outcome.losses.mean()

        @staticmethod
        def backward(ctx, upstream):
            return ctx.gradient * upstream

    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(Engine.apply, (theta,))


def chain_sum(path, net):
    """Σ_i over all calls with detached inputs, by K = N."""
    calls = path.coefficients.calls
    run_plan(path, sdo(calls, 4, path.coefficients, generator(), steps_per_sample=calls), objective)
    return grads(net)


@pytest.mark.parametrize("solver", CONFIGS)
def test_expectation_of_one_step_sdo_is_the_sum_over_steps(solver):
    net, path = toy_path(solver)
    calls = path.coefficients.calls
    total = 0
    for step in range(calls):
        # probability 1/calls times weight calls: the fixed plan with weight 1
        run_plan(path, sdo(calls, 4, path.coefficients, generator(), step_choice="fixed", step=step), objective)
        total = total + grads(net)
    assert close(total, chain_sum(path, net), TOLERANCE[solver])


@pytest.mark.parametrize("solver", CONFIGS)
def test_last_step_sdo_is_draft_1(solver):
    """DRaFT-1 keeps the last call THROUGH; nothing live stands before it, so the input carries no graph."""
    net, path = toy_path(solver)
    calls = path.coefficients.calls
    run_plan(path, sdo(calls, 4, path.coefficients, generator(), step_choice="last"), objective)
    shortcut = grads(net)
    mode, weight = empty(calls, 4)
    mode[-1], weight[-1] = Mode.THROUGH, 1.0
    one_graph(path, Plan(mode, weight), objective)
    assert close(shortcut, grads(net), TOLERANCE[solver])


def test_sdo_differs_from_full():
    """Not an identity: the shortcut leaves the chain through the inputs out."""
    net, path = toy_path("ddim")
    by_sum = chain_sum(path, net)
    run_plan(path, full(8, 4, path.coefficients, generator()), objective)
    assert not close(by_sum, grads(net), 1e-3)


def test_images_are_bit_identical_between_rules():
    _, path = toy_path("ddim", scale=3.0)
    plans = [full(8, 4, path.coefficients, generator()), sdo(8, 4, path.coefficients, generator())]
    finals = [run_plan(path, plan, objective).x_N for plan in plans] + [sample_latents(path)]
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[1], finals[2])


def test_micro_batches_do_not_change_the_gradient():
    net, path = toy_path("euler", scale=2.0)
    plan = sdo(8, 4, path.coefficients, generator(), steps_per_sample=2)
    three_stage(path, plan, objective)
    whole = grads(net)
    three_stage(path, plan, objective, micro=MicroBatches(rollout=3, score=1, shortcut=2))
    assert close(grads(net), whole, 2e-6)


def test_negative_branch_without_gradient():
    net, path = toy_path("ddim", scale=4.0)
    plan = sdo(8, 4, path.coefficients, generator())
    run_plan(path, plan, objective)
    with_negative = grads(net)
    denoise = type(path.denoise)(net, path.denoise.condition, path.denoise.negative, 4.0, negative_gradient=False)
    outcome = run_plan(type(path)(path.scheduler, 8, denoise, path.x_0), plan, objective)
    assert not close(grads(net), with_negative, 1e-3)
    assert torch.equal(outcome.x_N, sample_latents(path))


def test_three_stage_refuses_chained_plans():
    _, path = toy_path("ddim")
    with pytest.raises(ValueError, match="one-graph"):
        three_stage(path, full(8, 4, path.coefficients, generator()), objective)


@pytest.mark.parametrize("choice", ["stratified", "uniform"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_every_call_is_equally_likely_and_weights_are_one_over_p(choice, k):
    counts = torch.zeros(8)
    for seed in range(600):
        plan = sdo(8, 4, None, generator(seed), step_choice=choice, steps_per_sample=k)
        assert plan.live.sum(0).tolist() == [k] * 4
        counts += plan.live.sum(1)
    frequency = counts / 2400
    assert frequency == pytest.approx([k / 8] * 8, abs=0.04)
    assert plan.weight[plan.live].unique().tolist() == [8 / k]


def test_stratified_spreads_over_the_batch():
    for seed in range(20):
        plan = sdo(8, 8, None, generator(seed))
        assert plan.live.sum(1).tolist() == [1] * 8
