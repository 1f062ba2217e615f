"""Training state on disk: everything a killed run needs to end bit-equal to an uninterrupted one.

Random draws are functions of (seed, step), so no generator state is kept.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import atomic_path, read_json, recover, write_json

SCHEMA = 1


def save(
    folder: Path, step: int, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer], **extra
) -> None:
    """`step` steps are done. Atomic: a kill leaves the state before."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, module in modules.items():
            state = {k: v.contiguous().clone() for k, v in trained(module).items()}
            save_file(state, temporary / f"{name}.safetensors")
        torch.save({name: o.state_dict() for name, o in optimizers.items()}, temporary / "optimizers.pt")
        write_json(temporary / "state.json", {"schema": SCHEMA, "step": step, "modules": sorted(modules), **extra})


def load(folder: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> dict:
    """Restore in place and return the record (`step` and what was saved as extra); {"step": 0} when nothing is there.

    Raises InbriefError when a module's state is missing: an AV never goes on without the AR that trained with it.
    """
    recover(folder)
    if not folder.is_dir():
        return {"step": 0}
    record = read_json(folder / "state.json")
    for name, module in modules.items():
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise InbriefError(
                f"A resumed run needs the state of its {name}; {path} is missing. Restore it or start over in another folder."
            )
        try:
            state = load_file(path)
        except SafetensorError as e:
            raise InbriefError(
                f"{path} must be whole; reading failed ({e}). Delete {folder} to start this run over."
            ) from None
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in trained(module).items()}:
            raise InbriefError(f"{path} must hold exactly the trained tensors of the {name}; it holds others.")
        module.load_state_dict(state, strict=False)
    try:
        saved = torch.load(folder / "optimizers.pt", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as e:
        raise InbriefError(
            f"{folder}/optimizers.pt cannot be read ({e}). Delete {folder} to start this run over."
        ) from None
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(saved[name])
    return record


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name; a tied weight once."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
