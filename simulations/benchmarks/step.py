"""``step``: training speed of split fine-tuning against the unsplit model with stock PEFT."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count, product, repeat

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hsplitlora_flwr.config import DataConfig, TrainConfig
from hsplitlora_flwr.data.collate import Batch, Tokens, tokenize, training_batches
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.lora.base import SharedBase
from hsplitlora_flwr.lora.layers import inject
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.demo import demo_model, is_demo_model
from hsplitlora_flwr.models.loading import load_tokenizer
from hsplitlora_flwr.models.parts import IGNORED
from hsplitlora_flwr.training.client import ClientTrainer, load_client, train_client
from hsplitlora_flwr.training.half import OwnHalf
from hsplitlora_flwr.training.memory import return_freed_memory
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer
from hsplitlora_flwr.transport.certificates import make_identity
from hsplitlora_flwr.transport.link import Endpoint
from hsplitlora_flwr.transport.stream import StreamLink, StreamServer
from simulations.benchmarks.common import RANK, Apart, Row, Setup, specs, take_turns

SPLITS = (5, 10, 20)
SHAPE = (8, 64)
"""Batch size, and sequence length of the equal batches."""
MAX_LENGTH = 128
"""Tokens after which real text is cut, and to which tutorials pad."""
EPOCH_ROWS = 64
"""Examples of real text; a multiple of the batch size."""
STEPS = 2
"""Of a turn on equal batches; a turn on real text is an epoch."""
TURNS, EPOCH_TURNS = 5, 3

EQUAL, REAL = "equal", "real"
"""What is trained on."""
BUDGETS = {"tight": False, "ample": True}
"""Whether the client's process keeps freed memory, by what its budget leaves."""
PADDINGS = {"max_length": f"padded to {MAX_LENGTH}", "longest": "padded to the longest of a batch"}
"""How a plain loop pads real text."""


def step(setup: Setup) -> Iterator[Row]:
    """Tokens/s in training: a split client and the server against the unsplit model with stock PEFT.

    The split sides are a client process, set up as a client app sets itself up, and the server in this process, over
    the TLS stream. ``budget`` says how the client is set up: ``tight`` gives freed memory back at once, ``ample`` keeps
    it, as a client does whose budget holds twice its plan
    (:func:`hsplitlora_flwr.training.memory.keep_freed_memory`). The plain sides are a process of their own:
    ``get_peft_model``, the loss that the Hugging Face model makes of ``labels``, AdamW and clipping. All have adapters
    of rank 8 on all linear layers of the blocks, fp32 weights and as many threads as torch takes by itself; only one
    computes at a time.

    - ``equal``: full batches of 8 x 64 random ids, the same on all sides, and every token is a label on all sides. The
      first losses must agree, or this is an error. Goal: at least 1.0 times the plain speed.
    - ``real``: one epoch over the same 64 examples, in non-padding tokens/s. Split sides take the batches of
      :func:`hsplitlora_flwr.data.collate.training_batches`, rows of like length together and padded to the longest,
      with loss on the completion. Plain sides take rows in random order with loss on every real token, as
      ``DataCollatorForLanguageModeling`` has it: once padded to ``max_length`` as tutorials do
      (``padding="max_length"``), goal: at least 1.4 times that speed; and once padded to the longest row of the batch.

    A speed is a median over turns, and ``spread`` is the distance between the quartiles of the quotient.
    """
    rows = real_rows(setup)
    base = SharedBase(setup.model)
    stream = StreamServer("127.0.0.1", 0, identity=make_identity("127.0.0.1"))
    streams: dict[str, dict[int, tuple[Endpoint, str]]] = {budget: {} for budget in BUDGETS}
    for split, budget in product(SPLITS, BUDGETS):
        part = base.server_part(split).train()
        optimizer = AdapterOptimizer(inject(part, specs(name for name, _ in part.linears()), ""), TrainConfig())
        streams[budget][split] = stream.endpoint, stream.admit(ServerTrainer(part, OwnHalf(optimizer)))
    tokens = {EQUAL: STEPS * SHAPE[0] * SHAPE[1], REAL: sum(map(len, rows))}
    with ExitStack() as stack:
        stack.callback(stream.stop)
        cut = {
            budget: stack.enter_context(Apart(SplitClients, setup.model, streams[budget], rows, keeps))
            for budget, keeps in BUDGETS.items()
        }
        for side in cut.values():
            stack.callback(side.call, "close")
        plain = stack.enter_context(Apart(PlainLoop, setup.model, rows))

        def speed(side: Apart, work: str, *how: object) -> float:
            seconds: float = side.call("train", work, *how)
            return tokens[work] / seconds

        reference = plain.call("first_loss")
        for split, side in product(SPLITS, cut.values()):
            if abs(side.call("first_loss", split) / reference - 1) > 1e-4:
                raise RuntimeError(f"split {split} does not compute what the unsplit model does: the losses differ")
        for work, turns in ((EQUAL, TURNS), (REAL, EPOCH_TURNS)):
            ways = ["longest"] if work == EQUAL else list(PADDINGS)
            ours = list(product(SPLITS, BUDGETS))
            sides = [partial(speed, cut[budget], work, split) for split, budget in ours]
            figures = take_turns([*sides, *(partial(speed, plain, work, way) for way in ways)], turns, warm_up=0)
            for (split, budget), own in zip(ours, figures, strict=False):
                for way, theirs in zip(ways, figures[len(ours) :], strict=True):
                    ratio = own / theirs
                    yield {
                        "batches": work,
                        "split": split,
                        "budget": budget,
                        "plain": "the same" if work == EQUAL else PADDINGS[way],
                        "split_tokens_per_s": own.median,
                        "plain_tokens_per_s": theirs.median,
                        "split / plain": ratio.median,
                        "spread": ratio.spread,
                    }


def real_rows(setup: Setup) -> list[Tokens]:
    """Examples of real text as token ids."""
    config = DataConfig(source="e2e", path=setup.data) if setup.data else DataConfig()
    examples = load_text(config, 0).train
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:EPOCH_ROWS].tolist()
    return tokenize([examples[index] for index in chosen], load_tokenizer(setup.model), MAX_LENGTH)


def equal_batch(path: str, rows: int, length: int) -> Batch:
    """Random ids without padding; every token is a label."""
    vocabulary = int(read_config(path).vocab_size)
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids), ids)


def plain_batches(rows: Sequence[Tokens], batch_size: int, padding: str, max_length: int) -> Iterator[Batch]:
    """Batches as tutorials make them, epoch after epoch: rows in random order, every real token is a label."""
    for epoch in count():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).tolist()
        for at in range(0, len(rows), batch_size):
            chosen = [rows[index].input_ids for index in order[at : at + batch_size]]
            length = max_length if padding == "max_length" else max(map(len, chosen))
            ids = torch.tensor([row + [0] * (length - len(row)) for row in chosen])
            mask = (torch.arange(length) < torch.tensor([len(row) for row in chosen])[:, None]).long()
            yield Batch(ids, mask, ids.masked_fill(mask == 0, IGNORED))


class SplitClients:
    """The client process: a client for each split point, all connected, one training at a time.

    Parameters
    ----------
    path : str
        ``model.path``.
    streams : Mapping[int, tuple[Endpoint, str]]
        For each split point where its server is, and its token.
    rows : Sequence[Tokens]
        The real text.
    keeps : bool
        Whether the process keeps freed memory for later.
    """

    def __init__(
        self, path: str, streams: Mapping[int, tuple[Endpoint, str]], rows: Sequence[Tokens], keeps: bool
    ) -> None:
        if not keeps:
            return_freed_memory()
        self._links = ExitStack()
        self._sides: dict[tuple[str, int], tuple[ClientTrainer, StreamLink, int]] = {}
        size, length = SHAPE
        for split, stream in streams.items():
            model, _ = load_client(path, split, "float32", "cpu", {})
            optimizer = AdapterOptimizer(inject(model, specs(name for name, _ in model.linears()), ""), TrainConfig())
            link = self._links.enter_context(StreamLink(*stream))
            equal, real = repeat(equal_batch(path, size, length)), training_batches(rows, size, seed=0)
            for work, batches, steps in ((EQUAL, equal, STEPS), (REAL, real, len(rows) // size)):
                trainer = ClientTrainer(model.train(), optimizer, batches, first_step=0)
                self._sides[work, split] = trainer, link, steps

    def first_loss(self, split: int) -> float:
        """Of the first step on equal batches."""
        self.train(EQUAL, split)
        return self._sides[EQUAL, split][0].record.losses[0]

    def train(self, work: str, split: int) -> float:
        """Seconds of a turn."""
        trainer, link, steps = self._sides[work, split]
        started = time.perf_counter()
        train_client(trainer, link, steps)
        return time.perf_counter() - started

    def close(self) -> None:
        """End the streams."""
        self._links.close()


class PlainLoop:
    """The process of the unsplit model: what one writes with transformers and PEFT alone.

    Parameters
    ----------
    path : str
        ``model.path``.
    rows : Sequence[Tokens]
        The real text.
    """

    def __init__(self, path: str, rows: Sequence[Tokens]) -> None:
        size, length = SHAPE
        folder = demo_model() if is_demo_model(path) else path
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self._model = get_peft_model(base, adapters).train()
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=TrainConfig.lr, weight_decay=0.0)
        self._losses: list[float] = []
        equal = repeat(equal_batch(path, size, length))
        self._work: dict[tuple[str, str], tuple[Iterator[Batch], int]] = {(EQUAL, "longest"): (equal, STEPS)}
        for padding in PADDINGS:
            batches = plain_batches(rows, size, padding, MAX_LENGTH)
            self._work[REAL, padding] = batches, len(rows) // size

    def first_loss(self) -> float:
        """Of the first step on equal batches."""
        self.train(EQUAL, "longest")
        return self._losses[0]

    def train(self, work: str, padding: str) -> float:
        """Seconds of a turn."""
        batches, steps = self._work[work, padding]
        started = time.perf_counter()
        for _ in range(steps):
            batch = next(batches)
            output = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, TrainConfig.clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._losses.append(float(output.loss.detach()))
        return time.perf_counter() - started
