"""Advantages, KL estimators and the policy loss. Pure functions of arrays."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def advantages(rewards: Tensor, kind: Literal["std", "mean-only"]) -> Tensor:
    """rewards [n, group] -> [n, group]: reward minus the group's mean; `std` also divides by the group's unbiased
    standard deviation + 1e-6 (GRPO, arXiv 2402.03300; mean-only: Dr. GRPO, arXiv 2503.20783).

    A group without spread gives exactly zero, not rounding noise divided by 1e-6.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    centred = torch.where(spread <= 1e-6, torch.zeros_like(centred), centred)  # NaN goes through, to be counted
    if kind == "mean-only" or rewards.shape[1] < 2:
        return centred
    return centred / (rewards.std(1, keepdim=True) + 1e-6)


def kl(logp: Tensor, reference: Tensor, kind: Literal["k3", "k2"]) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) from tokens of the policy; same shape, differentiable in logp.

    k3 = e^Δ − Δ − 1 and k2 = Δ²/2 with Δ = log π_ref − log π (Schulman, "Approximating KL divergence", 2020). k1 = −Δ
    is not offered: as a loss its expected gradient is zero.
    """
    delta = reference - logp
    return delta.exp() - delta - 1 if kind == "k3" else 0.5 * delta.square()


def token_weights(lengths: Tensor, width: int, aggregation: Literal["sequence", "token"]) -> Tensor:
    """lengths [rows] of the whole batch -> [rows, width] weights that sum to 1, zero beyond each length.

    `sequence`: mean over a row's tokens, then over rows (the seed). `token`: mean over all tokens. Every row keeps its
    weight whatever micro-batch it falls into.
    """
    real = torch.arange(width, device=lengths.device)[None] < lengths[:, None]
    if aggregation == "sequence":
        return real / (lengths[:, None].clamp_min(1) * len(lengths))
    return real / lengths.sum().clamp_min(1)


def policy_loss(logp: Tensor, old: Tensor, advantage: Tensor, weights: Tensor, clip: float) -> Tensor:
    """Σ weights · −min(ρA, clip(ρ, 1±clip)A), ρ = exp(logp − old) (PPO, arXiv 1707.06347).

    logp, old, weights [rows, width]; advantage [rows]. Returns a scalar.
    """
    ratio = (logp - old).exp()
    a = advantage[:, None]
    return -(torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a) * weights).sum()
