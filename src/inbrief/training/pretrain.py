"""Train a small target language model: next-token loss, plus a disclosed planting loss where the facts are known.

A plain language model of StoryWorld's size does not carry a story's facts at its last token, so explanations of its
activations would be confabulation by construction. The planting loss is the mean cross-entropy of one linear read-out
per slot, at block K, of the facts established so far, weighted by `world.PLANTING`. The read-outs are thrown away.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

from inbrief.io.errors import InbriefError
from inbrief.io.progress import MetricsLog, Progress
from inbrief.storyworld import retelling, world
from inbrief.storyworld.tokenizer import PAD, build_tokenizer

IGNORE = -100


def target_config(vocab_size: int, eos: int, pad: int) -> Qwen3Config:
    """StoryWorld's target: Qwen3's architecture, d 128, four blocks."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
    )


def telling(seed: int, index: int) -> str:
    """A story told in a chat and retold by the assistant: how the target learns the wording of explanations."""
    text = world.story(seed, index)
    rng = random.Random(f"telling|{seed}|{index}")
    words = text.split(" ")
    prefix = " ".join(words[: rng.randint(8, len(words))])
    retold = retelling.retell(prefix, rng)
    return f"<|im_start|>user\n{prefix}<|im_end|>\n<|im_start|>assistant\n<explanation>\n{retold}\n</explanation><|im_end|>"


def storyworld_tokenizer(seed: int = 0, stories: int = 6000) -> PreTrainedTokenizerFast:
    """The vocabulary of `stories` tellings and stories of corpus `seed`."""
    texts = [world.story(seed, i) for i in range(stories)] + [telling(seed, i) for i in range(stories)]
    return build_tokenizer(texts, min_count=30)


def fact_labels(texts: list[str], offsets: list[list[tuple[int, int]]], width: int) -> Tensor:
    """[batch, width, slots] int64: the value index of each fact established at each token, IGNORE before that."""
    labels = torch.full((len(texts), width, len(world.SLOTS)), IGNORE)
    for row, (text, spans) in enumerate(zip(texts, offsets, strict=True)):
        seen: set[str] = set()
        for m in world.mentions(text):
            if m.slot in seen:
                continue
            seen.add(m.slot)
            first = next((i for i, (_, end) in enumerate(spans) if end >= m.end), len(spans))
            slot = list(world.SLOTS).index(m.slot)
            labels[row, first : len(spans), slot] = world.SLOTS[m.slot].index(m.value)
    return labels


class Readouts(nn.Module):
    """One linear classifier per slot; its weighted mean cross-entropy over the established facts."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(d, len(values)) for values in world.SLOTS.values())

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden [batch, time, d], labels [batch, time, slots] -> scalar."""
        losses = []
        for i, (slot, head) in enumerate(zip(world.SLOTS, self.heads, strict=True)):
            weight, y = world.PLANTING[slot], labels[..., i]
            if weight and bool((y != IGNORE).any()):
                losses.append(weight * nn.functional.cross_entropy(head(hidden[y != IGNORE]), y[y != IGNORE]))
        return torch.stack(losses).sum() / len(world.SLOTS)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    """[batch, time] int64 right-padded with IGNORE, and each row's character spans without padding."""
    enc = tokenizer(texts, padding=True, return_tensors="pt", return_offsets_mapping=True)
    mask = enc["attention_mask"]
    spans = [row[: int(m.sum())].tolist() for row, m in zip(enc["offset_mapping"], mask, strict=True)]
    return enc["input_ids"].masked_fill(mask == 0, IGNORE), spans


def next_token_loss(model: Qwen3ForCausalLM, ids: Tensor) -> tuple[Tensor, int]:
    """(summed cross-entropy, number of predicted tokens). Right padding needs no mask in a causal model."""
    logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits
    target = ids[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target, reduction="sum")
    return total, int((target != IGNORE).sum())


@dataclass(frozen=True)
class Pretrain:
    """Settings of the shipped target."""

    layer: int = 2
    """Block whose output carries the facts."""
    steps: int = 1000
    batch: int = 48
    """Sequences per step: three quarters stories, one quarter tellings."""
    lr: float = 3e-3
    planting: float = 2.0
    """Weight of the planting loss; 0 trains the plain target."""
    corpus_seed: int = 1000
    """Never that of the corpus explained later (data.seed)."""
    seed: int = 0


def pretrain_storyworld(out: Path, settings: Pretrain) -> dict[str, float]:
    """Train StoryWorld's target and save it, with its tokenizer, in Hugging Face format under `out`. Returns the last
    losses. Raises InbriefError when `out` is in use."""
    if out.exists() and any(out.iterdir()):
        raise InbriefError(f"A target needs an empty folder; {out} holds files. Choose another with --out.")
    s = settings
    if not 0 <= s.layer < target_config(1, 0, 0).num_hidden_layers - 1:
        raise InbriefError(f"--layer must name a block before the last; got {s.layer}.")
    torch.manual_seed(s.seed)
    tokenizer = storyworld_tokenizer()
    pad = int(tokenizer.convert_tokens_to_ids(PAD))  # pyright: ignore[reportArgumentType]
    model = Qwen3ForCausalLM(target_config(len(tokenizer), int(tokenizer.eos_token_id), pad))  # pyright: ignore
    readouts = Readouts(model.config.hidden_size)
    optimizer = torch.optim.AdamW([*model.parameters(), *readouts.parameters()], lr=s.lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, s.steps // 10), s.steps)
    caught: dict[str, Any] = {}
    model.model.layers[s.layer].register_forward_hook(lambda _m, _a, out: caught.__setitem__("h", out))
    log = MetricsLog(out / "metrics.jsonl")
    last: dict[str, float] = {}
    began = time.monotonic()
    with Progress(s.steps, "target") as progress:
        for step in range(s.steps):
            first = step * s.batch
            n_stories = s.batch * 3 // 4
            stories = [world.story(s.corpus_seed, first + i) + PAD for i in range(n_stories)]
            tellings = [telling(s.corpus_seed, first + i) for i in range(n_stories, s.batch)]
            # Two passes, because a telling is twice as long as a story and padding is not free.
            total, n, planted = torch.zeros(()), 0, torch.zeros(())
            for texts in (stories, tellings):
                ids, spans = encode(tokenizer, texts)
                loss_sum, predicted = next_token_loss(model, ids)
                total, n = total + loss_sum, n + predicted
                planted = planted + readouts(caught["h"], fact_labels(texts, spans, ids.shape[1])) / 2
            language = total / n
            loss = language + s.planting * planted
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            last = {"language": round(language.item(), 4), "planted": round(planted.item(), 4)}
            log.write(step, **last, seconds=round(time.monotonic() - began, 1))
            progress.advance(note=f"language {last['language']:.3f} planted {last['planted']:.3f}")
    model._forward_hooks.clear()
    model.model.layers[s.layer]._forward_hooks.clear()
    model.eval()
    model.save_pretrained(out)
    tokenizer.backend_tokenizer.no_padding()  # the last batch's padding is no setting of the tokenizer
    tokenizer.save_pretrained(out)
    return last
