"""CLIP by architecture and weight file: preprocessing and activation are those of the weights, or asked for.

The architectures have open_clip's names and tags, and small networks behind them.
"""

import json
import logging
import warnings

import open_clip
import pytest
import torch
from open_clip import factory
from reference_inputs import CLIP_SMALL, PROMPTS, pictures, random_state
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

import rewards
from rewards.clip_encoder import ClipEncoder
from rewards.clip_origin import Trained, of_tag, origin_of
from sdo_cli.cli.app import quiet_libraries
from sdo_cli.errors import EnvironmentFault

# one of each way to prepare pictures, and of each activation
PUBLISHED = [
    ("PE-Core-T-16-384", "meta"),
    ("ViT-B-16-SigLIP2", "webli"),
    ("ViT-L-14-CLIPA", "datacomp1b"),
    ("MobileCLIP-S1", "datacompdr"),
    ("ViT-L-14", "openai"),
    ("ViT-L-14", "laion2b_s32b_b82k"),
    ("ViT-L-14-quickgelu", "metaclip_400m"),
    ("ViT-H-14", "dfn5b"),
]


# Pillow 13 takes height first where it shrinks much more than width: then a byte may differ
PICTURES = [image for image in pictures() if image.width >= image.height][:8]


@pytest.fixture
def small_architectures(monkeypatch):
    """Every architecture of the list above, small; tokenizers that would be fetched are CLIP's."""
    for name, _ in PUBLISHED:
        config = {**CLIP_SMALL, "quick_gelu": True} if name.endswith("-quickgelu") else CLIP_SMALL
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, config)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: factory.SimpleTokenizer())


def weights_in(folder, architecture="ViT-L-14", name="weights.safetensors"):
    """A file of random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_state(open_clip.create_model(architecture).state_dict()), folder / name)
    return folder / name


def described(folder, architecture, tag):
    """``open_clip_config.json`` as open_clip writes it for a repository of the hub."""
    told = open_clip.get_pretrained_cfg(architecture, tag)
    preprocess = {key: told[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    model = {**CLIP_SMALL, **({"quick_gelu": True} if told.get("quick_gelu") else {})}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))


@torch.no_grad()
def by_folder(folder):
    """Cosines ``[8, 8]`` of pictures and prompts by open_clip's own pipeline."""
    net, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    seen = torch.cat([net.eval().encode_image(transform(image)[None], normalize=True) for image in PICTURES])
    return seen @ net.encode_text(factory.SimpleTokenizer()(PROMPTS[:8]), normalize=True).T


@torch.no_grad()
def by_reward(options):
    reward = rewards.build("clip-score", options)
    rows = [reward.encoder.images(to_tensor(image)[None]) for image in PICTURES]
    return torch.cat(rows) @ reward.encoder.prompts(PROMPTS[:8]).T


@pytest.mark.parametrize(("architecture", "tag"), PUBLISHED)
@pytest.mark.usefixtures("small_architectures")
def test_a_file_scores_as_open_clips_folder_does(architecture, tag, tmp_path, monkeypatch):
    """Whether its origin is said, or told by a config beside it, by the hub's cache, by a tag."""
    whole = weights_in(tmp_path / "whole", architecture, "open_clip_model.safetensors")
    described(whole.parent, architecture, tag)
    right = by_folder(whole.parent)
    repository = open_clip.get_pretrained_cfg(architecture, tag)["hf_hub"].rstrip("/")
    cache = tmp_path / f"models--{'--'.join(repository.split('/')[:2])}" / "snapshots" / "0123abc"
    alone, cached = (weights_in(folder, architecture) for folder in (tmp_path / "alone", cache))
    assert right.std() > 0.01
    for options in ({"pretrained": str(alone), "tag": tag}, {"pretrained": str(whole)}, {"pretrained": str(cached)}):
        assert (by_reward({"model": architecture, **options}) - right).abs().max() < 1e-5
    monkeypatch.setattr(factory, "download_pretrained", lambda *a, **k: str(alone))
    with warnings.catch_warnings():
        # computed as the tag was trained, there is nothing for open_clip to warn of
        warnings.simplefilter("error")
        assert (by_reward({"model": architecture, "pretrained": tag}) - right).abs().max() < 1e-5


def test_every_published_file_in_the_hubs_cache_is_known(tmp_path):
    """By its repository, all that open_clip lists."""
    pairs = [
        (name, tag) for name, tag in open_clip.list_pretrained() if open_clip.get_pretrained_cfg(name, tag)["hf_hub"]
    ]
    assert len(pairs) > 100
    for name, tag in pairs:
        told = open_clip.get_pretrained_cfg(name, tag)
        repository, _, file = told["hf_hub"].rpartition("/")
        folder = tmp_path / f"models--{repository.replace('/', '--')}" / "snapshots" / "0123abc"
        found = origin_of(name, str(folder / (file or "open_clip_model.safetensors")), None).trained
        assert found.preprocess == {key: told[key] for key in found.preprocess}
        assert found.quick_gelu or not told.get("quick_gelu")


def test_where_all_tags_of_an_architecture_agree_a_file_needs_no_word(tmp_path):
    found = origin_of("PE-Core-T-16-384", str(tmp_path / "mine.pt"), None).trained
    assert (found.resize_mode, found.interpolation, found.mean) == ("squash", "bilinear", (0.5,) * 3)
    assert origin_of("ViT-L-14-quickgelu", str(tmp_path / "mine.pt"), None).trained.quick_gelu
    # nobody published one: what open_clip trains with unless told otherwise
    assert origin_of("ViT-M-32", str(tmp_path / "mine.pt"), None).trained == Trained.of({}, quick_gelu=False)


@pytest.mark.parametrize("architecture", ["ViT-L-14", "ViT-B-32", "ViT-H-14", "ViT-bigG-14"])
def test_where_they_differ_it_is_asked_for(architecture, tmp_path):
    with pytest.raises(
        EnvironmentFault, match=rf"mine.pt may have been trained in \d ways, and {architecture}"
    ) as fault:
        origin_of(architecture, str(tmp_path / "mine.pt"), None)
    assert "`tag` with one of" in fault.value.remedy and "metaclip_fullcc, " in fault.value.remedy
    assert origin_of(architecture, str(tmp_path / "mine.pt"), "default").trained == Trained.of({}, quick_gelu=False)


def test_a_published_name_with_a_hash_and_a_folder_named_after_the_repository_tell(tmp_path):
    named = origin_of("ViT-B-32", str(tmp_path / "vit_b_32-quickgelu-laion400m_e32-46683a32.pt"), None)
    assert named.trained == of_tag("ViT-B-32", "laion400m_e32") and named.trained.quick_gelu
    folder = tmp_path / "CLIP-ViT-L-14-laion2B-s32B-b82K" / "open_clip_pytorch_model.bin"
    assert origin_of("ViT-L-14", str(folder), None).trained.mean == (0.5,) * 3
    # a link to a file in the cache
    blob = tmp_path / "models--timm--vit_large_patch14_clip_224.openai" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.touch()
    (tmp_path / "mine.safetensors").symlink_to(blob)
    assert origin_of("ViT-L-14", str(tmp_path / "mine.safetensors"), None).trained.quick_gelu


LAION = "models--laion--CLIP-ViT-L-14-laion2B-s32B-b82K/x.bin"
CONTRADICTIONS = [
    ("ViT-L-14", LAION, "openai", "`tag: openai` contradicts its place, as of the repository laion/.*mean is"),
    ("ViT-L-14", "openai", "laion2b_s32b_b82k", "`tag: laion2b_s32b_b82k` contradicts the tag openai"),
    ("ViT-L-14", LAION, "default", "`tag: default` contradicts"),
    ("ViT-L-14-quickgelu", LAION, None, "which is of ViT-L-14, not of ViT-L-14-quickgelu"),
    ("ViT-B-32", LAION, None, "which is of ViT-L-14, not of ViT-B-32"),
    ("ViT-L-14", "mine.pt", "webli", "ViT-L-14 has no tag 'webli'"),
]


@pytest.mark.parametrize(("architecture", "file", "tag", "said"), CONTRADICTIONS)
def test_what_contradicts_the_origin_is_refused(architecture, file, tag, said, tmp_path):
    is_tag = open_clip.get_pretrained_cfg(architecture, file)
    with pytest.raises(EnvironmentFault, match=said) as fault:
        origin_of(architecture, file if is_tag else str(tmp_path / file), tag)
    assert fault.value.remedy and "\n" not in fault.value.message


@pytest.mark.usefixtures("small_architectures")
def test_a_config_that_contradicts_is_refused(tmp_path):
    file = weights_in(tmp_path)
    described(tmp_path, "ViT-L-14", "laion2b_s32b_b82k")
    with pytest.raises(EnvironmentFault, match="was trained without QuickGELU"):
        ClipEncoder("ViT-L-14-quickgelu", str(file))
    with pytest.raises(
        EnvironmentFault, match=r"`tag: openai` contradicts the open_clip_config.json beside it: mean is"
    ):
        ClipEncoder("ViT-L-14", str(file), "openai")
    with pytest.raises(EnvironmentFault, match="describes another architecture than ViT-B-32: vision_cfg"):
        ClipEncoder("ViT-B-32", str(file))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(EnvironmentFault, match=r"cannot read .*open_clip_config\.json"):
        ClipEncoder("ViT-L-14", str(file))


@pytest.mark.usefixtures("small_architectures")
def test_a_folder_brings_its_own_weights(tmp_path):
    file = weights_in(tmp_path / "clip", name="open_clip_model.safetensors")
    described(file.parent, "ViT-L-14", "openai")
    for more in ({"pretrained": str(file)}, {"tag": "openai"}):
        with pytest.raises(EnvironmentFault, match="brings its own weights"):
            rewards.build("clip", {"model": str(file.parent), **more})
    # open_clip would go on with random numbers
    file.unlink()
    with pytest.raises(EnvironmentFault, match="cannot load the CLIP model"):
        rewards.build("clip", {"model": str(file.parent)})


@pytest.mark.usefixtures("small_architectures")
def test_openais_spelling_is_looked_up_too(tmp_path):
    file = weights_in(tmp_path)
    with pytest.raises(EnvironmentFault, match="may have been trained in"):
        ClipEncoder("ViT-L/14", str(file))


def test_the_sign_of_a_wrong_activation_is_not_hidden(caplog):
    with warnings.catch_warnings(record=True) as shown:
        quiet_libraries()
        for text in ("QuickGELU mismatch between final model config", "something of its own inside"):
            warnings.warn_explicit(text, UserWarning, "factory.py", 1, module="open_clip.factory")
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no kernel")
    assert [str(warning.message)[:18] for warning in shown] == ["QuickGELU mismatch"] and not caplog.records
