"""Distance of a set of images to a reference set: FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018).

Both are computed by torchmetrics, the extra ``fid``. Features are Inception's, as published figures have them,
or those of clip-score's model, which need no further weights and compare only among themselves.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdo_cli.drawing.pictures import read_image
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.evaluation.layouts import OTHER_SUFFIXES, SUFFIXES, counted, has_picture, is_sheet
from sdo_cli.hub import is_offline
from sdo_cli.installed import install_extra

FEATURES = ("inception", "clip")
# images in one of KID's random subsets, as published figures have it
SUBSET = 1000
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


# with names of JPEG that --images may or may not read
UNREAD = (OTHER_SUFFIXES | {".jfif", ".jpe"}) - SUFFIXES


def reference_files(folder: Path) -> tuple[list[Path], str]:
    """Pictures of a folder and of those inside it, by the rules of ``--images``, and a sentence about them.

    Raises:
        RecipeFault: fewer than two.
    """
    every = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix.lower() in SUFFIXES | UNREAD or has_picture(path))
    )
    hidden = {path for path in every if any(part[0] == "." for part in path.relative_to(folder).parts)}
    seen = [path for path in every if path not in hidden]
    pictures = [path for path in seen if has_picture(path)]
    files = [path for path in pictures if not is_sheet(path)]
    left = [
        f"{counted(len(paths), noun)} {what}, {paths[0].relative_to(folder)} first"
        for paths, noun, what in (
            ([path for path in pictures if is_sheet(path)], "sheet", "of several pictures"),
            (sorted(hidden), "picture", "in hidden files or folders"),
            ([path for path in seen if path.suffix.lower() in UNREAD], "file", "of kinds that sdo does not read"),
        )
        if paths
    ]
    said = f"--reference {folder}: {counted(len(files), 'picture')} used"
    if left:
        said += f"; left out: {'; '.join(left)}"
    if len(files) < 2:
        raise RecipeFault([f"{said}; it needs two or more; put them there as PNG, JPEG or WebP"], what="command line")
    return files, said


class _Given(nn.Module):
    """Stands for the network where features are known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def require_torchmetrics(features: str, weights: Path | None) -> None:
    """Raises EnvironmentFault, before anything is drawn, when a distance could not be computed."""
    wanted = ["torchmetrics"] + ["torch_fidelity"] * (features == "inception")
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise EnvironmentFault(f"--reference needs {' and '.join(missing)}", remedy=install_extra("fid"))
    if features != "inception":
        return
    if weights is not None and not weights.is_file():
        raise EnvironmentFault(f"--inception-weights {weights}: no such file", remedy="check the path")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if weights is None and is_offline() and not cached.is_file():
        raise EnvironmentFault(
            f"FID needs Inception's weights, which are not at {cached}",
            remedy=f"put {INCEPTION} (of torch-fidelity's releases) there, give --inception-weights FILE, or take "
            "--fid-features clip, which compares only with itself",
        )


def inception(weights: Path | None, device: torch.device) -> nn.Module:
    """The network of the published figures; downloaded by torch-fidelity where there is a network.

    Raises:
        EnvironmentFault: not to be had.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = None if weights is None else str(weights)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    # a download or a file can fail in any way
    except Exception as fault:
        raise EnvironmentFault(
            f"cannot load Inception's weights: {str(fault).strip().splitlines()[0]}",
            remedy=f"put {INCEPTION} into {torch.hub.get_dir()}/checkpoints, or give --inception-weights FILE",
        ) from fault
    return network.eval().to(device)


@torch.no_grad()
def inception_features(network: Any, files: list[Path], device: torch.device) -> Tensor:
    """``[images, 2048]``, one by one since sizes may differ; the network resizes to 299 pixels itself."""
    rows = []
    for path in files:
        image = (read_image(path)[None] * 255).round().to(torch.uint8).to(device)
        rows.append(network(image)[0].float().cpu())
    return torch.cat(rows)


def fid_kid(images: Tensor, reference: Tensor, *, prefix: str = "") -> dict[str, float]:
    """FID, not below 0, and KID, which may be, from features ``[n, D]`` of both sets.

    ``kid_std`` is the standard deviation over KID's random subsets of 1000 images, of all where there are fewer. It is
    left out where a set holds less than two subsets: of nearly the same images they hardly differ, which says nothing
    of other images. FID is biased upwards by some hundreds of images, the more the fewer; KID is not.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    width, smaller = images.shape[1], min(len(images), len(reference))
    subset = min(SUBSET, smaller)
    fid = FrechetInceptionDistance(feature=_Given(width))
    kid = KernelInceptionDistance(feature=_Given(width), subset_size=subset)
    for metric in (fid, kid):
        metric.update(reference, real=True)
        metric.update(images, real=False)
    with torch.random.fork_rng(devices=[]):
        # its subsets are random
        torch.manual_seed(0)
        mean, spread = kid.compute()
    # of a set to itself rounding leaves a little on either side of 0
    found = {f"{prefix}fid": max(0.0, float(fid.compute())), f"{prefix}kid": float(mean)}
    return found | ({f"{prefix}kid_std": float(spread)} if smaller >= 2 * subset else {})
