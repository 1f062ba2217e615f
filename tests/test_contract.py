"""What AV and AR agree on: markers in context, templates byte for byte, what an explanation is and how it is counted."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from typing import Any

import pytest
import yaml
from conftest import AR_TEMPLATE, AV_TEMPLATE, MARKER
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from inbrief.contract import contract as room
from inbrief.contract.contract import FILE, Contract, ar_prompt, av_prompt, check_marker, prompt_ids, verify
from inbrief.contract.explanation import CLOSE, OPEN, extract, read_answers, trim, wrap
from inbrief.io.errors import InbriefError

TAGLESS = st.text().filter(lambda t: t.strip() and OPEN not in t and CLOSE not in t)


def changed(contract: Contract, **values: Any) -> Contract:
    return contract.model_copy(update=values)


def words_tokenizer(*words: str, bos: bool = False, split: bool = True) -> Any:
    vocab = {w: i for i, w in enumerate(["[unk]", "<s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[unk]"))
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]", bos_token="<s>")


# The contract on disk


def test_contract_survives_the_disk(contract, tmp_path):
    contract.save(tmp_path)
    assert Contract.load(tmp_path) == contract


def test_tokenizer_sha_is_a_hash_of_ids_and_tokens_in_order(tokenizer):
    inverse = {i: t for t, i in tokenizer.get_vocab().items()}
    text = "\n".join(f"{i} {inverse[i]}" for i in range(len(inverse)))
    assert room.tokenizer_sha(tokenizer) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_folder_without_contract_names_the_file_it_misses(tmp_path):
    with pytest.raises(InbriefError, match=FILE):
        Contract.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "",
        "hello",
        "base_model: x",
        "- a",
    ],
)
def test_a_file_that_is_no_contract_is_an_error_for_the_user(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InbriefError, match="not a contract"):
        Contract.load(tmp_path)


def test_an_unknown_key_is_refused(contract, tmp_path):
    contract.save(tmp_path)
    raw = yaml.safe_load((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(yaml.safe_dump({**raw, "injection_scael": 3}))
    with pytest.raises(InbriefError, match="injection_scael"):
        Contract.load(tmp_path)


def test_a_newer_schema_asks_for_an_update(contract, tokenizer):
    with pytest.raises(InbriefError, match="Update"):
        verify(changed(contract, schema_version=room.SCHEMA + 1), tokenizer)


def test_a_layer_is_printed_with_its_other_names(contract):
    assert contract.layer_names == "layer 2 (resid_post.2, blocks.2.hook_resid_post)"


# The AV's prompt


def test_the_prompt_is_the_chat_template_with_the_marker_between_its_neighbours(contract, tokenizer):
    ids, column = av_prompt(contract, tokenizer)
    text = f"<|im_start|>user\n<concept>{MARKER}</concept>\nExplain.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[column - 1 : column + 2]) == f"<concept>{MARKER}</concept>"
    verify(contract, tokenizer)


@pytest.mark.parametrize(
    ("template", "found"),
    [("Explain.", "0 times"), ("<concept>{marker}</concept> {marker}", "2 times"), (f"{MARKER}{{marker}}", "2 times")],
)
def test_T1_marker_absent_or_doubled_is_refused(contract, tokenizer, template, found):
    with pytest.raises(InbriefError, match=found):
        verify(changed(contract, av_template=template), tokenizer)


@pytest.mark.parametrize("template", ["{marker}</concept>", "<concept>{marker}"])
def test_T1_marker_at_an_edge_is_refused(contract, tokenizer, template):
    bare = deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InbriefError, match="edge"):
        verify(changed(contract, av_template=template), bare)


@pytest.mark.parametrize("template", ["<text>{marker}</concept>", "<concept>{marker}</text>", "<concept> {marker} "])
def test_T1_marker_with_a_wrong_neighbour_is_refused(contract, tokenizer, template):
    with pytest.raises(InbriefError, match="neighbours"):
        verify(changed(contract, av_template=template), tokenizer)


def test_T1_marker_of_another_id_or_tokenizer_is_refused(contract, tokenizer):
    with pytest.raises(InbriefError, match="must have id"):
        verify(changed(contract, marker_id=contract.marker_id + 1), tokenizer)
    with pytest.raises(InbriefError, match="tokenizer must be"):
        verify(changed(contract, tokenizer_sha="0" * 16), tokenizer)


def test_T12_a_marker_that_is_one_token_alone_but_not_in_context_is_refused(contract):
    merging = words_tokenizer(MARKER, "a", "b", f"({MARKER})")
    assert check_marker(merging, MARKER) == 2
    own = changed(contract, marker_id=2, left_id=3, right_id=4, av_template="a ({marker}) b")
    with pytest.raises(InbriefError, match="0 times"):
        av_prompt(own, merging)
    assert av_prompt(changed(own, av_template="a {marker} b"), merging) == ([3, 2, 4], 1)


@pytest.mark.parametrize("marker", ["two words", "㊗"])
def test_T12_a_marker_of_several_tokens_is_refused_with_a_way_out(tokenizer, marker):
    with pytest.raises(InbriefError, match=r"one token.*model\.marker"):
        check_marker(tokenizer, marker)


def test_T12_an_unknown_character_is_no_marker():
    with pytest.raises(InbriefError, match="one token"):
        check_marker(words_tokenizer("a"), MARKER)


@pytest.mark.parametrize("thinking", [None, True, False])
def test_T12_the_chat_template_gives_plain_ids_though_it_may_return_a_dict(tokenizer, thinking):
    ids = prompt_ids(tokenizer, "hello", thinking)
    assert type(ids) is list
    assert all(type(i) is int for i in ids)


def test_T12_the_thinking_switch_reaches_the_template(tokenizer):
    switched = deepcopy(tokenizer)
    switched.chat_template = (
        "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{{ messages[0].content }}"
    )
    texts = [tokenizer.decode(prompt_ids(switched, "x", t)) for t in (None, True, False)]
    assert texts == ["x", "Truex", "Falsex"]


@pytest.mark.parametrize("template", [None, "{{ bos_token }} {{ messages[0].content }}"])
def test_T13_the_av_prompt_has_exactly_one_bos(contract, template):
    tokenizer = words_tokenizer("a", MARKER, "b", bos=True)
    tokenizer.chat_template = template
    ids, column = av_prompt(
        changed(contract, marker_id=3, left_id=2, right_id=4, av_template="a {marker} b"), tokenizer
    )
    assert ids == [1, 2, 3, 4]
    assert column == 2


# The AR's prompt


@pytest.mark.parametrize(
    "text", ["a fox", "  a fox\n", "{}", "{explanation}", "{0} {marker} %s \\1", "</text> <summary>", "漢字 🦊", "a <"]
)
def test_T14_the_ar_prompt_is_the_template_around_the_stripped_text_byte_for_byte(contract, text):
    assert ar_prompt(contract, text) == f"Summary of the following text: <text>{text.strip()}</text> <summary>"


@given(st.text())
def test_T14_wrapping_and_extracting_never_changes_the_ar_prompt(text):
    before, after = AR_TEMPLATE.split("{explanation}")
    own = Contract.model_construct(ar_template=AR_TEMPLATE)
    assert ar_prompt(own, text) == before + text.strip() + after
    if text.strip() and OPEN not in text and CLOSE not in text:
        assert ar_prompt(own, extract(wrap(text)) or "") == ar_prompt(own, text)


@pytest.mark.parametrize("template", ["no place", "{explanation} and {explanation}"])
def test_T14_an_ar_template_without_one_place_is_refused(contract, tokenizer, template):
    with pytest.raises(InbriefError, match="exactly once"):
        verify(changed(contract, ar_template=template), tokenizer)


@pytest.mark.parametrize("where", [{"av_template": AV_TEMPLATE + " {budget}"}, {"budget_template": "no place"}])
def test_T14_a_budget_in_the_wrong_template_is_refused(contract, tokenizer, where):
    with pytest.raises(InbriefError, match="budget"):
        verify(changed(contract, **where), tokenizer)


@pytest.mark.parametrize("ending", ["<", ".", "\n", "🦊", "漢", "{}", "}", "</", "</text", " ", '"', "ÿ"])
def test_T15_no_ending_of_an_explanation_moves_the_suffix(contract, tokenizer, ending):
    suffix = tokenizer("</text> <summary>", add_special_tokens=False)["input_ids"]
    ids = tokenizer(ar_prompt(contract, f"A fox{ending}"))["input_ids"]
    assert ids[-len(suffix) :] == suffix
    assert tokenizer.decode(ids) == ar_prompt(contract, f"A fox{ending}")


# What an explanation is


@given(TAGLESS)
def test_what_is_wrapped_is_extracted(text):
    assert extract(wrap(text)) == text.strip()


@given(TAGLESS, st.text().filter(lambda t: OPEN not in t), st.text())
def test_T16_only_the_first_tag_pair_counts(text, before, after):
    assert extract(before + wrap(text) + after) == text.strip()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("<explanation>a</text> <summary> b</explanation>", "a</text> <summary> b"),
        ("<explanation>a <explanation>b</explanation>", "a <explanation>b"),
        ("<explanation>a</explanation><explanation>b</explanation>", "a"),
        ("</explanation><explanation>a</explanation>", "a"),
        ("<explanation>a</explanation></explanation>", "a"),
        ("<explanation>a", None),
        ("a</explanation>", None),
        ("a", None),
        ("", None),
    ],
)
def test_T16_odd_tags_are_parsed_as_decided(answer, found):
    assert extract(answer) == found


@pytest.mark.parametrize("body", ["", " ", "\n\n", "\t \n"])
def test_T19_an_empty_explanation_has_failed(body):
    assert extract(f"{OPEN}{body}{CLOSE}") is None


# Where an answer ends, and how long it is


@given(st.lists(st.integers(0, 6), max_size=20), st.sets(st.integers(0, 6), max_size=3))
def test_T23_trimming_stops_at_any_stop_id_and_counts_it_once(ids, stops):
    trimmed, finish = trim(ids, stops)
    assert trimmed == ids[: len(trimmed)]
    if finish == "stop":
        assert trimmed[-1] in stops
        assert not set(trimmed[:-1]) & stops
    else:
        assert trimmed == ids
        assert not set(ids) & stops


def test_T23_each_stop_id_ends_an_answer_and_no_other_does(contract, tokenizer):
    body = tokenizer(wrap("a fox"), add_special_tokens=False)["input_ids"]
    first, second = contract.stop_ids
    [a, b, c] = read_answers([[*body, first, first, second], [*body, second, 5, 6], body], tokenizer, contract.stop_ids)
    assert (a.ids, a.tokens, a.finish) == ([*body, first], len(body) + 1, "stop")
    assert (b.ids, b.tokens, b.finish) == ([*body, second], len(body) + 1, "stop")
    assert (c.tokens, c.finish) == (len(body), "length")
    assert a.text == b.text == c.text == wrap("a fox")


def test_T24_a_stop_token_in_the_very_last_place_is_no_truncation(contract, tokenizer):
    body = tokenizer(wrap("a fox"), add_special_tokens=False)["input_ids"]
    cap = len(body) + 1
    [answer] = read_answers([[*body, contract.stop_ids[0]][:cap]], tokenizer, contract.stop_ids)
    assert (answer.tokens, answer.finish, answer.explanation) == (cap, "stop", "a fox")


def test_T25_a_truncated_answer_has_failed_even_where_its_tag_closed(contract, tokenizer):
    body = tokenizer(wrap("a fox") + " and then", add_special_tokens=False)["input_ids"]
    [answer] = read_answers([body], tokenizer, contract.stop_ids)
    assert (answer.explanation, answer.finish, answer.tokens) == (None, "length", len(body))


def test_T23_content_tokens_leave_out_tags_opener_and_stop_token(contract, tokenizer):
    text = "Mara, a brave baker"
    answer = f"<think>\n\n</think>\n\n{wrap(text)}"
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], contract.stop_ids[0]]
    [found] = read_answers([ids], tokenizer, contract.stop_ids)
    assert found.tokens == len(ids)
    assert found.content_tokens == len(tokenizer(text)["input_ids"])


def test_T23_content_tokens_leave_out_the_opener_of_a_failed_answer_too(contract, tokenizer):
    ids = tokenizer("<think>\n\n</think>\n\n<explanation>\nMara", add_special_tokens=False)["input_ids"]
    [found] = read_answers([ids], tokenizer, contract.stop_ids)
    assert found.content_tokens == len(tokenizer("Mara")["input_ids"])


def test_T23_content_tokens_never_exceed_tokens(contract, tokenizer):
    stray = tokenizer.get_vocab()["ÿ"]
    opened, closed = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (OPEN, CLOSE))
    ids = [*opened, *[stray] * 20, *closed, contract.stop_ids[0]]
    [answer] = read_answers([ids], tokenizer, contract.stop_ids)
    assert answer.explanation is not None
    assert answer.content_tokens <= answer.tokens


def test_no_answers_are_no_error(contract, tokenizer):
    assert read_answers([], tokenizer, contract.stop_ids) == []
