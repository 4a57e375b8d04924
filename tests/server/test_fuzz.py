"""Whatever a reply or a checkpoint holds, its readers say what is wrong with it, and nothing else happens.

``HSPLITLORA_FUZZ=10000000 pytest tests/server/test_fuzz.py`` tries a tenth as many replies and a fiftieth as many
checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.torch import save

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.lora.update import AccumulatedUpdate, UpdateError
from hsplitlora_flwr.messages import PACKET_TYPE, Description, ReplyError
from hsplitlora_flwr.planning import Budget
from hsplitlora_flwr.planning.planner import ClientPlan
from hsplitlora_flwr.server.checkpoint import ResumeError, RunState, check_resume, load_state, save_state
from hsplitlora_flwr.server.replies import MOST, read_outcome
from tests.fuzz import INPUTS, ODD, damage
from tests.server.test_replies import GOOD, LAYERS, ME, TASKS
from tests.server.test_strategy import settings

SHARES = 4
"""Independent parts, so that several processes can share the work."""

# ---------------------------------------------------------------------- replies

NUMBERS = [0, 1, -1, 2, 7, 129, 2**31, 2**63 - 1, -(2**63), 0.0, -0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf")]
TEXTS = ["", "1", "0.q", "x" * 65, "x" * 5000, "\x1b[2J", "\u202e", " 1", "\n", "float32"]
TENSORS = dict(zip(("0.q:B", "0.q:A"), GOOD.adapters["0.q"], strict=True))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool]
NAMES = ["0.q:B", "0.q:A", "0.q:dense", "0.v:B", "1.q:B", ":B", "0.q", "A"]


def header(data: bytes) -> bytes:
    return data[8 : 8 + struct.unpack_from("<Q", data)[0]]


def with_another_word(random: Random, text: bytes) -> bytes:
    """JSON with something odd in the place of a number, a text or a list in it."""
    words = json.loads(text)
    inside: Any = words
    while isinstance(inside, dict) and inside:
        key = random.choice(list(inside))
        if not isinstance(inside[key], dict) or random.random() < 0.3:
            inside[key] = "\x1a"
            break
        inside = inside[key]
    return json.dumps(words).encode().replace(b'"\\u001a"', random.choice(ODD))


def packet(random: Random) -> bytes:
    """Bytes where those of adapters should be."""
    good = save(TENSORS)
    match random.randrange(4):
        case 0:
            data = bytearray(good)
            for _ in range(random.choice((1, 1, 2, 4))):
                damage(random, data, [good, good[::-1]])
            return bytes(data)
        case 1:
            other = with_another_word(random, header(good))
            return struct.pack("<Q", len(other)) + other + good[8 + len(header(good)) :]
        case 2:
            shape = [random.choice((0, 1, 2, 4, 8)) for _ in range(random.randrange(4))]
            tensor = torch.ones(shape).to(random.choice(DTYPES))
            return save({**TENSORS, random.choice(NAMES): tensor})
        case _:
            tensor = random.choice((1e4, 1e38, -1e38, float("nan"), float("inf"), 0.0, 1e-45)) * torch.ones(4, 2)
            return save({**TENSORS, "0.q:B": tensor})


def any_record(random: Random) -> ArrayRecord | ConfigRecord | MetricRecord:
    """Of any kind, under names of this one or of others."""
    names = random.choices(
        [*vars(ME), "losses", "0.q", "0.v", "tokens", "nll", "label-tokens", ""], k=random.randrange(5)
    )
    numbers: dict[str, Any] = {name: random.choice(NUMBERS) for name in names}
    match random.randrange(4):
        case 0:
            return MetricRecord(numbers)
        case 1:
            return MetricRecord({name: [float(number)] * random.randrange(4) for name, number in numbers.items()})
        case 2:
            odd = [*TEXTS, True, b"", b"\xff", [1.0], ["x"], *NUMBERS]
            return ConfigRecord({name: random.choice(odd) for name in names})
        case _:
            data = random.randbytes(random.choice((0, 1, 8, 9, 100)))
            return ArrayRecord({"0": Array("uint8", (len(data),), random.choice((PACKET_TYPE, "numpy.ndarray")), data)})


def change(random: Random, records: RecordDict) -> None:
    """Something else in one place of a reply."""
    names = list(records)
    match random.randrange(6):
        case 0 if names:
            del records[random.choice(names)]
        case 1:
            records[random.choice((*names, "adapters", "x"))] = any_record(random)
        case 2:
            data = packet(random)
            records["adapters"] = ArrayRecord({"0": Array("uint8", (len(data),), PACKET_TYPE, data)})
        case 3:
            said = dict(records.config_records.get("description", {}))
            held = random.choice(ODD).decode("utf-8", "replace")
            said[random.choice([*vars(ME), "other"])] = random.choice([*NUMBERS, *TEXTS, held, True])
            records["description"] = ConfigRecord(said)
        case 4:
            metrics = dict(records.metric_records.get("metrics", {}))
            metrics[random.choice([*metrics, "x"])] = random.choice(NUMBERS)
            records["metrics"] = MetricRecord(metrics)
        case _:
            losses = [float(random.choice(NUMBERS)) for _ in range(random.choice((0, 1, 2, 2, 2, 3, 9)))]
            records["losses"] = MetricRecord({"losses": losses})


@pytest.mark.parametrize("share", range(SHARES))
def test_any_reply_is_what_was_asked_for_or_refused(share: int) -> None:
    random, count, good = Random(share), INPUTS // (10 * SHARES), 0
    for _ in range(count):
        task, outcome = TASKS[random.choice(list(TASKS))]
        records = RecordDict(dict(outcome.to_records()))
        for _ in range(random.choice((1, 1, 2, 3))):
            change(random, records)
        try:
            found = read_outcome(records, task, LAYERS)
        except ReplyError as error:
            assert str(error).isprintable() and len(str(error)) < 500
            continue
        good += 1
        assert len(found.losses) == task.steps and set(found.adapters) == set(outcome.adapters)
        assert all(0 <= value <= MOST for value in found.importance.values())
        for b, a in found.adapters.values():
            assert b.shape == (4, 2) and b.norm() < 1 and a.norm() < 10
        assert found.description.name.isprintable() and 0 < found.description.examples <= 1e12
        assert isinstance(found.description, Description) and found.description.budget
    assert 0 < good < count, "inputs of one kind alone show nothing"


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    return settings(tiny_folder, tmp_path / "new", **{"run.resume": str(tmp_path / "old")})


@pytest.fixture
def old(config: Config, tmp_path: Path) -> Path:
    """The folder of a run that has finished a round."""
    update = AccumulatedUpdate()
    update.add({"a": (torch.randn(8, 2), torch.randn(2, 8))})
    state = RunState(
        1,
        config.to_run_config(),
        update,
        start={"a": (torch.zeros(8, 2), torch.randn(2, 8))},
        optimizer={"a:A/adapter": torch.zeros(2, 3)},
        importance={"a": 0.5},
        planned_importance={"a": 0.5},
        plans={"x": ClientPlan(2, {"a": 4}, 12345, checkpointing=True)},
        planned_budgets={"x": Budget(10**9, up=1e6)},
    )
    save_state(state, tmp_path / "old")
    (tmp_path / "old" / "summary.json").write_text(
        '{"rounds": [{"round": 1}], "best": {"round": 1, "perplexity": 2.0}}'
    )
    return tmp_path / "old"


def damaged(random: Random, whole: bytes, others: list[bytes]) -> bytes:
    data = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 4))):
        damage(random, data, others)
    return bytes(data)


def with_other_content(random: Random, whole: bytes, others: list[bytes]) -> bytes:
    """JSON, or tensors, of the same form with something else in them."""
    if whole.startswith(b"{"):
        return with_another_word(random, whole)
    if random.random() < 0.5:
        other = with_another_word(random, header(whole))
        return struct.pack("<Q", len(other)) + other + whole[8 + len(header(whole)) :]
    names = random.sample(["a:B", "a:A", "a:dense", "a", ":B", "0/adapter", "a@1:B"], random.randrange(4))
    return save({name: torch.zeros(2, 3) for name in names}, {"states": "{}", "version": "1"})


def sign(folder: Path) -> None:
    """Make checksums of what is there, as somebody would who wants it to be taken."""
    file = folder / "state.json"
    try:
        text = json.loads(file.read_bytes())
        text["digests"] = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")
        }
        del text["checksum"]
        text["checksum"] = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps(text))
    except (ValueError, TypeError, KeyError, RecursionError):
        return


@pytest.mark.parametrize("made", [damaged, with_other_content])
@pytest.mark.parametrize("signed", [False, True], ids=["by mistake", "on purpose"])
def test_any_checkpoint_is_gone_on_from_or_refused(
    signed: bool, made: Callable[[Random, bytes, list[bytes]], bytes], old: Path, config: Config
) -> None:
    folder = old / "checkpoints" / "round-1"
    files = {path: path.read_bytes() for path in (*sorted(folder.iterdir()), old / "summary.json")}
    random, count, refused = Random(f"{made.__name__} {signed}"), INPUTS // 200, 0
    for _ in range(count):
        path = random.choice(list(files))
        path.write_bytes(made(random, files[path], list(files.values())))
        if signed:
            sign(folder)
        try:
            check_resume(config, Path(config.run.dir))
            state = load_state(config)
        except (ResumeError, ConfigError, UpdateError) as error:
            refused += 1
            assert len(str(error)) < 2000
        else:
            assert state.server_round == 1 and state.plans
        for file in (path, folder / "state.json"):
            file.write_bytes(files[file])
    assert refused
