"""Perplexity of held-out text under the global model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.models.split import WholeModel


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
def evaluate(model: WholeModel, batches: Iterable[Batch]) -> Evaluation:
    """Evaluate a whole model, in evaluation mode."""
    model.eval()
    device, threads = next(model.parameters()).device, torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # no client trains now
    nll, tokens = 0.0, 0
    for batch in batches:
        output = model(batch.input_ids.to(device), batch.attention_mask.to(device), batch.labels.to(device), 1)
        nll += float(output.loss)
        tokens += output.tokens
    torch.set_num_threads(threads)
    return Evaluation(nll, tokens)
