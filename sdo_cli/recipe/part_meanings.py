"""What keys of ``prompts``, ``rewards``, ``gradient``, ``lora``, ``validation``, ``guard`` mean (:mod:`.meanings`)."""

from sdo_cli.recipe.meaning import Meaning

PROMPT_MEANINGS = {
    "file": Meaning(
        "A file of prompts, or a shipped set.",
        "prompts: {file: my-prompts.txt}",
        "`.txt` (one a line), `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`. Looked up beside the recipe, then in"
        " the current folder, then among `sdo prompts list`.",
    ),
    "column": Meaning(
        "The column of a table that holds the prompts.",
        "prompts: {file: animals.csv, column: prompt}",
        "Not given: found by its name (prompt, text, caption …).",
    ),
    "lines": Meaning("The prompts themselves.", "prompts: {lines: [a tiger, a bus]}"),
    "template": Meaning(
        "One prompt with {names} to fill in, in all combinations.",
        'prompts: {template: "a {color} {thing}", values: {color: [red, blue], thing: [cat, bus]}}',
    ),
    "values": Meaning(
        "The words of each name in `template`.",
        'prompts: {template: "a {thing}", values: {thing: [cat, bus]}}',
    ),
}

REWARD_MEANINGS = {
    "name": Meaning(
        "Which reward.",
        "rewards: [{name: hps}]",
        "A short name stands for the newest version. `sdo reward list` also says size and licence of the weights,"
        " docs/plugins.md how to write one of your own. Rewards that only measure may stand in"
        " `validation.rewards`.",
    ),
    "weight": Meaning(
        "Times this, in the sum of all rewards.",
        "rewards: [{name: hps}, {name: aesthetic, weight: 0.02}]",
        "Rewards have different units (hps 0 to 0.4, aesthetic 0 to 10, pickscore 15 to 30): weights bring them to"
        " one. Below 0 lowers a reward. Means nothing in `validation.rewards` and `guard.rewards`.",
    ),
    "loss": Meaning(
        "What is made of the score r.",
        "rewards: [{name: aesthetic, loss: hinge, target: 7}]",
        "`maximize`: the higher the better, the loss is -r. `distance`: |target - r|, so it should be `target`, no"
        " more and no less. `hinge`: max(0, target - r), as `maximize` until `target` is reached, picture by picture;"
        " from there on the other rewards have the word (docs/rewards.md, rewards that are fooled).",
    ),
    "target": Meaning(
        "The score that `loss: distance` or `hinge` aims at.",
        "rewards: [{name: colorfulness, loss: distance, target: 0.3}]",
        "In the reward's own units. Needed by these two, refused with `maximize`.",
    ),
    "options": Meaning(
        "What the reward is built with, by the reward's own names.",
        "rewards: [{name: hps, options: {checkpoint: /models/HPS_v2.1_compressed.pt}}]",
        "Mostly where its weights are. Left out, published weights are taken from the hub's cache; with"
        " `model: embedded` the small embedded ones, where a reward has them.",
    ),
}

GRADIENT_MEANINGS = {
    "rule": Meaning(
        "Which gradient is taken.",
        "gradient: {rule: drtune}",
        "`sdo` is cheap in memory and trains all steps. `auto`: `full` where that costs about as much, at one or"
        " two network calls, else `sdo`; a line says which. The rules side by side: docs/gradients.md, and on your"
        " own model `sdo bench`. A rule of your own: docs/plugins.md.",
    ),
    "options": Meaning(
        "What the rule can be told.",
        "gradient: {rule: sdo, options: {step_choice: uniform, steps_per_sample: 2}}",
        "Each rule has its own; another rule's are refused. Calls are network calls of one picture, 0 the noisiest:"
        " as many as `num_inference_steps`, with solver `pndm` one more.",
    ),
    "weight_sharpness": Meaning(
        "How far weights are moved against the rewards before their gradient is taken.",
        "gradient: {weight_sharpness: 0.05}",
        "SAM, at the weights: all trained weights together go this far along the step's gradient, the live calls"
        " are made again there, and the weights come back; what a small change of the weights undoes is not"
        " followed. Costs the live calls once more a step, no rollout and no reward. 0: not. Only with"
        " `train: lora`, and rules that do not chain their steps.",
    ),
    "negative_gradient": Meaning(
        "Whether gradients also flow through guidance's negative branch.",
        "gradient: {negative_gradient: false}",
        "`false` saves a part of the backward pass, and gives another gradient. Means nothing with"
        " `guidance_scale: 1`.",
    ),
    "checkpointing": Meaning(
        "What rules that chain steps recompute in their backward pass.",
        "gradient: {rule: full, checkpointing: blocks}",
        "For `full`, `draft-k` and `alignprop`. `calls`: whole network calls, least memory. `blocks`: blocks inside"
        " each call. `none`: everything is kept, quickest, and memory grows with every call.",
    ),
    "rollout_micro_batch": Meaning(
        "Pictures drawn at a time, without gradients.",
        "gradient: {rollout_micro_batch: 2}",
        "Smaller needs less memory and changes nothing else. 0: all `train_batch_size` of them. For rules in three"
        " stages: not `full`, `draft-k`, `alignprop`.",
    ),
    "score_micro_batch": Meaning(
        "Pictures decoded and scored at a time, with gradients.",
        "gradient: {score_micro_batch: 1}",
        "The first thing to set to 1 where memory is short. 0: all `train_batch_size` of them.",
    ),
    "shortcut_micro_batch": Meaning(
        "Network calls with gradients at a time.",
        "gradient: {shortcut_micro_batch: 1}",
        "0: all pictures of `train_batch_size`.",
    ),
}

LORA_MEANINGS = {
    "rank": Meaning(
        "Size of the adapter.",
        "lora: {rank: 16}",
        "Rank of the two matrices put beside each layer. More can learn more; the file grows with it. Shipped"
        " recipes use 4 to 8.",
    ),
    "alpha": Meaning(
        "What the adapter is multiplied with is alpha / rank.",
        "lora: {rank: 16, alpha: 8}",
        "0 means alpha = rank, so times 1.",
    ),
    "layers": Meaning(
        "Which layers of the denoiser get an adapter: attention, or all.",
        "lora: {layers: all}",
        "`attention`: the projections of attention, as in diffusers' scripts. `all`: every linear layer and"
        " convolution of the blocks too, known as LoCon; it learned several times more per second on the embedded"
        " model, at a third of the learning rate, and its file is larger. ComfyUI, A1111 and diffusers read both.",
    ),
    "target_modules": Meaning(
        "Names of the layers that get an adapter, in place of `layers`.",
        "lora: {target_modules: [to_q, to_k, to_v, to_out.0, proj_in, proj_out]}",
        "Ends of diffusers' module names. Not given: the attention projections of the model's kind.",
    ),
    "text_encoder": Meaning(
        "Whether the CLIP text encoders get an adapter as well.",
        "lora: {text_encoder: true}",
        "They then stay in memory and are run at every network call.",
    ),
    "start_from": Meaning(
        "A LoRA to go on with.",
        "lora: {start_from: runs/hps-1}",
        "A run folder or a file, with diffusers' or kohya's names. Rank, alpha and layers are then the file's.",
    ),
    "kohya": Meaning(
        "Whether each LoRA also gets a file for ComfyUI and A1111.",
        "lora: {kohya: true}",
        "`<recipe>-kohya.safetensors`, in the run's folder, in `best/` and in every checkpoint. `sdo export` makes"
        " one of any LoRA afterwards.",
    ),
}

VALIDATION_MEANINGS = {
    "prompts": Meaning(
        "The held-out prompts; none may be trained on.",
        "validation: {prompts: {file: animals-heldout.txt}}",
        "Keys as under `prompts`.",
    ),
    "num_prompts": Meaning(
        "Only the first so many are drawn.",
        "validation: {prompts: {file: animals-heldout.txt}, num_prompts: 32}",
        "More of them: smaller error bars, and more time before and after training.",
    ),
    "seeds": Meaning(
        "Pictures per prompt, each from its own noise.",
        "validation: {prompts: {file: animals-heldout.txt}, seeds: 2}",
    ),
    "rewards": Meaning(
        "Measured beside the trained ones; nothing is chosen by them.",
        "validation: {prompts: {file: animals-heldout.txt}, rewards: [judge, clip]}",
        "Entries as under `rewards`. A gain in a reward that was not trained on is the better evidence."
        " `judge` is for the embedded model.",
    ),
    "batch_size": Meaning(
        "Held-out pictures at a time.",
        "validation: {prompts: {file: animals-heldout.txt}, batch_size: 4}",
        "No gradients, so more fit than in training. The guard draws with it too.",
    ),
    "grid_prompts": Meaning(
        "Of so many prompts the pictures are kept, before and after.",
        "validation: {prompts: {file: animals-heldout.txt}, grid_prompts: 4}",
        "The first ones, in `samples/`. 0: none.",
    ),
    "grid_steps": Meaning(
        "Every so many steps these pictures are drawn in between, too.",
        "validation: {prompts: {file: animals-heldout.txt}, grid_steps: 50}",
        "0: before and after training only.",
    ),
    "base_guidance_scale": Meaning(
        "The untrained model is also drawn with this guidance, to compare with.",
        "guidance_scale: 1.0\nvalidation: {prompts: {lines: [a bus]}, base_guidance_scale: 5.0}",
        "For training that is to make guidance needless: the same held-out prompts and noise, a row of the grid and"
        " a line of the results.",
    ),
}

GUARD_MEANINGS = {
    "steps": Meaning(
        "A check every so many optimizer steps.",
        "guard: {steps: 25, prompts: {file: animals-guard.txt}, rewards: [clip]}",
        "0: no checks at all, and the other keys mean nothing. A check also comes before the first and after the"
        " last step.",
    ),
    "prompts": Meaning(
        "Prompts of the checks: neither trained on nor held out for the end.",
        "guard: {steps: 25, prompts: {file: animals-guard.txt}, rewards: [clip]}",
        "Keys as under `prompts`.",
    ),
    "num_prompts": Meaning(
        "Only the first so many are drawn.",
        "guard: {steps: 25, prompts: {file: animals-guard.txt}, num_prompts: 16, rewards: [clip]}",
        "At least two. Checks cost time: pictures of a check = `num_prompts` × `seeds`.",
    ),
    "seeds": Meaning(
        "Pictures per prompt.",
        "guard: {steps: 25, prompts: {file: animals-guard.txt}, seeds: 4, rewards: [clip]}",
        "With 1 there is no diversity, which compares pictures of one prompt.",
    ),
    "rewards": Meaning(
        "Rewards that are not trained on; `best/` is chosen by them.",
        "guard: {steps: 25, prompts: {file: animals-guard.txt}, rewards: [clip]}",
        "Entries as under `rewards`. At least one, never one that only measures.",
    ),
    "patience": Meaning(
        "So many bad checks in a row are over-optimisation.",
        "guard: {steps: 25, prompts: {file: animals-guard.txt}, rewards: [clip], patience: 2}",
        "A check is bad when the untrained rewards are below their best so far by more than the standard error of"
        " that difference, or the trained reward is clearly below where it began.",
    ),
    "stop": Meaning(
        "Whether the run then ends, or only warns.",
        "guard: {steps: 25, prompts: {file: animals-guard.txt}, rewards: [clip], stop: true}",
        "`--stop-on-overoptimisation` sets it.",
    ),
}
