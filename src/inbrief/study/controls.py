"""What stands beside every FVE: what no explanation, the wrong explanation or a copy of the last words would reach."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from inbrief.metrics import Baseline, DocumentBootstrap, Interval, direction, fve
from inbrief.models.reconstructor import Reconstructor
from inbrief.study.evaluate import Heldout, errors

RIDGE_TOKENS = (1, 2, 4, 8)
MOST_IDS = 1000


def shuffled(n: int, seed: int) -> np.ndarray:
    """A permutation of n without a fixed point (n ≥ 2): everyone gets somebody else's explanation."""
    order = np.random.default_rng(seed).permutation(n)
    passed = np.empty(n, dtype=np.int64)
    passed[order] = np.roll(order, 1)
    return passed


def shuffled_within(keys: list[int], seed: int) -> np.ndarray:
    """As `shuffled`, among rows of equal key; a row alone with its key gets -1."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    out = np.full(len(keys), -1)
    for rows in groups.values():
        if len(rows) > 1:
            out[rows] = np.array(rows)[shuffled(len(rows), seed)]
    return out


def text_controls(
    ar: Reconstructor,
    held: Heldout,
    explanations: list[str | None],
    teacher: list[str],
    bootstrap: DocumentBootstrap,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """FVE of the mean, of the teacher's text and of other activations' explanations, all under the same AR."""
    n, base = len(held.rows), held.base

    def interval(mse: np.ndarray, mask: np.ndarray | None = None):
        return bootstrap.interval(fve(mse, base.value), mask)

    anyone = shuffled(n, seed)
    same = shuffled_within([ids[-1] for ids in held.last_ids], seed)
    taken = [explanations[i] if i >= 0 else None for i in same]
    return {
        "mean_vector": interval(mean_vector_errors(held.vectors, base)),
        "teacher": interval(errors(ar, held.vectors, list(teacher))),
        "shuffled": interval(errors(ar, held.vectors, [explanations[i] for i in anyone])),
        "shuffled_same_last_token": interval(errors(ar, held.vectors, taken), same >= 0),
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
