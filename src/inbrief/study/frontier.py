"""Length against fidelity: the seeds of each λ brought together, with intervals over documents and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats

from inbrief.metrics import DocumentBootstrap, Interval
from inbrief.study.evaluate import per_activation

NO_LOSS = -0.02
"""A change is called "no loss" when the lower bound of its paired difference in FVE is at least this."""


def pooled(replicates: list[np.ndarray], means: list[float]) -> Interval:
    """Mean over seeds and its 95 % interval. `replicates` holds, per seed, the same document draws.

    With one seed: the percentiles over documents ("this run only"). With S seeds: half-width
    √((t·s/√S)² + (1.96·σ)²), s the standard deviation between seeds, t Student's 97.5 % point at S−1 degrees, σ the
    bootstrap deviation of the seeds' mean over documents. Resampling two or three seeds would cover far less than it says.
    """
    mean = float(np.mean(means))
    draws = np.mean(replicates, axis=0)
    if len(means) == 1:
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        return {"mean": mean, "low": float(low), "high": float(high)}
    between = float(scipy.stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5)
    half = float(np.hypot(between, 1.96 * np.nanstd(draws)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def points(
    runs: dict[tuple[float, int], list[dict[str, Any]]],
    warm: list[dict[str, Any]],
    scorer: str,
    base: float,
    bootstrap: DocumentBootstrap,
    samples_per: int,
) -> list[dict[str, Any]]:
    """One point per λ, from samples keyed by (λ, seed), all under `scorer`.

    Each has tokens, content_tokens, fve, delta_fve and tokens_saved (share of tokens; both paired against λ=0 of the same
    seed), delta_fve_warm, and whether the loss of FVE is below NO_LOSS.
    """
    table = {key: per_activation([r for r in rows if r["scorer"] == scorer], samples_per) for key, rows in runs.items()}
    warm_mse = per_activation(warm, samples_per)["mse"]
    out = []
    for value in sorted({v for v, _ in table}):
        seeds = sorted(s for v, s in table if v == value)
        mine = [table[value, s] for s in seeds]
        control = [table[0.0, s] for s in seeds if (0.0, s) in table]

        def interval(arrays: list[np.ndarray]) -> Interval:
            return pooled([bootstrap.replicates(a) for a in arrays], [float(a.mean()) for a in arrays])

        point: dict[str, Any] = {
            "lambda": value,
            "scorer": scorer,
            "seeds": seeds,
            "tokens": interval([m["tokens"] for m in mine]),
            "content_tokens": interval([m["content_tokens"] for m in mine]),
            "fve": interval([1 - m["mse"] / base for m in mine]),
            "fve_extracted": _over_readable([runs[value, s] for s in seeds], scorer, base),
            "extraction_rate": float(np.mean([m["extracted"].mean() for m in mine])),
            "delta_fve": None,
            "tokens_saved": None,
            "no_loss": None,
            "delta_fve_warm": interval([(warm_mse - m["mse"]) / base for m in mine]),
        }
        if value and len(control) == len(mine):
            delta = interval([(c["mse"] - m["mse"]) / base for m, c in zip(mine, control, strict=True)])
            ratios = [
                1 - bootstrap.replicates(m["tokens"]) / bootstrap.replicates(c["tokens"])
                for m, c in zip(mine, control, strict=True)
            ]
            means = [1 - m["tokens"].mean() / c["tokens"].mean() for m, c in zip(mine, control, strict=True)]
            point |= {"delta_fve": delta, "tokens_saved": pooled(ratios, means), "no_loss": delta["low"] >= NO_LOSS}
        out.append(point)
    return out


def _over_readable(runs: list[list[dict[str, Any]]], scorer: str, base: float) -> float | None:
    """Mean fve over every readable sample of the seeds; None where there is none."""
    mse = [r["mse"] for rows in runs for r in rows if r["scorer"] == scorer and r["extracted"]]
    return 1 - float(np.mean(mse)) / base if mse else None
