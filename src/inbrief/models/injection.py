"""The one injection: how activations enter the verbalizer's forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from inbrief.contract.contract import Injection
from inbrief.io.errors import InbriefError
from inbrief.models import architectures


def check_vectors(vectors: Tensor, d_model: int) -> None:
    """Raises InbriefError unless `vectors` is [n, d_model], finite and nowhere zero."""
    if vectors.ndim != 2 or vectors.shape[1] != d_model:
        raise InbriefError(f"Activations must be [n, {d_model}] for this NLA; found {list(vectors.shape)}.")
    # By the norm in float32, which is what injection divides by: it overflows and vanishes before the numbers do.
    norms = vectors.float().norm(dim=1)
    if bad := int((~torch.isfinite(norms)).sum()):
        raise InbriefError(
            f"Activations must be finite; {bad} of {len(vectors)} hold NaN, infinity or a norm beyond float32. Drop those rows."
        )
    if bool((norms == 0).any()):
        raise InbriefError("Activations must not be zero: a zero vector has no direction to explain. Drop those rows.")


def _unit(vectors: Tensor) -> Tensor:
    # In float32, whatever the model's dtype: norms of 10⁴ and more lose their digits in bf16.
    v = vectors.float()
    return v / v.norm(dim=-1, keepdim=True)


def overwrite(embeds: Tensor, vectors: Tensor, column: int, scale: float) -> Tensor:
    """embeds [n, t, d], vectors [n, d] -> a copy of embeds with row `column` scaled *to* norm `scale`."""
    row = (_unit(vectors) * scale).to(embeds.dtype)
    return torch.cat([embeds[:, :column], row[:, None], embeds[:, column + 1 :]], dim=1)


def add_norm_matched(hidden: Tensor, vectors: Tensor, column: int) -> Tensor:
    """hidden [n, t, d] -> a copy with h + ‖h‖ · v/‖v‖ at `column` (the gradient flows through ‖h‖ too)."""
    h = hidden[:, column].float()
    row = (h + h.norm(dim=-1, keepdim=True) * _unit(vectors)).to(hidden.dtype)
    return torch.cat([hidden[:, :column], row[:, None], hidden[:, column + 1 :]], dim=1)


@contextmanager
def injected(model, injection: Injection, vectors: Tensor, column: int, marker_id: int) -> Iterator[None]:
    """Arm one forward pass of `model`: row i receives vectors[i] [n, d] at `column` of the ids passed to it.

    Raises InbriefError when a row has no marker in that column, when the numbers of rows and vectors differ, and when
    the pass never ran or ran twice: an armed vector is used exactly once, or it is an error.
    """
    fired = 0

    def check(_module, args, output: Tensor) -> Tensor:
        nonlocal fired
        fired += 1
        ids = args[0]
        if ids.shape[0] != len(vectors):
            raise InbriefError(
                f"Each row must receive one vector; the pass has {ids.shape[0]} rows for {len(vectors)} vectors."
            )
        if fired > 1:
            raise InbriefError(
                "One armed injection serves one forward pass; a second pass ran. Leave the context first."
            )
        if not bool((ids[:, column] == marker_id).all()):
            raise InbriefError(f"Every row must hold the marker (id {marker_id}) in column {column}; some do not.")
        if injection.method == "embed_overwrite":
            if injection.scale is None:
                raise InbriefError("Injection by embed_overwrite needs a numeric scale (model.injection.scale).")
            return overwrite(output, vectors, column, injection.scale)
        return output

    def add(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        changed = add_norm_matched(hidden, vectors, column)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    block = None
    if injection.method == "residual_add":
        stack = architectures.blocks(model)
        if not 0 <= injection.layer < len(stack):
            raise InbriefError(
                f"model.injection.layer must lie in 0..{len(stack) - 1} for this model; got {injection.layer}."
            )
        block = stack[injection.layer]
    handles = [model.get_input_embeddings().register_forward_hook(check)]
    if block is not None:
        handles.append(block.register_forward_hook(add))
    try:
        yield
        if fired == 0:
            raise InbriefError(
                "An injection was armed but no forward pass ran inside it: the vector would have been lost."
            )
    finally:
        for handle in handles:
            handle.remove()
