"""The one training loop of the embedded models: AdamW, one-cycle rate, EMA, resumable, a log line now and then."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def batch_generator(stage: str, step: int) -> torch.Generator:
    """Draws depend on the stage and the step only, so a resumed run sees the same batches."""
    return torch.Generator().manual_seed(sum(ord(c) * 31**k for k, c in enumerate(stage)) % 2**20 * 4096 + step)


def rate_at(step: int, steps: int, peak: float) -> float:
    """One cycle: linear warm-up over the first 5 %, then cosine to 1 % of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def fit(
    stage: str,
    model: nn.Module,
    loss_of: Callable[[nn.Module, torch.Generator], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    peak_rate: float,
    work: Path,
    preview: Callable[[nn.Module, int], None] | None = None,
    weight_decay: float = 0.01,
    ema_decay: float = 0.998,
) -> nn.Module:
    """Train to ``steps`` (from ``work/<stage>.pt`` when it is there); the model ends with its averaged weights."""
    state_path = work / f"{stage}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    start, spent = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, start, spent = state["averaged"], state["step"], state["seconds"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
        state |= {"step": step, "seconds": spent}
        torch.save(state, state_path.with_suffix(".tmp"))
        state_path.with_suffix(".tmp").replace(state_path)

    def swap() -> None:
        for name, parameter in model.named_parameters():
            parameter.data, averaged[name] = averaged[name], parameter.data

    for step in range(start, steps):
        tick = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, peak_rate)
        loss, numbers = loss_of(model, batch_generator(stage, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        for name, parameter in model.named_parameters():
            averaged[name].lerp_(parameter.detach(), 1 - decay)
        spent += time.perf_counter() - tick
        if (step + 1) % 25 == 0:
            shown = " ".join(f"{key} {value:.4f}" for key, value in numbers.items())
            left = (steps - step - 1) * spent / (step + 1) / 60
            print(
                f"{stage} {step + 1}/{steps} {shown} | {spent / (step + 1):.2f} s each, {left:.0f} min left", flush=True
            )
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save(step + 1)
            if preview is not None:
                swap()
                with torch.no_grad():
                    preview(model.eval(), step + 1)
                swap()
                model.train()
    swap()
    return model.eval()
