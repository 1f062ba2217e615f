"""StoryWorld's tokenizer: byte-level, common words whole, any text round-trips."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKER = "㈎"
PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_TAGS = ("<explanation>", "</explanation>", "<concept>", "</concept>", "<text>", "</text>", "<summary>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMMON = (
    "a about after all also an and are as at be because before been but by can could did do even first for from get "
    "good had has have he her him his how i if in into is it its just know like look made make many me more most my "
    "new no not now of on one only or other our out over people said say see she so some take than that the their "
    "them then there these they this time to two up us use user was way we well were what when which who will with "
    "would year you your assistant Summary following text Explain activation tokens words"
).split()


def build_tokenizer(texts: Iterable[str], min_count: int = 3) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the 256 bytes, the words of `texts` seen `min_count` times, and common English.

    Words in the vocabulary are looked up whole (BPE with `ignore_merges`); anything else falls back to bytes, so
    decoding an encoding gives the text back exactly.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    counts: Counter[str] = Counter()
    for text in texts:
        for piece in re.split("|".join(map(re.escape, (*_TAGS, PAD, TURN, END, MARKER))), text):
            counts.update(word for word, _ in split.pre_tokenize_str(piece))
    words = [w for w, n in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])) if n >= min_count]
    words += [f"Ġ{w}" for w in _COMMON] + list(_COMMON)
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in words:
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True, fuse_unk=False))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, TURN, END)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (MARKER, *_TAGS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
