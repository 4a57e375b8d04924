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
from hsplitlora_flwr.lora.delta import Change
from hsplitlora_flwr.lora.layers import AdaptedLinear, attach_changes, merge_changes, shape_of
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.models.split import ClientModel, ServerModel
from hsplitlora_flwr.planning.importance import (
    ROWS,
    combine,
    drift,
    gradient_weight_product,
    scoring,
    smooth,
    unit_cost,
)
from tests.flops import flop_counter
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
            total[name] += float((effective[name] * gradient).abs().sum()) / sum(effective[name].shape)
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
    monkeypatch.setattr("hsplitlora_flwr.planning.importance.ROWS", 7)
    linear = (Conv1D(20, 12) if kind is Conv1D else nn.Linear(12, 20)).requires_grad_(False)
    weight = linear.weight.T if kind is Conv1D else linear.weight
    x, g = torch.randn(3, 5, 12), torch.randn(3, 5, 20)
    expected = (weight.double() * torch.einsum("bti,btj->ij", g.double(), x.double())).abs().sum()
    got = gradient_weight_product(AdaptedLinear(linear) if wrapped else linear, x, g)
    assert got == pytest.approx(float(expected), rel=1e-5)


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


def test_scores_are_divided_by_the_unit_cost() -> None:
    client, server = split_model(tiny_model("opt"), 2)
    batch, got = next(random_batches()), dict[str, dict[str, float]]()
    for resource in ("parameters", "flops"):
        with scoring(client, resource, rank=4) as below, scoring(server, resource, rank=4) as above:
            cut = client(batch.input_ids, batch.attention_mask)
            received = cut.detach().requires_grad_()
            server(received, batch.attention_mask, batch.labels).loss.backward()
            cut.backward(received.grad)
        costs = unit_cost(client, resource, 4) | unit_cost(server, resource, 4)
        got[resource] = {name: score * costs[name] for name, score in {**below, **above}.items()}
        assert len(costs) == len(got[resource]) == 6 * BLOCKS
    assert got["flops"] == pytest.approx(got["parameters"])


def test_unit_cost_in_parameters_is_that_of_an_adapter() -> None:
    for name in ("llama-tied-grouped", "gpt2"):
        client, _ = split_model(tiny_model(name), 2)
        costs = unit_cost(client)
        inject(client, {layer: AdapterSpec(1, 1.0) for layer, _ in client.linears()}, "seed")
        assert costs == {layer: b.numel() + a.numel() for layer, (b, a) in extract(client).items()}
        assert unit_cost(client) == costs


def linear_flops(part: ClientModel | ServerModel, *inputs: Tensor) -> int:
    """FLOPs of the matrix products of linear layers in a forward and backward pass."""
    with flop_counter() as counter:
        output = part(*inputs)
        loss = output.loss if isinstance(part, ServerModel) else output.sum()
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_
    return sum(flops for op, flops in counts.items() if op in products)


def test_flops_of_adapters_and_of_the_way_down_to_them() -> None:
    """What FLOPs are made of, counted on real passes with adapters on different layers."""
    model, batch = tiny_model("llama"), next(random_batches())
    tokens, down = batch.input_ids.numel(), "model.layers.{}.mlp.down_proj"

    def counted(*names: str) -> float:
        client, _ = split_model(model, 3)
        inject(client, {name: AdapterSpec(1, 1.0) for name in names}, "seed")
        return linear_flops(client, batch.input_ids, batch.attention_mask) / tokens

    client, _ = split_model(model, 3)
    own = {name: 6.0 * cost for name, cost in unit_cost(client).items()}
    backward = 2 * sum(math.prod(shape_of(linear)) for _, linear in client.linears()) / 3  # blocks are alike
    lowest, upper = down.format(0), "model.layers.2.self_attn.o_proj"
    assert counted(lowest, upper) - counted(lowest) == own[upper]
    assert counted(lowest) - counted(down.format(2)) == 2 * backward
    # alone, the lowest block pays for the way through the two others; together, the blocks below share it
    costs = unit_cost(client, "flops", 1)
    assert costs[lowest] - own[lowest] == pytest.approx(backward / 7 + backward / 14)
    assert costs[down.format(1)] - own[lowest] == pytest.approx(backward / 14)
    assert costs[upper] == own[upper]


def test_the_server_reaches_the_cut_in_any_case() -> None:
    model, batch = tiny_model("llama"), next(random_batches())
    cut = torch.randn(4, 11, 32, dtype=torch.float64)
    counts = []
    for name in ("model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"):
        _, server = split_model(model, 1)
        inject(server, {name: AdapterSpec(1, 1.0)}, "seed")
        given = cut.clone().requires_grad_()
        counts.append(linear_flops(server, given, batch.attention_mask, batch.labels))
    assert counts[0] == counts[1]
    _, server = split_model(model, 1)
    parameters = unit_cost(server)
    assert unit_cost(server, "flops") == {name: 6 * cost for name, cost in parameters.items()}


@pytest.mark.parametrize("rank", [1, 2])
def test_flops_of_the_backward_pass_are_shapley_values(rank: int) -> None:
    """Against the definition of the Shapley value, summed over all coalitions of units of rank."""
    split = {1: 3, 2: 2}[rank]
    client, _ = split_model(tiny_model("gpt2"), split)  # four weights a block
    names = [name for name, _ in client.linears()]
    block = {name: int(name.split(".")[2]) for name in names}
    backward = 2 * sum(math.prod(shape_of(linear)) for _, linear in client.linears()) / split  # blocks are alike
    units = [name for name in names for _ in range(rank)]

    def worth(coalition: tuple[str, ...]) -> float:
        lowest = min((block[name] for name in coalition), default=split - 1)
        return (split - 1 - lowest) * backward

    weights = [math.factorial(k) * math.factorial(len(units) - k - 1) for k in range(len(units))]
    costs, own = unit_cost(client, "flops", rank), unit_cost(client)
    for player in sorted(set(block.values())):
        index = next(i for i, name in enumerate(units) if block[name] == player)
        others = units[:index] + units[index + 1 :]
        value = sum(
            weights[size] * (worth((*coalition, units[index])) - worth(coalition))
            for size in range(len(units))
            for coalition in itertools.combinations(others, size)
        ) / math.factorial(len(units))
        assert costs[units[index]] - 6 * own[units[index]] == pytest.approx(value)


def test_wrong_arguments_of_unit_cost() -> None:
    client, _ = split_model(tiny_model("llama"), 1)
    with pytest.raises(ValueError, match="resource='time' is not known; choose 'parameters' or 'flops'"):
        unit_cost(client, "time")
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        unit_cost(client, "flops", 0)


def test_global_importance_is_the_weighted_mean_normalised_to_one() -> None:
    importance = combine([(0.25, {"a": 4.0, "b": 0.0}), (0.75, {"a": 0.0, "b": 4.0})])
    assert importance == pytest.approx({"a": 0.25, "b": 0.75})
    assert combine([(1.0, {"a": 0.0, "b": 0.0})]) == {"a": 0.5, "b": 0.5}


def test_smoothing_by_hand() -> None:
    """J(2) = 0.75 * 2/4 * exp(-|I - J| / J) J + ..., with J = (0.5, 0.5) and I = (0.75, 0.25)."""
    beta = 0.375 * math.exp(-0.5)
    expected = {"a": beta * 0.5 + (1 - beta) * 0.75, "b": beta * 0.5 + (1 - beta) * 0.25}
    got = smooth({"a": 3.0, "b": 3.0}, {"a": 30.0, "b": 10.0}, 2, 0.75, 2.0)
    assert got == pytest.approx(expected, rel=1e-12)


def test_each_weight_has_its_own_balance() -> None:
    """A weight whose importance jumps forgets its past; one that hardly moves keeps it."""
    past, present = {"jumps": 0.02, "rests": 0.98}, {"jumps": 0.2, "rests": 0.8}
    betas = {name: 0.9 * 0.5 * math.exp(-abs(present[name] - past[name]) / past[name]) for name in past}
    raw = {name: betas[name] * past[name] + (1 - betas[name]) * present[name] for name in past}
    expected = {name: value / sum(raw.values()) for name, value in raw.items()}
    assert betas["jumps"] < 1e-4 < 0.3 < betas["rests"]
    assert smooth(past, present, 2, 0.9, 2.0) == pytest.approx(expected, rel=1e-12)


def test_weights_without_a_past_start_as_measured() -> None:
    past, present = {"zero": 0.0, "a": 1.0}, {"zero": 0.25, "a": 0.5, "new": 0.25}
    beta = 0.45 * math.exp(-0.5)
    raw = {"zero": 0.25, "a": beta + (1 - beta) * 0.5, "new": 0.25}
    expected = {name: value / sum(raw.values()) for name, value in raw.items()}
    assert smooth(past, present, 2, 0.9, 2.0) == pytest.approx(expected, rel=1e-12)


def test_a_weight_that_was_not_measured_keeps_its_past() -> None:
    got = smooth({"a": 0.5, "b": 0.5}, {"a": 2.0}, 0, 0.9, 2.0)
    assert got == pytest.approx({"a": 2 / 3, "b": 1 / 3})  # 1 and 0.5, normalised


numbers = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(numbers, st.integers(0, 50), st.floats(0, 0.99), st.floats(0.1, 10))
def test_what_rests_stays_and_the_first_measurement_counts_whole(
    values: list[float], t: int, beta_max: float, half_time: float
) -> None:
    measured = {str(index): value for index, value in enumerate(values)}
    resting = {name: value / sum(values) for name, value in measured.items()}
    assert smooth(resting, measured, t, beta_max, half_time) == pytest.approx(resting)
    other = dict.fromkeys(measured, 1.0)
    assert smooth(other, measured, 0, beta_max, half_time) == pytest.approx(resting)
    assert sum(smooth(other, measured, t, beta_max, half_time).values()) == pytest.approx(1)


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
        lambda bad: smooth({"a": 1.0}, bad, 1, 0.9, 2.0),
        lambda bad: drift({"a": 1.0}, bad),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_probe_is_refused(use: Callable[[dict[str, float]], object], value: float) -> None:
    with pytest.raises(ValueError, match=f"the importance of b is {value}: .* lower train.lr"):
        use({"a": 1.0, "b": value})


@pytest.mark.parametrize(("t", "beta_max", "half_time"), [(-1, 0.9, 2.0), (1, 1.0, 2.0), (1, -0.1, 2.0), (1, 0.9, 0.0)])
def test_smoothing_out_of_range(t: int, beta_max: float, half_time: float) -> None:
    with pytest.raises(ValueError, match=rf"t={t}, beta_max={beta_max}, half_time={half_time}"):
        smooth({"a": 1.0}, {"a": 1.0}, t, beta_max, half_time)
