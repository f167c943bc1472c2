"""Scheduler configs as published, key for key, and small models that carry them."""

import json
import shutil

_SD = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_XL = {
    **_SD,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
CONFIGS = {
    "sd15": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_SD},
    "sd21": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        **_SD,
        "prediction_type": "v_prediction",
    },
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", **_XL},
    "zero-snr": {
        **_XL,
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.31.0",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "sdxl-turbo": {
        **_XL,
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": "0.24.0.dev0",
        "timestep_spacing": "trailing",
    },
    "lightning": {
        **_XL,
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.26.0",
        "timestep_spacing": "trailing",
    },
    "lcm": {
        "_class_name": "LCMScheduler",
        "_diffusers_version": "0.22.0.dev0",
        **_SD,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
    },
    "tcd": {
        "_class_name": "TCDScheduler",
        "_diffusers_version": "0.27.0.dev0",
        **_SD,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
    },
    "sd3": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.29.0.dev0",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    },
    "sd35-turbo": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.29.0.dev0",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": False,
    },
    "playground": {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "_diffusers_version": "0.27.0.dev0",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
        "sample_max_value": 1.0,
        "sigma_data": 0.5,
        "sigma_max": 80.0,
        "sigma_min": 0.002,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
    },
}


def with_config(model, folder, name, **changes):
    """A copy of a small model with the published config ``name``; ``changes`` to it, None takes a key out."""
    config = CONFIGS[name] | changes
    config = {key: value for key, value in config.items() if key == "trained_betas" or value is not None}
    shutil.copytree(model, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
