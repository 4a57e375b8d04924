"""The hook-based importance against autograd's dense gradient of the unsplit model, and its life over rounds."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.data.collate import Batch
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.layers import AdaptedLinear, attach_changes, merge_changes, shape_of
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.models.parts import ClientModel, ServerModel
from hsplitlora_flwr.planning import importance as importance_module
from hsplitlora_flwr.planning.importance import (
    ROWS,
    combine,
    complete,
    drift,
    gradient_weight_product,
    scoring,
    smooth,
)
from tests.tiny import BLOCKS, CONFIGS, quantised_twins, random_batches, tiny_model

Matrices = Mapping[str, Tensor]


def some_batches(number: int = 2) -> list[Batch]:
    return list(itertools.islice(random_batches(), number))


def split_scores(client: ClientModel, server: ServerModel, batches: list[Batch], micro: int = 4) -> dict[str, float]:
    """Both sides' scores over the backward passes of ``batches``, in micro-batches of so many rows."""
    with scoring(client) as below, scoring(server) as above:
        for batch in batches:
            for part in batch.micro_batches(micro):
                cut = client(part.input_ids, part.attention_mask)
                received = cut.detach().requires_grad_()
                server(received, part.attention_mask, part.labels, batch.label_tokens).loss.backward()
                cut.backward(received.grad)
    assert not below.keys() & above.keys()
    return {**below, **above}


def dense_scores(
    model: PreTrainedModel, batches: list[Batch], updates: Matrices | None = None, adapters: Matrices | None = None
) -> dict[str, float]:
    """The formula on the unsplit model, whose weights are ``W + update + adapter``; autograd keeps every gradient.

    Updates and adapters are ``(out, in)``. A tensor of Conv1D lies the other way round.
    """

    def stored(matrices: Matrices | None, name: str) -> Tensor | float:
        if not matrices or name not in matrices:
            return 0.0
        return matrices[name].double().T if isinstance(model.get_submodule(name), Conv1D) else matrices[name].double()

    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name)
    ]
    effective = {name: model.get_parameter(f"{name}.weight").detach() + stored(updates, name) for name in names}
    used = {f"{name}.weight": (w + stored(adapters, name)).requires_grad_() for name, w in effective.items()}
    total = dict.fromkeys(names, 0.0)
    for batch in batches:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        logits = torch.func.functional_call(model, used, (), inputs).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        for name, gradient in zip(names, torch.autograd.grad(loss, list(used.values())), strict=True):
            total[name] += float((effective[name] * gradient).abs().sum())
    return total


def random_changes(parts: tuple[ClientModel, ServerModel]) -> dict[str, Change]:
    """Updates as large as the weights: factors on every second layer, matrices on the others."""
    generator, changes = torch.Generator().manual_seed(0), dict[str, Change]()
    layers = [*parts[0].linears(), *parts[1].linears()]
    for index, (name, linear) in enumerate(layers):
        rows, columns = shape_of(linear)
        b, a = (0.1 * torch.randn(*shape, generator=generator) for shape in ((rows, 3), (3, columns)))
        changes[name] = Change(factors=(b, a)) if index % 2 else Change(matrix=b @ a)
    return changes


def inject_random(part: ClientModel | ServerModel, rank: int = 3) -> None:
    """Adapters, with a B that is not zero, on all layers but every third."""
    specs = {name: AdapterSpec(rank, 5.0) for index, (name, _) in enumerate(part.linears()) if index % 3}
    for parameter in inject(part, specs, "seed"):
        if not parameter.any():
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(parameter)))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_sides_score_what_they_hold(name: str) -> None:
    expected = dense_scores(tiny_model(name), some_batches())
    for split in range(1, BLOCKS):
        client, server = split_model(tiny_model(name), split)
        assert split_scores(client, server, some_batches()) == pytest.approx(expected, rel=1e-5)
        parameters = (p for part in (client, server) for p in part.parameters())
        assert all(p.grad is None for p in parameters), "no gradient may be kept"


@pytest.mark.parametrize(("name", "quantise"), [("llama", "8bit"), ("gpt2", "4bit")])
def test_scores_of_a_quantised_base_are_those_of_its_dequantised_weights(
    name: str, quantise: str, tmp_path: Path
) -> None:
    model, plain = quantised_twins(name, quantise, tmp_path)
    parts = split_model(model, 2)
    changes = random_changes(parts)
    for part in parts:
        attach_changes(part, changes)
    expected = dense_scores(plain, some_batches(), {layer: change.dense() for layer, change in changes.items()})
    assert split_scores(*parts, some_batches()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", ["none", "merged", "attached"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_and_updates_take_part(name: str, update: str) -> None:
    for split in (1, 3):
        model = tiny_model(name)
        parts = split_model(model, split)
        changes = random_changes(parts) if update != "none" else {}
        for part in parts:
            if update == "merged":
                originals = {layer: model.get_parameter(f"{layer}.weight").clone() for layer, _ in part.linears()}
                merge_changes(part, changes, originals.__getitem__)
            elif update == "attached":
                attach_changes(part, changes)
            inject_random(part)
        adapters = {layer: b @ a for part in parts for layer, (b, a) in extract(part).items()}
        assert adapters
        updates = {layer: change.dense() for layer, change in changes.items()} if update == "attached" else None
        expected = dense_scores(model, some_batches(), updates, adapters)
        assert split_scores(*parts, some_batches()) == pytest.approx(expected, rel=1e-5)


def test_a_low_precision_base_scores_the_updated_weight() -> None:
    """The update lies beside a bf16 base, and counts as much as one that is merged into an fp32 base."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    parts = split_model(model, 2)
    changes = random_changes(parts)
    for part in parts:
        attach_changes(part, changes)
    got = split_scores(*parts, some_batches())
    wide = tiny_model("llama", dtype=torch.bfloat16).double()
    updates = {name: change.dense() for name, change in changes.items()}
    assert got == pytest.approx(dense_scores(wide, some_batches(), updates), rel=0.05)
    assert got != pytest.approx(dense_scores(wide, some_batches()), rel=0.05)


def test_micro_batches_score_the_sum_of_their_parts() -> None:
    """Micro-batches score their own share of the batch's gradient, which is more than the batch itself scores."""
    (batch,) = some_batches(1)
    client, server = split_model(tiny_model("llama"), 2)
    got = split_scores(client, server, [batch], micro=2)
    expected = dict.fromkeys(got, 0.0)
    for part in batch.micro_batches(2):
        for name, score in dense_scores(tiny_model("llama"), [part]).items():
            expected[name] += score * part.label_tokens / batch.label_tokens
    assert got == pytest.approx(expected, rel=1e-5)
    whole = split_scores(client, server, [batch])
    assert all(got[name] > whole[name] for name in whole)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("wrapped", [False, True])
def test_rows_of_the_gradient_add_up(kind: type, wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance_module, "ROWS", 7)
    linear = (Conv1D(20, 12) if kind is Conv1D else nn.Linear(12, 20)).requires_grad_(False)
    weight = linear.weight.T if kind is Conv1D else linear.weight
    x, g = torch.randn(3, 5, 12), torch.randn(3, 5, 20)
    expected = (weight.double() * torch.einsum("bti,btj->ij", g.double(), x.double())).abs().sum()
    got = gradient_weight_product(AdaptedLinear(linear) if wrapped else linear, x, g)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_memory_of_a_score_stays_below_one_weight_matrix() -> None:
    linear, x, g = nn.Linear(512, 4096), torch.randn(8, 512), torch.randn(8, 4096)
    linear.requires_grad_(False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradient_weight_product(linear, x, g)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    peak = max(itertools.accumulate(sizes))
    assert ROWS * 512 * 4 <= peak < 0.26 * linear.weight.nbytes


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


def test_a_weight_that_nobody_scored_counts_as_the_mean() -> None:
    known = {"b": 0.25, "c": 0.75}
    assert complete(known, ["a", "b", "c"]) == pytest.approx({"a": 0.5 / 1.5, "b": 0.25 / 1.5, "c": 0.75 / 1.5})
    assert complete(known, ["b", "c"]) == known


def test_smoothing_by_hand() -> None:
    """J(2) of 5, with J(1) = (0.5, 0.5) and I(2) = (0.75, 0.25), and of a weight that has no past."""
    g = {"a": 1 - math.exp(-0.75 * 2 / (0.5 * 5)), "b": 1 - math.exp(-0.25 * 2 / (0.5 * 5))}
    raw = {"a": g["a"] * 0.5 + (1 - g["a"]) * 0.75, "b": g["b"] * 0.5 + (1 - g["b"]) * 0.25}
    expected = {name: value / sum(raw.values()) for name, value in raw.items()}
    assert smooth({"a": 3.0, "b": 3.0}, {"a": 30.0, "b": 10.0}, 2, 5) == pytest.approx(expected, rel=1e-12)


def test_weights_without_a_past_start_as_measured() -> None:
    past, present = {"zero": 0.0, "a": 1.0}, {"zero": 0.25, "a": 0.5, "new": 0.25}
    g = 1 - math.exp(-0.5 * 3 / 4)
    raw = {"zero": 0.25, "a": g + (1 - g) * 0.5, "new": 0.25}
    expected = {name: value / sum(raw.values()) for name, value in raw.items()}
    assert smooth(past, present, 3, 4) == pytest.approx(expected, rel=1e-12)


def test_a_weight_that_was_not_measured_keeps_its_past() -> None:
    got = smooth({"a": 0.5, "b": 0.5}, {"a": 2.0}, 0, 9)
    assert got == pytest.approx({"a": 2 / 3, "b": 1 / 3})  # 1 and 0.5, normalised


numbers = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(numbers, st.integers(0, 50), st.integers(1, 50))
def test_what_rests_stays_and_the_first_measurement_counts_whole(values: list[float], t: int, rounds: int) -> None:
    measured = {str(index): value for index, value in enumerate(values)}
    resting = {name: value / sum(values) for name, value in measured.items()}
    assert smooth(resting, measured, t, rounds) == pytest.approx(resting)
    other = dict.fromkeys(measured, 1.0)
    assert smooth(other, measured, 0, rounds) == pytest.approx(resting)
    assert sum(smooth(other, measured, t, rounds).values()) == pytest.approx(1)


@given(numbers, numbers, numbers)
def test_drift_is_a_distance(first: list[float], second: list[float], third: list[float]) -> None:
    a, b, c = ({str(index): value for index, value in enumerate(values)} for values in (first, second, third))
    assert drift(a, b) == pytest.approx(drift(b, a))
    assert -1e-12 <= drift(a, c) <= drift(a, b) + drift(b, c) + 1e-12
    assert drift(a, {name: 7 * value for name, value in a.items()}) == pytest.approx(0)


def test_drift_by_hand() -> None:
    assert drift({"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 1.0}) == pytest.approx(0.25)
    assert drift({"a": 1.0, "b": 1.0}, {"a": 5.0}) == pytest.approx(0.5)
    assert drift({"a": 1.0}, {"b": 1.0}) == 1.0


@pytest.mark.parametrize(
    "use",
    [
        lambda bad: combine([(1.0, bad)]),
        lambda bad: smooth({"a": 1.0}, bad, 1, 2),
        lambda bad: drift({"a": 1.0}, bad),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_probe_is_refused(use: Callable[[dict[str, float]], object], value: float) -> None:
    with pytest.raises(ValueError, match=f"the importance of b is {value}: .* lower train.lr"):
        use({"a": 1.0, "b": value})


@pytest.mark.parametrize(("t", "rounds"), [(-1, 2), (1, 0)])
def test_smoothing_out_of_range(t: int, rounds: int) -> None:
    with pytest.raises(ValueError, match=rf"t={t}, rounds={rounds}"):
        smooth({"a": 1.0}, {"a": 1.0}, t, rounds)
