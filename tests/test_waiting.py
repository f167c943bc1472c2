"""Nothing in the loop over network calls makes the host wait for the device: seen on a device without numbers."""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import CONFIGS, toy_path

from sdo_cli.drawing.draw import DrawSettings, Noise, draw_noise, make_path
from sdo_cli.gradients.linear import linear_path
from sdo_cli.gradients.rules import find_rule
from sdo_cli.gradients.three_stage import rollout
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.sampling.loop import denoise_path, sample_latents
from sdo_cli.seeding import keyed_generator

META = torch.device("meta")


class Made(TorchFunctionMode):
    """Tensors that are made on the device of Python's numbers, which the dispatcher does not show."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.device == META:
            self.names.append(func.__name__)
        return result


class Crossings(TorchDispatchMode):
    """Counts copies between the CPU and the device: each makes the host wait for everything asked for before.

    A value that is asked for (``item``) fails by itself on this device.
    """

    def __init__(self):
        super().__init__()
        self.names = []
        self.made = Made(self.names)

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *fault):
        super().__exit__(*fault)
        self.made.__exit__(*fault)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_", "lift_fresh_copy"):
            devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)}
            if len(devices) > 1:
                self.names.append(func.overloadpacket.__name__)
        return result


def crossings(solver, steps, rule="sdo", **options):
    path = on_meta(toy_path(solver, steps=steps, scale=3.0))
    plan = find_rule(rule)(path.route.calls, 4, path.coefficients, keyed_generator(0, "plan"), **options)
    linear = linear_path(path.route, plan, None)
    with Crossings() as seen:
        rolled = rollout(path, plan, linear, micro=2)
    assert rolled.x_N.device == META
    return len(seen.names)


def on_meta(path_and_net):
    """The same path with every tensor on the device without numbers."""
    net, path = path_and_net
    guided = path.denoise
    moved = {
        name: {key: value.to(META) for key, value in getattr(guided, name).items()}
        for name in ("condition", "negative")
    }
    injected = None if path.injected is None else path.injected.to(META)
    denoise = replace(guided, network=net.to(META), **moved)
    return replace(path, denoise=denoise, x_0=path.x_0.to(META), injected=injected)


# diffusers' UniPC makes small tensors on the device at every step
@pytest.mark.parametrize("solver", [name for name in CONFIGS if name != "unipc"])
def test_a_rollout_copies_nothing_between_its_calls(solver):
    assert crossings(solver, 6) == crossings(solver, 12)


def test_nor_does_one_that_ends_early():
    assert crossings("ddim", 8, "refl") == crossings("ddim", 16, "refl")


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_nor_do_the_networks_themselves(small, kind):
    family = load_family(ModelSource(str(small(kind))))
    condition, negative = family.encode(["a fox"]), family.encode_negative("")

    def crossings(steps):
        settings = DrawSettings(num_inference_steps=steps)
        noise = draw_noise(family, settings, [torch.Generator().manual_seed(0)])
        for part in (family.denoiser, family.vae):
            part.to(META)
        moved = [{key: value.to(META) for key, value in found.items()} for found in (condition, negative)]
        path = make_path(family, settings, Noise(noise.initial.to(META)), *moved)
        # what is made once
        denoise_path(path, lambda i, x, t: path.denoise(x, t, path.rows))
        with torch.no_grad(), Crossings() as seen:
            assert sample_latents(path).device == META
        return len(seen.names)

    assert crossings(3) == crossings(6)
