"""The recipe, typed. Names follow diffusers' training scripts where they have one.

What every key means stands in ``meanings`` (docs/recipe.md); a key without a meaning fails a test.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class PromptSource:
    """Prompts from a file, lines in the recipe, or a template with values; exactly one of them.

    A bare name stands for a file, a bare list for lines.
    """

    SHORTHAND: ClassVar[str] = "file"
    OF_A_LIST: ClassVar[str] = "lines"

    file: str | None = None
    column: str | None = None
    lines: list[str] | None = None
    template: str | None = None
    values: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class RewardSpec:
    """A reward, its weight in the objective, and what it is built with. A bare name stands for the whole."""

    SHORTHAND: ClassVar[str] = "name"

    name: str
    weight: float = 1.0
    loss: Literal["maximize", "distance", "hinge"] = "maximize"
    target: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GradientSpec:
    """How the reward is sent back through sampling."""

    rule: str = "sdo"
    options: dict[str, Any] = field(default_factory=dict)
    negative_gradient: bool = True
    weight_sharpness: float = 0.0
    checkpointing: Literal["calls", "blocks", "none"] = "calls"
    rollout_micro_batch: int = 0
    score_micro_batch: int = 0
    shortcut_micro_batch: int = 0


@dataclass(frozen=True)
class LoraSpec:
    """The adapter."""

    rank: int = 8
    alpha: float = 0.0
    layers: Literal["attention", "all"] = "attention"
    target_modules: list[str] | None = None
    text_encoder: bool = False
    start_from: str | None = None
    kohya: bool = False


@dataclass(frozen=True)
class ValidationSpec:
    """Held-out prompts, drawn with the same seeds before and after; nothing is selected by them."""

    prompts: PromptSource = field(default_factory=PromptSource)
    num_prompts: int = 256
    seeds: int = 1
    rewards: list[RewardSpec] = field(default_factory=list)
    batch_size: int = 64
    grid_prompts: int = 8
    grid_steps: int = 0
    base_guidance_scale: float | None = None


@dataclass(frozen=True)
class GuardSpec:
    """Checks for over-optimisation, on prompts neither trained on nor held out."""

    steps: int = 0
    prompts: PromptSource = field(default_factory=PromptSource)
    num_prompts: int = 32
    seeds: int = 2
    rewards: list[RewardSpec] = field(default_factory=list)
    patience: int = 3
    stop: bool = False


@dataclass(frozen=True)
class RolloutSpec:
    """How training draws, where that is to cost less than sampling; held-out images are drawn in full."""

    num_inference_steps: int = 0
    lora: str | None = None
    lora_scale: float = 1.0
    solver: str | None = None
    timesteps: list[int] | None = None
    guidance_scale: float | None = None
    eta: float = 0.0
    skip_plan: str | None = None
    estimator: Literal["exact", "whole"] = "exact"
    drift_steps: int = 0
    max_drift: float = 0.0
    updates: int = 1
    max_change: float = 0.0
    proximal: float = 0.0
    rescore: bool = False


@dataclass(frozen=True)
class CombineSpec:
    """How several rewards are put together."""

    normalise: Literal["none", "spread", "spread-at-start"] = "none"
    conflict: Literal["none", "projection", "mgda"] = "none"
    measure: bool = False

    @property
    def looks(self) -> bool:
        """Whether each reward's own gradient is wanted."""
        return self.conflict != "none" or self.measure


@dataclass(frozen=True)
class SightSpec:
    """What rewards see of training's pictures, against patterns that only fool them."""

    views: int = 1
    crop: float = 0.0
    noise: float = 0.0
    jpeg: int = 0
    lower_bound: float = 0.0
    sharpness: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning job."""

    model: str
    rewards: list[RewardSpec]
    prompts: PromptSource
    kl_weight: float = 0.0
    kl_gate: float = 0.0
    description: str = ""
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    text_encoders: str | None = None
    decoder: Literal["full", "tiny", "tiny-jacobian"] = "full"
    tiny_decoder: str | None = None
    t5: bool = True
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
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
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree", "mofasgd"] = "adamw"
    optimizer_rank: int = 32
    optimizer_beta: float = 0.9
    optimizer_form: Literal["spectral", "clipped"] = "spectral"
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
    timesteps: list[int] | None = None
    guidance_scale: float = 5.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None

    combine: CombineSpec = field(default_factory=CombineSpec)
    sight: SightSpec = field(default_factory=SightSpec)
    gradient: GradientSpec = field(default_factory=GradientSpec)
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    lora: LoraSpec = field(default_factory=LoraSpec)
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    guard: GuardSpec = field(default_factory=GuardSpec)
    trackers: list[str] = field(default_factory=list)
    report: Literal["end", "live"] = "end"

    def global_batch(self, processes: int = 1) -> int:
        """Samples of one optimizer step, as in diffusers' scripts: per process, times accumulation, times processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes
