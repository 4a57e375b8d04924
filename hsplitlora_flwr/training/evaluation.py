"""Perplexity of held-out text under the global model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.models.split import ClientModel, ServerModel


@dataclass(frozen=True)
class Evaluation:
    """Summed negative log-likelihood in nats, and the number of labelled tokens that it is summed over."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean per token, pooled over all text (not a mean of batches' perplexities)."""
        return math.exp(self.nll / self.tokens)


@torch.no_grad()
def evaluate(client: ClientModel, server: ServerModel, batches: Iterable[Batch]) -> Evaluation:
    """Evaluate both parts in evaluation mode, one after another, on the same machine."""
    client.eval(), server.eval()
    torch.set_num_threads(os.cpu_count() or 1)
    device = next(client.parameters()).device
    nll, tokens = 0.0, 0
    for batch in batches:
        mask = batch.attention_mask.to(device)
        output = server(client(batch.input_ids.to(device), mask), mask, batch.labels.to(device), normalizer=1)
        nll += float(output.loss)
        tokens += output.tokens
    return Evaluation(nll, tokens)
