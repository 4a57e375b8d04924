"""HSplitLoRA as a Flower strategy: one round, from top to bottom.

    describe  -> every node says its budget, its number of examples, and the version of the weights that it holds
    plan      -> importance + budgets give every client a split point and ranks            (planning/)
    train     -> clients and server run K steps over the stream, adapters only             (training/, transport/)
    aggregate -> both sides' adapters of all clients, one noise-free sum, a new version    (lora/)
    evaluate  -> perplexity of held-out text under the global model

The strategy hosts the server shard: the frozen base, and for every client of a round its adapters above the split
point.

Source: HSplitLoRA, arXiv 2505.02795.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
from hsplitlora_flwr.lora.aggregation import Factors, aggregate
from hsplitlora_flwr.lora.delta import Delta, pack
from hsplitlora_flwr.lora.export import TOLERANCE, save_delta, save_merged_model, save_peft_adapter
from hsplitlora_flwr.lora.layers import AdapterSpec, extract
from hsplitlora_flwr.models.loading import load_tokenizer, read_config
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.planning.cost import CostModel, Workload
from hsplitlora_flwr.planning.importance import combine, scoring
from hsplitlora_flwr.planning.planner import Budget, ClientPlan, Plan, make_plan, probe_split
from hsplitlora_flwr.reporting.events import EventLog
from hsplitlora_flwr.reporting.summary import Summary
from hsplitlora_flwr.shard import Shard
from hsplitlora_flwr.training.memory import resting_bytes
from hsplitlora_flwr.training.server import ServerTrainer, StepReport


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
        self.folder = Path(folder)
        self.events = EventLog(self.folder)
        self.record = Summary(self.folder, dict(config.to_run_config()))
        self.delta = Delta()
        self.importance: dict[str, float] = {}
        self.plans: dict[int, ClientPlan] = {}
        self._held_out = held_out
        self._descriptions: dict[int, Description] = {}
        self._planned_for: dict[int, int] = {}
        self._trainers: dict[int, ServerTrainer] = {}

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
            self._process_bytes = resting_bytes()
            self.record.save()
            self.summary()
            nodes = self._wait_for_clients(grid)
            self.describe(grid, nodes)
            self._check_budgets()
            self._open()
            result.evaluate_metrics_serverapp[0] = self.evaluate(0)
            for server_round in range(1, self.config.train.rounds + 1):
                self._round_started = time.time()
                if server_round > 1:
                    self.describe(grid, nodes)
                self.make_plans(grid, server_round)
                messages = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
                replies = grid.send_and_receive(messages, timeout=self._timeout)
                _, metrics = self.aggregate_train(server_round, replies)
                self.checkpoint()
                result.train_metrics_clientapp[server_round] = metrics or MetricRecord()
                result.evaluate_metrics_serverapp[server_round] = self.evaluate(server_round)
            self.export()
        except BaseException as error:
            self.record.save(status="failed", error=_cause(error))
            self.events.emit("failed", error=_cause(error))
            raise
        finally:
            self._close()
        return result

    def describe(self, grid: Grid, nodes: Iterable[int]) -> None:
        """Ask every node for its budget and amount of data."""
        replies = grid.send_and_receive(
            [Message(settings_records(self.config), node, DESCRIBE) for node in nodes], timeout=self._timeout
        )
        self._descriptions = {
            reply.metadata.src_node_id: Description.from_records(reply.content)
            for reply in self._checked(replies, {node: str(node) for node in nodes}, 0)
        }
        names = [description.name for description in self._descriptions.values()]
        if twins := {name for name in names if names.count(name) > 1}:
            raise ClientFailedError(
                f"several nodes call themselves client {', '.join(sorted(twins))}; give each a partition-id of its own"
            )

    def make_plans(self, grid: Grid, server_round: int) -> None:
        """Give every client a split point and ranks, once; a budget that changed asks for a new plan."""
        budgets = {node: d.memory_bytes for node, d in self._descriptions.items()}
        if self.plans and budgets == self._planned_for:
            return
        self._planned_for = budgets
        if not self.importance:
            self.importance = self._probe(grid)
        plan = self._plan(self.importance, self._server_budget())
        nodes = {description.name: node for node, description in self._descriptions.items()}
        self.plans = {nodes[name]: client for name, client in plan.clients.items()}
        self._report_plan(server_round, plan)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message per planned client, and the server's half of its training behind a fresh token."""
        messages = []
        for node, plan in self.plans.items():
            alpha, dropout = self.config.alpha, self.config.lora.dropout
            specs = {name: AdapterSpec(rank, alpha(rank), dropout) for name, rank in plan.ranks.items()}
            steps = self.config.train.steps
            messages.append(self._admit(node, TRAIN, server_round, plan.split, specs, steps))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Join both sides' adapters of every client, and add the noise-free sum of the clients to the update."""
        updates: list[Mapping[str, Factors]] = []
        weights: list[float] = []
        clients: list[dict[str, Any]] = []
        names = {node: self._descriptions[node].name for node in self._trainers}
        for reply in self._checked(replies, names, server_round):
            node = reply.metadata.src_node_id
            trainer, outcome = self._trainers[node], Outcome.from_records(reply.content)
            if not trainer.finished:
                raise ClientFailedError(f"client {names[node]} replied before its last step was taken")
            updates.append({**outcome.adapters, **extract(trainer.model)})
            weights.append(self._descriptions[node].examples)
            clients.append(self._report_client(server_round, node, outcome))
        self._dismiss()
        update = aggregate(updates, weights, rule="noise_free")
        self.delta.add(update)
        self.shard.base.update(self.delta.changes())
        norm = math.sqrt(sum(float(((b.T @ b) * (a @ a.T)).sum()) for b, a in update.values()))
        self.record.content["rounds"].append({"round": server_round, "update_norm": norm, "clients": clients})
        self.events.emit(
            "round_finished", round=server_round, seconds=time.time() - self._round_started, update_norm=norm
        )
        loss = sum(w * c["losses"][-1] for w, c in zip(weights, clients, strict=True)) / sum(weights)
        return None, MetricRecord({"loss": loss, "update-norm": norm, "clients": len(clients)})

    def evaluate(self, server_round: int) -> MetricRecord:
        """Perplexity of the held-out text under the global model; round 0 is before training."""
        started = time.time()
        found = self.shard.evaluate(evaluation_batches(self._held_out_tokens, self.config.evaluation.batch_size))
        if not math.isfinite(found.nll):
            raise FloatingPointError(
                f"the held-out loss after round {server_round} is {found.nll}; lower train.lr or set train.clip"
            )
        self.events.emit(
            "evaluated",
            round=server_round,
            perplexity=found.perplexity,
            tokens=found.tokens,
            seconds=time.time() - started,
        )
        if server_round:
            self.record.content["rounds"][-1]["perplexity"] = found.perplexity
        changes: dict[str, Any] = {} if server_round else {"perplexity_before": found.perplexity}
        self.record.save(**changes, perplexity_after=found.perplexity, held_out_tokens=found.tokens)
        return MetricRecord({"perplexity": found.perplexity, "tokens": found.tokens})

    def checkpoint(self) -> None:
        """Put the accumulated update on disk: a finished round is not lost."""
        save_delta(self.delta, self.folder / "checkpoints")

    def export(self) -> None:
        """Write the PEFT adapter and, on request, the merged model; then the run is finished."""
        changes, path = self.delta.changes(), self.config.model.path
        self.events.emit("status", text="writing the adapter")
        save_peft_adapter(changes, self.folder / "adapter", self.shard.base.model, path)
        if self.config.run.merged:
            save_merged_model(self.shard.base.merged(), load_tokenizer(path), self.folder / "merged")
        self.record.save(status="finished", adapter={"folder": "adapter", "relative_error": TOLERANCE})
        self.events.emit(
            "finished",
            folder=str(self.folder),
            perplexity_before=self.record.content["perplexity_before"],
            perplexity_after=self.record.content["perplexity_after"],
        )

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
        text = (
            f"HSplitLoRA: {c.model.path} on {c.data.source}, {c.train.rounds} rounds x {c.train.steps} steps x "
            f"{c.train.batch_size} examples, ranks from {c.lora.ranks}, results in {self.folder}"
        )
        self.events.emit("status", text=text)

    # ------------------------------------------------------------------ parts of the above

    def _open(self) -> None:
        """Open the stream's port and load the base."""
        self.events.emit("status", text=f"loading {self.config.model.path}")
        self.shard = Shard(self.config)
        tokenizer = load_tokenizer(self.config.model.path)
        self._held_out_tokens = tokenize(self._held_out, tokenizer, self.config.data.max_length)

    def _close(self) -> None:
        if hasattr(self, "shard"):
            self.shard.stop()

    def _wait_for_clients(self, grid: Grid) -> list[int]:
        wanted, patience = self.config.clients.count, self.config.clients.wait
        self.events.emit("status", text=f"waiting for {wanted} clients")
        deadline = time.monotonic() + patience
        while len(nodes := sorted(grid.get_node_ids())) < wanted:
            if time.monotonic() > deadline:
                raise ClientFailedError(
                    f"only {len(nodes)} of clients.count={wanted} clients came within {patience} s; in a simulation "
                    f"pass --federation-config 'num-supernodes={wanted}', or lower clients.count"
                )
            time.sleep(0.2)
        return nodes

    def _check_budgets(self) -> None:
        """Raise ``PlanError`` before anything is loaded when no plan fits; the model's configuration tells."""
        config, train = read_config(self.config.model.path), self.config.train
        rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
        longest = max(description.longest for description in self._descriptions.values())
        workload = Workload(rows, longest, self.config.model.dtype)
        self._cost = CostModel(config, find_family(config), workload, self.config.targets)
        self._plan({}, None)

    def _plan(self, importance: Mapping[str, float], server: Budget | None) -> Plan:
        split = self.config.split
        return make_plan(
            {self._descriptions[node].name: budget for node, budget in self._budgets().items()},
            importance,
            self._cost,
            ranks=self.config.ranks,
            server=server,
            min_split=split.min,
            max_split=split.max or None,
            important_share=self.config.plan.important_share,
        )

    def _budgets(self) -> dict[int, Budget]:
        return {node: Budget(d.memory_bytes, d.process_bytes) for node, d in self._descriptions.items()}

    def _probe(self, grid: Grid) -> dict[str, float]:
        """Measure the importance: every client scores the weights below a provisional split, the server those above."""
        self.events.emit("status", text="measuring which weights matter")
        config, messages = self.config, []
        above: dict[int, dict[str, float]] = {}
        with ExitStack() as stack:
            for node, budget in self._budgets().items():
                split = probe_split(self._cost, budget, config.ranks, config.split.min, config.split.max or None)
                if split is None:  # it cannot take part at all; the planner says by how many bytes
                    continue
                messages.append(self._admit(node, PROBE, 0, split, {}, config.plan.probe_batches))
                above[node] = stack.enter_context(scoring(self._trainers[node].model))
            names = {node: self._descriptions[node].name for node in above}
            replies = self._checked(grid.send_and_receive(messages, timeout=self._timeout), names, 0)
        self._dismiss()
        total = sum(self._descriptions[node].examples for node in above)
        measured = []
        for reply in replies:
            node = reply.metadata.src_node_id
            scores = {**Outcome.from_records(reply.content).importance, **above[node]}
            measured.append((self._descriptions[node].examples / total, scores))
        importance = combine(measured)
        self.record.save(importance=importance)
        return importance

    def _admit(
        self, node: int, kind: str, server_round: int, split: int, specs: Mapping[str, AdapterSpec], steps: int
    ) -> Message:
        """Set the server's half of one client up and write the message that starts the client's half."""
        description = self._descriptions[node]
        held = {layer.name for layer in self._cost.all_layers if layer.block < split}
        task = Task(
            config=self.config,
            client=description.name,
            round=server_round,
            split=split,
            specs=specs,
            first_step=max(server_round - 1, 0) * self.config.train.steps,
            steps=steps,
            address=self.shard.address,
            token="",
            changes=pack(self.delta.below(held)),
        )
        token, trainer = self.shard.admit(split, specs, task.seed, lambda step: self._report_step(task, step))
        self._trainers[node] = trainer
        return Message(task.with_token(token).to_records(), node, kind)

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
                self.events.emit("client_failed", round=server_round, client=client, error=reason)
        if failures:
            raise ClientFailedError("; ".join(failures))
        if silent := set(names) - {reply.metadata.src_node_id for reply in replies}:
            raise ClientFailedError(
                f"no reply within {self._timeout:.0f} s (run.timeout) from {len(silent)} of {len(names)} clients"
            )
        return replies

    def _server_budget(self) -> Budget:
        stated = self.config.plan.server_memory_gb
        memory = stated * 1e9 if stated else resting_bytes() + psutil.virtual_memory().available
        return Budget(int(memory), self._process_bytes)

    def _report_plan(self, server_round: int, plan: Plan) -> None:
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
                ranks = list(client.ranks.values()) or [0]
                spread = {"min": min(ranks), "max": max(ranks), "mean": sum(ranks) / len(ranks)}
                row |= {"split": client.split, "ranks": spread, "predicted_bytes": client.predicted_bytes}
            else:
                row["left_out"] = f"misses {plan.left_out[description.name]:,} bytes of memory"
            rows.append(row)
        self.events.emit("planned", round=server_round, clients=rows)
        self.record.save(
            plan={
                "round": server_round,
                "objective": plan.objective,
                "server_predicted_bytes": plan.server_bytes,
                "clients": [
                    row | ({"ranks": dict(client.ranks)} if (client := plan.clients.get(row["client"])) else {})
                    for row in rows
                ],
            }
        )

    def _report_step(self, task: Task, step: StepReport) -> None:
        if task.round:
            self.events.emit(
                "step",
                round=task.round,
                rounds=self.config.train.rounds,
                client=task.client,
                step=step.step - task.first_step + 1,
                steps=task.steps,
                loss=step.loss,
                tokens=step.label_tokens,
                all_tokens=step.tokens,
            )

    def _report_client(self, server_round: int, node: int, outcome: Outcome) -> dict[str, Any]:
        """One client's round as it stands in the summary."""
        plan, metrics = self.plans[node], outcome.metrics
        row = {
            "client": self._descriptions[node].name,
            "examples": self._descriptions[node].examples,
            "split": plan.split,
            "ranks": {rank: list(plan.ranks.values()).count(rank) for rank in sorted(set(plan.ranks.values()))},
            "trainable_parameters": self._cost.adapter_parameters(plan.ranks),
            "resident_parameters": int(metrics["resident-parameters"]),
            "budget_bytes": self._descriptions[node].memory_bytes,
            "predicted_bytes": plan.predicted_bytes,
            "measured_bytes": int(metrics["measured-bytes"]),
            "process_bytes": self._descriptions[node].process_bytes,
            "tokens": int(metrics["tokens"]),
            "tokens_per_second": metrics["tokens"] / metrics["seconds"],
            "bytes_up": int(metrics["bytes-up"]),
            "bytes_down": int(metrics["bytes-down"]),
            "seconds": metrics["seconds"],
            "losses": outcome.losses,
        }
        self.events.emit(
            "client_finished",
            round=server_round,
            client=row["client"],
            seconds=row["seconds"],
            loss_first=outcome.losses[0],
            loss_last=outcome.losses[-1],
            measured_bytes=row["measured_bytes"],
            predicted_bytes=row["predicted_bytes"],
        )
        return row


def _reason(text: str) -> str:
    """The message of a client's error, without the traceback of the engine that carried it here."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    return last.rpartition("Message: ")[2].rstrip(">'\"")


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
