"""One optimizer step: a line of ``metrics.jsonl``."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Drift:
    """How far cheap rollouts are from those of the full sampler, on the samples of one step.

    Attributes:
        distance: of the final latents, root mean square, as a share of the full ones' spread.
        cosine: of the step's gradient to the one of full rollouts, whose live calls are drawn by the same key, but
        among other calls.
        loss: by how much the loss of the cheap ones is higher, in the mean; None in runs of before it was noted.
    """

    distance: float
    cosine: float
    loss: float | None = None


@dataclass(frozen=True)
class Replay:
    """One of several updates on a rollout.

    Attributes:
        update: from 1, which made the rollout.
        change: of the network's outputs at the live calls since then, mean of |e - e then| / |e then|.
        cosine: of the step's gradient to the one of a fresh rollout with the same noise, prompts and live calls, where
            that was looked at.
    """

    update: int
    change: float
    cosine: float | None = None


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. ``rewards`` are means over the global batch; ``calls`` count network calls per sample.

    ``penalty`` is the mean of (ε_θ - ε_base)² over the live calls when the recipe has a ``kl_weight``; ``skipped`` says
    that a reward or the gradient was not finite and nothing was changed. ``cheap_rollouts`` says that this step drew
    otherwise than sampling does, ``drift`` how far from it, where that was looked at. ``replay`` says which of several
    updates on one rollout it was; at a later one loss and rewards are the rollout's, or those of ``rescore``.
    ``decoder_gap`` is by how much rewards are higher through the model's own decoder, where training has a small one.
    ``gradients`` has the mean length of each reward's gradient at the pictures, weighted, and the mean cosine of each
    pair under ``a|b``; ``spreads`` what each reward was divided by; ``gate`` how uncertain the rewards were, mean and
    highest, and the share of samples that ``kl_gate`` let be held near the base.
    """

    step: int
    loss: float
    rewards: dict[str, float]
    grad_norm: float
    learning_rate: float
    seconds: dict[str, float]
    calls: dict[str, int]
    penalty: float | None = None
    skipped: bool = False
    drift: Drift | None = None
    cheap_rollouts: bool = False
    replay: Replay | None = None
    decoder_gap: dict[str, float] | None = None
    gradients: dict[str, float] | None = None
    spreads: dict[str, float] | None = None
    gate: dict[str, float] | None = None


def step_result(row: dict[str, Any]) -> StepResult:
    """A line of ``metrics.jsonl``; what a skipped step could not tell is null there."""
    nan = float("nan")
    numbers = {key: nan if row[key] is None else row[key] for key in ("loss", "grad_norm")}
    rewards_ = {name: nan if value is None else value for name, value in row["rewards"].items()}
    drift = (
        Drift(**{key: nan if value is None and key != "loss" else value for key, value in row["drift"].items()})
        if row.get("drift")
        else None
    )
    replay = Replay(**row["replay"]) if row.get("replay") else None
    return StepResult(**{**row, **numbers, "rewards": rewards_, "drift": drift, "replay": replay})
