"""Whole runs of every method, over the real stream, against the same rounds written out: split training as in
:mod:`tests.plain`, sums in NumPy. Training in one place is held against the step of the product, which
``tests/training/test_whole.py`` holds against stock PEFT."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    PreTrainedModel,
)

from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.collate import tokenize, training_batches
from hsplitlora_flwr.data.partition import partition
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.lora.layers import AdapterSpec, extract, inject
from hsplitlora_flwr.messages import FORGET, Description, take_tensors, to_arrays
from hsplitlora_flwr.methods import METHODS, keeps_half, shares_half
from hsplitlora_flwr.models import find_family, load_causal_lm
from hsplitlora_flwr.models.configuration import with_model_dtype
from hsplitlora_flwr.models.parts import WholeModel
from hsplitlora_flwr.models.quantisation import QuantisedLinear
from hsplitlora_flwr.models.split import whole_model
from hsplitlora_flwr.reporting import EVENTS_FILE, read_events
from hsplitlora_flwr.server import strategy
from hsplitlora_flwr.server.central import CentralTraining
from hsplitlora_flwr.server.clients import ClientFailedError
from hsplitlora_flwr.server.strategy import HSplitLoRA
from hsplitlora_flwr.training import memory
from hsplitlora_flwr.training.process import OwnProcess
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.whole import train_whole
from tests.grid import LocalGrid
from tests.plain import SERVER, PlainRound, block_of

Matrix = npt.NDArray[np.float64]
Pair = tuple[Matrix, Matrix]

GB = {0: 20.0, 1: 30.0, 2: 40.0}
"""Plenty: the process of the tests holds everything else too."""

DOUBLE = {"model.dtype": "float64", "transport.up": "float64", "transport.down": "float64"}
"""AdamW turns the rounding of a gradient near zero into a step: two calculations are to have little of it."""


def settings(folder: Path, tmp_path: Path, **changes: Any) -> Config:
    values = {
        "model.path": str(folder),
        "data.eval_rows": 30,
        "data.max_length": 48,
        "data.train_rows": 90,
        "lora.ranks": "0,2,4",
        "lora.rank": 3,
        "plan.over_budget": True,
        "train.rounds": 2,
        "train.steps": 3,
        "train.batch_size": 4,
        "train.lr": 0.02,
        "run.dir": str(tmp_path),
        "server.order": "arrival",  # the nodes of a local grid work one after another
        "train.rounds_per_message": 1,
    }
    return Config.from_run_config(values | changes)


def grid_of(gigabytes: dict[int, float] = GB) -> LocalGrid:
    count = len(gigabytes)
    nodes = {
        10 + index: {"partition-id": index, "num-partitions": count, "memory-gb": gb} for index, gb in gigabytes.items()
    }
    return LocalGrid(split_client_app(), nodes)


def run(config: Config, folder: Path, grid: LocalGrid | None = None) -> dict[str, Any]:
    text = load_text(config.data, config.run.seed)
    if METHODS[config.method.name].central:
        CentralTraining(config, text.held_out, folder, text.train).start(grid or grid_of())
    else:
        HSplitLoRA(config, text.held_out, folder).start(grid or grid_of())
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def fresh_model(config: Config, update: dict[str, Matrix]) -> PreTrainedModel:
    dtype = getattr(torch, with_model_dtype(config).model.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)
    for name, change in update.items():
        model.get_submodule(name).weight.data += torch.from_numpy(change).to(dtype)
    return model.requires_grad_(False)


def whole(model: PreTrainedModel) -> WholeModel:
    return whole_model(model, find_family(model.config))


def started(
    config: Config, owner: str, ranks: dict[str, int], adapter: dict[str, Pair]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
    """Adapters of these ranks as a round starts them, without their scale, and the scales."""
    method = METHODS[config.method.name]
    specs = {name: AdapterSpec(rank, 2.0 * rank) for name, rank in ranks.items()}
    start = {
        name: (torch.from_numpy(b[:, : specs[name].rank]), torch.from_numpy(a[: specs[name].rank]))
        for name, (b, a) in adapter.items()
        if name in specs
    }
    if not method.keeps_global_adapter:  # as long as a fresh row, and divided by the scale when it is put in
        start = {name: (b, a * specs[name].scale / 3**0.5) for name, (b, a) in start.items()}
    model = whole(fresh_model(config, {}))
    inject(model, specs, f"{config.run.seed}/{'all' if method.keeps_global_adapter else owner}", start)
    scales = {name: spec.scale for name, spec in specs.items()}
    return {name: (b, a / scales[name]) for name, (b, a) in extract(model).items()}, scales


def expected_update(config: Config, summary: dict[str, Any]) -> dict[str, Matrix]:
    """The update after the last round: every round written out on unsplit models, and NumPy adds the clients up."""
    method = METHODS[config.method.name]
    examples = load_text(config.data, config.run.seed).train
    parts = partition(examples, config.data, len(GB), config.run.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    rows = [tokenize([examples[i] for i in part], tokenizer, config.data.max_length) for part in parts]
    shares = np.array([len(part) for part in parts]) / len(examples)
    update: dict[str, Matrix] = {}
    adapter: dict[str, Pair] = {}
    weights: dict[str, Matrix] = {}
    before: PlainRound | None = None
    for server_round in range(config.train.rounds):
        plan = [p for p in summary["plans"] if p["round"] <= server_round + 1][-1]
        clients = {str(number): row for number, row in enumerate(plan["clients"])}
        shared = shares_half(config)
        splits = {client: row["split"] if shared else 10**6 for client, row in clients.items()}
        starts, scales = {}, {}
        for client, row in clients.items():
            own = {name: rank for name, rank in row["ranks"].items() if block_of(name) < splits[client]}
            owner = f"{server_round + 1}/{client}"
            starts[client], scales[client] = started(config, owner, own, adapter)
        above = {
            name: max(row["ranks"].get(name, 0) for client, row in clients.items() if splits[client] <= block_of(name))
            for name in {name for row in clients.values() for name in row["ranks"]}
            if min(splits.values()) <= block_of(name)
        }
        above = {name: rank for name, rank in above.items() if rank}  # who has a rank there may hold the block itself
        starts[SERVER], scales[SERVER] = started(config, f"{server_round + 1}/server", above, adapter)
        first = server_round * config.train.steps
        written_out = PlainRound(
            fresh_model(config, weights),
            starts,
            splits,
            scales,
            config.train,
            first,
            by_step=False,
            freeze_a=method.freeze_a,
        )
        going_on: set[str] = set()
        if before and keeps_half(config):
            earlier = before.factors[SERVER]
            going_on = {name for name, rank in above.items() if name in earlier and len(earlier[name][1]) == rank > 0}
            written_out.go_on(before, going_on, in_weights=not method.keeps_global_adapter)
        batches = {
            client: training_batches(rows[int(client)], config.train.batch_size, int(client), first)
            for client in clients
        }
        written_out.run(batches, config.train.steps)
        trained = {
            owner: {
                name: (b.double().numpy(), a.double().numpy()) for name, (b, a) in written_out.adapters(owner).items()
            }
            for owner in starts
        }
        for name in going_on if before and not method.keeps_global_adapter else ():  # of these the change
            (b, a), (start_b, start_a) = trained[SERVER][name], before.adapters(SERVER)[name]
            trained[SERVER][name] = np.hstack([b, start_b.double()]), np.vstack([a, -start_a.double()])
        before = written_out
        joined: dict[str, Pair] = {}
        for name in dict.fromkeys(name for own in trained.values() for name in own):
            held = [(shares[int(c)], trained[c][name]) for c in clients if name in trained[c]]
            if name in trained[SERVER]:
                together = sum(shares[int(c)] for c in clients if splits[c] <= block_of(name))
                held.append((together, trained[SERVER][name]))
            joined[name] = RULES[method.rule]([pair for _, pair in held], np.array([p for p, _ in held]))
        products = {name: b @ a for name, (b, a) in joined.items()}
        if method.keeps_global_adapter:
            adapter, update = joined, products
            for name, product in products.items() if method.residual else ():
                exact = sum(shares[int(c)] * trained[c][name][0] @ trained[c][name][1] for c in clients)
                weights[name] = weights.get(name, np.zeros(1)) + exact - product
                update[name] = weights[name] + product
        else:
            for name, total in products.items():
                weights[name] = update[name] = update.get(name, np.zeros(1)) + total
                if (method.init if config.lora.init == "auto" else config.lora.init) == "update":
                    _, s, vh = np.linalg.svd(total)
                    adapter[name] = np.zeros((len(total), 0)), vh[: len(s)][s > 1e-9 * s[0]]
    return update


def stacked(pairs: list[Pair], shares: Matrix) -> Pair:
    dense = np.sum([p * b @ a for p, (b, a) in zip(shares, pairs, strict=True)], axis=0)
    return dense, np.eye(dense.shape[1])


def mean(pairs: list[Pair], shares: Matrix) -> Pair:
    return (
        np.sum([p * b for p, (b, _) in zip(shares, pairs, strict=True)], axis=0),
        np.sum([p * a for p, (_, a) in zip(shares, pairs, strict=True)], axis=0),
    )


def padded(pairs: list[Pair]) -> list[Pair]:
    width = max(len(a) for _, a in pairs)
    return [(np.pad(b, ((0, 0), (0, width - len(a)))), np.pad(a, ((0, width - len(a)), (0, 0)))) for b, a in pairs]


def by_norm(pairs: list[Pair], shares: Matrix) -> Pair:
    norms = np.array([np.linalg.norm(b @ a) for b, a in pairs])
    return mean(padded(pairs), norms / norms.sum())


def by_svd(pairs: list[Pair], shares: Matrix) -> Pair:
    u, s, vh = np.linalg.svd(stacked(pairs, shares)[0], full_matrices=False)
    return u * np.sqrt(s), np.sqrt(s)[:, None] * vh


RULES = {
    "noise_free": stacked,
    "mean": mean,
    "mean_b": mean,
    "zero_pad": lambda pairs, shares: mean(padded(pairs), shares),
    "zero_pad_by_norm": by_norm,
    "svd": by_svd,
}

FEDERATED = [name for name in METHODS if not METHODS[name].central]


@pytest.mark.parametrize(
    ("name", "init"), [*((name, "auto") for name in FEDERATED), ("hsplitlora", "kaiming"), ("flora", "update")]
)
def test_a_run_is_its_rounds_calculated_plainly(name: str, init: str, tiny_folder: Path, tmp_path: Path) -> None:
    # AdamW would make steps of the rounding of gradients that are nearly zero
    smooth = {"train.optimizer": "sgd", "train.lr": 0.25, "train.momentum": 0.5}
    config = settings(tiny_folder, tmp_path, **DOUBLE | smooth | {"method.name": name, "lora.init": init})
    summary = run(config, tmp_path)
    assert summary["status"] == "finished"
    assert summary["perplexity_after"] < summary["perplexity_before"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    merged = tuned.merge_and_unload()
    moved = 0.0
    for layer, expected in expected_update(config, summary).items():
        found = (merged.get_submodule(layer).weight - base.get_submodule(layer).weight).detach().double().numpy()
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected) + 1e-6, layer
        moved += float(np.abs(expected).sum())
    assert moved > 1


@pytest.mark.parametrize(
    ("who", "changes"),
    [
        ("1", {}),
        ("012", {"lora.clients": "none"}),
        ("012", {"lora.clients": "none", "method.name": "splitlora"}),
        ("012", {"lora.clients": "none", "server.half": "per_client"}),
    ],
)
def test_clients_that_train_nothing_take_part_as_written_out(
    who: str, changes: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    smooth = {"train.optimizer": "sgd", "train.lr": 0.5}
    config = settings(tiny_folder, tmp_path, **DOUBLE | smooth | changes)
    grid = grid_of()
    if not changes:
        grid.node_configs[11]["adapter-mb"] = 1e-6
    summary = run(config, tmp_path, grid)
    assert summary["perplexity_after"] < summary["perplexity_before"]
    for rows in [plan["clients"] for plan in summary["plans"]] + [r["clients"] for r in summary["rounds"]]:
        assert {row["client"] for row in rows if not row["trains"]} == set(who)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    base, tuned, moved = AutoModelForCausalLM.from_pretrained(tiny_folder), merged.merge_and_unload(), 0.0
    for layer, expected in expected_update(config, summary).items():
        found = (tuned.get_submodule(layer).weight - base.get_submodule(layer).weight).detach().double().numpy()
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected) + 1e-6, layer
        moved += float(np.abs(expected).sum())
    assert moved > 1
    for client in summary["rounds"][-1]["clients"]:
        assert len(client["losses"]) == config.train.steps and client["losses"][-1] > 0


def test_a_quantised_base_with_an_exact_update_beside_it(tiny_folder: Path, tmp_path: Path) -> None:
    """Two rounds are those of the weights that the quantised ones stand for, and leave the same kind of adapter.

    By SGD: quantised products are of fp32, whose rounding AdamW turns into steps where a gradient is near zero.
    """
    pytest.importorskip("bitsandbytes")
    twin = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for layer, module in load_causal_lm(str(tiny_folder), quantise="4bit").named_modules():
        if isinstance(module, QuantisedLinear):
            twin.get_submodule(layer).weight.data = module.dequantised()
    dequantised = tmp_path / "dequantised"
    twin.save_pretrained(dequantised)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(dequantised)
    changes = DOUBLE | {"train.optimizer": "sgd", "train.lr": 1.0}
    summary = run(settings(tiny_folder, tmp_path, **changes | {"model.quantise": "4bit"}), tmp_path)
    assert summary["perplexity_after"] < summary["perplexity_before"]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_folder
    )
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    merged, base = tuned.merge_and_unload(), AutoModelForCausalLM.from_pretrained(tiny_folder)
    moved = 0.0
    for layer, expected in expected_update(settings(dequantised, tmp_path, **changes), summary).items():
        found = (merged.get_submodule(layer).weight - base.get_submodule(layer).weight).detach().double().numpy()
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected) + 1e-6, layer
        moved += float(np.abs(expected).sum())
    assert moved > 1


def test_methods_differ_where_they_say_so(tiny_folder: Path, tmp_path: Path) -> None:
    rows = {}
    for name in ("splitlora", "fedit", "ffa"):
        config = settings(tiny_folder, tmp_path / name, **{"method.name": name, "train.rounds": 1})
        rows[name] = run(config, tmp_path / name)["rounds"][0]["clients"][0]
    assert rows["splitlora"]["split"] < 4 == rows["fedit"]["split"]
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_folder).parameters())
    assert rows["splitlora"]["resident_parameters"] < whole == rows["fedit"]["resident_parameters"]
    per_block = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    per_block |= {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    assert rows["fedit"]["trainable_parameters"] == 4 * 3 * sum(map(sum, per_block.values()))
    assert rows["ffa"]["trainable_parameters"] == 4 * 3 * sum(rows for rows, _ in per_block.values())
    assert rows["splitlora"]["trainable_parameters"] == 4 * 3 * (32 + 32 + 16 + 32)
    # a method without a split sends adapters and nothing else
    assert rows["fedit"]["bytes_up"] == 4 * rows["fedit"]["trainable_parameters"]
    assert rows["fedit"]["bytes_down"] == 0


def test_central_lora_is_one_long_training_run(tiny_folder: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, tmp_path, **{"method.name": "cenlora"})
    summary = run(config, tmp_path)
    examples = load_text(config.data, 0).train
    rows = tokenize(examples, AutoTokenizer.from_pretrained(tiny_folder), config.data.max_length)
    model = whole(fresh_model(config, {}))
    specs = {name: AdapterSpec(3, 6.0) for name, _ in model.linears()}
    optimizer = AdapterOptimizer(inject(model, specs, "0/all"), config.train)
    steps = 2 * 3 * config.clients.count
    record = train_whole(model.train(), optimizer, training_batches(rows, 4, 0), first_step=0, steps=steps)
    losses = [loss for each in summary["rounds"] for loss in each["clients"][0]["losses"]]
    assert losses == pytest.approx(record.losses, rel=1e-4)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")


def test_full_fine_tuning_trains_every_weight_and_leaves_a_model(tiny_folder: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, tmp_path, **{"method.name": "full", "train.lr": 0.003})
    summary = run(config, tmp_path)
    assert summary["perplexity_after"] < summary["perplexity_before"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert summary["rounds"][0]["clients"][0]["trainable_parameters"] == sum(p.numel() for p in base.parameters())
    changed = {name for name, weight in base.named_parameters() if not torch.equal(weight, tuned.get_parameter(name))}
    assert changed == {name for name, _ in base.named_parameters()}
    assert all((tmp_path / name).is_file() for name in summary["results"])


def test_the_plan_is_kept_until_budgets_change_or_importance_drifts(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight: list[bool] = []

    class Watched(OwnProcess):
        def return_freed_memory(self) -> None:
            tight.append(True)

    monkeypatch.setattr(strategy, "OwnProcess", Watched)
    config = settings(tiny_folder, tmp_path, **{"plan.drift": 0.9, "train.rounds": 3, "plan.probe_batches": 1})
    grid = grid_of()
    original = grid.push_messages
    trains = 0

    def changing(messages: Any) -> Any:
        nonlocal trains
        messages = list(messages)
        trains += messages[0].metadata.message_type == "train"
        if trains == len(GB) + 1:  # with the reply of the second round it says its budget of the third
            grid.node_configs[10]["memory-gb"] = 25.0
        return original(messages)

    grid.push_messages = changing  # type: ignore[method-assign]
    summary = run(config, tmp_path / "budget", grid)
    assert [(plan["round"], plan["reason"]) for plan in summary["plans"]] == [
        (1, ""),
        (3, "budgets changed"),
    ]
    assert [entry["round"] for entry in summary["importance_drift"]] == [1, 2, 3]
    # the second round measured for the third, as it trained
    assert [entry["drift"] > 0 for entry in summary["importance_drift"]] == [False, False, True]
    assert [message.metadata.message_type for message in grid.sent].count("train.probe") == len(GB)
    assert sum(summary["importance"].values()) == pytest.approx(1)
    assert not tight, "the server has room for a fragmented heap"

    monkeypatch.setattr(memory, "FRAGMENTED", 10**9)
    config = settings(tiny_folder, tmp_path, **{"plan.drift": 0.0, "train.rounds": 3})
    plans = run(config, tmp_path / "drift")["plans"]
    assert [plan["round"] for plan in plans] == [1, 3]
    assert re.fullmatch(r"importance moved by 0\.\d{3}, more than plan\.drift=0", plans[1]["reason"])
    assert len(tight) == 2, "with every plan"


def test_bytes_of_a_round_count_what_came_for_a_probe(tiny_folder: Path, tmp_path: Path) -> None:
    def bytes_down(batches: int) -> int:
        folder, changes = tmp_path / str(batches), {"plan.probe_batches": batches, "train.rounds": 1}
        summary = run(settings(tiny_folder, folder, **changes), folder)
        return sum(client["bytes_down"] for client in summary["rounds"][0]["clients"])

    # a probe's gradients come on top of those of training
    assert bytes_down(2) > 1.1 * bytes_down(1)


def test_a_rank_cap_bounds_the_adapter_and_says_what_it_dropped(tiny_folder: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, tmp_path, **{"lora.rank_cap": 2})
    summary = run(config, tmp_path)
    assert all(0 < each["dropped_energy"] < 1 for each in summary["rounds"])
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert max(adapter["r"], *adapter["rank_pattern"].values(), 0) <= 2


def test_an_unsplit_client_that_cannot_hold_the_model_is_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, tmp_path, **{"method.name": "hetlora", "plan.over_budget": False})
    summary = run(config, tmp_path, grid_of({0: 0.1, 1: 30.0, 2: 40.0}))
    row = summary["plans"][0]["clients"][0]
    assert row["left_out"].startswith("misses ")
    assert [client["client"] for client in summary["rounds"][0]["clients"]] == ["1", "2"]


def test_a_round_goes_on_without_a_client_that_fails(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of()
    grid.node_configs[11]["memory-gb"] = -1
    summary = run(settings(tiny_folder, tmp_path), tmp_path, grid)
    assert summary["status"] == "finished"
    assert [[c["client"] for c in each["clients"]] for each in summary["rounds"]] == [["0", "2"], ["0", "2"]]
    failures = [e for e in map(json.loads, (tmp_path / "events.jsonl").open()) if e["kind"] == "client_failed"]
    assert "memory-gb=-1 of the node" in failures[0]["error"]


def test_a_client_that_comes_back_takes_part_again(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of()
    grid.node_configs[11]["memory-gb"] = -1
    original = grid.push_messages

    def recovering(messages: Any) -> Any:
        messages = list(messages)
        if any(message.metadata.message_type == "train" for message in messages):
            grid.node_configs[11]["memory-gb"] = 30.0
        return original(messages)

    grid.push_messages = recovering  # type: ignore[method-assign]
    summary = run(settings(tiny_folder, tmp_path, **{"train.rounds": 3}), tmp_path, grid)
    assert [len(each["clients"]) for each in summary["rounds"]] == [2, 3, 3]
    assert summary["plans"][1]["reason"] == "other clients take part"


def damaged(content: RecordDict, how: str) -> None:
    """Change what a client says that it trained."""
    if how == "cannot be read":
        content["adapters"] = ArrayRecord({"0": Array(np.zeros(50, np.uint8))})
        return
    tensors = take_tensors(content.array_records["adapters"])
    key = next(key for key in tensors if key.endswith(":B"))
    if how == "not those of its plan":
        del tensors[key], tensors[key.removesuffix("B") + "A"]
    else:
        tensors[key].fill_(torch.nan)
    content["adapters"] = to_arrays(tensors)


@pytest.mark.parametrize("how", ["not those of its plan", "not finite", "cannot be read"])
def test_a_client_with_a_bad_outcome_is_left_out(how: str, tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of()
    original = grid.pull_messages

    def damaging(ids: Any) -> Any:
        replies = list(original(ids))
        for reply in replies:
            if reply.metadata.src_node_id == 11 and reply.metadata.message_type == "train":
                damaged(reply.content, how)
        return replies

    grid.pull_messages = damaging  # type: ignore[method-assign]
    summary = run(settings(tiny_folder, tmp_path, **{"train.rounds": 1}), tmp_path, grid)
    assert [client["client"] for client in summary["rounds"][0]["clients"]] == ["0", "2"]
    [failure] = [e for e in map(json.loads, (tmp_path / "events.jsonl").open()) if e["kind"] == "client_failed"]
    assert failure["client"] == "1" and how in failure["error"]


@pytest.mark.parametrize(
    ("kind", "record", "key", "value", "says"),
    [
        ("query.describe", "description", "examples", 0, "its description of itself cannot be used"),
        ("train.probe", "importance", "model.layers.0.mlp.up_proj", float("nan"), "up_proj is nan"),
        ("evaluate", "metrics", "label-tokens", 0.0, "has no perplexity"),
    ],
)
def test_a_bad_reply_costs_no_more_than_its_client(
    kind: str, record: str, key: str, value: float, says: str, tiny_folder: Path, tmp_path: Path
) -> None:
    grid = grid_of()
    original = grid.pull_messages

    def damaging(ids: Any) -> Any:
        replies = list(original(ids))
        for reply in replies:
            if reply.metadata.src_node_id == 11 and reply.metadata.message_type == kind:
                reply.content[record][key] = value
        return replies

    grid.pull_messages = damaging  # type: ignore[method-assign]
    summary = run(settings(tiny_folder, tmp_path, **{"train.rounds": 1, "evaluation.client_rows": 2}), tmp_path, grid)
    assert summary["status"] == "finished"
    failures = [e for e in map(json.loads, (tmp_path / "events.jsonl").open()) if e["kind"] == "client_failed"]
    asked = 2 if kind == "query.describe" else 1  # before training, and for the first round
    assert len(failures) == asked and all(says in failure["error"] for failure in failures)
    trained = [client["client"] for client in summary["rounds"][0]["clients"]]
    assert trained == (["0", "1", "2"] if kind == "evaluate" else ["0", "2"])


def test_a_second_node_of_a_name_is_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of()
    grid.node_configs[12]["partition-id"] = 1
    summary = run(settings(tiny_folder, tmp_path, **{"train.rounds": 1}), tmp_path, grid)
    assert [client["client"] for client in summary["rounds"][0]["clients"]] == ["0", "1"]
    assert "another node calls itself client 1" in (tmp_path / "events.jsonl").read_text()


def test_too_few_clients_end_the_run_with_their_reasons(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of()
    grid.node_configs[11]["memory-gb"] = -1
    config = settings(tiny_folder, tmp_path, **{"clients.min": 3})
    with pytest.raises(ClientFailedError, match=r"2 clients are left, .*client 11 failed: .*memory-gb=-1 of the node"):
        run(config, tmp_path, grid)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_a_run_that_fails_leaves_nothing_on_its_nodes(tiny_folder: Path, tmp_path: Path) -> None:
    class Breaking(LocalGrid):
        """Loses its connection for good after some messages, or answers with errors from then on."""

        after, lost = 10**9, False

        def push_messages(self, messages: Any) -> Any:
            if self.lost and len(self.sent) >= self.after:
                raise ConnectionError("the SuperLink is gone")
            return super().push_messages(messages)

        def answer(self, message: Message) -> Message:
            if self.after < len(self.sent) and message.metadata.message_type == "train":
                raise RuntimeError("no more room here")
            return super().answer(message)

    sent = {}
    for lost in (False, True):
        grid = Breaking(split_client_app(), grid_of().node_configs)
        grid.after, grid.lost = 3 + 3 + 3, lost  # a round: describe, probe, train
        folder = tmp_path / str(lost)
        with pytest.raises((RuntimeError, ConnectionError), match=r"no more room here|the SuperLink is gone"):
            run(settings(tiny_folder, folder), folder, grid)
        sent[lost] = [message.metadata.message_type for message in grid.sent]
        assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
        if not lost:  # what a node cannot be told of goes with a later run
            assert sent[lost][-3:] == [FORGET] * 3 and not list(Path(grid.disk).rglob("*.*"))


def test_a_reason_that_clients_share_is_said_once(tiny_folder: Path, tmp_path: Path) -> None:
    nodes = {node: config | {"data-path": str(tmp_path / "nowhere")} for node, config in grid_of().node_configs.items()}
    with pytest.raises(ClientFailedError) as failed:
        run(settings(tiny_folder, tmp_path), tmp_path, LocalGrid(split_client_app(), nodes))
    assert str(failed.value).startswith("no client is left: clients 10, 11, 12 failed: ")
    assert str(failed.value).count("nowhere") == 1


def test_nodes_may_have_files_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of({0: 20.0, 1: 30.0})
    for index, name in enumerate(("st-mary", "st-john")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": f"case {i} of {name}"}) + "\n" for i in range(5 + index)))
        grid.node_configs[10 + index] = {"name": name, "data-path": str(file), "memory-gb": 20.0}
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a case that nobody has\nand another\n")
    changes = {"data.source": "jsonl", "data.eval_path": str(held_out), "data.train_rows": 0}
    changes |= {"train.rounds": 1, "clients.count": 2}
    summary = run(settings(tiny_folder, tmp_path, **changes), tmp_path, grid)
    clients = summary["rounds"][0]["clients"]
    assert [(client["client"], client["examples"]) for client in clients] == [("st-john", 6), ("st-mary", 5)]

    del grid.node_configs[10]["data-path"]
    with pytest.raises(ClientFailedError, match="every node needs a file of its own"):
        run(settings(tiny_folder, tmp_path / "b", **changes | {"clients.min": 2}), tmp_path / "b", grid)


def test_a_node_that_states_nothing_is_measured(tiny_folder: Path, tmp_path: Path) -> None:
    grid = grid_of({0: 20.0, 1: 30.0})
    del grid.node_configs[10]["memory-gb"]
    summary = run(settings(tiny_folder, tmp_path, **{"clients.count": 2}), tmp_path, grid)
    measured, stated = summary["plans"][0]["clients"]
    assert stated["budget_bytes"] == 30e9
    assert 0.3e9 < measured["budget_bytes"] < psutil.virtual_memory().total
    description = Description.from_records(grid.described[10])
    assert 1e8 < description.flops < 1e15
    assert all(1e5 < speed < 1e12 for speed in (description.up, description.down))
    assert Description.from_records(grid.described[11]).flops == 0


@pytest.mark.parametrize("method", ["hsplitlora", "cenlora"])
def test_what_is_cut_is_said_before_training_and_stays_in_the_summary(
    method: str, tiny_folder: Path, tmp_path: Path
) -> None:
    changes = {"method.name": method, "data.max_length": 24, "train.rounds": 1, "train.steps": 1}
    config = settings(tiny_folder, tmp_path, **changes)
    summary, text = run(config, tmp_path), load_text(config.data, config.run.seed)
    for name, examples in (("training", text.train), ("held_out", text.held_out)):
        lengths = [len((example.prompt + example.completion).encode()) + 1 for example in examples]  # and EOS
        lost = [length - 24 for length in lengths if length > 24]
        found = {"rows": len(lengths), "tokens": sum(lengths), "cut_rows": len(lost), "cut_tokens": sum(lost)}
        more = {"prompts_inside_tokens": 0, "prompts": "line"} if name == "held_out" else {}  # a token is a byte
        assert summary["text"][name] == found | {"cut_share": sum(lost) / sum(lengths)} | more
    events, _ = read_events(tmp_path / EVENTS_FILE, 0)
    told = [event.get("text", event["kind"]).partition(":")[0] for event in events]
    training, held_out = (f"{name} text is cut to data.max_length=24" for name in ("training", "held-out"))
    assert max(told.index(training), told.index(held_out)) < told.index("step")
    if method == "hsplitlora":
        rows = summary["plans"][0]["clients"]
        assert sum(row["cut_rows"] for row in rows) == summary["text"]["training"]["cut_rows"]
        assert all(0 < row["cut_share"] < 1 for row in rows)


def test_prompts_that_end_inside_a_token_are_told_of(tiny_folder: Path, tmp_path: Path) -> None:
    file = shutil.copytree(tiny_folder, tmp_path / "model") / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ĠJ"] = vocabulary.pop("ÿ")  # a byte that no text has
    tokenizer["model"]["merges"] = [["Ġ", "J"]]
    file.write_text(json.dumps(tokenizer))
    for part, names in {"train": ["Ann", "Joe", "Joan"], "held_out": ["John", "Mary", "Jane"]}.items():
        rows = [json.dumps({"prompt": "Name: ", "completion": name}) for name in names]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows))
    changes = {"method.name": "cenlora", "data.source": "jsonl", "data.partition": "iid", "data.train_rows": 0}
    changes |= {"data.path": str(tmp_path / "train.jsonl"), "data.eval_path": str(tmp_path / "held_out.jsonl")}
    summary = run(settings(tmp_path / "model", tmp_path, **changes), tmp_path)
    assert summary["text"]["held_out"]["prompts_inside_tokens"] == 2
    events, _ = read_events(tmp_path / EVENTS_FILE, 0)
    [told] = [event["text"] for event in events if "inside a token" in event.get("text", "")]
    assert told.startswith("the prompts of 2 of 3 held-out rows end inside a token of theirs")


def test_of_a_multimodal_base_the_adapter_fits_the_whole_and_the_merged_model_is_the_decoder(
    tiny_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 257}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"image_size": 28, "patch_size": 14}
    model = AutoModelForImageTextToText.from_config(
        Gemma3Config(text_config=sizes, vision_config=sight, mm_tokens_per_image=4)
    )
    model.save_pretrained(base)
    run(settings(base, tmp_path, **{"run.merged": True, "train.rounds": 1}), tmp_path)

    ids = torch.arange(3, 25).reshape(2, 11)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = AutoModelForCausalLM.from_pretrained(base)
    assert type(whole) is type(model)
    before = whole(**inputs).logits
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(**inputs).logits
    tuned = PeftModel.from_pretrained(whole, tmp_path / "adapter")(**inputs).logits
    torch.testing.assert_close(tuned, after, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


def test_a_node_whose_model_lacks_a_token_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(tiny_folder, tmp_path / "model"))
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "own.txt").write_text("<|user|> hello\n" * 3)
    grid = grid_of({0: 20.0})
    grid.node_configs[10]["data-path"] = str(tmp_path / "own.txt")
    config = settings(tmp_path / "model", tmp_path, **{"clients.count": 1})
    with pytest.raises(
        ClientFailedError, match=r"token \d+ \('<\|user\|>'\) of example 0 is beyond the \d+ embeddings"
    ):
        run(config, tmp_path, grid)
