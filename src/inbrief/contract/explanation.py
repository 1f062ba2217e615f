"""What an explanation is: how it is wrapped, parsed and counted. One function each, used by training, reward,
evaluation and report alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<explanation>", "</explanation>"
THINK = ("<think>", "</think>")
"""Some models open every answer with an empty block of these."""
Finish = Literal["stop", "length"]


def wrap(explanation: str) -> str:
    """The AV's answer that carries `explanation`."""
    return f"{OPEN}\n{explanation.strip()}\n{CLOSE}"


def extract(answer: str) -> str | None:
    """The stripped text between the first opening tag and the next closing one; None if there is none or it is empty.

    Anything inside counts as explanation, a second opening tag or `</text>` too: it reaches the AR as it stands.
    """
    _, opened, rest = answer.partition(OPEN)
    body, closed, _ = rest.partition(CLOSE)
    body = body.strip()
    return body if opened and closed and body else None


def trim(ids: Sequence[int], stop_ids: Iterable[int]) -> tuple[list[int], Finish]:
    """Generated ids up to and including the first stop id of any kind, and why they end.

    A stop id in the very last place is a stop, not a truncation.
    """
    stops = set(stop_ids)
    for i, token in enumerate(ids):
        if token in stops:
            return list(ids[: i + 1]), "stop"
    return list(ids), "length"


@dataclass(frozen=True)
class Answer:
    """One sampled answer, parsed and counted.

    `tokens` counts the generated ids up to and including the first stop id. `content_tokens` counts the tokens of the
    explanation tokenized alone: no tags, no fixed opener (an empty think block), no stop token; never more than `tokens`. `explanation` is None when the
    answer failed: truncated, unparsable or empty.
    """

    ids: list[int]
    text: str
    explanation: str | None
    tokens: int
    content_tokens: int
    finish: Finish


def _without_fixed(text: str) -> str:
    """A failed answer without its tags and fixed opener."""
    for fixed in (OPEN, CLOSE, *THINK):
        text = text.replace(fixed, "")
    return text.strip()


def read_answers(rows: Sequence[Sequence[int]], tokenizer, stop_ids: Iterable[int]) -> list[Answer]:
    """Parse and count sampled rows of ids. A truncated answer has failed even where its tag closed in time: otherwise
    length drifts to the cap."""
    if not rows:
        return []
    stops = set(stop_ids)
    trimmed = [trim(row, stops) for row in rows]
    texts = tokenizer.batch_decode(
        [ids[:-1] if finish == "stop" else ids for ids, finish in trimmed], skip_special_tokens=True
    )
    found = [extract(text) if finish == "stop" else None for text, (_, finish) in zip(texts, trimmed, strict=True)]
    bare = [e if e is not None else _without_fixed(t) for e, t in zip(found, texts, strict=True)]
    counts = [len(ids) for ids in tokenizer(bare, add_special_tokens=False)["input_ids"]]
    return [
        Answer(ids, text, explanation, len(ids), min(count, len(ids)), finish)
        for (ids, finish), text, explanation, count in zip(trimmed, texts, found, counts, strict=True)
    ]
