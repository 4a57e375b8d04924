"""Whether a run of which nothing is heard is still alive."""

from __future__ import annotations

import time
from collections.abc import Callable

from hsplitlora_flwr.cli.superlink import Question, SuperLink, SuperLinkError
from hsplitlora_flwr.cli.verdict import NOT_STARTED

_SILENCE_SECONDS = 20.0  # then ask Flower whether the run still lives; asking costs 1.5 s of CPU
_AGAIN_SECONDS = 2.0  # to the next question about a run whose log has ended
_REFUSALS, _PATIENCE = 3, 300.0  # questions without a sign of life between them, and seconds: then the run is lost
_SLOW_SECONDS = 180.0  # then a question is asked anew


class Watch:
    """Asks Flower about a run of which nothing is heard.

    On a busy machine Flower may take minutes to answer, and a network may fail for a while. Neither ends a run: it is
    lost if its SuperLink refuses again and again without a sign of life in between.

    Parameters
    ----------
    superlink : SuperLink
        Where the run is.
    now : Callable[[], float]
        The time in seconds.

    Attributes
    ----------
    status : RunStatus
        What Flower said last.
    """

    def __init__(self, superlink: SuperLink, now: Callable[[], float] = time.monotonic) -> None:
        self.status = NOT_STARTED
        self._superlink, self._now = superlink, now
        self._question: Question | None = None
        self._refusals = 0
        self._heard = self._asked = now()

    def heard(self) -> None:
        """The run gave a sign of life."""
        self._heard, self._refusals = self._now(), 0

    def look(self, run_id: str, ended: bool) -> None:
        """Take an answer, if there is one; ask, if it is time to. ``ended``: the run's log has ended.

        Raises
        ------
        SuperLinkError
            If the run is lost.
        """
        now = self._now()
        if self._question is None:
            silent = now - max(self._heard, self._asked) > _SILENCE_SECONDS
            if silent or (ended and now - self._asked > _AGAIN_SECONDS):
                self._question, self._asked = self._superlink.ask(run_id), now
            return
        try:
            answer = self._question.answer()
        except SuperLinkError:
            self._question, self._asked = None, now
            self._refusals += 1
            if self._refusals >= _REFUSALS and now - self._heard > _PATIENCE:
                raise
            return
        if answer:
            self._question, self._asked, self.status = None, now, answer
            self.heard()
        elif now - self._asked > _SLOW_SECONDS:
            self.close()
            self._asked = now

    def close(self) -> None:
        """Ask no more."""
        if self._question:
            self._question.drop()
            self._question = None
