"""The reconstructor (AR): the target's first K+1 blocks without the final norm, and a d×d head at the last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inbrief.contract.contract import Contract, ar_prompt
from inbrief.io.errors import InbriefError
from inbrief.metrics import FAILED_MSE, direction_mse
from inbrief.models.batching import length_batches, pad_right


class Reconstructor(nn.Module):
    """`backbone` is a decoder of K+1 blocks whose final norm is the identity; `head` is linear, bias-free, from identity.

    The hidden state is scaled to norm √d before the head. The head being linear and directions being compared, that
    changes no prediction; it keeps low-precision training from blowing up.
    """

    MAX_TOKENS = 1024

    def __init__(self, backbone: nn.Module, tokenizer, contract: Contract) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.contract = backbone, tokenizer, contract
        d = contract.d_model
        self.head = nn.Linear(d, d, bias=False)
        nn.init.eye_(self.head.weight)

    def prompts(self, explanations: Sequence[str]) -> list[list[int]]:
        """Token ids of each filled template. An over-long one is an error, never cut: the read-out would move."""
        texts = [ar_prompt(self.contract, e) for e in explanations]
        rows = self.tokenizer(texts, add_special_tokens=self.contract.ar_special_tokens)["input_ids"] if texts else []
        if (longest := max(map(len, rows), default=0)) > self.MAX_TOKENS:
            raise InbriefError(
                f"An AR prompt must not exceed {self.MAX_TOKENS} tokens; one has {longest}. Shorten the explanation."
            )
        return rows

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token rows -> predictions [n, d] in float32, read at each row's last token."""
        device = self.head.weight.device
        hidden = self.backbone(input_ids=pad_right(rows).to(device), use_cache=False).last_hidden_state
        last = torch.tensor([len(r) - 1 for r in rows], device=device)
        read = hidden[torch.arange(len(rows), device=device), last].float()
        read = read * (read.shape[-1] ** 0.5 / read.norm(dim=-1, keepdim=True).clamp_min(1e-6))
        return self.head(read.to(self.head.weight.dtype)).float()

    @torch.no_grad()
    def predict(self, explanations: Sequence[str], max_tokens: int = 16384) -> Tensor:
        """Predictions [n, d] float32 on the CPU, in the order given."""
        rows = self.prompts(explanations)
        out = torch.empty(len(rows), self.contract.d_model)
        for batch in length_batches([len(r) for r in rows], max_tokens):
            out[batch] = self([rows[i] for i in batch]).cpu()
        return out

    def errors(self, vectors: Tensor, explanations: Sequence[str | None]) -> Tensor:
        """mse of directions [n] float32 between vectors [n, d] and what is made of the explanations: 2(1 − cos). None stands
        for a failed answer: it never reaches the AR and has the error of an orthogonal guess."""
        out = torch.full((len(explanations),), FAILED_MSE)
        good = [i for i, e in enumerate(explanations) if e is not None]
        if good:
            out[good] = direction_mse(self.predict([explanations[i] or "" for i in good]), vectors[good])
        return out
