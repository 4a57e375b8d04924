"""A client and a server in one process."""

from __future__ import annotations

from collections import deque

from hsplitlora_flwr.transport.frames import Frame, decode, encode
from hsplitlora_flwr.transport.link import Handler


class Handed:
    """Frames are answered as they are: tensors stay on the device."""

    def __init__(self, handler: Handler) -> None:
        self._handler, self._answers = handler, deque[Frame]()

    def send(self, frame: Frame) -> None:
        """Have it answered at once."""
        self._answers.append(self._handler(frame))

    def receive(self) -> Frame:
        """The next answer."""
        return self._answers.popleft()


class Encoded(Handed):
    """Frames become bytes on the host and back, as between machines."""

    def send(self, frame: Frame) -> None:
        """Have it answered at once."""
        self._answers.append(decode(bytearray(encode(self._handler(decode(bytearray(encode(frame))))))))


LINKS = {"tensors": Handed, "bytes": Encoded}
