"""What a token costs, and what an answer earns. Pure functions of arrays."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from inbrief.metrics import FAILED_MSE


def linear(tokens: Tensor, value: float) -> Tensor:
    """λ · tokens (the seed's penalty), any shape."""
    return value * tokens


def rewards(
    mse: Tensor, failed: Tensor, tokens: Tensor, cap: int, value: float, rule: Literal["never-pays", "seed"]
) -> tuple[Tensor, Tensor]:
    """(penalised, unpenalised) reward, shapes as mse: mse float, failed bool, tokens float.

    A scored answer earns −mse − λ·tokens. Under `never-pays` a failed one earns −2 − λ·cap, and a scored one is never
    charged for more error than 2, so no answer earns more by failing. Under `seed` a failed one earns −2 − λ·(its own
    tokens), and mse is charged in full.
    """
    if rule == "never-pays":
        raw = -mse.clamp(max=FAILED_MSE).masked_fill(failed, FAILED_MSE)
        return raw - linear(tokens.clamp(max=float(cap)).masked_fill(failed, float(cap)), value), raw
    raw = -mse.masked_fill(failed, FAILED_MSE)
    return raw - linear(tokens, value), raw
