"""The files of ``deploy/``: what they name is there, and the programs of this environment take their commands.

No container engine is needed, so no image is built here.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.overrides import check_keys, literal, renamed
from hsplitlora_flwr.config import Config

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
CLUSTER = ("flower-superlink", "flower-supernode")


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    asked = {name: subprocess.Popen([name, "--help"], stdout=subprocess.PIPE, text=True) for name in CLUSTER}
    return {name: process.communicate(timeout=300)[0] for name, process in asked.items()}


def commands() -> list[list[str]]:
    """Of the services, and of the page that explains them."""
    page = (DEPLOY.parent / "docs" / "deployment.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = "".join(block for language, block in blocks if not language).replace("\\\n", " ").splitlines()
    return [service["command"] for service in SERVICES.values()] + [shlex.split(line) for line in lines if line]


def test_options_are_those_of_the_programs(help_texts: dict[str, str]) -> None:
    seen = set()
    for program, *arguments in commands():
        if program in CLUSTER:
            seen.add(program)
            known = set(re.findall(r"--[a-z-]+", help_texts[program]))
            assert {each.partition("=")[0] for each in arguments if each.startswith("--")} <= known, program
    assert seen == set(CLUSTER)


def test_settings_are_those_of_a_run() -> None:
    found = [arguments for program, *arguments in commands() if program == "hsplitlora" and arguments[0] == "run"]
    assert len(found) >= 2
    keys = [f"launcher.{key}" for key in Launcher.__dataclass_fields__]
    for _, *settings in found:
        check_keys(literal(renamed(settings)), keys)


def test_a_run_in_it_reaches_what_services_hold() -> None:
    [settings] = [SERVICES["run"]["command"][2:]]
    values = dict(each.split("=", 1) for each in settings)
    connection = tomllib.loads((DEPLOY / "flower.toml").read_text())["superlink"][values["launcher.superlink"]]
    assert connection["address"] == f"superlink:{port_of('superlink')}"
    assert values["transport.address"] == "superlink" and values["transport.port"] != port_of("superlink")
    count = sum(command["command"][0] == "flower-supernode" for command in SERVICES.values())
    assert int(values["clients.count"]) == count == 2
    held_out, folder = values["data.eval_path"], Path(values["run.dir"])
    for service in ("run", "superlink"):  # the launcher reads what the server writes
        assert any(f":{held_out}:ro" in volume for volume in SERVICES[service]["volumes"])
        assert f"results:{folder.parent}" in SERVICES[service]["volumes"]


def port_of(service: str) -> str:
    [port] = [each.partition("=")[2] for each in SERVICES[service]["command"] if each.startswith("--port=")]
    return str(port)


@pytest.mark.parametrize("service", [name for name in SERVICES if name.startswith("site-")])
def test_a_site_has_its_own_key_and_text_and_no_other(service: str) -> None:
    volumes = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    assert f"{service}-keys" in (names := [volume[0] for volume in volumes])
    assert not {"server-keys", *(f"{other}-keys" for other in SERVICES if other != service)} & set(names)
    config = next(each for each in SERVICES[service]["command"] if each.startswith("--node-config="))
    [path] = re.findall(r'data-path="([^"]*)"', config)
    [file] = [volume[0] for volume in volumes if volume[1] == path]
    rows = [json.loads(line) for line in (DEPLOY / file).read_text().splitlines()]
    assert len(rows) >= 4 and all(set(row) == {"prompt", "completion"} for row in rows)


def test_what_is_copied_and_mounted_is_there() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert copied and all((DEPLOY.parent / each).exists() for line in copied for each in line.split())
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())]
    assert all((DEPLOY / each).is_file() for each in mounted if each.startswith("."))
    made = re.findall(r"/[\w./-]+", re.search(r"mkdir -p (.*)", (DEPLOY / "Dockerfile").read_text())[1])  # type: ignore[index]
    volumes = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", ())]
    # a volume belongs to whoever owned the folder that it is mounted on first
    assert {volume[1] for volume in volumes if not volume[0].startswith(".")} <= set(made)
    assert Config().model.path == "smollm2-135m"  # whose cache the volume `model` is


def test_pages_say_what_replaced_a_program_that_flower_has_no_more() -> None:
    there = {script.name for script in entry_points(group="console_scripts")}
    assert "flower-simulation" not in there and {"flwr", "flower-superlink", "flower-supernode"} <= there
    for page in ("embedding.md", "troubleshooting.md"):
        told = next(
            line for line in (DEPLOY.parent / "docs" / page).read_text().split("\n\n") if "flower-simulation" in line
        )
        assert "hsplitlora run" in told
