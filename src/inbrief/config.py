"""Typed settings: the YAML, the flags and the record kept with a run are one thing."""

from __future__ import annotations

import difflib
import math
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inbrief.contract.contract import Injection
from inbrief.io.errors import InbriefError


class Section(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    path: str = "storyworld"
    """`storyworld`, a local folder, or a Hub id."""
    revision: str | None = None
    """Hub revision; a commit pins it."""
    layer: int = 2
    """K: the output of block K (resid_post.K)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and forward passes."""
    injection: Injection = Injection()
    """How the vector enters the AV; an embed_overwrite scale of null becomes the 75th percentile of activation norms."""
    marker: str = "㈎"
    """The character whose row the vector takes; one token of the tokenizer."""
    av_template: str = "<concept>{marker}</concept>\nExplain."
    """The AV's user message."""
    ar_template: str = "Summary of the following text: <text>{explanation}</text> <summary>"
    """The AR's input, read at its last token."""
    enable_thinking: bool | None = None
    """Passed to the chat template where it has such a switch."""


class Split(Section):
    av: float = 0.4
    ar: float = 0.4
    rl: float = 0.1
    heldout: float = 0.1

    @model_validator(mode="after")
    def _sums_to_one(self) -> Split:
        total = self.av + self.ar + self.rl + self.heldout
        if abs(total - 1) > 1e-6 or min(self.av, self.ar, self.rl, self.heldout) <= 0:
            raise ValueError(f"data.split must be four positive shares that sum to 1; they sum to {total:g}")
        return self


class Data(Section):
    corpus: str = "storyworld"
    """Where documents come from."""
    documents: int = Field(default=8000, gt=0)
    """How many documents to read."""
    positions: int = Field(default=5, gt=0)
    """Activations taken from each document."""
    min_position: int = Field(default=10, ge=1)
    """Positions before this one are never taken."""
    max_tokens: int = Field(default=256, gt=0)
    """A document is read up to here."""
    seed: int = Field(default=0, ge=0)
    """Decides the corpus where it is generated, the positions and the split."""
    split: Split = Split()
    """Shares of documents: warm-start AV, warm-start AR, reinforcement, held-out."""


class Teacher(Section):
    kind: Literal["storyworld", "rules"] = "storyworld"
    """Who writes the warm-start explanations."""
    seed: int = Field(default=0, ge=0)


class Fit(Section):
    """One supervised fit."""

    steps: int = Field(default=500, gt=0)
    batch: int = Field(default=32, gt=0)
    """Examples per step."""
    lr: float = Field(default=2e-3, gt=0)
    warmup: int = Field(default=30, ge=0)
    """Steps of linear warm-up; then cosine to 10 %."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""


class Gate(Section):
    """What a warm start must show before reinforcement may begin."""

    samples: int = Field(default=64, ge=8)
    """Held-out activations sampled in groups of four."""
    min_fve: float = 0.15
    min_extraction: float = 0.5
    min_length_sd: float = 5.0
    """Median within-group standard deviation of tokens; below it a penalty has nothing to push against."""


class Warmstart(Section):
    av: Fit = Fit(steps=500, batch=32, lr=2e-3)
    ar: Fit = Fit(steps=400, batch=48, lr=1e-3)
    seed: int = Field(default=0, ge=0)
    micro_tokens: int = Field(default=1024, gt=0)
    """Tokens per forward pass: rows of like length share one. Large on a GPU; on a CPU small ones waste less padding."""
    gate: Gate = Gate()


class Reinforce(Section):
    steps: int = Field(default=60, gt=0)
    prompts: int = Field(default=16, gt=0)
    """Activations per step."""
    group: int = Field(default=8, ge=2)
    """Samples per activation."""
    lr: float = Field(default=1e-4, gt=0)
    ar_lr: float = Field(default=3e-4, gt=0)
    ar: Literal["cotrained", "frozen"] = "cotrained"
    """Whether the AR goes on learning from the sampled explanations."""
    advantage: Literal["std", "mean-only"] = "std"
    """Rewards minus the group's mean, divided by its standard deviation or not."""
    aggregation: Literal["sequence", "token"] = "sequence"
    """Loss: mean per sequence, then over sequences; or mean over all tokens."""
    kl: Literal["k3", "k2"] = "k3"
    """Estimator of the KL to the warm start. k1 has no gradient and is not offered."""
    kl_weight: float = Field(default=0.01, ge=0)
    clip_ratio: float = Field(default=0.2, gt=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    cap: int = Field(default=104, gt=4)
    """Most tokens of an answer; reaching it without a stop token is a failure."""
    failure: Literal["never-pays", "seed"] = "never-pays"
    """A failed answer gets −2 minus the penalty at the cap; under `seed`, −2 minus the penalty of its own length."""
    seeds: list[int] = [0]
    """A seed varies reinforcement only; the warm start is shared."""
    micro_tokens: int = Field(default=2048, gt=0)
    """Tokens per forward pass of the losses."""
    checkpoint_every: int = Field(default=10, gt=0)
    no_spread_warning: int = Field(default=5, gt=0)
    """Warn after so many steps in a row in which every group has zero length spread."""

    @model_validator(mode="after")
    def _seeds(self) -> Reinforce:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"reinforce.seeds must be distinct whole numbers ≥ 0, at least one; got {self.seeds}")
        return self


class Penalty(Section):
    kind: Literal["linear"] = "linear"
    """λ · tokens."""
    values: list[float] = [0.0, 0.01, 0.04]
    """One run per value and seed; 0 is the control."""
    unit: Literal["tokens", "content_tokens"] = "tokens"

    @model_validator(mode="after")
    def _distinct(self) -> Penalty:
        # Distinct as they are written: a run's folder carries its value.
        good = all(math.isfinite(v) and v >= 0 for v in self.values) and len({f"{v:g}" for v in self.values}) == len(
            self.values
        )
        if not self.values or not good:
            raise ValueError(f"penalty.values must be distinct finite numbers ≥ 0, at least one; got {self.values}")
        return self


class Evaluate(Section):
    activations: int = Field(default=1000, ge=2)
    """Held-out activations, in corpus order."""
    samples: int = Field(default=1, gt=0)
    """Explanations per activation."""
    bootstrap: int = Field(default=2000, ge=100)
    """Resamplings of documents behind each interval."""
    seed: int = Field(default=0, ge=0)
    catchup: bool = True
    """Also train an AR alone on the frozen AV's text: how much of the gain is the AR catching up."""


class Report(Section):
    examples: int = Field(default=24, ge=0)
    """Held-out activations shown side by side."""


class Config(Section):
    """All settings of a run."""

    model: Model = Model()
    data: Data = Data()
    teacher: Teacher = Teacher()
    warmstart: Warmstart = Warmstart()
    reinforce: Reinforce = Reinforce()
    penalty: Penalty = Penalty()
    evaluate: Evaluate = Evaluate()
    report: Report = Report()
    workers: int = Field(default=2, gt=0)
    """Single-threaded processes side by side where stages are independent (CPU)."""


def presets() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in _preset_dir().iterdir() if p.name.endswith(".yaml"))


def _preset_dir() -> Path:
    return Path(str(resources.files("inbrief.presets")))


def load(target: str | Path) -> Config:
    """The config of a preset, a YAML file or a run folder. Raises InbriefError with the nearest name for a typo."""
    path = Path(target)
    if str(target) in presets():  # a folder of that name is ./NAME
        path = _preset_dir() / f"{target}.yaml"
    elif path.is_dir():
        path = path / "config.yaml"
        if not path.is_file():
            raise InbriefError(f"A run folder holds config.yaml; {target} has none.")
    elif not path.is_file():
        near = difflib.get_close_matches(str(target), presets(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InbriefError(
            f"{str(target)!r} is neither a preset ({', '.join(presets())}) nor a YAML file nor a run folder.{hint}"
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InbriefError(f"{path} must be YAML: {' '.join(str(e).split())}") from None
    return parse(raw, str(path))


def parse(raw: Any, where: str) -> Config:
    """Validate a mapping. Raises InbriefError naming each wrong key or value, with the nearest known name."""
    if not isinstance(raw, dict):
        raise InbriefError(f"{where} must hold a mapping of sections; found {type(raw).__name__}.")
    try:
        return Config.model_validate(raw)  # numbers written as 1e-4, a string to YAML, are taken as numbers
    except ValidationError as e:
        raise InbriefError(f"{where}: " + "; ".join(_explain(error) for error in e.errors())) from None


def _explain(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    name = ".".join(loc)
    if error["type"] != "extra_forbidden":
        return (
            f"{name or 'config'}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"
            if name
            else error["msg"].removeprefix("Value error, ")
        )
    fields: Any = Config
    for part in loc[:-1]:
        fields = fields.model_fields[part].annotation
    known = list(fields.model_fields)
    near = difflib.get_close_matches(loc[-1], known, n=1)
    return f"unknown key {name!r}" + (
        f"; did you mean {'.'.join([*loc[:-1], near[0]])!r}?" if near else f"; known: {', '.join(known)}"
    )


def dump(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(), allow_unicode=True, sort_keys=False)
