"""The hook-based importance against autograd's dense gradient."""

from __future__ import annotations

import pytest
import torch

from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.planning import combine, scoring
from tests.tiny import random_batches, tiny_model


def dense_scores(name: str, batches: int) -> dict[str, float]:
    """The formula, on the unsplit model, with gradients that autograd keeps."""
    model, total = tiny_model(name), dict[str, float]()
    client, server = split_model(model, 1)
    layers = [layer for part in (client, server) for layer, _ in part.linears()]
    weights = [model.get_submodule(layer).weight for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    for batch, _ in zip(random_batches(), range(batches), strict=False):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        for layer, weight, gradient in zip(layers, weights, torch.autograd.grad(loss, weights), strict=True):
            total[layer] = total.get(layer, 0) + float((weight * gradient).detach().abs().sum()) / sum(weight.shape)
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("split", [1, 3])
def test_both_sides_score_what_they_hold(name: str, split: int) -> None:
    client, server = split_model(tiny_model(name), split)
    with scoring(client) as below, scoring(server) as above:
        for batch, _ in zip(random_batches(), range(2), strict=False):
            cut = client(batch.input_ids, batch.attention_mask)
            received = cut.detach().requires_grad_()
            server(received, batch.attention_mask, batch.labels).loss.backward()
            cut.backward(received.grad)
    expected = dense_scores(name, 2)
    assert not below.keys() & above.keys()
    assert {**below, **above} == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for part in (client, server) for p in part.parameters()), "no gradient may be kept"


def test_scoring_leaves_no_trace() -> None:
    client, _ = split_model(tiny_model("llama"), 2)
    batch = next(random_batches())
    with scoring(client):
        assert client(batch.input_ids, batch.attention_mask).requires_grad
    assert not client(batch.input_ids, batch.attention_mask).requires_grad


def test_global_importance_is_the_weighted_mean_normalised_to_one() -> None:
    importance = combine([(0.25, {"a": 4.0, "b": 0.0}), (0.75, {"a": 0.0, "b": 4.0})])
    assert importance == pytest.approx({"a": 0.25, "b": 0.75})
    assert combine([(1.0, {"a": 0.0, "b": 0.0})]) == {"a": 0.5, "b": 0.5}
