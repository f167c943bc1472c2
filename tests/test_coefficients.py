"""The affine identity x_N = A_0 x_0 + Σ w_i e_i against the stock schedulers."""

import math

import pytest
import torch
from toy import CONFIGS, EPS, TOLERANCE, toy_path

from sdo_cli.errors import SolverFault
from sdo_cli.sampling.coefficients import affine_coefficients
from sdo_cli.sampling.loop import denoise_path, sample_latents
from sdo_cli.sampling.solvers import SOLVERS, make_scheduler


@pytest.mark.parametrize("solver", CONFIGS)
@pytest.mark.parametrize("steps", [5, 20])
def test_final_latent_is_rebuilt_from_outputs(solver, steps):
    _, path = toy_path(solver, steps, scale=3.0)
    outputs = []

    def call(i, x, t):
        outputs.append(path.denoise(x, t, path.rows))
        return outputs[-1]

    with torch.no_grad():
        x_N = denoise_path(path, call)
    c = path.coefficients
    assert c.calls == len(outputs)
    rebuilt = c.A * path.x_0 + sum(w * e for w, e in zip(c.w, outputs, strict=True))
    error = (rebuilt - x_N).abs().max() / x_N.abs().max()
    assert error < (2e-13 if TOLERANCE[solver] == 1e-9 else 2e-6)


def test_ddim_coefficients_match_closed_form_and_published_figures():
    scheduler = make_scheduler("ddim", EPS | {"set_alpha_to_one": False}, 50)
    c = affine_coefficients(scheduler, 50)
    abar = scheduler.alphas_cumprod.double()
    levels = torch.cat([abar[scheduler.timesteps], scheduler.final_alpha_cumprod.double()[None]])
    s = ((1 - levels) / levels).sqrt()
    expected = levels[-1].sqrt() * (s[1:] - s[:-1])
    assert pytest.approx(math.sqrt(levels[-1] / levels[0]), rel=1e-5) == c.A
    assert c.w == pytest.approx(expected.tolist(), rel=1e-4)
    assert [round(c.A, 2), round(c.w[0], 3), round(c.w[25], 3), round(c.w[49], 3)] == [13.15, -1.444, -0.097, -0.012]


def test_v_network_has_other_coefficients_for_the_same_path():
    scheduler = make_scheduler("ddim", EPS | {"prediction_type": "v_prediction"}, 50)
    assert pytest.approx(0.97, abs=0.01) == affine_coefficients(scheduler, 50).A


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
