"""The files of a diffusers pipeline's folder: what is a part's weights, and what is wrong when they are not there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# sdo has no use for them
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def parts_of(index: Mapping[str, Any], *, t5: bool = True) -> list[str]:
    """The parts of ``model_index.json`` that sdo loads."""
    left_out = UNUSED if t5 else (*UNUSED, "text_encoder_3", "tokenizer_3")
    return [part for part, value in index.items() if isinstance(value, list) and value[0] and part not in left_out]


def has_weights(part: str) -> bool:
    return part != "scheduler" and not part.startswith("tokenizer")


def weights_of(files: list[str], variant: str | None) -> list[str]:
    """The weights among the files of one part: of this variant, else the plain ones; empty if a piece is missing."""
    named = re.compile(rf"\.{variant}[.-]" if variant else r"^(?!.*\.fp16[.-])")
    weights = [name for name in files if name.endswith(".safetensors") and named.search(name)]
    pieces = [found for name in weights if (found := re.search(r"-(\d{5})-of-(\d{5})", name))]
    if pieces and len({found[1] for found in pieces}) != int(pieces[0][2]):
        weights = []
    # diffusers takes the plain file where a part has none of the variant
    return weights if weights or not variant else weights_of(files, None)


def what_is_missing(folder: Path, index: Mapping[str, Any], variant: str | None, *, t5: bool) -> tuple[str, str] | None:
    """What is wrong with the files of a local pipeline, and the remedy; None when all is there."""
    for part in parts_of(index, t5=t5):
        files = [path.name for path in (folder / part).glob("*")]
        if not files:
            if part.endswith("_3"):
                return (
                    f"{folder} has no {part}",
                    "leave SD 3's third encoder out: t5: false (--no-t5), or copy the folder",
                )
            return f"{folder} has no folder {part}, which its model_index.json names", "copy the whole pipeline"
        if not has_weights(part) or weights_of(files, variant):
            continue
        place = f"{folder / part} holds no weights"
        if part.endswith("_3"):
            return place, "leave SD 3's third encoder out: t5: false (--no-t5), or copy the files"
        if variant is None and weights_of(files, "fp16"):
            return f"{place} but in fp16", "write variant: fp16 (--variant fp16)"
        if any(name.endswith((".bin", ".ckpt")) for name in files):
            return (
                f"{place} as .safetensors, only as pickles, which can run any code",
                "save the pipeline with diffusers' save_pretrained, which writes .safetensors",
            )
        return place, "copy the files again: pieces may be missing"
    return None
