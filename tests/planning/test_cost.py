"""The cost model, which sees shapes alone, against tensors that autograd really keeps."""

from __future__ import annotations

import pytest
import torch

from hsplitlora_flwr.lora import AdapterSpec, inject
from hsplitlora_flwr.models import find_family, split_model
from hsplitlora_flwr.models.split import client_part
from hsplitlora_flwr.planning import CostModel, PlanError, Workload
from hsplitlora_flwr.planning.cost import ADAPTER_BYTES
from tests.tiny import CONFIGS, tiny_model

ROWS, LENGTH = 4, 24


def cost_of(name: str, targets: tuple[str, ...] | None = None, dtype: str = "float32") -> CostModel:
    config = tiny_model(name).config
    return CostModel(config, find_family(config), Workload(ROWS, LENGTH, dtype), targets)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_every_split(name: str) -> None:
    cost, model = cost_of(name), tiny_model(name, dtype=torch.float32)
    assert cost.total_parameters == sum(p.numel() for p in model.parameters())
    for split in range(1, cost.num_blocks):
        assert (
            cost.client_parameters(split) == client_part(model, find_family(model.config), split).resident_parameters()
        )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("rank", "dtype"), [(0, "float32"), (8, "float32"), (8, "bfloat16")])
def test_kept_activations_are_what_autograd_keeps(name: str, rank: int, dtype: str) -> None:
    cost, model = cost_of(name, dtype=dtype), tiny_model(name, dtype=getattr(torch, dtype))
    client, _ = split_model(model, 3)
    ranks = {layer.name: rank for layer in cost.layers if rank and 1 <= layer.block < 3}
    inject(client.train(), {layer: AdapterSpec(r, 2.0 * r) for layer, r in ranks.items()}, "s")
    given = {p.untyped_storage().data_ptr() for p in client.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    input_ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask = torch.ones_like(input_ids)
    mask[0, 20:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        client(input_ids, mask)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    predicted = cost.kept_bytes(ranks, 0, 3)
    if rank == 0:
        assert measured == predicted == 0, "without an adapter nothing is kept"
    else:
        # Within a fifth at these tiny sizes, where the mask and the rotary tables weigh as much as an activation.
        assert predicted == pytest.approx(measured, rel=0.2)


def test_adapters_cost_parameter_gradient_and_two_moments() -> None:
    cost = cost_of("llama")
    layer = cost.layers[0]
    assert cost.adapter_bytes({layer.name: 4}, 0, 4) == 4 * (32 + 32) * ADAPTER_BYTES
    assert cost.adapter_bytes({layer.name: 4}, 1, 4) == 0
    assert cost.adapter_parameters({layer.name: 4}) == 256


def test_more_blocks_higher_ranks_and_longer_text_cost_more() -> None:
    cost = cost_of("qwen3")
    ranks = {layer.name: 4 for layer in cost.layers}
    sizes = [cost.client_bytes(split, ranks) for split in range(1, cost.num_blocks)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    assert cost.client_bytes(2, dict.fromkeys(ranks, 8)) > cost.client_bytes(2, ranks)
    config = tiny_model("qwen3").config
    longer = CostModel(config, find_family(config), Workload(ROWS, 2 * LENGTH))
    assert longer.client_bytes(2, ranks) > cost.client_bytes(2, ranks)


def test_unknown_target() -> None:
    with pytest.raises(PlanError, match=r"query.*blocks of this model have.*q_proj"):
        cost_of("llama", ("q_proj", "query"))
    assert {layer.name.rpartition(".")[2] for layer in cost_of("llama", ("q_proj",)).layers} == {"q_proj"}
