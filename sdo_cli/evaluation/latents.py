"""Rewards that see latents, in an evaluation: its pictures are encoded by the VAE of the model that draws."""

import torch

import rewards
from rewards.base import Reward
from sdo_cli.errors import RecipeFault
from sdo_cli.evaluation.job import Job
from sdo_cli.models.load import load_family
from sdo_cli.scoring.latents import as_measure, sees_latents


def check_latents(job: Job) -> None:
    """Raises RecipeFault where a reward sees latents and there is no model."""
    name = next((name for name in job.rewards if rewards.resolve(name) and rewards.sees_latents(name)), None)
    if name is not None and job.settings is None:
        text = f"{name} sees latents, and files are pictures: it needs the VAE of the model whose latents it reads"
        raise RecipeFault([f"{text}; draw with that model here too (--model), or leave {name} out of --rewards"])


def of_pictures(name: str, reward: Reward, job: Job, device: torch.device) -> Reward:
    """What measures the evaluation's files; of a latent reward, the model comes back for its VAE alone.

    Raises:
        RecipeFault: the reward reads another model's latents.
    """
    if not sees_latents(reward):
        return reward
    assert job.settings is not None
    # in fp32: what the pictures are encoded to is not to hang on what they were drawn in
    family = load_family(job.settings.model, dtype=torch.float32)
    family.vae.to(device)
    return as_measure(name, reward, family)
