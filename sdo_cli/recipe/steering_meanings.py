"""What the keys of a recipe of `sdo optimize` mean, where they are not those of `sdo finetune` (``meanings``)."""

from typing import Any

from sdo_cli.recipe.meaning import Meaning
from sdo_cli.recipe.steering_schema import ObjectiveSpec, Steering

STEERING_MEANINGS: dict[Any, dict[str, Meaning]] = {
    Steering: {
        "model": Meaning(
            "The model that draws; its weights stay as they are.",
            "model: /models/dreamshaper_8.safetensors",
            "`embedded` (the small emoji model that ships with sdo), a diffusers folder, one `.safetensors` checkpoint,"
            " or a hub id.",
        ),
        "objectives": Meaning(
            "What each picture is moved towards.",
            "objectives: [aesthetic, {name: style:waves.png, weight: 2}]",
            "A list; a bare name stands for an entry with nothing but a name. The loss is their weighted sum.",
        ),
        "prompts": Meaning(
            "What is drawn, a picture each.",
            "prompts: {lines: [a tiger on a teal background, a house]}",
            "Exactly one of `file`, `lines` and `template`.",
        ),
        "description": Meaning("A line for people.", "description: my style", "Shown by `sdo optimize --list`."),
        "lora": Meaning("A LoRA to draw with.", "lora: runs/hps-1", "A run folder or a file."),
        "lora_scale": Meaning("Weight of that LoRA.", "lora_scale: 0.7", "1: as trained. 0: as without."),
        "gradient_checkpointing": Meaning(
            "Recompute the denoiser's blocks in the backward pass: less memory.",
            "gradient_checkpointing: true",
            "Whole network calls are recomputed by `checkpointing`.",
        ),
        "output_dir": Meaning("Where folders are put.", "output_dir: pictures", "`--out` names the folder itself."),
        "num_inference_steps": Meaning(
            "Sampling steps of a picture.",
            "num_inference_steps: 30",
            "Every optimisation step samples from `start` to the end again, without gradients.",
        ),
        "guidance_scale": Meaning(
            "Classifier-free guidance, as diffusers counts it; 1 is none.",
            "guidance_scale: 7.5",
            "Where guidance is a variable, it begins here; then not at 1.",
        ),
        "seed": Meaning(
            "Picture j starts from the noise of seed + j.",
            "seed: 7",
            "As `sdo sample --seed` does, so they can be compared.",
        ),
        "num_images": Meaning("Pictures per prompt.", "num_images: 4", "With `images`: 1."),
        "batch_size": Meaning(
            "Pictures at a time.", "batch_size: 1", "Smaller needs less memory and changes nothing else."
        ),
        "images": Meaning(
            "Pictures to begin from, instead of noise.",
            "images: [house.png]",
            "One for all prompts, or one per prompt. Each is walked backwards through the solver to `start`; solvers"
            " `ddim`, `euler` and `flow-euler`.",
        ),
        "inversion_guidance": Meaning(
            "Guidance while a picture is walked backwards.", "inversion_guidance: 1.0", "Not given: `guidance_scale`."
        ),
        "inversion_iterations": Meaning(
            "Fixed-point iterations for each backward step.",
            "inversion_iterations: 5",
            "More: the picture is met better; what is left is the autoencoder's own loss (docs/steering.md).",
        ),
        "start": Meaning(
            "The sampling step whose latent is moved.",
            "start: 25",
            "Counted from 0, the noise: everything may change. Near the end only colours and texture do. What comes"
            " before is drawn once.",
        ),
        "variables": Meaning(
            "What of each picture is moved.",
            "variables: [latent, embedding]",
            "One or several. `…-per-step`: another value at each sampling step. `guidance` needs a `guidance_scale`"
            " other than 1, `noise` an `eta` above 0.",
        ),
        "rule": Meaning(
            "Which gradient is taken.",
            "rule: draft-k",
            "Not `refl`, `draft-lv`, nor `drtune` with an early stop: those look at predictions of the picture.",
        ),
        "rule_options": Meaning(
            "What the rule can be told.",
            "rule: draft-k\nrule_options: {k: 2}",
            "By name, as `gradient.options` of a fine-tuning recipe; on the command line `--rule draft-k:k=2`.",
        ),
        "checkpointing": Meaning(
            "Whether rules that chain steps recompute network calls: less memory.", "checkpointing: false"
        ),
        "steps": Meaning(
            "Optimisation steps.",
            "steps: 50",
            "Each picture keeps its best step. Not sampling steps: `num_inference_steps`.",
        ),
        "optimizer": Meaning(
            "What moves the variables along their gradients.",
            "optimizer: sgd-norm",
            "`adam`, `adamw`, `sgd` as in torch. `sgd-norm`: each picture's gradient is brought to length 1 first.",
        ),
        "learning_rate": Meaning(
            "Step size, for all variables that have none of their own.",
            "learning_rate: 0.05",
            "A latent counts in units of its noise level.",
        ),
        "learning_rates": Meaning(
            "Step size of single variables.",
            "variables: [latent, guidance]\nlearning_rates: {guidance: 0.2}",
        ),
        "adam_beta1": Meaning("Adam's memory of gradients.", "adam_beta1: 0.8"),
        "adam_beta2": Meaning("Adam's memory of squared gradients.", "adam_beta2: 0.99"),
        "norm_prior": Meaning(
            "How strongly latents are held at the length noise has.",
            "norm_prior: 0.01",
            "Weight of ReNO's log-likelihood of the latent's norm. For the initial noise (`start: 0`) or injected"
            " noise. 0: off.",
        ),
        "renormalise": Meaning(
            "Give latents their first length back after every step.", "renormalise: true", "As DOODL does."
        ),
        "patience": Meaning(
            "End after so many steps without a better picture.",
            "patience: 20",
            "Better: by a ten-thousandth, for any picture of the batch. 0: all `steps`.",
        ),
        "measures": Meaning(
            "Rewards that only measure, before and after.",
            "measures: [judge]",
            "Entries as under `rewards` of a fine-tuning recipe.",
        ),
        "strip": Meaning("Pictures of the way there, in `strips/`.", "strip: 4", "0: none."),
    },
    ObjectiveSpec: {
        "name": Meaning(
            "A reward, or what to come near to.",
            "objectives: [{name: 'text:{prompt} on a purple background'}]",
            "A reward's name raises it. `style:FILE`: the colours and texture of a picture. `text:WORDS`: what the"
            " words say, the rest staying; `{prompt}` is the picture's own. `image:FILE`: that picture, pixel by pixel."
            " `classifier:REWARD`: a plug-in's reward. Files are looked up beside the recipe, then in the current"
            " folder.",
        ),
        "weight": Meaning(
            "Times this, in the sum of all objectives.",
            "objectives: [aesthetic, {name: hps, weight: 20}]",
            "Below 0 lowers a reward.",
        ),
        "options": Meaning(
            "What the objective is built with.",
            "objectives: [{name: style:waves.png, options: {layer: 4}}]",
            "A reward takes its own options (`sdo recipe explain rewards.0.options`).",
        ),
    },
}

# of objectives that are no reward
KIND_OPTION_MEANINGS: dict[str, str] = {
    "style.layer": "block of CLIP's vision transformer whose patch tokens are compared, 1 the first; 2 unless given",
    "text.alpha": "share of the text in the loss, the rest is likeness to the picture before; 0.5 unless given, two"
    " numbers are a schedule from the first step to the last",
    "text.augmentations": "moved and turned copies the text is compared with; 4 unless given, 0 is the picture itself",
    "image.loss": "l1 or l2, the distance of pixels; l2 unless given",
    "model": "which CLIP, as of reward clip-score",
    "pretrained": "its weights, as of reward clip-score",
    "tag": "what a weight file was published as, as of reward clip-score",
}
