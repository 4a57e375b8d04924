"""What a client's process takes by itself, on this machine: remembered, so that a forecast and its run take the same.

A run through Flower lets its clients measure it, once for a model and a text, and from then on it stands in the user's
cache: for other runs, whichever engine they have, and for plans. A plan before any run measures it in a process of its
own, which imports what a client of a simulation imports and describes itself as one does; Ray adds a few percent to
that, so a run does not take it over.

::

    echo '{"model.path": "smollm2-135m"}' | python -m hsplitlora_flwr.cli.own_memory
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.reporting.summary import read_summary

_PACKAGES = ("hsplitlora-flwr", "flwr", "torch", "transformers")
_FILE = "process.json"
_MOST = 200
"""Numbers that are kept, the youngest."""
_PATIENCE = 300.0


@dataclass(frozen=True)
class OwnMemory:
    """What a process takes.

    Parameters
    ----------
    bytes : int
    source : str
        Where the number comes from, in words.
    in_run : bool
        Whether clients of a run measured it.
    """

    bytes: int
    source: str
    in_run: bool = False


def stated(config: Config) -> OwnMemory | None:
    """As ``clients.process_mb`` says it; None if that is 0."""
    own = int(config.clients.process_mb * 1e6)
    return OwnMemory(own, "clients.process_mb") if own else None


def remembered(config: Config) -> OwnMemory | None:
    """As measured before for this model, this text and these packages; None if it never was."""
    entry = _entries().get(key(config))
    if not entry:
        return None
    return OwnMemory(entry["bytes"], "the last run here" if entry["in_run"] else "measured before", entry["in_run"])


def remember(config: Config, own: int, *, in_run: bool) -> None:
    """Keep a number; what a run measured is not replaced by anything else."""
    _keep(key(config), own, in_run=in_run)


def _keep(name: str, own: int, *, in_run: bool) -> None:
    entries = _entries()
    if in_run or not entries.get(name, {}).get("in_run"):
        entries.pop(name, None)
        entries[name] = {"bytes": own, "in_run": in_run}
        youngest = dict(list(entries.items())[-_MOST:])
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_file().parent, delete=False, encoding="utf-8") as draft:
            json.dump(youngest, draft)
        Path(draft.name).replace(_file())


def measured(config: Config) -> OwnMemory:
    """As a process of its own measures it now, which takes seconds; it is remembered.

    Where that cannot be, as with no more of a model than its configuration, this process measures itself.
    """
    command = [sys.executable, "-m", __name__]
    settings = json.dumps(config.to_run_config())
    done = subprocess.run(command, input=settings, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if done.returncode:
        from hsplitlora_flwr.models.configuration import read_config
        from hsplitlora_flwr.training.memory import process_bytes

        return OwnMemory(process_bytes(read_config(config.model.path)), "this process, without text and tokenizer")
    own = int(done.stdout.split()[-1])
    remember(config, own, in_run=False)
    return OwnMemory(own, "measured now")


def learn(name: str, folder: Path) -> None:
    """Remember what the clients of a run measured before they began, the largest of it.

    Parameters
    ----------
    name : str
        What :func:`key` says of its settings.
    folder : Path
        The folder of the finished run.
    """
    summary = read_summary(folder)
    if summary["rounds"]:
        _keep(name, max(row["process_bytes"] for row in summary["rounds"][0]["clients"]), in_run=True)


def _entries() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file() -> Path:
    from hsplitlora_flwr.models.demo import demo_folder

    return demo_folder().parent / _FILE


def key(config: Config) -> str:
    """Under what it is remembered: a digest of packages, the model's kind and its vocabulary, and the text."""
    from hsplitlora_flwr.models.configuration import read_config

    text = {key: value for key, value in config.to_run_config().items() if key.startswith("data.")}
    parts = {
        "versions": [platform.python_version(), *map(version, _PACKAGES)],
        "model": read_config(config.model.path).to_json_string(),
        "quantise": config.model.quantise,
        "text": text,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _measure(config: Config) -> int:
    """In this process, which has loaded nothing else: what a client says that it takes, in bytes."""
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    if find_spec("ray"):
        import flwr.simulation.ray_transport.ray_actor  # noqa: F401  # as in a client of a simulation
    from hsplitlora_flwr.client_app import app
    from hsplitlora_flwr.messages import DESCRIBE, Description, settings_records
    from hsplitlora_flwr.models.configuration import with_model_dtype

    clients = replace(config.clients, memory_gb=(1.0,), process_mb=0.0)  # a stated budget: nothing else is measured
    config = with_model_dtype(replace(config, clients=clients))
    # Whoever writes a message is a task, says Flower; an engine says which, and there is no public way to.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 0
    with tempfile.TemporaryDirectory() as disk:
        node: dict[str, Any] = {"partition-id": 0, "num-partitions": config.clients.count, "state-dir": disk}
        reply = app(Message(settings_records(config, None), 1, DESCRIBE), Context(1, 1, node, RecordDict(), {}))
    return Description.from_records(reply.content).process_bytes


if __name__ == "__main__":
    print(_measure(Config.from_run_config(json.load(sys.stdin))))
