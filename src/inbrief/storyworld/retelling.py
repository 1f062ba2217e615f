"""How an assistant model would describe a story so far: the world's teacher.

Completeness and wording vary from one explanation to the next. Without that spread a policy has nothing to choose
from, and a length penalty nothing to push against.
"""

from __future__ import annotations

import random
import re

from inbrief.storyworld import world

DROP_RATES = (0.0, 0.0, 0.15, 0.3, 0.5)
"""Per explanation, the chance that each sentence is left out."""
STYLES = ("verbose", "verbose", "plain", "terse")

_CHARACTER = {
    "verbose": ("The text is a story about {who}", "The main character of this story seems to be {who}"),
    "plain": ("It is about {who}", "A story of {who}"),
    "terse": ("{who}", "Story: {who}"),
}
_SETTING = {
    "verbose": ("The scene is set {where}", "As for the setting, we are told that it takes place {where}"),
    "plain": ("It is set {where}", "It happens {where}"),
    "terse": ("{where}", "Setting: {where}"),
}
_OBJECT = {
    "verbose": ("An object that matters in this story is {what}", "There has also been a mention of {what}"),
    "plain": ("There is {what}", "It mentions {what}"),
    "terse": ("{what}", "Object: {what}"),
}
_EVENT = {
    "verbose": ("What has happened so far involves {happened}", "The story has also told us of {happened}"),
    "plain": ("There was {happened}", "It tells of {happened}"),
    "terse": ("{happened}", "Event: {happened}"),
}
_FRIEND = {
    "verbose": ("A second character has been introduced, namely {friend}", "Help comes in the form of {friend}"),
    "plain": ("Then there is {friend}", "It also has {friend}"),
    "terse": ("{friend}", "Friend: {friend}"),
}
_LAST = {
    "verbose": (
        'The last words that can be read here are "... {quote}"',
        'The text breaks off with the words "... {quote}"',
    ),
    "plain": ('It ends with "... {quote}"', 'The last words are "... {quote}"'),
    "terse": ('"... {quote}"', 'Last: "... {quote}"'),
}
_NEXT = {
    "verbose": ("The next words will most likely tell us more about {missing}",),
    "plain": ("Next may come {missing}",),
    "terse": ("Next: {missing}",),
}
_FILLER = (
    "The tone is that of a simple tale for children.",
    "The sentences are short and the language is easy to follow.",
    "This reads like the kind of text one would expect in a book of tales.",
)
_MISSING = {
    "hero": "the main character",
    "place": "the setting",
    "object": "some object",
    "event": "what happened",
    "friend": "another character",
}


def _noun(told: dict[str, str], noun: str, adjective: str) -> str | None:
    """'a brave baker', 'a baker', 'someone brave' or None, by what has been told."""
    if noun in told:
        return world.with_article(" ".join(told[s] for s in (adjective, noun) if s in told))
    return f"someone {told[adjective]}" if adjective in told else None


def _phrases(told: dict[str, str]) -> list[tuple[dict[str, tuple[str, ...]], str]]:
    """The things there are to say, each with its family of wordings."""
    out = []
    person = _noun(told, "kind", "trait")
    if hero := told.get("hero"):
        person = f"{hero}, {person}" if person else hero
    if person:
        out.append((_CHARACTER, person))
    where = f"at the {told['place']}" if "place" in told else ""
    if "weather" in told:
        where = f"{where} in {told['weather']} weather".strip()
    if where:
        out.append((_SETTING, where))
    if "object" in told:
        out.append((_OBJECT, _noun(told, "object", "colour") or ""))
    elif "colour" in told:
        out.append((_OBJECT, f"something {told['colour']}"))
    happened = world.with_article(told["event"]) if "event" in told else ""
    if "mood" in told:
        happened = f"{happened} and feeling {told['mood']}" if happened else f"someone feeling {told['mood']}"
    if happened:
        out.append((_EVENT, happened))
    friend = world.with_article(told["friend_kind"]) if "friend_kind" in told else ""
    if "friend" in told:
        friend = f"{told['friend']}, {friend}" if friend else told["friend"]
    if friend:
        out.append((_FRIEND, friend))
    return out


def retell(text: str, rng: random.Random) -> str:
    """Explain the story so far as a verbose assistant would, sometimes dropping sentences and sometimes terse.

    Returns three parts separated by newlines: what has been told, the last words quoted, what may come next. At least
    one sentence always remains.
    """
    told = world.facts(text)
    rate = rng.choice(DROP_RATES)
    style = rng.choice(STYLES)

    def pick(family: dict[str, tuple[str, ...]]) -> str:
        chosen = style if rng.random() < 0.85 else rng.choice(STYLES)
        return rng.choice(family[chosen])

    def kept(sentences: list[str]) -> list[str]:
        return [s for s in sentences if rng.random() >= rate]

    body = [
        _sentence(pick(family).format(who=p, where=p, what=p, happened=p, friend=p)) for family, p in _phrases(told)
    ]
    words = re.findall(r"\S+", text)
    quote = " ".join(words[-rng.choice((1, 1, 2, 2, 3)) :])
    last = [_sentence(pick(_LAST).format(quote=quote))]
    missing = [name for slot, name in _MISSING.items() if slot not in told]
    upcoming = [_sentence(pick(_NEXT).format(missing=rng.choice(missing)))] if missing else []
    if style == "verbose" and rng.random() < 0.6:
        upcoming.append(rng.choice(_FILLER))
    parts = [" ".join(kept(part)) for part in (body, last, upcoming)]
    return "\n".join(p for p in parts if p) or last[0]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(('."', '."')) else ".")
