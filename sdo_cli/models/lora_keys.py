"""What a key of a LoRA file says: which layer, and which part of it. Every program spells it its own way."""

import re
from dataclasses import dataclass

# endings of a pair's halves and of what belongs to it, with the adapter's name where peft writes one
_ENDINGS = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"\.lora_A(?:\.(?P<adapter>[\w-]+))?\.weight", "down"),
        (r"\.lora_B(?:\.(?P<adapter>[\w-]+))?\.weight", "up"),
        (r"\.(?:lora_down|lora\.down|lora_linear_layer\.down)\.weight", "down"),
        (r"\.(?:lora_up|lora\.up|lora_linear_layer\.up)\.weight", "up"),
        (r"\.lora_magnitude_vector(?:\.(?P<adapter>[\w-]+))?(?:\.weight)?", "magnitude"),
        (r"\.dora_scale", "magnitude"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.alpha", "alpha"),
    )
)
# attention processors of diffusers up to 0.18: the layer's name is part of the key
_PROCESSOR = re.compile(r"(?P<stem>.*?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<half>down|up)\.weight")

# adapters of other kinds, by what stands in their keys; the first that fits
KINDS = (
    (r"\bhada_w", "LoHa (LyCORIS)"),
    (r"\blokr_w", "LoKr (LyCORIS)"),
    (r"\boft_|\boft_blocks|\brescale$", "OFT"),
    (r"\bon_input$", "IA3 (LyCORIS)"),
    (r"\b[ab][12]\.weight$", "GLoRA (LyCORIS)"),
    (r"vera_lambda", "VeRA"),
    (r"^bundle_emb\b|string_to_param|^emb_params$|^clip_[lg]$", "a file with textual-inversion embeddings"),
    (r"\.(diff|diff_b|w_norm|b_norm|reshape_weight|set_weight)$", "a LoRA with whole weights beside it"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.", "a whole checkpoint"),
    (r"control_model|controlnet", "a ControlNet"),
)


@dataclass(frozen=True)
class Piece:
    """Attributes:
    name: the layer as the file names it, with its prefix, dots or underscores.
    role: ``down``, ``up``, ``mid``, ``magnitude`` (DoRA) or ``alpha``.
    adapter: peft's name of the adapter, where the key holds one.
    """

    name: str
    role: str
    adapter: str = ""


def parse(key: str) -> Piece | None:
    """What a key is of; None for none of a LoRA's."""
    if (found := _PROCESSOR.fullmatch(key)) is not None:
        text = found["stem"].startswith("text_encoder")
        last = "out_proj" if text else "to_out.0"
        which = last if found["which"] == "out" else f"{found['which']}_proj" if text else f"to_{found['which']}"
        return Piece(cleaned(f"{found['stem']}.{which}"), found["half"])
    for ending, role in _ENDINGS:
        for match in ending.finditer(key):
            if match.end() == len(key) and match.start():
                return Piece(cleaned(key[: match.start()]), role, match.groupdict().get("adapter") or "")
    return None


def cleaned(name: str) -> str:
    """Without what peft, torch.compile and data parallelism wrap a network in."""
    return name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("base_model.model.")


def kind_of(keys: list[str]) -> str:
    """What else a file is, by the keys that are none of a LoRA's; empty when that is not known."""
    for pattern, kind in KINDS:
        if any(re.search(pattern, key) for key in keys):
            return kind
    return ""
