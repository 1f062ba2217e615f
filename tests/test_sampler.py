"""Sampling: the same log-probs as a plain forward pass, pinned settings, stops and caps, whatever is packed or dropped."""

from __future__ import annotations

import pytest
import torch
from conftest import copy_av, logits_by_hand, logprobs_by_hand
from torch import Tensor

from inbrief.contract.contract import Contract
from inbrief.io.errors import InbriefError
from inbrief.models import injection
from inbrief.models.sampler import Samples, sample
from inbrief.models.verbalizer import Verbalizer

BOTH = pytest.mark.parametrize(
    ("family", "method"),
    [("qwen3", "embed_overwrite"), ("qwen3", "residual_add"), ("llama", "embed_overwrite"), ("llama", "residual_add")],
)


def tiny_vectors(n: int) -> Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(9)) * 10


def stopping_often(av: Verbalizer) -> Verbalizer:
    """A twentieth of the vocabulary stops this AV, so that rows end at many different lengths."""
    contract = av.contract.model_copy(update={"stop_ids": list(range(0, len(av.tokenizer), 20))})
    return Verbalizer(av.model, av.tokenizer, contract)


def ids(drawn: Samples) -> list[list[int]]:
    return [a.ids for a in drawn.answers]


def gap_to_a_plain_forward(av: Verbalizer, vectors: Tensor, drawn: Samples) -> float:
    total = count = 0.0
    with torch.no_grad():
        for answer, owner, logprobs in zip(drawn.answers, drawn.owners, drawn.logprobs, strict=True):
            by_hand = logprobs_by_hand(av, vectors[owner], answer.ids)
            total += float((logprobs[: len(answer.ids)] - by_hand).abs().sum())
            count += len(answer.ids)
    return total / count


@BOTH
def test_T9_T31_sampled_logprobs_equal_a_plain_forward_pass_on_unprocessed_logits(tiny_av, family, method):
    av, vectors = stopping_often(tiny_av(family, method)), tiny_vectors(5)
    drawn = sample(av, vectors, 4, seed=1, cap=30)
    assert len({a.tokens for a in drawn.answers}) > 5
    assert gap_to_a_plain_forward(av, vectors, drawn) < 1e-5


def test_T9_on_the_shipped_target(warm_av, vectors):
    av = warm_av()
    drawn = sample(av, vectors[:4], 3, seed=2)
    assert gap_to_a_plain_forward(av, vectors, drawn) < 1e-5


def test_T9_another_vector_in_the_trainer_would_show(tiny_av):
    av, vectors = stopping_often(tiny_av()), tiny_vectors(4)
    assert gap_to_a_plain_forward(av, vectors.roll(1, 0), sample(av, vectors, 4, seed=1, cap=30)) > 1e-2


@BOTH
def test_T10_two_vectors_under_one_prompt_give_different_first_tokens(tiny_av, family, method):
    av, vectors = tiny_av(family, method), tiny_vectors(2)
    drawn = sample(av, vectors, 400, seed=0, cap=1)
    with torch.no_grad():
        by_hand = [logits_by_hand(av, v, [])[0].softmax(-1) for v in vectors]
    assert float((by_hand[0] - by_hand[1]).abs().sum()) > 0.02
    for v in range(2):
        rows = [i for i, owner in enumerate(drawn.owners) if owner == v]
        first = torch.tensor([drawn.answers[i].ids[0] for i in rows])
        found = drawn.logprobs[rows, 0]
        assert torch.allclose(found, by_hand[v].log()[first], atol=1e-4)
        assert float((found - by_hand[1 - v].log()[first]).abs().mean()) > 0.01
        seen = torch.bincount(first, minlength=len(by_hand[v])) / 400
        top = by_hand[v].topk(8).indices
        noise = (by_hand[v][top] * (1 - by_hand[v][top]) / 400).sqrt()
        assert bool(((seen - by_hand[v]).abs()[top] < 5 * noise).all())


def test_T30_a_generation_config_never_reaches_the_sampler(tiny_av):
    av, vectors = tiny_av(), tiny_vectors(3)
    before = sample(av, vectors, 4, seed=5, cap=12)
    settings = {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 9.0}
    for name, value in settings.items():
        setattr(av.model.generation_config, name, value)
    after = sample(av, vectors, 4, seed=5, cap=12)
    assert ids(after) == ids(before)
    assert torch.equal(after.logprobs, before.logprobs)


def test_T30_sampling_covers_the_full_vocabulary_at_temperature_one(tiny_av):
    av, vectors = tiny_av(), tiny_vectors(1)
    drawn = sample(av, vectors, 2000, seed=3, cap=1, max_rows=2000)
    with torch.no_grad():
        logp = logits_by_hand(av, vectors[0], [])[0].log_softmax(-1)
    entropy = float(-(logp.exp() * logp).sum())
    sd = float((logp.exp() * (logp + entropy).square()).sum().sqrt())
    assert float(-drawn.logprobs.mean()) == pytest.approx(entropy, abs=5 * sd / 2000**0.5)


def test_T5_the_vector_enters_once_in_the_prefill_and_never_in_a_cached_step(tiny_av, monkeypatch):
    av, calls = tiny_av(), []
    real = injection.overwrite

    def counting(embeds: Tensor, vectors: Tensor, column: int, scale: float) -> Tensor:
        calls.append(tuple(embeds.shape[:2]))
        return real(embeds, vectors, column, scale)

    monkeypatch.setattr(injection, "overwrite", counting)
    drawn = sample(av, tiny_vectors(3), 4, seed=0, cap=10)
    assert max(a.tokens for a in drawn.answers) > 1
    assert calls == [(3, len(av.suffix))]


def test_T6_groups_stand_together_under_their_owner(tiny_av):
    av, vectors = stopping_often(tiny_av()), tiny_vectors(7)
    drawn = sample(av, vectors, 3, seed=0, cap=20, max_rows=6)
    assert drawn.owners == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert gap_to_a_plain_forward(av, vectors, drawn) < 1e-5


def test_T11_zero_and_nan_vectors_are_refused(tiny_av):
    for bad in (0.0, float("nan")):
        vectors = tiny_vectors(3)
        vectors[1] = bad
        with pytest.raises(InbriefError):
            sample(tiny_av(), vectors, 2, seed=0, cap=4)


def test_T23_every_stop_id_ends_a_row_and_is_counted_once(tiny_av):
    av = stopping_often(tiny_av())
    drawn = sample(av, tiny_vectors(6), 6, seed=4, cap=60)
    stops = set(av.contract.stop_ids)
    ended = [a for a in drawn.answers if a.finish == "stop"]
    assert len({a.ids[-1] for a in ended}) > 3
    assert all(a.ids[-1] in stops for a in ended)
    assert all(not set(a.ids[:-1]) & stops for a in drawn.answers)
    assert all(a.tokens == len(a.ids) for a in drawn.answers)


def test_T24_T25_at_the_cap_a_stop_token_makes_the_difference(tiny_av):
    av, cap = stopping_often(tiny_av()), 12
    drawn = sample(av, tiny_vectors(8), 16, seed=0, cap=cap)
    at_cap = [a for a in drawn.answers if a.tokens == cap]
    assert {a.finish for a in at_cap} == {"stop", "length"}
    for a in at_cap:
        assert (a.finish == "stop") == (a.ids[-1] in av.contract.stop_ids)
    assert all(a.finish == "stop" for a in drawn.answers if a.tokens < cap)


def test_the_contract_gives_the_cap_where_none_is_named(tiny_av):
    av = tiny_av()
    own = Verbalizer(av.model, av.tokenizer, av.contract.model_copy(update={"cap": 3}))
    assert max(a.tokens for a in sample(own, tiny_vectors(4), 4, seed=0).answers) == 3


def test_logprobs_are_zero_beyond_each_answer(tiny_av):
    drawn = sample(stopping_often(tiny_av()), tiny_vectors(4), 4, seed=0, cap=30)
    lengths = torch.tensor([a.tokens for a in drawn.answers])
    assert drawn.logprobs.shape == (16, int(lengths.max()))
    beyond = torch.arange(drawn.logprobs.shape[1])[None] >= lengths[:, None]
    assert bool((drawn.logprobs[beyond] == 0).all())
    assert bool((drawn.logprobs[~beyond] < 0).all())


def test_the_seed_decides_the_text_and_nothing_else_does(tiny_av):
    av, vectors = tiny_av(), tiny_vectors(4)
    torch.manual_seed(1)
    first = ids(sample(av, vectors, 3, seed=8, cap=10))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert ids(sample(av, vectors, 3, seed=8, cap=10)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert ids(sample(av, vectors, 3, seed=9, cap=10)) != first


def test_members_of_a_group_and_chunks_draw_independently(tiny_av):
    same = tiny_vectors(1).expand(4, -1)
    rows = ids(sample(tiny_av(), same, 4, seed=0, cap=10, max_rows=4))
    assert len({tuple(r) for r in rows}) == 16


@pytest.mark.parametrize("training", [True, False])
def test_T38_sampling_leaves_mode_and_gradients_as_they_were(tiny_av, training):
    av = copy_av(tiny_av()).train(training)
    sample(av, tiny_vectors(2), 2, seed=0, cap=4)
    assert av.training is training
    assert all(p.requires_grad and p.grad is None for p in av.parameters())
    av.logprobs(tiny_vectors(1), [[5, 6]]).sum().backward()
    assert any(p.grad is not None for p in av.parameters())


def test_a_stop_id_twice_in_the_contract_changes_nothing(tiny_av):
    av = stopping_often(tiny_av())
    doubled: Contract = av.contract.model_copy(update={"stop_ids": [*av.contract.stop_ids, *av.contract.stop_ids]})
    twice = Verbalizer(av.model, av.tokenizer, doubled)
    assert ids(sample(twice, tiny_vectors(3), 3, seed=0, cap=20)) == ids(sample(av, tiny_vectors(3), 3, seed=0, cap=20))
