"""Training: what one step does and refuses, and that a killed run resumes bit-equal."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import copy_av, same_weights, weights_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from inbrief.config import Fit, Gate, Penalty, Reinforce
from inbrief.contract.explanation import read_answers
from inbrief.io.errors import InbriefError
from inbrief.metrics import FAILED_MSE, baseline, direction_mse
from inbrief.models.reconstructor import Reconstructor
from inbrief.models.sampler import Samples, sample
from inbrief.models.verbalizer import Verbalizer
from inbrief.training import reinforce, resume, warmstart
from inbrief.training.reinforce import Reinforcer
from inbrief.training.steps import adamw, batch_rows, cosine, guarded_step
from inbrief.training.warmstart import GateReport, fit_reconstructor, fit_verbalizer, measure_gate

Pair = tuple[Verbalizer, Reconstructor]
MICRO = 2048


class Killed(Exception):
    pass


class Dying(Reinforcer):
    """Killed before its fourth step."""

    def step(self, vectors: Tensor, step: int) -> dict[str, Any]:
        if step == 3:
            raise Killed
        return super().step(vectors, step)


@pytest.fixture
def pair(warm_av, new_ar) -> Callable[[], Pair]:
    return lambda: (warm_av(), new_ar())


def settings(**changes: Any) -> Reinforce:
    small = {"steps": 5, "prompts": 3, "group": 4, "cap": 40, "checkpoint_every": 2, "micro_tokens": 2048}
    return Reinforce.model_validate(small | changes)


def reinforcer(pair: Pair, kind: type[Reinforcer] = Reinforcer, value: float = 0.02, **changes: Any) -> Reinforcer:
    train_av = changes.pop("train_av", True)
    return kind(*pair, settings(**changes), Penalty(), value, seed=0, base=0.8, train_av=train_av)


def armed(pair: Pair, **changes: Any) -> Reinforcer:
    """A run with all its steps still ahead, for tests that take one step by hand."""
    run = reinforcer(pair, **changes)
    run.reference = copy_av(run.av).eval().requires_grad_(False)
    run.av_optimizer, run.ar_optimizer = adamw(run.av, run.settings.lr), adamw(run.ar, run.settings.ar_lr)
    run.skipped = run.flat_steps = 0
    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, without its clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds" and not k.startswith("s_")} for line in lines]


def optimizer_state(folder: Path) -> list[Tensor]:
    saved = torch.load(folder / "state" / "optimizers.pt", weights_only=True)
    return [t for name in sorted(saved) for s in saved[name]["state"].values() for t in s.values()]


def drawn_for(run: Reinforcer, vectors: Tensor) -> Samples:
    return sample(run.av, vectors, run.settings.group, 3, run.settings.cap)


# T36 to T38: killed, resumed, saved


def test_T36_T29_a_killed_run_resumes_bit_equal_and_keeps_its_reference(pair, vectors, tmp_path):
    whole = reinforcer(pair())
    whole.run(vectors, tmp_path / "whole", "whole")
    with pytest.raises(Killed):
        reinforcer(pair(), Dying).run(vectors, tmp_path / "cut", "cut")
    assert json.loads((tmp_path / "cut/state/state.json").read_text())["step"] == 2
    assert len(metrics(tmp_path / "cut")) == 3

    resumed = reinforcer(pair())
    warm = weights_of(resumed.av)
    resumed.run(vectors, tmp_path / "cut", "cut")
    assert same_weights(weights_of(resumed.av), weights_of(whole.av))
    assert same_weights(weights_of(resumed.ar), weights_of(whole.ar))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    states = zip(optimizer_state(tmp_path / "cut"), optimizer_state(tmp_path / "whole"), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert not same_weights(weights_of(resumed.av), warm)
    assert same_weights(weights_of(resumed.reference), warm)
    assert not any(p.requires_grad for p in resumed.reference.parameters())


def test_T38_saving_at_every_step_changes_nothing(pair, vectors, tmp_path):
    often, seldom = reinforcer(pair(), checkpoint_every=1), reinforcer(pair(), checkpoint_every=100)
    often.run(vectors, tmp_path / "often", "often")
    seldom.run(vectors, tmp_path / "seldom", "seldom")
    assert same_weights(weights_of(often.av), weights_of(seldom.av))
    assert same_weights(weights_of(often.ar), weights_of(seldom.ar))
    assert all(p.requires_grad for p in [*often.av.parameters(), *often.ar.parameters()])


def test_T36_a_finished_run_does_nothing_more(pair, vectors, tmp_path):
    first = reinforcer(pair(), steps=2)
    first.run(vectors, tmp_path, "run")
    again = reinforcer(pair(), steps=2)
    again.run(vectors, tmp_path, "run")
    assert same_weights(weights_of(again.av), weights_of(first.av))
    assert len(metrics(tmp_path)) == 2


@pytest.mark.parametrize("name", ["av", "ar"])
def test_T37_an_av_never_goes_on_without_the_ar_that_trained_with_it(pair, vectors, tmp_path, name):
    with pytest.raises(Killed):
        reinforcer(pair(), Dying).run(vectors, tmp_path, "run")
    (tmp_path / "state" / f"{name}.safetensors").unlink()
    with pytest.raises(InbriefError, match=f"state of its {name}"):
        reinforcer(pair()).run(vectors, tmp_path, "run")


def test_T39_a_state_of_other_tensors_is_refused(pair, tmp_path):
    av, ar = pair()
    resume.save(tmp_path / "state", 1, {"av": nn.Linear(3, 3), "ar": ar}, {})
    with pytest.raises(InbriefError, match="exactly the trained tensors of the av"):
        resume.load(tmp_path / "state", {"av": av, "ar": ar}, {})


def test_T36_a_state_holds_what_trains_and_nothing_else(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    resume.save(tmp_path / "state", 4, {"model": model}, {}, skipped=2)
    before = weights_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    record = resume.load(tmp_path / "state", {"model": model}, {})
    assert (record["step"], record["skipped"]) == (4, 2)
    after = weights_of(model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["1.weight"], before["1.weight"] + 1)


def test_T36_no_state_means_the_first_step(tmp_path):
    assert resume.load(tmp_path / "state", {}, {}) == {"step": 0}


@pytest.mark.parametrize("which", ["av", "ar"])
def test_T36_a_killed_warm_start_resumes_bit_equal(pair, vectors, explanations, tmp_path, monkeypatch, which):
    monkeypatch.setattr(warmstart, "CHECKPOINT_EVERY", 2)
    fit = Fit(steps=5, batch=10, lr=1e-3, warmup=2)

    def train(folder: Path) -> nn.Module:
        av, ar = pair()
        if which == "av":
            fit_verbalizer(av, vectors, explanations, fit, 0, folder, MICRO)
            return av
        fit_reconstructor(ar, vectors, explanations, fit, 0, folder, MICRO)
        return ar

    whole = train(tmp_path / "whole")
    real, calls = guarded_step, []

    def dying(*args: Any) -> float | None:
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return real(*args)

    with monkeypatch.context() as killing:
        killing.setattr(warmstart, "guarded_step", dying)
        with pytest.raises(Killed):
            train(tmp_path / "cut")
    resumed = train(tmp_path / "cut")
    assert same_weights(weights_of(resumed), weights_of(whole))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


# T22: the sign of λ, in a step


def test_T22_one_step_makes_short_answers_likelier_than_long_ones(pair, vectors):
    run = armed(pair(), lr=1e-5, kl_weight=0.0, prompts=4, group=8)
    drawn = drawn_for(run, vectors[:4])
    tokens = torch.tensor([float(a.tokens) for a in drawn.answers]).view(4, 8)
    assert bool((tokens.std(1) > 0).any())
    errors, none = torch.zeros(32), torch.zeros(32, dtype=torch.bool)
    earned, _ = reinforce.penalty.rewards(errors, none, tokens.flatten(), 40, 0.02, "never-pays")
    advantage = reinforce.objective.advantages(earned.view(4, 8), "std").flatten()
    run._update_av(drawn, vectors[:4], advantage)

    ids = [a.ids for a in drawn.answers]
    with torch.no_grad():
        after = run.av.logprobs(vectors[drawn.owners], ids)
    lengths = torch.tensor([len(r) for r in ids])
    gained = (after - drawn.logprobs).sum(1) / lengths
    assert torch.equal(advantage.view(4, 8) > 0, tokens < tokens.mean(1, keepdim=True))
    assert float((advantage * gained).sum()) > 0


def test_T22_equal_rewards_and_no_kl_move_nothing(pair, vectors):
    run = armed(pair(), kl_weight=0.0)
    before = weights_of(run.av)
    logged = run._update_av(drawn_for(run, vectors[:3]), vectors[:3], torch.zeros(12))
    assert logged["av_grad_norm"] == 0
    assert same_weights(weights_of(run.av), before)


# T9: sampler and trainer agree, or the run stops


def test_T9_the_sampler_and_the_trainer_agree(pair, vectors):
    run = armed(pair())
    assert run.step(vectors[:3], 0)["agreement"] < 1e-5


@pytest.mark.parametrize("lost", ["vectors", "weights"])
def test_T9_a_lost_injection_or_a_moved_weight_stops_the_run(pair, vectors, lost):
    run = armed(pair())
    drawn, own = drawn_for(run, vectors[:3]), vectors[:3]
    if lost == "vectors":
        own = own.roll(1, 0)
    else:
        with torch.no_grad():
            run.av.model.model.norm.weight.mul_(1.1)
    before = weights_of(run.av)
    with pytest.raises(InbriefError, match="same log-probs"):
        run._update_av(drawn, own, torch.ones(12))
    assert same_weights(weights_of(run.av), before)


# T32: micro-batches


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_T32_loss_and_gradients_do_not_depend_on_micro_tokens(pair, vectors, monkeypatch, aggregation):
    caught: list[list[Tensor]] = []

    def catch(optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float | None:
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        caught.append([p.grad.clone() for p in parameters if p.grad is not None])
        return guarded_step(optimizer, lr, clip)

    monkeypatch.setattr(reinforce, "guarded_step", catch)
    logged = []
    for micro_tokens in (100_000, 150, 1):
        run = armed(pair(), micro_tokens=micro_tokens, aggregation=aggregation, kl_weight=0.5)
        with torch.no_grad():
            run.reference.model.model.norm.weight.mul_(1.05)
        logged.append(run.step(vectors[:3], 0))
    for name in ("reward", "fve", "kl", "av_grad_norm", "ar_grad_norm"):
        assert [m[name] for m in logged] == pytest.approx([logged[0][name]] * 3, rel=1e-4)
    assert logged[0]["kl"] > 1e-4
    for other in (caught[2:4], caught[4:6]):
        for one, two in zip(caught[0:2], other, strict=True):
            assert len(one) == len(two) > 10
            for a, b in zip(one, two, strict=True):
                assert float((a - b).norm()) <= 1e-4 * float(a.norm()) + 1e-8


@pytest.mark.parametrize("which", ["av", "ar"])
def test_T32_a_warm_start_does_not_depend_on_micro_tokens(pair, vectors, explanations, tmp_path, which):
    logged = []
    for micro_tokens in (100_000, 200, 1):
        folder, (av, ar) = tmp_path / str(micro_tokens), pair()
        fit = Fit(steps=1, batch=12, lr=1e-3, warmup=0)
        if which == "av":
            fit_verbalizer(av, vectors, explanations, fit, 0, folder, micro_tokens)
        else:
            fit_reconstructor(ar, vectors, explanations, fit, 0, folder, micro_tokens)
        logged += metrics(folder)
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in logged] == pytest.approx([logged[0][name]] * 3, rel=1e-4)


def test_T32_the_first_warm_start_losses_are_those_computed_by_hand(pair, vectors, explanations, tmp_path):
    fit = Fit(steps=1, batch=6, lr=1e-3, warmup=0)
    rows = batch_rows(len(vectors), 6, 0, seed=4)
    av, ar = pair()
    with torch.no_grad():
        by_token = [av.logprobs(vectors[[i]], [av.answer_ids(explanations[i])])[0] for i in rows]
        by_row = direction_mse(ar.predict([explanations[i] for i in rows]), vectors[rows])
    fit_verbalizer(av, vectors, explanations, fit, 4, tmp_path / "av", MICRO)
    fit_reconstructor(ar, vectors, explanations, fit, 4, tmp_path / "ar", MICRO)
    assert metrics(tmp_path / "av")[0]["loss"] == pytest.approx(-float(torch.cat(by_token).mean()), rel=1e-4)
    assert metrics(tmp_path / "ar")[0]["loss"] == pytest.approx(float(by_row.mean()), rel=1e-4)


# T34: the AR in a step


def test_T34_the_ars_gradient_never_reaches_the_av(pair, vectors):
    run = armed(pair())
    run._score(drawn_for(run, vectors[:3]), vectors[:3])
    assert all(p.grad is None for p in run.av.parameters())
    assert all(p.grad is not None for p in run.ar.parameters())


def test_T34_the_policys_gradient_never_reaches_the_ar(pair, vectors):
    run = armed(pair())
    run._update_av(drawn_for(run, vectors[:3]), vectors[:3], torch.randn(12))
    assert all(p.grad is None for p in [*run.ar.parameters(), *run.reference.parameters()])


def test_T34_the_reward_uses_the_ar_before_its_own_update(pair, vectors, monkeypatch):
    kept: list[Samples] = []
    monkeypatch.setattr(reinforce, "sample", lambda *args: kept.append(sample(*args)) or kept[-1])
    run = armed(pair(), ar_lr=1e-2)

    def fve_now() -> float:
        mse = [
            FAILED_MSE
            if a.explanation is None
            else float(direction_mse(run.ar.predict([a.explanation])[0], vectors[owner]))
            for a, owner in zip(kept[0].answers, kept[0].owners, strict=True)
        ]
        return 1 - float(np.mean(mse)) / 0.8

    untouched = weights_of(run.ar)
    logged = run.step(vectors[:3], 0)
    assert not same_weights(weights_of(run.ar), untouched)
    after = fve_now()
    run.ar.load_state_dict(untouched)
    assert logged["fve"] == pytest.approx(fve_now(), abs=1e-4)
    assert abs(after - fve_now()) > 1e-2


def test_T19_T25_a_failed_answer_costs_two_and_never_reaches_the_ar(pair, vectors, monkeypatch):
    run = armed(pair())
    encode, stop = run.av.tokenizer, run.av.contract.stop_ids
    texts = ["<explanation>a fox</explanation>", "<explanation> </explanation>", "a fox", "<explanation>an owl"]
    rows = [[*encode(t, add_special_tokens=False)["input_ids"], stop[0]] for t in texts]
    rows.append(rows[0][:-1])
    drawn = Samples(read_answers(rows, encode, stop), torch.zeros(5, 1), [0] * 5)
    asked: list[list[str]] = []
    real = run.ar.prompts
    monkeypatch.setattr(run.ar, "prompts", lambda texts: asked.append(list(texts)) or real(texts))
    mse, failed = run._score(drawn, vectors[:1])
    assert asked == [["a fox"]]
    assert failed.tolist() == [False, True, True, True, True]
    assert mse[1:].tolist() == [FAILED_MSE] * 4
    assert mse[0] == pytest.approx(float(direction_mse(run.ar.predict(["a fox"])[0], vectors[0])), abs=1e-5)


def test_T26_a_step_in_which_every_answer_is_truncated_moves_neither_model(pair, vectors):
    av, ar = pair()
    endless = Verbalizer(av.model, av.tokenizer, av.contract.model_copy(update={"stop_ids": [10**6]}))
    run = armed((endless, ar), cap=8, kl_weight=0.0)
    before = weights_of(run.av), weights_of(run.ar)
    logged = run.step(vectors[:3], 0)
    assert (logged["truncated"], logged["extraction_rate"], logged["tokens"]) == (1, 0, 8)
    assert logged["reward"] == pytest.approx(-2 - 0.02 * 8)
    assert same_weights(weights_of(run.av), before[0])
    assert same_weights(weights_of(run.ar), before[1])


@pytest.mark.parametrize(
    ("changes", "av_moves", "ar_moves"),
    [({}, True, True), ({"ar": "frozen"}, True, False), ({"train_av": False}, False, True)],
)
def test_only_what_is_to_learn_learns(pair, vectors, tmp_path, changes, av_moves, ar_moves):
    run = reinforcer(pair(), steps=1, **changes)
    before = weights_of(run.av), weights_of(run.ar)
    run.run(vectors, tmp_path, "run")
    assert same_weights(weights_of(run.av), before[0]) != av_moves
    assert same_weights(weights_of(run.ar), before[1]) != ar_moves


def test_T29_the_kl_is_that_to_the_warm_start(pair, vectors):
    run = armed(pair(), lr=1e-3)
    assert run.step(vectors[:3], 0)["kl"] == pytest.approx(0, abs=1e-5)
    drawn = drawn_for(run, vectors[:3])
    by_hand = []
    with torch.no_grad():
        for answer, owner in zip(drawn.answers, drawn.owners, strict=True):
            logp, reference = (av.logprobs(vectors[[owner]], [answer.ids])[0] for av in (run.av, run.reference))
            by_hand.append(float(((reference - logp).exp() - (reference - logp) - 1).mean()))
    assert np.mean(by_hand) > 1e-3
    assert run._update_av(drawn, vectors[:3], torch.zeros(12))["kl"] == pytest.approx(np.mean(by_hand), rel=1e-3)


# T35: what is not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_T35_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = nn.Linear(3, 2)
    optimizer = adamw(model, 0.1)
    model(torch.ones(1, 3)).sum().backward()
    guarded_step(optimizer, 0.1, 1.0)
    before, state = weights_of(model), [t.clone() for s in optimizer.state.values() for t in s.values()]
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None
    model.weight.grad[0, 0] = bad
    assert guarded_step(optimizer, 0.1, 1.0) is None
    assert same_weights(weights_of(model), before)
    after = [t for s in optimizer.state.values() for t in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))
    assert model.weight.grad is None


@pytest.mark.parametrize("which", ["av", "ar"])
def test_T35_a_nan_gradient_skips_that_models_step_and_is_counted(pair, vectors, tmp_path, which):
    run = reinforcer(pair(), steps=2)
    sick, well = (run.av, run.ar) if which == "av" else (run.ar, run.av)
    next(iter(sick.parameters())).register_hook(lambda grad: grad * float("nan"))
    before = weights_of(sick), weights_of(well)
    run.run(vectors, tmp_path, "run")
    assert same_weights(weights_of(sick), before[0])
    assert not same_weights(weights_of(well), before[1])
    assert [m["skipped"] for m in metrics(tmp_path)] == [1, 2]
    assert [m[f"{which}_grad_norm"] for m in metrics(tmp_path)] == [None, None]


def test_T35_an_ar_that_answers_nan_moves_nothing(pair, vectors, tmp_path):
    run = reinforcer(pair(), steps=1)
    with torch.no_grad():
        run.ar.head.weight[0, 0] = float("nan")
    before = weights_of(run.av)
    run.run(vectors, tmp_path, "run")
    assert same_weights(weights_of(run.av), before)
    assert metrics(tmp_path)[0]["skipped"] == 2


def test_T35_T36_the_count_of_skipped_steps_survives_a_kill(pair, vectors, tmp_path):
    def poisoned(kind: type[Reinforcer]) -> Reinforcer:
        run = reinforcer(pair(), kind)
        next(iter(run.av.parameters())).register_hook(lambda grad: grad * float("nan"))
        return run

    with pytest.raises(Killed):
        poisoned(Dying).run(vectors, tmp_path, "run")
    poisoned(Reinforcer).run(vectors, tmp_path, "run")
    assert [m["skipped"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_T35_a_warm_start_skips_and_counts(pair, vectors, explanations, tmp_path):
    _, ar = pair()
    before = weights_of(ar)
    bad = vectors.clone()
    bad[:, 0] = float("nan")
    fit_reconstructor(ar, bad, explanations, Fit(steps=3, batch=4, warmup=0), 0, tmp_path, MICRO)
    assert same_weights(weights_of(ar), before)
    assert [m["skipped"] for m in metrics(tmp_path)] == [1, 2, 3]


def test_T35_T36_a_warm_starts_count_of_skipped_steps_survives_a_kill(
    pair, vectors, explanations, tmp_path, monkeypatch
):
    monkeypatch.setattr(warmstart, "CHECKPOINT_EVERY", 1)
    _, ar = pair()
    bad = vectors * float("nan")
    fit_reconstructor(ar, bad, explanations, Fit(steps=1, batch=4, warmup=0), 0, tmp_path, MICRO)
    fit_reconstructor(ar, bad, explanations, Fit(steps=2, batch=4, warmup=0), 0, tmp_path, MICRO)
    assert [m["skipped"] for m in metrics(tmp_path)] == [1, 2]


# Warnings, seeds, the gate


def test_T22_a_run_without_spread_in_length_says_so_once(pair, capsys):
    run = armed(pair(), no_spread_warning=3)
    for spread in (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0):
        run._watch_spread(spread, "λ=0.01")
    assert capsys.readouterr().err.count("no group had any spread in length for 3 steps") == 1


def test_a_seed_varies_the_run(pair, vectors, tmp_path):
    for seed in (0, 1):
        run = reinforcer(pair(), steps=1)
        run.seed = seed
        run.run(vectors, tmp_path / str(seed), "run")
    first, second = (metrics(tmp_path / s)[0] for s in "01")
    assert first["fve"] != second["fve"]


@pytest.mark.parametrize("unit", ["tokens", "content_tokens"])
def test_T22_the_penalty_charges_the_unit_it_names(pair, vectors, unit):
    run = armed(pair(), value=0.01, failure="seed")
    run.penalty = Penalty(unit=unit)
    logged = run.step(vectors[:3], 0)
    assert logged["reward_unpenalised"] - logged["reward"] == pytest.approx(0.01 * logged[unit], rel=1e-3)


def test_warm_starts_learn(target, pair, vectors, explanations, tmp_path):
    av, ar = pair()
    av.model.load_state_dict(target.state_dict())
    fit_reconstructor(ar, vectors, explanations, Fit(steps=12, batch=12, lr=2e-3, warmup=1), 0, tmp_path / "ar", MICRO)
    losses = [m["loss"] for m in metrics(tmp_path / "ar")]
    assert losses[-1] < 0.7 * losses[0]
    fit_verbalizer(av, vectors, explanations, Fit(steps=6, batch=12, lr=2e-3, warmup=1), 0, tmp_path / "av", MICRO)
    losses = [m["loss"] for m in metrics(tmp_path / "av")]
    assert losses[-1] < losses[0]
    assert not av.training and not ar.training


def test_a_warm_start_without_examples_says_so(pair, tmp_path):
    with pytest.raises(InbriefError, match="needs examples"):
        fit_reconstructor(pair()[1], torch.empty(0, 128), [], Fit(), 0, tmp_path, MICRO)


def test_the_gate_measures_what_it_says(pair, vectors):
    av, ar = pair()
    report = measure_gate(av, ar, vectors[:6], cap=40, seed=2)
    drawn = sample(av, vectors[:6], 4, 2, 40)
    base = baseline(vectors[:6]).value

    def score(shift: int) -> float:
        errors = [
            2.0
            if a.explanation is None
            else float(direction_mse(ar.predict([a.explanation])[0], vectors[(o - shift) % 6]))
            for a, o in zip(drawn.answers, drawn.owners, strict=True)
        ]
        return 1 - float(np.mean(errors)) / base

    lengths = np.array([a.tokens for a in drawn.answers]).reshape(6, 4)
    assert report.fve == pytest.approx(score(0), abs=1e-4)
    assert report.fve_shuffled == pytest.approx(score(1), abs=1e-4)
    assert report.extraction_rate == pytest.approx(np.mean([a.explanation is not None for a in drawn.answers]))
    assert report.tokens == pytest.approx(lengths.mean())
    assert report.length_sd == pytest.approx(np.median(lengths.std(1, ddof=1)))


def test_T19_the_gate_never_asks_the_ar_about_an_empty_text(pair, vectors, monkeypatch):
    av, ar = pair()
    asked: list[str] = []
    real = ar.prompts
    monkeypatch.setattr(ar, "prompts", lambda texts: asked.extend(texts) or real(texts))
    measure_gate(av, ar, vectors[:6], cap=6, seed=2)
    assert "" not in asked


GOOD = GateReport(n=64, fve=0.5, fve_shuffled=0.1, extraction_rate=0.9, tokens=50, length_sd=12)


def test_a_good_warm_start_passes_its_gate():
    GOOD.require(Gate())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fve_shuffled": 0.5}, "does not beat shuffled"),
        ({"fve": 0.12}, "below"),
        ({"extraction_rate": 0.3}, "could be read"),
        ({"length_sd": 2.0}, "length sd"),
    ],
)
def test_the_gate_names_each_reason(change, reason):
    with pytest.raises(InbriefError, match=reason):
        replace(GOOD, **change).require(Gate())


@pytest.mark.parametrize("field", ["fve", "extraction_rate", "length_sd"])
def test_T47_a_gate_value_that_is_no_number_does_not_pass(field):
    report = replace(GOOD, **{field: float("nan")})
    with pytest.raises(InbriefError):
        report.require(Gate())


# The order of the data and the schedule


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_visits_each_row_once(n, size, seed):
    steps = 3 * n
    rows = np.concatenate([batch_rows(n, size, step, seed) for step in range(steps)])
    for epoch in range(len(rows) // n):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_T36_a_batch_is_a_function_of_its_step_alone():
    random.seed(1)
    np.random.seed(1)
    first = [batch_rows(50, 8, step, 3).tolist() for step in range(20)]
    again = [batch_rows(50, 8, step, 3).tolist() for step in reversed(range(20))]
    assert first == again[::-1]
    assert first != [batch_rows(50, 8, step, 4).tolist() for step in range(20)]


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    factors = [cosine(step, 100, 10) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_a_step_is_clipped_and_uses_the_rate_it_is_given():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    before = model.weight.item()
    (model.weight * 50).sum().backward()
    assert guarded_step(optimizer, 0.5, clip=1.0) == pytest.approx(50)
    assert model.weight.item() == pytest.approx(before - 0.5, abs=1e-4)
