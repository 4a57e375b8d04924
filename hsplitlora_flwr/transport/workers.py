"""Worker processes of a simulation that died: Flower goes on giving them messages.

Simulated clients take turns in a few worker processes of Ray. One that died, as when the system killed it for lack of
memory, answers each further message at once with the error that it died of, word for word, and so takes message after
message from the workers that live: after one death a run of three clients would go on with one.

A message that a dead worker took has not been read by anybody, so it can be sent again. Flower gives it to the worker
that became idle last; so it goes out just after a reply has come, whose worker lives and has become idle. Where no
reply is on its way, a call that asks for nothing finds such a worker. The message in whose work the worker died is not
sent again, since it may be what killed it.
"""

from __future__ import annotations

import re

from flwr.app import Message

WAKE = "query.wake"
"""The type of a message that asks for nothing."""

_DEATH = re.compile(r"<class 'ray\.exceptions\.(?:Actor\w+|RayActor|OutOfMemory|WorkerCrashed|NodeDied)Error'>")
_LOOKED_AT, _LONGEST = 10_000, 1_000  # characters of an error's text, from its end, and of a reason
_MEMORY = re.compile(r"Memory on the node [^)]*\) was (\S+ / \S+) ")


class DeadWorkers:
    """The workers of a run that are known to be dead, by the errors that they died of."""

    def __init__(self) -> None:
        self._deaths: set[str] = set()

    def took(self, reply: Message) -> bool:
        """Whether a worker that was dead already took the message, so that nobody read it."""
        if not is_death(reply):
            return False
        known = _text(reply) in self._deaths
        self._deaths.add(_text(reply))
        return known


def is_death(reply: Message) -> bool:
    """Whether a reply is the error of a worker that died, now or earlier."""
    return reply.has_error() and bool(_DEATH.match(_text(reply)))


def reason_of(reply: Message) -> str:
    """Why a client failed, in a line: the message of its error, without the engine that carried it here."""
    text = _text(reply)
    if is_death(reply):
        found = _MEMORY.search(text)
        if found:
            return (
                f"Ray ended its worker process, since memory of its machine ran out ({found[1]} in use); let fewer "
                "clients train at the same time, or give each less to hold"
            )
        return "its worker process died; most often the system killed it for lack of memory"
    lines = [line.strip() for line in text[-_LOOKED_AT:].splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    reason = last.rpartition("Message: ")[2].rstrip(">'\"")
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} ..."


def _text(reply: Message) -> str:
    return reply.error.reason or ""
