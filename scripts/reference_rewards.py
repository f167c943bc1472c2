"""Scores of the reference implementations on random weights, kept as tests/fixtures/reference_rewards.json.

The packages (hpsv2x, image-reward, cyclereward) pin old versions, so they run in an environment of their own; MPS and
LRM (LPO) are no packages, only repositories:

    python3 -m venv /tmp/reference
    /tmp/reference/bin/pip install --no-deps hpsv2x image-reward cyclereward einops clint args fairscale timm==0.6.13 \
        transformers==4.36.2 tokenizers==0.15.2 'huggingface_hub<1' numpy
    git clone https://github.com/Kwai-Kolors/MPS /tmp/reference/MPS
    git clone https://github.com/Kwai-Kolors/LPO /tmp/reference/LPO
    echo <this project's venv>/lib/python3.11/site-packages > /tmp/reference/lib/python3.11/site-packages/torch.pth
    /tmp/reference/bin/python scripts/reference_rewards.py --mps /tmp/reference/MPS --lpo /tmp/reference/LPO [--full]

The last but one line lends it this project's torch, which it finds after its own packages. Weights and images come from
numpy generators seeded by name, so that the tests build the same ones without any file.
"""

import argparse
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from reference_inputs import (  # noqa: E402
    BLIP_TEXT,
    BLIP_VISION,
    CLIP_SMALL,
    LRM_TEXT,
    LRM_UNET,
    MPS_CASES,
    MPS_SMALL,
    PROMPTS,
    latent_of,
    linear_of,
    pictures,
    random_state,
    random_text,
    write_bert_words,
)

OUT = ROOT / "tests" / "fixtures" / "reference_rewards.json"
PACKAGES = {"hps", "imagereward"}


def hps(full: bool) -> dict[str, list[float]]:
    """The package's own model class, transform and tokenizer; scores as its ``score`` computes them, in fp32."""
    import hpsv2.src.open_clip.factory as factory
    from hpsv2.src.open_clip import get_tokenizer
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.transform import image_transform

    config = factory.get_model_config("ViT-H-14") if full else CLIP_SMALL
    model = CLIP(**config, output_dict=True).eval()
    model.load_state_dict(random_state(model.state_dict()))
    transform = image_transform(model.visual.image_size, is_train=False, resize_longest_max=True)
    tokenize = get_tokenizer("ViT-H-14")
    found: dict[str, list] = {"score": [], "embedding": []}
    with torch.no_grad():
        for image, prompt in zip(pictures(), PROMPTS, strict=True):
            out = model(transform(image)[None], tokenize([prompt]))
            found["score"].append((out["image_features"] @ out["text_features"].T).item())
            found["embedding"].append(out["image_features"][0, :16].tolist())
    return found


def imagereward() -> dict[str, list[float]]:
    """The authors' BLIP code (visual encoder, BERT with cross attention) and the steps of their ``score``."""
    import ImageReward as package_root  # noqa: F401
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
    from transformers import BertTokenizer

    vision = VisionTransformer(**BLIP_VISION)
    text = BertModel(BertConfig(**BLIP_TEXT, encoder_width=BLIP_VISION["embed_dim"]), add_pooling_layer=False)
    layers = [
        torch.nn.Linear(a, b) for a, b in ((BLIP_TEXT["hidden_size"], 1024), (1024, 128), (128, 64), (64, 16), (16, 1))
    ]
    head = torch.nn.Sequential(
        layers[0], torch.nn.Identity(), layers[1], torch.nn.Identity(), layers[2], torch.nn.Identity(), *layers[3:]
    )
    for part, prefix in ((vision, "blip.visual_encoder."), (text, "blip.text_encoder."), (head, "mlp.layers.")):
        part.eval().load_state_dict(random_state(part.state_dict(), prefix))
    folder = Path("/tmp/bert-words")
    write_bert_words(folder)
    tokenizer = BertTokenizer.from_pretrained(str(folder))
    size = BLIP_VISION["img_size"]
    transform = Compose([
        Resize(size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size), ToTensor(),
        Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ])  # fmt: skip
    found: dict[str, list] = {"score": [], "embedding": []}
    with torch.no_grad():
        for image, prompt in zip(pictures(), PROMPTS, strict=True):
            tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
            seen = vision(transform(image)[None])
            read = text(
                tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long), return_dict=True,
            ).last_hidden_state[:, 0]  # fmt: skip
            found["score"].append(((head(read) - 0.16717362830052426) / 1.0333394966054072).item())
            found["embedding"].append(read[0, :16].tolist())
    return found


def cyclereward() -> dict[str, list[float]]:
    """The package's BLIP, head and transform, and the steps of its ``score``."""
    from cyclereward.blip.med import BertConfig, BertModel
    from cyclereward.blip.vit import VisionTransformer
    from cyclereward.model import MLP, _transform
    from transformers import BertTokenizer

    vision = VisionTransformer(**BLIP_VISION)
    text = BertModel(BertConfig(**BLIP_TEXT, encoder_width=BLIP_VISION["embed_dim"]), add_pooling_layer=False)
    head = MLP(BLIP_TEXT["hidden_size"])
    for part, prefix in ((vision, "blip.visual_encoder."), (text, "blip.text_encoder."), (head, "mlp.")):
        part.eval().load_state_dict(random_state(part.state_dict(), prefix))
    folder = Path("/tmp/bert-words")
    write_bert_words(folder)
    tokenizer, transform = BertTokenizer.from_pretrained(str(folder)), _transform(BLIP_VISION["img_size"])
    found: dict[str, list] = {"score": [], "embedding": []}
    with torch.no_grad():
        for image, prompt in zip(pictures(), PROMPTS, strict=True):
            tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=128, return_tensors="pt")
            seen = vision(transform(image)[None])
            read = text(
                tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long), return_dict=True,
            ).last_hidden_state[:, 0]  # fmt: skip
            found["score"].append(head(read).item())
            found["embedding"].append(read[0, :16].tolist())
    return found


def mps(repository: Path, condition: str = "", threshold: float = 0.3) -> dict[str, list[float]]:
    """The repository's classes, and the steps of its evaluations, in fp32 (the authors' run in fp16)."""
    sys.path[:0] = [str(repository), str(ROOT)]
    from trainer.models.clip_model import XCLIPModel
    from trainer.models.cross_modeling import Cross_model
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizer

    from sdo_cli.models.clip_vocabulary import write_clip_tokenizer

    source = (repository / "eval_overall_mps_on_hpdv2.py").read_text()
    words = condition or re.search(r'condition = "(light[^"]*)"', source).group(1)
    vision, text = CLIP_SMALL["vision_cfg"], CLIP_SMALL["text_cfg"]
    net = XCLIPModel(CLIPConfig(
        projection_dim=CLIP_SMALL["embed_dim"],
        vision_config={
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "hidden_act": "gelu",
            "num_hidden_layers": vision["layers"], "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"], "patch_size": vision["patch_size"],
        },
        text_config={
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"], "hidden_act": "gelu",
            "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"], "vocab_size": 49408,
        },
    )).eval()  # fmt: skip
    net.load_state_dict(random_state(net.state_dict()))
    sizes = {"dim": MPS_SMALL["width"], "layer_num": MPS_SMALL["layers"], "heads": MPS_SMALL["heads"]}
    cross = Cross_model(**sizes, ff_mult=MPS_SMALL["wider"] // MPS_SMALL["width"]).eval()
    # what is no parameter stays as it is made
    drawn = random_state(dict(cross.named_parameters()), "cross_model.")
    cross.load_state_dict(cross.state_dict() | drawn)
    side = vision["image_size"]
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    write_clip_tokenizer(Path("/tmp/clip-words"))
    tokenizer = CLIPTokenizer.from_pretrained("/tmp/clip-words")

    def ids(prompt: str) -> torch.Tensor:
        return tokenizer(prompt, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids

    found: dict[str, list] = {"score": [], "embedding": [], "kept": []}
    with torch.no_grad():
        for image, prompt in zip(pictures(), PROMPTS, strict=True):
            read, end = net.get_text_features(ids(prompt))
            seen = net.get_image_features(processor(image, return_tensors="pt")["pixel_values"])
            likeness = torch.einsum("b i d, b j d -> b j i", read, net.get_text_features(ids(words))[0])
            likeness = likeness.max(dim=1, keepdim=True)[0]
            mask = torch.where(likeness / likeness.max() > threshold, 0.0, float("-inf"))
            looked = cross(seen, read, mask.repeat(1, seen.shape[1], 1))[:, 0]
            found["score"].append((net.logit_scale.exp() * torch.cosine_similarity(end, looked)).item())
            found["embedding"].append(looked[0, :16].tolist())
            found["kept"].append(int((mask == 0).sum()))
    return found


def lrm(version: str, repository: Path) -> dict[str, list[float]]:
    """The repository's model and ``get_preference_score``, at the authors' last timestep; only widths are others."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from sdo_cli.models.clip_vocabulary import write_clip_tokenizer

    package = types.ModuleType("lrm_models")
    package.__path__ = [str(repository / "lpo" / "lpo" / "preference_models" / "models")]
    sys.modules["lrm_models"] = package
    folder, names = Path("/tmp/lrm-small") / version, list(LRM_TEXT) if version == "lrm-xl" else list(LRM_TEXT)[:1]
    unet = UNet2DConditionModel(**LRM_UNET[version])
    unet.load_state_dict(random_state(unet.state_dict(), "unet."))
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(8,) * 4, norm_num_groups=4)  # fmt: skip
    for part, name in ((unet, "unet"), (vae, "vae"), (DDPMScheduler(), "scheduler")):
        part.save_pretrained(folder / name)
    for name in names:
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        encoder = kind(CLIPTextConfig(**LRM_TEXT[name]))
        encoder.load_state_dict(random_text(encoder.state_dict(), name))
        encoder.save_pretrained(folder / name)
        # OpenCLIP's encoder is given texts filled up with another word
        filler = {"pad_token": "!"} if name == "text_encoder_2" else {}
        write_clip_tokenizer(folder / name.replace("text_encoder", "tokenizer"), **filler)
    width, channels = LRM_TEXT[names[-1]]["hidden_size"], LRM_UNET[version]["block_out_channels"]
    place = {"pretrained_model_name_or_path": str(folder), "ft_model_path": None}
    if version == "lrm-1.5":
        from lrm_models.sd15_preference_model import SD15PreferenceModel, SD15PreferenceModelConfig

        torch.save({"text_projection.weight": linear_of("text_projection", width, width)}, folder / "clip.bin")
        config = SD15PreferenceModelConfig(**place, clip_ckpt_path=str(folder / "clip.bin"))
        model = SD15PreferenceModel(config)
    else:
        from lrm_models.sdxl_base_preference_model import SDXLBasePreferenceModel, SDXLBasePreferenceModelConfig

        config = SDXLBasePreferenceModelConfig(**place, pretrained_vae_name_or_path=str(folder / "vae"))
        model = SDXLBasePreferenceModel(config)
    features = linear_of("visual_projection", width, sum(channels) + channels[-1])
    model.visual_projection = torch.nn.Linear(features.shape[1], width, bias=False)
    model.visual_projection.weight.data = features
    model.eval()
    found: dict[str, list] = {"score": []}
    for j, prompt in enumerate(PROMPTS):
        ids = model.encode_prompt(prompt)
        given = (ids,) if version == "lrm-1.5" else ids
        found["score"].append(model.get_preference_score(latent_of(j)[None], *given, torch.ones(1).long()).item())
    return found


def bare_package(name: str) -> None:
    """Import a package's modules without running its ``__init__``, which wants a GPU's worth of others."""
    for place in sys.path:
        folder = Path(place).joinpath(*name.split("."))
        if folder.is_dir():
            module = types.ModuleType(name)
            module.__path__ = [str(folder)]
            sys.modules[name] = module
            return
    raise SystemExit(f"{name} is not installed here: see the top of this file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also ViT-H/14 at full size (8 GB of memory)")
    parser.add_argument("--only", choices=["hps", "imagereward", "cyclereward", "mps", "lrm"])
    parser.add_argument("--mps", type=Path, help="MPS's repository")
    parser.add_argument("--lpo", type=Path, help="LPO's repository")
    chosen = parser.parse_args()
    # the table goes on being asked for what is not made anew
    wanted = {chosen.only} if chosen.only else {"hps", "imagereward", "cyclereward", "mps", "lrm"}
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in ("hpsv2", "ImageReward", "ImageReward.models", "ImageReward.models.BLIP") if wanted & PACKAGES else ():
        bare_package(name)
    if "hps" in wanted:
        table["hps"] = hps(full=False)
        if chosen.full:
            table["hps-full"] = hps(full=True)
    if "imagereward" in wanted:
        table["imagereward"] = imagereward()
    if "cyclereward" in wanted:
        table["cyclereward"] = cyclereward()
    if "mps" in wanted:
        if chosen.mps is None:
            raise SystemExit("name MPS's repository with --mps: see the top of this file")
        table |= {f"mps-{case}": mps(chosen.mps, **options) for case, options in MPS_CASES.items()}
    if "lrm" in wanted:
        if chosen.lpo is None:
            raise SystemExit("name LPO's repository with --lpo: see the top of this file")
        sys.path.insert(0, str(ROOT))
        table |= {version: lrm(version, chosen.lpo) for version in LRM_UNET}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(table) + "\n")
    for name, values in table.items():
        print(name, np.mean(values["score"]), "±", np.std(values["score"]))


if __name__ == "__main__":
    main()
