"""What is typed arrives as it is typed, or the error says what to type."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hsplitlora_flwr.cli.__main__ import main
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.overrides import PATHS, check_keys, check_single, keys_of, literal, one_line, renamed, undashed
from hsplitlora_flwr.cli.settings import CONF, PROJECT, register
from hsplitlora_flwr.config import ConfigError

LAUNCHER = keys_of("launcher", Launcher)


def composed(*arguments: str) -> Any:
    register(Launcher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", literal(arguments)), resolve=True)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "/home/müller/m",
            "o'brien",
            'a "b"',
            "a(1)",
            "models [old]",
            "[x]",
            "{x}",
            "数据/语料",
            "a, b",
            "a#b;c&d",
            "a=b",
        ),
        *("~/x", "2024", "1e3", "true", "C:\\x\\", "it's \\'quoted", "- x", "@$%", "a:b"),
    ],
)
def test_paths_are_taken_as_they_are(value: str) -> None:
    values = composed(*(f"{key}={value}" for key in PATHS))
    for section, name in (key.split(".") for key in PATHS):
        assert values[section][name] == value


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12))
def test_any_name_of_a_folder_is_taken_or_was_in_quotes(name: str) -> None:
    if "$" in name or name[0] in "\"'" or name == "null":
        return
    assert composed(f"data.path=runs/{name}")["data"]["path"] == f"runs/{name}"


def test_what_hydra_reads_stays_as_it_is() -> None:
    arguments = ["-m", "train.lr=1e-3,3e-4", "clients.memory_gb=[1,2]", "run.dir=runs/${now:%Y}", "data=e2e"]
    arguments += ["model.path='a, b'", "data.path=a,b", "+experiment=e2e", "hydra/launcher=basic", "run.resume="]
    assert literal(arguments) == arguments
    assert literal(["data.path=a,b"]) == ["data.path='a,b'"], "without a sweep it is one path"
    assert literal(["--multirun", "data.path=a,ü"])[1] == "data.path='a','ü'"


def test_a_list_may_be_written_as_such() -> None:
    assert composed("clients.memory_gb=1,1.3,1.8")["clients"]["memory_gb"] == "1,1.3,1.8"
    assert literal(["-m", "clients.memory_gb=1,2"]) == ["-m", "clients.memory_gb=1,2"], "a sweep"


def test_what_others_write_is_told_as_it_is_written_here() -> None:
    with pytest.raises(ConfigError, match=r"without dashes: train\.rounds=4$"):
        undashed(["--train.rounds=4"])
    undashed(["--cfg", "job", "--config-dir=a.b", "train.rounds=4"])
    with pytest.raises(ConfigError, match=r"train\.lr=1e-3,2e-3 has several values, which -m takes"):
        check_single(["train.lr=1e-3,2e-3"])
    check_single(["train.lr=1e-3", "clients.memory_gb=[1,2]", *literal(["clients.memory_gb=1,2", "data.path=a,b"])])


def test_an_option_that_is_meant_is_named() -> None:
    text = (
        "Could not find 'method/hsplitlra'\n\nAvailable options in 'method':\n\tffa\n\thsplitlora\nConfig search path:"
    )
    assert one_line(HydraException(text)).endswith("ffa hsplitlora; did you mean method=hsplitlora?")


def test_former_names_are_the_new_ones_for_hydra(capsys: pytest.CaptureFixture[str]) -> None:
    assert renamed(["train.recompute=on", "train.steps=2"]) == ["train.activation_checkpointing=on", "train.steps=2"]
    assert capsys.readouterr().err == "warning: train.recompute is now train.activation_checkpointing\n"


def test_other_values_that_hydra_cannot_read_are_text() -> None:
    assert composed("data.group_field=Straße (alt)")["data"]["group_field"] == "Straße (alt)"
    with_year = composed("run.dir=runs/ü-${now:%Y}")["run"]["dir"]
    assert with_year.startswith("runs/ü-20") and len(with_year) == len("runs/ü-2000")


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("train.round=4", r"unknown key 'train\.round'; did you mean train\.rounds\?"),
        ("+train.round=4", "did you mean train.rounds"),
        ("lr=1", "did you mean train.lr"),
        ("launcher.cpu=1", "did you mean launcher.cpus"),
        ("nothing=1", "unknown key 'nothing'; known keys: .*launcher.client_cpus"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_is_meant(argument: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_keys([argument], LAUNCHER)
    known = ["train.rounds=4", "data=e2e", "experiment=e2e", "launcher.cpus=1", "--cfg", "job", "hydra.verbose=1"]
    check_keys(known, LAUNCHER)


@pytest.mark.parametrize(
    ("program", "argument", "says"),
    [
        ("run", "train.round=4", "error: unknown key 'train.round'; did you mean train.rounds?"),
        (
            "run",
            "data=nothing",
            "error: In 'config': Could not find 'data/nothing' Available options in 'data': chitchat",
        ),
        ("run", "train.rounds", "error: 'train.rounds' cannot be read; write KEY=VALUE, such as train.rounds=4"),
    ],
)
def test_a_wrong_command_line_has_status_2_and_one_line(program: str, argument: str, says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"simulations.{program}", argument]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(says) and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("program", "argument", "says"),
    [
        ("plan", "train.round=4", "error: unknown key 'train.round'; did you mean train.rounds?"),
        ("compare", "data=nothing", "error: In 'config': Could not find 'data/nothing' Available options"),
    ],
)
def test_so_it_is_for_commands_that_take_longer_to_import(
    program: str, argument: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main([program, argument], "python -m simulations.{}"))
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.startswith(says) and len(errors.splitlines()) == 1
