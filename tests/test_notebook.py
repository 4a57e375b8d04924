"""The notebook of the first example: whole, without outputs, and with commands and settings that there are.

It was executed as it stands; that takes minutes, and the run in it is that of tests/system/test_smollm2.py.
"""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from hsplitlora_flwr.cli.__main__ import COMMANDS
from hsplitlora_flwr.cli.overrides import check_keys

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "first-example.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def commands() -> list[list[str]]:
    """What its cells hand to a shell, those that it only proposes included."""
    typed = [line.removeprefix("!") for code in CODE for line in code.splitlines() if line.startswith("!")]
    blocks = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
    typed += [line for block in blocks for line in block.splitlines() if line.startswith("hsplitlora ")]
    return [shlex.split(line) for line in typed]


def test_cells_are_python_or_commands_and_hold_no_outputs() -> None:
    for code in CODE:
        ast.parse("\n".join("pass" if line.startswith(("!", "%")) else line for line in code.splitlines()))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)


@pytest.mark.parametrize("typed", commands(), ids=" ".join)
def test_commands_and_settings_are_there(typed: list[str]) -> None:
    program, command, *arguments = typed
    assert program == "hsplitlora" and command in COMMANDS
    check_keys([each for each in arguments if "=" in each and not each.startswith("-")])
