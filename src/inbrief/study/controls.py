"""What stands beside every FVE: what no explanation, the wrong explanation or a copy of the last words would reach."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from inbrief.data.store import Store
from inbrief.metrics import Baseline, DocumentBootstrap, Interval, direction, fve
from inbrief.models.reconstructor import Reconstructor
from inbrief.study.evaluate import Heldout

RIDGE_TOKENS = (1, 2, 4, 8)
MOST_IDS = 1000
TRAIN_ROWS = 10_000


def passed_on(groups: list[list[int]], documents: list[str], seed: int) -> np.ndarray:
    """For every row another row of its group, of another document; -1 where the group has no other document.

    groups partition the rows. Each group is shuffled document by document and handed on past its largest document, so
    nobody gets an explanation of their own text.
    """
    rng = np.random.default_rng(seed)
    out = np.full(len(documents), -1)
    for rows in groups:
        by_document: dict[str, list[int]] = defaultdict(list)
        for i in rows:
            by_document[documents[i]].append(i)
        names = list(by_document)
        order = [i for k in rng.permutation(len(names)) for i in by_document[names[k]]]
        largest = max(map(len, by_document.values()))
        if 2 * largest > len(order):
            continue
        out[order] = np.roll(order, largest)
    return out


def shuffles(
    ar: Reconstructor, held: Heldout, explanations: list[str | None], bootstrap: DocumentBootstrap, seed: int = 0
) -> dict[str, Any]:
    """FVE of other activations' explanations under the same AR: anyone's, and those of activations with the same last token.

    The second covers the activations that share their last token with enough others (`…_n`); their own explanations'
    FVE stands beside it (`…_own`).
    """
    everyone = passed_on([list(range(len(held.rows)))], held.documents, seed)
    by_token: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(held.last_ids):
        by_token[ids[-1]].append(i)
    same = passed_on(list(by_token.values()), held.documents, seed)

    def interval(source: np.ndarray, mask: np.ndarray) -> Interval | None:
        taken = [explanations[i] if i >= 0 else None for i in source]
        return bootstrap.interval(fve(ar.errors(held.vectors, taken).numpy(), held.base.value), mask)

    return {
        "shuffled": interval(everyone, everyone >= 0),
        "shuffled_same_last_token": interval(same, same >= 0),
        "shuffled_same_last_token_own": interval(np.arange(len(same)), same >= 0),
        "shuffled_same_last_token_n": int((same >= 0).sum()),
    }


def text_controls(
    ar: Reconstructor, held: Heldout, teacher: list[str], bootstrap: DocumentBootstrap
) -> dict[str, Interval | None]:
    """FVE of the mean vector, and of the teacher's text under `ar`."""
    base = held.base.value
    return {
        "mean_vector": bootstrap.interval(fve(mean_vector_errors(held.vectors, held.base), base)),
        "teacher": bootstrap.interval(fve(ar.errors(held.vectors, teacher).numpy(), base)),
    }


def mean_vector_errors(vectors: Tensor, base: Baseline) -> np.ndarray:
    """mse [n] of predicting μ, not normalised: FVE 0 by construction."""
    return ((direction(vectors.double()) - base.mean.double()) ** 2).mean(1).numpy()


def ridge(
    train_ids: list[list[int]], train: Tensor, test_ids: list[list[int]], test: Tensor, last: int, alpha: float = 1.0
) -> np.ndarray:
    """mse [n test] of a ridge regression from the ids of the `last` tokens (one-hot per place) to the direction.

    The prediction is not normalised. At each place the 1,000 commonest ids have a column of their own; others share none.
    """
    columns: list[dict[int, int]] = []
    width = 0
    for place in range(1, last + 1):
        common = [i for i, _ in Counter(ids[-place] for ids in train_ids).most_common(MOST_IDS)]
        columns.append({token: width + k for k, token in enumerate(common)})
        width += len(common)

    def features(rows: list[list[int]]) -> np.ndarray:
        x = np.zeros((len(rows), width), dtype=np.float32)
        for i, ids in enumerate(rows):
            for place, table in enumerate(columns, 1):
                if (column := table.get(ids[-place])) is not None:
                    x[i, column] = 1
        return x

    x, y = features(train_ids), direction(train).numpy()
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = x.T @ x - len(x) * np.outer(x_mean, x_mean) + alpha * np.eye(width, dtype=np.float32)
    weights = scipy.linalg.solve(gram.astype(np.float64), x.T @ (y - y_mean), assume_a="pos")
    predicted = (features(test_ids) - x_mean) @ weights + y_mean
    return ((predicted - direction(test).numpy()) ** 2).mean(1)


def ridge_training(harvested: Store) -> tuple[list[list[int]], Tensor]:
    """(last token ids, vectors) of the activations the ridge and the probes learn from: the warm-start AR's split."""
    rows = harvested.rows("ar")[:TRAIN_ROWS]
    ids = harvested.column("last_ids")
    return [ids[i] for i in rows], harvested.vectors(rows)


def ridge_controls(
    train_ids: list[list[int]], train: Tensor, held: Heldout, bootstrap: DocumentBootstrap
) -> dict[str, Interval | None]:
    """FVE of the ridge from the last 1, 2, 4 and 8 token ids: what copying the last words alone can do."""
    out = {}
    for last in RIDGE_TOKENS:
        with torch.no_grad():
            mse = ridge(train_ids, train, held.last_ids, held.vectors, last)
        out[f"ridge_last_{last}"] = bootstrap.interval(fve(mse, held.base.value))
    return out
