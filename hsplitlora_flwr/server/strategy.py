"""HSplitLoRA as a Flower strategy: one round, from top to bottom.

    describe  -> every node says its budget, its number of examples, and the version of the weights that it holds
    score     -> which weights matter, on a few batches, where no round has measured it yet (planning/importance.py)
    plan      -> importance + budgets give every client a split point and ranks             (planning/)
    train     -> clients and server run K steps, adapters only, over streams or messages    (training/, transport/)
                 and measure in the first of them which weights matter for the next plan
    aggregate -> the clients' adapters and the server's, one noise-free sum, a new version  (lora/)
    evaluate  -> perplexity of held-out text under the global model, and on request of the clients' own

A client that fails at any point is left out of the round, and asked again in the next.

The strategy hosts the server shard: the frozen base, and the adapters above the split points, which every client's step
trains in turn. The methods that HSplitLoRA is compared with take the same round; :mod:`hsplitlora_flwr.methods` says
what each does otherwise. What comes before and after the rounds is :mod:`hsplitlora_flwr.server.run`.

Source: HSplitLoRA, arXiv 2505.02795.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.fit import Cut
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.lora.aggregation import Update
from hsplitlora_flwr.lora.limits import SizeLimit, update_norm, update_size
from hsplitlora_flwr.messages import EVALUATE, PROBE, TRAIN, Outcome
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.placement import pick_devices
from hsplitlora_flwr.models.quantisation import check_quantiser
from hsplitlora_flwr.planning.leakage import LeakageTable
from hsplitlora_flwr.planning.planner import ClientPlan, Plan
from hsplitlora_flwr.planning.round import scored_steps
from hsplitlora_flwr.reporting.events import Listener
from hsplitlora_flwr.server.checkpoint import RunState, save_state
from hsplitlora_flwr.server.clients import ClientFailedError, Clients
from hsplitlora_flwr.server.dispatch import Dispatch
from hsplitlora_flwr.server.model import FederatedModel
from hsplitlora_flwr.server.plans import RoundPlanner
from hsplitlora_flwr.server.records import client_row, plan_rows
from hsplitlora_flwr.server.run import Run
from hsplitlora_flwr.server.session_grid import SessionGrid
from hsplitlora_flwr.server.sessions import Sessions
from hsplitlora_flwr.server.shard import Shard
from hsplitlora_flwr.training.memory import may_fragment
from hsplitlora_flwr.training.process import OwnProcess


@dataclass(frozen=True)
class Federation:
    """What the rounds of a federated run work with, all of it loaded.

    Parameters
    ----------
    planner : RoundPlanner
        Who holds what.
    shard : Shard
        The server's halves, behind a port.
    model : FederatedModel
        What trains, around the shard's base.
    dispatch : Dispatch
        The clients' tasks.
    """

    planner: RoundPlanner
    shard: Shard
    model: FederatedModel
    dispatch: Dispatch


class HSplitLoRA(Run[Federation], Strategy):
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

    Attributes
    ----------
    clients : Clients
        Those that take part now.
    sessions : Sessions
        Their messages that last.
    loaded : Federation
        Everything else, from :meth:`prepare` on.

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
        super().__init__(config, held_out, folder, listeners=listeners)
        self.clients = Clients(self.config, self.report)
        self.sessions = Sessions(config.train.rounds_per_message, self.report.status)
        self._size_limit = SizeLimit(config.clients.max_update)
        self._process = process or OwnProcess()

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
        self.clients.timeout = timeout or self.config.run.timeout
        return super().start(SessionGrid(grid, self.sessions), num_rounds=num_rounds)

    def prepare(self, grid: Grid, state: RunState | None, opened: ExitStack) -> Federation:
        """Wait for the clients, see that a plan is possible, and only then load the base."""
        config, clients = self.config, self.clients
        opened.callback(clients.forget, grid)
        check_quantiser(config.model.quantise)  # and load the library, which is part of the process
        held_out = Cut.of(self.held_out)  # and so are tokenizer and text
        stated = int(config.plan.server_process_mb * 1e6)
        process_bytes = stated or self._process.resting_bytes(read_config(config.model.path))
        clients.wait(grid)
        clients.describe(grid, 0)
        planner = RoundPlanner(config, clients.sizes, process_bytes, state)
        planner.check(clients.budgets)
        if config.transport.kind in ("stream", "auto") and not config.transport.tls:
            self.report.warning(
                "transport.tls=false, so activations, labels and tokens can be read by anyone on the way"
            )
        self.report.phase(f"loading {config.model.path}")
        shard = Shard(config, self.sessions)
        opened.callback(shard.stop)
        opened.callback(clients.forget, grid)
        opened.callback(shard.dismiss_all)  # a client that still trains learns of the end, and is free to hear the rest
        clients.on_failure, clients.on_draw = shard.expel, self.sessions.keep
        model = FederatedModel(config, shard.base, state)
        dispatch = Dispatch(config, clients, shard, model, planner.layers, self.report)
        self._report_text(Cut.total(client.cut for client in clients.descriptions.values()), held_out)
        self._process.settle()
        return Federation(planner, shard, model, dispatch)

    # ------------------------------------------------------------------ a round

    def train_round(self, grid: Grid, server_round: int) -> MetricRecord:
        """One round, repeated as often as the settings say where too few clients finish it."""
        for repeats in range(self.config.clients.repeats, -1, -1):
            try:
                return self.take_round(grid, server_round)
            except ClientFailedError as error:
                if not repeats:
                    raise
                self.report.status(f"round {server_round} is repeated ({repeats} more): {error}")
                self.loaded.shard.dismiss_all()
                self.clients.wait(grid, self.config.clients.min)
        raise AssertionError("the last attempt returns or raises")

    def take_round(self, grid: Grid, server_round: int) -> MetricRecord:
        """One round: describe, score, plan, train, aggregate."""
        self.loaded.dispatch.begin_round()
        self.describe(grid, server_round)
        self.score_weights(grid, server_round)
        self.make_plans(server_round)
        replies = self.train(grid, server_round)
        _, metrics = self.aggregate_train(server_round, replies)
        return metrics or MetricRecord()

    def describe(self, grid: Grid, server_round: int) -> None:
        """Ask nodes for their budget, their amount of data, and the update that they hold."""
        self.clients.describe(grid, server_round)
        self.loaded.planner.fit(self.clients.sizes)

    def score_weights(self, grid: Grid, server_round: int) -> None:
        """Measure which weights matter before there is a plan: every client scores the weights below a provisional
        split, the server those above. Later rounds do it as they train."""
        planner, dispatch = self.loaded.planner, self.loaded.dispatch
        if not planner.probe_due:
            return
        self.report.phase("measuring which weights matter")
        steps = self.config.plan.probe_batches
        messages = [
            dispatch.task(node, PROBE, server_round, plan, steps, steps)
            for node, client in self.clients.descriptions.items()
            if (plan := planner.probe_plan(client.name, client.budget))
        ]
        replies = self.clients.exchange(grid, messages, server_round, dispatch.answer)
        outcomes = dict(self.clients.outcomes(replies, server_round, dispatch.read))
        for node, outcome in outcomes.items():
            dispatch.figures.count_probe(node, outcome.metrics)
        planner.take_scores(server_round, self.clients.shares(outcomes), dispatch.scores(outcomes))
        self.loaded.shard.dismiss_all()

    def make_plans(self, server_round: int) -> None:
        """Give every client a split point and ranks; a plan is kept until importance or budgets moved."""
        planner, budgets = self.loaded.planner, self.clients.budgets
        moved, reason = planner.drift, planner.why_replan(budgets)
        if reason is not None:
            self.report.phase("planning who holds what")
            server = planner.server_budget()
            shares = self.clients.shares(self.clients.descriptions)
            plan = planner.replan(budgets, dict(zip(budgets, shares, strict=True)), server)
            if not may_fragment(server, plan.server_bytes):
                self._process.return_freed_memory()
            self._report_plan(server_round, reason, plan)
        self.report.importance(server_round, planner.importance, moved)

    def train(self, grid: Grid, server_round: int) -> list[Message]:
        """Let the clients of the round train, together with the server's half; returns their last replies."""
        dispatch = self.loaded.dispatch
        self.report.phase(f"round {server_round}: clients load their blocks")
        messages = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
        with self._process.peak_memory(pick_devices(self.config.model.device)) as memory:
            replies = self.clients.exchange(
                grid,
                messages,
                server_round,
                dispatch.answer,
                may_answer=dispatch.may_answer,
                deadline=self.config.clients.deadline,
            )
        dispatch.figures.server_peak, dispatch.figures.server_host_peak = memory.bytes, memory.host_bytes
        return replies

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message per planned client, and the server's half of its training behind a fresh token."""
        dispatch, steps = self.loaded.dispatch, self.config.train.steps
        scored = scored_steps(self.config, server_round)
        dispatch.begin_training(server_round, {self.clients.name(node): plan for node, plan in self._planned_clients()})
        return [dispatch.task(node, TRAIN, server_round, plan, steps, scored) for node, plan in self._planned_clients()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the clients' adapters and the server's half up: noise-free, or by the method's rule."""
        dispatch, model = self.loaded.dispatch, self.loaded.model
        self.report.phase(f"round {server_round}: adding the clients' adapters up")
        outcomes = dict(self.clients.outcomes(replies, server_round, dispatch.read))
        self._refuse_outliers(server_round, outcomes)
        shares = self.clients.shares(outcomes)
        if scored_steps(self.config, server_round):
            self.loaded.planner.take_scores(server_round, shares, dispatch.scores(outcomes))
        updates, half = dispatch.trained(outcomes)
        rows = [
            self._client_row(node, outcome, {**update, **half.of(index)})
            for index, ((node, outcome), update) in enumerate(zip(outcomes.items(), updates, strict=True))
        ]
        failed = self.loaded.shard.steps_of_others([row["client"] for row in rows])
        self.loaded.shard.dismiss_all()
        for node, row in zip(outcomes, rows, strict=True):
            self.report.client_finished(server_round, row)
            self.clients.remember(node)
        for client, steps in failed.items():
            self.report.status(f"the server's half keeps {steps} steps of client {client}, which failed")
        norm = update_norm(model.add_round(updates, shares, half))
        self.report.round_finished(
            server_round,
            time.time() - dispatch.figures.started,
            norm,
            rows,
            known_clients=self.clients.known,
            server_measured_bytes=dispatch.figures.server_peak,
            server_host_measured_bytes=dispatch.figures.server_host_peak,
            steps_of_failed=failed,
            **model.dropped(),
        )
        loss = sum(share * row["losses"][-1] for share, row in zip(shares, rows, strict=True))
        return None, MetricRecord({"loss": loss, "update-norm": norm, "clients": len(rows)})

    def evaluate_clients(self, grid: Grid, server_round: int) -> MetricRecord | None:
        """On request, the perplexity of what the clients keep out of training, measured where it lies."""
        if not self.config.evaluation.client_rows:
            return None
        self.report.phase("measuring the clients' own text")
        messages = self.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid)
        replies = self.clients.exchange(grid, messages, server_round, self.loaded.dispatch.answer, needed=0)
        return self.aggregate_evaluate(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client that trained, to measure what it keeps out of training."""
        task = self.loaded.dispatch.task
        return [
            task(node, EVALUATE, server_round, replace(plan, ranks={}), 0) for node, plan in self._planned_clients()
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Perplexity over the tokens of all clients together."""
        nll: dict[str, tuple[float, float]] = {}
        for node, outcome in self.clients.outcomes(replies, server_round, self.loaded.dispatch.read, needed=0):
            nll[self.clients.name(node)] = outcome.metrics["nll"], outcome.metrics["label-tokens"]
            self.clients.remember(node)  # it has brought its update up to date since it trained
        self.loaded.shard.dismiss_all()
        if not nll:
            return None
        pooled = math.exp(sum(total for total, _ in nll.values()) / sum(tokens for _, tokens in nll.values()))
        each = {client: math.exp(total / tokens) for client, (total, tokens) in nll.items()}
        self.report.evaluated_clients(server_round, pooled, each)
        return MetricRecord({"perplexity": pooled, "clients": len(each)})

    def checkpoint(self, server_round: int) -> None:
        """Put what the next round goes on from on disk: a finished round is not lost."""
        model, planner = self.loaded.model, self.loaded.planner
        state = RunState(
            server_round,
            self.config.to_run_config(),
            model.accumulated,
            start=model.adapter,
            optimizer=model.kept.tensors,
            importance=planner.importance,
            planned_importance=planner.planned_importance,
            plans=planner.plans,
            planned_budgets=planner.planned_budgets,
        )
        save_state(state, self.folder)

    # ------------------------------------------------------------------ parts of the above

    def _planned_clients(self) -> Iterator[tuple[int, ClientPlan]]:
        """The clients that the plan of this round has, by node, with their plans."""
        plans = self.loaded.planner.plans
        for node, client in self.clients.descriptions.items():
            if client.name in plans:
                yield node, plans[client.name]

    def _refuse_outliers(self, server_round: int, outcomes: dict[int, Outcome]) -> None:
        """Take clients out whose update is too large beside the others'."""
        limit, flaws = self._size_limit, dict[int, str]()
        for node, ratio in limit.exceeding({node: update_size(one.adapters) for node, one in outcomes.items()}).items():
            flaws[node] = f"its update is {ratio:.3g} times the median, and clients.max_update={limit.multiple:g}"
            del outcomes[node]
        self.clients.refuse(flaws, len(outcomes), server_round)

    def _client_row(self, node: int, outcome: Outcome, adapters: Update) -> dict[str, Any]:
        """One client's round as it stands in the summary; ``adapters`` are those of both sides."""
        client, figures = self.clients.descriptions[node], self.loaded.dispatch.figures
        return client_row(
            client,
            self.loaded.planner.plans[client.name],
            outcome,
            adapters,
            trains_a=not self.method.freeze_a,
            up=figures.up[node],
            down=figures.down[node],
            seconds=self.clients.seconds[node],
        )

    def _report_plan(self, server_round: int, reason: str, plan: Plan) -> None:
        figures: dict[str, Any] = {"objective": plan.objective, "server_predicted_bytes": plan.server_bytes}
        if self.method.importance:
            figures["importance"] = dict(self.loaded.planner.importance)
        if self.method.ranks == "plan":
            figures |= {"greedy_objective": plan.greedy_objective, "bound": plan.bound, "seconds": plan.seconds}
        rows = plan_rows(self.clients.descriptions.values(), plan, self.loaded.planner.num_blocks)
        self.report.planned(server_round, reason, figures, rows)
        if self.method.split and (table := LeakageTable.of(self.config)):
            for warning in table.warnings({name: client.split for name, client in plan.clients.items()}):
                self.report.status(warning)
