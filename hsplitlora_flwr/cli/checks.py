"""What is checked before a run starts, in a process of its own: what it takes memory for is gone when the run begins.

Seeing that a model, a text and the settings fit each other needs torch and transformers, 400 MB of them. The launcher,
which is there for as long as the run, has no other use for them, and the memory belongs to the clients.

::

    echo '{"settings": {"model.path": "smollm2-135m"}, "simulated": true, "planned": false, "path": []}' \\
        | python -m hsplitlora_flwr.cli.checks
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf.errors import OmegaConfBaseException

from hsplitlora_flwr.cli import own_memory
from hsplitlora_flwr.cli.interrupts import interruptible
from hsplitlora_flwr.cli.own_memory import OwnMemory
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.models.demo import DemoModelError, demo_folder, demo_model, is_demo_model
from hsplitlora_flwr.paths import check_run_folder
from hsplitlora_flwr.registry import import_plugins
from hsplitlora_flwr.reporting.events import Event, Listener

WRONG = (ValueError, ModuleNotFoundError, OmegaConfBaseException)
"""All errors of settings, data and models, and of packages for what was asked for."""
_MODULE = "hsplitlora_flwr.cli.checks"
_PATIENCE = 10.0
_LAST_LINES = 5


@dataclass(frozen=True)
class Checked:
    """What was learned on the way.

    Parameters
    ----------
    key : str
        Under which the memory of a client's process is remembered.
    memory : OwnMemory, optional
        What is remembered there.
    planned_bytes : int
        What all clients of a round and the server are planned to take together; 0 where there is no plan, or nobody
        asked.
    """

    key: str
    memory: OwnMemory | None
    planned_bytes: int = 0


def prepare(config: Config, console: Listener, *, simulated: bool = True) -> None:
    """Fail on what cannot work before anything starts; fetch the model that comes without one's own.

    Parameters
    ----------
    simulated : bool
        The server and its clients will be on this machine, and share its devices, its ports and the training text.
    """
    check_run_folder(Path(config.run.dir))
    text = load_text(config.data, config.run.seed)
    # from here on with torch, which takes seconds to import
    from hsplitlora_flwr.models.placement import check_gpu_memory
    from hsplitlora_flwr.server.checkpoint import check_resume
    from hsplitlora_flwr.server.preflight import check_model_settings, check_parts, check_text
    from hsplitlora_flwr.server.shard import check_server
    from hsplitlora_flwr.transport.certificates import CertificateError
    from hsplitlora_flwr.transport.stream import StreamError

    check_resume(config, Path(config.run.dir))
    if is_demo_model(config.model.path):
        if not demo_folder().is_dir():
            console.handle({"kind": "phase", "text": f"fetching the model {config.model.path}, 93 MB, this once"})
        try:
            demo_model()
        except DemoModelError as error:
            raise ConfigError(str(error)) from error
    check_model_settings(config)
    check_text(config, text)
    if simulated:
        check_gpu_memory("clients.gpu_memory_gb", config.clients.gpu_memory_gb, config.model.device)
        try:
            check_server(config)
        except (StreamError, CertificateError) as error:
            raise ConfigError(str(error)) from error
        check_parts(config, text)


def prepare_apart(config: Config, console: Listener, *, simulated: bool = True, planned: bool = False) -> Checked:
    """As :func:`prepare`, in a process that ends with it; ``planned`` asks for what the run is planned to take.

    Raises
    ------
    ConfigError
        If something is wrong with what was asked for.
    RuntimeError
        If the process ends otherwise; the text is what it said last.
    """
    asked = {"settings": config.to_run_config(), "simulated": simulated, "planned": planned, "path": sys.path}
    with tempfile.TemporaryFile() as said, _child(json.dumps(asked), said) as answers:
        for event in answers:
            match event["kind"]:
                case "checked":
                    memory = event["memory"]
                    own = OwnMemory(**memory) if memory else None
                    return Checked(event["key"], own, event["planned_bytes"])
                case "wrong":
                    raise ConfigError(event["error"])
                case _:
                    console.handle(event)
        said.seek(0)
        last = said.read().decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
    raise RuntimeError("\n".join(["the checks before the run broke off", *last]))


@contextmanager
def _child(asked: str, said: IO[bytes]) -> Iterator[Iterator[dict[str, Any]]]:
    """The process, and what it tells; whatever ends the talk ends it, too."""
    process = subprocess.Popen(
        [sys.executable, "-m", _MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is ours to handle
    )
    assert process.stdin and process.stdout
    try:
        with suppress(BrokenPipeError), process.stdin:
            process.stdin.write(asked)
        yield map(json.loads, process.stdout)
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class _Answers:
    """Tells what happens to who asked, who alone has the standard output: libraries that print there are not heard."""

    def __init__(self) -> None:
        self._output = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def handle(self, event: Event) -> None:
        self._output.write(json.dumps(dict(event)) + "\n")
        self._output.flush()


def _planned_bytes(config: Config) -> int:
    """What all clients of a round and the server take by the forecast; 0 where it has no plan."""
    from hsplitlora_flwr.cli.forecast import forecast

    try:
        plan = forecast(config).plan
    except WRONG:  # the run says it better, or has no clients to plan for
        return 0
    clients = sorted((client.predicted_bytes for client in plan.clients.values()), reverse=True)
    return plan.server_bytes + sum(clients[: config.clients.per_round or None])


def _check(asked: dict[str, Any], answers: Listener) -> None:
    sys.path[:] = asked["path"]
    try:
        import_plugins(asked["settings"])
        config = Config.from_run_config(asked["settings"])
        prepare(config, answers, simulated=asked["simulated"])
        memory = own_memory.remembered(config)
        known = {
            "key": own_memory.key(config),
            "memory": asdict(memory) if memory else None,
            "planned_bytes": _planned_bytes(config) if asked["planned"] else 0,
        }
    except WRONG as error:
        answers.handle({"kind": "wrong", "error": str(error)})
    else:
        answers.handle({"kind": "checked", **known})


if __name__ == "__main__":
    interruptible()  # what was begun, such as a download, is taken back
    _check(json.load(sys.stdin), _Answers())
