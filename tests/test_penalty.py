"""What a token costs and what an answer earns: failing never pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inbrief.config import Penalty
from inbrief.training.penalty import linear, rewards

CAP = 100
ROW = st.tuples(st.floats(0, 4), st.booleans(), st.integers(1, CAP))
VALUE = st.sampled_from([0.0, 0.001, 0.01, 0.04, 0.15, 1.0])


def columns(rows: list[tuple[float, bool, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mse, failed, tokens = zip(*rows, strict=True)
    return torch.tensor(mse, dtype=torch.float64), torch.tensor(failed), torch.tensor(tokens, dtype=torch.float64)


@given(st.lists(ROW, min_size=1, max_size=10), VALUE)
def test_T25_rewards_are_what_the_rule_says_row_by_row(rows, value):
    for rule in ("never-pays", "seed"):
        found, raw = rewards(*columns(rows), CAP, value, rule)
        for i, (mse, failed, tokens) in enumerate(rows):
            if rule == "never-pays":
                error, charged = (2.0, CAP) if failed else (min(mse, 2.0), tokens)
            else:
                error, charged = (2.0 if failed else mse), tokens
            assert float(raw[i]) == pytest.approx(-error)
            assert float(found[i]) == pytest.approx(-error - value * charged)


@given(ROW, ROW, VALUE)
def test_T25_no_answer_earns_more_by_failing(one, other, value):
    failing, scored = (one[0], True, one[2]), (other[0], False, other[2])
    found, raw = rewards(*columns([failing, scored]), CAP, value, "never-pays")
    assert float(found[0]) <= float(found[1]) + 1e-12
    assert float(raw[0]) <= float(raw[1])


@given(st.floats(0, 4), st.integers(1, CAP - 1), VALUE)
def test_T22_of_two_answers_that_explain_alike_the_shorter_earns_more(mse, tokens, value):
    found, raw = rewards(*columns([(mse, False, tokens), (mse, False, tokens + 1)]), CAP, value, "never-pays")
    assert float(found[0] - found[1]) == pytest.approx(value)
    assert float(raw[0]) == float(raw[1])


def test_T25_under_the_seeds_rule_a_short_failure_is_cheaper_than_a_long_one():
    found, _ = rewards(*columns([(0.0, True, 2), (0.0, True, 80)]), CAP, 0.15, "seed")
    assert found.tolist() == pytest.approx([-2.3, -14.0])


@given(st.lists(st.integers(0, 500), min_size=1, max_size=9), VALUE)
def test_the_linear_penalty_is_lambda_times_tokens(tokens, value):
    assert linear(torch.tensor(tokens, dtype=torch.float64), value).tolist() == pytest.approx(
        [value * t for t in tokens]
    )


def test_T22_lambda_zero_is_the_unpenalised_reward():
    mse = torch.tensor([0.1, 0.5, 2.0])
    found, raw = rewards(
        mse, torch.tensor([False, False, True]), torch.tensor([3.0, 90.0, 9.0]), CAP, 0.0, "never-pays"
    )
    assert torch.equal(found, raw)


def test_T25_failing_never_pays_even_where_the_count_exceeds_the_cap():
    found, _ = rewards(*columns([(1.9, False, 2 * CAP), (0.0, True, 5)]), CAP, 0.04, "never-pays")
    assert float(found[0]) >= float(found[1])


def test_inputs_stay_as_they_were():
    mse, failed, tokens = columns([(3.0, False, 5), (1.0, True, 7)])
    rewards(mse, failed, tokens, CAP, 0.1, "never-pays")
    assert mse.tolist() == [3.0, 1.0]
    assert tokens.tolist() == [5.0, 7.0]


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [-0.01]])
def test_lambdas_are_distinct_and_never_negative(values):
    with pytest.raises(ValueError, match=r"penalty\.values"):
        Penalty(values=values)
