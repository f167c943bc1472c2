"""Human Preference Score v2 and v2.1: a fine-tuned CLIP ViT-H/14, run through open_clip."""

from dataclasses import replace
from pathlib import Path

from rewards import HPS
from rewards.base import RewardInfo
from rewards.checkpoints import read_state
from rewards.clip_encoder import ClipEncoder
from rewards.clip_score import ClipScore
from sdo_cli.errors import EnvironmentFault
from sdo_cli.hub import find_file

INFO = RewardInfo(
    name="hps-v2.1",
    summary="human preference: cosine of image and prompt under a CLIP ViT-H/14 trained on people's choices",
    source="Wu et al. 2023, arXiv 2306.09341; github.com/tgxs002/HPSv2 (package hpsv2)",
    licence="Apache-2.0",
    range=(0.0, 0.4),
)
ARCHITECTURE = "ViT-H-14"


def build(version: str = "hps-v2.1", model: str = ARCHITECTURE, checkpoint: str | None = None) -> ClipScore:
    """The score of ``version``.

    Args:
        model: open_clip architecture name or folder; another than ViT-H-14 only to try things out.
        checkpoint: the published file, fetched from the hub when not given.

    Raises:
        EnvironmentFault: no checkpoint, or one of another architecture.
    """
    path = find_file(HPS[version]) if checkpoint is None else Path(checkpoint).expanduser()
    # the published file has its weights, under open_clip's names, beside what training left
    state = read_state(path, "HPS checkpoint")
    encoder = ClipEncoder.untrained(model)
    try:
        encoder.net.load_state_dict(state)
    except RuntimeError as fault:
        raise EnvironmentFault(
            f"the HPS checkpoint {path.name} does not fit {model}", remedy="use the file that belongs to the model"
        ) from fault
    # the authors resize floats, longest side first, with black borders
    encoder.preprocess = replace(encoder.preprocess, fit="longest", from_bytes=False)
    return ClipScore(encoder, replace(INFO, name=version))
