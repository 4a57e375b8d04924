"""A comparison whose runs are faked: what is run, kept, chosen and written."""

import json
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from hsplitlora_flwr.cli import compare
from hsplitlora_flwr.cli.compare import compose_setting, main, parse, runs_at_once
from hsplitlora_flwr.cli.launcher import Launcher
from hsplitlora_flwr.comparison.jobs import vary
from hsplitlora_flwr.comparison.options import Options
from hsplitlora_flwr.comparison.plots import plot
from hsplitlora_flwr.comparison.results import Comparison
from hsplitlora_flwr.comparison.study import Study, tuning_changes
from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.reporting import Listener

UNEVEN = Config.from_run_config(
    {"data.source": "e2e", "data.path": "e2e", "data.partition": "dirichlet", "data.eval_rows": 100, "train.rounds": 2}
)
EVEN = vary(UNEVEN, {"data.partition": "iid", "clients.memory_gb": "1.3"})
BASES = {"uneven": UNEVEN, "even": EVEN}


class FakeRuns:
    """Writes the summary of a run that ends at ``final(config)``, or fails with the text of its ValueError."""

    def __init__(self, final: Callable[[Config], float] = lambda config: 4.0) -> None:
        self.final = final
        self.configs: list[Config] = []

    def __call__(self, config: Config, listener: Listener) -> int:
        self.configs.append(config)
        folder = Path(config.run.dir)
        folder.mkdir(parents=True)
        (folder / "adapter.bin").touch()
        listener.handle({"kind": "status", "text": "under way"})
        try:
            final = self.final(config)
        except ValueError as error:
            listener.handle({"kind": "failed", "error": str(error)})
            return 1
        (folder / "summary.json").write_text(json.dumps(summary(final, config.train.rounds)))
        return 0

    @property
    def ran(self) -> list[tuple[str, str, int, float]]:
        return [(c.data.partition, c.method.name, c.run.seed, c.train.lr) for c in self.configs]


def summary(final: float, rounds: int) -> dict[str, Any]:
    row = {"trainable_parameters": 1000, "measured_bytes": 900, "budget_bytes": 1000, "tokens": 10}
    row |= {"bytes_up": 3, "bytes_down": 4, "predicted_bytes": 950}
    return {
        "status": "finished",
        "versions": {"torch": "2.13"},
        "perplexity_before": 16.0,
        "seconds": 5.0,
        "rounds": [{"perplexity": final + rounds - done, "clients": [row, row]} for done in range(1, rounds + 1)],
    }


def options(folder: Path, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "settings": ("uneven", "even"),
        "methods": ("hsplitlora", "splitlora"),
        "seeds": (1, 2),
        "lrs": (1e-3,),
        "tune_in": "uneven",
        "widen": 0,
        "out": folder / "out",
        "work": folder / "work",
    }
    return Options(**values | changes)


def study(wanted: Options, runs: FakeRuns, bases: Mapping[str, Config] = BASES) -> int:
    return Study(wanted, bases, runs, Console(quiet=True)).run()


def numbers(wanted: Options) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((wanted.out / "results.json").read_text())
    return values


def test_every_cell_is_run_once_and_reported(tmp_path):
    wanted, runs = options(tmp_path), FakeRuns(lambda config: 4.0 + config.run.seed)
    assert study(wanted, runs) == 0

    cells = [(p, m, s, 1e-3) for p in ("dirichlet", "iid") for m in ("hsplitlora", "splitlora") for s in (1, 2)]
    assert sorted(runs.ran) == sorted(cells)
    found = numbers(wanted)["summary"]["even"]["splitlora"]["final_perplexity"]
    assert found == {"mean": 5.5, "sd": pytest.approx(0.5**0.5), "n": 2, "unreached": 0}
    assert "| splitlora | 0.001 | 2 | 5.500 ± 0.707 |" in (wanted.out / "table.md").read_text()
    assert not any(wanted.work.iterdir())  # adapters are not kept


def test_runs_go_on_side_by_side_and_one_that_fails_stops_no_other(tmp_path):
    together = threading.Barrier(2)

    def side_by_side(config: Config) -> float:
        together.wait(300)
        if config.method.name == "splitlora":
            raise ValueError("no more memory")
        return 4.0

    wanted = options(tmp_path)
    runs = FakeRuns(side_by_side)
    assert Study(wanted, BASES, runs, Console(quiet=True), at_once=2).run() == 1
    assert len(runs.ran) == 8
    assert sum(not run["cause"] for run in numbers(wanted)["runs"]) == 4


def test_whoever_ends_a_comparison_ends_the_runs_that_go_on(tmp_path):
    stopped, begun = threading.Event(), threading.Barrier(2)

    def endless(config: Config) -> float:
        begun.wait(300)
        if config.method.name == "hsplitlora":
            raise KeyboardInterrupt
        assert stopped.wait(300)
        raise SystemExit

    runs = FakeRuns(endless)
    wanted = options(tmp_path, settings=("uneven",), seeds=(1,))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        Study(wanted, BASES, runs, Console(quiet=True), at_once=2, stop=stopped.set).run()
    assert stopped.is_set() and len(runs.ran) == 2
    assert not any((wanted.out / "records").iterdir())


def test_leaders_have_more_seeds(tmp_path):
    wanted, runs = options(tmp_path, settings=("uneven",), leaders=("hsplitlora",), more_seeds=(3, 4)), FakeRuns()
    study(wanted, runs)
    assert [(method, seed) for _, method, seed, _ in sorted(runs.ran)] == [
        ("hsplitlora", 1),
        ("hsplitlora", 2),
        ("hsplitlora", 3),
        ("hsplitlora", 4),
        ("splitlora", 1),
        ("splitlora", 2),
    ]
    found = numbers(wanted)["summary"]["uneven"]
    assert {method: found[method]["final_perplexity"]["n"] for method in found} == {"hsplitlora": 4, "splitlora": 2}


def test_a_machine_runs_as_many_as_its_cores_and_memory_hold(tiny_folder, monkeypatch):
    config, launcher = vary(UNEVEN, {"model.path": str(tiny_folder)}), Launcher(engine="process", cpus=2)
    monkeypatch.setattr(compare, "all_cores", lambda: 9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100e9))
    assert runs_at_once(launcher, config) == 4
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2.6e9))  # 1 GB each, of 80 %
    assert runs_at_once(launcher, config) == 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0.5e9))
    assert runs_at_once(launcher, config) == 1


def test_run_folders_are_kept_on_request(tmp_path):
    study(options(tmp_path, keep=True), FakeRuns())
    assert (tmp_path / "work" / "even-splitlora-seed2" / "adapter.bin").is_file()


def test_a_second_call_does_nothing_again(tmp_path):
    study(options(tmp_path), FakeRuns())
    again = FakeRuns()
    assert study(options(tmp_path), again) == 0
    assert again.ran == []


def test_a_wider_comparison_does_only_what_is_new(tmp_path):
    study(options(tmp_path), FakeRuns())
    again = FakeRuns()
    study(options(tmp_path, seeds=(1, 2, 3), settings=("uneven",)), again)
    assert sorted(again.ran) == [("dirichlet", "hsplitlora", 3, 1e-3), ("dirichlet", "splitlora", 3, 1e-3)]


def test_a_result_of_other_settings_does_not_count(tmp_path):
    study(options(tmp_path), FakeRuns())
    again = FakeRuns()
    study(options(tmp_path), again, BASES | {"even": vary(EVEN, {"clients.memory_gb": "1.4"})})
    assert len(again.ran) == 4
    assert {config.clients.memory_gb for config in again.configs} == {(1.4,)}


def test_a_folder_may_be_written_in_another_way(tmp_path):
    study(options(tmp_path), FakeRuns())
    again = FakeRuns()
    study(
        options(tmp_path),
        again,
        {name: vary(base, {"data.path": str(Path.cwd() / "e2e")}) for name, base in BASES.items()},
    )
    assert again.ran == []


def test_a_half_written_result_does_not_count(tmp_path):
    wanted = options(tmp_path)
    study(wanted, FakeRuns())
    record = wanted.out / "records" / "even-splitlora-seed1.json"
    record.write_text(record.read_text()[:100])
    again = FakeRuns()
    study(wanted, again)
    assert again.ran == [("iid", "splitlora", 1, 1e-3)]


def test_a_comparison_that_is_killed_in_a_run_goes_on_with_that_run(tmp_path):
    wanted = options(tmp_path)

    def killed(config: Config) -> float:
        if len(runs.configs) == 3:
            raise KeyboardInterrupt
        return 4.0

    runs = FakeRuns(killed)
    with pytest.raises(KeyboardInterrupt):
        study(wanted, runs)
    assert len(numbers(wanted)["runs"]) == 2  # reported as far as it came
    again = FakeRuns()
    assert study(wanted, again) == 0
    assert again.ran[0] == runs.ran[2]
    assert len(again.ran) == 6


def test_a_failed_run_is_recorded_with_its_cause_and_tried_again(tmp_path):
    wanted = options(tmp_path)

    def fails(config: Config) -> float:
        if config.method.name == "splitlora" and config.run.seed == 1:
            raise ValueError("PlanError: misses 7 bytes")
        return 4.0

    runs = FakeRuns(fails)
    assert study(wanted, runs) == 1
    assert len(runs.ran) == 8
    failed = [run for run in numbers(wanted)["runs"] if run["cause"]]
    assert [(run["setting"], run["seed"]) for run in failed] == [("uneven", 1), ("even", 1)]
    assert "- even, splitlora, seed 1: PlanError: misses 7 bytes" in (wanted.out / "table.md").read_text()
    assert (wanted.work / "even-splitlora-seed1" / "adapter.bin").is_file()  # the evidence

    again = FakeRuns()
    assert study(wanted, again) == 0
    assert {(method, seed) for _, method, seed, _ in again.ran} == {("splitlora", 1)}
    assert "Failed" not in (wanted.out / "table.md").read_text()


def test_a_run_without_a_usable_summary_has_failed(tmp_path):
    class Silent(FakeRuns):
        def __call__(self, config: Config, listener: Listener) -> int:
            super().__call__(config, listener)
            (Path(config.run.dir) / "summary.json").write_text('{"status": "running", "rounds": []}')
            return 0

    wanted = options(tmp_path, settings=("even",), seeds=(1,))
    assert study(wanted, Silent()) == 1
    assert {run["cause"] for run in numbers(wanted)["runs"]} == {
        "ValueError: summary.json says 'running' after 0 rounds"
    }


BEST = {"hsplitlora": 3e-3, "splitlora": 1e-3}


def tuned(config: Config) -> float:
    """Lowest at a learning rate of the method's own."""
    return 4.0 if config.train.lr == BEST[config.method.name] else 5.0


def test_every_method_runs_with_the_learning_rate_that_suits_it(tmp_path):
    wanted, runs = options(tmp_path, lrs=(1e-3, 3e-3), tune_rounds=1), FakeRuns(tuned)
    assert study(wanted, runs) == 0

    trials, reported = runs.configs[:4], runs.configs[4:]
    assert all(config.run.seed == 0 and config.data.partition == "dirichlet" for config in trials)
    assert all((c.data.eval_skip, c.data.eval_rows, c.train.rounds) == (100, 100, 1) for c in trials)
    assert len(reported) == 8
    assert all(config.train.lr == BEST[config.method.name] for config in reported)
    assert all((c.data.eval_skip, c.data.eval_rows, c.train.rounds) == (0, 100, 2) for c in reported)
    choices = {one["method"]: one["choice"] for one in numbers(wanted)["tuning"]}
    assert choices == BEST
    assert study(wanted, again := FakeRuns(tuned)) == 0
    assert again.ran == []


def test_a_grid_whose_end_is_best_grows_until_worse_ones_stand_on_both_sides(tmp_path):
    def lowest_at(best: float) -> FakeRuns:
        return FakeRuns(lambda config: 4.0 + abs(math.log(config.train.lr / best)))

    one = {"methods": ("hsplitlora",), "target": 3.0, "settings": ("uneven",), "seeds": (1,), "widen": 3}
    wanted, runs = options(tmp_path, lrs=(1e-3, 2e-3), **one), lowest_at(8e-3)
    assert study(wanted, runs) == 0
    assert [(lr, seed) for _, _, seed, lr in runs.ran] == [
        (1e-3, 0),
        (2e-3, 0),
        (4e-3, 0),
        (8e-3, 0),
        (1.6e-2, 0),
        (8e-3, 1),
    ]
    assert "| 0.008 |" in (wanted.out / "table.md").read_text()
    assert study(wanted, again := lowest_at(8e-3)) == 0
    assert again.ran == []

    bounded = options(tmp_path / "bounded", lrs=(1e-3, 2e-3), **one | {"widen": 1})
    assert study(bounded, runs := lowest_at(1e-5)) == 0
    assert [lr for _, _, _, lr in runs.ran] == [1e-3, 2e-3, 5e-4, 5e-4]


def test_an_ablation_runs_with_the_learning_rate_of_the_whole(tmp_path):
    wanted = options(tmp_path, methods=("hsplitlora", "hsplitlora-no-naa"), lrs=(1e-3, 3e-3), target=3.0, seeds=(1,))
    runs = FakeRuns(lambda config: 4.0 if config.train.lr == 3e-3 else 5.0)
    study(wanted, runs)
    assert "hsplitlora-no-naa" not in {config.method.name for config in runs.configs if config.run.seed == 0}
    assert {config.train.lr for config in runs.configs if config.run.seed} == {3e-3}


def test_settings_may_each_choose_for_themselves(tmp_path):
    def by_setting(config: Config) -> float:
        return 4.0 if (config.train.lr == 1e-3) == (config.data.partition == "iid") else 5.0

    runs = FakeRuns(by_setting)
    study(options(tmp_path, lrs=(1e-3, 3e-3), tune_in="each"), runs)
    assert {(partition, lr) for partition, _, seed, lr in runs.ran if seed} == {("iid", 1e-3), ("dirichlet", 3e-3)}


def test_a_learning_rate_that_diverges_is_not_chosen(tmp_path):
    def diverges(config: Config) -> float:
        if config.train.lr == 3e-3:
            raise ValueError("FloatingPointError: the held-out loss is nan")
        return 4.0

    wanted, runs = options(tmp_path, lrs=(1e-3, 3e-3)), FakeRuns(diverges)
    assert study(wanted, runs) == 0
    assert {config.train.lr for config in runs.configs if config.run.seed} == {1e-3}
    assert (
        "| hsplitlora | uneven | 4.000 | failed | 0.001, an end of the grid |" in (wanted.out / "table.md").read_text()
    )


def test_a_learning_rate_that_nobody_has_tried_has_not_failed(tmp_path):
    wanted = options(tmp_path, lrs=(1e-3, 3e-3))
    Study(wanted, BASES, FakeRuns(), Console(quiet=True)).report()
    assert "failed" not in (wanted.out / "table.md").read_text()
    study(options(tmp_path, lrs=(1e-3, 3e-3), methods=("splitlora",)), FakeRuns())
    Study(wanted, BASES, FakeRuns(), Console(quiet=True)).report()
    table = (wanted.out / "table.md").read_text()
    assert "| hsplitlora | uneven | - | - | none |" in table
    assert "| splitlora | uneven | 4.000 | 4.000 | 0.001, an end of the grid |" in table


def test_central_methods_run_once_and_stand_in_every_setting(tmp_path):
    wanted = options(tmp_path, methods=("hsplitlora", "cenlora"), target=3.0, seeds=(1,))
    runs = FakeRuns()
    study(wanted, runs)
    assert [method for _, method, _, _ in runs.ran].count("cenlora") == 1
    found = numbers(wanted)["summary"]
    assert found["uneven"]["cenlora"] == found["even"]["cenlora"]
    assert found["even"]["cenlora"]["final_perplexity"]["n"] == 1

    again = FakeRuns()
    study(options(tmp_path, methods=("cenlora",), target=3.0, seeds=(1,), settings=("even",)), again)
    assert again.ran == []  # clients make no difference to it


def test_settings_that_differ_in_more_than_clients_cannot_share_a_central_run(tmp_path):
    bases = BASES | {"even": vary(EVEN, {"train.rounds": 3})}
    with pytest.raises(ConfigError, match=r"cenlora has no clients .* differ in train\.rounds"):
        study(options(tmp_path, methods=("cenlora", "splitlora")), FakeRuns(), bases)


def test_tuning_needs_rows_that_are_kept_apart():
    with pytest.raises(ConfigError, match=r"data\.source=dialogues cannot keep held-out rows"):
        tuning_changes(Options(), Config())


def test_what_is_finished_is_drawn(tmp_path):
    wanted = options(tmp_path, methods=("hsplitlora", "cenlora", "fedit"), target=3.0)
    fails = FakeRuns(lambda config: 4.0 if config.method.name != "fedit" else [][0])
    done = Study(wanted, BASES, fails, Console(quiet=True))
    done.run()
    drawn = plot(done.comparison(), tmp_path)
    assert [path.name for path in drawn] == [
        "uneven-rounds.png",
        "uneven-bytes.png",
        "even-rounds.png",
        "even-bytes.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    empty = Comparison(["uneven"], ["hsplitlora"], [1], [], 3.0)
    assert plot(empty, tmp_path) == []


@pytest.mark.parametrize("setting", ["heterogeneous", "homogeneous", "scarce"])
def test_every_method_has_a_valid_config_in_every_setting(setting):
    config, launcher = compose_setting(setting, ["data.path=somewhere", "train.steps=2"])
    assert (launcher.engine, launcher.cpus, launcher.superlink) == ("process", 1, "")
    assert (config.clients.count, config.train.rounds, config.train.steps, config.plan.over_budget) == (5, 4, 2, True)
    for method in METHODS:
        assert vary(config, {"method.name": method}).method.name == method


@pytest.mark.parametrize(
    "setting, keys",
    [
        ("homogeneous", {"clients.memory_gb", "clients.gflops", "data.partition"}),
        ("scarce", {"clients.memory_gb", "plan.server_memory_gb", "lora.ranks"}),
    ],
)
def test_settings_differ_where_they_say_so(setting, keys):
    uneven, other = (
        compose_setting(name, ["data.path=somewhere"])[0].to_run_config() for name in ("heterogeneous", setting)
    )
    assert {key for key in uneven if uneven[key] != other[key]} == keys


def test_the_command_line():
    found = parse(["data.path=x", "--seeds", "4,5", "--lrs", "1e-3", "train.rounds=3", "--target", "4.5", "--keep"])
    assert (found.seeds, found.lrs, found.target, found.keep) == ((4, 5), (1e-3,), 4.5, True)
    assert found.overrides == ("data.path=x", "train.rounds=3")
    assert found.methods == tuple(METHODS)
    assert parse([]) == Options()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["train.lr=1"], "train.lr=1: this is what a comparison chooses"),
        (["+method.name=full"], "method.name=full: this is what a comparison chooses"),
        (["--methods", "hsplitlora,lora"], "--methods: unknown lora"),
        (["--methods", "hsplitlora,hsplitlora"], "each once"),
        (["--methods", "hsplitlora"], "--target=splitlora is not among --methods"),
        (["--target", "nan"], "--target=nan must be a perplexity above 0"),
        (["--seeds", "0,1"], "--tune-seed=0 is among --seeds"),
        (["--seeds=-1"], "at least 0"),
        (["--leaders", "lora", "--more-seeds", "4"], "--leaders: lora is not among --methods"),
        (["--more-seeds", "3,4"], "--seeds=1,2,3,3,4 must name one or more, each once"),
        (["--at-once=-1"], "--at-once=-1 must be at least 1"),
        (["--lrs", "0,1"], "must be numbers above 0"),
        (["--settings", "nowhere"], "nowhere"),
        (["data.path=x", "train.rounds=0"], "train.rounds=0 is out of range"),
        (["data.path=x", "data.pth=y"], "pth"),
        (["--settings=homogeneous", "data.path=nowhere"], "cannot read"),
    ],
)
def test_wrong_settings_have_status_2(arguments, text, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert text in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
