"""The verbalizer (AV): a causal LM that reads one injected activation and answers with an explanation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inbrief.contract import explanation
from inbrief.contract.contract import Contract, av_prompt
from inbrief.models import architectures
from inbrief.models.batching import pad_right
from inbrief.models.injection import check_vectors, injected


class Verbalizer(nn.Module):
    """An AV with its tokenizer and contract.

    The prompt is one template in which only the marker's row differs, so everything before the marker is the same for
    every row of every batch and is computed once per pass.
    """

    def __init__(self, model, tokenizer, contract: Contract) -> None:
        super().__init__()
        self.model, self.tokenizer, self.contract = model, tokenizer, contract
        ids, column = av_prompt(contract, tokenizer)
        self.prefix, self.suffix = ids[:column], ids[column:]

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def prefix_cache(self, rows: int):
        """Keys and values of the template before the marker, computed once and repeated for `rows` rows."""
        ids = torch.tensor([self.prefix], device=self.device)
        cache = architectures.decoder(self.model)(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(rows)
        return cache

    def hidden(self, vectors: Tensor, answers: Tensor, cache=None):
        """Final hidden states of marker, suffix and answer: vectors [n, d], answers [n, t] -> [n, len(suffix)+t, d]."""
        check_vectors(vectors, self.contract.d_model)
        suffix = torch.tensor([self.suffix], device=self.device).expand(len(vectors), -1)
        ids = torch.cat([suffix, answers.to(self.device)], dim=1)
        cache = cache if cache is not None else self.prefix_cache(len(vectors))
        with injected(self.model, self.contract.injection, vectors.to(self.device), 0, self.contract.marker_id):
            return architectures.decoder(self.model)(
                input_ids=ids, past_key_values=cache, use_cache=True
            ).last_hidden_state

    def logprobs(self, vectors: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        """log p of every answer token, [n, longest answer] float32, zero beyond each answer's end; differentiable.

        vectors [n, d] raw activations, one per answer. From unprocessed logits at temperature 1; only answer positions
        meet the LM head.
        """
        lengths = torch.tensor([len(a) for a in answers], device=self.device)
        ids = pad_right(answers).to(self.device)
        hidden = self.hidden(vectors, ids[:, :-1])[:, len(self.suffix) - 1 :]
        real = torch.arange(ids.shape[1], device=self.device)[None] < lengths[:, None]
        logits = self.model.get_output_embeddings()(hidden[real]).float()
        chosen = logits.gather(-1, ids[real][:, None])[:, 0] - logits.logsumexp(-1)
        return torch.zeros(real.shape, device=self.device).masked_scatter(real, chosen)

    def answer_ids(self, text: str) -> list[int]:
        """The ids of a complete answer carrying `text`, stop token included: what warm start trains on."""
        return [
            *self.tokenizer(explanation.wrap(text), add_special_tokens=False)["input_ids"],
            self.contract.stop_ids[0],
        ]
