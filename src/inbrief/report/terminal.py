"""What the terminal shows when a run is done: one table and the path of the page. Plain when piped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inbrief.io.runfolder import read_json
from inbrief.metrics import Interval


def number(ci: Interval | None, digits: int = 3, sign: bool = False) -> str:
    """'0.512 [0.498, 0.526]'; '–' where there is nothing to show."""
    if ci is None:
        return "–"
    f = f"{'+' if sign else ''}.{digits}f"
    return f"{ci['mean']:{f}} [{ci['low']:{f}}, {ci['high']:{f}}]"


def scope(results: dict[str, Any]) -> str:
    """What the intervals cover."""
    seeds = max((len(p["seeds"]) for p in results["frontier"]), default=1)
    return f"{results['warm_start']['n']} held-out activations, 95 % intervals, " + (
        f"{seeds} seeds" if seeds > 1 else "this run only"
    )


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The frontier under each run's own AR: name, tokens, saved, FVE, paired differences. The first row is the header."""
    warm = results["warm_start"]
    out = [
        ("", "tokens", "saved", "FVE", "ΔFVE to λ=0", "ΔFVE to warm start", "readable"),
        ("warm start", number(warm["tokens"], 1), "", number(warm["fve"]), "", "", f"{warm['extraction_rate']:.1%}"),
    ]
    for p in results["frontier"]:
        if p["scorer"] == "own":
            saved = f"{p['tokens_saved']['mean']:.0%}" if p["tokens_saved"] else ""
            delta = number(p["delta_fve"], sign=True) + (" no loss" if p["no_loss"] else "") if p["delta_fve"] else ""
            warm_delta = number(p["delta_fve_warm"], sign=True)
            out.append(
                (
                    f"λ={p['lambda']:g}",
                    number(p["tokens"], 1),
                    saved,
                    number(p["fve"]),
                    delta,
                    warm_delta,
                    f"{p['extraction_rate']:.1%}",
                )
            )
    return out


def markdown(results: dict[str, Any]) -> str:
    """The same table for a README."""
    header, *body = rows(results)
    lines = [header, ("---",) * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(root: Path) -> str:
    """The frontier as a table, then where the page lies."""
    results = read_json(root / "results.json")
    table = Table(title=scope(results), title_justify="left", box=None, pad_edge=False, header_style="bold")
    header, *body = rows(results)
    for name in header:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console = Console(width=160)  # wider than any row, so that no number is ever cut
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join([*lines, "", str(root / "report" / "report.html")])
