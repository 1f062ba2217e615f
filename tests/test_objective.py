"""Advantages, KL, weights and the policy loss, against hand computations."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inbrief.training.objective import advantages, kl, policy_loss, token_weights
from inbrief.training.penalty import rewards

Kind = Literal["std", "mean-only"]
KINDS = pytest.mark.parametrize("kind", ["std", "mean-only"])
AGGREGATIONS = pytest.mark.parametrize("aggregation", ["sequence", "token"])
LENGTHS = torch.tensor([3, 8, 5, 12])


def padded(lengths: Tensor, seed: int = 0) -> Tensor:
    """Log-probs of a group padded to its longest row, zero beyond each length."""
    logp = -torch.rand(len(lengths), int(lengths.max()), generator=torch.Generator().manual_seed(seed)) - 0.1
    return logp.masked_fill(torch.arange(logp.shape[1])[None] >= lengths[:, None], 0.0)


def gradient(logp: Tensor, advantage: Tensor, weights: Tensor, clip: float = 0.2) -> Tensor:
    moving = logp.clone().requires_grad_()
    policy_loss(moving, logp, advantage, weights, clip).backward()
    assert moving.grad is not None
    return moving.grad


# T22: what λ does


@AGGREGATIONS
@KINDS
def test_T22_lengths_in_a_padded_group_differ_and_lambda_has_the_right_sign(kind: Kind, aggregation):
    mse, failed = torch.full((4,), 0.5), torch.zeros(4, dtype=torch.bool)
    logp, weights = padded(LENGTHS), token_weights(LENGTHS, 12, aggregation)

    def pushed(value: float) -> Tensor:
        earned, _ = rewards(mse, failed, LENGTHS.float(), 20, value, "never-pays")
        return gradient(logp, advantages(earned[None], kind).flatten(), weights)

    assert bool((pushed(0.0) == 0).all())
    descent = -pushed(0.02)
    real = torch.arange(12)[None] < LENGTHS[:, None]
    assert bool((descent[~real] == 0).all())
    for row, length in enumerate(LENGTHS.tolist()):
        # The group's mean length is 7: shorter answers become likelier at every token, longer ones less likely.
        assert bool((descent[row, :length].sign() == math.copysign(1, 7 - length)).all())


def test_T22_the_gradient_of_lambda_on_the_expected_length_is_negative():
    # A policy over three lengths, written out: descending the loss shortens its expected length.
    theta = torch.zeros(3, requires_grad=True)
    lengths = torch.tensor([2.0, 6.0, 10.0])
    logp = theta.log_softmax(0)[:, None]
    earned, _ = rewards(torch.zeros(3), torch.zeros(3, dtype=torch.bool), lengths, 20, 0.1, "never-pays")
    policy_loss(
        logp, logp.detach(), advantages(earned[None], "mean-only")[0], torch.full((3, 1), 1 / 3), 0.2
    ).backward()
    assert theta.grad is not None
    stepped = (theta - 0.1 * theta.grad).softmax(0).detach()
    assert float(stepped @ lengths) < 6.0 - 1e-3


@KINDS
def test_T25_a_truncated_answer_stays_in_the_loss_and_is_pushed_down(kind: Kind):
    failed, mse = torch.tensor([False, False, False, True]), torch.tensor([0.4, 0.6, 0.5, 0.0])
    earned, _ = rewards(mse, failed, LENGTHS.float(), 12, 0.01, "never-pays")
    weights = token_weights(LENGTHS, 12, "sequence")
    descent = -gradient(padded(LENGTHS), advantages(earned[None], kind).flatten(), weights)
    assert bool((descent[3] < 0).all())
    assert bool((descent[0, :3] > 0).all())


# T26, T27: advantages


@KINDS
def test_advantages_equal_a_plain_computation(kind: Kind):
    r = np.random.default_rng(0).normal(size=(5, 7))
    naive = r - r.mean(1, keepdims=True)
    if kind == "std":
        naive = naive / (r.std(1, ddof=1, keepdims=True) + 1e-6)
    assert advantages(torch.from_numpy(r), kind).numpy() == pytest.approx(naive)


@KINDS
@pytest.mark.parametrize("value", [0.0, -2.0, 0.1, -1.2345678, 1e3])
def test_T26_a_group_of_equal_rewards_has_exactly_no_advantage(kind: Kind, value):
    assert torch.equal(advantages(torch.full((2, 7), value), kind), torch.zeros(2, 7))


@KINDS
def test_T26_rounding_noise_is_not_divided_by_a_millionth(kind: Kind):
    r = torch.full((1, 8), 0.3)
    r[0, 3] = torch.nextafter(r[0, 3], torch.tensor(1.0))
    assert float(advantages(r, kind).abs().max()) <= 1e-6


@KINDS
def test_T26_a_group_of_one_has_no_advantage(kind: Kind):
    assert torch.equal(advantages(torch.tensor([[3.0], [-1.0]]), kind), torch.zeros(2, 1))


@KINDS
@pytest.mark.parametrize("value", [0.0, 0.04])
def test_T26_a_group_of_failures_pushes_nowhere_whatever_their_lengths(kind: Kind, value):
    earned, _ = rewards(torch.zeros(4), torch.ones(4, dtype=torch.bool), LENGTHS.float(), 20, value, "never-pays")
    assert torch.equal(advantages(earned[None], kind), torch.zeros(1, 4))


@KINDS
def test_T26_one_flat_group_leaves_its_neighbour_alone(kind: Kind):
    lively = torch.tensor([[0.1, -0.4, 0.7]])
    both = advantages(torch.cat([torch.full((1, 3), 5.0), lively]), kind)
    assert torch.equal(both[:1], torch.zeros(1, 3))
    assert torch.equal(both[1:], advantages(lively, kind))


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=8), st.floats(0.5, 50), st.floats(-5, 5))
def test_T27_with_std_neither_scale_nor_shift_of_all_rewards_matters(values, scale, shift):
    r = torch.tensor([values], dtype=torch.float64)
    if float(r.max() - r.min()) < 0.1:
        return
    assert torch.allclose(advantages(scale * r + shift, "std"), advantages(r, "std"), atol=1e-4)
    assert torch.allclose(advantages(scale * r + shift, "mean-only"), scale * advantages(r, "mean-only"), atol=1e-9)


def test_T27_lambda_changes_its_share_against_the_error_not_the_size_of_the_push():
    mse, tokens = torch.tensor([0.2, 0.3, 0.4, 0.5]), torch.tensor([40.0, 30.0, 20.0, 10.0])
    none = torch.zeros(4, dtype=torch.bool)

    def of(value: float, kind: Kind) -> Tensor:
        return advantages(rewards(mse, none, tokens, 50, value, "never-pays")[0][None], kind)[0]

    # An error of 0.1 buys 10 tokens here: λ = 0.01 is the balance, below it accuracy wins, above it brevity.
    assert of(0.005, "std").argmax() == 0
    assert of(0.02, "std").argmax() == 3
    assert torch.allclose(of(0.01, "mean-only"), torch.zeros(4), atol=1e-6)
    for value in (0.005, 0.02, 0.5):
        assert float(of(value, "std").std()) == pytest.approx(1, abs=1e-3)
    assert float(of(0.5, "mean-only").std()) > 20 * float(of(0.02, "mean-only").std())


def test_T27_with_equal_errors_any_lambda_pushes_alike_under_std_and_in_proportion_without():
    none = torch.zeros(4, dtype=torch.bool)

    def of(value: float, kind: Kind) -> Tensor:
        return advantages(rewards(torch.ones(4), none, LENGTHS.float(), 20, value, "never-pays")[0][None], kind)

    assert torch.allclose(of(0.01, "std"), of(0.1, "std"), atol=1e-3)
    assert torch.allclose(10 * of(0.01, "mean-only"), of(0.1, "mean-only"), atol=1e-5)


# T28: the KL term


def toy(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(θ of a policy over six tokens, its analytic ∇KL(policy ‖ reference), the reference's log-probs)."""
    torch.manual_seed(seed)
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logp = theta.log_softmax(0)
    (analytic,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), theta)
    return theta, analytic, reference


def expected_gradient(theta: Tensor, per_token: Tensor) -> Tensor:
    """E over tokens of the policy of ∇(per-token loss); the sampling itself carries no gradient."""
    (found,) = torch.autograd.grad((theta.log_softmax(0).exp().detach() * per_token).sum(), theta)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_T28_the_expected_gradient_of_k2_is_the_analytic_one_and_k3_is_aligned_with_it(seed):
    theta, analytic, reference = toy(seed)
    k2 = expected_gradient(theta, kl(theta.log_softmax(0), reference, "k2"))
    assert torch.allclose(k2, analytic, atol=1e-12)
    k3 = expected_gradient(theta, kl(theta.log_softmax(0), reference, "k3"))
    assert float(torch.cosine_similarity(k3, analytic, dim=0)) > 0.5
    assert float(k3.norm()) > 0.1 * float(analytic.norm())


@pytest.mark.parametrize("seed", range(8))
def test_T28_k1_as_a_loss_would_have_no_expected_gradient(seed):
    theta, analytic, reference = toy(seed)
    k1 = expected_gradient(theta, theta.log_softmax(0) - reference)
    assert float(k1.norm()) < 1e-12 < float(analytic.norm())


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_T28_descending_the_kl_term_brings_the_policy_to_its_reference(kind):
    theta, _, reference = toy(0)
    values = []
    for _ in range(200):
        logp = theta.log_softmax(0)
        values.append((logp.exp() * (logp - reference)).sum().item())
        theta = (theta - 0.5 * expected_gradient(theta, kl(logp, reference, kind))).detach().requires_grad_()
    assert values[0] > 0.1
    assert values[-1] < 1e-3


@pytest.mark.parametrize("kind", ["k2", "k3"])
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_kl_estimates_are_never_negative_and_zero_where_the_policies_agree(kind, logp, reference):
    a, b = torch.tensor(logp, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    delta = reference - logp
    naive = math.exp(delta) - delta - 1 if kind == "k3" else delta**2 / 2
    found = float(kl(a, b, kind))
    assert found == pytest.approx(naive, abs=1e-9)
    assert found >= -1e-12
    assert float(kl(a, a, kind)) == 0


# T32, T33: weights


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 3))
def test_weights_sum_to_one_and_are_means_by_hand(lengths, slack):
    width, n = max(lengths) + slack, len(lengths)
    sequence = token_weights(torch.tensor(lengths), width, "sequence")
    token = token_weights(torch.tensor(lengths), width, "token")
    for i, length in enumerate(lengths):
        assert sequence[i, :length].tolist() == pytest.approx([1 / (n * length)] * length)
        assert token[i, :length].tolist() == pytest.approx([1 / sum(lengths)] * length)
        assert not sequence[i, length:].any()
        assert not token[i, length:].any()
    assert float(sequence.sum()) == pytest.approx(1)
    assert float(token.sum()) == pytest.approx(1)


@AGGREGATIONS
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[3], [1], [2], [0]], [[1, 3], [0, 2]]])
def test_T32_loss_and_gradient_do_not_depend_on_the_micro_batches(aggregation, parts):
    logp, advantage = padded(LENGTHS), torch.tensor([1.0, -0.5, 0.3, 2.0])
    weights = token_weights(LENGTHS, 12, aggregation)
    whole = gradient(logp, advantage, weights)
    summed = torch.zeros_like(logp)
    for rows in parts:
        width = int(LENGTHS[rows].max())
        summed[rows, :width] += gradient(logp[rows, :width], advantage[rows], weights[rows, :width])
    assert torch.allclose(summed, whole, atol=1e-7)


@AGGREGATIONS
def test_T32_padding_changes_nothing(aggregation):
    logp, advantage = padded(LENGTHS), torch.tensor([1.0, -0.5, 0.3, 2.0])
    wide = torch.cat([logp, torch.zeros(4, 5)], dim=1)
    narrow = gradient(logp, advantage, token_weights(LENGTHS, 12, aggregation))
    widened = gradient(wide, advantage, token_weights(LENGTHS, 17, aggregation))
    assert torch.equal(widened[:, :12], narrow)
    assert not widened[:, 12:].any()


@AGGREGATIONS
def test_T33_a_row_that_counts_for_nothing_does_not_raise_the_weight_of_the_others(aggregation):
    logp, weights = padded(LENGTHS), token_weights(LENGTHS, 12, aggregation)
    kept = gradient(logp, torch.tensor([1.0, -0.5, 0.3, 2.0]), weights)
    without = gradient(logp, torch.tensor([1.0, 0.0, 0.3, 2.0]), weights)
    assert torch.equal(without[[0, 2, 3]], kept[[0, 2, 3]])
    assert not without[1].any()


def test_T33_an_empty_row_still_counts_as_a_sequence():
    weights = token_weights(torch.tensor([4, 0]), 4, "sequence")
    assert weights.tolist() == [[0.125] * 4, [0.0] * 4]


# The clipped loss


def test_on_policy_the_gradient_is_minus_weight_times_advantage():
    logp, advantage = padded(LENGTHS), torch.tensor([1.0, -0.5, 0.3, 2.0])
    weights = token_weights(LENGTHS, 12, "sequence")
    assert torch.allclose(gradient(logp, advantage, weights), -weights * advantage[:, None], atol=1e-7)
    assert float(policy_loss(logp, logp, advantage, weights, 0.2)) == pytest.approx(-float(advantage.mean()))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),
        (0.5, 1.0, -0.5, -0.5),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_clipping_stops_only_the_push_that_goes_too_far(ratio, advantage, loss, slope):
    old = torch.full((1, 1), -1.0)
    logp = (old + math.log(ratio)).requires_grad_()
    value = policy_loss(logp, old, torch.tensor([advantage]), torch.ones(1, 1), 0.2)
    value.backward()
    assert float(value.detach()) == pytest.approx(loss)
    assert logp.grad is not None
    assert float(logp.grad) == pytest.approx(slope)


def test_T35_a_reward_that_is_no_number_shows_under_std():
    assert not torch.isfinite(advantages(torch.tensor([[float("nan"), 1.0, 2.0]]), "std")).any()


def test_T35_a_reward_that_is_no_number_shows_without_std_too():
    assert not torch.isfinite(advantages(torch.tensor([[float("nan"), 1.0, 2.0]]), "mean-only")).all()
