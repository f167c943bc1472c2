"""The package's own head on its own CLIP, under a name that cannot be taken for a published one."""

from dataclasses import replace

from rewards import aesthetic

INFO = replace(
    aesthetic.INFO,
    name="aesthetic-embedded",
    summary="colourfulness as the package's small CLIP sees it, no judgement of people; to try things out",
    source="sdo_cli/embedded/README.md",
)


def build() -> aesthetic.Aesthetic:
    reward = aesthetic.build(model="embedded", head="embedded")
    reward.info = INFO
    return reward
