"""How far a run is: steps, losses, tokens per second and time left, from its events."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from hsplitlora_flwr.reporting.events import Event, client_order, quarter


@dataclass
class ClientProgress:
    """One client's progress in the current round."""

    first_time: float
    first_step: int
    step: int
    steps: int
    last_time: float
    losses: list[float] = field(default_factory=list)
    tokens: int = 0  # of the steps after the first seen one: its own duration is unknown

    @property
    def loss(self) -> float:
        """Mean of its last steps, as many as a quarter of the round has."""
        last = self.losses[-quarter(self.steps) :]
        return sum(last) / len(last)

    @property
    def rate(self) -> float:
        """Tokens a second; 0 while unknown."""
        elapsed = self.last_time - self.first_time
        return self.tokens / elapsed if elapsed > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds to the end of its round; None while unknown."""
        return _remaining(self.last_time - self.first_time, self.step - self.first_step, self.steps - self.step)


class RunProgress:
    """How far a run is, computed from events alone, so that a replayed log shows what a live one did."""

    def __init__(self) -> None:
        self.clients: dict[str, ClientProgress] = {}
        self.round, self.rounds = 0, 0
        self.members: list[str] = []
        self.finished: list[Event] = []
        self._done_before = 0  # steps of the rounds before this one
        self._first: tuple[float, int] | None = None
        self._last_time = 0.0
        self._round_time, self._round_tokens = 0.0, 0  # since the first step of this round

    def planned(self, event: Event) -> None:
        names = [client["client"] for client in event["clients"] if not client["left_out"]]
        self.members = sorted(names, key=client_order)

    def step(self, event: Event) -> None:
        if event["round"] != self.round and self.clients:
            self.round_finished()
        self.round, self.rounds, self._last_time = event["round"], event["rounds"], event["time"]
        if self.clients:
            self._round_tokens += event["all_tokens"]
        else:
            self._round_time, self._round_tokens = event["time"], 0
        client = self.clients.get(event["client"])
        if client is None:
            now, step = event["time"], event["step"]
            client = ClientProgress(now, step, step, event["steps"], now)
            self.clients[event["client"]] = client
        else:
            client.tokens += event["all_tokens"]
        client.step, client.last_time = event["step"], event["time"]
        client.losses.append(event["loss"])
        self._first = self._first or (event["time"], self.done)

    def client_failed(self, event: Event) -> None:
        """A failed client's steps count as done: nobody will make them."""
        if client := self.clients.get(event["client"]):
            client.step = client.steps

    def round_finished(self) -> None:
        self._done_before += self._round_total
        self.clients.clear()
        self.finished.clear()

    @property
    def round_done(self) -> bool:
        """Whether all clients of the round have taken all steps."""
        return self._round_total == sum(client.step for client in self.clients.values())

    @property
    def done(self) -> int:
        """Steps taken so far by all clients."""
        return self._done_before + sum(client.step for client in self.clients.values())

    @property
    def total(self) -> int:
        """Steps of all clients in the whole run."""
        return self._done_before + self._round_total * (self.rounds - self.round + bool(self.clients))

    @property
    def left(self) -> float | None:
        """Seconds to the end of the run; None while unknown."""
        if self._first is None:
            return None
        since, done = self._first
        return _remaining(self._last_time - since, self.done - done, self.total - self.done)

    @property
    def rate(self) -> float:
        """Tokens a second of all clients together in this round; 0 while unknown."""
        elapsed = self._last_time - self._round_time
        return self._round_tokens / elapsed if elapsed > 0 else 0.0

    def line(self) -> str:
        """Progress of the round and of the run in one line."""
        clients = self.clients.values()
        made, wanted = sum(client.step for client in clients), self._round_total
        loss = sum(client.loss for client in clients) / len(clients)
        return (
            f"round {self.round}/{self.rounds}  steps {made}/{wanted}  loss {loss:.3f} (mean of {len(clients)} clients)"
            f"  {self.rate:.0f} tokens/s  {clock(self.left)} left"
        )

    @property
    def _round_total(self) -> int:
        steps = max((client.steps for client in self.clients.values()), default=0)
        return steps * max(len(self.members), len(self.clients))


def _remaining(elapsed: float, made: int, missing: int) -> float | None:
    return elapsed / made * missing if made > 0 else None


def clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
