"""A slow link on one machine: ``python simulations/shaping.py HOST:PORT --mbit 100 --round-trip-ms 20``.

A relay for TCP connections in a process of its own. It needs neither privileges nor a kernel with netem, and prints the
address at which it stands for ``HOST:PORT``. Each direction of a connection is a line of its own, as of a duplex link:

    sender -> queue of 256 KiB -> line: bytes leave one after another at the rate -> delay -> receiver

A sender that is faster than the line finds the queue full and has to wait, as behind a router; so has one whose
receiver does not read. At no moment has more arrived than the rate allows since the line was last idle.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

QUEUE_BYTES = 2**18
_CHUNK_BYTES = 2**14


@dataclass(frozen=True)
class SlowLink:
    """What a link is like, the same in both directions.

    Parameters
    ----------
    mbit : float
        Rate of each direction, in 1e6 bit/s.
    round_trip_ms : float
        Time that a bit takes there and back, in milliseconds; half of it each way.

    Raises
    ------
    ValueError
        If one is not finite, the rate not positive, or the round trip negative.
    """

    mbit: float
    round_trip_ms: float

    def __post_init__(self) -> None:
        if not 0 < self.mbit < math.inf:
            raise ValueError(f"mbit={self.mbit}: the rate of a link must be positive and finite")
        if not 0 <= self.round_trip_ms < math.inf:
            raise ValueError(f"round_trip_ms={self.round_trip_ms}: a round trip must be finite, and at least 0")

    def __str__(self) -> str:
        return f"{self.mbit:g} Mbit/s, {self.round_trip_ms:g} ms"

    @property
    def delay(self) -> float:
        """Seconds from one end to the other."""
        return self.round_trip_ms / 2e3

    def seconds(self, count: float) -> float:
        """Time that ``count`` bytes occupy the line."""
        return count * 8 / (self.mbit * 1e6)


@contextmanager
def shaped(address: str, link: SlowLink) -> Iterator[str]:
    """Put a slow link before ``address``.

    Parameters
    ----------
    address : str
        ``host:port`` of a TCP server.
    link : SlowLink

    Yields
    ------
    str
        ``host:port`` of the near end of the link, until the context ends.

    Raises
    ------
    RuntimeError
        If the relay does not start.
    """
    options = ["--mbit", str(link.mbit), "--round-trip-ms", str(link.round_trip_ms)]
    with subprocess.Popen([sys.executable, __file__, address, *options], stdout=subprocess.PIPE, text=True) as relay:
        assert relay.stdout is not None
        try:
            near = relay.stdout.readline().strip()
            if not near:
                raise RuntimeError(f"the relay to {address} ended with status {relay.wait()}; its error stands above")
            yield near
        finally:
            relay.terminate()


async def _serve(address: tuple[str, int], link: SlowLink) -> None:
    """Relay every connection to ``address``; prints the address that it listens on."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*address, limit=_CHUNK_BYTES)
        except OSError as error:
            print(f"the relay reaches nothing behind it: {error}", file=sys.stderr)
            writer.close()
            return
        for end in (writer, far_writer):  # else the kernel's buffers would hold megabytes besides the queue
            for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, buffer, 4 * _CHUNK_BYTES)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(_carry(reader, far_writer, link))
                directions.create_task(_carry(far_reader, writer, link))
        except* OSError:  # one end is gone; the other one learns of it
            pass
        finally:
            writer.close()
            far_writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0, limit=_CHUNK_BYTES)
    print("{}:{}".format(*server.sockets[0].getsockname()), flush=True)
    await server.serve_forever()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: SlowLink) -> None:
    """One direction of a connection."""
    loop = asyncio.get_running_loop()
    delayed: deque[bytes] = deque()
    free = 0.0  # when the last byte so far has left the queue
    while data := await reader.read(_CHUNK_BYTES):
        # By the clock of the line and not by that of this task: waking up late costs no rate.
        free = max(free, loop.time()) + link.seconds(len(data))
        delayed.append(data)
        loop.call_at(free + link.delay, lambda: writer.write(delayed.popleft()))
        await asyncio.sleep(free - loop.time() - link.seconds(QUEUE_BYTES))
        await writer.drain()
    while delayed:
        await asyncio.sleep(free + link.delay - loop.time())
    writer.write_eof()


def main() -> None:
    """Run the relay until it is stopped."""
    parser = argparse.ArgumentParser(description="A slow link before a TCP server.")
    parser.add_argument("address", type=_address, metavar="HOST:PORT", help="the server")
    parser.add_argument("--mbit", type=float, default=100.0, help="rate of each direction, 1e6 bit/s (%(default)s)")
    parser.add_argument("--round-trip-ms", type=float, default=20.0, help="delay there and back, ms (%(default)s)")
    options = parser.parse_args()
    asyncio.run(_serve(options.address, SlowLink(options.mbit, options.round_trip_ms)))


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not (host and port.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    main()
