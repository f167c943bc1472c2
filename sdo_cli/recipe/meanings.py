"""What every key of a recipe means, for `sdo recipe explain` and docs/recipe.md: the one place that says it.

Types, allowed words, defaults and ranges are read off the schema and the checks, lists of rules, rewards and solvers
off their own tables.
"""

from typing import Any

from sdo_cli.recipe.meaning import Meaning
from sdo_cli.recipe.part_meanings import (
    GRADIENT_MEANINGS,
    GUARD_MEANINGS,
    LORA_MEANINGS,
    PROMPT_MEANINGS,
    REWARD_MEANINGS,
    VALIDATION_MEANINGS,
)
from sdo_cli.recipe.rollout_meanings import ROLLOUT_MEANINGS
from sdo_cli.recipe.schema import (
    CombineSpec,
    GradientSpec,
    GuardSpec,
    LoraSpec,
    PromptSource,
    Recipe,
    RewardSpec,
    RolloutSpec,
    SightSpec,
    ValidationSpec,
)
from sdo_cli.recipe.sight_meanings import COMBINE_MEANINGS, SIGHT_MEANINGS

MEANINGS: dict[Any, dict[str, Meaning]] = {
    Recipe: {
        "model": Meaning(
            "The model that is fine-tuned.",
            "model: stable-diffusion-v1-5/stable-diffusion-v1-5",
            "`embedded` (the small emoji model that ships with sdo), a diffusers folder, one `.safetensors` checkpoint,"
            " or a hub id. Stable Diffusion 1.x, 2.x, XL, 3 and 3.5. Hub ids are looked up in the local cache first;"
            " `sdo fetch RECIPE` downloads what is missing.",
        ),
        "rewards": Meaning(
            "What the pictures are scored by; training raises it.",
            "rewards: [hps, {name: aesthetic, weight: 0.02}]",
            "A list; a bare name stands for an entry with nothing but a name. Several are added up, each times its"
            " weight. All of them have to be differentiable. No training images are used: the model draws its own"
            " pictures, and the rewards say which way is better.",
        ),
        "prompts": Meaning(
            "What is drawn in training.",
            "prompts: {file: animals-train.txt}",
            "Exactly one of `file`, `lines` and `template`. Only words are needed, no pictures. They are taken in a"
            " shuffled order, all of them before any comes again.",
        ),
        "kl_weight": Meaning(
            "How strongly the model is held near the one it was.",
            "kl_weight: 0.01",
            "Times the mean squared difference of the network's output to that of the model without the adapter, added"
            " to the loss (DRaFT+). 0: not held, and no cost; else one more network call for each one with gradients."
            " Only with `train: lora`.",
        ),
        "kl_gate": Meaning(
            "How uncertain rewards have to be about a picture for `kl_weight` to hold it.",
            "kl_weight: 0.1\nkl_gate: 0.02\nsight: {views: 4, crop: 0.2}",
            "In units of the weighted reward: the spread of its views (`sight.views`) and of the parts of a `mixture`;"
            " one of them there has to be. 0: every picture is held. `metrics.jsonl` has mean, highest and the share"
            " that is held under `gate`, with 0 too, so a first run says where to put it.",
        ),
        "description": Meaning(
            "A line for people.", "description: HPS v2.1 on SD 1.5", "Shown by `sdo recipe list` and in the model card."
        ),
        "revision": Meaning("Branch, tag or commit of a model on the hub.", "revision: main", "Not given: the newest."),
        "variant": Meaning(
            "Which of several weight files of a model is read.",
            "variant: fp16",
            "`fp16` reads `….fp16.safetensors`: half the download. It is not the precision that is computed in, which"
            " is `mixed_precision`. Not given: files without such a word, or the only ones there are.",
        ),
        "vae": Meaning(
            "Another VAE in place of the model's own.",
            "vae: madebyollin/sdxl-vae-fp16-fix",
            "A folder or hub id. SDXL's own VAE overflows in fp16; this example is its repaired twin.",
        ),
        "decoder": Meaning(
            "What decodes training's pictures for the rewards.",
            "decoder: tiny-jacobian\ntiny_decoder: taesd",
            "`full`: the model's own decoder. `tiny`: a small one, a twentieth of the work; the rewards of training's"
            " pictures, in `metrics.jsonl` too, are of what it draws; `rollout.drift_steps` says how far they are from"
            " those of the model's own pictures. `tiny-jacobian`: rewards see the model's own pictures, and their"
            " gradient goes back through the small decoder, in its memory. Held-out pictures, checks and all that is"
            " drawn later are the model's own.",
        ),
        "tiny_decoder": Meaning(
            "The small decoder of `decoder: tiny` and `tiny-jacobian`.",
            "decoder: tiny\ntiny_decoder: taesdxl",
            "`taesd` (SD 1.x, 2.x), `taesdxl`, `taesd3`, the folder of another diffusers AutoencoderTiny, or a hub id."
            " The embedded model has its own, `embedded:tiny`, and needs no name.",
        ),
        "text_encoders": Meaning(
            "Where to take the text encoders from, for a checkpoint file that holds none.",
            "text_encoders: /models/sd35-medium",
            "The folder of a diffusers pipeline of the same kind; its tokenizers come with them. SD 3.5's files as"
            " published, and many files for ComfyUI, hold only the network.",
        ),
        "t5": Meaning(
            "Whether SD 3's third text encoder, T5, is used.",
            "t5: false",
            "`false` leaves the largest file of SD 3 out; long prompts and writing inside pictures suffer. Means"
            " nothing to other models.",
        ),
        "prediction_type": Meaning(
            "What the network predicts, where the model does not say or lies.",
            "prediction_type: v_prediction",
            "`epsilon`: the noise, as SD 1.x, SDXL. `v_prediction`: as SD 2.1 at 768 pixels. Not given: as the model's"
            " scheduler config, or the marker in a checkpoint file, says. Needed for some single checkpoint files;"
            " pictures that are all noise or washed out are the sign.",
        ),
        "rescale_betas_zero_snr": Meaning(
            "Whether the model was trained with zero terminal SNR.",
            "rescale_betas_zero_snr: true",
            "Its noisiest level then leaves nothing of the picture; many v-prediction models are like this. Not given:"
            " as the model's scheduler config, or the marker in a checkpoint file, says. Without it pictures are all of"
            " one middle brightness.",
        ),
        "timestep_spacing": Meaning(
            "Which noise levels the steps are put at.",
            "timestep_spacing: trailing",
            "`trailing` begins at the noisiest level, which zero-SNR models and models for few steps want; `leading`"
            " ends at the cleanest and begins late; `linspace` has both ends. Not given: as the model's scheduler"
            " config says, else as the solver's own default.",
        ),
        "seed": Meaning(
            "Another number, other noise, prompt order and first adapter.",
            "seed: 1",
            "The same recipe and seed give the same run: bit for bit on one CPU process.",
        ),
        "output_dir": Meaning(
            "Where run folders are put.", "output_dir: /scratch/runs", "`--out` names the run folder itself."
        ),
        "max_train_steps": Meaning(
            "Optimizer steps of the run.",
            "max_train_steps: 200",
            "Each step draws a global batch of pictures, which is what it costs. A finished run goes on with more:"
            " `--resume max_train_steps=400`.",
        ),
        "checkpointing_steps": Meaning(
            "Every so many steps everything is saved that `--resume` needs.",
            "checkpointing_steps: 25",
            "0: no checkpoints. A run that is stopped by a signal or `--time-limit` saves by itself; only a run that is"
            " killed loses what came after the last checkpoint.",
        ),
        "checkpoints_total_limit": Meaning(
            "How many checkpoints can be gone on from; of older ones the LoRA stays.",
            "checkpoints_total_limit: 1",
            "0 keeps all of them whole.",
        ),
        "train_batch_size": Meaning(
            "Pictures of one pass, per process.",
            "train_batch_size: 4",
            "Global batch = `train_batch_size` × `gradient_accumulation_steps` × processes. Short of memory: lower"
            " this, raise the accumulation, and the result is the same; or keep it and cut the stages into"
            " micro-batches (`gradient.score_micro_batch` …).",
        ),
        "gradient_accumulation_steps": Meaning(
            "Passes whose gradients are added up for one optimizer step.",
            "gradient_accumulation_steps: 4",
            "Costs time, not memory. 1: each pass is a step.",
        ),
        "learning_rate": Meaning(
            "AdamW's step size, after the warm-up.",
            "learning_rate: 3e-4",
            "Shipped recipes use 1e-4 (SD 3.5) to 1e-3 (the embedded model), not tuned; `train: full` wants much less.",
        ),
        "lr_scheduler": Meaning(
            "What becomes of the learning rate after the warm-up.",
            "lr_scheduler: cosine",
            "`constant`: it stays. `linear`, `cosine`: it falls to 0 at `max_train_steps`.",
        ),
        "lr_warmup_steps": Meaning(
            "Optimizer steps over which the learning rate rises from 0.", "lr_warmup_steps: 10", "0: none."
        ),
        "adam_beta1": Meaning("AdamW's memory of gradients.", "adam_beta1: 0.9", "Nearer to 1 remembers longer."),
        "adam_beta2": Meaning(
            "AdamW's memory of squared gradients.", "adam_beta2: 0.99", "Nearer to 1 remembers longer."
        ),
        "adam_weight_decay": Meaning(
            "AdamW's pull of the weights towards 0.",
            "adam_weight_decay: 0.01",
            "Of a LoRA that is a pull back to the model as it was. 0: none.",
        ),
        "adam_epsilon": Meaning("AdamW's guard against dividing by 0.", "adam_epsilon: 1e-6"),
        "max_grad_norm": Meaning(
            "Longer gradients are shortened to this length.",
            "max_grad_norm: 0.1",
            "The length of all trained weights' gradients together, once per optimizer step; `metrics.jsonl` has it as"
            " `grad_norm`, before shortening. With `optimizer: mofasgd` only what the optimizer sees of them counts.",
        ),
        "max_skipped_steps": Meaning(
            "After so many broken steps in a row the run gives up.",
            "max_skipped_steps: 3",
            "A step whose reward or gradient is not a finite number changes nothing and is counted; in fp16 single ones"
            " are normal.",
        ),
        "optimizer": Meaning(
            "What turns gradients into steps.",
            "optimizer: mofasgd\ntrain: full",
            "`adamw`. `adamw8bit`: with its state in 8 bits, by the package bitsandbytes; saves memory where much is"
            " trained (`train: full`), with a LoRA hardly any. `prodigy` (package prodigyopt) finds the learning rate;"
            " `learning_rate: 1.0` is then a factor of it. `schedulefree` (package of that name) keeps a mean of the"
            " weights in place of a schedule. `mofasgd`, for `train: full`: a momentum of low rank, which needs a small"
            " part of AdamW's memory and keeps no gradient. What to take when: docs/optimizers.md.",
        ),
        "optimizer_rank": Meaning(
            "Rank of mofasgd's momentum, for every matrix.",
            "optimizer: mofasgd\noptimizer_rank: 16\ntrain: full",
            "So many directions on each side of a weight are followed. More take memory, time and bytes between"
            " processes in proportion; 16 to 32 are usual.",
        ),
        "optimizer_beta": Meaning(
            "What mofasgd's momentum keeps of itself at each step.",
            "optimizer: mofasgd\noptimizer_beta: 0.95\ntrain: full",
            "From 0 to below 1. Nearer to 1 remembers longer; 0.85 to 0.95 are usual.",
        ),
        "optimizer_form": Meaning(
            "How far mofasgd goes along each of the directions it follows.",
            "optimizer: mofasgd\noptimizer_form: clipped\ntrain: full",
            "`spectral`: equally far along all. `clipped`: less far along those that have less momentum than the mean"
            " of all, in proportion to it.",
        ),
        "ema_decay": Meaning(
            "Running mean of the weights, which is what is saved and drawn with.",
            "ema_decay: 0.99",
            "At each step the mean keeps this share of itself. 0: no running mean, the last weights count.",
        ),
        "train": Meaning(
            "What is trained: an adapter, or the whole denoiser.",
            "train: full",
            "`lora`: a small adapter, a few megabytes (keys under `lora`). `full`: every weight of the UNet or"
            " transformer; the run folder holds a whole pipeline. It needs four times the denoiser's memory in fp32, no"
            " `kl_weight` and a smaller learning rate; shared out over GPUs: docs/clusters.md."
            " With `optimizer: mofasgd` little more than the weights.",
        ),
        "mixed_precision": Meaning(
            "What the frozen parts of the model compute in.",
            "mixed_precision: bf16",
            "`no`: fp32. `bf16`: half the memory, for Ampere GPUs and newer. `fp16`: the same for older GPUs, with a"
            " loss scale. Trained weights stay in fp32.",
        ),
        "reward_precision": Meaning(
            "What the rewards compute in.",
            "reward_precision: bf16",
            "`no` (fp32) unless memory is short: scores become coarser.",
        ),
        "gradient_checkpointing": Meaning(
            "Recompute the denoiser's blocks in the backward pass: less memory.",
            "gradient_checkpointing: true",
            "Nearly free with rule `sdo`, which sends gradients through few of its calls. Rules that chain steps have"
            " `gradient.checkpointing` as well.",
        ),
        "vae_checkpointing": Meaning(
            "Recompute the VAE decoder's blocks in the backward pass: less memory.",
            "vae_checkpointing: true",
            "Goes well with `gradient.score_micro_batch: 1`: both are about the same stage.",
        ),
        "vae_tiling": Meaning(
            "Decode pictures in overlapping tiles of at most 512 pixels: less memory.",
            "vae_tiling: true",
            "Pictures change a little, since a tile does not see the others. For SDXL and SD 3 on small GPUs.",
        ),
        "reward_checkpointing": Meaning(
            "Recompute the rewards' layers in the backward pass: less memory.", "reward_checkpointing: true"
        ),
        "compile": Meaning(
            "torch.compile for the network calls that only draw.",
            "compile: default",
            "torch's modes; `none`: off. The first step takes longer while it compiles, so it is for long runs."
            " `reduce-overhead` and `max-autotune` use CUDA graphs.",
        ),
        "channels_last": Meaning(
            "Lay UNet and decoder out in memory as GPUs like it.",
            "channels_last: true",
            "For UNets (SD 1.x, 2.x, XL) in bf16 or fp16 on a GPU; changes nothing but rounding.",
        ),
        "solver": Meaning(
            "The sampler, by name.",
            "solver: dpm++2m",
            "`auto`: the sampler that the model's own folder names, for example `pndm` for SD 1.5, `euler` for SDXL,"
            " `flow-euler` for SD 3. Where sdo does not have that one, `ddim` (or `flow-euler`) stands in, and a line"
            " says so. Train with the solver you will draw with.",
        ),
        "eta": Meaning(
            "DDIM's fresh noise at every step.",
            "eta: 1.0",
            "0: none, the first noise decides the picture. 1: as much as DDPM adds. Only with solvers `ddim`, `tcd`.",
        ),
        "num_inference_steps": Meaning(
            "Sampling steps of a picture.",
            "num_inference_steps: 20",
            "A training step costs about this many network calls per picture, twice as many with guidance. Training may"
            " draw with fewer: `rollout.num_inference_steps`.",
        ),
        "timesteps": Meaning(
            "The noise levels of the steps, one by one, in place of the solver's own.",
            "timesteps: [999, 749, 499, 249]\nnum_inference_steps: 4",
            "Training timesteps, the noisiest first: from 999 down to 0, of flow models from 1000 to 1; as many as"
            " `num_inference_steps`. Some few-step models name theirs: one-step Hyper-SD 800, Lightning at four steps"
            " 999, 749, 499, 249. Only for solvers that take them: `ddim`, `euler`, `ipndm`, `dpm++2m`, `ddpm`, `lcm`,"
            " `tcd`, `flow-euler`.",
        ),
        "guidance_scale": Meaning(
            "Classifier-free guidance, as diffusers counts it.",
            "guidance_scale: 7.5",
            "1 or less: none, and each network call costs half. SD 1.5 is usually drawn with 7.5, SDXL with 5 to 7, SD"
            " 3.5 with 4.5.",
        ),
        "negative_prompt": Meaning(
            "What guidance moves away from.",
            "negative_prompt: blurry, text",
            "The same for every picture. Means nothing with `guidance_scale: 1`.",
        ),
        "height": Meaning("Pixels; the model's own by default.", "height: 768", "A multiple of 8, for SD 3 of 16."),
        "width": Meaning("Pixels; the model's own by default.", "width: 512", "A multiple of 8, for SD 3 of 16."),
        "gradient": Meaning("How the reward is sent back through sampling.", "gradient: {rule: sdo}"),
        "combine": Meaning(
            "How several rewards are put together.",
            "rewards: [clip, aesthetic]\ncombine: {normalise: spread, conflict: projection}",
            "Left out: each loss times its weight, added up.",
        ),
        "sight": Meaning(
            "What rewards see of training's pictures.",
            "sight: {views: 2, crop: 0.2, noise: 0.02}",
            "Against patterns that only fool a reward (docs/rewards.md). Held-out pictures and checks are scored as"
            " they are. Left out: the pictures as they are.",
        ),
        "rollout": Meaning(
            "How training draws, where that is to cost less than sampling.",
            "rollout: {num_inference_steps: 10}",
            "Held-out pictures are drawn in full. Left out: training draws as it samples.",
        ),
        "lora": Meaning("The adapter that is trained.", "lora: {rank: 16}", "With `train: lora`."),
        "validation": Meaning(
            "Held-out prompts, drawn before and after with the same noise.",
            "validation: {prompts: {file: animals-heldout.txt}, num_prompts: 32, rewards: [clip]}",
            "What the run's before and after, its report and its pictures come from. Without `prompts`: none of it.",
        ),
        "guard": Meaning(
            "Checks for over-optimisation while the run goes on.",
            "guard: {steps: 25, prompts: {file: animals-guard.txt}, num_prompts: 16, rewards: [clip]}",
            "A reward can be won at the pictures' cost. Each check draws prompts of its own and scores them with the"
            " trained rewards, with rewards that are not trained on, by diversity and by distance from the model as it"
            " was. `best/` keeps the adapter the untrained rewards liked most; when they fall, the run warns.",
        ),
        "trackers": Meaning(
            "Where figures go beside `metrics.jsonl`.",
            "trackers: [tensorboard]",
            "accelerate's trackers, each a package of its own; none by default.",
        ),
        "report": Meaning(
            "When `report.html` is written: at the end, or also at every checkpoint.",
            "report: live",
            "A page that is open reloads itself as long as the run goes on. A file, no server.",
        ),
    },
    PromptSource: PROMPT_MEANINGS,
    RewardSpec: REWARD_MEANINGS,
    GradientSpec: GRADIENT_MEANINGS,
    LoraSpec: LORA_MEANINGS,
    ValidationSpec: VALIDATION_MEANINGS,
    GuardSpec: GUARD_MEANINGS,
    RolloutSpec: ROLLOUT_MEANINGS,
    CombineSpec: COMBINE_MEANINGS,
    SightSpec: SIGHT_MEANINGS,
}
