"""A run folder as this project lays it out: its paths, the runs it holds, and the identity of each stage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from inbrief.config import Config, dump, parse
from inbrief.data.store import Store, read_table
from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import SCHEMA, Stage, atomic_path, identity
from inbrief.models import checkpoints

CATCHUP = "ar-only"
ADDITIVE = {("workers",), ("penalty", "values"), ("reinforce", "seeds"), ("report", "examples")}
"""Settings that may change in a used folder: they add runs or change the display, never a finished result."""


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
        """Names the base model's weights: the Hub revision, or a hash of the local files."""
        path = Path(checkpoints.resolve(self.config.model.path))
        if not path.is_dir():
            return self.config.model.revision or "main"
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.safetensors")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

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
        return [*names, RunName(CATCHUP, None, c.reinforce.seeds[0])] if c.evaluate.catchup else names

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
                return Stage(self.warm / "gate", name, identity(warm_av, warm_ar, w["gate"]))
        reinforce = c.reinforce.model_dump(exclude={"seeds", "micro_tokens", "checkpoint_every"})
        penalty = c.penalty.model_dump(exclude={"values"})
        trained = identity(warm_av, warm_ar, reinforce, penalty, run and (run.value, run.seed))
        match name, run:
            case "reinforce", RunName():
                return Stage(self.folder(run), name, trained)
            case "evaluate", RunName():
                return Stage(
                    self.folder(run) / "evaluation",
                    name,
                    identity(trained, c.evaluate.model_dump(exclude={"bootstrap"})),
                )
            case "evaluate", None:
                warm = identity(warm_av, warm_ar, c.evaluate.model_dump(exclude={"bootstrap"}))
                return Stage(self.warm / "evaluation", name, warm)
        raise ValueError(f"no stage {name!r}")


def taught(run: Run) -> dict[str, str]:
    """activation_id -> the teacher's explanation."""
    rows = read_table(run.stage("teach").folder / "explanations.parquet")
    return {r["activation_id"]: r["explanation"] for r in rows}


def open_run(config: Config, root: Path) -> Run:
    """Claim `root` for `config`. Raises InbriefError when it holds a run with other settings."""
    path = root / "config.yaml"
    if path.is_file():
        before = parse(yaml.safe_load(path.read_text()), str(path)).model_dump()
        if changed := [k for k in _differences(before, config.model_dump()) if k not in ADDITIVE]:
            key = changed[0]
            raise InbriefError(
                f"{root} holds a run with other settings: {'.'.join(key)} is {_at(before, key)!r} there and {_at(config.model_dump(), key)!r} "
                f"now ({len(changed)} differ). Use another folder (--out), or go on with `inbrief run {root}`."
            )
    elif root.exists() and any(root.iterdir()):
        raise InbriefError(f"A new run needs an empty folder; {root} holds other files. Choose another with --out.")
    root.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(dump(config))
    return Run(config, root)


def _differences(a: Any, b: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted(a.keys() | b.keys()) for d in _differences(a.get(k), b.get(k), (*at, k))]
    return [] if a == b else [at]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
