"""The Flower ``ServerApp``: settings -> strategy -> start."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import platformdirs
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.configuration import with_model_dtype
from hsplitlora_flwr.paths import check_run_folder
from hsplitlora_flwr.registry import import_plugins
from hsplitlora_flwr.reporting.report import RunReport, cause_of, failed_outside, make_listeners
from hsplitlora_flwr.server.central import CentralTraining
from hsplitlora_flwr.server.checkpoint import check_resume
from hsplitlora_flwr.server.preflight import check_model_settings, check_text
from hsplitlora_flwr.server.shard import check_server
from hsplitlora_flwr.server.strategy import HSplitLoRA
from hsplitlora_flwr.training.process import OwnProcess

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Check every setting before anything is loaded, then run."""
    folder = run_folder(str(context.run_config.get("run.dir", "")), context.run_id)
    try:
        import_plugins(context.run_config)
        strategy = make_strategy(Config.from_run_config(context.run_config), folder)
    except BaseException as error:
        failed_outside(folder, cause_of(error))
        raise
    threading.Thread(target=tell_a_stop, args=(strategy.report,), daemon=True).start()
    strategy.start(grid)


def tell_a_stop(report: RunReport) -> None:
    """Note that the run was stopped, if its process ends before it does.

    A simulation runs the ``ServerApp`` in a thread beside the main one. When Flower is told to stop the run, or Ray
    fails, the main thread ends, and seconds later the process, without a word to that thread.
    """
    threading.main_thread().join()
    report.stopped()


def make_strategy(config: Config, folder: Path, process: OwnProcess | None = None) -> HSplitLoRA | CentralTraining:
    """The strategy of a run, when everything that can be checked before it starts is checked.

    Parameters
    ----------
    config : Config
    folder : Path
        The run folder.
    process : OwnProcess, optional
        The process that it runs in; one of its own by default.
    """
    config = with_model_dtype(config)
    check_resume(config, folder)
    check_server(config)
    text = load_text(config.data, config.run.seed)
    check_model_settings(config)
    check_text(config, replace(text, train=()))  # what clients train on they check themselves
    listeners = make_listeners(config, folder)
    if METHODS[config.method.name].central:
        return CentralTraining(config, text.held_out, folder, text.train, listeners=listeners)
    return HSplitLoRA(config, text.held_out, folder, process, listeners=listeners)


def run_folder(wanted: str, run_id: int) -> Path:
    """The configured run folder, or one named after the run in the user's data directory.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    folder = Path(wanted) if wanted else platformdirs.user_data_path("hsplitlora_flwr") / "runs" / str(run_id)
    check_run_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()
