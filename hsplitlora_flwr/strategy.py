"""HSplitLoRA as a Flower strategy: one round, from top to bottom.

    describe  -> every node says its budget, its number of examples, and the version of the weights that it holds
    score     -> which weights matter, on a few batches of every client                     (planning/importance.py)
    plan      -> importance + budgets give every client a split point and ranks             (planning/)
    train     -> clients and server run K steps over the stream, adapters only              (training/, transport/)
    aggregate -> both sides' adapters of all clients, one noise-free sum, a new version     (lora/)
    evaluate  -> perplexity of held-out text under the global model

The strategy hosts the server shard: the frozen base, and for every client of a round its adapters above the split
point. The methods that HSplitLoRA is compared with take the same round; :mod:`hsplitlora_flwr.methods` says what each
does otherwise.

Source: HSplitLoRA, arXiv 2505.02795.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.control import DESCRIBE, PROBE, TRAIN, Description, Outcome, Task, settings_records
from hsplitlora_flwr.data.collate import evaluation_batches, tokenize
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.lora.aggregation import Factors, aggregate, truncate
from hsplitlora_flwr.lora.delta import Delta, pack
from hsplitlora_flwr.lora.export import TOLERANCE, save_delta, save_merged_model, save_peft_adapter
from hsplitlora_flwr.lora.layers import AdapterSpec, extract
from hsplitlora_flwr.methods import METHODS, cost_model, make_round_plan
from hsplitlora_flwr.models.loading import load_tokenizer, read_config
from hsplitlora_flwr.models.split import WholeModel
from hsplitlora_flwr.planning.importance import combine, drift, scoring, smooth
from hsplitlora_flwr.planning.planner import Budget, ClientPlan, Plan, probe_split
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.shard import Shard
from hsplitlora_flwr.training.evaluation import evaluate
from hsplitlora_flwr.training.generation import generate_and_score
from hsplitlora_flwr.training.memory import process_bytes, resting_bytes
from hsplitlora_flwr.training.server import ServerTrainer, StepReport

ADAPTER_FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")


class ClientFailedError(RuntimeError):
    """A client could not do its part of a round; the text holds what it reported."""


class HSplitLoRA(Strategy):
    """Heterogeneous split fine-tuning with LoRA.

    Parameters
    ----------
    config : Config
        All settings.
    held_out : Sequence[Example]
        Text that measures the model and that no client trains on.
    folder : Path
        The run folder.

    Notes
    -----
    ``start`` runs everything; it needs a ``Grid`` and nothing else, since arrays come from the model's files.
    """

    def __init__(self, config: Config, held_out: Sequence[Example], folder: Path) -> None:
        self.config = config
        self.method = METHODS[config.method.name]
        self.folder = Path(folder)
        self.report = RunReport(self.folder, config.to_run_config())
        self.delta = Delta(config.lora.rank_cap)
        self.adapter: dict[str, Factors] = {}
        self.importance: dict[str, float] = {}
        self.plans: dict[int, ClientPlan] = {}
        self._held_out = held_out
        self._timeout: float = config.run.timeout
        self._descriptions: dict[int, Description] = {}
        self._planned_budgets: dict[int, Budget] = {}
        self._planned_importance: dict[str, float] = {}
        self._trainers: dict[int, ServerTrainer] = {}
        self._sent: dict[int, int] = {}  # bytes of the tensors in the message to each node

    # ------------------------------------------------------------------ the run

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Any = None,
    ) -> Result:
        """Run all rounds and write the results into the run folder.

        Parameters
        ----------
        grid : Grid
            The connection to the nodes.
        num_rounds, timeout : optional
            Instead of ``train.rounds`` and ``run.timeout`` (seconds).
        initial_arrays, train_config, evaluate_config, evaluate_fn
            Must be left out: the model comes from its files, settings from the config, and the strategy evaluates.

        Returns
        -------
        Result
            Metrics by round; the arrays are in the run folder.

        Raises
        ------
        PlanError, ClientFailedError
            With the cause, which also stands in ``summary.json`` and in the event log.
        """
        if initial_arrays or train_config or evaluate_config or evaluate_fn:
            raise ValueError("HSplitLoRA takes its model, settings and evaluation from the config; pass grid alone")
        if num_rounds is not None:  # the learning-rate schedule spans them
            self.config = replace(self.config, train=replace(self.config.train, rounds=num_rounds))
        self._timeout = timeout or self.config.run.timeout
        result = Result()
        try:
            self.summary()
            self.prepare(grid)
            result.evaluate_metrics_serverapp[0] = self.evaluate(0)
            for server_round in range(1, self.config.train.rounds + 1):
                result.train_metrics_clientapp[server_round] = self.train_round(grid, server_round)
                self.checkpoint()
                result.evaluate_metrics_serverapp[server_round] = self.evaluate(server_round)
            self.generate()
            self.export()
        except BaseException as error:
            self.report.failed(error)
            raise
        finally:
            self._close()
        return result

    def prepare(self, grid: Grid) -> None:
        """Wait for the clients, see that a plan is possible, and only then load the base."""
        self._process_bytes = process_bytes(read_config(self.config.model.path))
        self._nodes = self._wait_for_clients(grid)
        self.describe(grid)
        longest = max(description.longest for description in self._descriptions.values())
        train = self.config.train
        rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
        self._cost = cost_model(self.config, rows, longest, len(self._nodes))
        make_round_plan(self.config, self._budgets_by_name(), None, {}, self._cost)
        self._open()

    def train_round(self, grid: Grid, server_round: int) -> MetricRecord:
        """One round: describe, score, plan, train, aggregate."""
        self._round_started = time.time()
        if server_round > 1:
            self.describe(grid)
        self.score_weights(grid, server_round)
        self.make_plans(server_round)
        messages = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
        replies = grid.send_and_receive(messages, timeout=self._timeout)
        _, metrics = self.aggregate_train(server_round, replies)
        return metrics or MetricRecord()

    def describe(self, grid: Grid) -> None:
        """Ask every node for its budget and amount of data."""
        replies = grid.send_and_receive(
            [Message(settings_records(self.config), node, DESCRIBE) for node in self._nodes], timeout=self._timeout
        )
        self._descriptions = {
            reply.metadata.src_node_id: Description.from_records(reply.content)
            for reply in self._checked(replies, {node: str(node) for node in self._nodes}, 0)
        }
        names = [description.name for description in self._descriptions.values()]
        if twins := {name for name in names if names.count(name) > 1}:
            raise ClientFailedError(
                f"several nodes call themselves client {', '.join(sorted(twins))}; give each a partition-id of its own"
            )

    def score_weights(self, grid: Grid, server_round: int) -> None:
        """Measure which weights matter, when a measurement is due, and let it move the importance known so far."""
        plan = self.config.plan
        if not self.method.importance:
            self.importance = {layer.name: 1 / len(self._cost.layers) for layer in self._cost.layers}
        elif server_round == 1:
            self.importance = self._probe(grid, server_round)
        elif plan.probe_every and (server_round - 1) % plan.probe_every == 0:
            measured, earlier = self._probe(grid, server_round), (server_round - 1) // plan.probe_every
            self.importance = smooth(self.importance, measured, earlier, plan.beta_max, plan.half_time)

    def make_plans(self, server_round: int) -> None:
        """Give every client a split point and ranks; a plan is kept until importance or budgets moved."""
        # what clients state; what their processes take is measured anew every time
        budgets = {node: replace(budget, process_bytes=0) for node, budget in self._budgets().items()}
        moved = drift(self.importance, self._planned_importance)
        if not self.plans:
            reason = ""
        elif budgets != self._planned_budgets:
            reason = "budgets changed"
        elif moved > self.config.plan.drift:
            reason = f"importance moved by {moved:.3f}, more than plan.drift={self.config.plan.drift:g}"
        else:
            self.report.importance(server_round, self.importance, moved)
            return
        plan = make_round_plan(self.config, self._budgets_by_name(), self._server_budget(), self.importance, self._cost)
        nodes = {description.name: node for node, description in self._descriptions.items()}
        self.plans = {nodes[name]: client for name, client in plan.clients.items()}
        self._report_plan(server_round, reason, plan)
        self.report.importance(server_round, self.importance, moved if self._planned_importance else 0.0)
        self._planned_budgets, self._planned_importance = budgets, self.importance

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message per planned client, and the server's half of its training behind a fresh token."""
        if self.method.carries:  # what training goes on from is the global adapter, not an update in the weights
            self.base.update({})
        messages = []
        for node, plan in self.plans.items():
            alpha, dropout = self.config.alpha, self.config.lora.dropout
            specs = {name: AdapterSpec(rank, alpha(rank), dropout) for name, rank in plan.ranks.items()}
            messages.append(self._admit(node, TRAIN, server_round, plan.split, specs, self.config.train.steps))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Join both sides' adapters of every client, and add the clients up: noise-free, or by the method's rule."""
        updates: list[Mapping[str, Factors]] = []
        weights: list[float] = []
        clients: list[dict[str, Any]] = []
        names = {node: self._descriptions[node].name for node in self.plans}
        for reply in self._checked(replies, names, server_round):
            node = reply.metadata.src_node_id
            outcome, upper = Outcome.from_records(reply.content), {}
            if self.method.split:
                if not self._trainers[node].finished:
                    raise ClientFailedError(f"client {names[node]} replied before its last step was taken")
                upper = extract(self._trainers[node].model)
            updates.append({**outcome.adapters, **upper})
            weights.append(self._descriptions[node].examples)
            clients.append(self._report_client(server_round, node, outcome, updates[-1]))
        self._dismiss()
        update = aggregate(updates, weights, rule=self.method.rule)
        if self.method.carries:
            self.adapter = update
            self.delta.replace(update)
        else:
            self.delta.add(update)
        norm = math.sqrt(sum(float(((b.T @ b) * (a @ a.T)).sum()) for b, a in update.values()))
        self.report.round_finished(server_round, time.time() - self._round_started, norm, clients, **self._dropped())
        loss = sum(w * c["losses"][-1] for w, c in zip(weights, clients, strict=True)) / sum(weights)
        return None, MetricRecord({"loss": loss, "update-norm": norm, "clients": len(clients)})

    def evaluate(self, server_round: int) -> MetricRecord:
        """Perplexity of the held-out text under the global model; round 0 is before training."""
        started = time.time()
        batches = evaluation_batches(self._held_out_tokens, self.config.evaluation.batch_size)
        found = evaluate(self._global_model(), batches)
        if not math.isfinite(found.nll):
            raise FloatingPointError(
                f"the held-out loss after round {server_round} is {found.nll}; lower train.lr or set train.clip"
            )
        self.report.evaluated(server_round, found.perplexity, found.tokens, time.time() - started)
        return MetricRecord({"perplexity": found.perplexity, "tokens": found.tokens})

    def checkpoint(self) -> None:
        """Put the accumulated update on disk: a finished round is not lost."""
        save_delta(self.delta, self.folder / "checkpoints")

    def generate(self) -> None:
        """On request, let the model write a text for every held-out prompt, and score the texts."""
        options = self.config.evaluation
        if not options.generate:
            return
        self.report.status("writing a text for every held-out prompt")
        scores = generate_and_score(
            self._global_model().causal_lm,
            load_tokenizer(self.config.model.path),
            self._held_out,
            self.folder,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            beams=options.beams,
        )
        self.report.generated(scores)

    def export(self) -> None:
        """Write the PEFT adapter and what else was asked for; then the run is finished."""
        changes, path = self.delta.changes(), self.config.model.path
        self.report.status("writing the adapter")
        save_peft_adapter(changes, self.folder / "adapter", self.base.model, path)
        if self.config.run.merged:
            save_merged_model(self.base.merged(), load_tokenizer(path), self.folder / "merged")
        self.report.finished(ADAPTER_FILES, adapter={"folder": "adapter", "relative_error": TOLERANCE})

    # ------------------------------------------------------------------ what Flower's Strategy also asks for

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: the server evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing: the server evaluates."""
        return None

    def summary(self) -> None:
        """Say what is in force."""
        c = self.config
        adapters = "all weights" if self.method.full else f"ranks from {c.lora.ranks}"
        if self.method.ranks == "equal" and not self.method.full:
            adapters = f"rank {c.lora.rank}"
        name = "HSplitLoRA" if c.method.name == "hsplitlora" else c.method.name
        self.report.status(
            f"{name}: {c.model.path} on {c.data.source}, {c.train.rounds} rounds x {c.train.steps} steps x "
            f"{c.train.batch_size} examples, {adapters}, results in {self.folder}"
        )

    # ------------------------------------------------------------------ parts of the above

    def _open(self) -> None:
        """Open the stream's port and load the base."""
        self.report.status(f"loading {self.config.model.path}")
        self.shard = Shard(self.config)
        self.base = self.shard.base
        self._read_held_out()

    def _read_held_out(self) -> None:
        tokenizer = load_tokenizer(self.config.model.path)
        self._held_out_tokens = tokenize(self._held_out, tokenizer, self.config.data.max_length)

    def _close(self) -> None:
        if hasattr(self, "shard"):
            self.shard.stop()

    def _global_model(self) -> WholeModel:
        self.base.update(self.delta.changes())
        return self.base.whole()

    def _dropped(self) -> dict[str, float]:
        return {"dropped_energy": self.delta.dropped} if self.config.lora.rank_cap else {}

    def _wait_for_clients(self, grid: Grid) -> list[int]:
        wanted, patience = self.config.clients.count, self.config.clients.wait
        self.report.status(f"waiting for {wanted} clients")
        deadline = time.monotonic() + patience
        while len(nodes := sorted(grid.get_node_ids())) < wanted:
            if time.monotonic() > deadline:
                raise ClientFailedError(
                    f"only {len(nodes)} of clients.count={wanted} clients came within {patience} s; in a simulation "
                    f"pass --federation-config 'num-supernodes={wanted}', or lower clients.count"
                )
            time.sleep(0.2)
        return nodes

    def _budgets(self) -> dict[int, Budget]:
        return {node: description.budget for node, description in self._descriptions.items()}

    def _budgets_by_name(self) -> dict[str, Budget]:
        return {description.name: description.budget for description in self._descriptions.values()}

    def _server_budget(self) -> Budget:
        plan = self.config.plan
        stated = plan.server_memory_gb
        memory = stated * 1e9 if stated else resting_bytes() + psutil.virtual_memory().available
        return Budget(int(memory), self._process_bytes, flops=plan.server_gflops * 1e9 or None)

    def _probe(self, grid: Grid, server_round: int) -> dict[str, float]:
        """One measurement: every client scores the weights below a provisional split, the server those above."""
        self.report.status("measuring which weights matter")
        config, messages = self.config, []
        above: dict[int, dict[str, float]] = {}
        with ExitStack() as stack:
            for node, budget in self._budgets().items():
                split = probe_split(self._cost, budget, config.ranks, config.split.min, config.split.max or None)
                if split is None:  # it cannot take part at all; the planner says by how many bytes
                    continue
                messages.append(self._admit(node, PROBE, server_round, split, {}, config.plan.probe_batches))
                upper = self._trainers[node].model
                above[node] = stack.enter_context(scoring(upper, config.plan.cost, config.lora.rank))
            names = {node: self._descriptions[node].name for node in above}
            replies = self._checked(grid.send_and_receive(messages, timeout=self._timeout), names, server_round)
        self._dismiss()
        total = sum(self._descriptions[node].examples for node in above)
        measured = []
        for reply in replies:
            node = reply.metadata.src_node_id
            scores = {**Outcome.from_records(reply.content).importance, **above[node]}
            measured.append((self._descriptions[node].examples / total, scores))
        return combine(measured)

    def _admit(
        self, node: int, kind: str, server_round: int, split: int, specs: Mapping[str, AdapterSpec], steps: int
    ) -> Message:
        """Set the server's half of one client up, if there is one, and write the message that starts the client's."""
        description, carries = self._descriptions[node], self.method.carries and kind == TRAIN
        held = {layer.name for layer in self._cost.all_layers if layer.block < split}
        start = {name: truncate(factors, specs[name].rank) for name, factors in self.adapter.items() if name in specs}
        task = Task(
            config=self.config,
            client=description.name,
            round=server_round,
            split=split,
            specs=specs,
            first_step=(server_round - 1) * self.config.train.steps,
            steps=steps,
            address=self.shard.address,
            token="",
            changes={} if carries else pack(self.delta.below(held)),
            start={name: factors for name, factors in start.items() if name in held},
        )
        self._sent[node] = sum(t.nbytes for t in (*task.changes.values(), *chain.from_iterable(task.start.values())))
        if self.method.split:
            report = self._report_step if kind == TRAIN else _say_nothing
            token, trainer = self.shard.admit(
                split,
                specs,
                task.seed,
                start,
                freeze_a=self.method.freeze_a,
                report=lambda step: report(task, step),
            )
            self._trainers[node] = trainer
            task = task.with_token(token)
        return Message(task.to_records(), node, kind)

    def _dismiss(self) -> None:
        """Forget the round's adapters, optimizers and tokens."""
        self._trainers.clear()
        self.shard.dismiss_all()

    def _checked(self, replies: Iterable[Message], names: Mapping[int, str], server_round: int) -> list[Message]:
        """The replies, if every client sent one without an error.

        Raises
        ------
        ClientFailedError
            With the first failure's cause.
        """
        replies = list(replies)
        failures = []
        for reply in replies:
            if reply.has_error():
                client = names.get(reply.metadata.src_node_id, str(reply.metadata.src_node_id))
                reason = _reason(str(reply.error.reason))
                failures.append(f"client {client} failed: {reason}")
                self.report.client_failed(server_round, client, reason)
        if failures:
            raise ClientFailedError("; ".join(failures))
        if silent := set(names) - {reply.metadata.src_node_id for reply in replies}:
            raise ClientFailedError(
                f"no reply within {self._timeout:.0f} s (run.timeout) from {len(silent)} of {len(names)} clients"
            )
        return replies

    def _report_plan(self, server_round: int, reason: str, plan: Plan) -> None:
        rows = []
        for description in self._descriptions.values():
            row: dict[str, Any] = {
                "client": description.name,
                "examples": description.examples,
                "budget_bytes": description.memory_bytes,
                "blocks": self._cost.num_blocks,
                "left_out": "",
            }
            if client := plan.clients.get(description.name):
                row |= {"split": client.split, "ranks": dict(client.ranks), "predicted_bytes": client.predicted_bytes}
            else:
                row["left_out"] = f"misses {plan.left_out[description.name]:,} bytes of memory"
            rows.append(row)
        figures = {"objective": plan.objective, "server_predicted_bytes": plan.server_bytes}
        if self.method.ranks == "plan":
            figures |= {"greedy_objective": plan.greedy_objective, "bound": plan.bound, "seconds": plan.seconds}
        self.report.planned(server_round, reason, figures, rows)

    def _report_step(self, task: Task, step: StepReport) -> None:
        self.report.step(
            round=task.round,
            rounds=self.config.train.rounds,
            client=task.client,
            step=step.step - task.first_step + 1,
            steps=task.steps,
            loss=step.loss,
            tokens=step.label_tokens,
            all_tokens=step.tokens,
        )

    def _report_client(
        self, server_round: int, node: int, outcome: Outcome, adapters: Mapping[str, Factors]
    ) -> dict[str, Any]:
        """One client's round as it stands in the summary."""
        plan, metrics = self.plans[node], outcome.metrics
        trained = (b.numel() + (0 if self.method.freeze_a else a.numel()) for b, a in adapters.values())
        row = {
            "client": self._descriptions[node].name,
            "examples": self._descriptions[node].examples,
            "split": plan.split,
            "ranks": {rank: list(plan.ranks.values()).count(rank) for rank in sorted(set(plan.ranks.values()))},
            "trainable_parameters": sum(trained),
            "resident_parameters": int(metrics["resident-parameters"]),
            "budget_bytes": self._descriptions[node].memory_bytes,
            "predicted_bytes": plan.predicted_bytes,
            "measured_bytes": int(metrics["measured-bytes"]),
            "process_bytes": self._descriptions[node].process_bytes,
            "tokens": int(metrics["tokens"]),
            "label_tokens": int(metrics["label-tokens"]),
            "tokens_per_second": metrics["tokens"] / metrics["seconds"],
            "bytes_up": int(metrics["bytes-up"]) + sum(b.nbytes + a.nbytes for b, a in outcome.adapters.values()),
            "bytes_down": int(metrics["bytes-down"]) + self._sent[node],
            "seconds": metrics["seconds"],
            "losses": outcome.losses,
        }
        self.report.client_finished(server_round, row)
        return row


def _say_nothing(task: Task, step: StepReport) -> None:
    """A probe trains nothing, so its steps are no progress."""


def _reason(text: str) -> str:
    """The message of a client's error, without the traceback of the engine that carried it here."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    return last.rpartition("Message: ")[2].rstrip(">'\"")
