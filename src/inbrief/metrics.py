"""The numbers: direction error, fraction of variance explained (FVE), baselines, bootstrap. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FAILED_MSE = 2.0
"""The error of an explanation that could not be read: that of an orthogonal guess."""
Interval = dict[str, float]


def direction(v: Tensor) -> Tensor:
    """v̂ = √d · v/‖v‖ over the last axis, any shape. Raises ValueError on a zero, NaN or infinite vector."""
    norm = v.norm(dim=-1, keepdim=True)
    if not bool(torch.isfinite(norm).all()) or bool((norm == 0).any()):
        raise ValueError("A vector to compare must be finite and not zero.")
    return v * (v.shape[-1] ** 0.5 / norm)


def direction_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """mean over d of (p̂ − v̂)² = 2(1 − cos) over the last axis: [..., d], [..., d] -> [...] float32, differentiable.

    The norm is kept away from zero, so that a prediction near zero gives a bounded gradient instead of 1e12.
    """
    cosine = torch.nn.functional.cosine_similarity(prediction.float(), target.float(), dim=-1, eps=1e-4)
    return 2 * (1 - cosine)


@dataclass(frozen=True)
class Baseline:
    """What predicting one vector for all costs, on the evaluated set.

    `value` = mean ‖v̂ − μ‖²/d with μ = mean v̂ (the paper's definition); `normalised_mean` the same against √d·μ/‖μ‖
    (the seed's, always larger); `mean` is μ [d].
    """

    value: float
    normalised_mean: float
    mean: Tensor


def baseline(targets: Tensor) -> Baseline:
    """targets [n, d], raw. Accumulated in float64. Raises ValueError on an empty set, a bad vector or
    vectors without variance."""
    if len(targets) == 0:
        raise ValueError("A baseline needs at least one vector.")
    unit = direction(targets.double())
    mean = unit.mean(0)
    r = float(mean.norm()) / unit.shape[-1] ** 0.5
    if 1 - r * r < 1e-9:
        raise ValueError("A baseline needs vectors of different directions; these are all alike.")
    return Baseline(1 - r * r, 2 * (1 - r), mean.float())


def fve(mse: np.ndarray, base: float) -> np.ndarray:
    """fve_i = 1 − mse_i/B."""
    return 1 - np.asarray(mse, dtype=np.float64) / base


class DocumentBootstrap:
    """95 % intervals of means by resampling documents; the same draws serve every quantity, so differences pair up.

    Positions of one document are correlated, so rows are resampled document by document (multinomial weights).
    """

    def __init__(self, documents: Sequence[str], replicates: int = 1000, seed: int = 0) -> None:
        names, self.rows = np.unique(np.asarray(documents), return_inverse=True)
        self.n_documents = len(names)
        rng = np.random.default_rng(seed)
        self.weights = rng.multinomial(
            self.n_documents, np.full(self.n_documents, 1 / self.n_documents), size=replicates
        )

    def replicates(self, values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """[replicates] float64: the mean of `values` [n] over the rows of `mask` under each draw; NaN where it drew none."""
        keep = np.ones(len(values)) if mask is None else mask.astype(float)
        total = np.bincount(self.rows, np.where(keep > 0, values, 0.0), self.n_documents)
        count = np.bincount(self.rows, keep, self.n_documents)
        drawn = self.weights @ count
        return np.divide(self.weights @ total, drawn, out=np.full(len(drawn), np.nan), where=drawn > 0)

    def interval(self, values: np.ndarray, mask: np.ndarray | None = None) -> Interval | None:
        """Mean and 95 % interval, or None where no row counts (never a perfect score)."""
        values = np.asarray(values, dtype=np.float64)
        keep = np.ones(len(values), bool) if mask is None else mask.astype(bool)
        if not keep.any():
            return None
        low, high = np.nanpercentile(self.replicates(values, keep), [2.5, 97.5])
        return {"mean": float(values[keep].mean()), "low": float(low), "high": float(high)}
