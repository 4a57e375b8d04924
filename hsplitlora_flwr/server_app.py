"""The Flower ``ServerApp``: settings -> strategy -> start."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hsplitlora_flwr.central import CentralTraining
from hsplitlora_flwr.checks import check_model_settings, check_text
from hsplitlora_flwr.config import Config
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.reporting.events import EventLog
from hsplitlora_flwr.resume import check_resume
from hsplitlora_flwr.strategy import HSplitLoRA

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Check every setting before anything is loaded, then run."""
    folder = run_folder(str(context.run_config.get("run.dir", "")), context.run_id)
    try:
        config = Config.from_run_config(context.run_config)
        check_resume(config, folder)
        text = load_text(config.data, config.run.seed)
        check_text(config, text)
        check_model_settings(config)
    except Exception as error:
        EventLog(folder).emit("failed", error=f"{type(error).__name__}: {error}")
        raise
    if METHODS[config.method.name].central:
        CentralTraining(config, text.held_out, folder, text.train).start(grid)
    else:
        HSplitLoRA(config, text.held_out, folder).start(grid)


def run_folder(wanted: str, run_id: int) -> Path:
    """The configured run folder, or one named after the run in the user's data directory."""
    folder = Path(wanted) if wanted else platformdirs.user_data_path("hsplitlora_flwr") / "runs" / str(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()
