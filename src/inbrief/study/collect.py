"""Evaluate the runs of a folder and bring them together in results.json."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from inbrief import __version__
from inbrief.config import Config
from inbrief.data import store as stores
from inbrief.data.store import read_table
from inbrief.io.runfolder import SCHEMA, identity, read_json, write_json
from inbrief.metrics import DocumentBootstrap, fve
from inbrief.models import checkpoints
from inbrief.run import Run, RunName, taught
from inbrief.study import controls, frontier
from inbrief.study.evaluate import SAMPLES, Heldout, heldout, paired_delta, per_activation, result_row, sample_rows

WARM = "warm_start"
RIDGE_ROWS = 10_000


def samples_path(run: Run, name: RunName | None) -> Path:
    return (run.warm if name is None else run.folder(name)) / "samples.parquet"


def evaluate_one(config: Config, root: Path, name: RunName | None) -> None:
    """Sample the held-out activations with one run's AV (None: the warm start's) and score with its own AR and the warm
    start's. Writes samples.parquet beside the AV."""
    run = Run(config, root)
    stage = run.stage("evaluate", name)
    if stage.finished():
        return
    with stage.running():
        held = heldout(run.store(), config.evaluate.activations)
        folder = run.warm if name is None else run.folder(name)
        dtype = config.model.dtype
        av = checkpoints.load_verbalizer(folder / "av", dtype)
        scorers = {"own": checkpoints.load_reconstructor(folder / "ar", dtype)}
        if name is not None:
            scorers[WARM] = checkpoints.load_reconstructor(run.warm / "ar", dtype)
        e = config.evaluate
        label, seed = (WARM, -1) if name is None else (name.folder, name.seed)
        rows = sample_rows(av, scorers, held, label, seed, e.samples, config.reinforce.cap, e.seed)
        stores.write_table(samples_path(run, name), rows, SAMPLES)
        if name is None:
            _warm_controls(run, held, scorers["own"], rows, stage.folder / "controls.json")


def _warm_controls(run: Run, held: Heldout, ar, rows: list[dict[str, Any]], path: Path) -> None:
    """The controls that need the warm start alone: texts under its AR, and the ridge from token ids."""
    e = run.config.evaluate
    bootstrap = DocumentBootstrap(held.documents, e.bootstrap, e.seed)
    texts = taught(run)
    first = [r for r in rows if r["sample"] == 0]
    explanations = [r["explanation"] if r["extracted"] else None for r in first]
    found = controls.text_controls(ar, held, explanations, [texts[i] for i in held.activation_ids], bootstrap, e.seed)
    harvested = run.store()
    train = np.concatenate([harvested.rows("av"), harvested.rows("ar")])[:RIDGE_ROWS]
    ids = harvested.column("last_ids")
    found |= controls.ridge_controls([ids[i] for i in train], harvested.vectors(train), held, bootstrap)
    write_json(path, {"schema": SCHEMA, **found})


def collect(run: Run) -> dict[str, Any]:
    """Write results.json: one ROW per run and scorer, paired differences, and the controls. Left alone when it was made
    from these very evaluations, so that it goes on naming the code that made it."""
    c = run.config
    path = run.root / "results.json"
    evaluated = [run.stage("evaluate", name).identity for name in (None, *run.runs())]
    made_from = identity(evaluated, c.evaluate.bootstrap, SCHEMA)
    if path.is_file() and read_json(path).get("identity") == made_from:
        return read_json(path)
    held = heldout(run.store(), c.evaluate.activations)
    bootstrap = DocumentBootstrap(held.documents, c.evaluate.bootstrap, c.evaluate.seed)
    per = c.evaluate.samples
    warm = read_table(samples_path(run, None))
    unit = {"unit": c.penalty.unit}
    head = {"model": c.model.path, "commit": commit()}

    def row(samples: list[dict[str, Any]], scorer: str, **more: Any) -> dict[str, Any]:
        return result_row(samples, scorer, held, bootstrap, per, **head, **more)

    warm_row = row(warm, "own", penalty={"kind": "none", "value": None, **unit}, **{"lambda": None}, seed=None, steps=0)
    rows: list[dict[str, Any]] = []
    found = read_json(run.stage("evaluate").folder / "controls.json")
    found.pop("schema")
    loaded = {name: read_table(samples_path(run, name)) for name in run.runs()}
    for name, samples in loaded.items():
        if name.value is None:
            mse = per_activation([r for r in samples if r["scorer"] == "own"], per)["mse"]
            found["ar_catchup"] = bootstrap.interval(fve(mse, held.base.value))
            continue
        control = next((s for n, s in loaded.items() if n.value == 0 and n.seed == name.seed), None)
        for scorer in ("own", WARM):
            penalty = {"kind": name.kind, "value": name.value, **unit}
            entry = row(
                samples, scorer, penalty=penalty, **{"lambda": name.value}, seed=name.seed, steps=c.reinforce.steps
            )
            if control is not None and name.value != 0:
                entry["delta_fve"] = paired_delta(samples, control, scorer, held.base.value, bootstrap, per)
            entry["delta_fve_warm"] = _against_warm(samples, warm, scorer, held, bootstrap, per)
            rows.append(entry)
    results = {"schema": SCHEMA, "baseline": held.base.value, "warm_start": warm_row, "runs": rows, "controls": found}
    trained = {(n.value, n.seed): samples for n, samples in loaded.items() if n.value is not None}
    results["frontier"] = [
        point
        for scorer in ("own", WARM)
        for point in frontier.points(trained, warm, scorer, held.base.value, bootstrap, per)
    ]
    results |= {
        "identity": made_from,
        "baseline_normalised_mean": held.base.normalised_mean,
        "layer": c.model.layer,
        "version": __version__,
    }
    write_json(path, results)
    return results


def _against_warm(samples, warm, scorer: str, held: Heldout, bootstrap: DocumentBootstrap, per: int):
    mine = per_activation([r for r in samples if r["scorer"] == scorer], per)["mse"]
    theirs = per_activation(warm, per)["mse"]  # the warm start has one scorer: its own AR
    return bootstrap.interval((theirs - mine) / held.base.value)


def commit() -> str | None:
    """The code's commit where it runs from a checkout, with `+` for uncommitted changes; None in an installed package."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5
        )
        if sha.returncode:
            return None
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=here, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return sha.stdout.strip() + ("+" if dirty.stdout.strip() else "")
