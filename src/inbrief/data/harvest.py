"""Text to activations: the residual stream after block K at a few positions of every document."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbrief.config import Config, Split
from inbrief.data import store
from inbrief.data.corpora import Document, documents
from inbrief.io.errors import InbriefError
from inbrief.io.progress import Progress
from inbrief.models.architectures import blocks, check_layer, decoder
from inbrief.models.batching import length_batches, pad_right
from inbrief.models.injection import check_vectors

PART_DOCUMENTS = 1000
MAX_TOKENS_PER_BATCH = 16384
SPLITS = ("av", "ar", "rl", "heldout")


class _Reached(Exception):
    """Raised by the hook once block K has answered: nothing after it needs computing."""


def activations(model, ids: list[list[int]], layer: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, [len(ids[row]), d] float32 on the CPU): the output of block `layer`, packed by length.

    It equals `hidden_states[layer+1]`; no row's padding is ever seen.
    """
    check_layer(model.config, layer)
    caught: list[Tensor] = []

    def catch(_module, _args, output) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = blocks(model)[layer].register_forward_hook(catch)
    try:
        for batch in length_batches([len(r) for r in ids], MAX_TOKENS_PER_BATCH):
            device = model.get_input_embeddings().weight.device
            with torch.inference_mode(), suppress(_Reached):
                decoder(model)(input_ids=pad_right([ids[i] for i in batch]).to(device), use_cache=False)
            hidden = caught.pop().float().cpu()
            for k, i in enumerate(batch):
                yield int(i), hidden[k, : len(ids[i])].clone()
    finally:
        handle.remove()


def choose_positions(seed: int, document_id: str, candidates: list[int], n: int) -> list[int]:
    """Up to n positions, drawn without replacement; a function of (seed, document) alone, so any sharding agrees."""
    rng = random.Random(hashlib.sha256(f"{seed}|{document_id}".encode()).hexdigest())
    return sorted(rng.sample(candidates, min(n, len(candidates))))


def split_of(seed: int, document_id: str, split: Split) -> str:
    """The split of a document: stable when the corpus is reordered, sharded or grown."""
    share = int(hashlib.sha256(f"split|{seed}|{document_id}".encode()).hexdigest()[:13], 16) / 16**13
    for name in SPLITS:
        share -= getattr(split, name)
        if share < 0:
            return name
    return SPLITS[-1]


def activation_id(revision: str, layer: int, document_id: str, position: int) -> str:
    return hashlib.sha256(f"{revision}|{layer}|{document_id}|{position}".encode()).hexdigest()[:16]


@dataclass
class Harvester:
    """Everything a harvest needs; `revision` names the base model's weights."""

    config: Config
    model: Any
    tokenizer: Any
    revision: str

    def run(self, folder: Path) -> None:
        """Write every part that is not there yet, then check that the splits share no document."""
        folder.mkdir(parents=True, exist_ok=True)
        data = self.config.data
        source = documents(data)
        with Progress(data.documents, "harvest", unit="doc") as progress:
            part = 0
            while block := list(islice(source, PART_DOCUMENTS)):
                if not store.has_part(folder, part):
                    self._part(folder, part, block)
                progress.advance(len(block))
                part += 1
        if part == 0:
            raise InbriefError(f"The corpus {data.corpus!r} must hold at least one document; it is empty.")
        harvested = store.Store(folder)
        if len(harvested) == 0:
            raise InbriefError(
                f"At least one document must have more than data.min_position = {data.min_position} tokens; none has. Lower it or "
                "choose longer documents."
            )
        check_disjoint(harvested)

    def _part(self, folder: Path, part: int, block: list[Document]) -> None:
        data, layer = self.config.data, self.config.model.layer
        texts = [d.text for d in block]
        ids = [row[: data.max_tokens] for row in self.tokenizer(texts)["input_ids"]]
        special = set(self.tokenizer.all_special_ids)
        rows: dict[int, list[dict]] = {}
        vectors: dict[int, Tensor] = {}
        kept = [i for i, row in enumerate(ids) if len(row) > data.min_position]
        for k, hidden in activations(self.model, [ids[i] for i in kept], layer):
            i, row = kept[k], ids[kept[k]]
            candidates = [p for p in range(data.min_position, len(row)) if row[p] not in special]
            chosen = choose_positions(data.seed, block[i].id, candidates, data.positions)
            rows[i] = [self._row(block[i], row, p) for p in chosen]
            vectors[i] = hidden[chosen]
        order = sorted(rows)
        found = torch.cat([torch.empty(0, self.model.config.hidden_size), *(vectors[i] for i in order)])
        check_vectors(found, found.shape[1])
        store.write_part(folder, part, [r for i in order for r in rows[i]], found)

    def _row(self, document: Document, ids: list[int], position: int) -> dict:
        data = self.config.data
        decode = self.tokenizer.decode
        last = [-1] * 8 + ids[: position + 1]
        return {
            "activation_id": activation_id(self.revision, self.config.model.layer, document.id, position),
            "doc_id": document.id,
            "position": position,
            "token_id": ids[position],
            "last_ids": last[-8:],
            "split": split_of(data.seed, document.id, data.split),
            "text": decode(ids[: position + 1], skip_special_tokens=True),
            "rest": decode(ids[position + 1 :], skip_special_tokens=True),
        }


def check_disjoint(harvested: store.Store) -> None:
    """Raises InbriefError when a document stands in two splits or a split is empty."""
    documents_of: dict[str, set[str]] = {name: set() for name in SPLITS}
    for doc, split in zip(harvested.column("doc_id"), harvested.column("split"), strict=True):
        documents_of[split].add(doc)
    for i, a in enumerate(SPLITS):
        if not documents_of[a]:
            raise InbriefError(
                f"Every split needs documents; {a!r} got none of {len(harvested)} activations. Raise data.documents."
            )
        for b in SPLITS[i + 1 :]:
            if both := documents_of[a] & documents_of[b]:
                raise InbriefError(
                    f"No document may stand in two splits; {a!r} and {b!r} share {len(both)}, e.g. {min(both)}."
                )
