"""Activations on disk: raw vectors in sharded safetensors beside one parquet index, written part by part.

A part covers a fixed block of documents and is two files written atomically, so a killed harvest goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import atomic_path

SCHEMA = pa.schema(
    [
        ("activation_id", pa.string()),
        ("doc_id", pa.string()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("last_ids", pa.list_(pa.int32(), 8)),  # the last eight token ids, oldest first, -1 before the document
        ("split", pa.string()),
        ("text", pa.string()),  # the source up to and including the position
        ("rest", pa.string()),  # what follows in the document
    ]
)


def write_part(folder: Path, part: int, rows: list[dict], vectors: Tensor) -> None:
    """rows in SCHEMA, vectors [len(rows), d] raw float32."""
    with atomic_path(folder / f"part-{part:05d}.safetensors") as temporary:
        save_file({"activations": vectors.contiguous()}, temporary)
    with atomic_path(folder / f"part-{part:05d}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)


def has_part(folder: Path, part: int) -> bool:
    # The index is written last: it stands only when the vectors do.
    return (folder / f"part-{part:05d}.parquet").is_file()


class Store:
    """Read a finished harvest. `index` holds one row per activation; `vectors(rows)` fetches theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("part-*.parquet"))
        if not paths:
            raise InbriefError(f"{folder} must hold harvested activations; it holds none. Run `inbrief harvest` first.")
        tables = [_parquet(p) for p in paths]
        self.index = pa.concat_tables(tables)
        self._shards = [p.with_suffix(".safetensors") for p in paths]
        self._first = np.cumsum([0, *(t.num_rows for t in tables)])
        self._open: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.index.num_rows

    def column(self, name: str) -> list:
        return self.index.column(name).to_pylist()

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, in corpus order."""
        return np.flatnonzero(np.asarray(self.column("split")) == split)

    def _shard(self, i: int) -> Tensor:
        if i not in self._open:
            path = self._shards[i]
            try:
                with safe_open(path, "pt") as f:
                    self._open[i] = f.get_tensor("activations")
            except (SafetensorError, OSError) as e:
                raise InbriefError(
                    f"{path} must be a whole safetensors file; reading failed ({e}). Delete it with its .parquet and harvest again."
                ) from None
            if len(self._open[i]) != self._first[i + 1] - self._first[i]:
                raise InbriefError(f"{path} and its index must have equally many rows. Delete both and harvest again.")
        return self._open[i]

    def vectors(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """[len(rows), d] float32, in the order asked."""
        rows = np.asarray(rows, dtype=np.int64)
        parts = np.searchsorted(self._first, rows, side="right") - 1
        out: Tensor | None = None
        for part in np.unique(parts):
            where = np.flatnonzero(parts == part)
            got = self._shard(int(part))[torch.from_numpy(rows[where] - self._first[part])].float()
            if out is None:
                out = torch.empty(len(rows), got.shape[1])
            elif got.shape[1] != out.shape[1]:
                raise InbriefError(
                    f"Every vector must have one width; {self.folder} holds {out.shape[1]} and {got.shape[1]}."
                )
            out[torch.from_numpy(where)] = got
        if out is None:
            raise InbriefError("At least one activation must be asked for.")
        return out


def write_table(path: Path, rows: list[dict], schema: pa.Schema | None = None) -> None:
    """A parquet file, atomically."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary)


def read_table(path: Path) -> list[dict]:
    if not path.is_file():
        raise InbriefError(f"{path} must exist; it does not. Run the stage that writes it first.")
    return _parquet(path).to_pylist()


def _parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as e:
        raise InbriefError(
            f"{path} must be a whole parquet file; reading failed ({e}). Delete it and run its stage again."
        ) from None
