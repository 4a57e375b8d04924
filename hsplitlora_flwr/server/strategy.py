"""HSplitLoRA as a Flower strategy: one round, from top to bottom.

    describe  -> every node says its budget, its number of examples, and the version of the weights that it holds
    score     -> which weights matter, on a few batches of every client                     (planning/importance.py)
    plan      -> importance + budgets give every client a split point and ranks             (planning/)
    train     -> clients and server run K steps, adapters only, over streams or messages    (training/, transport/)
    aggregate -> the clients' adapters and the server's, one noise-free sum, a new version  (lora/)
    evaluate  -> perplexity of held-out text under the global model, and on request of the clients' own

A client that fails at any point is left out of the round, and asked again in the next.

The strategy hosts the server shard: the frozen base, and the adapters above the split points, which every client's step
trains in turn. The methods that HSplitLoRA is compared with take the same round; :mod:`hsplitlora_flwr.methods` says
what each does otherwise.

Source: HSplitLoRA, arXiv 2505.02795.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.collate import evaluation_batches, prompts_inside_tokens
from hsplitlora_flwr.data.fit import Cut, beyond_training, fit_text
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.evaluation.generation import generate_and_score
from hsplitlora_flwr.evaluation.perplexity import MAX_NLL, evaluate
from hsplitlora_flwr.lora.aggregation import Factors, aggregate, directions, residual
from hsplitlora_flwr.lora.export import TOLERANCE, save_merged_model, save_peft_adapter
from hsplitlora_flwr.lora.kept import KeptHalf
from hsplitlora_flwr.lora.limits import SizeLimit, capped_weights, update_norm, update_size
from hsplitlora_flwr.lora.update import Change, Delta, with_adapter
from hsplitlora_flwr.messages import EVALUATE, PROBE, TRAIN, Outcome, ReplyError
from hsplitlora_flwr.methods import METHODS, keeps_half, shares_half, starts_along_update
from hsplitlora_flwr.models.loading import load_tokenizer, read_config
from hsplitlora_flwr.models.placement import pick_devices
from hsplitlora_flwr.models.quantisation import check_quantiser
from hsplitlora_flwr.models.split import WholeModel
from hsplitlora_flwr.planning.budget import Budget
from hsplitlora_flwr.planning.cost import CostModel
from hsplitlora_flwr.planning.importance import combine, complete, drift, scoring, smooth
from hsplitlora_flwr.planning.leakage import LeakageTable
from hsplitlora_flwr.planning.planner import ClientPlan, Plan, probe_plan
from hsplitlora_flwr.planning.round import cost_model, make_round_plan, own_costs, split_bounds
from hsplitlora_flwr.reporting.events import Listener
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.schema import scalar
from hsplitlora_flwr.server.best import replace_best, take_best
from hsplitlora_flwr.server.checkpoint import RunState, check_resume, last_round, load_state, save_state
from hsplitlora_flwr.server.clients import Clients
from hsplitlora_flwr.server.dispatch import Dispatch
from hsplitlora_flwr.server.records import client_row, plan_rows
from hsplitlora_flwr.server.shard import Shard
from hsplitlora_flwr.training.memory import free_bytes, may_fragment
from hsplitlora_flwr.training.process import OwnProcess

ADAPTER_FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")


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
    process : OwnProcess, optional
        The process that it runs in; one of its own by default.
    listeners : Sequence[Listener]
        Hear every event of the run.

    Notes
    -----
    ``start`` runs everything; it needs a ``Grid`` and nothing else, since arrays come from the model's files.
    """

    def __init__(
        self,
        config: Config,
        held_out: Sequence[Example],
        folder: Path,
        process: OwnProcess | None = None,
        *,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.config = config
        self.method = METHODS[config.method.name]
        self.folder = Path(folder)
        check_resume(config, self.folder)
        self.report = RunReport(self.folder, config.to_run_config(), listeners)
        self.delta = Delta(config.lora.rank_cap)
        self.importance: dict[str, float] = {}
        self.plans: dict[str, ClientPlan] = {}
        self._held_out, self._process = held_out, process or OwnProcess()
        self._own: dict[str, CostModel] = {}  # of each client's side
        self._lengths: dict[str, int] = {}  # of the rows that the cost models are for
        self._planned_lengths: dict[str, int] = {}
        self.clients = Clients(config, self.report)
        self.size_limit = SizeLimit(config.clients.max_update)
        self._planned_budgets: dict[str, Budget] = {}
        self._planned_importance: dict[str, float] = {}
        self._resumed: RunState | None = None
        self._opened = ExitStack()  # what ends with the run
        self._server_peak = 0  # memory of this process while the clients of this round trained, in bytes

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
            self.report.configured(self.config.to_run_config())
        self.clients.timeout = timeout or self.config.run.timeout
        result = Result()
        try:
            self.summary()
            self.resume()
            self.prepare(grid)
            done = self._resumed.server_round if self._resumed else 0
            result.evaluate_metrics_serverapp[done] = self.evaluate(done)
            self.keep_best(done)
            for server_round in range(done + 1, self.config.train.rounds + 1):
                result.train_metrics_clientapp[server_round] = self.train_round(grid, server_round)
                result.evaluate_metrics_serverapp[server_round] = self.evaluate(server_round)
                self.checkpoint(server_round)
                self.keep_best(server_round)
                if measured := self.evaluate_clients(grid, server_round):
                    result.evaluate_metrics_clientapp[server_round] = measured
            self.generate()
            self.export()
        except BaseException as error:
            self.report.failed(error)
            raise
        finally:
            self._opened.close()  # a client that still trains learns of the end, and is free to hear what follows
            self.clients.forget(grid)
        return result

    def resume(self) -> None:
        """On request, go on from the last finished round of another run."""
        if not self.config.run.resume:
            return
        state = self._resumed = load_state(self.config)
        self.report.resumed(Path(self.config.run.resume), state.server_round)
        if self.report.best_round and not take_best(Path(self.config.run.resume), self.folder):
            self.report.best(0)
        self.delta, self.importance = state.delta, dict(state.importance)
        if state.plans_hold(self.config):
            self.plans = dict(state.plans)
            self._planned_budgets = dict(state.planned_budgets)
            self._planned_importance = dict(state.planned_importance)

    def prepare(self, grid: Grid) -> None:
        """Wait for the clients, see that a plan is possible, and only then load the base."""
        check_quantiser(self.config.model.quantise)  # and load the library, which is part of the process
        self._read_held_out()
        stated = int(self.config.plan.server_process_mb * 1e6)
        self._process_bytes = stated or self._process.resting_bytes(read_config(self.config.model.path))
        self.clients.wait(grid)
        self.describe(grid)
        make_round_plan(self.config, self.clients.budgets, None, {}, self._cost, own=self._own)
        self._open()
        self._report_text(Cut.total(client.cut for client in self.clients.descriptions.values()))

    def train_round(self, grid: Grid, server_round: int) -> MetricRecord:
        """One round: describe, score, plan, train, aggregate."""
        self._round_started = time.time()
        self.dispatch.begin_round()
        if server_round > 1:
            self.describe(grid, server_round)
        self.score_weights(grid, server_round)
        self.make_plans(server_round)
        messages = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
        with self._process.peak_memory() as memory:
            replies = self.clients.exchange(
                grid, messages, server_round, self.dispatch.answer, may_answer=self.dispatch.may_answer
            )
        self._server_peak = memory.bytes
        _, metrics = self.aggregate_train(server_round, replies)
        return metrics or MetricRecord()

    def describe(self, grid: Grid, server_round: int = 0) -> None:
        """Ask nodes for their budget, their amount of data, and the update that they hold."""
        self.clients.describe(grid, server_round)
        if (lengths := self.clients.longest) != self._lengths:
            train, self._lengths, count = self.config.train, lengths, len(lengths)
            rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
            self._cost = cost_model(self.config, rows, max(lengths.values()), count)
            self._own = own_costs(self.config, rows, lengths, count)

    def score_weights(self, grid: Grid, server_round: int) -> None:
        """Measure which weights matter, when a measurement is due, and let it move the importance known so far."""
        plan = self.config.plan
        if not self.method.importance:
            self.importance = {layer.name: 1 / len(self._cost.layers) for layer in self._cost.layers}
        elif server_round == 1:
            self.importance = self._probe(grid, server_round)
        elif plan.probe_every and (server_round - 1) % plan.probe_every == 0:
            measured = self._probe(grid, server_round)
            self.importance = smooth(self.importance, measured, server_round - 1, self.config.train.rounds)

    def make_plans(self, server_round: int) -> None:
        """Give every client a split point and ranks; a plan is kept until importance or budgets moved."""
        # what clients state; what their processes take is measured anew every time
        budgets = {name: replace(budget, process_bytes=0) for name, budget in self.clients.budgets.items()}
        moved = drift(self.importance, self._planned_importance)
        if not self.plans:
            reason = ""
        elif budgets.keys() != self._planned_budgets.keys():
            reason = "clients came or went"
        elif budgets != self._planned_budgets:
            reason = "budgets changed"
        elif self._planned_lengths and self._lengths != self._planned_lengths:
            reason = "rows became longer or shorter"
        elif moved > self.config.plan.drift:
            reason = f"importance moved by {moved:.3f}, more than plan.drift={self.config.plan.drift:g}"
        else:
            self._planned_lengths = self._lengths
            self.report.importance(server_round, self.importance, moved)
            return
        server = self._server_budget()
        names = map(self.clients.name, self.clients.descriptions)
        shares = dict(zip(names, self.clients.shares(self.clients.descriptions), strict=True))
        plan = make_round_plan(
            self.config, self.clients.budgets, server, self.importance, self._cost, shares, self._own
        )
        if not may_fragment(server, plan.server_bytes):
            self._process.return_freed_memory()
        self.plans = dict(plan.clients)
        self._report_plan(server_round, reason, plan)
        self.report.importance(server_round, self.importance, moved if self._planned_importance else 0.0)
        self._planned_budgets, self._planned_importance = budgets, self.importance
        self._planned_lengths = self._lengths

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message per planned client, and the server's half of its training behind a fresh token."""
        if self.method.carries:  # what training goes on from is the global adapter, not an update in the weights
            self.base.update({})
        if shares_half(self.config):
            plans = {self.clients.name(node): plan for node, plan in self._participants()}
            self.dispatch.share_half(server_round, plans)
        steps = self.config.train.steps
        return [self.dispatch.task(node, TRAIN, server_round, plan, steps) for node, plan in self._participants()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the clients' adapters and the server's half up: noise-free, or by the method's rule."""
        outcomes = dict(self.clients.outcomes(replies, server_round, self.dispatch.read))
        self._refuse_outliers(server_round, outcomes)
        shares, half = self.clients.shares(outcomes), self.shard.adapters()
        updates: list[Mapping[str, Factors]] = []
        clients: list[dict[str, Any]] = []
        for node, outcome in outcomes.items():
            client = self.clients.name(node)
            updates.append({**outcome.adapters, **self.shard.adapters_of(client)})
            above = {name: half[name] for name in half.keys() - self.dispatch.layers_below(self.plans[client].split)}
            clients.append(self._report_client(server_round, node, outcome, {**updates[-1], **above}))
            self.clients.remember(node)
        failed = self.shard.steps_of_others([row["client"] for row in clients])
        for client, steps in failed.items():
            self.report.status(f"the server's half keeps {steps} steps of client {client}, which failed")
        shared, wholes = self.dispatch.end_half([row["split"] for row in clients])
        self.shard.dismiss_all()
        update = aggregate(updates, shares, self.method.rule, shared)
        if self.method.residual:
            self.dispatch.adapter = update
            self.delta.add(residual(updates, shares, update))
        elif self.method.carries:
            self.dispatch.adapter = update
            self.delta.replace(update)
        else:
            self.delta.add(update, wholes)
            if starts_along_update(self.config):
                highest = max(*self.config.lora.ranks, self.config.lora.rank)
                self.dispatch.adapter = {name: directions(factors, highest) for name, factors in update.items()}
        norm, known = update_norm(update), max(self.config.clients.count, len(clients))
        more = {"known_clients": known, "server_measured_bytes": self._server_peak, "steps_of_failed": failed}
        more |= self._dropped()
        self.report.round_finished(server_round, time.time() - self._round_started, norm, clients, **more)
        loss = sum(share * client["losses"][-1] for share, client in zip(shares, clients, strict=True))
        return None, MetricRecord({"loss": loss, "update-norm": norm, "clients": len(clients)})

    def evaluate(self, server_round: int) -> MetricRecord:
        """Perplexity of the held-out text under the global model; round 0 is before training.

        Raises
        ------
        FloatingPointError
            If there is none. The round is not kept then: the checkpoint is that of the round before.
        """
        started = time.time()
        batches = evaluation_batches(self._held_out_tokens, self.config.evaluation.batch_size)
        found = evaluate(self._global_model(), batches)
        if not found.nll / found.tokens < MAX_NLL:
            raise FloatingPointError(self._diverged(server_round, found.nll / found.tokens))
        seconds = time.time() - started
        self.report.evaluated(server_round, found.perplexity, found.tokens, seconds, found.interval(), found.rows)
        return MetricRecord({"perplexity": found.perplexity, "tokens": found.tokens})

    def evaluate_clients(self, grid: Grid, server_round: int) -> MetricRecord | None:
        """On request, the perplexity of what the clients keep out of training, measured where it lies."""
        if not self.config.evaluation.client_rows or self.method.central:
            return None
        self.report.status("measuring the clients' own text")
        messages = self.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid)
        replies = self.clients.exchange(grid, messages, server_round, self.dispatch.answer, needed=0)
        return self.aggregate_evaluate(server_round, replies)

    def checkpoint(self, server_round: int) -> None:
        """Put what the next round goes on from on disk: a finished round is not lost."""
        state = RunState(
            server_round,
            self.config.to_run_config(),
            self.delta,
            start=self.dispatch.adapter,
            optimizer=self.dispatch.half.tensors,
            importance=self.importance,
            planned_importance=self._planned_importance,
            plans=self.plans,
            planned_budgets=self._planned_budgets,
        )
        save_state(state, self.folder)

    def keep_best(self, server_round: int) -> None:
        """Write the adapter of a round that measured better than all before it; before the first there is none."""
        if server_round and self.report.improved(server_round):
            replace_best(self.folder, lambda folder: self._save_adapter(folder / "adapter"))
            self.report.best(server_round)

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
        self.report.status("writing the adapter")
        self._save_adapter(self.folder / "adapter")
        if self.config.run.merged:
            save_merged_model(self.base.merged(), load_tokenizer(self.config.model.path), self.folder / "merged")
        self.report.finished(ADAPTER_FILES, adapter={"folder": "adapter", "relative_error": TOLERANCE})

    # ------------------------------------------------------------------ what Flower's Strategy also asks for

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client that trained, to measure what it keeps out of training."""
        return [
            self.dispatch.task(node, EVALUATE, server_round, replace(plan, ranks={}), 0)
            for node, plan in self._participants()
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Perplexity over the tokens of all clients together."""
        nll: dict[str, tuple[float, float]] = {}
        for node, outcome in self.clients.outcomes(replies, server_round, self.dispatch.read, needed=0):
            nll[self.clients.name(node)] = outcome.metrics["nll"], outcome.metrics["label-tokens"]
            self.clients.remember(node)  # it has brought its update up to date since it trained
        self.shard.dismiss_all()
        if not nll:
            return None
        pooled = math.exp(sum(total for total, _ in nll.values()) / sum(tokens for _, tokens in nll.values()))
        each = {client: math.exp(total / tokens) for client, (total, tokens) in nll.items()}
        self.report.evaluated_clients(server_round, pooled, each)
        return MetricRecord({"perplexity": pooled, "clients": len(each)})

    def summary(self) -> None:
        """Say what is in force."""
        c = self.config
        adapters = "all weights" if self.method.full else f"ranks from {scalar(c.lora.ranks)}"
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
        if self.config.transport.kind in ("stream", "auto") and not self.config.transport.tls:
            self.report.warning(
                "transport.tls=false, so activations, labels and tokens can be read by anyone on the way"
            )
        self.report.status(f"loading {self.config.model.path}")
        self.shard = Shard(self.config)
        self._opened.callback(self.shard.stop)
        self.base = self.shard.base
        self.clients.on_failure = self.shard.leave
        self.dispatch = Dispatch(self.config, self.clients, self.shard, self.delta, self._cost.all_layers, self.report)
        if self._resumed:
            self.dispatch.adapter = dict(self._resumed.start)
            if keeps_half(self.config):
                self.dispatch.half = KeptHalf(self._resumed.optimizer)

    def _read_held_out(self) -> None:
        self._held_out_tokens = fit_text(self._held_out, self.config)

    def _changes(self) -> Mapping[str, Change]:
        """The whole update of the model."""
        changes = self.delta.changes()
        if not self.method.residual:
            return changes
        return {
            **changes,
            **{name: with_adapter(changes.get(name), pair) for name, pair in self.dispatch.adapter.items()},
        }

    def _global_model(self) -> WholeModel:
        self.base.update(self._changes())
        return self.base.whole()

    def _save_adapter(self, folder: Path) -> None:
        save_peft_adapter(self._changes(), folder, self.base.model, self.config.model.path, self.base.inside)

    def _diverged(self, server_round: int, loss: float) -> str:
        what = f"the held-out loss after round {server_round} is {loss:g} per token, which no perplexity belongs to; "
        if kept := last_round(self.folder):
            return (
                f"{what}its update is not kept, and round {kept} is: go on from there with run.resume={self.folder}, "
                "run.resume_changed=true, a new run.dir, and a lower train.lr or train.clip"
            )
        return f"{what}lower train.lr or set train.clip" if server_round else f"{what}see whether the base is whole"

    def _dropped(self) -> dict[str, float]:
        return {"dropped_energy": self.delta.dropped} if self.config.lora.rank_cap else {}

    def _participants(self) -> Iterator[tuple[int, ClientPlan]]:
        """The clients that take part in this round, by node."""
        for node, client in self.clients.descriptions.items():
            if client.name in self.plans:
                yield node, self.plans[client.name]

    def _server_budget(self) -> Budget:
        plan = self.config.plan
        stated = plan.server_memory_gb
        memory = stated * 1e9 if stated else free_bytes(pick_devices(self.config.model.device))
        return Budget(int(memory), self._process_bytes, flops=plan.server_gflops * 1e9 or None)

    def _probe(self, grid: Grid, server_round: int) -> dict[str, float]:
        """One measurement: every client scores the weights below a provisional split, the server those above."""
        self.report.status("measuring which weights matter")
        config, messages, again = self.config, [], self.config.train.activation_checkpointing == "on"
        bounds = split_bounds(config, self._cost.num_blocks)
        above = dict[int, dict[str, float]]()
        with ExitStack() as stack:
            for node, client in self.clients.descriptions.items():
                plan = probe_plan(
                    self._own[client.name],
                    client.budget,
                    config.lora.ranks,
                    *bounds,
                    recompute=again,
                    clients=config.lora.clients,
                )
                if plan is None:  # it cannot take part at all; the planner says by how many bytes
                    continue
                messages.append(self.dispatch.task(node, PROBE, server_round, plan, config.plan.probe_batches))
                upper = self.shard.trainer(client.name).model
                above[node] = stack.enter_context(scoring(upper))
            replies = self.clients.exchange(grid, messages, server_round, self.dispatch.answer)

        def read(node: int, records: RecordDict) -> Outcome:
            if not all(map(math.isfinite, above[node].values())):
                raise ReplyError("what it sent makes the scores of the server's weights infinite; lower train.lr")
            return self.dispatch.read(node, records)

        measured = {}
        for node, outcome in self.clients.outcomes(replies, server_round, read):
            self.dispatch.up[node] += int(outcome.metrics["bytes-up"])
            self.dispatch.down[node] += int(outcome.metrics["bytes-down"])
            measured[node] = {**outcome.importance, **above[node]}
        self.shard.dismiss_all()
        totals = [math.fsum(scores.values()) for scores in measured.values()]
        weights = capped_weights(self.clients.shares(measured), totals, config.clients.max_share)
        return complete(combine(zip(weights, measured.values(), strict=True)), [x.name for x in self._cost.layers])

    def _refuse_outliers(self, server_round: int, outcomes: dict[int, Outcome]) -> None:
        """Take clients out whose update is too large beside the others'."""
        limit, flaws = self.size_limit, dict[int, str]()
        for node, ratio in limit.exceeding({node: update_size(one.adapters) for node, one in outcomes.items()}).items():
            flaws[node] = f"its update is {ratio:.3g} times the median, and clients.max_update={limit.multiple:g}"
            del outcomes[node]
        self.clients.refuse(flaws, len(outcomes), server_round)

    def _report_text(self, training: Cut) -> None:
        """Say what of the text does not fit, or is not written after as it is trained, while the run can be stopped."""
        inside = prompts_inside_tokens(self._held_out, load_tokenizer(self.config.model.path))
        self.report.text(self.config.data.max_length, training, Cut.of(self._held_out_tokens), inside)
        if warning := beyond_training(self.config):
            self.report.warning(warning)

    def _report_plan(self, server_round: int, reason: str, plan: Plan) -> None:
        figures = {"objective": plan.objective, "server_predicted_bytes": plan.server_bytes}
        if self.method.ranks == "plan":
            figures |= {"greedy_objective": plan.greedy_objective, "bound": plan.bound, "seconds": plan.seconds}
        rows = plan_rows(self.clients.descriptions.values(), plan, self._cost.num_blocks)
        self.report.planned(server_round, reason, figures, rows)
        if self.method.split and (table := LeakageTable.of(self.config)):
            for warning in table.warnings({name: client.split for name, client in plan.clients.items()}):
                self.report.status(warning)

    def _report_client(
        self, server_round: int, node: int, outcome: Outcome, adapters: Mapping[str, Factors]
    ) -> dict[str, Any]:
        """One client's round as it stands in the summary."""
        row = client_row(
            self.clients.descriptions[node],
            self.plans[self.clients.name(node)],
            outcome,
            adapters,
            trains_a=not self.method.freeze_a,
            up=self.dispatch.up[node],
            down=self.dispatch.down[node],
            seconds=self.clients.seconds[node],
        )
        self.report.client_finished(server_round, row)
        return row
