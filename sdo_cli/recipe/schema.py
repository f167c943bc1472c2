"""The recipe, typed. Names follow diffusers' training scripts where they have one."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class PromptSource:
    """Prompts from a file, lines in the recipe, or a template with values; exactly one of them.

    ``file`` is looked up beside the recipe, then among the shipped sets: text (one a line), JSON, JSON lines, CSV, TSV
    or parquet, whose ``column`` of prompts is found by its name unless given.
    """

    file: str | None = None
    column: str | None = None
    lines: list[str] | None = None
    template: str | None = None
    values: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class RewardSpec:
    """A reward by name, its weight in the objective, and what it is built with. A bare name stands for the whole.

    ``loss`` is what is minimised: ``maximize`` -r, ``distance`` |target - r|, ``hinge`` max(0, target - r).
    """

    SHORTHAND: ClassVar[str] = "name"

    name: str
    weight: float = 1.0
    loss: Literal["maximize", "distance", "hinge"] = "maximize"
    target: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GradientSpec:
    """How the reward is sent back through sampling. Micro-batches: 0 takes all samples at once.

    ``checkpointing`` is for rules that chain live steps: recompute whole ``calls`` or their ``blocks``, or keep all.
    """

    rule: str = "sdo"
    options: dict[str, Any] = field(default_factory=dict)
    negative_gradient: bool = True
    checkpointing: Literal["calls", "blocks", "none"] = "calls"
    rollout_micro_batch: int = 0
    score_micro_batch: int = 0
    shortcut_micro_batch: int = 0


@dataclass(frozen=True)
class LoraSpec:
    """Adapter; ``alpha`` 0 means alpha = rank; no ``target_modules`` means the family's attention projections.

    ``text_encoder`` trains one in the CLIP text encoders too. ``start_from`` is a LoRA (run folder or file, diffusers'
    or kohya's names) to go on with; rank and alpha are then the file's.
    """

    rank: int = 8
    alpha: float = 0.0
    target_modules: list[str] | None = None
    text_encoder: bool = False
    start_from: str | None = None


@dataclass(frozen=True)
class ValidationSpec:
    """Held-out prompts, drawn with the same seeds before and after.

    ``rewards`` are measured beside the trained ones and never select anything (their weight means nothing).
    """

    prompts: PromptSource = field(default_factory=PromptSource)
    num_prompts: int = 256
    seeds: int = 1
    rewards: list[RewardSpec] = field(default_factory=list)
    batch_size: int = 64
    grid_prompts: int = 8
    grid_steps: int = 0


@dataclass(frozen=True)
class GuardSpec:
    """Checks for over-optimisation, every ``steps`` (0: none), on ``prompts`` neither trained on nor held out.

    ``rewards`` are not trained on: ``best/`` keeps the adapter they like most, and when they fall for ``patience``
    checks in a row the run warns, and with ``stop`` ends.
    """

    steps: int = 0
    prompts: PromptSource = field(default_factory=PromptSource)
    num_prompts: int = 32
    seeds: int = 2
    rewards: list[RewardSpec] = field(default_factory=list)
    patience: int = 3
    stop: bool = False


@dataclass(frozen=True)
class RolloutSpec:
    """How training draws, where that is to cost less than sampling; held-out images are drawn in full.

    ``num_inference_steps`` 0 is the recipe's own. ``skip_plan`` is a file of `sdo prune`, looked up beside the recipe;
    with it the ``exact`` estimator has the gradients of the pruned sampler, ``whole`` runs the whole network again at
    its live calls. Every ``drift_steps`` (0: never) the same samples are also drawn in full, and once their final
    latents are further apart than ``max_drift`` (a share of their size; 0: no limit) training draws in full too.
    """

    num_inference_steps: int = 0
    skip_plan: str | None = None
    estimator: Literal["exact", "whole"] = "exact"
    drift_steps: int = 0
    max_drift: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning job.

    ``vae`` replaces the model's own; ``t5: false`` leaves the third text encoder of SD 3 out;
    ``prediction_type`` is for models whose scheduler config does not say what they predict. ``train: full`` trains
    every weight of the denoiser instead of an adapter. ``mixed_precision`` is what frozen parts compute in (adapters
    and fully trained weights stay in fp32), ``reward_precision`` the same for the rewards. ``checkpointing_steps`` 0
    keeps no checkpoints, ``checkpoints_total_limit`` 0 all of them. A step whose reward or
    gradient is not finite changes nothing; ``max_skipped_steps`` of them in a row end the run. ``train_batch_size`` is
    per process. ``trackers`` are accelerate's (tensorboard, wandb, …), beside ``metrics.jsonl``. ``compile`` is torch's
    mode for the network calls of training's rollouts; ``channels_last`` lays UNet and decoder out as GPUs like it.
    """

    model: str
    rewards: list[RewardSpec]
    prompts: PromptSource
    kl_weight: float = 0.0
    description: str = ""
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    t5: bool = True
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    seed: int = 0
    output_dir: str = "runs"

    max_train_steps: int = 100
    checkpointing_steps: int = 50
    checkpoints_total_limit: int = 2
    train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 10
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    ema_decay: float = 0.0
    train: Literal["lora", "full"] = "lora"

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    reward_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    vae_checkpointing: bool = False
    vae_tiling: bool = False
    reward_checkpointing: bool = False
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    channels_last: bool = False

    solver: str = "auto"
    eta: float = 0.0
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None

    gradient: GradientSpec = field(default_factory=GradientSpec)
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    lora: LoraSpec = field(default_factory=LoraSpec)
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    guard: GuardSpec = field(default_factory=GuardSpec)
    trackers: list[str] = field(default_factory=list)

    def global_batch(self, processes: int = 1) -> int:
        """Samples of one optimizer step, as in diffusers' scripts: per process, times accumulation, times processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes
