"""Shared fixtures: the shipped target, a contract written by hand, tiny random models, and forward passes that share no
code with the package."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from inbrief.config import Fit
from inbrief.contract.contract import Contract, Injection, tokenizer_sha
from inbrief.models import checkpoints
from inbrief.models.reconstructor import Reconstructor
from inbrief.models.verbalizer import Verbalizer
from inbrief.storyworld import retelling, world
from inbrief.training.warmstart import fit_verbalizer

torch.set_num_threads(1)

LAYER = 2
MARKER = "㈎"
AV_TEMPLATE = "<concept>{marker}</concept>\nExplain."
AR_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return checkpoints.load_tokenizer("storyworld")


@pytest.fixture(scope="session")
def target() -> Any:
    """The shipped target; never trained, never changed."""
    return checkpoints.load_target("storyworld")


@pytest.fixture(scope="session")
def contract(tokenizer, target) -> Contract:
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in (MARKER, "<concept>", "</concept>")}
    return Contract(
        base_model="storyworld",
        revision="none",
        tokenizer_sha=tokenizer_sha(tokenizer),
        layer=LAYER,
        d_model=target.config.hidden_size,
        marker=MARKER,
        marker_id=ids[MARKER],
        left_id=ids["<concept>"],
        right_id=ids["</concept>"],
        av_template=AV_TEMPLATE,
        ar_template=AR_TEMPLATE,
        injection=Injection(method="embed_overwrite", scale=5.0),
        mse_scale=target.config.hidden_size**0.5,
        stop_ids=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        cap=48,
        fve_baseline=0.8,
    )


@pytest.fixture(scope="session")
def prefixes() -> list[str]:
    """Beginnings of stories, cut at different words."""
    return [" ".join(world.story(11, i).split()[: 12 + i]) for i in range(24)]


@pytest.fixture(scope="session")
def vectors(target, tokenizer, prefixes) -> Tensor:
    """[24, d] raw activations at the last token of each prefix: `hidden_states[K+1]`, one text at a time."""
    with torch.no_grad():
        states = [
            target(input_ids=torch.tensor([tokenizer(t)["input_ids"]]), output_hidden_states=True).hidden_states
            for t in prefixes
        ]
    return torch.stack([s[LAYER + 1][0, -1] for s in states])


@pytest.fixture(scope="session")
def explanations(prefixes) -> list[str]:
    """The shortest of three retellings of each prefix."""
    draws = [[retelling.retell(t, random.Random(f"{i}|{k}")) for k in range(3)] for i, t in enumerate(prefixes)]
    return [min(texts, key=len) for texts in draws]


@pytest.fixture(scope="session")
def _warm(target, tokenizer, contract, vectors, explanations, tmp_path_factory) -> Verbalizer:
    av = Verbalizer(deepcopy(target), tokenizer, contract)
    fit = Fit(steps=30, batch=12, lr=3e-3, warmup=3)
    fit_verbalizer(av, vectors, explanations, fit, 0, tmp_path_factory.mktemp("warm"), micro_tokens=2048)
    return av


@pytest.fixture
def warm_av(_warm) -> Callable[[], Verbalizer]:
    """Makes copies of an AV that opens and closes its tags most of the time."""
    return lambda: copy_av(_warm)


@pytest.fixture
def new_ar(target, tokenizer, contract) -> Callable[[], Reconstructor]:
    """Makes untrained ARs."""
    return lambda: checkpoints.new_reconstructor(target, tokenizer, contract)


@pytest.fixture
def tiny_av(tokenizer, contract) -> Callable[..., Verbalizer]:
    """Makes AVs of random weights, d 32 and three blocks, of either family and with either injection."""

    def make(family: str = "qwen3", method: str = "embed_overwrite", layer: int = 1, scale: float = 3.0) -> Verbalizer:
        injection = Injection.model_validate({"method": method, "layer": layer, "scale": scale})
        own = contract.model_copy(update={"d_model": 32, "layer": 1, "injection": injection})
        return Verbalizer(tiny_model(family, len(tokenizer)), tokenizer, own).eval()

    return make


def tiny_model(family: str, vocabulary: int, tied: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()


def copy_av(av: Verbalizer) -> Verbalizer:
    return Verbalizer(deepcopy(av.model), av.tokenizer, av.contract)


def logits_by_hand(av: Verbalizer, vector: Tensor, answer: list[int]) -> Tensor:
    """Logits [len(answer)+1, vocabulary] at the places where the answer's tokens are predicted: one row, embeddings and
    blocks called one by one, no cache, the injection written out."""
    prompt = [*av.prefix, *av.suffix]
    column, how = len(av.prefix), av.contract.injection
    ids = torch.tensor([[*prompt, *answer]])
    decoder = av.model.model
    hidden = decoder.embed_tokens(ids)
    if how.method == "embed_overwrite":
        hidden = hidden.clone()
        hidden[0, column] = float(how.scale or 0) * vector / vector.norm()
    t = ids.shape[1]
    positions = torch.arange(t)[None]
    mask = torch.full((t, t), float("-inf")).triu(1)[None, None]
    rotary = decoder.rotary_emb(hidden, positions)
    for i, block in enumerate(decoder.layers):
        hidden = block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        if how.method == "residual_add" and i == how.layer:
            h = hidden[0, column]
            hidden = torch.cat([hidden[:, :column], hidden[:, column + 1 :]], dim=1)
            changed = (h + h.norm() * vector / vector.norm())[None, None]
            hidden = torch.cat([hidden[:, :column], changed, hidden[:, column:]], dim=1)
    return av.model.lm_head(decoder.norm(hidden))[0, len(prompt) - 1 :]


def logprobs_by_hand(av: Verbalizer, vector: Tensor, answer: list[int]) -> Tensor:
    """log p [len(answer)] of each answer token."""
    logits = logits_by_hand(av, vector, answer)[:-1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
