"""Figures ready for a paper: axes named with units, intervals drawn, direct labels."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK, ACCENT, QUIET = "#222222", "#1f5fa8", "#9a9a9a"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "inbrief",
    "figure.dpi": 160,
}


def tradeoff(results: dict[str, Any], folder: Path) -> None:
    """tradeoff.png and tradeoff.svg: tokens against FVE, one point per λ, the warm start as its own mark."""
    points = [p for p in results["frontier"] if p["scorer"] == "own"]
    warm = results["warm_start"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.0, 3.9), layout="constrained")
        axes.axhline(0, color=QUIET, lw=0.7, ls=(0, (2, 3)))
        axes.plot(
            [p["tokens"]["mean"] for p in points],
            [p["fve"]["mean"] for p in points],
            color=ACCENT,
            lw=1.1,
            alpha=0.55,
            zorder=1,
        )
        for row in results["runs"]:
            if row["scorer"] == "own" and any(len(p["seeds"]) > 1 for p in points):
                axes.plot(
                    row["tokens"]["mean"], row["fve"]["mean"], "o", ms=2.6, color=ACCENT, alpha=0.35, mew=0, zorder=1
                )
        for p in points:
            _mark(axes, p, ACCENT, "o", 5.5)
        _mark(axes, warm, INK, "*", 11)
        marks = [(f"λ = {p['lambda']:g}", p, ACCENT) for p in points] + [("warm start", warm, INK)]
        axes.margins(x=0.13, y=0.16)
        _label(axes, marks)
        axes.set_xlabel("tokens per explanation")
        axes.set_ylabel("FVE, failures included")
        seeds = max(len(p["seeds"]) for p in points)
        over = f"{seeds} seeds and documents" if seeds > 1 else "documents (one seed: this run only)"
        axes.set_title(
            f"n = {warm['n']} held-out activations; bars: 95 % over {over}", fontsize=8, color="#666666", loc="left"
        )
        for suffix in ("png", "svg"):
            vector = suffix == "svg"
            figure.savefig(
                folder / f"tradeoff.{suffix}", dpi=200, transparent=vector, metadata={"Date": None} if vector else None
            )
        plt.close(figure)


def _mark(axes, point: dict[str, Any], colour: str, marker: str, size: float) -> None:
    x, y = point["tokens"], point["fve"]
    axes.errorbar(
        x["mean"],
        y["mean"],
        xerr=[[max(0, x["mean"] - x["low"])], [max(0, x["high"] - x["mean"])]],
        yerr=[[max(0, y["mean"] - y["low"])], [max(0, y["high"] - y["mean"])]],
        fmt=marker,
        ms=size,
        color=colour,
        mew=0,
        elinewidth=0.9,
        capsize=1.8,
        capthick=0.9,
        zorder=3,
    )


def _label(axes, marks: list[tuple[str, dict[str, Any], str]]) -> None:
    """Label each mark (the warm start last) on the side that covers the fewest marks, labels and stretches of the line."""
    axes.figure.canvas.draw()
    where = [tuple(axes.transData.transform((p["tokens"]["mean"], p["fve"]["mean"]))) for _, p, _ in marks]
    curve = where[:-1]  # all but the warm start stand on one line
    line = [(1 - t) * np.array(a) + t * np.array(b) for a, b in pairwise(curve) for t in np.linspace(0, 1, 40)]
    taken: list[Any] = []
    for (text, p, colour), (x, y) in zip(marks, where, strict=True):
        best = None
        sides = (
            (0, 9, "center"),
            (0, -17, "center"),
            (8, 7, "left"),
            (8, -14, "left"),
            (-8, 7, "right"),
            (-8, -14, "right"),
        )
        for dx, dy, ha in sides:
            half = {"left": 0.0, "right": -1.0, "center": -0.5}[ha]
            width, height = 13.0 * len(text) * 0.95, 24.0
            x0, y0 = x + dx * 2.2 + half * width, y + dy * 2.2
            middle = (x0 + width / 2, y0 + height / 2)
            inside = [x0 - 6 < qx < x0 + width + 6 and y0 - 4 < qy < y0 + height + 4 for qx, qy in (*where, *line)]
            cost = 20 * sum(inside[: len(where)]) + sum(inside[len(where) :])
            cost += sum(60 for a, b, w in taken if x0 < a + w and a < x0 + width and abs(b - y0) < height)
            # A label must not stand nearer to another mark than to its own.
            cost += 15 * (min(where, key=lambda q: math.dist(q, middle)) != (x, y))
            if best is None or cost < best[0]:
                best = (cost, dx, dy, ha, x0, y0, width)
        assert best is not None
        taken.append(best[4:])
        axes.annotate(
            text,
            (p["tokens"]["mean"], p["fve"]["mean"]),
            (best[1], best[2]),
            textcoords="offset points",
            ha=best[3],
            color=colour,
            fontsize=8.5,
        )
