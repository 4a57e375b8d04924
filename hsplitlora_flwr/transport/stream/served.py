"""The server's side of one client's stream: its frames are answered in turn, over one connection after another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Lock, Thread, Timer

import grpc
import torch

from hsplitlora_flwr.transport.frames import Buffer, Failure, Frame, FrameError, Ping, Pong, buffers, decode
from hsplitlora_flwr.transport.link import Guest
from hsplitlora_flwr.transport.stream.backlog import Backlog, Closed
from hsplitlora_flwr.transport.stream.chunks import CHUNK_BYTES, PING_BYTES, assemble, cut
from hsplitlora_flwr.transport.stream.protocol import LEAVE

log = logging.getLogger(__name__)

END_SECONDS = 5.0
"""Time that a client has to leave its stream when the round is over."""
PINGS = 64
"""Pings of a stream that are answered: a measurement takes fewer than 20."""


class Call:
    """One connection of a client.

    Parameters
    ----------
    requests : Iterator[bytes]
        What arrives.
    cancel : Callable[[], object]
        Cuts it off.
    """

    def __init__(self, requests: Iterator[bytes], cancel: Callable[[], object]) -> None:
        self.requests, self.cancel = requests, cancel


class ServedStream:
    """The server's side of one client: a thread reads, a thread computes, and gRPC's own thread sends.

    The thread that computes lasts as long as the stream, the others as long as one connection of it.
    """

    def __init__(self, guest: Guest, in_flight: int, name: str, grace: float) -> None:
        self._guest, self._name, self._grace = guest, name, grace
        self._window = in_flight + 1  # frames that its client has under way at most
        self._inbox: Backlog[Frame | FrameError] = Backlog(in_flight, keep=False)
        self._answers: Backlog[list[Buffer]] = Backlog(self._window + 1)  # and word that the round is over
        self._arrived, self._pings = 0, 0  # frames that are here, pings among them
        self._begun = self._left = False  # its client came; there is nothing more to do for it
        self._dismissed = False  # by the server
        self._told = False  # the guest, that it is over
        self._call: Call | None = None
        self._timer: Timer | None = None  # what ends it, where it does not come to its own end
        self._lock = Lock()
        self._reading = Lock()  # frames of a connection come behind those of the one before
        self.over = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._call is not None

    def connect(self, call: Call, has: int) -> tuple[int, Iterator[bytes]]:
        """Continue over another connection, whose client ``has`` so many answers.

        Returns
        -------
        tuple[int, Iterator[bytes]]
            How many of its frames have arrived, and the answers that it lacks, as messages.

        Raises
        ------
        LookupError
            If those answers are not kept, or the stream is over.
        """
        with self._lock:
            if self.over or (self._begun and not self._grace):
                raise LookupError("no live token")
            answers = self._answers.since(has)
            before, self._call = self._call, call
            self._stop_timer()
            Thread(target=self._read, args=(call,), name="stream-read", daemon=True).start()
            if not self._begun:
                self._begun = True
                self._guest.opened()
                Thread(target=self._compute, name="stream-compute", daemon=True).start()
        if before:
            before.cancel()
        return self._arrived, (message for answer in answers for message in cut(answer))

    def disconnect(self, call: Call) -> None:
        """A connection is gone; its client may come back."""
        with self._lock:
            if self._call is not call:
                return
            self._call = None
            self._stop_timer()
            self._answers.hang_up()
            waits = self._grace and not self.over and not self._left
            if waits:
                self._start_timer(self._grace, self._give_up)
            else:
                self._close()
        if waits:
            log.warning("the connection of %s broke off; it has %g s to come back", self._name, self._grace)
        else:
            self._tell(lost=not (self._left or self._dismissed))

    def dismiss(self) -> None:
        """Tell the client that the round is over, and end the stream whatever the client does."""
        with self._lock:
            self.over = self._dismissed = True
            self._inbox.close()
            self._stop_timer()
            if self._call:
                self._start_timer(END_SECONDS, self._call.cancel)
            else:
                self._close()

    def _give_up(self) -> None:
        with self._lock:
            if self._call is not None:
                return
            self._close()
        log.warning("%s did not come back within %g s", self._name, self._grace)
        self._tell(lost=True)

    def _tell(self, *, lost: bool) -> None:
        """Tell the guest once that the stream is over."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            self._guest.ended(lost)

    def _close(self) -> None:
        """End the thread that computes after the frame that it is answering."""
        self.over = True
        self._inbox.close(discard=True)
        self._answers.close(discard=True)

    def _start_timer(self, seconds: float, then: Callable[[], object]) -> None:
        self._timer = Timer(seconds, then)
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _read(self, call: Call) -> None:
        try:
            for data in assemble(self._messages(call), self._guest.limit, CHUNK_BYTES):
                if not self._deliver(call, decode(data)):
                    return
            self._left = True
        except FrameError as error:  # the client learns of it after the answers to what it sent before
            with suppress(Closed):
                self._deliver(call, error)
        except ConnectionError:
            if self._grace:
                return
        except Closed:
            pass
        self._inbox.close()

    @staticmethod
    def _messages(call: Call) -> Iterator[bytes]:
        """Messages until the client leaves; a call that ends in any other way broke, whatever gRPC says."""
        with suppress(grpc.RpcError):
            for message in call.requests:
                if message == LEAVE:
                    return
                yield message
        raise ConnectionError

    def _deliver(self, call: Call, frame: Frame | FrameError) -> bool:
        """Put a frame into the inbox; False if the stream has another connection by now."""
        with self._reading:
            with self._lock:
                if self._call is not call:
                    return False
                self._arrived += 1
            self._answers.arrived(self._arrived - self._window)
            self._inbox.put(frame)
            return True

    def _compute(self) -> None:
        frames, last = self._inbox.since(0), False
        try:
            while not last and not self.over and (frame := next(frames, None)) is not None:
                answer, last = self._answer(frame)
                self._answers.put(answer)
            if self.over and not last:
                self._answers.put(buffers(Failure("the round is over")))
        except Closed:
            pass
        finally:
            self._left = True  # there is nothing to come back for
            self._tell(lost=False)
            self._inbox.close(discard=True)
            self._answers.close()

    def _answer(self, frame: Frame | FrameError) -> tuple[list[Buffer], bool]:
        """The answer's bytes, and whether it ends the stream."""
        try:
            if isinstance(frame, FrameError):
                raise frame
            answer = self._pong(frame) if isinstance(frame, Ping) else self._guest(frame)
            return buffers(answer), isinstance(answer, Failure)
        except Exception as error:  # the client must learn why, whatever it is
            failure = Failure.of(error)
            log.warning("the stream of %s ends: %s", self._name, failure.error)
            return buffers(failure), True

    def _pong(self, ping: Ping) -> Pong:
        self._pings += 1
        if self._pings > PINGS:
            raise ValueError(f"more than {PINGS} pings on a stream")
        if not 0 <= ping.answer_bytes <= PING_BYTES:
            raise ValueError(f"a ping asks for {ping.answer_bytes} bytes; from 0 to {PING_BYTES} are allowed")
        return Pong(torch.zeros(ping.answer_bytes, dtype=torch.uint8))
