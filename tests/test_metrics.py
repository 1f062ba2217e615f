"""Directions, the two baselines, the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from inbrief.metrics import FAILED_MSE, DocumentBootstrap, baseline, direction, direction_mse, fve

VECTOR = hnp.arrays(np.float64, 6, elements=st.floats(-100, 100)).filter(lambda v: np.linalg.norm(v) > 1e-2)


@given(VECTOR)
def test_a_direction_has_norm_root_d_and_the_same_angle(v):
    unit = direction(torch.from_numpy(v)).numpy()
    assert np.linalg.norm(unit) == pytest.approx(math.sqrt(6))
    assert unit @ v == pytest.approx(np.linalg.norm(unit) * np.linalg.norm(v))


@given(VECTOR, VECTOR)
def test_direction_mse_is_the_mean_over_coordinates_and_two_minus_two_cosines(p, v):
    naive = np.mean((math.sqrt(6) * p / np.linalg.norm(p) - math.sqrt(6) * v / np.linalg.norm(v)) ** 2)
    cosine = p @ v / (np.linalg.norm(p) * np.linalg.norm(v))
    found = direction_mse(torch.from_numpy(p), torch.from_numpy(v)).item()
    assert found == pytest.approx(naive, abs=1e-5)
    assert found == pytest.approx(2 * (1 - cosine), abs=1e-5)


def test_T8_scale_of_prediction_and_target_never_matters():
    p, v = torch.randn(4, 32), torch.randn(4, 32)
    assert torch.allclose(direction_mse(p * 1e3, v * 14_000), direction_mse(p, v), atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_T11_a_vector_without_direction_is_refused(bad):
    v = torch.randn(3, 8)
    v[1] = bad
    with pytest.raises(ValueError, match="finite and not zero"):
        direction(v)
    with pytest.raises(ValueError, match="finite and not zero"):
        baseline(v)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-8, 1e-4])
def test_gradient_stays_bounded_where_the_prediction_vanishes(size):
    torch.manual_seed(0)
    p = (size * direction(torch.randn(1, 64))).requires_grad_()
    direction_mse(p, torch.randn(1, 64)).sum().backward()
    assert p.grad is not None
    assert float(p.grad.norm()) < 1e5


def test_T47_baselines_match_closed_form():
    # Two directions at angle θ, equally often: ‖mean of unit vectors‖ = cos(θ/2).
    angle = 1.1
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle), 0.0])
    found = baseline(torch.stack([a * 5, b * 0.3, a, b * 70]))
    r = math.cos(angle / 2)
    assert found.value == pytest.approx(1 - r**2, abs=1e-6)
    assert found.normalised_mean == pytest.approx(2 - 2 * r, abs=1e-6)
    assert torch.allclose(found.mean, math.sqrt(3) * (a + b) / 2, atol=1e-6)


def test_T47_baselines_match_a_plain_computation():
    v = np.random.default_rng(0).normal(1.0, 1.0, (50, 16))
    unit = 4 * v / np.linalg.norm(v, axis=1, keepdims=True)
    mu = unit.mean(0)
    found = baseline(torch.from_numpy(v))
    assert found.value == pytest.approx(((unit - mu) ** 2).mean(), abs=1e-9)
    assert found.normalised_mean == pytest.approx(((unit - 4 * mu / np.linalg.norm(mu)) ** 2).mean(), abs=1e-9)
    assert found.normalised_mean > found.value


def test_T47_fve_of_the_mean_is_zero_of_the_truth_one_of_a_failure_as_stated():
    v = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)) + 1
    base = baseline(v)
    of_the_mean = ((direction(v) - base.mean) ** 2).mean(1).numpy()
    assert fve(of_the_mean, base.value).mean() == pytest.approx(0, abs=1e-5)
    of_the_normalised_mean = direction_mse(base.mean.expand_as(v), v).numpy()
    assert fve(of_the_normalised_mean, base.normalised_mean).mean() == pytest.approx(0, abs=1e-5)
    assert fve(direction_mse(3 * v, v).numpy(), base.value) == pytest.approx(np.ones(200), abs=1e-5)
    assert fve(np.array([FAILED_MSE]), base.value)[0] == pytest.approx(1 - 2 / base.value)


def test_T47_no_sample_gives_null_never_a_perfect_score():
    bootstrap = DocumentBootstrap(["a", "b"], replicates=100)
    assert bootstrap.interval(np.array([0.0, 0.0]), np.array([False, False])) is None
    with pytest.raises(ValueError, match="at least one"):
        baseline(torch.empty(0, 8))


def test_bootstrap_equals_drawing_whole_documents():
    documents = ["a", "b", "a", "c", "c", "c", "d"]
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    bootstrap = DocumentBootstrap(documents, replicates=60, seed=3)
    by_document = {d: [x for e, x in zip(documents, values, strict=True) if e == d] for d in "abcd"}
    for draw, found in zip(bootstrap.weights, bootstrap.replicates(values), strict=True):
        assert draw.sum() == 4
        pooled = [x for d, times in zip("abcd", draw, strict=True) for x in by_document[d] * times]
        assert found == pytest.approx(np.mean(pooled))


def test_copies_of_a_row_within_its_document_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=30)
    names = [str(i) for i in range(30)]
    once = DocumentBootstrap(names).interval(values)
    often = DocumentBootstrap(names * 20).interval(np.tile(values, 20))
    assert once is not None
    assert often == pytest.approx(once)


def test_interval_covers_the_mean_at_the_stated_rate():
    hits = 0
    for seed in range(100):
        values = np.random.default_rng(seed).normal(size=60)
        interval = DocumentBootstrap([str(i) for i in range(60)], replicates=300, seed=seed).interval(values)
        assert interval is not None
        hits += interval["low"] <= 0 <= interval["high"]
    assert 85 <= hits <= 99


def test_two_quantities_share_their_draws_so_that_differences_pair_up():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 10, 80)
    b = a - 0.5
    bootstrap = DocumentBootstrap([str(i // 4) for i in range(80)])
    gap = bootstrap.replicates(a) - bootstrap.replicates(b)
    assert gap == pytest.approx(np.full(len(gap), 0.5))


@settings(max_examples=30)
@given(st.lists(st.floats(-5, 1), min_size=2, max_size=12), st.integers(0, 5))
def test_interval_lies_within_the_values(values, seed):
    interval = DocumentBootstrap([str(i) for i in range(len(values))], 100, seed).interval(np.array(values))
    assert interval is not None
    assert min(values) - 1e-9 <= interval["low"] <= interval["high"] <= max(values) + 1e-9
    assert interval["mean"] == pytest.approx(np.mean(values))


def test_masked_rows_do_not_count_even_where_they_hold_nan():
    values = np.array([1.0, np.nan, 3.0, np.nan])
    interval = DocumentBootstrap(["a", "a", "b", "b"]).interval(values, np.array([True, False, True, False]))
    assert interval == pytest.approx({"mean": 2.0, "low": 1.0, "high": 3.0})


def test_T47_draws_that_hold_no_countable_row_do_not_count_as_zero():
    mask = np.zeros(20, bool)
    mask[:2] = True
    interval = DocumentBootstrap([str(i) for i in range(20)]).interval(np.full(20, 0.8), mask)
    assert interval == pytest.approx({"mean": 0.8, "low": 0.8, "high": 0.8})
