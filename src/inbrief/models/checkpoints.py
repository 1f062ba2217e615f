"""Models on disk: targets, verbalizers and reconstructors in Hugging Face layout, weights in safetensors only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from inbrief.contract.contract import FILE, Contract, verify
from inbrief.io.errors import InbriefError
from inbrief.io.runfolder import atomic_path, recover
from inbrief.models.architectures import architecture, cut_config, decoder
from inbrief.models.reconstructor import Reconstructor
from inbrief.models.verbalizer import Verbalizer

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

BUILT_IN = "storyworld"
WEIGHTS, HEAD = "model.safetensors", "value_head.safetensors"


def built_in(part: str = "target") -> Path:
    """The folder of the shipped target, or of a shipped NLA."""
    return Path(str(resources.files("inbrief.storyworld"))) / part


def resolve(path: str) -> str:
    """`storyworld`, a local folder, or a Hub id left as it is. Raises InbriefError for a path that does not exist."""
    if path == BUILT_IN:
        return str(built_in())
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise InbriefError(
            f"model.path must be 'storyworld', a local folder or a Hub id OWNER/NAME; {path!r} is none of them."
        )
    return path


def device() -> torch.device:
    """Where models are put: the first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def revision_of(path: str, revision: str | None = None) -> str:
    """Names a base model's weights: a hash of the local files, or the Hub commit."""
    folder = Path(resolve(path))
    if not folder.is_dir():
        return getattr(target_config(path, revision), "_commit_hash", None) or revision or "main"
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            while block := f.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def load_tokenizer(path: str, revision: str | None = None):
    try:
        return AutoTokenizer.from_pretrained(resolve(path), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise InbriefError(f"No tokenizer could be loaded from {path!r}: {_first_line(e)}") from None


def load_target(path: str, revision: str | None = None, dtype: str = "float32"):
    """A causal LM in eval mode. Raises InbriefError when it is missing, broken or of an unregistered architecture."""
    architecture(target_config(path, revision))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(path),
            revision=revision,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise InbriefError(f"No model could be loaded from {path!r}: {_first_line(e)}") from None
    model, info = loaded
    # transformers draws a missing tensor at random and only warns.
    allowed = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    _require_exact(set(info["missing_keys"]) - allowed, info["unexpected_keys"])
    return model.eval().to(device())


def target_config(path: str, revision: str | None = None):
    try:
        return AutoConfig.from_pretrained(resolve(path), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise InbriefError(f"No model config could be read from {path!r}: {_first_line(e)}") from None


def save_verbalizer(av: Verbalizer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """A plain Hugging Face causal LM folder with tokenizer and contract; atomic."""
    with atomic_path(folder) as temporary:
        state = _state(av.model, dtype)
        if av.model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        _save(temporary, state, av.model.config, av.tokenizer, av.contract, dtype)


def load_verbalizer(folder: Path, dtype: str = "float32") -> Verbalizer:
    contract, tokenizer, config = _open(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    _load_state(
        model, _read(folder / WEIGHTS), allowed_missing={"lm_head.weight"} if config.tie_word_embeddings else set()
    )
    model.tie_weights()
    return Verbalizer(model, tokenizer, contract).eval().to(device())


def new_reconstructor(target, tokenizer, contract: Contract) -> Reconstructor:
    """An untrained AR: the target's first K+1 blocks, no final norm, the head at identity."""
    ar = _empty_reconstructor(cut_config(target.config, contract.layer + 1), tokenizer, contract, target.dtype)
    kept = ar.backbone.state_dict().keys()
    ar.backbone.load_state_dict({k: v.clone() for k, v in decoder(target).state_dict().items() if k in kept})
    return ar.to(target.device)


def save_reconstructor(ar: Reconstructor, folder: Path, dtype: torch.dtype | None = None) -> None:
    """The released NLAs' layout: a truncated backbone without final norm and LM head, the head in its own file; atomic."""
    with atomic_path(folder) as temporary:
        state = {f"model.{k}": v for k, v in _state(ar.backbone, dtype).items()}
        _save(temporary, state, ar.backbone.config, ar.tokenizer, ar.contract, dtype)
        save_file({"weight": _state(ar.head, dtype)["weight"]}, temporary / HEAD)


def load_reconstructor(folder: Path, dtype: str = "float32") -> Reconstructor:
    """Raises InbriefError on a missing or extra tensor, a missing head, or a block count other than K+1."""
    contract, tokenizer, config = _open(folder)
    if config.num_hidden_layers != contract.layer + 1:
        raise InbriefError(
            f"An AR for layer {contract.layer} has {contract.layer + 1} blocks; {folder} has {config.num_hidden_layers}."
        )
    ar = _empty_reconstructor(config, tokenizer, contract, getattr(torch, dtype))
    _load_state(ar.backbone, {k.removeprefix("model."): v for k, v in _read(folder / WEIGHTS).items()}, set())
    _load_state(ar.head, _read(folder / HEAD), set())
    return ar.eval().to(device())


def _empty_reconstructor(config, tokenizer, contract: Contract, dtype: torch.dtype) -> Reconstructor:
    backbone = decoder(AutoModelForCausalLM.from_config(config, dtype=dtype))
    setattr(backbone, architecture(config).norm, nn.Identity())
    # The head stays in float32: in bf16 its identity diagonal cannot move by a step of 1e-4.
    return Reconstructor(backbone, tokenizer, contract)


def _state(module: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    return {k: v.detach().to(dtype or v.dtype).contiguous().clone() for k, v in module.state_dict().items()}


def _save(folder: Path, state: dict[str, torch.Tensor], config, tokenizer, contract: Contract, dtype) -> None:
    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    contract.save(folder)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _open(folder: Path):
    recover(folder)
    if not folder.is_dir():
        raise InbriefError(f"{folder} must be a folder with a saved model; it does not exist.")
    contract = Contract.load(folder)
    tokenizer = load_tokenizer(str(folder.absolute()))
    verify(contract, tokenizer)
    return contract, tokenizer, target_config(str(folder.absolute()))


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InbriefError(
            f"{path} must exist beside {FILE}; it does not. The checkpoint is incomplete: save or download it again."
        )
    try:
        return load_file(path)
    except SafetensorError as e:
        raise InbriefError(
            f"{path} must be a whole safetensors file; reading failed ({e}). It may be cut short: copy it again."
        ) from None


def _load_state(module: nn.Module, state: dict[str, torch.Tensor], allowed_missing: set[str]) -> None:
    try:
        missing, extra = module.load_state_dict(state, strict=False)
    except RuntimeError as e:
        raise InbriefError(f"The checkpoint does not fit its config: {_first_line(e)}") from None
    _require_exact(set(missing) - allowed_missing, extra)


def _require_exact(missing: Iterable[str], extra: Iterable[str]) -> None:
    if missing or extra:
        raise InbriefError(
            f"A checkpoint must hold exactly the tensors of its model; missing {sorted(missing)[:4]}, unexpected {sorted(extra)[:4]}."
        )


def _first_line(e: Exception) -> str:
    return " ".join(str(e).split())[:300]
