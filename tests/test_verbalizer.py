"""The verbalizer's training pass: a shared prefix that changes neither log-probs nor gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import copy_av, logits_by_hand, logprobs_by_hand
from torch import Tensor

from inbrief.contract.explanation import read_answers
from inbrief.io.errors import InbriefError
from inbrief.models.verbalizer import Verbalizer

ANSWERS = [[5, 9, 300], [44], [7, 7, 7, 7, 7, 8, 200], [12, 13], [3, 2, 1, 0, 4]]
BOTH = pytest.mark.parametrize(
    ("family", "method"),
    [("qwen3", "embed_overwrite"), ("qwen3", "residual_add"), ("llama", "embed_overwrite"), ("llama", "residual_add")],
)


def some_vectors(n: int = len(ANSWERS)) -> Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(2)) * 10


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@BOTH
def test_T9_T31_logprobs_equal_a_plain_forward_pass(tiny_av, family, method):
    av = tiny_av(family, method)
    with torch.no_grad():
        by_hand = [logprobs_by_hand(av, v, a) for v, a in zip(some_vectors(), ANSWERS, strict=True)]
        found = av.logprobs(some_vectors(), ANSWERS)
    assert found.shape == (5, 7)
    assert torch.allclose(found, padded(by_hand), atol=1e-5)


@BOTH
def test_T4_the_shared_prefix_has_the_gradients_of_a_plain_forward_pass(tiny_av, family, method):
    av = tiny_av(family, method)
    other = copy_av(av)
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5])
    (av.logprobs(some_vectors(), ANSWERS).sum(1) * scale).sum().backward()
    rows = zip(some_vectors(), ANSWERS, scale, strict=True)
    torch.stack([logprobs_by_hand(other, v, a).sum() * s for v, a, s in rows]).sum().backward()
    for (name, p), q in zip(av.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        assert float((p.grad - q.grad).norm()) <= 1e-4 * float(q.grad.norm()), name


def test_T6_row_i_keeps_vector_i_in_any_order(tiny_av):
    av, order = tiny_av(), [3, 0, 4, 2, 1]
    with torch.no_grad():
        straight = av.logprobs(some_vectors(), ANSWERS)
        shuffled = av.logprobs(some_vectors()[order], [ANSWERS[i] for i in order])
        crossed = av.logprobs(some_vectors()[order], ANSWERS)
    assert torch.allclose(shuffled, straight[order], atol=1e-6)
    assert (crossed - straight).abs().max() > 1e-2


def test_T32_padding_never_reaches_an_answer_or_its_gradient(tiny_av):
    av = tiny_av()
    vectors = some_vectors(2)
    short, long = [5, 9, 300], list(range(40, 80))

    def gradient(answers: list[list[int]]) -> Tensor:
        av.zero_grad()
        logp = av.logprobs(vectors[: len(answers)], answers)
        assert bool((logp[0, 3:] == 0).all())
        logp[0].sum().backward()
        grad = av.model.get_input_embeddings().weight.grad
        assert grad is not None
        return grad.clone()

    alone, padded_out = gradient([short]), gradient([short, long])
    assert float((alone - padded_out).norm()) < 1e-5 * float(alone.norm())


def test_T10_two_vectors_under_one_prompt_are_read_apart(tiny_av):
    av = tiny_av()
    with torch.no_grad():
        a, b = av.logprobs(some_vectors(2), [[5], [5]])
        own = [logits_by_hand(av, v, [])[0].log_softmax(-1)[5] for v in some_vectors(2)]
    assert torch.allclose(torch.stack([a[0], b[0]]), torch.stack(own), atol=1e-5)
    assert abs(float(a[0] - b[0])) > 1e-3


def test_only_the_direction_of_a_vector_matters(tiny_av):
    for method in ("embed_overwrite", "residual_add"):
        av = tiny_av(method=method)
        with torch.no_grad():
            assert torch.allclose(
                av.logprobs(some_vectors() * 1400, ANSWERS), av.logprobs(some_vectors(), ANSWERS), atol=1e-4
            )


def test_T8_the_injected_row_has_the_norm_of_the_contract(tiny_av):
    av, seen = tiny_av(scale=7.5), []
    av.model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        av.logprobs(some_vectors(), ANSWERS)
    assert seen[-1][:, 0].norm(dim=-1) == pytest.approx(torch.full((5,), 7.5), rel=1e-5)


def test_T1_a_contract_that_does_not_fit_the_tokenizer_is_refused_at_once(tiny_av):
    av = tiny_av()
    for change in ({"av_template": "Explain."}, {"left_id": 3}, {"marker_id": 5}):
        with pytest.raises(InbriefError, match="marker"):
            Verbalizer(av.model, av.tokenizer, av.contract.model_copy(update=change))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_T11_vectors_without_direction_never_reach_the_model(tiny_av, bad):
    vectors = some_vectors()
    vectors[4] = bad
    with pytest.raises(InbriefError):
        tiny_av().logprobs(vectors, ANSWERS)


def test_T14_T23_what_warm_start_trains_on_is_read_back_with_the_same_count(tiny_av, explanations):
    av = tiny_av()
    rows = [av.answer_ids(e) for e in explanations]
    for row, text, answer in zip(
        rows, explanations, read_answers(rows, av.tokenizer, av.contract.stop_ids), strict=True
    ):
        assert answer.explanation == text.strip()
        assert (answer.ids, answer.tokens, answer.finish) == (row, len(row), "stop")
        assert row[-1] == av.tokenizer.eos_token_id
