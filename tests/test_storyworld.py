"""StoryWorld: the stories, the truth about them, the teacher and the tokenizer."""

from __future__ import annotations

import random

import pytest
from conftest import MARKER
from hypothesis import example, given
from hypothesis import strategies as st

from inbrief.storyworld import truth, world
from inbrief.storyworld.retelling import DROP_RATES, retell
from inbrief.storyworld.tokenizer import END, PAD, TURN, build_tokenizer

SEED, INDEX = st.integers(0, 10_000), st.integers(0, 10_000)
_TOKENIZER = build_tokenizer([world.story(0, i) for i in range(60)], min_count=2)


@st.composite
def beginnings(draw: st.DrawFn) -> tuple[str, str]:
    """A story and a beginning of it, cut at a word."""
    text = world.story(draw(SEED), draw(INDEX))
    words = text.split(" ")
    return text, " ".join(words[: draw(st.integers(1, len(words)))])


# The world


def test_every_content_word_belongs_to_one_slot():
    words = [w for values in world.SLOTS.values() for w in values]
    assert len(words) == len(set(words)) == len(world.SLOT_OF)
    assert all(w.isalpha() for w in words)
    assert {w.lower() for w in words} == {w.lower() for w in set(words)}
    assert world.PLANTING.keys() == world.SLOTS.keys()
    assert min(world.PLANTING.values()) == 0 < max(world.PLANTING.values())


@given(SEED, INDEX)
def test_a_story_is_a_function_of_corpus_and_index(seed, index):
    state = random.getstate()
    assert world.story(seed, index) == world.story(seed, index)
    assert random.getstate() == state


def test_stories_differ_by_index_and_by_corpus():
    assert len({world.story(seed, i) for seed in range(3) for i in range(200)}) == 600


@given(SEED, INDEX)
def test_a_whole_story_tells_every_fact_once_and_never_contradicts_itself(seed, index):
    text = world.story(seed, index)
    told = world.facts(text)
    assert told.keys() == world.SLOTS.keys()
    assert all(told[m.slot] == m.value for m in world.mentions(text))


@given(beginnings())
def test_a_beginning_tells_a_part_of_what_the_story_tells(pair):
    text, beginning = pair
    assert world.facts(beginning).items() <= world.facts(text).items()


@given(beginnings())
def test_mentions_end_where_their_word_ends(pair):
    _, text = pair
    for m in world.mentions(text):
        assert text[: m.end].endswith(m.value)
        assert not text[m.end : m.end + 1].isalpha()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a red map", [("colour", "red"), ("object", "map")]),
        ("redder maps", []),
        ("Red mara", []),
        ("foxred", []),
        ("", []),
        ("Mara's key, (sad).", [("hero", "Mara"), ("object", "key"), ("mood", "sad")]),
    ],
)
def test_words_are_matched_whole_and_by_case(text, found):
    assert [(m.slot, m.value) for m in world.mentions(text)] == found


def test_every_fact_can_be_told_early_or_late():
    first = {slot: set() for slot in world.SLOTS}
    for i in range(400):
        order = list(world.facts(world.story(3, i)))
        for slot in first:
            first[slot].add(order.index(slot))
    assert all(len(places) > 3 for places in first.values())


@pytest.mark.parametrize("word", [w for slot in world.SLOTS.values() for w in slot if w[0].islower()])
def test_articles_are_english(word):
    silent = word == "honest"
    article = "an" if silent or word[0] in "aeiou" else "a"
    assert world.with_article(word) == f"{article} {word}"


# The truth


def test_the_four_verdicts():
    text = "Mara was a brave baker. One rainy morning"
    judged = truth.judge("Mara, a shy baker, in rainy weather with a lantern.", text, {"hero", "kind"})
    assert [(j.slot, j.value, j.verdict) for j in judged] == [
        ("hero", "Mara", "true_decodable"),
        ("trait", "shy", "false"),
        ("kind", "baker", "true_decodable"),
        ("weather", "rainy", "true_by_luck"),
        ("object", "lantern", "not_yet_told"),
    ]


def test_a_claim_is_judged_once_and_contradictory_claims_each():
    assert truth.claims("red, red and blue") == [("colour", "red"), ("colour", "blue")]
    verdicts = [j.verdict for j in truth.judge("red, red and blue", "a red map", {"colour"})]
    assert verdicts == ["true_decodable", "false"]


@given(beginnings(), st.sets(st.sampled_from(sorted(world.SLOTS))))
def test_a_text_is_true_of_itself(pair, decodable):
    _, text = pair
    judged = truth.judge(text, text, decodable)
    assert {j.slot for j in judged} == truth.established(text).keys()
    for j in judged:
        assert j.verdict == ("true_decodable" if j.slot in decodable else "true_by_luck")


@given(SEED, INDEX, SEED, INDEX)
def test_the_verdicts_of_any_story_about_any_other_follow_from_their_facts(seed, index, other_seed, other_index):
    text, claimed = world.story(seed, index), world.story(other_seed, other_index)
    told = world.facts(text)
    for j in truth.judge(claimed, text, world.SLOTS):
        assert (j.verdict == "true_decodable") == (told[j.slot] == j.value)


# The teacher


@given(beginnings(), st.integers(0, 2**32))
def test_the_teacher_never_says_what_is_false_or_not_yet_told(pair, seed):
    _, text = pair
    retold = retell(text, random.Random(seed))
    assert {j.verdict for j in truth.judge(retold, text, world.SLOTS)} <= {"true_decodable"}
    assert retold.strip() == retold != ""


@given(beginnings(), st.integers(0, 2**32))
def test_the_teacher_is_a_function_of_text_and_generator(pair, seed):
    assert retell(pair[1], random.Random(seed)) == retell(pair[1], random.Random(seed))


def test_the_teachers_completeness_and_length_vary_on_one_text():
    text = world.story(0, 1)
    told = [retell(text, random.Random(i)) for i in range(300)]
    slots = [len({slot for slot, _ in truth.claims(t)}) for t in told]
    words = [len(t.split()) for t in told]
    assert max(slots) == len(world.SLOTS)
    assert min(slots) <= 3
    assert max(words) > 3 * min(words)
    assert sum(s == len(world.SLOTS) for s in slots) / 300 > 0.5 * DROP_RATES.count(0.0) / len(DROP_RATES)


def test_the_teacher_quotes_the_last_words():
    text = " ".join(world.story(0, 2).split()[:20])
    quoted = [t for t in (retell(text, random.Random(i)) for i in range(100)) if '"' in t]
    assert len(quoted) > 50
    for t in quoted:
        quote = t.split('"')[1].removeprefix("... ")
        assert text.endswith(quote)
        assert 1 <= len(quote.split()) <= 4


# The tokenizer


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example(f"{END}{PAD}{MARKER} <explanation>\n</text>  ")
@example("\r\n\t\x00 é漢🦊")
def test_any_text_round_trips(text):
    assert _TOKENIZER.decode(_TOKENIZER(text)["input_ids"]) == text


@given(beginnings())
def test_stories_and_what_the_teacher_says_round_trip_in_few_tokens(tokenizer, pair):
    for text in (pair[1], retell(pair[1], random.Random(0))):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 2 * len(text.split()) + 10


def test_content_words_tags_and_marker_are_single_tokens(tokenizer):
    words = [f" {w}" for values in world.SLOTS.values() for w in values]
    tags = ["<explanation>", "</explanation>", "<concept>", "</concept>", "<text>", "</text>", "<summary>", MARKER]
    for text in [*words, *tags, PAD, TURN, END]:
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text


def test_T13_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer("a fox")["input_ids"] == tokenizer("a fox", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token == PAD


def test_tags_are_text_and_only_the_turn_tokens_are_special(tokenizer):
    ids = tokenizer(f"{TURN}<explanation>a{MARKER}</explanation>{END}{PAD}")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"<explanation>a{MARKER}</explanation>"


def test_the_chat_template_ends_with_the_assistants_turn(tokenizer):
    message = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert prompt == f"{TURN}user\nhi{END}\n{TURN}assistant\n"
    assert tokenizer.apply_chat_template(message, tokenize=False) == f"{TURN}user\nhi{END}\n"


def test_rare_words_fall_back_to_bytes():
    ids = _TOKENIZER(" lantern")["input_ids"]
    assert len(ids) == 1
    assert len(_TOKENIZER(" zyxw")["input_ids"]) == 5
