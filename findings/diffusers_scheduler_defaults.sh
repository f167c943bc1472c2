#!/usr/bin/env bash
# diffusers 0.42.1: what a scheduler's config says depends on whether a key was in the file or filled in.
#
# 1. A key that the file left out is a filled-in default. Changing it on the loaded scheduler (register_to_config) shows
#    in its config, and every from_config drops it again: the new scheduler has its own default.
# 2. save_config writes filled-in defaults as if the file had named them. Loaded again, another scheduler class takes them
#    as settings: DPMSolverMultistepScheduler then places its steps at 801, 601, 401, 201 instead of 999, 749, 500, 250.
#
# Seen with the keys of Stable Diffusion 1.5's published scheduler config, which names neither key. Fails if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet diffusers==0.42.1 torch==2.14.1 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import diffusers
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

file = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}
print("diffusers", diffusers.__version__)

own = PNDMScheduler.from_config(file)
own.register_to_config(prediction_type="v_prediction")
again = PNDMScheduler.from_config(own.config)
print("1. after register_to_config:", own.config.prediction_type, "- after from_config of it:", again.config.prediction_type)
assert own.config.prediction_type == "v_prediction" and again.config.prediction_type == "epsilon"


def steps(config):
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(4)
    return scheduler.timesteps.tolist()


own = PNDMScheduler.from_config(file)
own.save_config("saved")
saved = PNDMScheduler.from_pretrained("saved")
print("2. DPM-Solver++ of the loaded config:", steps(own.config), "- of the same, saved and loaded:", steps(saved.config))
assert steps(own.config) == [999, 749, 500, 250] and steps(saved.config) == [801, 601, 401, 201]
PYTHON
echo "as described"
