"""What the keys of ``rollout`` mean (see :mod:`.meanings`)."""

from sdo_cli.recipe.meaning import Meaning

ROLLOUT_MEANINGS = {
    "num_inference_steps": Meaning(
        "Sampling steps of training's pictures.",
        "rollout: {num_inference_steps: 10}",
        "0: the recipe's own `num_inference_steps`.",
    ),
    "lora": Meaning(
        "A few-step LoRA that draws training's pictures and is not trained.",
        "rollout: {lora: lcm-lora-sdv1-5.safetensors, solver: lcm, num_inference_steps: 4}",
        "It is switched on, beside the LoRA that is trained, where pictures are drawn, and off where gradients are"
        " taken: the slow model learns from a fast one's pictures. A run folder, a LoRA file or a hub id, or"
        " `embedded:student` for the embedded model. `solver` and the steps have to be named. For rules that take"
        " one step at a time (docs/few-steps.md).",
    ),
    "lora_scale": Meaning(
        "The weight of `lora`.",
        "rollout: {lora: lcm.safetensors, lora_scale: 0.8, solver: lcm, num_inference_steps: 4}",
        "1: as it was made.",
    ),
    "solver": Meaning(
        "The sampler `lora` was made for.",
        "rollout: {lora: lcm-lora-sdv1-5.safetensors, solver: lcm, num_inference_steps: 4}",
        "`lcm` for LCM LoRAs, `tcd` for TCD and some of Hyper-SD, `euler` for Lightning, `ddim` for the others of"
        " Hyper-SD. Needed with `lora`, because its file does not say.",
    ),
    "timesteps": Meaning(
        "The noise levels of its steps, one by one.",
        "rollout: {lora: lightning.safetensors, solver: euler, timesteps: [999, 749, 499, 249]}",
        "As the recipe's own `timesteps`; with `lora` only.",
    ),
    "guidance_scale": Meaning(
        "Guidance of training's pictures.",
        "rollout: {num_inference_steps: 5, guidance_scale: 3.5}",
        "With fewer steps or a skip plan: not given, the recipe's own `guidance_scale`. Few steps want less of it,"
        " 0.7 of it at five (docs/pruning.md); calls with gradients have it too. With `lora`: not given, 1, as"
        " most few-step LoRAs want, and calls with gradients keep the recipe's own.",
    ),
    "eta": Meaning(
        "Fresh noise of its solver, where that takes a share.",
        "rollout: {lora: tcd.safetensors, solver: tcd, num_inference_steps: 4, eta: 0.3}",
        "0 to 1, of `tcd` (its authors' gamma) and `ddim`; `lcm` always adds its own.",
    ),
    "skip_plan": Meaning(
        "A plan of `sdo prune`: what training's pictures leave out of the network.",
        "rollout: {skip_plan: prunes/dip-go-1/plan-0.80.json}",
        "Looked up beside the recipe, then in the current folder. It was made for one model, solver and number of"
        " steps, or is a solver learned for a few calls, which fits whatever solver samples (docs/pruning.md).",
    ),
    "estimator": Meaning(
        "With a skip plan: whose gradients are taken.",
        "rollout: {skip_plan: prunes/dip-go-1/plan-0.80.json, estimator: whole}",
        "`exact`: those of the pruned sampler. `whole`: the whole network is run again at the calls with gradients.",
    ),
    "drift_steps": Meaning(
        "Every so many steps the same pictures are also drawn in full.",
        "rollout: {num_inference_steps: 10, drift_steps: 20}",
        "To see how far the cheap ones are off: final latents, gradients, loss. 0: never.",
    ),
    "max_drift": Meaning(
        "Further off than this, training draws in full from then on.",
        "rollout: {num_inference_steps: 10, drift_steps: 20, max_drift: 0.5}",
        "A share: the root-mean-square difference of final latents, divided by their size; 0.1 is a tenth. 0: no"
        " limit. Needs `drift_steps`.",
    ),
    "updates": Meaning(
        "How many optimizer steps each rollout serves.",
        "rollout: {updates: 4, max_change: 0.1}",
        "The pictures are drawn and scored once; every update then runs the network again, with its weights of by then,"
        " at other steps of their way. `max_train_steps` counts updates. For rules that take one step at a time"
        " (docs/gradients.md); 1: each step draws its own.",
    ),
    "max_change": Meaning(
        "When the network has changed by more than this, the next rollout begins.",
        "rollout: {updates: 8, max_change: 0.1}",
        "The mean of |e - e then| / |e then| over the steps that are run again; 0.1 is a tenth. The update at which it"
        " is seen is still made. 0: no limit.",
    ),
    "proximal": Meaning(
        "A penalty on moving away from what the network gave in the rollout.",
        "rollout: {updates: 8, proximal: 0.1}",
        "As `kl_weight`, the mean square of the difference times this, but against the network of the rollout; costs"
        " nothing.",
    ),
    "rescore": Meaning(
        "Take the reward again at every update.",
        "rollout: {updates: 4, rescore: true}",
        "At the picture where the solver's linear path leads by then, by what the network has changed at the steps run"
        " so far: one more decoder and reward, and up to `updates` network calls without a graph, an update. For rule"
        " `sdo` with its weights `true/p`.",
    ),
}
