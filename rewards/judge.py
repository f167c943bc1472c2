"""The embedded judge: a second CLIP of other architecture and seed that only measures."""

from dataclasses import replace

from rewards import clip_score
from rewards.clip_encoder import ClipEncoder

INFO = replace(
    clip_score.INFO,
    name="judge",
    summary="similarity under a CLIP no recipe may train on; measures whether a gain is real",
    trainable=False,
)


def build() -> clip_score.ClipScore:
    return clip_score.ClipScore(ClipEncoder("embedded:judge"), INFO)
