"""The package's own small CLIP, under a name that cannot be taken for a published one."""

from dataclasses import replace

from rewards import clip_score
from rewards.clip_encoder import ClipEncoder

INFO = replace(
    clip_score.INFO,
    name="clip-embedded",
    summary="similarity of image and prompt under the package's small CLIP, which knows emoji; to try things out",
    source="sdo_cli/embedded/README.md",
    licence="Apache-2.0",
)


def build() -> clip_score.ClipScore:
    return clip_score.ClipScore(ClipEncoder("embedded"), INFO)
