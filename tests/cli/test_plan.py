"""A plan from a model's configuration alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import LlamaConfig

from hsplitlora_flwr.cli.forecast import PARTS, Forecast, forecast, over_budgets, usual_budgets
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.cli.plan import run
from hsplitlora_flwr.cli.settings import CONF, register
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.lora.limits import capped_shares
from hsplitlora_flwr.planning import make_plan
from hsplitlora_flwr.planning.round import Size
from hsplitlora_flwr.server.plans import RoundPlanner
from tests.cli.conftest import PROCESS_BYTES

pytestmark = pytest.mark.usefixtures("known_process")


def composed(folder: Path, *overrides: str) -> DictConfig:
    register(Launcher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"model.path={folder}", "data.max_length=16", *overrides])


def planned(folder: Path, *overrides: str) -> Forecast:
    settings: Any = OmegaConf.to_container(composed(folder, *overrides), resolve=True)
    del settings["launcher"]
    return forecast(Config.from_mapping(settings))


def shown(folder: Path, *overrides: str) -> str:
    out = io.StringIO()
    assert run(composed(folder, *overrides), Console(file=out, width=200)) == 0
    return out.getvalue()


def test_the_plan_is_that_of_the_planner_for_uniform_importance(folder: Path) -> None:
    overrides = ("clients.count=4", "clients.memory_gb=[2,3]", "clients.gflops=[5]", "clients.mbit_up=[8,16]")
    result = planned(folder, *overrides, "plan.server_gflops=7", "plan.server_memory_gb=9", "train.steps=3")
    budgets = list(result.budgets.values())
    assert [budget.memory_bytes for budget in budgets] == [2 * 10**9, 3 * 10**9] * 2
    assert {budget.flops for budget in budgets} == {5e9}
    assert [budget.up for budget in budgets] == [1e6, 2e6] * 2
    assert {budget.down for budget in budgets} == {None}
    assert (result.server.memory_bytes, result.server.flops) == (9 * 10**9, 7e9)
    assert {budget.process_bytes for budget in budgets} == {PROCESS_BYTES}
    names = [layer.name for layer in result.cost.layers]
    uniform = dict.fromkeys(names, 1 / len(names))
    half = result.cost.num_blocks // 2  # of the blocks at most, beside a shared half
    bounds = {"server": result.server, "max_split": half}
    again = make_plan(
        result.budgets, uniform, result.cost, ranks=result.config.lora.ranks, steps=3, exchanges=True, **bounds
    )
    assert result.plan.clients == again.clients
    assert result.plan.seconds == again.seconds


LENGTHS, EXAMPLES = {"0": 5, "1": 16, "2": 9}, {"0": 10, "1": 90, "2": 20}


def summary_of_a_run(folder: Path, **first: Any) -> Path:
    rows = [{"client": name, "longest": LENGTHS[name], "examples": EXAMPLES[name]} for name in LENGTHS]
    rows[0] |= first
    plans = [{"clients": rows, "importance": {"none": 1.0}}, {"clients": rows, "importance": IMPORTANCE}]
    (folder / "run").mkdir()
    settings = {"status": "finished", "config": {}, "rounds": [], "started": 0.0, "plans": plans}
    (folder / "run" / "summary.json").write_text(json.dumps(settings))
    return folder / "run"


IMPORTANCE = {f"model.layers.{block}.mlp.down_proj": 1.0 + block for block in range(4)}


def test_a_plan_after_a_run_is_the_one_that_the_run_makes(folder: Path, tmp_path: Path) -> None:
    """By the server's own planner, with what clients told it."""
    settings = planned(folder, "clients.memory_gb=[0.2504,0.251,0.3]", "data.max_length=16")
    config = settings.config
    sizes = {name: Size(length) for name, length in LENGTHS.items()}
    server = RoundPlanner(config, sizes, PROCESS_BYTES)
    server.importance = dict(IMPORTANCE)
    shares = dict(zip(EXAMPLES, capped_shares(list(EXAMPLES.values()), config.clients.max_share), strict=True))
    wanted = server.replan(settings.budgets, shares, settings.server)
    found = forecast(config, str(summary_of_a_run(tmp_path)))
    assert found.plan.clients == wanted.clients
    assert found.plan.clients != settings.plan.clients, "and not the one before it"


def test_a_run_of_other_clients_is_refused(folder: Path, tmp_path: Path) -> None:
    run = summary_of_a_run(tmp_path, client="st-mary")
    with pytest.raises(ConfigError, match=r"its last plan is for 1, 2, st-mary, and these settings for 0, 1, 2; name"):
        forecast(planned(folder).config, str(run))
    with pytest.raises(ConfigError, match=r"nowhere is no folder of a run"):
        forecast(planned(folder).config, "nowhere")


def test_clients_that_train_nothing_are_shown(folder: Path) -> None:
    mute = ("clients.count=2", "clients.memory_gb=[2]", "clients.adapter_mb=[0.0001,10]", "data.max_length=16")
    text = shown(folder, *mute)
    rows = [line for line in text.splitlines() if "2.00 GB" in line]
    assert ["no" in row.split() for row in rows] == [True, False]
    assert "0.0 MB down to a client that trains nothing" in text
    assert "client 0 is left out" in shown(folder, *mute, "lora.clients=all")


@pytest.mark.parametrize("more", [(), ("clients.gflops=[1]", "train.activation_checkpointing=on")])
def test_a_terminal_of_80_columns_shows_all_of_it(folder: Path, more: tuple[str, ...]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    assert run(composed(folder, "clients.memory_gb=[2,2.5,12]", "clients.count=12", *more), console) == 0
    lines = out.getvalue().splitlines()
    tables = [line for line in lines if line.lstrip().startswith(("client ", "memory ", "11 "))]
    assert len(tables) == 4 and "12.00 GB" in tables[1] and not any("…" in line for line in lines)
    assert ("checkpointing" in tables[0], "round" in tables[0]) == (bool(more), bool(more))
    assert set(PARTS) <= set(tables[2].split())


def test_what_is_printed(folder: Path) -> None:
    text = shown(folder, "clients.count=2", "clients.memory_gb=[2]")
    result = planned(folder, "clients.count=2", "clients.memory_gb=[2]")
    assert "4 blocks" in text
    assert "importance: uniform" in text
    assert all(part in text for part in PARTS)
    assert text.count("2.00 GB") == 2
    assert f"worth: {result.plan.objective / result.plan.bound:.1%} of the most" in text
    assert "process: 0.25 GB of a client's memory, <the last run here>" in text
    # 8 x 16 tokens of 32 float32 numbers, and up also mask and labels of 8 bytes each
    assert "wire: 0.0 MB up and 0.0 MB down" in text
    assert "round:" not in text, "without a speed seconds mean nothing"
    assert "round:" in shown(folder, "clients.memory_gb=[2]", "clients.gflops=[1]")


def test_clients_that_are_left_out_are_named_with_what_they_miss(folder: Path) -> None:
    text = shown(folder, "clients.count=2", "clients.memory_gb=[2,0.001]")
    assert "client 1 is left out: it misses " in text
    assert "bytes of its 1.0 MB" in text


@pytest.mark.parametrize("method", ["fedit", "splitlora", "hetlora"])
def test_other_methods(folder: Path, method: str) -> None:
    text = shown(folder, f"method={method}", "clients.memory_gb=[2]")
    assert method in text
    assert "worth" not in text


def test_a_bare_configuration_file_will_do(folder: Path) -> None:
    assert planned(folder / "config.json").plan.clients.keys() == {"0", "1", "2"}


def test_a_model_of_70_billion_parameters(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path)
    budgets = "clients.memory_gb=[24,40,80]"
    result = planned(tmp_path, budgets, "model.dtype=bfloat16", "plan.server_memory_gb=600")
    assert result.cost.total_parameters == 70_553_706_496
    assert len(result.plan.clients) == 3
    assert result.plan.server_bytes <= 600e9
    assert result.plan.bound * 0.98 <= result.plan.objective <= result.plan.bound


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("clients.memory_gb=[0.001]",), "no client can hold even 1 block(s)"),
        (("clients.memory_gb=[]",), "clients.memory_gb is empty"),
        (("model.path=/nowhere",), "model.path=/nowhere"),
        (("method=cenlora",), "method.name=cenlora trains in one place"),
        (("plan.deadline=1",), "deadline=1 needs a speed"),
        (("plan.deadline=1e-9", "clients.gflops=[1]"), "no plan meets the deadline"),
        (("lora.targets=nothing",), "lora.targets names ['nothing']"),
    ],
)
def test_errors_are_one_clear_line(
    folder: Path, overrides: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(composed(folder, *overrides), Console(file=io.StringIO())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_settings_are_checked(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"clients\.gflops"):
        planned(folder, "clients.gflops=[-1]")


def test_on_a_gpu_a_plan_counts_no_process(folder: Path) -> None:
    overrides = ("clients.gpu_memory_gb=[24,80]", "clients.memory_gb=[4]", "plan.server_gpu_memory_gb=90")
    result = planned(folder, *overrides)
    assert [(b.memory_bytes, b.process_bytes) for b in result.budgets.values()] == [(24 * 10**9, 0), (80 * 10**9, 0)]
    assert (result.server.memory_bytes, result.server.process_bytes) == (90 * 10**9, 0)
    assert "process: 0.25 GB in the machine, beside its GPU" in shown(folder, *overrides)
    others = over_budgets(result.config, usual_budgets(result.config))
    assert {24.0, 80.0} < others.keys()
    found = {gb: each for gb, each in others.items() if isinstance(each, Forecast)}
    assert found and all(each.budgets["0"].memory_bytes == gb * 10**9 for gb, each in found.items())
