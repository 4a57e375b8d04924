"""Whole runs: Hydra, flwr run, SuperLink, Ray, the stream; checked against the unsplit model and stock PEFT."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.collate import evaluation_batches, tokenize, training_batches
from hsplitlora_flwr.data.partition import partition
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.models import split_model
from tests.plain import SERVER, PlainRound, block_of
from tests.system.conftest import Run


def stock_perplexity(model: Any, config: Config) -> float:
    """Perplexity of the held-out text with nothing but transformers and torch."""
    rows = tokenize(
        load_text(config.data, config.run.seed).held_out,
        AutoTokenizer.from_pretrained(config.model.path),
        config.data.max_length,
    )
    nll, tokens = 0.0, 0
    for batch in evaluation_batches(rows, 8):
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
        targets = batch.labels[:, 1:].flatten()
        nll += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum"))
        tokens += int((targets != -100).sum())
    return math.exp(nll / tokens)


def unsplit_round(config: Config, plan: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The first round without a cut, a stream or Flower, and the dense weighted sum in fp64."""
    examples = load_text(config.data, config.run.seed).train
    parts = partition(examples, config.data, len(plan), config.run.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)

    def unsplit() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=getattr(torch, config.model.dtype))

    def started(owner: str, ranks: dict[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        adapters: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for part in split_model(unsplit(), 1):
            inject(part, {n: AdapterSpec(r, 2.0 * r) for n, r in ranks.items()}, f"{config.run.seed}/1/{owner}")
            adapters |= {name: (b, a / 2.0) for name, (b, a) in extract(part).items()}
        return adapters

    splits = {row["client"]: row["split"] for row in plan}
    starts, batches = {}, {}
    for row in plan:
        client, below = row["client"], {n: r for n, r in row["ranks"].items() if block_of(n) < row["split"]}
        starts[client] = started(client, below)
        rows = tokenize([examples[i] for i in parts[int(client)]], tokenizer, config.data.max_length)
        assert len(rows) == row["examples"]
        batches[client] = training_batches(rows, config.train.batch_size, int(client))
    shallowest = min(plan, key=lambda row: row["split"])
    above = {n: r for n, r in shallowest["ranks"].items() if block_of(n) >= shallowest["split"]}
    for row in plan:  # whoever reaches a block of the server has the same rank there
        assert all(row["ranks"].get(n) == r for n, r in above.items() if block_of(n) >= row["split"])
    starts[SERVER] = started(SERVER, above)
    scales = {owner: dict.fromkeys(own, 2.0) for owner, own in starts.items()}
    written_out = PlainRound(unsplit().requires_grad_(False), starts, splits, scales, config.train)
    written_out.run(batches, config.train.steps)
    examples_of = {row["client"]: row["examples"] for row in plan}
    total: dict[str, torch.Tensor] = {}
    for client, split in splits.items():
        mine = written_out.adapters(client)
        mine |= {n: pair for n, pair in written_out.adapters(SERVER).items() if block_of(n) >= split}
        for name, (b, a) in mine.items():
            share = examples_of[client] / sum(examples_of.values())
            total[name] = total.get(name, torch.zeros(len(b), a.shape[1])) + share * b.double() @ a.double()
    return total


def test_a_run_ends_in_an_adapter_that_stock_peft_loads(start_run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    double = dict.fromkeys(("model__dtype", "transport__up", "transport__down"), "float64")  # AdamW blows rounding up
    process = start_run(train__rounds=1, train__micro_batch_size=2, run__merged="true", **double)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    config = Config.from_run_config(summary["config"])
    assert summary["status"] == "finished"
    assert f"{summary['perplexity_before']:.2f} → {summary['perplexity_after']:.2f}" in output

    # Who held what: embeddings and the blocks below the split, and nothing else.
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    block = sum(p.numel() for p in base.model.layers[0].parameters())
    assert [len(each["clients"]) for each in summary["rounds"]] == [3]
    assert 0.5 < summary["rounds"][0]["server_measured_bytes"] / summary["plans"][0]["server_predicted_bytes"] < 2
    for client in (client for each in summary["rounds"] for client in each["clients"]):
        assert client["resident_parameters"] == base.model.embed_tokens.weight.numel() + client["split"] * block
        assert client["predicted_bytes"] <= client["budget_bytes"]
        assert client["process_bytes"] * 0.8 < client["measured_bytes"] <= client["budget_bytes"]
        assert len(client["losses"]) == config.train.steps
        assert client["bytes_up"] > client["bytes_down"] > config.train.steps * 4 * 32
    assert len({client["examples"] for client in summary["plans"][0]["clients"]}) > 1

    # The reported perplexities are those of stock transformers and stock PEFT.
    assert summary["perplexity_before"] == pytest.approx(stock_perplexity(base.eval(), config), rel=1e-3)
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    assert summary["perplexity_after"] == pytest.approx(stock_perplexity(adapted, config), rel=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert summary["perplexity_after"] == pytest.approx(stock_perplexity(merged, config), rel=1e-3)
    assert summary["perplexity_after"] < 0.9 * summary["perplexity_before"]
    with safe_open(folder / "checkpoints" / "round-1" / "delta.safetensors", framework="pt") as file:
        assert file.metadata()["version"] == "1"

    # The same round, unsplit, in whole batches and without Flower, gives the same update.
    for name, expected in unsplit_round(config, summary["plans"][0]["clients"]).items():
        got = (
            merged.get_submodule(name).weight.double()
            - AutoModelForCausalLM.from_pretrained(tiny_folder).get_submodule(name).weight.double()
        )
        assert torch.linalg.norm(got - expected) <= 1e-3 * torch.linalg.norm(expected), name
    token_words = ("token'", '"token"')
    assert not any(word in (folder / name).read_text() for name in ("summary.json", "flwr.log") for word in token_words)


def test_a_round_goes_on_without_a_client_that_is_killed(start_run: Run, tmp_path: Path) -> None:
    process = start_run(train__steps=40, train__rounds=2)
    events = tmp_path / "run" / "events.jsonl"
    deadline = time.monotonic() + 400
    while not (events.exists() and '"kind": "step"' in events.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, "training did not start"
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    sessions = {os.getsid(child.pid) for child in below}  # Ray's workers are no children of ours, but of our session
    workers = [
        p
        for p in psutil.process_iter(["cmdline"])
        if any("ClientAppActor" in part for part in p.info["cmdline"] or []) and os.getsid(p.pid) in sessions
    ]
    assert workers
    workers[0].kill()
    output, _ = process.communicate(timeout=500)
    failures = [line for line in output.splitlines() if "failed: " in line]
    assert process.returncode == 0, output
    assert failures and "client" in failures[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["rounds"][0]["clients"]) == 2
    assert [failure["round"] for failure in summary["failures"]] == [1]
    assert len(summary["rounds"][1]["clients"]) == 3, "the messages of the next round go to workers that live"


def test_one_process_ends_in_the_bits_of_flower(start_run: Run, tmp_path: Path) -> None:
    stated = {"clients__process_mb": 500.0, "plan__server_process_mb": 500.0, "plan__server_memory_gb": 4.0}
    ends = {}
    for engine in ("flower", "process"):
        process = start_run(run__dir=tmp_path / engine, launcher__engine=engine, lora__dropout=0.1, **stated)
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        summary = json.loads((tmp_path / engine / "summary.json").read_text())
        rows = [row for round_ in summary["rounds"] for row in round_["clients"]]
        assert all((row["measured_bytes"] == 0) == (engine == "process") for row in rows)
        figures = summary["perplexity_after"], summary["plans"], [(row["losses"], row["bytes_up"]) for row in rows]
        ends[engine] = *figures, load_file(tmp_path / engine / "adapter" / "adapter_model.safetensors")
    *ours, adapter = ends["process"]
    *theirs, expected = ends["flower"]
    assert ours == theirs
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter.items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"split__max": 4}, "split=4 is not possible"),
        ({"train__speed": 3}, "train.speed"),
    ],
)
def test_wrong_input_is_named(start_run: Run, settings: dict[str, Any], says: str) -> None:
    process = start_run(**settings)
    output, _ = process.communicate(timeout=500)
    assert process.returncode != 0
    assert says in "\n".join(output.splitlines()[-6:])
    assert "perplexity" not in output
