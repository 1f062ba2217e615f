"""Documents, harvest, store, teachers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inbrief.config import Config, Data, Split
from inbrief.data import store as stores
from inbrief.data.corpora import documents
from inbrief.data.harvest import (
    Harvester,
    activation_id,
    activations,
    check_disjoint,
    choose_positions,
    split_of,
)
from inbrief.data.teachers import rules, teach
from inbrief.io.errors import InbriefError
from inbrief.models import checkpoints
from inbrief.models.batching import length_batches, pad_right
from inbrief.storyworld import world


@pytest.fixture(scope="module")
def target():
    return checkpoints.load_target("storyworld")


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoints.load_tokenizer("storyworld")


def harvested(folder, target, tokenizer, **data):
    config = Config(data=Data(documents=40, **data))
    Harvester(config, target, tokenizer, "rev").run(folder)
    return stores.Store(folder)


def test_T45_harvest_equals_hidden_states_after_block_K_whatever_the_batch(target, tokenizer):
    ids = [tokenizer(world.story(0, i))["input_ids"][: 20 + 9 * i] for i in range(5)]
    found = dict(activations(target, ids, 2))
    for i, row in enumerate(ids):
        with torch.no_grad():
            alone = target(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[3][0]
        assert found[i].shape == (len(row), 128)
        assert torch.allclose(found[i], alone, atol=2e-4, rtol=1e-4)


def test_T45_the_forward_pass_stops_after_block_K_and_leaves_no_hook(target, tokenizer):
    seen, before = [], dict(target.model.layers[2]._forward_hooks)
    handle = target.model.layers[3].register_forward_hook(lambda *_: seen.append(3))
    list(activations(target, [tokenizer("Once there lived")["input_ids"]], 2))
    handle.remove()
    assert seen == []
    assert target.model.layers[2]._forward_hooks == before


def test_harvest_reads_another_architecture_through_the_same_code():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM(config).eval()
    [(_, found)] = activations(model, [[1, 2, 3]], 1)
    with torch.no_grad():
        wanted = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states[2][0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("layer", [-1, 3, 4])
def test_the_last_block_is_refused(target, layer):
    with pytest.raises(InbriefError, match="last block"):
        list(activations(target, [[1, 2]], layer))


def test_T43_positions_and_splits_are_functions_of_the_document_alone(tmp_path, target, tokenizer):
    few = harvested(tmp_path / "few", target, tokenizer)
    config = Config(data=Data(documents=60))
    Harvester(config, target, tokenizer, "rev").run(tmp_path / "more")
    more = stores.Store(tmp_path / "more")
    columns = ("activation_id", "doc_id", "position", "split")
    rows = [list(zip(*(s.column(c) for c in columns), strict=True)) for s in (few, more)]
    assert rows[1][: len(rows[0])] == rows[0]
    assert torch.allclose(few.vectors([0, 1, 2]), more.vectors([0, 1, 2]), atol=1e-4)


def test_T43_splits_follow_their_shares_and_share_no_document():
    split = Split(av=0.4, ar=0.4, rl=0.1, heldout=0.1)
    names = [split_of(0, f"doc{i}", split) for i in range(4000)]
    assert abs(names.count("av") / 4000 - 0.4) < 0.03
    assert abs(names.count("heldout") / 4000 - 0.1) < 0.02
    assert names != [split_of(1, f"doc{i}", split) for i in range(4000)]


def test_T43_a_document_in_two_splits_is_refused(tmp_path, target, tokenizer):
    store = harvested(tmp_path, target, tokenizer)
    row = dict(zip(store.index.column_names, [c[0].as_py() for c in store.index.columns], strict=True))
    row["split"] = "rl" if row["split"] != "rl" else "av"
    stores.write_part(tmp_path, 1, [row], store.vectors([0]))
    with pytest.raises(InbriefError, match="two splits"):
        check_disjoint(stores.Store(tmp_path))


def test_positions_are_distinct_sorted_and_never_before_the_first_allowed(tmp_path, target, tokenizer):
    store = harvested(tmp_path, target, tokenizer, min_position=15)
    assert min(store.column("position")) >= 15
    assert choose_positions(0, "d", list(range(3)), 5) == [0, 1, 2]
    drawn = choose_positions(0, "d", list(range(100)), 5)
    assert drawn == sorted(set(drawn)) and len(drawn) == 5
    assert drawn != choose_positions(0, "e", list(range(100)), 5)


def test_the_index_says_what_was_read(tmp_path, target, tokenizer):
    store = harvested(tmp_path, target, tokenizer)
    texts = {d.id: d.text for d in documents(Data(documents=40))}
    for i in range(0, len(store), 17):
        row = {n: store.column(n)[i] for n in store.index.column_names}
        assert row["text"] + row["rest"] == texts[row["doc_id"]]
        assert row["last_ids"][-1] == row["token_id"]
        assert row["text"].endswith(tokenizer.decode([row["token_id"]]))
        assert row["activation_id"] == activation_id("rev", 2, row["doc_id"], row["position"])
        assert len(row["activation_id"]) == 16


def test_stored_vectors_are_raw_and_come_back_in_the_order_asked(tmp_path, target, tokenizer):
    store = harvested(tmp_path, target, tokenizer)
    order = [7, 0, 7, len(store) - 1]
    every = store.vectors(range(len(store)))
    assert torch.equal(store.vectors(order), every[order])
    assert every.norm(dim=1).std() > 1e-3
    i = 5
    ids = tokenizer(store.column("text")[i])["input_ids"]
    [(_, hidden)] = activations(target, [ids], 2)
    assert torch.allclose(hidden[store.column("position")[i]], every[i], atol=1e-3)


def test_a_killed_harvest_goes_on_where_it_stopped(tmp_path, target, tokenizer, monkeypatch):
    monkeypatch.setattr("inbrief.data.harvest.PART_DOCUMENTS", 16)
    whole = harvested(tmp_path / "whole", target, tokenizer)
    cut = tmp_path / "cut"
    harvested(cut, target, tokenizer)
    (cut / "part-00001.parquet").unlink()
    first = (cut / "part-00000.safetensors").stat().st_mtime_ns
    again = harvested(cut, target, tokenizer)
    assert (cut / "part-00000.safetensors").stat().st_mtime_ns == first
    assert again.index.equals(whole.index)
    assert torch.equal(again.vectors(range(len(again))), whole.vectors(range(len(whole))))


def test_a_truncated_safetensors_file_is_one_clear_line(tmp_path, target, tokenizer):
    store = harvested(tmp_path, target, tokenizer)
    path = tmp_path / "part-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InbriefError, match="whole safetensors file"):
        stores.Store(store.folder).vectors([0])


def test_an_empty_corpus_and_an_unknown_one_are_refused(tmp_path, target, tokenizer, monkeypatch):
    monkeypatch.setitem(
        __import__("inbrief.data.corpora", fromlist=["CORPORA"]).CORPORA, "none", lambda _data: iter(())
    )
    with pytest.raises(InbriefError, match="at least one document"):
        harvested(tmp_path, target, tokenizer, corpus="none")
    with pytest.raises(InbriefError, match="must be one of"):
        documents(Data(corpus="nowhere"))


def test_documents_too_short_are_refused_with_the_way_out(tmp_path, target, tokenizer):
    with pytest.raises(InbriefError, match="min_position"):
        harvested(tmp_path, target, tokenizer, min_position=250)


def test_length_batches_hold_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    batches = length_batches(lengths, 256)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(b) * max(lengths[i] for i in b) <= 256 for b in batches)
    assert pad_right([[1, 2], [3]], pad=9).tolist() == [[1, 2], [3, 9]]


def test_the_worlds_teacher_is_a_function_of_seed_and_activation_and_varies():
    text = world.story(0, 1)
    assert teach("storyworld", 0, "a", text) == teach("storyworld", 0, "a", text)
    said = {teach("storyworld", 0, str(i), text) for i in range(50)}
    assert len(said) > 40
    lengths = [len(s.split()) for s in said]
    assert np.std(lengths) > 5


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x + 1", "One word", "What? Why? The Great Wall is old.", "漢字 and é"]
)
def test_the_rule_based_teacher_explains_any_text_and_quotes_its_end(text):
    full = max((rules(text, random.Random(i)) for i in range(20)), key=len)
    assert text.split()[-1] in full
    assert all(rules(text, random.Random(i)).strip() for i in range(50))
