"""The examples of docs/extending.md: each is one file of somebody else's package, and does what the page says."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hsplitlora_flwr import config
from hsplitlora_flwr.lora.aggregation import RULES, AggregationError, aggregate
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.registry import Registry
from tests.server.test_strategy import run, settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
REGISTRIES: list[Registry[Any]] = [RULES, *(r for r in vars(config).values() if isinstance(r, Registry))]

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
    for registry, items, names in before:
        registry._items, registry._names = items, names
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
