"""Downloads what a recipe needs."""

import json
from collections.abc import Iterator

from sdo_cli.hub import MissingWeights, WeightFile, download, is_offline, remedy_for, why_not
from sdo_cli.installed import sdo
from sdo_cli.models.catalog import MODELS
from sdo_cli.models.folder import weights_of
from sdo_cli.weights.needs import Need

# parts of a pipeline sdo has no use for
UNUSED = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
# other forms of the same weights, for other programs
NEVER = ("non_ema", "openvino", "flax", "onnx")


def fetch(needs: list[Need], *, variant: str | None, t5: bool) -> Iterator[Need]:
    """Download the missing ones, one after the other; yields each when it is whole.

    Raises:
        MissingWeights: offline, a path nobody can fetch, or what the hub said, in one sentence.
    """
    for need in needs:
        if need.present:
            continue
        if need.is_local:
            raise MissingWeights(f"{need.source} is a path, which cannot be fetched", remedy="copy it there by hand")
        if is_offline():
            raise MissingWeights(
                "HF_HUB_OFFLINE is set: nothing is fetched",
                remedy=f"unset it, or run {sdo('fetch')} where there is a network",
            )
        if need.file is not None:
            download(need.file)
        else:
            _snapshot(need, variant, t5=t5)
        yield need


def _snapshot(need: Need, variant: str | None, *, t5: bool) -> None:
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().list_repo_files(need.source, revision=need.revision)
        snapshot_download(need.source, revision=need.revision, allow_patterns=_wanted(need, files, variant, t5=t5))
    except MissingWeights:
        raise
    # a network can fail in any way
    except Exception as fault:
        page = " (gated)" if (known := MODELS.get(need.source)) and known.gated else ""
        raise MissingWeights(why_not(need.source + page, fault), remedy=remedy_for(fault)) from fault


def _wanted(need: Need, files: list[str], variant: str | None, *, t5: bool) -> list[str]:
    """Files of the parts that ``model_index.json`` names: repositories hold the same weights in many other forms.

    Raises:
        MissingWeights: a part that the repository has no safetensors for.
    """
    if need.what in ("vae", "tiny decoder"):
        return ["config.json", *_weights(need.what, [name for name in files if "/" not in name], None, need)]
    index = json.loads(download(WeightFile(need.source, "model_index.json", 0, "", need.revision)).read_text())
    if variant and not any(f".{variant}" in name for name in files):
        raise MissingWeights(
            f"the hub's {need.source} has no {variant} files", remedy="leave variant out of the recipe"
        )
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] and name not in UNUSED]
    wanted = ["model_index.json"]
    for part in parts:
        if part.endswith("_3") and not t5:
            continue
        inside = [name for name in files if name.startswith(f"{part}/")]
        wanted += [name for name in inside if name.endswith((".json", ".txt", ".model"))]
        if part != "scheduler" and not part.startswith("tokenizer"):
            wanted += _weights(part, inside, variant, need)
    return wanted


def _weights(part: str, files: list[str], variant: str | None, need: Need) -> list[str]:
    plain = [name for name in files if not any(word in name for word in NEVER)]
    if not (found := weights_of(plain, variant)):
        raise MissingWeights(
            f"the hub's {need.source} has no whole safetensors weights for {part}",
            remedy="name another repository or revision; sdo reads safetensors only",
        )
    return found
