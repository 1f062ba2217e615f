"""The truth API: what an explanation claims about a StoryWorld text, and whether it is so."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from inbrief.storyworld import world

Verdict = Literal["true_decodable", "true_by_luck", "false", "not_yet_told"]


@dataclass(frozen=True)
class Judged:
    slot: str
    value: str
    verdict: Verdict


@cache
def decodable() -> frozenset[str]:
    """The slots that the shipped target carries at its layer, from the committed acceptance table (acceptance.json)."""
    table = json.loads(resources.files("inbrief.storyworld").joinpath("acceptance.json").read_text())
    return frozenset(slot for slot, fact in table["facts"].items() if fact["decodable"])


def claims(explanation: str) -> list[tuple[str, str]]:
    """The distinct (slot, value) pairs an explanation asserts, in order of first mention."""
    return list(dict.fromkeys((m.slot, m.value) for m in world.mentions(explanation)))


def established(text: str) -> dict[str, str]:
    """The facts told by `text` up to its end: slot -> value."""
    return world.facts(text)


def judge(explanation: str, text: str, readable: Collection[str] | None = None) -> list[Judged]:
    """Judge each claim of `explanation` against `text`, the source up to and including the explained position.

    - *true_decodable*: told, right, and of a slot the target carries (`readable`, by
      default `decodable()`).
    - *true_by_luck*: told and right, but of a slot the activation does not carry, so it was guessed.
    - *false*: the text tells another value. - *not_yet_told*: the text has not told this slot at all.
    """
    carried = decodable() if readable is None else readable
    told = established(text)
    out = []
    for slot, value in claims(explanation):
        if slot not in told:
            verdict: Verdict = "not_yet_told"
        elif told[slot] != value:
            verdict = "false"
        else:
            verdict = "true_decodable" if slot in carried else "true_by_luck"
        out.append(Judged(slot, value, verdict))
    return out
