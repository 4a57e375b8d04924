"""What methods differ in: an ablation changes one thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.methods import METHODS, keeps_half


@pytest.mark.parametrize(
    ("method", "other", "changes"),
    [
        ("hsplitlora-no-naa", "hsplitlora", {"rule": "zero_pad"}),
        ("hsplitlora-no-iwi", "hsplitlora", {"importance": False}),
        ("hsplitlora-no-armsc", "hsplitlora", {"ranks": "equal", "importance": False}),
        ("splitlora-v1", "splitlora", {"half": "per_client"}),
        ("fedex", "fedit", {"residual": True}),
    ],
)
def test_what_a_method_changes_of_another(method: str, other: str, changes: dict[str, Any]) -> None:
    own = METHODS[method]
    assert own == replace(METHODS[other], source=own.source, summary=own.summary, **changes)


@pytest.mark.parametrize("name", ["hsplitlora", "hsplitlora-no-naa", "splitlora", "splitlora-v1", "fedit", "cenlora"])
def test_whose_half_goes_on(name: str) -> None:
    keeps = {"hsplitlora", "hsplitlora-no-naa", "splitlora"}
    assert keeps_half(Config.from_run_config({"method.name": name})) == (name in keeps)
    for key, value in {"server.between_rounds": "renew", "server.half": "per_client"}.items():
        other = Config.from_run_config({"method.name": name, key: value})
        assert keeps_half(other) == (name == "splitlora" and key == "server.half")


@pytest.mark.parametrize("name", ["hsplitlora", "splitlora", "flora"])
def test_a_residual_needs_one_adapter_of_a_whole_model(name: str) -> None:
    with pytest.raises(ValueError, match="residual of a method is for one global adapter"):
        replace(METHODS[name], residual=True)
