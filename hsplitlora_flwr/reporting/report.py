"""The report of a run: events while it goes on, then the summary and the page, which stay."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.config.names import KNOWN_LISTENERS
from hsplitlora_flwr.registry import Registry
from hsplitlora_flwr.reporting.events import EVENTS_FILE, EventLog, Listener, quarter, read_events
from hsplitlora_flwr.reporting.page import PAGE_FILE, write_page
from hsplitlora_flwr.reporting.summary import STOPPED, SUMMARY_FILE, Summary, end_as_failed, write_rows
from hsplitlora_flwr.reporting.trackers import TrackerListener

if TYPE_CHECKING:  # who only writes how a run ended, such as the launcher, shall not load torch for it
    from hsplitlora_flwr.data.example import Example
    from hsplitlora_flwr.data.fit import Cut

log = logging.getLogger(__name__)

_LONGEST_CAUSE = 2_000
"""Characters of an error that a person is shown; the traceback in Flower's log has all of it."""


_DRAWING = 20
"""Times that the page took, until it is written again while the run goes on."""

MakeListener = Callable[[Config, Path], Listener]
"""Makes a listener of a run from its settings and its folder."""
LISTENERS: Registry[MakeListener] = KNOWN_LISTENERS
"""What makes listeners, by name."""

M = TypeVar("M", bound=MakeListener)


def register_listener(name: str) -> Callable[[M], M]:
    """Make a class or function known that makes a listener, which ``run.listeners`` may name::

        @register_listener("print")
        class Printer:
            def __init__(self, config, folder): ...
            def handle(self, event):
                print(event["kind"])

    Raises
    ------
    PluginError
        If the name is taken.
    """

    def register(make: M) -> M:
        LISTENERS.register(name, make)
        return make

    return register


def make_listeners(config: Config, folder: Path) -> list[Listener]:
    """The listeners that ``run.listeners`` and ``run.trackers`` name.

    Raises
    ------
    ModuleNotFoundError
        If a tracker's package is not installed.
    """
    trackers = [TrackerListener(name, config, folder) for name in config.run.trackers]
    return [*trackers, *(LISTENERS[name](config, folder) for name in config.run.listeners)]


class RunReport:
    """The event log, the summary and the page of a run folder.

    Parameters
    ----------
    folder : Path
        The run folder.
    config : dict
        The settings as dotted keys.
    listeners : Sequence[Listener]
        Hear every event; see :class:`hsplitlora_flwr.reporting.events.EventLog`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], listeners: Sequence[Listener] = ()) -> None:
        self._folder = folder
        self._events = EventLog(folder, listeners)
        self._summary = Summary(folder, dict(config))
        self._draw_at = 0.0  # when the page of a run that goes on is written again, by time.monotonic
        self._summary.save()

    def configured(self, config: Mapping[str, Any]) -> None:
        """The run has other settings than those that it was made with."""
        self._summary.save(config=dict(config))

    def phase(self, text: str) -> None:
        """Say what goes on from now."""
        self._events.emit("phase", text=text)

    def status(self, text: str) -> None:
        """Say what has come to be known."""
        self._events.emit("status", text=text)

    def warning(self, text: str) -> None:
        """Say what is likely to be a mistake, now and in the summary."""
        self._summary.save(warnings=[*self._summary.content.get("warnings", []), text])
        self.status(f"warning: {text}")

    def resumed(self, run_folder: Path, server_round: int) -> None:
        """The run goes on from a round of another, whose summary up to there becomes part of this one's."""
        self._summary.resume(run_folder, server_round)
        self._events.emit("status", text=f"going on after round {server_round} of {run_folder}")

    def text(self, max_length: int, training: Cut, held_out: Cut, inside: int, prompts: str = "") -> None:
        """What of the text is cut to ``max_length`` tokens, how many held-out prompts end ``inside`` a token, and of
        what kind they are (:func:`hsplitlora_flwr.data.shapes.kind_of`)."""
        parts = {"training": training, "held_out": held_out}
        figures = {name: {**vars(part), "cut_share": part.share} for name, part in parts.items()}
        figures["held_out"] |= {"prompts_inside_tokens": inside, "prompts": prompts}
        self._summary.save(text=figures)
        for name, part in parts.items():
            if part.cut_rows:
                text = f"{name.replace('_', '-')} text is cut to data.max_length={max_length}: {part}"
                self._events.emit("status", text=text)
        if inside:
            text = (
                f"the prompts of {inside} of {held_out.rows} held-out rows end inside a token of theirs, so a text is "
                "written after other tokens than the completion is learnt after; end prompts where tokens end, as at a "
                "line break, and start completions with the space"
            )
            self._events.emit("status", text=text)

    def importance(self, server_round: int, importance: Mapping[str, float], drift: float) -> None:
        """The importance of every weight, and how far it moved since the plan was made."""
        self._summary.add("importance_drift", {"round": server_round, "drift": drift})
        self._summary.save(importance=dict(importance))

    def planned(
        self, server_round: int, reason: str, plan: Mapping[str, Any], clients: Sequence[dict[str, Any]]
    ) -> None:
        """A new plan: why, its figures, and a row for every client with its ranks by layer."""
        rows = [{**client, "ranks": _spread(client["ranks"])} if "ranks" in client else client for client in clients]
        self._events.emit("planned", round=server_round, reason=reason, clients=rows)
        self._summary.add("plans", {"round": server_round, "reason": reason, **plan, "clients": clients})

    def step(self, **fields: Any) -> None:
        """A step of a client."""
        self._events.emit("step", **fields)

    def client_finished(self, server_round: int, row: Mapping[str, Any]) -> None:
        """A client's part of a round."""
        losses, some = row["losses"], quarter(len(row["losses"]))
        first, last = (sum(part) / some for part in (losses[:some], losses[-some:]))
        told = {name: row[name] for name in ("client", "seconds", "measured_bytes", "predicted_bytes")}
        self._events.emit("client_finished", round=server_round, **told, loss_first=first, loss_last=last)

    def client_failed(self, server_round: int, client: str, error: str) -> None:
        """A client that could not do its part."""
        failure = {"round": server_round, "client": client, "error": error}
        self._summary.add("failures", failure)
        self._events.emit("client_failed", round=server_round, client=client, error=error)

    def round_finished(
        self, server_round: int, seconds: float, update_norm: float, clients: Sequence[Mapping[str, Any]], **more: Any
    ) -> None:
        """A round whose update is part of the model."""
        row = {"round": server_round, "seconds": seconds, "update_norm": update_norm, **more, "clients": list(clients)}
        self._summary.add("rounds", row)
        self._events.emit("round_finished", round=server_round, seconds=seconds, update_norm=update_norm)

    def evaluated(
        self,
        server_round: int,
        perplexity: float,
        tokens: int,
        seconds: float,
        interval: tuple[float, float] | None = None,
        rows: Sequence[tuple[float, int]] = (),
    ) -> None:
        """Perplexity of the held-out text, with an interval over its rows; round 0 is before training.

        Nats and labelled tokens of every row after the last round go to a file of their own, so that runs can be
        compared row by row.
        """
        if rows:
            write_rows(self._folder, server_round, rows)
        self._events.emit("evaluated", round=server_round, perplexity=perplexity, tokens=tokens, seconds=seconds)
        changes: dict[str, Any] = {}
        if server_round:
            row = {"perplexity": perplexity, "perplexity_interval": interval, "evaluation_seconds": seconds}
            self._summary.amend("rounds", **row)
        else:
            changes["perplexity_before"] = perplexity
        self._summary.save(**changes, perplexity_after=perplexity, held_out_tokens=tokens)
        if time.monotonic() >= self._draw_at:
            self._draw()

    @property
    def best_round(self) -> int:
        """The round whose adapter is kept as the best; 0 before there is one."""
        return int(self._summary.content.get("best", {}).get("round", 0))

    def improved(self, server_round: int) -> bool:
        """Whether a round measured better than the best one."""
        best = self._summary.content.get("best", {}).get("perplexity", math.inf)
        return bool(self._perplexity_of(server_round) < best)

    def best(self, server_round: int) -> None:
        """The adapter of this round is kept as the best; 0 = none is."""
        best = {"round": server_round, "perplexity": self._perplexity_of(server_round)} if server_round else {}
        self._summary.save(best=best)

    def _perplexity_of(self, server_round: int) -> float:
        rows = {row["round"]: row for row in self._summary.content["rounds"]}
        return float(rows[server_round]["perplexity"])

    def evaluated_clients(self, server_round: int, perplexity: float, clients: Mapping[str, float]) -> None:
        """Perplexity of what the clients keep out of training: over all their tokens, and of each client."""
        self._summary.amend("rounds", client_perplexity={"all": perplexity, **clients})
        self._events.emit("status", text=f"perplexity {perplexity:.2f} on the clients' own text")

    def generated(self, scores: Mapping[str, float | None]) -> None:
        """Scores of the texts that the model wrote for the held-out prompts; None was not computed."""
        self._summary.save(generation=dict(scores))
        told = (f"{name} {'not computed' if score is None else f'{score:.4g}'}" for name, score in scores.items())
        self._events.emit("status", text=f"generated texts: {', '.join(told)}")

    def answered(self, when: str, asked: Sequence[Example], texts: Sequence[str]) -> None:
        """What the model writes for some held-out prompts, ``before`` training or ``after`` it."""
        rows = self._summary.content.get("texts") or [
            {"prompt": example.prompt, "reference": example.completion} for example in asked
        ]
        self._summary.save(texts=[{**row, when: text} for row, text in zip(rows, texts, strict=False)])

    def shrunk(self, rank: int, folder: str, perplexity: float, dropped: float) -> None:
        """An adapter of a rank at most was saved beside the exact one."""
        told = {"rank": rank, "folder": folder, "perplexity": perplexity, "dropped_energy": dropped}
        self._summary.save(smaller_adapter=told)
        exact = self._summary.content["perplexity_after"]
        self._events.emit("status", text=f"perplexity {perplexity:.3f} at rank {rank} at most, exact {exact:.3f}")

    @property
    def content(self) -> Mapping[str, Any]:
        """What ``summary.json`` says now."""
        return self._summary.content

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        """The finished rounds, as ``summary.json`` has them."""
        rounds: Sequence[Mapping[str, Any]] = self._summary.content["rounds"]
        return rounds

    def finished(self, results: Sequence[str], **more: Any) -> None:
        """The run did what it was to do; ``results`` are the files that it leaves, relative to the run folder."""
        results = [*results, PAGE_FILE]
        self._summary.save(status="finished", results=results, **more)
        self._draw()
        content = self._summary.content
        last = content["rounds"][-1] if content["rounds"] else {}
        told = (
            {"clients": len(last["clients"]), "known_clients": last["known_clients"]} if "known_clients" in last else {}
        )
        self._events.emit(
            "finished",
            folder=str(self._folder),
            results=results,
            perplexity_before=content["perplexity_before"],
            perplexity_after=content["perplexity_after"],
            **told,
        )

    def failed(self, error: BaseException) -> None:
        """The run ended early, and why.

        Nothing is raised, whatever cannot be written: a full disk must not hide what ended the run.
        """
        cause = cause_of(error)
        if not _try(lambda: self._summary.save(status="failed", error=cause)):
            _try(lambda: end_as_failed(self._folder, cause))
        _try(self._draw)
        _try(lambda: self._events.emit("failed", error=cause))

    def stopped(self) -> None:
        """The process of the run ends, and if the run does not, that is all that can be said here.

        Flower's log has more; who reads it may put that in place of this (:func:`failed_outside`).
        """
        if self._summary.content["status"] == "running":
            _try(lambda: self._summary.save(status="failed", error=STOPPED))
            _try(self._draw)

    def _draw(self) -> None:
        """Write the page. It has all rounds, so the longer it takes the longer is the wait for the next one."""
        started = time.monotonic()
        write_page(self._summary.content, self._folder)
        self._draw_at = started + (1 + _DRAWING) * (time.monotonic() - started)


def failed_outside(folder: Path, cause: str) -> None:
    """Write that a run ended without a word of its own: before it could begin, or since its process was killed.

    Nothing is written where its summary tells of its end, and nothing is raised.

    Parameters
    ----------
    folder : Path
        The run folder.
    cause : str
        Why it ended.
    """
    _try(lambda: _close(folder, cause))


def _close(folder: Path, cause: str) -> None:
    if content := end_as_failed(folder, cause):
        _try(lambda: write_page(content, folder))
    elif (folder / SUMMARY_FILE).exists():
        return
    events, _ = read_events(folder / EVENTS_FILE)
    if not events or events[-1]["kind"] != "failed":
        EventLog(folder).append("failed", error=cause)


def cause_of(error: BaseException) -> str:
    """An error in a few lines."""
    kind = type(error).__name__
    try:
        text = str(error).strip()
    except Exception:  # even that may fail, and then its kind has to do
        text = ""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return f"the run was told to stop ({kind})"
    if len(text) > _LONGEST_CAUSE:
        text = f"{text[:_LONGEST_CAUSE]} ..."
    return f"{kind}: {text}" if text else kind


def _try(tell: Callable[[], Any]) -> bool:
    try:
        tell()
    except Exception:
        log.warning("the end of the run could not be told everywhere", exc_info=True)
        return False
    return True


def _spread(ranks: Mapping[str, int]) -> dict[str, float]:
    values = list(ranks.values()) or [0]
    return {"min": min(values), "max": max(values), "mean": sum(values) / len(values)}
