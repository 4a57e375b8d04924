"""A run that ended early goes on as if nothing had happened; where it cannot, that is said before anything runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from flwr.app import MetricRecord
from flwr.serverapp import Grid
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from hsplitlora_flwr.client.handlers import split_client_app
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.sources import load_text
from hsplitlora_flwr.evaluation.perplexity import Evaluation
from hsplitlora_flwr.lora.update import AccumulatedUpdate
from hsplitlora_flwr.planning import Budget
from hsplitlora_flwr.planning.planner import ClientPlan
from hsplitlora_flwr.server import run as server_run
from hsplitlora_flwr.server.central import CentralTraining
from hsplitlora_flwr.server.checkpoint import ResumeError, RunState, check_resume, load_state, save_state
from hsplitlora_flwr.server.run import Run
from hsplitlora_flwr.server.strategy import HSplitLoRA
from tests.grid import LocalGrid
from tests.server.test_strategy import GB, grid_of, run, settings


class Stopped(RuntimeError): ...


@pytest.fixture
def stop_in_round_2(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The server dies in the middle of the second round, after the clients trained."""
    aggregate = HSplitLoRA.aggregate_train

    def dies(self: HSplitLoRA, server_round: int, replies: Any) -> Any:
        if server_round == 2:
            raise Stopped("no power")
        return aggregate(self, server_round, replies)

    monkeypatch.setattr(HSplitLoRA, "aggregate_train", dies)
    return monkeypatch


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", ["hsplitlora", "splitlora", "hetlora"])
def test_a_run_goes_on_as_if_it_had_not_ended(
    method: str, stop_in_round_2: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    changes = {"method.name": method, "train.schedule": "cosine", "plan.drift": 0.0}
    first = tmp_path / "first"
    with pytest.raises(Stopped):
        run(settings(tiny_folder, first, **changes), first)
    assert [path.name for path in (first / "checkpoints").iterdir()] == ["round-1"]
    stop_in_round_2.undo()

    second, whole = tmp_path / "second", tmp_path / "whole"
    resumed = run(settings(tiny_folder, second, **changes, **{"run.resume": str(first)}), second)
    plain = run(settings(tiny_folder, whole, **changes), whole)
    assert same(adapter(second), adapter(whole))
    assert resumed["status"] == "finished"
    assert resumed["resumed"] == {"run": str(first), "after_round": 1}
    assert resumed["perplexity_before"] == plain["perplexity_before"]
    for name in ("perplexity", "update_norm"):
        assert [row[name] for row in resumed["rounds"]] == [row[name] for row in plain["rounds"]]
    assert resumed["importance"] == plain["importance"]
    for one, other in zip(resumed["plans"], plain["plans"], strict=True):
        assert [(c["client"], c.get("split"), c["ranks"]) for c in one["clients"]] == [
            (c["client"], c.get("split"), c["ranks"]) for c in other["clients"]
        ]


@pytest.mark.parametrize("method", ["hsplitlora", "fedex", "cenlora"])
def test_the_adapter_of_the_best_round_is_kept_also_by_a_run_that_goes_on(
    method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity rises from the second round on: the first is the best."""
    changes = {"method.name": method, "plan.probe_every": 0}
    run(settings(tiny_folder, tmp_path / "one", **changes, **{"train.rounds": 1}), tmp_path / "one")
    measured, nll = server_run.evaluate, iter([300.0, 100.0, 200.0, 200.0, 150.0, 90.0])

    def rises(*arguments: Any) -> Evaluation:
        return replace(measured(*arguments), nll=next(nll))

    monkeypatch.setattr(server_run, "evaluate", rises)
    two = run(settings(tiny_folder, tmp_path / "two", **changes), tmp_path / "two")
    assert two["best"] == {"round": 1, "perplexity": two["rounds"][0]["perplexity"]}
    assert same(adapter(tmp_path / "two" / "best"), adapter(tmp_path / "one"))
    assert not same(adapter(tmp_path / "two" / "best"), adapter(tmp_path / "two"))
    more = settings(
        tiny_folder, tmp_path / "more", **changes, **{"train.rounds": 4, "run.resume": str(tmp_path / "two")}
    )
    seen: list[tuple[int, bool]] = []
    keep = Run.keep_best

    def watching(self: Run[Any], server_round: int) -> None:
        keep(self, server_round)
        seen.append((server_round, same(adapter(tmp_path / "more" / "best"), adapter(tmp_path / "one"))))

    monkeypatch.setattr(Run, "keep_best", watching)
    summary = run(more, tmp_path / "more")
    assert seen == [(2, True), (3, True), (4, False)]
    assert summary["best"]["round"] == 4
    assert same(adapter(tmp_path / "more" / "best"), adapter(tmp_path / "more"))
    assert sorted(path.name for path in (tmp_path / "more").glob("best*")) == ["best"]


def test_a_best_adapter_that_is_not_there_is_not_spoken_of(tiny_folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(settings(tiny_folder, first), first)
    shutil.rmtree(first / "best")
    again = run(settings(tiny_folder, tmp_path / "again", **{"run.resume": str(first)}), tmp_path / "again")
    assert again["best"] == {"round": 2, "perplexity": again["rounds"][1]["perplexity"]}
    assert same(adapter(tmp_path / "again" / "best"), adapter(tmp_path / "again"))


def test_a_checkpoint_from_before_the_half_was_kept_goes_on_with_a_fresh_one(tiny_folder: Path, tmp_path: Path) -> None:
    first, changes = tmp_path / "first", {"plan.probe_every": 0}
    run(settings(tiny_folder, first, **changes), first)
    config = settings(tiny_folder, tmp_path / "new", **changes, **{"run.resume": str(first), "train.rounds": 3})
    state = load_state(config)
    assert any(key.endswith(":A/exp_avg") for key in state.optimizer)
    run(config, tmp_path / "new")
    save_state(replace(state, optimizer={}), first)
    anew = replace(config, run=replace(config.run, dir=str(tmp_path / "anew")))
    assert [row["round"] for row in run(anew, tmp_path / "anew")["rounds"]] == [1, 2, 3]
    assert not same(adapter(tmp_path / "new"), adapter(tmp_path / "anew"))


def test_a_kept_half_goes_on_with_the_optimizer_that_it_began_with(old: Path, config: Config) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer='sgd', and the run in .* has 'adamw'"):
        check_resume(Config.from_run_config(config.to_run_config() | {"train.optimizer": "sgd"}), Path(config.run.dir))


def test_the_plan_is_kept_and_clients_are_known_by_name(
    stop_in_round_2: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    """After a restart the same clients have other node ids; with a client less there is a new plan."""
    first, changes = tmp_path / "first", {"clients.count": 2, "plan.probe_every": 0}
    with pytest.raises(Stopped):
        run(settings(tiny_folder, first, **changes), first)
    stop_in_round_2.undo()
    for gigabytes, reasons in ((GB, [""]), ({0: 20.0, 1: 30.0}, ["", "other clients take part"])):
        nodes = {
            90 - index: {"partition-id": index, "num-partitions": len(GB), "memory-gb": gb}
            for index, gb in gigabytes.items()
        }
        folder = tmp_path / str(len(nodes))
        config = settings(tiny_folder, folder, **changes, **{"run.resume": str(first)})
        summary = run(config, folder, LocalGrid(split_client_app(), nodes))
        assert [plan["reason"] for plan in summary["plans"]] == reasons
        assert [len(row["clients"]) for row in summary["rounds"]] == [3, len(nodes)]


def test_central_training_goes_on_with_its_optimizer(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    train_round = CentralTraining.train_round

    def dies(self: CentralTraining, grid: Grid, server_round: int) -> MetricRecord:
        if server_round == 2:
            raise Stopped("no power")
        return train_round(self, grid, server_round)

    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(CentralTraining, "train_round", dies)
        run(settings(tiny_folder, first, **{"method.name": "cenlora"}), first)
    resumed = run(settings(tiny_folder, second, **{"method.name": "cenlora", "run.resume": str(first)}), second)
    plain = run(settings(tiny_folder, whole, **{"method.name": "cenlora"}), whole)
    assert same(adapter(second), adapter(whole))
    assert [row["perplexity"] for row in resumed["rounds"]] == [row["perplexity"] for row in plain["rounds"]]


def test_a_finished_run_may_have_more_rounds_or_be_written_out_again(tiny_folder: Path, tmp_path: Path) -> None:
    first, changes = tmp_path / "first", {"plan.probe_every": 0}
    run(settings(tiny_folder, first, **changes, **{"train.rounds": 1}), first)
    for rounds in (1, 2):
        folder = tmp_path / str(rounds)
        more = {"train.rounds": rounds, "run.resume": str(first)}
        summary = run(settings(tiny_folder, folder, **changes, **more), folder)
        assert [row["round"] for row in summary["rounds"]] == [1, 2][:rounds]
    assert same(adapter(tmp_path / "1"), adapter(first))
    assert not same(adapter(tmp_path / "2"), adapter(first))


# ---------------------------------------------------------------------- the files


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    return settings(tiny_folder, tmp_path / "new", **{"run.resume": str(tmp_path / "old")})


@pytest.fixture
def state(config: Config) -> RunState:
    accumulated = AccumulatedUpdate()
    accumulated.add({"a": (torch.randn(8, 2), torch.randn(2, 8))})
    return RunState(
        1,
        config.to_run_config(),
        accumulated,
        start={"a": (torch.zeros(8, 2), torch.randn(2, 8))},
        importance={"a": 0.1 + 0.2},
        planned_importance={"a": 1 / 3},
        plans={"x": ClientPlan(2, {"a": 4}, 12345, checkpointing=True)},
        planned_budgets={"x": Budget(10**9, up=1e6)},
    )


@pytest.fixture
def old(state: RunState, tmp_path: Path) -> Path:
    save_state(state, tmp_path / "old")
    (tmp_path / "old" / "summary.json").write_text('{"rounds": []}')
    return tmp_path / "old"


def test_what_is_written_is_read(old: Path, state: RunState, config: Config) -> None:
    check_resume(config, Path(config.run.dir))
    found = load_state(config)
    assert (found.server_round, found.settings, found.importance) == (1, state.settings, state.importance)
    assert (found.plans, found.planned_budgets) == (state.plans, state.planned_budgets)
    assert found.planned_importance == state.planned_importance
    assert found.accumulated.held() == state.accumulated.held()
    assert all(torch.equal(x, y) for x, y in zip(found.start["a"], state.start["a"], strict=True))
    assert found.plans_hold(config)


def test_plans_of_an_earlier_release_are_read(old: Path, state: RunState, config: Config) -> None:
    file = old / "checkpoints" / "round-1" / "state.json"
    content = json.loads(file.read_text())
    names = {"checkpointing": "recompute", "server_checkpointing": "server_recompute"}
    content["plans"] = {"x": {names.get(name, name): value for name, value in content["plans"]["x"].items()}}
    del content["checksum"]
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(content))
    assert load_state(config).plans == state.plans


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_whole_round_and_the_one_before_are_there(old: Path, state: RunState, config: Config) -> None:
    half = old / "checkpoints" / "part"
    half.mkdir()
    (half / "state.json").write_text("{")
    assert load_state(config).server_round == 1
    config = Config.from_run_config(config.to_run_config() | {"train.rounds": 3})
    for number, there in ((2, ["round-1", "round-2"]), (3, ["round-2", "round-3"]), (3, ["round-2", "round-3"])):
        save_state(RunState(number, state.settings, state.accumulated), old)
        assert rounds(old) == there
        assert load_state(config).server_round == number


def test_checkpoints_of_a_run_that_was_in_the_folder_before_go(old: Path, state: RunState, config: Config) -> None:
    for number in (7, 8):
        save_state(RunState(number, state.settings, state.accumulated), old)
    save_state(RunState(1, state.settings, state.accumulated), old)
    assert rounds(old) == ["round-1"]
    (old / "checkpoints" / "round-of-tea").mkdir()
    assert load_state(config).server_round == 1


def test_a_checkpoint_is_on_the_disk_before_it_bears_its_name(
    state: RunState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    fsync, target = os.fsync, tmp_path / "checkpoints" / "round-1"

    def watching(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watching)
    save_state(state, tmp_path)
    files = {"state.json", "start.safetensors", "optimizer.safetensors", "delta.safetensors"}
    assert {name for name, named in synced if not named} == files | {"part"}
    assert synced[-1] == ("checkpoints", True)


def test_where_the_last_round_is_damaged_the_one_before_is_named_and_can_be_gone_on_from(
    old: Path, state: RunState, config: Config
) -> None:
    save_state(RunState(2, state.settings, state.accumulated), old)
    (old / "checkpoints" / "round-2" / "delta.safetensors").write_bytes(b"")
    with pytest.raises(ResumeError, match=r"remove the folder round-2 to go on after round 1"):
        check_resume(config, Path(config.run.dir))
    shutil.rmtree(old / "checkpoints" / "round-2")
    check_resume(config, Path(config.run.dir))
    assert load_state(config).server_round == 1


@pytest.mark.parametrize("file", ["state.json", "start.safetensors", "optimizer.safetensors", "delta.safetensors"])
@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_a_damaged_file_is_recognised(how: str, file: str, old: Path, config: Config) -> None:
    path = old / "checkpoints" / "round-1" / file
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif file == "state.json":
        path.write_text(json.dumps({"server_round": 1}))
    else:
        save_file({"a:B": torch.ones(8, 2), "a:A": torch.ones(2, 8)}, path)
    for reading in (load_state, lambda config: check_resume(config, Path(config.run.dir))):
        with pytest.raises(ResumeError, match=file):
            reading(config)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@hypothesis.settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_file_holds_there_is_a_typed_error(data: st.DataObject, old: Path, config: Config) -> None:
    """Cut short, with flipped bits, or another file of its kind: the run does not start."""
    folder = old / "checkpoints" / "round-1"
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = path.read_bytes()
    how = data.draw(st.sampled_from(["cut", "flipped", "other", "bytes"]))
    if how == "cut":
        content = whole[: data.draw(st.integers(0, len(whole) - 2))]  # the line end of the text says nothing
    elif how == "flipped":
        changed = bytearray(whole)
        changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        content = bytes(changed)
    elif how == "bytes":
        content = data.draw(st.binary(max_size=300))
    elif path.suffix == ".json":
        mixed = json.loads(whole) | data.draw(st.dictionaries(st.sampled_from(list(json.loads(whole))), JSON))
        content = json.dumps(data.draw(st.sampled_from([mixed, data.draw(JSON)]))).encode()
    else:
        names = st.sampled_from(["a:B", "a:A", "a:dense", "a", ":B", "0/adapter"])
        content = save(
            {name: torch.zeros(2, 3) for name in data.draw(st.sets(names))}, {"states": "{}", "version": "1"}
        )
    path.write_bytes(content)
    try:
        for reading in (load_state, lambda config: check_resume(config, Path(config.run.dir))):
            try:
                reading(config)
            except (ResumeError, ConfigError):
                continue
            assert content == whole or json.loads(content) == json.loads(whole)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"best": [1]}',
        '{"best": {"round": 1}}',
        '{"rounds": {}}',
        '{"rounds": [1]}',
        '{"plans": [{"round": "1"}]}',
        "[" * 9999,
    ],
)
def test_a_summary_of_another_kind_is_recognised(text: str, old: Path, config: Config) -> None:
    (old / "summary.json").write_text(text)
    with pytest.raises(ResumeError, match=r"summary\.json is damaged or not of a run"):
        check_resume(config, Path(config.run.dir))


@pytest.mark.parametrize("nll", [math.nan, math.inf, 1e9])
def test_a_round_without_a_perplexity_does_not_replace_the_last_good_one(
    nll: float, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = server_run.evaluate

    def diverges(*arguments: Any) -> Evaluation:
        return replace(measured(*arguments), nll=nll) if (tmp_path / "checkpoints").exists() else measured(*arguments)

    monkeypatch.setattr(server_run, "evaluate", diverges)
    with pytest.raises(FloatingPointError, match=r"after round 2 is .*round 1 is: go on from there with run\.resume="):
        run(settings(tiny_folder, tmp_path), tmp_path)
    assert rounds(tmp_path) == ["round-1"]


def test_the_number_of_rounds_may_come_with_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, tmp_path, **{"train.rounds": 1})
    HSplitLoRA(config, load_text(config.data, 0).held_out, tmp_path).start(grid_of(), num_rounds=2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["config"]["train.rounds"] == 2 == len(summary["rounds"])


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("method.name", "flora", "method.name='flora', and the run in .* has 'hsplitlora'"),
        ("model.quantise", "4bit", "model.quantise='4bit'"),
        ("run.seed", 7, "run.seed=7, and the run in .* has 0"),
        ("data.max_length", 64, "data.max_length=64, and the run in .* has 48"),
        ("data.path", "other", "data.path=other, and .*; a run goes on with the text"),
        ("evaluation.client_rows", 3, "evaluation.client_rows=3"),
        ("train.rounds", 0, "train.rounds=0, and the run in .* has finished 1"),
        ("method.name", "full", "not possible with method.name=full.*model.path="),
    ],
)
def test_settings_that_do_not_fit_are_refused(key: str, value: Any, text: str, old: Path, config: Config) -> None:
    if (key, value) == ("train.rounds", 0):  # the schema asks for one round at least, so let two be finished
        state = load_state(config)
        save_state(RunState(2, state.settings, state.accumulated), old)
        value, text = 1, "train.rounds=1, and the run in .* has finished 2"
    with pytest.raises(ConfigError, match=text):
        check_resume(Config.from_run_config(config.to_run_config() | {key: value}), Path(config.run.dir))


OTHER = {
    "train.lr": 1e-4,
    "train.steps": 7,
    "train.batch_size": 2,
    "train.clip": 0.5,
    "train.schedule": "cosine",
    "lora.ranks": "0,8",
    "lora.dropout": 0.1,
    "split.min": 2,
    "server.half": "per_client",
    "transport.up": "int8",
    "model.dtype": "bfloat16",
    "clients.max_share": 0.5,
}


@pytest.mark.parametrize("key", OTHER)
def test_what_changes_the_training_is_for_the_user_to_say(key: str, old: Path, config: Config) -> None:
    then = config.to_run_config()
    changed = Config.from_run_config(then | {key: OTHER[key]})
    with pytest.raises(
        ConfigError,
        match=rf"{re.escape(f'{key}={OTHER[key]!r} for {then[key]!r}')}; .* unless run\.resume_changed=true",
    ):
        check_resume(changed, Path(config.run.dir))
    check_resume(Config.from_run_config(changed.to_run_config() | {"run.resume_changed": True}), Path(config.run.dir))


def test_all_that_is_other_is_named_at_once_and_what_is_fixed_stays_so(old: Path, config: Config) -> None:
    both = config.to_run_config() | {"train.lr": 1e-4, "train.steps": 7}
    with pytest.raises(ConfigError, match=r"train\.steps=7 for 3, train\.lr=0\.0001 for 0\.02; "):
        check_resume(Config.from_run_config(both), Path(config.run.dir))
    said = config.to_run_config() | {"run.seed": 7, "run.resume_changed": True}
    with pytest.raises(ConfigError, match=r"run\.seed=7, and the run in .* has 0; a run goes on with what it began"):
        check_resume(Config.from_run_config(said), Path(config.run.dir))


def test_where_and_how_a_run_is_computed_may_change(old: Path, config: Config) -> None:
    other: dict[str, Any] = {
        "train.rounds": 9,
        "train.micro_batch_size": 1,
        "train.activation_checkpointing": "on",
        "clients.count": 5,
        "clients.memory_gb": "4,8",
        "evaluation.generate": True,
        "transport.kind": "messages",
        "transport.port": 8443,
        "server.order": "fixed",
        "model.device": "cpu",
        "run.timeout": 60,
        "run.merged": True,
    }
    check_resume(Config.from_run_config(config.to_run_config() | other), Path(config.run.dir))


def test_a_setting_that_there_was_not_yet_has_its_default(old: Path, state: RunState, config: Config) -> None:
    older = {key: value for key, value in state.settings.items() if key != "server.half"}
    save_state(RunState(2, older, state.accumulated), old)
    check_resume(config, Path(config.run.dir))
    own = Config.from_run_config(config.to_run_config() | {"server.half": "per_client"})
    with pytest.raises(ConfigError, match=r"server\.half='per_client' for 'shared'"):
        check_resume(own, Path(config.run.dir))


def test_adapters_that_go_on_keep_their_ranks(old: Path, state: RunState, config: Config) -> None:
    fedit = Config.from_run_config(config.to_run_config() | {"method.name": "fedit"})
    save_state(RunState(2, fedit.to_run_config(), state.accumulated), old)
    check_resume(fedit, Path(config.run.dir))
    with pytest.raises(ConfigError, match=r"lora\.rank=5, and the run in .* has 3"):
        check_resume(Config.from_run_config(fedit.to_run_config() | {"lora.rank": 5}), Path(config.run.dir))


def test_a_model_may_have_moved_but_is_not_another(
    old: Path, config: Config, tmp_path: Path, tiny_folder: Path
) -> None:
    moved = shutil.copytree(tiny_folder, tmp_path / "elsewhere" / tiny_folder.name)
    for path in (moved, tmp_path / "other"):
        changed = Config.from_run_config(config.to_run_config() | {"model.path": str(path)})
        if path == moved:
            check_resume(changed, Path(config.run.dir))
        else:
            with pytest.raises(ConfigError, match="its update belongs to that model"):
                check_resume(changed, Path(config.run.dir))


def test_other_settings_make_a_new_plan(old: Path, config: Config) -> None:
    changed = Config.from_run_config(config.to_run_config() | {"plan.server_memory_gb": 9.0})
    assert not load_state(changed).plans_hold(changed)


def test_there_must_be_a_round_and_a_summary(old: Path, config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the folder of this run too"):
        check_resume(config, old)
    (old / "summary.json").write_text("")
    with pytest.raises(ResumeError, match=r"summary\.json is damaged"):
        check_resume(config, Path(config.run.dir))
    shutil.rmtree(old / "checkpoints")
    with pytest.raises(ResumeError, match="there is no finished round in"):
        check_resume(config, Path(config.run.dir))
    assert not (tmp_path / "new").exists()
