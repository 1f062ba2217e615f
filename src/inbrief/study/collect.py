"""Evaluate the runs of a folder and bring them together in results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inbrief import __version__
from inbrief.config import Config
from inbrief.data import store as stores
from inbrief.data.store import read_table
from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import SCHEMA, identity, read_json, write_json
from inbrief.metrics import DocumentBootstrap, fve
from inbrief.models import checkpoints
from inbrief.models.reconstructor import Reconstructor
from inbrief.run import Run, RunName, taught
from inbrief.study import controls, frontier
from inbrief.study.evaluate import SAMPLES, Heldout, heldout, paired_delta, per_activation, result_row, sample_rows

WARM = "warm_start"


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
        harvested = run.store()
        held = heldout(harvested, config.evaluate.activations)
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
        bootstrap = DocumentBootstrap(held.documents, e.bootstrap, e.seed)
        said = [r["explanation"] if r["extracted"] else None for r in rows if r["sample"] == 0 and r["scorer"] == "own"]
        found = controls.shuffles(scorers["own"], held, said, bootstrap, e.seed)
        if name is None:
            found |= _world_controls(run, harvested, held, scorers["own"], bootstrap)
        write_json(stage.folder / "controls.json", {"schema": SCHEMA, **found})


def _world_controls(
    run: Run, harvested: stores.Store, held: Heldout, ar: Reconstructor, bootstrap: DocumentBootstrap
) -> dict[str, Any]:
    """The controls that depend on no run: the mean, the teacher's text, the ridge from token ids."""
    texts = taught(run)
    found = controls.text_controls(ar, held, [texts[i] for i in held.activation_ids], bootstrap)
    ids, vectors = controls.ridge_training(harvested)
    return found | controls.ridge_controls(ids, vectors, held, bootstrap)


def collect(run: Run) -> None:
    """Write results.json: one ROW per run and scorer, paired differences, and the controls. Left alone when it was made
    from these very evaluations, so that it goes on naming the code that made it."""
    c = run.config
    path = run.root / "results.json"
    evaluated = [run.stage("evaluate", name).identity for name in (None, *run.runs())]
    made_from = identity(evaluated, c.evaluate.bootstrap, SCHEMA)
    if path.is_file() and read_json(path).get("identity") == made_from:
        return
    held = heldout(run.store(), c.evaluate.activations)
    bootstrap = DocumentBootstrap(held.documents, c.evaluate.bootstrap, c.evaluate.seed)
    per = c.evaluate.samples
    warm = read_table(samples_path(run, None))
    unit = {"unit": c.penalty.unit}
    head = {"model": c.model.path}

    def row(samples: list[dict[str, Any]], scorer: str, **more: Any) -> dict[str, Any]:
        return result_row(samples, scorer, held, bootstrap, per, **head, **more)

    warm_row = row(
        warm,
        "own",
        commit=_commit(run, None),
        penalty={"kind": "none", "value": None, **unit},
        **{"lambda": None},
        seed=None,
        steps=0,
    )
    rows: list[dict[str, Any]] = []
    found = _controls(run, None)
    found["runs"] = {name.folder: _controls(run, name) for name in run.runs()}
    loaded = {name: read_table(samples_path(run, name)) for name in run.runs()}
    for name, samples in loaded.items():
        _require_paired(samples, warm)
        if name.value is None:
            mse = per_activation([r for r in samples if r["scorer"] == "own"], per)["mse"]
            found["ar_catchup"] = bootstrap.interval(fve(mse, held.base.value))
            continue
        control = next((s for n, s in loaded.items() if n.value == 0 and n.seed == name.seed), None)
        for scorer in ("own", WARM):
            penalty = {"kind": name.kind, "value": name.value, **unit}
            about = {"penalty": penalty, "lambda": name.value, "seed": name.seed, "commit": _commit(run, name)}
            entry = row(samples, scorer, steps=c.reinforce.steps, **about)
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


def _against_warm(samples, warm, scorer: str, held: Heldout, bootstrap: DocumentBootstrap, per: int):
    mine = per_activation([r for r in samples if r["scorer"] == scorer], per)["mse"]
    theirs = per_activation(warm, per)["mse"]  # the warm start has one scorer: its own AR
    return bootstrap.interval((theirs - mine) / held.base.value)


def _require_paired(samples: list[dict[str, Any]], warm: list[dict[str, Any]]) -> None:
    """Differences are taken row by row: every run must have explained the warm start's activations, in their order."""
    own = [(r["activation_id"], r["sample"]) for r in samples if r["scorer"] == "own"]
    if own != [(r["activation_id"], r["sample"]) for r in warm]:
        raise InbriefError(
            "The runs of a folder must be evaluated on the same activations; samples.parquet of one differs. Delete its "
            "evaluation/ and evaluate again."
        )


def _commit(run: Run, name: RunName | None) -> str | None:
    """The code that trained the run, else the code that evaluated it."""
    trained = run.stage("warmstart-av") if name is None else run.stage("reinforce", name)
    return trained.record().get("commit") or run.stage("evaluate", name).record().get("commit")


def _controls(run: Run, name: RunName | None) -> dict[str, Any]:
    found = read_json(run.stage("evaluate", name).folder / "controls.json")
    found.pop("schema")
    return found
