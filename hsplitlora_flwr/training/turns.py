"""Whose step moves the server's shared half next.

Every client's step trains the same adapters, so steps come one after another, each from its first micro-batch to the
move of the optimizer. Meanwhile the other clients compute their next forward pass, or are on the wire. The order is

- ``fixed``: by step, and within a step by the clients' names. The adapters are the same to the last bit in every run.
  All wait for the client whose step is next; one that has not come within a patience is passed over, and the others do
  not wait for it any more until it has caught up with them.
- ``arrival``: whoever asks first. Nobody waits for anybody, and no two runs are alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Condition

ORDERS = ("fixed", "arrival")


class Turns:
    """The turns of a round's clients; used by the threads of all of them.

    Parameters
    ----------
    clients : Sequence[str]
        Their names, in the order of a step.
    order : {"fixed", "arrival"}
        See above.
    patience : float
        Seconds that the others wait for a client whose step is next.
    passed_over : Callable[[str], None], optional
        Is told about a client that did not come in time; called in the thread of one that waited.

    Attributes
    ----------
    clients : tuple[str, ...]
        Those that there were at the start.
    holder : str or None
        Whose step is under way.
    """

    def __init__(
        self,
        clients: Sequence[str],
        order: str = "fixed",
        patience: float = 60.0,
        passed_over: Callable[[str], None] = lambda client: None,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is unknown; choose one of {', '.join(ORDERS)}")
        self._fixed, self._patience, self._passed_over = order == "fixed", patience, passed_over
        self._taken = dict.fromkeys(clients, 0)  # steps of each client that is still there, in the order of a step
        self._late: set[str] = set()
        self._asking: list[str] = []  # in the order of their coming
        self.clients = tuple(clients)
        self.holder: str | None = None
        self._idle_since = 0.0  # when the turn became free, or somebody asked for it
        self._changed = Condition()

    def take(self, client: str) -> None:
        """Wait for the client's turn, and hold it until :meth:`done` or :meth:`leave`.

        Raises
        ------
        LookupError
            If the client has left.
        """
        while not self.try_take(client):
            with self._changed:
                if not self._is_next(client):
                    left = self._idle_since + self._patience - time.monotonic()
                    self._changed.wait(max(left, 0.01) if self.holder is None else None)

    def try_take(self, client: str) -> bool:
        """Take the turn if it is the client's now; it counts as asking for it from then on.

        Raises
        ------
        LookupError
            If the client has left.
        """
        late: list[str] = []
        with self._changed:
            if self.holder == client:
                return True
            if client not in self._taken:
                raise LookupError(f"client {client} has no turn: it left, or the round is over")
            if client not in self._asking:
                self._asking.append(client)
                if self.holder is None and len(self._asking) == 1:
                    self._idle_since = time.monotonic()
            if self.holder is None and time.monotonic() >= self._idle_since + self._patience:
                late = self._pass_over()
            if late:
                self._changed.notify_all()
            if taken := self._is_next(client):  # nobody else's turn comes by that
                self._asking.remove(client)
                self.holder = client
        for name in late:
            self._passed_over(name)
        return taken

    def done(self, client: str) -> None:
        """The client's step has been taken: the next one's turn."""
        with self._changed:
            if client in self._taken:
                self._taken[client] += 1
                waited_for = [steps for name, steps in self._taken.items() if name not in self._late]
                if self._taken[client] >= min(waited_for, default=0):
                    self._late.discard(client)
            self._free()

    def leave(self, client: str) -> None:
        """The client has no more steps, or failed: nobody waits for it, and what it holds is free."""
        with self._changed:
            self._forget(client)
            if self.holder == client:
                self._free()

    def expel(self, client: str) -> None:
        """As :meth:`leave`, said by another thread than the client's: what it holds it gives back itself."""
        with self._changed:
            self._forget(client)

    def _forget(self, client: str) -> None:
        self._taken.pop(client, None)
        self._late.discard(client)
        if client in self._asking:
            self._asking.remove(client)
        self._changed.notify_all()

    def _free(self) -> None:
        self.holder, self._idle_since = None, time.monotonic()
        self._changed.notify_all()

    def _is_next(self, client: str) -> bool:
        if self.holder is not None or client not in self._asking:
            return False
        return self._in_order()[0] == client if self._fixed else self._asking[0] == client

    def _in_order(self) -> list[str]:
        """The clients that are waited for or there, by the steps that they have taken and then as they are listed."""
        counted = (name for name in self._taken if name not in self._late or name in self._asking)
        return sorted(counted, key=self._taken.__getitem__)

    def _pass_over(self) -> list[str]:
        """Wait no more for those that stand before the first client that is there; returns who is late now."""
        order = self._in_order() if self._fixed else []
        late = order[: next((place for place, name in enumerate(order) if name in self._asking), 0)]
        self._late.update(late)
        return late
