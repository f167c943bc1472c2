"""Small random pipelines of every family in the real folder layout: real classes, configs, tokenizers, file names."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sdo_cli.models.clip_vocabulary import write_clip_tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# sd15: ε, CLIP-L; sd2: v-prediction, OpenCLIP text encoder, linear projections; sd2-base: ε
KINDS = ("sd15", "sd2", "sd2-base", "sdxl", "sd3", "sd35", "sd3-no-t5")
FAMILY_OF = {kind: "sdxl" if kind == "sdxl" else "sd3" if kind.startswith("sd3") else "sd" for kind in KINDS}


def _vae(channels=4, **config):
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": channels,
    }
    return AutoencoderKL(**defaults | config)


def _tokenizer(folder, **options):
    write_clip_tokenizer(folder, **options)
    return CLIPTokenizer.from_pretrained(str(folder))


def _text(cls, *, hidden=32, layers=3, projection=32, act="quick_gelu", heads=4):
    return cls(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=77,
            projection_dim=projection,
            hidden_act=act,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )


def _unet(cross, **config):
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": cross,
    }
    return UNet2DConditionModel(**defaults | config)


def _t5_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing

    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(33, 127)), "▁a", "▁the", "▁on", "▁cat", "▁dog"]
    tokenizer = Tokenizer(Unigram([(piece, -float(i + 1)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0
    )


def _sd(folder, *, v=False, second=False):
    config = {"attention_head_dim": [4, 8], "use_linear_projection": True} if second else {}
    prediction = {"prediction_type": "v_prediction"} if v else {}
    scheduler = DDIMScheduler if second else PNDMScheduler
    extra = {"clip_sample": False} if second else {"skip_prk_steps": True}
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text(CLIPTextModel, act="gelu" if second else "quick_gelu"),
        tokenizer=_tokenizer(folder / "work", pad_token="!" if second else "<|endoftext|>"),
        unet=_unet(32, **config),
        scheduler=scheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, **extra, **prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(folder):
    return StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True, scaling_factor=0.13025),
        text_encoder=_text(CLIPTextModel),
        text_encoder_2=_text(CLIPTextModelWithProjection, hidden=48, projection=24, act="gelu"),
        tokenizer=_tokenizer(folder / "work"),
        tokenizer_2=_tokenizer(folder / "work2", pad_token="!"),
        unet=_unet(
            80,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            transformer_layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )


def _sd3(folder, *, t5=True, medium=False):
    more = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if medium else {}
    third = {"text_encoder_3": None, "tokenizer_3": None}
    if t5:
        config = T5Config(vocab_size=128, d_model=80, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        third = {"text_encoder_3": T5EncoderModel(config), "tokenizer_3": _t5_tokenizer()}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=80,
            caption_projection_dim=32,
            pooled_projection_dim=56,
            out_channels=16,
            pos_embed_max_size=16,
            **more,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_text(CLIPTextModelWithProjection),
        tokenizer=_tokenizer(folder / "work"),
        text_encoder_2=_text(CLIPTextModelWithProjection, hidden=40, projection=24, act="gelu"),
        tokenizer_2=_tokenizer(folder / "work2", pad_token="!"),
        **third,
    )


MAKERS = {
    "sd15": lambda f: _sd(f),
    "sd2": lambda f: _sd(f, v=True, second=True),
    "sd2-base": lambda f: _sd(f, second=True),
    "sdxl": _sdxl,
    "sd3": lambda f: _sd3(f),
    "sd35": lambda f: _sd3(f, medium=True),
    "sd3-no-t5": lambda f: _sd3(f, t5=False),
}


def make_small(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a small random pipeline of this kind under ``folder/<kind>``; images are 64 pixels wide."""
    target = folder / kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = MAKERS[kind](folder)
        # a freshly made VAE decodes everything to a dull grey: spread the pixels so that differences show
        with torch.no_grad():
            pipeline.vae.decoder.conv_out.weight.mul_(2)
    pipeline.save_pretrained(target)
    for leftover in ("work", "work2"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    return target


def read_tokenizers_once(root: Path) -> None:
    """From here on those under ``root``, where nobody writes: 50,000 words are most of what a small pipeline loads."""
    real, kept = vars(PreTrainedTokenizerBase)["from_pretrained"].__func__, {}

    def from_pretrained(cls, pretrained_model_name_or_path, *words, **options):
        name = str(pretrained_model_name_or_path)
        if not Path(name).is_relative_to(root):
            return real(cls, name, *words, **options)
        key = (cls, name, str(options.get("subfolder")))
        if key not in kept:
            kept[key] = real(cls, name, *words, **options)
        return kept[key]

    PreTrainedTokenizerBase.from_pretrained = classmethod(from_pretrained)


def plain(folder, **options):
    """The pipeline as a user of diffusers loads it."""
    index = json.loads((folder / "model_index.json").read_text())
    if index["_class_name"] == "StableDiffusion3Pipeline" and not index["text_encoder_3"][0]:
        options |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
