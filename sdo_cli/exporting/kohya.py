"""What sd-scripts notes in a LoRA file, and which family a file belongs to."""

from sdo_cli.models.lora_files import Layers

ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
}
SGM = "https://github.com/Stability-AI/generative-models"


def kohya_metadata(layers: Layers, version: str, *, model: str, title: str) -> dict[str, str]:
    """The keys A1111 and ComfyUI look at (sd-scripts, train_network.py and library/sai_model_spec.py).

    Args:
        version: a key of ARCHITECTURES.
    """
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one_or_dynamic([layer.rank for part in layers.values() for layer in part.values()]),
        "ss_network_alpha": _one_or_dynamic([layer.alpha for part in layers.values() for layer in part.values()]),
        "ss_base_model_version": version,
        # A1111 tells SD 2.x by this key
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_sd_model_name": model,
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{ARCHITECTURES[version]}/lora",
        "modelspec.implementation": SGM if version.startswith("sdxl") else "diffusers",
        "modelspec.title": title,
    }


def _one_or_dynamic(values: list[int] | list[float]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "Dynamic"


def base_version(layers: Layers, family: str, *, v_prediction: bool) -> str:
    """A key of ARCHITECTURES; SD 2.x by the width of its text embeddings, 1024."""
    if family != "sd":
        return {"sdxl": "sdxl_base_v1-0", "sd3": "sd3"}[family]
    if text_width(layers) != 1024:
        return "sd_v1"
    return "sd_v2_v" if v_prediction else "sd_v2"


def text_width(layers: Layers) -> int | None:
    """Features the UNet's cross attention reads: 768 (SD 1.x), 1024 (2.x), 2048 (SDXL)."""
    for module, layer in layers.get("unet", {}).items():
        if module.endswith(("attn2.to_k", "attn2.to_v")):
            return layer.down.shape[1]
    return None


def guess_family(layers: Layers) -> str | None:
    """The family a file was made for, None when it does not show."""
    if "transformer" in layers:
        return "sd3"
    if "text_encoder_2" in layers:
        return "sdxl"
    return {768: "sd", 1024: "sd", 2048: "sdxl"}.get(text_width(layers) or 0)
