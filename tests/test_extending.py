"""The examples of docs/extending.md: each is one file of somebody else's package, and does what the page says."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import AuthenticationError
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from transformers import LlamaConfig

from hsplitlora_flwr import CutTransform, server_app, split_client_app
from hsplitlora_flwr.config import Config, ConfigError, DataConfig, TrainConfig, TransportConfig, names
from hsplitlora_flwr.data.sources import READERS, DataError, Example, load_text, read_rows
from hsplitlora_flwr.lora.aggregation import RULES, AggregationError, aggregate
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.planning.cost import CostModel, Workload
from hsplitlora_flwr.registry import Registry
from hsplitlora_flwr.reporting import EVENTS_FILE, event_text, read_events
from hsplitlora_flwr.reporting.report import RunReport, make_listeners
from hsplitlora_flwr.training.schedule import AdapterOptimizer, farthest
from hsplitlora_flwr.transport import stream
from hsplitlora_flwr.transport.codecs import WireError, pack, packed_bytes, unpack
from hsplitlora_flwr.transport.frames import Activation, Finish, Finished, Frame
from hsplitlora_flwr.transport.link import Handler
from hsplitlora_flwr.transport.stream import StreamServer
from tests.grid import LocalGrid
from tests.server.test_strategy import DOUBLE, grid_of, run, settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
REGISTRIES: list[Registry[Any]] = [RULES, READERS, *(r for r in vars(names).values() if isinstance(r, Registry))]

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports the example that the page calls ``my_package/<name>.py``; what it registers is forgotten after."""
    examples = dict(re.findall(r"^```python\n# (my_package/\w+\.py)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.M))
    (tmp_path / "my_package").mkdir()
    for path, code in examples.items():
        (tmp_path / path).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [(registry, dict(registry._items), dict(registry._names)) for registry in REGISTRIES]
    yield lambda name: importlib.import_module(f"my_package.{name}")
    for registry, items, known in before:
        registry._items, registry._names = items, known
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def factors(generator: torch.Generator, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    b, a = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((6, rank), (rank, 5)))
    return scale * b, a


def test_a_rule_of_ones_own(load: Load) -> None:
    load("rules")
    generator = torch.Generator().manual_seed(0)
    pairs = [factors(generator, rank, scale) for rank, scale in ((2, 1.0), (3, 50.0), (1, 0.1))]
    b, a = aggregate([{"layer": pair} for pair in pairs], [1, 1, 2], "clipped")["layer"]
    products = [(b @ a).numpy() for b, a in pairs]
    norms = [np.sqrt((product**2).sum()) for product in products]
    middle = sorted(norms)[1]
    expected = sum(
        share * min(1, middle / norm) * product
        for share, norm, product in zip((0.25, 0.25, 0.5), norms, products, strict=True)
    )
    np.testing.assert_allclose((b @ a).numpy(), expected, rtol=1e-12)


def test_a_method_of_ones_own_trains(load: Load, tiny_folder: Path, tmp_path: Path) -> None:
    load("rules")
    summary = run(settings(tiny_folder, tmp_path, **{"method.name": "hsplitlora-clipped"}), tmp_path)
    assert summary["status"] == "finished" and summary["config"]["method.name"] == "hsplitlora-clipped"
    assert METHODS["hsplitlora-clipped"].rule == "clipped"


def test_a_codec_of_ones_own(load: Load) -> None:
    load("codecs")
    tensor = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, scale = pack(tensor, "four_bits")
    assert values.numel() + 4 * scale.numel() == packed_bytes((2, 3, 9), "four_bits") == 2 * 3 * (5 + 4)
    back = unpack(values, scale, torch.float64, "cpu", "four_bits", (2, 3, 9)).numpy()
    steps = np.abs(tensor.numpy()).max(-1, keepdims=True) / 7
    np.testing.assert_allclose(back, np.round(tensor.numpy() / steps) * steps, rtol=1e-6)
    Config.from_run_config({"transport.up": "four_bits", "transport.down": "four_bits"})


@pytest.mark.parametrize("changes", [{}, {"split.labels": "client"}, {"transport.kind": "messages"}], ids=str)
def test_a_codec_of_ones_own_carries_a_run(
    load: Load, changes: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    load("codecs")
    wires = {"transport.up": "four_bits", "transport.down": "four_bits"}
    if not changes:
        summary = run_short(tiny_folder, tmp_path / "plain")
        plain = [client["frame_bytes_per_token"] for client in summary["rounds"][0]["clients"]]
    summary = run_short(tiny_folder, tmp_path / "packed", **wires, **changes)
    [done] = summary["rounds"]
    assert summary["status"] == "finished" and len(done["clients"]) == 2
    assert all(loss > 0 for client in done["clients"] for loss in client["losses"])
    if not changes:  # 32 numbers of 4 bytes become 16 bytes and a scale
        packed = [client["frame_bytes_per_token"] for client in done["clients"]]
        assert all(few < many / 3 for few, many in zip(packed, plain, strict=True))


def test_plans_count_a_codec_of_ones_own(load: Load) -> None:
    load("codecs")
    model = CostModel(LlamaConfig(hidden_size=64, num_hidden_layers=2), find_family(LlamaConfig()), Workload(2, 5))
    ids = 2 * 8 * 2 * 5
    assert model.wire_bytes("four_bits", "four_bits") == (2 * 5 * (32 + 4) + ids, 2 * 5 * (32 + 4))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda values, scale: (values[..., :-1], scale), "uint8"),
        (lambda values, scale: (values.to(torch.int8), scale), "int8"),
        (lambda values, scale: (values, scale[0]), "float32"),
        (lambda values, scale: (values, scale.double()), "float64"),
        (lambda values, scale: (values, scale * float("inf")), "not finite"),
    ],
)
def test_what_is_not_of_the_codec_is_refused_before_it_is_decoded(
    load: Load, changed: Callable[..., Any], said: str
) -> None:
    load("codecs")
    values, scale = changed(*pack(torch.ones(2, 3, 8), "four_bits"))
    with pytest.raises(WireError, match=said):
        unpack(values, scale, torch.float32, "cpu", "four_bits", (2, 3, 8))


@pytest.mark.parametrize("broken", ["layout", "shape"])
def test_a_codec_that_breaks_its_layout_is_named(load: Load, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = load("codecs").FourBits
    if broken == "layout":
        monkeypatch.setattr(codec, "encode", lambda self, tensor: (tensor, tensor[..., 0]))
        with pytest.raises(WireError, match=r"as four_bits is torch\.uint8"):
            pack(torch.ones(2, 8), "four_bits")
    else:
        packed = pack(torch.ones(2, 8), "four_bits")
        monkeypatch.setattr(codec, "decode", lambda self, values, scale, shape, dtype, device: values)
        with pytest.raises(WireError, match=r"codec four_bits made torch\.uint8"):
            unpack(*packed, torch.float32, "cpu", "four_bits", (2, 8))


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_transport_of_ones_own_gives_the_adapters_of_the_stream(
    load: Load, labels: str, tiny_folder: Path, tmp_path: Path
) -> None:
    load("sockets")
    same = {"method.name": "hsplitlora-no-armsc", "split.point": 2, "split.labels": labels, **DOUBLE}
    over = {}
    for kind in ("stream", "local_sockets"):
        summary = run_short(tiny_folder, tmp_path / kind, **same, **{"transport.kind": kind})
        clients = summary["rounds"][0]["clients"]
        measured = summary["rounds"][0]["client_perplexity"]["all"]
        over[kind] = [measured, *(loss for client in clients for loss in client["losses"])]
        assert all(client["bytes_up"] > client["frame_bytes_per_token"] > 0 for client in clients)
    assert over["local_sockets"] == pytest.approx(over["stream"], rel=1e-9)


def test_a_transport_of_ones_own_lets_one_client_in_and_tells_failures(load: Load) -> None:
    transport = load("sockets")
    ended, port = Event(), transport.Port(TransportConfig())

    def handler(frame: Frame) -> Frame:
        if isinstance(frame, Finish) and frame.previous_grad_norm_sq:
            raise ValueError("no such square")
        return Finished()

    ticket = port.serve(handler, 1000, ended.set, "client 0")
    with pytest.raises(AuthenticationError), transport.connect(ticket._replace(token="guess"), TransportConfig()):
        pass
    assert ended.wait(300)
    ended.clear()
    with transport.connect(port.serve(handler, 1000, ended.set, "client 0"), TransportConfig()) as link:
        link.send(Finish(0.0))
        assert isinstance(link.receive(), Finished)
        link.send(Finish(1.0))
        with pytest.raises(RuntimeError, match="no such square"):
            link.receive()
    assert ended.wait(300)
    port.stop()


def test_an_optimizer_of_ones_own(load: Load, tiny_folder: Path, tmp_path: Path) -> None:
    load("optimizers")
    train = TrainConfig(optimizer="adagrad", lr=0.1, clip=0.0, weight_decay=0.0)
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    mine = AdapterOptimizer([parameter], train)
    expected, total = np.ones((3, 4)), np.zeros((3, 4))
    for step in range(3):
        gradient = np.arange(12.0).reshape(3, 4) - 5 + step
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        mine.step(step, 0.0)
        total += gradient**2
        expected -= 0.1 * gradient / (np.sqrt(total) + 1e-10)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5)
    kept = [tensor for name, tensor in mine.tensors().items() if not name.endswith("adapter") and tensor.ndim]
    assert [tensor.shape for tensor in kept] == [parameter.shape]
    assert Workload(1, 1, optimizer="adagrad").adapter_parameter_bytes == 4 * (1 + 1 + 1)
    assert farthest(train, 0, 3, 12) == float("inf")
    summary = run_short(tiny_folder, tmp_path, **{"train.optimizer": "adagrad", "transport.kind": "messages"})
    assert summary["status"] == "finished"


def run_short(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return changed_run(split_client_app(), folder, model, **changes)


def test_a_file_format_of_ones_own(load: Load, tmp_path: Path) -> None:
    load("formats")
    rows = ["question,answer,topic"] + [f"what is {i}?,number {i},{'odd' if i % 2 else 'even'}" for i in range(10)]
    (tmp_path / "notes.CSV").write_text("\n".join(rows))
    expected = Example("what is 3?\n", "number 3", "odd")
    config = DataConfig("jsonl", path=str(tmp_path / "notes.CSV"), group_field="topic", eval_rows=2)
    text = load_text(config, seed=0)
    assert len(text.train) == 8 and expected in (*text.train, *text.held_out)
    assert sorted(example.group for example in text.held_out) == ["even", "odd"]
    assert read_rows(str(tmp_path / "notes.CSV"))[3] == replace(expected, group="")
    with pytest.raises(DataError, match=r"notes\.CSV: example 1 has no group, by which data\.partition=natural"):
        load_text(replace(config, group_field="group"), seed=0)
    (tmp_path / "bad.csv").write_text("question,answer\nwhat?,")
    with pytest.raises(DataError, match=r"bad\.csv: a row without an 'answer'"):
        read_rows(str(tmp_path / "bad.csv"))
    with pytest.raises(DataError, match=r"cannot read .*absent\.csv"):
        read_rows(str(tmp_path / "absent.csv"))


@pytest.mark.parametrize("example", [Example("a", " "), "a text", ("a", "b", "")])
def test_what_a_reader_makes_is_checked(load: Load, example: Any, tmp_path: Path) -> None:
    READERS.register(".own", lambda *_: [Example("a", "b"), example])
    with pytest.raises(DataError, match="example 2 has no completion"):
        read_rows(str(tmp_path / "file.own"))


def test_a_source_of_ones_own_trains(load: Load, tiny_folder: Path, tmp_path: Path) -> None:
    load("formats")
    summary = run_short(tiny_folder, tmp_path, **{"data.source": "sums"})
    assert summary["status"] == "finished" and summary["config"]["data.source"] == "sums"
    assert sum(client["examples"] for client in summary["rounds"][0]["clients"]) == 90 - 2 * 4


def test_a_listener_of_ones_own(load: Load, tmp_path: Path) -> None:
    load("tracker")
    config = Config.from_run_config({"run.listeners": "loss_table"})
    report = RunReport(tmp_path, config.to_run_config(), make_listeners(config, tmp_path))
    told = {"round": 1, "rounds": 2, "client": "0", "steps": 9, "tokens": 5, "all_tokens": 7}
    for step, loss in ((1, 2.5), (2, 2.25)):
        report.step(step=step, loss=loss, **told)
    assert (tmp_path / "losses.csv").read_text() == "round,client,step,loss\n1,0,1,2.5\n1,0,2,2.25\n"


def test_the_server_app_makes_the_listeners_that_a_run_names(load: Load, tiny_folder: Path, tmp_path: Path) -> None:
    load("tracker")
    values = settings(tiny_folder, tmp_path, **{"run.listeners": "loss_table", "train.rounds": 1}).to_run_config()
    server_app.app(grid_of(), Context(1, 0, {}, RecordDict(), dict(values)))
    rows = (tmp_path / "losses.csv").read_text().splitlines()[1:]
    steps = [event for event in read_events(tmp_path / EVENTS_FILE)[0] if event["kind"] == "step"]
    assert rows == [f"{step['round']},{step['client']},{step['step']},{step['loss']}" for step in steps]
    assert len(rows) == 9


def test_listeners_that_nobody_registered_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.listeners names wandb, mlflow, which is not registered"):
        Config.from_run_config({"run.listeners": "wandb, mlflow"})


class Seen(StreamServer):
    """Notes what comes up."""

    norms: ClassVar[list[float]] = []

    def admit(self, handler: Handler, *arguments: Any, **more: Any) -> str:
        def noted(frame: Frame) -> Frame:
            if isinstance(frame, Activation):
                self.norms.append(float(torch.linalg.vector_norm(frame.cut, dim=-1).max()))
            return handler(frame)

        return super().admit(noted, *arguments, **more)


def changed_run(app: ClientApp, folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    nodes = {10 + i: {"partition-id": i, "num-partitions": 2, "memory-gb": 30.0} for i in range(2)}
    config = settings(model, folder, **{"train.rounds": 1, "evaluation.client_rows": 4, "clients.count": 2} | changes)
    return run(config, folder, LocalGrid(app, nodes))


def test_a_cut_transform_of_ones_own(
    load: Load, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("noisy_app")
    monkeypatch.setattr(module, "LONGEST", 1e-3)
    monkeypatch.setattr(module, "NOISE", 0.0)
    monkeypatch.setattr(stream, "StreamServer", Seen)
    Seen.norms.clear()
    summary = changed_run(module.app, tmp_path, tiny_folder)
    assert len(Seen.norms) > 2 * 3 and max(Seen.norms) <= 1.001e-3, "of the probe, the steps and the evaluation"
    named = [row["cut_transform"] for row in (*summary["plans"][0]["clients"], *summary["rounds"][0]["clients"])]
    assert named == ["clip 5, noise 0.1"] * 4
    [plan] = [event for event in read_events(tmp_path / EVENTS_FILE)[0] if event["kind"] == "planned"]
    assert "of 4, clip 5, noise 0.1" in (event_text(plan) or "")


def test_noise_is_the_same_over_messages_and_another_in_every_run(
    load: Load, tiny_folder: Path, tmp_path: Path
) -> None:
    secret = CutTransform("noise", load("noisy_app").clip_and_blur)
    repeated = replace(secret, reproducible=True)
    fixed = {"plan.probe_every": 0, "method.name": "hsplitlora-no-armsc", "split.point": 2, **DOUBLE}

    def losses(name: str, transform: CutTransform, kind: str = "stream") -> list[float]:
        app = split_client_app(cut_transform=transform)
        summary = changed_run(app, tmp_path / name, tiny_folder, **fixed, **{"transport.kind": kind})
        return [loss for client in summary["rounds"][0]["clients"] for loss in client["losses"]]

    same = losses("stream", repeated)
    assert losses("messages", repeated, "messages")[0] == pytest.approx(same[0], rel=1e-12)
    one, other = losses("one", secret)[0], losses("other", secret)[0]
    assert min(abs(one - other), abs(one - same[0])) > 1e-9


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda b, a: (b, a[:, :-1]),
            r"rule 'theirs' made B \(6, 2\) and A \(2, 4\) of a layer of \(out, in\) = \(6, 5\)",
        ),
        (lambda b, a: (b[:, :1], a), "theirs"),
        (lambda b, a: (b * float("nan"), a), "rule 'theirs' made numbers that are not finite"),
    ],
)
def test_what_a_rule_makes_is_checked(load: Load, made: Callable[..., Any], said: str) -> None:
    RULES.register("theirs", lambda pairs, shares: made(*pairs[0]))
    pair = factors(torch.Generator().manual_seed(0), 2, 1.0)
    with pytest.raises(AggregationError, match=said):
        aggregate([{"layer": pair}], [1], "theirs")
