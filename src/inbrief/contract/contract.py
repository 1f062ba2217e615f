"""The contract: everything a verbalizer and a reconstructor must agree on, checked against the live tokenizer.

Kept as `nla_meta.yaml` beside every dataset and checkpoint.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from inbrief.io.errors import InbriefError

FILE = "nla_meta.yaml"
SCHEMA = 1


class Injection(BaseModel):
    """How a vector enters the AV.

    `embed_overwrite`: the marker's embedding becomes `scale · v/‖v‖`. `residual_add`: after block `layer`,
    `h ← h + ‖h‖ · v/‖v‖` at the marker; it needs no scale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: Literal["embed_overwrite", "residual_add"] = "embed_overwrite"
    layer: int = 1
    scale: float | None = None


class Contract(BaseModel):
    """See the module's docstring. Templates hold `{marker}` and `{explanation}`; `budget_template` also `{budget}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = SCHEMA
    base_model: str
    revision: str
    tokenizer_sha: str
    layer: int
    d_model: int
    marker: str
    marker_id: int
    left_id: int
    right_id: int
    av_template: str
    ar_template: str
    budget_template: str | None = None
    enable_thinking: bool | None = None
    ar_special_tokens: bool = True
    injection: Injection
    mse_scale: float
    read_out: Literal["last_token"] = "last_token"
    stop_ids: list[int]
    cap: int
    fve_baseline: float | None = None

    @property
    def layer_names(self) -> str:
        """The layer under the names other tools give it."""
        return f"layer {self.layer} (resid_post.{self.layer}, blocks.{self.layer}.hook_resid_post)"

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(
            yaml.safe_dump({"kind": "inbrief", **self.model_dump()}, allow_unicode=True, sort_keys=False)
        )

    @classmethod
    def load(cls, folder: Path) -> Contract:
        path = folder / FILE
        if not path.is_file():
            raise InbriefError(f"An NLA folder holds {FILE}; {folder} has none. Point at a folder written by inbrief.")
        try:
            raw = yaml.safe_load(path.read_text())
            if not isinstance(raw, dict):
                raise ValueError("it holds no mapping")
            raw.pop("kind", None)
            return cls.model_validate(raw)
        except (ValidationError, yaml.YAMLError, ValueError) as e:
            first = str(e).replace("\n", " ")[:200]
            raise InbriefError(f"{path} is not a contract this version reads: {first}") from None


def tokenizer_sha(tokenizer) -> str:
    """First 16 hex digits of a hash of the vocabulary: equal for equal tokenizers wherever they lie."""
    lines = "\n".join(f"{i} {t}" for t, i in sorted(tokenizer.get_vocab().items(), key=lambda kv: kv[1]))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def prompt_ids(tokenizer, user_message: str, enable_thinking: bool | None) -> list[int]:
    """The AV's prompt as ids: the chat template where the tokenizer has one, the bare message where it has none."""
    if not tokenizer.chat_template:
        return list(tokenizer(user_message)["input_ids"])
    extra = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    # Tokenized in one go (never template -> string -> encode, which doubles a BOS); a dict since transformers 5.
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": user_message}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **extra,
    )["input_ids"]
    return list(ids)


def av_prompt(contract: Contract, tokenizer) -> tuple[list[int], int]:
    """(prompt ids, the marker's column). Raises InbriefError unless the marker stands there exactly once, in the
    context the contract pins."""
    ids = prompt_ids(tokenizer, contract.av_template.replace("{marker}", contract.marker), contract.enable_thinking)
    columns = [i for i, token in enumerate(ids) if token == contract.marker_id]
    if len(columns) != 1:
        raise InbriefError(
            f"The marker {contract.marker!r} (id {contract.marker_id}) must stand exactly once in the AV's prompt; it "
            f"stands {len(columns)} times. Choose a marker that is one token of this tokenizer and absent from the template."
        )
    column = columns[0]
    if not 0 < column < len(ids) - 1:
        raise InbriefError(
            "The marker must not stand at an edge of the AV's prompt: give it a neighbour on both sides."
        )
    if (ids[column - 1], ids[column + 1]) != (contract.left_id, contract.right_id):
        raise InbriefError(
            f"The marker's neighbours must be {contract.left_id} and {contract.right_id}; found {ids[column - 1]} and "
            f"{ids[column + 1]}. The template or the tokenizer differs from the one this NLA was trained with."
        )
    return ids, column


def check_marker(tokenizer, marker: str) -> int:
    """The marker's id. Raises InbriefError unless the tokenizer encodes it as one known token."""
    ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InbriefError(
            f"The marker must be one token of the tokenizer; {marker!r} becomes {len(ids)} (ids {ids[:6]}). Set model.marker "
            "to a rare character that is one token; U+3200 to U+33FF often has some."
        )
    return ids[0]


def verify(contract: Contract, tokenizer) -> None:
    """Check the contract against the live tokenizer before anything is computed. Raises InbriefError."""
    if contract.schema_version > SCHEMA:
        raise InbriefError(
            f"The contract has schema {contract.schema_version}; this version reads up to {SCHEMA}. Update inbrief."
        )
    if (found := check_marker(tokenizer, contract.marker)) != contract.marker_id:
        raise InbriefError(
            f"The marker {contract.marker!r} must have id {contract.marker_id}; this tokenizer says {found}."
        )
    av_prompt(contract, tokenizer)
    if (sha := tokenizer_sha(tokenizer)) != contract.tokenizer_sha:
        raise InbriefError(
            f"The tokenizer must be {contract.tokenizer_sha}; found {sha}. Use the one saved with the NLA."
        )
    if not contract.stop_ids or contract.cap < 1:
        raise InbriefError("The contract must name at least one stop id and a cap of at least one token.")
    if contract.ar_template.count("{explanation}") != 1:
        raise InbriefError("The AR template must hold {explanation} exactly once.")
    if "{budget}" in contract.av_template or (contract.budget_template and "{budget}" not in contract.budget_template):
        raise InbriefError("{budget} belongs into budget_template, and there it is required.")


def ar_prompt(contract: Contract, explanation: str) -> str:
    """The AR's input: the template around the stripped explanation, byte for byte the same everywhere (braces too)."""
    return contract.ar_template.replace("{explanation}", explanation.strip())
