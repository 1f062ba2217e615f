"""The smallest settings that still go through every stage; used by the tests of whole runs."""

from __future__ import annotations

SHORT = {
    "data.documents": 240,
    "warmstart.av.steps": 3,
    "warmstart.ar.steps": 3,
    "warmstart.gate.samples": 8,
    "warmstart.gate.min-fve": -9,
    "warmstart.gate.min-extraction": 0,
    "warmstart.gate.min-length-sd": 0,
    "reinforce.steps": 2,
    "reinforce.prompts": 3,
    "reinforce.group": 4,
    "reinforce.checkpoint-every": 1,
    "evaluate.activations": 40,
    "evaluate.bootstrap": 100,
    "report.examples": 3,
}


def flags(**more: object) -> list[str]:
    """SHORT as command-line flags; `more` overrides, with `__` for the dot and `_` for the dash."""
    settings = SHORT | {k.replace("__", ".").replace("_", "-"): v for k, v in more.items()}
    out: list[str] = []
    for name, value in settings.items():
        out += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return out
