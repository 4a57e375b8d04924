"""What the trace counts, on tensors whose sizes one can add up by hand."""

from __future__ import annotations

import copy

import torch

from hsplitlora_flwr.models import find_family
from hsplitlora_flwr.models.families import tiny_config
from hsplitlora_flwr.models.split import client_part
from hsplitlora_flwr.models.stored import empty_model
from hsplitlora_flwr.planning.trace import LiveBytes, trace_block, trace_model
from tests.tiny import CONFIGS


def test_layers_that_read_the_same_tensor_share_it() -> None:
    config = tiny_config(CONFIGS["llama"], 2)
    layers = trace_block(client_part(empty_model(config), find_family(config), 1), rows=2, length=8, rank=1).layers
    q, k, v, o, gate, up, down = (
        *(layers[f"self_attn.{name}_proj"] for name in "qkvo"),
        *(layers[f"mlp.{name}_proj"] for name in ("gate", "up", "down")),
    )
    assert q.input_id == k.input_id == v.input_id
    assert gate.input_id == up.input_id
    assert len({q.input_id, o.input_id, gate.input_id, down.input_id}) == 4
    assert (down.in_features, down.out_features) == (48, 32)
    # Attention keeps its output anyway; the normalised input and the gated product are kept for adapters alone.
    assert (q.input_bytes, o.input_bytes, down.input_bytes) == (2 * 8 * 32 * 4, 0, 2 * 8 * 48 * 4)


def test_a_model_is_traced_once_and_another_one_anew() -> None:
    config = tiny_config(CONFIGS["llama"], 3)
    asked = find_family(config), "float32", 2, 8, 1
    trace = trace_model(config, *asked)
    assert trace_model(copy.deepcopy(config), *asked) is trace
    config.intermediate_size *= 2
    wider = trace_model(config, *asked)
    assert wider.blocks[0].parameters == trace.blocks[0].parameters + 3 * 32 * 48
    assert trace_model(config, *asked[:-1], 2).blocks[0].peak > wider.blocks[0].peak


def test_live_bytes_count_what_is_alive_at_one_time() -> None:
    given = torch.zeros(1000)
    with LiveBytes([given]) as live:
        held = given + 1
        (given + 2).sum()
        assert live.now == held.nbytes
        view = held[:10]
        del held
        assert live.now == 4000, "a view keeps all of it"
        del view
        assert live.now == 0
        given.view(10, 100).add_(1)
    assert 8000 <= live.peak <= 8008, "two tensors, and the sum of one"
