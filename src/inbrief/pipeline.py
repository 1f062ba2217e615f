"""The stages in order, each resumable and idempotent: harvest, teach, warm start, reinforce, evaluate, report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inbrief import __version__
from inbrief.config import Config, dump
from inbrief.contract.contract import Contract, check_marker, prompt_ids, tokenizer_sha, verify
from inbrief.data import store as stores
from inbrief.data.corpora import documents
from inbrief.data.harvest import Harvester
from inbrief.data.teachers import teach
from inbrief.io.errors import InbriefError
from inbrief.io.pool import run_jobs
from inbrief.io.progress import clock, track
from inbrief.io.runfolder import SCHEMA, atomic_path, locked, read_json, write_json
from inbrief.metrics import baseline
from inbrief.models import checkpoints
from inbrief.models.architectures import check_layer
from inbrief.models.verbalizer import Verbalizer
from inbrief.run import Run, RunName, check_folder, taught
from inbrief.study.evaluate import heldout
from inbrief.training.pretrain import Pretrain
from inbrief.training.reinforce import Reinforcer
from inbrief.training.warmstart import GateReport, fit_reconstructor, fit_verbalizer, measure_gate

STAGES = ("harvest", "teach", "warmstart", "reinforce", "evaluate", "report")


def preflight(config: Config) -> None:
    """Raises InbriefError for what can be seen to be wrong before anything is written or computed."""
    m = config.model
    tokenizer = checkpoints.load_tokenizer(m.path, m.revision)
    check_marker(tokenizer, m.marker)
    architecture = checkpoints.target_config(m.path, m.revision)
    check_layer(architecture, m.layer)
    documents(config.data)
    trained_on = Pretrain().corpus_seed
    if (m.path, config.data.corpus, config.data.seed) == (checkpoints.BUILT_IN, "storyworld", trained_on):
        raise InbriefError(
            f"data.seed {trained_on} makes the stories the shipped target was trained on. Choose another seed."
        )


# The jobs: module-level functions of (config, root, …), so that a worker process can run them.


def harvest(config: Config, root: Path) -> None:
    """Activations under data/, and the contract beside them."""
    run = Run(config, root)
    stage = run.stage("harvest")
    if stage.finished():
        return
    path, revision = config.model.path, config.model.revision
    tokenizer = checkpoints.load_tokenizer(path, revision)
    with stage.running():
        target = checkpoints.load_target(path, revision, config.model.dtype)
        Harvester(config, target, tokenizer, run.revision).run(run.data)
        build_contract(config, run, target, tokenizer).save(run.data)


def build_contract(config: Config, run: Run, target, tokenizer) -> Contract:
    """What AV and AR will agree on; scale and baseline come from the harvested vectors."""
    m = config.model
    harvested = run.store()
    held = harvested.vectors(harvested.rows("heldout"))
    scale = m.injection.scale
    if scale is None and m.injection.method == "embed_overwrite":
        scale = round(float(np.percentile(held.norm(dim=1).numpy(), 75)), 4)
    marker_id = check_marker(tokenizer, m.marker)
    prompt = prompt_ids(tokenizer, m.av_template.replace("{marker}", m.marker), m.enable_thinking)
    at = prompt.index(marker_id) if marker_id in prompt else 0
    neighbours = (prompt[at - 1], prompt[at + 1]) if 0 < at < len(prompt) - 1 else (-1, -1)
    stops = target.generation_config.eos_token_id if target.generation_config is not None else None
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    stop_ids = list(dict.fromkeys(s for s in [tokenizer.eos_token_id, *stops, tokenizer.pad_token_id] if s is not None))
    contract = Contract(
        base_model=m.path,
        revision=run.revision,
        tokenizer_sha=tokenizer_sha(tokenizer),
        layer=m.layer,
        d_model=held.shape[1],
        marker=m.marker,
        marker_id=marker_id,
        left_id=neighbours[0],
        right_id=neighbours[1],
        av_template=m.av_template,
        ar_template=m.ar_template,
        enable_thinking=m.enable_thinking,
        injection=m.injection.model_copy(update={"scale": scale}),
        mse_scale=held.shape[1] ** 0.5,
        stop_ids=stop_ids,
        cap=config.reinforce.cap,
        fve_baseline=round(baseline(held).value, 6),
    )
    verify(contract, tokenizer)
    return contract


def write_explanations(config: Config, root: Path) -> None:
    """The teacher's text for the warm-start splits, and for the held-out activations as a control."""
    run = Run(config, root)
    stage = run.stage("teach")
    if stage.finished():
        return
    harvested = run.store()
    with stage.running():
        columns = zip(*(harvested.column(c) for c in ("activation_id", "split", "text")), strict=True)
        wanted = [(a, s, t) for a, s, t in columns if s != "rl"]
        rows = [
            {"activation_id": a, "split": s, "explanation": teach(config.teacher.kind, config.teacher.seed, a, t)}
            for a, s, t in track(wanted, len(wanted), "teach", unit="text")
        ]
        stores.write_table(stage.folder / "explanations.parquet", rows)


def _examples(run: Run, split: str) -> tuple[torch.Tensor, list[str]]:
    harvested = run.store()
    rows, texts, ids = harvested.rows(split), taught(run), harvested.column("activation_id")
    return harvested.vectors(rows), [texts[ids[i]] for i in rows]


def warmstart_part(config: Config, root: Path, part: str) -> None:
    """Fit the AV (`part` "av") or the AR ("ar") and save it under warmstart/."""
    run = Run(config, root)
    stage = run.stage(f"warmstart-{part}")
    if stage.finished():
        return
    with stage.running():
        torch.manual_seed(config.warmstart.seed)
        contract = Contract.load(run.data)
        tokenizer = checkpoints.load_tokenizer(config.model.path, config.model.revision)
        verify(contract, tokenizer)
        target = checkpoints.load_target(config.model.path, config.model.revision, config.model.dtype)
        vectors, explanations = _examples(run, part)
        if part == "av":
            av = Verbalizer(target, tokenizer, contract)
            fit_verbalizer(
                av,
                vectors,
                explanations,
                config.warmstart.av,
                config.warmstart.seed,
                stage.folder,
                config.warmstart.micro_tokens,
            )
            checkpoints.save_verbalizer(av, run.warm / "av")
        else:
            ar = checkpoints.new_reconstructor(target, tokenizer, contract)
            fit_reconstructor(
                ar,
                vectors,
                explanations,
                config.warmstart.ar,
                config.warmstart.seed,
                stage.folder,
                config.warmstart.micro_tokens,
            )
            checkpoints.save_reconstructor(ar, run.warm / "ar")


def gate(config: Config, root: Path) -> GateReport:
    """Measure the warm start once; raises InbriefError with the reasons when it must not go on. The thresholds may change
    without measuring again."""
    run = Run(config, root)
    stage = run.stage("gate")
    settings = config.warmstart.gate
    path = stage.folder / "gate.json"
    if not stage.finished():
        with stage.running():
            harvested = run.store()
            # Spread over the split, so that neighbouring positions of one document do not fill the gate.
            rows = harvested.rows("heldout")
            rows = rows[np.linspace(0, len(rows) - 1, min(settings.samples, len(rows))).astype(int)]
            av = checkpoints.load_verbalizer(run.warm / "av", config.model.dtype)
            ar = checkpoints.load_reconstructor(run.warm / "ar", config.model.dtype)
            vectors = harvested.vectors(rows)
            report = measure_gate(av, ar, vectors, config.reinforce.cap, config.warmstart.seed)
            write_json(path, {"schema": SCHEMA, **report.record()})
    found = read_json(path)
    found.pop("schema")
    report = GateReport(**found)
    report.require(settings)
    return report


def reinforce_one(config: Config, root: Path, name: RunName) -> None:
    """One λ and seed, from the shared warm start."""
    run = Run(config, root)
    stage = run.stage("reinforce", name)
    if stage.finished():
        return
    with stage.running():
        av = checkpoints.load_verbalizer(run.warm / "av", config.model.dtype)
        ar = checkpoints.load_reconstructor(run.warm / "ar", config.model.dtype)
        harvested = run.store()
        trainer = Reinforcer(
            av=av,
            ar=ar,
            settings=config.reinforce,
            penalty=config.penalty,
            value=name.value or 0.0,
            seed=name.seed,
            base=av.contract.fve_baseline or 1.0,
            train_av=name.value is not None,
        )
        label = "AR only" if name.value is None else f"λ={name.value:g} seed {name.seed}"
        trainer.run(harvested.vectors(harvested.rows("rl")), run.folder(name), label)
        checkpoints.save_verbalizer(av, run.folder(name) / "av")
        checkpoints.save_reconstructor(ar, run.folder(name) / "ar")


# Running stages.


def run_stages(config: Config, root: Path, last: str = "report") -> Path:
    """Run every stage up to `last`; what is done is left alone, what was cut short goes on. Returns the root.

    Raises InbriefError on any mistake the user can mend: before anything is written where that can be seen, otherwise
    STATUS.json says where it stopped.
    """
    check_folder(config, root)
    preflight(config)
    with locked(root):
        with atomic_path(root / "config.yaml") as temporary:
            temporary.write_text(dump(config), encoding="utf-8")
        run = Run(config, root)
        workers = 1 if checkpoints.device().type == "cuda" else config.workers
        if workers > 1:
            torch.set_num_threads(1)
        began = time.monotonic()
        seconds: dict[str, float] = {}
        for name in STAGES[: STAGES.index(last) + 1]:
            stage_began = time.monotonic()
            _status(run, name, "running", seconds)
            try:
                _RUN[name](run, workers)
            except BaseException as e:
                _status(run, name, "interrupted" if isinstance(e, KeyboardInterrupt) else "failed", seconds)
                raise
            seconds[name] = round(time.monotonic() - stage_began, 1)
            say(f"{name:<10} {clock(seconds[name]):>7}")
        _status(run, last, "done", seconds)
        say(f"{'total':<10} {clock(time.monotonic() - began):>7}")
    return root


def _harvest(run: Run, workers: int) -> None:
    harvest(run.config, run.root)
    heldout(run.store(), run.config.evaluate.activations)  # too few is better known now than after the training


def _teach(run: Run, workers: int) -> None:
    write_explanations(run.config, run.root)


def _warmstart(run: Run, workers: int) -> None:
    todo = [part for part in ("av", "ar") if not run.stage(f"warmstart-{part}").finished()]
    run_jobs([(warmstart_part, (run.config, run.root, part)) for part in todo], workers)
    report = gate(run.config, run.root)
    say(
        f"gate: FVE {report.fve:.3f} (shuffled {report.fve_shuffled:.3f}), {report.tokens:.1f} tokens, length sd {report.length_sd:.1f}"
    )


def _reinforce(run: Run, workers: int) -> None:
    # Without the gate's blessing nothing is reinforced, even if the stage is asked for alone.
    gate(run.config, run.root)
    _in_parallel(reinforce_one, run, "reinforce", list(run.runs()), workers)


def _evaluate(run: Run, workers: int) -> None:
    # Imported here because scipy and the study are not needed by the stages before.
    from inbrief.study import collect

    _in_parallel(collect.evaluate_one, run, "evaluate", [None, *run.runs()], workers)
    collect.collect(run)


def _report(run: Run, workers: int) -> None:
    from inbrief.report import page

    page.write(run)


def _in_parallel(job: Callable[..., None], run: Run, stage: str, names: list[Any], workers: int) -> None:
    todo = [n for n in names if not run.stage(stage, n).finished()]
    run_jobs([(job, (run.config, run.root, n)) for n in todo], workers)


_RUN: dict[str, Callable[[Run, int], None]] = dict(
    zip(STAGES, (_harvest, _teach, _warmstart, _reinforce, _evaluate, _report), strict=True)
)


def _status(run: Run, stage: str, state: str, seconds: dict[str, float]) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {
        "schema": SCHEMA,
        "stage": stage,
        "state": state,
        "pid": os.getpid(),
        "updated": stamp,
        "version": __version__,
    }
    write_json(run.root / "STATUS.json", {**record, "seconds_this_session": seconds})


def say(line: str) -> None:
    """What people read while they wait goes to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)
