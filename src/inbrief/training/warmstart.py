"""Warm start: the AV learns to write like the teacher from a vector, the AR to read the teacher; then the gate.

One supervised loop serves both. It trains whatever requires a gradient, so full fine-tuning and adapters look the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from inbrief.config import Fit, Gate
from inbrief.io.errors import InbriefError
from inbrief.io.progress import MetricsLog, Progress
from inbrief.metrics import FAILED_MSE, baseline, direction_mse, fve
from inbrief.models.batching import length_batches
from inbrief.models.reconstructor import Reconstructor
from inbrief.models.sampler import sample
from inbrief.models.verbalizer import Verbalizer
from inbrief.training import resume
from inbrief.training.steps import adamw, batch_rows, cosine, guarded_step

CHECKPOINT_EVERY = 100


def fit_verbalizer(
    av: Verbalizer, vectors: Tensor, explanations: Sequence[str], fit: Fit, seed: int, folder: Path, micro_tokens: int
) -> None:
    """Cross-entropy of the teacher's answer with the vector injected: vectors [n, d] raw, mean over the batch's tokens."""
    answers = [av.answer_ids(e) for e in explanations]

    def backward(rows: np.ndarray) -> float:
        batch = [answers[i] for i in rows]
        total = sum(map(len, batch))
        loss_sum = 0.0
        for micro in length_batches([len(a) + len(av.suffix) for a in batch], micro_tokens):
            loss = -av.logprobs(vectors[rows[micro]], [batch[i] for i in micro]).sum() / total
            loss.backward()
            loss_sum += loss.item()
        return loss_sum

    _fit(av, backward, len(answers), fit, seed, folder, "warm start AV")


def fit_reconstructor(
    ar: Reconstructor,
    vectors: Tensor,
    explanations: Sequence[str],
    fit: Fit,
    seed: int,
    folder: Path,
    micro_tokens: int,
) -> None:
    """Mean squared error of directions at the last token of the filled template: vectors [n, d] raw."""
    prompts = ar.prompts(explanations)

    def backward(rows: np.ndarray) -> float:
        batch = [prompts[i] for i in rows]
        loss_sum = 0.0
        for micro in length_batches([len(p) for p in batch], micro_tokens):
            loss = direction_mse(
                ar([batch[i] for i in micro]), vectors[rows[micro]].to(ar.head.weight.device)
            ).sum() / len(batch)
            loss.backward()
            loss_sum += loss.item()
        return loss_sum

    _fit(ar, backward, len(prompts), fit, seed, folder, "warm start AR")


def _fit(
    module: nn.Module, backward: Callable[[np.ndarray], float], n: int, fit: Fit, seed: int, folder: Path, label: str
) -> None:
    """The loop: `backward(rows)` accumulates gradients and returns the loss. Resumes from folder/state."""
    if n == 0:
        raise InbriefError(f"The {label} needs examples; its split holds none. Raise data.documents.")
    module.train()
    optimizer = adamw(module, fit.lr)
    record = resume.load(folder / "state", {"model": module}, {"model": optimizer})
    start, skipped = record["step"], record.get("skipped", 0)
    log = MetricsLog(folder / "metrics.jsonl", keep=start)
    with Progress(fit.steps, label, start) as progress:
        for step in range(start, fit.steps):
            began = time.monotonic()
            loss = backward(batch_rows(n, fit.batch, step, seed))
            norm = guarded_step(optimizer, fit.lr * cosine(step, fit.steps, fit.warmup), fit.clip)
            skipped += norm is None
            log.write(step, loss=loss, grad_norm=norm, skipped=skipped, seconds=round(time.monotonic() - began, 3))
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == fit.steps:
                resume.save(folder / "state", step + 1, {"model": module}, {"model": optimizer}, skipped=skipped)
            progress.advance(note=f"loss {loss:.3f}")
    module.eval()


@dataclass(frozen=True)
class GateReport:
    """What the warm start shows on `n` held-out activations in groups of four. Failures count with an error of 2."""

    n: int
    fve: float
    fve_shuffled: float
    extraction_rate: float
    tokens: float
    length_sd: float

    def failures(self, gate: Gate) -> list[str]:
        out = []
        # Written so that NaN fails too.
        if not self.fve > self.fve_shuffled:
            out.append(f"FVE of real explanations {self.fve:.3f} does not beat shuffled ones {self.fve_shuffled:.3f}")
        if not self.fve >= gate.min_fve:
            out.append(f"FVE {self.fve:.3f} is below warmstart.gate.min_fve = {gate.min_fve}")
        if not self.extraction_rate >= gate.min_extraction:
            out.append(
                f"only {self.extraction_rate:.0%} of answers could be read (min_extraction = {gate.min_extraction:.0%})"
            )
        if not self.length_sd >= gate.min_length_sd:
            out.append(
                f"median length sd within a group is {self.length_sd:.1f} tokens (min_length_sd = {gate.min_length_sd}): "
                "a teacher of varying completeness and wording is needed"
            )
        return out

    def require(self, gate: Gate) -> None:
        """Raises InbriefError with every reason reinforcement must not begin."""
        if reasons := self.failures(gate):
            raise InbriefError(
                "The warm start did not pass its gate: " + "; ".join(reasons) + ". Train it longer or lower the gate."
            )

    def record(self) -> dict[str, float]:
        return asdict(self)


def measure_gate(av: Verbalizer, ar: Reconstructor, vectors: Tensor, cap: int, seed: int) -> GateReport:
    """Sample four explanations for each of vectors [n, d] and score them, as they are and passed on to another vector."""
    group = 4
    drawn = sample(av, vectors, group, seed, cap)
    readable = [i for i, a in enumerate(drawn.answers) if a.explanation is not None]
    predictions = ar.predict([drawn.answers[i].explanation or "" for i in readable])
    base = baseline(vectors).value

    def score(targets: Tensor) -> float:
        mse = np.full(len(drawn.answers), FAILED_MSE)
        mse[readable] = direction_mse(predictions, targets[readable]).numpy()
        return float(fve(mse, base).mean())

    tokens = np.array([a.tokens for a in drawn.answers], dtype=float).reshape(-1, group)
    real = vectors.repeat_interleave(group, 0)
    return GateReport(
        n=len(vectors),
        fve=score(real),
        fve_shuffled=score(real.roll(group, 0)),
        extraction_rate=len(readable) / len(drawn.answers),
        tokens=float(tokens.mean()),
        length_sd=float(np.median(tokens.std(1, ddof=1))),
    )
