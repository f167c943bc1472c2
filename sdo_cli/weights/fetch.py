"""Downloads what a recipe needs."""

import json
from collections.abc import Iterator

from sdo_cli.hub import MissingWeights, WeightFile, download, is_offline, remedy_for, why_not
from sdo_cli.models.catalog import MODELS
from sdo_cli.weights.needs import Need

# parts of a pipeline sdo has no use for
UNUSED = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
# other forms of the same weights, for other programs
NEVER = ("*non_ema*", "*openvino*", "*flax*", "*.bin", "*.ckpt", "*.onnx*", "*.msgpack", "*.pt", "*.xml", "*.gguf")


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
                remedy="unset it, or run sdo fetch where there is a network",
            )
        if need.file is not None:
            download(need.file)
        else:
            _snapshot(need, variant, t5=t5)
        yield need


def _snapshot(need: Need, variant: str | None, *, t5: bool) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            need.source,
            revision=need.revision,
            allow_patterns=_wanted(need, variant, t5=t5),
            ignore_patterns=[*NEVER, *([] if variant else ["*.fp16[.-]*"])],
        )
    except MissingWeights:
        raise
    # a network can fail in any way
    except Exception as fault:
        page = " (gated)" if (known := MODELS.get(need.source)) and known.gated else ""
        raise MissingWeights(why_not(need.source + page, fault), remedy=remedy_for(fault)) from fault


def _wanted(need: Need, variant: str | None, *, t5: bool) -> list[str]:
    """Files of the parts that ``model_index.json`` names: repositories hold the same weights in many other forms."""
    if need.what == "vae":
        return ["config.json", "diffusion_pytorch_model.safetensors"]
    index = json.loads(download(WeightFile(need.source, "model_index.json", 0, "", need.revision)).read_text())
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] and name not in UNUSED]
    kind = f".{variant}" if variant else ""
    # large parts come in pieces: model-00001-of-00002, with the variant before or behind
    names = [f"*{kind}.safetensors", f"*{kind}-?????-of-?????.safetensors", f"*-?????-of-?????{kind}.safetensors"]
    names += ["*.json", "*.txt", "*.model"]
    return ["model_index.json", *(f"{part}/{name}" for part in parts if t5 or part[-2:] != "_3" for name in names)]
