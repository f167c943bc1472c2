"""What rewards see in training: crops, noise and JPEG with gradients, keyed; lower bounds; the perturbed picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_combine import Decoder, Linear, drawn, gradient, objective_of, steps_of
from torch.autograd import gradcheck

from sdo_cli.recipe.schema import SightSpec
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.objective import RewardObjective, WeightedReward, lower
from sdo_cli.training.sight import Sight, compressed, cropped


def draw(row, view):
    return keyed_generator(0, f"view {view}", 3, row)


def picture(side=40, seed=0):
    """Smooth colours with an edge."""
    rough = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(rough, (side, side), mode="bicubic").clamp(0, 1)
    smooth[..., side // 2 :, : side // 3] *= 0.3
    return smooth


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("side", [40, 37])
def test_jpeg_is_pils(quality, side):
    image = (picture(side) * 255).round() / 255
    stream = io.BytesIO()
    array = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(array).save(stream, "JPEG", quality=quality, subsampling=0)
    theirs = np.asarray(Image.open(stream), dtype=np.float64)
    mine = compressed(image, torch.tensor([float(quality)]))[0].permute(1, 2, 0).numpy() * 255
    # libjpeg computes in whole numbers
    assert np.abs(mine - theirs).mean() < 0.8
    # and it does something
    assert np.abs(mine - array).mean() > 2 * np.abs(mine - theirs).mean()


def test_gradients_pass_jpegs_rounding_as_if_there_were_none():
    image = (0.2 + 0.6 * picture(16)).double().requires_grad_()
    direction = drawn(1, 3, 16, 16)
    (g,) = torch.autograd.grad((direction * compressed(image, torch.tensor([80.0]))).sum(), image)
    assert torch.allclose(g, direction, atol=1e-3)


def test_a_crop_of_the_whole_is_the_picture_and_one_of_a_half_is_its_half():
    image = picture()
    assert torch.allclose(cropped(image, torch.tensor([[1.0, 0.0, 0.0]])), image, atol=1e-6)
    half = cropped(image, torch.tensor([[0.5, 0.5, 0.0]]))
    wanted = torch.nn.functional.interpolate(image[..., :20, 20:], (40, 40), mode="bilinear")
    assert (half - wanted)[..., 2:-2, 2:-2].abs().max() < 1e-5


def test_crops_have_gradients():
    image = torch.rand(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def view(x):
        return Sight(crop=0.3)(x.float(), draw, [0], 0)

    assert gradcheck(lambda x: view(x).double(), image, eps=1e-2, atol=1e-3)


def test_views_are_keyed_by_sample_step_and_view_and_nothing_else():
    images = torch.cat([picture(seed=seed) for seed in range(3)])
    sight = Sight(crop=0.3, noise=0.05, jpeg=40)
    together = sight(images, draw, [0, 1, 2], 0)
    assert torch.allclose(sight(images[1:2], draw, [1], 0), together[1:2], atol=1e-6)
    assert not torch.allclose(sight(images[1:2], draw, [1], 1), together[1:2], atol=1e-3)
    assert together.shape == images.shape and together.min() >= 0 and together.max() <= 1
    # more noise leaves the crop where it was
    boxes = [Sight(crop=0.3, noise=noise)._drawn(draw(0, 0), (3, 4, 4))[0] for noise in (0.0, 0.5)]
    assert boxes[0] == boxes[1]


def test_the_lower_bound_is_mean_less_spread():
    scores = drawn(4, 6)
    wanted = scores.numpy().mean(0) - 1.5 * scores.numpy().std(0)
    assert np.allclose(lower(scores, 1.5).numpy(), wanted, atol=1e-9)
    assert torch.equal(lower(scores, 0.0), scores.mean(0))
    same = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(lower(same, 1.0).sum(), same)[0]).all()


def test_a_reward_sees_the_views():
    x = drawn(3, 3, 4, 4).float()
    look = SightSpec(views=3, noise=0.1, lower_bound=0.5)
    scored, _ = gradient(plain(sight=look, draw=draw), x)
    images, sight = Decoder.decode(x), Sight(noise=0.1)
    views = [Linear(1).score(sight(images, draw, [0, 1, 2], view), []) for view in range(3)]
    assert torch.allclose(scored.rewards["r"], lower(torch.stack(views), 0.5).float(), atol=1e-5)


def plain(**changes):
    return RewardObjective(Decoder, [WeightedReward("r", Float(1, 2), 1.0)], ["x", "y", "z"], **changes)


class Float(Linear):
    def __init__(self, seed, power=1):
        super().__init__(seed)
        self.direction = self.direction.float()


def test_sharpness_takes_the_gradient_where_the_loss_is_larger():
    """Against the formula in float64: at images + ρ ∇L / rms(∇L)."""
    x, rho = drawn(3, 3, 4, 4, seed=6).clamp(-1, 1), 0.05
    scored, found = gradient(objective_of(sight=SightSpec(sharpness=rho)), x)
    images = Decoder.decode(x)
    items = objective_of().rewards

    def loss(leaf):
        return sum(item.loss_of(item.reward.score(leaf, [])) for item in items)

    leaf = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    size = g.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    there = (images + rho * g / size).clamp(0, 1).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(there).sum(), there)
    assert torch.allclose(found, wanted * 0.6 * x, rtol=1e-4, atol=1e-5 * wanted.abs().max())
    nearer, _ = gradient(objective_of(sight=SightSpec(sharpness=1e-4)), x)
    assert bool((nearer.losses > loss(images)).all()) and not torch.equal(scored.losses, nearer.losses)


def test_training_sees_it_and_measuring_does_not():
    plain_steps, _ = steps_of("rewards=[clip]", "max_train_steps=1")
    seen, _ = steps_of("rewards=[clip]", "max_train_steps=1", "sight.noise=0.2")
    again, _ = steps_of("rewards=[clip]", "max_train_steps=1", "sight.noise=0.2")
    assert seen[0].rewards == again[0].rewards != plain_steps[0].rewards
    slices, _ = steps_of("rewards=[clip]", "max_train_steps=1", "sight.noise=0.2", "gradient.score_micro_batch=1")
    assert slices[0].rewards["clip-embedded"] == pytest.approx(seen[0].rewards["clip-embedded"], abs=1e-6)
