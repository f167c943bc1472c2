"""What measures of differences between pictures are called; imports no torch.

Figures of two networks are no figures of one measure, so each has columns of its own: clip-score's the plain names,
LPIPS' those with the network behind (``diversity-lpips-vgg``).
"""

DIVERSITY = "diversity"
DISTANCE = "distance-from-base"
# of the package lpips: its networks by how they are asked for
LPIPS = {"lpips-alex": "alex", "lpips-vgg": "vgg", "lpips-squeeze": "squeeze"}
SHORT = {"lpips": "lpips-alex"}


def diversity_by(kind: str) -> str:
    return f"{DIVERSITY}-{kind}"


def distance_by(kind: str) -> str:
    return f"{DISTANCE}-{kind}"


DIVERSITIES = (DIVERSITY, *map(diversity_by, LPIPS))
DISTANCES = (DISTANCE, *map(distance_by, LPIPS))
# measured between pictures, not by a reward
BETWEEN_PICTURES = (*DIVERSITIES, *DISTANCES)
