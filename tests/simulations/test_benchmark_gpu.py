"""The benchmark of a GPU, in small, where there is none; and what it needs to be installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simulations.benchmarks.common import Setup
from simulations.benchmarks.gpu import clients as clients_module
from simulations.benchmarks.gpu import gpu
from simulations.benchmarks.gpu import parts as parts_module
from simulations.benchmarks.gpu.cases import Case, Figure, Place
from simulations.benchmarks.gpu.clients import clients
from simulations.benchmarks.gpu.device import PeakBytes, sheet_tflops
from simulations.benchmarks.gpu.exact import MODELS, exact
from simulations.benchmarks.gpu.parts import Part

HERE = Place(torch.device("cpu"), small=True)


def test_what_fails_or_finds_no_time_is_said_and_hinders_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def good() -> Iterator[Figure]:
        yield Figure("speed", 2.0, at_least=1.0)
        yield Figure("error", 0.3, at_most=0.1, note="in bf16")

    def bad() -> Iterator[Figure]:
        yield Figure("first", 1.0)
        raise RuntimeError("out of\n memory")

    def broken(place: Place) -> Iterator[Case]:
        yield Case("one", good)
        raise ValueError("no such model")

    both = [Case("bad", bad), Case("good", good)]
    parts = {"a": Part(lambda place: iter(both), 60), "b": Part(broken, 60), "c": Part(lambda place: iter(both), -1)}
    monkeypatch.setattr(parts_module, "PARTS", parts)
    rows = list(gpu(Setup()))
    assert [(row["part"], row["case"], row["figure"], row["met"], row["note"]) for row in rows] == [
        ("a", "bad", "first", "", ""),
        ("a", "bad", "not run", "", "RuntimeError: out of memory"),
        ("a", "good", "speed", "yes", ""),
        ("a", "good", "error", "no", "in bf16"),
        ("b", "one", "speed", "yes", ""),
        ("b", "one", "error", "no", "in bf16"),
        ("b", "", "not run", "", "ValueError: no such model"),
        ("c", "bad", "not run", "", "the -1 s of this part are over"),
        ("c", "good", "not run", "", "the -1 s of this part are over"),
    ]
    assert len({tuple(row) for row in rows}) == 1


def test_goals_may_have_two_ends() -> None:
    assert [Figure("x", value, at_least=0.95, at_most=1.05).met for value in (0.9, 1.0, 1.1)] == [False, True, False]
    assert Figure("x", 1.0, at_least=0.95, at_most=1.05).goal == ">= 0.95, <= 1.05"
    assert Figure("x", 1.0).met is None


def test_every_kind_of_model_is_compared() -> None:
    names = [case.name for case in exact(HERE)]
    assert {f"{kind} {dtype}, labels server" for kind in MODELS for dtype in ("float32", "bfloat16")} <= set(names)
    case = next(case for case in exact(HERE) if case.name == "gpt2 float32, labels client")
    figures = list(case.run())
    assert [figure.met for figure in figures] == [True, True]
    assert float(figures[1].value) > 0  # it is two computations that are compared


def test_peak_of_tensors() -> None:
    held = torch.zeros(1000)
    with PeakBytes(HERE, [held, held[:10]]) as peak:
        torch.ones(500).add(1)
        torch.ones(200)
    assert peak.bytes == 4 * (1000 + 500 + 500)


def test_peaks_are_those_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA A100-SXM4-40GB": 312.0, "Other": 0.0}
    for name, tflops in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert sheet_tflops(Place(torch.device("cuda"), small=False)) == tflops


def test_clients_together_in_turn_and_as_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module, "SPLITS", (1, 3))
    [case] = clients(HERE, "none")
    assert case.name == "2 clients x 1 x 16"
    figures = list(case.run())
    values = {figure.name: figure.value for figure in figures}
    assert float(values["error_of_the_first_loss"]) < 1e-3
    assert 0.8 < float(values["predicted / measured"]) < 1.5
    goals = {figure.name: figure.goal for figure in figures if figure.goal}
    assert goals["together / in turn"] == ">= 2"
    assert goals["together / peft"] == ">= 0.9"


PLAIN_MACHINE = """
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

wanted, there = sys.argv[2:], set()
while wanted:
    name = wanted.pop().lower().replace("_", "-")
    if name not in there:
        there.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue
        wanted += [re.match("[A-Za-z0-9._-]+", need)[0] for need in needs if "extra ==" not in need]
for module, owners in packages_distributions().items():
    if not there.intersection(owner.lower().replace("_", "-") for owner in owners):
        sys.modules[module] = None
assert sys.modules["flwr"] is sys.modules["hydra"] is sys.modules["bitsandbytes"] is None

from simulations import benchmark
from simulations.benchmarks.gpu import clients, exact

exact.MODELS, clients.SPLITS = ["llama"], (1, 2)
sys.exit(benchmark.main(["gpu", "--small", "--out", sys.argv[1]]))
"""
INSTALLED = ("torch", "transformers", "peft", "accelerate", "safetensors", "scipy", "numpy", "rich", "psutil")


def test_beside_what_machines_with_gpus_have_it_needs_pydantic_alone(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_MACHINE, str(out), *INSTALLED, "pydantic"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    rows = written["benchmarks"]["gpu"]
    failed = {(row["part"], row["note"]) for row in rows if row["figure"] == "not run" and "Error" in row["note"]}
    assert [part for part, _ in failed] == ["clients 4bit"]
    assert "bitsandbytes" in failed.pop()[1]
    assert {row["part"] for row in rows} == {"card", "s1", "step", "clients bfloat16", "clients 4bit"}
    assert all(row["met"] == "yes" for row in rows if row["part"] == "s1")
    assert written["environment"]["gpus"] == "none"
