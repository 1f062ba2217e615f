"""What the terminal shows when a run is done: one table and the path of the page. Plain when piped."""

from __future__ import annotations

from pathlib import Path

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


def summary(root: Path) -> str:
    """The frontier as a table, then where the page lies."""
    results = read_json(root / "results.json")
    seeds = max((len(p["seeds"]) for p in results["frontier"]), default=1)
    scope = f"{seeds} seeds" if seeds > 1 else "this run only"
    title = f"{results['warm_start']['n']} held-out activations, 95 % intervals, {scope}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("", "tokens", "saved", "FVE", "ΔFVE to λ=0", "ΔFVE to warm start"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    warm = results["warm_start"]
    table.add_row("warm start", number(warm["tokens"], 1), "", number(warm["fve"]), "", "")
    for p in results["frontier"]:
        if p["scorer"] == "own":
            saved = f"{p['tokens_saved']['mean']:.0%}" if p["tokens_saved"] else ""
            delta = number(p["delta_fve"], sign=True) + (" no loss" if p["no_loss"] else "") if p["delta_fve"] else ""
            table.add_row(
                f"λ={p['lambda']:g}",
                number(p["tokens"], 1),
                saved,
                number(p["fve"]),
                delta,
                number(p["delta_fve_warm"], sign=True),
            )
    console = Console(width=118)
    with console.capture() as captured:
        console.print(table)
        console.print(f"\n{root / 'report' / 'report.html'}", style="bold", soft_wrap=True)
    return captured.get().rstrip("\n")
