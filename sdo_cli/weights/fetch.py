"""Downloads what a recipe needs."""

from collections.abc import Iterator

from sdo_cli.hub import MissingWeights, download, is_offline, remedy_for, why_not
from sdo_cli.models.catalog import MODELS
from sdo_cli.weights.needs import Need

# parts of a pipeline sdo has no use for, and the forms of weights it never reads
SKIP = ("safety_checker/*", "feature_extractor/*", "image_encoder/*", "*.bin", "*.ckpt", "*.onnx*", "*.msgpack", "*.pt")
NEVER = ("*non_ema*", "*openvino*", "*flax*")


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
            # weights lie in the parts' folders; what lies at the top is the same in one file
            allow_patterns=["model_index.json", "config.json", "*/*.json", "*/*.txt", "*/*.model", *_weights(variant)],
            ignore_patterns=[*SKIP, *NEVER, *([] if variant else ["*.fp16.*"]), *([] if t5 else ["*_3/*"])],
        )
    # a network can fail in any way
    except Exception as fault:
        page = " (gated)" if (known := MODELS.get(need.source)) and known.gated else ""
        raise MissingWeights(why_not(need.source + page, fault), remedy=remedy_for(fault)) from fault


def _weights(variant: str | None) -> list[str]:
    kind = f".{variant}" if variant else ""
    # large parts come in pieces: model-00001-of-00002, with the variant before or behind
    pieces = [f"*/*{kind}-?????-of-?????.safetensors", f"*/*-?????-of-?????{kind}.safetensors"]
    return [f"*/*{kind}.safetensors", "diffusion_pytorch_model.safetensors", *pieces]
