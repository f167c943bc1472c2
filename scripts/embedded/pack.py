"""Stage ``pack``: trained states to the files that ship, in the layouts diffusers and open_clip read."""

import json
import shutil
from pathlib import Path

import open_clip
import torch
from diffusers import StableDiffusionPipeline
from embedded.clip import model_config, write_clip
from embedded.unet import TextToImage, make_scheduler
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from rewards.aesthetic import predictor_head

WEIGHTS = Path(__file__).parent.parent.parent / "sdo_cli" / "embedded" / "weights"


def averaged(model: torch.nn.Module, work: Path, stage: str) -> torch.nn.Module:
    state = torch.load(work / f"{stage}.pt", weights_only=True)
    model.load_state_dict(state["model"] | state["averaged"])
    return model.eval()


def pack(vae: torch.nn.Module, tokenizer: CLIPTokenizer, work: Path) -> None:
    latents = torch.load(work / "pool.pt", weights_only=True)[0]
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())
    model = averaged(TextToImage(tokenizer), work, "unet")
    emoji = WEIGHTS / "emoji"
    shutil.rmtree(emoji, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model.text.half(),
        tokenizer=tokenizer,
        unet=model.unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(emoji)
    # transformers 5 would keep the text encoder in half precision unless its config says otherwise
    config = json.loads((emoji / "text_encoder" / "config.json").read_text())
    config.pop("torch_dtype", None)
    (emoji / "text_encoder" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(work / "tokenizer" / name, emoji / "tokenizer" / name)
    (emoji / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)

    for name in ("clip", "judge"):
        if (work / f"{name}.pt").exists():
            net = averaged(open_clip.CLIP(**model_config(name, len(tokenizer))), work, name)
            write_clip(name, net, tokenizer, WEIGHTS / name)
            for part in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
                shutil.copy(work / "tokenizer" / part, WEIGHTS / name / part)
    if (work / "aesthetic.pt").exists():
        head = averaged(predictor_head(64), work, "aesthetic")
        (WEIGHTS / "aesthetic").mkdir(parents=True, exist_ok=True)
        save_file({k: v.half() for k, v in head.state_dict().items()}, WEIGHTS / "aesthetic" / "head.safetensors")
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    print(f"{WEIGHTS}: {total / 1e6:.1f} MB")
