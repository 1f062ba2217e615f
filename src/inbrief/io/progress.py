"""Progress for people (tqdm on a terminal, plain lines otherwise) and for machines (`metrics.jsonl`)."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from inbrief.io.runfolder import atomic_path

T = TypeVar("T")
PLAIN_EVERY_S = 20.0
SLOT_ENV = "INBRIEF_PROGRESS_SLOT"
"""Set by the pool for its workers: on which terminal row a worker draws its bar. Changes nothing but the display."""


class Progress:
    """Counts towards `total`; on a terminal a bar, otherwise a line every 20 s with the time left. Writes to stderr."""

    def __init__(self, total: int, label: str, start: int = 0, unit: str = "step") -> None:
        self.total, self.label, self.done, self.first = total, label, start, start
        self.began = self.last_line = time.monotonic()
        self.note = ""
        self.bar = None
        if sys.stderr.isatty():
            slot = int(os.environ.get(SLOT_ENV, "0"))
            self.bar = tqdm(
                total=total, desc=label, initial=start, unit=unit, position=slot, leave=slot == 0, dynamic_ncols=True
            )

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last_line >= PLAIN_EVERY_S:
            self.last_line = time.monotonic()
            left = (self.last_line - self.began) / max(1, self.done - self.first) * (self.total - self.done)
            print(
                f"{self.label}: {self.done}/{self.total}, {clock(left)} left  {self.note}", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif time.monotonic() - self.began >= 2:
            spent = clock(time.monotonic() - self.began)
            print(f"{self.label}: done in {spent}  {self.note}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or self.bar is not None:
            self.close()


def track(items: Iterable[T], total: int, label: str, unit: str = "batch") -> Iterator[T]:
    """Iterate with progress."""
    with Progress(total, label, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """'0:07', '12:30' or '1:02:03'."""
    s = round(seconds)
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


class MetricsLog:
    """Append-only `metrics.jsonl`. On resume, steps past `keep` are cut, so that no step stands twice."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line for line in read_metrics(path) if line["step"] < keep] if path.exists() else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(self, step: int, **values: Any) -> None:
        """One line; a number that is not finite stands as null, which JSON has a word for."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a line cut short by a kill is left out."""
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out
