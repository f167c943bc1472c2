"""From a name to a model family."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault

if TYPE_CHECKING:
    from sdo_cli.models.base import Family

# pipeline class in model_index.json -> family
PIPELINES = {"StableDiffusionPipeline": "sd"}


def locate(model: str) -> str:
    """Folder or hub id behind ``model`` (``embedded``, a path, a hub id).

    Raises:
        EnvironmentFault: a path that holds no diffusers model.
    """
    if embedded.is_embedded(model):
        try:
            path = embedded.folder(model, default="emoji")
        except KeyError as fault:
            raise EnvironmentFault(str(fault.args[0]), remedy="write `embedded`") from fault
    else:
        path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise EnvironmentFault(
                f"{model} is a folder without model_index.json", remedy="give the folder of a diffusers pipeline"
            )
        return str(path)
    if model.startswith((".", "/", "~")) or path.suffix or model.count("/") != 1:
        raise EnvironmentFault(
            f"no model at {model}", remedy="give `embedded`, the folder of a diffusers pipeline, or a hub id"
        )
    return model


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Loading takes a second; sdo shows its own progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in libraries:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in libraries:
            module.enable_progress_bar()


def load_family(model: str, *, revision: str | None = None) -> "Family":
    """Load every part of ``model`` in fp32 on the CPU.

    Raises:
        EnvironmentFault: not found, not reachable, or a pipeline no family serves.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    from sdo_cli.models.sd import StableDiffusion

    source = locate(model)
    try:
        if Path(source).is_dir():
            index = json.loads((Path(source) / "model_index.json").read_text())
        else:
            index = DiffusionPipeline.load_config(source, revision=revision)
        kind = index.get("_class_name") if isinstance(index, dict) else None
        if kind not in PIPELINES:
            raise EnvironmentFault(
                f"{model} is a {kind}, which no model family serves yet",
                remedy=f"use a model of one of: {', '.join(PIPELINES)}",
            )
        with _no_loading_bars():
            pipeline = StableDiffusionPipeline.from_pretrained(
                source, revision=revision, safety_checker=None, requires_safety_checker=False
            )
    except (OSError, ValueError) as fault:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise EnvironmentFault(
            f"cannot load {model}{offline}: {str(fault).strip().splitlines()[0]}",
            remedy="download it on a machine with network, or try the same job with `model=embedded`",
        ) from fault
    return StableDiffusion(pipeline, source=model)
