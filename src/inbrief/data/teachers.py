"""Who writes the explanations a warm start learns from."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

from inbrief.storyworld import retelling

Write = Callable[[str, random.Random], str]
_STOP = frozenset(
    "the and for that this with was are but not you all any can had her him his has have they from there their what when "
    "who will more were been its into than then them these which would about could other some such only also over our".split()
)


def rules(text: str, rng: random.Random) -> str:
    """A rule-based explanation of any text: register, salient words, last words quoted, in 2–3 short parts.

    Completeness and wording vary by `rng`, as the policy must find something to choose from.
    """
    words = re.findall(r"[^\W\d_]{3,}", text)
    counts = Counter(w.lower() for w in words if w.lower() not in _STOP)
    recent = {w.lower(): i for i, w in enumerate(words)}
    salient = sorted(counts, key=lambda w: (-counts[w], -recent[w]))[: rng.choice((2, 4, 6, 8))]
    names = [w for w in dict.fromkeys(words[1:]) if w[0].isupper() and not w.isupper()][: rng.choice((0, 2, 3))]
    tail = " ".join(text.split()[-rng.choice((3, 5, 8)) :])
    terse = rng.random() < 0.4
    parts = [f"{_register(text)}." if terse else f"The text reads like {_register(text)}."]
    if salient:
        parts.append(("About: " if terse else "It is mostly about ") + ", ".join(salient) + ".")
    if names:
        parts.append(("Names: " if terse else "It names ") + ", ".join(names) + ".")
    parts.append(
        f'Ends: "{tail}".' if terse else f'The last words are "{tail}", and the next ones should go on from there.'
    )
    rate = rng.choice(retelling.DROP_RATES)
    return "\n".join(p for p in parts if rng.random() >= rate) or parts[-1]


def _register(text: str) -> str:
    if re.search(r"^\s*(def|class|import|return|#include|function)\b|[{};]\s*$", text, re.M):
        return "program code"
    if text.count("?") >= 2:
        return "questions"
    if re.search(r'["“].+["”]', text):
        return "a story with speech"
    if re.search(r"\b(is|are|returns?|raises?|must|should)\b", text):
        return "an explanation"
    return "a narrative"


TEACHERS: dict[str, Write] = {"storyworld": retelling.retell, "rules": rules}


def teach(kind: str, seed: int, activation_id: str, text: str) -> str:
    """The explanation of one activation, a function of its arguments alone; `text` ends at the explained position."""
    return TEACHERS[kind](text, random.Random(f"teach|{seed}|{activation_id}"))
