"""Batches packed by length: rows of like length together, each batch under a token budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[np.ndarray]:
    """Indices of rows, longest first, such that rows × longest ≤ `max_tokens` in each batch (a single row may exceed)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, max_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def pad_right(rows: Sequence[Sequence[int]], pad: int = 0) -> Tensor:
    """[n, longest] int64. A causal model reads right-padded rows correctly without a mask."""
    width = max((len(r) for r in rows), default=0)
    out = torch.full((len(rows), width), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out
