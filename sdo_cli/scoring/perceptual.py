"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) through its own package, the extra ``lpips``.

The package brings the weights of its linear layers; those of the network under them are torchvision's, of ImageNet. It
would download them by itself, and in its constructor, so here it is built without and given a file.
"""

import hashlib
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.hub import MissingWeights, is_offline
from sdo_cli.installed import install_extra
from sdo_cli.scoring.measure_names import LPIPS

# torchvision's records of published weights, by network
PUBLISHED = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
# of the shorter side; under it the deepest layers have no place left
SMALLEST = 32


@dataclass(frozen=True)
class Backbone:
    """The file a measure's network is read from, and what its figures are by."""

    kind: str
    path: Path

    @property
    def said(self) -> str:
        with self.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return f"lpips {metadata.version('lpips')}, {LPIPS[self.kind]} sha256 {digest[:16]}"


def backbones(kinds: Sequence[str], weights: Path | None) -> dict[str, Backbone]:
    """The weight file of every measure asked for, downloaded where it has to be.

    Args:
        kinds: of :data:`LPIPS`.
        weights: a local file in place of torchvision's, of the only kind.

    Raises:
        EnvironmentFault: the package or a file is not to be had.
    """
    if kinds and find_spec("lpips") is None:
        raise EnvironmentFault(f"--distance {kinds[0]} needs the package lpips", remedy=install_extra("lpips"))
    if weights is not None and not weights.is_file():
        raise EnvironmentFault(f"--lpips-weights {weights}: no such file", remedy="check the path")
    return {kind: Backbone(kind, weights or _published(LPIPS[kind])) for kind in kinds}


def _published(net: str) -> Path:
    """torchvision's file in torch's own cache, as torchvision itself would put it there."""
    import torchvision

    url: str = getattr(torchvision.models, PUBLISHED[net]).IMAGENET1K_V1.url
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    remedy = f"put torchvision's {name} there, or name it with --lpips-weights FILE"
    if is_offline():
        raise MissingWeights(
            f"lpips-{net} needs {path}, which is not there, and HF_HUB_OFFLINE is set: nothing is fetched",
            remedy=remedy,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the name ends in the first letters of its SHA-256
        torch.hub.download_url_to_file(url, str(path), name.rpartition("-")[2].removesuffix(".pth"), progress=False)
    # a network can fail in any way
    except Exception as fault:
        text = str(fault).strip().splitlines()
        why = text[0] if text else type(fault).__name__
        raise MissingWeights(f"cannot download {name} to {path.parent}: {why}", remedy=remedy) from fault
    return path


def build(backbone: Backbone, device: torch.device) -> nn.Module:
    """The package's network, version 0.1, in fp32 and for measuring only.

    Raises:
        EnvironmentFault: the file is no such network's.
    """
    import lpips

    net = LPIPS[backbone.kind]
    with warnings.catch_warnings():
        # of torchvision, about the way the package calls it
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    _fill(network.net, _table(backbone.path), backbone)
    found: nn.Module = network.eval().requires_grad_(False).to(device)
    return found


def _table(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        read = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as fault:
        raise EnvironmentFault(
            f"{path} is no table of weights that can be read", remedy="give torchvision's file, or a .safetensors"
        ) from fault
    return read if isinstance(read, dict) else {}


def _fill(network: nn.Module, table: Mapping[str, Tensor], backbone: Backbone) -> None:
    """``features.0.weight`` of torchvision is ``slice1.0.weight`` of the package; its classifier is not used."""
    for name, parameter in network.named_parameters():
        found = table.get(f"features.{name.partition('.')[2]}")
        if found is None or found.shape != parameter.shape:
            raise EnvironmentFault(
                f"{backbone.path}: holds no {LPIPS[backbone.kind]} (features.{name.partition('.')[2]} of "
                f"{list(parameter.shape)})",
                remedy=f"give torchvision's weights of {PUBLISHED[LPIPS[backbone.kind]].removesuffix('_Weights')}",
            )
        parameter.data.copy_(found)


@torch.no_grad()
def distance(network: nn.Module, a: Tensor, b: Tensor) -> float | None:
    """Of two pictures ``[3, H, W]`` in [0, 1]; 0 for equal ones, None where their sizes differ.

    One pair at a time, so that the figure does not hang on what else is measured.

    Raises:
        RecipeFault: smaller than the network can see.
    """
    if a.shape != b.shape:
        return None
    if min(a.shape[1:]) < SMALLEST:
        size = " × ".join(map(str, a.shape[:0:-1]))
        raise RecipeFault([f"--distance: LPIPS needs {SMALLEST} pixels a side, pictures have {size}; leave it out"])
    found: Tensor = network(a[None], b[None], normalize=True)
    return found.double().item()
