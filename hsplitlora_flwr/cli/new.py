"""The beginning of a Flower app of one's own: ``hsplitlora new FOLDER``.

Writes what docs/embedding.md shows: an app of twenty lines with data of its own, its settings, a few notes for two
sites to learn from, and the commands that run it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from string import Template

from hsplitlora_flwr.cli.outcome import ends
from hsplitlora_flwr.config import ConfigError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
"""What Flower takes as the name of an app and of its folder."""

APP = '''\
from pathlib import Path

from flwr.serverapp import ServerApp
from hsplitlora_flwr import Config, HSplitLoRA, split_client_app
from hsplitlora_flwr.data import Example


def my_notes(context, config):
    """The private examples of one node; they do not leave it."""
    folder = Path(config.data.path) / f"site-{context.node_config['partition-id']}"
    return [Example(prompt=f"{file.stem}\\n", completion=file.read_text()) for file in sorted(folder.glob("*.txt"))]


client = split_client_app(load_data=my_notes)
server = ServerApp()


@server.main()
def main(grid, context):
    config = Config.from_run_config(context.run_config)
    held_out = [Example("greeting\\n", "Good morning, how can I help you?")]
    HSplitLoRA(config, held_out, f"{config.run.dir}/{context.run_id}").start(grid)
'''

PROJECT = """\
[project]
name = "$name"
version = "1.0.0"
description = "Notes of two sites, learnt without leaving them"
license = "Apache-2.0"
dependencies = ["hsplitlora-flwr"]

[tool.flwr.app]
publisher = "me"
components = { serverapp = "notes:server", clientapp = "notes:client" }

[tool.flwr.app.config]
model.path = "smollm2-135m"
data.path = "$folder/notes"
clients.count = 2
run.dir = "$folder/results"
train.rounds = 2
train.steps = 10
"""

COMMANDS = """\
cd $folder
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
flwr run . --stream --federation-config 'num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2'
"""

README = """\
# $name

`notes.py` is a Flower app: each node learns from the notes of its site, `notes/site-0` or `notes/site-1`, which do not
leave it.
`pyproject.toml` holds its settings; `hsplitlora run --help` lists them all.

```
$commands```

A run leaves its adapter, report and summary in `results/RUN_ID`. The local SuperLink that the first `flwr run` starts
goes on running; the variable, which counts where it is started, keeps it from installing torch anew for every run.
"""

NOTES = {
    "site-0": {
        "opening hours": "We are open from eight to noon, and on Thursdays until six in the evening.",
        "parking": "There are a few places behind the house; please leave the two in front of the door free.",
        "prescriptions": "Ring us before ten, and your prescription is ready in the afternoon of the same day.",
        "vaccinations": "Come on a Tuesday, bring the yellow booklet, and stay for a quarter of an hour.",
    },
    "site-1": {
        "opening hours": "The desk is staffed day and night; visitors come between two and seven.",
        "lost and found": "What was found lies at the desk for a month, and after that with the town.",
        "meals": "Breakfast is at seven, lunch at noon and supper at half past five.",
        "television": "It is free of charge; please take the headphones when you are not alone.",
    },
}


def files(name: str, folder: str) -> dict[str, str]:
    """The app's files by their path in it.

    Parameters
    ----------
    name : str
        Of the app.
    folder : str
        Where it lies, as it is to stand in settings and commands.
    """
    values = {"name": name, "folder": folder}
    values["commands"] = Template(COMMANDS).substitute(values)
    written = {"notes.py": APP}
    written |= {
        file: Template(text).substitute(values) for file, text in (("pyproject.toml", PROJECT), ("README.md", README))
    }
    notes = ((site, title, text) for site, texts in NOTES.items() for title, text in texts.items())
    return written | {f"notes/{site}/{title}.txt": f"{text}\n" for site, title, text in notes}


def new(folder: Path) -> str:
    """Write an app; returns the commands that run it.

    Raises
    ------
    ConfigError
        If Flower takes no such name, or something is there already.
    """
    folder = folder.expanduser().resolve()
    if not _NAME.fullmatch(folder.name):
        proposed = re.sub(r"[^A-Za-z0-9]+", "-", folder.name).strip("-0123456789")[:32] or "my-app"
        raise ConfigError(
            f"{folder.name!r} cannot be the name of a Flower app: letters, digits and hyphens, at most 32, a letter "
            f"first; {proposed} can"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name a new folder")
    if unfit := [sign for sign in "\\\"'\n" if sign in str(folder)]:
        raise ConfigError(f"{folder} has {unfit[0]!r} in its path, which settings and commands cannot hold")
    for path, text in files(folder.name, folder.as_posix()).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return Template(COMMANDS).substitute(folder=folder.as_posix())


def command() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the beginning of a Flower app with data of one's own.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder; its name is that of the app")
    options = parser.parse_args()
    ends(
        lambda: print(
            f"{options.folder} is an app; notes.py is where to begin. To run it:\n\n{new(options.folder)}", end=""
        )
    )
