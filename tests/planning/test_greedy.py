"""What a unit of rank costs, which the greedy rule divides by, against real passes and the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.layers import shape_of
from hsplitlora_flwr.models import find_family, split_model
from hsplitlora_flwr.models.parts import ClientModel, ServerModel
from hsplitlora_flwr.planning.cost import CostModel, Layer, Workload
from hsplitlora_flwr.planning.greedy import unit_cost
from tests.flops import flop_counter
from tests.tiny import random_batches, tiny_model


def layers_of(name: str, first: int = 0, last: int = 4) -> list[Layer]:
    """All linear layers of blocks ``first .. last - 1``."""
    config = tiny_model(name).config
    layers = CostModel(config, find_family(config), Workload(1, 2)).all_layers
    return [layer for layer in layers if first <= layer.block < last]


def test_unit_cost_in_parameters_is_that_of_an_adapter() -> None:
    for name in ("llama-tied-grouped", "gpt2"):
        client, _ = split_model(tiny_model(name), 2)
        inject(client, {layer: AdapterSpec(1, 1.0) for layer, _ in client.linears()}, "seed")
        adapters = {layer: b.numel() + a.numel() for layer, (b, a) in extract(client).items()}
        assert unit_cost(layers_of(name, last=2)) == adapters


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
    own = {name: 6.0 * cost for name, cost in unit_cost(layers_of("llama", last=3)).items()}
    backward = 2 * sum(math.prod(shape_of(linear)) for _, linear in client.linears()) / 3  # blocks are alike
    lowest, upper = down.format(0), "model.layers.2.self_attn.o_proj"
    assert counted(lowest, upper) - counted(lowest) == own[upper]
    assert counted(lowest) - counted(down.format(2)) == 2 * backward
    # alone, the lowest block pays for the way through the two others; together, the blocks below share it
    costs = unit_cost(layers_of("llama", last=3), "flops", 1)
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
    layers = layers_of("llama", first=1)
    parameters = unit_cost(layers)
    assert unit_cost(layers, "flops", server=True) == {name: 6 * cost for name, cost in parameters.items()}


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
    layers = layers_of("gpt2", last=split)
    costs, own = unit_cost(layers, "flops", rank), unit_cost(layers)
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
    with pytest.raises(ValueError, match="resource='time' is not known; choose 'parameters' or 'flops'"):
        unit_cost(layers_of("llama"), "time")
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        unit_cost(layers_of("llama"), "flops", 0)
