"""The public object: load an NLA once; explain a text, verbalize vectors, reconstruct from explanations, score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbrief.contract.contract import Contract, tokenizer_sha
from inbrief.contract.explanation import Answer
from inbrief.data.harvest import activations
from inbrief.io.errors import InbriefError
from inbrief.metrics import direction_mse
from inbrief.models import checkpoints
from inbrief.models.injection import check_vectors
from inbrief.models.reconstructor import Reconstructor
from inbrief.models.sampler import sample
from inbrief.models.verbalizer import Verbalizer


@dataclass(frozen=True)
class Explained:
    """One explained activation. `fve` = 1 − mse/B with the contract's baseline B; a failed answer has mse 2 and its raw
    text as `explanation`."""

    position: int
    token: str
    layer: int
    explanation: str
    tokens: int
    content_tokens: int
    finish: str
    extracted: bool
    mse: float
    cosine: float
    fve: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class NLA:
    """A verbalizer, its reconstructor and, when a text is to be read, their target model (loaded on first use)."""

    def __init__(self, av: Verbalizer, ar: Reconstructor, target: str | None = None) -> None:
        if av.contract.model_dump(exclude={"fve_baseline"}) != ar.contract.model_dump(exclude={"fve_baseline"}):
            raise InbriefError(
                "The AV and the AR must share one contract; theirs differ. Load a pair that was trained together."
            )
        self.av, self.ar = av, ar
        self.target_path = target or av.contract.base_model
        self.dtype = str(av.model.dtype).removeprefix("torch.")

    @property
    def contract(self) -> Contract:
        return self.av.contract

    @property
    def tokenizer(self):
        return self.av.tokenizer

    @cached_property
    def target(self):
        revision = None if Path(checkpoints.resolve(self.target_path)).is_dir() else self.contract.revision
        if (
            sha := tokenizer_sha(checkpoints.load_tokenizer(self.target_path, revision))
        ) != self.contract.tokenizer_sha:
            raise InbriefError(
                f"The target's tokenizer must be {self.contract.tokenizer_sha}; {self.target_path!r} has {sha}."
            )
        if (found := checkpoints.revision_of(self.target_path, revision)) != self.contract.revision:
            raise InbriefError(
                f"This NLA was trained on the weights {self.contract.revision} of its target; {self.target_path!r} holds {found}. Say where "
                "the right ones lie with load(…, target=PATH)."
            )
        return checkpoints.load_target(self.target_path, revision, self.dtype)

    def read(self, text: str, positions: Sequence[int]) -> tuple[list[int], Tensor]:
        """(token ids of `text`, raw activations [len(positions), d] at layer K). Negative positions count from the end."""
        ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise InbriefError("The text must hold at least one token; it is empty.")
        if bad := [p for p in positions if not -len(ids) <= p < len(ids)]:
            raise InbriefError(
                f"A position must lie in {-len(ids)}..{len(ids) - 1} for this text of {len(ids)} tokens; got {bad[0]}."
            )
        [(_, hidden)] = activations(self.target, [ids], self.contract.layer)
        return ids, hidden[list(positions)]

    def explain(self, text: str, position: int = -1, seed: int = 0) -> Explained:
        """Explain the activation at one token of `text` and say how well the AR gets it back."""
        return self.explain_many(text, [position], seed)[0]

    def explain_many(self, text: str, positions: Sequence[int], seed: int = 0) -> list[Explained]:
        """Explain several positions of one text in one batch."""
        ids, vectors = self.read(text, positions)
        answers = self.verbalize(vectors, seed=seed)
        errors = self.errors(vectors, answers)
        base = self.contract.fve_baseline
        return [
            Explained(
                position=p % len(ids),
                token=self.tokenizer.decode([ids[p]]),
                layer=self.contract.layer,
                explanation=a.explanation if a.explanation is not None else a.text,
                tokens=a.tokens,
                content_tokens=a.content_tokens,
                finish=a.finish,
                extracted=a.explanation is not None,
                mse=round(e, 6),
                cosine=round(1 - e / 2, 6),
                fve=round(1 - e / base, 6) if base else None,
            )
            for p, a, e in zip(positions, answers, errors.tolist(), strict=True)
        ]

    def verbalize(self, vectors: Tensor, samples: int = 1, seed: int = 0) -> list[Answer]:
        """`samples` answers for each raw activation of vectors [n, d], those of one vector side by side."""
        check_vectors(vectors, self.contract.d_model)
        return sample(self.av, vectors, samples, seed).answers

    def reconstruct(self, explanations: Sequence[str]) -> Tensor:
        """Predicted activations [n, d] float32; their direction is what counts."""
        if empty := [i for i, e in enumerate(explanations) if not e.strip()]:
            raise InbriefError(f"An explanation must not be empty; number {empty[0]} is.")
        return self.ar.predict(explanations)

    def score(self, vectors: Tensor, explanations: Sequence[str]) -> Tensor:
        """mse of directions [n] between vectors [n, d] and what the AR makes of the explanations: 2(1 − cos)."""
        check_vectors(vectors, self.contract.d_model)
        return direction_mse(self.reconstruct(explanations), vectors)

    def save(self, folder: Path, dtype: str = "bfloat16") -> None:
        """Write `av/` and `ar/` under `folder`, each atomically. Raises InbriefError when they are there already."""
        for part in ("av", "ar"):
            if (folder / part).exists():
                raise InbriefError(f"An export never overwrites; {folder / part} exists. Choose another folder.")
        checkpoints.save_verbalizer(self.av, folder / "av", getattr(torch, dtype))
        checkpoints.save_reconstructor(self.ar, folder / "ar", getattr(torch, dtype))

    def errors(self, vectors: Tensor, answers: Sequence[Answer]) -> Tensor:
        """mse [n] of sampled answers; a failed one counts 2 and never reaches the AR."""
        check_vectors(vectors, self.contract.d_model)
        return self.ar.errors(vectors, [a.explanation for a in answers])


SHIPPED = {None: "nla", "storyworld": "nla", "storyworld-warmstart": "warmstart"}
"""The pairs that come with inbrief, by the name `load` knows them by: StoryWorld's after and before reinforcement."""


def load(folder: str | Path | None = None, target: str | None = None, dtype: str = "float32") -> NLA:
    """Load an NLA: the shipped StoryWorld pair when no folder is named, else a folder holding `av/` and `ar/` (a run's
    `runs/<penalty>-s<seed>`, or its `warmstart`); SHIPPED names the pairs that come with
    inbrief. `target` says where the target model lies now, if it has moved."""
    path = checkpoints.built_in(SHIPPED[folder]) if folder in SHIPPED else Path(folder or "").expanduser()
    if not path.is_dir():
        raise InbriefError(f"An NLA is a folder holding av/ and ar/; {path} does not exist.")
    if not (path / "av").is_dir():
        inside = sorted(str(p.parent.relative_to(path)) for p in path.glob("runs/*/av"))
        hint = f" It holds runs; name one: {', '.join(inside[:6])}." if inside else ""
        raise InbriefError(f"An NLA is a folder holding av/ and ar/; {path} has no av/.{hint}")
    return NLA(
        checkpoints.load_verbalizer(path / "av", dtype), checkpoints.load_reconstructor(path / "ar", dtype), target
    )
