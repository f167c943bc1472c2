"""Stage ``student``: an LCM LoRA for the packed pipeline, which then draws in 4 calls without guidance.

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; as a LoRA: 2311.05556) on latents the teacher drew.
"""

import copy
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from embedded import emoji_data as data
from embedded.loop import batch_generator, fit
from embedded.pack import WEIGHTS
from embedded.unet import tokenize
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.utils import save_image

BATCH = 16
RANK = 32
GUIDANCE = 3.0
# of the 12 colours, how many every object is drawn on: more would cost more than the training itself
PIECES = 4
# the grid of LCMScheduler's original_inference_steps: 19, 39, …, 999
GRID, SPACING = 50, 20
# from this part of the training on, the teacher steps over so many grid points: a short chain learns fast, a long
# one has the smaller error
JUMPS = ((0.0, 10), (0.25, 5), (0.6, 2))
HUBER = 1e-3
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
LAYERS += ["conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj"]


def jump_at(share: float) -> int:
    """Grid points of the teacher's step at this part of the training."""
    return [jump for begin, jump in JUMPS if share >= begin][-1]


def column(values: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, 1, 1]``."""
    return values.view(-1, 1, 1, 1)


@torch.no_grad()
def text_states(pipe: StableDiffusionPipeline) -> Tensor:
    """Of every caption, object by object, and last of the empty one: ``[1525, 20, 128]``."""
    lines = [data.caption(noun, colour) for noun in data.OBJECTS for colour in data.COLOUR_NAMES] + [""]
    return torch.cat([pipe.text_encoder(part).last_hidden_state for part in tokenize(pipe.tokenizer, lines).split(127)])


def guided(unet: UNet2DConditionModel, x: Tensor, t: Tensor, states: Tensor, empty: Tensor) -> Tensor:
    """The noise with classifier-free guidance."""
    both = torch.cat([empty.expand_as(states), states])
    free, cond = unet(torch.cat([x, x]), torch.cat([t, t]), both).sample.chunk(2)
    return free + GUIDANCE * (cond - free)


def piece_lines(piece: int) -> Tensor:
    """Every object once, each on another colour than in the other pieces: indices of captions ``[127]``."""
    objects = torch.arange(len(data.OBJECTS))
    # 5 and 12 have no common divisor: one piece holds all colours
    return objects * len(data.COLOUR_NAMES) + (5 * objects + 3 * piece + piece // 4) % len(data.COLOUR_NAMES)


def piece_noise(piece: int) -> Tensor:
    return torch.randn(len(data.OBJECTS), 4, 16, 16, generator=torch.Generator().manual_seed(4000 + piece))


@torch.no_grad()
def teacher_latents(pipe: StableDiffusionPipeline, states: Tensor, work: Path) -> tuple[Tensor, Tensor]:
    """DDIM-20 latents ``[127 * PIECES, 4, 16, 16]`` and their captions, kept in ``work/student-pool``."""
    folder = work / "student-pool"
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(20)
    parts = []
    for piece in range(PIECES):
        path, lines = folder / f"{piece:02d}.safetensors", piece_lines(piece)
        if not path.exists():
            x = piece_noise(piece)
            for t in scheduler.timesteps:
                noise = guided(pipe.unet, x, t.expand(len(x)), states[lines], states[-1:])
                x = scheduler.step(noise, t, x).prev_sample
            save_file({"latents": x}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            print(f"teacher's latents {piece + 1}/{PIECES}", flush=True)
        parts.append((load_file(path)["latents"], lines))
    latents, captions = zip(*parts, strict=True)
    return torch.cat(latents), torch.cat(captions)


def boundary(scheduler: LCMScheduler, t: Tensor) -> tuple[Tensor, Tensor]:
    """LCMScheduler's c_skip and c_out at the timesteps ``[B]``."""
    return scheduler.get_scalings_for_boundary_condition_discrete(t.float())


def predicted(noise: Tensor, x: Tensor, level: Tensor) -> Tensor:
    """The clean latent that ``x`` holds, if this is its noise."""
    return (x - column((1 - level).sqrt()) * noise) / column(level.sqrt())


@torch.no_grad()
def draw(unet: nn.Module, scheduler: LCMScheduler, x: Tensor, states: Tensor, *, calls: int) -> Tensor:
    """The student's latents from the noise ``x``."""
    scheduler.set_timesteps(calls)
    generator = torch.Generator().manual_seed(6)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, states).sample, t, x, generator=generator).prev_sample
    return x


def write(unet: UNet2DConditionModel, folder: Path) -> None:
    """The file ``load_lora_weights`` reads, in fp16; peft's names throughout, as diffusers drops the fewer of a mix."""
    layers = {name: tensor.half() for name, tensor in get_peft_model_state_dict(unet, adapter_name="default").items()}
    settings = unet.peft_config["default"].to_dict() | {"target_modules": sorted(LAYERS)}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=settings)


def train_student(*, steps: int, work: Path) -> None:
    """Consistency of neighbouring points of the teacher's path; writes ``weights/student``."""
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "emoji", dtype=torch.float32)
    teacher = pipe.unet.requires_grad_(False).eval()
    states = text_states(pipe)
    latents, lines = teacher_latents(pipe, states, work)
    torch.manual_seed(0)
    student = copy.deepcopy(teacher)
    student.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    adapter = nn.ParameterList(p for p in student.parameters() if p.requires_grad)
    scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=GRID)
    levels = scheduler.alphas_cumprod

    def consistency(x: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        skip, out = boundary(scheduler, t)
        noise = student(x, t, caption).sample
        return column(skip) * x + column(out) * predicted(noise, x, levels[t])

    first = batch_generator("student", 0).initial_seed()

    def loss_of(_: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        jump = jump_at((generator.initial_seed() - first) / steps)
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        caption = states[lines[pick]]
        t = (torch.randint(GRID, (BATCH,), generator=generator) + 1) * SPACING - 1
        earlier = (t - jump * SPACING).clamp(min=0)
        noise = torch.randn(BATCH, 4, 16, 16, generator=generator)
        x = column(levels[t].sqrt()) * latents[pick] + column((1 - levels[t]).sqrt()) * noise
        with torch.no_grad():
            noise = guided(teacher, x, t, caption, states[-1:])
            clean = predicted(noise, x, levels[t])
            nearer = column(levels[earlier].sqrt()) * clean + column((1 - levels[earlier]).sqrt()) * noise
            target = consistency(nearer, earlier, caption)
        error = consistency(x, t, caption) - target
        loss = ((error.square() + HUBER**2).sqrt() - HUBER).mean()
        return loss, {"loss": loss.item(), "jump": jump}

    @torch.no_grad()
    def preview(_: nn.Module, step: int) -> None:
        shown = torch.arange(0, 127, 4)
        caption = states[piece_lines(0)[shown]]
        rows = [latents[shown]]
        rows += [draw(student, scheduler, piece_noise(0)[shown], caption, calls=calls) for calls in (2, 4)]
        images = [(pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1) for z in rows]
        far = [(row - images[0]).abs().mean().item() for row in images[1:]]
        print(f"student {step}: L1 from DDIM-20, 2 calls {far[0]:.4f}, 4 calls {far[1]:.4f}", flush=True)
        picture = [part for parts in zip(*(row.split(16) for row in images), strict=True) for part in parts]
        save_image(torch.cat(picture), work / f"student_{step:05d}.png", nrow=16)
        write(student, work / "student")

    fit("student", adapter, loss_of, steps=steps, peak_rate=2e-3, work=work, preview=preview)
    write(student, WEIGHTS / "student")
