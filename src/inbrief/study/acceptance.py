"""What StoryWorld's target carries: probes, the price of a false claim, and what the last words alone explain."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from torch import Tensor

from inbrief.config import load
from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import SCHEMA, write_json
from inbrief.metrics import DocumentBootstrap, direction
from inbrief.models import checkpoints
from inbrief.run import Run, taught
from inbrief.storyworld import world
from inbrief.study.controls import ridge_controls, ridge_training
from inbrief.study.evaluate import heldout

DECODABLE = 0.9
"""A slot counts as decodable when its probe reads at least this share of held-out values."""


def accept(root: Path, out: Path) -> str:
    """Measure the target of a warm-started StoryWorld run, write the table to `out` and return it as text.

    Raises InbriefError when the run is of another corpus.
    """
    config = load(root)
    if config.data.corpus != "storyworld" or config.teacher.kind != "storyworld":
        raise InbriefError(
            f"Only a StoryWorld run has known facts; {root} reads {config.data.corpus!r}, taught by {config.teacher.kind!r}."
        )
    run = Run(config, root)
    harvested = run.store()
    held = heldout(harvested, config.evaluate.activations)
    bootstrap = DocumentBootstrap(held.documents, config.evaluate.bootstrap, config.evaluate.seed)
    train_ids, train_vectors = ridge_training(harvested)
    every_text = harvested.column("text")
    train_texts = [every_text[i] for i in harvested.rows("ar")[: len(train_ids)]]
    ar = checkpoints.load_reconstructor(run.warm / "ar", config.model.dtype)
    texts = taught(run)
    teacher = [texts[i] for i in held.activation_ids]
    facts: dict[str, Any] = {}
    for slot in world.SLOTS:
        accuracy, n = probe(slot, train_texts, train_vectors, held.texts, held.vectors)
        rows = [i for i, text in enumerate(teacher) if slot in claimed(text)]
        cost = _cost(slot, rows, teacher, ar, held, bootstrap)
        facts[slot] = {
            "planted": world.PLANTING[slot],
            "values": len(world.SLOTS[slot]),
            "probe_accuracy": round(accuracy, 4),
            "probe_n": n,
            "false_claim_cost": cost,
            "false_claim_n": len(rows),
            "decodable": accuracy >= DECODABLE,
        }
    shares = ridge_controls(train_ids, train_vectors, held, bootstrap)
    record = {
        "schema": SCHEMA,
        "revision": run.revision,
        "layer": config.model.layer,
        "n": len(held.rows),
        "baseline": held.base.value,
        "facts": facts,
        **shares,
    }
    write_json(out, record)
    return table(record)


def probe(slot: str, train_texts: list[str], train: Tensor, test_texts: list[str], test: Tensor) -> tuple[float, int]:
    """(held-out accuracy, held-out rows) of a ridge classifier reading `slot` from directions, where it is told."""
    values = world.SLOTS[slot]

    def told(texts: list[str], vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
        labels = [world.facts(t).get(slot) for t in texts]
        keep = [i for i, label in enumerate(labels) if label is not None]
        x = direction(vectors[keep]).double().numpy()
        return np.hstack([x, np.ones((len(keep), 1))]), np.array([values.index(labels[i] or "") for i in keep])

    x, y = told(train_texts, train)
    gram = x.T @ x + 1e-2 * len(x) * np.eye(x.shape[1])
    weights = scipy.linalg.solve(gram, x.T @ np.eye(len(values))[y], assume_a="pos")
    x_test, y_test = told(test_texts, test)
    return float(((x_test @ weights).argmax(1) == y_test).mean()), len(y_test)


def falsify(text: str, slot: str, rng: random.Random) -> str:
    """`text` with its claim about `slot` replaced by another value that takes the same article; what stands in quotation
    marks is left as it is, because it is no claim but the source's own words."""
    value = claimed(text)[slot]
    article = world.with_article(value).split()[0]
    others = [v for v in world.SLOTS[slot] if v != value]
    alike = [v for v in others if world.with_article(v).split()[0] == article]
    other = rng.choice(alike or others)
    return "".join(
        part if part.startswith('"') else re.sub(rf"\b{value}\b", other, part) for part in re.split(r'("[^"]*")', text)
    )


def claimed(text: str) -> dict[str, str]:
    """The facts `text` asserts outside quotation marks."""
    return world.facts(re.sub(r'"[^"]*"', " ", text))


def _cost(slot: str, rows: list[int], teacher: list[str], ar, held, bootstrap: DocumentBootstrap):
    """Interval of the FVE lost when a true claim about `slot` in the teacher's text is made false; paired."""
    if not rows:
        return None
    true = [teacher[i] for i in rows]
    false = [
        falsify(t, slot, random.Random(f"falsify|{slot}|{held.activation_ids[i]}"))
        for i, t in zip(rows, true, strict=True)
    ]
    vectors = held.vectors[rows]
    lost = np.zeros(len(held.rows))
    lost[rows] = (ar.errors(vectors, false) - ar.errors(vectors, true)).numpy() / held.base.value
    mask = np.zeros(len(held.rows), bool)
    mask[rows] = True
    return bootstrap.interval(lost, mask)


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    lines = ["| fact | planted | probe accuracy | FVE lost by a false claim |", "|---|---|---|---|"]
    for slot, f in record["facts"].items():
        c = f["false_claim_cost"]
        cost = f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" if c else "–"
        lines.append(
            f"| {slot} | {f['planted']:g} | {f['probe_accuracy']:.2f} (chance {1 / f['values']:.2f}) | {cost} |"
        )
    lines += ["", "| last tokens | share of the variance a ridge on their ids explains |", "|---|---|"]
    for last in (1, 2, 4, 8):
        ci = record[f"ridge_last_{last}"]
        lines.append(f"| {last} | {ci['mean']:.3f} [{ci['low']:.3f}, {ci['high']:.3f}] |")
    return "\n".join(lines)
