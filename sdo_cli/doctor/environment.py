"""What this machine has: packages, weights, disk, GPU, processes."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import sdo_cli
from sdo_cli.doctor.target import Target, find_target
from sdo_cli.installed import install, install_extra, requirements, sdo
from sdo_cli.optimizers.adamw import PACKAGES
from sdo_cli.recipe.schema import Recipe
from sdo_cli.threads import cores
from sdo_cli.weights.needs import Need, needs_of, size_text

# settings that need a package sdo does without otherwise: (field, value) -> package, extra
EXTRAS = {("optimizer", name): (package, extra) for name, (package, _, _, extra) in PACKAGES.items()}

# where runs are written unless a recipe says otherwise
RUNS = "runs"


@dataclass(frozen=True)
class Finding:
    """Attributes:
    section: ``packages``, ``weights``, ``disk``, ``driver``, ``world``; without a recipe ``device`` and ``cores``.
    ok: False for what keeps the recipe from running here.
    remedy: what to type, empty when there is nothing to do.
    """

    section: str
    text: str
    ok: bool = True
    remedy: str = ""


def look_around(recipe: Recipe, given: Sequence[str]) -> list[Finding]:
    """Everything but memory.

    Args:
        given: recipe and overrides as the user typed them, for the lines to type.
    """
    needs = needs_of(recipe)
    return [*packages(recipe), *weights(needs, given), disk(recipe.output_dir, needs), *driver(recipe), world()]


def look_at_machine() -> list[Finding]:
    """What is here, whatever it is to be used for."""
    target = find_target(None)
    python = Finding("packages", f"sdo {sdo_cli.__version__}, Python {sys.version.split()[0]}")
    device = Finding("device", f"{target.name}, {size_text(target.memory)} of memory")
    return [python, *packages(), *driver(), device, disk(RUNS, []), usable(), world()]


def packages(recipe: Recipe | None = None) -> list[Finding]:
    """Versions against what sdo asks for, and the extras this recipe needs."""
    wanted = {name: f"{name}{range_}" for name, range_ in _requirements()}
    versions = {name: _version(name) for name in wanted}
    found = [
        Finding("packages", f"{name} is {version or 'missing'}; sdo needs {wanted[name]}", ok=False, remedy=remedy)
        for name, version in versions.items()
        if not _fits(name, version)
        for remedy in [install(wanted[name])]
    ]
    for (setting, value), (package, extra) in EXTRAS.items():
        if recipe is not None and getattr(recipe, setting) == value and _version(package) is None:
            text = f"{setting}={value} needs {package}, which is not installed"
            found.append(Finding("packages", text, ok=False, remedy=install_extra(extra)))
    shown = ("torch", "diffusers", "transformers", "peft", "open-clip-torch")
    return [Finding("packages", ", ".join(f"{name} {versions.get(name) or 'missing'}" for name in shown)), *found]


def _requirements() -> list[tuple[str, str]]:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    every = [Requirement(text) for text in requirements()]
    return [(canonicalize_name(needed.name), str(needed.specifier)) for needed in every if needed.marker is None]


def _fits(name: str, version: str | None) -> bool:
    from packaging.specifiers import SpecifierSet

    return version is not None and SpecifierSet(dict(_requirements())[name]).contains(version, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def weights(needs: list[Need], given: Sequence[str]) -> list[Finding]:
    """Each file or repository the recipe loads, and the line that gets it."""
    if not needs:
        return [Finding("weights", "nothing to fetch: everything ships with sdo")]
    found = []
    for need in needs:
        what = f"{need.what}: {need.source}"
        if need.present:
            found.append(Finding("weights", f"{what} is here"))
            continue
        remedy = "check the path" if need.is_local else sdo("fetch", *given)
        size = "no such path" if need.is_local else f"missing, {size_text(need.size)}, licence {need.licence or '?'}"
        found.append(Finding("weights", f"{what} {size}", ok=False, remedy=remedy))
    return found


def disk(folder: str, needs: list[Need]) -> Finding:
    """Room for what has to be downloaded (published sizes), and what is free where the run is written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    missing = sum(need.size for need in needs if not need.present)
    cache, runs = _free(Path(HF_HUB_CACHE)), _free(Path(folder))
    text = f"{size_text(runs)} free for {folder}/, {size_text(cache)} for downloads"
    if missing > cache:
        text += f", which need about {size_text(missing)}"
        return Finding("disk", text, ok=False, remedy="set HF_HOME to a folder on a larger disk")
    return Finding("disk", text)


def _free(path: Path) -> int:
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


def driver(recipe: Recipe | None = None) -> list[Finding]:
    """The GPU as torch sees it; none is no fault."""
    import torch

    nvidia = Path("/proc/driver/nvidia/version")
    if not torch.cuda.is_available():
        if nvidia.exists():
            text = f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it"
            return [Finding("driver", text, ok=False, remedy="install a torch build for CUDA that fits the driver")]
        return [Finding("driver", "no GPU: sdo runs on the CPU, which suits the embedded model only")]
    version = nvidia.read_text().split("Kernel Module")[-1].split()[0] if nvidia.exists() else "?"
    text = f"{torch.cuda.get_device_name(0)}, driver {version}, CUDA {torch.version.cuda}"
    found = [Finding("driver", text)]
    if recipe is not None and recipe.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported():
        found.append(Finding("driver", "this GPU has no bf16", ok=False, remedy="set mixed_precision=fp16"))
    return found


def named_gpu(recipe: Recipe, target: Target) -> list[Finding]:
    """What of the recipe the GPU that the user names cannot do."""
    if target.half == "bf16":
        return []
    asked = [name for name in ("mixed_precision", "reward_precision") if getattr(recipe, name) == "bf16"]
    remedy = " ".join(f"{name}=fp16" for name in asked)
    return [Finding("driver", f"a {target.name} has no bf16", ok=False, remedy=f"set {remedy}")] if asked else []


def usable() -> Finding:
    """Of the CPU, and how many threads torch computes with."""
    import torch

    every, ours = os.cpu_count() or 1, cores()
    text = f"{every} core{'s' * (every != 1)}"
    if ours < every:
        text += f", {ours} of them for this process (affinity or quota)"
    return Finding("cores", f"{text}; torch computes in {torch.get_num_threads()} threads")


def world() -> Finding:
    """How many processes and GPUs there are."""
    import torch

    size, gpus = os.environ.get("WORLD_SIZE", "1"), torch.cuda.device_count()
    note = f"; {sdo('finetune', '--gpus', gpus)} uses all of them" if gpus > 1 and size == "1" else ""
    return Finding("world", f"world size {size}, {gpus} GPU{'' if gpus == 1 else 's'}{note}")
