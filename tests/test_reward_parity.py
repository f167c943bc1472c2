"""Every reward against its reference implementation: the same random weights, the same 32 PIL images.

transformers' CLIPModel stands beside clip-score, aesthetic-v2 and PickScore here; HPS, ImageReward, CycleReward and MPS
beside values of the packages hpsv2x, image-reward and cyclereward and of MPS's repository, made by
scripts/reference_rewards.py in an environment of its own.
"""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from reference_inputs import CLIP_SMALL, LRM_UNET, MPS_CASES, PROMPTS, latent_of, pictures, random_state
from safetensors.torch import save_file
from small_rewards import make_small_reward, small_hf_clip, write_open_clip
from torchvision.transforms.functional import to_tensor
from transformers import CLIPImageProcessorPil

import rewards
from rewards.aesthetic import predictor_head
from rewards.clip_encoder import ClipEncoder, evaluation_transform
from sdo_cli.errors import EnvironmentFault

SIGLIP_SMALL = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {"width": 48, "heads": 4, "layers": 2, "pool_type": "last", "no_causal_mask": True, "proj_bias": True},
}
REFERENCE = json.loads((Path(__file__).parent / "fixtures" / "reference_rewards.json").read_text())


def alone(score):
    """[32] of a function of one image in [0, 1] and its prompt; the images have several shapes."""
    with torch.no_grad():
        return torch.cat([score(to_tensor(i)[None], [p]).float() for i, p in zip(pictures(), PROMPTS, strict=True)])


def same_scores(ours, theirs):
    """To 1e-3 of the spread of scores over the images, and that spread is no rounding."""
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    assert theirs.std() > 1e-3 * theirs.abs().mean()
    assert (ours - theirs).abs().max() < 1e-3 * theirs.std() + 1e-7, (ours - theirs).abs().max() / theirs.std()


def same_embeddings(ours, theirs):
    assert F.cosine_similarity(ours, theirs, dim=-1).min() > 0.9999


def clip_to_transformers(state: dict, layers: dict) -> dict:
    """open_clip's names to those of ``transformers.CLIPModel``."""
    out = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms |= {"ln_final": "text_model.final_layer_norm"}
    for tower, prefix in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(layers[prefix]):
            old, new = f"{tower}.resblocks.{i}", f"{prefix}.encoder.layers.{i}"
            norms |= {f"{old}.ln_1": f"{new}.layer_norm1", f"{old}.ln_2": f"{new}.layer_norm2"}
            norms |= {f"{old}.attn.out_proj": f"{new}.self_attn.out_proj"}
            norms |= {f"{old}.mlp.c_fc": f"{new}.mlp.fc1", f"{old}.mlp.c_proj": f"{new}.mlp.fc2"}
            for kind in ("weight", "bias"):
                parts = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
                out |= {f"{new}.self_attn.{n}_proj.{kind}": p for n, p in zip("qkv", parts, strict=True)}
    for old, new in norms.items():
        out |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return out


def transformers_clip(encoder: ClipEncoder, act: str):
    """``CLIPModel`` with an encoder's weights."""
    net = small_hf_clip(act=act) if encoder.width == CLIP_SMALL["embed_dim"] else full_size_vit_l(act)
    layers = {"vision_model": len(encoder.net.visual.transformer.resblocks)}
    layers["text_model"] = len(encoder.net.transformer.resblocks)
    net.load_state_dict(clip_to_transformers(encoder.net.state_dict(), layers))
    return net


def full_size_vit_l(act):
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 14, "hidden_act": act}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text |= {"hidden_act": act, "bos_token_id": 49406, "eos_token_id": 49407}
    return CLIPModel(CLIPConfig(projection_dim=768, vision_config=vision, text_config=text)).eval()


def processed(net, image):
    """The processor's pixels, from the PIL image."""
    size = net.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(image, return_tensors="pt").pixel_values


@torch.no_grad()
def their_embeddings(net, tokenize):
    """Unit-length image and text embeddings ``[32, D]`` as transformers makes them."""
    seen, read = [], []
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        pooled = net.vision_model(pixel_values=processed(net, image)).pooler_output
        seen.append(F.normalize(net.visual_projection(pooled), dim=-1))
        pooled = net.text_model(input_ids=tokenize([prompt])).pooler_output
        read.append(F.normalize(net.text_projection(pooled), dim=-1))
    return torch.cat(seen), torch.cat(read)


def compare_with_transformers(reward, aesthetic_head=None):
    net = transformers_clip(reward.encoder, "quick_gelu")
    seen, read = their_embeddings(net, reward.encoder.tokenize)
    same_embeddings(alone(lambda image, prompt: reward.encoder.images(image)), seen)
    same_embeddings(alone(lambda image, prompt: reward.encoder.prompts(prompt)), read)
    if aesthetic_head is None:
        same_scores(alone(reward.score), (seen * read).sum(-1))
    else:
        with torch.no_grad():
            same_scores(alone(reward.score), aesthetic_head(seen).squeeze(-1))


def test_clip_score_is_transformers(tmp_path):
    compare_with_transformers(rewards.build("clip-score", make_small_reward("clip-score", tmp_path)))


def test_aesthetic_is_the_authors_mlp_on_transformers_clip(tmp_path):
    reward = rewards.build("aesthetic-v2", make_small_reward("aesthetic-v2", tmp_path))
    head = predictor_head(CLIP_SMALL["embed_dim"]).eval()
    head.load_state_dict(random_state(head.state_dict()))
    compare_with_transformers(reward, head)


@pytest.mark.slow
def test_clip_and_aesthetic_at_full_size(tmp_path):
    """ViT-L/14 with QuickGELU, random weights, as the published file is laid out."""
    config = open_clip.get_model_config("ViT-L-14")
    folder = write_open_clip(tmp_path / "l14", config, quick_gelu=True)
    torch.save(random_state(predictor_head(768).state_dict()), tmp_path / "head.pth")
    weights = str(folder / "open_clip_model.safetensors")
    options = {"model": "ViT-L-14-quickgelu", "pretrained": weights}
    compare_with_transformers(rewards.build("clip-score", options))
    reward = rewards.build("aesthetic-v2", options | {"head": str(tmp_path / "head.pth")})
    compare_with_transformers(reward, reward.head)


@pytest.mark.parametrize("end_of_text", [49407, 2])
def test_pickscore_is_transformers_as_its_authors_use_it(end_of_text, tmp_path):
    """Older files of CLIP name another token as the last one, on which transformers reads the text another way."""
    from transformers import CLIPModel, CLIPTokenizer

    from sdo_cli.models.clip_vocabulary import write_clip_tokenizer

    options = make_small_reward("pickscore-v1", tmp_path)
    described = Path(options["model"]) / "config.json"
    config = json.loads(described.read_text())
    config["text_config"]["eos_token_id"] = end_of_text
    described.write_text(json.dumps(config))
    net = CLIPModel.from_pretrained(options["model"])
    assert net.text_model.eos_token_id == end_of_text
    write_clip_tokenizer(tmp_path / "words")
    words = CLIPTokenizer.from_pretrained(str(tmp_path / "words"))
    reward = rewards.build("pickscore-v1", options)
    found, seen = [], []
    with torch.no_grad():
        for image, prompt in zip(pictures(), PROMPTS, strict=True):
            tokens = words(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
            out = net(pixel_values=processed(net, image), **tokens)
            seen.append(out.image_embeds)
            found.append(net.logit_scale.exp() * (out.text_embeds @ out.image_embeds.T)[0, 0])
    same_embeddings(alone(lambda image, prompt: reward.images(image)), torch.cat(seen))
    same_scores(alone(reward.score), torch.stack(found))


# as they stand in PartiPrompts and people's files: open_clip's tokenizer mends them, transformers' does not
ODD_PROMPTS = [
    "a corgi\u2019s head depicted as an explosion of a nebula",
    "a restaurant menu that says \u201cMenu\u201d",
    "a sign that says 'Deep Learning' \u2026 on a caf\u00e9's wall",
    "a cat &amp; a dog, 50&#37; each",
    "caf\u00c3\u00a9",
    "\ufb01ne art, \u2014 long dash",
    "\uff21\uff22\uff23 in full width",
    "  TWO   spaces\tand\na line ",
    "an emoji \U0001f600 and \u65e5\u672c\u8a9e",
    "e\u0301 in two pieces",
    "don't, we'll, I'd <|endoftext|> go on",
    "",
    "word " * 100,
]


def test_pickscore_reads_prompts_as_transformers_processor_does(tmp_path):
    """Its authors' AutoProcessor is a CLIPProcessor with CLIP's vocabulary; random weights."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    from rewards.pickscore import ids_of
    from sdo_cli.models.clip_vocabulary import write_clip_tokenizer

    options = make_small_reward("pickscore-v1", tmp_path)
    write_clip_tokenizer(tmp_path / "words")
    square = {"height": CLIP_SMALL["vision_cfg"]["image_size"], "width": CLIP_SMALL["vision_cfg"]["image_size"]}
    pictured = CLIPImageProcessorPil(size={"shortest_edge": square["height"]}, crop_size=square)
    processor = CLIPProcessor(pictured, CLIPTokenizerFast.from_pretrained(str(tmp_path / "words")))
    net, reward = CLIPModel.from_pretrained(options["model"]).eval(), rewards.build("pickscore-v1", options)
    image, theirs = pictures()[0], []
    for prompt in ODD_PROMPTS:
        given = processor(text=prompt, images=image, padding=True, truncation=True, max_length=77, return_tensors="pt")
        assert torch.equal(ids_of(reward.tokenizer, [prompt]), given["input_ids"]), prompt
        with torch.no_grad():
            out = net(**given)
        theirs.append(net.logit_scale.exp() * (out.text_embeds @ out.image_embeds.T)[0, 0])
    with torch.no_grad():
        ours = reward.score(to_tensor(image).repeat(len(ODD_PROMPTS), 1, 1, 1), ODD_PROMPTS)
    same_scores(ours, torch.stack(theirs))


def test_hps_is_the_hpsv2x_package(tmp_path):
    reward = rewards.build("hps-v2.1", make_small_reward("hps-v2.1", tmp_path))
    compare_with_fixture(reward, REFERENCE["hps"])


@pytest.mark.slow
def test_hps_at_full_size_is_the_hpsv2x_package(tmp_path):
    """ViT-H/14, random weights, a checkpoint in the published form."""
    net = open_clip.create_model("ViT-H-14", pretrained=None)
    torch.save({"state_dict": random_state(net.state_dict())}, tmp_path / "HPS.pt")
    del net
    reward = rewards.build("hps-v2.1", {"checkpoint": str(tmp_path / "HPS.pt")})
    compare_with_fixture(reward, REFERENCE["hps-full"])


def compare_with_fixture(reward, reference):
    assert torch.tensor(reference["score"]).unique().numel() == len(PROMPTS) == 32
    with torch.no_grad():
        embeddings = alone(lambda image, prompt: reward.encoder.images(image)[:, :16])
    same_embeddings(embeddings, torch.tensor(reference["embedding"]))
    same_scores(alone(reward.score), reference["score"])


def test_imagereward_is_the_authors_blip(tmp_path):
    reward = rewards.build("imagereward-v1", make_small_reward("imagereward-v1", tmp_path))
    read = []
    reward.text.register_forward_hook(lambda module, given, out: read.append(out.last_hidden_state[:, 0, :16]))
    same_scores(alone(reward.score), REFERENCE["imagereward"]["score"])
    same_embeddings(torch.cat(read), torch.tensor(REFERENCE["imagereward"]["embedding"]))


def test_cyclereward_is_the_package(tmp_path):
    reward = rewards.build("cyclereward", make_small_reward("cyclereward-combo", tmp_path))
    read = []
    reward.text.register_forward_hook(lambda module, given, out: read.append(out.last_hidden_state[:, 0, :16]))
    same_scores(alone(reward.score), REFERENCE["cyclereward"]["score"])
    same_embeddings(torch.cat(read), torch.tensor(REFERENCE["cyclereward"]["embedding"]))


@pytest.mark.parametrize("case", MPS_CASES)
def test_mps_is_its_repository(case, tmp_path):
    reference = REFERENCE[f"mps-{case}"]
    options = make_small_reward("mps-v1", tmp_path) | MPS_CASES[case]
    reward = rewards.build("mps-v1", options)
    looked = []
    reward.cross.register_forward_hook(lambda module, given, out: looked.append(out[:, 0, :16]))
    same_scores(alone(reward.score), reference["score"])
    same_embeddings(torch.cat(looked), torch.tensor(reference["embedding"]))
    kept = [int((row[-77:] == 0).sum()) for row in reward._texts._rows.values()]
    assert kept == reference["kept"] and (case == "overall" or max(kept) < 77)


@pytest.mark.parametrize("version", LRM_UNET)
def test_lrm_is_its_repository(version, tmp_path):
    """At the authors' last timestep, each latent with its prompt; with guidance between prompt and none, as theirs."""
    reward = rewards.build(version, make_small_reward(version, tmp_path))
    with torch.no_grad():
        found = torch.cat([reward.score(latent_of(j)[None], [prompt]) for j, prompt in enumerate(PROMPTS)])
        together = reward.score(torch.stack([latent_of(j) for j in range(8)]), PROMPTS[:8])
    same_scores(found, REFERENCE[version]["score"])
    assert torch.allclose(found[:8], together, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_every_evaluation_transform_of_open_clip(mode, interpolation):
    settings = {"size": (56, 56), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    settings |= {"interpolation": interpolation, "resize_mode": mode}
    theirs = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    ours = evaluation_transform(settings)
    # Pillow 13 takes height first where it shrinks much more than width: one byte may differ
    byte = 1 / 255 / min(settings["std"]) if mode == "squash" else 0.0
    for image in pictures()[:4]:
        assert (ours(to_tensor(image)[None])[0] - theirs(image)).abs().max() < byte + 1e-5


# height and width: an odd margin (SDXL's 1216 x 832 cut to 224 among them), and long sides that land on whole pixels
AWKWARD = [(1216, 832), (832, 1216), (55, 110), (110, 55), (300, 200), (230, 224), (224, 231), (91, 273), (105, 60)]


def noise(size):
    values = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(sum(size)), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


@pytest.mark.parametrize("side", [224, 336])
def test_pickscores_pixels_are_transformers(tmp_path, side):
    """Bytes, from transformers' processor of PIL images: the crop's place and every resampled value."""
    reward = rewards.build("pickscore-v1", make_small_reward("pickscore-v1", tmp_path))
    plain = replace(reward.preprocess, size=side, mean=(0.0,) * 3, std=(1.0,) * 3)
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = CLIPImageProcessorPil(**settings, do_rescale=False, do_normalize=False)
    for size in AWKWARD:
        image = noise(size)
        theirs = torch.as_tensor(processor(image, return_tensors="pt").pixel_values[0]).long()
        ours = (plain(to_tensor(image)[None])[0] * 255).round().long()
        assert torch.equal(ours, theirs), size


@pytest.mark.parametrize("mode", ["shortest", "longest"])
def test_awkward_sizes_are_open_clips(mode):
    settings = {"size": (56, 56), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic"}
    settings |= {"resize_mode": mode}
    theirs = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    ours = evaluation_transform(settings)
    for size in [*AWKWARD, (175, 400), (58, 928), (103, 309)]:
        image = noise(size)
        assert (ours(to_tensor(image)[None])[0] - theirs(image)).abs().max() < 1e-6, size


def test_transforms_that_are_not_square_are_refused():
    settings = {"size": (56, 112), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(EnvironmentFault, match="not square"):
        evaluation_transform(settings)


def test_clip_score_with_towers_of_timm(tmp_path):
    """In SigLIP's form: a text tower of its own, pictures squashed to a square, another mean."""
    net = open_clip.model.CustomTextCLIP(**SIGLIP_SMALL).eval()
    save_file(random_state(net.state_dict()), tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    described = {"model_cfg": SIGLIP_SMALL | {"custom_text": True}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    reward = rewards.build("clip-score", {"model": str(tmp_path)})
    assert reward.encoder.width == SIGLIP_SMALL["embed_dim"]

    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    words = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    with torch.no_grad():
        seen = torch.cat([theirs.encode_image(transform(image)[None], normalize=True) for image in pictures()])
        read = theirs.encode_text(words(PROMPTS), normalize=True)
    same_embeddings(alone(lambda image, prompt: reward.encoder.images(image)), seen)
    same_scores(alone(reward.score), (seen * read).sum(-1))
