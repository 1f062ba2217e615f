"""Reinforcement: sample groups of explanations, reward what the AR can recover minus a price per token.

One step, top to bottom: draw activations, sample a group for each, score with the AR (whose own regression shares that
forward pass), turn rewards into advantages, one clipped policy-gradient step with a KL to the warm start, one AR step.

Left out on purpose: value functions (a group is its own baseline), several epochs per batch (the ratio stays at one
but for rounding), entropy bonuses (the KL keeps the policy fluent).
"""

from __future__ import annotations

import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inbrief.config import Penalty, Reinforce
from inbrief.io.errors import InbriefError
from inbrief.io.progress import MetricsLog, Progress
from inbrief.metrics import FAILED_MSE, direction_mse
from inbrief.models.batching import length_batches
from inbrief.models.reconstructor import Reconstructor
from inbrief.models.sampler import Samples, sample
from inbrief.models.verbalizer import Verbalizer
from inbrief.training import objective, penalty, resume
from inbrief.training.steps import adamw, batch_rows, guarded_step

AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest mean |Δ log p| between sampler and trainer; a rollout that lost its injection shows 0.2 and more."""


@dataclass
class Reinforcer:
    """One run: `value` is λ, `seed` varies nothing but this run; with `train_av` off only the AR goes on learning."""

    av: Verbalizer
    ar: Reconstructor
    settings: Reinforce
    penalty: Penalty
    value: float
    seed: int
    base: float
    train_av: bool = True

    def run(self, vectors: Tensor, folder: Path, label: str) -> None:
        """Train in place on vectors [n, d]; `folder` receives metrics.jsonl and state/ and is resumed from there."""
        s = self.settings
        self.reference = deepcopy(self.av).eval().requires_grad_(False)
        self.av_optimizer, self.ar_optimizer = adamw(self.av, s.lr), adamw(self.ar, s.ar_lr)
        modules = {"av": self.av, "ar": self.ar}
        optimizers = {"av": self.av_optimizer, "ar": self.ar_optimizer}
        record = resume.load(folder / "state", modules, optimizers)
        start, self.skipped, self.flat_steps = record["step"], record.get("skipped", 0), record.get("flat_steps", 0)
        log = MetricsLog(folder / "metrics.jsonl", keep=start)
        with Progress(s.steps, label, start) as progress:
            for step in range(start, s.steps):
                m = self.step(vectors[batch_rows(len(vectors), s.prompts, step, self.seed)], step)
                log.write(step, **m)
                self._watch_spread(m["length_spread_max"], label)
                if (step + 1) % s.checkpoint_every == 0 or step + 1 == s.steps:
                    extra = {"skipped": self.skipped, "flat_steps": self.flat_steps}
                    resume.save(folder / "state", step + 1, modules, optimizers, **extra)
                progress.advance(note=f"FVE {m['fve']:.3f}  tokens {m['tokens']:.1f}  KL {m['kl']:.3f}")
        self.av.eval()
        self.ar.eval()

    def step(self, vectors: Tensor, step: int) -> dict[str, Any]:
        """One update from vectors [prompts, d]; returns what is logged."""
        s, clock = self.settings, [time.monotonic()]
        drawn = sample(self.av, vectors, s.group, _draw_seed(self.seed, step), s.cap)
        clock.append(time.monotonic())
        mse, failed = self._score(drawn, vectors)
        clock.append(time.monotonic())
        tokens = torch.tensor([float(a.tokens) for a in drawn.answers])
        charged = torch.tensor([float(getattr(a, self.penalty.unit)) for a in drawn.answers])
        spread = tokens.view(-1, s.group).std(1)
        rewards, raw = penalty.rewards(mse, failed, charged, s.cap, self.value, s.failure)
        metrics = {"kl": 0.0, "agreement": 0.0, "av_grad_norm": 0.0}
        if self.train_av:
            advantage = objective.advantages(rewards.view(-1, s.group), s.advantage).flatten()
            metrics = self._update_av(drawn, vectors, advantage)
        ar_norm = guarded_step(self.ar_optimizer, s.ar_lr, s.clip) if s.ar == "cotrained" else 0.0
        self.skipped += ar_norm is None
        clock.append(time.monotonic())
        seconds = np.diff(clock)
        return {
            "reward": float(rewards.mean()),
            "reward_unpenalised": float(raw.mean()),
            "fve": 1 - float(mse.masked_fill(failed, FAILED_MSE).mean()) / self.base,
            "tokens": float(tokens.mean()),
            "content_tokens": float(np.mean([a.content_tokens for a in drawn.answers])),
            "length_spread": float(spread.median()),
            "length_spread_max": float(spread.max()),
            "extraction_rate": 1 - float(failed.float().mean()),
            "truncated": float(np.mean([a.finish == "length" for a in drawn.answers])),
            **metrics,
            "ar_grad_norm": ar_norm,
            "skipped": self.skipped,
            "s_sample": round(float(seconds[0]), 3),
            "s_score": round(float(seconds[1]), 3),
            "s_update": round(float(seconds[2]), 3),
        }

    def _score(self, drawn: Samples, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(mse [rows], failed [rows]) under the AR as it is before its own update. A failed answer never reaches the AR.

        When the AR is co-trained, the gradient of its regression (the mean over readable answers) is accumulated from this
        same forward pass.
        """
        learn = self.settings.ar == "cotrained"
        mse = torch.full((len(drawn.answers),), FAILED_MSE)
        failed = torch.tensor([a.explanation is None for a in drawn.answers])
        readable = [i for i, a in enumerate(drawn.answers) if a.explanation is not None]
        prompts = self.ar.prompts([drawn.answers[i].explanation or "" for i in readable])
        self.ar.train(learn)
        for micro in length_batches([len(p) for p in prompts], self.settings.micro_tokens):
            rows = [readable[i] for i in micro]
            target = vectors[[drawn.owners[i] for i in rows]].to(self.ar.head.weight.device)
            with torch.set_grad_enabled(learn):
                errors = direction_mse(self.ar([prompts[i] for i in micro]), target)
                if learn:
                    (errors.sum() / len(readable)).backward()
            mse[rows] = errors.detach().cpu()
        return mse, failed

    def _update_av(self, drawn: Samples, vectors: Tensor, advantage: Tensor) -> dict[str, Any]:
        """One policy step over the whole batch in micro-batches; rows keep their weight whatever batch they fall into."""
        s = self.settings
        ids = [a.ids for a in drawn.answers]
        lengths = torch.tensor([len(r) for r in ids])
        weights = objective.token_weights(lengths, drawn.logprobs.shape[1], s.aggregation)
        self.av.train()
        kl_sum = gap_sum = 0.0
        for micro in length_batches([len(r) + len(self.av.suffix) for r in ids], s.micro_tokens):
            own = vectors[[drawn.owners[i] for i in micro]]
            rows = [ids[i] for i in micro]
            logp = self.av.logprobs(own, rows)
            with torch.no_grad():
                reference = self.reference.logprobs(own, rows)
            width = logp.shape[1]
            old, w = drawn.logprobs[micro, :width].to(logp), weights[micro, :width].to(logp)
            divergence = (objective.kl(logp, reference, s.kl) * w).sum()
            loss = (
                objective.policy_loss(logp, old, advantage[micro].to(logp), w, s.clip_ratio) + s.kl_weight * divergence
            )
            loss.backward()
            kl_sum += float(divergence.detach())
            gap_sum += float((logp.detach() - old).abs().sum())
        agreement = gap_sum / float(lengths.sum())
        self._require_agreement(agreement)
        norm = guarded_step(self.av_optimizer, s.lr, s.clip)
        self.skipped += norm is None
        return {"kl": kl_sum, "agreement": agreement, "av_grad_norm": norm}

    def _require_agreement(self, gap: float) -> None:
        limit = AGREEMENT[self.av.model.dtype]
        if gap > limit:
            raise InbriefError(
                f"Sampler and trainer must give the same log-probs; mean |Δ log p| is {gap:.3g} (limit {limit:g}). The injection "
                "or the template was lost on one side, or the weights changed in between."
            )

    def _watch_spread(self, spread: float, label: str) -> None:
        self.flat_steps = self.flat_steps + 1 if spread == 0 else 0
        if self.flat_steps == self.settings.no_spread_warning:
            print(
                f"{label}: no group had any spread in length for {self.flat_steps} steps; the penalty has no gradient there.",
                file=sys.stderr,
                flush=True,
            )


def _draw_seed(seed: int, step: int) -> int:
    return int(np.random.default_rng([7, seed, step]).integers(2**31))
