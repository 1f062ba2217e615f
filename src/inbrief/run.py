"""A run folder as this project lays it out: its paths, the runs it holds, and the identity of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inbrief.config import Config, load
from inbrief.data.store import Store, read_table
from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import LOCK_FILE, SCHEMA, Stage, identity
from inbrief.models import checkpoints

CATCHUP = "ar-only"
FREE = (("workers",), ("penalty", "values"), ("reinforce", "seeds"), ("warmstart", "gate"), ("evaluate",), ("report",))
"""Settings that may change in a used folder: they add runs, measure again or change the display, but retrain nothing."""


@dataclass(frozen=True)
class RunName:
    """One reinforcement run. `value` None is the control in which only the AR trains on."""

    kind: str
    value: float | None
    seed: int

    @property
    def folder(self) -> str:
        return f"{CATCHUP}-s{self.seed}" if self.value is None else f"{self.kind}-{self.value:g}-s{self.seed}"


class Run:
    """A run folder and its settings: paths, stage identities, the runs it holds."""

    def __init__(self, config: Config, root: Path) -> None:
        self.config, self.root = config, root

    @cached_property
    def revision(self) -> str:
        return checkpoints.revision_of(self.config.model.path, self.config.model.revision)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def warm(self) -> Path:
        return self.root / "warmstart"

    def folder(self, name: RunName) -> Path:
        return self.root / "runs" / name.folder

    def runs(self) -> list[RunName]:
        """λ by λ, seed by seed; the AR-only control last, with the first seed."""
        c = self.config
        names = [RunName(c.penalty.kind, v, s) for s in c.reinforce.seeds for v in c.penalty.values]
        # A frozen AR has nothing to catch up with.
        catchup = c.evaluate.catchup and c.reinforce.ar == "cotrained"
        return [*names, RunName(CATCHUP, None, c.reinforce.seeds[0])] if catchup else names

    def store(self) -> Store:
        return Store(self.data)

    def stage(self, name: str, run: RunName | None = None) -> Stage:
        c = self.config
        harvest = identity(self.revision, c.model.model_dump(), c.data.model_dump(), c.reinforce.cap, SCHEMA)
        taught = identity(harvest, c.teacher.model_dump())
        w = c.warmstart.model_dump()
        warm_av = identity(taught, w["av"], w["seed"])
        warm_ar = identity(taught, w["ar"], w["seed"])
        match name:
            case "harvest":
                return Stage(self.data, name, harvest)
            case "teach":
                return Stage(self.data / "explanations", name, taught)
            case "warmstart-av":
                return Stage(self.warm / "av-fit", name, warm_av)
            case "warmstart-ar":
                return Stage(self.warm / "ar-fit", name, warm_ar)
            case "gate":
                measured = identity(warm_av, warm_ar, w["gate"]["samples"])
                return Stage(self.warm / "gate", name, measured, replaceable=True)
        evaluated = c.evaluate.model_dump(exclude={"catchup"})
        reinforce = c.reinforce.model_dump(exclude={"seeds", "micro_tokens", "checkpoint_every"})
        penalty = c.penalty.model_dump(exclude={"values"})
        trained = identity(warm_av, warm_ar, reinforce, penalty, run and (run.value, run.seed))
        match name, run:
            case "reinforce", RunName():
                return Stage(self.folder(run), name, trained)
            case "evaluate", RunName():
                return Stage(self.folder(run) / "evaluation", name, identity(trained, evaluated), replaceable=True)
            case "evaluate", None:
                warm = identity(warm_av, warm_ar, evaluated)
                return Stage(self.warm / "evaluation", name, warm, replaceable=True)
        raise ValueError(f"no stage {name!r}")


def taught(run: Run) -> dict[str, str]:
    """activation_id -> the teacher's explanation."""
    rows = read_table(run.stage("teach").folder / "explanations.parquet")
    return {r["activation_id"]: r["explanation"] for r in rows}


def check_folder(config: Config, root: Path) -> None:
    """Raises InbriefError when `root` holds a run with settings that cannot change, or something else; writes nothing."""
    path = root / "config.yaml"
    if path.is_file():
        before, now = load(root).model_dump(), config.model_dump()
        if changed := [k for k in _differences(before, now) if not any(k[: len(f)] == f for f in FREE)]:
            key = changed[0]
            raise InbriefError(
                f"{root} holds a run with other settings: {'.'.join(key)} is {_at(before, key)!r} there and {_at(now, key)!r} now "
                f"({len(changed)} differ). Use another folder (--out), or go on with `inbrief run {root}`."
            )
    elif root.exists() and (not root.is_dir() or any(p.name != LOCK_FILE for p in root.iterdir())):
        raise InbriefError(f"A new run needs an empty folder; {root} holds other files. Choose another with --out.")


def _differences(a: Any, b: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted(a.keys() | b.keys()) for d in _differences(a.get(k), b.get(k), (*at, k))]
    return [] if a == b else [at]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
