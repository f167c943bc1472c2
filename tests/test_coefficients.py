"""The affine identity x_N = A_0 x_0 + Σ w_i e_i against the stock schedulers."""

import dataclasses
import math

import pytest
import torch
from toy import CONFIGS, EPS, TOLERANCE, ZERO_SNR, toy_path

from sdo_cli.errors import SolverFault
from sdo_cli.sampling.coefficients import affine_coefficients, coefficients_of
from sdo_cli.sampling.loop import denoise_path, sample_latents
from sdo_cli.sampling.route import Route
from sdo_cli.sampling.solvers import SOLVERS, make_scheduler


def outputs_of(path, endpoint=None):
    """The end of a walk and the native output of every call."""
    outputs = []

    def call(i, x, t):
        outputs.append(path.denoise(x, t, path.rows))
        return outputs[-1]

    with torch.no_grad():
        return denoise_path(path, call, endpoint=endpoint), outputs


def rebuilt(path, c, outputs):
    x = c.A * path.x_0 + sum(w * e for w, e in zip(c.w, outputs, strict=False))
    if path.injected is not None:
        x = x + sum(n * z for n, z in zip(c.noise, path.injected, strict=True))
    return x


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


EXACT = {solver: 2e-13 if TOLERANCE[solver] == 1e-9 else 2e-6 for solver in CONFIGS}


@pytest.mark.parametrize("solver", CONFIGS)
@pytest.mark.parametrize(("steps", "start"), [(5, 0), (20, 3)])
def test_final_latent_is_rebuilt_from_outputs(solver, steps, start):
    _, path = toy_path(solver, steps, scale=3.0, start=start)
    x_N, outputs = outputs_of(path)
    assert path.coefficients.calls == len(outputs) == steps - start + (solver == "pndm")
    assert error(rebuilt(path, path.coefficients, outputs), x_N) < EXACT[solver]


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("solver", ["ddim", "ddim-v", "tcd"])
def test_injected_noise_adds_one_linear_term_per_step(solver, eta):
    _, path = toy_path(solver, 10, scale=2.0, eta=eta)
    x_N, outputs = outputs_of(path)
    assert error(rebuilt(path, path.coefficients, outputs), x_N) < 2e-13
    without = dataclasses.replace(path.coefficients, noise=(0.0,) * 10)
    assert error(rebuilt(path, without, outputs), x_N) > 1e-2


# float32 tables of noise levels meet σ/α = 4096 at the first call
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "euler-a", "ipndm", "dpm++2m", "unipc", "lcm", "tcd"])
def test_zero_terminal_snr_is_affine_too(solver):
    for steps in (1, 4):
        _, path = toy_path(solver, steps, scale=3.0, config=ZERO_SNR)
        x_N, outputs = outputs_of(path)
        assert error(rebuilt(path, path.coefficients, outputs), x_N) < (1e-5 if EXACT[solver] > 1e-9 else 2e-13)
        assert path.route.levels[0].alpha / path.route.levels[0].sigma < 3e-4


def test_noise_weight_is_its_deviation_times_what_follows():
    """METHOD: the gradient of the noise of step i is std_i A_{i+1} g."""
    _, path = toy_path("ddim", 10, eta=1.0)
    scheduler = path.route.scheduler
    t, before = (int(v) for v in path.route.begin()[1][3:5])
    abar = scheduler.alphas_cumprod.double()
    std = ((1 - abar[before]) / (1 - abar[t]) * (1 - abar[t] / abar[before])).sqrt().item()
    rest = coefficients_of(Route(scheduler, 10, 4, 1.0)).A
    assert path.coefficients.noise[3] == pytest.approx(std * rest, rel=1e-5)


@pytest.mark.parametrize("solver", CONFIGS)
@pytest.mark.parametrize("endpoint", [0, 4, 7])
def test_x0_prediction_is_affine_and_right(solver, endpoint):
    """Its coefficients rebuild it, and a network that knows the noise gets the image back exactly."""
    _, path = toy_path(solver, 8, scale=2.0)
    stop = torch.full((4,), endpoint)
    predicted, outputs = outputs_of(path, stop)
    assert len(outputs) == endpoint + 1
    c = coefficients_of(path.route, endpoint=endpoint)
    assert c.w[endpoint + 1 :] == (0.0,) * (path.route.calls - endpoint - 1)
    assert error(rebuilt(path, c, outputs), predicted) < EXACT[solver]
    level = path.route.levels[endpoint]
    image, noise = torch.randn(2, 5, dtype=torch.float64)
    x = level.alpha * image + level.sigma * noise
    v = level.alpha * noise - level.sigma * image
    native = {"ddim-v": v, "flow-euler": noise - image}.get(solver, noise)
    assert torch.allclose(level.x0_of_x * x + level.x0_of_e * native, image, atol=1e-12)
    assert torch.allclose(level.eps_of_x * x + level.eps_of_e * native, noise, atol=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "euler", "flow-euler", "dpm++2m"])
def test_levels_are_the_schedulers_own(solver):
    """``add_noise`` of the stock scheduler at the call's timestep makes α x0 + σ ε."""
    _, path = toy_path(solver, 8)
    scheduler, timesteps = path.route.begin()
    image, noise = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64)
    add = getattr(scheduler, "add_noise", None) or (lambda x, z, t: scheduler.scale_noise(x, t, z))
    for level, t in zip(path.route.levels, timesteps, strict=True):
        assert error(add(image, noise, t[None]), level.alpha * image + level.sigma * noise) < 1e-5


@pytest.mark.parametrize("config", [EPS, ZERO_SNR])
def test_ipndm_is_the_papers_multistep_in_noise_over_signal(config):
    """Zhang & Chen 2022 (arXiv 2204.13902): fixed weights of up to four slopes, on x / α over σ / α;
    to σ = 0 the newest alone, as ComfyUI does."""
    _, path = toy_path("ipndm", 7, scale=2.0, config=config)
    weights = [[1], [1.5, -0.5], [23 / 12, -4 / 3, 5 / 12], *[[55 / 24, -59 / 24, 37 / 24, -9 / 24]] * 4]
    sigmas, x, slopes = path.route.begin()[0].sigmas.double().tolist(), path.x_0, []
    for i, t in enumerate(path.route.begin()[1]):
        e = path.denoise(x / (sigmas[i] ** 2 + 1) ** 0.5, t.expand(4), path.rows)
        level = path.route.levels[i]
        slopes.insert(0, level.eps_of_x * x + level.eps_of_e * e)
        ahead = sum(w * slope for w, slope in zip(weights[i] if sigmas[i + 1] else [1], slopes, strict=False))
        x = x + (sigmas[i + 1] - sigmas[i]) * ahead
    assert error(sample_latents(path), x) < 1e-5


def test_samples_may_end_at_different_calls():
    _, path = toy_path("ddim", 8, scale=2.0)
    together, _ = outputs_of(path, torch.tensor([2, 8, 5, 2]))
    for row, endpoint in enumerate([2, 8, 5, 2]):
        alone, _ = outputs_of(path, torch.full((4,), endpoint))
        assert torch.equal(together[row], alone[row])
    assert torch.equal(together[1], sample_latents(path)[1])


def test_middle_of_a_one_step_solver_keeps_its_weights():
    """From the middle x_N = A_m x_m + Σ w_i e_i with the same w for one-step solvers, others restart."""
    for solver, same in (("ddim", True), ("euler", True), ("flow-euler", True), ("dpm++2m", False), ("pndm", False)):
        _, whole = toy_path(solver, 10)
        rest = coefficients_of(whole.route.from_step(4)).w
        agree = len(rest) == 6 and rest == pytest.approx(whole.coefficients.w[-6:], rel=1e-5)
        assert agree == same, solver


def test_held_in_epsilon_a_v_network_has_the_coefficients_of_an_epsilon_network():
    """as_epsilon: A and, times ∂ε/∂v, the w of the same path."""
    _, path = toy_path("ddim-v", 10)
    _, native = toy_path("ddim", 10)
    c, expected = path.coefficients.in_epsilon(), native.coefficients
    # schedulers take roots of their levels in float32
    assert pytest.approx(expected.A, rel=1e-6) == c.A
    by_v = [w * level.alpha for w, level in zip(expected.w, path.route.levels, strict=True)]
    assert c.w == pytest.approx(by_v, rel=1e-6)
    assert expected.in_epsilon().w == pytest.approx(expected.w, rel=1e-12)


def test_epsilon_is_refused_where_it_says_nothing():
    _, path = toy_path("flow-euler", 5)
    with pytest.raises(SolverFault, match="pure noise"):
        path.coefficients.in_epsilon()


def test_ddim_coefficients_match_closed_form_and_published_figures():
    scheduler = make_scheduler("ddim", EPS | {"set_alpha_to_one": False}, 50)
    c = affine_coefficients(Route(scheduler, 50))
    abar = scheduler.alphas_cumprod.double()
    levels = torch.cat([abar[scheduler.timesteps], scheduler.final_alpha_cumprod.double()[None]])
    s = ((1 - levels) / levels).sqrt()
    expected = levels[-1].sqrt() * (s[1:] - s[:-1])
    assert pytest.approx(math.sqrt(levels[-1] / levels[0]), rel=1e-5) == c.A
    assert c.w == pytest.approx(expected.tolist(), rel=1e-4)
    assert [round(c.A, 2), round(c.w[0], 3), round(c.w[25], 3), round(c.w[49], 3)] == [13.15, -1.444, -0.097, -0.012]


def test_v_network_has_other_coefficients_for_the_same_path():
    scheduler = make_scheduler("ddim", EPS | {"prediction_type": "v_prediction"}, 50)
    assert pytest.approx(0.97, abs=0.01) == affine_coefficients(Route(scheduler, 50)).A


def test_pndm_counts_calls_not_steps():
    _, path = toy_path("pndm", 20)
    assert path.coefficients.calls == 21


@pytest.mark.parametrize("key", ["thresholding", "clip_sample"])
def test_configs_that_break_the_identity_are_refused(key):
    with pytest.raises(SolverFault, match=key):
        make_scheduler("ddim", EPS | {key: True}, 10)


def test_missing_clip_sample_counts_as_false():
    assert make_scheduler("ddim", EPS, 10).config.clip_sample is False


def test_unknown_solver_lists_the_known_ones():
    with pytest.raises(SolverFault) as fault:
        make_scheduler("heun", EPS, 10)
    assert all(name in fault.value.remedy for name in SOLVERS)


def test_flow_solver_refuses_an_epsilon_network_and_the_other_way_round():
    with pytest.raises(SolverFault, match="does not fit"):
        make_scheduler("flow-euler", EPS, 10)
    with pytest.raises(SolverFault, match="does not fit"):
        make_scheduler("ddim", CONFIGS["flow-euler"][1], 10)


def test_sampling_is_repeatable_although_schedulers_are_stateful():
    _, path = toy_path("unipc", 10)
    assert torch.equal(sample_latents(path), sample_latents(path))
