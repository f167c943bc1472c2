"""The rewards' contract on the embedded models, and parity of the preprocessing."""

import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from reference_inputs import CLIP_SMALL
from small_rewards import make_small_reward, small_hf_clip, write_open_clip
from torchvision.transforms.functional import to_tensor

import rewards
from rewards.aesthetic import build as build_aesthetic
from rewards.aesthetic import predictor_head
from rewards.clip_encoder import ClipEncoder
from rewards.colorfulness import colorfulness
from rewards.pickscore import PickScore, clip_words
from rewards.preprocess import Preprocess
from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.recipe.load import load_recipe, shipped_recipes
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.recipe.toys import named

PUBLISHED_HEAD = Path(__file__).parent.parent.parent / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"
NAMES = sorted(rewards.TABLE)
# those that need no file, with what makes them so
READY_NAMES = ("clip-score", "aesthetic-v2", "colorfulness", "judge", "clip-embedded", "aesthetic-embedded")
READY = {name: rewards.embedded_options(name) for name in READY_NAMES}


def pictures(count=4, height=64, width=64, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def shown(reward, count=4, side=64):
    """What a reward sees: pictures of this size, or latents of an eighth of 128 pixels."""
    if reward.info.sees == "latent":
        return torch.randn(count, reward.latents.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    return pictures(count, side, side)


PROMPTS = ["a tiger on a teal background", "a rose on a red background", "a bus on a blue background", "a bird"]


@pytest.fixture(params=NAMES)
def reward(request, tmp_path):
    """Every reward there is: embedded where it can be, else a small random one in the real file format."""
    return make(request.param, tmp_path)


def make(name, folder):
    if name in READY:
        return rewards.build(name, READY[name])
    if name == "jpeg-compressibility":
        return rewards.build(name)
    if name == "mixture":
        parts = [{"name": "clip-score", "weight": 2.0, "mean": 0.8, "std": 0.1, "options": {"model": "embedded"}}]
        return rewards.build(name, {"parts": [*parts, {"name": "colorfulness", "weight": 0.5}]})
    return rewards.build(name, make_small_reward(name, folder))


def test_scores_are_one_number_per_image_and_deterministic(reward):
    first = reward.score(shown(reward), PROMPTS)
    assert first.shape == (4,) and torch.isfinite(first).all()
    assert torch.equal(first, reward.score(shown(reward), PROMPTS))
    assert reward.info.name in NAMES


def test_images_are_scored_on_their_own(reward):
    together = reward.score(shown(reward), PROMPTS)
    alone = torch.cat([reward.score(shown(reward)[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.fixture(params=[name for name in NAMES if name != "jpeg-compressibility"])
def differentiable(request, tmp_path):
    return make(request.param, tmp_path)


def test_gradients_agree_with_finite_differences(differentiable):
    reward = differentiable
    if hasattr(reward, "to"):
        reward.to(torch.device("cpu"), torch.float64)
    # at the model's own size nothing is resized, so nothing is rounded to bytes; small steps: the judge has kinks
    side = getattr(getattr(reward, "encoder", reward), "preprocess", Preprocess(64)).size
    images = shown(reward, 2, side).double().requires_grad_()
    reward.score(images, PROMPTS[:2]).sum().backward()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        ends = [reward.score(images + s * 1e-7 * direction, PROMPTS[:2]).sum() for s in (1, -1)]
    assert images.grad.abs().max() > 0
    assert ((ends[0] - ends[1]) / 2e-7).item() == pytest.approx((images.grad * direction).sum().item(), rel=1e-4)


def test_recomputing_layers_changes_nothing(differentiable):
    if not hasattr(differentiable, "gradient_checkpointing") or differentiable.info.name == "judge":
        pytest.skip("nothing to recompute, or a ResNet, whose layers open_clip does not recompute")
    found = []
    for recomputed in (False, True):
        if recomputed:
            differentiable.gradient_checkpointing()
        images, saved = shown(differentiable, 2).requires_grad_(), []
        # what autograd keeps for the backward pass must become less
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            score = differentiable.score(images, PROMPTS[:2])
        score.sum().backward()
        found.append((score.detach(), images.grad, sum(saved)))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    assert found[1][2] < 0.8 * found[0][2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_nearly_the_same(differentiable, dtype):
    if not hasattr(differentiable, "to"):
        pytest.skip("no weights")
    exact = differentiable.score(shown(differentiable), PROMPTS)
    differentiable.to(torch.device("cpu"), dtype)
    images = shown(differentiable).requires_grad_()
    half = differentiable.score(images, PROMPTS)
    half.sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().max() > 0
    assert (half - exact).abs().max() < 0.15 * exact.abs().max()
    # the towers are coarse, the score is not rounded on top of that
    assert half.dtype == torch.float32 and not torch.equal(half, half.to(dtype).float())


def test_mps_keeps_the_latest_prompts_only(tmp_path):
    """A row is a third of a megabyte; one that has gone is made again, with the same bits."""
    reward = make("mps-v1", tmp_path)
    reward._texts._most = 2
    first = reward.score(pictures(), PROMPTS)
    assert len(reward._texts._rows) == 2 and torch.equal(first, reward.score(pictures(), PROMPTS))


def test_pickscores_temperature_is_not_rounded():
    """exp of bf16's log 100 is 98.9."""
    net = small_hf_clip()
    net.logit_scale.data.fill_(math.log(100))
    reward = PickScore(net, clip_words()).to(torch.device("cpu"), torch.bfloat16)
    cosine = (reward.images(pictures()) * reward.prompts(PROMPTS)).sum(-1)
    assert torch.allclose(reward.score(pictures(), PROMPTS), 100 * cosine, rtol=1e-5)


def test_a_picture_is_nearer_to_its_own_caption():
    """The embedded CLIP and the judge know what a plain red and a plain blue background are."""
    colours = {"red": (214, 48, 49), "blue": (50, 100, 215), "green": (60, 160, 70)}
    images = torch.stack([torch.tensor(c).view(3, 1, 1).expand(3, 64, 64) / 255 for c in colours.values()])
    for name in ("clip-score", "judge"):
        reward = rewards.build(name, READY[name])
        table = torch.stack(
            [reward.score(images, [f"a bird on a {c} background"] * 3) for c in colours], 1
        )  # [image, caption]
        assert table.argmax(1).tolist() == [0, 1, 2]


def test_the_judge_cannot_be_trained_on(tmp_path):
    assert not rewards.build("judge").info.trainable
    assert {name for name in NAMES if not make(name, tmp_path / name).info.trainable} == set(rewards.MEASURE_ONLY)
    part = {"name": "aesthetic", "options": {"model": "embedded:judge", "head": "embedded"}}
    disguised = (("clip", {"model": "embedded:judge"}), ("aesthetic", part["options"]), ("mixture", {"parts": [part]}))
    for name, options in disguised:
        with pytest.raises(RecipeFault, match="only measures"):
            rewards.build(name, options)
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
    # resized as PIL does it, to the last byte
    assert (ours - theirs).abs().max() < 1e-5


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
    reward = build_aesthetic(model="embedded", head="embedded")
    assert reward.score(colourful, ["x"]) > reward.score(grey, ["x"]) + 1


@pytest.mark.skipif(not PUBLISHED_HEAD.exists(), reason="the published head is not beside this checkout")
def test_the_published_aesthetic_head_is_the_reference_mlp(tmp_path):
    """Through the reward's own loader, on a small CLIP of ViT-L/14's width."""
    clip = write_open_clip(tmp_path / "clip", CLIP_SMALL | {"embed_dim": 768})
    reward = rewards.build("aesthetic-v2", {"model": str(clip), "head": str(PUBLISHED_HEAD)})
    state = torch.load(PUBLISHED_HEAD, weights_only=True, map_location="cpu")
    x = torch.nn.functional.normalize(torch.randn(32, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    reference = x
    for index in (0, 2, 4, 6, 7):
        reference = reference @ state[f"layers.{index}.weight"].float().T + state[f"layers.{index}.bias"].float()
    assert reference.std() > 0.01 and (reward.head(x) - reference).abs().max() < 1e-5


def test_a_head_of_another_width_is_one_sentence(tmp_path):
    from safetensors.torch import save_file

    save_file(dict(predictor_head(32).state_dict()), tmp_path / "head.safetensors")
    with pytest.raises(EnvironmentFault, match="does not fit a CLIP of width 64"):
        build_aesthetic(model="embedded", head=str(tmp_path / "head.safetensors"))


def test_a_clip_that_is_not_there_is_one_sentence():
    with pytest.raises(EnvironmentFault, match="no CLIP weights"):
        ClipEncoder("ViT-L-14")


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (300, 190), (97, 33)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_is_pils(size, interpolation):
    smooth = torch.nn.functional.interpolate(pictures(1, 9, 9), size, mode="bicubic")[0].clamp(0, 1)
    image = Image.fromarray((smooth.permute(1, 2, 0) * 255).round().byte().numpy())
    prepare = Preprocess(40, (0.0,) * 3, (1.0,) * 3, interpolation)
    height, width = prepare.target(*size)
    theirs = to_tensor(image.resize((width, height), getattr(Image.Resampling, interpolation.upper())))
    ours = prepare._resized(to_tensor(image)[None], (height, width))[0]
    assert (ours - theirs).abs().max() < 1e-6


def test_the_gradient_of_resizing_is_that_of_the_unrounded_values():
    """By central differences of the same resize without rounding: two matrices."""
    from rewards.preprocess import resize_matrix

    images = (0.25 + 0.5 * pictures(1, 40, 56)).double().requires_grad_()
    v = torch.randn(1, 3, 20, 28, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (v * Preprocess(20, (0.0,) * 3, (1.0,) * 3)._resized(images, (20, 28))).sum().backward()
    down, across = resize_matrix(40, 20, "bicubic"), resize_matrix(56, 28, "bicubic")
    assert torch.allclose(images.grad, down.T @ v @ across, atol=1e-12)


def test_longest_side_and_black_borders():
    """HPS's frame: a wide picture keeps its shape between black bars."""
    prepare = Preprocess(56, (0.0,) * 3, (1.0,) * 3, fit="longest", from_bytes=False)
    out = prepare(torch.ones(1, 3, 40, 100))
    assert out.shape == (1, 3, 56, 56) and out[..., :17, :].abs().max() == 0 and out[..., 20:36, :].min() > 0.99


def test_jpeg_counts_the_bytes_of_the_file(tmp_path):
    image = pictures(1)
    Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(tmp_path / "a.jpg", quality=95)
    score = rewards.build("jpeg-compressibility").score(image, ["x"])
    assert score.item() == pytest.approx(-(tmp_path / "a.jpg").stat().st_size / 1000)
    flat = rewards.build("jpeg-compressibility").score(torch.full((1, 3, 64, 64), 0.5), ["x"])
    assert flat > score
    with pytest.raises(RecipeFault, match="quality must be between 1 and 100, not 0"):
        rewards.build("jpeg-compressibility", {"quality": 0})


def test_the_lower_bound_of_a_mixture_is_weighted_mean_less_spread():
    from rewards.mixture import Mixture

    plain = {name: torch.randn(6, generator=torch.Generator().manual_seed(k)).double() for k, name in enumerate("abc")}
    members = {"a": (None, 1.0, 0.1, 2.0), "b": (None, 2.0, -0.3, 0.5), "c": (None, 0.5, 0.0, 1.0)}
    found = Mixture(members, 0.7).mixed(plain).numpy()
    weights = np.array([1.0, 2.0, 0.5])
    z = np.stack([(plain[name].numpy() - mean) / std for name, (_, _, mean, std) in members.items()])
    mean = np.average(z, axis=0, weights=weights)
    spread = np.sqrt(np.average((z - mean) ** 2, axis=0, weights=weights))
    assert np.allclose(found, weights.sum() * (mean - 0.7 * spread), atol=1e-9)
    assert torch.equal(Mixture(members, 0.0).mixed(plain), Mixture(members).mixed(plain))
    same = {name: torch.ones(2, dtype=torch.float64, requires_grad=True) for name in "ab"}
    equal = Mixture(dict.fromkeys("ab", (None, 1.0, 0.0, 1.0)), 1.0).mixed(same)
    assert torch.isfinite(torch.autograd.grad(equal.sum(), same["a"])[0]).all()
    for bound, weight, sentence in (
        (-1.0, 1.0, "from 0"),
        (float("nan"), 1.0, "from 0"),
        (1.0, -1.0, "weights above 0"),
    ):
        options = {"parts": [{"name": "colorfulness", "weight": weight}], "lower_bound": bound}
        with pytest.raises(RecipeFault, match=sentence):
            rewards.build("mixture", options)
        if bound == bound:
            words = f"rewards=[{{name: mixture, options: {{parts: [{{name: colorfulness, weight: {weight}}}], "
            with pytest.raises(RecipeFault, match=sentence):
                load_recipe("quickstart", [f"{words}lower_bound: {bound}}}}}]"])


def test_a_mixture_is_its_normalised_parts(tmp_path):
    mixture, images = make("mixture", tmp_path), pictures()
    parts = mixture.parts(images, PROMPTS)
    assert set(parts) == {"clip-score", "colorfulness"}
    expected = 2.0 * (parts["clip-score"] - 0.8) / 0.1 + 0.5 * parts["colorfulness"]
    assert torch.allclose(mixture.score(images, PROMPTS), expected)
    with pytest.raises(RecipeFault, match="only measures"):
        rewards.build("mixture", {"parts": [{"name": "judge"}]})
    with pytest.raises(RecipeFault, match="colorfulness is a part twice"):
        rewards.build("mixture", {"parts": [{"name": "colorfulness"}, {"name": "colorfulness", "weight": 2.0}]})


def test_tables_agree_with_the_modules(tmp_path):
    """What is said without torch is what the built rewards say."""
    assert set(rewards.OPTIONS) == set(rewards.TABLE) and set(rewards.WEIGHTS) <= set(rewards.TABLE)
    for name in NAMES:
        info = make(name, tmp_path / name).info
        assert info.name == name and (name in rewards.MEASURE_ONLY) == (not info.trainable)
    assert {rewards.full_name(short) for short in rewards.SHORT} <= set(rewards.TABLE)


@pytest.mark.parametrize(
    ("name", "options", "known"),
    [
        ("clip", {}, ("clip-embedded", {})),
        ("clip-score", {"model": "embedded:clip"}, ("clip-embedded", {})),
        ("aesthetic", {}, ("aesthetic-embedded", {})),
        ("clip", {"model": "ViT-B-32"}, ("clip", {"model": "ViT-B-32"})),
        ("judge", {}, ("judge", {})),
    ],
)
def test_the_toys_are_called_so_in_recipes(name, options, known):
    spec = named(RewardSpec(name, options=options), "embedded")
    assert (spec.name, spec.options) == known
    parts = [{"name": name, "options": options, "weight": 2.0}]
    ((part),) = named(RewardSpec("mixture", options={"parts": parts}), "embedded").options["parts"]
    assert (part["name"], part["options"], part["weight"]) == (*known, 2.0)
    # of another model only where they are asked for
    other = named(RewardSpec(name, options=options), "a/b")
    assert other.name == (known[0] if "embedded" in str(options) else name)


def test_recipes_of_the_embedded_model_name_the_toys(tmp_path):
    loaded = load_recipe("guarded")
    recipe = loaded.recipe
    names = [spec.name for spec in (*recipe.rewards, *recipe.guard.rewards, *recipe.validation.rewards)]
    assert names == ["aesthetic-embedded", "clip-embedded", "judge"]
    assert any("aesthetic is aesthetic-embedded, clip-score is clip-embedded" in note for note in loaded.notes)
    with pytest.raises(RecipeFault, match=r"rewards.1.name: clip is in the list twice"):
        load_recipe("quickstart", ["rewards=[clip-embedded, clip]"])
    with pytest.raises(RecipeFault, match="is in the list twice"):
        load_recipe("quickstart", ["validation.rewards=[clip-embedded, {name: clip, options: {model: embedded}}]"])
    real = load_recipe("quickstart", ["model=a/b"])
    assert real.recipe.rewards[0].name == "clip-score" and not real.notes
    # taken over from a resolved recipe
    (note,) = load_recipe("quickstart", ["model=a/b", "rewards=[clip-embedded]"]).notes
    assert note == "clip-embedded: by the package's own small CLIP, which knows emoji and no pictures of a/b"
