"""report.html: the frontier, the table and held-out activations with every λ's explanation side by side, in one file."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from inbrief.contract.contract import Contract
from inbrief.data.store import read_table
from inbrief.io.runfolder import atomic_path, read_json
from inbrief.metrics import Interval
from inbrief.models import checkpoints
from inbrief.report import figures
from inbrief.report.terminal import number
from inbrief.run import Run
from inbrief.study.collect import samples_path

CONTROL_NAMES = {
    "mean_vector": "the mean vector for all",
    "teacher": "the teacher's text",
    "shuffled": "another activation's explanation",
    "shuffled_same_last_token": "another's with the same last token",
    "ridge_last_1": "ridge on the last token id",
    "ridge_last_2": "ridge on the last 2 ids",
    "ridge_last_4": "ridge on the last 4 ids",
    "ridge_last_8": "ridge on the last 8 ids",
    "ar_catchup": "AV frozen, AR trained on",
}


def write(run: Run) -> None:
    """Draw the figures and write the page under report/, replacing what was there."""
    results = read_json(run.root / "results.json")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("inbrief.report").joinpath("page.html").read_text(encoding="utf-8")
    with atomic_path(run.root / "report") as folder:
        folder.mkdir()
        figures.tradeoff(results, folder)
        svg = (folder / "tradeoff.svg").read_text(encoding="utf-8")
        page = environment.from_string(source).render(
            title=run.root.name,
            figure=Markup(svg[svg.index("<svg") :]),  # drawn from numbers alone
            results=results,
            points=[p for p in results["frontier"] if p["scorer"] == "own"],
            strict={p["lambda"]: p for p in results["frontier"] if p["scorer"] == "warm_start"},
            by_value={
                n.value: results["controls"]["runs"][n.folder] for n in reversed(run.runs()) if n.value is not None
            },
            controls=[(CONTROL_NAMES[k], v) for k, v in results["controls"].items() if k in CONTROL_NAMES],
            headline=headline(results),
            examples=examples(run),
            ramp=[tint(x) for x in np.linspace(0, 1, 9)],
            spread=spread,
            contract=Contract.load(run.data),
        )
        (folder / "report.html").write_text(page, encoding="utf-8")


def headline(results: dict[str, Any]) -> str:
    """What the run says, in two sentences: how short it can get, and what goes."""
    points = [p for p in results["frontier"] if p["scorer"] == "own" and p["delta_fve"]]
    if not points:
        return "No penalised run stands beside λ = 0 yet."
    seeds = len(points[0]["seeds"])
    scope = f"over {seeds} seeds" if seeds > 1 else "in this run only"
    free = [p for p in points if p["no_loss"] and p["tokens_saved"]["low"] > 0]
    if free:
        best = max(free, key=lambda p: p["tokens_saved"]["mean"])
        first = (
            f"At λ = {best['lambda']:g} explanations are {best['tokens_saved']['mean']:.0%} shorter than at λ = 0 with no loss of FVE "
            f"({number(best['delta_fve'], sign=True)}, {scope})."
        )
    else:
        least = max(points, key=lambda p: p["delta_fve"]["mean"])
        first = (
            f"For no λ > 0 that saves tokens can a loss be ruled out; the least is at λ = {least['lambda']:g}: FVE "
            f"{number(least['delta_fve'], sign=True)} at {least['tokens_saved']['mean']:.0%} of the tokens saved ({scope})."
        )
    last = points[-1]
    fate = (
        "below"
        if last["delta_fve_warm"]["high"] < 0
        else "above"
        if last["delta_fve_warm"]["low"] > 0
        else "level with"
    )
    return f"{first} At λ = {last['lambda']:g}, {last['tokens']['mean']:.0f} tokens remain and FVE is {fate} the warm start."


def spread(ci: Interval | None, digits: int = 3, sign: bool = False) -> Markup:
    """A mean with its interval in small figures."""
    if ci is None:
        return Markup("–")
    f = f"{'+' if sign else ''}.{digits}f"
    shown = (f"{ci[k]:{f}}".replace("-", "−") for k in ("mean", "low", "high"))
    return Markup("{} <small>{} to {}</small>").format(*shown)


def tint(fve: float) -> str:
    """A colour-blind-safe colour (cividis) for an FVE between 0 and 1; below 0 as 0."""
    return to_hex(colormaps["cividis"](float(np.clip(fve, 0, 1))))


def examples(run: Run) -> list[dict[str, Any]]:
    """Every k-th held-out activation (not chosen for looks): its text, its token, and each run's explanation of it."""
    c = run.config
    if not c.report.examples:
        return []
    tables = [("warm start", samples_path(run, None))]
    tables += [
        (f"λ = {n.value:g}", samples_path(run, n))
        for n in run.runs()
        if n.value is not None and n.seed == c.reinforce.seeds[0]
    ]
    columns = [
        (label, [r for r in read_table(path) if r["scorer"] == "own" and r["sample"] == 0]) for label, path in tables
    ]
    ids = [r["activation_id"] for r in columns[0][1]]
    harvested = run.store()
    place = {a: i for i, a in enumerate(harvested.column("activation_id"))}
    tokenizer = checkpoints.load_tokenizer(c.model.path, c.model.revision)
    index = {name: harvested.column(name) for name in ("text", "rest", "token_id", "doc_id", "position")}
    chosen = np.unique(np.linspace(0, len(ids) - 1, c.report.examples).astype(int))
    out = []
    for i in chosen:
        row = place[ids[i]]
        token = tokenizer.decode([index["token_id"][row]])
        text = index["text"][row]
        before = text.removesuffix(token) if text.endswith(token) else text
        out.append(
            {
                "id": ids[i],
                "doc": index["doc_id"][row],
                "position": index["position"][row],
                "before": before,
                "token": text[len(before) :],
                "after": index["rest"][row],
                "said": [_said(label, rows[i]) for label, rows in columns],
            }
        )
    return out


def _said(label: str, row: dict[str, Any]) -> dict[str, Any]:
    fve: float = row["fve"]
    width = round(100 * float(np.clip(fve, 0, 1)), 1)
    return {**row, "label": label, "width": width, "tint": tint(fve), "failed": not row["extracted"]}
