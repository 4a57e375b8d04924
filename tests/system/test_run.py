"""A whole run: Hydra, flwr run, SuperLink, Ray, the stream; checked against the unsplit model and stock PEFT.

Its second round loses a client, whose process is killed between two steps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.collate import evaluation_batches, tokenize, training_batches
from hsplitlora_flwr.data.partition import partition
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.export import DELTA_FILE, load_update
from hsplitlora_flwr.models import split_model
from hsplitlora_flwr.models.configuration import with_model_dtype
from tests.plain import SERVER, PlainRound, block_of
from tests.system.conftest import Run, start_in


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
        dtype = getattr(torch, with_model_dtype(config).model.dtype)
        return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)

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


@dataclass(frozen=True)
class Done:
    """A run of three rounds, and the checkpoint of its first one."""

    folder: Path
    output: str
    first_round: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def config(self) -> Config:
        """Its settings but for the listener, which only its own processes know."""
        return Config.from_run_config(self.summary["config"] | {"run.plugins": "", "run.listeners": ""})


DOUBLE = dict.fromkeys(("model__dtype", "transport__up", "transport__down"), "float64")  # AdamW blows rounding up
SETTINGS = {"train__micro_batch_size": 2, **DOUBLE}
HOLDS = """
import time
from pathlib import Path
from hsplitlora_flwr import register_listener

@register_listener("holds")
class Holds:
    def __init__(self, config, folder):
        self.folder = Path(folder)

    def handle(self, event):
        if event["kind"] == "step" and event["round"] == 2:  # whoever trains waits for what is said to listeners
            while not (self.folder / "go on").exists():
                time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A client's process is killed while the server holds the first step of the second round."""
    place = tmp_path_factory.mktemp("run")
    folder, first_round = place / "run", place / "round-1"
    (place / "holds.py").write_text(HOLDS)
    named = {"run__plugins": "holds", "run__listeners": "holds", "run__merged": "true", "train__rounds": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")])))
        process = start_in(folder, tiny_folder, **named, **SETTINGS)
    try:
        events = folder / "events.jsonl"
        while not (events.exists() and in_round_2(events.read_text())):
            assert process.poll() is None, f"training did not start: {process.communicate()}"
            time.sleep(0.1)
        shutil.copytree(folder / "checkpoints" / "round-1", first_round)
        a_worker_of(process).kill()
    finally:
        folder.mkdir(exist_ok=True)
        (folder / "go on").touch()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return Done(folder, output, first_round)


def in_round_2(events: str) -> bool:
    lines = (line for line in events.splitlines(keepends=True) if line.endswith("\n"))
    return any(event["kind"] == "step" and event["round"] == 2 for event in map(json.loads, lines))


def a_worker_of(launcher: subprocess.Popen[str]) -> psutil.Process:
    below = psutil.Process(launcher.pid).children(recursive=True)
    sessions = {os.getsid(child.pid) for child in below}  # Ray's workers are no children of ours, but of our session
    workers = [
        p
        for p in psutil.process_iter(["cmdline"])
        if any("ClientAppActor" in part for part in p.info["cmdline"] or []) and os.getsid(p.pid) in sessions
    ]
    assert workers
    return workers[0]


def test_a_run_ends_in_an_adapter_that_stock_peft_loads(done: Done, tiny_folder: Path) -> None:
    summary, folder = done.summary, done.folder
    config = done.config
    assert summary["status"] == "finished"
    assert f"{summary['perplexity_before']:.2f} → {summary['perplexity_after']:.2f}" in done.output

    # Who held what: embeddings and the blocks below the split, and nothing else.
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    block = sum(p.numel() for p in base.model.layers[0].parameters())
    assert len(summary["rounds"][0]["clients"]) == 3
    assert 0.5 < summary["rounds"][0]["server_measured_bytes"] / summary["plans"][0]["server_predicted_bytes"] < 2
    for server_round, client in ((each["round"], client) for each in summary["rounds"] for client in each["clients"]):
        assert client["resident_parameters"] == base.model.embed_tokens.weight.numel() + client["split"] * block
        assert client["predicted_bytes"] <= client["budget_bytes"]
        assert client["process_bytes"] * 0.8 < client["measured_bytes"] <= client["budget_bytes"]
        assert len(client["losses"]) == config.train.steps
        assert client["bytes_down"] > config.train.steps * 4 * 32
        assert client["bytes_up"] > client["bytes_down"] or server_round > 1, "later rounds bring an update down"
    assert len({client["examples"] for client in summary["plans"][0]["clients"]}) > 1

    # The reported perplexities are those of stock transformers and stock PEFT.
    assert summary["perplexity_before"] == pytest.approx(stock_perplexity(base.eval(), config), rel=1e-3)
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    assert summary["perplexity_after"] == pytest.approx(stock_perplexity(adapted, config), rel=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert summary["perplexity_after"] == pytest.approx(stock_perplexity(merged, config), rel=1e-3)
    assert summary["perplexity_after"] < 0.9 * summary["perplexity_before"]
    token_words = ("token'", '"token"')
    assert not any(word in (folder / name).read_text() for name in ("summary.json", "flwr.log") for word in token_words)


def test_a_round_is_the_same_unsplit_in_whole_batches_and_without_flower(done: Done) -> None:
    summary = done.summary
    accumulated = load_update(done.first_round)
    assert accumulated.version == 1
    found = {name: change.dense().double() for name, change in accumulated.changes().items()}
    expected = unsplit_round(done.config, summary["plans"][0]["clients"])
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert torch.linalg.norm(found[name] - matrix) <= 1e-3 * torch.linalg.norm(matrix), name


def test_a_round_goes_on_without_a_client_that_is_killed(done: Done) -> None:
    failures = [line for line in done.output.splitlines() if "failed: " in line]
    assert failures and "client" in failures[0]
    summary = done.summary
    assert len(summary["rounds"][1]["clients"]) == 2
    assert [failure["round"] for failure in summary["failures"]] == [2]
    assert len(summary["rounds"][2]["clients"]) == 3, "the messages of the next round go to workers that live"


def test_one_process_ends_in_the_bits_of_flower(done: Done, start_run: Run, tmp_path: Path) -> None:
    process = start_run(launcher__engine="process", train__rounds=1, **SETTINGS)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    ours, theirs = json.loads((tmp_path / "run" / "summary.json").read_text()), done.summary
    rows, expected = ours["rounds"][0]["clients"], theirs["rounds"][0]["clients"]
    assert all(row["measured_bytes"] == 0 for row in rows) and all(row["measured_bytes"] > 0 for row in expected)
    assert ours["rounds"][0]["perplexity"] == theirs["rounds"][0]["perplexity"]
    for same in ("client", "split", "losses", "bytes_up"):
        assert [row[same] for row in rows] == [row[same] for row in expected]
    ranks = ([row["ranks"] for row in summary["plans"][0]["clients"]] for summary in (ours, theirs))
    assert next(ranks) == next(ranks)
    found, wanted = (
        load_file(folder / DELTA_FILE) for folder in (tmp_path / "run" / "checkpoints" / "round-1", done.first_round)
    )
    assert found.keys() == wanted.keys() and all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


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
