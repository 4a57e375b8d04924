"""The types of Flower messages that a run sends."""

from __future__ import annotations

from contextvars import ContextVar

DESCRIBE, PROBE, TRAIN, EVALUATE = "query.describe", "train.probe", "train", "evaluate"
"""Message types, in the order of a round."""
TURN, FORGET = "train.turn", "query.forget"
"""Message types for a step of training over messages, and for the end of the run, when nodes delete what they kept."""
answering_here: ContextVar[bool] = ContextVar("answering_here", default=False)
"""Whether this thread is the server's own, inside a call that lets clients answer. A client that waited there for the
server's next message would wait for ever."""
