"""A TCP relay whose connections break as whoever has it says."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType


class Relay:
    """Passes bytes on between whoever connects to ``port`` and ``127.0.0.1:target``."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._passes, self._open = threading.Event(), threading.Event()
        self._passes.set()
        self._open.set()
        self._lock = threading.Lock()
        self.connections = self.bytes = 0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._passes.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        """Reset every connection, in the middle of whatever is on its way."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for end in (end for pair in pairs for end in pair):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def hold(self) -> None:
        """Pass nothing on any more over the connections that there are, and say nothing about it."""
        self._passes.clear()
        self._passes = threading.Event()
        self._passes.set()

    def refuse(self) -> None:
        """Reset every connection from now on, until :meth:`admit`."""
        self._open.clear()
        self.cut()

    def admit(self) -> None:
        """Take connections again."""
        self._open.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self._open.is_set():
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._pairs.append((near, far))
                    self.connections += 1
                passes = self._passes
                self._start(self._pump, near, far, passes)
                self._start(self._pump, far, near, passes)

    def _pump(self, source: socket.socket, sink: socket.socket, passes: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                if not passes.is_set():
                    continue
                sink.sendall(data)
                self.bytes += len(data)
        if passes.is_set():
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
