"""What every training loop here shares: the optimizer, its schedule, the guarded step, the order of the data."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn


def adamw(module: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay, β 0.9/0.95, over the parameters that train."""
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95), weight_decay=0.0
    )


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then cosine to 10 %. A function of the step, so nothing to resume."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def guarded_step(optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float | None:
    """Clip, step and clear. Returns the gradient norm, or None if it was not finite: then nothing changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    finite = bool(torch.isfinite(norm))
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm) if finite else None


def batch_rows(n: int, size: int, step: int, seed: int) -> np.ndarray:
    """The rows of batch `step`: every epoch a new permutation of n, drawn from (seed, epoch). A function of its arguments."""
    positions = np.arange(step * size, (step + 1) * size)
    epochs = positions // n
    order = {e: np.random.default_rng([seed, int(e)]).permutation(n) for e in np.unique(epochs)}
    return np.array([order[e][p % n] for e, p in zip(epochs, positions, strict=True)])
