"""The real model and, where it is at hand, the real data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hsplitlora_flwr.config import DataConfig, TrainConfig
from hsplitlora_flwr.data.collate import evaluation_batches, tokenize, training_batches
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.evaluation.perplexity import evaluate
from hsplitlora_flwr.lora import AdapterSpec, extract, inject
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.models.demo import demo_model
from hsplitlora_flwr.models.loading import load_client_model, load_tokenizer
from hsplitlora_flwr.training.client import ClientTrainer, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.stream import StreamLink, StreamServer

MODEL, SPLIT, STEPS = "smollm2-135m", 10, 3
TRAIN = TrainConfig(lr=1e-3, clip=1.0)


def test_three_split_steps_equal_three_unsplit_steps() -> None:
    """S1 at split 10, over a real stream, against stock PEFT with q and v of rank 8."""
    rows = tokenize(load_text(DataConfig(), 0).train[:64], load_tokenizer(MODEL), 64)
    base = SharedBase(MODEL)
    server, client = base.server_part(SPLIT), load_client_model(MODEL, SPLIT)
    names = [n for part in (client, server) for n, _ in part.linears() if n.endswith(("q_proj", "v_proj"))]
    specs = {name: AdapterSpec(8, 16.0) for name in names}
    own = inject(client, specs, "s"), inject(server, specs, "s")
    starts = {**extract(client), **extract(server)}
    trainer = ServerTrainer(server.train(), OwnHalf(AdapterOptimizer(own[1], TRAIN)))
    shard = StreamServer("127.0.0.1", 0, identity=make_identity("127.0.0.1"))
    with StreamLink(shard.endpoint, shard.admit(trainer)) as link:
        optimizer, batches = AdapterOptimizer(own[0], TRAIN), training_batches(rows, 4, seed=0)
        record = train_client(ClientTrainer(client.train(), optimizer, batches, first_step=0), link, STEPS)
    shard.stop()

    twin = get_peft_model(
        AutoModelForCausalLM.from_pretrained(demo_model()),
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    ).train()
    for name in names:
        twin.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(starts[name][1] / 2)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=TRAIN.lr, weight_decay=0.0)
    losses = []
    for _, batch in zip(range(STEPS), training_batches(rows, 4, seed=0), strict=False):
        logits = twin(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, TRAIN.clip)
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss.detach()))
    assert record.losses == pytest.approx(losses, rel=1e-5)
    assert len(set(losses)) == STEPS


def test_perplexity_of_e2e_before_training(e2e_folder: Path) -> None:
    """The first 40 rows of the dev set, given ``mr + newline``, EOS included, as a plain loop over rows finds it."""
    held_out = load_text(DataConfig(source="e2e", path=str(e2e_folder), eval_rows=40), 0).held_out
    rows = tokenize(held_out, load_tokenizer(MODEL), 128)
    base = SharedBase(MODEL)
    found = evaluate(base.whole(), evaluation_batches(rows, 16))
    assert found.tokens == 744
    assert found.perplexity == pytest.approx(12.19778, rel=1e-5)
