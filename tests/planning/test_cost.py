"""The cost model, which sees shapes alone, against tensors that really live and operations that are really done."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    DeepseekV3Config,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hsplitlora_flwr.config import Config, TrainConfig
from hsplitlora_flwr.config.names import WIRES
from hsplitlora_flwr.lora import AdapterSpec, inject
from hsplitlora_flwr.models import find_family, load_causal_lm, load_client_model, split_model
from hsplitlora_flwr.models.build import build_causal_lm
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.models.families import tiny_config
from hsplitlora_flwr.models.parts import ModelPart
from hsplitlora_flwr.models.split import client_part, head_part, whole_model
from hsplitlora_flwr.planning import Budget, CostModel, PlanError, Workload, make_plan
from hsplitlora_flwr.planning.round import cost_model, make_round_plan
from hsplitlora_flwr.training.activation_checkpointing import checkpoint_blocks
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.transport.frames import Activation, Frame, Gradient, Hidden, HiddenGradient, Loss, encode
from tests.flops import flop_counter
from tests.tiny import CONFIGS, tiny_model

ROWS, LENGTH = 4, 24
IDS = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 90 + 3
MASK = torch.ones_like(IDS)
MASK[0, 20:] = 0


@cache
def cost_of(
    name: str,
    targets: tuple[str, ...] | None = None,
    dtype: str = "float32",
    labels: str = "server",
    in_flight: int = 1,
    quantise: str = "none",
    width: int = 0,
) -> CostModel:
    config = tiny_model(name).config
    workload = Workload(ROWS, LENGTH, dtype, labels=labels, in_flight=in_flight, quantise=quantise, width=width)
    return CostModel(config, find_family(config), workload, targets)


def adapt(part: ModelPart, ranks: dict[str, int]) -> int:
    """Inject adapters; returns the bytes of their parameters on this part."""
    parameters = inject(part.train(), {layer: AdapterSpec(r, 2.0 * r) for layer, r in ranks.items()}, "s")
    return sum(parameter.nbytes for parameter in parameters)


def frames_of(cost: CostModel) -> int:
    """What is on the wire, or waits to be, of the micro-batches in flight."""
    return 4 * cost.workload.in_flight * cost.cut_bytes // cost.workload.item * cost.workload.adapter_item


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
    with_labels, family = cost_of(name, labels="client"), find_family(model.config)
    for split in range(1, cost.num_blocks):
        client = client_part(model, family, split)
        assert cost.client_parameters(split) == client.resident_parameters()
        both = torch.nn.ModuleList([client, head_part(model, family)])  # counts a matrix that they share once
        assert with_labels.client_parameters(split) == sum(p.numel() for p in both.parameters())


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


@pytest.mark.parametrize(("dtype", "rows", "length"), [("float32", 4, 24), ("bfloat16", 8, 64)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_client_without_adapters_takes_the_forward_pass_of_one_block(
    name: str, dtype: str, rows: int, length: int
) -> None:
    model = tiny_model(name, dtype=getattr(torch, dtype))
    cost = CostModel(model.config, find_family(model.config), Workload(rows, length, dtype))
    ids = torch.arange(rows * length).reshape(rows, length) % 90 + 3
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0

    def step() -> None:
        with torch.no_grad():
            client(ids, mask)

    waiting = frames_of(cost) // 2  # one micro-batch, as it was sent and inside the stream
    for split in (2, 3):
        client, _ = split_model(model, split)
        parts = cost.memory_parts(split, {}, updated=False)
        assert parts["adapters"] == parts["activations"] == 0
        assert 0.98 < (parts["temporary"] - waiting) / allocated_peak(step) < 1.11
    one = {next(layer.name for layer in cost.layers if layer.block == 2): 1}
    assert cost.client_bytes(3, {}, updated=False) < cost.client_bytes(3, one, updated=False)


@pytest.mark.parametrize("quantise", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m-like"])
def test_quantised_weights_have_the_predicted_bytes(name: str, dtype: str, quantise: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model(name).save_pretrained(tmp_path)
    cost = cost_of(name, dtype=dtype, quantise=quantise)

    def held(part: torch.nn.Module) -> int:
        buffers = (b for key, b in part.named_buffers() if key.endswith(("packed", "scales")))
        return sum(tensor.nbytes for tensor in (*part.parameters(), *buffers))

    for split in range(1, cost.num_blocks):
        client = load_client_model(str(tmp_path), split, dtype, quantise=quantise)
        assert cost.memory_parts(split, {})["weights"] == held(client)
        assert cost.client_parameters(split) == client.resident_parameters()
    whole = held(load_causal_lm(str(tmp_path), dtype, quantise=quantise))
    update = cost.update_bytes(cost.num_blocks)
    assert cost.server_bytes({}) == whole + update
    parts = cost.memory_parts(2, {}), cost.memory_parts(2, {}, updated=False)
    assert parts[0]["update"] - parts[1]["update"] == cost.update_bytes(2), "it stays beside the weights"


@pytest.mark.parametrize("quantise", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_over_a_quantised_base_takes_what_is_predicted(dtype: str, quantise: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path)
    cost = cost_of("llama", dtype=dtype, quantise=quantise)
    client = load_client_model(str(tmp_path), 3, dtype, quantise=quantise)
    ranks = {layer.name: 8 for layer in cost.layers if layer.block < 3}
    adapt(client, ranks)

    def step() -> None:
        cut = client(IDS, MASK)
        cut.backward(torch.ones_like(cut))

    parts = cost.memory_parts(3, ranks, updated=False)
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

    predicted = cost.server_bytes({"a": (2, ranks)}) - cost.server_bytes({}) - 4 * adapters - frames_of(cost)
    assert predicted == pytest.approx(allocated_peak(step), rel=0.08)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in CONFIGS), ("llama", "bfloat16")])
def test_steps_that_compute_activations_again_take_what_is_predicted(name: str, dtype: str) -> None:
    model = tiny_model(name, dtype=getattr(torch, dtype))
    workload = Workload(ROWS, LENGTH, dtype)
    cost = CostModel(model.config, find_family(model.config), workload, adapter_rank=8)
    client, server = split_model(model, 3)[0], split_model(model, 1)[1]
    ranks = {layer.name: 8 for layer in cost.layers}
    on_client, on_server = adapt(client, ranks), adapt(server, ranks)
    cut = torch.randn(ROWS, LENGTH, 32, dtype=model.dtype)
    for part in (client, server):
        checkpoint_blocks(part)

    def client_step() -> None:
        end = client(IDS, MASK)
        end.backward(torch.ones_like(end))

    def server_step() -> None:
        server(cut.clone().requires_grad_(), MASK, IDS).loss.backward()

    parts = cost.memory_parts(3, ranks, checkpointing=True, updated=False)
    assert parts["adapters"] == 4 * on_client
    measured = allocated_peak(client_step)
    # A block's step need not peak where all of its activations are there, as is predicted.
    assert 0.9 * measured < parts["activations"] + parts["temporary"] < 1.15 * measured
    served = {"a": (1, ranks)}
    predicted = cost.server_bytes(served, checkpointing=True) - cost.server_bytes({}) - 4 * on_server - frames_of(cost)
    measured = allocated_peak(server_step)
    assert 0.9 * measured < predicted < 1.2 * measured


def test_computing_again_trades_memory_for_time() -> None:
    cost = CostModel(LlamaConfig(), find_family(LlamaConfig()), Workload(4, 256), adapter_rank=8)
    ranks = {layer.name: 8 for layer in cost.layers}
    kept, again = (cost.kept_bytes(ranks, 0, 10, checkpointing=checkpointing) for checkpointing in (False, True))
    assert again == 10 * cost.cut_bytes < kept / 10
    kept, again = (
        cost.client_bytes(10, ranks, checkpointing=checkpointing, updated=False) for checkpointing in (False, True)
    )
    assert again < kept
    assert cost.server_flops(10, {}, checkpointing=True) / cost.server_flops(10, {}) == pytest.approx(1.5, rel=0.05)
    assert cost.client_bytes(10, {}, checkpointing=True) == cost.client_bytes(10, {}), "nothing trains"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_head_takes_what_is_predicted(name: str, dtype: str) -> None:
    """Soft-capped logits (Gemma 2) and hidden states in fp32 (RMSNorm) included."""
    cost, model = cost_of(name, dtype=dtype), tiny_model(name, dtype=getattr(torch, dtype))
    *_, head = split_model(model, 2, labels="client")
    hidden = torch.randn(ROWS, LENGTH, 32, dtype=getattr(torch, dtype))

    def step() -> None:
        head(hidden.clone().requires_grad_(), IDS).loss.backward()

    assert cost.head_bytes == pytest.approx(allocated_peak(step), rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_in_three_parts_take_what_is_predicted(name: str) -> None:
    """Two micro-batches in flight: their activations are kept on both sides while the first one's loss is computed."""
    cost, model = cost_of(name, labels="client", in_flight=2), tiny_model(name, dtype=torch.float32)
    client, body, head = split_model(model, 2, labels="client")
    ranks = {layer.name: 8 for layer in cost.layers}
    on_client, on_server = adapt(client, ranks), adapt(body, ranks)
    states = [torch.randn(ROWS, LENGTH, 32) for _ in range(2)]

    def client_step() -> None:
        cuts = [client(IDS, MASK) for _ in states]
        for cut, state in zip(cuts, states, strict=True):
            returned = state.clone().requires_grad_()
            head(returned, IDS).loss.backward()
            cut.backward(returned.grad)

    def server_step() -> None:
        cuts = [state.clone().requires_grad_() for state in states]
        for hidden in [body(cut, MASK) for cut in cuts]:
            hidden.backward(torch.ones_like(hidden))

    # one of the two is on the wire, which is not here
    frames = frames_of(cost) // 2
    predicted = cost.client_bytes(2, ranks, updated=False) - 4 * cost.client_parameters(2) - 4 * on_client - frames
    assert predicted == pytest.approx(allocated_peak(client_step), rel=0.1)
    predicted = cost.held_bytes(2, ranks) + cost.pass_bytes(2, ranks) - 4 * on_server - frames_of(cost)
    assert predicted == pytest.approx(allocated_peak(server_step), rel=0.1)


def test_the_head_weighs_on_the_side_that_has_the_labels() -> None:
    above, below = cost_of("llama"), cost_of("llama", labels="client")
    assert above.head_bytes == below.head_bytes > above.temporary_bytes == below.temporary_bytes
    every = {layer.name: 1 for layer in above.layers}
    assert above.memory_parts(2, every)["temporary"] == above.temporary_bytes
    assert above.memory_parts(2, {})["temporary"] == above.forward_bytes
    assert below.memory_parts(2, every)["temporary"] == below.head_bytes
    assert below.memory_parts(2, {})["temporary"] == max(below.forward_bytes, below.head_bytes)
    assert above.pass_bytes(2, {}) - below.pass_bytes(2, {}) >= above.head_bytes - above.temporary_bytes


def test_no_more_passes_meet_on_the_server_than_it_computes_at_once() -> None:
    config = tiny_model("llama").config
    every = {layer.name: 8 for layer in cost_of("llama").layers}
    clients = {"a": (1, every), "b": (3, every), "c": (2, {}), "d": (1, {})}
    for passes in (None, 1, 2, 3, 4, 9):
        cost = CostModel(config, find_family(config), Workload(ROWS, LENGTH, passes=passes, half="per_client"))
        held = sum(cost.held_bytes(*client) for client in clients.values())
        largest = sorted((cost.pass_bytes(*client) for client in clients.values()), reverse=True)
        assert cost.server_bytes(clients, 7) - cost.server_bytes({}, 7) == held + sum(largest[:passes])
    with pytest.raises(PlanError, match="passes=0"):
        Workload(ROWS, LENGTH, passes=0)


def test_a_shared_half_is_there_once_from_the_lowest_split_up() -> None:
    cost = cost_of("llama")
    every = {layer.name: 8 for layer in cost.layers}
    for splits in ((2,), (3, 2), (2, 3, 3, 2)):
        clients = {str(i): (split, every) for i, split in enumerate(splits)}
        once = cost.adapter_bytes(every, 2, 4) + cost.pass_bytes(2, every) + len(splits) * frames_of(cost)
        assert cost.server_bytes(clients, 7) == cost.server_bytes({}, 7) + once
    with pytest.raises(PlanError, match="half='both' is not possible; choose one of shared, per_client"):
        Workload(ROWS, LENGTH, half="both")  # type: ignore[arg-type]


def test_activations_count_for_every_micro_batch_in_flight() -> None:
    one, three = cost_of("llama"), cost_of("llama", in_flight=3)
    ranks = {layer.name: 8 for layer in one.layers}
    for first, last, everything in ((0, 3, False), (1, 4, True)):
        kept = one.kept_bytes(ranks, first, last, everything=everything)
        assert three.kept_bytes(ranks, first, last, everything=everything) == 3 * kept > 0
    assert three.adapter_bytes(ranks, 0, 4) == one.adapter_bytes(ranks, 0, 4), "adapters exist once"
    added = one.adapter_price(one.layers[0], 8, 3) - one.adapter_price(one.layers[0], 8, 1)
    assert added == 2 * 8 * ROWS * LENGTH * 4
    assert three.pass_bytes(1, ranks) == one.pass_bytes(1, ranks), "the server takes them one by one"
    assert three.held_bytes(1, ranks) == one.held_bytes(1, ranks) + 2 * frames_of(one), "and the others wait"
    staying = cost_of("llama", labels="client"), cost_of("llama", labels="client", in_flight=3)
    kept = one.kept_bytes(ranks, 1, 4, everything=True)
    assert staying[1].pass_bytes(1, ranks) == staying[0].pass_bytes(1, ranks) + 2 * kept, "unless their loss is to come"
    frames = 4 * one.cut_bytes
    assert three.head_bytes == one.head_bytes + 2 * frames
    assert one.temporary_bytes < three.temporary_bytes <= one.temporary_bytes + 2 * frames


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
        counter = flop_counter()
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
    bare = tiny_model(name, dtype=torch.float32)
    bare.set_attn_implementation("eager")
    assert cost.client_flops(3, {}) == counted(lambda: split_model(bare, 3)[0](IDS, MASK))
    whole = whole_model(model, family)
    adapt(whole, ranks)
    both = counted(lambda: whole(IDS, MASK, IDS).loss.backward())
    assert both <= cost.whole_flops(ranks) < 1.1 * both

    with_labels = cost_of(name, labels="client")
    _, body, head = split_model(model, 3, labels="client")
    adapt(body, ranks)
    hidden = body(cut.detach(), MASK).detach().requires_grad_()
    top = counted(lambda: head(hidden, IDS).loss.backward())
    assert top <= with_labels.client_flops(3, ranks) - cost.client_flops(3, ranks) < 1.05 * top
    between = counted(lambda: body(leaf, MASK).backward(torch.ones_like(cut)))
    assert between <= with_labels.server_flops(3, ranks) < 1.05 * between


def tensor_bytes(frame: Frame) -> int:
    """Bytes of the tensors of a frame; its header has a few hundred more."""
    size = sum(value.nbytes for value in vars(frame).values() if isinstance(value, torch.Tensor))
    assert size == pytest.approx(len(encode(frame)), abs=512)
    return size


@pytest.mark.parametrize("wire", WIRES)
def test_bytes_on_the_wire_are_those_of_the_frames(wire: str) -> None:
    hidden = torch.zeros(ROWS, LENGTH, 32, dtype=getattr(torch, wire))
    scale = torch.zeros(hidden.shape[:-1] if wire == "int8" else 0)
    sent = tensor_bytes(Activation(0, hidden, scale, MASK, IDS, 1, True, 0.0))
    without_labels = tensor_bytes(Activation(0, hidden, scale, MASK, torch.zeros(0, dtype=torch.long), 1, True, 0.0))
    gradient = tensor_bytes(Gradient(hidden, scale, 0.0, 0.0))
    cost, with_labels = cost_of("llama"), cost_of("llama", labels="client")
    assert cost.wire_bytes(wire, wire) == (sent, gradient)
    assert cost.wire_bytes("float32", wire) == (cost.wire_bytes()[0], gradient)
    assert cost_of("llama", dtype="bfloat16").wire_bytes(wire, wire) == (sent, gradient)
    assert with_labels.wire_bytes(wire, wire) == (
        without_labels + tensor_bytes(HiddenGradient(hidden, scale, 0.0)),
        gradient + tensor_bytes(Hidden(hidden, scale)),
    )
    # Down to a client without adapters come losses alone, and hidden states where the labels stay.
    assert tensor_bytes(Loss(0.0)) == 0
    assert cost.wire_bytes(wire, wire, forward_only=True) == (sent, 0)
    assert with_labels.wire_bytes(wire, wire, forward_only=True) == (
        with_labels.wire_bytes(wire, wire)[0],
        tensor_bytes(Hidden(hidden, scale)),
    )


def test_numbers_that_no_wire_carries() -> None:
    with pytest.raises(PlanError, match="numbers on the wire cannot be 'int4'; choose one of float32"):
        cost_of("llama").wire_bytes("float32", "int4")


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


def test_labels_and_flights_out_of_range() -> None:
    with pytest.raises(PlanError, match="labels='both' is not possible; choose one of server, client"):
        Workload(1, 2, labels="both")
    with pytest.raises(PlanError, match="in_flight=0 is out of range; at least 1"):
        Workload(1, 2, in_flight=0)


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


def test_settings_of_a_run_reach_the_cost_model(tiny_folder: Path) -> None:
    settings: dict[str, int | str] = {
        "model.path": str(tiny_folder),
        "split.labels": "client",
        "transport.in_flight": 4,
        "transport.up": "int8",
        "transport.down": "bfloat16",
        "train.batch_size": 9,
        "train.micro_batch_size": 4,
        "train.steps": 5,
    }
    config = Config.from_run_config(settings)
    cost = cost_model(config, 4, LENGTH)
    assert (cost.workload.labels, cost.workload.in_flight) == ("client", 3), "a batch of 9 has three micro-batches"
    assert cost_model(config, 1, LENGTH).workload.in_flight == 4
    assert cost.workload.passes is None, "where labels stay, activations of all clients wait"
    assert cost.workload.half == "shared"
    alone = settings | {"split.labels": "server", "server.half": "per_client"}
    for joint, passes, expected in (("off", 3, 3), ("auto", 0, all_cores()), ("on", 3, None)):
        given = alone | {"train.multi_adapter_batching": joint, "train.passes": passes, "model.device": "cpu"}
        workload = cost_model(Config.from_run_config(given), 4, LENGTH).workload
        assert (workload.passes, workload.half) == (expected, "per_client")
    unsplit = cost_model(Config.from_run_config(settings | {"method.name": "fedit"}), 4, LENGTH).workload
    assert (unsplit.labels, unsplit.in_flight) == ("server", 1)
    plan = make_round_plan(config, {"a": Budget(10**12, 0, 1e9, 1e6, 2e6)}, None, {}, cost).clients["a"]
    up, down = cost.wire_bytes("int8", "bfloat16")
    seconds = cost.client_flops(plan.split, plan.ranks) / 1e9 + up / 1e6 + down / 2e6
    below = {layer.name for layer in cost.layers if layer.block < plan.split}
    sent = 4 * cost.adapter_parameters({name: rank for name, rank in plan.ranks.items() if name in below})
    assert plan.predicted_seconds == pytest.approx(5 * 3 * seconds + sent / 1e6 + sent / 2e6)


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


UNLIKE = DeepseekV3Config(n_routed_experts=16, num_experts_per_tok=4, first_k_dense_replace=2)
"""Two dense blocks, and others with experts."""


def build(config: PretrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    return build_causal_lm(tiny_config(config, 5), getattr(torch, dtype))


@pytest.mark.parametrize("config", [UNLIKE, MixtralConfig(num_local_experts=4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_experts_and_unlike_blocks_are_counted(config: PretrainedConfig, dtype: str) -> None:
    """Parameters and layers are those of the parts; a client's step stays within what is predicted, and near it."""
    model, family = build(config, dtype), find_family(config)
    cost = CostModel(model.config, family, Workload(ROWS, LENGTH, dtype), adapter_rank=4)
    assert cost.total_parameters == sum(p.numel() for p in model.parameters())
    for split in range(1, 5):
        client, server = split_model(model, split)
        assert cost.client_parameters(split) == client.resident_parameters()
        for part, blocks in ((client, range(split)), (server, range(split, 5))):
            held = [layer for layer in cost.layers if layer.block in blocks]
            layers = {layer.name: (layer.out_features, layer.in_features) for layer in held}
            assert layers == {name: tuple(linear.weight.shape) for name, linear in part.linears()}
        ranks = {layer.name: 4 for layer in cost.layers}
        adapt(client, ranks)

        def step(client: ModelPart = client) -> None:
            cut = client(IDS, MASK)
            cut.backward(torch.ones_like(cut))

        parts = cost.memory_parts(split, ranks, updated=False)
        predicted, taken = parts["activations"] + parts["temporary"], allocated_peak(step)
        assert 0.4 * predicted < taken < 1.1 * predicted, "a block that keeps less than others counts as one of them"


def test_plans_of_unlike_blocks_keep_to_budgets() -> None:
    cost = CostModel(build(UNLIKE).config, find_family(UNLIKE), Workload(ROWS, LENGTH), update_rank=8, adapter_rank=4)
    scores = {layer.name: 1.0 for layer in cost.layers}
    least, most = cost.client_bytes(1, {}), cost.client_bytes(4, dict.fromkeys(scores, 4))
    budgets = {f"c{share}": Budget(least + (most - least) * share // 4) for share in range(5)}
    plan = make_plan(budgets, scores, cost, ranks=(0, 2, 4))
    for name, client in plan.clients.items():
        assert cost.client_bytes(client.split, client.ranks) <= budgets[name].memory_bytes
    adapted = [{layer for layer, rank in plan.clients[f"c{share}"].ranks.items() if rank} for share in (0, 4)]
    assert len(adapted[0]) < len(adapted[1])


def test_blocks_that_look_into_values_are_refused() -> None:
    config = JetMoeConfig()
    with pytest.raises(
        PlanError, match="what a 'jetmoe' keeps in memory cannot be predicted: its blocks cannot be traced"
    ):
        CostModel(tiny_config(config, 4), find_family(config), Workload(ROWS, LENGTH))


def test_a_token_may_cross_in_fewer_numbers() -> None:
    cut, ids = torch.zeros(ROWS, LENGTH, 5), 8 * ROWS * LENGTH
    narrow, whole = cost_of("llama", width=5), cost_of("llama")
    assert narrow.wire_bytes() == (cut.nbytes + 2 * ids, cut.nbytes)
    assert narrow.wire_bytes(forward_only=True)[1] == 0
    assert narrow.client_bytes(2, {}) < whole.client_bytes(2, {}), "frames are smaller by more than directions take"
    hidden = torch.zeros(ROWS, LENGTH, 32).nbytes
    staying = cost_of("llama", labels="client", width=5)
    assert staying.wire_bytes() == (cut.nbytes + hidden + ids, cut.nbytes + hidden)
    directions = 4 * 5 * (2 * 32 + ROWS * LENGTH)
    assert staying.forward_bytes == cost_of("llama", labels="client").forward_bytes + directions
