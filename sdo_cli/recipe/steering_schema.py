"""The settings of `sdo optimize`, typed; imports no torch. What they mean: ``steering_meanings``."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sdo_cli.recipe.schema import PromptSource, Recipe, RewardSpec
from sdo_cli.sampling.solvers import AUTO

VARIABLES = ("latent", "embedding", "embedding-per-step", "guidance", "guidance-per-step", "noise")
# what stands before the colon of an objective that is no reward
KINDS = ("style", "text", "image", "classifier")
# of each kind, and the type of its value; a pair of numbers is a schedule from the first step to the last
_CLIP: dict[str, type] = {"model": str, "pretrained": str, "tag": str}
KIND_OPTIONS: dict[str, dict[str, type]] = {
    "style": {**_CLIP, "layer": int},
    "text": {**_CLIP, "alpha": list, "augmentations": int},
    "image": {"loss": str},
}
# rules whose reward sees an x0-prediction part-way, or re-noised repeats
LOOK_ELSEWHERE = ("refl", "draft-lv")
# x_i = (x_{i+1} - b e(x_i)) / a can be solved for one step at a time only
ONE_STEP = (AUTO, "ddim", "euler", "flow-euler")


@dataclass(frozen=True)
class ObjectiveSpec:
    """One wish: a reward's name, or ``kind:value`` with a kind of ``KINDS``. A bare name stands for the whole."""

    SHORTHAND: ClassVar[str] = "name"

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """One of ``KINDS``, or ``reward``."""
        word, colon, _ = self.name.partition(":")
        return word if colon and word in KINDS else "reward"

    @property
    def value(self) -> str:
        """What stands after the colon; of a reward, its name."""
        return self.name if self.kind == "reward" else self.name.partition(":")[2]

    @property
    def reward(self) -> RewardSpec | None:
        """The reward that scores it, if one does."""
        return RewardSpec(self.value, options=self.options) if self.kind in ("reward", "classifier") else None


@dataclass(frozen=True)
class Steering:
    """One optimisation of single images; fields of sampling are named as in fine-tuning recipes."""

    model: str
    objectives: list[ObjectiveSpec]
    prompts: PromptSource
    description: str = ""
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    text_encoders: str | None = None
    t5: bool = True
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    reward_precision: Literal["no", "fp16", "bf16"] = "no"
    vae_checkpointing: bool = False
    gradient_checkpointing: bool = False
    output_dir: str = "steered"

    solver: str = AUTO
    eta: float = 0.0
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    seed: int = 0
    num_images: int = 1
    batch_size: int = 4

    images: list[str] = field(default_factory=list)
    inversion_guidance: float | None = None
    inversion_iterations: int = 10

    start: int = 0
    variables: list[str] = field(default_factory=lambda: ["latent"])
    rule: str = "sdo"
    rule_options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = True
    steps: int = 100
    optimizer: Literal["adam", "adamw", "sgd", "sgd-norm"] = "adam"
    learning_rate: float = 0.01
    learning_rates: dict[str, float] = field(default_factory=dict)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.9
    norm_prior: float = 0.0
    renormalise: bool = False
    patience: int = 0
    measures: list[RewardSpec] = field(default_factory=list)
    strip: int = 8

    @property
    def rate_of(self) -> dict[str, float]:
        return {name: self.learning_rates.get(name, self.learning_rate) for name in self.variables}

    def as_recipe(self) -> Recipe:
        """Model, sampling and rewards as the rest of sdo reads them."""
        specs = [
            spec.reward or RewardSpec("clip-score", options=_clip_options(spec))
            for spec in self.objectives
            if spec.kind != "image"
        ]
        return Recipe(
            model=self.model,
            rewards=[*specs, *self.measures],
            prompts=self.prompts,
            revision=self.revision,
            variant=self.variant,
            vae=self.vae,
            text_encoders=self.text_encoders,
            t5=self.t5,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.rescale_betas_zero_snr,
            timestep_spacing=self.timestep_spacing,
            mixed_precision=self.mixed_precision,
            reward_precision=self.reward_precision,
            solver=self.solver,
            eta=self.eta,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
        )


def _clip_options(spec: ObjectiveSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.options.items() if key in _CLIP}
