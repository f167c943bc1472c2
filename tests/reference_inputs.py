"""Images, prompts and random weights that a reference environment and the tests make alike, from names alone."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PROMPTS = [
    f"{how} {what} {where}"
    for how in ("a photo of a", "an oil painting of a", "a blurry", "two")
    for what in ("cat", "red bus", "mountain, snow", "child's drawing")
    for where in ("on a table", "at night, highly detailed, 4k")
]
CLIP_SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 56, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3},
}
MPS_SMALL = {"width": 32, "layers": 2, "heads": 2, "wider": 128}
# diffusers' UNet and CLIP text encoders of the latent rewards
LRM_UNET = {
    "lrm-1.5": {
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
    },
    "lrm-xl": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32 + 48,
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "norm_num_groups": 8,
        "sample_size": 16,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
}
LRM_TEXT = {
    "text_encoder": {"hidden_size": 32, "num_attention_heads": 4, "hidden_act": "quick_gelu", "projection_dim": 32},
    "text_encoder_2": {"hidden_size": 48, "num_attention_heads": 4, "hidden_act": "gelu", "projection_dim": 48},
}
for _settings in LRM_TEXT.values():
    _settings |= {"intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 49408, "eos_token_id": 2}
# options of the reward mps-v1; states of random weights are alike, so that the authors' threshold leaves out none
MPS_CASES = {"overall": {}, "near": {"threshold": 0.8}, "aspects": {"condition": "light, color", "threshold": 0.8}}
BLIP_VISION = {"img_size": 48, "patch_size": 16, "embed_dim": 128, "depth": 3, "num_heads": 2}
BLIP_TEXT = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 160,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "add_cross_attention": True,
}


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def pictures() -> list[Image.Image]:
    """One PIL image per prompt, smooth, of several sizes and shapes."""
    sizes = [(96, 96), (128, 80), (60, 120), (224, 224)]
    images = []
    for j in range(len(PROMPTS)):
        small = generator(f"picture {j}").integers(0, 256, (6, 6, 3), dtype=np.uint8)
        images.append(Image.fromarray(small).resize(sizes[j % len(sizes)], Image.Resampling.BICUBIC))
    return images


def latent_of(j: int) -> torch.Tensor:
    """``[4, 16, 16]`` for prompt j."""
    drawn = generator(f"latent {j}").standard_normal((4, 16, 16), dtype=np.float32)
    return torch.from_numpy(np.asarray(drawn))


def linear_of(name: str, outputs: int, inputs: int) -> torch.Tensor:
    return random_state({"weight": torch.zeros(outputs, inputs)}, f"{name}.")["weight"]


def random_state(like: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights for every entry, drawn from its name: enough spread that scores differ from image to image."""
    state = {}
    for name, value in like.items():
        if not value.is_floating_point():
            state[name] = value
            continue
        drawn = generator(prefix + name).standard_normal(tuple(value.shape), dtype=np.float32)
        fan = value.shape[-1] if value.dim() == 2 else int(np.prod(value.shape[1:])) if value.dim() > 2 else 0
        is_norm = value.dim() == 1 and name.endswith("weight")
        scale = 1.0 / np.sqrt(fan) if fan else 0.1
        state[name] = torch.from_numpy(np.asarray(drawn * np.float32(scale) + np.float32(1.0 if is_norm else 0.0)))
    return state


def random_text(like: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Of a CLIP text encoder, whose names older and newer libraries begin otherwise."""
    bare = {name: name.removeprefix("text_model.") for name in like}
    state = random_state({bare[name]: value for name, value in like.items()}, f"{prefix}.")
    return {name: state[bare[name]] for name in like}


def write_bert_words(folder: Path) -> None:
    """A tiny vocabulary in BERT's file format: marks, letters and a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), ",", "'", "4"]
    words += ["photo", "painting", "cat", "bus", "table", "night", "of", "on", "the"]
    words += [f"[unused{i}]" for i in range(120 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
