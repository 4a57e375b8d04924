"""What ``conf/`` composes is what the schema says."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.settings import CONF, help_text, register
from hsplitlora_flwr.config import SETTINGS, Config, ConfigError
from hsplitlora_flwr.methods import METHODS, register_method
from hsplitlora_flwr.schema import settings_of


def composed(*overrides: str) -> dict[str, Any]:
    """The settings of a run, without those of the launcher."""
    register(Launcher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    del values["launcher"]
    return values


def test_no_override_gives_the_defaults_of_the_schema_but_for_simulated_budgets_and_texts_to_read():
    values = composed()
    values["run"]["dir"] = ""
    assert values["clients"].pop("memory_gb") == "1.0,1.3,1.8"
    assert values["evaluation"].pop("texts") == 3
    assert Config.from_mapping(values) == Config()


@pytest.mark.parametrize(("count", "memory"), [(1, "1.0"), (2, "1.0,1.3"), (3, "1.0,1.3,1.8"), (5, "1.0,1.3,1.8")])
def test_fewer_clients_are_the_first_of_the_default_ones(count, memory):
    values = composed(f"clients.count={count}")
    assert values["clients"]["memory_gb"] == memory
    assert Config.from_mapping(values).clients.counted.count == count


def test_fewer_clients_than_a_typed_list_names_are_refused():
    with pytest.raises(ConfigError, match=r"clients\.count=2"):
        Config.from_mapping(composed("clients.count=2", "clients.memory_gb=[1.0,1.3,1.8]"))


@pytest.mark.parametrize("count", ["-1", "'two'"])
def test_what_is_no_number_of_clients_is_told_by_its_own_name(count):
    with pytest.raises(ConfigError, match=rf"clients\.count={count}"):
        Config.from_mapping(composed(f"clients.count={count}"))


def test_conf_names_every_setting_of_the_schema():
    keys = {f"{section}.{name}" for section, table in composed().items() for name in table}
    assert keys == set(Config().to_run_config())


def test_the_launcher_has_the_defaults_of_its_class():
    register(Launcher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("config").launcher)
    assert values == {"engine": "flower", "superlink": "", "client_cpus": 1, "cpus": 0, "ray_address": ""}
    assert Launcher.from_mapping(values) == Launcher()


def options(group: str) -> list[str]:
    return [f"{group}={file.stem}" for file in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(
    "option", [option for folder in CONF.iterdir() if folder.is_dir() for option in options(folder.name)]
)
def test_every_option_of_every_group_is_valid(option):
    values = composed(option, "data.path=somewhere")
    assert Config.from_mapping(values).data.path == "somewhere"


def test_a_data_group_sets_every_setting_of_its_section():
    """Otherwise what a group leaves out depends on which group was chosen before it."""
    for option in options("data"):
        assert set(composed(option)["data"]) == set(composed()["data"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_an_option(name):
    assert Config.from_mapping(composed(f"method={name}")).method.name == name


@pytest.mark.parametrize("kind", ["stream", "messages", "auto"])
def test_every_transport_is_an_option(kind):
    assert Config.from_mapping(composed(f"transport={kind}")).transport.kind == kind


def test_a_method_that_is_registered_is_an_option_of_the_command_line_and_in_its_help(monkeypatch):
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    monkeypatch.setattr(METHODS, "_names", dict(METHODS._names))
    register_method("theirs", replace(METHODS["fedit"], summary="as others do it"))
    assert Config.from_mapping(composed("method=theirs")).method.name == "theirs"
    assert "\n  theirs: as others do it\n" in help_text("", Launcher)


def test_the_help_says_every_setting_in_80_columns():
    text = help_text("One run.", Launcher)
    assert max(map(len, text.splitlines())) <= 80
    known = [*SETTINGS, *settings_of("launcher", Launcher)]
    assert [line.split("=")[0].strip() for line in text.splitlines() if re.match(r"  \w+\.\w+=", line)] == [
        each.key for each in known
    ]
    words = " ".join(text.split())
    for each in known:
        assert " ".join("; ".join((each.meaning, *each.rules)).split()) in words
    assert "clients.memory_gb=1.0,1.3,1.8 memory of client 0" in words and "; in 1e9 bytes" in words


def test_the_reference_experiment():
    config = Config.from_mapping(composed("experiment=e2e", "data.path=folder"))
    assert (config.data.source, config.data.partition, config.data.alpha) == ("e2e", "dirichlet", 1.0)
    assert (config.train.rounds, config.train.steps, config.train.batch_size, config.train.lr) == (3, 16, 8, 2e-3)


@pytest.mark.parametrize(
    ("level", "depth", "width", "trains"),
    [("off", 0.0, 0, "plan"), ("moderate", 0.5, 64, "none"), ("strong", 0.5, 32, "none")],
)
def test_levels_of_privacy(level, depth, width, trains):
    config = Config.from_mapping(composed(f"privacy={level}"))
    assert (config.split.min_share, config.split.width, config.lora.clients) == (depth, width, trains)
    assert Config.from_mapping(composed(f"privacy={level}", "split.width=16", "split.bottleneck=x")).split.width == 16


def test_an_override_beats_the_experiment():
    config = Config.from_mapping(composed("experiment=e2e", "data.path=folder", "train.rounds=1", "data=dialogues"))
    assert config.train.rounds == 1
    assert config.data.source == "dialogues"


@pytest.mark.parametrize("option", ["data=e2e", "data=jsonl"])
def test_data_that_need_a_path_say_so(option):
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        Config.from_mapping(composed(option))


def test_lists_may_be_written_as_lists():
    config = Config.from_mapping(composed("clients.memory_gb=[1,2.5]", "lora.ranks=[0,4]"))
    assert config.clients.memory_bytes == (1_000_000_000, 2_500_000_000)
    assert config.lora.ranks == (0, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"superlink": 3},
        {"client_cpus": "many"},
        {"client_cpus": 0},
        {"gpus": 1},
        {"ray_address": "ray.example"},
        {"cpus": 4, "ray_address": "ray.example:6379"},
        {"superlink": "hospital", "ray_address": "ray.example:6379"},
    ],
)
def test_wrong_launcher_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"launcher.{next(iter(wrong))}"):
        Launcher.from_mapping(wrong)
