"""A client process from its start to an open stream: ``python -m simulations.benchmarks.starting``.

What it needs stands as JSON on its standard input: ``begun`` (when its parent started it, in seconds since the epoch),
``path``, ``split``, ``endpoint`` and ``token``. It prints a JSON object: seconds by part, in order. Nothing is imported
before its turn, so the parts are those of a process that Flower starts for a message.
"""

import json
import sys
import time


def main() -> None:
    """Take the parts one after another, and print how long each took."""
    stamps = [time.time()]
    task = json.load(sys.stdin)
    import flwr.clientapp  # noqa: F401

    stamps.append(time.time())
    import torch  # noqa: F401

    stamps.append(time.time())
    import hsplitlora_flwr.client_app  # noqa: F401
    from hsplitlora_flwr.training.client import load_client

    stamps.append(time.time())
    load_client(task["path"], task["split"], "float32", "cpu", {})
    stamps.append(time.time())
    from hsplitlora_flwr.transport.link import Endpoint
    from hsplitlora_flwr.transport.stream import StreamLink

    with StreamLink(Endpoint(**task["endpoint"]), task["token"]):
        stamps.append(time.time())
    parts = ("process", "import flwr", "import torch", "import hsplitlora_flwr", "load", "stream")
    starts = [task["begun"], *stamps[:-1]]
    print(json.dumps({part: end - start for part, start, end in zip(parts, starts, stamps, strict=True)}))


if __name__ == "__main__":
    main()
