"""The cost model, which sees shapes alone, against tensors that really live and operations that are really done."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from hsplitlora_flwr.config import TrainConfig
from hsplitlora_flwr.lora import AdapterSpec, inject
from hsplitlora_flwr.models import find_family, split_model
from hsplitlora_flwr.models.split import ModelPart, client_part, whole_model
from hsplitlora_flwr.planning import CostModel, PlanError, Workload
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.transport.frames import Activation, Gradient, encode
from tests.tiny import CONFIGS, tiny_model

ROWS, LENGTH = 4, 24
IDS = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 90 + 3
MASK = torch.ones_like(IDS)
MASK[0, 20:] = 0


@cache
def cost_of(name: str, targets: tuple[str, ...] | None = None, dtype: str = "float32") -> CostModel:
    config = tiny_model(name).config
    return CostModel(config, find_family(config), Workload(ROWS, LENGTH, dtype), targets)


def adapt(part: ModelPart, ranks: dict[str, int]) -> int:
    """Inject adapters; returns the bytes of their parameters on this part."""
    parameters = inject(part.train(), {layer: AdapterSpec(r, 2.0 * r) for layer, r in ranks.items()}, "s")
    return sum(parameter.nbytes for parameter in parameters)


def allocated_peak(step: Callable[[], None]) -> int:
    """Most bytes that the allocator had handed out at one time during a step, counted by torch's own profiler."""
    step()  # what is made once is not of a step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    changes: list[tuple[int, int]] = []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


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
    adapt(client, ranks)
    given = {p.untyped_storage().data_ptr() for p in client.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        client(IDS, MASK)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    predicted = cost.kept_bytes(ranks, 0, 3)
    if rank == 0:
        assert measured == predicted == 0, "without an adapter nothing is kept"
    else:
        # At these tiny sizes the mask and the rotary tables, which all blocks share, weigh as much as an activation.
        assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_client_step_takes_what_is_predicted(name: str, dtype: str) -> None:
    cost, model = cost_of(name, dtype=dtype), tiny_model(name, dtype=getattr(torch, dtype))
    client, _ = split_model(model, 3)
    ranks = {layer.name: 8 for layer in cost.layers if layer.block < 3}
    adapters = adapt(client, ranks)

    def step() -> None:  # gradients of adapters accumulate, so they are there before
        cut = client(IDS, MASK)
        cut.backward(torch.ones_like(cut))

    parts = cost.memory_parts(3, ranks, updated=False)
    assert parts["adapters"] == 4 * adapters
    assert parts["activations"] + parts["temporary"] == pytest.approx(allocated_peak(step), rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_server_step_takes_what_is_predicted(name: str) -> None:
    cost, model = cost_of(name), tiny_model(name, dtype=torch.float32)
    client, server = split_model(model, 2)
    ranks = {layer.name: 8 for layer in cost.layers}
    adapters = adapt(server, ranks)
    cut = client(IDS, MASK).detach()

    def step() -> None:
        server(cut.clone().requires_grad_(), MASK, IDS).loss.backward()

    predicted = cost.server_share(2, ranks) - 4 * adapters
    assert predicted == pytest.approx(allocated_peak(step), rel=0.08)


@pytest.mark.parametrize("name", ["llama-tied-grouped", "gpt2"])
def test_unsplit_step_takes_what_is_predicted(name: str) -> None:
    cost, model = cost_of(name), tiny_model(name, dtype=torch.float32)
    whole = whole_model(model, find_family(model.config))
    ranks = {layer.name: 8 for layer in cost.layers}
    adapters = adapt(whole, ranks)
    predicted = cost.whole_bytes(ranks, updated=False) - cost.total_parameters * 4 - 4 * adapters

    def step() -> None:
        whole(IDS, MASK, IDS).loss.backward()

    assert predicted == pytest.approx(allocated_peak(step), rel=0.1)


@pytest.mark.parametrize("name", ["llama-tied-grouped", "gpt2", "gemma2"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    cost, model = cost_of(name), tiny_model(name, dtype=torch.float32)
    family = find_family(model.config)
    model.set_attn_implementation("eager")  # whose products are counted one by one
    ranks = {layer.name: 8 for layer in cost.layers if layer.block >= 1}
    client, server = split_model(model, 3)
    adapt(client, ranks), adapt(server, ranks)
    cut = client(IDS, MASK)
    gradient = torch.ones_like(cut)
    leaf = cut.detach().requires_grad_()

    def counted(step: Callable[[], torch.Tensor]) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            step()
        return counter.get_total_flops()

    below = counted(lambda: client(IDS, MASK).backward(gradient))
    # Nothing below the lowest adapter asks the first adapted layers for the gradient of their input.
    assert below <= cost.client_flops(3, ranks) < 1.1 * below
    above = counted(lambda: server(leaf, MASK, IDS).loss.backward())
    assert above <= cost.server_flops(3, ranks) < 1.05 * above, "every position but the last of a row has a label"
    forward = counted(lambda: client(IDS, MASK))
    assert cost.client_flops(3, {}) < forward < cost.client_flops(3, ranks)
    whole = whole_model(model, family)
    adapt(whole, ranks)
    both = counted(lambda: whole(IDS, MASK, IDS).loss.backward())
    assert both <= cost.whole_flops(ranks) < 1.1 * both


def test_bytes_on_the_wire_are_those_of_the_frames() -> None:
    up, down = cost_of("llama").wire_bytes()
    cut = torch.zeros(ROWS, LENGTH, 32)
    sent = encode(Activation(0, cut, MASK, IDS, 1, True, 0.0))
    assert up == cut.nbytes + MASK.nbytes + IDS.nbytes == pytest.approx(len(sent), abs=512)
    assert down == cut.nbytes == pytest.approx(len(encode(Gradient(cut, 0.0, 0.0))), abs=512)
    assert cost_of("llama", dtype="bfloat16").wire_bytes() == (up, down)
    assert cost_of("llama").wire_bytes(item_bytes=2) == (up - down / 2, down / 2)


@pytest.mark.parametrize(("optimizer", "momentum", "size"), [("adamw", 0.0, 16), ("sgd", 0.0, 8), ("sgd", 0.9, 12)])
def test_adapters_cost_parameter_gradient_and_optimizer_states(optimizer: str, momentum: float, size: int) -> None:
    config = tiny_model("llama").config
    workload = Workload(ROWS, LENGTH, optimizer=optimizer, momentum=bool(momentum))
    cost = CostModel(config, find_family(config), workload)
    layer = cost.layers[0]
    assert cost.adapter_bytes({layer.name: 4}, 0, 4) == 4 * (32 + 32) * size
    assert cost.adapter_bytes({layer.name: 4}, 1, 4) == 0
    assert cost.adapter_parameters({layer.name: 4}) == 256
    parameter = torch.nn.Parameter(torch.zeros(256))
    adapters = AdapterOptimizer([parameter], TrainConfig(optimizer=optimizer, momentum=momentum))
    parameter.grad = torch.ones(256)
    adapters._optimizer.step()
    states = [t for state in adapters._optimizer.state.values() for t in state.values() if t is not None and t.ndim]
    assert sum(tensor.nbytes for tensor in (parameter, parameter.grad, *states)) == 256 * size


def test_unknown_optimizer() -> None:
    with pytest.raises(PlanError, match="optimizer='adam' is unknown; choose one of adamw, sgd"):
        Workload(1, 2, optimizer="adam")


def test_parts_add_up_and_an_update_counts_where_it_is_the_peak() -> None:
    cost = cost_of("llama")
    ranks = {layer.name: 4 for layer in cost.layers}
    for updated in (False, True):
        parts = cost.memory_parts(2, ranks, 1000, updated=updated)
        assert sum(parts.values()) == cost.client_bytes(2, ranks, 1000, updated=updated)
        assert parts["process"] == 1000
        assert parts["weights"] == 4 * cost.client_parameters(2)
    assert cost.memory_parts(2, ranks, updated=False)["update"] == 0
    # Loading holds the dense update and one more matrix beside the weights; training has not begun.
    matrices = 4 * (4 * 32 * 32 + 3 * 32 * 48)
    loading = 4 * cost.client_parameters(3) + 3 * matrices + 4 * 32 * 48
    config = tiny_model("llama").config
    short = CostModel(config, find_family(config), Workload(1, 2))
    assert short.client_bytes(3, {}) == loading > short.client_bytes(3, {}, updated=False)
    assert cost.server_bytes({}) == 4 * cost.total_parameters + 4 * matrices
    beside = cost_of("llama", dtype="bfloat16")
    assert beside.memory_parts(3, ranks)["update"] == 3 * matrices, "beside bf16 weights it stays"


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


def test_a_70b_model_is_costed_from_its_configuration() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    cost = CostModel(config, find_family(config), Workload(1, 512, "bfloat16"))
    block = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert cost.total_parameters == 80 * block + 2 * 128256 * 8192 + 8192
    assert cost.memory_parts(20, {})["weights"] == 2 * (20 * block + 128256 * 8192)
    assert len(cost.layers) == 80 * 7


def test_unknown_target() -> None:
    with pytest.raises(PlanError, match=r"query.*blocks of this model have.*q_proj"):
        cost_of("llama", ("q_proj", "query"))
    assert {layer.name.rpartition(".")[2] for layer in cost_of("llama", ("q_proj",)).layers} == {"q_proj"}


def test_the_update_is_as_large_as_its_rank_allows() -> None:
    config = tiny_model("llama").config
    family = find_family(config)
    shapes = [(layer.out_features, layer.in_features) for layer in cost_of("llama").all_layers if layer.block == 0]
    for rank in (1, 3, 1000):
        cost = CostModel(config, family, Workload(4, 16), update_rank=rank)
        assert cost.update_bytes(3) == 3 * 4 * sum(min(rows * cols, rank * (rows + cols)) for rows, cols in shapes)
    assert cost.update_bytes(3) == cost_of("llama").update_bytes(3)
    narrow = CostModel(config, family, Workload(4, 16), targets=("q_proj",), update_rank=1)
    assert narrow.update_bytes(2) == 2 * 4 * (32 + 32)
