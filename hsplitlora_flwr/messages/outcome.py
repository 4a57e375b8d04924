"""What a client returns at the end of a task."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.messages.description import Description
from hsplitlora_flwr.messages.packing import pack_factors, take_tensors, to_arrays, unpack_factors
from hsplitlora_flwr.messages.reading import reading, record


@dataclass(frozen=True)
class Outcome:
    """The content of a client's last reply to ``train``, ``probe`` or ``evaluate``.

    Parameters
    ----------
    adapters : Mapping[str, Factors]
        ``(B, A)`` by absolute layer name, scale folded in.
    importance : Mapping[str, float]
        By absolute layer name; empty where no step was scored.
    losses : list of float
        The loss of every step.
    metrics : Mapping[str, float]
        ``measured-bytes`` (peak memory), ``resident-parameters`` (base parameters held), ``tokens``, ``label-tokens``,
        ``bytes-up``, ``bytes-down`` (frames), ``seconds`` (training), ``seconds-before`` (from the start of the
        process's work on the message to the first step); of an evaluation ``nll`` and ``label-tokens``.
    description : Description
        The client's, as it is now, so that the next round need not ask for it.
    """

    adapters: Mapping[str, Factors]
    importance: Mapping[str, float]
    losses: list[float]
    metrics: Mapping[str, float]
    description: Description

    def to_records(self) -> RecordDict:
        """As the content of a reply."""
        return RecordDict(
            {
                **self.description.to_records(),
                "adapters": to_arrays(pack_factors(self.adapters)),
                "importance": MetricRecord(dict(self.importance)),
                "losses": MetricRecord({"losses": self.losses}),
                "metrics": MetricRecord(dict(self.metrics)),
            }
        )

    @staticmethod
    def is_in(records: RecordDict) -> bool:
        """Whether a reply's content is, or ends with, an outcome."""
        return "losses" in records

    @classmethod
    def from_records(cls, records: RecordDict) -> Outcome:
        """Read from the content of a reply, whose arrays are taken out of it.

        Raises
        ------
        ReplyError
            If it is not what :meth:`to_records` makes.
        """
        with reading("its reply"):
            importance, metrics = record(records, "importance", MetricRecord), record(records, "metrics", MetricRecord)
            losses: Any = record(records, "losses", MetricRecord)["losses"]
            return cls(
                adapters=unpack_factors(take_tensors(record(records, "adapters", ArrayRecord))),
                importance={name: float(value) for name, value in importance.items()},  # type: ignore[arg-type]
                losses=[float(loss) for loss in losses],
                metrics={name: float(value) for name, value in metrics.items()},  # type: ignore[arg-type]
                description=Description.from_records(records),
            )


@dataclass
class Progress:
    """A client's measurements during a task, over all of its messages.

    Parameters
    ----------
    started : float
        When it began the task, in seconds since the epoch.
    before : float
        Seconds from then until the first step: reading text, weights and the update.
    peak, host_peak : int
        Peak memory where the model lies, and of the process in the machine, in bytes.
    bytes_up, bytes_down : int
        Frames to and from the server.
    """

    started: float = field(default_factory=time.time)
    before: float = 0.0
    peak: int = 0
    host_peak: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def begin(self) -> None:
        """Training starts."""
        self.before = time.time() - self.started

    def note_peaks(self, there: int, host: int) -> None:
        """Take note of peak memory in bytes: where the model lies, and of the process in the machine."""
        self.peak, self.host_peak = max(self.peak, there), max(self.host_peak, host)

    def metrics(self, seconds: float) -> dict[str, float]:
        """For an :class:`Outcome`; ``seconds`` of training where one process knows them."""
        return {
            "measured-bytes": self.peak,
            "host-bytes": self.host_peak,
            "bytes-up": self.bytes_up,
            "bytes-down": self.bytes_down,
            "seconds-before": self.before,
            "seconds": seconds or time.time() - self.started - self.before,
        }
