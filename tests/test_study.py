"""Evaluation, controls, frontier."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from inbrief.metrics import DocumentBootstrap, baseline, direction
from inbrief.report.page import headline
from inbrief.study import frontier
from inbrief.study.acceptance import claimed, falsify
from inbrief.study.controls import mean_vector_errors, passed_on, ridge
from inbrief.study.evaluate import Heldout, paired_delta, result_row


def held(n: int = 40, d: int = 16) -> Heldout:
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 0.5
    names = [f"doc{i // 4}" for i in range(n)]
    return Heldout(
        np.arange(n),
        vectors,
        baseline(vectors),
        [f"{i:016x}" for i in range(n)],
        names,
        [0] * n,
        [[0] * 8] * n,
        [""] * n,
    )


def rows(mse, tokens, extracted=None, scorer="own"):
    extracted = [True] * len(mse) if extracted is None else extracted
    return [
        {"mse": m, "tokens": t, "content_tokens": t - 3, "extracted": e, "scorer": scorer}
        for m, t, e in zip(mse, tokens, extracted, strict=True)
    ]


def test_T47_the_mean_vector_scores_zero_and_failures_count_two():
    h = held()
    assert mean_vector_errors(h.vectors, h.base).mean() == pytest.approx(h.base.value, abs=1e-6)
    boot = DocumentBootstrap(h.documents, 200)
    half = [0.0, 2.0] * 20
    row = result_row(rows(half, [10] * 40, [True, False] * 20), "own", h, boot, 1)
    assert row["fve"]["mean"] == pytest.approx(1 - 1.0 / h.base.value)
    assert row["fve_extracted"]["mean"] == pytest.approx(1.0)
    assert row["extraction_rate"] == 0.5
    assert row["n"] == 40


def test_T47_no_scorable_sample_is_null_and_never_a_perfect_score():
    h = held()
    row = result_row(rows([2.0] * 40, [104] * 40, [False] * 40), "own", h, DocumentBootstrap(h.documents, 200), 1)
    assert row["fve_extracted"] is None
    assert row["fve"]["mean"] < 0


def test_several_samples_of_one_activation_are_averaged_before_the_bootstrap():
    h = held()
    mse = np.tile([0.2, 0.4], 40)
    row = result_row(rows(mse.tolist(), [10, 20] * 40), "own", h, DocumentBootstrap(h.documents, 200), 2)
    assert row["fve"]["mean"] == pytest.approx(1 - 0.3 / h.base.value)
    assert row["fve"]["high"] - row["fve"]["low"] < 1e-9
    assert row["tokens"]["mean"] == 15


def test_a_paired_difference_is_tighter_than_the_scores_it_compares():
    h = held()
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0, 1, 40)
    a, b = rows((difficulty + 0.05).tolist(), [10] * 40), rows(difficulty.tolist(), [10] * 40)
    boot = DocumentBootstrap(h.documents, 500)
    delta = paired_delta(a, b, "own", h.base.value, boot, 1)
    assert delta is not None
    assert delta["mean"] == pytest.approx(-0.05 / h.base.value)
    assert delta["high"] - delta["low"] < 1e-9


def test_intervals_resample_documents_not_rows():
    names = [f"d{i // 25}" for i in range(100)]
    values = np.repeat([0.0, 0.0, 1.0, 1.0], 25)
    by_document = DocumentBootstrap(names, 2000).interval(values)
    by_row = DocumentBootstrap([str(i) for i in range(100)], 2000).interval(values)
    assert by_document and by_row
    assert by_document["high"] - by_document["low"] > 2 * (by_row["high"] - by_row["low"])


def test_T48_everyone_gets_somebody_elses_text_from_another_document():
    documents = [f"doc{i // 5}" for i in range(40)]
    given = passed_on([list(range(40))], documents, 1)
    assert sorted(given) == list(range(40))
    assert all(documents[i] != documents[j] for i, j in enumerate(given))
    assert list(given) != list(passed_on([list(range(40))], documents, 2))


def test_T48_within_a_group_and_never_from_the_only_document_of_it():
    documents = ["a", "b", "c", "d", "d", "e"]
    groups = [[0, 1, 2], [3, 4], [5]]
    given = passed_on(groups, documents, 0)
    assert sorted(given[:3]) == [0, 1, 2] and all(given[i] != i for i in range(3))
    assert list(given[3:]) == [-1, -1, -1]


def test_the_ridge_finds_what_the_last_token_decides_and_nothing_else():
    rng = np.random.default_rng(0)
    table = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    ids = rng.integers(0, 5, (600, 8)).tolist()
    vectors = table[[r[-1] for r in ids]]
    assert ridge(ids[:500], vectors[:500], ids[500:], vectors[500:], 1).mean() < 0.01
    noise = torch.randn(600, 16, generator=torch.Generator().manual_seed(2))
    lost = ridge(ids[:500], noise[:500], ids[500:], noise[500:], 4).mean()
    assert lost == pytest.approx(
        ((direction(noise[500:]) - direction(noise[:500]).mean(0)) ** 2).mean().item(), rel=0.1
    )


def test_seeds_widen_the_interval_of_a_pooled_point():
    names = [f"d{i}" for i in range(200)]
    boot = DocumentBootstrap(names, 1000)
    rng = np.random.default_rng(0)
    low, high = rng.normal(0.4, 0.1, 200), rng.normal(0.6, 0.1, 200)
    one = frontier.pooled([boot.replicates(low)], [float(low.mean())])
    two = frontier.pooled([boot.replicates(low), boot.replicates(high)], [float(low.mean()), float(high.mean())])
    assert two["mean"] == pytest.approx((low.mean() + high.mean()) / 2)
    assert two["high"] - two["low"] > 3 * (one["high"] - one["low"])


def test_no_loss_is_said_only_when_the_lower_bound_allows_it():
    h = held()
    boot = DocumentBootstrap(h.documents, 300)
    control = rows([0.3] * 40, [60] * 40)
    runs = {(0.0, 0): control, (0.01, 0): rows([0.31] * 40, [40] * 40), (0.04, 0): rows([0.5] * 40, [10] * 40)}
    zero, mild, hard = frontier.points(runs, control, "own", h.base.value, boot, 1)
    assert zero["delta_fve"] is None and zero["no_loss"] is None
    assert mild["no_loss"] is True and mild["tokens_saved"]["mean"] == pytest.approx(1 / 3)
    assert hard["no_loss"] is False


def test_the_pooled_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    boot = DocumentBootstrap([f"d{i}" for i in range(100)], 300)
    hits = 0
    for _ in range(200):
        runs = [0.5 + rng.normal(0, 0.05) + rng.normal(0, 0.1, 100) for _ in range(3)]
        ci = frontier.pooled([boot.replicates(r) for r in runs], [float(r.mean()) for r in runs])
        hits += ci["low"] <= 0.5 <= ci["high"]
    assert hits / 200 >= 0.91


@pytest.mark.parametrize(
    ("delta", "saved", "words"),
    [
        ((0.001, -0.010, 0.012), (0.35, 0.3, 0.4), "35% shorter than at λ = 0 with no loss"),
        ((0.001, -0.030, 0.032), (0.35, 0.3, 0.4), "can a loss be ruled out"),
        ((0.001, -0.010, 0.012), (-0.04, -0.1, 0.02), "For no λ > 0 that saves tokens"),
    ],
)
def test_the_headline_says_no_more_than_the_intervals_allow(delta, saved, words):
    def ci(x):
        return dict(zip(("mean", "low", "high"), x, strict=True))

    point = {
        "lambda": 0.01, "scorer": "own", "seeds": [0], "delta_fve": ci(delta), "tokens_saved": ci(saved),
        "no_loss": delta[1] >= frontier.NO_LOSS, "tokens": ci((40, 39, 41)), "delta_fve_warm": ci((0.1, 0.05, 0.15)),
    }  # fmt: skip
    assert words in headline({"frontier": [point]})


def test_a_false_claim_leaves_the_quoted_words_alone():
    text = 'It is set at the harbour. It ends with "... at the harbour."'
    false = falsify(text, "place", random.Random(0))
    assert false.endswith('"... at the harbour."') and not false.startswith("It is set at the harbour")
    assert claimed(text) == {"place": "harbour"} and claimed('"... the harbour"') == {}
