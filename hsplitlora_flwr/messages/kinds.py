"""The types of Flower messages that a run sends."""

from __future__ import annotations

from contextvars import ContextVar

DESCRIBE, PROBE, TRAIN, EVALUATE = "query.describe", "train.probe", "train", "evaluate"
"""Message types, in the order of a round."""
TURN, FORGET = "train.turn", "query.forget"
"""A step over messages; and the end of the run, when nodes remove what they kept of it."""
answering_here: ContextVar[bool] = ContextVar("answering_here", default=False)
"""Whether this thread is the server's, in a call that lets clients answer: one that waited there for what the server
sends next would wait for ever."""
