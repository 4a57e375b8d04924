"""A run from its settings to its results, whatever trains in its rounds.

resume    -> on request, what another run left                                                  (checkpoint.py)
prepare   -> everything that rounds work with, loaded
rounds    -> train, measure, put what the next one goes on from on disk, keep the best      (strategy.py, central.py)
generate  -> on request, a text for every held-out prompt
export    -> the adapter, and on request the merged model
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from flwr.app import MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.collate import Tokens, evaluation_batches, prompts_inside_tokens
from hsplitlora_flwr.data.fit import Cut, beyond_training, fit_text
from hsplitlora_flwr.data.shapes import kind_of
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.evaluation.generation import answer, generate_and_score
from hsplitlora_flwr.evaluation.perplexity import MAX_NLL, evaluate
from hsplitlora_flwr.lora.export import write_manifest
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.configuration import with_model_dtype
from hsplitlora_flwr.models.loading import load_tokenizer
from hsplitlora_flwr.paths import last_round
from hsplitlora_flwr.reporting.card import shrunk_facts, write_card
from hsplitlora_flwr.reporting.events import Listener
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.schema import scalar
from hsplitlora_flwr.server.best import replace_best, take_best
from hsplitlora_flwr.server.checkpoint import RunState, check_resume, load_state
from hsplitlora_flwr.server.model import TunedModel, files_of


class Loaded(Protocol):
    """What the rounds of a run work with; it exists only when everything is loaded."""

    @property
    def model(self) -> TunedModel:
        """The model that trains."""


L = TypeVar("L", bound=Loaded)


class Run(ABC, Generic[L]):
    """What all runs have in common: how one begins, what is measured and kept after a round, and what it leaves.

    Parameters
    ----------
    config : Config
        All settings.
    held_out : Sequence[Example]
        Text that measures the model and that nobody trains on.
    folder : Path
        The run folder.
    listeners : Sequence[Listener]
        Hear every event of the run.

    Raises
    ------
    ResumeError, ConfigError
        If the run that it is to go on from cannot be gone on from.
    """

    def __init__(
        self, config: Config, held_out: Sequence[Example], folder: Path, *, listeners: Sequence[Listener] = ()
    ) -> None:
        self.config = config = with_model_dtype(config)
        self.method = METHODS[config.method.name]
        self.folder = Path(folder)
        check_resume(config, self.folder)
        self.report = RunReport(self.folder, config.to_run_config(), listeners)
        self._held_out = held_out
        self._loaded: L | None = None

    @property
    def loaded(self) -> L:
        """What :meth:`prepare` made.

        Raises
        ------
        RuntimeError
            Before that.
        """
        if self._loaded is None:
            raise RuntimeError("nothing is loaded yet: start() does that, and then takes the rounds")
        return self._loaded

    @cached_property
    def held_out(self) -> list[Tokens]:
        """The text that measures the model, as it is read."""
        return fit_text(self._held_out, self.config)

    # ------------------------------------------------------------------ from start to end

    def start(self, grid: Grid, *, num_rounds: int | None = None) -> Result:
        """Run all rounds and write the results into the run folder.

        Parameters
        ----------
        grid : Grid
            The connection to the nodes.
        num_rounds : int, optional
            Instead of ``train.rounds``.

        Returns
        -------
        Result
            Metrics by round; the arrays are in the run folder.
        """
        if num_rounds is not None:  # the learning-rate schedule spans them
            self.config = replace(self.config, train=replace(self.config.train, rounds=num_rounds))
            self.report.configured(self.config.to_run_config())
        with ExitStack() as opened:
            try:
                return self._take_rounds(grid, opened)
            except BaseException as error:
                self.report.failed(error)
                raise

    def _take_rounds(self, grid: Grid, opened: ExitStack) -> Result:
        result = Result()
        self.summary()
        state = self.resume()
        self._loaded = self.prepare(grid, state, opened)
        done = state.server_round if state else 0
        result.evaluate_metrics_serverapp[done] = self.evaluate(done)
        self.keep_best(done)
        if not done:
            self.answer("before")
        for server_round in range(done + 1, self.config.train.rounds + 1):
            result.train_metrics_clientapp[server_round] = self.train_round(grid, server_round)
            result.evaluate_metrics_serverapp[server_round] = self.evaluate(server_round)
            self.checkpoint(server_round)
            self.keep_best(server_round)
            if measured := self.evaluate_clients(grid, server_round):
                result.evaluate_metrics_clientapp[server_round] = measured
        self.answer("after")
        self.generate()
        self.export()
        return result

    @abstractmethod
    def prepare(self, grid: Grid, state: RunState | None, opened: ExitStack) -> L:
        """Load everything that rounds work with.

        Parameters
        ----------
        grid : Grid
        state : RunState, optional
            What another run left, to go on from.
        opened : ExitStack
            Takes what ends with the run, whether it came to be or not.
        """

    @abstractmethod
    def train_round(self, grid: Grid, server_round: int) -> MetricRecord:
        """Train the model for a round."""

    @abstractmethod
    def checkpoint(self, server_round: int) -> None:
        """Save what the next round continues from, so that a finished round is not lost."""

    # ------------------------------------------------------------------ what is said and done around the rounds

    def summary(self) -> None:
        """Log the settings in force."""
        c = self.config
        adapters = "all weights" if self.method.full else f"ranks from {scalar(c.lora.ranks)}"
        if self.method.ranks == "equal" and not self.method.full:
            adapters = f"rank {c.lora.rank}"
        name = "HSplitLoRA" if c.method.name == "hsplitlora" else c.method.name
        self.report.status(
            f"{name}: {c.model.path} on {c.data.source}, {c.train.rounds} rounds x {c.train.steps} steps x "
            f"{c.train.batch_size} examples, {adapters}, results in {self.folder}"
        )

    def resume(self) -> RunState | None:
        """With ``run.resume``, take over what another run left after its last finished round."""
        if not self.config.run.resume:
            return None
        state, earlier = load_state(self.config), Path(self.config.run.resume)
        self.report.resumed(earlier, state.server_round)
        if self.report.best_round and not take_best(earlier, self.folder):
            self.report.best(0)
        return state

    def evaluate(self, server_round: int) -> MetricRecord:
        """Perplexity of the held-out text under the global model; round 0 is before training.

        Raises
        ------
        FloatingPointError
            If there is none. The round is not kept then: the checkpoint is that of the round before.
        """
        when = f"after round {server_round}" if server_round else "before training"
        self.report.phase(f"measuring the perplexity {when}")
        started = time.time()
        batches = evaluation_batches(self.held_out, self.config.evaluation.batch_size)
        found = evaluate(self.loaded.model.whole(), batches)
        if not found.nll / found.tokens < MAX_NLL:
            raise FloatingPointError(self._diverged(server_round, found.nll / found.tokens))
        seconds = time.time() - started
        self.report.evaluated(server_round, found.perplexity, found.tokens, seconds, found.interval(), found.rows)
        return MetricRecord({"perplexity": found.perplexity, "tokens": found.tokens})

    def evaluate_clients(self, grid: Grid, server_round: int) -> MetricRecord | None:
        """On request, the perplexity of text that clients keep to themselves; None where there is none."""
        return None

    def keep_best(self, server_round: int) -> None:
        """Write the adapter of a round that measured better than all before it; before the first there is none."""
        model = self.loaded.model
        if server_round and model.has_adapter and self.report.improved(server_round):
            self.report.best(server_round)
            replace_best(self.folder, lambda folder: self._save_adapter(folder / "adapter"))

    def answer(self, when: str) -> None:
        """On request, let the model answer a few held-out prompts, ``before`` training and ``after`` it."""
        options = self.config.evaluation
        prompted = [example for example in self._held_out if example.prompt or example.turns]
        if not (options.texts and prompted):
            return
        count = min(options.texts, len(prompted))
        self.report.phase(f"answering {count} held-out prompts")
        asked = [prompted[place * len(prompted) // count] for place in range(count)]
        written = answer(
            self.loaded.model.whole().causal_lm,
            load_tokenizer(self.config.model.path),
            asked,
            batch_size=count,
            max_new_tokens=options.max_new_tokens,
            beams=options.beams,
        )
        self.report.answered(when, asked, written)

    def generate(self) -> None:
        """On request, let the model write a text for every held-out prompt, and score the texts."""
        options = self.config.evaluation
        if not options.generate:
            return
        self.report.phase("writing a text for every held-out prompt")
        scores = generate_and_score(
            self.loaded.model.whole().causal_lm,
            load_tokenizer(self.config.model.path),
            self._held_out,
            self.folder,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            beams=options.beams,
        )
        self.report.generated(scores)

    def export(self) -> None:
        """Write the results; then the run is finished."""
        model, smaller = self.loaded.model, self._at_rank()
        self.report.phase(f"writing the {'adapter' if model.has_adapter else 'model'}")
        files, facts = model.export(self.folder, merged=self.config.run.merged)
        if model.has_adapter:
            self._describe(self.folder / "adapter")
        self.report.finished([*files, *smaller], **facts)

    def _save_adapter(self, folder: Path) -> None:
        self.loaded.model.save_adapter(folder)
        self._describe(folder)

    def _describe(self, folder: Path, facts: Mapping[str, str] | None = None) -> None:
        """Put manifest and card beside an adapter."""
        write_manifest(folder, self.report.rounds)
        write_card(self.report.content, folder, facts)

    def _at_rank(self) -> list[str]:
        """On request, the adapter at a rank beside the exact one, measured; returns its files."""
        if not (rank := self.config.run.adapter_rank):
            return []
        self.report.phase(f"measuring the adapter at rank {rank}")
        name = f"adapter-rank-{rank}"
        whole, dropped = self.loaded.model.save_at_rank(rank, self.folder / name)
        found = evaluate(whole, evaluation_batches(self.held_out, self.config.evaluation.batch_size))
        self.report.shrunk(rank, name, found.perplexity, dropped)
        self._describe(self.folder / name, shrunk_facts(rank, found.perplexity, dropped))
        return files_of(name)

    def _report_text(self, training: Cut, held_out: Cut) -> None:
        """Report text that does not fit, or that generation would continue otherwise than it is trained."""
        inside = prompts_inside_tokens(self._held_out, load_tokenizer(self.config.model.path))
        self.report.text(self.config.data.max_length, training, held_out, inside, kind_of(self._held_out))
        if warning := beyond_training(self.config):
            self.report.warning(warning)

    def _diverged(self, server_round: int, loss: float) -> str:
        what = f"the held-out loss after round {server_round} is {loss:g} per token, which no perplexity belongs to; "
        if kept := last_round(self.folder):
            return (
                f"{what}its update is not kept, and round {kept} is: go on from there with run.resume={self.folder}, "
                "run.resume_changed=true, a new run.dir, and a lower train.lr or train.clip"
            )
        return f"{what}lower train.lr or set train.clip" if server_round else f"{what}see whether the base is whole"
