"""Where each supported architecture keeps its blocks and final norm, and how to cut it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from inbrief.io.errors import InbriefError


@dataclass(frozen=True)
class Architecture:
    """Attribute names on the decoder (`model.get_decoder()`): the list of blocks and the final norm."""

    blocks: str = "layers"
    norm: str = "norm"


REGISTRY: dict[str, Architecture] = {
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
}


PER_LAYER = ("layer_types",)
"""Config fields with one entry per block."""


def architecture(config) -> Architecture:
    """Raises InbriefError for a model type nobody registered."""
    if config.model_type not in REGISTRY:
        raise InbriefError(
            f"inbrief must know where an architecture keeps its blocks; {config.model_type!r} is not registered (known: "
            f"{', '.join(REGISTRY)}). Add its block list and final norm to REGISTRY in inbrief/models/architectures.py."
        )
    return REGISTRY[config.model_type]


def decoder(model) -> nn.Module:
    """The stack of blocks without the LM head."""
    return model.get_decoder()


def blocks(model) -> nn.ModuleList:
    return getattr(decoder(model), architecture(model.config).blocks)


def check_layer(config, layer: int) -> None:
    """Layer K is the output of block K; the last block is refused, its hidden state is only seen after the final norm."""
    if not 0 <= layer < config.num_hidden_layers - 1:
        raise InbriefError(
            f"model.layer must lie in 0..{config.num_hidden_layers - 2} for a model of {config.num_hidden_layers} blocks "
            f"(the last block's output is only seen after the final norm); got {layer}."
        )


def cut_config(config, n_blocks: int):
    """A copy of `config` with `n_blocks` blocks and its per-layer lists cut to match."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = n_blocks
    for name in PER_LAYER:
        if isinstance(value := getattr(cut, name, None), list | tuple):
            setattr(cut, name, value[:n_blocks])
    return cut
