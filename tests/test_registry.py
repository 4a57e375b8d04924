"""Names that others register, and how the modules that do so become known."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.config.names import KNOWN_METHODS
from hsplitlora_flwr.methods import METHODS as RESOLVED
from hsplitlora_flwr.methods import Method
from hsplitlora_flwr.registry import PluginError, Registry, import_plugins

LATE: Registry[int] = Registry("number", "one", home="at_home")


def test_names_are_known_before_what_they_stand_for() -> None:
    registry: Registry[int] = Registry("number", "one", "two")
    assert list(registry) == ["one", "two"] and "one" in registry and "three" not in registry
    assert registry.register("two", 2) == 2
    registry.register("three", 3)
    assert registry["two"] == 2 and list(registry) == ["one", "two", "three"]
    with pytest.raises(KeyError):
        registry["four"]


def test_what_a_name_stands_for_is_brought_in_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "at_home.py").write_text("from tests.test_registry import LATE\nLATE.register('one', 1)\n")
    assert list(LATE) == ["one"] and "one" in LATE and "two" not in LATE
    assert "at_home" not in sys.modules, "to know a name takes no more than the name"
    assert LATE["one"] == 1


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a=b", "-a", "a\n", "a/b"])
def test_a_name_is_one_word(name: str) -> None:
    with pytest.raises(PluginError, match="number"):
        Registry[int]("number").register(name, 1)


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(PluginError, match="method 'fedit' is registered already"):
        RESOLVED.register("fedit", Method(""))


def test_every_name_of_the_schema_stands_for_something() -> None:
    assert all(isinstance(RESOLVED[name], Method) for name in KNOWN_METHODS)


@pytest.mark.parametrize(("field", "value"), [("half", "own"), ("ranks", "equals"), ("init", "zero")])
def test_a_method_that_says_what_there_is_not_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='{value}'"):
        Method("", **{field: value})  # type: ignore[arg-type]


def installed(folder: Path, code: str, module: str = "their_rules") -> None:
    """A package with an entry point, as pip lays it down."""
    (folder / f"{module}.py").write_text(code)
    facts = folder / f"{module}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[hsplitlora_flwr.plugins]\nany = {module}\n")


REGISTERS = (
    "from hsplitlora_flwr.methods import METHODS, register_method\nregister_method('theirs', METHODS['fedit'])\n"
)
CHOOSES = """
import sys
sys.path.insert(0, {folder!r})
from hsplitlora_flwr.config import Config, KNOWN_METHODS
Config()
assert "their_rules" not in sys.modules, "nobody asked for it"
print(Config.from_run_config({{"method.name": "theirs"}}).method.name, "theirs" in list(KNOWN_METHODS))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


def test_an_installed_package_is_imported_when_a_name_is_not_known(tmp_path: Path) -> None:
    installed(tmp_path, REGISTERS)
    ended = run(CHOOSES.format(folder=str(tmp_path)))
    assert ended.stdout.split() == ["theirs", "True"], ended.stderr


def test_an_installed_package_that_is_broken_is_named(tmp_path: Path) -> None:
    installed(tmp_path, "import a_package_that_is_not_there\n")
    ended = run(CHOOSES.format(folder=str(tmp_path)))
    last = ended.stderr.strip().splitlines()[-1]
    assert "Error: " in last and "their-rules is installed with the plugin 'their_rules'" in last
    assert "No module named 'a_package_that_is_not_there'" in last


def test_modules_that_a_run_names_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("seen_first", "seen_second"):
        (tmp_path / f"{name}.py").write_text("")
    import_plugins({"run.plugins": " seen_first, seen_second,"})
    assert {"seen_first", "seen_second"} <= sys.modules.keys()
    import_plugins({})
    with pytest.raises(PluginError, match=r"run\.plugins names 'not_there'.*No module named"):
        Config.from_mapping({"run": {"plugins": "not_there"}})


def test_settings_do_not_import_what_a_message_names() -> None:
    with pytest.raises(ConfigError, match=r"method\.name='theirs'"):
        Config.from_run_config({"run.plugins": "antigravity", "method.name": "theirs"})
    assert "antigravity" not in sys.modules


def test_every_method_has_a_row_in_the_docs_and_a_line_in_the_help() -> None:
    rows = re.findall(
        r"^\| (`[^|]*`) \|", (Path(__file__).parents[1] / "docs" / "methods.md").read_text(), re.MULTILINE
    )
    assert set(RESOLVED) <= {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert all(method.summary and method.source for method in RESOLVED.values())
