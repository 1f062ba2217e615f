"""Sample explanations: every vector × its group in one lock-step batch.

The template's prefix is computed once, each distinct vector is prefilled once and expanded to its group, the cache is
allocated once, rows that have stopped are dropped, and log-probs come from the same pass. Sampling is pinned to T = 1
over the full vocabulary: nothing a generation_config says reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from inbrief.contract.explanation import Answer, read_answers
from inbrief.models import architectures
from inbrief.models.verbalizer import Verbalizer


class _Buffered(DynamicLayer):
    """A cache layer that writes into a buffer allocated once and hands out views of it."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.used = keys.shape[-2]
        shape = (*keys.shape[:-2], self.used + room, keys.shape[-1])
        self._k, self._v = keys.new_empty(shape), values.new_empty(shape)
        self._k[..., : self.used, :], self._v[..., : self.used, :] = keys, values
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = self._k[..., : self.used, :], self._v[..., : self.used, :]
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.used + key_states.shape[-2]
        self._k[..., self.used : end, :], self._v[..., self.used : end, :] = key_states, value_states
        self.used = end
        return self._show()

    def keep(self, rows: Tensor) -> None:
        """Drop every row not in `rows`; the room that is left stays allocated."""
        self._k, self._v = self._k[rows], self._v[rows]
        self._show()


@dataclass
class Samples:
    """`answers[i]` and `logprobs[i]` belong to vector `owners[i]`; a group's samples stand together.

    `logprobs` [n·group, longest] float32 on the CPU, zero beyond each answer's end.
    """

    answers: list[Answer]
    logprobs: Tensor
    owners: list[int]


def _buffered(cache: DynamicCache, group: int, room: int) -> tuple[DynamicCache, list[_Buffered]]:
    """A cache for `group` times the rows with `room` more columns, and its layers."""
    layers = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        layers.append(_Buffered(layer.keys.repeat_interleave(group, 0), layer.values.repeat_interleave(group, 0), room))
    out = DynamicCache()
    out.layers = [*layers]
    return out, layers


@torch.inference_mode()
def sample(
    av: Verbalizer, vectors: Tensor, group: int, seed: int, cap: int | None = None, max_rows: int = 512
) -> Samples:
    """Draw `group` answers for each raw activation of vectors [n, d].

    `seed` decides everything: the same vectors, weights and seed give the same text. `cap` defaults to the contract's.
    At most `max_rows` rows are decoded together.
    """
    cap = cap or av.contract.cap
    was_training = av.training
    av.eval()
    rows: list[list[int]] = []
    logprobs: list[list[float]] = []
    per_chunk = max(1, max_rows // group)
    try:
        for start in range(0, len(vectors), per_chunk):
            generator = torch.Generator(av.device).manual_seed((seed * 1_000_003 + start) % 2**63)
            ids, lp = _decode(av, vectors[start : start + per_chunk], group, generator, cap)
            rows += ids
            logprobs += lp
    finally:
        av.train(was_training)
    answers = read_answers(rows, av.tokenizer, av.contract.stop_ids)
    table = torch.zeros(len(rows), max((len(r) for r in rows), default=0))
    for i, lp in enumerate(logprobs):
        table[i, : len(lp)] = torch.tensor(lp)
    return Samples(answers, table, [i for i in range(len(vectors)) for _ in range(group)])


def _decode(
    av: Verbalizer, vectors: Tensor, group: int, generator: torch.Generator, cap: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Lock-step decoding of one chunk: ids and log-probs per row, cut after the first stop id."""
    decoder, head = architectures.decoder(av.model), av.model.get_output_embeddings()
    n, device = len(vectors) * group, av.device
    prefill = av.prefix_cache(len(vectors))
    last = av.hidden(vectors, torch.empty(len(vectors), 0, dtype=torch.long), prefill)[:, -1]
    cache, layers = _buffered(prefill, group, cap)
    logits = head(last).float().repeat_interleave(group, 0)
    stops = torch.tensor(av.contract.stop_ids, device=device)
    out = torch.zeros(n, cap, dtype=torch.long, device=device)
    out_lp = torch.zeros(n, cap, device=device)
    length = torch.full((n,), cap, device=device)
    alive = torch.arange(n, device=device)  # rows still in the cache
    open_ = torch.ones(n, dtype=torch.bool, device=device)  # of those, the ones that have not stopped
    for t in range(cap):
        logp = logits.log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1, generator=generator)
        out[alive, t] = token[:, 0]
        out_lp[alive, t] = logp.gather(1, token)[:, 0]
        stopped = torch.isin(token[:, 0], stops) & open_
        length[alive[stopped]] = t + 1
        open_ = open_ & ~stopped
        left = int(open_.sum())
        if left == 0 or t + 1 == cap:
            break
        # Compacting copies the cache, so it waits until an eighth of the rows is idle.
        if left <= 0.875 * len(alive):
            keep = open_.nonzero()[:, 0]
            for layer in layers:
                layer.keep(keep)
            alive, open_, token = alive[keep], open_[keep], token[keep]
        hidden = decoder(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state
        logits = head(hidden[:, -1]).float()
    ids, lps, lengths = out.tolist(), out_lp.tolist(), length.tolist()
    return [r[:k] for r, k in zip(ids, lengths, strict=True)], [r[:k] for r, k in zip(lps, lengths, strict=True)]
