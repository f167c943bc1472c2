"""What mofasgd keeps, sends and takes beside AdamW (docs/optimizers.md, docs/many-gpus.md).

    python scripts/studies/low_rank_momentum.py count             state and bytes a step, from shapes
    python scripts/studies/low_rank_momentum.py state sdxl 32     state of a UNet of random bf16 weights after a step
    python scripts/studies/low_rank_momentum.py time sd15 16      CPU seconds of a step beside AdamW's, layer by layer
    python scripts/studies/low_rank_momentum.py peak OPTIMIZER    peak memory of a step of SD 1.5 at 256 pixels
    python scripts/studies/low_rank_momentum.py first             how good the first bases are, and the next

Weights are random, shapes are the published ones. Memory is this process's resident memory.
"""

import json
import resource
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sdo_cli import embedded
from sdo_cli.estimate.momentum import momentum_bytes, product_bytes
from sdo_cli.models.single_file import CONFIGS
from sdo_cli.optimizers.low_rank import Factors, project, start
from sdo_cli.optimizers.mofasgd import MoFaSGD, matrices_of
from sdo_cli.optimizers.stepper import Stepper
from sdo_cli.optimizers.together import Together
from sdo_cli.recipe.load import load_recipe

RECIPE = ["train=full", "optimizer=mofasgd"]


def unet_of(kind: str, device: str = "meta") -> nn.Module:
    from diffusers import UNet2DConditionModel

    folder = embedded.folder("embedded", "emoji") if kind == "embedded" else CONFIGS / kind
    folder = folder / "unet"
    with torch.device(device):
        return UNet2DConditionModel.from_config(json.loads((folder / "config.json").read_text()))


def resident(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def used() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def count() -> None:
    for kind in ("embedded", "sd15", "sdxl"):
        parameters = list(unet_of(kind).parameters())
        matrices, others = matrices_of(model := unet_of(kind), list(model.parameters()))
        total, rest = (sum(p.numel() for p in some) for some in (parameters, others))
        shapes = [(len(p), p[0].numel()) for p in matrices]
        for rank in (16, 32):
            state, sent = momentum_bytes(shapes, rank) + 8 * rest, product_bytes(shapes, rank) + 4 * rest
            print(
                f"{kind:9} rank {rank}: {len(shapes)} matrices, AdamW {8 * total / 1e9:.3f} GB, state "
                f"{state / 1e9:.3f} GB ({state / 8 / total:.4f}), sent {sent / 1e6:.1f} of {4 * total / 1e6:.1f} MB "
                f"a step ({sent / 4 / total:.4f}), what is no matrix {rest / 1e6:.2f} M"
            )


def state(kind: str, rank: int) -> None:
    """Every tensor of the state, and by how much memory grew; gradients come and go one by one."""
    torch.set_default_dtype(torch.bfloat16)
    model = unet_of(kind, "cpu")
    torch.set_default_dtype(torch.float32)
    recipe = load_recipe("quickstart", [*RECIPE, f"optimizer_rank={rank}"]).recipe
    matrices, others = matrices_of(model, list(model.parameters()))
    before = resident()
    adamw = torch.optim.AdamW(others, fused=True)
    stepped = MoFaSGD(recipe, matrices=matrices, parameters=[*matrices, *others], adamw=adamw)
    for parameter in (*matrices, *others):
        parameter.grad = torch.empty_like(parameter).uniform_(-1e-3, 1e-3)
    for matrix in stepped.matrices:
        matrix.take()
    stepped.step()
    tensors = [t for of_one in adamw.state.values() for t in of_one.values()]
    tensors += [tensor for matrix in stepped.matrices for tensor in matrix.tensors]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    print(
        f"{kind} rank {rank}: {sum(p.numel() for p in model.parameters()):,} in bf16, state {held / 1e9:.3f} GB, "
        f"resident memory {(resident() - before) / 1e9:+.3f} GB"
    )


def timed(kind: str, rank: int, rounds: int = 3) -> None:
    """Layer by layer, one after the other, so that little memory is needed; both with clipping, AdamW fused."""
    torch.set_num_threads(1)
    recipe = load_recipe("quickstart", [*RECIPE, f"optimizer_rank={rank}"]).recipe
    meta = unet_of(kind)
    taken = {id(p) for p in matrices_of(meta, list(meta.parameters()))[0]}
    shapes = [(tuple(p.shape), id(p) in taken) for p in meta.parameters()]
    seconds = dict.fromkeys(("adamw", "projecting", "stepping"), 0.0)
    for few in _chunks(shapes, 40_000_000):
        for name, found in _times(recipe, few, rounds).items():
            seconds[name] += found
    mine = seconds["projecting"] + seconds["stepping"]
    print(
        f"{kind} rank {rank}, CPU seconds a step, one thread: "
        + ", ".join(f"{k} {v:.3f}" for k, v in seconds.items())
        + f"; in all {mine / seconds['adamw']:.2f} times AdamW's"
    )


def _chunks(shapes: list, most: int) -> list[list]:
    chunks: list[list] = [[]]
    for shape in shapes:
        if sum(torch.Size(s).numel() for s, _ in chunks[-1]) > most:
            chunks.append([])
        chunks[-1].append(shape)
    return chunks


def _times(recipe, shapes: list, rounds: int) -> dict[str, float]:
    weights = [nn.Parameter(torch.randn(shape)) for shape, _ in shapes]
    matrices = [weight for weight, (_, is_matrix) in zip(weights, shapes, strict=True) if is_matrix]
    rest = [weight for weight, (_, is_matrix) in zip(weights, shapes, strict=True) if not is_matrix]
    gradients = [torch.randn_like(weight) for weight in weights]
    adamw = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    beside = torch.optim.AdamW(rest or [nn.Parameter(torch.zeros(1))], lr=1e-6, fused=True)
    mine = MoFaSGD(recipe, matrices=matrices, parameters=weights, adamw=beside)
    best = dict.fromkeys(("adamw", "projecting", "stepping"), float("inf"))
    for _ in range(rounds + 1):
        _give(weights, gradients)
        cpu = used()
        nn.utils.clip_grad_norm_(weights, 1.0)
        adamw.step()
        best["adamw"] = min(best["adamw"], used() - cpu)
        _give(weights, gradients)
        cpu = used()
        for matrix in mine.matrices:
            matrix.take()
        best["projecting"] = min(best["projecting"], used() - cpu)
        cpu = used()
        mine.step()
        best["stepping"] = min(best["stepping"], used() - cpu)
    return best


def _give(weights: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient


def peak(optimizer: str, pixels: int = 256, steps: int = 1) -> None:
    """Steps of a UNet of SD 1.5's shape at this size, fp32, recomputed blocks; no VAE, no reward, random conditions."""
    torch.manual_seed(0)
    recipe = load_recipe("quickstart", ["train=full", f"optimizer={optimizer}"]).recipe
    model = unet_of("sd15", "cpu")
    model.enable_gradient_checkpointing()
    model.train()
    parameters = list(model.parameters())
    how = {}
    if optimizer == "mofasgd":
        matrices, others = matrices_of(model, parameters)
        how = {"deal": partial(MoFaSGD, recipe, matrices=matrices), "adamw_only": others}
    stepper, loaded, took = Stepper(recipe, parameters, **how), resident(), []
    Path("/proc/self/clear_refs").write_text("5")
    for step in range(steps):
        cpu = used()
        for _ in range(2):
            x, condition = torch.randn(1, 4, pixels // 8, pixels // 8), torch.randn(1, 77, 768)
            e = model(x, torch.tensor([500.0]), encoder_hidden_states=condition).sample
            stepper.backward((e * torch.randn_like(e)).sum())
        passes, cpu = used() - cpu, used()
        stepper.step(step + 1)
        took.append((round(passes, 2), round(used() - cpu, 2)))
    print(
        f"{optimizer}: weights {loaded / 1e9:.2f} GB resident, peak {resident('VmHWM') / 1e9:.2f} GB; "
        f"CPU seconds of two passes and of the step: {took}"
    )


def first() -> None:
    """Share of the best gain at this rank that the bases have: begun at random, and by Nyström's approximation."""
    generator = torch.Generator().manual_seed(0)
    for setting in ((320, 2880, 16, 1.0), (640, 640, 32, 1.0), (640, 640, 32, 0.5)):
        m, n, rank, power = setting
        spectrum = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power
        left, right = (torch.linalg.qr(_normal(generator, side, len(spectrum)))[0] for side in (m, n))
        noise, signal = 0.3 * spectrum.norm() / (m * n) ** 0.5, left * spectrum @ right.T
        begun, M, found = start(m, n, rank, generator, torch.float64), torch.zeros(m, n, dtype=torch.float64), []
        ways: dict[str, Factors] = {}
        for step in range(1, 9):
            G = signal + noise * _normal(generator, m, n)
            M = 0.9 * M + G
            ways = {name: _stepped(factors, G) for name, factors in ways.items()}
            ways = ways or {"random": _stepped(begun, G), "nystrom": _nystrom(begun, G)}
            most = torch.linalg.svdvals(M)[:rank].sum()
            if step in (1, 2, 8):
                gains = {name: f"{float((f.U.T @ M @ f.V).trace() / most):.2f}" for name, f in ways.items()}
                found.append(f"step {step} {gains}")
        print(f"{m} x {n}, rank {rank}, singular values i^-{power:g}: " + "; ".join(found))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _stepped(factors: Factors, G: Tensor) -> Factors:
    products = project(G, factors.U, factors.V)
    sides = list(zip((factors.U.clone(), factors.V.clone()), products, strict=True))
    S, _ = Together(sides).step(factors.S[None], 0.9, 1.0, "spectral")
    return Factors(sides[0][0], S[0], sides[1][0])


def _nystrom(factors: Factors, G: Tensor, cut: float = 0.1) -> Factors:
    """G ≈ GV (UᵀGV)⁺ UᵀG, small singular values of the middle left out: what one look at G also allows."""
    GV, GtU = project(G, factors.U, factors.V)
    (Q_U, R_U), (Q_V, R_V) = torch.linalg.qr(GV), torch.linalg.qr(GtU)
    P, S, Qt = torch.linalg.svd(R_U @ torch.linalg.pinv(factors.U.T @ GV, rtol=cut) @ R_V.T)
    return Factors(Q_U @ P, S, Q_V @ Qt.T)


if __name__ == "__main__":
    what, *given = sys.argv[1:] or ["count"]
    {
        "count": count,
        "state": lambda kind, rank: state(kind, int(rank)),
        "time": lambda kind, rank: timed(kind, int(rank)),
        "peak": peak,
        "first": first,
    }[what](*given)
