"""The rewards' contract on the embedded models, and parity of the preprocessing."""

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms.functional import to_tensor

import rewards
from rewards.aesthetic import build as build_aesthetic
from rewards.aesthetic import predictor_head
from rewards.clip_encoder import ClipEncoder
from rewards.colorfulness import colorfulness
from rewards.preprocess import Preprocess
from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault
from sdo_cli.recipe.load import load_recipe, shipped_recipes

PUBLISHED_HEAD = Path(__file__).parent.parent.parent / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"
NAMES = sorted(rewards.TABLE)


def pictures(count=4, height=64, width=64, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


PROMPTS = ["a tiger on a teal background", "a rose on a red background", "a bus on a blue background", "a bird"]


@pytest.fixture(params=NAMES)
def reward(request):
    return rewards.build(request.param)


def test_scores_are_one_number_per_image_and_deterministic(reward):
    first = reward.score(pictures(), PROMPTS)
    assert first.shape == (4,) and torch.isfinite(first).all()
    assert torch.equal(first, reward.score(pictures(), PROMPTS))
    assert reward.info.name in NAMES


def test_images_are_scored_on_their_own(reward):
    together = reward.score(pictures(), PROMPTS)
    alone = torch.cat([reward.score(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gradients_agree_with_finite_differences(reward):
    # no resizing at 64 pixels; the steps are small because the judge has kinks (ReLU)
    for part in (getattr(reward, "encoder", None), getattr(reward, "head", None)):
        if part is not None:
            part.to(torch.device("cpu"), torch.float64) if isinstance(part, ClipEncoder) else part.double()
    images = pictures(2).double().requires_grad_()
    reward.score(images, PROMPTS[:2]).sum().backward()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        ends = [reward.score(images + s * 1e-7 * direction, PROMPTS[:2]).sum() for s in (1, -1)]
    assert ((ends[0] - ends[1]) / 2e-7).item() == pytest.approx((images.grad * direction).sum().item(), rel=1e-4)


def test_a_picture_is_nearer_to_its_own_caption():
    """The embedded CLIP and the judge know what a plain red and a plain blue background are."""
    colours = {"red": (214, 48, 49), "blue": (50, 100, 215), "green": (60, 160, 70)}
    images = torch.stack([torch.tensor(c).view(3, 1, 1).expand(3, 64, 64) / 255 for c in colours.values()])
    for name in ("clip-score", "judge"):
        reward = rewards.build(name)
        table = torch.stack(
            [reward.score(images, [f"a bird on a {c} background"] * 3) for c in colours], 1
        )  # [image, caption]
        assert table.argmax(1).tolist() == [0, 1, 2]


def test_the_judge_cannot_be_trained_on():
    assert not rewards.build("judge").info.trainable
    assert {name for name in NAMES if not rewards.build(name).info.trainable} == set(rewards.MEASURE_ONLY)
    with pytest.raises(ValueError, match="only measures"):
        rewards.build("clip-score", {"model": "embedded:judge"})
    for name in shipped_recipes():
        assert not {rewards.full_name(spec.name) for spec in load_recipe(name).recipe.rewards} & rewards.MEASURE_ONLY


def test_judge_and_clip_are_different_architectures():
    configs = [
        (embedded.folder(f"embedded:{name}") / "open_clip_config.json").read_text() for name in ("clip", "judge")
    ]
    assert "patch_size" in configs[0] and "patch_size" not in configs[1]


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (256, 190), (512, 512)])
def test_preprocessing_matches_open_clip_on_pil_images(size):
    encoder = ClipEncoder()
    transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(encoder.net)), is_train=False)
    small = pictures(1, 24, 24)
    smooth = torch.nn.functional.interpolate(small, size, mode="bilinear")[0]
    image = Image.fromarray((smooth.permute(1, 2, 0) * 255).round().byte().numpy())
    ours = encoder.preprocess(to_tensor(image)[None])
    theirs = transform(image)[None]
    assert ours.shape == theirs.shape
    # PIL rounds to bytes between the steps: 2/255 in normalised units
    assert (ours - theirs).abs().max() < 2 / 255 / 0.5 + 1e-4
    assert (ours - theirs).abs().mean() < 0.5 / 255 / 0.5


def test_preprocessing_lets_gradients_through():
    images = pictures(1, 100, 80).requires_grad_()
    Preprocess(64, (0.5,) * 3, (0.5,) * 3)(images).square().sum().backward()
    assert images.grad.abs().mean() > 0


def test_colorfulness_against_the_definition_in_numpy():
    import numpy as np

    image = pictures(1)[0].double().numpy() * 255
    rg, yb = image[0] - image[1], 0.5 * (image[0] + image[1]) - image[2]
    expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    assert colorfulness(pictures(1).double()).item() * 255 == pytest.approx(expected, rel=1e-9)
    grey = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    colorfulness(grey).sum().backward()
    assert torch.isfinite(grey.grad).all()


def test_the_embedded_aesthetic_follows_colourfulness():
    colourful = torch.zeros(1, 3, 64, 64)
    colourful[:, 0, :, :32], colourful[:, 2, :, 32:] = 1.0, 1.0
    grey = torch.full((1, 3, 64, 64), 0.5)
    reward = build_aesthetic()
    assert reward.score(colourful, ["x"]) > reward.score(grey, ["x"]) + 1


@pytest.mark.skipif(not PUBLISHED_HEAD.exists(), reason="the published head is not beside this checkout")
def test_the_published_aesthetic_head_fits_the_layout():
    state = torch.load(PUBLISHED_HEAD, weights_only=True, map_location="cpu")
    head = predictor_head(768).eval()
    head.load_state_dict({key.removeprefix("layers."): value.float() for key, value in state.items()})
    x = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
    reference = x
    for index in (0, 2, 4, 6, 7):
        reference = reference @ state[f"layers.{index}.weight"].float().T + state[f"layers.{index}.bias"].float()
    assert torch.allclose(head(x), reference, atol=1e-5)


def test_a_head_of_another_width_is_one_sentence(tmp_path):
    from safetensors.torch import save_file

    save_file(dict(predictor_head(32).state_dict()), tmp_path / "head.safetensors")
    with pytest.raises(EnvironmentFault, match="does not fit a CLIP of width 64"):
        build_aesthetic(head=str(tmp_path / "head.safetensors"))


def test_a_clip_that_is_not_there_is_one_sentence():
    with pytest.raises(EnvironmentFault, match="no CLIP weights"):
        ClipEncoder("ViT-L-14")
