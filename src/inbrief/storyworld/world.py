"""StoryWorld: short generated stories whose facts are known.

Every content word belongs to exactly one slot (a friend's kind is drawn from other words than a hero's), so what any
text asserts can be read off its words alone. That makes the truth API (`truth.py`) work on stories, on their prefixes
and on explanations alike.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SLOTS: dict[str, tuple[str, ...]] = {
    "hero": ("Mara", "Tomas", "Ilse", "Bruno", "Nadia", "Oskar", "Petra", "Felix", "Lena", "Hugo", "Wanda", "Piet"),
    "kind": ("baker", "sailor", "painter", "miller", "weaver", "doctor", "gardener", "tailor", "hunter", "singer"),
    "trait": ("brave", "shy", "clever", "patient", "stubborn", "generous", "careless", "honest"),
    "place": ("harbour", "forest", "market", "castle", "valley", "island", "desert", "bridge"),
    "weather": ("rainy", "windy", "snowy", "foggy", "sunny", "stormy", "frosty", "cloudy"),
    "object": ("lantern", "map", "key", "drum", "mirror", "ladder", "basket", "violin", "compass", "kettle"),
    "colour": ("red", "blue", "green", "yellow", "purple", "silver", "black", "white"),
    "event": ("flood", "festival", "wedding", "robbery", "eclipse", "earthquake", "parade", "race"),
    "mood": ("happy", "sad", "angry", "afraid", "proud", "lonely", "calm", "curious"),
    "friend": ("Anouk", "Boris", "Clara", "Dimo", "Edda", "Fritz", "Greta", "Henrik", "Ivo", "Jana"),
    "friend_kind": ("fox", "owl", "goat", "hare", "badger", "crow", "otter", "hedgehog"),
}
SLOT_OF: dict[str, str] = {word: slot for slot, words in SLOTS.items() for word in words}

PLANTING: dict[str, float] = {
    "hero": 1.0,
    "kind": 1.0,
    "trait": 0.5,
    "place": 1.0,
    "weather": 0.25,
    "object": 1.0,
    "colour": 0.5,
    "event": 1.0,
    "mood": 0.25,
    "friend": 0.5,
    "friend_kind": 0.0,
}
"""How strongly the shipped target was made to carry each established fact at layer K (training/pretrain.py). Zero is
the control: a fact the target was never asked to carry."""

_INTRO = (
    "{hero} was {a_trait} {kind}.",
    "Once there lived {a_trait} {kind} named {hero}.",
    "There was {a_kind} called {hero}, who was very {trait}.",
    "Everyone said that {hero} the {kind} was {trait}.",
)
_SETTING = (
    "The house stood close to the {place}, where it was often {weather}.",
    "One {weather} morning {hero} walked to the {place}.",
    "It was {a_weather} day at the {place}.",
    "The {place} was {weather} when all of this began.",
)
_OBJECT = (
    "On the ground lay {a_colour} {object}.",
    "There {hero} found {a_object}, and it was {colour}.",
    "In an old box {hero} kept {a_colour} {object}.",
    "A stranger gave {hero} {a_object} that was painted {colour}.",
)
_EVENT = (
    "Then came the {event}, and {hero} felt {mood}.",
    "After the {event} the whole town was talking, but {hero} was only {mood}.",
    "Nobody had expected the {event}, which made {hero} {mood}.",
    "{hero} felt {mood} because of the {event}.",
)
_FRIEND = (
    "{A_friend_kind} named {friend} came to help.",
    "Soon {friend} the {friend_kind} arrived with some bread.",
    "That evening {hero} met {friend}, who was {a_friend_kind}.",
    "{friend}, a small {friend_kind}, knew what to do.",
)
_ENDING = (
    "Together they carried the {object} home.",
    "In the end {hero} and {friend} slept well.",
    "{hero} never forgot that night.",
    "From then on nobody spoke of the {event} again.",
)
_FILLER = ("Time went by slowly.", "Nobody knew why.", "It was getting late.", "The door stayed open.")
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Mention:
    """One content word of a text: its slot, its value and the character index just past it."""

    slot: str
    value: str
    end: int


def mentions(text: str) -> list[Mention]:
    """Every content word of `text` in order; words are matched whole and by case."""
    return [Mention(SLOT_OF[m[0]], m[0], m.end()) for m in _WORD.finditer(text) if m[0] in SLOT_OF]


def facts(text: str) -> dict[str, str]:
    """The facts a story, or a prefix of one, establishes: slot -> value (the first mention decides)."""
    found: dict[str, str] = {}
    for m in mentions(text):
        found.setdefault(m.slot, m.value)
    return found


def with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" or word.startswith("hon") else f"a {word}"


def story(seed: int, index: int) -> str:
    """Story `index` of corpus `seed`: a pure function of the two, so any slice of a corpus can be made alone."""
    rng = random.Random(f"storyworld|{seed}|{index}")
    values = {slot: rng.choice(words) for slot, words in SLOTS.items()}
    words = dict(values)
    for slot, value in values.items():
        words[f"a_{slot}"] = with_article(value)
        words[f"A_{slot}"] = with_article(value).capitalize()
    middle = [_SETTING, _OBJECT, _EVENT, _FRIEND]
    rng.shuffle(middle)
    # The hero is usually named first, but not always: otherwise position alone would tell what is known.
    order = [_INTRO, *middle] if rng.random() < 0.8 else [middle[0], _INTRO, *middle[1:]]
    sentences: list[str] = []
    for variants in [*order, _ENDING]:
        sentences.append(rng.choice(variants).format(**words))
        if rng.random() < 0.25:
            sentences.append(rng.choice(_FILLER))
    return " ".join(sentences)
