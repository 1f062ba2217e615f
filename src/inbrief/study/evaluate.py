"""Held-out evaluation: sample every activation, score with each AR, and turn samples into the rows of results.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from inbrief.data.store import Store
from inbrief.io.errors import InbriefError
from inbrief.io.progress import track
from inbrief.metrics import Baseline, DocumentBootstrap, baseline, fve
from inbrief.models.reconstructor import Reconstructor
from inbrief.models.sampler import sample
from inbrief.models.verbalizer import Verbalizer

CHUNK = 256
SAMPLES = pa.schema(
    [
        ("activation_id", pa.string()),
        ("doc_id", pa.string()),
        ("position", pa.int32()),
        ("run", pa.string()),
        ("seed", pa.int32()),
        ("sample", pa.int32()),
        ("explanation", pa.string()),
        ("tokens", pa.int32()),
        ("content_tokens", pa.int32()),
        ("finish", pa.string()),
        ("extracted", pa.bool_()),
        ("mse", pa.float32()),
        ("fve", pa.float32()),
        ("scorer", pa.string()),
    ]
)


@dataclass
class Heldout:
    """The evaluated activations: `rows` of the store, their vectors [n, d], their baseline."""

    rows: np.ndarray
    vectors: Tensor
    base: Baseline
    activation_ids: list[str]
    documents: list[str]
    positions: list[int]
    last_ids: list[list[int]]
    texts: list[str]


def heldout(store: Store, n: int) -> Heldout:
    """The first n held-out activations in corpus order. Raises InbriefError when there are fewer."""
    rows = store.rows("heldout")
    if len(rows) < n:
        raise InbriefError(
            f"evaluate.activations asks for {n} held-out activations; the split holds {len(rows)}. Raise data.documents."
        )
    rows = rows[:n]
    vectors = store.vectors(rows)
    take = store.index.take(pa.array(rows))
    return Heldout(
        rows=rows,
        vectors=vectors,
        base=baseline(vectors),
        activation_ids=take.column("activation_id").to_pylist(),
        documents=take.column("doc_id").to_pylist(),
        positions=take.column("position").to_pylist(),
        last_ids=take.column("last_ids").to_pylist(),
        texts=take.column("text").to_pylist(),
    )


def sample_rows(
    av: Verbalizer,
    scorers: dict[str, Reconstructor],
    held: Heldout,
    run: str,
    seed: int,
    samples: int,
    cap: int,
    draw_seed: int,
) -> list[dict[str, Any]]:
    """One row per activation, sample and scorer, in SAMPLES, scorer by scorer. A failed answer keeps its raw text as
    explanation."""
    answers, owners = [], []
    chunks = range(0, len(held.rows), CHUNK)
    for start in track(chunks, len(chunks), f"evaluate {run}"):
        drawn = sample(av, held.vectors[start : start + CHUNK], samples, draw_seed + start, cap)
        answers += drawn.answers
        owners += [start + owner for owner in drawn.owners]
    vectors = held.vectors[owners]
    readable = [a.explanation for a in answers]
    out = []
    for scorer, ar in scorers.items():
        mse = ar.errors(vectors, readable)
        for i, (answer, owner) in enumerate(zip(answers, owners, strict=True)):
            out.append(
                {
                    "activation_id": held.activation_ids[owner],
                    "doc_id": held.documents[owner],
                    "position": held.positions[owner],
                    "run": run,
                    "seed": seed,
                    "sample": i % samples,
                    "explanation": answer.explanation if answer.explanation is not None else answer.text,
                    "tokens": answer.tokens,
                    "content_tokens": answer.content_tokens,
                    "finish": answer.finish,
                    "extracted": answer.explanation is not None,
                    "mse": float(mse[i]),
                    "fve": 1 - float(mse[i]) / held.base.value,
                    "scorer": scorer,
                }
            )
    return out


def result_row(
    samples: list[dict[str, Any]],
    scorer: str,
    held: Heldout,
    bootstrap: DocumentBootstrap,
    samples_per: int,
    **head: Any,
) -> dict[str, Any]:
    """One ROW of results.json from the samples of one scorer; `delta_*` are filled in by `add_deltas`."""
    rows = [r for r in samples if r["scorer"] == scorer]
    arrays = per_activation(rows, samples_per)
    mse, good = arrays["mse"], arrays["extracted"]
    base = held.base

    def interval(values: np.ndarray, mask: np.ndarray | None = None):
        return bootstrap.interval(values, mask)

    readable = np.array([r["extracted"] for r in rows]).reshape(-1, samples_per)
    raw = np.array([r["mse"] for r in rows]).reshape(-1, samples_per)
    mean_readable = np.where(readable, raw, 0).sum(1) / np.maximum(readable.sum(1), 1)
    return {
        **head,
        "n": len(held.rows),
        "scorer": scorer,
        "tokens": interval(arrays["tokens"]),
        "content_tokens": interval(arrays["content_tokens"]),
        "tokens_sd": float(np.std([r["tokens"] for r in rows], ddof=1)),
        "fve": interval(fve(mse, base.value)),
        "fve_extracted": interval(fve(mean_readable, base.value), np.asarray(readable.any(axis=1))),
        "fve_normalised_mean": interval(fve(mse, base.normalised_mean)),
        "cosine": interval(1 - mse / 2),
        "extraction_rate": float(good.mean()),
        "delta_fve": None,
        "delta_fve_warm": None,
    }


def per_activation(rows: list[dict[str, Any]], samples_per: int) -> dict[str, np.ndarray]:
    """Means over the samples of each activation, [n] each: mse, tokens, content_tokens, extracted."""
    return {
        name: np.array([float(r[name]) for r in rows]).reshape(-1, samples_per).mean(1)
        for name in ("mse", "tokens", "content_tokens", "extracted")
    }


def paired_delta(
    samples: list[dict[str, Any]],
    other: list[dict[str, Any]],
    scorer: str,
    base: float,
    bootstrap: DocumentBootstrap,
    samples_per: int,
):
    """Interval of mean fve(samples) − fve(other) over the same activations."""
    mine = per_activation([r for r in samples if r["scorer"] == scorer], samples_per)["mse"]
    theirs = per_activation([r for r in other if r["scorer"] == scorer], samples_per)["mse"]
    return bootstrap.interval((theirs - mine) / base)
